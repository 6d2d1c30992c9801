"""Small strategies, one file each: what to feed and what to keep."""

from __future__ import annotations

from ..checkpoint import Checkpoint
from ..engine.loop import Engine
from ..engine.strategy import Strategy
from ..errors import ConfigError
from ..settings import ArSettings, DecoderSettings
from .ar import ArStrategy
from .fluid import FluidStrategy


def strategy_for(checkpoint: Checkpoint, settings: DecoderSettings) -> Strategy:
    """The strategy that carries out these settings. Raises ConfigError if the checkpoint cannot serve them."""
    if isinstance(settings, ArSettings):
        return ArStrategy(checkpoint.backbone, settings)
    if checkpoint.head is None or checkpoint.mask_id is None:
        raise ConfigError(f"decoder={settings.name} needs a K-head, and this model has none; use --decoder ar")
    if settings.min_horizon > checkpoint.head.k_max:
        raise ConfigError(f"min_horizon={settings.min_horizon} exceeds the head's k_max={checkpoint.head.k_max}")
    return FluidStrategy(checkpoint.backbone, checkpoint.head, checkpoint.mask_id, settings)


def engine_for(checkpoint: Checkpoint, settings: DecoderSettings, slots: int = 16) -> Engine:
    """An engine that decodes this checkpoint with these settings, `slots` rows at a time."""
    strategy = strategy_for(checkpoint, settings)
    return Engine(checkpoint.backbone, checkpoint.tokenizer, checkpoint.end_ids, strategy, slots)
