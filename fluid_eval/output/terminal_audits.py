"""Losslessness audits and K-head diagnostics on the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from .terminal import bare_table, number, plain_table, screen

MOST_DIVERGENCES = 12
"""Divergences printed at most."""


def print_audit(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print an audit: agreement with AR, tests or divergences, the verdict. console: default standard output."""
    console = console or screen()
    # 1) the run and how far it agrees
    decoder, sampled = report["decoder"], report["distribution"]
    settings = ", ".join(f"{k}={v}" for k, v in decoder.items() if k != "name")
    console.print(f"{report['model']}  decoder {decoder['name']}" + (f" ({settings})" if settings else ""))
    console.print(f"against {'sampled' if sampled else 'greedy'} AR of the same weights, {report['dtype']}")
    console.print()
    same = "AR's with the same random numbers" if sampled else "AR's"
    console.print(
        f"{report['identical']:,} of {report['n']:,} texts are {same}; {report['agreeing_tokens']:,} of "
        f"{report['tokens']:,} tokens, ends included, agree before the first difference"
    )
    # 2) sampled text: both tests
    if sampled:
        console.print(
            f"ranks: chi-square {sampled['statistic']:.1f} on {sampled['dof']} degrees of freedom over "
            f"{sampled['n']:,} tokens, p = {sampled['p_ranks']:.2g}"
        )
        expected = sampled["n"] * sampled["rare_below"]
        console.print(
            f"rare: {sampled['rare']:,} tokens with probability below {sampled['rare_below']:g}, "
            f"at most {expected:.2g} expected, p = {sampled['p_rare']:.2g}"
        )
        console.print(f"both together: p = {sampled['p']:.2g}")
    # 3) greedy text: the divergences
    if report["divergences"]:
        console.print(_divergences(report))
        if len(report["divergences"]) > MOST_DIVERGENCES:
            console.print(f"and {len(report['divergences']) - MOST_DIVERGENCES} more (--json)")
        console.print(
            f"margin: likeliest minus second likeliest token, nats; rounding explains {report['tolerance']:.2g}"
        )
        if report["recheck"]:
            console.print(f"recheck: both decoded again in {report['recheck']}")
    # 4) the verdict
    if not report["promises"]:
        console.print("this decoder does not promise AR's text")
    few = f" (under {sampled['enough']:,} tokens)" if report["verdict"] == "undecided" else ""
    console.print(f"verdict: {report['verdict']}{few}")


def _divergences(report: Mapping[str, Any]) -> Table:
    """The first difference of each text from AR's."""
    table = bare_table()
    table.add_column("sample", overflow="fold")
    recheck = [f"in {report['recheck']}"] if report["recheck"] else []
    for name in ("place", "ours", "AR's", "margin", *recheck):
        table.add_column(name, justify="right", no_wrap=name not in ("ours", "AR's"))
    if recheck:
        table.add_column("recheck")
    table.add_column("verdict", no_wrap=True)
    for each in report["divergences"][:MOST_DIVERGENCES]:
        again: tuple[str, ...] = ()
        if recheck:
            again = (f"{each['margin_recheck']:.2g}", "agrees" if each["agrees_in_recheck"] else "differs")
        table.add_row(
            each["key"], str(each["place"]), json.dumps(each["ours"]), json.dumps(each["theirs"]),
            f"{each['margin']:.2g}", *again, each["verdict"].removeprefix("numerical "),
        )  # fmt: skip
    return table


def print_khead(report: Mapping[str, Any]) -> None:
    """Print K-head diagnostics: strides by task, then calibration and draft policies over all tasks."""
    console = screen()
    tau = "unknown" if report["tau"] is None else f"{report['tau']:g}"
    console.print(report["model"])
    console.print(f"K-head of tau {tau}, K_max {report['k_max']}, slot budget {report['slot_budget']}")
    overall = report["tasks"]["all"]
    for table in (_tasks(report["tasks"]), _calibration(overall), _policies(overall, report["k_max"])):
        console.print()
        console.print(table)
    console.print()
    console.print("head: the K-head's mean stride, or places where it predicts this stride")
    console.print("possible: tokens accepted of a full draft   reached: all predicted were accepted")
    console.print("cost: forwards + slots / slot budget, per token")
    console.print("regret: K-head's cost over the best fixed stride's (chosen on these texts), less 1")


def _tasks(tasks: Mapping[str, Any]) -> Table:
    """Predicted and possible strides by task."""
    table = plain_table("task", ("places", "head", "possible", "K*", "best fixed", "regret"))
    for name, task in tasks.items():
        table.add_row(
            name, f"{task['positions']:,}", number(task["predicted"], 2), number(task["possible"], 2),
            number(task["k_star"], 2), str(task["best_fixed"]), f"{100 * task['regret']:+.1f}%",
        )  # fmt: skip
    return table


def _calibration(overall: Mapping[str, Any]) -> Table:
    """For each stride: how often the K-head predicts it, how often it is possible then, and anywhere."""
    never = {"n": 0, "mean_possible": None, "reached": None}
    predicted = {row["predicted"]: row for row in overall["calibration"]}
    table = plain_table("stride", ("head", "possible then", "reached", "accepted up to here"))
    for step in overall["by_step"]:
        row = predicted.get(step["step"], never)
        table.add_row(
            str(step["step"]), f"{row['n']:,}", number(row["mean_possible"], 2), _percent(row["reached"]),
            _percent(step["accepted"]),
        )  # fmt: skip
    return table


def _policies(overall: Mapping[str, Any], k_max: int) -> Table:
    """Costs of the K-head, of three fixed strides and of the oracle."""
    shown = ("K-head", f"fixed {overall['best_fixed']}", "fixed 1", f"fixed {k_max}", "oracle")
    table = plain_table("policy", ("forwards/token", "slots/token", "cost/token"))
    for policy in overall["policies"]:
        if policy["name"] in shown:
            costs = (policy[name] for name in ("forwards_per_token", "slots_per_token", "cost_per_token"))
            table.add_row(policy["name"], *(number(cost, 3) for cost in costs))
    return table


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}%"
