"""Tables that read back as they were, and figures that exist and do not change."""

from __future__ import annotations

import re
from dataclasses import replace

import pandas
import pytest

from fluid_eval.common.stats import Interval
from fluid_eval.sweeps.captions import caption, write
from fluid_eval.sweeps.frontier_figure import draw, figure, svg
from fluid_eval.sweeps.frontier_files import table, write_tables
from fluid_eval.sweeps.label_places import in_short
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
    assert "2 & [b] & -- &" in text, "a row break takes a bracket that follows for a length"
    lines = text.splitlines()
    assert (lines[0], lines[-1]) == (r"\begin{tabular}{lllllllll}", r"\end{tabular}")
    assert [line for line in lines if line.endswith("rule")] == [r"\toprule", r"\midrule", r"\bottomrule"]
    rows = [line for line in lines if line.endswith(r" \\")]
    assert [row.count(" & ") for row in rows] == [8, 8, 8]


@pytest.mark.slow
def test_figures_are_vectors_of_one_column_with_text(sweep, tmp_path):
    images = []
    for by in ("tokens_per_forward", "forwards_per_answer", "forwards_per_answer"):
        assert draw(sweep, tmp_path, by=by, baseline="ar")
        images.append([(tmp_path / f"frontier-{by}.{kind}").read_bytes() for kind in ("svg", "pdf", "png")])
    assert images[1] == images[2], "the same bytes for the same numbers"
    assert len({file.stem for file in tmp_path.iterdir()}) == 2, "one speed's figure does not overwrite another's"
    svg, pdf, png = images[1]
    assert b">forwards/answer</text>" in svg, "text is text"
    assert b"/FontFile2" in pdf, "TrueType is embedded"
    assert b"/Type3" not in pdf
    assert re.search(rb"/MediaBox \[ 0 0 237\.6 ", pdf), "3.3 inches wide"
    assert png.startswith(b"\x89PNG")


def texts_of(figure) -> list[str]:
    """Its labels, then its legend."""
    legend = [text.get_text() for text in figure.legends[0].get_texts()] if figure.legends else []
    return [note.get_text() for note in figure.axes[0].texts] + legend


def marks_of(drawn) -> dict:
    """The mark of each point, by its name."""
    return {line.get_gid().split(":")[1].strip(): line for line in drawn.axes[0].lines if line.get_gid()}


def test_the_figure_says_what_every_point_is(tmp_path):
    """Shape: decoder and verification. Label: settings on the frontier, numbers in the table elsewhere."""
    base = placed("ar", 0.7, 30.0, {"decoder.name": "ar"}, method="ar")
    fast = {"decoder.name": "fluid", "decoder.verify": True, "decoder.confidence": 0.9}
    front = placed("fast", 0.8, 90.0, fast, method="fluid, verified")
    others = [
        placed(f"p{i}", 0.1 + 0.06 * i, 20.0 + 5 * i, {"decoder.confidence": i / 10}, method="fluid, unverified")
        for i in range(1, 9)
    ]
    behind = [replace(p, dominated_by="fast") for p in others]
    points = [front, *behind, base]
    drawn = figure(points, by="tokens_per_forward", baseline="ar")
    assert drawn is not None
    assert texts_of(drawn) == [
        "γ=0.9", "ar", *map(str, range(9, 1, -1)),
        "fluid, verified", "fluid, unverified", "baseline (ar)", "on the frontier", "dominated",
    ]  # fmt: skip
    assert table(points)["no"].tolist() == list(range(1, 11)), "the numbers are rows of the tables"
    markers = {name: line.get_marker() for name, line in marks_of(drawn).items()}
    assert (markers["fast"], markers["p1"], markers["p8"], markers["ar"]) == ("o", "^", "^", "*")
    assert "<title>p3: 28.0 [23.0, 33.0]% at 35.00 [" in svg(drawn), "and say their name when pointed at"


def test_points_on_one_another_share_a_label():
    same = [
        placed(f"γ {g}", 0.7, 50.0, {"decoder.confidence": g, "decoder.max_horizon": 8}, method="fluid, verified")
        for g in (0.5, 0.7, 0.9)
    ]
    other = placed("far", 0.4, 90.0, {"decoder.confidence": 0.5, "decoder.max_horizon": 4}, method="fluid, verified")
    drawn = figure([*same, other], by="tokens_per_forward")
    assert texts_of(drawn)[:2] == ["γ=0.5/0.7/0.9 K=8", "γ=0.5 K=4"]
    best = placed("best", 0.9, 95.0, {"decoder.confidence": 1.0})
    behind = [replace(p, dominated_by="best", settings={}) for p in (*same, other)]
    rest = [placed(f"{i}", 0.2 + i / 100, 40.0, dominated_by="best") for i in range(9)]
    assert "2-4" in texts_of(figure([best, *behind, *rest], by="tokens_per_forward")), "by their numbers"


def test_a_point_that_was_stopped_is_hollow(sweep):
    drawn = figure(sweep, by="tokens_per_forward", baseline="ar")
    colors = {name: line.get_mfc() for name, line in marks_of(drawn).items()}
    assert colors["50%_off"] == "white"
    assert len({colors["fast"], colors["slow"], "white"}) == 3


@pytest.mark.parametrize("n", [1, 40])
def test_figures_of_any_number_of_points(n):
    points = [placed(f"p{i}", 0.9 - i / 100, 10.0 + i, {"decoder.confidence": i}) for i in range(n)]
    assert figure(points, by="tokens_per_second")


