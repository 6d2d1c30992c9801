"""The pictures of the training layouts are what the layouts build."""

from __future__ import annotations

import random
import re

from fluid_model.train import row_layouts
from fluid_model.train.masked_layouts import BlockCausalLayout, CanvasLayout
from fluid_model.train.row_layouts import IGNORE, AllMaskLayout, Example, NoisedBlockLayout, pack_rows

MASK, END = 258, 1


class Scripted(random.Random):
    """Draws given numbers, and the smallest integers."""

    def __init__(self, *draws):
        super().__init__()
        self.draws = list(draws)

    def random(self):
        return self.draws.pop(0)

    def randint(self, low, high):
        return low


FIELDS = {
    "id": "ids",
    "position": "positions",
    "label": "labels",
    "segment": "segment",
    "anchor": "anchor",
    "step": "step",
}


def pictures():
    """The tables of the module's docstring, in order: {name of a row: its cells}."""
    tables = []
    for line in row_layouts.__doc__.splitlines():
        name, _, rest = line.strip().partition(" ")
        cells = re.split(" {6,}", rest.strip())[0].split()  # what follows a gap explains the row
        if name == "slot" and cells[0] == "0":
            tables.append({})
        elif tables and name in FIELDS:
            tables[-1][name] = cells
    return tables


def test_the_pictures_of_the_layouts():
    """Each table of the docstring is what its layout builds; a to e are tokens 10 to 14, p and q 20 and 21."""
    five, three, two = (
        Example(tuple(range(10, 15)), ((1, 5),)),
        Example((10, 11, 12), ((1, 3),)),
        Example((20, 21), ((1, 2),)),
    )
    one_mask = AllMaskLayout(MASK, 1)
    rows = [
        AllMaskLayout(MASK, 2).build(five, Scripted(0.9, 0.1, 0.9), 0),
        NoisedBlockLayout(MASK, END, 2, noise_level=0.5).build(five, Scripted(0.1, 0.1, 0.9, 0.1), 0),
        CanvasLayout(MASK, END, noise_level=0.5).build(five, Scripted(0.1, 0.9, 0.1, 0.9), 0),
        BlockCausalLayout(MASK, END, 2, noise_level=0.5).build(five, Scripted(0.1, 0.9, 0.9, 0.1, 0.1), 0),
        pack_rows([one_mask.build(three, Scripted(0.1), 0), one_mask.build(two, Scripted(), 0)]),
    ]
    letters = {"M": MASK, ".": IGNORE, "p": 20, "q": 21, "z": END} | {
        letter: 10 + i for i, letter in enumerate("abcde")
    }
    for row, picture in zip(rows, pictures(), strict=True):
        assert len(picture) >= 5
        for name, cells in picture.items():
            assert getattr(row, FIELDS[name]) == [letters[cell] if cell in letters else int(cell) for cell in cells], (
                name
            )
