"""Which modules of a model are packed, by the rules of transformers and bitsandbytes, told from its architecture.

Checked against bitsandbytes 0.50 and transformers 5.23 (`quantizers/base.py`, `quantizers_utils.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from bigpipe.bigmodel.architecture import PLAIN_TORCH
from bigpipe.bigmodel.memo import kept
from bigpipe.errors import UsageError

if TYPE_CHECKING:
    from bigpipe.bigmodel.architecture import Architecture, ModuleSpec, TensorSpec


def converted_modules(
    architecture: Architecture, *, skip_modules: Sequence[str] | None = None, keep: Sequence[str] = ()
) -> tuple[ModuleSpec, ...]:
    """The modules whose weight bitsandbytes converts, in `named_modules()` order.

    skip_modules: names or patterns to leave alone; None means the default: whatever is tied, the output embedding, and
    the module of the last parameter, in classes of transformers where that is no bias, as there. keep: more of them,
    such as those kept in float32.
    """
    skipped = None if skip_modules is None else tuple(skip_modules)
    return _converted_modules(architecture, skipped, tuple(keep))


@kept
def _converted_modules(
    architecture: Architecture, skip_modules: tuple[str, ...] | None, keep: tuple[str, ...]
) -> tuple[ModuleSpec, ...]:
    skipped = default_skips(architecture) if skip_modules is None else skip_modules
    left_alone = name_matcher([*skipped, *architecture.keep_in_fp32, *keep])
    return tuple(module for module in architecture.modules if module.linear and not left_alone(module.name))


def name_matcher(entries: Sequence[str]) -> Callable[[str], bool]:
    """Whether a module's name is meant by one of these, as transformers reads them: a prefix or a regular expression,
    up to a dot or the end, or any suffix. Raises UsageError for what is no regular expression."""
    try:
        rules = [(re.compile(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))"), entry) for entry in entries]
    except re.error as error:
        raise UsageError(f"{error.pattern!r} names no modules: {error}", "give module names, such as lm_head") from None
    return lambda name: any(rule.match(name) or name.endswith(entry) for rule, entry in rules)


def known_modules(entries: Sequence[str] | None, architecture: Architecture) -> tuple[str, ...] | None:
    """Return the entries that mean a module there is, read as `name_matcher` does; None, which says nothing, as it is.
    Raise UsageError for what is no regular expression."""
    if entries is None:
        return None
    names = [module.name for module in architecture.modules]
    return tuple(entry for entry in entries if any(map(name_matcher([entry]), names)))


def default_skips(architecture: Architecture) -> list[str]:
    """Names that are left alone where nobody says which."""
    names = {name for group in architecture.tied for name in group}
    parameters = [tensor.name for module in architecture.modules for tensor in module.tensors if not tensor.buffer]
    last = parameters[-1:]
    if architecture.output_embedding is not None:
        names.add(architecture.output_embedding)
    elif architecture.library in PLAIN_TORCH:  # a head's last parameter may be its bias; transformers converts such
        last = [name.removesuffix(".bias") for name in last]
    return sorted({name.removesuffix(".weight") for name in (*names, *last)})


def weight_of(module: ModuleSpec) -> TensorSpec:
    """The matrix of a linear module."""
    return next(tensor for tensor in module.tensors if tensor.name.rpartition(".")[2] == "weight")


def matrix_shape(module: ModuleSpec) -> tuple[int, int]:
    """(out, in) features; `Conv1D` holds its weight the other way round."""
    rows, columns = weight_of(module).shape
    return (columns, rows) if module.class_name == "Conv1D" else (rows, columns)
