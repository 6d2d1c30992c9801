"""Speculative steps of FLUID on a model without trained drafts: tiny-fluid's acceptances, recorded and replayed.

The recording holds what a step depends on beside device and batch: the probabilities of the likeliest candidates at
each place behind each token of an answer, and which of them are accepted. The draft policy then decides how many slots
to feed, as for any model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from string import ascii_uppercase

import torch
from torch import Tensor

import fluid_model
from fluid_model import ArSettings, Checkpoint, ConfigError, FluidSettings, Request
from fluid_model.decoders.draft_policy import MIN_COST
from fluid_model.decoders.draft_rows import DraftLayout, DraftLimits, DraftRows, Predictions
from fluid_model.decoders.draft_tree import Candidate, Draft, DraftTree
from fluid_model.decoders.fluid import FluidStrategy
from fluid_model.engine.strategy import OneEach, Updates
from fluid_model.forward.attention_masks import MAX_STEPS
from fluid_model.forward.kv_cache import KVCache

FILE = Path(__file__).with_name("accepted.json")
ROOT = Path(__file__).resolve().parents[1]
ALPHABET = ascii_uppercase
NEW = 160
"""Tokens of a recorded answer at most."""

BlockCandidates = tuple[tuple[float, ...], ...]
"""Probabilities of the candidates in the mask block behind one token, place by place, in falling order; negative where
a candidate is rejected; as many as the K-head's stride allows and as could gain more than the least cost of a slot.
"""


@dataclass(frozen=True)
class Tape:
    """Answers end to end, the last followed by the first. blocks: one a token, each prompt's last token included.
    starts: places of those.
    """

    blocks: tuple[BlockCandidates, ...]
    starts: tuple[int, ...]

    @classmethod
    def of(cls, answers: Sequence[Sequence[BlockCandidates]], most: int) -> Tape:
        """As many whole answers as there are places."""
        ends = [0, *accumulate(map(len, answers))]
        complete = sum(end <= most for end in ends) - 1
        if complete < 1:
            raise ConfigError(f"no recorded answer fits on {most} places")
        return cls(tuple(block for answer in answers[:complete] for block in answer), tuple(ends[:complete]))

    @property
    def wrong(self) -> int:
        """The id of every rejected candidate; the others' are their places."""
        return len(self.blocks)

    def after(self, token: int, ahead: int = 1) -> int:
        """The token that many places on."""
        return self.wrong if token == self.wrong else (token + ahead) % self.wrong

    @cached_property
    def drafts(self) -> list[list[list[Candidate]]]:
        """Of each token the drafts behind it, place by place; a rejected one has none, and comes last."""
        return [
            [
                [
                    (self.after(token, ahead) if probability > 0 else self.wrong, abs(probability))
                    for probability in siblings
                ]
                for ahead, siblings in enumerate(block, 2)
            ]
            for token, block in enumerate((*self.blocks, ()))
        ]


