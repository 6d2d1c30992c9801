"""Published layouts of other projects, read without their code; those of `field_layouts` are a table there.

openPangu-Embedded   model_type "PanguEmbedded": a Llama with biases on q, k, v and o.
NBDiff               openPangu's layout (arXiv 2512.06776). Its config equals its parent's; the repository's name
                     identifies it, or a mask token or block length in the config, or the user (`model.method`). The
                     mask token is an unused token.
LLaDA                model_type "llada" (arXiv 2502.09992): Llama's arithmetic under OLMo's parameter names, with
                     bidirectional attention.
FLUID                `model_head.bin` beside a model or a PEFT adapter, or under head/ as on the hub (arXiv
                     2605.27387): a pickled state dict with
                     `diffusion_k_head.{0,2}.{weight,bias}`. The mask token is an unused token of the parent. Stage 1 is
                     trained with LLaMA-Factory and saved as a PEFT adapter.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..common.errors import ConfigError, reason
from ..common.files import read_json
from ..forward.khead import KHead
from ..tokens import Tokenizer
from . import field_layouts
from .field_layouts import Architecture, need
from .weight_names import stored_names

HEAD_FILE = "model_head.bin"
HEAD_FOLDER = "head"
ADAPTER_FILE = "adapter_config.json"
HEAD_PREFIX = "diffusion_k_head."
MASK_TEXTS: dict[str, tuple[str, ...]] = {
    "fluid": ("[unused32]", "<unused32>", "unused32", "<mask>"),
    "nbdiff": ("[unused0]", "<unused0>", "unused0"),
    "llada": ("<|mdm_mask|>",),
    "mdlm": ("<|mask|>", "<M>", "[MASK]"),
    "bd3lm": ("<|mask|>",),
    "sdar": ("<|MASK|>", "<MASK>"),
    "fast-dllm-v2": ("|<MASK>|",),
    "wedlm": ("<|mask|>", "<MASK>"),
}
"""Mask tokens of published checkpoints. FLUID's code (commit 9093c11) uses openPangu's unused32, and <mask> over other
parents.
"""
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>")
END_TEXTS: dict[str, tuple[str, ...]] = {
    "llada": ("<|eot_id|>",), "mdlm": _TURN_ENDS, "bd3lm": _TURN_ENDS, "sdar": _TURN_ENDS, "fast-dllm-v2": _TURN_ENDS,
    "wedlm": _TURN_ENDS,
}  # fmt: skip
"""End tokens beside the end of sequence: of a turn, in the chats of LLaDA and Llama 3 and of Qwen."""
NBDIFF_NAMES = ("nbdiff-7b-base", "nbdiff-7b-instruct", "openpangu-7b-diffusion-base", "openpangu-r-7b-diffusion")
"""Repositories of NBDiff, whose config.json is their parent's."""
ADAPTER_KEYS = {r"^model\.model\.": "model.", r"^model\.lm_head\.": "lm_head."}
"""Parameter names of FLUID's adapters, whose trainer wraps the model before it adds LoRA."""

_PANGU_NEEDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "rms_norm_eps", "rope_theta", "bias",
)  # fmt: skip
_LLADA_FIXED: dict[str, tuple[Any, ...]] = {
    "block_type": ("llama",), "activation_type": ("silu",), "layer_norm_type": ("rms",), "rope": (True,),
    "layer_norm_with_affine": (True,), "alibi": (False,), "input_emb_norm": (False,), "scale_logits": (False,),
    "attention_layer_norm": (False,), "include_bias": (False,), "include_qkv_bias": (False, None),
    "bias_for_layer_norm": (False, None), "multi_query_attention": (False, None), "block_group_size": (1,),
}  # fmt: skip
"""Values of a LLaDA config with Llama's architecture; missing ones count as agreeing."""
_LLADA_BLOCK = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
}
LLADA_KEYS = {
    r"^model\.transformer\.wte\.": "model.embed_tokens.",
    r"^model\.transformer\.ln_f\.": "model.norm.",
    r"^model\.transformer\.ff_out\.": "lm_head.",
    **{rf"^model\.transformer\.blocks\.(\d+)\.{a}\.": rf"model.layers.\1.{b}." for a, b in _LLADA_BLOCK.items()},
}


