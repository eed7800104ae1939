"""Does it fit: needs against what is there, the search for the value that holds, and the change that is the cure.

Placement, estimates and stage kinds hand in numbers; nobody compares, searches or words a cure for themselves.
"""

from __future__ import annotations

import errno
import shlex
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from .errors import DoesNotFit, gpu_memory_ran_out
from .sizes import format_size

Key = TypeVar("Key", bound=Hashable)
ALLOCATOR_FAILED = "DefaultCPUAllocator: can't allocate memory"
"""In the RuntimeError of torch's allocator for the CPU (c10/core/impl/alloc_cpu.cpp), whose class tells nothing."""

UNTOLD = "without exception set"
"""In CPython's SystemError where its own code gave up and said nothing (Python/ceval.c): under a limit on memory, there
was none left for that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Bytes that one device must hold, by what they are for."""

    weights: int = 0
    """Parameters and buffers."""
    kv_cache: int = 0
    activations: int = 0
    runtime: int = 0
    """CUDA context, the libraries' workspaces, the allocator's rounding."""
    streaming: int = 0
    """What passes through: the largest layer; on a GPU, where one computes while the next one comes, two."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def __str__(self) -> str:
        """`18.0 GiB of weights, 2.0 GiB of KV cache`."""
        words = {"kv_cache": "KV cache", "streaming": "streaming buffer"}
        parts = {words.get(name, name): size for name, size in asdict(self).items() if size}
        return ", ".join(f"{format_size(size)} of {name}" for name, size in parts.items())


def totals(needs: Mapping[Key, Need]) -> dict[Key, int]:
    return {key: need.total for key, need in needs.items()}


def fits(needed: int, room: float | None) -> bool:
    """Is there room for what is needed? None is room without a limit."""
    return room is None or needed <= room


def lacking(needs: Mapping[Key, int], rooms: Mapping[Key, float | None]) -> dict[Key, int]:
    """Return how much each of those lacks that do not fit; what has no entry in `rooms` has no room."""
    found = {key: (needed, rooms.get(key, 0)) for key, needed in needs.items()}
    return {key: needed - int(room or 0) for key, (needed, room) in found.items() if not fits(needed, room)}


def nearest(holding: int, failing: int, holds: Callable[[int], bool], *, step: int = 1) -> int | None:
    """Return the number nearest to `failing` for which `holds`, to within `step`; None where `holding` does not.

    Between the two `holds` changes once. The largest batch: `nearest(1, asked, …)`; the smallest cap: `nearest(much,
    given, …)`.
    """
    if not holds(holding):
        return None
    while abs(failing - holding) > step:
        middle = (holding + failing) // 2
        holding, failing = (middle, failing) if holds(middle) else (holding, middle)
    return holding


@dataclass(frozen=True, slots=True)
class Cure:
    """A change that makes something fit."""

    change: Mapping[str, Any]
    """Option → value, all of them together; a dot leads into a map: `max_memory.0`."""
    text: str = ""
    """What people read, where that is more than the change as fields."""

    def __str__(self) -> str:
        return self.text or as_fields(self.change)


@dataclass(frozen=True, slots=True)
class Misfit:
    """Something that will not fit here, and the smallest change under which it does."""

    cause: str
    cure: Cure | str = ""
    field: str = ""
    """What of the stage it is about, where that is not the first thing to change: `device_map`."""

    @property
    def about(self) -> str:
        """Return the field, or part of the stage, that it is about; "" where it is about the whole."""
        return self.field or next(iter(self.change), "")

    @property
    def change(self) -> Mapping[str, Any]:
        return self.cure.change if isinstance(self.cure, Cure) else {}

    def error(self) -> DoesNotFit:
        error = DoesNotFit(self.cause, str(self.cure), field=self.about)
        error.change = self.change
        return error

    @classmethod
    def of(cls, error: DoesNotFit) -> Misfit:
        return cls(error.cause, Cure(error.change, error.cure), error.field)


def as_fields(change: Mapping[str, Any]) -> str:
    """`set batch_size to 1 and max_memory.0 to 22GiB`: fields of a stage's `with:`."""
    return "set " + " and ".join(f"{option} to {flow(value)}" for option, value in change.items())


def as_options(change: Mapping[str, Any]) -> str:
    """`--batch-size 1 --double-quant`: options of a command."""
    named = {f"--{option.replace('_', '-')}": value for option, value in change.items()}
    return " ".join(name if value is True else f"{name} {flow(value)}" for name, value in named.items())


def as_parameters(arguments: Mapping[str, str]) -> str:
    """`-p batch=1 -p 'memory={cpu: 10GiB}'`: a recipe's parameters as they are typed."""
    return " ".join(f"-p {shlex.quote(f'{name}={value}')}" for name, value in arguments.items())


def flow(value: Any) -> str:
    """A value as YAML on one line: `{cpu: 48GiB, disk: 200GiB}`."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {flow(item)}" for key, item in value.items()) + "}"
    return str(value)


def out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, of the machine or of a GPU, as Python, the system or torch says it."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if isinstance(error, SystemError) and UNTOLD in str(error):
        import resource

        return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    return gpu_memory_ran_out(error) or (isinstance(error, RuntimeError) and ALLOCATOR_FAILED in str(error))
