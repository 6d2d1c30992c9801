"""FLUID in one forward a round does what a plain version without a cache does, round by round."""

from __future__ import annotations

import pytest
import torch

from fluid_eval.paths import resource
from fluid_model import ArSettings, FluidSettings, Request, load
from fluid_model.checkpoint import Checkpoint
from fluid_model.decoders.fluid import UNLIKELY
from fluid_model.decoders.sampling import choose

from .test_laws import write

NEW, SEED = 40, 3
TEXTS = (
    "Question: Ann has 12 pens. Bob has 7 pens. How many pens do they have together?\nAnswer:",
    "Problem: What is 34 + 58?\nSolution:",
    "def add_one(x):\n",
    "Ann has 3",
)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """Trained weights, whose drafts are sometimes right."""
    return load(str(resource("checkpoints") / "tiny-fluid"))


def requests(checkpoint: Checkpoint) -> list[Request]:
    return [Request(text, tuple(checkpoint.tokenizer(text)["input_ids"]), NEW, seed=SEED) for text in TEXTS]


def forward(checkpoint: Checkpoint, done: list[int], tokens: list[int], fans: list[int], width: int):
    """One forward over the answer so far, the tokens fed and a fan of `width` masks behind each of tokens[fans]: what
    each slot reads is written out. Returns logits and hidden states by (anchor, step).
    """
    real = done + tokens
    base = len(done)
    slots = [(i, 0) for i in range(len(real))] + [(base + a, s) for a in fans for s in range(1, width + 1)]
    ids = real + [checkpoint.mask_id] * (len(slots) - len(real))
    may = torch.zeros(len(slots), len(slots), dtype=torch.bool)
    for q, (anchor, step) in enumerate(slots):
        for k, (other, other_step) in enumerate(slots):
            may[q, k] = (other <= anchor) if other_step == 0 else (other == anchor and other_step <= step)
    bias = torch.zeros(may.shape).masked_fill(~may, torch.finfo(torch.float32).min)[None, None]
    out = checkpoint.model(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([[anchor + step for anchor, step in slots]]),
        attention_mask=bias,
        output_hidden_states=True,
    )
    where = {(anchor - base, step): i for i, (anchor, step) in enumerate(slots)}
    return {key: (out.logits[0, i], out.hidden_states[-1][0, i]) for key, i in where.items()}


@torch.inference_mode()
def plain_rounds(checkpoint: Checkpoint, prompt, decoder: FluidSettings, new_tokens: int):
    """The answer, its rounds, and the slots they fed."""
    width, random = decoder.max_horizon - 1, torch.Generator().manual_seed(SEED)
    draws = torch.tensor([float(torch.rand((), generator=random)) for _ in range(new_tokens + 2 * decoder.max_horizon)])

    def pick(logits, place):
        """The token of a place of the answer, and its probability."""
        token, sure = choose(logits[None], draws[place : place + 1], decoder.temperature, decoder.top_p, "probability")
        return int(token), float(sure)

    done, tokens, fans, answer = [], list(prompt), [len(prompt) - 1] if width else [], []
    rounds, fed, last = 0, 0, len(prompt) - 1  # a prompt is a round whose tokens are all right
    while len(answer) < new_tokens and not any(token in checkpoint.end_ids for token in answer):
        found = forward(checkpoint, done, tokens, fans, width)
        rounds, fed = rounds + 1, fed + len(tokens) + len(fans) * width
        place = len(answer)  # of what the last token kept is followed by
        if answer and decoder.verify:
            last = 0
            while last < len(tokens) - 1 and tokens[last + 1] == pick(found[last, 0][0], place + last)[0]:
                last += 1
            place += last
        elif answer:
            last = len(tokens) - 1
        pending, _ = pick(found[last, 0][0], place)
        steps = range(1, width + 1) if last in fans else ()
        said = [pick(found[last, step][0], place + step) for step in steps]
        stride = int(checkpoint.head.stride(found[last, 0][1][None]))
        stride = min(max(stride, decoder.min_horizon), decoder.max_horizon)
        done += tokens[: last + 1]
        verified = tokens[1 : last + 1] if answer and decoder.verify else []
        tokens, right, reached = [pending], 1.0, [1.0]
        for token, sure in said[: stride - 1]:
            right *= sure
            if (right < UNLIKELY) if decoder.verify else (sure <= decoder.confidence):
                break
            tokens.append(token)
            reached.append(right)
        ends = [a - b for a, b in zip(reached, [*reached[1:], 0.0], strict=True)]
        likely = sorted(range(len(ends)), key=lambda i: -ends[i])[: decoder.fans]
        fans = [i for i in likely if ends[i] >= UNLIKELY] if decoder.verify else [len(tokens) - 1]
        fans = fans if width else []
        answer += [*verified, pending] if decoder.verify else tokens
    answer = answer[:new_tokens]
    end = next((i for i, token in enumerate(answer) if token in checkpoint.end_ids), None)
    return tuple(answer[:end]), rounds, fed


@pytest.mark.parametrize(
    "decoder",
    [
        FluidSettings(),
        FluidSettings(fans=1),
        FluidSettings(fans=9, min_horizon=8),
        FluidSettings(max_horizon=3),
        FluidSettings(verify=False, confidence=0.3, min_horizon=8),
        FluidSettings(verify=False, confidence=0.0),
        FluidSettings(temperature=1.0),
        FluidSettings(temperature=1.5, top_p=0.8, min_horizon=6),
        FluidSettings(verify=False, confidence=0.3, min_horizon=8, temperature=1.0),
    ],
)
def test_one_forward_a_round(checkpoint, decoder):
    """Same text, same number of rounds, same slots fed; in a batch as alone."""
    found = write(checkpoint, decoder, requests(checkpoint), slots=3)
    for request in requests(checkpoint):
        ids, rounds, fed = plain_rounds(checkpoint, request.prompt, decoder, NEW)
        trace = found[request.key].trace
        assert (found[request.key].ids, sum(trace.forwards.values()), trace.slots) == (ids, rounds, fed)


def test_a_horizon_beyond_the_heads_costs_nothing(checkpoint):
    found = [write(checkpoint, FluidSettings(max_horizon=k), requests(checkpoint)) for k in (16, 64)]
    assert {k: (g.ids, g.trace) for k, g in found[0].items()} == {k: (g.ids, g.trace) for k, g in found[1].items()}


@pytest.mark.parametrize("heat", [0.0, 0.5])
def test_drafts_are_sometimes_right_and_sometimes_not(checkpoint, heat):
    """The law above would prove little if they were always the one, nor that sampled text is AR's."""
    decoder = FluidSettings(temperature=heat)
    found = write(checkpoint, decoder, requests(checkpoint))
    pairs = [pair for g in found.values() for pair in zip(g.trace.predicted, g.trace.accepted, strict=True)]
    assert any(kept > 1 for _, kept in pairs)
    assert any(kept < drafted for drafted, kept in pairs)
    expected = write(checkpoint, ArSettings(temperature=heat), requests(checkpoint))
    assert {key: g.text for key, g in found.items()} == {key: g.text for key, g in expected.items()}
