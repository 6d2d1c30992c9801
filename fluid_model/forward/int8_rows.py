"""Weights as int8 with one float32 scale a row: a weight is its integer, -127 to 127, times the scale of its output.

A model loaded with `dtype=int8` has its linear maps rounded so, once, in torch's own weights. All forwards then compute
the same function; the compiled one reads the integers, a quarter of the bytes. Activations and sums are float32.

    row of weights     0.50   -1.27    0.003        scale 1.27 / 127 = 0.01
    integers             50    -127        0
    rounded            0.50   -1.27    0.000

Legend: N outputs, K inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LABEL = "int8 by row"
"""What results call such weights."""
LARGEST = 127


def rounded(weights: Tensor) -> tuple[Tensor, Tensor]:
    """weights (N, K) -> integers (N, K) int8 and scales (N,) float32. Rounded weights give their integers again."""
    wide = weights.float()
    scales = wide.abs().amax(1) / LARGEST
    scales = scales.where(scales != 0, 1)  # a row of zeros
    return (wide / scales[:, None]).round().to(torch.int8), scales


@torch.no_grad()
def round_linear_maps(model: Any) -> None:
    """Round the weights of all linear maps of a model in place, embeddings where they are tied to one."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            integers, scales = rounded(module.weight)
            module.weight.copy_(integers * scales[:, None])
