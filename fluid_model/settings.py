"""Decoder settings: what a user may choose about how a model writes. No torch here, so that errors come early.

Naming (FLUID, arXiv 2605.27387): tau is the training-time bound that labels the K-head and belongs to a checkpoint;
gamma is `confidence`, the inference-time acceptance probability. They are never the same knob. A decoder's `method` is
what a checkpoint must have been adapted to for it; None takes any.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from .common.errors import ConfigError

Rule = Literal["probability", "margin", "entropy"]
"""How sure a decoder is of a token."""


PUBLISHED_BLOCK = 32
"""NBDiff's block length where a checkpoint does not say its own."""


def check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Raise ConfigError unless low <= value <= high (low < value if `open_low`)."""
    if not (low < value if open_low else low <= value) or value > high:
        bracket = "(" if open_low else "["
        raise ConfigError(f"{name}={value} must lie in {bracket}{low}, {high}]")


@dataclass(frozen=True)
class ArSettings:
    """One token a forward: the yardstick every other decoder is measured against."""

    name: ClassVar[str] = "ar"
    method: ClassVar[str | None] = None

    temperature: float = 0.0
    """0 is greedy; above it, sampling from softmax(logits / temperature)."""
    top_p: float = 1.0
    """Nucleus: the smallest set of tokens whose probability reaches top_p."""

    def __post_init__(self) -> None:
        check_range("temperature", self.temperature, 0.0, 100.0)
        check_range("top_p", self.top_p, 0.0, 1.0, open_low=True)


@dataclass(frozen=True)
class FluidSettings:
    """FLUID: K-head stride, drafts, causal verification."""

    name: ClassVar[str] = "fluid"
    method: ClassVar[str | None] = "fluid"

    rounds: Literal["one", "reference"] = "one"
    """one: a forward a round, which verifies drafts and makes the next; reference: the public sampler's several."""
    confidence: float = 0.9
    """gamma: a drafted token is kept (unverified) or written ahead of the pointer (reference) when its probability
    exceeds this. Verified rounds of one forward do not ask for it.
    """
    min_horizon: int = 1
    """Floor of the stride. The public code's cached version uses 4, the uncached one 1."""
    max_horizon: int = 16
    """Ceiling of the stride (K_max); above what the K-head was trained for it changes nothing."""
    verify: bool = True
    """Check drafts by the causal model before keeping them; the text is then that of AR."""
    slot_budget: int | None = None
    """Slots that cost as much as all else a forward does: the more there are, the more a verified round of one forward
    feeds for the same gain. Unset, measured. It changes speed, never text.
    """
    candidates: int = 4
    """Likeliest tokens that greedy drafts may try at one place: they grow into a tree, whose nodes are fed as far as
    slots allow. 1: a chain, as sampled drafts are. It changes speed, never verified text.
    """
    temperature: float = 0.0
    """0 is greedy; above it, rounds of one forward sample as ar does."""
    top_p: float = 1.0
    """Nucleus, as for ar."""

    def __post_init__(self) -> None:
        check_range("confidence", self.confidence, 0.0, 1.0)
        if self.max_horizon < 1:
            raise ConfigError(f"max_horizon={self.max_horizon} must be at least 1")
        if not 1 <= self.min_horizon <= self.max_horizon:
            raise ConfigError(f"min_horizon={self.min_horizon} must lie in 1..max_horizon={self.max_horizon}")
        if self.rounds not in ("one", "reference"):
            raise ConfigError(f"rounds={self.rounds!r}: known are one, reference")
        if self.slot_budget is not None:
            check_range("slot_budget", self.slot_budget, 1, 10**6)
        check_range("candidates", self.candidates, 1, 64)
        check_range("temperature", self.temperature, 0.0, 100.0)
        check_range("top_p", self.top_p, 0.0, 1.0, open_low=True)
        if self.rounds == "reference" and self.temperature:
            raise ConfigError(f"temperature={self.temperature}: rounds=reference is greedy; use rounds=one")


