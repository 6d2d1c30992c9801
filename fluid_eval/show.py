"""What a run prints: tables that fit 80 columns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from .health import RULES
from .pareto import SPEEDS as PACES

if TYPE_CHECKING:
    from .grid import Plan
    from .sweep import Estimate

Line = Mapping[str, Any]
MACHINE = "tok/s: per worker; the interval covers documents, not how busy a machine was"
MOST_DIVERGENCES, ENOUGH = 12, 2000
"""Divergences an audit prints; tokens from which on its distribution test says much."""


def score(line: Line) -> str:
    """Percent with its 95% interval."""
    return f"{100 * line['score']:.1f} [{100 * line['low']:.1f}, {100 * line['high']:.1f}]"


def number(value: float | None, digits: int = 0) -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else f"{value:,.{digits}f}"


def metric(line: Line) -> str:
    """Metric and filter in one name, short where the filter says nothing."""
    names = {"strict-match": " strict", "flexible-extract": " flex", "none": "", "create_test": ""}
    return f"{line['metric']}{names.get(line['filter'], ' ' + line['filter'])}"


def print_result(result: Mapping[str, Any], folder: Path) -> None:
    """The result table, the data's fingerprints and where everything is."""
    console = Console(width=None if Console().is_terminal else 80, highlight=False, markup=False)
    decoder = ", ".join(f"{k}={v}" for k, v in result["decoder"].items() if k != "name")
    console.print(f"{result['model']}  decoder {result['decoder']['name']} ({decoder})")
    if chat := result.get("chat"):
        console.print(f"chat ({', '.join(f'{k}={v}' for k, v in chat.items() if v not in (None, '', {}))})")
    if used := result.get("protocol"):
        console.print(f"protocol {used['name']} {used['hash']}")
    console.print()
    console.print(_table(result["lines"]))
    console.print()
    console.print(_costs(result["lines"]))
    console.print()
    console.print("score: % and its 95% interval   cut: prompts cut from the left to fit the window")
    console.print("tok/s: per worker               limit: answers that hit the length limit")
    console.print("tokens: of answers before their end; forwards by kind, summed over samples")
    print_health(console, result.get("health", []))
    for message in result["data"]:
        console.print(f"data: {message}")
    for message in result["notices"]:
        console.print(f"note: {message}")
    if ran := result.get("remote_code"):
        console.print(f"code of the model's repository ran: {', '.join(ran)}")
    for key, reason in result.get("lost", {}).items():
        console.print(f"given up, and in no score: {key} ({reason})")
    console.print(f"run folder: {folder}  (fluid-eval report {folder})", soft_wrap=True)


