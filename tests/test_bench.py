"""Benches run, and tell their bars in the form all of them share."""

from __future__ import annotations

import json
from typing import get_args, get_type_hints

import pytest

import fluid_eval
from bench import bars, decode, likelihood, scale, smol, smol_table
from bench.clock import side_by_side
from bench.field import __main__ as field
from bench.field import layouts, plan
from bench.prompts import mini
from fluid_model import Generation
from fluid_model.checkpoints import field_layouts
from fluid_model.engine.records import KINDS, Trace
from fluid_model.registry import BUILT_IN, decoder_named
from fluid_model.settings.block_diffusion import SdarSettings

from .test_gated import gated_checkpoint
from .tiny import fluid_checkpoint


def test_bars_are_told_in_two_forms():
    results = [bars.at_least("speed", 2.4999, 2.5), bars.at_most("waste", 0.1, 0.1), bars.Bar("shown", 3.0, "", None)]
    printed = json.loads(bars.render(results, as_json=True))["bars"]
    assert printed[0] == {"name": "speed", "measured": 2.5, "bar": "at least 2.5", "ok": False}
    assert [bar["ok"] for bar in printed] == [False, True, None]
    assert "| speed | 2.5 | at least 2.5 | **no** |" in bars.render(results, as_json=False)


def test_prompts_are_the_test_sets_levels_in_turn():
    prompts = mini(6)
    assert len(set(prompts)) == 6
    assert all(prompt.startswith("Question: ") and prompt.endswith("Answer:") for prompt in prompts)


@pytest.mark.slow
def test_decoding_is_measured(capsys):
    """Texts must be AR's; what is fast enough is not for a test of one run to say."""
    decode.main(["--quick", "--json", "--only", "identical", "--only", "forwards", "--only", "overhead"])
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])["bars"]
    texts = [bar for bar in printed if bar["name"].startswith("greedy text identical")]
    assert len(texts) == 2
    assert all(bar["ok"] for bar in texts)
    assert next(bar["measured"] for bar in printed if bar["name"].endswith("slots free")) > 1.5
    assert all(0 < bar["measured"] < 1 for bar in printed if bar["name"].startswith("host time over"))


def test_a_ratio_is_of_turns_and_order_alternates(monkeypatch):
    """A machine that is ten times as slow in one turn changes no ratio; the last turn alone is another."""
    now, called = [0.0], list[str]()
    slowness = iter([1, 1, 1, 1, 10, 10, 1, 2])

    def system(name, seconds):
        def call():
            called.append(name)
            now[0] += seconds * next(slowness)
            return 6

        return call

    monkeypatch.setattr("bench.clock.time.perf_counter", lambda: now[0])
    speeds = side_by_side({"one": system("one", 1), "two": system("two", 2)}, runs=1, seconds=34)
    assert called == ["one", "two", "one", "two", "two", "one", "one", "two"], "the first two warm up"
    assert speeds.runs == {"one": [6, 0.6, 6], "two": [3, 0.3, 1.5]}
    assert speeds["one"] == 6
    assert speeds.ratio("one", "two") == 2


@pytest.mark.slow
def test_likelihoods_are_measured(capsys, data_dir):
    likelihood.main(["--quick", "--json"])
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])["bars"]
    assert printed[0]["measured"] > 0
    assert printed[1]["ok"], "log-likelihoods are those of lm-eval's backend"


def test_a_gated_training_is_measured():
    """On random weights: the step runs forward and backward, and its share of a product's rate is a share."""
    child, parent = gated_checkpoint(vocabulary=1300, window=400)
    part = smol.training(smol.Pair(parent, child), smol.SmolWorkload(runs=1))
    assert 0 < part.bars[0].measured < 2
    assert "mask slots/s" in part.table


def test_steps_that_reach_a_depth():
    trace = Trace(accepted=[1, 3, 2, 1])
    answer = Generation("0", (5,) * 7, "", "eos", trace, 1.0)
    child = fluid_checkpoint(k_max=3)
    assert smol.reached({"0": answer}, child) == ["100%", "50%", "25%", "0%"]


