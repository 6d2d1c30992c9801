"""`fluid-eval view`: runs and sweeps of a folder in a browser, from files alone.

Safe by what it lacks: no route writes, no page has a script of its own, and a path is never built from what a browser
sent; a name is looked up among the folders found. Only loopback names are accepted as Host, so that no page elsewhere
can read this one by another name.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from fluid_model.common.errors import ConfigError, RunError

from ..common.paths import resource
from .report.facts import gather
from .report.page import render, templates
from .report.runs import read_runs
from .view_folders import Entry, entries

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from uvicorn import Server

HOST, PORT = "127.0.0.1", 8420
NAMES = ("127.0.0.1", "localhost")
"""Host names that are answered."""
REFRESH = 5
"""Seconds between reloads of a page about something that runs."""
ADVICE = "view needs Starlette and uvicorn: pip install 'fluid-eval[view]'"
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_OWN = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
"""Policy of the pages here. A report has its own, which allows its script by hash."""


class _MissingError(Exception):
    """Nothing has that name."""


def application(root: Path) -> Starlette:
    """The server's application. Raises ConfigError if the extra `view` is not installed, or root is no folder."""
    # 1) what it needs
    try:
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
        from starlette.responses import HTMLResponse
        from starlette.routing import Route
    except ImportError as error:
        raise ConfigError(ADVICE) from error
    if not root.is_dir():
        raise ConfigError(f"{root}: no such folder; name one that holds runs, or sweeps")
    pages = _Pages(root)

    # 2) routes, all of them for reading
    def page(text: str, status: int = 200, policy: str = _OWN) -> Response:
        return HTMLResponse(text, status, {**_HEADERS, "Content-Security-Policy": policy})

    def listing(request: Request) -> Response:
        asked = request.query_params
        return page(pages.listing(asked.get("q", ""), points="points" in asked, watch="watch" in asked))

    def one(request: Request) -> Response:
        text, is_report = pages.one(request.path_params["name"])
        return page(text, policy="frame-ancestors 'none'" if is_report else _OWN)

    def compared(request: Request) -> Response:
        return page(pages.compared(request.query_params.getlist("run")), policy="frame-ancestors 'none'")

    def missing(request: Request, error: Exception) -> Response:
        return page(pages.problem("Not found", "No run or sweep of this folder has that name."), 404)

    def faulty(request: Request, error: Exception) -> Response:
        return page(pages.problem("This cannot be shown", str(error)), 400)

    # 3) the application
    return Starlette(
        routes=[
            Route("/", listing, methods=["GET"]),
            Route("/compare", compared, methods=["GET"]),
            Route("/of/{name:path}", one, methods=["GET"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(NAMES), www_redirect=False)],
        exception_handlers={_MissingError: missing, 404: missing, ConfigError: faulty, RunError: faulty},
    )


def serve(root: Path, port: int = PORT) -> None:
    """Serve a folder on loopback until interrupted. Raises ConfigError if the port is taken."""
    server, opened = listening(root, port)
    with opened:
        print(f"http://{HOST}:{opened.getsockname()[1]}/  ({root}; Ctrl-C ends it)", flush=True)
        server.run(sockets=[opened])


def listening(root: Path, port: int) -> tuple[Server, socket.socket]:
    """The server, and the socket of loopback that it is to answer."""
    served = application(root)
    import uvicorn

    opened = socket.socket()
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((HOST, port))
        opened.listen()  # who is told the address may call at once
    except (OSError, OverflowError) as error:
        opened.close()
        raise ConfigError(f"--port {port}: {error}; choose another, or 0 for a free one") from error
    return uvicorn.Server(uvicorn.Config(served, log_level="warning", server_header=False, access_log=False)), opened


class _Pages:
    """The pages of a folder, read anew for each request."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._style = Markup((resource("reports") / "report" / "style.css").read_text(encoding="utf-8"))
        self._templates = templates()

    def listing(self, words: str, *, points: bool, watch: bool) -> str:
        """All runs and sweeps that have these words, points of sweeps only if asked for.

        watch: read the page anew every few seconds; not by default, since that unticks what was ticked.
        """
        everything = list(entries(self._root).values())
        shown = [entry for entry in everything if (points or entry.kind != "point") and entry.matches(words)]
        total = sum(points or entry.kind != "point" for entry in everything)
        given = {"words": words, "points": points, "watch": watch, "refresh": REFRESH if watch else None}
        return self._page("Runs and sweeps", shown=shown, total=total, **given)

    def one(self, name: str) -> tuple[str, bool]:
        """A finished run's report, or a sweep's over its finished points, and True; else how far it is, and False."""
        entry = self._entry(name)
        of_sweep = [other for other in entries(self._root).values() if other.name.startswith(f"{name}/")]
        if entry.state == "finished" or any(point.state == "finished" for point in of_sweep):
            return self._report([entry]), True
        if entry.state == "damaged":
            raise ConfigError(f"{entry.name}: {entry.problem}")
        refresh = REFRESH if entry.state == "running" else None
        return self._page(entry.name, progress=entry, points_of=of_sweep, refresh=refresh), False

    def compared(self, names: Sequence[str]) -> str:
        """The report of several runs. Raises ConfigError for fewer than two."""
        chosen = [self._entry(name) for name in dict.fromkeys(names)]
        if len(chosen) < 2:
            raise ConfigError("choose two finished runs or more to compare")
        return self._report(chosen)

    def problem(self, title: str, text: str) -> str:
        return self._page(title, problem=text)

    def _entry(self, name: str) -> Entry:
        if (entry := entries(self._root).get(name)) is None:
            raise _MissingError(name)
        return entry

    def _report(self, chosen: Sequence[Entry]) -> str:
        runs, why = read_runs([entry.folder for entry in chosen])
        return render(gather(runs, None, why=why))

    def _page(self, title: str, **values: Any) -> str:
        blank = {"shown": None, "progress": None, "points_of": (), "problem": "", "refresh": None}
        return self._templates.get_template("view.html.j2").render(
            title=title, root=self._root, style=self._style, **{**blank, **values}
        )
