"""The ctypes halves of `csrc/structs.h`, in the same order; see there for the meaning and shape of every field."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_double, c_float, c_long, c_void_p

import numpy as np
import torch

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""How weights are stored: `Format` in csrc/structs.h."""


class Linear(Structure):
    """A linear map with packed weights."""

    _fields_ = (
        ("panels", c_void_p), ("scales", c_void_p), ("bias", c_void_p), ("inputs", c_long), ("outputs", c_long),
        ("format", c_long),
    )  # fmt: skip


class GatedLinear(Structure):
    """A linear map, and the low-rank map that an adapter adds to it at mask slots."""

    _fields_ = (("full", Linear), ("down", Linear), ("up", Linear))


class Layer(Structure):
    """The weights of one transformer layer."""

    _fields_ = (
        ("attention_norm", c_void_p), ("mlp_norm", c_void_p), ("query_norm", c_void_p), ("key_norm", c_void_p),
        ("qkv", GatedLinear), ("attention_out", GatedLinear), ("gate_up", GatedLinear), ("down", GatedLinear),
    )  # fmt: skip


class Model(Structure):
    """The weights and sizes of a model."""

    _fields_ = (
        ("embeddings", c_void_p), ("final_norm", c_void_p), ("cos", c_void_p), ("sin", c_void_p),
        ("rms_norm_eps", c_float),
        ("vocabulary", c_long), ("layers", c_long), ("hidden", c_long), ("inner", c_long), ("query_heads", c_long),
        ("key_heads", c_long), ("head_size", c_long), ("window", c_long),
        ("mask_id", c_long), ("rank", c_long), ("mask_embedding", c_void_p),
        ("embedding_format", c_long),
        ("layer", POINTER(Layer)),
    )  # fmt: skip


class Batch(Structure):
    """One forward over the key/value cache."""

    _fields_ = (
        ("ids", c_void_p), ("columns", c_void_p), ("widths", c_void_p),
        ("enter", c_void_p), ("exit", c_void_p), ("offsets", c_void_p),
        ("rows", c_long), ("slots", c_long), ("total", c_long),
        ("first_row", c_long), ("cache_rows", c_long), ("cache_columns", c_long),
        ("cache", c_void_p),
    )  # fmt: skip


class DraftTable(Structure):
    """The drafts of the rows of a batch."""

    _fields_ = (
        ("tokens", c_void_p), ("parents", c_void_p), ("depths", c_void_p), ("masks", c_void_p),
        ("reached", c_void_p),
        ("nodes", c_void_p), ("slots", c_void_p),
        ("min_stride", c_long), ("max_stride", c_long), ("max_slots", c_long), ("candidates", c_long),
        ("window_left", c_void_p),
        ("costs", c_void_p), ("rates", c_void_p),
        ("room", c_long), ("scratch", c_void_p), ("scratch_reached", c_void_p),
    )  # fmt: skip


class RowTable(Structure):
    """The rows of a batch and their answers. TOKEN, STEP and REJECTED are the entries of its lists."""

    _fields_ = (
        *((name, c_void_p) for name in ("cached", "forwards", "slots", "limits", "seconds")),
        ("lengths", c_void_p), ("answers", c_void_p), ("steps_made", c_void_p), ("steps", c_void_p),
        ("drafts_rejected", c_void_p), ("drafts", c_void_p), ("tokens_rejected", c_void_p), ("rejected", c_void_p),
        *((name, c_long) for name in ("answer_room", "step_room", "draft_room", "rejected_room")),
        ("harmless", c_void_p), ("known", c_long),
    )  # fmt: skip


TOKEN = np.dtype([("id", int), ("forward", int)])
STEP = np.dtype([("predicted", int), ("begun", int), ("ended", int), ("expected", float)])
REJECTED = np.dtype([("forward", int), ("place", int), ("length", int)])


class StepUpdates(Structure):
    """What a forward brought rows."""

    _fields_ = (
        ("widths", c_void_p), ("slots", c_long), ("forwards", c_long), ("seconds", c_double),
        ("tokens", c_void_p), ("ages", c_void_p), ("width", c_long),
        *((name, c_void_p) for name in ("lengths", "kept", "dropped", "strides")),
        ("length", c_long), ("kept_of_all", c_long), ("stride", c_long),
        *((name, c_void_p) for name in ("expected", "rejected_places", "rejected_counts", "rejected")),
        ("rejected_width", c_long),
    )  # fmt: skip


STRUCTS: tuple[type[Structure], ...] = (
    Linear, GatedLinear, Layer, Model, Batch, DraftTable, RowTable, StepUpdates,
)  # fmt: skip

FUNCTIONS = {
    "forward": ((POINTER(Model), POINTER(Batch), c_long, c_void_p, c_void_p), ctypes.c_int),
    "workspace_size": ((POINTER(Model), c_long, c_long, c_long), c_long),
    "project_vocabulary": ((POINTER(Linear), c_long, c_void_p, c_void_p, c_long), None),
    "prepare_panels": ((c_void_p, c_long), None),
    "pack": ((c_void_p, c_long, c_long, c_long, c_long, c_void_p, c_long), None),
    "k_head_strides": ((POINTER(Linear), POINTER(Linear), c_long, c_void_p, c_void_p, c_void_p), None),
    "select_states": ((c_void_p, c_long, c_void_p, c_long, c_void_p), None),
    "rank_logits": ((*[c_long] * 3, *[c_void_p] * 2, c_long, *[c_void_p] * 2, c_long), None),
    "all_finite": ((c_void_p, c_long), ctypes.c_int),
    "lay_out_drafts": ((POINTER(DraftTable), c_long, c_long, c_long, c_long, c_void_p), None),
    "measure_drafts": ((POINTER(DraftTable), c_long, c_long, c_void_p), None),
    "advance_drafts": ((POINTER(DraftTable), *[c_long] * 2, *[c_void_p] * 9), c_long),
    "extend_rows": ((POINTER(RowTable), POINTER(StepUpdates), c_long, c_long, c_void_p), c_long),
    "extend_rows_alike": ((POINTER(RowTable), c_long, c_long, c_void_p, *[c_long] * 3, c_double, c_void_p), c_long),
    "fill_mask": ((POINTER(Batch), c_void_p, c_void_p), None),
}
"""Parameters and result of every function that the library exports."""


class LayoutError(Exception):
    """The structures of the library are not those of this module."""


def bind(code: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the library's functions. Raises LayoutError if a structure has another size in C."""
    for struct in STRUCTS:
        try:
            size = c_long.in_dll(code, f"sizeof_{struct.__name__}").value
        except ValueError:
            raise LayoutError(f"the library does not export the size of {struct.__name__}") from None
        if size != ctypes.sizeof(struct):
            raise LayoutError(f"{struct.__name__} has {size} bytes in C and {ctypes.sizeof(struct)} in Python")
    for name, (parameters, result) in FUNCTIONS.items():
        function = getattr(code, name)
        function.argtypes, function.restype = parameters, result
    return code
