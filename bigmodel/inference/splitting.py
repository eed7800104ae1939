"""Each process its share of what all are given, for scripts that `accelerate launch` or torchrun starts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from bigpipe.errors import UsageError

from .sharing import bounds

T = TypeVar("T")


@contextmanager
def split_between_processes(
    inputs: T, apply_padding: bool = False, *, rank: int | None = None, world_size: int | None = None
) -> Iterator[T]:
    """Give this process its share of `inputs` inside a `with`, by the rules of accelerate's
    `PartialState.split_between_processes`: contiguous, the first processes one more where it does not come out even.

    inputs: a list, a tuple, a tensor of any shape [n, …], a Dataset of the package datasets, or a dict of these of one
    length; anything else, a tensor of one number too, goes to all as it is. apply_padding: the last element is repeated
    until all processes have as many. rank, world_size: those of this process; None: what torchrun's RANK and WORLD_SIZE
    say, alone where they are not set.

    Unlike accelerate's, it starts no process group, leaves a dict that it was given as it was, pads tuples too, and
    pads tensors where they are. Raise UsageError for a dict of several lengths, or with a number or another dict in it
    (on one process too), for a rank that is none, and where there is nothing to pad with.
    """
    rank = _variable("RANK", 0) if rank is None else rank
    world_size = _variable("WORLD_SIZE", 1) if world_size is None else world_size
    if not (isinstance(rank, int) and isinstance(world_size, int) and 0 <= rank < world_size):
        raise UsageError(f"rank {rank!r} is none of {world_size!r}", "give whole numbers; ranks count from 0")
    length = _length(inputs) if _has_entries(inputs) else 0
    if world_size == 1 or not _has_entries(inputs):
        yield inputs
        return
    if apply_padding and not length:
        raise UsageError("there is nothing to pad with", "give one element at least, or leave apply_padding out")
    start, end = bounds(length, world_size)[rank]
    yield _share(inputs, start, end, -(-length // world_size) if apply_padding else 0)


def _variable(name: str, otherwise: int) -> int:
    text = os.environ.get(name, "").strip()
    if not text:
        return otherwise
    if not text.isdecimal():
        raise UsageError(f"the variable {name} is {text[:40]!r}, and no number", "unset it, or start with torchrun")
    return int(text)


def _has_entries(value: Any) -> bool:
    return hasattr(value, "__len__") and getattr(value, "ndim", 1) != 0


def _refuse_unsplit(inputs: Mapping[Any, Any]) -> None:
    """Raise UsageError for a value of the dict that has no entries, or whose entries are those of its own values."""
    odd = next((name for name, value in inputs.items() if isinstance(value, dict) or not _has_entries(value)), None)
    if odd is not None:
        cause = f"{odd!r} of the dict is a {type(inputs[odd]).__name__}, and has no entries to share out"
        raise UsageError(cause, "give a list of them, or keep it out of the dict")


def _length(inputs: Any) -> int:
    if not isinstance(inputs, dict):
        return len(inputs)
    _refuse_unsplit(inputs)
    lengths = {name: len(value) for name, value in inputs.items()}
    if len(set(lengths.values())) > 1:
        raise UsageError(f"the values of the dict have several lengths: {lengths}", "give all of them one length")
    return next(iter(lengths.values()), 0)


def _share(inputs: Any, start: int, end: int, padded: int) -> Any:
    """padded: how many it has at least."""
    if isinstance(inputs, dict):
        return {name: _share(value, start, end, padded) for name, value in inputs.items()}
    missing = padded - (end - start)
    if type(inputs).__module__.partition(".")[0] == "datasets" and hasattr(inputs, "select"):
        return inputs.select([*range(start, end), *[len(inputs) - 1] * missing])
    if not (isinstance(inputs, list | tuple) or hasattr(inputs, "new_empty")):
        return inputs
    if isinstance(inputs, tuple):
        return (*inputs[start:end], *inputs[-1:] * missing)
    return (
        inputs[start:end] + inputs[-1:] * missing if isinstance(inputs, list) else _tensor(inputs, start, end, missing)
    )


def _tensor(tensor: Any, start: int, end: int, missing: int) -> Any:
    import torch

    share = tensor[start:end]
    return torch.cat([share, *[tensor[-1:]] * missing]) if missing > 0 else share
