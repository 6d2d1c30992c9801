"""Damaged settings, command lines and run folders by chance: whatever they are, a command ends in one line or works.

`python -m tests.fuzz --minutes 10 --seed 1` goes on until the time is over and says what ended in a traceback. Seed and
number of a case make it again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fluid_eval.cli.main import main
from fluid_eval.results.run_folder import encode

from .runs import write_run

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 3, 10**9, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "3", "\ud800",
    "é–⏎", "a" * 300, "../..", "~nobody/x", "/dev/null", [], [[]], [1, "x"], {}, {"": {}}, {"name": 3}, {"path": None},
)  # fmt: skip
WORDS = (
    "run", "sweep", "tax", "trace", "audit", "khead", "compare", "report", "rescore", "--tasks", "mini",
    "gsm8k", "mmlu_x", "--model", "--decoder", "fluid", "ar", "--set", "decoder=-1", "model=3", "chat=true", "sweep=1",
    "decoder.verify=false", "tasks=[]", "health=x", "chat.variables.a=2020-01-01", "--limit", "-1", "0", "--sweep",
    "decoder=-1", "decoder.name=ar,3", "model.path=x,y", "decoder.confidence=0.5,0.9", "--sample", "2", "--profile",
    "minimal", "nothing.toml", "--chat", "--json", "--resume", "--out", "--num-fewshot", "--max-new-tokens", "é", "--k",
    "--fail-if-worse", "nan", "--within", "--claims", "--seed", "99999999999", "--engine", "--dtype", "--prompt", "x",
)  # fmt: skip
SPEC: dict[str, Any] = {
    "tasks": ["mini_gsm8k_1"], "model": {"path": "nowhere"}, "decoder": {"name": "fluid", "confidence": 0.5},
    "limit": 2, "chat": {"system": "x"},
    "engine": {"kind": "inline"}, "health": {"broken": 0.5}, "seed": 1, "batch_size": 2,
    "sweep": {"grid": {"decoder.confidence": [0.5, 0.9]}, "point": [{"decoder.name": "ar"}]},
}  # fmt: skip
STORED = ("spec.json", "environment.json", "result.json", "samples.jsonl", "audit.json", "khead.json")


def changed(values: Any, rng: random.Random) -> Any:
    """Plain values with one of them replaced, taken away or put twice, at any depth."""
    if isinstance(values, dict) and values and rng.random() < 0.85:
        name = rng.choice(sorted(values))
        if rng.random() < 0.15:
            return {key: value for key, value in values.items() if key != name}
        return {**values, name: changed(values[name], rng)}
    if isinstance(values, list) and values and rng.random() < 0.7:
        place = rng.randrange(len(values))
        return [changed(value, rng) if at == place else value for at, value in enumerate(values)]
    return rng.choice([odd for odd in ODD if odd is not values])


def toml(values: Any) -> str:
    """Plain values as TOML writes them in one line; what it has no word for as a text."""
    if isinstance(values, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(value)}" for key, value in values.items()) + "}"
    if isinstance(values, list):
        return "[" + ", ".join(map(toml, values)) + "]"
    if isinstance(values, float) and abs(values) != float("inf") and values == values:
        return repr(values)
    return json.dumps(values if values is not None else "none")


def spec_case(root: Path, rng: random.Random) -> list[str]:
    """A spec file with something odd in it."""
    values = SPEC
    for _ in range(rng.randint(1, 3)):
        values = changed(values, rng)
    text = "\n".join(f"{name} = {toml(value)}" for name, value in values.items()) if isinstance(values, dict) else "x"
    if rng.random() < 0.1:
        place = rng.randrange(len(text) + 1)
        text = text[:place] + rng.choice("\"'[]{}=\n\0\ufeff") + text[place + 1 :]
    file = root / "spec.toml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    named = isinstance(values, dict) and "model" in values  # else the bundled one would go to work
    model = [] if named else ["--model=nowhere"]
    return [rng.choice(("run", "sweep", "audit")), str(file), "--out", str(root / "out"), *model]


def words_case(root: Path, rng: random.Random) -> list[str]:
    """Words of the command line in any order."""
    words = [rng.choice(WORDS[:9]), *rng.choices(WORDS, k=rng.randint(0, 7))]
    if words[0] in WORDS[:6]:
        words.append("--model=nowhere")  # nothing is to be found good and go to work
    return [word if word != "--out" else f"--out={root / 'out'}" for word in words]


def stored_case(root: Path, rng: random.Random) -> list[str]:
    """A finished run, one of its files odd: changed under the right checksum, cut, gone, or a folder."""
    folder, name = root / "b", rng.choice(STORED)
    file, way = folder / name, rng.random()
    if way < 0.1:
        file.unlink(missing_ok=True)
        if rng.random() < 0.7:
            file.mkdir()
    elif way < 0.2:
        file.write_bytes(rng.choice((b"", b"{}", b"[]", b"null", b'{"a":', b"\xff\xfe", b"\n\n", b"3")))
    elif name == "samples.jsonl":
        lines = file.read_bytes().splitlines(keepends=True)
        place = rng.randrange(len(lines))
        record = json.loads(lines[place])
        record.pop("crc32")
        record = changed(record, rng)
        if rng.random() < 0.5 and isinstance(record, dict) and isinstance(record.get("trace"), dict):
            record["trace"] = changed(record["trace"], rng)
        lines[place] = encode(record) if isinstance(record, dict) else b"3\n"
        file.write_bytes(b"".join(lines))
    else:
        values = json.loads(file.read_text()) if file.exists() else {"verdict": "identical", "n": 3, "tasks": {}}
        file.write_text(json.dumps(changed(changed(values, rng), rng)))
    a, b = str(root / "a"), str(folder)
    return rng.choice((
        ["report", b, "-o", str(root / "page.html")],
        ["report", b, a, "-o", str(root / "page.html"), "--markdown", str(root / "a.md")],
        ["report", a, b, "-o", str(root / "page.html"), "--latex", str(root / "a.tex")],
        ["compare", a, b, "--across-protocols", "--flips"],
        ["compare", b, a, "--json"],
        ["audit", b], ["khead", b],
        ["rescore", b, "--profile", "minimal", "--out", str(root / "out")],
    ))  # fmt: skip


CASES: dict[str, Callable[[Path, random.Random], list[str]]] = {
    "spec": spec_case, "words": words_case, "stored": stored_case,
}  # fmt: skip
ENDS = (0, 1, 2, 3, 4)


def ended(words: Sequence[str]) -> str | None:
    """What is wrong with how a command ended; None where it worked or said why not in one line."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(words)
    except SystemExit as error:  # argparse's own usage and error
        return None if error.code in (0, 2) else f"exit {error.code}"
    except BaseException:
        return traceback.format_exc()
    messages = [line for line in err.getvalue().splitlines() if line.startswith("fluid-eval: ")]
    if code not in ENDS or (code == 2 and len(messages) != 1):
        return f"exit {code} with {len(messages)} lines: {err.getvalue()[-300:]}"
    return None


