"""Converts LLaMA-Factory's training files, the format of FLUID's published configurations, to recipes.

    model_name_or_path: parents/pangu           stage = "fluid-hybrid"
    dataset: alpaca_en                          out = "saves/fluid"
    cutoff_len: 1024                   ->       [model]
    max_steps: 32000                            parent = "parents/pangu"
    output_dir: saves/fluid                     ...

Every key is converted, refused or named in a note. Missing keys get LLaMA-Factory's defaults, written into the recipe
(hiyouga/LLaMA-Factory at ff6d4d12, src/llamafactory/hparams; the rest is transformers' TrainingArguments).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from ..common.errors import ConfigError
from ..common.fields import put
from ..common.files import Nested, read_text
from .recipe import build_recipe

RENAMED = {
    "model_name_or_path": "model.parent",
    "output_dir": "out",
    "cutoff_len": "data.max_length",
    "max_samples": "data.max_rows",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "learning_rate": "optim.learning_rate",
    "weight_decay": "optim.weight_decay",
    "max_grad_norm": "optim.clip",
    "bf16": "optim.bf16",
    "save_steps": "optim.save_every",
    "logging_steps": "optim.report_every",
    "eval_steps": "optim.measure_every",
    "seed": "seed",
    "k_masks": "fans.k_max",
}
"""Keys that keep their value, and their recipe settings."""
DEFAULTS = {
    "cutoff_len": 2048, "lora_rank": 8, "lora_dropout": 0.0, "learning_rate": 5e-5, "weight_decay": 0.0,
    "max_grad_norm": 1.0, "bf16": False, "seed": 42, "num_train_epochs": 3.0, "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1, "lr_scheduler_type": "linear", "warmup_steps": 0, "warmup_ratio": 0.0,
    "dataset_dir": "data", "val_size": 0, "lora_target": "all",
}  # fmt: skip
"""LLaMA-Factory's values of missing keys."""
FLOATS = (
    "lora_dropout",
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "num_train_epochs",
    "warmup_ratio",
    "val_size",
)
TRAINER = (
    "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_kwargs", "fp16", "tf32",
    "deepspeed", "fsdp", "fsdp_config", "gradient_checkpointing", "gradient_checkpointing_kwargs", "report_to",
    "run_name", "dataloader_num_workers", "ddp_timeout", "ddp_find_unused_parameters", "torch_compile",
)  # fmt: skip
"""Arguments of transformers' Trainer, passed on unchanged."""
CONVERTED = frozenset(
    (
        "stage", "do_train", "finetuning_type", "lora_target", "dataset", "dataset_dir", "val_size", "max_steps",
        "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "lr_scheduler_type",
        "warmup_ratio", "warmup_steps", "packing", "neat_packing", "train_on_prompt", "mask_history", "pure_bf16",
    )
)  # fmt: skip
"""Keys that `convert` computes other settings from."""
REFUSED: Mapping[str, Any] = dict.fromkeys((
    "eval_dataset", "interleave_probs", "default_system", "tokenized_path", "adapter_name_or_path", "lora_adapter_path",
    "quantization_bit", "use_dora", "use_rslora", "pissa_init", "loraplus_lr_ratio", "additional_target",
    "use_llama_pro", "use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon", "use_dft_loss",
    "use_asft_loss", "use_eaft_loss", "label_smoothing_factor", "neftune_noise_alpha", "resize_vocab", "add_tokens",
    "add_special_tokens", "shift_attn", "mixture_of_depths", "train_from_scratch", "disable_shuffling",
    "early_stopping_steps", "load_best_model_at_end",
)) | {"mix_strategy": "concat", "model_revision": "main", "rope_scaling": "none"}  # fmt: skip
"""Keys that change the training and have no counterpart here. The value, like null, false and 0, changes nothing."""