@dataclass(frozen=True)
class NbdiffSettings:
    """NBDiff's public decoder: blocks filled in both directions, then read causally."""

    name: ClassVar[str] = "nbdiff"
    method: ClassVar[str | None] = "nbdiff"

    block_length: int | None = None
    """Tokens of a block; unset, what the checkpoint was trained for (PUBLISHED_BLOCK where it does not say)."""
    small_blocks: int = 8
    """Parts of a block that are filled one after another."""
    rule: Rule = "probability"
    """How sure a token is: its probability, the margin over the second likeliest, or the entropy."""
    confidence: float | None = 0.9
    """Tokens surer than this are written at once, for rules probability and margin; unset, one a pass."""
    max_entropy: float | None = None
    """Nats below which a token is written at once, for rule entropy; unset, one a pass, as the public code does."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus, as for ar."""

    def __post_init__(self) -> None:
        check_range("small_blocks", self.small_blocks, 1, 4096)
        if self.block_length is not None:
            check_range("block_length", self.block_length, 1, 4096)
            self.part(self.block_length)
        if self.confidence is not None:
            check_range("confidence", self.confidence, 0.0, 1.0)
        if self.max_entropy is not None and (self.rule != "entropy" or self.max_entropy < 0):
            raise ConfigError(f"max_entropy={self.max_entropy}: at least 0, and only for rule=entropy")
        check_range("temperature", self.temperature, 0.0, 100.0)
        check_range("top_p", self.top_p, 0.0, 1.0, open_low=True)

    def length(self, trained: int | None) -> int:
        """Tokens of a block for a checkpoint trained with blocks of that length, if it says."""
        return self.block_length or trained or PUBLISHED_BLOCK

    def part(self, block_length: int) -> int:
        """Tokens of a small block, one at least. Raises ConfigError if the small blocks do not fill the block."""
        if block_length > self.small_blocks and block_length % self.small_blocks:
            raise ConfigError(f"small_blocks={self.small_blocks} must divide block_length={block_length}")
        return max(1, block_length // self.small_blocks)

    @property
    def least_sureness(self) -> float:
        """What sureness must exceed to be written ahead of its turn."""
        if self.rule == "entropy":
            return math.inf if self.max_entropy is None else -self.max_entropy
        return math.inf if self.confidence is None else self.confidence


@dataclass(frozen=True)
class LladaSettings:
    """LLaDA's decoder: a whole canvas under full attention, filled block by block."""

    name: ClassVar[str] = "llada"
    method: ClassVar[str | None] = "llada"

    steps: int | None = None
    """Forwards for the whole canvas, shared evenly by its blocks; unset, one a token."""
    gen_length: int | None = None
    """Canvas in tokens; unset, the task's length limit, rounded up to whole blocks."""
    block_length: int = 32
    """Tokens of a block; blocks are filled from left to right."""
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    """Which predictions of a step are kept: the surest, or any."""
    guidance: float = 0.0
    """Classifier-free guidance; above 0 every step takes a second forward, with the prompt masked."""
    temperature: float = 0.0
    """Of Gumbel noise on the logits; 0 is greedy."""
    suppress_end: bool = False
    """Take end tokens out of what confidences are taken from, so that they are written last (the public code's
    `confidence_eos_eot_inf`); at temperatures above 0 all but the tokenizer's own, as there. For low_confidence.
    """
    logits_eos_inf: bool = False
    """Never write the tokenizer's end of sequence (the public code's name)."""
    whole_canvas: bool = False
    """Go on to the canvas's end, as the public code does, also where the answer has ended before. Text is the same."""
    mc_num: int = 128
    """Samples of a log-likelihood; a continuation of one token needs none."""

    def __post_init__(self) -> None:
        for name in ("steps", "gen_length"):
            if (value := getattr(self, name)) is not None:
                check_range(name, value, 1, 10**6)
        check_range("block_length", self.block_length, 1, 4096)
        check_range("mc_num", self.mc_num, 1, 10**6)
        if self.gen_length is not None:
            self.canvas(self.gen_length)
        check_range("guidance", self.guidance, 0.0, 100.0)
        check_range("temperature", self.temperature, 0.0, 100.0)

    def canvas(self, max_new_tokens: int) -> tuple[int, int]:
        """Tokens of the canvas for an answer of that length, and forwards a block.

        Raises ConfigError if the blocks do not fill the canvas or do not share the steps evenly.
        """
        length = self.gen_length or -(-max_new_tokens // self.block_length) * self.block_length
        blocks, rest = divmod(length, self.block_length)
        if rest:
            raise ConfigError(f"gen_length={length} must be a multiple of block_length={self.block_length}")
        steps = self.steps or length
        if steps > length:
            raise ConfigError(f"steps={steps} must not exceed the canvas of {length} tokens")
        if steps % blocks:
            raise ConfigError(f"steps={steps} must be a multiple of the canvas's {blocks} blocks")
        return length, steps // blocks


DecoderSettings = ArSettings | FluidSettings | NbdiffSettings | LladaSettings
DECODERS: dict[str, type[DecoderSettings]] = {
    kind.name: kind for kind in (ArSettings, FluidSettings, NbdiffSettings, LladaSettings)
}


def answer_slots(settings: DecoderSettings, max_new_tokens: int) -> int:
    """Places of the window an answer of that length needs: as many, or the canvas it is written on if that is longer.

    Raises ConfigError if the decoder cannot lay such a canvas out.
    """
    canvas = settings.canvas(max_new_tokens)[0] if isinstance(settings, LladaSettings) else 0
    return max(max_new_tokens, canvas)


def setting_names(decoder: str) -> list[str]:
    """Names a user may set on a decoder, in declaration order."""
    return [f.name for f in fields(DECODERS[decoder])]
