"""Small random checkpoints in layouts that others published, and their arithmetic in plain code.

Legend: B rows, L tokens, H query heads, G key heads, Dh head size, D hidden.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.convert_slow_tokenizer import import_protobuf

from .byte_tokenizer import byte_tokenizer

D, FFN, LAYERS, H, G, V = 32, 48, 2, 4, 2, 384
THETA, EPS = 16000000.0, 1e-5
LINEAR = {"q": (D, D), "k": (D * G // H, D), "v": (D * G // H, D), "o": (D, D)}
LINEAR |= {"gate": (FFN, D), "up": (FFN, D), "down": (D, FFN)}
PANGU = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
PANGU |= {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
PANGU |= {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
LLADA = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "attn_out", "gate": "ff_proj", "up": "up_proj"}
LLADA |= {"down": "ff_out", "norm1": "attn_norm", "norm2": "ff_norm"}
UNUSED = [f"[unused{n}]" for n in range(34)]
MERGED = ["\u2581h", "he", "el", "ll", "lo", "\u2581he", "ell", "ello", "hello", "\u2581hello", "wo", "or", "\u2581wo"]
"""Pieces of several letters, the likeliest last: merges must follow scores, not ids."""

Weights = dict[str, Tensor]


def random_weights(bias: bool, tied: bool) -> Weights:
    """By short names: embed, head, norm, and 0.q, 0.q.bias, 0.norm1, ..."""
    weights = {"embed": torch.randn(V, D), "norm": 1 + 0.1 * torch.randn(D)}
    weights["head"] = weights["embed"] if tied else torch.randn(V, D)
    for layer in range(LAYERS):
        for name, shape in LINEAR.items():
            weights[f"{layer}.{name}"] = torch.randn(shape) / shape[1] ** 0.5
            if bias and name in "qkvo":
                weights[f"{layer}.{name}.bias"] = torch.randn(shape[0])
        weights |= {f"{layer}.{norm}": 1 + 0.1 * torch.randn(D) for norm in ("norm1", "norm2")}
    return weights


def plain_forward(weights: Weights, ids: Tensor, causal: bool) -> Tensor:
    """(B, L) ids -> (B, L, V) logits."""

    def norm(x: Tensor, name: str) -> Tensor:
        return weights[name] * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[name].T + weights.get(f"{name}.bias", 0)

    def heads(x: Tensor, turned: bool) -> Tensor:
        x = x.view(*x.shape[:-1], -1, D // H).transpose(1, 2)  # (B, heads, L, Dh)
        if turned:
            half = x.shape[-1] // 2
            angle = torch.arange(x.shape[2])[:, None] * THETA ** (-torch.arange(half) / half)
            a, b = x[..., :half], x[..., half:]
            x = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
        return x.repeat_interleave(H // x.shape[1], 1)

    x, length = weights["embed"][ids], ids.shape[1]
    hidden = torch.ones(length, length).triu(1).bool() if causal else torch.zeros(length, length).bool()
    for n in range(LAYERS):
        y = norm(x, f"{n}.norm1")
        q, k, v = (heads(linear(y, f"{n}.{name}"), name != "v") for name in "qkv")
        scores = (q @ k.transpose(-1, -2) / (D // H) ** 0.5).masked_fill(hidden, -torch.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{n}.o")
        y = norm(x, f"{n}.norm2")
        x = x + linear(torch.nn.functional.silu(linear(y, f"{n}.gate")) * linear(y, f"{n}.up"), f"{n}.down")
    return norm(x, "norm") @ weights["head"].T


def write_json(file: Path, values: dict[str, Any]) -> None:
    """One object in a file."""
    file.write_text(json.dumps(values))


def save_shards(folder: Path, tensors: Weights) -> None:
    """Two files and their index, as large models are published."""
    names, where = sorted(tensors), dict[str, str]()
    for part, some in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{part}-of-00002.safetensors"
        save_file({n: tensors[n].contiguous().clone() for n in some}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(some, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 0}, "weight_map": where})


def save_pangu(folder: Path, weights: Weights, **config: Any) -> Path:
    """openPangu-Embedded's folder: config with auto_map, shards that hold inv_freq, SentencePiece and its own class."""
    folder.mkdir(parents=True)
    files = ("configuration_openpangu_dense", "modeling_openpangu_dense", "tokenization_openpangu")
    for file in files:
        (folder / f"{file}.py").write_text("raise SystemExit('code of the repository was run')\n")
    values = {
        "architectures": ["PanguEmbeddedForCausalLM"], "bias": "0.q.bias" in weights, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": f"{files[0]}.C", "AutoModelForCausalLM": f"{files[1]}.L"},
        "bos_token_id": 1, "pad_token_id": 0, "eos_token_id": piece_ids()["[unused10]"], "hidden_act": "silu",
        "hidden_size": D, "initializer_range": 0.02, "intermediate_size": FFN, "max_position_embeddings": 128,
        "model_type": "PanguEmbedded", "num_attention_heads": H, "num_hidden_layers": LAYERS, "num_key_value_heads": G,
        "rms_norm_eps": EPS, "rope_theta": THETA, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.53.2", "use_cache": True, "vocab_size": V,
    }  # fmt: skip
    write_json(folder / "config.json", {**values, **config})
    names = {"embed": "model.embed_tokens.weight", "head": "lm_head.weight", "norm": "model.norm.weight"}
    for n in range(LAYERS):
        names |= {f"{n}.{short}": f"model.layers.{n}.{long}.weight" for short, long in PANGU.items()}
        names |= {f"{n}.{short}.bias": f"model.layers.{n}.{PANGU[short]}.bias" for short in "qkvo"}
    tensors = {names[short]: tensor for short, tensor in weights.items()}
    tensors |= {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(LAYERS)}
    save_shards(folder, tensors)
    save_pieces(folder)
    return folder


