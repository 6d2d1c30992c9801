"""What a report's page holds, read back: tags, tables, samples."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

from fluid_eval.output.report import samples


class Outline(HTMLParser):
    """Tags with their attributes, and the cells of every table row."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self._cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][-1] += data


def embedded(page: str) -> dict[str, Any]:
    script = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert script
    assert not set(script[1]) & set("<>&\u2028\u2029")
    return dict(json.loads(script[1]))


def unpack(text: str) -> list[int]:
    """What `pack` packed, by the definition of base64 VLQ."""
    numbers, bits = [], ""
    for letter in text:
        digit = samples._DIGITS.index(letter)
        bits = f"{digit & 31:05b}{bits}"
        if digit < 32:
            value = int(bits, 2)
            numbers.append(-(value >> 1) if value & 1 else value >> 1)
            bits = ""
    return numbers
