"""Runs a recipe: data, transformers' Trainer with a stage's loss, the finished checkpoint and training.json."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
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
from ..checkpoints.manifest import CHECKPOINT_FILES, TRAINING_FILE
from ..common import replace_folder
from ..common.errors import ConfigError, RunError
from .data import Filling, Pack, TrainingSet, encode, pack_examples
from .gated import GatedStage
from .measure import HeldOut
from .origin import training_record
from .places import SECONDS_FILE, WORK_FILES, check_out, finished, is_first, latest_step, work_folder
from .progress import Progress
from .recipe import ADAPTS, MASKED, Recipe
from .rows import DataRow, load_rows
from .stage_setup import StageSetup, final_layout, set_up_stage
from .stages import FLEX_MULTIPLE, Batch, HorizonCalibration, collate, row_loss

MEASURED_ROWS = 64
"""Held-out rows used by a measurement."""


class StageTrainer(Trainer):
    """transformers' Trainer with a stage's loss; logs the loss's terms and the held-out measurements, too."""

    def __init__(self, setup: StageSetup, recipe: Recipe, held_out: HeldOut | None, **options: Any) -> None:
        super().__init__(**options)
        self.setup, self.recipe, self.held_out = setup, recipe, held_out
        self.model_accepts_loss_kwargs = False  # our loss is a mean: Trainer must divide it by accumulation steps
        self._terms: dict[str, list[Tensor]] = {}

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if isinstance(self.setup.module, HorizonCalibration | GatedStage):
            terms = model(**inputs)
            loss = terms.pop("loss")
        else:
            loss, terms = row_loss(model, self.setup.checkpoint.model, inputs, self.recipe.loss_weights)
        for name, value in terms.items():
            self._terms.setdefault(name, []).append(value.detach())
        return (loss, {"loss": loss}) if return_outputs else loss

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        figures: dict[str, float] = super().evaluate(*arguments, **options)
        if self.held_out is not None:
            training = self.model.training
            self.model.eval()
            measured = {f"eval_{name}": round(value, 5) for name, value in self.held_out.measure(self.model).items()}
            self.model.train(training)
            self.log(measured)
            figures |= measured
        return figures

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        prefix = "eval_" if "eval_loss" in logs else ""
        for name, values in self._terms.items():
            logs[prefix + name] = round(float(torch.stack(values).float().mean()), 5)
        self._terms.clear()
        super().log(logs, start_time)


class WeightVersions(TrainerCallback):
    """Counts a new version of every trained weight after each step, as torch does for other changes in place.

    Fused optimizers, the Trainer's default, do not, and the engine's forward keeps what it has made of a version.
    """

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        if model is not None:
            torch.autograd.graph.increment_version([p for p in model.parameters() if p.requires_grad])


class Clock(TrainerCallback):
    """Wall time of a training in seconds, including interrupted attempts up to the step that they were resumed from."""

    def __init__(self, work: Path, started: float, last_step: Path | None) -> None:
        self.work, self.started = work, started
        file = last_step / SECONDS_FILE if last_step else None
        self.before = float(file.read_text()) if file and file.is_file() else 0.0

    def seconds(self) -> float:
        """Seconds so far."""
        return self.before + time.perf_counter() - self.started

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        folder = self.work / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            (folder / SECONDS_FILE).write_text(str(self.seconds()))


