"""What is compared: every layout under every decoder that serves it, by every selection rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fluid_model.checkpoints.checkpoint import Checkpoint, load
from fluid_model.engine.records import Request
from fluid_model.registry import BUILT_IN, decoder_named
from fluid_model.settings import DecoderSettings

from . import layouts, published
from .plain import Written
from .plain_blocks import plain_bd3lm, plain_fast_dllm, plain_nbdiff, plain_sdar
from .plain_canvas import plain_llada, plain_mdlm
from .plain_causal import plain_ar, plain_fluid
from .plain_window import plain_wedlm

NEW = 16
PLAIN: dict[str, Callable[..., Written]] = {
    "ar": plain_ar, "fluid": plain_ar, "nbdiff": plain_nbdiff, "llada": plain_llada, "mdlm": plain_mdlm,
    "dream": plain_mdlm, "bd3lm": plain_bd3lm, "sdar": plain_sdar, "fast-dllm-v2": plain_fast_dllm,
    "wedlm": plain_wedlm,
}  # fmt: skip
"""The plain sampler of each decoder; verified drafts must write AR's text."""
_REFERENCE = {"rounds": "reference", "confidence": 0.1}
_MASKED = {rule: {"rule": rule, "steps": 8, "whole_canvas": True} for rule in ("probability", "margin", "entropy")}
_MASKED["random"] = {"rule": "random", "steps": 8, "whole_canvas": True}
RULES: dict[str, dict[str, dict[str, Any]]] = {
    "ar": {"next token": {}},
    "fluid": {
        "verified": {"slot_budget": 64},
        "published verified": _REFERENCE,
        "published unverified": {**_REFERENCE, "verify": False},
    },
    "nbdiff": {
        "probability": {"confidence": 0.1, "small_blocks": 2},
        "margin": {"rule": "margin", "confidence": 0.03, "small_blocks": 2},
        "entropy": {"rule": "entropy", "max_entropy": 4.5, "small_blocks": 2},
    },
    "llada": {
        "low_confidence": {"steps": 8, "whole_canvas": True},
        "random": {"steps": 8, "remasking": "random", "whole_canvas": True},
    },
    "mdlm": _MASKED,
    "dream": _MASKED,
    "bd3lm": {"low_confidence": {"steps": 3}, "random": {"steps": 3, "remasking": "random"}},
    "sdar": {
        "dynamic": {"confidence": 0.1},
        "static": {"remasking": "static", "steps": 2},
        "sequential": {"remasking": "sequential", "steps": 2},
        "entropy_bounded": {"remasking": "entropy_bounded", "max_entropy": 12.0},
    },
    "fast-dllm-v2": {
        "above a threshold": {"confidence": 0.1, "small_block": 4},
        "one a pass": {"confidence": None, "small_block": 4},
        "block cache": {"confidence": 0.1, "small_block": 2, "block_cache": True},
    },
    "wedlm": {
        "under a bound": {"max_entropy": 4.3},
        "under a higher bound": {"max_entropy": 4.5},
        "one a step": {"max_entropy": None},
        "near ones first": {"max_entropy": 4.5, "distance_penalty": 0.1},
        "likeliest tokens": {"max_entropy": 4.3, "top_k": 20, "top_p": 0.9},
    },
}  # fmt: skip
"""Settings of each selection rule, by decoder. Thresholds are such that a pass of a random model often writes several
tokens; a canvas is filled to its end, as in the public code, so that forwards compare.
"""
SIZES = {"ar": None, "fluid": "max_horizon", "wedlm": "window"}
"""The setting that takes a block's size, where it is not `block_length`."""


@dataclass(frozen=True)
class FieldWorkload:
    """How much is compared.  sizes: of blocks.  heats: temperatures.  lengths: of the prompts, one batch."""

    sizes: tuple[int, ...] = (4, 8, 16)
    heats: tuple[float, ...] = (0.0, 0.7)
    lengths: tuple[int, ...] = (3, 8, 17, 23)


