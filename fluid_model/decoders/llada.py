"""LLaDA's decoder: each step writes the most confident predictions of a block, the same number at every step.

(arXiv 2502.09992, low-confidence remasking under the linear schedule.) The rest is `canvas`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint
from ..settings.masked_diffusion import LladaSettings
from . import transfer_schedule
from .canvas import CanvasState, CanvasStrategy, gumbel


class LladaStrategy(CanvasStrategy):
    """A canvas filled as LLaDA does."""

    settings: LladaSettings

    def __init__(self, checkpoint: Checkpoint, settings: LladaSettings) -> None:
        super().__init__(checkpoint, settings)
        eos_id = checkpoint.tokenizer.eos_token_id  # the tokenizer's end of sequence is LLaDA's EOS, the others its EoT
        self._eos = [] if eos_id is None else [eos_id]
        self._other_ends = [token for token in checkpoint.end_ids if token != eos_id]

    def _schedule(self, state: CanvasState, masked: int) -> tuple[int, ...]:
        return transfer_schedule.even(masked, state.steps)

    def _predict(self, state: CanvasState, logits: Tensor) -> tuple[Tensor, Tensor]:
        """As in the public code, a suppressed end loses its logit: `logits_eos_inf` before the token is chosen,
        `suppress_end` after it, where confidences are computed, so that those of other tokens rise. The public code
        suppresses EOS in the noisy logits, which are a copy at temperatures above 0: EOS keeps its confidence there.
        """
        settings, logits = self.settings, logits.cpu()
        if settings.logits_eos_inf:
            logits = _suppress(logits, self._eos)
        token = gumbel(logits, settings.temperature, state.generator).argmax(-1)
        if settings.remasking == "random":
            return token, torch.rand(len(token), generator=state.generator)
        if settings.suppress_end:
            logits = _suppress(logits, self._other_ends + (self._eos if settings.temperature == 0 else []))
        return token, logits.softmax(-1).gather(-1, token[:, None])[:, 0]


def _suppress(logits: Tensor, tokens: list[int]) -> Tensor:
    """Logits in which these tokens have no probability. (M, V)"""
    return logits.index_fill(-1, torch.tensor(tokens, dtype=torch.long), -torch.inf)
