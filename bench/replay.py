"""FLUID's rounds on a model whose drafts never come true: what tiny-fluid's were worth is recorded, and said again.

Recorded is what decides a round whatever the device and the batch: how sure the likeliest drafts of each place behind
each token of an answer were, and which came true. How much to feed is then up to the strategy, as for any model.
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
from fluid_model.decoders.draft_tree import Candidate, Draft, DraftTree
from fluid_model.decoders.fluid import FluidStrategy
from fluid_model.decoders.verification import Predictions
from fluid_model.engine.strategy import RowUpdate
from fluid_model.forward.kv_cache import KVCache

FILE = Path(__file__).with_name("accepted.json")
ROOT = Path(__file__).resolve().parents[1]
ALPHABET = ascii_uppercase
NEW = 160
"""Tokens of a recorded answer at most."""

Fan = tuple[tuple[float, ...], ...]
"""How sure the drafts behind one token are, place by place, of each the likeliest, the surest first; negative where
they do not come true; as many as the K-head allows and as could be worth a slot.
"""


@dataclass(frozen=True)
class Tape:
    """Answers end to end, the last followed by the first. fans: one a token, each prompt's last token included.
    starts: places of those.
    """

    fans: tuple[Fan, ...]
    starts: tuple[int, ...]

    @classmethod
    def of(cls, answers: Sequence[Sequence[Fan]], most: int) -> Tape:
        """As many whole answers as there are places."""
        ends = [0, *accumulate(map(len, answers))]
        whole = sum(end <= most for end in ends) - 1
        if whole < 1:
            raise ConfigError(f"no recorded answer fits on {most} places")
        return cls(tuple(fan for answer in answers[:whole] for fan in answer), tuple(ends[:whole]))

    @property
    def wrong(self) -> int:
        """The id of every draft that does not come true; others are their places."""
        return len(self.fans)

    def after(self, token: int, ahead: int = 1) -> int:
        """The token that many places on."""
        return self.wrong if token == self.wrong else (token + ahead) % self.wrong

    @cached_property
    def drafts(self) -> list[list[list[Candidate]]]:
        """Of each token the drafts behind it, place by place; a wrong one's come last and are none."""
        return [
            [
                [(self.after(token, ahead) if sure > 0 else self.wrong, abs(sure)) for sure in rivals]
                for ahead, rivals in enumerate(fan, 2)
            ]
            for token, fan in enumerate((*self.fans, ()))
        ]


class Replay(FluidStrategy):
    """All that a round costs is done; then the slots say what the tape says.

    A token's id is its place on the tape; a request's seed is the number of the answer it begins with.
    """

    def __init__(self, checkpoint: Checkpoint, settings: FluidSettings, tape: Tape) -> None:
        assert checkpoint.head is not None
        assert checkpoint.mask_id is not None
        super().__init__(checkpoint.backbone, checkpoint.head, checkpoint.mask_id, settings)
        if not settings.verify or settings.temperature:
            raise ConfigError("only greedy rounds whose drafts are verified can be replayed")
        self._tape = tape

    def admit(
        self, start: int, requests: list[Request], hidden: Tensor | None, window_left: list[int]
    ) -> list[RowUpdate]:
        starts = self._tape.starts
        begun = [replace(each, prompt=(starts[each.seed % len(starts)],)) for each in requests]
        return super().admit(start, begun, hidden, window_left)

    def _predict(self, start: int, hidden: Tensor, drafts: Sequence[Draft]) -> list[Predictions]:
        super()._predict(start, hidden, drafts)
        predictions = []
        for draft in drafts:
            ranked: list[list[Candidate]] = []
            for token, masks in zip(draft.tree.tokens, draft.masks, strict=True):
                recorded = [*self._tape.drafts[token], *([(self._tape.wrong, 0.0)] for _ in range(masks))]
                ranked += [candidates[: self._candidates] for candidates in recorded[:masks]]
            tokens = [self._tape.after(token) for token in draft.tree.tokens]
            candidates = [[token for token, _ in each] for each in ranked]
            probabilities = [[probability for _, probability in each] for each in ranked]
            predictions.append(Predictions(tokens, [self.max_stride] * len(tokens), candidates, probabilities))
        return predictions


def record(checkpoint: Checkpoint, work: Sequence[Request]) -> list[list[Fan]]:
    """What the drafts behind every token of the model's greedy answers are worth, prompt by prompt."""
    engine = fluid_model.engine_for(checkpoint, ArSettings(), 16)
    answers = {answer.key: answer.ids for answer in engine.generate(work)}
    return [_fans(checkpoint, request, answers[request.key]) for request in work]


