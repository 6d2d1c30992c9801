"""Plain samplers of block diffusion: NBDiff, dLLM's BD3LM, SDAR, Fast-dLLM v2."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fluid_model.checkpoints.checkpoint import Checkpoint
from fluid_model.engine.records import Kind, Request
from fluid_model.settings.block_diffusion import (
    Bd3lmSettings,
    BlockDiffusionSettings,
    FastDllmSettings,
    NbdiffSettings,
    SdarSettings,
)

from .plain import PlainRow, Written, causal, forward_alone, forward_and_states, in_blocks, sample


class _Blocks(PlainRow):
    """A row written in blocks. length: tokens of a block."""

    def __init__(self, checkpoint: Checkpoint, request: Request, decoder: BlockDiffusionSettings) -> None:
        super().__init__(checkpoint, request)
        self.decoder, self.length = decoder, decoder.block_length or 0
        self.first = len(request.prompt) if decoder.grid == "prompt end" else 0

    def logits(self, kind: Kind, ids: Sequence[int]) -> Tensor:
        """All read what is in their own block or before it."""
        return self.ask(kind, ids, in_blocks(len(ids), self.first, self.length))

    def sample(self, logits: Tensor) -> tuple[list[int], Tensor]:
        """A token of each slot and the probabilities that it is drawn from. A row draws for whole blocks."""
        decoder = self.decoder
        draws = torch.rand(self.length, generator=self.random) if decoder.temperature else torch.zeros(self.length)
        return sample(logits, draws[: len(logits)], decoder.temperature, decoder.top_p, decoder.top_k)

    def open(self, block: Sequence[int]) -> list[int]:
        """Masked slots of a block."""
        return [j for j, token in enumerate(block) if token == self.mask]


def plain_nbdiff(checkpoint: Checkpoint, request: Request, decoder: NbdiffSettings) -> Written:
    """As github.com/YuchuanTian/NBDiff at e0c10f3bc53c.

    The end is looked for after every small block; a block without one is committed, the last as well.
    """
    row = _Blocks(checkpoint, request, decoder)
    small, mask = -(-row.length // min(decoder.small_blocks, row.length)), row.mask
    first = row.ask("prefill", row.ids, causal(len(row.ids)))[-1:]
    while row.left > 0:
        start = len(row.ids)
        block = [*row.sample(first)[0], *[mask] * (row.length - 1)]
        for low in range(0, row.length, small):
            while open_ := [j for j in row.open(block) if low <= j < low + small]:
                ids = row.ids + block
                logits = row.ask("denoise", ids, causal(len(ids), both_from=start))[start:]
                token, chances = row.sample(torch.cat([logits[:1], logits[:-1]]))
                top = chances.topk(2).values
                score = {
                    "probability": chances[range(len(token)), token],
                    "margin": top[:, 0] - top[:, 1],
                    "entropy": (chances * (chances + 1e-10).log()).sum(-1),
                }[decoder.rule].tolist()
                best = max(open_, key=score.__getitem__)
                written = [j for j in open_ if j == best or score[j] > decoder.confidence_threshold]
                assert any(token[j] != mask for j in written), "the public code would not end"
                for j in written:
                    block[j] = token[j]
            if row.ended(block):
                row.ids += block
                return row.written()
        row.ids += block
        first = row.ask("commit", row.ids, causal(len(row.ids)))[-1:]
    return row.written()


def plain_bd3lm(checkpoint: Checkpoint, request: Request, decoder: Bd3lmSettings) -> Written:
    """As github.com/ZHZisZZ/dllm, whose prefix forward of each block is the prefill or the last block's commit here."""
    row = _Blocks(checkpoint, request, decoder)
    while row.left > 0 and not row.ended(row.answer):
        row.forwards["commit" if row.answer else "prefill"] += 1
        width = min(row.length, row.left)
        block, steps, left = [row.mask] * width, decoder.steps or row.length, width
        for step in range(steps):
            share = [np.float32(1) - (np.float32(1) - np.float32((steps - step - k) / steps)) for k in (0, 1)]
            count = min(left, round(left * (1 - float(share[1] / share[0]))))
            left -= count
            open_ = row.open(block)
            if not count or not open_:
                continue
            logits = row.logits("denoise", row.ids + block)[-width:]
            tokens, _ = row.sample(logits)
            score = logits.softmax(-1)[range(width), tokens].tolist()
            if decoder.remasking == "random":
                score = torch.rand(row.length, generator=row.random).tolist()
            for j in sorted(open_, key=lambda j: -score[j])[:count]:
                block[j] = tokens[j]
        row.ids += block
    return row.written()


