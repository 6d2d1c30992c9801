"""A stored run opened again to be looked into: its model, and its texts as ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fluid_model.checkpoints.checkpoint import Checkpoint
from fluid_model.common.errors import ConfigError
from fluid_model.common.files import Nested
from fluid_model.tokens import Tokenizer

from ..common.spec import RunSpec
from ..results.run_folder import ENVIRONMENT, RESULT, SPEC, Record, held_spec, read_samples
from ..results.stored_values import read_environment, read_result
from ..running.lm_eval_model import Ids, encode_prompts, row_seed
from ..running.worker import load_for, weights_name


@dataclass(frozen=True)
class Text:
    """An answer and what it answers.

    ended: whether its end is the decoder's own choice, to be compared: the model ended it, or nothing that it was asked
    to stop at did.  seed: of its random numbers.  written: the forward that wrote each token, empty
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
            f"nothing is written in {', '.join(spec.tasks)}: likelihoods alone; name tasks that are answered, such as "
            "mini_gsm8k"
        )
    checkpoint = load_for(spec)
    before = read_environment(folder / ENVIRONMENT).get("same", {}).get("weights")
    if checkpoint.folder is not None and before not in (None, weights_name(checkpoint.folder)):
        raise ConfigError(f"{folder}: the weights at {spec.model.path} are others now than those of this run")
    asked = (read_result(folder / RESULT).get("protocol") or {}).get("tasks", {})
    encoded = encode_prompts(checkpoint.tokenizer, list({r["prompt"] for r in written}), chat=spec.chat is not None)
    vocabulary, window = checkpoint.model.get_input_embeddings().num_embeddings, checkpoint.backbone.window
    texts = []
    for record in written:
        if missing := {"prompt_tokens", "truncated"} - record.keys():
            raise ConfigError(f"{folder}: {record['key']} does not tell its {' and '.join(sorted(missing))}")
        ids, count = encoded[record["prompt"]], record["prompt_tokens"]
        if len(ids) != count + record["truncated"]:
            raise ConfigError(f"{folder}: the prompt of {record['key']} has other tokens now than in this run")
        if (
            not count
            or count + len(record["output_ids"]) > window
            or max(record["output_ids"], default=0) >= vocabulary
        ):
            raise ConfigError(f"{folder}: {record['key']} cannot be this model's: its window or vocabulary is smaller")
        when = tuple(record["trace"].get("written", ()))
        seed, ended = row_seed(spec.seed, record["key"]), not was_cut(record, asked, checkpoint.tokenizer)
        answer = tuple(record["output_ids"])
        texts.append(Text(record["key"], record["task"], ids[-count:], answer, ended, seed, when))
    return Stored(spec, checkpoint, tuple(texts))


def was_cut(record: Record, asked: Nested, tokenizer: Tokenizer) -> bool:
    """Whether the length limit or a stop string ended an answer, as it says: it has that length, or holds one.

    asked: task -> its protocol, empty of runs that are older than those, which are believed.
    """
    told = asked.get(record["task"], {})
    if record["finish"] == "length":
        return len(record["output_ids"]) >= (told.get("max_gen_toks") or 0)
    if record["finish"] == "stop":
        stops, text = told.get("until"), tokenizer.decode(record["output_ids"])
        stops = [stops] if isinstance(stops, str) else stops
        return stops is None or any(stop in text for stop in (*stops, tokenizer.eos_token) if stop)
    return False
