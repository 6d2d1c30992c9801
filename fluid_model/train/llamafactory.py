"""LLaMA-Factory's training files, as the published FLUID configurations are written, to this project's recipes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from ..errors import ConfigError
from ..fields import put
from ..files import Nested, read_text
from .recipe import build_recipe

PLACES = {
    "model_name_or_path": "model.parent",
    "output_dir": "out",
    "cutoff_len": "data.max_length",
    "packing": "data.pack",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "learning_rate": "optim.learning_rate",
    "warmup_ratio": "optim.warmup",
    "weight_decay": "optim.weight_decay",
    "max_grad_norm": "optim.clip",
    "max_steps": "optim.steps",
    "bf16": "optim.bf16",
    "save_steps": "optim.save_every",
    "logging_steps": "optim.report_every",
    "eval_steps": "optim.measure_every",
    "seed": "seed",
    "k_masks": "fans.k_max",
}
"""LLaMA-Factory's keys and where they go."""
FLOATS = ("lora.dropout", "optim.learning_rate", "optim.warmup", "optim.weight_decay", "optim.clip")
READ_ELSEWHERE = frozenset(
    (
        "stage", "do_train", "do_eval", "finetuning_type", "lora_target", "dataset", "dataset_dir", "val_size",
        "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "lr_scheduler_type",
        "warmup_steps",
    )
)  # fmt: skip


def read_yaml(file: Path) -> Nested:
    """A training file's keys. Raises ConfigError naming the file."""
    try:
        values = yaml.safe_load(read_text(file))
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{file}: not a training file: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: not a training file: a mapping of settings is wanted")
    return values


def convert(values: Mapping[str, Any], devices: int = 1) -> tuple[Nested, list[str]]:
    """Recipe values for FLUID's stage 1, and the keys that have no place in one.

    devices: how many the file was written for; its batch size is a device's.  Raises ConfigError for what cannot be
    carried over.
    """
    if values.get("stage", "sft") not in ("sft", "pt"):
        raise ConfigError(f"stage={values['stage']}: only sft and pt files can become a fluid-hybrid recipe")
    kind = values.get("finetuning_type", "lora")
    if kind not in ("lora", "full"):
        raise ConfigError(f"finetuning_type={kind}: known are lora and full")
    if "max_steps" not in values:
        epochs = values.get("num_train_epochs")
        raise ConfigError(f"max_steps is missing (num_train_epochs={epochs}): a recipe counts steps; add max_steps")
    recipe: Nested = {"stage": "fluid-hybrid"}
    for key, place in PLACES.items():
        if key in values and (kind == "lora" or not place.startswith("lora.")):
            number = values[key]
            put(recipe, place, _number(key, number) if place in FLOATS else number)
    if kind == "lora":
        lora = recipe.setdefault("lora", {})
        lora.setdefault("rank", 8)  # LLaMA-Factory's own default, as is an alpha of twice the rank
        lora.setdefault("alpha", 2 * lora["rank"])
    accumulate = int(values.get("gradient_accumulation_steps", 1))
    put(recipe, "optim.accumulate", accumulate)
    put(recipe, "optim.batch_size", int(values.get("per_device_train_batch_size", 1)) * accumulate * devices)
    put(recipe, "optim.schedule", values.get("lr_scheduler_type", "linear"))
    steps = values["max_steps"]
    put(recipe, "optim.warmup", float(recipe["optim"].get("warmup", values.get("warmup_steps", 0) / max(1, steps))))
    put(recipe, "data.datasets", [name.strip() for name in str(values.get("dataset", "")).split(",") if name.strip()])
    put(recipe, "data.dataset_info", str(Path(values.get("dataset_dir", "data")) / "dataset_info.json"))
    if values.get("val_size", 0) >= 1:
        put(recipe, "data.held_out", int(values["val_size"]))
    build_recipe(recipe)
    unused = [f"{key}: {values[key]}" for key in values if key not in PLACES and key not in READ_ELSEWHERE]
    return recipe, unused


def _number(key: str, value: Any) -> float:
    try:
        return float(value)  # YAML reads 2e-4 as text
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}={value!r} must be a number") from error


def as_toml(recipe: Mapping[str, Any], notes: list[str]) -> str:
    """A recipe file's text, with `notes` as comments."""
    lines = [f"# {note}" for note in notes]
    lines += [f"{name} = {json.dumps(value)}" for name, value in recipe.items() if not isinstance(value, dict)]
    for name, table in recipe.items():
        if isinstance(table, dict):
            lines += ["", f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"
