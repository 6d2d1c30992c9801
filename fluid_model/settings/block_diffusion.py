"""Block-diffusion decoders, each by its settings: NBDiff's, and those of other projects. No torch.

One strategy carries all of them out, `decoders.block_diffusion`. What differs is named by axes: context, grid, shift,
where an answer ends, schedule, and the order in which masked slots are written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..common.errors import ConfigError
from . import DecoderSettings, Rule, check_range

Selection = Literal["confidence", "random", "sequential", "entropy bound"]
"""The order in which masked slots are written."""
PUBLISHED_BLOCK = 32
"""NBDiff's block length, for checkpoints that do not state one."""


def check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    """Raise ConfigError naming the known values unless this is one of them."""
    if value not in known:
        raise ConfigError(f"{name}={value!r}: known are {', '.join(known)}")


@dataclass(frozen=True)
class BlockDiffusionSettings(DecoderSettings):
    """Block diffusion: a block of masks behind cached tokens is denoised in several forwards, then cached.

    A preset fixes the axes below; its settings are what its public code lets a user choose.
    """

    needs = ("mask token",)
    strategy = "fluid_model.decoders.block_diffusion:open_strategy"

    context: ClassVar[Literal["causal", "block"]]
    """How prompt and finished blocks are cached: causally, or with both directions inside each block."""
    grid: ClassVar[Literal["prompt end", "start"]]
    """Where blocks count from. From the start of the prompt, its last partial block is denoised with the answer."""
    shift: ClassVar[bool]
    """Slot j - 1 predicts slot j; the token before a block predicts its first, which is written at once."""
    ends: ClassVar[Literal["token", "small block", "block", "commit"]]
    """Where an answer's end is looked for: at any token without a mask before it, behind a small block, behind a block
    (the answer's last one is then not cached), or once a block is cached.
    """
    schedule: ClassVar[Literal["one", "even", "alpha"]]
    """Least tokens of a denoise forward: one, until the block is full; or those of a fixed number of forwards, shared
    evenly or by a noise schedule, see `decoders.transfer_schedule`.
    """
    published_block: ClassVar[int] = PUBLISHED_BLOCK
    """Tokens of a block where neither settings nor checkpoint say."""
    clips_last: ClassVar[bool] = False
    """The last block ends at the answer's length limit."""
    samples_first: ClassVar[bool] = False
    """With a shift, a block's first token is sampled as all others; else it is the likeliest."""
    tempered: ClassVar[bool] = True
    """A token's probability is taken after the temperature."""

    block_length: int | None = None
    """Tokens of a block; unset, the checkpoint's own (else PUBLISHED_BLOCK)."""

    def __post_init__(self) -> None:
        if self.block_length is not None:
            check_range("block_length", self.block_length, 1, 4096)
            self.small_block_length(self.block_length)
        check_range("temperature", self.temperature, 0.0, 100.0)
        check_range("top_p", self.top_p, 0.0, 1.0, open_low=True)

    @property
    def rule(self) -> Rule:
        """Confidence in a token."""
        return "probability"

    @property
    def selection(self) -> Selection:
        """The order in which masked slots are written."""
        return "confidence"

    @property
    def confidence_threshold(self) -> float:
        """Confidence above which every token is written; infinity for none."""
        return math.inf

    @property
    def entropy_bound(self) -> float:
        """Of selection by entropy bound, nats."""
        return 0.0

    @property
    def alpha(self) -> Literal["linear", "cosine"]:
        """Noise schedule, of schedule alpha."""
        return "linear"

    @property
    def top_k(self) -> int:
        """Sampling from the likeliest tokens alone; 0 for all."""
        return 0

    @property
    def block_cache(self) -> bool:
        """Whether a small block is fed alone, behind cached states of its block's other slots."""
        return False

    @property
    def nucleus(self) -> float:
        """The nucleus in which confidences are taken, greedy ones as well."""
        return self.top_p if self.temperature > 0 else 1.0

    def block_length_for(self, trained: int | None) -> int:
        """Tokens of a block. trained: the checkpoint's block length, None if it states none."""
        return self.block_length or trained or self.published_block

    def small_block_length(self, block_length: int) -> int:
        """Tokens of a small block. Raises ConfigError if small blocks do not fill the block."""
        return block_length

    def steps_for(self, block_length: int) -> int:
        """Denoise forwards of a block, at most, under a schedule."""
        return block_length

    def check_model(self, k_max: int | None, block_length: int | None) -> None:
        self.small_block_length(self.block_length_for(block_length))


