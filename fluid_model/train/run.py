"""Carries out a recipe: parent, rows, transformers' Trainer, checkpoint and manifest."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from ..checkpoints import checkpoint as checkpoints
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.manifest import CHECKPOINT_FILES, TRAINING_FILE, Manifest
from ..common import replace_folder
from ..common.errors import ConfigError, RunError
from ..forward.backbone import Backbone
from .data import Pack, Rows, encode, packs
from .measure import HeldOut
from .origin import told
from .parent import start
from .places import CLOCK_FILE, WORK_FILES, check_out, finished, is_first, latest, work_folder
from .progress import Progress
from .recipe import ADAPTS, LoraSpec, Recipe
from .row_layouts import Blocks, Canvas, HybridFans, Layout, MaskFans, Plain
from .rows import Row, load_rows
from .stages import FLEX_MULTIPLE, Batch, Horizons, collate, row_loss

NEW_MASK = "<|mask|>"
"""Text of the mask token a parent is given if the recipe names none."""
MEASURED_ROWS = 64
"""Held-out rows a measurement looks at."""


@dataclass
class Parts:
    """What a recipe trains: the checkpoint it becomes, the module whose parameters move, how rows are laid out for it,
    and how they are laid out to measure it (None: the loss says all).
    """

    checkpoint: Checkpoint
    module: nn.Module
    lay: Layout
    full: Layout | None = None


class StageTrainer(Trainer):
    """transformers' Trainer with a stage's loss; the loss's terms and what held-out rows show are logged beside it."""

    def __init__(self, parts: Parts, recipe: Recipe, held_out: HeldOut | None, **options: Any) -> None:
        super().__init__(**options)
        self.parts, self.recipe, self.held_out = parts, recipe, held_out
        self.model_accepts_loss_kwargs = False  # our loss is a mean: Trainer is to divide it by accumulation steps
        self._terms: dict[str, list[Tensor]] = {}

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if isinstance(self.parts.module, Horizons):
            terms = model(**inputs)
            loss = terms.pop("loss")
        else:
            loss, terms = row_loss(model, self.parts.checkpoint.model, inputs, self.recipe.loss_weights)
        for name, value in terms.items():
            self._terms.setdefault(name, []).append(value.detach())
        return (loss, {"loss": loss}) if return_outputs else loss

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        found: dict[str, float] = super().evaluate(*arguments, **options)
        if self.held_out is not None:
            training = self.model.training
            self.model.eval()
            seen = {f"eval_{name}": round(value, 5) for name, value in self.held_out.look(self.model).items()}
            self.model.train(training)
            self.log(seen)
            found |= seen
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        prefix = "eval_" if "eval_loss" in logs else ""
        for name, values in self._terms.items():
            logs[prefix + name] = round(float(torch.stack(values).float().mean()), 5)
        self._terms.clear()
        super().log(logs, start_time)


class Clock(TrainerCallback):
    """Time spent on a training, that of broken-off attempts up to the step they are resumed from included."""

    def __init__(self, work: Path, started: float, latest: Path | None) -> None:
        self.work, self.started = work, started
        file = latest / CLOCK_FILE if latest else None
        self.before = float(file.read_text()) if file and file.is_file() else 0.0

    def seconds(self) -> float:
        """So far."""
        return self.before + time.perf_counter() - self.started

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        folder = self.work / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            (folder / CLOCK_FILE).write_text(str(self.seconds()))


