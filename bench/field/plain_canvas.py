"""Plain samplers of masked diffusion under full attention: LLaDA, dLLM's MDLM, Dream's `diffusion_generate`.

LLaDA: github.com/ML-GSAI/LLaDA at b7e6c3565f19. MDLM: github.com/ZHZisZZ/dllm at ca176752fbce. Dream: the copy in
that repository; open-dcoder's (github.com/pengzhangzhi/Open-dLLM at 8b3878779) stops where no mask is left, as here.
All of them fill the canvas to its end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fluid_model.checkpoints.checkpoint import Checkpoint
from fluid_model.engine.records import Request
from fluid_model.settings.masked_diffusion import CanvasSettings, LladaSettings, MdlmSettings

from .plain import PlainRow, Written, causal, moved


class _Canvas(PlainRow):
    """A row and its masks.  length: tokens of the canvas."""

    def __init__(self, checkpoint: Checkpoint, request: Request, decoder: CanvasSettings, length: int) -> None:
        super().__init__(checkpoint, request)
        self.ids += [self.mask] * length
        self.guidance = decoder.guidance
        self.shift = decoder.shift_for(trained=checkpoint.manifest is not None and checkpoint.manifest.shift)

    def guided(self) -> Tensor:
        """Logits of one step: (L, V)."""
        prompt, both = len(self.request.prompt), causal(len(self.ids), both_from=0)
        logits = moved(self.ask("denoise", self.ids, both), self.shift)
        if not self.guidance:
            return logits
        without = moved(self.ask("denoise", [self.mask] * prompt + self.ids[prompt:], both), self.shift)
        return without + (self.guidance + 1) * (logits - without)

    def open(self, end: int) -> list[int]:
        """Masked slots before `end`."""
        return [i for i in range(min(end, len(self.ids))) if self.ids[i] == self.mask]

    def write(self, open_: Sequence[int], tokens: Tensor, confidence: Tensor, count: int) -> None:
        """The most confident predictions of open slots."""
        scores = torch.full((len(self.ids),), -torch.inf)
        scores[open_] = confidence.float()
        for i in scores.topk(count).indices.tolist():
            self.ids[i] = int(tokens[open_.index(i)])


def plain_llada(checkpoint: Checkpoint, request: Request, decoder: LladaSettings) -> Written:
    """LLaDA's decoder, whose two sorts of end are here the tokenizer's own and the others."""
    block, eos = decoder.block_length, checkpoint.tokenizer.eos_token_id
    length, steps = decoder.canvas(request.max_new_tokens)
    row = _Canvas(checkpoint, request, decoder, length)
    for low in range(len(request.prompt), len(row.ids), block):
        for step in range(steps):
            count = block // steps + (1 if step < block % steps else 0)  # the remainder to the first steps
            logits = row.guided()
            if decoder.logits_eos_inf:
                logits[:, eos] = -torch.inf
            open_ = row.open(low + block)
            noisy = logits[open_].double()
            if decoder.temperature:
                noise = torch.rand(noisy.shape, dtype=torch.float64, generator=row.random)
                noisy = noisy.exp() / (-noise.log()) ** decoder.temperature
            token = noisy.argmax(-1)
            if decoder.suppress_end:
                taken = [t for t in checkpoint.end_ids if t != eos] + ([] if decoder.temperature else [eos])
                logits[:, taken] = -torch.inf
            confidence = logits[open_].softmax(-1)[range(len(open_)), token]
            if decoder.remasking == "random":
                confidence = torch.rand(len(open_), generator=row.random)
            row.write(open_, token, confidence, count)
    return row.written()


def plain_mdlm(checkpoint: Checkpoint, request: Request, decoder: MdlmSettings) -> Written:
    """dLLM's MDLM sampler, or with `schedule` of timesteps Dream's. Rules beyond the public ones are the others'."""
    if decoder.schedule == "timesteps":
        return _plain_dream(checkpoint, request, decoder)
    new = request.max_new_tokens
    row, block = _Canvas(checkpoint, request, decoder, new), decoder.block_length or new
    steps = math.ceil((decoder.steps or new) / math.ceil(new / block))
    for low in range(len(request.prompt), len(row.ids), block):
        left = min(low + block, len(row.ids)) - low
        for count in _revealed(row, decoder, left, steps):
            logits = row.guided()
            open_ = row.open(low + block)
            token = logits[open_].double()
            if decoder.temperature:
                token = token + decoder.temperature * row.noise(token.shape)
            token = token.argmax(-1)
            row.write(open_, token, _confidence(row, decoder.rule, logits[open_].softmax(-1), token), count)
    return row.written()


