"""A server with OpenAI's completions and chat completions, whose answers a test decides."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Respond = Callable[[dict[str, Any]], tuple[int, Any]]
"""From a request to status and body."""


@contextmanager
def openai_server(respond: Respond) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(base address, requests so far) of a server on loopback."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({"path": self.path, **request})
            status, body = respond(request)
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()


def completion(text: str | None, finish: str = "stop", tokens: int | None = 7, *, chat: bool = False) -> Any:
    """A response with one answer. tokens: None leaves out `usage`."""
    part = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    usage = {} if tokens is None else {"usage": {"prompt_tokens": 9, "completion_tokens": tokens}}
    return {"choices": [{"index": 0, "finish_reason": finish, **part}], **usage}
