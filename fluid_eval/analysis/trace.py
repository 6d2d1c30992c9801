"""How one answer is decoded, forward by forward: `fluid-eval trace`.

A row of the table, from FLUID in steps of one forward (a round in the stored trace):

    | | forward | slots | masks behind | committed | drafted | siblings |
    | 4 | round | 6 | 5 | 5-6: ` - ` | 7-10: `6 = <<1` | 5 |

Forward 4 fed 6 slots, among them a mask block anchored at place 5 of the answer. Its verification committed places 5
and 6. The draft tree of the next forward holds places 7 to 10, and 5 sibling candidates for them.
"""

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
class ForwardRecord:
    """One forward of one row. Places count the answer's tokens from 0; -1 is the prompt's last token.

    committed: text of the tokens that the answer grew by, by place.
    drafted: text of the draft tokens that are new in the next forward, by place; of siblings the likeliest.
    siblings: further candidates fed for places that have a draft token.
    anchors: places of the tokens that mask blocks are anchored at.
    """

    kind: str
    slots: int
    committed: Mapping[int, str]
    drafted: Mapping[int, str]
    siblings: int
    anchors: Sequence[int]


def trace_answer(spec: RunSpec, prompt: str) -> tuple[list[ForwardRecord], Generation]:
    """Decode one answer and record its forwards. Raises ConfigError as a run would."""
    # 1) load the model as a run does
    model = spec.model
    info = describe(model.path, model.method, trust_remote_code=model.trust_remote_code, base=model.base)
    check_decoder(spec, info)
    print(reason(spec, info), file=sys.stderr)
    checkpoint = load_for(spec)
    engine = engine_for(checkpoint, spec.decoder, batch_size=1)
    steps: list[RowForward] = []
    engine.watch = steps.append
    # 2) the prompt, as a conversation where the run has a chat template
    chat = open_chat(spec.chat, checkpoint.tokenizer, spec.model.path)
    if chat is not None:
        prompt = chat.render([*chat.system_turn, {"role": "user", "content": prompt}])
    ids = tuple(checkpoint.tokenizer(prompt, add_special_tokens=chat is None)["input_ids"])
    # 3) decode
    room = max(1, checkpoint.backbone.window - len(ids))
    (answer,) = engine.generate([Request("trace", ids, min(spec.max_new_tokens or room, room), seed=spec.seed)])
    return forward_records(steps, checkpoint, len(ids)), answer


def forward_records(steps: Sequence[RowForward], checkpoint: Checkpoint, prompt: int) -> list[ForwardRecord]:
    """The engine's steps of one row as places and texts. prompt: its length in tokens."""
    records: list[ForwardRecord] = []
    length = 0  # of the answer so far
    pending: dict[int, int] = {}  # draft tokens of the last forward, by place
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        # 1) committed tokens
        committed = dict(enumerate(step.tokens, length))
        length += len(committed)
        if committed and step.kind != "denoise":
            pending = {}  # draft tokens that were not accepted are dropped; a denoised slot keeps its token
        # 2) draft tokens that the next forward feeds, and which of them are new
        draft, siblings = _draft_of(following, checkpoint.mask_id, prompt) if following else ({}, 0)
        fresh = {place: token for place, token in draft.items() if place >= length and pending.get(place) != token}
        fed = {position - prompt for position in following.positions} if following else set()
        pending = {place: token for place, token in pending.items() if place not in fed} | draft
        # 3) anchors of this forward's mask blocks
        anchors = sorted({position - prompt for position in step.anchors if position is not None})
        records.append(
            ForwardRecord(
                kind=step.kind,
                slots=len(step.ids),
                committed=_texts(checkpoint, committed),
                drafted=_texts(checkpoint, fresh),
                siblings=siblings,
                anchors=anchors,
            )
        )
    return records


def _draft_of(step: RowForward, mask_id: int | None, prompt: int) -> tuple[dict[int, int], int]:
    """Draft tokens that a forward feeds, by place in the answer, and how many siblings are left out.

    Siblings share a place; the first fed is the likeliest and is the one returned.
    """
    slots = zip(step.ids, step.positions, strict=True)
    tokens = [(position - prompt, token) for token, position in slots if position >= prompt and token != mask_id]
    likeliest = dict(reversed(tokens))
    return dict(sorted(likeliest.items())), len(tokens) - len(likeliest)


def _texts(checkpoint: Checkpoint, tokens: Mapping[int, int]) -> dict[int, str]:
    """Each token's own text, new lines shown as a sign."""
    decode = checkpoint.tokenizer.decode
    return {place: decode([token]).replace("\n", NEW_LINE) for place, token in tokens.items()}