def print_health(console: Console, health: Sequence[Mapping[str, Any]]) -> None:
    """What the gates counted, where that is anything, and what to do about those over their thresholds."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("", "health", "task"):
        table.add_column(name, no_wrap=True)
    for name in ("count", "share", "allowed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("first of them", overflow="fold")
    for gate in (gate for gate in health if gate["count"]):
        keys = gate["keys"][0] + (", …" if gate["count"] > 1 else "")
        counts = f"{gate['count']}/{gate['n']}", f"{gate['share']:.1%}", f"{gate['threshold']:.0%}"
        table.add_row("" if gate["ok"] else "!", gate["gate"], gate["task"], *counts, keys)
    if table.row_count:
        console.print()
        console.print(table)
        console.print()
    if over := next((RULES[gate["gate"]].setting for gate in health if not gate["ok"]), None):
        console.print(f"!: more than allowed, exit code 3; turned off by --set health.{over}=1")


def _costs(lines: Sequence[Line]) -> Table:
    """What each task's answers cost: forwards by kind, slots fed."""
    firsts = [line for i, line in enumerate(lines) if line["task"] not in {before["task"] for before in lines[:i]}]
    kinds = [
        kind for kind in lines[0]["forwards_by_kind"] if any(line["forwards_by_kind"].get(kind) for line in firsts)
    ]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("task", no_wrap=True)
    for name in ("tokens", *kinds, "forwards", "slots/tok"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in firsts:
        by_kind = line["forwards_by_kind"]
        counts = (line["tokens"], *(by_kind.get(kind, 0) for kind in kinds), line["forwards"])
        table.add_row(line["task"], *(f"{count:,}" for count in counts), number(line["slots_per_token"], 1))
    return table


def _table(lines: Sequence[Line]) -> Table:
    """One line a metric; what the answers cost stands on a task's first line."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("task", no_wrap=True)
    table.add_column("metric", no_wrap=True)
    for name in ("score", "n", "tok/fwd", "tok/s", "cut", "limit"):
        table.add_column(name, justify="right", no_wrap=True)
    before = None
    for line in lines:
        first = line["task"] != before
        cost = (
            number(line["tokens_per_forward"], 2),
            number(line["tokens_per_second"]),
            str(line["truncated_prompts"]),
            str(line["length_limit_hits"]),
        )
        table.add_row(
            line["task"] if first else "", metric(line), score(line), str(line["n"]), *(cost if first else ())
        )
        before = line["task"]
    return table


def print_comparison(comparison: Mapping[str, Any], *, flips: bool = False) -> None:
    """Every pair of runs: scores, speeds, flips. flips: name all that changed, not only the first."""
    console = Console(width=None if Console().is_terminal else 80, highlight=False, markup=False)
    models = {run["folder"]: f"{Path(run['model']).name}, {run['decoder']['name']}" for run in comparison["runs"]}
    _print_protocols(console, comparison["protocol_difference"])
    for pair in comparison["pairs"]:
        console.print(f"base:  {pair['base']}  ({models[pair['base']]})", soft_wrap=True)
        console.print(f"other: {pair['other']}  ({models[pair['other']]})", soft_wrap=True)
        console.print()
        rows = [*pair["tasks"], *([pair["all"]] if len(pair["tasks"]) > 1 else [])]
        console.print(_differences(rows))
        console.print()
        if pair["speed"]["tokens_per_forward"]:
            console.print(_ratios([*pair["tasks"], {"task": "all", "speed": pair["speed"]}]))
            console.print()
        _notes(console, pair, flips)
        console.print()
    console.print("score: %, by a task's first metric   all: mean over tasks")
    console.print("difference: other less base, in points, with its paired 95% interval")
    console.print("p: McNemar's exact test   MDE: what would be found 4 times of 5, in points")
    console.print(MACHINE)


def _print_protocols(console: Console, differences: Sequence[str]) -> None:
    if differences:
        console.print("asked or read differently (base / other):")
        for line in differences:
            console.print(f"  {line}")
        console.print()


def print_tax(result: Mapping[str, Any], folder: Path) -> None:
    """Every step of an adaptation: scores and speeds, over all tasks and of each."""
    console = Console(width=None if Console().is_terminal else 80, highlight=False, markup=False)
    _print_protocols(console, result["protocol_difference"])
    steps, last = result["steps"], result["against_parent"][-1]
    names = [entry["task"] for entry in last["tasks"]]
    of = {name: [next(e for e in step["tasks"] if e["task"] == name) for step in steps] for name in names}
    whole = {"all": [{**step["all"], "speed": step["speed"]} for step in steps]} if len(of) > 1 else {}
    for title, make in (("score", _steps), ("speed", _paces)):
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("", no_wrap=True)
        for name in ("score", "step", "p") if title == "score" else ("tok/s", "step", "tok/fwd", "step"):
            table.add_column(name, justify="right", no_wrap=True)
        for task, entries in {**whole, **of}.items():
            make(table, task, result["names"], entries)
        console.print(table)
        console.print()
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("all, from the parent to", no_wrap=True)
    for name in ("score", "p", "tok/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for total in result["against_parent"]:
        pace = _ratio(total["speed"]["tokens_per_second"])
        table.add_row(f"  {total['step']}", signed(total["all"]), _chance(total["all"]["mcnemar_p"]), pace)
    console.print(table)
    console.print()
    for step in result["steps"]:
        _notes(console, {**step, "all": {"flips": {"gained": [], "lost": []}}}, False)
    console.print("score: %, with its 95% interval   all: mean over tasks")
    console.print("step: from the line above, in points, paired, or as a ratio   p: McNemar's test")
    console.print(MACHINE)
    console.print(f"folder: {folder}  (each run is a folder below points/)", soft_wrap=True)


def _steps(table: Table, task: str, names: Sequence[str], entries: Sequence[Mapping[str, Any]]) -> None:
    """Scores after each step, the parent's first."""
    table.add_row(task)
    scores = [entries[0]["base"], *(entry["other"] for entry in entries)]
    for name, found, entry in zip(names, scores, (None, *entries), strict=True):
        step = (signed(entry), _chance(entry["mcnemar_p"])) if entry else ()
        table.add_row(f"  {name}", score({"score": found["mean"], **found}), *step)


def _paces(table: Table, task: str, names: Sequence[str], entries: Sequence[Mapping[str, Any]]) -> None:
    """Speeds after each step; nothing of tasks that do not write."""
    speeds = [(entry["speed"]["tokens_per_second"], entry["speed"]["tokens_per_forward"]) for entry in entries]
    if speeds[0][1] is None:
        return
    table.add_row(task)
    table.add_row(f"  {names[0]}", number(speeds[0][0] and speeds[0][0]["base"]), "", number(speeds[0][1]["base"], 2))
    for name, (second, forward) in zip(names[1:], speeds, strict=True):
        cells = (number(second and second["other"]), _ratio(second), number(forward["other"], 2), _ratio(forward))
        table.add_row(f"  {name}", *cells)


def _chance(p: float | None) -> str:
    return "–" if p is None else f"{p:.3f}" if p >= 0.001 else "<.001"


def _ratio(speed: Mapping[str, Any] | None) -> str:
    return f"{speed['ratio']:.2f} [{speed['low']:.2f}, {speed['high']:.2f}]" if speed else "–"


def signed(entry: Mapping[str, Any]) -> str:
    """An entry's difference in points with its interval."""
    mean, low, high = (100 * entry["difference"][name] for name in ("mean", "low", "high"))
    return f"{round(mean, 1) + 0.0:+.1f} [{round(low, 1) + 0.0:.1f}, {round(high, 1) + 0.0:.1f}]"


def _differences(entries: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("task", no_wrap=True)
    for name in ("base", "other", "difference", "p", "MDE", "n", "gained", "lost"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in entries:
        means = (f"{100 * entry[run]['mean']:.1f}" for run in ("base", "other"))
        rest = (_chance(entry["mcnemar_p"]), f"{100 * entry['mde']:.1f}", entry["n"], entry["c"], entry["b"])
        table.add_row(entry["task"], *means, signed(entry), *map(str, rest))
    return table


def _ratios(entries: Sequence[Mapping[str, Any]]) -> Table:
    """Speeds, two lines a task that writes."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("task", "speed"):
        table.add_column(name, no_wrap=True)
    for name in ("base", "other", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in entries:
        task = entry["task"]
        for name, unit, digits in (("tokens_per_second", "tok/s", 0), ("tokens_per_forward", "tok/fwd", 2)):
            if speed := entry["speed"][name]:
                values = (number(speed[run], digits) for run in ("base", "other"))
                table.add_row(task, unit, *values, _ratio(speed))
                task = ""
    return table


def _notes(console: Console, pair: Mapping[str, Any], flips: bool) -> None:
    """What flipped, what was left out, and what to mind."""
    for name, what in (("gained", "right only in other"), ("lost", "right only in base")):
        if keys := pair["all"]["flips"][name]:
            console.print(f"{what}: {_listed(keys, None if flips else 3)}")
    for why, keys in pair["unpaired"].items():
        if keys:
            console.print(f"left out, {why}: {_listed(keys, 3)}")
    if pair["speed"]["tokens_per_forward"] and pair["speed"]["not_compared"]:
        console.print(f"tok/s do not compare: {'; '.join(pair['speed']['not_compared'])}")
    for folder, over in pair["unhealthy"].items():
        if over:
            console.print(f"over a health gate's threshold in {folder}: {', '.join(over)}")


def _listed(keys: Sequence[str], most: int | None) -> str:
    more = ", …" if most is not None and len(keys) > most else ""
    return f"{len(keys)} ({', '.join(keys[:most])}{more})"


def print_audit(found: Mapping[str, Any]) -> None:
    """The verdict, and where texts differ."""
    console = Console(width=None if Console().is_terminal else 80, highlight=False, markup=False)
    decoder, sampled = found["decoder"], found["distribution"]
    settings = ", ".join(f"{k}={v}" for k, v in decoder.items() if k != "name")
    console.print(f"{found['model']}  decoder {decoder['name']} ({settings})")
    console.print(f"against {'sampled' if sampled else 'greedy'} AR of the same weights, {found['dtype']}")
    console.print()
    console.print(
        f"{found['identical']:,} of {found['n']:,} texts are AR's; {found['agreeing_tokens']:,} of "
        f"{found['tokens']:,} tokens, ends included, stand before a difference"
    )
    if sampled:
        few = "" if sampled["n"] >= ENOUGH else f"; {ENOUGH:,} tokens would say more"
        console.print(
            f"distribution: chi-square {sampled['statistic']:.1f} on {sampled['dof']} degrees of freedom, "
            f"p = {sampled['p']:.2g}, over {sampled['n']:,} tokens{few}"
        )
    if found["divergences"]:
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("sample", overflow="fold")
        for name in ("place", "ours", "AR's", "margin", f"in {found['recheck']}"):
            table.add_column(name, justify="right", no_wrap=name not in ("ours", "AR's"))
        table.add_column("again")
        table.add_column("verdict", no_wrap=True)
        for each in found["divergences"][:MOST_DIVERGENCES]:
            table.add_row(
                each["key"], str(each["place"]), json.dumps(each["ours"]), json.dumps(each["theirs"]),
                f"{each['margin']:.2g}", f"{each['margin_fp32']:.2g}",
                "agrees" if each["agrees_in_fp32"] else "differs", each["verdict"].removeprefix("numerical "),
            )  # fmt: skip
        console.print(table)
        if len(found["divergences"]) > MOST_DIVERGENCES:
            console.print(f"and {len(found['divergences']) - MOST_DIVERGENCES} more (--json)")
        console.print(
            f"margin: likeliest minus second likeliest token, nats; rounding explains {found['tolerance']:.2g}"
        )
        console.print(f"again: both written anew in {found['recheck']}")
    if not found["promises"]:
        console.print("this decoder does not promise AR's text")
    console.print(f"verdict: {found['verdict']}")


def print_khead(found: Mapping[str, Any]) -> None:
    """Strides by task; calibration and policies over all tasks."""
    console = Console(width=None if Console().is_terminal else 80, highlight=False, markup=False)
    tau = "unknown" if found["tau"] is None else f"{found['tau']:g}"
    console.print(found["model"])
    console.print(f"K-head of tau {tau}, K_max {found['k_max']}, slot budget {found['slot_budget']}")
    console.print()
    tasks = _plain("task", ("places", "said", "possible", "K*", "best fixed", "regret"))
    for name, task in found["tasks"].items():
        tasks.add_row(
            name, f"{task['positions']:,}", number(task["predicted"], 2), number(task["possible"], 2),
            number(task["k_star"], 2), str(task["best_fixed"]), f"{100 * task['regret']:+.1f}%",
        )  # fmt: skip
    console.print(tasks)
    console.print()
    whole = found["tasks"]["all"]
    said, steps = (
        {row[name]: row for row in whole[part]} for part, name in (("calibration", "predicted"), ("by_step", "step"))
    )
    strides = _plain("stride", ("said", "possible then", "reached", "right up to here"))
    for k, step in steps.items():
        row = said.get(k, {"n": 0, "mean_possible": None, "reached": None})
        strides.add_row(
            str(k),
            f"{row['n']:,}",
            number(row["mean_possible"], 2),
            _percent(row["reached"]),
            _percent(step["accepted"]),
        )
    console.print(strides)
    console.print()
    policies = _plain("policy", ("forwards/token", "slots/token", "cost/token"))
    told = ("K-head", f"fixed {whole['best_fixed']}", "fixed 1", f"fixed {found['k_max']}", "oracle")
    for policy in whole["policies"]:
        if policy["name"] in told:
            names = ("forwards_per_token", "slots_per_token", "cost_per_token")
            policies.add_row(policy["name"], *(number(policy[name], 3) for name in names))
    console.print(policies)
    console.print()
    console.print("said: the K-head's mean stride, or places where it says this one")
    console.print("possible: tokens that a full draft gets right   reached: as many as it said")
    console.print("cost: forwards, and a slot as one over the slot budget")
    console.print("regret: of the K-head's cost over the best fixed stride's, chosen on these texts")


def _plain(first: str, others: Sequence[str]) -> Table:
    """A table without lines: a name, then numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}%"


def print_plan(plan: Plan, estimate: Estimate, folder: Path) -> None:
    """What a sweep would do."""
    console = Console(width=None if Console().is_terminal else 80, highlight=False, markup=False)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("point", no_wrap=True)
    table.add_column("settings")
    for point in plan.points:
        table.add_row(point.name, ", ".join(f"{name}={value}" for name, value in point.settings.items()))
    console.print(table)
    if plan.merged:
        console.print(f"{plan.merged} points of the grid are the same run as another and are run once")
    if not estimate.tried:
        console.print(f"{len(plan.points)} points; no sample is missing")
        return
    hours, minutes = divmod(round(estimate.seconds / 60), 60)
    about = f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{estimate.seconds:.0f} s"
    console.print(
        f"{len(plan.points)} points, {estimate.samples:,} samples to answer, about {estimate.forwards:,.0f} forwards "
        f"and {about} (from {estimate.tried} samples answered just now; larger batches take less)"
    )
    console.print(f"folder: {folder} (nothing is written yet)", soft_wrap=True)


def print_sweep(result: Mapping[str, Any], folder: Path) -> None:
    """A sweep's points, the fastest first, and where everything is."""
    console = Console(width=None if Console().is_terminal else 80, highlight=False, markup=False)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    table.add_column("point")
    for name in ("score", "tok/s", "tok/fwd", "fwd/ans"):
        table.add_column(name, justify="right", no_wrap=True)
    by, notes = result["by"], list[str]()
    unhealthy = {gate["point"] for gate in result.get("health", []) if not gate["ok"]}
    speed = {p["name"]: (p[by] or {"mean": 0.0})["mean"] for p in result["points"]}
    sign = 1 if by == "forwards_per_answer" else -1
    for point in sorted(result["points"], key=lambda p: sign * speed[p["name"]]):
        place = score({"score": point["score"]["mean"], **point["score"]})
        means = [(point[name] or {"mean": None})["mean"] for name in PACES]
        mark = "*" if point["name"] in result["frontier"] else "-" if point["dominated_by"] else ""
        mark = ("x" if point["stopped"] else mark) + ("!" if point["name"] in unhealthy else "")
        table.add_row(mark, point["name"], place, number(means[0]), number(means[1], 2), number(means[2], 1))
        if point["stopped"]:
            notes.append(f"{point['name']}: ended early, {point['stopped']}")
    console.print(table)
    console.print()
    if "so_far" in result:
        console.print(f"so far: the first {result['so_far']:.0%} of each task's documents")
    console.print("*: on the frontier   -: surely beaten: another is no worse, and faster")
    if notes:
        console.print("x: ended early")
    if unhealthy:
        console.print("!: a health gate is over its threshold; result.json tells which")
    console.print("score: mean over tasks, %, with its 95% bootstrap interval   tok/s: per worker")
    if result["best"] is not None:
        against = result["baseline"] or "the best score"
        console.print(f"fastest that scores at most {result['within']:g} (%) less than {against}: {result['best']}")
    for decoder, area in result["aup"].items():
        console.print(f"area under the accuracy-parallelism curve, {decoder}: {area:.1f}")
    for note in notes:
        console.print(note)
    for key, reason in result["lost"].items():
        console.print(f"given up, and in no score: {key} ({reason})")
    files = "frontier.png .svg .csv .parquet .md .tex" if result["figure"] else "frontier.csv .parquet .md .tex"
    console.print(f"folder: {folder}  ({files}; each point is a run folder below points/)", soft_wrap=True)