@dataclass(frozen=True)
class FieldModel:
    """A layout and the method that it was adapted by, None for a plain causal model."""

    layout: str
    method: str | None

    def decoders(self) -> list[str]:
        """Names of the decoders that serve it."""
        return [kind.name for kind in BUILT_IN if (self.method in kind.methods if self.method else not kind.methods)]


MODELS = (
    FieldModel("PanguEmbedded", None), FieldModel("PanguEmbedded", "fluid"), FieldModel("PanguEmbedded", "nbdiff"),
    FieldModel("llada", "llada"),
    *(FieldModel(layout, "mdlm") for layout in ("a2d-llama", "a2d-qwen2", "a2d-qwen3", "Dream", "CoDA")),
    *(FieldModel(layout, "bd3lm") for layout in ("a2d-llama", "a2d-qwen2", "a2d-qwen3")),
    FieldModel("sdar", "sdar"), FieldModel("Fast_dLLM_Qwen", "fast-dllm-v2"), FieldModel("wedlm", "wedlm"),
)  # fmt: skip
"""Published layouts, by all methods that they are published with."""
RENAMED = (FieldModel("a2d-qwen3", "fast-dllm-v2"),)
"""Layouts under a method that the user names: norms of queries and keys under a decoder published without."""


def save_model(model: FieldModel, folder: Path) -> Path:
    """A small random checkpoint in its published layout, in a folder that is named as the field names it."""
    torch.manual_seed(0)
    if model.layout == "PanguEmbedded":
        path = folder / ("NBDiff-7B-Base" if model.method == "nbdiff" else "openPangu-Embedded-7B")
        published.save_pangu(path, published.random_weights(bias=True, tied=False))
        if model.method == "fluid":
            published.save_head(path / "head" / "tau_2.8")
        return path
    if model.layout == "llada":
        weights = published.random_weights(bias=False, tied=False)
        return published.save_llada(folder / "LLaDA-8B-Base", weights, tied=False)
    return layouts.save_layout(folder / f"{model.layout}-{model.method}", model.layout)


def open_model(model: FieldModel, folder: Path) -> Checkpoint:
    """A small random checkpoint, written in its published layout and loaded.

    Its ends are likely and its mask is not: models of random weights would else predict the mask now and then, where
    public code does not end.
    """
    path = save_model(model, folder)
    method = model.method if model in RENAMED else None
    checkpoint = load(str(path), device="cpu", dtype="float32", method=method)
    assert (checkpoint.manifest.method if checkpoint.manifest else None) == model.method
    weights = checkpoint.model.get_output_embeddings().weight
    with torch.no_grad():
        weights *= 0.3  # less sure than weights of unit variance are
        weights[list(checkpoint.end_ids)] *= 2
        if checkpoint.mask_id is not None:
            weights[checkpoint.mask_id] = 0
    return checkpoint


def comparisons(
    decoder: str, rule: str, plan: FieldWorkload
) -> Iterator[tuple[DecoderSettings, Callable[..., Written]]]:
    """Settings of a selection rule, block by block and temperature by temperature, each with its plain sampler."""
    values, size_setting = RULES[decoder][rule], SIZES.get(decoder, "block_length")
    is_reference = values.get("rounds") == "reference"
    for size in plan.sizes if size_setting else (1,):
        for heat in (0.0,) if is_reference else plan.heats:
            sized = {size_setting: size} if size_setting else {}
            settings = decoder_named(decoder)(**values, **sized, **({} if is_reference else {"temperature": heat}))
            yield settings, plain_fluid if is_reference else PLAIN[decoder]


def requests(plan: FieldWorkload) -> list[Request]:
    """Prompts of made-up tokens."""
    return [Request(str(n), tuple((7 * i * i + n) % 250 + 2 for i in range(n)), NEW, seed=n) for n in plan.lengths]