def test_figures_of_equal_scores():
    """An interval of no width can miss its mean by a rounding error."""
    above, below = Interval(0.3, 0.1 + 0.2, 0.1 + 0.2, 9), Interval(0.1 + 0.2, 0.3, 0.3, 9)
    points = [Placed(name, {}, 9, score, score, None, None) for name, score in (("a", above), ("b", below))]
    assert figure(points, by="tokens_per_second", baseline="b")


def test_nothing_is_drawn_without_speeds(tmp_path):
    by = "tokens_per_second"
    assert not draw([placed("p", 0.5, None)], tmp_path, by=by)
    assert not list(tmp_path.iterdir())
    assert figure([placed("ar", 0.5, None), placed("p", 0.5, 3.0)], by=by, baseline="ar")
    with pytest.raises(ConfigError, match="baseline='x' is none of the points: p"):
        draw([placed("p", 0.5, 1.0)], tmp_path, by=by, baseline="x")


def test_settings_in_short():
    assert in_short([{"decoder.confidence": 0.9, "decoder.max_horizon": 16}]) == "γ=0.9 K=16"
    assert in_short([{"model.tau": 0.25, "decoder.verify": True}]) == "τ=0.25 verify"
    several = [{"decoder.verify": False, "model.path": "runs/x/tiny-fluid/", "a.b": None}]
    assert in_short(several) == "no verify tiny-fluid"
    assert in_short(several, without=["decoder.verify"]) == "tiny-fluid"
    assert in_short([{"a.n": n, "decoder.verify": n > 2} for n in range(6)]) == "n=0…5 no verify/verify"


def test_a_caption_states_n_hardware_and_settings(sweep, tmp_path):
    spec = {"tasks": ["a", "b"], "model": {"path": "x/tiny"}, "batch_size": "auto", "seed": 1, "limit": 5}
    engine = {"device": "cuda:0", "dtype": "bfloat16", "workers": 2, "threads": 1, "forward": "torch"}
    machine = {"processor": "x86_64", "cpus": 8, "versions": {"torch": "2.13.0"}, "engine": engine}
    runs = [({**spec, "decoder": {"name": "fluid", "verify": at > 1, "candidates": 4}}, machine) for at in range(5)]
    text = caption(sweep, runs, by="tokens_per_second", baseline="ar")
    assert text.startswith(
        "Score (a, b, mean over tasks) against tokens/s per worker of tiny: 4 points, n = 50 documents each, the first "
        "of each task."
    )
    assert "of tokens/s over 5 repeats taken in turns" in text
    assert "Grey points are dominated" in text
    assert "The dashed line is the score of ar." in text
    assert "In labels, γ is confidence, K max_horizon." in text
    assert "Settings: fluid with candidates 4; batch_size auto; seed 1." in text
    assert text.endswith("cuda:0, x86_64 with 8 CPUs, bfloat16, 2 workers, 1 thread, torch forward, torch 2.13.0.")
    other = (runs[0][0], {**machine, "engine": {**engine, "dtype": "float32"}})
    assert "bfloat16 or float32" in caption(sweep, [*runs[:4], other], by="tokens_per_second")
    write(text, tmp_path, "tokens_per_second")
    assert (tmp_path / "frontier-tokens_per_second.txt").read_text() == text + "\n"
    latex = (tmp_path / "frontier-tokens_per_second.tex").read_text()
    assert "\\includegraphics[width=\\columnwidth]{frontier-tokens_per_second.pdf}" in latex
    assert "x86\\_64" in latex


def test_a_caption_says_what_was_timed_once_who_is_left_out_and_whose_hardware_is_unknown(sweep):
    speed = Interval(40.0, float("nan"), float("nan"), 50)
    served = replace(
        placed("served", 0.72, None, repeats=0), tokens_per_second=speed, method="backend local-completions"
    )
    points = [*sweep[:2], served, replace(sweep[2], repeats=0)]
    spec = {"tasks": ["a"], "model": {"path": "x/tiny"}, "decoder": {"name": "fluid"}}
    here = {"processor": "x86_64", "cpus": 8, "engine": {"device": "cpu", "forward": "compiled"}}
    other = {**spec, "decoder": {"name": "local-completions"}, "backend": {"name": "local-completions", "args": {}}}
    away = {"processor": "client", "cpus": 1, "engine": {"device": None, "forward": "local-completions"}}
    runs = [(spec, here), (spec, here), (other, away), (spec, here)]
    text = caption(points, runs, by="tokens_per_second")
    assert (
        "of tokens/s over 5 repeats taken in turns; tokens/s of served, slow are of one run, without an interval. "
        "Tokens/s of served are by wall time of the backend's calls."
    ) in text
    assert "with and without verification, and backends." in text
    assert "Left out" not in text
    assert text.endswith(
        "Hardware: cpu, x86_64 with 8 CPUs, compiled forward. The hardware behind local-completions is not known."
    )
    counted = caption(points, runs, by="tokens_per_forward")
    assert "Left out, without tokens/forward (forwards of a backend are not known): served." in counted
    assert "3 points" in counted
    inside = {**away, "engine": {"device": "cpu", "forward": "hf"}}
    assert "hf forward" not in caption(points, [(spec, here), (other, inside)], by="tokens_per_second")
    many = [replace(served, name=f"s{n}") for n in range(9)]
    assert "are not known): 9 points." in caption([*points[:2], *many], runs, by="forwards_per_answer")
