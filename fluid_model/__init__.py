"""AR and parallel diffusion decoding of language models: checkpoints, engine, scoring, training.

    checkpoint = fluid_model.load("path/or/hub-id")
    engine = fluid_model.engine_for(checkpoint, fluid_model.ArSettings())
    for answer in engine.generate([fluid_model.Request("1", prompt_ids, max_new_tokens=64)]): ...

Inference needs torch, transformers, peft and safetensors only. Names are imported on first use, so that settings can be
read without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "ArSettings": "settings",
    "Bd3lmSettings": "settings.block_diffusion",
    "Checkpoint": "checkpoints.checkpoint",
    "ConfigError": "common.errors",
    "DecoderSettings": "settings",
    "DreamSettings": "settings.masked_diffusion",
    "Engine": "engine.loop",
    "FastDllmSettings": "settings.block_diffusion",
    "FluidSettings": "settings",
    "Generation": "engine.records",
    "KHead": "forward.khead",
    "LladaSettings": "settings.masked_diffusion",
    "Manifest": "checkpoints.manifest",
    "MdlmSettings": "settings.masked_diffusion",
    "NbdiffSettings": "settings.block_diffusion",
    "Request": "engine.records",
    "SdarSettings": "settings.block_diffusion",
    "Score": "engine.records",
    "ScoreRequest": "engine.records",
    "Scorer": "scoring.loglikelihood",
    "WedlmSettings": "settings.wedlm",
    "add_mask_token": "checkpoints.checkpoint",
    "describe": "checkpoints.checkpoint",
    "engine_for": "decoders",
    "load": "checkpoints.checkpoint",
    "load_tokenizer": "checkpoints.checkpoint",
    "save": "checkpoints.checkpoint",
    "scorer_for": "decoders",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
