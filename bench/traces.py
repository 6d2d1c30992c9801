"""Writes the traces of docs/decoders.md anew: `python -m bench.traces` runs the command each of them names."""

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
    """What a command prints. Raises RuntimeError if it fails."""
    out = io.StringIO()
    with contextlib.chdir(PAGE.parent.parent), contextlib.redirect_stdout(out):
        code = command_line(shlex.split(command)[1:])
    if code:
        raise RuntimeError(f"{command} ended with {code}")
    return out.getvalue().strip()


def rewrite(page: Path) -> None:
    """Replace the text after every command by what the command prints now."""
    text = page.read_text(encoding="utf-8")
    page.write_text(BLOCK.sub(lambda found: f"<!-- {found[1]} -->\n{printed(found[1])}\n<!-- end -->", text), "utf-8")


if __name__ == "__main__":
    rewrite(PAGE)
    sys.exit(0)
