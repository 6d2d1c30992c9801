"""Decoders by name: this package's, those of other packages, and classes that a user names. No torch.

    fluid                      one of BUILT_IN
    stride                     an entry point of the group `fluid_eval.decoders` of an installed package
    package.module:Class       a class of any module, of the working directory, too

Other packages are loaded only where a name is not this package's, or where names are listed. A decoder of foreign code
is recorded with the hash of its source. No code is imported because a stored run names it.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .common.errors import ConfigError, reason
from .common.fields import build
from .common.files import Nested
from .common.names import did_you_mean
from .settings import ArSettings, DecoderSettings, FluidSettings
from .settings.block_diffusion import Bd3lmSettings, FastDllmSettings, NbdiffSettings, SdarSettings
from .settings.masked_diffusion import DreamSettings, LladaSettings, MdlmSettings
from .settings.wedlm import WedlmSettings

BUILT_IN: tuple[type[DecoderSettings], ...] = (
    ArSettings, FluidSettings, NbdiffSettings, LladaSettings, MdlmSettings, DreamSettings, Bd3lmSettings, SdarSettings,
    FastDllmSettings, WedlmSettings,
)  # fmt: skip
GROUP = "fluid_eval.decoders"
"""Group of entry points."""
FIXED = {"name", "source", "methods", "needs", "strategy", "scorer"}
"""Names that no setting may have."""
_OWN = __name__.partition(".")[0]
_named: dict[str, type[DecoderSettings]] = {}
"""Classes that were named as `module:Class` in this process."""


class DecoderNotFoundError(ConfigError):
    """A decoder that this process does not find. Another one, of another path, may."""


def decoders() -> dict[str, type[DecoderSettings]]:
    """Every registered decoder by name, this package's first, and those named before in this process.

    One that cannot be loaded is left out with a warning.
    """
    known = {kind.name: kind for kind in BUILT_IN}
    for name in sorted(_entry_points().keys() - known):
        try:
            known[name] = _from_entry_point(name)
        except ConfigError as error:
            logging.getLogger(__name__).warning("%s", error)
    return {**known, **_named}


def decoder_named(name: Any, *, stored: bool = False) -> type[DecoderSettings]:
    """The decoder of this name.

    stored: the name comes from a stored run, whose foreign code is not imported unless it is already.
    Raises ConfigError naming the known ones and the nearest, or what a class lacks.
    """
    for kind in BUILT_IN:
        if kind.name == name:
            return kind
    if isinstance(name, str) and ":" in name:
        if stored and name not in _named:
            raise ConfigError(f"decoder={name!r} is code, imported only where it is named: pass --decoder {name}")
        return _from_module(name)
    if isinstance(name, str) and name in _entry_points():
        return _from_entry_point(name)
    known = decoders()
    raise DecoderNotFoundError(
        f"decoder={name!r} is unknown; {did_you_mean(name, known)}known: {', '.join(known)}, or MODULE:CLASS"
    )


def default_decoder(method: str | None, *, has_head: bool = True) -> str:
    """Name of the first decoder that serves a checkpoint of this adaptation; ar for None, and where the K-head that all
    of them need is missing.

    has_head: whether the checkpoint has a K-head.  Raises ConfigError if no decoder serves the adaptation.
    """
    if method is None:
        return ArSettings.name
    if not (serving := _serving(method)):
        raise ConfigError(f"models adapted to {method} have no decoder here yet; decoders are {', '.join(decoders())}")
    return next((kind.name for kind in serving if has_head or "K-head" not in kind.needs), ArSettings.name)


def check_method(where: str, method: str, *, stated: bool = False) -> None:
    """Raise ConfigError unless a decoder serves this adaptation.

    stated: by a user alone, which tells nothing of a K-head: a decoder must serve it without one.
    """
    if not any(not stated or "K-head" not in kind.needs for kind in _serving(method)):
        kinds = [kind for kind in decoders().values() if not stated or "K-head" not in kind.needs]
        known = dict.fromkeys(name for kind in kinds for name in kind.methods)
        raise ConfigError(f"{where}={method!r} is unknown; known: {', '.join(known)}")


def decoder_settings(values: Any, *, stored: bool = False) -> DecoderSettings:
    """A decoder's settings from plain values: {"name": "fluid", "confidence": 0.9}.  stored: as in `decoder_named`.

    Raises ConfigError for an unknown decoder or setting, for a bad value, and if the decoder's source has changed.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"decoder={values!r} must be a name or a table")
    values = dict(values)
    kind = decoder_named(values.pop("name", ArSettings.name), stored=stored)
    if (source := values.pop("source", None)) not in (None, source_of(kind)):
        raise ConfigError(f"decoder={kind.name}: its source has hash {source_of(kind)} here, {source} in the run")
    for setting in values.keys() - setting_names(kind):
        if others := [name for name, other in decoders().items() if setting in setting_names(other)]:
            raise ConfigError(
                f"decoder.{setting} is no setting of decoder {kind.name!r} but of {' and '.join(others)}; "
                f"pass --decoder {' or '.join(others)}"
            )
    settings: DecoderSettings = build(kind, values, "decoder.")
    return settings


