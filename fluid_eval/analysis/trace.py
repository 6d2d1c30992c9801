"""How one answer came about, forward by forward: `fluid-eval trace`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fluid_model.checkpoints.checkpoint import Checkpoint, describe
from fluid_model.decoders import engine_for
from fluid_model.engine.records import Generation, Request, RowForward

from ..benchmarks.chat_template import open_chat
from ..common.spec import RunSpec
from ..running.decoder_choice import reason
from ..running.job import check_decoder
from ..running.worker import load_for

NEW_LINE = "⏎"


@dataclass(frozen=True)
class Line:
    """One forward. kept: what the answer grew by.  drafted: what stands in the next feed and did not before. Both by
    place in the answer, from 0.  rivals: drafts fed beside these, for places that have one.  fans: places of the tokens
    that masks hang on, counted alike (-1: the prompt's last).
    """

    kind: str
    slots: int
    kept: Mapping[int, str]
    drafted: Mapping[int, str]
    rivals: int
    fans: Sequence[int]


def watch(spec: RunSpec, prompt: str) -> tuple[list[Line], Generation]:
    """Write one answer and keep what happened. Raises ConfigError as a run would."""
    model = spec.model
    info = describe(model.path, model.method, trust_remote_code=model.trust_remote_code, base=model.base)
    check_decoder(spec, info)
    print(reason(spec, info), file=sys.stderr)
    checkpoint = load_for(spec)
    engine = engine_for(checkpoint, spec.decoder, slots=1)
    steps: list[RowForward] = []
    engine.watch = steps.append
    chat = open_chat(spec.chat, checkpoint.tokenizer, spec.model.path)
    if chat is not None:
        prompt = chat.render([*chat.system_turn, {"role": "user", "content": prompt}])
    ids = tuple(checkpoint.tokenizer(prompt, add_special_tokens=chat is None)["input_ids"])
    room = max(1, checkpoint.backbone.window - len(ids))
    (answer,) = engine.generate([Request("trace", ids, min(spec.max_new_tokens or room, room), seed=spec.seed)])
    return lines(steps, checkpoint, len(ids)), answer


def lines(steps: Sequence[RowForward], checkpoint: Checkpoint, prompt: int) -> list[Line]:
    """Steps of one row as places and texts. prompt: its length in tokens."""
    found, done, before = [], 0, dict[int, int]()
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        kept = dict(enumerate(step.tokens, done))
        done += len(kept)
        after, rivals = _written(following, checkpoint.mask_id, prompt) if following else ({}, 0)
        if kept:
            before = {}  # what was drafted and not kept is gone
        fresh = {i: token for i, token in after.items() if i >= done and before.get(i) != token}
        before = after
        fans = sorted({at - prompt for at in step.anchors if at is not None})
        said, drafted = ({i: _show(checkpoint, token) for i, token in ids.items()} for ids in (kept, fresh))
        found.append(Line(step.kind, len(step.ids), said, drafted, rivals, fans))
    return found


def _written(step: RowForward, mask_id: int | None, prompt: int) -> tuple[dict[int, int], int]:
    """Tokens of an answer that a feed holds, by place: of rivals the likeliest, which come first. And the others."""
    slots = zip(step.ids, step.positions, strict=True)
    tokens = [(at - prompt, token) for token, at in slots if at >= prompt and token != mask_id]
    first = dict(reversed(tokens))
    return dict(sorted(first.items())), len(tokens) - len(first)


def _show(checkpoint: Checkpoint, token: int) -> str:
    text: str = checkpoint.tokenizer.decode([token])
    return text.replace("\n", NEW_LINE)


def runs(texts: Mapping[int, str]) -> list[tuple[str, str]]:
    """Unbroken runs of places, as ("3-7", text)."""
    found = []
    for _, group in groupby(enumerate(sorted(texts)), key=lambda pair: pair[1] - pair[0]):
        places = [place for _, place in group]
        name = str(places[0]) if len(places) == 1 else f"{places[0]}-{places[-1]}"
        found.append((name, "".join(texts[place] for place in places)))
    return found


def markdown(found: Sequence[Line]) -> str:
    """A table, one line a forward."""
    rivals = any(line.rivals for line in found)
    head = ("", "forward", "slots", "fans behind", "kept", "drafted", *(["rivals"] if rivals else []))
    body = [
        (
            str(i), line.kind, str(line.slots), ", ".join(map(str, line.fans)),
            *(" ".join(f"{place}: `{text}`" for place, text in runs(texts)) for texts in (line.kept, line.drafted)),
            *([str(line.rivals)] if rivals else []),
        )
        for i, line in enumerate(found, 1)
    ]  # fmt: skip
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body))


def show(found: Sequence[Line], answer: Generation, decoder: Mapping[str, Any]) -> None:
    """The same in colours, the answer as it grows: new tokens green, drafts yellow, masks grey."""
    console = Console(width=None if Console().is_terminal else 80, highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), expand=True)
    for name, right in (("", True), ("forward", False), ("slots", True)):
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    table.add_column("the answer after it", ratio=1)
    state: dict[int, tuple[str, str]] = {}
    for i, line in enumerate(found, 1):
        state = {place: (text, "") for place, (text, style) in state.items() if style != "yellow" or place in line.kept}
        state |= {place: (text, "green") for place, text in line.kept.items()}
        state |= {place: (text, "yellow") for place, text in line.drafted.items()}
        table.add_row(str(i), line.kind, str(line.slots), _canvas(state))
    console.print(table)
    tokens, forwards = len(answer.ids), sum(answer.trace.forwards.values())
    console.print(
        f"\n{tokens} tokens in {forwards} forwards, {tokens / forwards:.2f} a forward; ended by {answer.finish}"
    )
    console.print(f"decoder {', '.join(f'{name}={value}' for name, value in decoder.items())}")


def _canvas(state: Mapping[int, tuple[str, str]]) -> Text:
    text = Text()
    for place in range(max(state, default=-1) + 1):
        text.append(*state.get(place, ("·", "bright_black")))
    return text
