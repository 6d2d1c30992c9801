"""Small random models, for tests and for trying an installation: `python -m tests.tiny FOLDER` writes one."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

import fluid_model
from bench.field.byte_tokenizer import byte_tokenizer
from fluid_model.checkpoints.checkpoint import Checkpoint
from fluid_model.forward.backbone import Backbone
from fluid_model.tokens import end_ids

MASK = "<|mask|>"


def llama_config(**changes: object) -> LlamaConfig:
    values = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.3,
    }
    return LlamaConfig(**{**values, **changes})


def save_model(folder: Path, config: PreTrainedConfig | None = None, seed: int = 0) -> Path:
    """A random model in the ordinary Hugging Face layout."""
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config or llama_config()).float().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def fluid_checkpoint(
    seed: int = 0, k_max: int = 8, tau: tuple[float, ...] = (2.8,), config: PreTrainedConfig | None = None
) -> Checkpoint:
    """A random FLUID checkpoint in memory, its mask token new to the tokenizer."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config or llama_config()).float().eval()
    tokenizer = byte_tokenizer()
    mask_id = fluid_model.add_mask_token(model, tokenizer, MASK)
    heads = [fluid_model.KHead(model.config.hidden_size, k_max) for _ in tau]
    manifest = fluid_model.Manifest(parent="random", mask_token=MASK, k_max=k_max, tau=tau)
    ends = end_ids(tokenizer, model.config)
    return Checkpoint(Backbone(model), tokenizer, ends, manifest, mask_id, heads, heads[0])


if __name__ == "__main__":
    save_model(Path(sys.argv[1]))