def runs(texts: Mapping[int, str]) -> list[tuple[str, str]]:
    """Unbroken runs of places and their text: {3: "a", 4: "b", 7: "c"} -> [("3-4", "ab"), ("7", "c")]."""
    pieces = []
    for _, group in groupby(enumerate(sorted(texts)), key=lambda pair: pair[1] - pair[0]):
        places = [place for _, place in group]
        name = str(places[0]) if len(places) == 1 else f"{places[0]}-{places[-1]}"
        pieces.append((name, "".join(texts[place] for place in places)))
    return pieces


def markdown(records: Sequence[ForwardRecord]) -> str:
    """A Markdown table, a row for each forward. The column of siblings is there if any forward had some."""
    with_siblings = any(record.siblings for record in records)
    head = ["", "forward", "slots", "masks behind", "committed", "drafted"]
    rows = []
    for number, record in enumerate(records, 1):
        anchors = ", ".join(map(str, record.anchors))
        row = [str(number), record.kind, str(record.slots), anchors]
        row += [" ".join(f"{place}: `{text}`" for place, text in runs(record.committed))]
        row += [" ".join(f"{place}: `{text}`" for place, text in runs(record.drafted))]
        rows.append(row + [str(record.siblings)] * with_siblings)
    head += ["siblings"] * with_siblings
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def show(records: Sequence[ForwardRecord], answer: Generation, decoder: Mapping[str, Any]) -> None:
    """Print the growing answer: committed tokens green, draft tokens yellow, masks grey; else in brackets."""
    # 1) the table
    console = Console(width=None if Console().is_terminal else 80, highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), expand=True)
    for name, right in (("", True), ("forward", False), ("slots", True)):
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    table.add_column("the answer after it", ratio=1)
    # 2) the answer after each forward
    canvas: dict[int, tuple[str, str]] = {}  # place -> text and colour
    for number, record in enumerate(records, 1):
        # tokens of earlier forwards lose their colour; old draft tokens go unless committed now
        canvas = {
            place: (text, "")
            for place, (text, colour) in canvas.items()
            if colour != "yellow" or place in record.committed
        }
        canvas |= {place: (text, "green") for place, text in record.committed.items()}
        canvas |= {place: (text, "yellow") for place, text in record.drafted.items()}
        table.add_row(str(number), record.kind, str(record.slots), _painted(canvas, bool(console.color_system)))
    # 3) legend and totals
    console.print(table)
    console.print(_legend(bool(console.color_system)))
    tokens, forwards = len(answer.ids), sum(answer.trace.forwards.values())
    console.print(
        f"\n{tokens} tokens in {forwards} forwards, {tokens / forwards:.2f} a forward; ended by {answer.finish}"
    )
    if answer.trace.predicted:
        console.print(_drafting(answer))
    console.print(f"decoder {', '.join(f'{name}={value}' for name, value in decoder.items())}")


def _drafting(answer: Generation) -> str:
    """Draft lengths, and why there were none where there were none."""
    trace, policy = answer.trace, answer.draft_policy
    mean = {name: sum(getattr(trace, name)) / len(trace.predicted) for name in ("predicted", "expected", "accepted")}
    words = ", ".join(f"{name} {value:.2f}" for name, value in mean.items())
    line = f"a step, bonus token counted: {words}"
    if policy is None or policy.slot_budget is not None or not trace.forwards["commit"]:
        return line
    line += f"\n{trace.forwards['commit']} steps without drafts, to time them or because they are faster"
    if policy.drafting_rate and policy.plain_rate:
        line += f"\ntokens/s: {policy.drafting_rate:,.0f} with drafts, {policy.plain_rate:,.0f} without"
    return line


BRACKETS = {"green": ("[", "]"), "yellow": ("<", ">")}
"""Around committed and draft tokens where there are no colours."""


def _legend(coloured: bool) -> Text:
    names = {"green": "committed by this forward", "yellow": "drafted, not verified yet"}
    text = Text("\n")
    for colour, name in names.items():
        text.append(*((name, colour) if coloured else (f"{''.join(BRACKETS[colour])} {name}", "")))
        text.append("   ")
    return text.append("· not written yet", "bright_black" if coloured else "")


def _painted(canvas: Mapping[int, tuple[str, str]], coloured: bool) -> Text:
    """The answer, runs of tokens of one colour together."""
    places = [canvas.get(place, ("·", "bright_black")) for place in range(max(canvas, default=-1) + 1)]
    text = Text()
    for colour, run in groupby(places, key=lambda piece: piece[1]):
        words = "".join(piece for piece, _ in run)
        opening, closing = ("", "") if coloured else BRACKETS.get(colour, ("", ""))
        text.append(f"{opening}{words}{closing}", colour)
    return text
