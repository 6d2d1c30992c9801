"""`fluid-train RECIPE --dry-run`: what a recipe would take, before anything is spent. Estimates, and said to be."""

from __future__ import annotations

import random
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..checkpoints import checkpoint as checkpoints
from ..common.errors import ConfigError
from .data import Pack, encode, packs
from .parent import learn_tokenizer, outline
from .recipe import ParentSpec, Recipe
from .row_layouts import Example, Expanded, Layout, pack
from .rows import load_rows
from .run import layouts

SAMPLE = 256
"""Rows looked at to know how long laid-out rows are."""
UTILISATION = 0.4
"""Share of a GPU's peak a well-fed training reaches; large-model reports give 0.35 to 0.5."""
GPUS: dict[str, tuple[float, float]] = {
    "a100": (312e12, 80), "h100": (989e12, 80), "h200": (989e12, 141), "b200": (2250e12, 180), "910b": (376e12, 64),
}  # fmt: skip
"""Dense bfloat16 FLOP/s and memory in GiB, from the makers' data sheets (910b: Ascend, 16-bit)."""


@dataclass(frozen=True)
class Plan:
    """steps: of the whole training.  tokens: of text.  slots: fed, all steps together.  labels: slots with a loss.
    flops: of the whole training.  weights, moving, activations: bytes of weights, of gradients and optimiser, and of
    one device's activations.
    """

    steps: int
    parameters: int
    trained: int
    tokens: float
    slots: float
    labels: float
    flops: float
    weights: float
    moving: float
    activations: float
    assumed: str | None


def plan(recipe: Recipe, origin: ParentSpec) -> Plan:
    """Count what the recipe asks for. origin: what its chain starts from.

    Raises ConfigError if the shape of that cannot be known, or how many steps the epochs are.
    """
    model = outline(origin)
    config = model.config.get_text_config(decoder=True)
    rows, packs_in_all, assumed = _sample(recipe, origin)
    count = len(rows)
    if recipe.optim.steps is None and assumed:
        raise ConfigError(f"optim.epochs={recipe.optim.epochs}: set optim.steps for a dry run without data ({assumed})")
    steps = recipe.optim.total(packs_in_all)
    slots, labels, tokens, reads = (
        sum(map(measure, rows)) / count * recipe.optim.batch_size * steps
        for measure in (_slots, _labels, _tokens, _reads)
    )
    parameters = sum(p.numel() for p in model.parameters())
    vocabulary = config.vocab_size * config.hidden_size
    blocks = parameters - vocabulary * (1 if config.tie_word_embeddings else 2)
    trained = _trained(recipe, model, parameters)
    forward = 2 * blocks * slots + 2 * vocabulary * labels + 4 * config.num_hidden_layers * config.hidden_size * reads
    passes = 1 if recipe.stage == "fluid-horizon" else 2 if recipe.lora is not None else 3
    width = 2 if recipe.optim.bf16 else 4
    per_step = 1 / steps / recipe.optim.accumulate
    layer = 34 * config.hidden_size * width / 2  # bytes a slot leaves in a layer (Korthikanti et al. 2022, eq. 2)
    kept = 1 if passes == 1 else config.num_hidden_layers
    activations = (layer * kept * slots + 12 * config.vocab_size * labels) * per_step
    return Plan(
        steps, parameters, trained, tokens, slots, labels, passes * forward, parameters * 4.0 if trained == parameters
        else parameters * float(width), trained * 12.0, activations, assumed,
    )  # fmt: skip


def tell(recipes: Sequence[Recipe], gpu: str) -> str:
    """The plan of a chain in words. Raises ConfigError for an unknown kind of GPU."""
    if gpu not in GPUS:
        raise ConfigError(f"--gpu {gpu}: known are {', '.join(GPUS)}")
    here = machine_flops()
    return "\n\n".join(_tell(recipe, plan(recipe, recipes[0].model), gpu, here) for recipe in recipes)


