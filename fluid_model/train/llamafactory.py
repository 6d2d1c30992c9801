"""LLaMA-Factory's training files, as the published FLUID configurations are written, to this project's recipes.

A key goes to its place in the recipe, or is refused, or is named among the notes; none is dropped without a word. A key
the file leaves out has LLaMA-Factory's own value, which is written into the recipe (hiyouga/LLaMA-Factory at ff6d4d12,
src/llamafactory/hparams; the rest is transformers' TrainingArguments).
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

PLACES = {
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
"""Keys that are carried over as they are, and where they go."""
DEFAULTS = {
    "cutoff_len": 2048, "lora_rank": 8, "lora_dropout": 0.0, "learning_rate": 5e-5, "weight_decay": 0.0,
    "max_grad_norm": 1.0, "bf16": False, "seed": 42, "num_train_epochs": 3.0, "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1, "lr_scheduler_type": "linear", "warmup_steps": 0, "warmup_ratio": 0.0,
    "dataset_dir": "data", "val_size": 0, "lora_target": "all",
}  # fmt: skip
"""What holds where a file does not say it."""
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
"""Keys that are arguments of transformers' Trainer, and stay such."""
TURNED = frozenset(
    (
        "stage", "do_train", "finetuning_type", "lora_target", "dataset", "dataset_dir", "val_size", "max_steps",
        "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "lr_scheduler_type",
        "warmup_ratio", "warmup_steps", "packing", "neat_packing", "train_on_prompt", "mask_history", "pure_bf16",
    )
)  # fmt: skip
"""Keys that `convert` turns into something else."""
REFUSED: Mapping[str, Any] = dict.fromkeys((
    "eval_dataset", "interleave_probs", "default_system", "tokenized_path", "adapter_name_or_path", "lora_adapter_path",
    "quantization_bit", "use_dora", "use_rslora", "pissa_init", "loraplus_lr_ratio", "additional_target",
    "use_llama_pro", "use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon", "use_dft_loss",
    "use_asft_loss", "use_eaft_loss", "label_smoothing_factor", "neftune_noise_alpha", "resize_vocab", "add_tokens",
    "add_special_tokens", "shift_attn", "mixture_of_depths", "train_from_scratch", "disable_shuffling",
    "early_stopping_steps", "load_best_model_at_end",
)) | {"mix_strategy": "concat", "model_revision": "main", "rope_scaling": "none"}  # fmt: skip
"""Keys that change what is learnt and have no counterpart here, and a value besides null, false and 0 at which
they change nothing."""


def read_yaml(file: Path) -> Nested:
    """A training file's keys. Raises ConfigError naming the file."""
    try:
        values = yaml.safe_load(read_text(file))
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{file}: not a training file: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{file}: not a training file: a mapping of settings is wanted")
    return values


def convert(values: Mapping[str, Any], devices: int = 1) -> tuple[Nested, list[str]]:
    """Recipe values for FLUID's stage 1, and notes on what differs: keys not used, settings with another meaning.

    devices: how many the file was written for; its batch size is a device's.  Raises ConfigError for what cannot be
    carried over.
    """
    given = {key: value for key, value in values.items() if value is not None}
    _check(given, devices)
    said = {**DEFAULTS, **given}
    lora = said.get("finetuning_type", "lora") == "lora"
    notes: list[str] = []
    recipe: Nested = {"stage": "fluid-hybrid"}
    for key, place in PLACES.items():  # 1) what only changes its name
        if key in said and (lora or not place.startswith("lora.")):
            put(recipe, place, _number(key, said[key]) if key in FLOATS else said[key])
    if lora:
        recipe["lora"].setdefault("alpha", 2 * _whole("lora_rank", said["lora_rank"]))
        targets = _names("lora_target", said["lora_target"])
        if targets != ["all"]:
            put(recipe, "lora.targets", targets)
        notes.append("lora: the mask token's embedding is trained, too; with lora.train_mask = false it is not")
    _put_data(recipe, said, notes)  # 2) what is told otherwise
    _put_schedule(recipe, said, devices)
    if "num_train_epochs" in given and "steps" in recipe["optim"]:
        notes.append(f"num_train_epochs: {given['num_train_epochs']!r} gives way to max_steps, as in the Trainer")
    if said.get("pure_bf16"):
        put(recipe, "optim.bf16", True)
        notes.append("pure_bf16: what is trained stays float32 here, the rest is bfloat16")
    trainer = {key: given[key] for key in TRAINER if key in given}  # 3) what stays the Trainer's
    if trainer:
        recipe["trainer"] = trainer
    build_recipe(recipe)
    known = {*PLACES, *TRAINER, *TURNED, *REFUSED}
    return recipe, notes + [
        f"not used: {key}: {json.dumps(given[key], default=str)}" for key in given if key not in known
    ]


