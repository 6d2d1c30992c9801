"""Training rows: JSON lines to token ids. A bad row names its file and line."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ..errors import ConfigError
from ..layout import Example, Expanded
from ..tokens import Tokenizer
from .recipe import DataSpec


@dataclass(frozen=True)
class Text:
    """A row as written. An empty prompt means that all of it carries loss."""

    prompt: str
    completion: str


def read_rows(file: Path) -> Iterator[Text]:
    """Rows of a JSON lines file (plain or .gz): {"prompt", "completion"} or {"text"}.

    Raises ConfigError naming file and line of one that is neither.
    """
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _row(line, file, number)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error


def _row(line: str, file: Path, number: int) -> Text:
    try:
        row = json.loads(line)
        texts = ("", row["text"]) if "text" in row else (row["prompt"], row["completion"])
        if not all(isinstance(text, str) for text in texts) or not texts[1]:
            raise ValueError("texts must be strings, the completion not empty")
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}, line {number}: not a training row: {type(error).__name__}: {error}") from error
    return Text(*texts)


def encode(tokenizer: Tokenizer, rows: list[Text], max_length: int) -> list[Example]:
    """Token ids of prompt and completion, an end-of-sequence id last, cut at max_length. Rows whose response is cut
    away whole are left out.
    """
    if not rows:
        return []
    prompts = tokenizer([row.prompt for row in rows])["input_ids"]
    answers = tokenizer([row.completion for row in rows], add_special_tokens=False)["input_ids"]
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    examples = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = (*prompt, *answer, *end)[:max_length]
        if len(prompt) < len(ids):
            examples.append(Example(ids, start=max(1, len(prompt))))
    return examples


def load_rows(data: DataSpec) -> tuple[list[Text], list[Text]]:
    """Training rows and held-out rows. Raises ConfigError if too few are left to train on."""
    rows = [row for name in data.files for row in read_rows(Path(name))]
    if len(rows) <= data.held_out:
        raise ConfigError(f"data.files: {len(rows)} rows, data.held_out={data.held_out} leaves none to train on")
    return rows[: -data.held_out], rows[-data.held_out :]


def fingerprint(file: Path) -> dict[str, Any]:
    """Rows and sha256 of a data file, for the checkpoint's manifest."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return {"file": file.name, "sha256": digest, "rows": sum(1 for _ in read_rows(file))}


class Rows(Dataset[Expanded]):
    """`count` draws from the examples, in an order and with random numbers that depend on the seed and the draw's
    number alone: a resumed training sees what an unbroken one would have seen.
    """

    def __init__(
        self, examples: list[Example], lay: Callable[[Example, random.Random], Expanded], count: int, seed: int
    ) -> None:
        self.examples, self.lay, self.count, self.seed = examples, lay, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, draw: int) -> Expanded:
        epoch, place = divmod(draw, len(self.examples))
        rng = random.Random(f"{self.seed}/{draw}")
        return self.lay(self.examples[self._order(epoch)[place]], rng)

    def _order(self, epoch: int) -> list[int]:
        if getattr(self, "_epoch", None) != epoch:
            self._epoch = epoch
            self._shuffled = random.Random(f"{self.seed}/order/{epoch}").sample(
                range(len(self.examples)), len(self.examples)
            )
        return self._shuffled
