"""WeDLM's decoder, by its settings. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from . import DecoderSettings, check_range


@dataclass(frozen=True)
class WedlmSettings(DecoderSettings):
    """WeDLM's public engine: a sliding window of masks under causal attention, written tokens fed before masks."""

    name = "wedlm"
    methods = ("wedlm",)
    needs = ("mask token",)
    strategy = "fluid_model.decoders.wedlm:WedlmStrategy"

    window: int = 16
    """Slots behind the committed tokens, written or masked. A step feeds up to twice as many."""
    max_entropy: float | None = 0.4
    """A step writes all masks whose entropy in nats, with the distance penalty, is below this; where none is, and
    unset, the one with the least.
    """
    distance_penalty: float = 0.02
    """Added to a mask's entropy for each place behind the first mask."""
    temperature: float = 0.0
    """0 is greedy. Of tokens alone: entropies are the model's own."""
    top_p: float = 1.0
    """Tokens from the smallest set of the likeliest ones whose probability exceeds top_p, before temperature."""
    top_k: int = 0
    """Sampling from the likeliest tokens alone, before top_p; 0 for all."""

    def __post_init__(self) -> None:
        check_range("window", self.window, 1, 4096)
        if self.max_entropy is not None:
            check_range("max_entropy", self.max_entropy, 0.0, 1e6)
        check_range("distance_penalty", self.distance_penalty, 0.0, 1e6)
        check_range("temperature", self.temperature, 0.0, 100.0)
        check_range("top_p", self.top_p, 0.0, 1.0, open_low=True)
        check_range("top_k", self.top_k, 0, 10**9)
