"""Checkpoints adapted to NBDiff and LLaDA through the main job: every task, and errors that say which decoder."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

import fluid_eval
import fluid_model
from fluid_eval.common.spec import build_spec
from fluid_eval.output.report import write_report
from fluid_eval.results import run_folder
from fluid_eval.running.answering_lm import row_seed
from fluid_eval.running.job import run
from fluid_eval.running.worker import Worker
from fluid_model import ConfigError, Manifest
from fluid_model.engine.records import ScoreRequest

from .tiny import MASK, byte_tokenizer, fluid_checkpoint

TASKS = ["mini_gsm8k_1", "mini_mmlu_1", "mini_humaneval_1"]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """Folders of random checkpoints by method."""
    folder = tmp_path_factory.mktemp("adapted")
    for method in ("nbdiff", "llada"):
        manifest = Manifest("random", MASK, method=method, block_length=8 if method == "nbdiff" else None)
        checkpoint = replace(fluid_checkpoint(), manifest=manifest, heads=[], head=None)
        checkpoint.model.config.max_position_embeddings = 512
        fluid_model.save(checkpoint, folder / method)
    return folder


def spec_of(path, decoder, **changes):
    values = {"tasks": TASKS, "model": str(path), "decoder": decoder, "limit": 2, "max_new_tokens": 10}
    return build_spec({**values, "allow_unsafe_code": True, **changes})


@pytest.mark.parametrize(
    "decoder",
    [
        {"name": "nbdiff", "small_blocks": 2},
        {"name": "nbdiff", "rule": "entropy", "max_entropy": 4.0},
        {"name": "llada", "block_length": 5, "steps": 4},
    ],
)
def test_the_main_job_runs(adapted, tmp_path, decoder):
    result = run(spec_of(adapted / decoder["name"], decoder), tmp_path / "run")
    assert [line["n"] for line in result["lines"]] == [2, 2, 2, 2]
    records = {record["task"]: record for record in run_folder.read_samples(tmp_path / "run")}
    written = records["mini_gsm8k_1"]["trace"]["forwards"]
    scored = records["mini_mmlu_1"]["trace"]["forwards"]
    copies = 6  # of two-token choices that share their first: it masked, one for each; the second or both, one for all
    assert sum(scored.values()) == (copies if decoder["name"] == "llada" else 1)
    assert written["denoise"] > 0
    assert (written["prefill"], scored["denoise"]) == ((0, copies) if decoder["name"] == "llada" else (1, 0))
    assert len(records["mini_gsm8k_1"]["output_ids"]) <= 10


def test_estimates_come_with_their_standard_errors(adapted, tmp_path):
    """As the scorer gives them, in the samples, the loaded frame and the page; exact likelihoods have none."""
    spec = spec_of(adapted / "llada", "llada", tasks=["mini_mmlu_1"])
    run(spec, tmp_path / "llada")
    record = next(run_folder.read_samples(tmp_path / "llada"))
    context = tuple(fluid_model.load_tokenizer(str(adapted / "llada"))(record["prompt"])["input_ids"])
    pairs = tuple((context, tuple(byte_tokenizer()(choice)["input_ids"])) for choice in record["choices"])
    (score,) = Worker().run(spec.to_dict(), [ScoreRequest(record["key"], pairs, row_seed(spec.seed, record["key"]))])
    assert record["standard_errors"] == pytest.approx(score.errors)
    assert min(record["standard_errors"]) > 0
    frame = fluid_eval.load_results(tmp_path / "llada")
    assert frame["standard_errors"][0] == record["standard_errors"]
    write_report([tmp_path / "llada"], tmp_path / "page.html")
    assert f'"errors":[{round(record["standard_errors"][0], 5)},' in (tmp_path / "page.html").read_text()
    run(spec_of(adapted / "nbdiff", "nbdiff", tasks=["mini_mmlu_1"]), tmp_path / "nbdiff")
    assert all(record["standard_errors"] == [] for record in run_folder.read_samples(tmp_path / "nbdiff"))


def test_a_canvas_longer_than_the_answer_is_what_prompts_are_cut_for(adapted, tmp_path):
    decoder = {"name": "llada", "gen_length": 480, "block_length": 480, "steps": 1}
    run(spec_of(adapted / "llada", decoder, tasks=["mini_gsm8k_1"]), tmp_path / "r")
    records = list(run_folder.read_samples(tmp_path / "r"))
    assert [record["prompt_tokens"] for record in records] == [32, 32]
    assert all(record["truncated"] > 0 and len(record["output_ids"]) <= 10 for record in records)
    decoder |= {"gen_length": 512, "block_length": 512}
    with pytest.raises(
        ConfigError, match=r"max_new_tokens=10 .* a canvas of 512, leaves no room .*decoder\.gen_length"
    ):
        run(spec_of(adapted / "llada", decoder, tasks=["mini_gsm8k_1"]), tmp_path / "none")


def test_estimates_follow_the_seed(adapted, tmp_path):
    estimates = []
    for n, seed in enumerate((1, 1, 2)):
        run(spec_of(adapted / "llada", "llada", tasks=["mini_mmlu_1"], limit=1, seed=seed), tmp_path / str(n))
        estimates.append(next(run_folder.read_samples(tmp_path / str(n)))["loglikelihoods"])
    assert estimates[0] == estimates[1] != estimates[2]


@pytest.mark.parametrize(
    ("method", "decoder", "message"),
    [
        ("nbdiff", "llada", "was adapted to nbdiff; use --decoder nbdiff"),
        ("llada", "nbdiff", "was adapted to llada; use --decoder llada"),
        ("llada", "ar", "reads in both directions; use --decoder llada"),
        ("nbdiff", "fluid", "decoder=fluid needs a K-head"),
    ],
)
def test_a_decoder_of_another_method_is_refused(adapted, tmp_path, method, decoder, message):
    with pytest.raises(ConfigError) as caught:
        run(spec_of(adapted / method, decoder), tmp_path / "run")
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("nbdiff", {"decoder": {"name": "nbdiff", "small_blocks": 3}}, "small_blocks=3 must divide block_length=8"),
        ("llada", {"decoder": {"name": "llada", "steps": 20}}, "steps=20 must not exceed the canvas of 12 tokens"),
        ("llada", {"decoder": {"name": "llada", "steps": 5}}, "steps=5 must be a multiple of the canvas's 3 blocks"),
        ("llada", {"decoder": {"name": "llada"}, "max_new_tokens": 510}, "written on a canvas of 512, leaves no room"),
        ("llada", {"model": {"mask_token": "two words"}}, "mask token 'two words' is not one token"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_weights_load(adapted, tmp_path, method, changes, message):
    folder = tmp_path / "model"
    shutil.copytree(adapted / method, folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    decoder = {"block_length": 4, **changes.get("decoder", {"name": method})}
    if method == "nbdiff":
        del decoder["block_length"]
    model = {"path": str(folder), **changes.get("model", {})}
    length = changes.get("max_new_tokens", 10)
    with pytest.raises(ConfigError) as caught:
        run(spec_of("", decoder, model=model, max_new_tokens=length), tmp_path / "run")
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_plain_model_has_no_blocks(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match="is a plain causal model; use --decoder ar"):
        run(spec_of(tiny_model, "nbdiff"), tmp_path / "run")


def test_the_causal_path_of_nbdiff_is_ar(adapted, tmp_path):
    """The same folder read one token a forward, and in blocks of one, writes the same: with a commit more where the
    last token is no end.
    """
    run(spec_of(adapted / "nbdiff", "ar"), tmp_path / "ar")
    run(spec_of(adapted / "nbdiff", {"name": "nbdiff", "block_length": 1}), tmp_path / "ones")
    ar, ones = ({r["key"]: r for r in run_folder.read_samples(tmp_path / name)} for name in ("ar", "ones"))
    assert {key: r["output"] for key, r in ones.items()} == {key: r["output"] for key, r in ar.items()}
    for key, one in ar.items():
        more = sum(ones[key]["trace"]["forwards"].values()) - sum(one["trace"]["forwards"].values())
        assert more == (one["finish"] not in (None, "eos"))


def test_a_bidirectional_backbone_needs_full_attention():
    from transformers import MistralConfig

    from .tiny import llama_config

    config = MistralConfig(**{**llama_config().to_dict(), "model_type": "mistral", "sliding_window": 8})
    checkpoint = fluid_checkpoint(config=config)
    engine = fluid_model.engine_for(checkpoint, fluid_model.LladaSettings(block_length=4))
    with pytest.raises(ConfigError, match="reads through a sliding window: only causal decoders run"):
        list(engine.generate([fluid_model.Request("x", (5, 6, 7), 4)]))
