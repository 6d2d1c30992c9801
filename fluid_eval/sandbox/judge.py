"""The judge's side, run in a jail of its own: runs the tests, with stand-ins for the program's functions.

    assert add(2, 3) == 5          `add` is a Handle: it sends (0, (2, 3), {}) to the program's process
                                   and returns 5, decoded from JSON, to the tests

So the tests compare plain data made here, never an object, builtin or module of the program. Only this process can
report `passed`, over a pipe that the program cannot write to. One judge serves many programs: each is judged in a fork.

Messages to the warden: `n` names wanted, `c` a call, `v` the verdict. See `child` for the program's answers.
"""

from __future__ import annotations

import builtins
import copy  # noqa: F401  modules that tests and prompts import most: once here, not in every fork
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
"""Exceptions that would end a loop of the tests instead of failing them."""
_MODULES = sys.stdlib_module_names
_REPORTED = 91
"""The exit code of a fork that has sent its verdict."""


class ProgramError(Exception):
    """An exception whose type is defined by the program."""


class ProgramRaised(BaseException):
    """Wraps an exception of the program, so that it is not taken for an error of decoding."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class ProgramFailed(BaseException):
    """The program has failed, even if the tests catch this."""


_DECODING_ERRORS = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError)
"""Exceptions from decoding a malformed answer."""
_BROKEN = "the program broke the protocol"
_TOOLS = ("abs", "all", "any", "isinstance", "issubclass", "len", "max", "min", "print", "repr", "round", "sorted")
"""Built-in functions that tests apply to results."""


class ProgramChannel:
    """The judge's channel to the program, relayed by the warden.

    failure: why the program has failed, the first reason.  received: answers that were read.
    """

    def __init__(self, requests: BinaryIO, answers: int) -> None:
        self._requests, self._answers = requests, answers
        self.failure: str | None = None
        self.received = 0

    def fail(self, reason: str) -> ProgramFailed:
        """Record a failure; the exception to raise."""
        self.failure = self.failure or reason
        return ProgramFailed(reason)

    def send(self, kind: bytes, data: bytes) -> None:
        data = kind + data
        data = len(data).to_bytes(4, "big") + data
        while data:
            data = data[os.write(self._answers, data) :]

    def receive(self, part: str) -> dict[str, Any]:
        """Fields `part` and "after" of the program's next answer, decoded.

        Raises ProgramRaised with the program's exception, or ProgramFailed.
        """
        content = self._requests.read(int.from_bytes(self._requests.read(4), "big"))
        self.received += 1
        answer = json.loads(content)
        if "over" in answer:
            raise self.fail(str(answer["over"] or _BROKEN))
        if "raised" in answer:
            kind, own, text, args = answer["raised"]
            raise ProgramRaised(self._error(str(kind), str(own), str(text), [*map(self.decode, args)]))
        return {name: self.decode(answer[name]) for name in (part, "after") if name in answer}

    def call(self, target: int | str, positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Call a handle in the program's process. Returns its value, or raises the exception that it raised."""
        try:
            request = marshal.dumps((target, _encode(positional), _encode(named)))
        except ValueError:
            raise self.fail("the tests hand over what is no plain data") from None
        self.send(b"c", request)
        answer = self.answer("value")
        for argument, after in zip(positional, answer.get("after", ()), strict=False):
            _mutate(argument, after)
        return answer["value"]

    def answer(self, part: str) -> dict[str, Any]:
        """As `receive`, with the program's exception raised itself, and ProgramFailed for a malformed answer."""
        try:
            answer = self.receive(part)
            answer[part]
        except ProgramRaised as wrapped:
            raise wrapped.error from None
        except _DECODING_ERRORS:
            raise self.fail(_BROKEN) from None
        return answer

    def _error(self, name: str, own: str, text: str, args: list[Any]) -> BaseException:
        """The exception that the tests see for one of the program's.

        Its nearest built-in type, unless that would end the tests early; a ProgramError for types of the program;
        ProgramFailed for SystemExit and other exceptions that end a process.
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
                except TypeError:  # its constructor needs arguments that are no plain data
                    pass
        return ProgramError(f"{own}: {text}" if text else own)

    def decode(self, value: Any) -> Any:
        """A value from its JSON: an instance of a plain builtin type, a module of the standard library, or a handle."""
        if isinstance(value, list):
            return [self.decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((sign, inner),) = value.items()
        if sign in _DECODERS:
            return _DECODERS[sign](self.decode, inner)
        if sign == "m" and inner in _MODULES:
            return importlib.import_module(inner)
        if sign == "h":
            return Handle(self, int(inner[0]), str(inner[1]))
        raise ValueError(sign)


_DECODERS: dict[str, Callable[[Callable[[Any], Any], Any], Any]] = {
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
    """Stand-in for an object in the program's process.

    Calls, attributes, indexing, iteration, length and truth are forwarded. Comparisons fail the program: their result
    would be the program's word.
    """

    __slots__ = ("_channel", "_id", "_type")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, channel: ProgramChannel, number: int, kind: str) -> None:
        self._channel, self._id, self._type = channel, number, kind

    def __call__(self, *positional: Any, **named: Any) -> Any:
        return self._channel.call(self._id, positional, named)

    def __getattr__(self, name: str) -> Any:
        return self._channel.call("getattr", (self, name), {})

    def __getitem__(self, key: Any) -> Any:
        return self.__getattr__("__getitem__")(key)

    def __len__(self) -> int:
        length: int = self._channel.call("len", (self,), {})
        return length

    def __bool__(self) -> bool:
        truth: bool = self._channel.call("bool", (self,), {})
        return truth

    def __iter__(self) -> Iterator[Any]:
        return iter(self._channel.call("list", (self,), {}))

    def _unfit(self, *_: Any) -> Any:
        raise self._channel.fail(f"the program gave a {self._type}, which is no plain data")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = _unfit


def _encode(value: Any) -> Any:
    """An argument for marshal: a handle becomes (..., its number)."""
    if isinstance(value, Handle):
        return (..., value._id)
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(_encode(item) for item in value)
    if type(value) is dict:
        return {_encode(k): _encode(v) for k, v in value.items()}
    return value


def _mutate(argument: Any, after: Any) -> None:
    """Give a mutable argument the contents that the call left in it."""
    if type(argument) is list and type(after) is list:
        argument[:] = after
    elif type(argument) in (dict, set) and type(after) is type(argument):
        argument.clear()
        argument.update(after)


def _free_names(code: CodeType) -> list[str]:
    """Free names of tests: globals that they read and never set, in any of their functions."""
    read: dict[str, None] = {}
    assigned: set[str] = set()
    todo = [code]
    while todo:
        part = todo.pop()
        todo += [const for const in part.co_consts if isinstance(const, CodeType)]
        for step in dis.get_instructions(part):
            if step.opname in ("LOAD_NAME", "LOAD_GLOBAL"):
                read[step.argval] = None
            elif step.opname in ("STORE_NAME", "STORE_GLOBAL"):
                assigned.add(step.argval)
    return [name for name in read if name not in assigned]


def run(channel: ProgramChannel, setup: str, tests: str, entry: str) -> None:
    """Run the tests. Raises whatever stops them."""
    # 1) the program's names, as handles or plain data
    defined = channel.answer("names")["names"]
    # 2) setup: helpers of the tests
    module = sys.modules["program"] = type(sys)("program")  # dataclasses look their names up here
    space = vars(module)
    if setup:
        exec(_compile_setup(setup), space)
    # 3) tests, with the names under test from the program
    code = _compile(tests)
    for name in [entry] if entry else _names_under_test(channel, _free_names(code), defined):
        space.pop(name, None)
        if name in defined:
            space[name] = defined[name]
    exec(code, space)


def _names_under_test(channel: ProgramChannel, free: list[str], defined: dict[str, Any]) -> list[str]:
    """Free names of the tests that come from the program. A builtin's name, such as `sum`, only if it is the only
    candidate.

    The tests alone decide, not the program: with a `sum` and an `all` of its own it would pass
    `assert all([sum(2, 3) == 5])`. Raises ProgramFailed if the choice is ambiguous.
    """
    tested = [name for name in free if not hasattr(builtins, name)]
    if not tested:
        tools = [name for name in free if name in _TOOLS or isinstance(getattr(builtins, name), type)]
        tested = free if len(free) == 1 else [name for name in free if name not in tools]
        if len(tested) != 1 and any(name in defined for name in free):
            raise channel.fail(f"the tests do not say which of {', '.join(free)} is the program's")
    return [name for name in tested if name in defined]


def _compile(source: str, name: str = "tests.py") -> CodeType:
    return compile(source, name, "exec", dont_inherit=True)  # not with this module's own __future__


def _compile_setup(setup: str) -> CodeType:
    """Compile a HumanEval prompt. A prompt that ends with a function's head gets the body `pass`."""
    try:
        return _compile(setup, "prompt.py")
    except SyntaxError:
        last = setup.rstrip().rpartition("\n")[2]
        indent = last[: len(last) - len(last.lstrip())]
        try:
            return _compile(f"{setup.rstrip()}\n{indent}    pass\n", "prompt.py")
        except SyntaxError:
            pass
        raise