@dataclass(frozen=True)
class NbdiffSettings(BlockDiffusionSettings):
    """NBDiff's public decoder: a block is denoised under bidirectional attention, then cached causally."""

    name = "nbdiff"
    methods = ("nbdiff",)
    context, grid, shift, ends, schedule = "causal", "prompt end", True, "small block", "one"
    samples_first = True

    small_blocks: int = 8
    """Parts of a block, denoised one after another."""
    rule: Rule = "probability"
    """Confidence in a token: its probability, the margin over the second likeliest, or the entropy."""
    confidence: float | None = 0.9
    """All tokens above this confidence are written, for rules probability and margin; unset, one token per pass."""
    max_entropy: float | None = None
    """All tokens below this entropy in nats are written, for rule entropy; unset, one token per pass (public code)."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus sampling, as for ar."""

    def __post_init__(self) -> None:
        check_range("small_blocks", self.small_blocks, 1, 4096)
        super().__post_init__()
        if self.confidence is not None:
            check_range("confidence", self.confidence, 0.0, 1.0)
        if self.max_entropy is not None and (self.rule != "entropy" or self.max_entropy < 0):
            raise ConfigError(f"max_entropy={self.max_entropy}: at least 0, and only for rule=entropy")

    @property
    def nucleus(self) -> float:
        return self.top_p

    def small_block_length(self, block_length: int) -> int:
        """Tokens of a small block, at least 1. Raises ConfigError if the small blocks do not fill the block."""
        if block_length > self.small_blocks and block_length % self.small_blocks:
            raise ConfigError(f"small_blocks={self.small_blocks} must divide block_length={block_length}")
        return max(1, block_length // self.small_blocks)

    @property
    def confidence_threshold(self) -> float:
        """Confidence above which every token is written; infinity for one token per pass."""
        if self.rule == "entropy":
            return math.inf if self.max_entropy is None else -self.max_entropy
        return math.inf if self.confidence is None else self.confidence


@dataclass(frozen=True)
class Bd3lmSettings(BlockDiffusionSettings):
    """dLLM's BD3LM sampler: blocks in place, behind block-causal context, a fixed number of forwards each."""

    name = "bd3lm"
    methods = ("bd3lm",)
    scorer = ""
    context, grid, shift, ends, schedule = "block", "prompt end", False, "block", "alpha"
    clips_last, tempered = True, False

    steps: int | None = None
    """Denoise forwards of a block, at most; unset, one a token. Forwards that would write nothing are skipped."""
    alpha: Literal["linear", "cosine"] = "linear"
    """Noise schedule, which says how many tokens each forward writes."""
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    """Predictions that a forward writes: the most confident ones, or random ones."""
    temperature: float = 0.0
    """0 is greedy. Confidences are taken without it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("alpha", self.alpha, ("linear", "cosine"))
        check_choice("remasking", self.remasking, ("low_confidence", "random"))
        if self.steps is not None:
            check_range("steps", self.steps, 1, 10**6)

    @property
    def selection(self) -> Selection:
        return "random" if self.remasking == "random" else "confidence"

    def steps_for(self, block_length: int) -> int:
        return self.steps or block_length


@dataclass(frozen=True)
class SdarSettings(BlockDiffusionSettings):
    """SDAR's public sampler: blocks from the prompt's start, in place, behind block-causal context."""

    name = "sdar"
    methods = ("sdar",)
    scorer = ""
    context, grid, shift, ends, schedule = "block", "start", False, "commit", "even"
    published_block = 4

    steps: int | None = None
    """Denoise forwards of a block, at most, which share its tokens evenly; unset, one a token."""
    remasking: Literal["dynamic", "static", "sequential", "entropy_bounded"] = "dynamic"
    """Predictions that a forward writes. static: its share, the most confident ones.  dynamic: these, and all above
    `confidence`.  sequential: its share, from the left.  entropy_bounded: those of least entropy, while their sum stays
    under `max_entropy`, one at least.
    """
    confidence: float | None = None
    """Of remasking dynamic; unset, 0.85."""
    max_entropy: float | None = None
    """Of remasking entropy_bounded, in nats; unset, 0.35."""
    temperature: float = 1.0
    """0 is greedy, which the public code has not."""
    top_k: int = 0
    """Sampling from the likeliest tokens alone; 0 for all."""
    top_p: float = 1.0
    """Nucleus sampling, as for ar."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("remasking", self.remasking, ("dynamic", "static", "sequential", "entropy_bounded"))
        if self.steps is not None:
            check_range("steps", self.steps, 1, self.block_length or 4096)
        if self.confidence is not None:
            check_range("confidence", self.confidence, 0.0, 1.0)
        if self.max_entropy is not None:
            check_range("max_entropy", self.max_entropy, 0.0, 1e6)
        check_range("top_k", self.top_k, 0, 10**9)
        for name, owner in (("confidence", "dynamic"), ("max_entropy", "entropy_bounded")):
            if getattr(self, name) is not None and self.remasking != owner:
                raise ConfigError(f"{name}={getattr(self, name)}: only for remasking={owner}, not {self.remasking}")

    @property
    def selection(self) -> Selection:
        if self.remasking == "entropy_bounded":
            return "entropy bound"
        return "sequential" if self.remasking == "sequential" else "confidence"

    @property
    def confidence_threshold(self) -> float:
        if self.remasking != "dynamic":
            return math.inf
        return 0.85 if self.confidence is None else self.confidence

    @property
    def entropy_bound(self) -> float:
        return 0.35 if self.max_entropy is None else self.max_entropy

    def steps_for(self, block_length: int) -> int:
        return self.steps or block_length

    def check_model(self, k_max: int | None, block_length: int | None) -> None:
        if (steps := self.steps or 1) > (length := self.block_length_for(block_length)):
            raise ConfigError(f"steps={steps} must not exceed block_length={length}")


@dataclass(frozen=True)
class FastDllmSettings(BlockDiffusionSettings):
    """Fast-dLLM v2's public sampler: blocks from the prompt's start, filled in small blocks, predictions shifted."""

    name = "fast-dllm-v2"
    methods = ("fast-dllm-v2",)
    scorer = ""
    context, grid, shift, ends, schedule = "block", "start", True, "token", "one"

    small_block: int = 8
    """Tokens of a small block; small blocks are filled one after another."""
    confidence: float | None = 0.9
    """All tokens above this confidence are written; unset, one token per pass."""
    temperature: float = 0.0
    """0 is greedy. A block's first token always is."""
    top_p: float = 0.95
    """Nucleus sampling, as for ar; of no effect at temperature 0."""
    block_cache: bool = False
    """Feed a small block alone once its first token is written; it reads the block's other slots as the last forward of
    the whole block left them. Approximate: their states are out of date, so the text may differ. (Public code's
    `use_block_cache`)
    """

    def __post_init__(self) -> None:
        check_range("small_block", self.small_block, 1, 4096)
        super().__post_init__()
        if self.confidence is not None:
            check_range("confidence", self.confidence, 0.0, 1.0)

    @property
    def approximation(self) -> str:
        if not self.block_cache:
            return ""
        return "decoder.block_cache: approximate; small blocks read states of their block that are out of date"

    @property
    def confidence_threshold(self) -> float:
        return math.inf if self.confidence is None else self.confidence

    def small_block_length(self, block_length: int) -> int:
        if block_length % self.small_block:
            raise ConfigError(f"small_block={self.small_block} must divide block_length={block_length}")
        return self.small_block
