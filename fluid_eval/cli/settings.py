"""`fluid-eval settings`."""

from __future__ import annotations

import argparse
import json

HELP = "list settings with type, default and meaning"
EXAMPLE = "fluid-eval settings decoder.confidence"


def add(settings: argparse.ArgumentParser) -> None:
    settings.add_argument("name", nargs="?", metavar="NAME", help="a setting, the start of names (chat.), or a decoder")
    settings.add_argument("--json", action="store_true", help="print the list as JSON")


def main(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from rich.padding import Padding

    from ..common.settings_list import settings_named
    from ..output.terminal import screen

    listed = settings_named(options.name)
    if options.json:
        print(json.dumps([asdict(setting) for setting in listed], indent=2))
        return 0
    console = screen()
    for setting in listed:
        owner = f"  (decoder {setting.decoder})" if setting.decoder else ""
        console.print(f"{setting.name}{owner}  {setting.type}, default {setting.default}")
        console.print(Padding(setting.about, (0, 0, 0, 4)))
    console.print("\nset by --set NAME=VALUE, or in a TOML file; chat is on with any chat setting")
    return 0
