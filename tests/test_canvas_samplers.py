"""MDLM's and Dream's decoders write as plain, slow versions of their public samplers do: ids and forwards.

dLLM's MDLM sampler: github.com/ZHZisZZ/dllm at ca176752fbce. Dream's `diffusion_generate`: the copy in that repository;
open-dcoder's: github.com/pengzhangzhi/Open-dLLM at 8b3878779, which stops where no mask is left, as here.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fluid_eval.common.spec import build_spec
from fluid_model import ConfigError, DreamSettings, MdlmSettings

from .test_laws import requests, write
from .test_samplers import NEW, REQUEST_SEED, cut, forward, moved, with_ends
from .tiny import fluid_checkpoint

CHECKPOINT = with_ends(fluid_checkpoint(), mask_scale=3.0)


def noise(shape, random):
    """Gumbel noise, float64."""
    return -torch.log(-torch.log(torch.rand(shape, dtype=torch.float64, generator=random).clamp(min=1e-300)))


def guided_logits(row, prompt, decoder):
    """Logits of a row, and how many forwards they took."""
    logits = moved(forward(CHECKPOINT, row, 0), decoder.shift)
    if not decoder.guidance:
        return logits, 1
    without = moved(forward(CHECKPOINT, [CHECKPOINT.mask_id] * prompt + row[prompt:], 0), decoder.shift)
    return without + (decoder.guidance + 1) * (logits - without), 2


def plain_mdlm(prompt, decoder: MdlmSettings, new: int):
    """dLLM's sampler for one row: the answer and the forwards."""
    random, mask = torch.Generator().manual_seed(REQUEST_SEED), CHECKPOINT.mask_id
    row, block, forwards = [*prompt, *[mask] * new], decoder.block_length or new, 0
    steps = math.ceil((decoder.steps or new) / math.ceil(new / block))
    for low in range(len(prompt), len(row), block):
        high = min(low + block, len(row))
        # 1) how many tokens each step reveals, those that reveal none left out
        counts, left = [], high - low
        for step in range(steps, 0, -1):
            t, s = torch.tensor(step / steps), torch.tensor((step - 1) / steps)
            if decoder.schedule == "linear":
                masked_s, masked_t = 1 - (1 - s), 1 - (1 - t)
            else:
                masked_s, masked_t = (1 - (1 - torch.cos(math.pi / 2 * (1 - x))) for x in (s, t))
            share = 1 - float(masked_s / masked_t)
            if decoder.stochastic_transfer:
                count = int((torch.rand(left, generator=random) < share).sum())
            else:
                count = int(torch.round(torch.tensor(left, dtype=torch.float64) * share))
            left -= min(count, left)
            counts.append(count)
        # 2) the most confident ones, step by step
        for count in filter(None, counts):
            logits, asked = guided_logits(row, len(prompt), decoder)
            forwards += asked
            open_ = [i for i in range(low + block) if i < len(row) and row[i] == mask]
            token = logits[open_].double()
            if decoder.temperature:
                token = token + decoder.temperature * noise(token.shape, random)
            token = token.argmax(-1)
            score = torch.full((len(row),), -torch.inf)
            score[open_] = (
                torch.rand(len(open_), generator=random)
                if decoder.rule == "random"
                else logits[open_].softmax(-1)[range(len(open_)), token]
            )
            for i in score.topk(count).indices.tolist():
                row[i] = int(token[open_.index(i)])
    return cut(CHECKPOINT, row[len(prompt) :], new), forwards


def confidence_by(rule, probability, token, random):
    """Confidence of each slot."""
    top = probability.topk(2).values
    if rule == "random":
        return torch.rand(len(token), generator=random)
    if rule == "margin":
        return top[:, 0] - top[:, 1]
    if rule == "entropy":
        return (probability * (probability + 1e-10).log()).sum(-1)
    return probability[range(len(token)), token]


