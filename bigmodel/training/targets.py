"""Which modules get adapters, told from a model's modules alone: as peft chooses them, without torch."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

from bigpipe.bigmodel.architecture import Architecture, is_named
from bigpipe.bigmodel.formats import matrix_shape
from bigpipe.errors import UsageError
from bigpipe.names import did_you_mean

DEFAULTS = "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"
ALL_LINEAR = "all-linear"
"""peft's name for every linear module but the output head."""
Targets = tuple[str, ...] | str | None


@cache
def default_targets() -> Mapping[str, list[str] | str]:
    """Return peft's own choice by `model_type`, read from its source: importing it imports torch. Empty where peft is
    not installed, or keeps it elsewhere."""
    found = find_spec("peft")
    source = Path(found.origin).parent / "utils" / "constants.py" if found and found.origin else None
    if source is None or not source.is_file():
        return {}
    for statement in ast.parse(source.read_bytes()).body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", "") == DEFAULTS:
            return dict(ast.literal_eval(statement.value))
    return {}


def find_targets(architecture: Architecture, asked: Targets) -> dict[str, tuple[int, int]] | None:
    """Return the modules that get adapters: name → (outputs, inputs) of its matrix; None where peft's rules reach
    beyond linear modules, and only peft itself knows (`rehearsing`).

    asked: ends of names, or a regular expression over whole names; None is peft's default for the architecture.
    Raise UsageError for a name that fits no linear module, with those that come near, and where peft has no
    default.
    """
    wanted, matrices, ends = _wanted(architecture, asked), _matrices(architecture), linear_ends(architecture)
    if stacks(architecture):
        return None
    if wanted == ALL_LINEAR:
        return {name: shape for name, shape in matrices.items() if name != architecture.output_embedding}
    fits = _fitting(wanted)
    if isinstance(wanted, str) and not any(map(fits, matrices)):
        cure = f"a text is a regular expression over whole names; write ends of names as a list, of {', '.join(ends)}"
        raise UsageError(f"target_modules {wanted!r} matches no module of the model", cure)
    for end in () if isinstance(wanted, str) else unknown_ends(architecture, wanted):
        cure = did_you_mean(end, ends) or f"there are {', '.join(ends)}"
        raise UsageError(f"target_modules: the model has no linear module {end!r}", cure)
    others = (module.name for module in architecture.modules if module.name and not module.linear)
    return None if any(map(fits, others)) else {name: shape for name, shape in matrices.items() if fits(name)}


def linear_ends(architecture: Architecture) -> list[str]:
    """Return what the names of linear modules end with."""
    return sorted({name.rpartition(".")[2] for name in _matrices(architecture)})


def unknown_ends(architecture: Architecture, asked: Sequence[str] | str | None) -> list[str]:
    """Return the ends of names that no linear module has."""
    named = () if asked is None or isinstance(asked, str) else asked
    return [end for end in named if not any(is_named(name, end) for name in _matrices(architecture))]


def stacks(architecture: Architecture) -> bool:
    """Return whether a class holds more than matrices in one parameter: experts, as mixtures do since transformers 5,
    or the kernels of convolutions, beside which peft refuses some modules."""
    tensors = (tensor for module in architecture.modules for tensor in module.tensors)
    return any(len(tensor.shape) > 2 and not tensor.buffer for tensor in tensors)


def _wanted(architecture: Architecture, asked: Targets) -> Sequence[str] | str:
    kind = str(architecture.config.get("model_type"))
    wanted = asked if asked is not None else default_targets().get(kind)
    some = f"name some of {', '.join(linear_ends(architecture))}"
    if wanted is None:
        raise UsageError(f"peft has no target_modules of its own for {kind}", some)
    if not wanted:
        raise UsageError("target_modules names no module", some)
    if isinstance(wanted, str):
        _matches(wanted, "")
    return wanted


def _fitting(wanted: Sequence[str] | str) -> Callable[[str], bool]:
    """Whether the name of a module is meant."""
    if isinstance(wanted, str):
        return partial(_matches, wanted)
    return lambda name: any(is_named(name, end) for end in wanted)


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise UsageError(f"target_modules {pattern!r} is no regular expression: {error}", "mend it") from error


def _matrices(architecture: Architecture) -> dict[str, tuple[int, int]]:
    """Linear modules: name → (outputs, inputs)."""
    return {module.name: matrix_shape(module) for module in architecture.modules if module.linear and module.name}