@torch.inference_mode()
def _fans(checkpoint: Checkpoint, request: Request, answer: tuple[int, ...]) -> list[Fan]:
    """All fans of one answer, each as wide as can be, in one forward."""
    backbone, head, count = checkpoint.backbone, checkpoint.head, 1 + len(answer)
    assert head is not None
    assert checkpoint.mask_id is not None
    strategy = FluidStrategy(backbone, head, checkpoint.mask_id, FluidSettings(slot_budget=1))
    strategy.allocate(1)
    masks = strategy.max_stride - 1
    draft = strategy._drafts[0] = Draft(DraftTree.chain([request.prompt[-1], *answer]), [masks] * count)
    before, feed = torch.tensor([request.prompt[:-1]]), strategy.plan(1)
    cache = KVCache(1, before.shape[1] + draft.slots)
    if before.numel():
        backbone.forward(before, cache.set_write_positions(0, [0], before.shape[1], backbone.device), cache)
    plan = cache.set_write_positions(0, [before.shape[1]], draft.slots, backbone.device, intervals=feed.intervals)
    hidden = backbone.forward(feed.ids, plan, cache)
    (predicted,) = strategy._predict(0, hidden, [draft])
    return [_fan(predicted, place, count, masks) for place in range(count)]


def _fan(predicted: Predictions, place: int, count: int, masks: int) -> Fan:
    """The fan behind one of `count` tokens: what it drafts came true where the text goes on so."""
    reached, fan = 1.0, []
    for step in range(min(masks, predicted.strides[place] - 1)):
        after, candidates = place + 1 + step, predicted.candidates_of(place * masks + step)
        right = predicted.tokens[after] if after < count else None
        worth = [(token, sure) for token, sure in candidates if reached * sure >= MIN_COST]
        fan.append(tuple(sure if token == right else -sure for token, sure in worth))
        reached *= candidates[0][1]
        if reached < MIN_COST:
            return tuple(fan[:-1])
    return tuple(fan)


def write(file: Path = FILE, prompts: int = 60) -> int:
    """Record tiny-fluid on the mini suite's prompts. Returns the file's size."""
    from .prompts import mini  # the one part that needs more than fluid_model

    checkpoint = fluid_model.load(str(ROOT / "checkpoints" / "tiny-fluid"), device="cpu", dtype="float32")
    asked = [tuple(checkpoint.tokenizer(prompt)["input_ids"]) for prompt in mini(prompts)]
    answers = record(checkpoint, [Request(str(n), ids, NEW) for n, ids in enumerate(asked)])
    told = {
        "model": "tiny-fluid",
        "prompts": f"mini_gsm8k, test, {prompts}",
        "answers": [".".join(map(letters, answer)) for answer in answers],
    }
    return file.write_text(json.dumps(told, indent=0) + "\n", "utf-8")


def read(most: int, file: Path = FILE) -> Tape:
    """The recorded answers that fit on `most` places. Raises ConfigError where the file is not what `write` writes."""
    try:
        answers = json.loads(file.read_text("utf-8"))["answers"]
        return Tape.of([[sureness(text) for text in answer.split(".")] for answer in answers], most)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file}: not a recording: {error}; python -m bench.gpu --record writes one") from error


def letters(fan: Fan) -> str:
    """A fan in a file, its places parted by commas. A letter is how likely a draft comes true and the likeliest before
    it: A surely, Z by MIN_COST, evenly in the logarithm; it is small where that draft did not.
    """
    reach, found = 1.0, list[str]()
    for rivals in fan:
        scaled = [round(math.log(reach * abs(sure)) / math.log(MIN_COST) * (len(ALPHABET) - 1)) for sure in rivals]
        named = zip((ALPHABET[each] for each in scaled), rivals, strict=True)
        found.append("".join(name if sure > 0 else name.lower() for name, sure in named))
        reach *= abs(rivals[0])
    return ",".join(found)


def sureness(text: str) -> Fan:
    """The fan that these letters stand for. Raises ValueError if they stand for none."""
    found, before = [], 0
    for place in text.split(",") if text else ():
        scaled = [ALPHABET.index(letter.upper()) for letter in place]
        if [before, *scaled] != sorted([before, *scaled]) or not scaled:
            raise ValueError(f"{text!r} grows likelier from draft to draft")
        sure = [MIN_COST ** ((each - before) / (len(ALPHABET) - 1)) for each in scaled]
        found.append(tuple(each if name.isupper() else -each for each, name in zip(sure, place, strict=True)))
        before = scaled[0]
    return tuple(found)
