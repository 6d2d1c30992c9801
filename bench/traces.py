"""Updates the traces in docs/decoders.md: `python -m bench.traces` runs the command above each of them."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

from fluid_eval.cli.main import main as command_line
from fluid_eval.common.paths import resource

PAGE = resource("docs") / "decoders.md"
BLOCK = re.compile(r"<!-- (fluid-eval trace .*?) -->\n.*?<!-- end -->", re.DOTALL)


def printed(command: str) -> str:
    """Standard output of a command. Raises RuntimeError if it fails."""
    out = io.StringIO()
    with contextlib.chdir(PAGE.parent.parent), contextlib.redirect_stdout(out):
        code = command_line(shlex.split(command)[1:])
    if code:
        raise RuntimeError(f"{command} ended with {code}")
    return out.getvalue().strip()


def rewrite(page: Path) -> None:
    """Replace the text below every command by its current output."""
    text = page.read_text(encoding="utf-8")
    page.write_text(BLOCK.sub(lambda block: f"<!-- {block[1]} -->\n{printed(block[1])}\n<!-- end -->", text), "utf-8")


if __name__ == "__main__":
    rewrite(PAGE)
    sys.exit(0)
