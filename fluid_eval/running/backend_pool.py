"""A model of lm-eval's own as the pool: another program writes the answers, in text.

    TextRequest(key, Instances) … ──BackendPool.run──▶ calls of up to ROWS_A_CALL requests ──▶ TextAnswer(key, text, …)

Forwards are not known. Seconds are wall time: a call's, shared out evenly over its answers. Tokens are what the server
says in `usage` where it does, else those of the text encoded again by the backend's tokenizer, else unknown.
"""

from __future__ import annotations

import inspect
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import get_model, model_registry

from fluid_model.common.errors import ConfigError, RunError, reason

from ..common.spec import RunSpec
from ..results.sample_records import UNKNOWN
from .answering_lm import text_of
from .chunks import Chunk, FailedRequest

ROWS_A_CALL = 64
"""Requests that the backend receives together at least: it sorts and batches them, and they are stored after that."""
CALLS_A_BATCH = 8
"""Batches in a call, where the batch size is set."""
_FINISH = {"stop": "stop", "length": "length"}
BY_SERVER, BY_TOKENIZER = "as the server counts them", "by encoding the answers again"
"""How tokens are counted."""


@dataclass(frozen=True)
class TextRequest:
    """A request as lm-eval makes it; of a likelihood question, one Instance a choice."""

    key: str
    instances: tuple[Instance, ...]

    @property
    def kind(self) -> str:
        """lm-eval's type of the request."""
        return str(self.instances[0].request_type)


@dataclass(frozen=True)
class TextAnswer:
    """An answer in text, or the likelihoods of choices.

    tokens: None where unknown.  counted: how, None where they are not.  seconds: share of a call's wall time.
    """

    key: str
    text: str
    likelihoods: tuple[tuple[float, bool], ...]
    tokens: int | None
    counted: str | None
    finish: str
    seconds: float


