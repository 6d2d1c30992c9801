"""`python -m bench.house [--json] [--where] [--no-paths]`: the house against its limits.

Exit code 1 if a limit is passed. `--where` names on standard error what each number counts.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator

from .. import bars
from . import LIMITS, journeys, sizes, sources, words


def static_bars() -> Iterator[tuple[bars.Bar, list[str]]]:
    """All bars but those of the two paths, each with what it counts, worst first."""
    graph = sources.import_graph()
    tops = {package: sources.rooms_at_the_top(package) for package in sources.ROOMS}
    widest = max(tops.values(), key=len)
    yield _bar(
        "rooms at the top of a package", len(widest), [f"{name}: {', '.join(top)}" for name, top in tops.items()]
    )
    for name, lines in (
        ("upward imports", sources.upward(graph)),
        ("import cycles", sources.cycles(graph)),
        ("packages that import each other", sources.mutual(graph)),
    ):
        yield _bar(name, len(lines), lines)
    for name, longest in (
        ("lines of the longest file", sizes.longest_file()),
        ("lines of the longest function", sizes.longest_function()),
    ):
        yield _bar(name, longest.lines, [longest.name])
    repeated = [f"{name}: {', '.join(modules)}" for name, modules in sizes.repeated_classes().items()]
    yield _bar("class names that stand in several modules", len(repeated), repeated)
    core = sizes.density()
    facts = [f"{core.lines} lines, {core.code} of code: {core.comprehensions} comprehensions, {core.comments} comments"]
    yield _bar("comprehensions per 1,000 lines of the dense core", 1000 * core.comprehensions / core.lines, facts)
    yield _bar("lines of code per comment in the dense core", core.code / max(1, core.comments), facts)
    names = words.name_uses()
    for name, group in (
        ("`found` as a name", words.RESULTS),
        ("`told`, `said`, `true` as names", words.SPOKEN),
        ("other habits as names", words.HABITS),
        ("words the glossary replaced, as names", words.REPLACED),
    ):
        yield _uses(name, {word: names[word] for word in group})
    yield _uses("phrases the glossary replaced, in texts", words.phrase_uses())


def path_bars() -> Iterator[tuple[bars.Bar, list[str]]]:
    """Files on the two paths, helpers apart; the lines name them, and how many there are with helpers."""
    for name, path in (
        ("files on the path of one request", journeys.request_path()),
        ("files on the path of one decoding step", journeys.step_path()),
    ):
        helpers = [file for file in path.all if file.startswith(tuple(journeys.HELPERS))]
        yield _bar(name, len(path.work), [*path.work, f"with helpers {len(path.all)}: {', '.join(helpers)}"])


def _bar(name: str, count: float, lines: list[str]) -> tuple[bars.Bar, list[str]]:
    return bars.at_most(name, count, LIMITS[name]), lines


def _uses(name: str, uses: dict[str, Counter[str]]) -> tuple[bars.Bar, list[str]]:
    """Uses of all words together, with the files of each."""
    lines = [
        f"{word}: {by_file.total()} ({', '.join(f'{file} {count}' for file, count in by_file.most_common())})"
        for word, by_file in uses.items()
        if by_file
    ]
    return _bar(name, sum(by_file.total() for by_file in uses.values()), lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.house", description="The house against its limits.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--where", action="store_true", help="name what is counted, on standard error")
    parser.add_argument("--no-paths", action="store_true", help="run no model: without the files on the two paths")
    options = parser.parse_args(arguments)
    measured = [*static_bars(), *([] if options.no_paths else path_bars())]
    if options.where:
        for bar, lines in measured:
            print(f"{bar.name}: {bar.measured:g}", *(f"    {line}" for line in lines), sep="\n", file=sys.stderr)
    print(bars.render([bar for bar, _ in measured], as_json=options.json))
    return 0 if all(bar.ok for bar, _ in measured) else 1


if __name__ == "__main__":
    sys.exit(main())
