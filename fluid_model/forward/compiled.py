"""The forward of Llama-shaped models in float32 on a CPU, compiled: `native.c` by the C compiler at hand.

Torch takes longer to be called than a model of a few million weights takes to compute. Here a forward is one call, and
so is each question a round asks of its numbers. They are the same to the last bit in every batch, and those of tokens
among drafts and fans the same as AR's. Where there is no compiler, or the model is another, torch's own way is taken.

Legend: B rows, S slots fed, M slots that count, T columns, D hidden, V vocabulary, N numbers a map writes.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, Structure, c_float, c_long, c_void_p
from itertools import accumulate, pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..common import cache_folder
from .attention_masks import AttentionPlan
from .kv_cache import KVCache

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
LANES = (16, 8, 4)
"""Numbers a processor may take at once, the most first; a model's sizes are multiples."""
WIDEST = {"AVX512": 16, "AVX2": 8}
"""Of these processors; of others the least."""
MOST_HEAD = 256
MOST_BYTES = 2**28
"""Weights of a model that are laid out a second time at most."""
WORTH = 1e8
"""Multiplications and additions worth a thread of their own."""
OFF = "FLUID_NATIVE"
"""Environment variable: 0 leaves all to torch."""

_version = attrgetter("_version")
_log = logging.getLogger(__name__)
Result = TypeVar("Result")


class _Map(Structure):
    _fields_ = (("panels", c_void_p), ("bias", c_void_p), ("read", c_long), ("written", c_long))


class _Layer(Structure):
    _fields_ = (
        ("before", c_void_p), ("after", c_void_p), ("read", _Map), ("out", _Map), ("opened", _Map), ("down", _Map),
    )  # fmt: skip


class _Model(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("embed", "norm", "cos", "sin")), ("eps", c_float),
        *((name, c_long) for name in ("vocabulary", "layers", "hidden", "inner", "heads", "key_heads", "head")),
        ("layer", POINTER(_Layer)),
    )  # fmt: skip


class _Fed(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("ids", "columns", "widths", "order", "until", "places")),
        *((name, c_long) for name in ("rows", "slots", "total", "first", "held", "room")), ("cache", c_void_p),
    )  # fmt: skip


@functools.cache
def library(lanes: int) -> ctypes.CDLL | None:
    """The compiled code for this processor; None where there is no compiler, or it fails.

    It is compiled once and kept in the user's cache folder, under a name made of all that it depends on; where that
    folder cannot be trusted, for this process alone.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or os.environ.get(OFF) == "0":
        return None
    words = [compiler, *FLAGS, f"-DLANES={lanes}"]
    name = hashlib.sha256("\n".join([SOURCE.read_text(), *words, _processor()]).encode()).hexdigest()[:16]
    file = f"native-{name}.so"
    try:
        try:
            found = _kept(file, words)
        except OSError as error:
            _log.warning("%s; compiled for this process alone", error)
            with tempfile.TemporaryDirectory() as scratch:
                found = ctypes.CDLL(str(_compiled(Path(scratch, file), words)))
    except (OSError, subprocess.CalledProcessError) as error:
        _log.warning("no compiled forward: %s", getattr(error, "stderr", None) or error)
        return None
    found.forward.argtypes = (POINTER(_Model), POINTER(_Fed), c_long, c_void_p, c_void_p)
    found.through.argtypes, found.through.restype = (POINTER(_Map), c_long, c_void_p, c_void_p, c_void_p), None
    found.workspace.argtypes, found.workspace.restype = (POINTER(_Model), c_long, c_long), c_long
    found.strides.argtypes = (POINTER(_Map), POINTER(_Map), c_long, c_void_p, c_void_p, c_void_p)
    found.surest.argtypes = (c_long, c_long, c_void_p, c_long, c_void_p, c_void_p)
    found.strides.restype = found.surest.restype = None
    return found


def _kept(name: str, words: list[str]) -> ctypes.CDLL:
    """The code of that name in the cache, compiled if it is not there. Raises OSError where nothing can be kept."""
    if (file := cache_folder.cached_file(name)) is None:
        file = cache_folder.folder() / name
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            _compiled(Path(scratch, name), words).replace(file)  # whole or not at all, whoever else compiles it now
    return ctypes.CDLL(str(file))


def _compiled(file: Path, words: list[str]) -> Path:
    subprocess.run([*words, "-o", file, SOURCE, "-lm"], check=True, capture_output=True, text=True)
    return file


def _processor() -> str:
    """What this processor can do: a cache folder may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


@functools.cache
def widest() -> int:
    """Lanes of this processor."""
    return WIDEST.get(torch.backends.cpu.get_cpu_capability(), LANES[-1])