def _tell(recipe: Recipe, found: Plan, gpu: str, here: float) -> str:
    peak, room = GPUS[gpu]
    whole = found.weights + found.moving + found.activations
    sharded = (found.weights + found.moving + found.activations) / 8
    copied = found.weights + found.moving + found.activations / 8
    there = found.flops / (8 * peak * UTILISATION)
    device = "one GPU" if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    lines = [
        f"recipe {recipe.hash}: stage {recipe.stage}, {found.steps:,} steps of {recipe.optim.batch_size} rows",
        f"parameters  {found.parameters:,}, of which {found.trained:,} are trained",
        f"tokens      {found.tokens:.3g} of text, {found.slots:.3g} slots fed, {found.labels:.3g} of them with a loss",
        f"FLOPs       {found.flops:.3g}",
        f"memory      {_gib(whole)}: weights {_gib(found.weights)}, gradients and optimiser {_gib(found.moving)}, "
        f"activations {_gib(found.activations)} (less with gradient checkpointing)",
        f"time here   {_time(found.flops / here)} at {here / 1e9:,.0f} GFLOP/s, measured now on {device}",
        f"8 x {gpu:8}{_time(there)} at {UTILISATION:.0%} of {peak / 1e12:,.0f} TFLOP/s; "
        f"{_gib(copied)} each copied, {_gib(sharded)} sharded, of {room:g} GiB",
    ]
    if found.assumed:
        lines.append(f"assumed     {found.assumed}")
    return "\n".join(textwrap.fill(line, 80, subsequent_indent=" " * 12) for line in lines)


def machine_flops(seconds: float = 0.5) -> float:
    """FLOP/s of matrix products on this machine's device, in the number format a training would use."""
    cuda = torch.cuda.is_available()
    size = 8192 if cuda else 768
    a = torch.randn(size, size, device="cuda" if cuda else "cpu", dtype=torch.bfloat16 if cuda else torch.float32)
    (a @ a).sum().item()
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        (a @ a)[0, 0].item()
        done += 1
    return done * 2 * size**3 / (time.perf_counter() - started) * (UTILISATION if cuda else 0.5)


def _sample(recipe: Recipe, origin: ParentSpec) -> tuple[list[Expanded], int, str | None]:
    """Laid-out rows as a step would be fed, from the data if it is at hand, else full ones.

    Returns some of them, how many there are in all, and what was assumed where there is no data.
    """
    assumed, in_all = None, 0
    try:
        rows, _ = load_rows(recipe.data)
        texts = [row.text for row in rows]
        if origin.scratch is not None:
            tokenizer = learn_tokenizer(texts[:2000], origin.scratch.vocab_size)
        else:
            tokenizer = checkpoints.load_tokenizer(str(origin.parent))
        some = random.Random(0).sample(rows, min(len(rows), 8 * SAMPLE))
        examples = encode(tokenizer, some, recipe.data.max_length, recipe.data.loss_on)
        packed: Sequence[Pack] = (
            packs(examples, recipe.data.max_length, 0) if recipe.data.pack else [(e,) for e in examples]
        )
        in_all = round(len(rows) * len(packed) / len(some))
    except ConfigError as error:
        assumed = f"every row holds {recipe.data.max_length} tokens, three quarters of them response ({error})"
        length = recipe.data.max_length
        packed = [(Example((0,) * length, ((length // 4, length),)),)] * 4
    lay: Layout = layouts(recipe, mask=1, end=0, ids=range(2, 3))
    rng, last = random.Random(0), (recipe.optim.steps or 1 << 30) - 1
    laid = [pack([lay.lay(e, rng, last) for e in one]) for one in packed[:SAMPLE]]
    return laid, in_all, assumed


def _slots(row: Expanded) -> float:
    return len(row.ids)


def _labels(row: Expanded) -> float:
    return sum(label >= 0 for label in row.labels)


def _tokens(row: Expanded) -> float:
    return len({*zip(row.segment, row.positions, strict=True)})


def _reads(row: Expanded) -> float:
    """Pairs of query and key a dense attention computes."""
    return len(row.ids) ** 2


def _trained(recipe: Recipe, model: PreTrainedModel, parameters: int) -> int:
    hidden: int = model.config.get_text_config(decoder=True).hidden_size
    if recipe.stage == "fluid-horizon":
        quarter = hidden // 4
        return len(recipe.tau) * (hidden * quarter + quarter + quarter * recipe.fans.k_max + recipe.fans.k_max)
    if recipe.lora is None:
        return parameters
    targets, head = recipe.lora.targets, model.get_output_embeddings()
    linear = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and (name.rpartition(".")[2] in targets if targets else module is not head)
    ]
    adapter = sum(recipe.lora.rank * (m.in_features + m.out_features) for m in linear)
    return adapter + (hidden if recipe.lora.train_mask else 0)


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size > 2**30 else f"{size / 2**20:,.0f} MiB"


def _time(seconds: float) -> str:
    for size, name in ((86400 * 365, "years"), (86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:.0f} s"
