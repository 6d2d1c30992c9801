"""Words this project left, counted: as identifiers in Python and C, and as phrases in messages, docstrings and docs."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

from .sizes import short
from .sources import ROOT, c_files, nodes, python_files

RESULTS = ("found",)
SPOKEN = ("told", "said", "true")
HABITS = ("whole", "good", "heard", "sure", "surest", "dear", "rivals")
"""Names that say nothing of what they hold, or say it in words of daily life."""
REPLACED = ("SlotCache", "Spans", "Reading", "FAN", "NOBODY", "Absorbed", "written_out", "aim", "normed")
"""Left-hand words of the glossary that were names of this code alone."""
PHRASES = (
    r"who may read whom", r"who reads whom", r"hangs? on\b", r"\bc[ao]mes? true", r"written[- ]out", r"broken rows?\b",
    r"pending tokens?", r"SlotCache", r"\blet in\b", r"\bsurest\b", r"\bgiven up\b",
)  # fmt: skip
"""Left-hand phrases of the glossary."""
NAMING = {
    ast.Name: ("id",),
    ast.Attribute: ("attr",),
    ast.arg: ("arg",),
    ast.keyword: ("arg",),
    ast.FunctionDef: ("name",),
    ast.ClassDef: ("name",),
    ast.alias: ("name", "asname"),
    ast.ExceptHandler: ("name",),
    ast.MatchAs: ("name",),
}
"""Where a syntax tree holds identifiers."""
HERE = Path(__file__).parent
"""Files that quote the words are not counted."""


def identifiers(file: Path) -> Counter[str]:
    """Every identifier of a Python or C file, underscores at its front apart. Comments and strings do not count."""
    if file.suffix != ".py":
        text = file.read_text(encoding="utf-8")
        bare = re.sub(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\])*"', " ", text, flags=re.DOTALL)
        return Counter(re.findall(r"[A-Za-z]\w*", bare))
    names = [getattr(node, field) for node in nodes(file) for field in NAMING.get(type(node), ())]
    return Counter(name.lstrip("_") for name in names if name)


def name_uses() -> dict[str, Counter[str]]:
    """Word -> its uses as an identifier by file."""
    uses: dict[str, Counter[str]] = {word: Counter() for word in (*RESULTS, *SPOKEN, *HABITS, *REPLACED)}
    for file in (*python_files(), *c_files()):
        if file.parent != HERE:
            names = identifiers(file)
            for word, by_file in uses.items():
                if names[word]:
                    by_file[short(file)] = names[word]
    return uses


def phrase_uses() -> dict[str, Counter[str]]:
    """Phrase -> its uses by file: whole texts of code, README, docs (their log apart), recipes and reports."""
    folders = (("docs", "*.md"), ("recipes", "*.toml"), ("reports", "*"), ("tasks", "*.toml"))
    pages = [file for folder, names in folders for file in sorted((ROOT / folder).glob(names)) if file.is_file()]
    uses: dict[str, Counter[str]] = {phrase: Counter() for phrase in PHRASES}
    for file in (*python_files(), *c_files(), ROOT / "README.md", *pages):
        if file.parent != HERE:
            text = re.sub(r"\s+#?\s*", " ", file.read_text(encoding="utf-8"))
            for phrase, by_file in uses.items():
                if hits := len(re.findall(phrase, text, re.IGNORECASE)):
                    by_file[short(file)] = hits
    return uses
