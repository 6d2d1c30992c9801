"""Carries out a recipe: parent, rows, transformers' Trainer, checkpoint and manifest."""

from __future__ import annotations

import json
import platform
import random
import time
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

from .. import checkpoint as checkpoints
from .. import layout
from ..backbone import Backbone
from ..checkpoint import Checkpoint
from ..errors import ConfigError
from ..layout import HybridFans, MaskFans
from ..manifest import Manifest
from ..tokens import Tokenizer, end_ids
from .data import Rows, encode, fingerprint, load_rows
from .recipe import Recipe, ScratchSpec, as_table
from .stages import Batch, Horizons, collate, row_loss

TRAINING_FILE = "training.json"
MEASURED_ROWS = 32
"""Held-out rows a measurement looks at."""


@dataclass
class Parts:
    """What a recipe trains: the checkpoint it becomes, the module whose parameters move, and how rows are laid out."""

    checkpoint: Checkpoint
    module: nn.Module
    lay: Any
    weight: float | None = None


class StageTrainer(Trainer):
    """transformers' Trainer with a stage's loss; the loss's terms are logged beside it."""

    def __init__(self, parts: Parts, **options: Any) -> None:
        super().__init__(**options)
        self.parts = parts
        self._terms: dict[str, list[Tensor]] = {}

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if isinstance(self.parts.module, Horizons):
            found = model(**inputs)
            loss, terms = found["loss"], {"stride": found["stride"].mean().detach()}
        else:
            loss, terms = row_loss(model, self.parts.checkpoint.model, inputs, self.parts.weight)
        for name, value in terms.items():
            self._terms.setdefault(name, []).append(value)
        return (loss, {"loss": loss}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for name, values in self._terms.items():
            logs[name] = round(float(torch.stack(values).mean()), 5)
        self._terms.clear()
        super().log(logs, start_time)


def train(recipe: Recipe, *, resume: bool = False) -> dict[str, Any]:
    """Train, save `recipe.out` all or nothing, and return what its training.json says.

    Raises ConfigError for data or a parent that cannot be used.
    """
    set_seed(recipe.seed)
    started = time.perf_counter()
    rows, held_out = load_rows(recipe.data)
    parts = prepare(recipe, [f"{row.prompt}{row.completion}" for row in rows])
    tokenizer, optim = parts.checkpoint.tokenizer, recipe.optim
    examples = encode(tokenizer, rows, recipe.data.max_length)
    measured = encode(tokenizer, held_out[:MEASURED_ROWS], recipe.data.max_length)
    if not examples or not measured:
        raise ConfigError(f"data.max_length={recipe.data.max_length}: no row keeps any of its response")
    work = Path(recipe.out).with_name(f"{Path(recipe.out).name}.training")
    trainer = StageTrainer(
        parts,
        model=parts.module,
        args=_arguments(recipe, work),
        data_collator=collate,
        train_dataset=Rows(examples, parts.lay, optim.steps * optim.batch_size, recipe.seed),
        eval_dataset=Rows(measured, parts.lay, len(measured), recipe.seed + 1),
    )
    latest = sorted(work.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    trainer.train(resume_from_checkpoint=str(latest[-1]) if resume and latest else None)
    losses = trainer.evaluate()
    told = _told(recipe, losses, trainer.state.log_history, time.perf_counter() - started)
    _save(parts.checkpoint, recipe, told)
    return told


def prepare(recipe: Recipe, texts: list[str]) -> Parts:
    """Load or make the parent and set its stage up. texts: what a new tokenizer is learnt from."""
    if recipe.model.scratch is not None:
        checkpoint = from_scratch(recipe.model.scratch, texts)
    else:
        checkpoint = checkpoints.load(str(recipe.model.parent), device="cpu")
    fans, parent = recipe.fans, recipe.model.parent
    if recipe.stage == "ar":
        return Parts(checkpoint, checkpoint.model, lambda example, rng: layout.plain(example))
    if recipe.stage == "fluid-hybrid":
        text = recipe.model.mask_token
        mask = checkpoints.add_mask_token(checkpoint.model, checkpoint.tokenizer, text)
        special = [i for i in checkpoint.tokenizer.all_special_ids if i != mask]
        rule = HybridFans(mask, fans.k_max, range(max(special, default=-1) + 1, mask), fans.probability, fans.noise)
        checkpoint = replace(checkpoint, mask_id=mask, backbone=Backbone(checkpoint.model))
        module: nn.Module = checkpoint.model
        if recipe.lora is not None:
            lora = LoraConfig(
                r=recipe.lora.rank, lora_alpha=recipe.lora.alpha, lora_dropout=recipe.lora.dropout,
                target_modules="all-linear", trainable_token_indices=[mask],
            )  # fmt: skip
            module = checkpoint.adapter = get_peft_model(checkpoint.model, lora)
        checkpoint.manifest = Manifest(str(parent), text, fans.k_max, tau=())
        return Parts(checkpoint, module, partial(_expand, rule), fans.diff_weight)
    if checkpoint.mask_id is None or checkpoint.manifest is None:
        raise ConfigError(f"model.parent={parent}: stage fluid-horizon needs a checkpoint of stage fluid-hybrid")
    horizons = Horizons(checkpoint.model, fans.k_max, recipe.tau)
    checkpoint.manifest = replace(checkpoint.manifest, k_max=fans.k_max, tau=recipe.tau)
    checkpoint.heads = list(horizons.heads)  # type: ignore[arg-type]  # a ModuleList of KHeads
    return Parts(checkpoint, horizons, partial(_expand, MaskFans(checkpoint.mask_id, fans.k_max, fans.probability)))


def _expand(rule: layout.FanRule, example: layout.Example, rng: random.Random) -> layout.Expanded:
    return layout.expand(example, rule, rng)


def from_scratch(spec: ScratchSpec, texts: list[str]) -> Checkpoint:
    """A new Llama and its tokenizer."""
    tokenizer = learn_tokenizer(texts[: spec.tokenizer_rows], spec.vocab_size)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=spec.hidden_size, intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.layers, num_attention_heads=spec.heads, num_key_value_heads=spec.kv_heads,
        max_position_embeddings=spec.window, tie_word_embeddings=spec.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    return Checkpoint(Backbone(model), tokenizer, end_ids(tokenizer, config))


def learn_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE that spells any text; digits stand alone."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Fast

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    fast.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>")


def _arguments(recipe: Recipe, work: Path) -> TrainingArguments:
    optim = recipe.optim
    devices = max(1, torch.cuda.device_count())
    rows, left = divmod(optim.batch_size, optim.accumulate * devices)
    if left or not rows:
        raise ConfigError(f"optim.batch_size={optim.batch_size} does not divide over {devices} devices")
    return TrainingArguments(
        output_dir=str(work), max_steps=optim.steps, per_device_train_batch_size=rows,
        per_device_eval_batch_size=rows, gradient_accumulation_steps=optim.accumulate,
        learning_rate=optim.learning_rate, lr_scheduler_type=optim.schedule,
        warmup_steps=round(optim.warmup * optim.steps), weight_decay=optim.weight_decay, max_grad_norm=optim.clip,
        bf16=optim.bf16, save_steps=optim.save_every, save_total_limit=2, logging_steps=optim.report_every,
        eval_strategy="steps", eval_steps=optim.measure_every, train_sampling_strategy="sequential",
        remove_unused_columns=False, report_to="none", seed=recipe.seed, dataloader_pin_memory=False,
        prediction_loss_only=True, label_names=["labels"],
    )  # fmt: skip


def _told(recipe: Recipe, losses: dict[str, float], history: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The manifest of a training: enough to do it again and to see whether it came out the same."""
    return {
        "recipe": as_table(recipe),
        "recipe_hash": recipe.hash,
        "data": [fingerprint(Path(file)) for file in recipe.data.files],
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft")},
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
        "held_out_loss": losses["eval_loss"],
        "history": [entry for entry in history if "loss" in entry or "eval_loss" in entry],
    }


def _save(checkpoint: Checkpoint, recipe: Recipe, told: dict[str, Any]) -> None:
    if recipe.lora is not None and checkpoint.adapter is not None:
        checkpoint.backbone.model = checkpoint.adapter.merge_and_unload()
        checkpoint.adapter = None
    checkpoints.save(checkpoint, recipe.out, {TRAINING_FILE: json.dumps(told, indent=2) + "\n"})
