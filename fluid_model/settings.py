"""Decoder settings: what a user may choose about how a model writes. No torch here, so that errors come early.

Naming (FLUID, arXiv 2605.27387): tau is the training-time bound that labels the K-head and belongs to a checkpoint;
gamma is `confidence`, the inference-time acceptance probability. They are never the same knob.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from .errors import ConfigError


def check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Raise ConfigError unless low <= value <= high (low < value if `open_low`)."""
    if not (low < value if open_low else low <= value) or value > high:
        bracket = "(" if open_low else "["
        raise ConfigError(f"{name}={value} must lie in {bracket}{low}, {high}]")


@dataclass(frozen=True)
class ArSettings:
    """One token a forward: the yardstick every other decoder is measured against."""

    name: ClassVar[str] = "ar"
    widest: ClassVar[int] = 1
    needs_head: ClassVar[bool] = False

    temperature: float = 0.0
    """0 is greedy; above it, sampling from softmax(logits / temperature)."""
    top_p: float = 1.0
    """Nucleus: the smallest set of tokens whose probability reaches top_p."""

    def __post_init__(self) -> None:
        check_range("temperature", self.temperature, 0.0, 100.0)
        check_range("top_p", self.top_p, 0.0, 1.0, open_low=True)


@dataclass(frozen=True)
class FluidSettings:
    """FLUID's public sampler (reference semantics): K-head stride, confidence fill, causal verification. Greedy."""

    name: ClassVar[str] = "fluid"
    needs_head: ClassVar[bool] = True

    confidence: float = 0.9
    """gamma: a drafted token is written ahead of the pointer when its probability exceeds this."""
    min_horizon: int = 1
    """Floor of the stride. The public code's cached version uses 4, the uncached one 1."""
    max_horizon: int = 16
    """Ceiling of the stride (K_max); above what the K-head was trained for it changes nothing."""
    verify: bool = True
    """Check drafts by the causal model before keeping them; the text is then that of greedy AR."""

    def __post_init__(self) -> None:
        check_range("confidence", self.confidence, 0.0, 1.0)
        if self.max_horizon < 1:
            raise ConfigError(f"max_horizon={self.max_horizon} must be at least 1")
        if not 1 <= self.min_horizon <= self.max_horizon:
            raise ConfigError(f"min_horizon={self.min_horizon} must lie in 1..max_horizon={self.max_horizon}")

    @property
    def widest(self) -> int:
        """The most slots one row feeds in one forward."""
        return self.max_horizon


DecoderSettings = ArSettings | FluidSettings
DECODERS: dict[str, type[ArSettings] | type[FluidSettings]] = {"ar": ArSettings, "fluid": FluidSettings}


def setting_names(decoder: str) -> list[str]:
    """Names a user may set on a decoder, in declaration order."""
    return [f.name for f in fields(DECODERS[decoder])]