def read_yaml(file: Path) -> Nested:
    """The keys of a training file. Raises ConfigError naming the file."""
    try:
        values = yaml.safe_load(read_text(file))
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{file}: not a training file: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{file}: not a training file: a mapping of settings is wanted")
    return values


def convert(values: Mapping[str, Any], devices: int = 1) -> tuple[Nested, list[str]]:
    """Recipe values for FLUID's stage 1, and notes: unused keys, and settings with another meaning here.

    devices: number of devices that the file was written for; its batch size is per device.
    Raises ConfigError for a file that cannot be converted.
    """
    given = {key: value for key, value in values.items() if value is not None}
    _check(given, devices)
    settings = {**DEFAULTS, **given}
    lora = settings.get("finetuning_type", "lora") == "lora"
    notes: list[str] = []
    recipe: Nested = {"stage": "fluid-hybrid"}
    # 1) keys that change their name only
    for key, name in RENAMED.items():
        if key in settings and (lora or not name.startswith("lora.")):
            put(recipe, name, _number(key, settings[key]) if key in FLOATS else settings[key])
    # 2) keys that settings are computed from
    if lora:
        _put_lora(recipe, settings, notes)
    _put_data(recipe, settings, notes)
    _put_schedule(recipe, settings, devices)
    if "num_train_epochs" in given and "steps" in recipe["optim"]:
        notes.append(f"num_train_epochs: {given['num_train_epochs']!r} gives way to max_steps, as in the Trainer")
    if settings.get("pure_bf16"):
        put(recipe, "optim.bf16", True)
        notes.append("pure_bf16: trained weights stay float32 here, the rest is bfloat16")
    # 3) the Trainer's own arguments
    trainer = {key: given[key] for key in TRAINER if key in given}
    if trainer:
        recipe["trainer"] = trainer
    build_recipe(recipe)  # raises for values that no recipe takes
    # 4) all others
    known = {*RENAMED, *TRAINER, *CONVERTED, *REFUSED}
    notes += [f"not used: {key}: {json.dumps(value, default=str)}" for key, value in given.items() if key not in known]
    return recipe, notes


def _check(given: Mapping[str, Any], devices: int) -> None:
    """Raise ConfigError for a file of another kind of training, and for unsupported keys."""
    if devices < 1:
        raise ConfigError(f"--devices {devices} must be at least 1")
    if given.get("stage", "sft") not in ("sft", "pt"):
        raise ConfigError(f"stage={given['stage']}: only sft and pt files can become a fluid-hybrid recipe")
    kind = given.get("finetuning_type", "lora")
    if kind not in ("lora", "full"):
        raise ConfigError(f"finetuning_type={kind}: known are lora and full")
    if not given.get("do_train", True):
        raise ConfigError("do_train=false: the file trains nothing")
    for key in ("model_name_or_path", "output_dir", "dataset"):
        if key not in given:
            raise ConfigError(f"{key} is missing")
    for key, harmless in REFUSED.items():
        if given.get(key) not in (None, False, harmless):
            raise ConfigError(f"{key}={given[key]!r} has no counterpart here; take it out to go on without it")


def _put_lora(recipe: Nested, settings: Mapping[str, Any], notes: list[str]) -> None:
    recipe["lora"].setdefault("alpha", 2 * _integer("lora_rank", settings["lora_rank"]))
    targets = _names("lora_target", settings["lora_target"])
    if targets != ["all"]:
        put(recipe, "lora.targets", targets)
    notes.append("lora: the mask token's embedding is trained, too; with lora.train_mask = false it is not")


