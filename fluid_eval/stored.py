"""A stored run opened again to be looked into: its model, and its texts as ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fluid_model.checkpoint import Checkpoint
from fluid_model.errors import ConfigError
from fluid_model.files import read_json

from .adapter import Ids, encode_prompts, row_seed
from .spec import RunSpec
from .store import ENVIRONMENT, RESULT, SPEC, held_spec, read_samples
from .worker import load_for, weights_name


@dataclass(frozen=True)
class Text:
    """An answer and what it answers.

    ended: whether the model ended it.  seed: of its random numbers.  written: the forward that wrote each token, empty
    where the run did not record it.
    """

    key: str
    task: str
    prompt: Ids
    ids: Ids
    ended: bool
    seed: int
    written: tuple[int, ...] = ()


@dataclass(frozen=True)
class Stored:
    """A finished run, its model loaded."""

    spec: RunSpec
    checkpoint: Checkpoint
    texts: tuple[Text, ...]


def open_stored(folder: Path) -> Stored:
    """Load a finished run's model and the texts it wrote.

    Raises ConfigError if there is no finished run, nothing was written, or weights or tokenizer are others by now.
    """
    spec = held_spec(folder) if (folder / SPEC).exists() else None
    if spec is None or not (folder / RESULT).exists():
        raise ConfigError(f"{folder}: no finished run here; name a folder that fluid-eval run --out wrote")
    written = [r for r in read_samples(folder) if r["finish"] not in (None, "lost")]
    if not written:
        raise ConfigError(
            f"{folder}: nothing was written in this run (likelihoods alone); name tasks that are answered"
        )
    checkpoint = load_for(spec)
    before = read_json(folder / ENVIRONMENT).get("same", {}).get("weights")
    if checkpoint.folder is not None and before not in (None, weights_name(checkpoint.folder)):
        raise ConfigError(f"{folder}: the weights at {spec.model.path} are others now than those of this run")
    encoded = encode_prompts(checkpoint.tokenizer, list({r["prompt"] for r in written}), chat=spec.chat is not None)
    texts = []
    for record in written:
        ids, count = encoded[record["prompt"]], record["prompt_tokens"]
        if len(ids) != count + record["truncated"]:
            raise ConfigError(f"{folder}: the prompt of {record['key']} has other tokens now than in this run")
        when = tuple(record["trace"].get("written", ()))
        seed, ended = row_seed(spec.seed, record["key"]), record["finish"] == "eos"
        answer = tuple(record["output_ids"])
        texts.append(Text(record["key"], record["task"], ids[-count:], answer, ended, seed, when))
    return Stored(spec, checkpoint, tuple(texts))
