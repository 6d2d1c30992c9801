"""Reads layouts other projects published; nothing else in the package knows them.

FLUID (arXiv 2605.27387): beside an ordinary Hugging Face folder stands `model_head.bin`, a pickled state dict with
`diffusion_k_head.{0,2}.{weight,bias}`; the mask token is one of the parent's unused tokens. Its stage 1 is trained with
LLaMA-Factory, which leaves a bare PEFT adapter.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import torch

from .errors import ConfigError
from .khead import KHead
from .tokens import Tokenizer

HEAD_FILE = "model_head.bin"
ADAPTER_FILE = "adapter_config.json"
HEAD_PREFIX = "diffusion_k_head."
MASK_TEXTS = ("[unused32]", "<unused32>", "unused32")
"""How the published FLUID checkpoints may spell their mask token."""


def read_head(file: Path, hidden_size: int) -> KHead:
    """The K-head of a published FLUID checkpoint.

    Raises ConfigError, naming the file, if it is no plain state dict, lacks the head or has another hidden size.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        state = {k.removeprefix(HEAD_PREFIX): v for k, v in state.items() if k.startswith(HEAD_PREFIX)}
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, AttributeError) as error:
        raise ConfigError(f"{file}: cannot be read as a state dict of tensors: {error}".splitlines()[0]) from error
    return head_from_state(state, hidden_size, file)


def head_from_state(state: dict[str, torch.Tensor], hidden_size: int, source: Path) -> KHead:
    """Build a K-head from {0,2}.{weight,bias}; its widest stride is what the last layer holds."""
    wanted = sorted(KHead(hidden_size, 1).state_dict())
    if sorted(state) != wanted:
        raise ConfigError(f"{source}: a K-head needs {', '.join(wanted)}; found {', '.join(sorted(state)) or 'none'}")
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


def mask_text(tokenizer: Tokenizer) -> str:
    """The mask token of a published checkpoint, found by how it may be spelt. Raises ConfigError if none is known."""
    vocabulary = tokenizer.get_vocab()
    for text in MASK_TEXTS:
        if text in vocabulary:
            return text
    raise ConfigError(f"no mask token: none of {', '.join(MASK_TEXTS)} is in the tokenizer; set model.mask_token")


def adapter_parent(folder: Path) -> str | None:
    """What a bare PEFT adapter's folder says it adapts; None if it is no such folder. Raises ConfigError if it says
    nothing.
    """
    file = folder / ADAPTER_FILE
    if not file.is_file() or (folder / "config.json").is_file():
        return None
    try:
        parent = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{file}: not an adapter's configuration: {error}") from error
    if not parent:
        raise ConfigError(f"{file}: base_model_name_or_path is missing; it names what the adapter changes")
    return str(parent)
