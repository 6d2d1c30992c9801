"""Speed repeats: a run's answers generated again, only to time them. No torch.

Timings vary from repeat to repeat, so a speed has an interval only over repeats. Two settings are compared within one
process that alternates between them. `repeats.jsonl` in a run folder holds one line a repeat:

    {"session": "5f1c…", "turn": 0, "seconds": {"gsm8k/0": 0.041, …}, "unequal": [], "crc32": "…"}

session: one timing process; runs timed in alternation share it.  turn: index of the repeat in its session.
seconds: engine time of each answer.  unequal: answers whose tokens differ from the stored ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fluid_model.common.errors import ConfigError
from fluid_model.common.fields import at_least

from ..common.stats import Interval, geometric
from .run_folder import REPEATS as REPEATS
from .sample_records import encode, parse, tokens_of
from .samples_file import torn_bytes

Turn = tuple[str, int]
"""Session and turn of a repeat. Repeats of two runs with equal ones were timed in alternation, in one process."""


@dataclass(frozen=True)
class Repeat:
    """Times of a run's answers, generated once more. See the module for the fields."""

    session: str
    turn: int
    seconds: Mapping[str, float]
    unequal: Sequence[str] = ()


def check_count(repeats: int | None) -> None:
    """Raise ConfigError for fewer repeats than an interval needs."""
    at_least("speed_repeats", repeats, 2)


def append(folder: Path, repeat: Repeat) -> None:
    """Append one repeat to a run folder, after dropping a torn line that a crash left."""
    file = folder / REPEATS
    torn = torn_bytes(file)
    with file.open("ab") as handle:
        handle.truncate(handle.tell() - torn)
        handle.write(encode(asdict(repeat)))


def read(folder: Path) -> list[Repeat]:
    """Repeats of a run folder, in file order. Raises ConfigError naming the line that is no repeat."""
    file = folder / REPEATS
    if not file.is_file():
        return []
    lines = file.read_bytes()[: -torn_bytes(file) or None].splitlines()
    repeats = []
    for number, line in enumerate(lines, 1):
        try:
            values = parse(line)
            seconds = {str(key): float(value) for key, value in values["seconds"].items()}
            if not all(0 <= value < math.inf for value in seconds.values()):
                raise ValueError("seconds below 0 or infinite")
            repeats.append(Repeat(str(values["session"]), int(values["turn"]), seconds, list(values["unequal"])))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{file}, line {number}: not a repeat ({error}); remove the file, and time again with --speed-repeats"
            ) from error
    return repeats


def enough(repeats: Sequence[Repeat], wanted: int) -> bool:
    """Whether one session timed at least `wanted` repeats. Sessions do not add up: the machine's state differs."""
    sessions = [repeat.session for repeat in repeats]
    return any(sessions.count(session) >= wanted for session in set(sessions)) or not wanted


def tokens_per_second(records: Iterable[Mapping[str, Any]], repeats: Sequence[Repeat]) -> dict[Turn, float]:
    """Tokens/s over the generated samples among `records`, for each repeat that timed all of them.

    Empty where nothing was generated: likelihood tasks have no tokens/s.
    """
    if not repeats:
        return {}
    generated = [record for record in records if record["finish"] is not None]
    tokens = sum(tokens_of(record) or 0 for record in generated)
    speeds = {}
    for repeat in repeats:
        if tokens and all(record["key"] in repeat.seconds for record in generated):
            seconds = math.fsum(repeat.seconds[record["key"]] for record in generated)
            if seconds > 0:
                speeds[repeat.session, repeat.turn] = tokens / seconds
    return speeds


def ratio(base: Mapping[Turn, float], other: Mapping[Turn, float]) -> Interval | None:
    """Speed of the other run over the base's, from repeats timed in alternation; None where there are none."""
    both = [turn for turn in base if turn in other]
    return geometric([other[turn] / base[turn] for turn in both]) if both else None


def notices(repeats: Sequence[Repeat]) -> list[str]:
    """A warning if repeats generated other tokens than the stored ones."""
    keys = sorted({key for repeat in repeats for key in repeat.unequal})
    if not keys:
        return []
    more = ", …" if len(keys) > 1 else ""
    return [
        f"speed repeats: {len(keys)} answers were not written with the same tokens each time ({keys[0]}{more}); "
        "scores are of the first writing"
    ]
