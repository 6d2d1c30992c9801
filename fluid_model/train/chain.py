"""A recipe file's stages: each one's settings are the former's with the changes of its table `next`. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..common.errors import ConfigError
from ..common.files import Nested
from .recipe import Recipe, build_recipe

ALTERNATIVES = (("steps", "epochs"), ("epochs", "steps"), ("warmup", "warmup_steps"))
"""Pairs of `optim` settings; setting the first in a later stage discards the inherited second."""
STAGE_SUFFIX = ".stage-"
"""Between `out` and the number of a stage, in the folder of an intermediate result."""


def build_chain(values: Mapping[str, Any]) -> list[Recipe]:
    """The stages of a recipe file in order: its own settings, then with the changes of its table `next`, and so on.

    Each stage after the first starts from the result of the one before. Unchanged settings are inherited, except the
    tables lora and loss.  Raises ConfigError naming the field.
    """
    recipes: list[Recipe] = []
    values = dict(values)
    where = ""  # of a stage's fields in messages
    while True:
        # 1) this stage; a result that is not the last gets a folder of its own
        following = values.pop("next", None)
        out = values.get("out")
        intermediate = {"out": f"{out}{STAGE_SUFFIX}{len(recipes) + 1}"} if following and out else {}
        try:
            recipe = build_recipe({**values, **intermediate})
        except ConfigError as error:
            raise ConfigError(f"{where}{error}") from error
        recipes.append(recipe)
        if following is None:
            return recipes
        if not isinstance(following, Mapping):
            raise ConfigError(f"{where}next={following!r} must be a table")
        # 2) the settings of the next one
        where += "next."
        inherited = {name: value for name, value in values.items() if name not in ("lora", "loss", "model")}
        values = _merged({**inherited, "model": {"parent": recipe.out}}, following)
        # 3) of two alternative settings, the later stage's replaces the earlier stage's
        optim = following.get("optim")
        for name, alternative in ALTERNATIVES:
            if isinstance(optim, Mapping) and name in optim and alternative not in optim:
                values["optim"].pop(alternative, None)


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> Nested:
    merged = dict(values)
    for name, value in changes.items():
        inner = merged.get(name)
        merged[name] = _merged(inner, value) if isinstance(value, Mapping) and isinstance(inner, Mapping) else value
    return merged
