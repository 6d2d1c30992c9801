"""The documentation: every page has its place, the tour runs what the quickstart shows, commands on pages parse."""

from __future__ import annotations

import re
import shlex
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from bench.field import plan
from fluid_eval.cli.main import COMMANDS, parser
from fluid_model.common.command_line import Parser
from fluid_model.registry import BUILT_IN

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = {"reference/cli.md", "reference/settings.md", "reference/run-folder.md", "reference/python.md"}


def places(entry) -> list[str]:
    """Pages of a part of the site's nav."""
    if isinstance(entry, str):
        return [entry]
    return [page for value in (entry.values() if isinstance(entry, dict) else entry) for page in places(value)]


def blocks(page: Path, mark: str = "") -> list[str]:
    """The code blocks of a page; mark: a comment on the line above."""
    return re.findall(rf"^{re.escape(mark)}```\w*\n(.*?)^```", page.read_text(), re.M | re.S)


def test_every_page_has_one_place_in_the_site():
    listed = places(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted({page.name for page in (ROOT / "docs").glob("*.md")} | GENERATED)


def commands(page: Path) -> list[str]:
    """The commands of `fluid-eval` in a page's blocks, as they stand there, without comments and continuations."""
    lines = "\n".join(blocks(page)).replace("\\\n", " ").splitlines()
    found_in = [re.match(r"(?:\$ )?(?:\.venv/bin/)?(fluid-eval .*?)(?:\s+#.*)?$", line) for line in lines]
    return [match[1] for match in found_in if match and "…" not in match[1] and "..." not in match[1]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_pages_parse(page, monkeypatch):
    def error(self, message):
        raise AssertionError(f"{page.name}: {message}")

    monkeypatch.setattr(Parser, "error", error)
    for command in commands(page):
        parser().parse_args(shlex.split(command.partition(" > ")[0])[1:])


def test_pages_show_commands():
    assert sum(len(commands(page)) for page in PAGES) > 30
    assert "fluid-eval compare runs/ar runs/fluid" in commands(ROOT / "docs" / "quickstart.md")


def test_the_tour_runs_the_quickstart_and_most_commands():
    tour = (ROOT / "docs" / "tour.sh").read_text()
    marked = blocks(ROOT / "docs" / "quickstart.md", "<!-- tour -->\n")
    assert len(marked) >= 5
    run = {line.split()[1] for line in ("\n".join(marked) + tour).splitlines() if line.startswith("fluid-eval ")}
    assert COMMANDS.keys() - run == {"tax", "reproduce", "score", "doctor", "import", "view"}


def test_the_readme_is_one_screen_and_takes_its_figures_from_the_pages():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 70
    table = (ROOT / "docs/log/2026-11-30-long-contexts.md").read_text()
    for name, alone in (("smol", 3), ("tiny", 0)):  # batches with a figure of their own
        cells = re.search(rf"^\| {name}-fluid, now \|(.*)\|$", table, re.M)[1].split("|")
        ratios = [re.search(r"\d\.\d+", cell)[0] for cell in cells]
        assert ", ".join(ratios[:alone]) in readme
        together = sorted(ratios[alone:], key=float)
        assert f"{together[0]} to {together[-1]} from {2**alone} to 64" in readme
    smol = (ROOT / "docs/smol.md").read_text()
    alone, batched = re.search(r"^\| .*child, verified \|.* (\d\.\d\d) and (\d\.\d\d) times AR", smol, re.M).groups()
    assert f"child {alone} times at batch 1, {batched} at 8" in readme
    free = [re.search(rf"^\| {name} \| 64 free \| (\S+) ", smol, re.M)[1] for name in ("GSM8K", "HumanEval")]
    assert f"{free[0]} tokens/forward on GSM8K's questions where slots are free, {free[1]} on HumanEval's" in readme


def test_the_first_page_of_the_site_has_the_readmes_table():
    tables = [
        re.findall(r"^\|.*\|$", (ROOT / page).read_text().partition("## ")[0], re.M)
        for page in ("README.md", "docs/index.md")
    ]
    assert tables[0][:6] == [line.replace("(decoders.md)", "(docs/decoders.md)") for line in tables[1]]


def test_the_page_of_decoders_names_all_of_them_and_traces_each():
    page = (ROOT / "docs" / "decoders.md").read_text()
    table = page.partition("| module |")[0]
    traced = re.findall(r"<!-- fluid-eval trace .*?--decoder (\S+) .*?-->\n\|", page)
    assert {kind.name for kind in BUILT_IN} == set(re.findall(r"^\| `([\w-]+)`", table, re.M)) == set(traced)
    assert "`rounds=reference`" in table
    assert "decoder.rounds=reference" in page


def test_the_counts_of_the_fields_decoders_are_those_of_the_bench():
    """Answers that are compared, by decoder; a run says how many are equal."""
    page = (ROOT / "docs" / "decoders.md").read_text().partition("## Beside the public samplers")[2]
    printed = dict(re.findall(r"^\| `([\w-]+)` .* \| \d+ of (\d+) \|$", page, re.M))
    workload, counts = plan.FieldWorkload(), dict.fromkeys(plan.RULES, 0)
    for model in (*plan.MODELS, *plan.RENAMED):
        for name in model.decoders():
            pairs = [pair for rule in plan.RULES[name] for pair in plan.comparisons(name, rule, workload)]
            counts[name] += len(pairs) * len(workload.lengths)
    assert printed == {name: str(count) for name, count in counts.items()}


def test_the_citation_has_the_version_of_the_package():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert (cited["version"], cited["license"]) == (project, "Apache-2.0")
    assert metadata.version("fluid-eval") == project
