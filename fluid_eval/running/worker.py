"""Holds a model and works through requests. Runs in this process or inside a Ray actor; knows neither."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from fluid_model.checkpoints.checkpoint import Checkpoint, load
from fluid_model.common.errors import RunError
from fluid_model.common.files import Nested
from fluid_model.decoders import engine_for, scorer_for
from fluid_model.engine.records import Generation, Request, Score, ScoreRequest
from fluid_model.forward.backbone import Backbone
from fluid_model.settings import DecoderSettings, FluidSettings

from ..common.spec import ModelSpec, RunSpec, build_spec
from . import slot_budget_cache

Work = Request | ScoreRequest
Answer = Generation | Score
Item = TypeVar("Item", Request, ScoreRequest)
WEIGHTS_END = 1 << 22
"""Bytes read at each end of a weights file to name it."""
AUTO_ROWS = 32
"""Rows at a time where the user leaves it to us, if memory allows."""
KEEP_SHARE = 0.25
"""Share of free memory that checkpoints held may take when another one is to be loaded; else they are dropped."""
KV_SHARE = 0.5
"""Share of free memory that keys and values may take with an automatic batch size."""


class Worker:
    """Holds checkpoints for many batches of requests of many specs. A checkpoint is loaded once, when first needed."""

    def __init__(self, threads: int | None = None) -> None:
        """threads: CPU threads to use (torch's own choice if None)."""
        self._held: dict[ModelSpec, Checkpoint] = {}
        self._names: dict[Path, str] = {}
        self._fit: dict[ModelSpec, int] = {}  # rows that memory took, where it did not take all
        if threads is not None:
            torch.set_num_threads(threads)

    def facts(self, spec: Nested) -> dict[str, Any]:
        """What a spec runs on here: device, dtype, threads, forward, parameters.

        spec: as RunSpec.to_dict gives it.  Raises ConfigError if its model cannot load.
        """
        self._take(spec)
        backbone, folder = self._checkpoint.backbone, self._checkpoint.folder
        if folder is not None and folder not in self._names:
            self._names[folder] = weights_name(folder)
        return {
            **device_facts(backbone),
            "forward_kind": backbone.forward_choice.kind,
            "forward_reason": backbone.forward_choice.reason,
            "parameters": sum(p.numel() for p in self._checkpoint.model.parameters()),
            "weights": self._names[folder] if folder else None,
            "slot_budget": backbone.slot_budget if prices_slots(self._spec.decoder) else None,
        }

    def _take(self, spec: Nested) -> None:
        """Turn to a spec: its checkpoint, loaded unless it is held, and its K-head."""
        self._spec = build_spec(spec)
        key = self._key = replace(self._spec.model, tau=None)
        if key not in self._held:
            held = sum(weights_bytes(checkpoint.model) for checkpoint in self._held.values())
            if self._held and held > KEEP_SHARE * free_memory(next(iter(self._held.values())).backbone.device):
                self._held.clear()
                vars(self).pop("_checkpoint", None)
                torch.cuda.empty_cache()
            self._held[key] = load(
                key.path, dtype=key.dtype, device=key.device, mask_token=key.mask_token,
                end_tokens=key.end_tokens, method=key.method, trust_remote_code=key.trust_remote_code,
                base=key.base,
            )  # fmt: skip
        self._checkpoint = self._held[key].with_tau(self._spec.model.tau)
        price_slots(self._checkpoint, self._spec)

    def run(self, spec: Nested, work: Sequence[Work]) -> Iterator[Answer]:
        """Answers to a spec's requests as they are finished, in any order."""
        self._take(spec)
        asked = self._spec.batch_size
        self._most = self._fit.get(self._key, AUTO_ROWS) if asked == "auto" else int(asked)
        generate = [item for item in work if isinstance(item, Request)]
        score = [item for item in work if isinstance(item, ScoreRequest)]
        for longest, requests in self._bands(generate, lambda r: len(r.prompt) + r.max_new_tokens):
            yield from self._all(requests, longest, self._write)
        for longest, questions in self._bands(score, lambda r: max(len(a) + len(b) for a, b in r.pairs)):
            yield from self._all(questions, longest, self._score)

    def _bands(self, work: list[Item], tokens: Callable[[Item], int]) -> Iterator[tuple[int, list[Item]]]:
        """All work at once where memory takes as many rows as wanted of the longest; else what is at least half as long
        as the longest first, so that long rows do not keep short ones from being many. With the longest's tokens.
        """
        left = sorted(work, key=tokens, reverse=True)
        while left:
            longest = tokens(left[0])
            fits = self.rows_for(longest) >= min(self._most, len(left))
            count = len(left) if fits else sum(2 * tokens(item) >= longest for item in left)
            yield longest, left[:count]
            left = left[count:]

    def _write(self, requests: list[Request], rows: int) -> Iterator[Answer]:
        return engine_for(self._checkpoint, self._spec.decoder, rows).generate(requests)

    def _score(self, requests: list[ScoreRequest], rows: int) -> Iterator[Answer]:
        return scorer_for(self._checkpoint, self._spec.decoder, rows).score(requests)

    def _all(
        self, work: list[Item], longest: int, answers: Callable[[list[Item], int], Iterator[Answer]]
    ) -> Iterator[Answer]:
        """Answers to all work. Where memory runs out, what is not answered yet goes on with half as many rows at once,
        from then on, unless the user set how many.

        longest: tokens of a row.  answers: to the work that is left, that many rows at a time.
        Raises RunError where memory does not take one row, or not as many as asked.
        """
        left: dict[str, Item] = {item.key: item for item in work}
        while left:
            rows = min(self._most, self.rows_for(longest))
            try:
                for answer in answers(list(left.values()), rows):
                    del left[answer.key]
                    yield answer
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if rows == 1 or self._spec.batch_size != "auto":
                    raise RunError(
                        f"batch_size={rows}: out of memory with rows of {longest} tokens; "
                        + ("nothing smaller is left" if rows == 1 else "pass a smaller --batch-size, or auto")
                    ) from error
                self._most = self._fit[self._key] = rows // 2
            torch.cuda.empty_cache()

    def rows_for(self, tokens: int) -> int:
        """Rows of `tokens` tokens to keep at once: as asked, or as many as free memory takes, up to AUTO_ROWS."""
        if self._spec.batch_size != "auto":
            return int(self._spec.batch_size)
        backbone = self._checkpoint.backbone
        config = backbone.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        row: int = 2 * config.num_hidden_layers * heads * size * tokens * torch.finfo(backbone.dtype).bits // 8
        return max(1, min(AUTO_ROWS, int(KV_SHARE * free_memory(backbone.device)) // row))


def load_for(spec: RunSpec) -> Checkpoint:
    """The checkpoint a run names, and its slot budget where the decoder asks for one. Raises ConfigError if it cannot
    load.
    """
    model = spec.model
    checkpoint = load(
        model.path, dtype=model.dtype, device=model.device, tau=model.tau, mask_token=model.mask_token,
        end_tokens=model.end_tokens, method=model.method, trust_remote_code=model.trust_remote_code,
        base=model.base,
    )  # fmt: skip
    price_slots(checkpoint, spec)
    return checkpoint


def price_slots(checkpoint: Checkpoint, spec: RunSpec) -> None:
    """See to a checkpoint's slot budget, where the decoder asks for one: from the user's cache, or measured now."""
    backbone = checkpoint.backbone
    if prices_slots(spec.decoder) and checkpoint.folder is not None and "slot_budget" not in vars(backbone):
        device = ", ".join(str(fact) for fact in device_facts(backbone).values())
        name = f"{Path(spec.model.path).name} {weights_name(checkpoint.folder)}"
        backbone.slot_budget = slot_budget_cache.recall(backbone, device, name)


def prices_slots(decoder: DecoderSettings) -> bool:
    """Whether a decoder needs to know what a slot costs on this device."""
    return (
        isinstance(decoder, FluidSettings)
        and decoder.rounds == "one"
        and decoder.verify
        and decoder.slot_budget is None
    )


def device_facts(backbone: Backbone) -> dict[str, Any]:
    """What makes a model fast or slow here: device, dtype, threads, whose forward."""
    cuda = backbone.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(backbone.device) if cuda else "cpu",
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "forward": "torch" if backbone.compiled is None else "compiled",
    }


def weights_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's parameters."""
    return sum(weight.nbytes for weight in model.parameters())


def weights_name(folder: Path) -> str:
    """What tells one model's weights from another's: a hash over a folder's files, wherever it came from.

    Of large files only the size and both ends are read, which a retrained or converted model changes.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".safetensors", ".bin", ".json", ".jinja", ".model"):
            with file.open("rb") as handle:
                head = handle.read(WEIGHTS_END)
                handle.seek(max(len(head), file.stat().st_size - WEIGHTS_END))
                digest.update(f"{file.relative_to(folder)} {file.stat().st_size}".encode() + head + handle.read())
    return digest.hexdigest()[:16]


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch found no memory, on whatever device."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def free_memory(device: torch.device) -> int:
    """Bytes free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)
