"""A recipe: one TOML file with all settings of a training, checked before any data is read. No torch.

stage = "fluid-hybrid"
out = "checkpoints/mine"
[model]
parent = "some/model"
[data]
files = ["train.jsonl"]
[fans]                        # mask blocks; FLUID's code calls them fans
k_max = 16
[optim]
steps = 2000
[next]                        # a second stage, from the result of the first
stage = "fluid-horizon"
tau = [2.8]
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from ..common.errors import ConfigError
from ..common.fields import at_least, build
from ..common.files import Nested
from ..settings import check_range
from .layout_specs import BlockSpec, CanvasSpec, MaskBlockSpec
from .noise import NoiseSpec

LossOn = Literal["responses", "last", "all"]
"""The part of a row with a loss: every response, the last one, or all of it."""
LossTarget = Literal["labels", "parent"]
"""What a mask slot learns: the next token, by cross-entropy, or the parent's distribution of it, by KL divergence."""
LossPer = Literal["slot", "row", "batch"]
Stage = Literal["ar", "fluid-hybrid", "fluid-horizon", "nbdiff", "llada", "mdlm", "bd3lm"]
MASKED = ("llada", "mdlm", "bd3lm")
"""Stages of masked diffusion: one noise level an example, no causal path left."""
ADAPTS = ("fluid-hybrid", "nbdiff", *MASKED)
"""Stages that add a mask token to a parent and train it to predict masked tokens."""
LOSSES: dict[Stage, tuple[float, float] | None] = {
    "ar": (1.0, 0.0), "fluid-hybrid": None, "fluid-horizon": None, "nbdiff": (0.5, 1.0), "llada": (0.0, 1.0),
    "mdlm": (0.0, 1.0), "bd3lm": (0.0, 1.0),
}  # fmt: skip
"""Weights of L_AR and L_Diff; None: one mean over all slots. (FLUID's public code; NBDiff, lambda 0.5; LLaDA; dLLM)"""


