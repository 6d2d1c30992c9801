"""Masked-diffusion decoders, each by its settings: LLaDA's, dLLM's MDLM and Dream's. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..common.errors import ConfigError
from . import DecoderSettings, Rule, check_range


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
