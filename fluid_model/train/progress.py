"""Progress of a running training: a bar with the remaining time on a terminal, and a line for every report.

400/2400           loss 3.653  l_ar 3.66  l_diff 3.65  lr 0.00095  12 min left
400/2400 held-out  loss 3.168  l_ar 3.17  l_diff 3.17  accepted 1.075  drift 0.215
"""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SHOWN = ("loss", "l_ar", "l_diff", "stride", "accepted", "drift")


class Progress(TrainerCallback):
    """Replaces Trainer's own output."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        quiet = not (state.is_world_process_zero and sys.stderr.isatty())
        self._first, self._started = state.global_step, time.perf_counter()
        self._bar = tqdm(
            total=state.max_steps, initial=state.global_step, disable=quiet, unit="step", dynamic_ncols=True
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if state.is_world_process_zero and (line := report(state.global_step, state.max_steps, logs or {})):
            done = state.global_step - self._first
            left = (time.perf_counter() - self._started) / done * (state.max_steps - state.global_step) if done else 0
            tqdm.write(f"{line}  {left / 60:.0f} min left" if left >= 60 else line, file=sys.stderr)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._bar.close()


def report(step: int, steps: int, logs: dict[str, float]) -> str:
    """One line of figures, marked where they are of held-out rows; empty without any of SHOWN."""
    prefix = "eval_" if any(name.startswith("eval_") for name in logs) else ""
    figures = [f"{name} {float(logs[prefix + name]):.4g}" for name in SHOWN if prefix + name in logs]
    if not figures:
        return ""
    if "learning_rate" in logs:
        figures.append(f"lr {float(logs['learning_rate']):.2g}")
    return f"{step:>{len(str(steps))}}/{steps} {'held-out' if prefix else '':8}  {'  '.join(figures)}"
