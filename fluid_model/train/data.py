"""Data rows to training rows: token ids by the chat template, packing, and draws that a resumed training repeats.

DataRow --encode--> Example --pack_examples--> Pack --TrainingSet, a Layout--> TrainingRow
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from torch.utils.data import Dataset

from ..common.errors import ConfigError
from ..tokens import Tokenizer
from .recipe import LossOn, LossPer
from .row_layouts import Example, Layout, TrainingRow, pack_rows, weigh_per_example
from .rows import DataRow

Pack = tuple[Example, ...]
"""Examples that share one training row."""
OPEN_PACKS = 64
"""Packs kept open for a fitting example while others are filled."""


class Response(NamedTuple):
    """Half-open range of an assistant's tokens, and whether they carry a loss."""

    start: int
    end: int
    loss: bool


def encode(
    tokenizer: Tokenizer, rows: Sequence[DataRow], max_length: int, loss_on: LossOn = "responses"
) -> list[Example]:
    """Tokenise rows and cut them at max_length tokens. Rows without any of their response left are dropped.

    A prompt and its completion end with an end-of-sequence id. A chat is rendered by the tokenizer's chat template, or
    as turns joined by newlines where there is none; the assistant's turns carry a loss.  loss_on: see `DataSpec`.
    Raises ConfigError for a chat template that cannot render turn by turn.
    """
    # 1) prompts and completions are tokenised in two calls
    plain = [row for row in rows if not row.chat]
    prompts = tokenizer([row.prompt for row in plain])["input_ids"] if plain else []
    completions = tokenizer([row.completion for row in plain], add_special_tokens=False)["input_ids"] if plain else []
    pairs = zip(prompts, completions, strict=True)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    examples = []
    for row in rows:
        # 2) ids and responses of a row
        if row.chat:
            ids, responses = _encode_chat(tokenizer, row)
        else:
            prompt, completion = next(pairs)
            ids = [*prompt, *completion, *end]
            responses = [Response(len(prompt), len(ids), loss=True)]
        # 3) cut the row and its spans
        spans = _loss_spans(responses, len(ids), loss_on)
        ids = ids[:max_length]
        spans = [(start, min(stop, len(ids))) for start, stop in spans if start < len(ids)]
        # 4) the row's first token has no predecessor to predict it from
        if spans and spans[-1][1] > max(1, spans[0][0]):
            examples.append(Example(tuple(ids), tuple(spans)))
    return examples


def _loss_spans(responses: Sequence[Response], length: int, loss_on: LossOn) -> list[tuple[int, int]]:
    """Half-open ranges with a loss, ordered and disjoint."""
    if loss_on == "all":  # the row, less the responses that carry no loss
        edges = [0]
        for response in responses:
            if not response.loss:
                edges += [response.start, response.end]
        edges.append(length)
        return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]
    chosen = responses[-1:] if loss_on == "last" else responses
    return [(response.start, response.end) for response in chosen if response.loss]


def _encode_chat(tokenizer: Tokenizer, row: DataRow) -> tuple[list[int], list[Response]]:
    """Ids of a chat, and its responses, each with the end marker that the template writes."""
    messages = [{"role": turn.role, "content": turn.text} for turn in row.chat]
    ids: list[int] = []
    responses = []
    rendered = ""  # text already tokenised
    for number, turn in enumerate(row.chat):
        if turn.role != "assistant":
            continue
        # 1) render the chat before and after the response
        before = _render(tokenizer, messages[:number], generation_prompt=True)
        after = _render(tokenizer, messages[: number + 1], generation_prompt=False)
        if not (before.startswith(rendered) and after.startswith(before)):
            raise ConfigError("the chat template writes earlier turns differently later; rows of one turn can be used")
        # 2) tokenise what is new, prompt and response apart, so that no token spans both
        first = tokenizer.bos_token if not ids and tokenizer.chat_template is None else None
        ids += tokenizer((first or "") + before[len(rendered) :], add_special_tokens=False)["input_ids"]
        response = tokenizer(after[len(before) :], add_special_tokens=False)["input_ids"]
        if tokenizer.chat_template is None and tokenizer.eos_token_id is not None:
            response = [*response, tokenizer.eos_token_id]
        responses.append(Response(len(ids), len(ids) + len(response), turn.loss))
        ids += response
        rendered = after
    return ids, responses