class BackendPool:
    """A loaded model of lm-eval's. Raises ConfigError if lm-eval has none of the name, or it cannot be loaded."""

    size: int = 1
    chunk_rows: int | None = None

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self.lm = _load(spec)
        self._usage: dict[str, tuple[int | None, str]] = {}
        """Of each text that a server wrote: its tokens and how it ended."""
        self._note_usage()

    def facts(self, spec: RunSpec) -> dict[str, Any]:
        """What is known of the machine that answers: of a server, nothing."""
        model: Any = getattr(self.lm, "model", None)
        facts: dict[str, Any] = {"device": None, "dtype": None, "threads": None, "weights": None}
        if hasattr(model, "parameters"):  # a torch model, in this process
            import torch

            device = torch.device(getattr(self.lm, "device", "cpu"))
            facts["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
            facts["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
            facts["threads"] = torch.get_num_threads()
            facts["parameters"] = sum(weight.numel() for weight in model.parameters())
        return {**facts, "forward": self._backend, "batch_size": getattr(self.lm, "batch_size", None)}

    @property
    def _backend(self) -> str:
        assert self._spec.backend is not None, "the pool of a backend"
        return self._spec.backend.name

    def run(self, chunks: Sequence[Chunk]) -> Iterator[tuple[str, TextAnswer | FailedRequest]]:
        """(run, answer) as calls return. Raises RunError where a call fails; what came before is stored."""
        rows = ROWS_A_CALL if self._spec.batch_size == "auto" else CALLS_A_BATCH * int(self._spec.batch_size)
        for chunk in chunks:
            requests: Sequence[Any] = chunk.work  # its type is that of this package's workers
            work: list[TextRequest] = sorted(requests, key=lambda one: -len(text_of(one.instances[0].args[0])))
            for kind in dict.fromkeys(request.kind for request in work):
                own = [request for request in work if request.kind == kind]
                for start in range(0, len(own), rows):
                    yield from ((chunk.point, answer) for answer in self._call(kind, own[start : start + rows]))

    def _call(self, kind: str, requests: Sequence[TextRequest]) -> Iterator[TextAnswer | FailedRequest]:
        """Answers to requests of one type."""
        instances = [instance for request in requests for instance in request.instances]
        self._usage.clear()
        clock = time.perf_counter()
        try:
            results = getattr(self.lm, kind)(instances, disable_tqdm=True)
        except NotImplementedError as error:
            raise ConfigError(f"backend {self._backend} cannot do this task: {reason(error)}") from error
        except Exception as error:
            raise RunError(
                f"backend {self._backend}: {type(error).__name__}: {reason(error)}; what is answered is stored, "
                "--resume continues"
            ) from error
        seconds = (time.perf_counter() - clock) / len(requests)
        rest = iter(results)
        for request in requests:
            yield self._answer(request, [next(rest) for _ in request.instances], seconds)

    def _answer(self, request: TextRequest, results: list[Any], seconds: float) -> TextAnswer | FailedRequest:
        if request.kind != "generate_until":
            pairs = tuple((float(r), False) if isinstance(r, float) else (float(r[0]), bool(r[1])) for r in results)
            return TextAnswer(request.key, "", pairs, None, None, "", seconds)
        text = results[0]
        if _is_none(text):
            return FailedRequest(request.key, "the server returned an answer without content")
        tokens, finish = self._usage.get(text, (None, UNKNOWN))
        counted = BY_SERVER
        if tokens is None:
            tokens = self._encoded(text)
            counted = BY_TOKENIZER
        return TextAnswer(request.key, text, (), tokens, None if tokens is None else counted, finish, seconds)

    def _encoded(self, text: str) -> int | None:
        """Tokens of a text, without special ones; None without a tokenizer."""
        if getattr(self.lm, "tokenizer", None) is None or not hasattr(self.lm, "tok_encode"):
            return None
        ids = self.lm.tok_encode(text, add_special_tokens=False)
        return len(ids) if isinstance(ids, list) and all(isinstance(i, int) for i in ids) else None

    def _note_usage(self) -> None:
        """Have a server's usage and finish reasons noted, of responses with one answer."""
        parse = getattr(self.lm, "parse_generations", None)
        if parse is None:
            return

        def parse_and_note(outputs: Any, **rest: Any) -> Any:
            texts = parse(outputs=outputs, **rest)
            response = outputs[0] if isinstance(outputs, list) and len(outputs) == 1 else outputs
            if isinstance(response, Mapping) and len(texts) == 1 and texts[0] is not None:
                tokens = (response.get("usage") or {}).get("completion_tokens")
                ended = (response.get("choices") or [{}])[0].get("finish_reason")
                known = tokens if isinstance(tokens, int) and tokens > 0 else None
                self._usage[texts[0]] = known, _FINISH.get(ended, UNKNOWN)
            return texts

        self.lm.parse_generations = parse_and_note

    def close(self) -> None:
        """Nothing to stop: the backend ends with the process."""


def _load(spec: RunSpec) -> LM:
    """lm-eval's model of the spec's backend."""
    assert spec.backend is not None, "the caller asks for a backend"
    import lm_eval.models  # noqa: F401  # the registry fills itself only while it is empty

    from fluid_model.checkpoints.gguf_files import gguf_of

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    name, args = spec.backend.name, dict(spec.backend.args)
    check_name(name)
    try:
        kind = get_model(name)
        known = _arguments(kind)
        argument = next((name for name in ("pretrained", "model") if name in known), None)
        if argument is not None and argument not in args:
            file = gguf_of(spec.model.path) if "gguf_file" in known else None
            args |= {argument: spec.model.path} if file is None else gguf_arguments(file)
        if "device" in known:  # whose default is a GPU, where there is none too
            args.setdefault("device", "cuda" if _has_gpu() else "cpu")
        more = {} if spec.batch_size == "auto" else {"batch_size": spec.batch_size}
        return kind.create_from_arg_obj(args, more)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"backend {name} with {json.dumps(args)}: {type(error).__name__}: {reason(error)}") from error


def quantization(spec: RunSpec) -> str | None:
    """How the weights that a spec's backend opens were quantised, where that is known: of a GGUF file.

    Raises ConfigError if lm-eval has no such model, or what it needs is not installed.
    """
    import lm_eval.models  # noqa: F401

    from fluid_model.checkpoints.gguf_files import gguf_of, quantization_of

    assert spec.backend is not None, "the caller asks for a backend"
    check_name(spec.backend.name)
    try:
        known = _arguments(get_model(spec.backend.name))
    except Exception as error:
        raise ConfigError(f"backend {spec.backend.name}: {type(error).__name__}: {reason(error)}") from error
    if "gguf_file" not in known or {"pretrained", "model"} & set(spec.backend.args):
        return None
    file = gguf_of(spec.model.path)
    return None if file is None else quantization_of(file)


def gguf_arguments(file: Path) -> dict[str, str]:
    """Arguments by which lm-eval's hf opens a GGUF file."""
    return {"pretrained": str(file.parent), "gguf_file": file.name}


def check_name(name: str) -> None:
    """Raise ConfigError, naming the known ones, if lm-eval has no such model."""
    import lm_eval.models  # noqa: F401

    if name not in model_registry:
        known = ", ".join(sorted(model_registry.keys()))
        raise ConfigError(f"backend={name!r} is no model of lm-eval's; it has {known}")


def _arguments(kind: type[LM]) -> set[str]:
    """Names of a model's arguments, those of its base classes included."""
    inits = [vars(base)["__init__"] for base in kind.__mro__ if "__init__" in vars(base)]
    return {name for init in inits for name in inspect.signature(init).parameters}


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _is_none(text: str) -> bool:
    """Whether a text stands for an answer without content in lm-eval."""
    try:
        from lm_eval.models.api_models import LMEVAL_MODEL_NONE_ANSWER_PLACEHOLDER as PLACEHOLDER
    except ImportError:
        return False
    return text == str(PLACEHOLDER)