def train_chain(recipes: Sequence[Recipe], *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Train stage after stage; what stands between the first parent and the last result is removed in the end.

    Returns and raises as `train` does. A resumed chain goes on after the stages that are done.
    """
    done = [finished(recipe) if resume else None for recipe in recipes]
    if (whole := done[-1]) is not None:
        return whole
    for recipe, stage in zip(recipes, done, strict=True):
        if stage is None:
            check_out(recipe, overwrite=overwrite)
    stages: list[dict[str, Any]] = []
    for recipe, stage in zip(recipes, done, strict=True):
        stages.append(stage or train(recipe, resume=resume, overwrite=overwrite, before=stages))
    if is_first():
        for recipe in recipes[:-1]:
            replace_folder.remove(Path(recipe.out), CHECKPOINT_FILES)
    return stages[-1]


def train(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, before: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """Train one stage, save `recipe.out` all or nothing, and return what its training.json says.

    overwrite: the recipe's own result may be replaced; nothing else ever is.  before: what the stages before it said.
    Raises ConfigError for data or a parent that cannot be used, an `out` that is taken, a half-done training of another
    recipe; RunError if the result cannot be written, with what is saved kept.
    """
    set_seed(recipe.seed)
    logging.disable_progress_bar()  # of loading and saving; the training's own stays
    started = time.perf_counter()
    check_out(recipe, overwrite=overwrite)
    work = work_folder(recipe, resume)
    arguments = _arguments(recipe, work)
    rows, held_out = load_rows(recipe.data)
    parts = prepare(recipe, [row.text for row in rows])
    packed, measured = (_packs(recipe, parts, part) for part in (rows, held_out[:MEASURED_ROWS]))
    steps = recipe.optim.total(len(packed))
    arguments.max_steps, arguments.warmup_steps = steps, recipe.optim.warming(steps)
    flex = parts.checkpoint.model.config._attn_implementation == "flex_attention"
    multiple = FLEX_MULTIPLE if flex else 1
    optim, per_row = recipe.optim, recipe.loss.per == "row"
    parts.checkpoint.model.to(arguments.device)
    trainer = StageTrainer(
        parts, recipe, _held_out(parts, measured, arguments, multiple),
        model=parts.module, args=arguments, data_collator=partial(collate, multiple=multiple),
        train_dataset=Rows(
            packed, parts.lay, steps=steps, batch=optim.batch_size, seed=recipe.seed, per_row=per_row
        ),
        eval_dataset=Rows(measured, _final(parts.lay), steps=1, batch=len(measured), seed=recipe.seed + 1),
    )  # fmt: skip
    last = latest(work) if resume else None
    clock = Clock(work, started, last)
    trainer.add_callback(clock)
    for shown in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(shown)
    trainer.add_callback(Progress())
    with _told_disk(work):
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    _round(parts.module, recipe)
    final = trainer.evaluate()
    manifest = told(recipe, final, trainer.state.log_history, clock.seconds(), before) | {"steps": steps}
    if trainer.is_world_process_zero():
        with _told_disk(work):
            check_out(recipe, overwrite=overwrite)  # hours have passed
            _save(parts.checkpoint, recipe, manifest)
        replace_folder.remove(work, WORK_FILES)
    trainer.accelerator.wait_for_everyone()
    return manifest


def prepare(recipe: Recipe, texts: Sequence[str]) -> Parts:
    """Load or make the parent and set its stage up. texts: what a new tokenizer is learnt from."""
    half = recipe.optim.bf16 and torch.cuda.is_available() and (recipe.lora is not None or bool(recipe.tau))
    dtype = "bfloat16" if half else "float32"  # what is trained stays float32
    checkpoint = start(recipe.model, texts, dtype, calibrates=recipe.stage == "fluid-horizon")
    _check_attention(checkpoint, recipe)
    if recipe.stage == "ar":
        return Parts(checkpoint, checkpoint.model, Plain())
    parent, fans = _parent_name(recipe), recipe.fans
    if recipe.stage == "fluid-horizon":
        mask, manifest = checkpoint.mask_id, checkpoint.manifest
        if mask is None or manifest is None or manifest.method != "fluid":
            raise ConfigError(f"model.parent={parent}: stage fluid-horizon needs a checkpoint of stage fluid-hybrid")
        horizons = Horizons(checkpoint.model, fans.k_max, recipe.tau)
        checkpoint.manifest = replace(manifest, k_max=fans.k_max, tau=recipe.tau)
        checkpoint.heads = list(horizons.heads)  # type: ignore[arg-type]  # a ModuleList of KHeads
        return Parts(checkpoint, horizons, layouts(recipe, mask, mask, range(0)))
    return _adapt(checkpoint, recipe, parent)


def _adapt(checkpoint: Checkpoint, recipe: Recipe, parent: str) -> Parts:
    """A mask token for the parent, LoRA if asked for, and the stage's layout."""
    text = recipe.model.mask_token or NEW_MASK
    mask = checkpoints.add_mask_token(checkpoint.model, checkpoint.tokenizer, text)
    checkpoint = replace(checkpoint, mask_id=mask, backbone=Backbone(checkpoint.model))
    end = checkpoint.tokenizer.eos_token_id
    if recipe.stage != "fluid-hybrid" and end is None:
        raise ConfigError(f"model.parent={parent}: its tokenizer has no end-of-sequence token to fill blocks with")
    special = {*checkpoint.tokenizer.all_special_ids, mask}
    lay = layouts(recipe, mask, end, [i for i in range(len(checkpoint.tokenizer)) if i not in special])
    full: Layout
    if isinstance(lay, HybridFans):
        full = MaskFans(mask, lay.k_max)
        checkpoint.manifest = Manifest(parent, text, lay.k_max)
    elif isinstance(lay, Blocks):
        full = replace(lay, every=0, by_noise=False, level=1.0)
        checkpoint.manifest = Manifest(parent, text, method="nbdiff", block_length=lay.length)
    else:
        full = Canvas(mask, end, level=1.0)
        checkpoint.manifest = Manifest(parent, text, method="llada")
    module: nn.Module = checkpoint.model
    if recipe.lora is not None:
        module = checkpoint.adapter = _lora(checkpoint, recipe.lora, mask)
    return Parts(checkpoint, module, lay, full)


def _lora(checkpoint: Checkpoint, spec: LoraSpec, mask: int) -> PeftModel:
    lora = LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, lora_dropout=spec.dropout,
        target_modules=list(spec.targets) or "all-linear",
        trainable_token_indices=[mask] if spec.train_mask else None,
    )  # fmt: skip
    try:
        return get_peft_model(checkpoint.model, lora)
    except ValueError as error:
        raise ConfigError(f"lora.targets={list(spec.targets)}: {error}") from error


