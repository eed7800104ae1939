"""A machine for the pickles of state dicts. It knows the opcodes torch.save writes and builds inert values only.

Not a subclass of Python's Unpickler: that one allocates what an opcode claims (a memo index of 2^32, a bytearray of any
length), hashes nested keys recursively, and calls what a pickle reduces. Here a global is a name, calls are answered by
the table `_CALLS`, every object is counted, and nothing recurses.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .tensors import DTYPES, STORAGE_DTYPES, invalid, itemsize

MAX_OBJECTS = 1_500_000
"""A state dict makes about 12 objects per tensor; all of these together stay under 200 MB."""

MAX_DEPTH = 64


@dataclass(frozen=True, slots=True)
class Global:
    """The name of something a pickle refers to. Never looked up."""

    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """One storage record: `data/KEY` in the zip file."""

    key: str
    dtype: str | None
    """None: untyped; the tensor knows."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as a view of a storage. Offset and strides in elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Refused(Exception):
    """Why a pickle is not read; turned into InvalidCheckpoint with the offset."""

    def __init__(self, cause: str, cure: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.cure = cure or "the file is damaged, or not a state dict written by torch.save; save it anew"


def _check_plain(args: tuple[Any, ...], count: int) -> None:
    """After `count` arguments there may be metadata, which must be empty."""
    if not count <= len(args) <= count + 1 or any(args[count:]):
        raise _Refused("a tensor has properties a checkpoint cannot keep (conjugate or negative views)", "resolve them")


def _rebuild_tensor(args: tuple[Any, ...]) -> Tensor:
    """torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks[, metadata])."""
    _check_plain(args, 6)
    storage, offset, shape, strides = args[:4]
    if not isinstance(storage, Storage) or storage.dtype is None:
        raise _Refused("a tensor has no typed storage")
    return Tensor(storage, storage.dtype, _size(offset), _sizes(shape), _sizes(strides))


def _rebuild_untyped(args: tuple[Any, ...]) -> Tensor:
    """torch._utils._rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype[, metadata])."""
    _check_plain(args, 7)
    storage, offset, shape, strides, dtype = *args[:4], args[6]
    name = dtype.name.removeprefix("torch.") if isinstance(dtype, Global) else ""
    if not isinstance(storage, Storage) or storage.dtype is not None or name not in DTYPES:
        raise _Refused(f"a tensor has no untyped storage or no known dtype ({name[:60]!r})")
    return Tensor(storage, name, _size(offset), _sizes(shape), _sizes(strides))


def _rebuild_parameter(args: tuple[Any, ...]) -> Tensor:
    """torch._utils._rebuild_parameter(tensor, requires_grad, hooks) and ..._with_state(..., state)."""
    if not 3 <= len(args) <= 4 or not isinstance(args[0], Tensor):
        raise _Refused("a parameter holds no tensor")
    return args[0]


def _ordered_dict(args: tuple[Any, ...]) -> dict[str, Any]:
    if args:
        raise _Refused("an OrderedDict is not built the way torch.save does it")
    return {}


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise _Refused("a size is not a number")
    return value


def _sizes(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > 64:
        raise _Refused("a shape is not a short tuple")
    return tuple(_size(item) for item in value)


_CALLS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_untyped,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "collections.OrderedDict": _ordered_dict,
}
_NAMES = frozenset({*_CALLS, "torch.storage.UntypedStorage", *(f"torch.{name}" for name in (*STORAGE_DTYPES, *DTYPES))})


_PLAIN = "save tensors only, without what else the training program knows"
_NUMBERS = "it is an array of numpy's: save torch.from_numpy(array) in its place"
HARMLESS = {
    "torch._utils._rebuild_sparse_tensor": "it is a sparse tensor: save it after .to_dense()",
    "torch._utils._rebuild_qtensor": "it is a quantized tensor of torch's own: save it after .dequantize()",
    **dict.fromkeys(("torch.Size", "torch.device", "argparse.Namespace", "collections.defaultdict"), _PLAIN),
    **{
        f"{core}.multiarray.{name}": _NUMBERS
        for core in ("numpy.core", "numpy._core")
        for name in ("_reconstruct", "scalar")
    },
}
"""What training programs write without meaning any harm → what to do. Neither is run."""


class PickleMachine:
    """Runs one pickle to its end. `run` gives dicts, lists, tuples, strings, numbers, `Tensor`s and `Storage`s."""

    def __init__(self, pickled: bytes, name: str) -> None:
        self.pickled = pickled
        self.name = name
        self.at = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []
        self.objects = 0

    def run(self) -> Any:
        """Return the value of the pickle. Raise InvalidCheckpoint at the byte where it leaves what is allowed."""
        start = 0
        try:
            while True:
                start = self.at
                code = self.pickled[start]
                self.at += 1
                if code == 0x2E:  # STOP
                    return self.pop()
                operation = _OPERATIONS.get(code)
                if operation is None:
                    raise _Refused(f"uses the pickle operation {bytes([code])!r}, which a state dict does not need")
                operation(self)
        except _Refused as error:
            raise invalid(self.name, f"data.pkl byte {start}: {error.cause}", error.cure) from None
        except (IndexError, struct.error):
            raise invalid(self.name, f"data.pkl is cut short or damaged at byte {start}", _Refused("").cure) from None

    def take(self, count: int) -> bytes:
        piece = self.pickled[self.at : self.at + count]
        if len(piece) != count:
            raise _Refused("ends in the middle of a value")
        self.at += count
        return piece

    def line(self) -> str:
        end = self.pickled.find(b"\n", self.at, self.at + 512)
        if end < 0:
            raise _Refused("a name does not end")
        text = self.take(end - self.at).decode("utf-8", "replace")
        self.at += 1
        return text

    def number(self, form: str) -> int:
        (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return int(value)

    def push(self, value: Any) -> None:
        self.objects += 1
        if self.objects > MAX_OBJECTS:
            raise _Refused(f"makes more than {MAX_OBJECTS} objects")
        self.stack.append(value)

    def pop(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise _Refused("takes a value that is not there")
        return self.stack.pop()

    def top(self) -> Any:
        self.stack.append(value := self.pop())
        return value

    def pop_marked(self) -> list[Any]:
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def mark(self) -> None:
        if len(self.marks) >= MAX_DEPTH:
            raise _Refused(f"nests more than {MAX_DEPTH} values")
        self.marks.append(len(self.stack))

    def tuple_of(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(values)))

    def text(self, form: str) -> None:
        try:
            self.push(self.take(self.number(form)).decode("utf-8"))
        except UnicodeDecodeError:
            raise _Refused("a string is not valid UTF-8") from None

    def long(self) -> None:
        size = self.number("<B")
        self.push(int.from_bytes(self.take(size), "little", signed=True))

    def remember(self, index: int) -> None:
        # Picklers number the memo in order; an index that leaps would make us keep a table of that length.
        if index > len(self.memo):
            raise _Refused("numbers its values out of order")
        if index == len(self.memo):
            self.memo.append(self.top())
        else:
            self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        if index >= len(self.memo):
            raise _Refused("refers to a value that is not there")
        self.push(self.memo[index])

    def named(self, module: Any, name: Any) -> None:
        full = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "?"
        if full not in _NAMES:
            cause = f"refers to {full[:200]!r}; a state dict of tensors does not, and bigpipe never runs it"
            cure = "do not load this file elsewhere either unless you trust whoever made it; ask for safetensors"
            raise _Refused(cause, HARMLESS.get(full, cure))
        self.push(Global(full))

    def stack_global(self) -> None:
        name = self.pop()
        self.named(self.pop(), name)

    def global_(self) -> None:
        module = self.line()
        self.named(module, self.line())

    def reduce(self) -> None:
        args, function = self.pop(), self.pop()
        call = _CALLS.get(function.name) if isinstance(function, Global) else None
        if call is None or not isinstance(args, tuple):
            raise _Refused("calls something that is not a rebuilding function of torch")
        self.push(call(args))

    def persistent(self) -> None:
        """('storage', storage class, key, location, number of elements)."""
        saved = self.pop()
        if not isinstance(saved, tuple) or len(saved) != 5 or saved[0] != "storage":
            raise _Refused("refers to something outside that is not a storage")
        _, kind, key, _, count = saved
        name = kind.name.rpartition(".")[2] if isinstance(kind, Global) else ""
        dtype = STORAGE_DTYPES.get(name)
        if not isinstance(key, str) or (dtype is None and name != "UntypedStorage"):
            raise _Refused("a storage has no known class or key")
        self.push(Storage(key, dtype, _size(count) * (itemsize(dtype) if dtype else 1)))

    def build(self) -> None:
        """Sets attributes: a state dict carries `_metadata` (module versions), which no checkpoint needs."""
        self.pop()
        if not isinstance(self.top(), dict | Tensor):
            raise _Refused("sets attributes of something that is not a state dict")

    def set_items(self, pairs: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, dict) or len(pairs) % 2:
            raise _Refused("fills something that is not a dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str | int):
                raise _Refused("has a key that is not a string")
            target[key] = value

    def append_items(self, values: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, list):
            raise _Refused("appends to something that is not a list")
        target.extend(values)


def _set_item(machine: PickleMachine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


_OPERATIONS: dict[int, Callable[[PickleMachine], None]] = {
    ord(code): operation
    for code, operation in {
        b"\x80": lambda m: m.take(1),  # PROTO
        b"\x95": lambda m: m.take(8),  # FRAME
        b"(": PickleMachine.mark,
        b"0": lambda m: m.pop(),
        b"}": lambda m: m.push({}),
        b"]": lambda m: m.push([]),
        b")": lambda m: m.push(()),
        b"t": lambda m: m.push(tuple(m.pop_marked())),
        b"\x85": lambda m: m.tuple_of(1),
        b"\x86": lambda m: m.tuple_of(2),
        b"\x87": lambda m: m.tuple_of(3),
        b"N": lambda m: m.push(None),
        b"\x88": lambda m: m.push(True),
        b"\x89": lambda m: m.push(False),
        b"K": lambda m: m.push(m.number("<B")),
        b"M": lambda m: m.push(m.number("<H")),
        b"J": lambda m: m.push(m.number("<i")),
        b"\x8a": PickleMachine.long,
        b"G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
        b"X": lambda m: m.text("<I"),
        b"\x8c": lambda m: m.text("<B"),
        b"\x8d": lambda m: m.text("<Q"),
        b"c": PickleMachine.global_,
        b"\x93": PickleMachine.stack_global,
        b"q": lambda m: m.remember(m.number("<B")),
        b"r": lambda m: m.remember(m.number("<I")),
        b"\x94": lambda m: m.remember(len(m.memo)),
        b"h": lambda m: m.recall(m.number("<B")),
        b"j": lambda m: m.recall(m.number("<I")),
        b"R": PickleMachine.reduce,
        b"Q": PickleMachine.persistent,
        b"b": PickleMachine.build,
        b"s": _set_item,
        b"u": lambda m: m.set_items(m.pop_marked()),
        b"a": lambda m: m.append_items([m.pop()]),
        b"e": lambda m: m.append_items(m.pop_marked()),
    }.items()
}