@dataclass(frozen=True)
class LlamaSpec:
    """A Llama's shape.

    vocab_size: tokens. A new tokenizer's include the 256 bytes and the special tokens, so that it encodes any text.
    window: tokens.  init_std: standard deviation of new weights.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    window: int = 2048
    rope_theta: float = 10000.0
    rms_eps: float = 1e-6
    attention_bias: bool = False
    tie_embeddings: bool = True
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.hidden_size % self.heads or self.heads % self.kv_heads:
            raise ConfigError(
                f"model: hidden_size={self.hidden_size}, heads={self.heads}, kv_heads={self.kv_heads} "
                "must divide one another in this order"
            )
        at_least("model: vocab_size", self.vocab_size, 300)


@dataclass(frozen=True)
class ParentSpec:
    """The model that training starts from: `parent` (a folder or hub id), or a new one of the shape `scratch`.

    tokenizer_rows: training rows that a new model's byte-level BPE tokenizer is trained on.  mask_token: text of the
    mask token (unset: the parent's own, or <|mask|>, added).  shape: the parent's, for a dry run without the parent.
    """

    parent: str | None = None
    scratch: LlamaSpec | None = None
    shape: LlamaSpec | None = None
    mask_token: str | None = None
    tokenizer_rows: int = 20000

    def __post_init__(self) -> None:
        if (self.parent is None) == (self.scratch is None):
            raise ConfigError("model: needs either parent or scratch")


@dataclass(frozen=True)
class DataSpec:
    """Data rows; `rows` has their forms.

    files: paths.  dataset_info, datasets: LLaMA-Factory's register and the names to take from it.
    max_rows: first rows of each file or set.  max_length: tokens; longer rows are cut.  pack: join short rows up to
    max_length; they do not attend to one another.  loss_on: every response or completion, the last one, or prompts,
    too.  held_out: rows at the end for measurements, or their share of all rows (0.05).
    """

    files: tuple[str, ...] = ()
    dataset_info: str | None = None
    datasets: tuple[str, ...] = ()
    max_rows: int | None = None
    max_length: int = 1024
    pack: bool = False
    loss_on: LossOn = "responses"
    held_out: int | float = 64

    def __post_init__(self) -> None:
        if not self.files and not self.datasets:
            raise ConfigError("data.files: must name at least one file (or data.dataset_info and data.datasets)")
        if bool(self.datasets) != (self.dataset_info is not None):
            raise ConfigError("data.datasets and data.dataset_info need one another")
        at_least("data.max_length", self.max_length, 2)
        at_least("data.max_rows", self.max_rows, 1)
        if isinstance(self.held_out, float) and not 0 < self.held_out < 1:
            raise ConfigError(f"data.held_out={self.held_out} must be a number of rows or a share between 0 and 1")
        if isinstance(self.held_out, int):
            at_least("data.held_out", self.held_out, 1)


@dataclass(frozen=True)
class LoraSpec:
    """LoRA.  (FLUID: rank 16, alpha 32, all linear layers)

    targets: names of the adapted layers; none: all linear layers.  train_mask: also train the mask token's embedding.
    FLUID's public code does not (Oli-lab-nun/FLUID at 9093c11); its mask is an unused token of the parent.
    gated: LoRA acts on mask slots alone, so the adapted model's verified text is its parent's (`forward.gated_lora`).
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    train_mask: bool = True
    gated: bool = False


@dataclass(frozen=True)
class LossSpec:
    """The minimised loss: ar * L_AR + diff * L_Diff. Unset weights are those of the stage's publication, `LOSSES`.

    per: weigh every labelled slot of a step the same (slot), or every row (row). FLUID's public code and SMDM's
    (ML-GSAI/SMDM at 583aa47, sft/finetune_mdm.py) weigh slots, LLaDA's guidelines (ML-GSAI/LLaDA at b7e6c35,
    GUIDELINES.md) weigh rows. NBDiff published no training code.  batch: a row's losses are summed, then averaged over
    rows. dLLM's loss_norm_type has the three as token (its default), sequence and batch.
    target: see `LossTarget`; parent needs a gated adapter, whose training has the parent's distributions at hand.
    """

    ar: float | None = None
    diff: float | None = None
    per: LossPer = "slot"
    target: LossTarget = "labels"

    def __post_init__(self) -> None:
        at_least("loss.ar", self.ar, 0.0)
        at_least("loss.diff", self.diff, 0.0)


@dataclass(frozen=True)
class OptimSpec:
    """Length, batch and learning rate of a training.

    steps, or epochs: passes over the rows.  batch_size: rows (packs) per step on all devices.  warmup: share of the
    steps; warmup_steps: their number instead.  save_every, report_every, measure_every: steps.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 16
    learning_rate: float = 2e-4
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup: float = 0.1
    warmup_steps: int | None = None
    weight_decay: float = 0.0
    clip: float = 1.0
    bf16: bool = False
    accumulate: int = 1
    save_every: int = 500
    report_every: int = 50
    measure_every: int = 250

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "save_every", "report_every", "measure_every"):
            at_least(f"optim.{name}", getattr(self, name), 1)
        at_least("optim.warmup_steps", self.warmup_steps, 0)
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError("optim: needs either steps or epochs")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ConfigError(f"optim.epochs={self.epochs} must be above 0")
        check_range("optim.learning_rate", self.learning_rate, 0.0, 1.0, open_low=True)
        check_range("optim.warmup", self.warmup, 0.0, 1.0)
        if self.batch_size % self.accumulate:
            raise ConfigError(f"optim.batch_size={self.batch_size} must be a multiple of accumulate={self.accumulate}")

    def total_steps(self, rows: int) -> int:
        """Steps of a training on `rows` rows (or packs)."""
        if self.steps is not None:
            return self.steps
        return math.ceil((self.epochs or 0) * rows / self.batch_size)

    def warmup_of(self, steps: int) -> int:
        """Warm-up steps of a training of `steps`."""
        return round(self.warmup * steps) if self.warmup_steps is None else self.warmup_steps


@dataclass(frozen=True)
class Recipe:
    """The settings of one stage.

    tau: bounds of the K-heads to train, for stage fluid-horizon.  trainer: further arguments of transformers' Trainer,
    e.g. deepspeed, fsdp, gradient_checkpointing, report_to.  save_dtype: number format of the saved weights.
    """

    stage: Stage
    out: str
    model: ParentSpec
    data: DataSpec
    optim: OptimSpec
    fans: MaskBlockSpec = field(default_factory=MaskBlockSpec)
    blocks: BlockSpec = field(default_factory=BlockSpec)
    canvas: CanvasSpec = field(default_factory=CanvasSpec)
    noise: NoiseSpec = field(default_factory=NoiseSpec)
    loss: LossSpec = field(default_factory=LossSpec)
    lora: LoraSpec | None = None
    tau: tuple[float, ...] = ()
    trainer: dict[str, Any] = field(default_factory=dict)
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 1

    def __post_init__(self) -> None:
        if Path(self.out).name in ("", ".."):
            raise ConfigError(f"out={self.out!r} must name a folder")
        if self.stage != "ar" and self.model.scratch is not None:
            raise ConfigError(f"model.scratch: stage {self.stage} adapts a parent; set model.parent")
        if (self.stage == "fluid-horizon") != bool(self.tau):
            raise ConfigError(f"tau={list(self.tau)}: stage fluid-horizon needs some, other stages none")
        if len(set(self.tau)) != len(self.tau) or any(t <= 0 for t in self.tau):
            raise ConfigError(f"tau={list(self.tau)}: bounds must be positive and distinct")
        if self.lora is not None and self.stage not in ADAPTS:
            raise ConfigError(f"lora: stage {self.stage} trains no adapter")
        if (self.loss.ar, self.loss.diff) != (None, None) and self.stage not in ADAPTS:
            raise ConfigError(f"loss: stage {self.stage} has one term only")
        if self.is_gated:
            self._check_gated()
        elif self.loss.target == "parent":
            raise ConfigError("loss.target='parent' needs lora.gated=true")
        if self.fans.drawn and not self.is_gated:
            raise ConfigError("fans.drawn=true: widths are drawn by depth for gated adapters alone (lora.gated=true)")
        self._check_masked()

    @property
    def is_gated(self) -> bool:
        """Whether the stage trains a gated adapter."""
        return self.lora is not None and self.lora.gated

    @property
    def fills_batch(self) -> bool:
        """Whether rows are filled up to the longest of a device's batch."""
        published = "batch" if self.stage == "mdlm" else "random"
        return self.stage in ("llada", "mdlm") and (self.canvas.fill or published) == "batch"

    def _check_masked(self) -> None:
        """Raise ConfigError for settings of masked diffusion in other stages, and for those that do not fit it."""
        if self.stage not in MASKED and self.noise != NoiseSpec():
            raise ConfigError(f"noise: stage {self.stage} has none; known: {', '.join(MASKED)}")
        if self.stage not in MASKED and self.loss.per == "batch":
            raise ConfigError(f"loss.per='batch': stage {self.stage} averages over slots or rows")
        if self.loss.ar and self.stage in MASKED:
            raise ConfigError(f"loss.ar={self.loss.ar}: stage {self.stage} has no autoregressive term")
        if self.fills_batch and self.data.pack:
            raise ConfigError("data.pack=true: packed rows are not filled up to a batch's; set canvas.fill='random'")
        if self.blocks.shift and self.stage != "bd3lm":
            raise ConfigError(f"blocks.shift=true: a setting of stage bd3lm, not of {self.stage}")
        length, longest = self.blocks.length, self.data.max_length
        if self.stage == "bd3lm" and longest % length:
            rounded_up = -(-longest // length) * length
            raise ConfigError(f"blocks.length={length} does not divide data.max_length={longest}; set {rounded_up}")
        if self.stage == "bd3lm" and self.blocks.by_noise:
            raise ConfigError("blocks.by_noise=true: stage bd3lm weighs by noise.weight")

    def _check_gated(self) -> None:
        """Raise ConfigError for settings that a gated adapter does not learn from."""
        if self.stage != "fluid-hybrid":
            raise ConfigError(f"lora.gated=true: stage {self.stage} has no mask slots beside its tokens")
        if self.fans.restore:
            raise ConfigError(f"fans.restore={self.fans.restore}: a gated adapter learns from masks alone; set it to 0")
        if self.loss.ar:
            raise ConfigError(f"loss.ar={self.loss.ar}: a gated adapter leaves the parent's own text as it is")
        if self.lora is not None and (self.lora.dropout or not self.lora.train_mask):
            raise ConfigError("lora: a gated adapter takes neither dropout nor train_mask=false")

    @property
    def loss_weights(self) -> tuple[float, float] | None:
        """Weights of L_AR and L_Diff; None for one mean over all slots."""
        published = LOSSES[self.stage]
        if self.loss.ar is None and self.loss.diff is None:
            return published
        default_ar, default_diff = published or (1.0, 1.0)
        ar = default_ar if self.loss.ar is None else self.loss.ar
        diff = default_diff if self.loss.diff is None else self.loss.diff
        return ar, diff

    @property
    def hash(self) -> str:
        """12 hex digits over all settings that differ from their defaults, except `out`.

        Settings added later, at their defaults, leave it unchanged.
        """
        text = json.dumps({**_changed_settings(self), "out": None}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _changed_settings(spec: Any) -> Nested:
    """Values of a specification that differ from its defaults, nested."""
    values: Nested = {}
    for f in fields(spec):
        value = getattr(spec, f.name)
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if value != default:
            values[f.name] = _changed_settings(value) if is_dataclass(value) else value
    return values


def build_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe of one stage from nested values. Raises ConfigError naming the field."""
    recipe: Recipe = build(Recipe, values)
    return recipe


def as_table(recipe: Recipe) -> Nested:
    """All settings as nested plain values; `build_recipe` of them gives this recipe again."""
    values: Nested = json.loads(json.dumps(asdict(recipe)))
    return values
