"""One stage of a recipe after its matrix is expanded: everything plan and run need to know of it."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from bigpipe.errors import Place
from bigpipe.orchestrator.contract import Json, Launch, Params, Stage

from .conditions import Condition
from .manifest import OnFail, ResourcesSpec
from .yamlsource import Document, Item, Key


class Places(UserDict[str, Place]):
    """Where the parts of one stage stand: `""`, `params.scheme`, `gates[0]`, `inputs.model`; built when first asked.
    Keys of `with:` stand under `params`; a key itself is `params.scheme[key]`. What came from `${…}` has the place of
    that reference."""

    def __init__(self, document: Document, path: tuple[Key, ...]) -> None:
        self._document, self._path = document, path

    @cached_property
    def data(self) -> dict[str, Place]:  # type: ignore[override]
        table = {"": self._document.place_at(self._path, key=True)}
        stage, _ = self._document.find(self._path)
        for key, item in stage.value.items() if isinstance(stage.value, dict) else ():
            self._enter(table, "params" if key == "with" else str(key), item)
        return table

    def of(self, field: str) -> Place | None:
        """Return where a field of `with:`, or a part of the stage (`inputs.model`), stands, or the nearest thing around
        it that was written."""
        parts = field.split(".") if field else []
        names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
        written = (name for name in (*(f"params.{name}" for name in names), *names) if name in self)
        return self.get(next(written, ""))

    def _enter(self, table: dict[str, Place], name: str, item: Item) -> None:
        table[name] = self._document.place(item)
        if isinstance(item.value, dict):
            for key, child in item.value.items():
                self._enter(table, f"{name}.{key}", child)
                table[f"{name}.{key}[key]"] = self._document.place(item.keys.get(key, child))
        elif isinstance(item.value, list):
            for index, child in enumerate(item.value):
                self._enter(table, f"{name}[{index}]", child)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One value of the axis along which a node takes the first variant that passes, and what it then takes."""

    value: str
    judge: str
    """The node whose gates decide."""
    inputs: Mapping[str, tuple[str, ...]]
    needs: tuple[str, ...] = ()
    own: tuple[str, ...]
    """What it takes and needs, without what is gathered over all values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class First:
    """A node takes one variant of an axis: the first that passes its gates."""

    axis: str
    of: str
    """The stage whose gates decide."""
    choices: tuple[Choice, ...]
    """In the order in which they are tried."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Node:
    """One use of a stage kind: a stage of the manifest, or one variant of it."""

    name: str
    """`quantize@scheme=nf4`; several axes as `x@a=1,b=2`, in the order the manifest declares them."""
    stage: str
    """The key under `stages:`."""
    kind: Stage[Any]
    location: str
    """`module:attribute` of the kind: where workers import it from."""
    params: Params
    """Validated; paths as written, relative to the manifest."""
    variant: Mapping[str, Json]
    inputs: Mapping[str, tuple[str, ...]]
    """Port → node names; where it takes the `first` variant that passes, those of all."""
    first: First | None = None
    needs: tuple[str, ...] = ()
    when: Condition | None = None
    gates: tuple[Condition, ...] = ()
    launch: Launch = field(default_factory=Launch.model_construct)
    resources: ResourcesSpec = field(default_factory=ResourcesSpec)
    retries: int = 0
    timeout: float | None = None
    """Seconds."""
    on_fail: OnFail = "stop"
    cache: bool = True
    env: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    """Names it may see: the kind's own and those the stage lists."""
    places: Places

    producers: tuple[str, ...] = field(init=False)
    """The nodes whose artifacts it takes."""
    predecessors: tuple[str, ...] = field(init=False)
    """The nodes that must have ended before this one starts: inputs, needs, and those that `when` and `first` ask."""

    def __repr__(self) -> str:
        after = f", after {', '.join(self.predecessors)}" if self.predecessors else ""
        return f"<Node {self.name}: {self.kind.kind}{after}>"

    def __post_init__(self) -> None:
        producers = dict.fromkeys(name for names in self.inputs.values() for name in names)
        asked = sorted(node for node, _ in self.when.references if node is not None) if self.when else ()
        judges = [choice.judge for choice in self.first.choices] if self.first else []
        object.__setattr__(self, "producers", tuple(producers))
        object.__setattr__(self, "predecessors", tuple(dict.fromkeys([*producers, *self.needs, *asked, *judges])))
