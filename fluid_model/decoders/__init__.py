"""Decoders, one strategy a file: `ar`, `fluid` (speculative decoding with its own drafts), `fluid_reference` (FLUID's
published sampler), `block_diffusion` (NBDiff and others), `wedlm` (a sliding window), `llada` and `mdlm` (masked
diffusion, on a `canvas`). `engine.loop` runs any of them; `registry` finds them.
"""

from __future__ import annotations

import inspect

from ..checkpoints.checkpoint import Checkpoint
from ..common.errors import ConfigError
from ..engine.loop import Engine
from ..engine.strategy import Strategy
from ..registry import resolve
from ..scoring.loglikelihood import Scorer
from ..scoring.monte_carlo import CanvasScorer
from ..settings import DecoderSettings

_METHODS = ("prompt_mask_block", "draft_policy", "allocate", "admit", "plan", "absorb", "move")
"""What a strategy's class has, beside `max_slots` and `prefills_prompt`."""


def check_strategy(settings: DecoderSettings) -> None:
    """Raise ConfigError if a decoder's code cannot be imported, or its strategy lacks a method."""
    opens = resolve(settings.strategy)
    lacking = [name for name in _METHODS if not hasattr(opens, name)] if inspect.isclass(opens) else []
    if lacking:
        raise ConfigError(f"decoder={settings.name}: {settings.strategy} lacks {', '.join(lacking)}")
    if settings.scorer:
        resolve(settings.scorer)


def strategy_for(checkpoint: Checkpoint, settings: DecoderSettings) -> Strategy:
    """The strategy that carries out these settings. Raises ConfigError if the checkpoint cannot serve them."""
    _check_checkpoint(checkpoint, settings)
    strategy: Strategy = resolve(settings.strategy)(checkpoint, settings)
    return strategy


def scorer_for(checkpoint: Checkpoint, settings: DecoderSettings, batch_size: int = 16) -> Scorer | CanvasScorer:
    """Log-likelihoods as this checkpoint defines them: exact under causal attention, Monte-Carlo estimates under
    bidirectional attention. Raises ConfigError where the method defines none.
    """
    if settings.scorer == "":
        raise ConfigError(f"decoder={settings.name} defines no log-likelihood; run tasks that generate text")
    if settings.scorer is None:
        return Scorer(checkpoint.backbone, batch_size)
    _check_checkpoint(checkpoint, settings)
    scorer: CanvasScorer = resolve(settings.scorer)(checkpoint, settings, batch_size)
    return scorer


def engine_for(checkpoint: Checkpoint, settings: DecoderSettings, batch_size: int = 16) -> Engine:
    """An engine that decodes this checkpoint with these settings, `batch_size` rows at a time."""
    strategy = strategy_for(checkpoint, settings)
    return Engine(checkpoint.backbone, checkpoint.tokenizer, checkpoint.end_ids, strategy, batch_size)


def _check_checkpoint(checkpoint: Checkpoint, settings: DecoderSettings) -> None:
    parts = {"K-head": checkpoint.head, "mask token": checkpoint.mask_id}
    for part in settings.needs:
        if parts[part] is None:
            raise ConfigError(f"decoder={settings.name} needs a {part}, and this model has none; use --decoder ar")
    k_max = checkpoint.head.k_max if checkpoint.head is not None else None
    settings.check_model(k_max, checkpoint.manifest.block_length if checkpoint.manifest else None)
