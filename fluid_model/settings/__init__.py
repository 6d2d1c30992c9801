"""Decoders, each by its settings: one class states all that other code asks of a decoder. Validated without torch.

FLUID (arXiv 2605.27387) has two bounds: tau, of the training loss that labels the K-head, belongs to a checkpoint;
gamma, the acceptance probability at inference, is `confidence` here. `registry` finds these classes by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..common.errors import ConfigError

Rule = Literal["probability", "margin", "entropy"]
"""Confidence in a predicted token: its probability, the margin over the second likeliest, or the negative entropy."""


def check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Raise ConfigError unless low <= value <= high (low < value if `open_low`)."""
    if not (low < value if open_low else low <= value) or value > high:
        bracket = "(" if open_low else "["
        raise ConfigError(f"{name}={value} must lie in {bracket}{low}, {high}]")


@dataclass(frozen=True)
class DecoderSettings:
    """A decoder: subclass it as a frozen dataclass, whose fields are the settings and whose docstring describes it.

    A preset of another decoder is a subclass of that one's settings with other defaults.
    """

    name: ClassVar[str] = ""
    """As `--decoder` takes it. Left out, it is `module:Class`; a name of its own needs an entry point."""
    methods: ClassVar[tuple[str, ...]] = ()
    """Adaptations that it needs of a checkpoint, one of them; none: any causal model. The first registered decoder that
    serves a checkpoint is its default, one named as the adaptation before others.
    """
    needs: ClassVar[tuple[Literal["K-head", "mask token"], ...]] = ()
    """Parts that the checkpoint must have."""
    strategy: ClassVar[str] = ""
    """`module:callable` of (checkpoint, settings) that opens the `engine.strategy.Strategy`; imported when needed."""
    scorer: ClassVar[str | None] = None
    """`module:callable` of (checkpoint, settings, batch_size) for log-likelihoods of weights that attend in both
    directions, which ar cannot decode; None: exact ones, under causal attention; empty: none are defined.
    """

    def __init_subclass__(cls) -> None:
        if "name" not in vars(cls):
            cls.name = f"{cls.__module__}:{cls.__qualname__}"

    @property
    def temperature(self) -> float:
        """0 is greedy, as a decoder without this setting is."""
        return 0.0

    @property
    def top_p(self) -> float:
        """Nucleus sampling; 1 for all tokens."""
        return 1.0

    @property
    def writes_ar_text(self) -> bool:
        """Whether it is lossless: its text is that of ar with the same weights."""
        return False

    @property
    def approximation(self) -> str:
        """What these settings leave out of the method's own computation, for a run's notices; empty if nothing."""
        return ""

    @property
    def drafts_by_cost(self) -> bool:
        """Whether drafts depend on a slot's marginal cost, and tokens/forward therefore on rows and slot budget."""
        return False

    @property
    def drafts_by_time(self) -> bool:
        """Whether that cost is measured time, as the setting `slot_budget` is unset."""
        return False

    def answer_slots(self, max_new_tokens: int) -> int:
        """Slots of the context window for an answer of up to max_new_tokens. Raises ConfigError if none can hold it."""
        return max_new_tokens

    def check_model(self, k_max: int | None, block_length: int | None) -> None:
        """Raise ConfigError if these settings do not fit a checkpoint's K-head or trained block length."""


@dataclass(frozen=True)
class ArSettings(DecoderSettings):
    """Autoregressive decoding, one token per forward: the baseline of every other decoder."""

    name = "ar"
    strategy = "fluid_model.decoders.ar:open_strategy"

    temperature: float = 0.0
    """0 is greedy; above it, sampling from softmax(logits / temperature)."""
    top_p: float = 1.0
    """Nucleus sampling: from the smallest set of tokens whose probability reaches top_p."""

    def __post_init__(self) -> None:
        check_range("temperature", self.temperature, 0.0, 100.0)
        check_range("top_p", self.top_p, 0.0, 1.0, open_low=True)

    @property
    def writes_ar_text(self) -> bool:
        return True


@dataclass(frozen=True)
class FluidSettings(DecoderSettings):
    """FLUID: K-head stride, draft tokens from mask blocks, causal verification."""

    name = "fluid"
    methods = ("fluid",)
    needs = ("K-head", "mask token")
    strategy = "fluid_model.decoders.fluid:open_strategy"

    rounds: Literal["one", "reference"] = "one"
    """one: one forward per step verifies draft tokens and predicts the next ones; reference: the public sampler's
    several forwards per step.
    """
    confidence: float = 0.9
    """gamma: a draft token above this probability is accepted (unverified) or written ahead of the pointer (reference).
    Verified steps of one forward do not use it.
    """
    min_horizon: int = 1
    """Smallest stride. The public code's cached version uses 4, the uncached one 1."""
    max_horizon: int = 16
    """Largest stride (K_max); values above the K-head's own have no effect."""
    verify: bool = True
    """Verify draft tokens by the causal model; the text is then that of AR."""
    slot_budget: int | None = None
    """Slots whose marginal cost equals a forward's fixed cost. The larger, the more slots a verified step feeds for the
    same expected gain. Unset, drafts follow measured time, and forwards differ from run to run. It never changes text.
    """
    candidates: int = 4
    """Sibling candidates per position of a greedy draft tree: the top-k tokens of a mask slot, as far as slots allow.
    1: a chain, as sampled drafts are. It changes speed, never verified text.
    """
    temperature: float = 0.0
    """0 is greedy; above it, steps of one forward sample as ar does."""
    top_p: float = 1.0
    """Nucleus sampling, as for ar."""

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

    @property
    def writes_ar_text(self) -> bool:
        return self.verify

    @property
    def drafts_by_cost(self) -> bool:
        return self.verify and self.rounds == "one"

    @property
    def drafts_by_time(self) -> bool:
        return self.drafts_by_cost and self.slot_budget is None

    def check_model(self, k_max: int | None, block_length: int | None) -> None:
        if k_max is not None and self.min_horizon > k_max:
            raise ConfigError(
                f"min_horizon={self.min_horizon} exceeds what this model's K-head was trained for (k_max={k_max})"
            )