def train_chain(recipes: Sequence[Recipe], *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Train stage after stage, then remove the results of all but the last.

    Returns and raises as `train`. A resumed chain skips finished stages.
    """
    # 1) finished stages, and room for the others
    records = [finished(recipe) if resume else None for recipe in recipes]
    if (last := records[-1]) is not None:
        return last
    for recipe, record in zip(recipes, records, strict=True):
        if record is None:
            check_out(recipe, overwrite=overwrite)
    # 2) train
    stages: list[dict[str, Any]] = []
    for recipe, record in zip(recipes, records, strict=True):
        stages.append(record or train(recipe, resume=resume, overwrite=overwrite, before=stages))
    # 3) remove intermediate results
    if is_first():
        for recipe in recipes[:-1]:
            replace_folder.remove(Path(recipe.out), CHECKPOINT_FILES)
    return stages[-1]


def train(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, before: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """Train one stage, save `recipe.out` all or nothing, and return its training.json.

    overwrite: replace this recipe's own earlier result, and nothing else.  before: training.json of earlier stages.
    Raises ConfigError for unusable data or parents, an `out` that is taken, saved steps of another recipe; RunError if
    the result cannot be written, with saved steps left in place.
    """
    # 1) where to write
    set_seed(recipe.seed)
    logging.disable_progress_bar()  # of loading and saving; the training's own stays
    started = time.perf_counter()
    check_out(recipe, overwrite=overwrite)
    work = work_folder(recipe, resume)
    arguments = _arguments(recipe, work)
    # 2) parent, data, number of steps
    rows, held_out_rows = load_rows(recipe.data)
    setup = set_up_stage(recipe, [row.text for row in rows])
    packs = _pack(recipe, setup, rows)
    held_out_packs = _pack(recipe, setup, held_out_rows[:MEASURED_ROWS])
    steps = recipe.optim.total_steps(len(packs))
    arguments.max_steps, arguments.warmup_steps = steps, recipe.optim.warmup_of(steps)
    # 3) train
    last_step = latest_step(work) if resume else None
    clock = Clock(work, started, last_step)
    trainer = _trainer(recipe, setup, packs, held_out_packs, arguments)
    trainer.add_callback(clock)
    with _disk_errors(work):
        trainer.train(resume_from_checkpoint=str(last_step) if last_step else None)
    # 4) measure the weights as they are saved
    _round_weights(setup.module, recipe)
    final = trainer.evaluate()
    record = training_record(recipe, final, trainer.state.log_history, clock.seconds(), before) | {"steps": steps}
    # 5) save; `out` may have been filled since the first check
    if trainer.is_world_process_zero():
        with _disk_errors(work):
            check_out(recipe, overwrite=overwrite)
            _save(setup.checkpoint, recipe, record)
        replace_folder.remove(work, WORK_FILES)
    trainer.accelerator.wait_for_everyone()
    return record


def _trainer(
    recipe: Recipe, setup: StageSetup, packs: list[Pack], held_out_packs: list[Pack], arguments: TrainingArguments
) -> StageTrainer:
    """The Trainer with both data sets, the held-out measurements, and this project's progress lines."""
    flex = setup.checkpoint.model.config._attn_implementation == "flex_attention"
    multiple = FLEX_MULTIPLE if flex else 1
    setup.checkpoint.model.to(arguments.device)
    trainer = StageTrainer(
        setup,
        recipe,
        _held_out(recipe, setup, held_out_packs, arguments, multiple),
        model=setup.module,
        args=arguments,
        data_collator=partial(collate, multiple=multiple),
        train_dataset=TrainingSet(
            packs,
            setup.layout,
            steps=arguments.max_steps,
            batch=recipe.optim.batch_size,
            seed=recipe.seed,
            per=recipe.loss.per,
            filling=_filling(recipe, setup, arguments.per_device_train_batch_size),
        ),
        eval_dataset=TrainingSet(
            held_out_packs,
            final_layout(setup.layout),
            steps=1,
            batch=len(held_out_packs),
            seed=recipe.seed + 1,
            filling=_filling(recipe, setup, arguments.per_device_eval_batch_size),
        ),
    )
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    trainer.add_callback(Progress())
    trainer.add_callback(WeightVersions())
    return trainer


def _pack(recipe: Recipe, setup: StageSetup, rows: Sequence[DataRow]) -> list[Pack]:
    """Tokenised rows, packed if the recipe asks for it. Raises ConfigError if none keeps any response."""
    examples = encode(setup.checkpoint.tokenizer, rows, recipe.data.max_length, recipe.data.loss_on)
    if not examples:
        raise ConfigError(f"data.max_length={recipe.data.max_length}: no row keeps any of its response")
    if recipe.data.pack:
        return pack_examples(examples, recipe.data.max_length, recipe.seed)
    return [(example,) for example in examples]


def _filling(recipe: Recipe, setup: StageSetup, rows: int) -> Filling | None:
    """What fills up the rows of a device's batch, where the recipe asks for it."""
    if not recipe.fills_batch:
        return None
    tokenizer = setup.checkpoint.tokenizer
    pads = recipe.stage == "mdlm" and tokenizer.pad_token_id is not None
    return Filling(tokenizer.pad_token_id if pads else tokenizer.eos_token_id, rows)


def _held_out(
    recipe: Recipe, setup: StageSetup, packs: list[Pack], arguments: TrainingArguments, multiple: int
) -> HeldOut | None:
    if setup.measured_layout is None:
        return None
    causal = recipe.stage not in MASKED
    batch = arguments.per_device_eval_batch_size
    return HeldOut(setup.checkpoint.model, packs, setup.measured_layout, batch, causal=causal, multiple=multiple)


def _arguments(recipe: Recipe, work: Path) -> TrainingArguments:
    """The Trainer's arguments: the recipe's own, then its table `trainer`. Raises ConfigError for unusable ones."""
    # 1) rows of a device's batch
    optim = recipe.optim
    devices = max(1, int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.device_count())
    rows, remainder = divmod(optim.batch_size, optim.accumulate * devices)
    if remainder or not rows:
        raise ConfigError(f"optim.batch_size={optim.batch_size} does not divide over {devices} devices")
    # 2) the recipe's settings
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
    # 3) the user's further arguments
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
def _disk_errors(work: Path) -> Iterator[None]:
    """Turn write failures, and an `out` filled meanwhile, into a RunError of one line that says how to go on."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, ConfigError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        last = latest_step(work)
        way_out = f"--resume goes on from {last.name}" if last else "no step was saved yet"
        if isinstance(error, ConfigError):  # from `check_out`
            raise RunError(f"{error}; {way_out}") from error
        raise RunError(f"{work}: cannot be written: {error}; {way_out}") from error


@torch.no_grad()
def _round_weights(module: nn.Module, recipe: Recipe) -> None:
    """Round trained weights to the saved number format, so that the last measurement is of the saved weights."""
    if recipe.save_dtype == "bfloat16" and not isinstance(module, HorizonCalibration):
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())


def _save(checkpoint: Checkpoint, recipe: Recipe, record: dict[str, Any]) -> None:
    """Merge an adapter, convert the weights, and write the checkpoint's folder with training.json."""
    if recipe.stage in ADAPTS and checkpoint.adapter is not None:
        checkpoint.backbone.model = checkpoint.adapter.merge_and_unload()
        checkpoint.adapter = None
    saved = getattr(torch, recipe.save_dtype)
    if checkpoint.backbone.adapter is not None:
        checkpoint.backbone.adapter.to(saved)  # its parent is not saved
    else:
        checkpoint.model.to(saved)
    beside = {TRAINING_FILE: json.dumps(record, indent=2) + "\n"}
    checkpoints.save(checkpoint, recipe.out, beside, overwrite=True)