def save_llada(folder: Path, weights: Weights, tied: bool, **config: Any) -> Path:
    """LLaDA's folder: OLMo's names, the output head under transformer.ff_out."""
    folder.mkdir(parents=True)
    tokenizer = byte_tokenizer()
    special = ["<|endoftext|>", "<|eot_id|>", "<|mdm_mask|>"]
    tokenizer.add_special_tokens({"eos_token": special[0], "additional_special_tokens": special[1:]})
    tokenizer.save_pretrained(folder)
    ids = tokenizer.get_vocab()
    values = {
        "activation_type": "silu", "alibi": False, "architectures": ["LLaDAModelLM"], "attention_layer_norm": False,
        "auto_map": {"AutoConfig": "configuration_llada.C", "AutoModelForCausalLM": "modeling_llada.M"},
        "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": D,
        "embedding_size": V, "eos_token_id": ids[special[0]], "include_bias": False, "include_qkv_bias": False,
        "input_emb_norm": False, "layer_norm_type": "rms", "layer_norm_with_affine": True,
        "mask_token_id": ids[special[2]], "max_sequence_length": 128, "mlp_hidden_size": FFN, "mlp_ratio": 4,
        "model_type": "llada", "multi_query_attention": None, "n_heads": H, "n_kv_heads": G, "n_layers": LAYERS,
        "pad_token_id": ids[special[0]], "rms_norm_eps": EPS, "rope": True, "rope_full_precision": True,
        "rope_theta": THETA, "scale_logits": False, "use_cache": False, "vocab_size": V - 3, "weight_tying": tied,
    }  # fmt: skip
    write_json(folder / "config.json", {**values, **config})
    top = {"embed": "wte", "norm": "ln_f"} | ({} if tied else {"head": "ff_out"})
    tensors = {f"model.transformer.{long}.weight": weights[short] for short, long in top.items()}
    for n in range(LAYERS):
        prefix = f"model.transformer.blocks.{n}"
        tensors |= {f"{prefix}.{long}.weight": weights[f"{n}.{short}"] for short, long in LLADA.items()}
    save_shards(folder, tensors)
    return folder


def save_head(folder: Path, k_max: int = 16) -> None:
    """A random K-head as FLUID publishes it."""
    folder.mkdir(parents=True)
    shapes = {"0.weight": (D // 4, D), "0.bias": (D // 4,), "2.weight": (k_max, D // 4), "2.bias": (k_max,)}
    state = {f"diffusion_k_head.{name}": torch.randn(shape) for name, shape in shapes.items()}
    torch.save(state, folder / "model_head.bin")


def pieces() -> list[tuple[str, float, int]]:
    """Text, score and type of each piece: unknown 2, control 3, byte 6, user-defined 4, normal 1."""
    rare = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((f"<0x{n:02X}>", 0.0, 6) for n in range(256))]
    letters = [(letter, -100.0 - n, 1) for n, letter in enumerate("\u2581abdehlorw:")]
    merged = [(text, float(n - 50), 1) for n, text in enumerate(MERGED)]
    return [*rare, *merged, *((text, 0.0, 4) for text in UNUSED), *letters]


def piece_ids() -> dict[str, int]:
    """Ids of the pieces by their text."""
    return {text: n for n, (text, _, _) in enumerate(pieces())}


def save_pieces(folder: Path, **config: Any) -> None:
    """tokenizer.model and the configuration of a class that only the repository's code defines."""
    proto = import_protobuf().ModelProto()
    for text, score, kind in pieces():
        proto.pieces.add(piece=text, score=score, type=kind)
    proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback = 2, True
    proto.normalizer_spec.remove_extra_whitespaces = False
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    ids = piece_ids()
    added = {
        str(ids[t]): {"content": t, "normalized": False, "special": True} for t in ["<unk>", "<s>", "</s>", *UNUSED]
    }
    values = {
        "add_bos_token": True, "add_eos_token": False, "added_tokens_decoder": added,
        "auto_map": {"AutoTokenizer": ["tokenization_openpangu.PanguTokenizer", None]}, "bos_token": "<s>",
        "clean_up_tokenization_spaces": False, "eos_token": "[unused10]", "pad_token": "<unk>", "unk_token": "<unk>",
        "tokenizer_class": "PanguTokenizer", "chat_template": "{{ messages[0]['content'] }}",
    }  # fmt: skip
    write_json(folder / "tokenizer_config.json", {**values, **config})
