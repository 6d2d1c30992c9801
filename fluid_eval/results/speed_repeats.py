"""Speed repeats: the same answers written again for their time alone. No torch.

A machine is never as fast twice. How much it varies is seen only where the same work is timed several times, and two
settings compare only where they take turns in one process. `repeats.jsonl` in a run folder holds one line a repeat:

    {"session": "5f1c…", "turn": 0, "seconds": {"gsm8k/0": 0.041, …}, "unequal": [], "crc32": "…"}

session: one process that timed; runs timed in turns share it.  turn: which of its repeats.  seconds: each answer's
share of the engine's time.  unequal: answers whose tokens were not those stored.
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
from .run_folder import torn_bytes
from .sample_records import encode, parse

Turn = tuple[str, int]
"""Session and turn: repeats of several runs with the same ones took turns in one process."""


@dataclass(frozen=True)
class Repeat:
    """One more writing of a run's answers (see the module)."""

    session: str
    turn: int
    seconds: Mapping[str, float]
    unequal: Sequence[str] = ()


def check_count(repeats: int | None) -> None:
    """Raise ConfigError for a number of repeats that gives no interval."""
    at_least("speed_repeats", repeats, 2)


def append(folder: Path, repeat: Repeat) -> None:
    """Keep one repeat in a run folder. What a crash left of a line before it is dropped."""
    file = folder / REPEATS
    torn = torn_bytes(file)
    with file.open("ab") as handle:
        handle.truncate(handle.tell() - torn)
        handle.write(encode(asdict(repeat)))


def read(folder: Path) -> list[Repeat]:
    """Repeats of a run folder, none where it holds none. Raises ConfigError naming the line that is no repeat."""
    file = folder / REPEATS
    if not file.is_file():
        return []
    whole = file.read_bytes()[: -torn_bytes(file) or None]
    found = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            held = parse(line)
            times = {str(key): float(value) for key, value in held["seconds"].items()}
            if not all(0 <= value < math.inf for value in times.values()):
                raise ValueError("seconds below 0 or infinite")
            found.append(Repeat(str(held["session"]), int(held["turn"]), times, list(held["unequal"])))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{file}, line {number}: not a repeat ({error}); remove the file, and time again with --speed-repeats"
            ) from error
    return found


def enough(held: Sequence[Repeat], wanted: int) -> bool:
    """Whether one session timed at least that many: repeats of several processes are not of one machine's state."""
    sessions = [repeat.session for repeat in held]
    return any(sessions.count(session) >= wanted for session in set(sessions)) or not wanted


def paces(records: Iterable[Mapping[str, Any]], held: Sequence[Repeat]) -> dict[Turn, float]:
    """Tokens/s of these written samples in each repeat that timed all of them; of samples that write nothing, none."""
    wrote = [record for record in records if record["finish"] is not None]
    tokens = sum(len(record["output_ids"]) for record in wrote)
    found = {}
    for repeat in held:
        if tokens and all(record["key"] in repeat.seconds for record in wrote):
            seconds = math.fsum(repeat.seconds[record["key"]] for record in wrote)
            if seconds > 0:
                found[repeat.session, repeat.turn] = tokens / seconds
    return found


def ratio(base: Mapping[Turn, float], other: Mapping[Turn, float]) -> Interval | None:
    """How many times as fast the other was, from the repeats in which both took turns; None where there are none."""
    both = [turn for turn in base if turn in other]
    return geometric([other[turn] / base[turn] for turn in both]) if both else None


def notices(held: Sequence[Repeat]) -> list[str]:
    """What a reader of the speeds must know."""
    keys = sorted({key for repeat in held for key in repeat.unequal})
    if not keys:
        return []
    more = ", …" if len(keys) > 1 else ""
    return [
        f"speed repeats: {len(keys)} answers were not written with the same tokens each time ({keys[0]}{more}); "
        "scores are of the first writing"
    ]
