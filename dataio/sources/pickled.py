"""Reads the pickles of CIFAR-10 batches with a machine of its own, which executes nothing (called by cifar).

A pickle is a program for a stack machine. Python's unpickler runs all of them; this one knows the opcodes that batches consist of, and
builds numbers, text, lists, dicts with text as keys, and checked uint8 arrays. Each opcode takes constant time and memory but for the bytes
it carries, which are in the file: no value is hashed, compared or shown as a whole, so that values which hold one another twice over (2^n
parts in n bytes) cost nothing. So time and memory are proportional to the file.
"""

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dataio.foreign import MAX_MEMBER_BYTES
from dataio.sources.source import SourceError, text_of

MAX_OPCODES = 1 << 21  # a batch of 10,000 images has 60,000
MAX_IMAGES = 1 << 20

_PUSHES = frozenset(
    """
    INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES
    BINBYTES8 BYTEARRAY8
    """.split()  # noqa: SIM905 (a list of them fills the page)
)
_OLD_TEXTS = frozenset({"STRING", "BINSTRING", "SHORT_BINSTRING"})  # Python 2's, which are bytes
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NOTHING = frozenset({"PROTO", "FRAME"})
_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_GETS = frozenset({"GET", "BINGET", "LONG_BINGET"})
_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


