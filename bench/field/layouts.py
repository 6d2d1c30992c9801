"""Small random checkpoints in the layouts of the field's Llama, Qwen2 and Qwen3 models, without their code.

Legend: D hidden, FFN hidden of an MLP, H query heads, G key heads, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .byte_tokenizer import byte_tokenizer
from .published import Weights, write_json

D, FFN, LAYERS, H, G, V, THETA, EPS = 32, 48, 2, 4, 2, 300, 1e6, 1e-6
SPECIAL = ["<|endoftext|>", "<|im_end|>", "<|mask|>", "<|MASK|>", "|<MASK>|"]
BASE = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "rope_theta": THETA,
    "num_attention_heads": H, "num_key_value_heads": G, "rms_norm_eps": EPS, "max_position_embeddings": 512,
    "hidden_act": "silu", "torch_dtype": "bfloat16", "use_cache": False, "use_sliding_window": False,
    "sliding_window": 4096, "rope_scaling": None, "auto_map": {"AutoConfig": "own.C", "AutoModel": "own.M"},
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "a2d-llama": {}, "a2d-qwen2": {}, "a2d-qwen3": {"head_dim": 12}, "Dream": {"use_mrope": False},
    "sdar": {"head_dim": 12, "block_size": 4, "attn_implementation": "flex_attention", "fuse_cross_entropy": True},
    "Fast_dLLM_Qwen": {"bd_size": 8, "conplemenrary_mask": True}, "CoDA": {"head_dim": 8, "sampling_eps": [0.1, 0.2]},
    "wedlm": {"qk_norm": True, "attention_bias": False, "head_dim": 12},
}  # fmt: skip
"""Fields of config.json that are a layout's own."""


def has_norms(layout: str) -> bool:
    """Whether queries and keys are normalised, as Qwen3's are."""
    return layout in ("a2d-qwen3", "sdar", "CoDA", "wedlm")


def random_weights(layout: str, tied: bool = False) -> Weights:
    """By transformers' names: biases on q, k and v for Qwen2's arithmetic, norms of queries and keys for Qwen3's."""
    torch.manual_seed(0)
    size = OWN[layout].get("head_dim", D // H)
    weights = {"model.embed_tokens.weight": torch.randn(V, D), "model.norm.weight": 1 + 0.1 * torch.randn(D)}
    if not tied:
        weights["lm_head.weight"] = torch.randn(V, D)
    shapes = {"self_attn.q_proj": (H * size, D), "self_attn.k_proj": (G * size, D), "self_attn.v_proj": (G * size, D)}
    shapes |= {"self_attn.o_proj": (D, H * size), "mlp.gate_proj": (FFN, D), "mlp.up_proj": (FFN, D)}
    for n in range(LAYERS):
        for name, shape in (shapes | {"mlp.down_proj": (D, FFN)}).items():
            weights[f"model.layers.{n}.{name}.weight"] = torch.randn(shape) / shape[1] ** 0.5
            if name[-6:] in ("q_proj", "k_proj", "v_proj") and not has_norms(layout) and layout != "a2d-llama":
                weights[f"model.layers.{n}.{name}.bias"] = torch.randn(shape[0])
        norms = {"input_layernorm": D, "post_attention_layernorm": D}
        norms |= {"self_attn.q_norm": size, "self_attn.k_norm": size} if has_norms(layout) else {}
        weights |= {f"model.layers.{n}.{name}.weight": 1 + 0.3 * torch.randn(width) for name, width in norms.items()}
    return weights


def save_layout(folder: Path, layout: str, tied: bool = False, **config: Any) -> Path:
    """A random checkpoint as it is published: config.json with the layout's own fields, weights, tokenizer.

    A value of `...` leaves its field out.
    """
    folder.mkdir(parents=True)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": SPECIAL[0], "additional_special_tokens": SPECIAL[1:]})
    tokenizer.save_pretrained(folder)
    values = {"model_type": layout, "architectures": [f"{layout}LM"], "eos_token_id": tokenizer.eos_token_id}
    values |= {**BASE, **OWN[layout], **({"tie_word_embeddings": False} if layout != "CoDA" else {}), **config}
    write_json(folder / "config.json", {k: v for k, v in values.items() if v is not ...})
    save_file(random_weights(layout, tied), folder / "model.safetensors", metadata={"format": "pt"})
    return folder
