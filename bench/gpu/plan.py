"""What `bench.gpu` measures on, how much of it, and where it goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers

from fluid_model import Checkpoint, ConfigError, Engine, FluidSettings, KHead
from fluid_model.forward.backbone import Backbone

from .. import bars, replay
from ..bars import Bar

Bounds = dict[str, dict[int, tuple[Callable[[str, float, float], Bar], float]]]
"""What bars are for, by what is measured and how many rows share a forward (0: whatever their number)."""
QUICK = {
    "layers": 2, "hidden": 64, "vocabulary": 8192, "context": 64, "tokens": 16, "answers": 2, "forwards": 5, "runs": 1,
}  # fmt: skip


@dataclass(frozen=True)
class GpuPlan:
    """The model, and how much is measured.

    context: tokens a row has read before.  tokens: to write.  answers: written by FLUID at least.  forwards, runs: of
    which the median.
    """

    device: torch.device
    concurrency: tuple[int, ...]
    layers: int = 34
    hidden: int = 4096
    vocabulary: int = 153376
    context: int = 1024
    tokens: int = 256
    answers: int = 8
    forwards: int = 15
    runs: int = 3

    def __post_init__(self) -> None:
        if self.hidden < 64 or self.hidden % 64:
            raise ConfigError(f"hidden={self.hidden} must be a multiple of 64")
        for name, least in (("layers", 1), ("context", 2), ("tokens", 2), ("runs", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {least}")

    @property
    def is_whole(self) -> bool:
        """Whether bars are for this to meet."""
        return self.device.type == "cuda" and (self.layers, self.hidden, self.vocabulary) == (34, 4096, 153376)

    @property
    def hardware(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"


class Measurements:
    """What was measured, by what it is and how many rows share a forward (0: whatever their number)."""

    def __init__(self, plan: GpuPlan, bounds: Bounds) -> None:
        self.plan, self.bounds = plan, bounds
        self.cells: dict[str, dict[int, Bar]] = {}

    def put(self, what: str, rows: int, measured: float | None) -> None:
        """measured: None where this machine cannot say."""
        name = f"{what}, {f'batch {rows}, ' if rows else ''}{self.plan.hardware}"
        bound = self.bounds.get(what, {}).get(rows) if self.plan.is_whole else None
        if bound is None or measured is None:
            bar = Bar(name, None if measured is None else float(f"{measured:.4g}"), "", None)
        else:
            bar = bound[0](name, measured, bound[1])
        self.cells.setdefault(what, {})[rows] = bar

    @property
    def bars(self) -> list[Bar]:
        return [bar for cells in self.cells.values() for bar in cells.values()]

    def table(self) -> str:
        """One line for what is measured, one column for a number of rows."""
        columns = self.plan.concurrency
        lines = []
        for what, cells in self.cells.items():
            once = [_cell(cells[0])] if 0 in cells else []
            lines.append([what, *once, *(_cell(cells.get(rows)) for rows in columns[len(once) :])])
        return bars.table([self.plan.hardware, *(f"batch {rows}" for rows in columns)], lines)


def _cell(bar: Bar | None) -> str:
    if bar is None:
        return ""
    text = "not measured" if bar.measured is None else f"{bar.measured:g}"
    return text if bar.ok is None else f"{text} ({bar.bar}: {'yes' if bar.ok else '**no**'})"


class _Mute:
    """A tokenizer for random ids, which say nothing."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return ""


def build(plan: GpuPlan) -> Checkpoint:
    """Random weights, made where they stay: bfloat16, or float32 on a CPU. Nothing ends its answers."""
    heads = max(4, plan.hidden // 128)
    config = transformers.LlamaConfig(
        hidden_size=plan.hidden, intermediate_size=plan.hidden * 25 // 8, num_hidden_layers=plan.layers,
        num_attention_heads=heads, num_key_value_heads=heads // 4, vocab_size=plan.vocabulary, attention_bias=True,
        max_position_embeddings=32768, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 1.6e7},
        bos_token_id=None, eos_token_id=None, pad_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    dtype = torch.float32 if plan.device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    with plan.device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        head = KHead(plan.hidden, FluidSettings().max_horizon)
    backbone = Backbone(model)
    if backbone.explicit is None:
        raise ConfigError("no explicit Llama forward for this model; see fluid_model.forward.llama.misfit")
    return Checkpoint(backbone, _Mute(), (), mask_id=plan.vocabulary - 1, head=head)


@dataclass(frozen=True)
class Bench:
    """What is measured with. bandwidth: of copies, bytes a second.  note: how, where there are several ways."""

    plan: GpuPlan
    checkpoint: Checkpoint
    tape: replay.Tape
    bandwidth: float
    measurements: Measurements
    note: str = ""

    def put(self, what: str, rows: int, measured: float | None) -> None:
        """Add a measurement under its name and this bench's note."""
        self.measurements.put(what + self.note, rows, measured)

    @property
    def backbone(self) -> Backbone:
        backbone: Backbone = self.checkpoint.backbone
        return backbone

    @property
    def read(self) -> int:
        """Bytes of all weights that a forward reads: of the embedding it reads a few rows."""
        return self.held - int(self.checkpoint.model.get_input_embeddings().weight.nbytes)

    @property
    def held(self) -> int:
        """Bytes of all weights."""
        return sum(int(weight.nbytes) for weight in self.checkpoint.model.parameters())

    def fluid(self, rows: int) -> Engine:
        """An engine whose rows are FLUID's, by the recording."""
        strategy = replay.Replay(self.checkpoint, FluidSettings(), self.tape)
        return Engine(self.backbone, self.checkpoint.tokenizer, self.checkpoint.end_ids, strategy, rows)