def layouts(recipe: Recipe, mask: int, end: int, ids: Sequence[int]) -> Layout:
    """How the recipe's stage lays rows out. mask, end: token ids.  ids: what noise is drawn from."""
    fans, blocks = recipe.fans, recipe.blocks
    if recipe.stage == "fluid-hybrid":
        return HybridFans(mask, fans.k_max, ids, fans.probability, fans.noise, fans.restore)
    if recipe.stage == "fluid-horizon":
        return MaskFans(mask, fans.k_max, fans.probability, fans.past_end)
    if recipe.stage == "nbdiff":
        return Blocks(mask, end, blocks.length, blocks.first, blocks.every, blocks.by_noise)
    if recipe.stage == "llada":
        return Canvas(mask, end, recipe.canvas.length)
    return Plain()


def _check_attention(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """FlexAttention on CUDA, dense masks elsewhere; a window narrower than the rows would be read past."""
    config = checkpoint.backbone.config
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and window < recipe.data.max_length:
        raise ConfigError(f"data.max_length={recipe.data.max_length} exceeds the parent's sliding window of {window}")
    if recipe.data.max_length > checkpoint.backbone.window:
        raise ConfigError(f"data.max_length={recipe.data.max_length}: the parent reads {checkpoint.backbone.window}")
    if torch.cuda.is_available():
        checkpoint.model.set_attn_implementation("flex_attention")


def _parent_name(recipe: Recipe) -> str:
    """The parent as the new checkpoint's manifest names it: a folder as seen from the new one, so both can move."""
    parent = str(recipe.model.parent)
    return os.path.relpath(parent, recipe.out) if Path(parent).is_dir() else parent


def _packs(recipe: Recipe, parts: Parts, rows: Sequence[Row]) -> list[Pack]:
    examples = encode(parts.checkpoint.tokenizer, rows, recipe.data.max_length, recipe.data.loss_on)
    if not examples:
        raise ConfigError(f"data.max_length={recipe.data.max_length}: no row keeps any of its response")
    if recipe.data.pack:
        return packs(examples, recipe.data.max_length, recipe.seed)
    return [(example,) for example in examples]


def _held_out(parts: Parts, measured: list[Pack], arguments: TrainingArguments, multiple: int) -> HeldOut | None:
    if parts.full is None:
        return None
    causal = not isinstance(parts.lay, Canvas)
    batch = arguments.per_device_eval_batch_size
    return HeldOut(parts.checkpoint.model, measured, parts.full, batch, causal=causal, multiple=multiple)


def _final(lay: Layout) -> Layout:
    """The layout as it is at the end of a training, whatever the step."""
    return replace(lay, every=0) if isinstance(lay, Blocks) else lay


def _arguments(recipe: Recipe, work: Path) -> TrainingArguments:
    optim = recipe.optim
    devices = max(1, int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.device_count())
    rows, left = divmod(optim.batch_size, optim.accumulate * devices)
    if left or not rows:
        raise ConfigError(f"optim.batch_size={optim.batch_size} does not divide over {devices} devices")
    ours: dict[str, Any] = {
        "output_dir": str(work), "max_steps": optim.steps or 1, "per_device_train_batch_size": rows,
        "per_device_eval_batch_size": rows, "gradient_accumulation_steps": optim.accumulate,
        "learning_rate": optim.learning_rate, "lr_scheduler_type": optim.schedule,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.clip, "bf16": optim.bf16, "save_steps": optim.save_every, "save_total_limit": 2,
        "logging_steps": optim.report_every, "eval_strategy": "steps", "eval_steps": optim.measure_every,
        "train_sampling_strategy": "sequential", "remove_unused_columns": False, "report_to": "none",
        "seed": recipe.seed, "dataloader_pin_memory": False, "prediction_loss_only": True, "label_names": ["labels"],
        "use_cpu": not torch.cuda.is_available(),
    }  # fmt: skip
    set_here = {*ours, "warmup_steps", "warmup_ratio", "num_train_epochs"}
    known = {f.name for f in fields(TrainingArguments)} - (set_here - {"report_to"})
    if unknown := recipe.trainer.keys() - known:
        name = min(unknown)
        why = "is set by the recipe" if name in set_here else "is no argument of transformers' Trainer"
        raise ConfigError(f"trainer.{name} {why}")
    try:
        return TrainingArguments(**{**ours, **recipe.trainer})
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"trainer: {error}") from error