def _check(given: Mapping[str, Any], devices: int) -> None:
    """Raises ConfigError for a file that is no training of this kind, or says what cannot be honoured."""
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


def _put_data(recipe: Nested, said: Mapping[str, Any], notes: list[str]) -> None:
    folder = said["dataset_dir"]
    if not isinstance(folder, str) or folder == "ONLINE" or folder.startswith("REMOTE:"):
        raise ConfigError(f"dataset_dir={folder!r}: sets are not fetched; save them as files in a folder")
    put(recipe, "data.datasets", _names("dataset", said["dataset"]))
    put(recipe, "data.dataset_info", str(Path(folder) / "dataset_info.json"))
    packing = said.get("packing", said.get("stage") == "pt")  # pre-training packs where the file says nothing
    put(recipe, "data.pack", bool(said.get("neat_packing", False)) or packing)
    if packing and not said.get("neat_packing"):
        notes.append("packing: packed rows do not see one another here (LLaMA-Factory's neat_packing)")
    if said.get("train_on_prompt") and said.get("mask_history"):
        raise ConfigError("train_on_prompt and mask_history exclude one another")
    if said.get("train_on_prompt"):
        put(recipe, "data.loss_on", "all")
    if said.get("mask_history"):
        put(recipe, "data.loss_on", "last")
    share = _number("val_size", said["val_size"])
    if share > 0:
        put(recipe, "data.held_out", int(share) if share >= 1 else share)
        notes.append("val_size: held-out rows are the last ones here, not drawn at random")
    else:
        put(recipe, "data.held_out", 64)
        notes.append("val_size is 0: the last 64 rows are held out here, which data.held_out changes")


def _put_schedule(recipe: Nested, said: Mapping[str, Any], devices: int) -> None:
    """Length, batch and learning rate. A max_steps above 0 and a warmup_steps above 0 win, as in the Trainer."""
    if _whole("max_steps", said.get("max_steps", -1)) > 0:
        put(recipe, "optim.steps", said["max_steps"])
    else:
        put(recipe, "optim.epochs", _number("num_train_epochs", said["num_train_epochs"]))
    accumulate = _whole("gradient_accumulation_steps", said["gradient_accumulation_steps"])
    batch = _whole("per_device_train_batch_size", said["per_device_train_batch_size"])
    put(recipe, "optim.accumulate", accumulate)
    put(recipe, "optim.batch_size", batch * accumulate * devices)
    kind = said["lr_scheduler_type"]
    put(recipe, "optim.schedule", "constant_with_warmup" if kind == "constant" else kind)
    steps, share = said["warmup_steps"], _number("warmup_ratio", said["warmup_ratio"])
    if kind == "constant":
        put(recipe, "optim.warmup", 0.0)  # it knows no warm-up
    elif 0 < _number("warmup_steps", steps) < 1:  # a share, for the Trainer of transformers 5
        put(recipe, "optim.warmup", float(steps))
    elif _whole("warmup_steps", steps) > 0:
        put(recipe, "optim.warmup_steps", steps)
    else:
        put(recipe, "optim.warmup", share)


def _names(key: str, value: Any) -> list[str]:
    """Names in a list, or between commas."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{key}={value!r} must be names: a list, or text with commas between")
    if not (found := [name.strip() for name in names if name.strip()]):
        raise ConfigError(f"{key} names nothing")
    return found


def _number(key: str, value: Any) -> float:
    try:
        return float(value)  # YAML reads 2e-4 as text
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}={value!r} must be a number") from error


def _whole(key: str, value: Any) -> int:
    if type(value) is not int:
        raise ConfigError(f"{key}={value!r} must be a whole number")
    return value


def as_toml(recipe: Mapping[str, Any], notes: list[str]) -> str:
    """A recipe file's text, with `notes` as comments, each on one line."""
    lines = [f"# {' '.join(note.split())}" for note in notes]
    lines += [f"{name} = {_toml(value)}" for name, value in recipe.items() if not isinstance(value, dict)]
    for name, table in recipe.items():
        if isinstance(table, dict):
            lines += ["", f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """Raises ConfigError for what TOML or a recipe has no word for: nothing, a date."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    if not isinstance(value, (str, int)):
        raise ConfigError(f"{value!r} cannot be written into a recipe")
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