def load_cifar_pickle(name: str, raw: bytes) -> dict[str, Any]:
    """The dict of a CIFAR batch; texts are bytes or str, arrays (n, m) uint8. Raises SourceError that names what was refused."""
    try:
        content = _Machine().run(raw)
    except (ValueError, KeyError, OverflowError) as error:  # genops raises the latter two for damaged arguments
        raise SourceError(f"{name} is not a CIFAR-10 batch: its pickle is refused ({error}), nothing of it was executed") from error
    if not isinstance(content, dict):
        raise SourceError(f"{name} is not a CIFAR-10 batch: it holds a {type(content).__name__}, not a dict of named values")
    return {text_of(key): value.value if isinstance(value, _Array) else value for key, value in content.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Named:
    """An allowed global: only a name. What it would do is in `_call`."""

    module: str
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Dtype:
    name: str


class _Array:
    """An array, once its state is known and was checked."""

    __slots__ = ("value",)

    def __init__(self, value: np.ndarray | None = None) -> None:
        self.value = value


class _Machine:
    """The stack, the marks in it, the numbered values, and how many bytes were made of others."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._made_bytes = 0
        self._steps: dict[str, Callable[[], None]] = {
            "MARK": lambda: self._marks.append(len(self._stack)),
            "POP": self._pop_or_unmark,
            "POP_MARK": self._drop_since_mark,
            "DUP": lambda: self._stack.append(self._top()),
            "EMPTY_LIST": lambda: self._stack.append([]),
            "EMPTY_TUPLE": lambda: self._stack.append(()),
            "EMPTY_DICT": lambda: self._stack.append({}),
            "LIST": lambda: self._stack.append(self._since_mark()),
            "TUPLE": lambda: self._stack.append(tuple(self._since_mark())),
            "TUPLE1": lambda: self._tuple(1),
            "TUPLE2": lambda: self._tuple(2),
            "TUPLE3": lambda: self._tuple(3),
            "DICT": self._dict,
            "APPEND": lambda: self._extend([self._pop()]),
            "APPENDS": lambda: self._extend(self._since_mark()),
            "SETITEM": lambda: self._set([self._pop(), self._pop()][::-1]),
            "SETITEMS": lambda: self._set(self._since_mark()),
            "STACK_GLOBAL": lambda: self._global(*[self._pop(), self._pop()][::-1]),
            "REDUCE": self._reduce,
            "BUILD": self._build,
            "MEMOIZE": lambda: self._put(len(self._memo)),
        }

    def run(self, raw: bytes) -> Any:
        """The value that the pickle describes. ValueError for one that is damaged or asks for more than values."""
        for count, (opcode, argument, _) in enumerate(pickletools.genops(raw)):
            name = opcode.name
            if count >= MAX_OPCODES:
                raise ValueError(f"has more than {MAX_OPCODES} opcodes")
            if name in _PUSHES:
                self._stack.append(argument)
            elif name in _OLD_TEXTS:
                assert isinstance(argument, str)
                self._stack.append(argument.encode("latin-1"))
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name])
            elif name in _PUTS:
                self._put(argument)
            elif name in _GETS:
                self._stack.append(self._memo[int(argument or 0)])
            elif name == "GLOBAL":
                self._global(*str(argument).split(" ", 1))
            elif name in self._steps:
                self._steps[name]()
            elif name == "STOP":
                return self._pop()
            elif name not in _NOTHING:
                raise ValueError(f"uses the opcode {name}")
        raise ValueError("has no end")

    def _top(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise ValueError("takes a value that was never put there")
        return self._stack[-1]

    def _pop(self) -> Any:
        value = self._top()
        self._stack.pop()
        return value

    def _pop_or_unmark(self) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._pop()

    def _since_mark(self) -> list[Any]:
        if not self._marks:
            raise ValueError("takes values up to a mark that was never set")
        at = self._marks.pop()
        values = self._stack[at:]
        del self._stack[at:]
        return values

    def _drop_since_mark(self) -> None:
        self._since_mark()

    def _tuple(self, size: int) -> None:
        self._stack.append(tuple([self._pop() for _ in range(size)][::-1]))

    def _put(self, number: Any) -> None:
        self._memo[number] = self._top()

    def _extend(self, values: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, list):
            raise ValueError(f"appends to a {type(target).__name__}")
        target.extend(values)

    def _dict(self) -> None:
        values = self._since_mark()
        self._stack.append({})
        self._set(values)

    def _set(self, values: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, dict) or len(values) % 2:
            raise ValueError(f"sets items of a {type(target).__name__}")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, bytes | str):  # hashing another value may take for ever
                raise ValueError(f"names a value by a {type(key).__name__}")
            target[key] = value

    def _global(self, module: Any = "", name: Any = "") -> None:
        if not isinstance(module, str) or not isinstance(name, str) or (module, name) not in _GLOBALS:
            raise ValueError(f"refers to {module}.{name}" if isinstance(module, str) and isinstance(name, str) else "refers to no name")
        self._stack.append(_Named(module=module, name=name))

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, _Named) or not isinstance(arguments, tuple):
            raise ValueError(f"calls a {type(function).__name__}")
        self._stack.append(self._call(function.name, arguments))

    def _call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        match name, arguments:
            case "_reconstruct", (_Named(), _, _):
                return _Array()
            case "dtype", (bytes() | str() as kind, *_):
                return _Dtype(name=text_of(kind))
            case "_frombuffer", (raw, dtype, shape, order):
                return _Array(_array(raw, dtype, shape, order))
            case "encode", (str(text), "latin1" | b"latin1"):  # how Python 3 writes bytes for Python 2
                self._made_bytes += len(text)
                if self._made_bytes > MAX_MEMBER_BYTES:
                    raise ValueError(f"makes more than {MAX_MEMBER_BYTES} bytes of others")
                return text.encode("latin1")
        raise ValueError(f"calls {name} with unexpected arguments")

    def _build(self) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, _Dtype):
            return  # byte order and alignment, which a single byte does not have
        if not isinstance(target, _Array):
            raise ValueError(f"sets attributes of {target.name if isinstance(target, _Named) else f'a {type(target).__name__}'}")
        if not isinstance(state, tuple) or len(state) != 5:
            raise ValueError("an array's state is not (version, shape, dtype, order, bytes)")
        _, shape, dtype, fortran, raw = state
        target.value = _array(raw, dtype, shape, "F" if fortran is True or fortran == 1 else "C")


def _array(raw: object, dtype: object, shape: object, order: object) -> np.ndarray:
    if not isinstance(dtype, _Dtype) or dtype.name not in ("u1", "|u1", "uint8"):
        raise ValueError(f"holds an array of {dtype.name if isinstance(dtype, _Dtype) else type(dtype).__name__!r:.40}, not of uint8")
    if not isinstance(shape, tuple) or len(shape) != 2 or not all(type(side) is int and 0 <= side <= MAX_IMAGES for side in shape):
        raise ValueError("holds an array whose shape is not two numbers, (images, bytes)")
    if not isinstance(raw, bytes | bytearray) or len(raw) != math.prod(shape):
        raise ValueError(f"holds an array of shape {shape} without its bytes")
    return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if order in ("F", b"F") else "C")
