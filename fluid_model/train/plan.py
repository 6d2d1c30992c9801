"""`fluid-train RECIPE --dry-run`: estimated tokens, FLOPs, memory and time of a training, before any of it is spent.

FLOPs count matrix products: 2 per weight and slot in a forward, twice that in a backward (Kaplan et al. 2020, section
2.1), and the dense attention's. Memory of activations follows Korthikanti et al. 2022, equation 2.
"""

from __future__ import annotations

import random
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from ..checkpoints import checkpoint as checkpoints
from ..common.errors import ConfigError
from .data import Pack, encode, fill_up, pack_examples
from .parent import outline, train_tokenizer
from .recipe import ParentSpec, Recipe
from .row_layouts import Example, TrainingRow, pack_rows
from .rows import load_rows
from .stage_setup import layout_of

SAMPLE = 256
"""Training rows that the estimate's means are over."""
TOKENIZER_ROWS = 2000
"""Data rows that a new tokenizer is trained on for an estimate."""
UTILISATION = 0.4
"""Share of a GPU's peak that an efficient training reaches; reports of large models give 0.35 to 0.5."""
GPUS: dict[str, tuple[float, float]] = {
    "a100": (312e12, 80), "h100": (989e12, 80), "h200": (989e12, 141), "b200": (2250e12, 180), "910b": (376e12, 64),
}  # fmt: skip
"""Dense bfloat16 FLOP/s and memory in GiB, from the makers' data sheets (910b: Ascend, 16-bit)."""
DEVICES = 8
"""GPUs of the second time estimate."""
OPTIMIZER_BYTES = 12.0
"""Bytes per trained parameter of its gradient and AdamW's two moments, float32."""
ACTIVATION_BYTES = 34
"""Bytes per slot, layer and hidden unit of the activations that a backward needs, at 16 bits (Korthikanti et al.)."""
LOGIT_BYTES = 12
"""Bytes per label and vocabulary entry of float32 logits, their softmax and its gradient."""


@dataclass(frozen=True)
class TrainingCost:
    """Estimated cost of a stage.

    steps, tokens (of text), slots (fed), labels (slots with a loss), flops: of the whole training.
    parameters, trained: of the model.  weight_bytes, optimizer_bytes (gradients included), activation_bytes: of one
    device.  assumed: what was assumed where the data is not at hand.
    """

    steps: int
    parameters: int
    trained: int
    tokens: float
    slots: float
    labels: float
    flops: float
    weight_bytes: float
    optimizer_bytes: float
    activation_bytes: float
    assumed: str | None


class RowSample(NamedTuple):
    """Some training rows, the number of all of them, and what was assumed where the data is not at hand."""

    rows: list[TrainingRow]
    total: int
    assumed: str | None


