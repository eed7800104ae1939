"""What stands beside a tokenizer: pictures and sounds as a model's processor wants them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import UsageError

from .rows import Row
from .tokenizing import DOWNLOAD, TASK, Asking, Bounded, names_of

if TYPE_CHECKING:
    from bigpipe.bigmodel.checkpoint import ModelDescription

PROCESSOR_FILES = frozenset({"preprocessor_config.json", "processor_config.json"})
NEEDS = {
    "PIL": ("pillow", "pictures"), "soundfile": ("soundfile", "sounds"), "diffusers": ("diffusers", "diffusers"),
}  # fmt: skip
"""Module → the distribution that has it, and the extra that installs it."""


def require_processor(model: ModelDescription, asking: Asking = TASK) -> None:
    """Raise UsageError for a model of a class of its own, and for one that comes without a processor's file."""
    if model.own_class is not None:
        raise asking.refuse_other(f"the class {model.own_class}")
    names = names_of(model)
    if names is not None and not PROCESSOR_FILES.intersection(names):
        cause = f"{asking.what} needs a preprocessor_config.json, and {model.path or 'the model'} has none"
        raise UsageError(cause, DOWNLOAD)


def require_library(module: str, what: str) -> None:
    """Raise UsageError where the library that reads `what` is not installed."""
    distribution, extra = NEEDS[module]
    if find_spec(module) is None:
        raise UsageError(f"{what} needs {distribution}, which is not installed", f"pip install 'bigpipe-ml[{extra}]'")


def load_processor(kind: str, path: Path, sources: Sources, bounded: Bounded) -> Any:
    """Return the processor in a checkpoint's directory. kind: its class of transformers, `AutoImageProcessor`. Raise
    UsageError where there is none that can be used."""
    import transformers

    try:
        with bounded(f"loading the processor of {path}"):
            return getattr(transformers, kind).from_pretrained(
                str(path), local_files_only=True, trust_remote_code=sources.trust_remote_code
            )
    except Exception as error:  # a foreign file may make foreign code raise anything
        first = str(error).strip().partition("\n")[0]
        raise UsageError(f"{path} has no processor that can be used: {first}", DOWNLOAD) from error


def file_of(row: Row, sources: Sources) -> Path:
    return (sources.base or Path()) / str(row.prompt)


@contextmanager
def reading(name: str, what: str) -> Iterator[None]:
    """Inside, a file is read: whatever a foreign file makes a reader raise is a ValueError that names it."""
    try:
        yield
    except Exception as error:
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        said = re.sub(rf"(?<=['\"])/[^'\"]*(?={re.escape(name)}['\"])", "", said)  # where it lies is nobody's business
        raise ValueError(f"{name} is no {what} that can be read: {said}") from error


def on_device(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a processor's tensors where the model computes, floats in its dtype."""
    from bigpipe.bigmodel.execution import loaded

    home = loaded(model).homes.main
    return {
        name: tensor.to(home, model.dtype) if tensor.is_floating_point() else tensor.to(home)
        for name, tensor in inputs.items()
    }
