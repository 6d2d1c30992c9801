"""Settings of masked diffusion as dLLM's MDLM sampler and Dream's `diffusion_generate` have them. No torch.

They differ in how many slots a step writes (`schedule`), which (`rule`), and where confidences come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .settings import CanvasSettings, Rule, check_range


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
    """Masked diffusion as Dream, DiffuCoder and open-dcoder write: a step's surest slots by entropy."""

    name = "dream"

    rule: Rule | Literal["random"] = "entropy"
    schedule: Literal["linear", "cosine", "timesteps"] = "timesteps"
    confidence_of: Literal["model", "sampled"] = "sampled"
