"""Names that lm-eval's command has: those accepted here too, and what to write in place of the others.

`docs/coming-from-lm-eval.md` shows both tables. In any flag `_` may stand for `-`: --batch_size is --batch-size.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fluid_model.common.command_line import Parser

ACCEPTED = {
    "--tasks": "the same; separated by commas",
    "--model": "FOLDER_OR_HUB_ID: the model itself, not a backend's name",
    "--limit": "the same, as a whole number",
    "--num_fewshot": "the same",
    "--batch_size": "the same: a whole number or auto; it changes no answer",
    "--device": "auto, cpu or cuda; CUDA_VISIBLE_DEVICES chooses among several",
    "--seed": "one number",
    "--trust_remote_code": "the same",
    "--apply_chat_template": "--chat; with a name: --set chat.template=NAME",
    "--fewshot_as_multiturn": "--set chat.multiturn=true or false",
    "--gen_kwargs": "--set decoder.temperature=…, decoder.top_p=…, and --max-new-tokens",
    "--output_path": "--out: the run folder itself",
    "--log_samples": "nothing to ask for: every sample is kept in samples.jsonl",
    "--include_path": "--tasks-dir",
    "--confirm_run_unsafe_code": "nothing to confirm: generated code runs isolated",
}
"""Name of lm-eval -> its counterpart here. These may be written as they are."""
INSTEAD = {
    "--model-args": "write --model FOLDER_OR_HUB_ID, and --set model.dtype=… and others (fluid-eval settings model)",
    "--use-cache": "answers are kept in the run folder: the same command again, or --resume",
    "--cache-requests": "prompts are built anew in each run",
    "--system-instruction": "write --set chat.system=TEXT",
    "--max-batch-size": "write --batch-size N; auto finds what fits",
    "--samples": "write --limit N: the first N documents",
    "--predict-only": "answers are scored always; fluid-eval rescore scores them again",
    "--write-out": "prompts stand in samples.jsonl, and in fluid-eval report's page",
    "--show-config": "prompts, stops and extraction stand in result.json, under protocol",
    "--check-integrity": "data are compared with their known fingerprints in every run",
    "--config": "name the file alone: fluid-eval run SPEC.toml",
    "--metadata": "write --set NAME=VALUE (fluid-eval settings)",
    "--verbosity": "messages have one level",
}
"""Flag of lm-eval that is refused -> what the message says to write."""
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens")
_DECODER = ("temperature", "top_p")


def add(command: argparse.ArgumentParser) -> None:
    """Add the flags of ACCEPTED that have another name here, without showing them in --help."""
    hidden = argparse.SUPPRESS
    command.add_argument("--apply-chat-template", nargs="?", action=_ApplyChatTemplate, help=hidden)
    command.add_argument("--fewshot-as-multiturn", nargs="?", const="true", action=_Multiturn, help=hidden)
    command.add_argument("--gen-kwargs", nargs="+", action=_GenKwargs, help=hidden)
    command.add_argument("--output-path", dest="out", type=Path, help=hidden)
    command.add_argument("--include-path", dest="tasks_dir", help=hidden)
    for flag in ("--log-samples", "--confirm-run-unsafe-code"):
        command.add_argument(flag, action="store_true", help=hidden)
    if isinstance(command, Parser):
        command.instead = INSTEAD


class _ApplyChatTemplate(argparse.Action):
    """`--apply_chat_template [NAME]` as --chat."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.chat = True
        if values is not None:
            namespace.set = [*namespace.set, f'chat.template="{values}"']


class _Multiturn(argparse.Action):
    """`--fewshot_as_multiturn [true|false]`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.set = [*namespace.set, f"chat.multiturn={values.lower()}"]


class _GenKwargs(argparse.Action):
    """`--gen_kwargs temperature=0.8,top_p=0.95` as assignments of --set."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        pairs = [pair.strip() for word in values for pair in word.split(",") if pair.strip()]
        try:
            namespace.set = [*namespace.set, *settings_of(pairs)]
        except ValueError as error:
            parser.error(f"--gen-kwargs: {error}")


def settings_of(pairs: list[str]) -> Iterator[str]:
    """lm-eval's generation arguments as settings. Raises ValueError for one without a counterpart."""
    given = {name: value for name, _, value in (pair.partition("=") for pair in pairs)}
    for name, value in given.items():
        if name in _LIMITS:
            yield f"max_new_tokens={value}"
        elif name in _DECODER:
            yield f"decoder.{name}={value}"
        elif name == "do_sample":
            if value.lower() != "false" and float(given.get("temperature") or 0) <= 0:
                raise ValueError("do_sample=true needs a temperature above 0: temperature=0.8,top_p=0.95")
        elif name == "until":
            raise ValueError("until: stops belong to the protocol; write a profile with them, --profile my.toml")
        else:
            raise ValueError(
                f"{name or '(nothing)'} is unknown; known: {', '.join((*_DECODER, *_LIMITS[:1]))}, do_sample"
            )
