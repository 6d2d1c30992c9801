"""Calls of the compiled forward: one call of C, however many layers.

Legend: B rows, S slots fed, M slots that count, T columns, D hidden, E head size, V vocabulary, W window.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import llama
from ..attention_masks import AttentionPlan
from ..gated_lora import GROUPS, GatedLora
from ..kv_cache import KVCache
from . import build, structs, threads, weights

MAX_HEAD_SIZE = 256
"""As in csrc/structs.h."""


class CompiledForward:
    """The forward of one model. Follows weights that are changed in place."""

    def __init__(
        self,
        model: Any,
        cos: Tensor,
        sin: Tensor,
        adapter: GatedLora | None,
        lanes: int,
        library: ctypes.CDLL,
        *,
        int8: bool,
    ) -> None:
        """cos, sin: (W, E) each, the sine of the left half negative.  library: compiled for `lanes`."""
        self._adapter, self._int8 = adapter, int8
        self.stored = "int8" if int8 else str(model.dtype).removeprefix("torch.")
        """How weights are stored: float32, bfloat16 or int8. Activations and sums are float32."""
        self._model, self._cos, self._sin, self.lanes, self._library = model, cos, sin, lanes, library
        self._head = model.get_output_embeddings()
        self.projects_vocabulary = type(self._head) is nn.Linear
        """Whether the vocabulary projection is a plain linear map, which `logits` runs."""
        head_weights = self._head.parameters() if self.projects_vocabulary else ()
        self._versions = weights.Versions([*model.base_model.parameters(), *head_weights, *_parameters(adapter)])
        self._weights = sum(weight.numel() for weight in model.base_model.layers.parameters())
        self._local = threading.local()

    @classmethod
    def of(
        cls, model: Any, cos: Tensor, sin: Tensor, adapter: GatedLora | None = None, *, int8: bool = False
    ) -> tuple[CompiledForward | None, str]:
        """For a model that `llama.misfit` has nothing against; or None, and why not in one line.

        cos, sin: (W, 1, E) float32 each.  adapter: acts at mask slots.  int8: store linear maps so, see `int8_rows`.
        """
        parameters, config, head_size = list(model.parameters()), model.config, cos.shape[-1]
        sizes = (config.hidden_size, config.intermediate_size, head_size)
        lanes = next((n for n in build.LANES if n <= build.native_lanes() and not any(size % n for size in sizes)), 0)
        if not weights.packable(parameters):
            return None, f"compiled code is for float32 or bfloat16 on a CPU, not {model.dtype} on {model.device.type}"
        if weights.untracked([*parameters, *_parameters(adapter)]):
            return None, "the weights are inference tensors, whose changes cannot be noticed"
        if head_size > MAX_HEAD_SIZE:
            return None, f"heads of {head_size} numbers; compiled code takes {MAX_HEAD_SIZE} at most"
        if not lanes:
            return None, f"hidden, inner or head size {sizes} is not a multiple of {build.LANES[-1]}"
        if no_room := weights.no_room(parameters, int8=int8):
            return None, no_room
        library = build.library(lanes)
        if library is None:
            return None, build.why_not(lanes)
        return cls(model, cos[:, 0].contiguous(), sin[:, 0].contiguous(), adapter, lanes, library, int8=int8), ""

    def __call__(self, ids: Tensor, plan: AttentionPlan, cache: KVCache) -> Tensor:
        """ids: (B, S), fed to a cache whose write positions are `plan`'s.

        Returns (B, S, D) after the final norm, 0 for padding.
        Raises IndexError where an id is not in the vocabulary, or a slot stands outside the cache.
        """
        self._pack_if_changed()
        model, (rows, slots) = self._tables, ids.shape
        widths = _widths(plan, rows, slots)
        cells = cache.storage(model.layers, model.key_heads, model.head_size)
        start, columns, total = cache.write_columns
        hidden = torch.zeros(rows, slots, model.hidden)
        batch = _Batch(ids, columns, total, plan, widths)
        struct = batch.struct
        struct.first_row, struct.cache_rows, struct.cache_columns = start, cache.rows, cache.columns
        struct.cache = cells.data_ptr()
        count = int(widths.sum())
        workers = threads.worth(self._weights, count)
        workspace = self._workspace(self._library.workspace_size(model, count, total, workers))
        if self._library.forward(model, struct, workers, workspace.data_ptr(), hidden.data_ptr()):
            raise IndexError(f"a token is none of {model.vocabulary}, or a slot stands outside the cache")
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """(M, D), in any number format -> (M, V) float32."""
        self._pack_if_changed()
        projection = self._projection
        hidden, logits = hidden.float().contiguous(), torch.empty(len(hidden), projection.outputs)
        workers = threads.worth(projection.inputs * projection.outputs, len(hidden))
        self._library.project_vocabulary(projection, len(hidden), hidden.data_ptr(), logits.data_ptr(), workers)
        return logits

    def _pack_if_changed(self) -> None:
        """Pack the weights at the first call, and after they were changed."""
        if not self._versions.changed():
            return
        base, config, adapter, rank = self._model.base_model, self._model.config, self._adapter, 0
        self._packed = packed = weights.PackedWeights(self.lanes, self._library, 4 * self._weights, int8=self._int8)
        layers = (structs.Layer * len(base.layers))()
        for number, layer in enumerate(base.layers):
            maps, low_rank = {}, {} if adapter is None else adapter.grouped(number, torch.float32)
            for group, names in GROUPS.items():
                maps[group] = packed.gated([layer.get_submodule(name) for name in names], low_rank.get(group))
                rank = max(rank, maps[group].down.outputs)
            norms = (
                layer.input_layernorm.weight,
                layer.post_attention_layernorm.weight,
                *(llama.head_norms(layer) or ()),
            )
            names = "attention_norm", "mlp_norm", "query_norm", "key_norm"
            layers[number] = structs.Layer(**dict(zip(names, map(packed.address, norms), strict=False)), **maps)
        table = base.embed_tokens.weight
        self._tables = structs.Model(
            embeddings=packed.address(table, table.dtype), embedding_format=structs.FORMATS[table.dtype],
            final_norm=packed.address(base.norm.weight),
            cos=packed.address(self._cos), sin=packed.address(self._sin), rms_norm_eps=config.rms_norm_eps,
            vocabulary=len(base.embed_tokens.weight), layers=len(layers), hidden=config.hidden_size,
            inner=config.intermediate_size, query_heads=config.num_attention_heads,
            key_heads=config.num_key_value_heads, head_size=self._cos.shape[-1], window=len(self._cos),
            mask_id=-1 if adapter is None else adapter.mask_id, rank=rank,
            mask_embedding=None if adapter is None else packed.address(adapter.mask_embedding), layer=layers,
        )  # fmt: skip
        if self.projects_vocabulary:
            self._projection = packed.linear([self._head])

    def _workspace(self, size: int) -> Tensor:
        """This thread's own floats, kept between calls: fresh memory would be cleared page by page at every call."""
        held: Tensor | None = getattr(self._local, "workspace", None)
        if held is None or len(held) < size:
            held = self._local.workspace = torch.empty(size)
        return held