@dataclass(frozen=True)
class Published:
    """A folder's configuration in this package's terms.

    layout: the published `model_type`, empty for transformers' own.  architecture, fields: of transformers, that
    compute the same, and the fields of its configuration.  keys: patterns of published parameter names, and the
    architecture's.  method: of the adaptation.  mask_id, block_length: as config.json states them.  shift: a masked
    token is predicted at the slot before it.
    """

    layout: str = ""
    architecture: Architecture | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    method: str | None = None
    mask_id: int | None = None
    block_length: int | None = None
    shift: bool = False


def read_published(folder: Path, name: str, method: str | None = None) -> Published:
    """Read config.json.  name: the model's, as the user states it.  method: of the adaptation, likewise.

    Raises ConfigError, naming the file, if a field is missing or contradicts Llama's architecture.
    """
    file = folder / "config.json"
    raw = read_raw(file)
    layout = str(raw.get("model_type"))
    published = Published(mask_id=raw.get("mask_token_id"), block_length=raw.get("block_length"))
    if layout in field_layouts.LAYOUTS:
        published = _of_the_field(folder, name, raw)
    elif layout in field_layouts.MIXTURES:
        refused = field_layouts.MIXTURES[layout]
        raise ConfigError(
            f"{file}: {refused} is a mixture of experts, which is not supported; known are {known_layouts()}"
        )
    elif layout == "llada":
        published = replace(published, layout=layout, fields=_llada(raw, file), keys=LLADA_KEYS, method="llada")
    elif layout == "PanguEmbedded":
        is_nbdiff = published.mask_id is not None or published.block_length is not None
        is_nbdiff |= Path(name).name.lower() in NBDIFF_NAMES
        published = replace(published, layout=layout, fields=_pangu(raw, file), method="nbdiff" if is_nbdiff else None)
    elif layout == "qwen2" and Path(name).name.lower().startswith(field_layouts.OPEN_DCODER):
        published = replace(published, method="mdlm", shift=True)
    if published.layout and published.architecture is None:
        published = replace(published, architecture="llama")
    return replace(published, method=method or published.method)


def known_layouts() -> str:
    """Layouts that load beside transformers' own, for messages."""
    return ", ".join(sorted(("PanguEmbedded", "llada", *field_layouts.LAYOUTS), key=str.lower))


def _of_the_field(folder: Path, name: str, raw: Mapping[str, Any]) -> Published:
    """A model in one of `field_layouts`.  name: the model's, as the user states it.  raw: its config.json."""
    file, model_type = folder / "config.json", str(raw["model_type"])
    stored = stored_names(folder)
    tied = stored is not None and "lm_head.weight" not in stored
    architecture, fields = field_layouts.fields_of(model_type, raw, file, tied=tied)
    return Published(
        layout=model_type,
        architecture=architecture,
        fields=fields,
        method=field_layouts.method_of(model_type, raw, name),
        mask_id=raw.get("mask_token_id"),
        block_length=field_layouts.block_length(model_type, raw, file),
        shift=field_layouts.LAYOUTS[model_type].shift,
    )


def head_file(folder: Path) -> Path | None:
    """The published K-head of a folder: `model_head.bin`, or the only one under head/, as FLUID-7B lies on the hub.

    Raises ConfigError where several lie there.
    """
    if (folder / HEAD_FILE).is_file():
        return folder / HEAD_FILE
    heads = sorted((folder / HEAD_FOLDER).glob(f"**/{HEAD_FILE}"))
    if len(heads) > 1:
        names = ", ".join(str(file.relative_to(folder)) for file in heads)
        raise ConfigError(f"model={folder}: {len(heads)} K-heads, {names}; copy the one to use to {HEAD_FILE}")
    return heads[0] if heads else None


def _pangu(raw: Mapping[str, Any], file: Path) -> dict[str, Any]:
    need(raw, _PANGU_NEEDS, file)
    dropped = {"auto_map", "model_type", "bias", "transformers_version"}
    return {**{k: v for k, v in raw.items() if k not in dropped}, "attention_bias": raw["bias"], "mlp_bias": False}


