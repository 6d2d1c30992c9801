"""The judge's side, run in a jail of its own: tests, with stand-ins for the program's functions.

A stand-in sends its arguments to the program's process and gives back plain data, rebuilt here from JSON, so that no
object, builtin or module of the program's is ever among what the tests compare. Only this process says `passed`, over
a pipe that the program has no end of. It answers many programs: each is judged in a fork of its own.
"""

from __future__ import annotations

import builtins
import copy  # noqa: F401  what tests and prompts import most: once here, not in every fork
import ctypes
import dis
import importlib
import json
import marshal
import math  # noqa: F401
import os
import random  # noqa: F401
import string  # noqa: F401
import sys
import typing  # noqa: F401
from types import CodeType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, BinaryIO

_ENDS = ("StopIteration", "StopAsyncIteration", "GeneratorExit")
"""What would end a loop of the tests rather than fail it."""
_MODULES = sys.stdlib_module_names


_SAID = 91
"""The exit code of a fork that has given its verdict."""


class ProgramError(Exception):
    """An exception of a type that only the program has."""


class Told(BaseException):
    """Carries an exception of the program's past those of taking it apart."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class Over(BaseException):
    """The program has failed, whatever the tests make of it."""


_BAD = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError)
"""What comes of taking apart an answer that is none."""
_BROKEN = "the program broke the protocol"
_TOOLS = ("abs", "all", "any", "isinstance", "issubclass", "len", "max", "min", "print", "repr", "round", "sorted")
"""Built-in functions that tests use on what they look at."""


class Line:
    """To the warden, and through it to the program. over: why the program has failed already, if it has.  taken:
    answers that were read.
    """

    def __init__(self, requests: BinaryIO, answers: int) -> None:
        self._requests, self._answers = requests, answers
        self.over: str | None = None
        self.taken = 0

    def fail(self, reason: str) -> Over:
        """The Over to raise."""
        self.over = self.over or reason
        return Over(reason)

    def send(self, kind: bytes, data: bytes) -> None:
        data = kind + data
        data = len(data).to_bytes(4, "big") + data
        while data:
            data = data[os.write(self._answers, data) :]

    def take(self, part: str) -> dict[str, Any]:
        """That part of the program's next answer, rebuilt. Raises what the program raised, or Over."""
        content = self._requests.read(int.from_bytes(self._requests.read(4), "big"))
        self.taken += 1
        answer = json.loads(content)
        if "over" in answer:
            raise self.fail(str(answer["over"] or _BROKEN))
        if "raised" in answer:
            kind, own, text, args = answer["raised"]
            raise Told(self._error(str(kind), str(own), str(text), [*map(self.rebuilt, args)]))
        return {name: self.rebuilt(answer[name]) for name in (part, "after") if name in answer}

    def call(self, target: int | str, positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Call in the program's process; returns its value or raises what it raised."""
        try:
            request = marshal.dumps((target, _sent(positional), _sent(named)))
        except ValueError:
            raise self.fail("the tests hand over what is no plain data") from None
        self.send(b"c", request)
        answer = self.answer("value")
        for argument, after in zip(positional, answer.get("after", ()), strict=False):
            _change(argument, after)
        return answer["value"]

    def answer(self, part: str) -> dict[str, Any]:
        """As `take`, and Over where the program's answer makes no sense."""
        try:
            answer = self.take(part)
            answer[part]
        except Told as told:
            raise told.error from None
        except _BAD:
            raise self.fail(_BROKEN) from None
        return answer

    def _error(self, name: str, own: str, text: str, args: list[Any]) -> BaseException:
        """The exception to raise for one of the program's: of the built-in type that its own is, or is a kind of, where
        that is no way to end tests early, else a ProgramError; Over for those that end a process.
        """
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, BaseException):
            if not issubclass(kind, Exception):
                return self.fail(f"the program raised {own}")
            if name in _ENDS:
                return RuntimeError(f"the program raised {own}")
            if kind is not Exception or own == name:
                try:
                    return kind(*args)
                except TypeError:  # one with more to it than a text, whose parts are no plain data
                    pass
        return ProgramError(f"{own}: {text}" if text else own)

    def rebuilt(self, value: Any) -> Any:
        """A value from its JSON: exactly plain builtins, or a handle."""
        if isinstance(value, list):
            return [self.rebuilt(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((sign, inner),) = value.items()
        if sign in _REBUILT:
            return _REBUILT[sign](self.rebuilt, inner)
        if sign == "m" and inner in _MODULES:
            return importlib.import_module(inner)
        if sign == "h":
            return Handle(self, int(inner[0]), str(inner[1]))
        raise ValueError(sign)


_REBUILT: dict[str, Callable[[Callable[[Any], Any], Any], Any]] = {
    "i": lambda again, inner: int(inner, 16),
    "f": lambda again, inner: float.fromhex(inner),
    "c": lambda again, inner: complex(*map(again, inner)),
    "b": lambda again, inner: inner.encode("latin-1"),
    "B": lambda again, inner: bytearray(inner.encode("latin-1")),
    "t": lambda again, inner: tuple(map(again, inner)),
    "s": lambda again, inner: set(map(again, inner)),
    "z": lambda again, inner: frozenset(map(again, inner)),
    "d": lambda again, inner: {again(k): again(v) for k, v in inner},
}


class Handle:
    """Stands for what stays in the program's process. It can be called, asked for attributes and gone through, and
    whether it is true; what it is, and whether it equals something, is not for it to say.
    """

    __slots__ = ("_id", "_line", "_type")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, line: Line, number: int, kind: str) -> None:
        self._line, self._id, self._type = line, number, kind

    def __call__(self, *positional: Any, **named: Any) -> Any:
        return self._line.call(self._id, positional, named)

    def __getattr__(self, name: str) -> Any:
        return self._line.call("getattr", (self, name), {})

    def __getitem__(self, key: Any) -> Any:
        return self.__getattr__("__getitem__")(key)

    def __len__(self) -> int:
        length: int = self._line.call("len", (self,), {})
        return length

    def __bool__(self) -> bool:
        truth: bool = self._line.call("bool", (self,), {})
        return truth

    def __iter__(self) -> Iterator[Any]:
        return iter(self._line.call("list", (self,), {}))

    def _unfit(self, *_: Any) -> Any:
        raise self._line.fail(f"the program gave a {self._type}, which is no plain data")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = _unfit


def _sent(value: Any) -> Any:
    """An argument as it travels: a handle as (..., its number)."""
    if isinstance(value, Handle):
        return (..., value._id)
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(_sent(item) for item in value)
    if type(value) is dict:
        return {_sent(k): _sent(v) for k, v in value.items()}
    return value


def _change(argument: Any, after: Any) -> None:
    """Give an argument the contents that the call left it with."""
    if type(argument) is list and type(after) is list:
        argument[:] = after
    elif type(argument) in (dict, set) and type(after) is type(argument):
        argument.clear()
        argument.update(after)


def _wanted(code: CodeType) -> list[str]:
    """Names that tests take from outside: globals they read and nowhere set, in any of their functions."""
    read: dict[str, None] = {}
    made: set[str] = set()
    todo = [code]
    while todo:
        part = todo.pop()
        todo += [const for const in part.co_consts if isinstance(const, CodeType)]
        for step in dis.get_instructions(part):
            if step.opname in ("LOAD_NAME", "LOAD_GLOBAL"):
                read[step.argval] = None
            elif step.opname in ("STORE_NAME", "STORE_GLOBAL"):
                made.add(step.argval)
    return [name for name in read if name not in made]


def run(line: Line, setup: str, tests: str, entry: str) -> None:
    """Run tests to their end, or raise what stops them."""
    found = line.answer("names")["names"]
    module = sys.modules["program"] = type(sys)("program")  # where dataclasses look their names up
    space = vars(module)
    if setup:
        exec(_prompt(setup), space)
    code = _compiled(tests)
    for name in [entry] if entry else _chosen(line, _wanted(code), found):
        space.pop(name, None)
        if name in found:
            space[name] = found[name]
    exec(code, space)


def _chosen(line: Line, wanted: list[str], found: dict[str, Any]) -> list[str]:
    """Names to take from the program: a `sum` of its own only where the tests can be about nothing else.

    The tests alone decide that, never what the program defines: with a `sum` and an `all` of its own it would pass
    `assert all([sum(2, 3) == 5])`. Raises Over where it is not clear.
    """
    own = [name for name in wanted if not hasattr(builtins, name)]
    if not own:
        tools = [name for name in wanted if name in _TOOLS or isinstance(getattr(builtins, name), type)]
        own = wanted if len(wanted) == 1 else [name for name in wanted if name not in tools]
        if len(own) != 1 and any(name in found for name in wanted):
            raise line.fail(f"the tests do not say which of {', '.join(wanted)} is the program's")
    return [name for name in own if name in found]


def _compiled(source: str, name: str = "tests.py") -> CodeType:
    return compile(source, name, "exec", dont_inherit=True)  # not with this module's own __future__


def _prompt(setup: str) -> CodeType:
    """A prompt's code; one that ends with a function's head gets a body."""
    try:
        return _compiled(setup, "prompt.py")
    except SyntaxError:
        last = setup.rstrip().rpartition("\n")[2]
        indent = last[: len(last) - len(last.lstrip())]
        try:
            return _compiled(f"{setup.rstrip()}\n{indent}    pass\n", "prompt.py")
        except SyntaxError:
            pass
        raise


def judge(line: Line, setup: str, tests: str, entry: str) -> None:
    """Run tests and say what came of it."""
    try:
        run(line, setup, tests, entry)
        stopped = None
    except BaseException as error:
        stopped = str(error) or type(error).__name__
    reason = line.over or stopped
    text = (reason or "")[:500].encode("utf-8", "backslashreplace").decode()  # it may hold half a character
    line.send(b"v", json.dumps([reason is None, text, line.taken]).encode())


def names(tests: str, entry: str) -> list[str]:
    """What the program is to tell of."""
    try:
        return [entry] if entry else _wanted(_compiled(tests))
    except (SyntaxError, ValueError):
        return []


def _end_with(parent: int) -> None:
    """Have the kernel end this fork with the judge. What ends the judge is not told of its forks everywhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL
        if os.getppid() != parent:
            os._exit(0)


def main() -> None:
    """Judge programs until nobody asks: (setup, tests, entry), answered by names, then calls, then a verdict with the
    number of answers taken, by which the warden knows that none was left in the pipe; -1 where that is not known.
    """
    requests, answers = sys.stdin.buffer, os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (1, 2):
        os.dup2(null, number)
    line, parent = Line(requests, answers), os.getpid()
    while True:
        setup, tests, entry = marshal.load(requests)
        line.send(b"n", json.dumps(names(tests, entry)).encode())
        child = os.fork()
        if not child:
            _end_with(parent)
            judge(line, setup, tests, entry)
            os._exit(_SAID)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != _SAID:
            line.send(b"v", b'[false, "the tests ended their process", -1]')


if __name__ == "jailed":
    main()
