"""Decoders, one strategy a file: `ar`, `fluid` (speculative decoding with its own drafts), `fluid_reference` (FLUID's
published sampler), `nbdiff` (block diffusion), `llada` (masked diffusion). `engine.loop` runs any of them.
"""

from __future__ import annotations

from ..checkpoints.checkpoint import Checkpoint
from ..common.errors import ConfigError
from ..engine.loop import Engine
from ..engine.strategy import Strategy
from ..scoring.loglikelihood import Scorer
from ..scoring.monte_carlo import CanvasScorer
from ..settings import ArSettings, DecoderSettings, FluidSettings, LladaSettings, NbdiffSettings
from .ar import ArStrategy
from .fluid import FluidStrategy
from .fluid_reference import FluidReferenceStrategy
from .llada import LladaStrategy
from .nbdiff import NbdiffStrategy


def strategy_for(checkpoint: Checkpoint, settings: DecoderSettings) -> Strategy:
    """The strategy that carries out these settings. Raises ConfigError if the checkpoint cannot serve them."""
    if isinstance(settings, ArSettings):
        return ArStrategy(checkpoint.backbone, settings)
    if isinstance(settings, FluidSettings):
        return _fluid(checkpoint, settings)
    if checkpoint.mask_id is None:
        raise ConfigError(f"decoder={settings.name} needs a mask token, and this model has none; use --decoder ar")
    if isinstance(settings, NbdiffSettings):
        length = settings.block_length_for(checkpoint.manifest.block_length if checkpoint.manifest else None)
        return NbdiffStrategy(checkpoint.backbone, checkpoint.mask_id, checkpoint.end_ids, length, settings)
    eos_id, shift = checkpoint.tokenizer.eos_token_id, _shift(checkpoint, settings)
    return LladaStrategy(checkpoint.backbone, checkpoint.mask_id, eos_id, checkpoint.end_ids, settings, shift=shift)


def _shift(checkpoint: Checkpoint, settings: LladaSettings) -> bool:
    return settings.shift_for(trained=checkpoint.manifest is not None and checkpoint.manifest.shift)


def _fluid(checkpoint: Checkpoint, settings: FluidSettings) -> Strategy:
    if checkpoint.head is None or checkpoint.mask_id is None:
        raise ConfigError(f"decoder={settings.name} needs a K-head, and this model has none; use --decoder ar")
    if settings.min_horizon > checkpoint.head.k_max:
        raise ConfigError(f"min_horizon={settings.min_horizon} exceeds the head's k_max={checkpoint.head.k_max}")
    strategy = FluidStrategy if settings.rounds == "one" else FluidReferenceStrategy
    return strategy(checkpoint.backbone, checkpoint.head, checkpoint.mask_id, settings)


def scorer_for(checkpoint: Checkpoint, settings: DecoderSettings, batch_size: int = 16) -> Scorer | CanvasScorer:
    """Log-likelihoods as this checkpoint defines them: exact under causal attention, Monte-Carlo estimates under
    bidirectional attention.
    """
    if isinstance(settings, LladaSettings) and checkpoint.mask_id is not None:
        shift = _shift(checkpoint, settings)
        return CanvasScorer(checkpoint.backbone, checkpoint.mask_id, batch_size, settings.mc_num, shift=shift)
    return Scorer(checkpoint.backbone, batch_size)


def engine_for(checkpoint: Checkpoint, settings: DecoderSettings, batch_size: int = 16) -> Engine:
    """An engine that decodes this checkpoint with these settings, `batch_size` rows at a time."""
    strategy = strategy_for(checkpoint, settings)
    return Engine(checkpoint.backbone, checkpoint.tokenizer, checkpoint.end_ids, strategy, batch_size)