def _put_data(recipe: Nested, settings: Mapping[str, Any], notes: list[str]) -> None:
    # 1) data sets
    folder = settings["dataset_dir"]
    if not isinstance(folder, str) or folder == "ONLINE" or folder.startswith("REMOTE:"):
        raise ConfigError(f"dataset_dir={folder!r}: sets are not fetched; save them as files in a folder")
    put(recipe, "data.datasets", _names("dataset", settings["dataset"]))
    put(recipe, "data.dataset_info", str(Path(folder) / "dataset_info.json"))
    # 2) packing and loss
    packing = settings.get("packing", settings.get("stage") == "pt")  # pre-training packs by default
    put(recipe, "data.pack", bool(settings.get("neat_packing", False)) or packing)
    if packing and not settings.get("neat_packing"):
        notes.append("packing: packed rows do not attend to one another here (LLaMA-Factory's neat_packing)")
    if settings.get("train_on_prompt") and settings.get("mask_history"):
        raise ConfigError("train_on_prompt and mask_history exclude one another")
    if settings.get("train_on_prompt"):
        put(recipe, "data.loss_on", "all")
    if settings.get("mask_history"):
        put(recipe, "data.loss_on", "last")
    # 3) held-out rows
    share = _number("val_size", settings["val_size"])
    if share > 0:
        put(recipe, "data.held_out", int(share) if share >= 1 else share)
        notes.append("val_size: held-out rows are the last ones here, not drawn at random")
    else:
        put(recipe, "data.held_out", 64)
        notes.append("val_size is 0: the last 64 rows are held out here, which data.held_out changes")


def _put_schedule(recipe: Nested, settings: Mapping[str, Any], devices: int) -> None:
    """Length, batch and learning rate. max_steps and warmup_steps take precedence if above 0, as in the Trainer."""
    # 1) length and batch
    if _integer("max_steps", settings.get("max_steps", -1)) > 0:
        put(recipe, "optim.steps", settings["max_steps"])
    else:
        put(recipe, "optim.epochs", _number("num_train_epochs", settings["num_train_epochs"]))
    accumulate = _integer("gradient_accumulation_steps", settings["gradient_accumulation_steps"])
    batch = _integer("per_device_train_batch_size", settings["per_device_train_batch_size"])
    put(recipe, "optim.accumulate", accumulate)
    put(recipe, "optim.batch_size", batch * accumulate * devices)
    # 2) learning rate
    kind = settings["lr_scheduler_type"]
    put(recipe, "optim.schedule", "constant_with_warmup" if kind == "constant" else kind)
    steps, share = settings["warmup_steps"], _number("warmup_ratio", settings["warmup_ratio"])
    if kind == "constant":
        put(recipe, "optim.warmup", 0.0)  # that schedule has no warm-up
    elif 0 < _number("warmup_steps", steps) < 1:  # a share, as in transformers 5
        put(recipe, "optim.warmup", float(steps))
    elif _integer("warmup_steps", steps) > 0:
        put(recipe, "optim.warmup_steps", steps)
    else:
        put(recipe, "optim.warmup", share)


def _names(key: str, value: Any) -> list[str]:
    """Names of a list, or of text with commas."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{key}={value!r} must be names: a list, or text with commas between")
    stripped = [name.strip() for name in names if name.strip()]
    if not stripped:
        raise ConfigError(f"{key} names nothing")
    return stripped


def _number(key: str, value: Any) -> float:
    try:
        return float(value)  # YAML parses 2e-4 as text
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}={value!r} must be a number") from error


def _integer(key: str, value: Any) -> int:
    if type(value) is not int:
        raise ConfigError(f"{key}={value!r} must be a whole number")
    return value


def as_toml(recipe: Mapping[str, Any], notes: list[str]) -> str:
    """The text of a recipe file, with `notes` as comments of one line each."""
    lines = [f"# {' '.join(note.split())}" for note in notes]
    lines += [f"{name} = {_toml(value)}" for name, value in recipe.items() if not isinstance(value, dict)]
    for name, table in recipe.items():
        if isinstance(table, dict):
            lines += ["", f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """A value in TOML. Raises ConfigError for values without a TOML form in recipes: null, a date."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    if not isinstance(value, (str, int)):
        raise ConfigError(f"{value!r} cannot be written into a recipe")
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