def fuzz(
    seed: int, *, seconds: float, most: int = 10**9, kinds: Sequence[str] = tuple(CASES)
) -> tuple[Counter[str], list[str]]:
    """Cases until the time is over, or there are so many: how many of each kind, and what ended badly."""
    counts, bad, until = Counter[str](), [], time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as spare:
        intact = Path(spare) / "whole"
        write_run(intact, "fluid")
        for number in range(most):
            if number and time.monotonic() > until:
                break
            rng, kind = random.Random(f"{seed}/{number}"), kinds[number % len(kinds)]
            root = Path(spare) / "case"
            root.mkdir()
            if kind == "stored":
                shutil.copytree(intact, root / "a")
                shutil.copytree(intact, root / "b")
            with contextlib.chdir(root):
                words = CASES[kind](root, rng)
                problem = ended(words)
            shutil.rmtree(root)
            counts[kind] += 1
            if problem is not None:
                bad.append(f"case {seed}/{number} ({kind}): {' '.join(words)}\n{problem}")
    return counts, bad


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    counts, bad = fuzz(asked.seed, seconds=60 * asked.minutes)
    for each in bad:
        print(each, end="\n\n")
    print(f"seed {asked.seed}: {dict(counts)}; {len(bad)} ended in anything but one line")
    sys.exit(1 if bad else 0)
