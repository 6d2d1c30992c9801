"""Updates the traces in docs/decoders.md: `python -m bench.traces [WORD ...]` runs the command above each of them.

With words, only commands that hold one of them.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from fluid_eval.cli.main import main as command_line
from fluid_eval.common.paths import resource
from fluid_model.checkpoints.manifest import MANIFEST_FILE

PAGE = resource("docs") / "decoders.md"
ROOT = PAGE.parent.parent
BLOCK = re.compile(r"<!-- (fluid-eval trace .*?) -->\n.*?<!-- end -->", re.DOTALL)
BORROWERS = ("bd3lm", "sdar", "fast-dllm-v2", "wedlm")
"""Methods that no bundled checkpoint was trained for. tiny-nbdiff's weights write their traces."""


def lend(method: str, folder: Path) -> None:
    """Copy tiny-nbdiff to a folder that states another method."""
    shutil.copytree(ROOT / "checkpoints" / "tiny-nbdiff", folder, dirs_exist_ok=True)
    manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    (folder / MANIFEST_FILE).write_text(json.dumps({**manifest, "method": method}), encoding="utf-8")


def printed(command: str) -> str:
    """Standard output of a command. Raises RuntimeError if it fails."""
    out = io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(out):
        code = command_line(shlex.split(command)[1:])
    if code:
        raise RuntimeError(f"{command} ended with {code}")
    return out.getvalue().strip()


def rewrite(page: Path, words: Sequence[str] = ()) -> None:
    """Replace the text below every command by its current output.  words: see the module."""

    def renewed(block: re.Match[str]) -> str:
        if words and not any(word in block[1] for word in words):
            return block[0]
        return f"<!-- {block[1]} -->\n{printed(block[1])}\n<!-- end -->"

    page.write_text(BLOCK.sub(renewed, page.read_text(encoding="utf-8")), "utf-8")


if __name__ == "__main__":
    for borrowing in BORROWERS:
        lend(borrowing, ROOT / "build" / "traces" / borrowing)
    rewrite(PAGE, sys.argv[1:])
    sys.exit(0)
