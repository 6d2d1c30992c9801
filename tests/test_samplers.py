"""NBDiff and LLaDA decode as plain, slow versions of their public code do, alone or in batches: ids and forwards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluid_model import ArSettings, Request
from fluid_model.checkpoints.checkpoint import Checkpoint
from fluid_model.decoders import strategy_for
from fluid_model.engine.records import KINDS
from fluid_model.settings import LladaSettings
from fluid_model.settings.block_diffusion import NbdiffSettings

from .test_laws import CHECKPOINT, requests, write
from .tiny import fluid_checkpoint

NEW = 13
REQUEST_SEED = 3


def forward(checkpoint: Checkpoint, ids: list[int], both_from: int) -> torch.Tensor:
    """Logits of a row that reads causally, but in both directions from `both_from` on."""
    size = len(ids)
    may = torch.ones(size, size).tril().bool()
    may[both_from:, both_from:] = True
    bias = torch.zeros(1, 1, size, size).masked_fill(~may, torch.finfo(torch.float32).min)
    with torch.inference_mode():
        logits: torch.Tensor = checkpoint.model(input_ids=torch.tensor([ids]), attention_mask=bias).logits[0]
    return logits


def cut(checkpoint: Checkpoint, answer: list[int], new_tokens: int) -> tuple[int, ...]:
    answer = answer[:new_tokens]
    end = next((i for i, token in enumerate(answer) if token in checkpoint.end_ids), None)
    return tuple(answer[:end])


def plain_nbdiff(checkpoint: Checkpoint, prompt, decoder: NbdiffSettings, new_tokens: int):
    """NBDiff's decoder for one row, without a cache: the answer and its forwards by kind.

    As github.com/YuchuanTian/NBDiff at e0c10f3bc53c: the end is looked for after every small block; a block without
    one is committed, the last as well.
    """
    length, mask = decoder.block_length, checkpoint.mask_id
    small = -(-length // min(decoder.small_blocks, length))
    answer, count = [], {"prefill": 1, "denoise": 0, "commit": 0}
    first = forward(checkpoint, [*prompt], len(prompt))[-1]
    while len(answer) < new_tokens:
        done = [*prompt, *answer]
        block = [int(first.argmax())] + [mask] * (length - 1)
        for low in range(0, length, small):
            while open_ := [j for j in range(low, low + small) if block[j] == mask]:
                count["denoise"] += 1
                logits = forward(checkpoint, done + block, len(done))[len(done) :]
                token, score = {}, {}
                for j in open_:
                    probabilities = logits[max(j - 1, 0)].softmax(-1)
                    top = probabilities.topk(2).values
                    order = float((probabilities * (probabilities + 1e-10).log()).sum())
                    token[j] = int(probabilities.argmax())
                    score[j] = {"probability": float(top[0]), "margin": float(top[0] - top[1]), "entropy": order}[
                        decoder.rule
                    ]
                least = decoder.confidence_threshold
                best = max(open_, key=lambda j: score[j])
                written = {j: token[j] for j in open_ if j == best or score[j] > least}
                assert set(written.values()) != {mask}, "the public code would not end"
                for j, chosen in written.items():
                    block[j] = chosen
            if not set(checkpoint.end_ids).isdisjoint(block):
                return cut(checkpoint, answer + block, new_tokens), count
        answer += block
        count["commit"] += 1
        first = forward(checkpoint, [*prompt, *answer], len(prompt) + len(answer))[-1]
    return cut(checkpoint, answer, new_tokens), count


def moved(logits: torch.Tensor, shift: bool | None) -> torch.Tensor:
    """Right by one slot where predictions are shifted, as Dream's public code does after every forward."""
    return torch.cat([logits[:1], logits[:-1]]) if shift else logits.clone()


