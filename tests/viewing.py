"""A folder of runs, and the viewer over it on a free port of loopback."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fluid_eval.output.view_server import listening

from .runs import write_run


def write_folder(top: Path) -> Path:
    """Two finished runs, one that runs, one without answers for an hour, one damaged; a sweep of two points; a link."""
    root = top / "runs"
    write_run(root / "ar", "ar", model="models/parent")
    write_run(root / "deep" / "fluid", "fluid", model="models/child")
    running = write_run(root / "running", "fluid", model="models/child")
    (running / "result.json").unlink()
    stopped = shutil.copytree(running, root / "stopped")
    hour_ago = time.time() - 3600
    for file in stopped.iterdir():
        os.utime(file, (hour_ago, hour_ago))
    damaged = write_run(root / "damaged", "ar")
    (damaged / "spec.json").write_text("{")
    for name, decoder in (("aaaa", "ar"), ("bbbb", "fluid")):
        write_run(root / "sweep" / "points" / name, decoder, model="models/child")
    (root / "sweep" / "sweep.json").write_text(
        '{"id": "x", "points": [{"name": "γ=0.9", "settings": {}, "folder": "points/bbbb"}]}'
    )
    write_run(top / "outside", "ar", model="models/secret")
    (root / "link").symlink_to(top / "outside")
    (root / "sweep" / "points" / "link").symlink_to(top / "outside")
    return root


@contextmanager
def viewer(root: Path) -> Iterator[str]:
    """The viewer's address, as long as it is open."""
    server, opened = listening(root, 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
    with opened:
        thread.start()
        yield f"http://127.0.0.1:{opened.getsockname()[1]}"
        server.should_exit = True
        thread.join(30)
