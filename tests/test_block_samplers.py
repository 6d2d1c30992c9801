"""BD3LM, SDAR and Fast-dLLM v2 decode as plain, slow versions of their public code do, alone or in batches."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config, Qwen3Config

from bench.field.plain_blocks import plain_bd3lm, plain_fast_dllm, plain_sdar
from fluid_eval.benchmarks.lm_eval_tasks import check_settings
from fluid_eval.common.spec import build_spec
from fluid_model import ConfigError, Request, engine_for, scorer_for
from fluid_model.checkpoints.checkpoint import Checkpoint
from fluid_model.decoders import transfer_schedule
from fluid_model.settings.block_diffusion import Bd3lmSettings, BlockDiffusionSettings, FastDllmSettings, SdarSettings

from .test_laws import write
from .tiny import fluid_checkpoint, llama_config

NEW = 13
SHAPE = {name: value for name, value in llama_config().to_dict().items() if name not in ("model_type", "head_dim")}
CHECKPOINTS = [
    replace(fluid_checkpoint(seed, config=config), end_ids=ends)
    for seed, config, ends in (
        (0, Qwen2Config(**SHAPE), (1, 9)),
        (3, Qwen3Config(**SHAPE, head_dim=8), tuple(range(1, 30))),
    )
]
"""The second one ends its answers soon."""
LENGTHS = (3, 8, 17, 23)
WORK = [Request(str(n), tuple((7 * i * i + n) % 250 + 2 for i in range(n)), NEW, seed=n) for n in LENGTHS]


def check(plain, decoder: BlockDiffusionSettings, checkpoint: Checkpoint | None = None) -> None:
    """Ids and forwards of every kind, alone and in a batch of 4."""
    checkpoint = checkpoint or CHECKPOINTS[decoder.block_length == 4]
    alone = {key: answer for one in WORK for key, answer in write(checkpoint, decoder, [one], 1).items()}
    together = write(checkpoint, decoder, WORK, 4)
    for request in WORK:
        ids, count = plain(checkpoint, request, decoder)
        for answers in (alone, together):
            answer = answers[request.key]
            assert (answer.ids, answer.trace.forwards) == (ids, count), (decoder, request.key)
            assert len(answer.trace.written) == len(ids)


def likes_masks() -> Checkpoint:
    """A model that predicts the mask token wherever it would have written token 214, which it does often."""
    checkpoint = replace(fluid_checkpoint(0, config=Qwen2Config(**SHAPE)), end_ids=(1, 9))
    weights = checkpoint.model.get_output_embeddings().weight
    with torch.no_grad():
        weights[checkpoint.mask_id] = 1.2 * weights[214]
    return checkpoint


BLOCKS = pytest.mark.parametrize("block_length", [1, 4, 8])


@BLOCKS
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"steps": 3},
        {"steps": 20, "remasking": "random"},
        {"temperature": 0.7},
        {"temperature": 1.0, "remasking": "random", "steps": 2},
    ],
)
def test_bd3lm_is_the_public_sampler(block_length, values):
    check(plain_bd3lm, Bd3lmSettings(block_length=block_length, **values))


@pytest.mark.parametrize("values", [{}, {"steps": 3}, {"temperature": 0.7}])
def test_masks_that_a_schedule_leaves_stay_in_the_answer(values):
    """As in the public code: they are text to the blocks behind them."""
    decoder, checkpoint = Bd3lmSettings(block_length=8, **values), likes_masks()
    check(plain_bd3lm, decoder, checkpoint)
    assert any(checkpoint.mask_id in answer.ids for answer in write(checkpoint, decoder, WORK, 4).values())


@BLOCKS
@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.0, "confidence": 0.1},
        {"temperature": 0.0, "remasking": "static", "steps": 1},
        {"confidence": 0.3, "steps": 1},
        {"remasking": "static", "top_k": 20},
        {"remasking": "sequential", "top_p": 0.8},
        {"remasking": "entropy_bounded", "max_entropy": 6.0, "temperature": 0.7, "top_k": 30, "top_p": 0.9},
    ],
)
def test_sdar_is_the_public_sampler(block_length, values):
    values = dict(values)
    if values.pop("steps", None):
        values["steps"] = -(-block_length // 3)
    check(plain_sdar, SdarSettings(block_length=block_length, **values))


@pytest.mark.parametrize(("block_length", "small_block"), [(1, 1), (4, 2), (8, 4), (8, 8)])
@pytest.mark.parametrize(
    "values", [{}, {"confidence": 0.05}, {"confidence": None}, {"temperature": 0.7, "confidence": 0.3}]
)
@pytest.mark.parametrize("block_cache", [False, True])
def test_fast_dllm_is_the_public_sampler(block_length, small_block, values, block_cache):
    values = {**values, "block_cache": block_cache}
    check(plain_fast_dllm, FastDllmSettings(block_length=block_length, small_block=small_block, **values))


def test_a_small_block_beside_a_whole_one_fits_the_cache():
    """Padded to its mate's width, behind the rest of its own block."""
    decoder = FastDllmSettings(block_length=16, small_block=2, block_cache=True)
    endless = replace(CHECKPOINTS[0], end_ids=())
    alone = {key: answer.ids for one in WORK for key, answer in write(endless, decoder, [one], 1).items()}
    assert {key: answer.ids for key, answer in write(endless, decoder, WORK, 4).items()} == alone


