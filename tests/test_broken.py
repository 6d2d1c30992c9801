"""Non-finite logits: their row fails and is counted, and no other row changes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fluid_eval.benchmarks.lm_eval_tasks import scored_records
from fluid_eval.common.spec import build_spec
from fluid_eval.results.run_folder import read_samples
from fluid_eval.running.job import run
from fluid_model import ConfigError, Request, ScoreRequest, load, save
from fluid_model.decoders import engine_for, scorer_for
from fluid_model.settings import ArSettings, FluidSettings
from fluid_model.settings.block_diffusion import NbdiffSettings
from fluid_model.settings.masked_diffusion import LladaSettings
from fluid_model.settings.wedlm import WedlmSettings

from .tiny import byte_tokenizer, fluid_checkpoint

BAD = byte_tokenizer()("^")["input_ids"][0]
PROMPTS = [
    "^ and much longer than any other of them",
    "quite as long as the one before it, no?",
    "^bc",
    "say it",
    "abc^",
    "a longer one than others",
    "x",
    "^",
    "what is it that is ^ here",
    "one more",
]
DECODERS = {
    "ar": ArSettings(),
    "ar, sampled": ArSettings(temperature=1.0),
    "fluid": FluidSettings(slot_budget=64),
    "fluid, sampled": FluidSettings(slot_budget=64, temperature=1.0),
    "fluid, unverified": FluidSettings(verify=False, confidence=0.0),
    "fluid, reference": FluidSettings(rounds="reference"),
    "nbdiff": NbdiffSettings(block_length=4, small_blocks=2),
    "llada": LladaSettings(block_length=4),
    "wedlm": WedlmSettings(window=4, max_entropy=4.5),
}


@pytest.fixture(scope="module")
def checkpoints():
    """The same weights, whole, and with one token's embedding lost. No answer holds that token."""
    intact, harmed = fluid_checkpoint(seed=1), fluid_checkpoint(seed=1)
    for checkpoint in (intact, harmed):
        checkpoint.backbone.model.get_output_embeddings().weight.data[BAD] = 0.0
    harmed.backbone.model.get_input_embeddings().weight.data[BAD] = float("nan")
    return intact, harmed


def requests():
    tokenizer = byte_tokenizer()
    return [Request(str(i), tuple(tokenizer(text)["input_ids"]), 8, seed=i) for i, text in enumerate(PROMPTS)]


@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.parametrize("name", DECODERS)
def test_a_broken_row_is_given_up_alone(checkpoints, name, slots):
    intact, harmed = checkpoints
    expected = {a.key: a.ids for a in engine_for(intact, DECODERS[name], slots).generate(requests())}
    answers = {a.key: a for a in engine_for(harmed, DECODERS[name], slots).generate(requests())}
    assert answers.keys() == expected.keys()
    for key, answer in answers.items():
        if "^" in PROMPTS[int(key)]:
            assert (answer.finish, answer.ids, answer.text, answer.trace.written) == ("broken", (), "", [])
            assert sum(answer.trace.forwards.values()) == 1, "not fed any further"
        else:
            assert BAD not in expected[key], "else this row breaks too"
            assert answer.ids == expected[key]
            assert answer.finish != "broken"


@pytest.mark.parametrize("slots", [1, 3])
def test_a_broken_question_is_nan_and_no_other_one(checkpoints, slots):
    intact, harmed = checkpoints
    questions = [ScoreRequest(r.key, tuple((r.prompt, (3 + choice,)) for choice in range(3))) for r in requests()]
    expected = {s.key: s.loglikelihoods for s in scorer_for(intact, ArSettings(), slots).score(questions)}
    for score in scorer_for(harmed, ArSettings(), slots).score(questions):
        if "^" in PROMPTS[int(score.key)]:
            assert all(value != value for value in score.loglikelihoods)
        else:
            assert score.loglikelihoods == pytest.approx(expected[score.key], abs=1e-5)


def test_a_run_goes_on_and_says_so(checkpoints, tmp_path):
    """One question breaks: it counts as wrong, a gate names it, and the rest is answered."""
    save(checkpoints[1], tmp_path / "m")
    (tmp_path / "d" / "gsm8k").mkdir(parents=True)
    rows = [f'{{"question": "{text}", "answer": "#### 1"}}' for text in ("two", "^", "four")]
    for split in ("train", "test"):
        (tmp_path / "d" / "gsm8k" / f"{split}.jsonl").write_text("\n".join(rows))
    values = {
        "tasks": "gsm8k", "model": str(tmp_path / "m"), "decoder": "fluid", "data_dir": str(tmp_path / "d"),
        "num_fewshot": 0, "max_new_tokens": 4,
    }  # fmt: skip
    result = run(build_spec(values), tmp_path / "r")
    records = {r["doc_id"]: r for r in read_samples(tmp_path / "r")}
    assert [records[i].get("broken", False) for i in range(3)] == [False, True, False]
    assert set(records[1]["scores"].values()) == {0.0}
    (gate,) = [gate for gate in result["health"] if gate["gate"] == "numbers not finite"]
    assert (gate["count"], gate["keys"], gate["ok"]) == (1, ["gsm8k/1"], False)


def test_what_nobody_said_is_not_right():
    """lm-eval scores a broken sample as if it had been an answer."""
    from lm_eval.api.metrics import mean

    task = SimpleNamespace(get_config=lambda name: None, aggregation=lambda: {"acc": mean})
    example = {"doc_id": 0, "filter": "none", "metrics": ["acc"], "acc": 1.0, "target": "A", "doc": {}}
    sample = {"output": "A", "choices": [" A"], "finish": None}
    scores = [
        scored_records({"tasks": {"t": task}}, {"samples": {"t": [example]}}, {"t/0": sample | extra})[0]["scores"]
        for extra in ({}, {"broken": True})
    ]
    assert scores == [{"acc,none": 1.0}, {"acc,none": 0.0}]


def test_a_checkpoint_of_no_numbers_is_refused(tmp_path):
    broken = fluid_checkpoint(seed=1)
    broken.backbone.model.get_output_embeddings().weight.data[3] = float("inf")
    save(broken, tmp_path / "m")
    with pytest.raises(ConfigError, match="its logits are not finite"):
        load(str(tmp_path / "m"))


@pytest.mark.parametrize("token", [-1, 10**6])
def test_a_token_without_embedding_is_refused(checkpoints, token):
    intact, _ = checkpoints
    with pytest.raises(ConfigError, match=f"request k: token {token} is outside the model's vocabulary"):
        list(engine_for(intact, ArSettings(), 1).generate([Request("k", (5, token), 4)]))
    for settings in (ArSettings(), LladaSettings()):
        with pytest.raises(ConfigError, match=f"request k: token {token} is outside the model's vocabulary"):
            list(scorer_for(intact, settings, 1).score([ScoreRequest("k", (((5, token), (6,)),))]))
