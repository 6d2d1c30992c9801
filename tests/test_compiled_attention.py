"""Compiled attention over long contexts, which it reads chunk by chunk (`CHUNK` of attention.h)."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from fluid_model.forward.attention_masks import ALWAYS, MAX_STEPS, AttentionIntervals
from fluid_model.forward.backbone import Backbone
from fluid_model.forward.compiled import threads
from fluid_model.forward.kv_cache import KVCache

from .test_compiled import WIDE, by_torch, run_twice
from .test_llama import model_of

pytestmark = pytest.mark.usefixtures("c_library")
LENGTHS = [1020, 3, 505, 512, 1030]
"""Cached tokens of each row: below, at and across the first two ends of chunks of 512."""
FED = 12


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(model_of(LlamaConfig(**{**WIDE, "max_position_embeddings": 2048})))


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 97, (len(LENGTHS), max(LENGTHS) + FED), generator=torch.Generator().manual_seed(1))


def siblings(first: int) -> AttentionIntervals:
    """A chain of slots up to `first`, and behind it slots that are all its children."""
    slot = torch.arange(FED).expand(len(LENGTHS), -1)
    exit_ = torch.where(slot > first, (slot + 1) * MAX_STEPS, ALWAYS)
    return AttentionIntervals(slot * MAX_STEPS, exit_, slot.clamp(max=first + 1))


@torch.inference_mode()
def behind_prompts(forward, ids, intervals):
    """Hidden states of FED slots behind prompts of LENGTHS, (5, FED, D)."""
    cache, width = KVCache(len(LENGTHS), ids.shape[1]), max(LENGTHS)
    forward(ids[:, :width], cache.set_write_positions(0, [0] * len(LENGTHS), width, ids.device), cache)
    fed = torch.stack([row[n : n + FED] for row, n in zip(ids, LENGTHS, strict=True)])
    return forward(fed, cache.set_write_positions(0, LENGTHS, FED, ids.device, None, intervals), cache)


@pytest.mark.parametrize("first", [FED, 0, 5])
def test_chunks_agree_with_torch(backbone, ids, first):
    """Causal, all slots children of the first, and a chain with children."""
    ours, theirs = (
        behind_prompts(forward, ids, siblings(first)) for forward in (backbone.compiled, by_torch(backbone))
    )
    assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)


def test_chunks_depend_on_the_row_alone(backbone, ids, monkeypatch):
    """To the last bit: among longer and shorter rows, on several threads, and one slot at a time as in AR."""
    monkeypatch.setattr(threads, "OPERATIONS_PER_THREAD", 1e5)
    forward = backbone.compiled
    with torch.inference_mode():
        together = run_twice(forward, ids, LENGTHS, FED, ids.shape[1])[1]
        assert torch.equal(run_twice(forward, ids, LENGTHS, FED, ids.shape[1], count=3)[1], together)
        for row, length in enumerate(LENGTHS):
            (alone,) = run_twice(forward, ids[row : row + 1], [length], FED, length + FED)[1]
            assert torch.equal(together[row], alone)
            cache = KVCache(1, length + FED)
            forward(ids[row : row + 1, :length], cache.set_write_positions(0, [0], length, ids.device), cache)
            for slot in range(FED):
                plan = cache.set_write_positions(0, [length + slot], 1, ids.device)
                single = forward(ids[row : row + 1, length + slot, None], plan, cache)
                assert torch.equal(single[0, 0], together[row, slot])


def test_an_accepted_sibling_reads_as_a_chain_does(backbone, ids):
    """Its columns are not side by side until the cache is compacted; the numbers are the same to the last bit."""
    branch = behind_prompts(backbone.compiled, ids, siblings(0))
    chain = ids.clone()
    for row, length in enumerate(LENGTHS):
        chain[row, length + 1] = ids[row, length + 4]
    assert torch.equal(branch[:, 4], behind_prompts(backbone.compiled, chain, siblings(FED))[:, 1])
