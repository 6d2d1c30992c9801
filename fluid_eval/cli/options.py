"""Settings shared by commands that run a model: from a spec file, then flags, then `--set`; later ones win."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluid_model.common.errors import ConfigError

from . import EXIT_FAILED, EXIT_OK, EXIT_UNHEALTHY, lm_eval_names

if TYPE_CHECKING:
    from ..common.spec import ModelSpec, RunSpec

BUNDLED = "tiny-fluid"
"""The checkpoint of a run without --model."""
BUNDLED_TASKS = "mini_gsm8k,mini_math,mini_humaneval,mini_mmlu"
WRITTEN_TASKS, WRITTEN_LIMIT = "mini_gsm8k,mini_math", 20
"""Tasks, and documents of each, of runs made for an audit or K-head diagnostics without --tasks."""

_FLAGS = {
    "tasks": "tasks",
    "tasks_dir": "tasks_dir",
    "model": "model.path",
    "decoder": "decoder.name",
    "backend": "backend.name",
    "dtype": "model.dtype",
    "device": "model.device",
    "data_dir": "data_dir",
    "limit": "limit",
    "num_fewshot": "num_fewshot",
    "max_new_tokens": "max_new_tokens",
    "profile": "profile",
    "batch_size": "batch_size",
    "engine": "engine.kind",
    "workers": "engine.workers",
    "ray_address": "engine.ray_address",
    "seed": "seed",
    "allow_unsafe_code": "allow_unsafe_code",
    "trust_remote_code": "model.trust_remote_code",
}
"""Flag -> setting of the spec."""


def add_settings(
    run: argparse.ArgumentParser, spec: str = "SPEC.toml", about: str = "settings from a file; flags override it"
) -> argparse._ArgumentGroup:
    """Add the settings of a run. Returns the group "where". spec, about: name and help of the positional argument."""
    run.add_argument("spec", nargs="?", type=Path, metavar=spec, help=about)
    what = run.add_argument_group("what to run")
    what.add_argument(
        "--tasks", metavar="A,B", help="tasks, groups, tags of lm-eval, patterns ('arc_*'); fluid-eval tasks lists them"
    )
    what.add_argument("--tasks-dir", metavar="DIR", help="folder with your own lm-eval task files")
    what.add_argument(
        "--model",
        metavar="PATH_OR_HUB_ID",
        help="Hugging Face causal LM, or an adapted checkpoint; a bundled one by name; default: tiny-fluid",
    )
    what.add_argument(
        "--decoder", metavar="NAME", help="`fluid-eval decoders` lists them; default: that of the model, else ar"
    )
    what.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="any setting, e.g. decoder.confidence=0.9"
    )
    what.add_argument("--limit", type=integer, metavar="N", help="first N documents of each task")
    what.add_argument("--num-fewshot", type=integer, metavar="N", help="few-shot examples; default: the task's own")
    what.add_argument(
        "--max-new-tokens", type=integer, metavar="N", help="length limit of answers; default: the task's own"
    )
    what.add_argument(
        "--profile", metavar="NAME|FILE", help="protocol: lm-eval (default), fluid-paper, llada, minimal, my.toml"
    )
    what.add_argument("--chat", action="store_true", help="use the chat template; --set chat.system=TEXT, ...")
    what.add_argument("--seed", type=integer, metavar="N", help="random seed; default: 1234")
    what.add_argument(
        "--trust-remote-code", action="store_const", const=True, help="run code from the model's repository"
    )
    what.add_argument(
        "--allow-code", action="store_true", help=argparse.SUPPRESS
    )  # from before generated code was isolated
    where = run.add_argument_group("where")
    where.add_argument("--data-dir", metavar="DIR", help="benchmark data; default: FLUID_DATA_DIR, else the hub")
    where.add_argument("--batch-size", type=integer, metavar="N|auto", help="rows decoded together")
    where.add_argument("--dtype", metavar="auto|float32|bfloat16|int8")
    where.add_argument("--device", metavar="auto|cpu|cuda")
    where.add_argument("--engine", metavar="inline|ray", help="decode in this process (default), or in Ray workers")
    where.add_argument("--workers", type=integer, metavar="N", help="Ray workers; default: one for each GPU")
    where.add_argument(
        "--allow-unsafe-code", action="store_const", const=True, help="run generated code without isolation"
    )
    where.add_argument("--ray-address", metavar="HOST:PORT", help="default: RAY_ADDRESS, else a private cluster")
    lm_eval_names.add(run)
    return where


def add_speed_repeats(where: argparse._ArgumentGroup) -> None:
    """Add --speed-repeats, for commands that measure speeds."""
    where.add_argument(
        "--speed-repeats", type=int, default=0, metavar="N",
        help="generate all answers N more times to time them; without, tokens/s have no interval",
    )  # fmt: skip


def add_track(where: argparse._ArgumentGroup) -> None:
    """Add --track, for commands that finish runs."""
    where.add_argument(
        "--track", choices=("wandb", "mlflow", "tensorboard", "trackio"), help="log the finished result there too"
    )  # fmt: skip


def exit_code(failed: Mapping[str, str], health: Sequence[Mapping[str, Any]]) -> int:
    """Exit code of a finished run: failed samples win over health gates above their thresholds."""
    unhealthy = any(not gate["ok"] for gate in health)
    return EXIT_FAILED if failed else EXIT_UNHEALTHY if unhealthy else EXIT_OK


def add_analysed_run(command: argparse.ArgumentParser) -> None:
    """Add the run to analyse: a stored one, or settings of a run to make first."""
    where = add_settings(command, "RUN|SPEC.toml", "a finished run, or settings of a new one from a file")
    where.add_argument("--out", type=Path, metavar="DIR", help="keep the new run in this folder")
    where.add_argument("--json", action="store_true", help="print the result as JSON")


@contextmanager
def analysed_run(options: argparse.Namespace) -> Iterator[Path]:
    """The folder of the named stored run, or of a new run, which is kept in --out or removed afterwards.

    Raises ConfigError if settings are given with a stored run, which has its own.
    """
    if options.spec is not None and options.spec.is_dir():
        name_own_decoder(options)
        _refuse_settings(options, allowed=())
        yield options.spec
        return
    if options.spec is None and options.tasks is None:
        options.tasks = WRITTEN_TASKS
        options.limit = options.limit or WRITTEN_LIMIT
    spec = spec_of(options)
    say_which_model(options)
    from ..running.job import run

    with tempfile.TemporaryDirectory() as spare:
        folder = options.out or Path(spare) / "run"
        run(spec, folder)
        yield folder


def given_model(options: argparse.Namespace) -> ModelSpec | None:
    """The model whose weights a stored run is audited against, by --model, --dtype and --device; None: the run's own.

    Raises ConfigError for other settings.
    """
    from ..common.bundled import resolved
    from ..common.spec import ModelSpec

    _refuse_settings(options, allowed=("model", "dtype", "device", "trust_remote_code"))
    values = {name: getattr(options, name) for name in ("dtype", "device", "trust_remote_code")}
    given = {name: value for name, value in values.items() if value is not None}
    if options.model is None and given:
        raise ConfigError(f"--{next(iter(given))}: name the weights too, by --model")
    return None if options.model is None else ModelSpec(resolved(options.model), **given)


def _refuse_settings(options: argparse.Namespace, allowed: Sequence[str]) -> None:
    """Raise ConfigError if settings are given with a stored run, but for the allowed ones."""
    names = [name for name in (*_FLAGS, "set", "chat", "out") if name not in allowed]
    given = [name for name in names if getattr(options, name, None) not in (None, [], False)]
    if given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError(f"{options.spec} is a stored run with its own settings: drop {flags}, or name no run")


def arguments(text: str) -> dict[str, Any]:
    """NAME=VALUE,... as lm-eval's --model_args has them: numbers, true, false and none, other values as text.

    Raises ConfigError for a part without "=".
    """
    values: dict[str, Any] = {}
    for pair in filter(None, text.split(",")):
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--backend-args {pair!r}: write NAME=VALUE,NAME=VALUE")
        values[name.strip()] = _value(value)
    return values


def _value(text: str) -> Any:
    """A value as lm-eval reads it."""
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def name_own_decoder(options: argparse.Namespace) -> None:
    """Import `--decoder MODULE:CLASS` for a stored run, whose decoder it must be; its settings are the run's."""
    if options.decoder and ":" in options.decoder:
        from fluid_model.registry import decoder_named

        decoder_named(options.decoder)
        options.decoder = None


