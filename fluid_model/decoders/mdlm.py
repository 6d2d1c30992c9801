"""Masked diffusion as dLLM's MDLM sampler and Dream's `diffusion_generate`, by settings; the rest is `canvas`.

    public name                  settings
    remasking=low_confidence     rule=probability             (dLLM)
    alg=maskgit_plus             rule=probability             (Dream)
    alg=topk_margin, entropy     rule=margin, entropy         (Dream)
    alg=origin                   rule=random, stochastic_transfer

Legend: M open slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..settings.masked_diffusion import MdlmSettings
from . import transfer_schedule
from .canvas import CanvasState, CanvasStrategy, gumbel
from .sampling import LOG_OFFSET, restrict


class MdlmStrategy(CanvasStrategy):
    """A canvas filled by a noise schedule."""

    settings: MdlmSettings

    def _schedule(self, state: CanvasState, masked: int) -> Sequence[float]:
        """Slots of each step, zeros left out; of Dream's timesteps the share of masked slots, at each of them."""
        if self.settings.schedule == "timesteps":
            return _timesteps(state.steps, self.settings.eps)
        if not self.settings.stochastic_transfer:
            return transfer_schedule.by_alpha(masked, state.steps, self.settings.schedule)
        counts = []
        for share in transfer_schedule.alpha_shares(state.steps, self.settings.schedule):
            counts.append(min(self._transfers(state, masked, share), masked))
            masked -= counts[-1]
        return [count for count in counts if count]

    def _count(self, state: CanvasState, masked: int) -> int:
        entry = state.schedule[state.step]
        return self._transfers(state, masked, entry) if self.settings.schedule == "timesteps" else int(entry)

    def _transfers(self, state: CanvasState, masked: int, share: float) -> int:
        """Slots to write out of this many."""
        if self.settings.stochastic_transfer:
            return int((torch.rand(masked, generator=state.generator) < share).sum())
        return int(torch.tensor(float(masked)) * share)  # in float32, as there

    def _predict(self, state: CanvasState, logits: Tensor) -> tuple[Tensor, Tensor]:
        settings, random, logits = self.settings, state.generator, logits.cpu()
        # 1) a token of each slot
        heat = settings.temperature
        sampled = restrict(logits / heat if heat else logits, settings.top_p, settings.top_k)  # (M, V)
        token = gumbel(sampled, float(heat > 0), random).argmax(-1)
        # 2) its confidence
        probability = (sampled if settings.confidence_of == "sampled" else logits).softmax(-1)  # (M, V)
        if settings.rule == "random":
            confidence = torch.rand(len(token), generator=random)
        elif settings.rule == "margin":
            first, second = probability.topk(2).values.unbind(-1)
            confidence = first - second
        elif settings.rule == "entropy":
            confidence = (probability * (probability + LOG_OFFSET).log()).sum(-1)
        else:
            confidence = probability.gather(-1, token[:, None])[:, 0]
        # 3) slots by chance: the best of noisy confidences, which is drawing without replacement
        if settings.alg_temp:
            confidence = gumbel(confidence / settings.alg_temp, 1.0, random).float()
        return token, confidence


def _timesteps(steps: int, eps: float) -> tuple[float, ...]:
    """Share of the masked slots that each of Dream's steps writes, 1 at the last. In float32, as in the public code."""
    time = torch.linspace(1, eps, steps + 1)
    return (*(1 - time[1:] / time[:-1]).tolist()[:-1], 1.0)
