"""Rows to what a training step is fed: token ids, packs, draws that a resumed training repeats."""

from __future__ import annotations

import random
from collections.abc import Sequence

from torch.utils.data import Dataset

from ..common.errors import ConfigError
from ..tokens import Tokenizer
from . import row_layouts
from .recipe import LossOn
from .row_layouts import Example, Expanded, Layout
from .rows import Row

Pack = tuple[Example, ...]
Response = tuple[int, int, bool]
"""Start and end of what an assistant says, and whether it carries loss."""
OPEN_PACKS = 64
"""Packs that wait for a fitting example while others are filled."""


def encode(tokenizer: Tokenizer, rows: Sequence[Row], max_length: int, loss_on: LossOn = "responses") -> list[Example]:
    """Token ids of rows, cut at max_length. Rows whose response is cut away whole are left out.

    A plain row ends with an end-of-sequence id; a chat is written by the tokenizer's chat template (without one: turns
    joined by newlines), and carries loss where the assistant speaks. loss_on: see `DataSpec`.
    """
    plain = [row for row in rows if not row.chat]
    prompts = tokenizer([row.prompt for row in plain])["input_ids"] if plain else []
    answers = tokenizer([row.completion for row in plain], add_special_tokens=False)["input_ids"] if plain else []
    pairs = zip(prompts, answers, strict=True)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    found = []
    for row in rows:
        if row.chat:
            ids, responses = _chat(tokenizer, row)
        else:
            prompt, answer = next(pairs)
            ids = [*prompt, *answer, *end]
            responses = [(len(prompt), len(ids), True)]
        spans = _learnt(responses, len(ids), loss_on)
        ids = ids[:max_length]
        kept = [(start, min(stop, len(ids))) for start, stop in spans if start < len(ids)]
        if kept and kept[-1][1] > max(1, kept[0][0]):  # a first token is nobody's to say
            found.append(Example(tuple(ids), tuple(kept)))
    return found


def _learnt(responses: Sequence[Response], length: int, loss_on: LossOn) -> list[tuple[int, int]]:
    """Half-open ranges that carry loss, in order and apart."""
    if loss_on == "all":
        edges = [0, *(edge for start, end, loss in responses if not loss for edge in (start, end)), length]
        return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]
    return [(start, end) for start, end, loss in (responses[-1:] if loss_on == "last" else responses) if loss]


def _chat(tokenizer: Tokenizer, row: Row) -> tuple[list[int], list[Response]]:
    """Ids of a chat and what the assistant says, each with the end its template writes."""
    messages = [{"role": turn.role, "content": turn.text} for turn in row.chat]
    ids: list[int] = []
    responses = []
    written = ""
    for number, turn in enumerate(row.chat):
        if turn.role != "assistant":
            continue
        before = _render(tokenizer, messages[:number], ask=True)
        after = _render(tokenizer, messages[: number + 1], ask=False)
        if not (before.startswith(written) and after.startswith(before)):
            raise ConfigError("the chat template writes earlier turns differently later; rows of one turn can be used")
        first = tokenizer.bos_token if not ids and tokenizer.chat_template is None else None
        ids += tokenizer((first or "") + before[len(written) :], add_special_tokens=False)["input_ids"]
        said = tokenizer(after[len(before) :], add_special_tokens=False)["input_ids"]
        if tokenizer.chat_template is None and tokenizer.eos_token_id is not None:
            said = [*said, tokenizer.eos_token_id]
        responses.append((len(ids), len(ids) + len(said), turn.loss))
        ids += said
        written = after
    return ids, responses


def _render(tokenizer: Tokenizer, messages: list[dict[str, str]], *, ask: bool) -> str:
    if tokenizer.chat_template is None:
        return "\n".join(message["content"] for message in messages) + ("\n" if ask else "")
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        names = ", ".join(sorted(tokenizer.chat_template))
        raise ConfigError(f"the parent's tokenizer has chat templates by name ({names}), and none is its default")
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    return text


def packs(examples: Sequence[Example], room: int, seed: int) -> list[Pack]:
    """Examples put together, in random order, so that each pack holds at most `room` tokens (first fit)."""
    order = random.Random(f"{seed}/packs").sample(range(len(examples)), len(examples))
    done: list[Pack] = []
    waiting: list[tuple[int, list[Example]]] = []  # room left, examples
    for index in order:
        example = examples[index]
        size = len(example.ids)
        for place, (left, held) in enumerate(waiting):
            if size <= left:
                held.append(example)
                waiting[place] = (left - size, held)
                break
        else:
            waiting.append((room - size, [example]))
            if len(waiting) > OPEN_PACKS:
                fullest = min(range(len(waiting)), key=lambda i: waiting[i][0])
                done.append(tuple(waiting.pop(fullest)[1]))
    return done + [tuple(held) for _, held in waiting]


class Rows(Dataset[Expanded]):
    """`steps` times `batch` draws, in an order and with random numbers that depend on the seed and the draw's number
    alone: a resumed training sees what an unbroken one would have seen.

    per_row: weigh every example the same, however long its response is.
    """

    def __init__(
        self, packs: Sequence[Pack], lay: Layout, *, steps: int, batch: int, seed: int, per_row: bool = False
    ) -> None:
        self.packs, self.rule, self.steps, self.batch, self.seed, self.per_row = packs, lay, steps, batch, seed, per_row

    def __len__(self) -> int:
        return self.steps * self.batch

    def __getitem__(self, draw: int) -> Expanded:
        epoch, place = divmod(draw, len(self.packs))
        rng = random.Random(f"{self.seed}/{draw}")
        step = draw // self.batch
        laid = [self.rule.lay(example, rng, step) for example in self.packs[self._order(epoch)[place]]]
        return row_layouts.pack([row_layouts.by_row(row) for row in laid] if self.per_row else laid)

    def _order(self, epoch: int) -> list[int]:
        if getattr(self, "_epoch", None) != epoch:
            self._epoch = epoch
            self._shuffled = random.Random(f"{self.seed}/order/{epoch}").sample(range(len(self.packs)), len(self.packs))
        return self._shuffled
