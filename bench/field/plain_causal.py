"""Plain samplers of causal models: AR, and FLUID as its public code writes."""

from __future__ import annotations

import torch
from torch import Tensor

from fluid_model.checkpoints.checkpoint import Checkpoint
from fluid_model.engine.records import Kind, Request
from fluid_model.settings import ArSettings, FluidSettings

from .plain import PlainRow, Written, causal, sample


def plain_ar(checkpoint: Checkpoint, request: Request, decoder: ArSettings | FluidSettings) -> Written:
    """One token a forward; what verified drafts must write, too."""
    row = PlainRow(checkpoint, request)
    while row.left and not row.ended(row.answer):
        logits = row.ask("commit" if row.answer else "prefill", row.ids, causal(len(row.ids)))
        draw = torch.rand((), generator=row.random)[None]
        row.ids += sample(logits[-1:], draw, decoder.temperature, decoder.top_p)[0]
    return row.written()


def plain_fluid(checkpoint: Checkpoint, request: Request, decoder: FluidSettings) -> Written:
    """As the cached generation of github.com/Oli-lab-nun/FLUID at 9093c11bf437.

    The forward that fed a round's last form also opens the next round, and runs for the last round too.
    """
    row, head = PlainRow(checkpoint, request), checkpoint.head
    assert head is not None

    def ask(ids: list[int], kind: Kind) -> tuple[Tensor, Tensor]:
        row.forwards[kind] += 1
        out = checkpoint.model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        return out.logits[0], out.hidden_states[-1][0]

    with torch.inference_mode():
        hidden = ask(row.ids, "prefill")[1]
        while row.left > 0 and not row.ended(row.answer):
            # 1) a canvas as wide as the K-head says
            start = len(row.ids)
            stride = int(head(hidden[-1:]).argmax()) + 1
            stride = min(max(stride, decoder.min_horizon), decoder.max_horizon)
            canvas, pointer = [row.mask] * stride, 0
            # 2) filled from the left, and where the model is confident
            while pointer < stride and row.mask in canvas:
                guesses = ask(row.ids + canvas, "denoise")[0][start - 1 :]  # guesses[j] predicts canvas slot j
                confident = guesses.softmax(-1).max(-1).values > decoder.confidence
                canvas[pointer] = int(guesses[pointer].argmax())
                for slot in range(pointer + 1, stride):
                    if confident[slot]:
                        canvas[slot] = int(guesses[slot].argmax())
                pointer += 1
                while pointer < stride and confident[pointer]:
                    pointer += 1
            # 3) kept up to the first token that AR would not have written, which AR's replaces
            wrong = None
            if decoder.verify:
                logits, hidden = ask(row.ids + canvas, "verify")
                right = logits[start - 1 :].argmax(-1).tolist()
                wrong = next((j for j in range(stride) if canvas[j] != right[j]), None)
                if wrong is not None:
                    canvas = [*canvas[:wrong], right[wrong]]
            row.ids += canvas
            if wrong is not None or not decoder.verify:
                hidden = ask(row.ids, "commit")[1]
    return row.written()
