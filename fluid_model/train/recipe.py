"""A recipe: one TOML file that says how a checkpoint is made. Checked as a whole before any data is read; no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..errors import ConfigError
from ..fields import Nested, at_least, build
from ..settings import check_range

Stage = Literal["ar", "fluid-hybrid", "fluid-horizon"]


@dataclass(frozen=True)
class ScratchSpec:
    """A Llama to be trained from nothing, with a byte-level BPE tokenizer learnt from the training rows.

    vocab_size: tokens, the 256 bytes and the special ones included, so that any text can be spelt.
    tokenizer_rows: training rows the tokenizer is learnt from.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    window: int = 2048
    rope_theta: float = 10000.0
    tie_embeddings: bool = True
    tokenizer_rows: int = 20000

    def __post_init__(self) -> None:
        if self.hidden_size % self.heads or self.heads % self.kv_heads:
            raise ConfigError(
                f"model.scratch: hidden_size={self.hidden_size}, heads={self.heads}, kv_heads={self.kv_heads} "
                "must divide one another in this order"
            )
        at_least("model.scratch.vocab_size", self.vocab_size, 300)


@dataclass(frozen=True)
class ParentSpec:
    """What training starts from: `parent` (a folder or hub id), or a model `scratch` describes."""

    parent: str | None = None
    scratch: ScratchSpec | None = None
    mask_token: str = "<|mask|>"

    def __post_init__(self) -> None:
        if (self.parent is None) == (self.scratch is None):
            raise ConfigError("model: needs either parent or scratch")


@dataclass(frozen=True)
class DataSpec:
    """Training rows. files: JSON lines with prompt and completion, or with text.  max_length: tokens; longer rows
    lose their end.  held_out: rows at the end of the last file that are only measured on.
    """

    files: tuple[str, ...]
    max_length: int = 1024
    held_out: int = 64

    def __post_init__(self) -> None:
        if not self.files:
            raise ConfigError("data.files: must name at least one file")
        at_least("data.max_length", self.max_length, 2)
        at_least("data.held_out", self.held_out, 1)


@dataclass(frozen=True)
class LoraSpec:
    """LoRA on all linear layers.  (FLUID: rank 16, alpha 32)"""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0


@dataclass(frozen=True)
class FanSpec:
    """Fans of mask slots. k_max, probability, noise: as FLUID's stage 1 (16, 0.5, 10%).

    diff_weight: of the slots' loss beside the real tokens'; unset, one mean over both, as the published code takes.
    """

    k_max: int = 16
    probability: float = 0.5
    noise: float = 0.1
    diff_weight: float | None = None

    def __post_init__(self) -> None:
        at_least("fans.k_max", self.k_max, 1)
        check_range("fans.probability", self.probability, 0.0, 1.0, open_low=True)
        check_range("fans.noise", self.noise, 0.0, 1.0)
        at_least("fans.diff_weight", self.diff_weight, 0.0)


@dataclass(frozen=True)
class OptimSpec:
    """How long and how fast. batch_size: rows a step, all devices together.  warmup: share of the steps."""

    steps: int
    batch_size: int = 16
    learning_rate: float = 2e-4
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup: float = 0.1
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
        check_range("optim.learning_rate", self.learning_rate, 0.0, 1.0, open_low=True)
        check_range("optim.warmup", self.warmup, 0.0, 1.0)
        if self.batch_size % self.accumulate:
            raise ConfigError(f"optim.batch_size={self.batch_size} must be a multiple of accumulate={self.accumulate}")


@dataclass(frozen=True)
class Recipe:
    """How one checkpoint is made. tau: bounds of the K-heads to train, for stage fluid-horizon."""

    stage: Stage
    out: str
    model: ParentSpec
    data: DataSpec
    optim: OptimSpec
    fans: FanSpec = field(default_factory=FanSpec)
    lora: LoraSpec | None = None
    tau: tuple[float, ...] = ()
    seed: int = 1

    def __post_init__(self) -> None:
        if self.stage != "ar" and self.model.scratch is not None:
            raise ConfigError(f"model.scratch: stage {self.stage} adapts a parent; set model.parent")
        if (self.stage == "fluid-horizon") != bool(self.tau):
            raise ConfigError(f"tau={list(self.tau)}: stage fluid-horizon needs some, other stages none")
        if len(set(self.tau)) != len(self.tau) or any(t <= 0 for t in self.tau):
            raise ConfigError(f"tau={list(self.tau)}: bounds must be positive and distinct")
        if self.lora is not None and self.stage != "fluid-hybrid":
            raise ConfigError(f"lora: stage {self.stage} trains no adapter")

    @property
    def hash(self) -> str:
        """12 hex digits that name everything the recipe says."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def build_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe from nested values. Raises ConfigError naming the field."""
    recipe: Recipe = build(Recipe, values)
    return recipe


def as_table(recipe: Recipe) -> Nested:
    """Nested plain values; building a recipe from them gives this recipe again."""
    values: Nested = json.loads(json.dumps(asdict(recipe)))
    return values
