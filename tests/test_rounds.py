"""FLUID with one forward a step against a plain version without a cache, tree or intervals, step by step."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

import pytest
import torch

from fluid_eval.common.paths import resource
from fluid_model import ArSettings, FluidSettings, Request, load
from fluid_model.checkpoints.checkpoint import Checkpoint
from fluid_model.decoders import engine_for
from fluid_model.decoders.draft_policy import StepStatistics
from fluid_model.decoders.sampling import choose
from fluid_model.engine.records import RowForward

from .test_laws import write

NEW, SEED = 28, 3
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


Text = tuple[int, ...]
"""A path of the draft tree: the bonus token, then draft tokens."""


def forward(checkpoint: Checkpoint, done: list[int], blocks: dict[Text, int]):
    """One forward over the answer so far, the last token of every path and its mask block; what each slot attends to is
    decided pair by pair. blocks: size of each path's mask block.  Returns logits and hidden states by (path, step).
    """
    slots = [((), -at) for at in range(len(done), 0, -1)]
    slots += [(text, 0) for text in blocks] + [(text, s) for text, masks in blocks.items() for s in range(1, masks + 1)]
    ids = done + [text[-1] for text in blocks] + [checkpoint.mask_id] * sum(blocks.values())
    rows = []
    for text, step in slots:
        begins = {text[:length] for length in range(len(text))}
        rows.append([(text == other and at <= step) or (at <= 0 and other in begins) for other, at in slots])
    may = torch.tensor(rows)
    bias = torch.zeros(may.shape).masked_fill(~may, torch.finfo(torch.float32).min)[None, None]
    out = checkpoint.model(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([[len(done) + max(len(text) - 1, 0) + step for text, step in slots]]),
        attention_mask=bias,
        output_hidden_states=True,
    )
    return {slot: (out.logits[0, i], out.hidden_states[-1][0, i]) for i, slot in enumerate(slots)}


def paths_behind(bonus: int, drafts: list[list[tuple[int, float]]], cost: float, most: int) -> dict[Text, float]:
    """All paths whose probability is the marginal cost at least; the likeliest if there are too many."""
    paths = {(bonus,): 1.0}
    for depth, siblings in enumerate(drafts, 1):
        paths |= {
            (*text, token): reached * probability
            for text, reached in paths.items()
            for token, probability in siblings
            if len(text) == depth and reached * probability >= cost
        }
    return dict(sorted(paths.items(), key=lambda pair: -pair[1])[:most])


def in_order(texts: dict[Text, float]) -> list[Text]:
    """Preorder: each path before those that continue it, the likelier sibling first."""
    return sorted(texts, key=lambda text: [(-texts[text[: n + 1]], text[n]) for n in range(len(text))])


@dataclass
class Tally:
    """Statistics of a row's steps; its prior counts as four steps."""

    together: int
    decoder: FluidSettings
    steps: float = 4.0
    committed: float = 10.0
    slots: float = 48.0

    @property
    def cost(self) -> float:
        """Tokens that would be committed in the time of a slot."""
        budget = self.decoder.slot_budget or 1
        each = self.together * (self.committed / self.steps) / (budget + self.together * self.slots / self.steps)
        return min(max(each, 0.001), 0.9)

    def width(self, stops: float) -> int:
        """The largest mask block whose last slot gains more than it costs. stops: probability that drafts end there."""
        masks, accepted = 0, (self.committed - self.steps) / self.committed
        while masks < self.decoder.max_horizon - 1 and stops * accepted ** (masks + 1) >= self.cost:
            masks += 1
        return masks


