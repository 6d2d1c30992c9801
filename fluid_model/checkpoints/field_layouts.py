"""Layouts of the field's adapted Llama, Qwen2 and Qwen3 models, by `model_type` of config.json, as a table.

Each computes what one architecture of transformers computes, under an attention of its own, so its weights load there
under the same names. Compared with the public modelling code on small random weights: docs/checkpoints.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..common.errors import ConfigError

Architecture = Literal["llama", "qwen2", "qwen3"]
"""Architectures of transformers whose logits a layout's are."""

_NEEDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "rms_norm_eps", "max_position_embeddings",
)  # fmt: skip
_KEPT = (
    *_NEEDS, "architectures", "torch_dtype", "dtype", "bos_token_id", "eos_token_id", "pad_token_id", "head_dim",
    "hidden_act", "initializer_range", "rope_theta", "rope_scaling", "rope_parameters", "attention_bias", "mlp_bias",
    "attention_dropout", "tie_word_embeddings", "quantization_config",
)  # fmt: skip
"""Fields that transformers' configurations understand; the others are of training or of the published code alone."""
BLOCK_WORDS = frozenset({"bd3lm", "tide", "opdlm"})
"""Words in names of repositories whose a2d checkpoint is adapted to BD3LM; its config.json is that of an MDLM one."""
OPEN_DCODER = "open-dcoder"
"""How names of open-dcoder begin, whose config.json is that of its parent, a Qwen2."""
MIXTURES = {"lladamoe": "LLaDA-MoE", "llada_moe": "LLaDA-MoE", "llada2_moe": "LLaDA2", "sdar_moe": "SDAR-MoE"}
"""Layouts that are refused by name: mixtures of experts, which no architecture here computes."""
QWEN2_TOKENIZERS = ("Qwen2Tokenizer", "DreamTokenizer")
"""Tokenizer classes of repositories that are transformers' Qwen2Tokenizer."""


@dataclass(frozen=True)
class FieldLayout:
    """What a `model_type` stands for.

    source: repository of the public modelling code, and its commit.  architecture: None where `qk_norm` of the config
    says which of Qwen2's and Qwen3's it is.  method: of the adaptation.  in_blocks: the method of those that are named
    or configured as block diffusion.  shift: a masked token is predicted at the slot before it.
    block: field of the config with the tokens of a block.  fixed: values that the equality needs, missing ones agree.
    """

    source: str
    architecture: Architecture | None
    method: str
    in_blocks: str | None = None
    shift: bool = False
    block: str = "block_size"
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


_NO_WINDOW: dict[str, tuple[Any, ...]] = {"use_sliding_window": (False, None)}
_DLLM = "github.com/ZHZisZZ/dllm ca176752fbce"
LAYOUTS: dict[str, FieldLayout] = {
    "a2d-llama": FieldLayout(_DLLM, "llama", "mdlm", in_blocks="bd3lm"),
    "a2d-qwen2": FieldLayout(_DLLM, "qwen2", "mdlm", in_blocks="bd3lm", fixed=_NO_WINDOW),
    "a2d-qwen3": FieldLayout(_DLLM, "qwen3", "mdlm", in_blocks="bd3lm", fixed=_NO_WINDOW),
    "sdar": FieldLayout("github.com/JetAstra/SDAR c2041a833333", "qwen3", "sdar", fixed=_NO_WINDOW),
    "Fast_dLLM_Qwen": FieldLayout(
        "github.com/Satgoy152/DualDiffusion 9587d1e437cb (a copy of the hub's Fast_dLLM_v2_7B)",
        "qwen2", "fast-dllm-v2", shift=True, block="bd_size", fixed=_NO_WINDOW,
    ),
    "Dream": FieldLayout(
        _DLLM, "qwen2", "mdlm", shift=True,
        fixed={**_NO_WINDOW, "use_mrope": (False, None), "block_size": (None,), "qk_norm": (False, None)},
    ),
    "CoDA": FieldLayout(
        "github.com/SalesforceAIResearch/CoDA fa1d505008c6", "qwen3", "mdlm", shift=True, fixed=_NO_WINDOW
    ),
    "wedlm": FieldLayout("github.com/Tencent/WeDLM 0216110f2469", None, "wedlm", fixed=_NO_WINDOW),
}  # fmt: skip
"""Layouts by `model_type`. Repositories: dLLM's a2d models, SDAR, Fast-dLLM v2, Dream and DiffuCoder, CoDA, WeDLM."""


def method_of(model_type: str, raw: Mapping[str, Any], name: str) -> str:
    """The method of a layout's model.  raw: its config.json.  name: the model's, as the user states it."""
    layout = LAYOUTS[model_type]
    words = re.split(r"[-_.]", Path(name).name.lower())
    if layout.in_blocks and (raw.get(layout.block) is not None or BLOCK_WORDS.intersection(words)):
        return layout.in_blocks
    return layout.method


def block_length(model_type: str, raw: Mapping[str, Any], file: Path) -> int | None:
    """Tokens of a block as the config states them. Raises ConfigError for anything but a number of tokens."""
    name = LAYOUTS[model_type].block
    length = raw.get(name)
    if length is not None and (not isinstance(length, int) or isinstance(length, bool) or not 1 <= length <= 4096):
        raise ConfigError(f"{file}: {name}={length!r} must be the tokens of a block, 1 to 4096")
    return length


def fields_of(
    model_type: str, raw: Mapping[str, Any], file: Path, *, tied: bool
) -> tuple[Architecture, dict[str, Any]]:
    """The architecture, and the fields of its configuration in transformers.

    tied: whether the two embedding tables are one, where the config does not say.  file: config.json, for messages.
    Raises ConfigError if a field is missing or contradicts the architecture.
    """
    layout = LAYOUTS[model_type]
    need(raw, _NEEDS, file)
    if raw.get("rope_theta") is None and raw.get("rope_parameters") is None:
        raise ConfigError(f"{file}: rope_theta is missing; a {model_type} model cannot be read without it")
    for name, known in layout.fixed.items():
        if (value := raw.get(name, known[0])) not in known:
            raise ConfigError(f"{file}: {name}={value!r} is not supported; {model_type} models have {known[0]!r}")
    architecture = layout.architecture or ("qwen3" if raw.get("qk_norm") else "qwen2")
    fields = {"tie_word_embeddings": tied} | {k: raw[k] for k in _KEPT if raw.get(k) is not None}
    if layout.architecture is None and raw.get("attention_bias", True) is not (architecture == "qwen2"):
        bias, norm = raw.get("attention_bias", True), bool(raw.get("qk_norm"))
        raise ConfigError(f"{file}: attention_bias={bias} with qk_norm={norm} is neither Qwen2's nor Qwen3's attention")
    if architecture == "qwen3":
        need(raw, ("head_dim",), file)
    return architecture, fields


def need(raw: Mapping[str, Any], names: tuple[str, ...], file: Path) -> None:
    """Raise ConfigError, naming the file, unless the config states all these fields."""
    missing = [name for name in names if raw.get(name) is None]
    if missing:
        raise ConfigError(f"{file}: {missing[0]} is missing; a {raw.get('model_type')} model cannot be read without it")
