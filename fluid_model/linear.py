"""Linear maps of one input as one, by the fastest kernel at hand.

On CPUs float32 maps go to oneDNN with weights laid out for it: twice as fast as `torch.nn.functional.linear` on CPUs
whose wide instructions MKL does not use, no slower elsewhere. The operators are those `torch.compile` writes into its
own code; a torch without them takes the plain way.

Legend: M slots (of all rows), D size of what is read, N of what is written, summed over parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

FEWEST = 4
"""Slots from which on oneDNN is the faster way."""
MOST_BYTES = 2**28
"""Weights of a model that are laid out a second time at most."""

_version = attrgetter("_version")
Part = tuple[Tensor, Tensor | None]
"""Weight (n, D) and bias (n,) or None."""


def bucket(slots: int) -> int:
    """Slots a forward is filled up to, an eighth more at most: oneDNN makes code for every new number of them."""
    step = 1 << max(0, slots.bit_length() - 4)
    return -(-slots // step) * step


def packs(weights: Sequence[Tensor]) -> bool:
    """Whether maps of these weights are laid out for oneDNN."""
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not has_onednn or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    plain = all(w.device.type == "cpu" and w.dtype == torch.float32 and not w.is_inference() for w in weights)
    return plain and sum(weight.nbytes for weight in weights) <= MOST_BYTES


class Linear:
    """Maps that read the same, as one map. Follows weights that are changed in place."""

    def __init__(self, parts: Sequence[Part], *, pack: bool) -> None:
        """pack: lay out the weights for oneDNN at the first call that gains by it."""
        self._parts, self._pack = list(parts), pack
        self._weights = [weight for weight, _ in parts]
        self._watched = [tensor for part in parts for tensor in part if tensor is not None]
        self._laid: Tensor | None = None
        self._bias: Tensor | None = None
        self._version = -1

    @classmethod
    def of(cls, module: Any) -> Callable[[Tensor], Tensor]:
        """The map of a module for any number of slots; the module itself where it is more than a linear map."""
        if type(module) is not nn.Linear:
            found: Callable[[Tensor], Tensor] = module
            return found
        whole = cls([(module.weight, module.bias)], pack=packs([module.weight]))
        return whole.filled

    def filled(self, inputs: Tensor) -> Tensor:
        """(M, D) -> (M, N) for any M: filled up to its `bucket`."""
        more = bucket(len(inputs)) - len(inputs) if self._pack else 0
        return self(functional.pad(inputs, (0, 0, 0, more)))[: len(inputs)] if more else self(inputs)

    def __call__(self, inputs: Tensor, more: Tensor | None = None) -> Tensor:
        """inputs: (M, D).  more: (M, N) to add, which may be overwritten.  Returns (M, N)."""
        if self._pack and len(inputs) >= FEWEST:
            laid = self._packed()
            if more is None:
                found: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, laid, self._bias, "none", [], "")
            else:
                found = torch.ops.mkldnn._linear_pointwise.binary(inputs, more, laid, self._bias, "add")
            return found
        each = [functional.linear(inputs, *part) for part in self._parts]
        found = each[0] if len(each) == 1 else torch.cat(each, -1)
        return found if more is None else more.add_(found)

    def _packed(self) -> Tensor:
        """All weights, laid out for oneDNN."""
        version = sum(map(_version, self._watched))
        if self._laid is None or version != self._version:
            weight = torch.cat([weight.detach() for weight in self._weights])
            self._laid, self._version = torch.ops.mkldnn._reorder_linear_weight(weight, None), version
            biases = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in self._parts]
            self._bias = None if all(bias is None for _, bias in self._parts) else torch.cat(biases).detach()
        return self._laid
