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


@dataclass(frozen=True)
class CanvasSettings(DecoderSettings):
    """Masked diffusion under full attention: a canvas of masks, denoised block by block."""

    needs = ("mask token",)
    scorer = "fluid_model.decoders.canvas:open_scorer"

    steps: int | None = None
    """Forwards for the canvas, shared by its blocks; unset, one per token."""
    gen_length: int | None = None
    """Canvas in tokens; unset, the task's length limit."""
    block_length: int | None = None
    """Tokens of a block; blocks are denoised from left to right. Unset, the whole canvas is one."""
    guidance: float = 0.0
    """Classifier-free guidance; above 0 every step takes a second forward, with the prompt masked."""
    temperature: float = 0.0
    """Of Gumbel noise on the logits; 0 is greedy."""
    whole_canvas: bool = False
    """Denoise blocks behind the end of the answer, too, as the public code does. The text is the same."""
    mc_num: int = 128
    """Monte Carlo samples of a log-likelihood; a continuation of one token needs none."""
    shift: bool | None = None
    """Predict a masked token at the slot before it, as Dream does, or in place as LLaDA; unset, the checkpoint says."""

    def __post_init__(self) -> None:
        for name in ("steps", "gen_length"):
            if (value := getattr(self, name)) is not None:
                check_range(name, value, 1, 10**6)
        if self.block_length is not None:
            check_range("block_length", self.block_length, 1, 4096)
        check_range("mc_num", self.mc_num, 1, 10**6)
        check_range("guidance", self.guidance, 0.0, 100.0)
        check_range("temperature", self.temperature, 0.0, 100.0)

    def shift_for(self, trained: bool) -> bool:
        """Whether predictions are shifted. trained: whether the checkpoint's are."""
        return trained if self.shift is None else self.shift

    def answer_slots(self, max_new_tokens: int) -> int:
        return max(max_new_tokens, self.canvas(max_new_tokens)[0])

    def canvas(self, max_new_tokens: int) -> tuple[int, int]:
        """(tokens of the canvas, steps per block, rounded up) for answers of up to max_new_tokens."""
        length = self.gen_length or max_new_tokens
        blocks = -(-length // (self.block_length or length))
        return length, -(-(self.steps or length) // blocks)


@dataclass(frozen=True)
class LladaSettings(CanvasSettings):
    """LLaDA's decoder: a canvas under full attention, denoised block by block."""

    name = "llada"
    methods = ("llada", "mdlm")
    strategy = "fluid_model.decoders.llada:LladaStrategy"

    gen_length: int | None = None
    """Canvas in tokens; unset, the task's length limit, rounded up to a multiple of block_length."""
    block_length: int = 32
    """Tokens of a block; blocks are denoised from left to right."""
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    """Predictions that a step writes: the most confident ones, or random ones."""
    suppress_end: bool = False
    """Give end tokens the lowest confidence, so that they are written last; above temperature 0, all but the
    tokenizer's own (the public code's `confidence_eos_eot_inf`). For low_confidence.
    """
    logits_eos_inf: bool = False
    """Never write the tokenizer's end of sequence. (The public code's name.)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gen_length is not None:
            self.canvas(self.gen_length)

    def canvas(self, max_new_tokens: int) -> tuple[int, int]:
        """(tokens of the canvas, forwards per block) for answers of up to max_new_tokens.

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


@dataclass(frozen=True)
class MdlmSettings(CanvasSettings):
    """Masked diffusion as dLLM's MDLM sampler: full attention, slots by a noise schedule."""

    name = "mdlm"
    methods = ("mdlm", "llada")
    strategy = "fluid_model.decoders.mdlm:MdlmStrategy"

    rule: Rule | Literal["random"] = "probability"
    """Slots that a step writes: those with the highest confidence (a token's probability, the margin over the second
    likeliest, or the negative entropy), or random ones.
    """
    schedule: Literal["linear", "cosine", "timesteps"] = "linear"
    """How many slots a step writes. linear, cosine: by dLLM's alpha schedulers, rounded, a step that writes none left
    out; timesteps: Dream's, evenly from 1 to `eps`, rounded down, the rest at the last step.
    """
    stochastic_transfer: bool = False
    """Draw that number, as if each masked slot were written by chance. With rule=random: Dream's `origin`."""
    eps: float = 1e-3
    """Last of Dream's timesteps."""
    top_p: float = 1.0
    """Tokens from the smallest set of the likeliest ones whose probability exceeds top_p."""
    top_k: int | None = None
    """Tokens from the top_k likeliest; unset, all."""
    confidence_of: Literal["model", "sampled"] = "model"
    """Whose probabilities confidence is: the model's, or those after temperature, top_p and top_k (Dream)."""
    alg_temp: float = 0.0
    """Of Gumbel noise on confidences, which then choose slots by chance; 0 is none. (Dream's name)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("top_p", self.top_p, 0.0, 1.0, open_low=True)
        if self.top_k is not None:
            check_range("top_k", self.top_k, 1, 10**6)
        check_range("eps", self.eps, 0.0, 1.0, open_low=True)
        check_range("alg_temp", self.alg_temp, 0.0, 100.0)


@dataclass(frozen=True)
class DreamSettings(MdlmSettings):
    """Masked diffusion as Dream, DiffuCoder and open-dcoder write: the lowest entropy first."""

    name = "dream"

    rule: Rule | Literal["random"] = "entropy"
    schedule: Literal["linear", "cosine", "timesteps"] = "timesteps"
    confidence_of: Literal["model", "sampled"] = "sampled"
