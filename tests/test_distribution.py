"""Sampled text comes from AR's distribution, however many tokens a round keeps: a chi-square test on whole texts."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM

from fluid_model import ArSettings, FluidSettings, KHead, Request, engine_for
from fluid_model.checkpoints.checkpoint import Checkpoint
from fluid_model.forward.backbone import Backbone
from fluid_model.settings import DecoderSettings

from .tiny import byte_tokenizer, llama_config

LETTERS, LENGTH, DRAWS = 5, 4, 5_000
PROMPT = (2, 3, 4)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """Five letters, the last of them the mask, and no end."""
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(llama_config(vocab_size=LETTERS)).float().eval()
    head = KHead(model.config.hidden_size, 4)
    return Checkpoint(Backbone(model), byte_tokenizer(), (), None, LETTERS - 1, [head], head)


@torch.inference_mode()
def probabilities(checkpoint: Checkpoint, temperature: float) -> torch.Tensor:
    """(LETTERS ** LENGTH,) of every text, by plain forwards."""
    table = torch.ones(1)
    for length in range(LENGTH):
        places = torch.cartesian_prod(*[torch.arange(LETTERS)] * length).view(-1, length) if length else None
        texts = torch.empty(1, 0, dtype=torch.long) if places is None else places
        ids = torch.cat([torch.tensor(PROMPT).expand(len(texts), -1), texts], 1)
        logits = checkpoint.model(input_ids=ids).logits[:, -1]
        table = (table[:, None] * (logits / temperature).softmax(-1)).flatten()
    return table


def draw(checkpoint: Checkpoint, decoder: DecoderSettings) -> tuple[torch.Tensor, float]:
    """How often each text was written, and tokens kept a round."""
    work = [Request(str(seed), PROMPT, LENGTH, seed=seed) for seed in range(DRAWS)]
    counts, kept = torch.zeros(LETTERS**LENGTH), []
    for answer in engine_for(checkpoint, decoder, 512).generate(work):
        place = 0
        for token in answer.ids:
            place = LETTERS * place + token
        counts[place] += 1
        kept += answer.trace.accepted
    return counts, sum(kept) / max(1, len(kept))


def probability(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Of counts like these or worse; texts expected fewer than ten times are one."""
    rare = expected * DRAWS < 10
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]]).double()
    return float(chisquare(observed, wanted / wanted.sum() * DRAWS).pvalue)


def test_sampled_texts_are_distributed_as_ars(checkpoint):
    temperature = 0.8
    expected = probabilities(checkpoint, temperature)
    assert abs(float(expected.sum()) - 1) < 1e-5
    counts, kept = draw(checkpoint, FluidSettings(temperature=temperature, slot_budget=1000, min_horizon=3))
    assert kept > 1.2, "or drafts were never right, and nothing was tested"
    assert probability(counts, expected) > 1e-3
    assert probability(counts, probabilities(checkpoint, 1.1 * temperature)) < 1e-9, "the test tells others apart"


def test_so_are_ars_own(checkpoint):
    counts, _ = draw(checkpoint, ArSettings(temperature=0.8))
    assert probability(counts, probabilities(checkpoint, 0.8)) > 1e-3