def test_finished_runs_share_a_row_by_system(tmp_path, monkeypatch):
    """One row a model and decoder, a column a task, whatever folder a run is in; the same task twice is refused."""
    first, second = "mini_gsm8k_1", "mini_mmlu_1"
    judged = {first: ("exact_match", "strict-match"), second: ("acc", "none")}
    monkeypatch.setattr(smol_table, "METRICS", judged)
    grid = {"decoder.name": ["ar", "fluid"]}
    settings = {"model": "tiny-fluid", "limit": 2, "max_new_tokens": 8}
    written = fluid_eval.sweep(tasks=first, grid=grid, out=tmp_path / "sweep", by="tokens_per_forward", **settings)
    read = fluid_eval.run(tasks=second, decoder="fluid", out=tmp_path / "run", **settings)
    rows = smol_table.table([written.folder, read.folder]).splitlines()
    assert rows[0] == f"| system | {first} | {second} |"
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| tiny-fluid, ar", "| tiny-fluid, verified, timed drafts"]
    score = read.row(second)
    assert rows[3].endswith(f" | {100 * score.score:.1f} [{100 * score.low:.1f}, {100 * score.high:.1f}], n 2 |")
    assert rows[2].endswith(" |  |")
    assert ", n 2 (" in rows[2]
    with pytest.raises(fluid_eval.ConfigError, match="no run of smollm2-135m, ar in "):
        smol_table.agreement([read.folder])
    monkeypatch.setattr(smol_table, "PARENT", "tiny-fluid, ar")
    assert smol_table.agreement([written.folder]).splitlines()[-1] == "| tiny-fluid, verified, timed drafts | 100.0 |"
    shorter = smol_table.agreement(
        [
            written.folder,
            fluid_eval.run(
                tasks=first, decoder="fluid", **settings | {"max_new_tokens": 2}, out=tmp_path / "short"
            ).folder,
        ]
    )
    assert shorter.splitlines()[-1] == "| tiny-fluid, verified, timed drafts | 50.0 |", "four answers, two of them cut"
    spec = json.loads((read.folder / "spec.json").read_text())
    (read.folder / "spec.json").write_text(json.dumps({**spec, "backend": {"name": "hf"}}))
    assert smol_table.label(read) == "tiny-fluid, lm-eval's hf"
    (read.folder / "spec.json").write_text(json.dumps(spec))
    with pytest.raises(fluid_eval.ConfigError, match=f"{second} of 'tiny-fluid, verified, timed drafts' is in two"):
        smol_table.table([read.folder, read.folder])


def test_blocks_of_a_page_are_rewritten_by_name(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(
        "a\n" + "".join(f"<!-- python -m bench.smol --only {n} -->\nold\n<!-- end -->\n" for n in ("x", "y"))
    )
    smol.rewrite(page, {"y": "new"})
    assert page.read_text().split("\n")[2:6:3] == ["old", "new"]
    with pytest.raises(SystemExit):
        smol.main(["--only", "gguf", "--only", "speed", "--page", str(page)])
    assert "has no block for gguf, speed; name other parts by --only" in capsys.readouterr().err


QUICK = plan.FieldWorkload(sizes=(8,), heats=(0.7,), lengths=(3, 17))


@pytest.mark.parametrize("model", [plan.MODELS[0], plan.FieldModel("sdar", "sdar")], ids=str)
def test_a_layout_of_the_field_is_compared(tmp_path, model):
    rows = field.measure(model, plan.open_model(model, tmp_path), QUICK)
    assert [row.rule for row in rows] == [rule for decoder in model.decoders() for rule in plan.RULES[decoder]]
    assert all((row.answers, row.ids, row.counted, row.forwards, row.batched) == (2,) * 5 for row in rows)


def test_answers_of_the_field_that_differ_are_counted_and_named(capsys):
    forwards = dict.fromkeys(KINDS, 1)
    written = {
        ids: Generation("0", ids, "", "eos", Trace(forwards={**forwards, "commit": commits}), 1.0)
        for ids, commits in (((5, 6), 1), ((5, 7), 1), ((5, 6, 7), 2))
    }
    right, wrong, longer = written.values()
    row = field.FieldRow("sdar", "sdar", "sdar", "static")
    for alone, batched in ((right, right), (wrong, wrong), (longer, longer), (right, wrong)):
        field.count(row, SdarSettings(), ((5, 6), forwards), alone, batched)
    assert row.shares == ["2 of 4", "3 of 4", "3 of 4"]
    assert capsys.readouterr().err.count("sdar") >= 3
    assert [bar.ok for bar in field.bars_of([row])] == [False] * 3


def test_the_field_is_planned_whole():
    """Every layout, every decoder, and every selection rule that a decoder's settings name."""
    assert {model.layout for model in plan.MODELS} == {"PanguEmbedded", "llada", *layouts.OWN}
    assert set(layouts.OWN) == set(field_layouts.LAYOUTS)
    assert list(plan.RULES) == [kind.name for kind in BUILT_IN]
    assert {name for model in plan.MODELS for name in model.decoders()} == set(plan.RULES)
    for decoder, rules in plan.RULES.items():
        hints = get_type_hints(decoder_named(decoder))
        for setting in {"rule", "remasking"} & hints.keys():
            named = {word for hint in (get_args(hints[setting]) or ()) for word in (get_args(hint) or (hint,))}
            kinds = [next(plan.comparisons(decoder, rule, QUICK))[0] for rule in rules]
            assert {getattr(kind, setting) for kind in kinds} == named, decoder


@pytest.mark.slow
def test_the_field_is_printed(capsys):
    assert field.main(["--quick", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert all(row["ids"] == row["answers"] == row["batched"] == 2 for row in printed["rows"])
    models = (*plan.MODELS, *plan.RENAMED)
    assert len(printed["rows"]) == sum(len(plan.RULES[d]) for model in models for d in model.decoders())


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        decode.main(["--only", "everything"])
    assert "invalid choice: 'everything'" in capsys.readouterr().err


def test_dummy_samples_cost_little(tmp_path):
    """The driver and the store alone; what Ray adds is for the bench."""
    spec, work = scale.dummy(500, 2)
    seconds, _ = scale.store_all(scale.InProcess(), spec, work, tmp_path / "r")
    assert seconds < 1e-3
    assert len(fluid_eval.load_results(tmp_path / "r")) == 500