def plain_llada(checkpoint: Checkpoint, prompt, decoder: LladaSettings, new_tokens: int):
    """LLaDA's decoder for one row, all blocks to the end: the answer and the forwards.

    As github.com/ML-GSAI/LLaDA at b7e6c3565f19, whose two sorts of end are here the tokenizer's own and the others.
    """
    block, mask, eos = decoder.block_length, checkpoint.mask_id, checkpoint.tokenizer.eos_token_id
    random = torch.Generator().manual_seed(REQUEST_SEED)
    length, steps = decoder.canvas(new_tokens)
    row = [*prompt, *[mask] * length]
    forwards = 0
    for low in range(len(prompt), len(row), block):
        for step in range(steps):
            count = block // steps + (1 if step < block % steps else 0)  # the remainder to the first steps
            logits = moved(forward(checkpoint, row, 0), decoder.shift)
            if decoder.guidance:
                unguided = moved(forward(checkpoint, [mask] * len(prompt) + row[len(prompt) :], 0), decoder.shift)
                logits = unguided + (decoder.guidance + 1) * (logits - unguided)
            forwards += 1 + (decoder.guidance > 0)
            if decoder.logits_eos_inf:
                logits[:, eos] = -torch.inf
            open_ = [i for i in range(low + block) if row[i] == mask]
            noisy = logits[open_].double()
            if decoder.temperature:
                noise = torch.rand(noisy.shape, dtype=torch.float64, generator=random)
                noisy = noisy.exp() / (-noise.log()) ** decoder.temperature
            token = noisy.argmax(-1)
            if decoder.suppress_end:
                taken = [t for t in checkpoint.end_ids if t != eos] + ([] if decoder.temperature else [eos])
                logits[:, taken] = -torch.inf
            confidence = logits[open_].softmax(-1)[range(len(open_)), token]
            if decoder.remasking == "random":
                confidence = torch.rand(len(open_), generator=random)
            scores = torch.full((len(row),), -torch.inf)
            scores[open_] = confidence
            for i in scores.topk(count).indices.tolist():
                row[i] = int(token[open_.index(i)])
    return cut(checkpoint, row[len(prompt) :], new_tokens), forwards


@settings(max_examples=9, deadline=None)
@given(
    rule=st.sampled_from(["probability", "margin", "entropy"]),
    threshold=st.sampled_from([None, 0.02, 0.2]),
    parts=st.sampled_from([(1, 1), (1, 8), (3, 3), (4, 1), (6, 2), (7, 1), (8, 4), (8, 8)]),
)
def test_nbdiff_is_the_public_decoder(rule, threshold, parts):
    length, small = parts
    if rule == "entropy":
        bounds = {"max_entropy": None if threshold is None else 4.5 + threshold}
    else:
        bounds = {"confidence": threshold}
    decoder = NbdiffSettings(block_length=length, small_blocks=small, rule=rule, **bounds)
    answers = write(CHECKPOINT, decoder, requests(3, NEW), batch_size=2)
    for request in requests(3, NEW):
        ids, count = plain_nbdiff(CHECKPOINT, request.prompt, decoder, NEW)
        assert answers[request.key].ids == ids
        used = {kind: n for kind, n in answers[request.key].trace.forwards.items() if kind in count}
        assert sum(answers[request.key].trace.forwards.values()) == sum(count.values())
        assert used == count


def with_ends(checkpoint: Checkpoint, scale: float = 2.0, mask_scale: float = 1.0) -> Checkpoint:
    """The tokenizer's end and another one, which this model writes often; and its mask, if asked."""
    checkpoint = replace(checkpoint, end_ids=(1, 9))
    weights = checkpoint.model.get_output_embeddings().weight
    with torch.no_grad():
        weights[[1, 9]] *= scale
        weights[checkpoint.mask_id] *= mask_scale
    return checkpoint


LLADA = [
    {"block_length": 4},
    {"block_length": 8, "steps": 4},
    {"gen_length": 16, "block_length": 16, "steps": 6},
    {"block_length": 4, "guidance": 0.5},
]