@torch.inference_mode()
def plain_steps(checkpoint: Checkpoint, prompt, decoder: FluidSettings, new_tokens: int, rows: int):
    """The answer, its steps, the slots they fed, and what each draft was expected to bring; `rows` share a forward."""
    random = torch.Generator().manual_seed(SEED)
    draws = torch.tensor([float(torch.rand((), generator=random)) for _ in range(new_tokens + 2 * decoder.max_horizon)])
    count = decoder.candidates if decoder.verify and decoder.temperature == 0 else 1
    most = max(2 * decoder.max_horizon, min((decoder.slot_budget or 1) // rows if decoder.verify else 0, 1024))

    def pick(logits, place):
        """The token of a place of the answer, and its probability."""
        draw = draws[place : place + 1]
        token, probability = choose(logits[None], draw, decoder.temperature, decoder.top_p, "probability")
        return int(token), float(probability)

    def candidates(logits, place):
        """Candidates for a place of the answer."""
        ranked, tokens = logits.softmax(-1).topk(count)
        return [pick(logits, place)] if count == 1 else list(zip(tokens.tolist(), ranked.tolist(), strict=True))

    tally = Tally(rows, decoder)
    blocks = {prompt[-1:]: tally.width(1.0) if decoder.verify else decoder.max_horizon - 1}
    done, answer = list(prompt[:-1]), []
    steps, fed, expected, texts = 0, len(prompt) - 1, list[float](), {prompt[-1:]: 1.0}
    while len(answer) < new_tokens and not any(token in checkpoint.end_ids for token in answer):
        outputs = forward(checkpoint, done, blocks)
        slots = len(blocks) + sum(blocks.values())
        steps, fed = steps + 1, fed + slots
        place, text = len(answer), next(iter(blocks))  # the first place that is not committed, and the bonus token
        # 1) verify
        if answer:
            tally.steps, tally.slots = tally.steps + 1, tally.slots + slots
            expected.append(sum(texts.values()) if decoder.verify else 1.0)
        if answer and decoder.verify:
            while (longer := (*text, pick(outputs[text, 0][0], place)[0])) in blocks:
                text, place = longer, place + 1
        elif answer:
            text = max(blocks, key=len)
        bonus, _ = pick(outputs[text, 0][0], place)
        # 2) draft
        drafts = [candidates(outputs[text, step][0], place + step) for step in range(1, blocks[text] + 1)]
        stride = int(checkpoint.head.stride(outputs[text, 0][1][None]))
        drafts = drafts[: min(max(stride, decoder.min_horizon), decoder.max_horizon) - 1]
        done += text
        verified = list(text[1:]) if answer and decoder.verify else []
        if decoder.verify:
            texts = paths_behind(bonus, drafts, tally.cost, most // 2)
            left, blocks = most - len(texts), {}
            for text in in_order(texts):
                onward = sum(texts[longer] for longer in texts if longer[:-1] == text)
                blocks[text] = min(tally.width(texts[text] - onward), left)
                left -= blocks[text]
            fresh = [*verified, bonus]
        else:
            confident = takewhile(lambda siblings: siblings[0][1] > decoder.confidence, drafts)
            fresh = [bonus, *(siblings[0][0] for siblings in confident)]
            blocks = {tuple(fresh[: n + 1]): 0 for n in range(len(fresh))} | {tuple(fresh): decoder.max_horizon - 1}
        # 3) commit
        tally.committed += len(fresh) if answer else 0
        answer += fresh
    written = takewhile(lambda token: token not in checkpoint.end_ids, answer[:new_tokens])
    return tuple(written), steps, fed, expected


@pytest.mark.parametrize(
    "decoder",
    [
        FluidSettings(slot_budget=1000),
        FluidSettings(slot_budget=3000, min_horizon=8),
        FluidSettings(slot_budget=64, min_horizon=4),
        FluidSettings(slot_budget=8),
        FluidSettings(slot_budget=200, max_horizon=3),
        FluidSettings(slot_budget=1000, candidates=1),
        FluidSettings(slot_budget=300, candidates=9, min_horizon=5),
        FluidSettings(verify=False, confidence=0.3, min_horizon=8),
        FluidSettings(verify=False, confidence=0.0),
        FluidSettings(slot_budget=500, temperature=1.0),
        FluidSettings(slot_budget=500, temperature=1.5, top_p=0.8, min_horizon=6),
        FluidSettings(verify=False, confidence=0.3, min_horizon=8, temperature=1.0),
    ],
)
@pytest.mark.parametrize("rows", [1, 3])
def test_one_forward_a_step(checkpoint, decoder, rows):
    """Same text, same number of steps, same slots fed, same expectations."""
    answers = write(checkpoint, decoder, requests(checkpoint), batch_size=rows)
    for request in requests(checkpoint):
        ids, steps, fed, expected = plain_steps(checkpoint, request.prompt, decoder, NEW, rows)
        trace = answers[request.key].trace
        assert (answers[request.key].ids, sum(trace.forwards.values()), trace.slots) == (ids, steps, fed)
        if decoder.verify:
            assert trace.expected == pytest.approx(expected, abs=1e-3)


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
    """The more they cost, the fewer a forward has and the more forwards it takes."""
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


def test_no_row_feeds_more_than_it_has_columns_for(checkpoint, monkeypatch):
    """Where slots cost nothing all of them are fed."""
    monkeypatch.setattr(StepStatistics, "marginal_costs", lambda each, rows, *_: 0 * each.steps[rows] + 1e-4)
    engine = engine_for(checkpoint, FluidSettings(slot_budget=120, min_horizon=16), 2)
    seen: list[RowForward] = []
    engine.watch = seen.append
    answers = {g.key: g.ids for g in engine.generate(requests(checkpoint))}
    assert answers == {key: g.ids for key, g in write(checkpoint, ArSettings(), requests(checkpoint)).items()}
    assert max(len(step.ids) for step in seen if step.kind == "round") == engine.strategy.max_slots == 60


def test_a_horizon_beyond_the_heads_costs_nothing(checkpoint):
    answers = [write(checkpoint, FluidSettings(max_horizon=k, slot_budget=64), requests(checkpoint)) for k in (16, 64)]
    assert {k: (g.ids, g.trace) for k, g in answers[0].items()} == {k: (g.ids, g.trace) for k, g in answers[1].items()}


@pytest.mark.parametrize("heat", [0.0, 0.5])
def test_drafts_are_sometimes_accepted_and_sometimes_rejected(checkpoint, heat):
    """The law above would prove little if they were always the one, nor that sampled text is AR's."""
    decoder = FluidSettings(temperature=heat, slot_budget=64)
    answers = write(checkpoint, decoder, requests(checkpoint))
    pairs = [pair for g in answers.values() for pair in zip(g.trace.predicted, g.trace.accepted, strict=True)]
    assert any(accepted > 1 for _, accepted in pairs)
    assert any(accepted < drafted for drafted, accepted in pairs)
    expected = write(checkpoint, ArSettings(temperature=heat), requests(checkpoint))
    assert {key: g.text for key, g in answers.items()} == {key: g.text for key, g in expected.items()}
