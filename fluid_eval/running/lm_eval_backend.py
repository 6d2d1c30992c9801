"""Our decoders as a model of lm-eval's own command, for any of its tasks:

    lm_eval --model fluid-eval --model_args pretrained=MODEL,decoder=fluid,confidence=0.9 --tasks arc_easy

lm-eval after 0.4.13 finds the model by its entry point. For 0.4.13, which looks for none, this module is the command:
`python -m fluid_eval.running.lm_eval_backend --model fluid-eval …`. Tokens and forwards are in lm-eval's results file
below "config", as "fluid_eval".
"""

from __future__ import annotations

import atexit
import sys
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.registry import model_registry

from fluid_model.common.errors import ConfigError

from ..benchmarks import chat_template
from ..benchmarks.lm_eval_tasks import Tasks
from ..common.libraries import set_library_defaults
from ..common.progress import ProgressBar
from ..common.spec import ChatSpec, ModelSpec, RunSpec
from ..results.metrics import cost
from ..results.sample_records import Record
from .chunks import Pool
from .given_values import nested, spec_from
from .job import prepare
from .lm_eval_model import FluidLM
from .workers import open_pool

NAME = "fluid-eval"
DEFAULT_DEVICE = "cuda:0"
"""What lm-eval's command passes where no device is named, on machines without CUDA too."""
NO_TASKS: Tasks = {"tasks": {}, "groups": {}}
"""lm-eval loads the tasks itself."""


class LmEvalBackend(FluidLM):
    """A checkpoint and its decoder, built from lm-eval's --model_args. Its answers are kept in memory."""

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        device: str | None = None,
        **settings: Any,
    ) -> None:
        """pretrained: folder or hub id.  batch_size, max_batch_size, device: as lm-eval's command passes them.

        settings: `decoder`, a field of the model (dtype, base, ...), a setting of the decoder (confidence, ...), or any
        setting of a run by its dotted name.
        Raises ConfigError for unknown settings, and if the model cannot be decoded so.
        """
        set_library_defaults()
        named = {"model.path": pretrained, **{_full_name(name): value for name, value in settings.items()}}
        if device not in (None, DEFAULT_DEVICE):
            named["model.device"] = device
        rows = "auto" if str(batch_size).startswith("auto") else int(batch_size)
        spec = spec_from({"tasks": [NAME], "batch_size": rows, **nested(named)})
        ready = prepare(spec, NO_TASKS)
        print(ready.decoder, file=sys.stderr)
        self._opened: Pool | None = None
        self._memory = AnswersInMemory(spec)
        assert ready.window is not None, "only a backend's run has none"
        super().__init__(ready.tokenizer, ready.window, self._workers, self._memory, ProgressBar)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, in request order. Raises ConfigError for a request to sample, which is the decoder's decision."""
        for instance in requests:
            options = instance.args[1]
            if options.get("do_sample") and options.get("temperature", 1.0) > 0:
                raise ConfigError(
                    f"task {instance.task_name} asks for sampling; here the decoder decides: "
                    "--model_args temperature=T, and --gen_kwargs do_sample=False"
                )
        return super().generate_until(requests, disable_tqdm)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation, by the tokenizer's template. lm-eval calls this with --apply_chat_template."""
        if self._chat is None:
            spec = self._run.spec
            self._chat = chat_template.open_chat(spec.chat or ChatSpec(), self.tokenizer, spec.model.path)
            self._end_of_thinking = self._chat.cut if self._chat else None
        return super().apply_chat_template(chat_history, add_generation_prompt)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes below "config" of its results file: the decoder, and what the answers cost."""
        spec, records = self._memory.spec, list(self._memory.samples.values())
        tasks = dict.fromkeys(record["task"] for record in records)
        by_task = {task: _cost([record for record in records if record["task"] == task]) for task in tasks}
        facts = self._workers().facts(spec)
        return {
            "fluid_eval": {
                **{name: spec.to_dict()[name] for name in ("model", "decoder", "seed")},
                "engine": facts,
                **_cost(records),
                "by_task": by_task,
            }
        }

    def _workers(self) -> Pool:
        """The workers, started when the first answer is missing."""
        if self._opened is None:
            self._opened = open_pool(self._run.spec)
            atexit.register(self._opened.close)  # lm-eval never says that it has finished
        return self._opened


class AnswersInMemory:
    """The part of a run folder (`results.run_folder.Run`) that answers need, without files. samples: records by key."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self.folder = Path("lm-eval")
        self.samples = RecordsInMemory()

    def append(self, record: Record) -> None:
        """Keep a record."""
        self.samples[record["key"]] = record


class RecordsInMemory(dict[str, Record]):
    """Records by key."""

    def prompt_hash(self, key: str) -> str | None:
        """The hash of a record's prompt; None if there is no such record."""
        return str(self[key]["prompt_hash"]) if key in self else None


def _full_name(name: str) -> str:
    """The setting that an argument of --model_args means."""
    if "." in name or name in {field.name for field in fields(RunSpec)} - {"decoder"}:
        return name
    if name == "decoder":
        return "decoder.name"
    return f"{'model' if name in {field.name for field in fields(ModelSpec)} else 'decoder'}.{name}"


def _cost(records: list[Record]) -> Mapping[str, Any]:
    """The cost of some answers, see `results.metrics.Cost`."""
    return asdict(cost(records))


def main() -> None:
    """lm-eval's command, with fluid-eval among its models."""
    import lm_eval.models  # noqa: F401  # the registry fills itself only while it is empty
    from lm_eval.__main__ import cli_evaluate

    if NAME not in model_registry:
        model_registry.register(NAME, target=LmEvalBackend)
    cli_evaluate()


if __name__ == "__main__":
    main()
