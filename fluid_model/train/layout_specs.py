"""Settings of the layouts of training rows: a recipe's tables fans, blocks and canvas. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..common.fields import at_least
from ..settings import check_range


@dataclass(frozen=True)
class MaskBlockSpec:
    """FLUID's mask blocks; FLUID's code calls them fans. The defaults are its stage 1's (16, 0.5, 10%, all).

    k_max, probability, noise, restore, anchors, depth: see `row_layouts.HybridLayout`.  past_end: in stage
    fluid-horizon, slots past the end of a response count in K*'s mean with loss 0, as in FLUID's public code.  drawn:
    widths by `depth` in place of weights, for gated adapters. See `row_layouts.AllMaskLayout` for both.
    """

    k_max: int = 16
    probability: float = 0.5
    noise: float = 0.1
    restore: float = 1.0
    anchors: int | None = None
    depth: float = 1.0
    past_end: bool = False
    drawn: bool = False

    def __post_init__(self) -> None:
        at_least("fans.k_max", self.k_max, 1)
        check_range("fans.probability", self.probability, 0.0, 1.0, open_low=True)
        check_range("fans.noise", self.noise, 0.0, 1.0)
        check_range("fans.restore", self.restore, 0.0, 1.0)
        at_least("fans.anchors", self.anchors, 1)
        check_range("fans.depth", self.depth, 0.0, 1.0, open_low=True)


@dataclass(frozen=True)
class BlockSpec:
    """Blocks of the stages nbdiff and bd3lm.

    length: tokens.  first, every: block length at step 0, and steps between its doublings (every=0: full length from
    the start).  by_noise: weigh a masked token 1/t, in nbdiff.  shift: see `CanvasSpec`, for bd3lm.
    """

    length: int = 32
    first: int = 1
    every: int = 0
    by_noise: bool = False
    shift: bool = False

    def __post_init__(self) -> None:
        at_least("blocks.length", self.length, 1)
        check_range("blocks.first", self.first, 1, self.length)
        at_least("blocks.every", self.every, 0)


@dataclass(frozen=True)
class CanvasSpec:
    """The canvas of the stages llada and mdlm.

    fill: tokens behind a row, learnt like the response. random: a random number of end tokens, at most until the
    response has `length` tokens.  batch: up to the longest row of a device's batch; in mdlm with padding tokens if the
    tokenizer has one (dLLM), in llada with end tokens (LLaDA's guidelines).  Unset: batch in mdlm, random in llada.
    shift: a masked token is predicted at the slot before it, where the parent predicts it, too (DiffuLLaMA, arXiv
    2410.17891; Dream, arXiv 2508.15487). LLaDA predicts in place.
    """

    length: int = 128
    shift: bool = False
    fill: Literal["random", "batch"] | None = None

    def __post_init__(self) -> None:
        at_least("canvas.length", self.length, 1)
