"""FLUID in one forward a round does what a plain version without a cache does, round by round."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from fluid_eval.paths import resource
from fluid_model import ArSettings, FluidSettings, Request, load
from fluid_model.checkpoint import Checkpoint
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


def forward(checkpoint: Checkpoint, done: list[int], tokens: list[int], fans: dict[int, int]):
    """One forward over the answer so far, the tokens fed and fans of masks, their widths by the place of the token
    they hang on: what each slot reads is written out. Returns logits and hidden states by (anchor, step).
    """
    real = done + tokens
    base = len(done)
    slots = [(i, 0) for i in range(len(real))] + [
        (base + a, s) for a, masks in fans.items() for s in range(1, masks + 1)
    ]
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


@dataclass
class Tally:
    """How a row's rounds went so far; what it begins with counts as four rounds."""

    together: int
    decoder: FluidSettings
    rounds: float = 4.0
    written: float = 10.0
    slots: float = 48.0

    @property
    def price(self) -> float:
        """Tokens that would be written in the time of a slot."""
        budget = self.decoder.slot_budget or 1
        each = self.together * (self.written / self.rounds) / (budget + self.together * self.slots / self.rounds)
        return min(max(each, 0.01), 0.9)

    def width(self, hit: float) -> int:
        """The most masks of which the last is likelier to be used than it is dear."""
        masks, true = 0, (self.written - self.rounds) / self.written
        while masks < self.decoder.max_horizon - 1 and hit * true ** (masks + 1) >= self.price:
            masks += 1
        return masks


@torch.inference_mode()
def plain_rounds(checkpoint: Checkpoint, prompt, decoder: FluidSettings, new_tokens: int, rows: int):
    """The answer, its rounds, and the slots they fed, where `rows` share a forward."""
    random = torch.Generator().manual_seed(SEED)
    draws = torch.tensor([float(torch.rand((), generator=random)) for _ in range(new_tokens + 2 * decoder.max_horizon)])

    def pick(logits, place):
        """The token of a place of the answer, and its probability."""
        token, sure = choose(logits[None], draws[place : place + 1], decoder.temperature, decoder.top_p, "probability")
        return int(token), float(sure)

    tally = Tally(rows, decoder)
    first = tally.width(1.0) if decoder.verify else decoder.max_horizon - 1
    fans = {len(prompt) - 1: first}
    done, tokens, answer = [], list(prompt), []
    rounds, fed, last = 0, 0, len(prompt) - 1  # a prompt is a round whose tokens are all right
    while len(answer) < new_tokens and not any(token in checkpoint.end_ids for token in answer):
        found = forward(checkpoint, done, tokens, fans)
        rounds, fed = rounds + 1, fed + len(tokens) + sum(fans.values())
        place = len(answer)  # of what the last token kept is followed by
        if answer:
            tally.rounds, tally.slots = tally.rounds + 1, tally.slots + len(tokens) + sum(fans.values())
        if answer and decoder.verify:
            last = 0
            while last < len(tokens) - 1 and tokens[last + 1] == pick(found[last, 0][0], place + last)[0]:
                last += 1
            place += last
        elif answer:
            last = len(tokens) - 1
        pending, _ = pick(found[last, 0][0], place)
        said = [pick(found[last, step][0], place + step) for step in range(1, fans.get(last, 0) + 1)]
        stride = int(checkpoint.head.stride(found[last, 0][1][None]))
        stride = min(max(stride, decoder.min_horizon), decoder.max_horizon)
        done += tokens[: last + 1]
        verified = tokens[1 : last + 1] if answer and decoder.verify else []
        tokens, right, reached, price = [pending], 1.0, [1.0], tally.price
        for token, sure in said[: stride - 1]:
            right *= sure
            if (right < price) if decoder.verify else (sure <= decoder.confidence):
                break
            tokens.append(token)
            reached.append(right)
        ends = [a - b for a, b in zip(reached, [*reached[1:], 0.0], strict=True)]
        fans = {i: tally.width(hit) for i, hit in enumerate(ends)}
        fans = fans if decoder.verify else {len(tokens) - 1: decoder.max_horizon - 1}
        tally.written += (len(verified) + 1 if decoder.verify else len(tokens)) if answer else 0
        answer += [*verified, pending] if decoder.verify else tokens
    answer = answer[:new_tokens]
    end = next((i for i, token in enumerate(answer) if token in checkpoint.end_ids), None)
    return tuple(answer[:end]), rounds, fed


@pytest.mark.parametrize(
    "decoder",
    [
        FluidSettings(slot_budget=1000),
        FluidSettings(slot_budget=100_000, min_horizon=8),
        FluidSettings(slot_budget=64, min_horizon=4),
        FluidSettings(slot_budget=8),
        FluidSettings(slot_budget=200, max_horizon=3),
        FluidSettings(verify=False, confidence=0.3, min_horizon=8),
        FluidSettings(verify=False, confidence=0.0),
        FluidSettings(slot_budget=500, temperature=1.0),
        FluidSettings(slot_budget=500, temperature=1.5, top_p=0.8, min_horizon=6),
        FluidSettings(verify=False, confidence=0.3, min_horizon=8, temperature=1.0),
    ],
)
@pytest.mark.parametrize("rows", [1, 3])
def test_one_forward_a_round(checkpoint, decoder, rows):
    """Same text, same number of rounds, same slots fed."""
    found = write(checkpoint, decoder, requests(checkpoint), slots=rows)
    for request in requests(checkpoint):
        ids, rounds, fed = plain_rounds(checkpoint, request.prompt, decoder, NEW, rows)
        trace = found[request.key].trace
        assert (found[request.key].ids, sum(trace.forwards.values()), trace.slots) == (ids, rounds, fed)


def test_drafts_end_where_the_window_does(checkpoint):
    """Text that repeats itself is drafted far ahead."""
    ids = tuple(checkpoint.tokenizer(TEXTS[0] + " Ann has 12 pens. Bob has 7 pens." * 300)["input_ids"])
    room = 12
    request = Request("x", ids[: checkpoint.backbone.window - room], room)
    decoder = FluidSettings(slot_budget=100_000, min_horizon=16)
    (answer,) = write(checkpoint, decoder, [request]).values()
    left = room - 1  # the prompt's own forward wrote one
    assert max(answer.trace.accepted) > 1
    for predicted, accepted in zip(answer.trace.predicted, answer.trace.accepted, strict=True):
        assert predicted <= left + 1
        left -= accepted


def test_slots_are_fed_where_they_are_cheap(checkpoint):
    """The dearer they are, the fewer a forward has and the more forwards it takes."""
    fed, forwards = [], []
    for budget in (2, 30, 500, 100_000):
        traces = [
            g.trace for g in write(checkpoint, FluidSettings(slot_budget=budget), requests(checkpoint), 1).values()
        ]
        forwards.append(sum(sum(trace.forwards.values()) for trace in traces))
        fed.append(sum(trace.slots for trace in traces) / forwards[-1])
    assert fed == sorted(fed)
    assert forwards == sorted(forwards, reverse=True)
    assert fed[-1] > 1.5 * fed[0]


def test_a_horizon_beyond_the_heads_costs_nothing(checkpoint):
    found = [write(checkpoint, FluidSettings(max_horizon=k, slot_budget=64), requests(checkpoint)) for k in (16, 64)]
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