def estimate_cost(recipe: Recipe, origin: ParentSpec) -> TrainingCost:
    """The cost of a recipe. origin: the model that its chain starts from.

    Raises ConfigError if that model's shape is unknown, or if the number of steps depends on missing data.
    """
    model = outline(origin)
    config = model.config.get_text_config(decoder=True)
    # 1) steps, and what they feed
    sample = _sample_rows(recipe, origin)
    optim = recipe.optim
    if optim.steps is None and sample.assumed:
        raise ConfigError(f"optim.epochs={optim.epochs}: set optim.steps for a dry run without data ({sample.assumed})")
    steps = optim.total_steps(sample.total)

    def in_all(sampled: int) -> float:
        return sampled / len(sample.rows) * optim.batch_size * steps

    slots = in_all(sum(len(row.ids) for row in sample.rows))
    masks = in_all(sum(step > 0 for row in sample.rows for step in row.step))
    labels = in_all(sum(_count_labels(row) for row in sample.rows))
    tokens = in_all(sum(_count_tokens(row) for row in sample.rows))
    attended = in_all(sum(len(row.ids) ** 2 for row in sample.rows))  # pairs of query and key
    # 2) FLOPs: a forward, and a backward through trained weights (2 more) or past frozen ones (1 more); a gated
    # adapter's backward is that of its mask slots alone
    parameters = sum(p.numel() for p in model.parameters())
    trained = _count_trained(recipe, model, parameters)
    vocabulary = config.vocab_size * config.hidden_size
    layers = parameters - vocabulary * (1 if config.tie_word_embeddings else 2)
    attention = 4 * config.num_hidden_layers * config.hidden_size * attended
    forward = 2 * layers * slots + 2 * vocabulary * labels + attention
    passes = 1.0 if recipe.stage == "fluid-horizon" else 2.0 if recipe.lora is not None else 3.0
    if recipe.is_gated:
        passes = 1.0 + masks / slots
    # 3) memory; a forward alone holds one layer's activations at a time
    width = 2 if optim.bf16 else 4
    weight_bytes = parameters * 4.0 if trained == parameters else parameters * float(width)
    layers_held = 1 if passes == 1 else config.num_hidden_layers
    per_layer = ACTIVATION_BYTES * config.hidden_size * width / 2
    activations = per_layer * layers_held * slots + LOGIT_BYTES * config.vocab_size * labels
    return TrainingCost(
        steps=steps,
        parameters=parameters,
        trained=trained,
        tokens=tokens,
        slots=slots,
        labels=labels,
        flops=passes * forward,
        weight_bytes=weight_bytes,
        optimizer_bytes=trained * OPTIMIZER_BYTES,
        activation_bytes=activations * (1 / steps / optim.accumulate),
        assumed=sample.assumed,
    )


def describe_costs(recipes: Sequence[Recipe], gpu: str) -> str:
    """The costs of a chain as text. Raises ConfigError for an unknown kind of GPU."""
    if gpu not in GPUS:
        raise ConfigError(f"--gpu {gpu}: known are {', '.join(GPUS)}")
    local_flops = machine_flops()
    stages = [_describe(recipe, estimate_cost(recipe, recipes[0].model), gpu, local_flops) for recipe in recipes]
    return "\n\n".join(stages)


def _describe(recipe: Recipe, cost: TrainingCost, gpu: str, local_flops: float) -> str:
    # 1) on DEVICES GPUs, with replicated or sharded weights
    peak, room = GPUS[gpu]
    state = cost.weight_bytes + cost.optimizer_bytes
    replicated = state + cost.activation_bytes / DEVICES
    sharded = (state + cost.activation_bytes) / DEVICES
    gpu_seconds = cost.flops / (DEVICES * peak * UTILISATION)
    # 2) the lines
    device = "one GPU" if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    lines = [
        f"recipe {recipe.hash}: stage {recipe.stage}, {cost.steps:,} steps of {recipe.optim.batch_size} rows",
        f"parameters  {cost.parameters:,}, of which {cost.trained:,} are trained",
        f"tokens      {cost.tokens:.3g} of text, {cost.slots:.3g} slots fed, {cost.labels:.3g} of them with a loss",
        f"FLOPs       {cost.flops:.3g}",
        f"memory      {_gib(state + cost.activation_bytes)}: weights {_gib(cost.weight_bytes)}, "
        f"gradients and optimiser {_gib(cost.optimizer_bytes)}, "
        f"activations {_gib(cost.activation_bytes)} (less with gradient checkpointing)",
        f"time here   {_time(cost.flops / local_flops)} at {local_flops / 1e9:,.0f} GFLOP/s, measured now on {device}",
        f"{DEVICES} x {gpu:8}{_time(gpu_seconds)} at {UTILISATION:.0%} of {peak / 1e12:,.0f} TFLOP/s; "
        f"{_gib(replicated)} each replicated, {_gib(sharded)} sharded, of {room:g} GiB",
    ]
    if cost.assumed:
        lines.append(f"assumed     {cost.assumed}")
    return "\n".join(textwrap.fill(line, 80, subsequent_indent=" " * 12) for line in lines)


