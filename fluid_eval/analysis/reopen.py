"""A finished run reopened for analysis: its model loaded, and the texts it wrote as token ids."""

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
from ..running.answering_lm import row_seed
from ..running.lm_eval_model import Ids, encode_prompts
from ..running.worker import load_for, weights_name


@dataclass(frozen=True)
class StoredText:
    """A stored answer and its prompt, as token ids.

    ended: the end is the decoder's own choice and takes part in comparisons. False where the length limit or a stop
    string cut the answer.
    seed: of the row's random numbers.
    written: for each token the forward that wrote it, empty where the run did not record it.
    """

    key: str
    task: str
    prompt: Ids
    ids: Ids
    ended: bool
    seed: int
    written: tuple[int, ...] = ()


@dataclass(frozen=True)
class ReopenedRun:
    """A finished run with its model loaded."""

    spec: RunSpec
    checkpoint: Checkpoint
    texts: tuple[StoredText, ...]


def open_run(folder: Path) -> ReopenedRun:
    """Load a finished run's model and the texts it wrote.

    Raises ConfigError if there is no finished run, if it generated no text, or if weights or tokenizer have changed.
    """
    # 1) the run
    spec = held_spec(folder) if (folder / SPEC).exists() else None
    if spec is None or not (folder / RESULT).exists():
        raise ConfigError(f"{folder}: no finished run here; name a folder that fluid-eval run --out wrote")
    if spec.backend is not None:
        raise ConfigError(f"{folder}: {spec.backend.name} wrote these answers, not a decoder of this package")
    records = [record for record in read_samples(folder) if record["finish"] not in (None, "lost")]
    if not records:
        raise ConfigError(
            f"no text was generated in {', '.join(spec.tasks)}, only log-likelihoods; name tasks with generated "
            "answers, such as mini_gsm8k"
        )
    # 2) its model, which must have the same weights
    checkpoint = load_for(spec)
    weights = read_environment(folder / ENVIRONMENT).get("same", {}).get("weights")
    if checkpoint.folder is not None and weights not in (None, weights_name(checkpoint.folder)):
        raise ConfigError(f"{folder}: the weights at {spec.model.path} have changed since this run")
    # 3) its texts, which must have the same prompt tokens
    protocols = (read_result(folder / RESULT).get("protocol") or {}).get("tasks", {})
    prompts = encode_prompts(checkpoint.tokenizer, list({r["prompt"] for r in records}), chat=spec.chat is not None)
    texts = []
    for record in records:
        if missing := {"prompt_tokens", "truncated"} - record.keys():
            raise ConfigError(f"{folder}: {record['key']} lacks {' and '.join(sorted(missing))}")
        ids = prompts[record["prompt"]]
        if len(ids) != record["prompt_tokens"] + record["truncated"]:
            raise ConfigError(f"{folder}: the prompt of {record['key']} has other tokens now than in this run")
        _check_fits(folder, record, checkpoint)
        texts.append(
            StoredText(
                key=record["key"],
                task=record["task"],
                prompt=ids[-record["prompt_tokens"] :],
                ids=tuple(record["output_ids"]),
                ended=not was_cut(record, protocols, checkpoint.tokenizer),
                seed=row_seed(spec.seed, record["key"]),
                written=tuple(record["trace"].get("written", ())),
            )
        )
    return ReopenedRun(spec, checkpoint, tuple(texts))


def _check_fits(folder: Path, record: Record, checkpoint: Checkpoint) -> None:
    """Raises ConfigError if a stored answer exceeds the model's window or vocabulary."""
    vocabulary, window = checkpoint.model.get_input_embeddings().num_embeddings, checkpoint.backbone.window
    prompt, answer = record["prompt_tokens"], record["output_ids"]
    if not prompt or prompt + len(answer) > window or max(answer, default=0) >= vocabulary:
        raise ConfigError(f"{folder}: {record['key']} cannot be this model's: its window or vocabulary is smaller")


def was_cut(record: Record, protocols: Nested, tokenizer: Tokenizer) -> bool:
    """Whether the length limit or a stop string ended an answer. The recorded finish must agree with the answer: it has
    that length, or holds a stop string.

    protocols: task -> its protocol; empty of older runs, whose recorded finish is trusted.
    """
    protocol = protocols.get(record["task"], {})
    if record["finish"] == "length":
        return len(record["output_ids"]) >= (protocol.get("max_gen_toks") or 0)
    if record["finish"] == "stop":
        stops, text = protocol.get("until"), tokenizer.decode(record["output_ids"])
        stops = [stops] if isinstance(stops, str) else stops
        return stops is None or any(stop in text for stop in (*stops, tokenizer.eos_token) if stop)
    return False