class Replay(FluidStrategy):
    """Does all the work of a step, then replaces the predictions by the recording's.

    A token's id is its place on the tape; a request's seed is the number of the answer it begins with.
    """

    def __init__(self, checkpoint: Checkpoint, settings: FluidSettings, tape: Tape) -> None:
        assert checkpoint.head is not None
        assert checkpoint.mask_id is not None
        super().__init__(checkpoint.backbone, checkpoint.head, checkpoint.mask_id, settings)
        if not settings.verify or settings.temperature:
            raise ConfigError("only greedy, verified decoding can be replayed")
        self._tape = tape

    def admit(
        self, start: int, requests: list[Request], hidden: Tensor | None, window_left: list[int]
    ) -> Updates | OneEach:
        starts = self._tape.starts
        begun = [replace(each, prompt=(starts[each.seed % len(starts)],)) for each in requests]
        return super().admit(start, begun, hidden, window_left)

    def _predict(self, start: int, layout: DraftLayout, hidden: Tensor) -> Predictions:
        predicted = super()._predict(start, layout, hidden)
        ids, enter, *_ = layout.slots(layout.numbers)  # (n, S) each
        fed, total = layout.fed(layout.numbers), sum(layout.nodes)
        count = predicted.candidates.shape[1]  # C
        candidates, probabilities = [], []
        masks = fed[total:]
        anchors, steps = enter.flatten()[masks] // MAX_STEPS, enter.flatten()[masks] % MAX_STEPS
        for token, step in zip(ids[masks // layout.width, anchors].tolist(), steps.tolist(), strict=True):
            recorded = self._tape.drafts[token][step - 1 : step] or [[]]
            ranked = [*recorded[0], *[(self._tape.wrong, 0.0)] * count][:count]
            candidates.append([token for token, _ in ranked])
            probabilities.append([probability for _, probability in ranked])
        tokens = [self._tape.after(token) for token in ids.flatten()[fed[:total]].tolist()]
        return Predictions(
            torch.tensor(tokens),
            torch.full((total,), self.max_stride),
            torch.tensor(candidates, dtype=torch.long).view(-1, count),
            torch.tensor(probabilities, dtype=torch.float32).view(-1, count),
        )


def record(checkpoint: Checkpoint, work: Sequence[Request]) -> list[list[BlockCandidates]]:
    """Candidates behind every token of the model's greedy answers, prompt by prompt."""
    engine = fluid_model.engine_for(checkpoint, ArSettings(), 16)
    answers = {answer.key: answer.ids for answer in engine.generate(work)}
    return [_blocks(checkpoint, request, answers[request.key]) for request in work]


@torch.inference_mode()
def _blocks(checkpoint: Checkpoint, request: Request, answer: tuple[int, ...]) -> list[BlockCandidates]:
    """All mask blocks of one answer, each as wide as can be, in one forward."""
    backbone, head, count = checkpoint.backbone, checkpoint.head, 1 + len(answer)
    assert head is not None
    assert checkpoint.mask_id is not None
    strategy = FluidStrategy(backbone, head, checkpoint.mask_id, FluidSettings(slot_budget=1))
    strategy.allocate(1)
    masks = strategy.max_stride - 1
    draft = Draft(DraftTree.chain([request.prompt[-1], *answer]), [masks] * count)
    strategy._drafts = DraftRows(1, DraftLimits(1, strategy.max_stride, draft.slots, strategy._candidates))
    strategy._drafts.drafts[0] = draft
    before, feed = torch.tensor([request.prompt[:-1]]), strategy.plan(1)
    cache = KVCache(1, before.shape[1] + draft.slots)
    if before.numel():
        backbone.forward(before, cache.set_write_positions(0, [0], before.shape[1], backbone.device), cache)
    plan = cache.set_write_positions(0, [before.shape[1]], draft.slots, backbone.device, intervals=feed.intervals)
    hidden = backbone.forward(feed.ids, plan, cache)
    assert strategy._layout is not None
    predicted = strategy._predict(0, strategy._layout, hidden)
    return [_block(predicted, place, count, masks) for place in range(count)]


def _block(predicted: Predictions, place: int, count: int, masks: int) -> BlockCandidates:
    """The mask block behind one of `count` tokens: a candidate is accepted where it is the text's next token."""
    reached, block = 1.0, []
    for step in range(min(masks, int(predicted.strides[place]) - 1)):
        after, slot = place + 1 + step, place * masks + step
        candidates = list(zip(predicted.candidates[slot].tolist(), predicted.probabilities[slot].tolist(), strict=True))
        right = int(predicted.tokens[after]) if after < count else None
        worth = [(token, probability) for token, probability in candidates if reached * probability >= MIN_COST]
        block.append(tuple(probability if token == right else -probability for token, probability in worth))
        reached *= candidates[0][1]
        if reached < MIN_COST:
            return tuple(block[:-1])
    return tuple(block)


def write(file: Path = FILE, prompts: int = 60) -> int:
    """Record tiny-fluid on the mini suite's prompts. Returns the file's size."""
    from .prompts import mini  # the one part that needs more than fluid_model

    checkpoint = fluid_model.load(str(ROOT / "checkpoints" / "tiny-fluid"), device="cpu", dtype="float32")
    asked = [tuple(checkpoint.tokenizer(prompt)["input_ids"]) for prompt in mini(prompts)]
    answers = record(checkpoint, [Request(str(n), ids, NEW) for n, ids in enumerate(asked)])
    recording = {
        "model": "tiny-fluid",
        "prompts": f"mini_gsm8k, test, {prompts}",
        "answers": [".".join(map(letters, answer)) for answer in answers],
    }
    return file.write_text(json.dumps(recording, indent=0) + "\n", "utf-8")


def read(most: int, file: Path = FILE) -> Tape:
    """The recorded answers that fit on `most` places. Raises ConfigError where the file is not what `write` writes."""
    try:
        answers = json.loads(file.read_text("utf-8"))["answers"]
        return Tape.of([[sureness(text) for text in answer.split(".")] for answer in answers], most)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file}: not a recording: {error}; python -m bench.gpu --record writes one") from error


def letters(block: BlockCandidates) -> str:
    """A mask block in a file, its places parted by commas. A letter is the probability of a candidate times those of
    the likeliest before it, from A for 1 to Z for MIN_COST, evenly in the logarithm; lower case where it is rejected.
    """
    reach, places = 1.0, list[str]()
    for siblings in block:
        scaled = [
            round(math.log(reach * abs(probability)) / math.log(MIN_COST) * (len(ALPHABET) - 1))
            for probability in siblings
        ]
        named = zip((ALPHABET[each] for each in scaled), siblings, strict=True)
        places.append("".join(name if probability > 0 else name.lower() for name, probability in named))
        reach *= abs(siblings[0])
    return ",".join(places)


def sureness(text: str) -> BlockCandidates:
    """The mask block that these letters stand for. Raises ValueError if they stand for none."""
    places, before = [], 0
    for place in text.split(",") if text else ():
        scaled = [ALPHABET.index(letter.upper()) for letter in place]
        if [before, *scaled] != sorted([before, *scaled]) or not scaled:
            raise ValueError(f"{text!r} grows likelier from draft to draft")
        probability = [MIN_COST ** ((each - before) / (len(ALPHABET) - 1)) for each in scaled]
        places.append(tuple(each if name.isupper() else -each for each, name in zip(probability, place, strict=True)))
        before = scaled[0]
    return tuple(places)