def machine_flops(seconds: float = 0.5) -> float:
    """FLOP/s of matrix products on this machine's device, in the number format of a training. Takes `seconds`."""
    cuda = torch.cuda.is_available()
    size = 8192 if cuda else 768
    a = torch.randn(size, size, device="cuda" if cuda else "cpu", dtype=torch.bfloat16 if cuda else torch.float32)
    (a @ a).sum().item()
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        (a @ a)[0, 0].item()
        done += 1
    return done * 2 * size**3 / (time.perf_counter() - started) * (UTILISATION if cuda else 0.5)


def _sample_rows(recipe: Recipe, origin: ParentSpec) -> RowSample:
    """Training rows of the recipe's data at the end of the training; full rows where the data is not at hand."""
    max_length = recipe.data.max_length
    assumed, total = None, 0
    try:
        # 1) data rows and a tokenizer
        rows, _ = load_rows(recipe.data)
        if origin.scratch is not None:
            texts = [row.text for row in rows[:TOKENIZER_ROWS]]
            tokenizer = train_tokenizer(texts, origin.scratch.vocab_size)
        else:
            tokenizer = checkpoints.load_tokenizer(str(origin.parent))
        # 2) some of them, tokenised and packed
        some = random.Random(0).sample(rows, min(len(rows), 8 * SAMPLE))
        examples = encode(tokenizer, some, max_length, recipe.data.loss_on)
        packs: Sequence[Pack] = [(example,) for example in examples]
        if recipe.data.pack:
            packs = pack_examples(examples, max_length, 0)
        total = round(len(rows) * len(packs) / len(some))
    except ConfigError as error:
        assumed = f"every row holds {max_length} tokens, three quarters of them response ({error})"
        packs = [(Example((0,) * max_length, ((max_length // 4, max_length),)),)] * 4
    # 3) in the layout of the last step; token ids do not matter
    layout = layout_of(recipe, mask=1, end=0, noise_ids=range(2, 3))
    rng, last_step = random.Random(0), (recipe.optim.steps or 1 << 30) - 1
    training_rows = []
    sampled = packs[:SAMPLE]
    if recipe.fills_batch:
        size = recipe.optim.batch_size // recipe.optim.accumulate
        batches = [sampled[i : i + size] for i in range(0, len(sampled), size)]
        sampled = [fill_up(pack, batch, token=0) for batch in batches for pack in batch]
    for pack in sampled:
        training_rows.append(pack_rows([layout.build(example, rng, last_step) for example in pack]))
    return RowSample(training_rows, total, assumed)


def _count_labels(row: TrainingRow) -> int:
    return sum(label >= 0 for label in row.labels)


def _count_tokens(row: TrainingRow) -> int:
    """Places of the row's text, whatever the number of slots that stand at each."""
    return len({*zip(row.segment, row.positions, strict=True)})


def _count_trained(recipe: Recipe, model: PreTrainedModel, parameters: int) -> int:
    """Trained parameters: K-heads, an adapter's matrices, or all."""
    hidden: int = model.config.get_text_config(decoder=True).hidden_size
    if recipe.stage == "fluid-horizon":
        quarter = hidden // 4
        return len(recipe.tau) * (hidden * quarter + quarter + quarter * recipe.fans.k_max + recipe.fans.k_max)
    if recipe.lora is None:
        return parameters
    targets, output = recipe.lora.targets, model.get_output_embeddings()
    adapter = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            adapted = name.rpartition(".")[2] in targets if targets else module is not output
            if adapted:
                adapter += recipe.lora.rank * (module.in_features + module.out_features)
    return adapter + (hidden if recipe.lora.train_mask else 0)


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size > 2**30 else f"{size / 2**20:,.0f} MiB"


def _time(seconds: float) -> str:
    for size, name in ((86400 * 365, "years"), (86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:.0f} s"
