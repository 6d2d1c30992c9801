"""What a report says of runs held against another: never more than that they were asked alike allows."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from fluid_eval.cli import main
from fluid_eval.report import facts
from fluid_eval.report.stored import read_runs
from fluid_eval.store import write_json

from .runs import WRITTEN, write_run, written


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A slow run that is always wrong, and a fast one that is always right."""
    top, rng = tmp_path_factory.mktemp("pair"), random.Random(4)
    answers = [written(n, "fluid", rng) for n in range(WRITTEN)]
    return [
        write_run(
            top / name,
            records=[
                {**one, "scores": dict.fromkeys(one["scores"], right), "seconds": one["seconds"] * slower}
                for one in answers
            ],
        )
        for name, right, slower in (("base", 0.0, 9), ("other", 1.0, 1))
    ]


def test_runs_asked_otherwise_are_not_compared_unasked(pair: list[Path], tmp_path: Path) -> None:
    found = facts.gather(read_runs(pair), None)
    assert found.verdicts[0].state == "good"
    assert found.placed[0].dominated_by == found.placed[1].name
    file = pair[1] / "result.json"
    before = file.read_text()
    result = json.loads(before)
    result["protocol"]["tasks"]["gsm8k"]["num_fewshot"] = 0
    write_json(file, result)
    try:
        files = [tmp_path / name for name in ("page.html", "page.md", "page.tex")]
        words = [*map(str, pair), "-o", str(files[0]), "--markdown", str(files[1]), "--latex", str(files[2])]
        for more, compared in (([], False), (["--across-protocols"], True)):
            assert main(["report", *words, *more]) == 0
            page, markdown, latex = (path.read_text(encoding="utf-8") for path in files)
            for text in (page, markdown, latex):
                assert re.search(r"num(\\)?_fewshot: 5 / 0", text)
                assert "Protocols differ" in text
            assert ('id="compare"' in page, "## Differences" in markdown) == (compared, compared)
            assert markdown.index("Protocols differ, ") < (markdown + "## Differences").index("## Differences")
            found = facts.gather(read_runs(pair), None, across_protocols=compared)
            assert (found.verdicts[0].state, found.verdicts[0].word) == ("warn", "Protocols differ")
            scores = [one for one in found.verdicts if one.about.startswith("Score")]
            assert [one.state for one in scores] == ["none"] * compared
            assert {place.dominated_by for place in found.placed} == {None}
    finally:
        file.write_text(before)
