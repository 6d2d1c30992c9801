"""What an audit and the K-head's diagnostics print."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from .terminal import bare_table, number, screen

MOST_DIVERGENCES = 12
"""Divergences an audit prints."""


def print_audit(found: Mapping[str, Any]) -> None:
    """The verdict, and where texts differ."""
    console = screen()
    decoder, sampled = found["decoder"], found["distribution"]
    settings = ", ".join(f"{k}={v}" for k, v in decoder.items() if k != "name")
    console.print(f"{found['model']}  decoder {decoder['name']} ({settings})")
    console.print(f"against {'sampled' if sampled else 'greedy'} AR of the same weights, {found['dtype']}")
    console.print()
    same = "AR's with the same random numbers" if sampled else "AR's"
    console.print(
        f"{found['identical']:,} of {found['n']:,} texts are {same}; {found['agreeing_tokens']:,} of "
        f"{found['tokens']:,} tokens, ends included, stand before a difference"
    )
    if sampled:
        console.print(
            f"ranks: chi-square {sampled['statistic']:.1f} on {sampled['dof']} degrees of freedom over "
            f"{sampled['n']:,} tokens, p = {sampled['p_ranks']:.2g}"
        )
        expected = sampled["n"] * sampled["rare_below"]
        console.print(
            f"rare: {sampled['rare']:,} tokens of a chance below {sampled['rare_below']:g}, at most {expected:.2g} "
            f"expected, p = {sampled['p_rare']:.2g}"
        )
        console.print(f"both together: p = {sampled['p']:.2g}")
    if found["divergences"]:
        table = bare_table()
        table.add_column("sample", overflow="fold")
        for name in ("place", "ours", "AR's", "margin", f"in {found['recheck']}"):
            table.add_column(name, justify="right", no_wrap=name not in ("ours", "AR's"))
        table.add_column("again")
        table.add_column("verdict", no_wrap=True)
        for each in found["divergences"][:MOST_DIVERGENCES]:
            table.add_row(
                each["key"], str(each["place"]), json.dumps(each["ours"]), json.dumps(each["theirs"]),
                f"{each['margin']:.2g}", f"{each['margin_recheck']:.2g}",
                "agrees" if each["agrees_in_recheck"] else "differs", each["verdict"].removeprefix("numerical "),
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
    few = f" (under {sampled['enough']:,} tokens)" if found["verdict"] == "undecided" else ""
    console.print(f"verdict: {found['verdict']}{few}")


def print_khead(found: Mapping[str, Any]) -> None:
    """Strides by task; calibration and policies over all tasks."""
    console = screen()
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
    table = bare_table()
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}%"
