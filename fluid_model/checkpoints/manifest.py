"""`fluid.json`, the manifest of an adapted checkpoint. No torch.

    {"parent": "owner/name", "mask_token": "<|mask|>", "k_max": 16, "tau": [2.8], "weights": "merged",
     "method": "fluid", "block_length": null, "shift": false, "format_version": 1}

A folder holds merged weights ("merged": an ordinary Hugging Face folder) or an adapter over its parent ("adapter": PEFT
files in adapter/, the mask token's embedding beside them), and always the tokenizer. FLUID's K-heads are in
khead.safetensors.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ..common.errors import ConfigError
from ..common.fields import build
from ..common.files import read_json
from ..registry import check_method
from ..settings import check_range

FORMAT_VERSION = 2
READABLE = (1, 2)
"""Format versions that this package reads. 2 added shift, gated and parent_hash."""
MANIFEST_FILE = "fluid.json"
HEAD_FILE = "khead.safetensors"
ADAPTER_FOLDER = "adapter"
MASK_FILE = "mask_embedding.safetensors"
TRAINING_FILE = "training.json"
CHECKPOINT_FILES = (
    MANIFEST_FILE, HEAD_FILE, MASK_FILE, TRAINING_FILE, f"{ADAPTER_FOLDER}/*", "config.json", "generation_config.json",
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "tokenizer*.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "additional_chat_templates/*", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
"""File names of a saved checkpoint: this project's, a tokenizer's, transformers'."""


@dataclass(frozen=True)
class Manifest:
    """The fields of fluid.json. parent: folder or hub id of the base model.  method: of the adaptation.

    fluid: k_max is the widest stride; tau lists the training-time bounds, one K-head each, the default first. A tau of
    null was not stated by the source. An empty list: not calibrated yet, no K-head.  block_length: tokens of a block,
    of nbdiff and other methods that write in blocks.  llada, mdlm: attention is bidirectional; shift: a masked token is
    predicted at the slot before it, as Dream does.
    weights: merged into the parent's, or an adapter beside this file.  gated: the adapter acts on mask slots alone.
    parent_hash: of the parent's weights (`weights.fingerprint`), for an adapter.
    """

    parent: str
    mask_token: str
    k_max: int | None = None
    tau: tuple[float | None, ...] = ()
    weights: Literal["merged", "adapter"] = "merged"
    method: str = "fluid"
    block_length: int | None = None
    shift: bool = False
    gated: bool = False
    parent_hash: str | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        check_method("method", self.method)
        for name in ("k_max", "block_length"):
            if (value := getattr(self, name)) is not None:
                check_range(name, value, 1, 4096)
        for bound in self.tau:
            if bound is not None:
                check_range("tau", bound, 0, 100, open_low=True)

    def choose(self, tau: float | None) -> int:
        """Index of the K-head of `tau`; 0 for None. Raises ConfigError naming the known ones."""
        if tau is None:
            return 0
        if tau not in self.tau:
            known = ", ".join(str(t) for t in self.tau)
            raise ConfigError(f"model.tau={tau}: this checkpoint has heads for tau = {known}")
        return self.tau.index(tau)


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest, None without one. Raises ConfigError, naming the file, if it is invalid."""
    file = folder / MANIFEST_FILE
    if not file.is_file():
        return None
    values = read_json(file)
    version = values.pop("format_version", None)
    if version not in READABLE:
        known = " and ".join(map(str, READABLE))
        raise ConfigError(f"{file}: format_version {version!r} is unknown; this package reads {known}")
    try:
        manifest: Manifest = build(Manifest, values)
    except ConfigError as error:
        raise ConfigError(f"{file}: not a FLUID manifest: {error}") from error
    if (manifest.k_max is None) != (manifest.method != "fluid"):
        raise ConfigError(f"{file}: method {manifest.method} and k_max={manifest.k_max} do not fit")
    if manifest.gated and (manifest.method, manifest.weights) != ("fluid", "adapter"):
        raise ConfigError(f"{file}: gated=true needs method fluid and weights adapter")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write fluid.json into the folder."""
    text = json.dumps(asdict(manifest), indent=2, ensure_ascii=False)
    (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")
