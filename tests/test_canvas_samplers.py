"""MDLM's and Dream's decoders write as plain, slow versions of their public samplers do: ids and forwards."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.field.plain_canvas import plain_mdlm
from fluid_eval.common.spec import build_spec
from fluid_model import ConfigError, DreamSettings, MdlmSettings

from .test_laws import requests, write
from .test_samplers import NEW, REQUEST_SEED, with_ends
from .tiny import fluid_checkpoint

CHECKPOINT = with_ends(fluid_checkpoint(), mask_scale=3.0)


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
    for request in work:
        ids, forwards = plain_mdlm(CHECKPOINT, request, decoder)
        for got in (alone[request.key], together[request.key]):
            assert (got.ids, got.trace.forwards) == (ids, forwards)
        assert early[request.key].ids == ids
        assert early[request.key].trace.forwards["denoise"] <= forwards["denoise"]


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