def plain_dream(prompt, decoder: DreamSettings, new: int):
    """Dream's sampler for one row, up to the step after which no mask is left: the answer and the forwards."""
    random, mask = torch.Generator().manual_seed(REQUEST_SEED), CHECKPOINT.mask_id
    row, forwards, steps = [*prompt, *[mask] * new], 0, decoder.steps or new
    times = torch.linspace(1, decoder.eps, steps + 1)
    for step in range(steps):
        open_ = [i for i in range(len(row)) if row[i] == mask]
        if not open_:
            break
        # 1) tokens and probabilities, after temperature, nucleus and top-k
        logits, asked = guided_logits(row, len(prompt), decoder)
        forwards += asked
        logits = logits[open_] / (decoder.temperature or 1)
        for values in logits:
            order = values.sort(descending=True).indices
            sums = values[order].softmax(-1).cumsum(-1)
            size = len(order) if decoder.top_p == 1 else int((sums <= decoder.top_p).sum()) + 1
            values[order[min(size, decoder.top_k or size) :]] = torch.finfo(torch.float32).min
        probability = logits.softmax(-1)
        token = (logits.double() + noise(logits.shape, random) if decoder.temperature else logits).argmax(-1)
        # 2) how sure, how many
        score = confidence_by(decoder.rule, probability, token, random)
        if decoder.alg_temp:
            score = score / decoder.alg_temp + noise(score.shape, random)
        share = 1 - times[step + 1] / times[step] if step < steps - 1 else torch.tensor(1.0)
        if decoder.stochastic_transfer:  # `origin`
            count = int((torch.rand(len(open_), generator=random) < share).sum())
        else:
            count = int(torch.tensor(len(open_)).float() * share)
        # 3) write
        scores = torch.full((len(row),), -torch.inf)
        scores[open_] = score.float()
        for i in scores.topk(count).indices.tolist():
            row[i] = int(token[open_.index(i)])
    return cut(CHECKPOINT, row[len(prompt) :], new), forwards


MDLM = [
    MdlmSettings(),
    MdlmSettings(block_length=4, steps=7, shift=True),
    MdlmSettings(block_length=5, steps=30, schedule="cosine"),
    MdlmSettings(block_length=6, schedule="cosine", temperature=0.7, steps=5),
    MdlmSettings(block_length=8, rule="random", guidance=0.5),
    MdlmSettings(steps=6, stochastic_transfer=True, shift=True),
]
DREAM = [
    DreamSettings(shift=True),
    DreamSettings(shift=True, steps=5, rule="probability", top_p=0.8),
    DreamSettings(shift=True, steps=20, rule="margin", top_k=3, eps=0.1),
    DreamSettings(shift=True, steps=NEW, rule="margin", temperature=1.5),
    DreamSettings(shift=True, steps=6, rule="random", stochastic_transfer=True, temperature=0.7),
    DreamSettings(shift=False, steps=6, temperature=0.7, top_p=0.9, top_k=20, alg_temp=0.4),
    DreamSettings(shift=True, steps=5, guidance=0.5, alg_temp=0.4),
]


@pytest.mark.parametrize("decoder", [*MDLM, *DREAM], ids=str)
def test_the_public_sampler(decoder):
    work = [replace(request, seed=REQUEST_SEED) for request in requests(2, NEW)]
    to_the_end = replace(decoder, whole_canvas=True)
    alone, together = (write(CHECKPOINT, to_the_end, work, batch_size=n) for n in (1, 2))
    early = write(CHECKPOINT, decoder, work, batch_size=2)
    plain = plain_dream if isinstance(decoder, DreamSettings) else plain_mdlm
    for request in work:
        ids, forwards = plain(request.prompt, decoder, NEW)
        for got in (alone[request.key], together[request.key]):
            assert got.ids == ids
            assert got.trace.forwards["denoise"] == sum(got.trace.forwards.values()) == forwards
        assert early[request.key].ids == ids
        assert early[request.key].trace.forwards["denoise"] <= forwards


def test_a_full_canvas_is_not_fed_again():
    """Where chance has written the last mask before the last step, as open-dcoder stops."""
    decoder = DreamSettings(steps=40, rule="random", stochastic_transfer=True, whole_canvas=True)
    answers = write(with_ends(fluid_checkpoint()), decoder, requests(3, NEW), batch_size=3).values()
    assert all(len(answer.trace.written) for answer in answers)
    assert min(answer.trace.forwards["denoise"] for answer in answers) < 40


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "mdlm", "rule": "p2"}, "decoder.rule='p2'"),
        ({"name": "mdlm", "schedule": "quadratic"}, "decoder.schedule='quadratic'"),
        ({"name": "mdlm", "remasking": "random"}, "decoder.remasking is no setting of decoder 'mdlm' but of llada"),
        ({"name": "llada", "rule": "entropy"}, "decoder.rule is no setting of decoder 'llada' but of nbdiff and mdlm"),
        ({"name": "llada", "remasking": "entropy"}, "decoder.remasking='entropy'"),
        ({"name": "llada", "gen_length": 10, "block_length": 4}, "gen_length=10 must be a multiple of block_length=4"),
        ({"name": "mdlm", "top_p": 0}, "top_p=0"),
        ({"name": "mdlm", "top_k": 0}, "top_k=0"),
        ({"name": "dream", "eps": 0}, "eps=0"),
        ({"name": "dream", "alg_temp": -1}, "alg_temp=-1"),
        ({"name": "mdlm", "block_length": 0}, "block_length=0"),
    ],
)
def test_what_the_method_has_not_is_one_line(values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build_spec({"model": {"path": "m"}, "tasks": ["gsm8k"], "decoder": values})
    assert "\n" not in str(caught.value)
