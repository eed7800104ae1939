"""Engines by name, imported when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, get_args

from bigpipe.modules import import_attribute

if TYPE_CHECKING:
    from bigpipe.bigmodel.tasks import Arguments

    from .engine import Engine

EngineName = Literal["transformers", "openai", "vllm"]
ENGINES: Mapping[str, str] = {name: f"bigpipe.bigmodel.engines.{name}:ENGINE" for name in get_args(EngineName)}
"""Name → `module:NAME` of the engine."""


def find_engine(name: EngineName) -> Engine:
    """Return the engine of that name."""
    engine: Engine = import_attribute(ENGINES[name])
    return engine


def engine_settings() -> Mapping[str, type[Arguments]]:
    """Return what each engine takes under `serving:`, by its name."""
    return {name: find_engine(name).settings for name in get_args(EngineName)}