def test_a_schedule_rounds_as_the_public_one():
    """Figures of dLLM's `get_num_transfer_tokens`."""
    assert transfer_schedule.by_alpha(32, 10, "linear") == (3, 3, 3, 3, 3, 3, 3, 4, 3, 4)
    assert transfer_schedule.by_alpha(5, 8, "cosine") == (1, 1, 1, 1, 1)


def test_prompts_share_whole_blocks():
    """Where blocks count from the prompt's start; the answers are those without sharing."""
    start = tuple(i % 200 + 2 for i in range(45))
    work = [Request(str(n), (*start, *range(30, 30 + n)), 5) for n in (1, 4, 9)]
    for decoder in (SdarSettings(block_length=8, temperature=0.0), Bd3lmSettings(block_length=8)):
        alone = {key: answer.ids for one in work for key, answer in write(CHECKPOINTS[0], decoder, [one]).items()}
        engine = engine_for(CHECKPOINTS[0], decoder, 3)
        together = {answer.key: answer for answer in engine.generate(work)}
        assert {key: answer.ids for key, answer in together.items()} == alone
        assert bool(engine._cached_prefix) == (decoder.grid == "start")
        assert len(engine._cached_prefix) % 8 == 0
        assert all(answer.trace.forwards["prefill"] == 1 for answer in together.values())


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (FastDllmSettings, {"block_length": 12}, "small_block=8 must divide block_length=12"),
        (SdarSettings, {"remasking": "random"}, "remasking='random': known are dynamic, static, sequential"),
        (SdarSettings, {"remasking": "static", "confidence": 0.5}, "confidence=0.5: only for remasking=dynamic"),
        (SdarSettings, {"max_entropy": 0.5}, "max_entropy=0.5: only for remasking=entropy_bounded"),
        (Bd3lmSettings, {"remasking": "entropy_bounded"}, "known are low_confidence, random"),
        (Bd3lmSettings, {"alpha": "square"}, "alpha='square': known are linear, cosine"),
        (Bd3lmSettings, {"steps": 0}, "steps=0 must lie in"),
        (SdarSettings, {"steps": 5, "block_length": 4}, "steps=5 must lie in [1, 4]"),
    ],
)
def test_a_setting_that_the_method_has_not_is_refused(kind, values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        kind(**values)


def test_settings_that_a_checkpoint_does_not_fit_are_refused():
    with pytest.raises(ConfigError, match="small_block=8 must divide block_length=20"):
        FastDllmSettings().check_model(None, 20)
    with pytest.raises(ConfigError, match="steps=8 must not exceed block_length=4"):
        SdarSettings(steps=8).check_model(None, None)
    SdarSettings(steps=8).check_model(None, 8)


@pytest.mark.parametrize("decoder", [Bd3lmSettings(), SdarSettings(), FastDllmSettings()])
def test_no_log_likelihood_is_made_up(decoder):
    with pytest.raises(ConfigError, match=f"decoder={decoder.name} defines no log-likelihood"):
        scorer_for(CHECKPOINTS[0], decoder)


def test_tasks_that_compare_likelihoods_are_refused():
    """By one line, before weights load."""
    task = SimpleNamespace(get_config={"output_type": "multiple_choice"}.get)
    spec = build_spec({"tasks": "mini_mmlu", "model": "m", "decoder": "bd3lm"})
    with pytest.raises(ConfigError, match="decoder=bd3lm defines no log-likelihood, which task mini_mmlu compares"):
        check_settings(spec, {"tasks": {"mini_mmlu": task}}, 256)


def test_a_window_that_ends_in_a_block_holds_the_answer():
    work = [Request("1", tuple(range(2, 245)), NEW)]
    for decoder in (Bd3lmSettings(block_length=8), SdarSettings(block_length=8), FastDllmSettings(block_length=8)):
        (answer,) = write(replace(CHECKPOINTS[0], end_ids=()), decoder, work).values()
        assert len(answer.ids) == NEW