def _render(tokenizer: Tokenizer, messages: list[dict[str, str]], *, generation_prompt: bool) -> str:
    if tokenizer.chat_template is None:
        return "\n".join(message["content"] for message in messages) + ("\n" if generation_prompt else "")
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        names = ", ".join(sorted(tokenizer.chat_template))
        raise ConfigError(f"the parent's tokenizer has chat templates by name ({names}), and none is its default")
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
    return text


def pack_examples(examples: Sequence[Example], max_length: int, seed: int) -> list[Pack]:
    """Pack examples in random order, first fit: each pack holds at most `max_length` tokens."""
    order = random.Random(f"{seed}/packs").sample(range(len(examples)), len(examples))
    closed: list[Pack] = []
    open_packs: list[tuple[int, list[Example]]] = []  # (tokens left, examples)
    for index in order:
        example = examples[index]
        size = len(example.ids)
        for place, (left, packed) in enumerate(open_packs):
            if size <= left:
                packed.append(example)
                open_packs[place] = (left - size, packed)
                break
        else:
            open_packs.append((max_length - size, [example]))
            if len(open_packs) > OPEN_PACKS:  # close the fullest
                fullest = min(range(len(open_packs)), key=lambda i: open_packs[i][0])
                closed.append(tuple(open_packs.pop(fullest)[1]))
    return closed + [tuple(packed) for _, packed in open_packs]


class Filling(NamedTuple):
    """The token that fills up rows to the longest of a device's batch, and the rows of such a batch."""

    token: int
    rows: int


def fill_up(pack: Pack, batch: Sequence[Pack], token: int) -> Pack:
    """An unpacked example, filled up to the longest of its batch with tokens to learn."""
    (example,) = pack
    end, longest = len(example.ids), max(len(other.ids) for (other,) in batch)
    if end == longest:
        return pack
    *before, (start, stop) = example.spans
    filled = [(start, longest)] if stop == end else [(start, stop), (end, longest)]
    return (Example(example.ids + (token,) * (longest - end), (*before, *filled)),)


class TrainingSet(Dataset[TrainingRow]):
    """Training rows by the number of their draw, `steps` times `batch` of them.

    Order and noise depend on the seed and the draw's number alone, so a resumed training draws what an unbroken one
    draws.  per: see `LossSpec`.  filling: what rows without packing are filled up with.
    """

    def __init__(
        self,
        packs: Sequence[Pack],
        layout: Layout,
        *,
        steps: int,
        batch: int,
        seed: int,
        per: LossPer = "slot",
        filling: Filling | None = None,
    ) -> None:
        self.packs = packs
        self.layout = layout
        self.steps = steps
        self.batch = batch
        self.seed = seed
        self.per = per
        self.filling = filling

    def __len__(self) -> int:
        return self.steps * self.batch

    def __getitem__(self, draw: int) -> TrainingRow:
        step = draw // self.batch
        rng = random.Random(f"{self.seed}/{draw}")
        rows = [self.layout.build(example, rng, step) for example in self._examples(draw)]
        if self.per == "row":
            rows = [weigh_per_example(row) for row in rows]
        if self.per == "batch":
            rows = [replace(row, diff_count=1.0) for row in rows]
        return pack_rows(rows)

    def _examples(self, draw: int) -> Pack:
        """The examples of a draw, filled up where asked for."""
        pack = self._pack(draw)
        if self.filling is None:
            return pack
        first = draw - draw % self.filling.rows
        batch = [self._pack(other) for other in range(first, min(first + self.filling.rows, len(self)))]
        return fill_up(pack, batch, self.filling.token)

    def _pack(self, draw: int) -> Pack:
        epoch, place = divmod(draw, len(self.packs))
        return self.packs[self._order(epoch)[place]]

    def _order(self, epoch: int) -> list[int]:
        """The packs' order in an epoch; the last one asked for is cached."""
        if getattr(self, "_epoch", None) != epoch:
            self._epoch = epoch
            self._shuffled = random.Random(f"{self.seed}/order/{epoch}").sample(range(len(self.packs)), len(self.packs))
        return self._shuffled