@contextmanager
def _told_disk(work: Path) -> Iterator[None]:
    """Turns a disk that is full or gone, and an `out` that is taken, into one line and the way out."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, ConfigError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        last = latest(work)
        back = f"--resume goes on from {last.name}" if last else "no step was saved yet"
        if isinstance(error, ConfigError):  # `out` was filled meanwhile
            raise RunError(f"{error}; {back}") from error
        raise RunError(f"{work}: cannot be written: {error}; {back}") from error


@torch.no_grad()
def _round(module: nn.Module, recipe: Recipe) -> None:
    """Give trained weights the precision they are saved with, so that what is measured last is what is saved."""
    if recipe.save_dtype == "bfloat16" and not isinstance(module, Horizons):
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())


def _save(checkpoint: Checkpoint, recipe: Recipe, manifest: dict[str, Any]) -> None:
    if recipe.stage in ADAPTS and checkpoint.adapter is not None:
        checkpoint.backbone.model = checkpoint.adapter.merge_and_unload()
        checkpoint.adapter = None
    checkpoint.model.to(getattr(torch, recipe.save_dtype))
    beside = {TRAINING_FILE: json.dumps(manifest, indent=2) + "\n"}
    checkpoints.save(checkpoint, recipe.out, beside, overwrite=True)