def stored_decoder(values: Any) -> DecoderSettings | None:
    """Settings of a stored run's decoder; None where they are not known here."""
    try:
        return decoder_settings(values, stored=True)
    except ConfigError:
        return None


def claims_lossless(values: Any) -> bool:
    """Whether a stored run's decoder, other than ar, claims to write AR's text."""
    decoder = stored_decoder(values)
    return decoder is not None and decoder.writes_ar_text and decoder.name != ArSettings.name


def plain_values(settings: DecoderSettings) -> Nested:
    """Name, source if it is foreign code, and settings: what `decoder_settings` takes."""
    source = source_of(type(settings))
    return {"name": settings.name, **({"source": source} if source else {}), **asdict(settings)}


def setting_names(kind: type[DecoderSettings]) -> list[str]:
    """A decoder's settings by name, in order of declaration."""
    return [f.name for f in fields(kind)]


def source_of(kind: type[DecoderSettings]) -> str | None:
    """Hash of the files with settings, strategy and scorer, 12 hex digits; None if all are this package's."""
    modules = {base.__module__ for base in kind.__mro__ if issubclass(base, DecoderSettings)}
    modules |= {reference.partition(":")[0] for reference in (kind.strategy, kind.scorer) if reference}
    foreign = sorted(name for name in modules if name.partition(".")[0] != _OWN)
    return hashlib.sha256(b"".join(map(_source, foreign))).hexdigest()[:12] if foreign else None


def resolve(reference: str) -> Callable[..., Any]:
    """The callable of `module:callable`. Raises ConfigError if there is none."""
    module, _, name = reference.partition(":")
    named: Callable[..., Any] | None = getattr(_imported(reference, module), name, None)
    if named is None or not callable(named):
        raise DecoderNotFoundError(f"{reference}: {module} has no class or function {name!r}")
    return named


def _from_module(name: str) -> type[DecoderSettings]:
    if name not in _named:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # behind installed packages, which it cannot hide
        kind = _checked(resolve(name), f"decoder={name}")
        if kind.name != name:
            hint = "" if ":" in kind.name else f", by an entry point of {GROUP}; without one, leave `name` out"
            raise ConfigError(f"decoder={name}: the class is to be named as {kind.name}{hint}")
        _named[name] = kind
    return _named[name]


def _from_entry_point(name: str) -> type[DecoderSettings]:
    value = _entry_points()[name]
    kind = _checked(resolve(value), f"decoder={name} ({value})")
    if kind.name != name:
        raise ConfigError(f"decoder={name} ({value}): the class is named {kind.name!r}; name it as its entry point")
    return kind


@cache
def _entry_points() -> dict[str, str]:
    """`module:Class` by name, of all installed packages."""
    return {point.name: point.value for point in metadata.entry_points(group=GROUP)}


@cache
def _source(module: str) -> bytes:
    """A module's file, as it was when first asked for: code that has been imported stays."""
    if module == "__main__":
        raise ConfigError(
            "a decoder of '__main__' (a notebook, a script) is in no file that others can import: give it one"
        )
    try:
        module_spec = find_spec(module)
        return Path(str(module_spec and module_spec.origin)).read_bytes()
    except (ImportError, ValueError, OSError) as error:
        raise ConfigError(f"module {module!r} of a decoder cannot be read: {reason(error)}") from error


def _imported(where: str, module: str) -> Any:
    try:
        return import_module(module)
    except (Exception, SystemExit) as error:  # foreign code raises errors of many types
        raise DecoderNotFoundError(
            f"{where}: importing {module!r} failed: {type(error).__name__}: {reason(error)}"
        ) from error


def _serving(method: str) -> list[type[DecoderSettings]]:
    """Decoders of an adaptation, its namesake first; those of other packages only where this package has none."""
    own = sorted((kind for kind in BUILT_IN if method in kind.methods), key=lambda kind: kind.name != method)
    return own or [kind for kind in decoders().values() if method in kind.methods]


def _checked(kind: Any, where: str) -> type[DecoderSettings]:
    """The class, if it states all that a decoder must. Raises ConfigError with what it lacks."""
    if not (inspect.isclass(kind) and issubclass(kind, DecoderSettings)):
        raise ConfigError(f"{where}: no subclass of fluid_model.DecoderSettings")
    lacking = []
    if "__dataclass_fields__" not in vars(kind):
        lacking.append("@dataclass(frozen=True)")
    elif fixed := (FIXED & set(setting_names(kind))):
        raise ConfigError(f"{where}: {', '.join(sorted(fixed))} without a type: with one it would be a setting")
    if not kind.__doc__ or kind.__doc__.startswith(f"{kind.__name__}("):
        lacking.append("a docstring")
    if ":" not in kind.strategy:
        lacking.append('strategy = "module:Class"')
    lacking += [f"a tuple {name}" for name in ("methods", "needs") if not isinstance(getattr(kind, name), tuple)]
    if lacking:
        raise ConfigError(f"{where}: the class lacks {', '.join(lacking)}")
    source_of(kind)  # read now: later changes are not what runs
    return kind