def plain_sdar(checkpoint: Checkpoint, request: Request, decoder: SdarSettings) -> Written:
    """As github.com/JetAstra/SDAR; the entropy bound as its engine's, github.com/Labman42/JetEngine."""
    row = _Blocks(checkpoint, request, decoder)
    cached = len(row.ids) // row.length * row.length
    row.forwards["prefill"] += cached > 0
    block, row.ids = row.ids[cached:], row.ids[:cached]
    share, rest = divmod(row.length, decoder.steps or row.length)
    while True:
        block += [row.mask] * (row.length - len(block))
        step = 0
        while open_ := row.open(block):
            logits = row.logits("denoise", row.ids + block)[-row.length :]
            tokens, chances = row.sample(logits)
            score = chances[range(row.length), tokens].tolist()
            count, above = share + (step < rest), list[int]()
            if decoder.remasking == "sequential":
                score = [-j for j in range(row.length)]
            if decoder.remasking == "dynamic":
                above = [j for j in open_ if score[j] > decoder.confidence_threshold]
            if decoder.remasking == "entropy_bounded":
                chance = (logits / (decoder.temperature or 1)).softmax(-1).clamp(min=1e-12)
                score = (chance * chance.log()).sum(-1).tolist()
                sums = np.cumsum(sorted(-score[j] for j in open_))
                count = max(1, int((sums < decoder.entropy_bound).sum()))
            best = sorted(open_, key=lambda j: -score[j])[:count]
            for j in above if len(above) >= count else best:
                block[j] = tokens[j]
            step += 1
        row.ids += block
        row.forwards["commit"] += 1
        if row.ended(row.answer) or row.left <= 0:
            return row.written()
        block = []


def plain_fast_dllm(checkpoint: Checkpoint, request: Request, decoder: FastDllmSettings) -> Written:
    """As github.com/NVlabs/Fast-dLLM, v2, and the hub's files."""
    row = _Blocks(checkpoint, request, decoder)
    cached, small = len(row.ids) // row.length * row.length, decoder.small_block
    block = row.ids[cached:]
    if cached:
        first = row.logits("prefill", row.ids[:cached])[-1].argmax()
        block = block or [int(first)]
    row.ids = row.ids[:cached]
    while True:
        block += [row.mask] * (row.length - len(block))
        states = None
        while open_ := row.open(block):
            if row.ended((row.ids + block[: open_[0]])[len(request.prompt) :]):
                row.ids += block
                return row.written()
            ids, start = row.ids + block, open_[0] // small * small
            row.forwards["denoise"] += 1
            if not decoder.block_cache or states is None or start in open_:
                order = in_blocks(len(ids), row.first, row.length)
                logits, states = forward_and_states(checkpoint, ids, order)
                logits = logits[-row.length :]
            else:
                slots = range(len(row.ids) + start, len(row.ids) + start + small)
                logits = torch.zeros(row.length, logits.shape[-1])
                logits[start : start + small] = forward_alone(checkpoint, ids, slots, states)
            tokens, chances = row.sample(torch.cat([logits[:1], logits[:-1]]))
            chance = chances[range(row.length), tokens].tolist()
            current = [j for j in open_ if j // small == open_[0] // small]
            best = max(current, key=chance.__getitem__)
            written = [j for j in current if j == best or chance[j] > decoder.confidence_threshold]
            assert any(tokens[j] != row.mask for j in written), "the public code would not end"
            for j in written:
                block[j] = tokens[j]
        row.ids += block
        if row.ended(row.answer):
            return row.written()
        following = row.logits("commit", row.ids)[-1].argmax()
        if row.left <= 0:
            return row.written()
        block = [int(following)]