def integer(text: str) -> int | str:
    """An integer, or the text itself, which the spec refuses with a message."""
    try:
        return int(text)
    except ValueError:
        return text


def spec_of(options: argparse.Namespace) -> RunSpec:
    """The run's spec, with the decoder of its model if none is named."""
    from ..running.given_values import spec_from

    return spec_from(values_of(options))


def values_of(options: argparse.Namespace) -> dict[str, Any]:
    """The values of a spec: from its file, then flags, then --set."""
    # 1) file
    from fluid_model.common.fields import assign, put
    from fluid_model.common.files import read_toml

    from ..common.spec import tables
    from ..running.given_values import completed

    values = tables(read_toml(options.spec) if options.spec else {})
    has_writer = bool(getattr(options, "backend", None) or "backend" in values)
    options.is_bundled = options.model is None and "model" not in values and not has_writer
    if options.is_bundled:
        _take_bundled(values, options)
    # 2) flags
    if options.decoder and values.get("decoder", {}).get("name", options.decoder) != options.decoder:
        values["decoder"] = {}  # of another decoder
    for flag, name in _FLAGS.items():
        if (value := getattr(options, flag, None)) is not None:
            put(values, name, value)
    if (args := getattr(options, "backend_args", None)) is not None:
        if not isinstance(values.get("backend"), Mapping):
            raise ConfigError("--backend-args: name the backend too, by --backend")
        put(values, "backend.args", {**values["backend"].get("args", {}), **arguments(args)})
    _say_what_is_hidden(options.model)
    if options.chat:
        values.setdefault("chat", {})
    # 3) --set, then what environment and profile add
    for setting in options.set:
        assign(values, setting)
    return completed(values)


def _say_what_is_hidden(model: str | None) -> None:
    """Print a notice where a folder hides the bundled checkpoint of its name."""
    from ..common.bundled import bundled

    if model in bundled() and Path(model).exists():
        print(f"model: the folder ./{model}, not the bundled checkpoint of that name", file=sys.stderr)


def say_which_model(options: argparse.Namespace) -> None:
    """Print a notice where no model was named.

    Called once the settings are known to be valid, so that it precedes no error.
    """
    if options.is_bundled:
        print(
            f"No model given: the bundled {BUNDLED}, 1.8M parameters, trained on the mini\n"
            "suite's kind of questions alone. For a real one, such as a 7B checkpoint:\n"
            "fluid-eval run --tasks gsm8k,math500 --model FOLDER_OR_HUB_ID\n",
            file=sys.stderr,
        )


def _take_bundled(values: dict[str, Any], options: argparse.Namespace) -> None:
    """Default model: the bundled tiny-fluid, on the mini suite unless tasks are given."""
    from ..common.paths import resource

    values["model"] = {"path": str(resource("checkpoints") / BUNDLED)}
    if options.tasks is None and "tasks" not in values:
        values["tasks"] = BUNDLED_TASKS
        values["allow_unsafe_code"] = True  # bundled weights; still isolated where possible
