"""Plain sampler of a sliding window: WeDLM."""

from __future__ import annotations

import torch

from fluid_model.checkpoints.checkpoint import Checkpoint
from fluid_model.engine.records import Request
from fluid_model.settings.wedlm import WedlmSettings

from .plain import PlainRow, Written, causal, forward


def plain_wedlm(checkpoint: Checkpoint, request: Request, decoder: WedlmSettings) -> Written:
    """As the engine of github.com/Tencent/WeDLM at 0216110f2469. Its prefill predicts nothing."""
    row = PlainRow(checkpoint, request)
    row.forwards["prefill"] += 1
    window: list[int | None] = [None] * decoder.window
    while True:
        # 1) tokens first, then masks, at their own places
        start, front = len(row.ids), next((j for j, token in enumerate(window) if token is None), len(window))
        window += [None] * front
        masks = [j for j, token in enumerate(window) if token is None]
        tokens = {j: token for j, token in enumerate(window) if token is not None}
        ids = [*row.ids, *tokens.values(), *[row.mask] * len(masks)]
        places = [*range(start), *(start + j for j in [*tokens, *masks])]
        row.forwards["denoise"] += 1
        logits = forward(checkpoint, ids, causal(len(ids)), places=places)[-len(masks) :]
        # 2) the tokens in front are text
        row.ids += list(tokens.values())[:front]
        if row.ended(row.answer) or row.left <= 0:
            return row.written()
        # 3) those of low entropy, or the one of least
        chance = logits.softmax(-1)
        entropy = -(chance * chance.log()).sum(-1) + (torch.tensor(masks) - masks[0]) * decoder.distance_penalty
        low = [] if decoder.max_entropy is None else (entropy < decoder.max_entropy).nonzero()[:, 0].tolist()
        draws = torch.rand(decoder.window, generator=row.random)
        for k in low or [int(entropy.argmin())]:
            order = logits[k].argsort(descending=True, stable=True)[: decoder.top_k or None]
            sums = logits[k][order].softmax(-1).cumsum(-1)
            order = order[: 1 + int((sums <= decoder.top_p).sum())]
            heat = decoder.temperature
            rank = int(((logits[k][order] / heat).softmax(-1).cumsum(-1) <= draws[k]).sum()) if heat else 0
            window[masks[k]] = int(order[min(rank, len(order) - 1)])
        window = window[front:]