def surest(scores: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """The likeliest of each row of logits, see `sampling.surest`; None where torch is to look for them."""
    found = library(widest()) if _plain([scores]) else None
    if found is None:
        return None
    scores, rows = scores.contiguous(), len(scores)
    places, sure = torch.empty(rows, count, dtype=torch.long), torch.empty(rows, count)
    found.surest(rows, scores.shape[-1], scores.data_ptr(), count, places.data_ptr(), sure.data_ptr())
    return places, sure


class _Laid:
    """Weights as the compiled code reads them, for as long as it does."""

    def __init__(self, lanes: int) -> None:
        self._lanes = lanes
        self._held: list[Tensor] = []

    def keep(self, tensor: Tensor) -> int:
        """Where a tensor's numbers lie."""
        self._held.append(tensor.detach().contiguous())
        return self._held[-1].data_ptr()

    def map(self, modules: Sequence[nn.Linear]) -> _Map:
        """Linear maps of one input as one: panels of 2 * lanes columns, the last filled up with zeros."""
        weight, wide = torch.cat([module.weight.detach() for module in modules]), 2 * self._lanes
        panels = functional.pad(weight, (0, 0, 0, -len(weight) % wide)).view(-1, wide, weight.shape[1]).transpose(1, 2)
        biased = any(module.bias is not None for module in modules)
        biases = [
            each.weight.new_zeros(len(each.weight)) if each.bias is None else each.bias.detach() for each in modules
        ]
        return _Map(self.keep(panels), self.keep(torch.cat(biases)) if biased else None, weight.shape[1], len(weight))


class _Head:
    """A K-head laid out. Follows weights that are changed in place."""

    def __init__(self, *maps: nn.Linear) -> None:
        self._watched, self._version = [weight for each in maps for weight in each.parameters()], -1

    def __call__(self, first: nn.Linear, second: nn.Linear, hidden: Tensor, found: ctypes.CDLL) -> Tensor:
        version = sum(map(_version, self._watched))
        if version != self._version:
            self._laid = laid = _Laid(widest())
            self._first, self._second = laid.map([first]), laid.map([second])
            self._version = version
        hidden, to = hidden.contiguous(), torch.empty(len(hidden), dtype=torch.long)
        space = torch.empty(len(hidden) * self._first.written + self._second.written)
        words = len(hidden), hidden.data_ptr(), space.data_ptr(), to.data_ptr()
        found.strides(self._first, self._second, *words)
        return to


_heads: WeakKeyDictionary[nn.Linear, _Head] = WeakKeyDictionary()
"""By their first maps, which they do not hold."""


def strides(first: nn.Linear, second: nn.Linear, hidden: Tensor) -> Tensor | None:
    """Those of a K-head, see `khead.KHead`: (M, D) -> (M,). None where torch is to compute them."""
    weights = first.weight, second.weight
    found = library(widest()) if _plain([hidden, *weights]) and not _frozen(weights) else None
    if found is None:
        return None
    if first not in _heads:
        _heads[first] = _Head(first, second)
    return _heads[first](first, second, hidden, found)


def _plain(tensors: Sequence[Tensor]) -> bool:
    """Whether compiled code can read these."""
    return all(each.device.type == "cpu" and each.dtype == torch.float32 for each in tensors)


def _frozen(weights: Sequence[Tensor]) -> bool:
    """Whether nobody could tell that they were changed."""
    return any(weight.is_inference() for weight in weights)


class Forward:
    """Calls of one model. Follows weights that are changed in place."""

    def __init__(self, model: Any, cos: Tensor, sin: Tensor, lanes: int, found: ctypes.CDLL) -> None:
        """cos, sin: (W, E) each.  lanes: those that `found` was compiled for."""
        self._model, self._cos, self._sin, self._lanes, self._library = model, cos, sin, lanes, found
        self._head = model.get_output_embeddings()
        self.says_tokens = type(self._head) is nn.Linear
        """Whether the vocabulary projection is a plain map, which `logits` runs."""
        self._watched = [*model.base_model.parameters(), *(self._head.parameters() if self.says_tokens else ())]
        self._once = 2 * sum(weight.numel() for weight in model.base_model.layers.parameters())
        self._version = -1
        self._local = threading.local()

    @classmethod
    def of(cls, model: Any, cos: Tensor, sin: Tensor) -> Forward | None:
        """For a model that `llama.fits`; None where torch is to run it.  cos, sin: (W, 1, E) each."""
        config, weights, size = model.config, list(model.parameters()), cos.shape[-1]
        if (
            not _plain(weights)
            or _frozen(weights)
            or sum(weight.nbytes for weight in weights) > MOST_BYTES
            or size > MOST_HEAD
        ):
            return None
        sizes = (config.hidden_size, config.intermediate_size, size)
        lanes = next((n for n in LANES if n <= widest() and not any(size % n for size in sizes)), 0)
        found = library(lanes) if lanes else None
        return None if found is None else cls(model, cos[:, 0].contiguous(), sin[:, 0].contiguous(), lanes, found)

    def __call__(self, ids: Tensor, reading: AttentionPlan, cache: KVCache) -> Tensor:
        """ids: (B, S), fed to a cache aimed at what reads them.  Returns (B, S, D) after the final norm; padding is 0.

        Raises IndexError where an id is not in the vocabulary, or a slot stands outside the cache.
        """
        self._follow()
        (rows, slots), tables, (start, columns, total) = ids.shape, self._tables, cache.write_columns
        counts = reading.widths or [slots] * rows
        cells, to = cache.cells(tables.layers, tables.key_heads, tables.head), torch.zeros(rows, slots, tables.hidden)
        intervals = [each.contiguous() for each in reading.intervals or ()]
        ids, columns = ids.contiguous(), columns.contiguous()

        def run(part: range) -> bool:
            here, first = counts[part.start : part.stop], part.start
            widths, behind = (c_long * len(here))(*here), first * slots * ids.itemsize
            fed = _Fed(
                ids.data_ptr() + behind, columns.data_ptr() + behind, ctypes.addressof(widths),
                *([each.data_ptr() + behind for each in intervals] or [0] * 3),
                len(here), slots, total, start + first, cache.slots, cache.columns, cells.data_ptr(),
            )  # fmt: skip
            space = self._space(self._library.workspace(tables, sum(here), total))
            found = self._library.forward(tables, fed, len(self._cos), space.data_ptr(), to[first:].data_ptr())
            return bool(found)

        if any(_each(run, _parts(counts, self._once))):
            raise IndexError(f"a token is none of {tables.vocabulary}, or a slot stands outside the cache")
        return to

    def logits(self, hidden: Tensor) -> Tensor:
        """(M, D) -> (M, V)."""
        self._follow()
        hidden, to = hidden.contiguous(), torch.empty(len(hidden), self._says.written)

        def run(part: range) -> None:
            some, into = hidden[part.start :].data_ptr(), to[part.start :].data_ptr()
            self._library.through(self._says, len(part), some, None, into)

        _each(run, _parts([1] * len(hidden), 2 * self._says.read * self._says.written))
        return to

    def _follow(self) -> None:
        """Lay out the weights, unless they are those that are."""
        version = sum(map(_version, self._watched))
        if version == self._version:
            return
        base, config = self._model.base_model, self._model.config
        self._laid = laid = _Laid(self._lanes)
        layers = (_Layer * len(base.layers))()
        for number, layer in enumerate(base.layers):
            of, mlp = layer.self_attn, layer.mlp
            parts = ([of.q_proj, of.k_proj, of.v_proj], [of.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj])
            norms = (layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
            layers[number] = _Layer(*map(laid.keep, norms), *map(laid.map, parts))
        tables = (base.embed_tokens.weight, base.norm.weight, self._cos, self._sin)
        self._tables = _Model(
            *map(laid.keep, tables), config.rms_norm_eps, len(base.embed_tokens.weight), len(layers),
            config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads,
            self._cos.shape[-1], layers,
        )  # fmt: skip
        if self.says_tokens:
            self._says = laid.map([self._head])
        self._version = version

    def _space(self, size: int) -> Tensor:
        """Room for so many numbers, this thread's own: taken anew at every call, it would be cleared page by page."""
        held: Tensor | None = getattr(self._local, "space", None)
        if held is None or len(held) < size:
            held = self._local.space = torch.empty(size)
        return held


def _parts(counts: Sequence[int], once: int) -> list[range]:
    """Rows in as many parts as threads are worth waking.  counts: slots of each.  once: operations a slot takes."""
    whole = sum(counts)
    most = max(1, min(torch.get_num_threads(), len(counts), int(once * whole // WORTH)))
    if most == 1:
        return [range(len(counts))]
    ends = [*accumulate(counts)]
    cuts = [0, *(bisect_left(ends, whole * part / most) + 1 for part in range(1, most)), len(counts)]
    return [range(*pair) for pair in pairwise(cuts) if pair[0] < pair[1]]


def _each(run: Callable[[range], Result], parts: Sequence[range]) -> list[Result]:
    """What all parts return, each on a thread of its own."""
    if len(parts) == 1:
        return [run(parts[0])]
    others = [_pool(os.getpid()).submit(run, part) for part in parts[1:]]
    return [run(parts[0]), *(other.result() for other in others)]


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads of this process: they do not live on in a fork of it."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="forward")
