"""Tables that read back as they were, and figures that exist and do not change."""

from __future__ import annotations

import pandas
import pytest

from fluid_eval.common.stats import Interval
from fluid_eval.sweeps.frontier_files import draw, short, table, write_tables
from fluid_eval.sweeps.pareto import Placed
from fluid_model.common.errors import ConfigError


def placed(name, score, speed, settings=None, **rest):
    pace = None if speed is None else Interval(speed, 0.9 * speed, 1.1 * speed, 50)
    return Placed(
        name,
        settings or {},
        50,
        Interval(score, score - 0.05, score + 0.05, 50),
        pace,
        pace,
        pace,
        **{"repeats": 5, **rest},
    )


@pytest.fixture
def sweep():
    """A baseline, a point of the frontier, a dominated one, a stopped one, one that wrote nothing."""
    settings = [
        {"decoder.confidence": g, "decoder.max_horizon": k, "odd": odd}
        for g, k, odd in ((0.9, 16, "auto"), (0.5, 4, 3), (0.7, 8, [1, 2]), (0.7, 4, None))
    ]
    return [
        placed("ar", 0.7, 100.0),
        placed("fast", 0.71, 1234.5678901234, settings[0]),
        placed("slow", 0.6, 50.0, settings[1], dominated_by="fast"),
        placed("50%_off", 0.5, 80.0, settings[2], dominated_by="fast", stopped="below fast | after 50"),
        placed("silent", 0.123456789012, None, settings[3]),
    ]


def test_tables_read_back(sweep, tmp_path):
    files = write_tables(sweep, tmp_path)
    assert [f.name for f in files] == ["frontier.csv", "frontier.parquet", "frontier.md", "frontier.tex"]
    rows = table(sweep)
    pandas.testing.assert_frame_equal(pandas.read_parquet(files[1]), rows)
    table_read = pandas.read_csv(files[0], float_precision="round_trip").convert_dtypes()
    numbers = rows.drop(columns=["odd", "stopped", "dominated_by", "name"])
    pandas.testing.assert_frame_equal(table_read[numbers.columns], numbers, check_dtype=False)
    assert rows.name.tolist() == table_read.name.tolist() == ["ar", "fast", "slow", "50%_off", "silent"]
    assert rows.score.tolist() == [70.0, 71.0, 60.0, 50.0, 12.3456789012]
    assert rows.score_low.tolist()[:2] == [65.0, 66.0]
    assert rows.tokens_per_second.tolist()[:4] == [100.0, 1234.5678901234, 50.0, 80.0]
    assert rows.tokens_per_second.isna().tolist() == [False] * 4 + [True]
    assert rows.dominated_by.dropna().tolist() == ["fast", "fast"]


def test_settings_keep_their_kind_or_become_text(sweep):
    rows = table(sweep)
    assert rows["decoder.max_horizon"].dtype == "Int64"
    assert rows["decoder.confidence"].dropna().tolist() == [0.9, 0.5, 0.7, 0.7]
    assert rows["odd"].dropna().tolist() == ["auto", "3", "[1, 2]"]
    assert rows.loc[0, ["odd", "decoder.max_horizon"]].isna().all()
    mixed = [placed(str(i), 0.5, 1.0, {"x": x}) for i, x in enumerate((1, 2.5))]
    assert table(mixed).x.tolist() == [1.0, 2.5]
    flags = [placed(str(i), 0.5, 1.0, {"x": x}) for i, x in enumerate((True, None, False))]
    assert table(flags).x.dtype == "boolean"
    lists = [placed(str(i), 0.5, 1.0, {"x": x}) for i, x in enumerate(([1, 2], [3, 4]))]
    assert table(lists).x.tolist() == ["[1, 2]", "[3, 4]"]
    with pytest.raises(ConfigError, match="setting 'score'"):
        table([placed("a", 0.5, 1.0, {"score": 1})])


def test_markdown_has_one_row_a_point(sweep, tmp_path):
    lines = write_tables(sweep, tmp_path)[2].read_text().splitlines()
    assert len(lines) == 2 + len(sweep)
    cells = [line.replace("\\|", "").count("|") for line in lines]
    assert len(set(cells)) == 1
    assert "| 71.0 [66.0, 76.0] | 1,235 [1,111, 1,358] |" in lines[3]
    assert lines[4].endswith("| dominated by fast |")
    assert lines[5].endswith("| dominated by fast; stopped: below fast \\| after 50 |")
    assert "| – | – |" in lines[2]
    silent = write_tables(sweep[-1:], tmp_path)[2].read_text()
    assert "tokens/s" not in silent


def test_latex_is_escaped(tmp_path):
    odd = placed("a&b%c$d#e_f{g}h~i^j\\k<l", 0.5, 1.0, {"x_y": "[1]"})
    text = write_tables([odd, placed("[b]", 0.5, 1.0)], tmp_path)[3].read_text()
    name = r"a\&b\%c\$d\#e\_f\{g\}h\textasciitilde{}i\textasciicircum{}j\textbackslash{}k\textless{}l"
    assert name + " & [1] &" in text
    assert r"x\_y" in text
    assert r"score (\%)" in text
    assert "\n{}[b] & -- &" in text, "a row break takes a bracket that follows for a length"
    lines = text.splitlines()
    assert (lines[0], lines[-1]) == (r"\begin{tabular}{llllllll}", r"\end{tabular}")
    assert [line for line in lines if line.endswith("rule")] == [r"\toprule", r"\midrule", r"\bottomrule"]
    rows = [line for line in lines if line.endswith(r" \\")]
    assert [row.count(" & ") for row in rows] == [7, 7, 7]


def test_figures_exist_and_do_not_change(sweep, tmp_path):
    images = []
    for by in ("tokens_per_forward", "forwards_per_answer", "forwards_per_answer"):
        assert draw(sweep, tmp_path, by=by, baseline="ar", title="$x$ & y")
        images.append((tmp_path / "frontier.svg").read_bytes())
    assert images[1].rstrip().endswith(b"</svg>")
    assert images[1] == images[2] != images[0]
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("n", [1, 40])
def test_figures_of_any_number_of_points(tmp_path, n):
    assert draw([placed(f"p{i}", 0.9 - i / 100, 10.0 + i, {"decoder.confidence": i}) for i in range(n)], tmp_path)


def test_figures_of_equal_scores(tmp_path):
    """An interval of no width can miss its mean by a rounding error."""
    above, below = Interval(0.3, 0.1 + 0.2, 0.1 + 0.2, 9), Interval(0.1 + 0.2, 0.3, 0.3, 9)
    points = [Placed(name, {}, 9, score, score, None, None) for name, score in (("a", above), ("b", below))]
    assert draw(points, tmp_path, baseline="b")


def test_nothing_is_drawn_without_speeds(tmp_path):
    assert not draw([placed("p", 0.5, None)], tmp_path)
    assert not list(tmp_path.iterdir())
    assert draw([placed("ar", 0.5, None), placed("p", 0.5, 3.0)], tmp_path, baseline="ar")
    with pytest.raises(ConfigError, match="baseline='x' is none of the points: p"):
        draw([placed("p", 0.5, 1.0)], tmp_path, baseline="x")


def test_settings_in_short():
    assert short({"decoder.confidence": 0.9, "decoder.max_horizon": 16}) == "γ=0.9 K=16"
    assert short({"model.tau": 0.25, "decoder.verify": True}) == "τ=0.25 verify"
    assert (
        short({"decoder.verify": False, "model.path": "runs/x/tiny-fluid/", "a.b": None}) == "no verify path=tiny-fluid"
    )