def _widths(plan: AttentionPlan, rows: int, slots: int) -> np.ndarray:
    """(B,) slots of each row that count."""
    return np.full(rows, slots) if plan.widths is None else np.ascontiguousarray(plan.widths, np.int64)


def _parameters(adapter: GatedLora | None) -> Iterable[Tensor]:
    return () if adapter is None else adapter.parameters()


class _Batch:
    """The structure of a batch without its cache, and the tensors it points to."""

    def __init__(self, ids: Tensor, columns: Tensor, total: int, plan: AttentionPlan, widths: np.ndarray) -> None:
        held = [ids.contiguous(), columns.contiguous(), *(each.contiguous() for each in plan.intervals or ())]
        self._held, self._widths = held, widths
        addresses = [tensor.data_ptr() for tensor in held]
        rows, slots = ids.shape
        self.struct = structs.Batch(
            ids=addresses[0], columns=addresses[1], widths=widths.ctypes.data, rows=rows, slots=slots,
            total=total,
        )  # fmt: skip
        if plan.intervals:
            self.struct.enter, self.struct.exit, self.struct.offsets = addresses[2:]


def attention_mask(plan: AttentionPlan, lanes: int) -> Tensor | None:
    """The mask that compiled attention applies, (B, S, T) bool, all False for padding; None where there is no library.
    For tests: it is made by the C function that attention takes its columns from.
    """
    library = build.library(lanes)
    if library is None:
        return None
    rows, slots = plan.columns.shape
    mask = torch.zeros(rows, slots, plan.total, dtype=torch.bool)
    batch = _Batch(torch.zeros_like(plan.columns), plan.columns, plan.total, plan, _widths(plan, rows, slots))
    columns = torch.empty(plan.total, dtype=torch.int32)
    library.fill_mask(batch.struct, columns.data_ptr(), mask.data_ptr())
    return mask