def _revealed(row: PlainRow, decoder: MdlmSettings, left: int, steps: int) -> list[int]:
    """How many tokens each step of a block reveals, those that reveal none left out.  left: tokens of the block."""
    counts = []
    for step in range(steps, 0, -1):
        t, s = torch.tensor(step / steps), torch.tensor((step - 1) / steps)
        if decoder.schedule == "linear":
            masked_s, masked_t = 1 - (1 - s), 1 - (1 - t)
        else:
            masked_s, masked_t = (1 - (1 - torch.cos(math.pi / 2 * (1 - x))) for x in (s, t))
        share = 1 - float(masked_s / masked_t)
        if decoder.stochastic_transfer:
            count = int((torch.rand(left, generator=row.random) < share).sum())
        else:
            count = int(torch.round(torch.tensor(left, dtype=torch.float64) * share))
        left -= min(count, left)
        counts.append(count)
    return [count for count in counts if count]


def _plain_dream(checkpoint: Checkpoint, request: Request, decoder: MdlmSettings) -> Written:
    """Dream's sampler, up to the step after which no mask is left; blocks share its steps, as dLLM's do."""
    new = request.max_new_tokens
    row, block = _Canvas(checkpoint, request, decoder, new), decoder.block_length or new
    steps = math.ceil((decoder.steps or new) / math.ceil(new / block))
    times = torch.linspace(1, decoder.eps, steps + 1)
    for low in range(len(request.prompt), len(row.ids), block):
        for step in range(steps):
            open_ = row.open(low + block)
            if not open_:
                break
            # 1) tokens and probabilities, after temperature, nucleus and top-k
            logits = row.guided()[open_] / (decoder.temperature or 1)
            for values in logits:
                order = values.sort(descending=True).indices
                sums = values[order].softmax(-1).cumsum(-1)
                size = len(order) if decoder.top_p == 1 else int((sums <= decoder.top_p).sum()) + 1
                values[order[min(size, decoder.top_k or size) :]] = torch.finfo(torch.float32).min
            token = logits.double() + row.noise(logits.shape) if decoder.temperature else logits
            token = token.argmax(-1)
            # 2) how sure, how many
            confidence = _confidence(row, decoder.rule, logits.softmax(-1), token)
            if decoder.alg_temp:
                confidence = confidence / decoder.alg_temp + row.noise(confidence.shape)
            share = 1 - times[step + 1] / times[step] if step < steps - 1 else torch.tensor(1.0)
            if decoder.stochastic_transfer:  # `origin`
                count = int((torch.rand(len(open_), generator=row.random) < share).sum())
            else:
                count = int(torch.tensor(len(open_)).float() * share)
            # 3) write
            row.write(open_, token, confidence, count)
    return row.written()


def _confidence(row: PlainRow, rule: str, probability: Tensor, token: Tensor) -> Tensor:
    """Confidence of each slot: (n,).  probability: (n, V).  token: (n,)."""
    top = probability.topk(2).values
    if rule == "random":
        return torch.rand(len(token), generator=row.random)
    if rule == "margin":
        return top[:, 0] - top[:, 1]
    if rule == "entropy":
        return (probability * (probability + 1e-10).log()).sum(-1)
    return probability[range(len(token)), token]