def judge(channel: ProgramChannel, setup: str, tests: str, entry: str) -> None:
    """Run the tests and send the verdict: passed, reason, answers read."""
    try:
        run(channel, setup, tests, entry)
        stopped = None
    except BaseException as error:
        stopped = str(error) or type(error).__name__
    reason = channel.failure or stopped  # the tests may have caught ProgramFailed
    text = (reason or "")[:500].encode("utf-8", "backslashreplace").decode()  # the cut may split a surrogate pair
    channel.send(b"v", json.dumps([reason is None, text, channel.received]).encode())


def names(tests: str, entry: str) -> list[str]:
    """Names whose values the program must send."""
    try:
        return [entry] if entry else _free_names(_compile(tests))
    except (SyntaxError, ValueError):
        return []


def _end_with(parent: int) -> None:
    """Have the kernel kill this fork when the judge ends: not every tier kills the judge's forks with it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL
        if os.getppid() != parent:
            os._exit(0)


def main() -> None:
    """Judge programs until the warden closes the pipe.

    Each request (setup, tests, entry) is answered by the names wanted, calls, and a verdict. The verdict holds the
    number of answers read, -1 if unknown: an unread answer in the pipe would count for the next program.
    """
    requests, answers = sys.stdin.buffer, os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (1, 2):
        os.dup2(null, number)
    channel, parent = ProgramChannel(requests, answers), os.getpid()
    while True:
        setup, tests, entry = marshal.load(requests)
        channel.send(b"n", json.dumps(names(tests, entry)).encode())
        child = os.fork()
        if not child:
            _end_with(parent)
            judge(channel, setup, tests, entry)
            os._exit(_REPORTED)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != _REPORTED:
            channel.send(b"v", b'[false, "the tests ended their process", -1]')


if __name__ == "jailed":
    main()