@pytest.mark.parametrize("values", LLADA)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"suppress_end": True},
        {"logits_eos_inf": True},
        {"suppress_end": True, "temperature": 0.7},
        {"suppress_end": True, "logits_eos_inf": True, "temperature": 0.7},
        {"suppress_end": True, "remasking": "random"},
        {"shift": True},
        {"shift": True, "suppress_end": True, "temperature": 0.7},
    ],
)
def test_llada_is_the_public_decoder(values, more):
    """Where end and mask are likely: in ids whether the canvas is filled to its end or not, in forwards if it is."""
    checkpoint = with_ends(fluid_checkpoint(), mask_scale=3.0)
    decoder = LladaSettings(**values, **more)
    work = [replace(request, seed=REQUEST_SEED) for request in requests(2, NEW)]
    early = write(checkpoint, decoder, work, batch_size=2)
    full_canvas = write(checkpoint, replace(decoder, whole_canvas=True), work, batch_size=3)
    for request in work:
        ids, forwards = plain_llada(checkpoint, request.prompt, decoder, NEW)
        assert full_canvas[request.key].ids == early[request.key].ids == ids
        assert full_canvas[request.key].trace.forwards == {**dict.fromkeys(KINDS, 0), "denoise": forwards}
        assert early[request.key].trace.forwards["denoise"] <= forwards


def test_an_end_that_is_taken_away_leaves_its_confidence_to_the_others():
    """What is less sure of a token but surer of the end is written first then."""
    checkpoint = with_ends(fluid_checkpoint())
    chosen = {}
    for suppress in (False, True):
        strategy = strategy_for(checkpoint, LladaSettings(block_length=2, steps=2, suppress_end=suppress))
        strategy.allocate(1)
        strategy.admit(0, [Request("x", (5, 6), 2)], None, [256])
        logits = torch.full((2, 259), -20.0)
        logits[0, [30, 31]] = torch.tensor([0.6, 0.4]).log()  # 0.6 either way
        logits[1, [40, 1]] = torch.tensor([0.51, 0.49]).log()  # 0.51, or all
        (row,) = strategy._states(1)
        strategy._denoise(row, strategy._open_slots(row), logits)
        chosen[suppress] = [token != checkpoint.mask_id for token in row.ids[2:].tolist()]
    assert chosen == {False: [True, False], True: [False, True]}


def test_blocks_of_one_are_ar():
    """But for the commit of a last token that is no end, which the public code runs."""
    ar = write(CHECKPOINT, ArSettings(), requests())
    blocks = write(CHECKPOINT, NbdiffSettings(block_length=1, small_blocks=1), requests())
    assert {key: g.ids for key, g in blocks.items()} == {key: g.ids for key, g in ar.items()}
    for key, one in ar.items():
        last = one.finish != "eos"
        assert blocks[key].trace.forwards == {
            **one.trace.forwards,
            "commit": one.trace.forwards["commit"] + last,
        }


@pytest.mark.parametrize("end", range(NEW))
def test_nbdiff_looks_for_the_end_after_every_small_block(end):
    """Wherever in a block it is written, first and last places of small blocks among them."""
    decoder = NbdiffSettings(block_length=6, small_blocks=3, confidence=0.05)
    (request,) = requests(1, 18)
    free, _ = plain_nbdiff(replace(CHECKPOINT, end_ids=()), request.prompt, decoder, 18)
    checkpoint = replace(CHECKPOINT, end_ids=(free[end], free[0] + 300))
    (got,) = write(checkpoint, decoder, [request]).values()
    ids, count = plain_nbdiff(checkpoint, request.prompt, decoder, 18)
    assert (got.ids, got.finish) == (ids, "eos")
    assert got.trace.forwards == {**dict.fromkeys(KINDS, 0), **count}


def test_a_mask_that_is_predicted_stays_open_in_a_block_while_others_are_written():
    checkpoint = with_ends(fluid_checkpoint(1), scale=1.0, mask_scale=2.0)
    decoder = NbdiffSettings(block_length=8, small_blocks=1, confidence=0.02)
    compared = 0
    for request in requests(7, 24):
        got = write(checkpoint, decoder, [request])[request.key]
        if checkpoint.mask_id in got.ids:  # nothing else was written: the public code would go on for ever
            continue
        ids, count = plain_nbdiff(checkpoint, request.prompt, decoder, 24)
        assert got.ids == ids
        assert got.trace.forwards == {**dict.fromkeys(KINDS, 0), **count}
        compared += 1
    assert compared
