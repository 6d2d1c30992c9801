"""The worker: loads a checkpoint and answers requests with it. The same in this process and inside a Ray actor.

worker.run(spec, requests)
    1) checkpoint of the spec: loaded, or reused from an earlier spec (a sweep's points share it)
    2) requests in bands of similar length, the longest first (`_bands`)
    3) rows a batch: as asked, or as many as key/value memory allows (`rows_for`)
    4) engine (generation) or scorer (likelihoods) for each band; out of memory: the rest with half as many rows
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from fluid_model.checkpoints.checkpoint import Checkpoint, load
from fluid_model.common.errors import ConfigError, RunError
from fluid_model.common.files import Nested
from fluid_model.decoders import engine_for, scorer_for
from fluid_model.engine.records import Generation, Request, Score, ScoreRequest
from fluid_model.forward.backbone import Backbone

from ..common.spec import ModelSpec, RunSpec, build_spec
from . import forward_time_cache

Work = Request | ScoreRequest
Answer = Generation | Score
Item = TypeVar("Item", Request, ScoreRequest)
WEIGHTS_END = 1 << 22
"""Bytes hashed at each end of a weights file."""
AUTO_ROWS = 32
"""Rows a batch with `batch_size = "auto"`, if memory allows."""
KEEP_SHARE = 0.25
"""Share of free memory up to which loaded checkpoints stay when another one is loaded; above it they are dropped."""
KV_SHARE = 0.5
"""Share of free memory for the key/value cache with `batch_size = "auto"`."""


class Worker:
    """Answers requests of any number of specs. Loads each checkpoint once, when it is first needed."""

    def __init__(self, threads: int | None = None) -> None:
        """threads: CPU threads to use (None: torch's default)."""
        self._checkpoints: dict[ModelSpec, Checkpoint] = {}
        self._names: dict[Path, str] = {}
        self._fitting_rows: dict[ModelSpec, int] = {}
        """Rows a batch that fit into memory, for models that ran out of it."""
        if threads is not None:
            torch.set_num_threads(threads)

    def facts(self, spec: Nested) -> dict[str, Any]:
        """What a spec runs on here: device, dtype, threads, forward, parameters.

        spec: as RunSpec.to_dict gives it.  Raises ConfigError if its model cannot load.
        """
        self._load(spec)
        backbone, folder = self._checkpoint.backbone, self._checkpoint.folder
        if folder is not None and folder not in self._names:
            self._names[folder] = weights_name(folder)
        return {
            **device_facts(backbone),
            "forward_kind": backbone.forward_choice.kind,
            "forward_reason": backbone.forward_choice.reason,
            "parameters": sum(p.numel() for p in self._checkpoint.model.parameters()),
            "weights": self._names[folder] if folder else None,
            "slot_budget": backbone.slot_budget if self._spec.decoder.drafts_by_time else None,
        }

    def _load(self, spec: Nested) -> None:
        """Switch to a spec: its checkpoint, loaded unless it is already, with the K-head of its tau."""
        self._spec = build_spec(spec)
        key = self._key = replace(self._spec.model, tau=None)  # one load serves all K-heads
        if key not in self._checkpoints:
            self._make_room()
            self._checkpoints[key] = load(
                key.path, dtype=key.dtype, device=key.device, mask_token=key.mask_token,
                end_tokens=key.end_tokens, method=key.method, trust_remote_code=key.trust_remote_code,
                base=key.base,
            )  # fmt: skip
        self._checkpoint = self._checkpoints[key].with_tau(self._spec.model.tau)
        set_forward_time(self._checkpoint, self._spec)

    def _make_room(self) -> None:
        """Drop the loaded checkpoints if they take more than KEEP_SHARE of free memory."""
        if not self._checkpoints:
            return
        used = sum(weights_bytes(checkpoint.model) for checkpoint in self._checkpoints.values())
        device = next(iter(self._checkpoints.values())).backbone.device
        if used > KEEP_SHARE * free_memory(device):
            self._checkpoints.clear()
            vars(self).pop("_checkpoint", None)
            torch.cuda.empty_cache()

    def run(self, spec: Nested, work: Sequence[Work]) -> Iterator[Answer]:
        """Answers to a spec's requests as they finish, in any order."""
        self._load(spec)
        asked = self._spec.batch_size
        self._max_rows = self._fitting_rows.get(self._key, AUTO_ROWS) if asked == "auto" else int(asked)
        generations = [item for item in work if isinstance(item, Request)]
        questions = [item for item in work if isinstance(item, ScoreRequest)]
        for longest, requests in self._bands(generations, lambda r: len(r.prompt) + r.max_new_tokens):
            yield from self._answer_all(requests, longest, self._generate)
        for longest, scored in self._bands(questions, lambda r: max(len(a) + len(b) for a, b in r.pairs)):
            yield from self._answer_all(scored, longest, self._score)

    def _bands(self, work: list[Item], tokens: Callable[[Item], int]) -> Iterator[tuple[int, list[Item]]]:
        """Work in bands of similar length, the longest first, each with the tokens of its longest item.

        One band if memory fits a full batch of the longest item. Else a band ends at half its longest item's length:
        long rows, of which few fit, would otherwise limit the batches of short ones.
        """
        left = sorted(work, key=tokens, reverse=True)
        while left:
            longest = tokens(left[0])
            fits = self.rows_for(longest) >= min(self._max_rows, len(left))
            count = len(left) if fits else sum(2 * tokens(item) >= longest for item in left)
            yield longest, left[:count]
            left = left[count:]

    def _generate(self, requests: list[Request], rows: int) -> Iterator[Answer]:
        return engine_for(self._checkpoint, self._spec.decoder, rows).generate(requests)

    def _score(self, requests: list[ScoreRequest], rows: int) -> Iterator[Answer]:
        return scorer_for(self._checkpoint, self._spec.decoder, rows).score(requests)

    def _answer_all(
        self, work: list[Item], longest: int, answer: Callable[[list[Item], int], Iterator[Answer]]
    ) -> Iterator[Answer]:
        """Answers to all work. Out of memory, the unanswered rest continues with half as many rows a batch, as do later
        bands; a batch size that the user set is not changed.

        longest: tokens of the longest row.  answer: answers work with so many rows a batch.
        Raises RunError if one row does not fit, or not as many as the user asked for.
        """
        unanswered: dict[str, Item] = {item.key: item for item in work}
        while unanswered:
            rows = min(self._max_rows, self.rows_for(longest))
            try:
                for result in answer(list(unanswered.values()), rows):
                    del unanswered[result.key]
                    yield result
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if rows == 1 or self._spec.batch_size != "auto":
                    raise RunError(
                        f"batch_size={rows}: out of memory with rows of {longest} tokens; "
                        + ("nothing smaller is left" if rows == 1 else "pass a smaller --batch-size, or auto")
                    ) from error
                self._max_rows = self._fitting_rows[self._key] = rows // 2
            torch.cuda.empty_cache()

    def rows_for(self, tokens: int) -> int:
        """Rows a batch, each `tokens` long: as asked, or as many as key/value memory fits, up to AUTO_ROWS."""
        if self._spec.batch_size != "auto":
            return int(self._spec.batch_size)
        backbone = self._checkpoint.backbone
        config = backbone.config
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        numbers = 2 * config.num_hidden_layers * kv_heads * head_size * tokens  # keys and values of one row
        row_bytes: int = numbers * torch.finfo(backbone.cache_dtype).bits // 8
        return max(1, min(AUTO_ROWS, int(KV_SHARE * free_memory(backbone.device)) // row_bytes))


def load_for(spec: RunSpec) -> Checkpoint:
    """The checkpoint of a run, with the time of its forwards if the decoder drafts by it.

    Raises ConfigError if it cannot load.
    """
    if spec.backend is not None:
        raise ConfigError(f"backend {spec.backend.name} writes the answers: this needs a decoder of this package")
    model = spec.model
    checkpoint = load(
        model.path, dtype=model.dtype, device=model.device, tau=model.tau, mask_token=model.mask_token,
        end_tokens=model.end_tokens, method=model.method, trust_remote_code=model.trust_remote_code,
        base=model.base,
    )  # fmt: skip
    set_forward_time(checkpoint, spec)
    return checkpoint


def set_forward_time(checkpoint: Checkpoint, spec: RunSpec) -> None:
    """Set how long a checkpoint's forwards take, if the decoder drafts by it: from the user's cache, or measured."""
    backbone = checkpoint.backbone
    if spec.decoder.drafts_by_time and checkpoint.folder is not None and "forward_time" not in vars(backbone):
        device = ", ".join(str(fact) for fact in device_facts(backbone).values())
        name = f"{Path(spec.model.path).name} {weights_name(checkpoint.folder)}"
        backbone.forward_time = forward_time_cache.recall(backbone, device, name)


def device_facts(backbone: Backbone) -> dict[str, Any]:
    """Device, dtype, threads and forward (compiled or torch), which decide a model's speed."""
    cuda = backbone.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(backbone.device) if cuda else "cpu",
        "dtype": backbone.dtype_name,
        "threads": torch.get_num_threads(),
        "forward": "torch" if backbone.compiled is None else "compiled",
    }


def weights_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's parameters."""
    return sum(weight.nbytes for weight in model.parameters())


def weights_name(folder: Path) -> str:
    """Hash that identifies a model's weights: over the names, sizes and both ends of a folder's files.

    Retraining or conversion changes the ends; hashing all of a 7B model would take a minute.
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
    """Whether torch ran out of memory, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def free_memory(device: torch.device) -> int:
    """Bytes free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)