def _llada(raw: Mapping[str, Any], file: Path) -> dict[str, Any]:
    need(raw, ("d_model", "n_heads", "n_layers", "mlp_hidden_size", "rope_theta", "rms_norm_eps"), file)
    for name, known in _LLADA_FIXED.items():
        if (value := raw.get(name, known[0])) not in known:
            raise ConfigError(f"{file}: {name}={value!r} is not supported; LLaDA-8B has {known[0]!r}")
    vocabulary = raw.get("embedding_size") or raw.get("vocab_size")
    need({"vocab_size": vocabulary, **raw}, ("vocab_size", "max_sequence_length", "weight_tying"), file)
    unchanged = ("architectures", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id")
    return {
        **{k: raw[k] for k in unchanged if k in raw},
        "vocab_size": vocabulary,
        "hidden_size": raw["d_model"],
        "intermediate_size": raw["mlp_hidden_size"],
        "num_hidden_layers": raw["n_layers"],
        "num_attention_heads": raw["n_heads"],
        "num_key_value_heads": raw.get("n_kv_heads") or raw["n_heads"],
        "max_position_embeddings": raw["max_sequence_length"],
        "rms_norm_eps": raw["rms_norm_eps"],
        "rope_theta": raw["rope_theta"],
        "tie_word_embeddings": raw["weight_tying"],
    }


def read_raw(file: Path) -> dict[str, Any]:
    """The object of a JSON file, empty without the file. Raises ConfigError naming it."""
    return read_json(file) if file.is_file() else {}


def own_classes(folder: Path, file: str) -> list[str]:
    """Classes of the repository's code in a file's auto_map."""
    named = read_raw(folder / file).get("auto_map") or {}
    if not isinstance(named, dict):
        raise ConfigError(f"{folder / file}: auto_map={named!r} is no table of classes")
    classes: list[Any] = []
    for value in named.values():
        classes += value if isinstance(value, list) else [value]
    return [str(name) for name in classes if name]


def read_head(file: Path, hidden_size: int) -> KHead:
    """The K-head of a published FLUID checkpoint.

    Raises ConfigError, naming the file, if it is no plain state dict, lacks the head or has another hidden size.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        state = {k.removeprefix(HEAD_PREFIX): v for k, v in state.items() if k.startswith(HEAD_PREFIX)}
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, AttributeError) as error:
        raise ConfigError(f"{file}: cannot be read as a state dict of tensors: {reason(error)}") from error
    return head_from_state(state, hidden_size, file)


def head_from_state(state: dict[str, torch.Tensor], hidden_size: int, source: Path) -> KHead:
    """A K-head from {0,2}.{weight,bias}; k_max is the size of the last layer."""
    names = sorted(KHead(hidden_size, 1).state_dict())
    if sorted(state) != names:
        raise ConfigError(f"{source}: a K-head needs {', '.join(names)}; found {', '.join(sorted(state)) or 'none'}")
    bias = state["2.bias"]
    head = KHead(hidden_size, bias.shape[0] if bias.ndim else 1)
    for name, tensor in head.state_dict().items():
        if state[name].shape != tensor.shape:
            raise ConfigError(
                f"{source}: {name} has shape {tuple(state[name].shape)}, "
                f"a backbone of hidden size {hidden_size} needs {tuple(tensor.shape)}"
            )
    head = head.to(bias.dtype)
    head.load_state_dict(state)
    return head.eval()


def mask_text(tokenizer: Tokenizer, published: Published) -> str:
    """The mask token's text: of the config's id, else the tokenizer's mask token, else of MASK_TEXTS.

    Raises ConfigError if there is none.
    """
    vocabulary = tokenizer.get_vocab()
    if published.mask_id is not None:
        text = next((text for text, token in vocabulary.items() if token == published.mask_id), None)
        if text is None:
            raise ConfigError(
                f"config.json: mask_token_id={published.mask_id} is no token of this tokenizer; set model.mask_token"
            )
        return str(text)
    if tokenizer.mask_token is not None:
        return str(tokenizer.mask_token)
    spellings = MASK_TEXTS.get(published.method or "", ())
    for text in spellings:
        if text in vocabulary:
            return text
    raise ConfigError(f"no mask token: none of {', '.join(spellings)} is in the tokenizer; set model.mask_token")


def adapter_parent(folder: Path, given: str | None = None) -> str | None:
    """The base model's name of a bare PEFT adapter, or `given` instead; None for other folders.

    Raises ConfigError if the adapter names none.
    """
    file = folder / ADAPTER_FILE
    if not file.is_file() or (folder / "config.json").is_file():
        return None
    parent = given or read_raw(file).get("base_model_name_or_path")
    if not parent or not isinstance(parent, str):
        raise ConfigError(
            f"{file}: base_model_name_or_path={parent!r} names no base model; --set model.base=FOLDER does"
        )
    return parent
