"""The engine as a value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.tasks import Arguments, Task, find_task
from bigpipe.errors import UsageError

if TYPE_CHECKING:
    from bigpipe.bigmodel.checkpoint import ModelDescription
    from bigpipe.bigmodel.sources import Sources
    from bigpipe.machine import Machine

    from .endpoint import Endpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What an engine is to serve, and where."""

    task: str
    machine: Machine
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Where the secrets that the settings name are."""
    offline: bool = False
    dtype: str | None = None
    """What to compute in; None: the engine's own choice."""
    model: ModelDescription | None = None
    """As far as it is known."""
    path: Path | None = None
    """The model's directory, once it is there."""
    folder: Path | None = None
    """A directory for what the engine writes down, once there is one."""


def _no_check(settings: Any, wanted: Wanted) -> None:
    """Nothing can be wrong."""


def _holds_nothing(settings: Any, machine: Machine) -> Mapping[int, int]:
    """It computes elsewhere."""
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One way to have a task's rows answered.

    settings: the model of what stands under `serving:`.
    serve: (settings, what is wanted) → a context with the endpoint that answers; None: the ranks themselves hold the
      model. Raises a BigpipeError where there is none.
    takes_model: does it take the model that is wired to the stage?
    tasks: gives those it does, by name; None: all, functions of the user's own among them.
    apart: settings that change how it is asked, and nothing of the answers.
    check: (settings, what is wanted); raises a BigpipeError for what would fail later, as far as it is known.
    packages: distributions whose versions the answers depend on.
    holds: (settings, the machine) → GPU's number → bytes of it that it takes, of an engine that takes a model.
    """

    name: str
    settings: type[Arguments]
    serve: Callable[[Any, Wanted], AbstractContextManager[Endpoint]] | None = None
    takes_model: bool = True
    tasks: Callable[[], Mapping[str, Task]] | None = None
    apart: tuple[str, ...] = ()
    check: Callable[[Any, Wanted], None] = _no_check
    packages: tuple[str, ...] = ()
    holds: Callable[[Any, Machine], Mapping[int, int]] = _holds_nothing

    def find_task(self, name: str, sources: Sources) -> Task:
        """Return the task of that name as this engine does it. Raise UsageError as `tasks.find_task`, and for one that
        it does not do."""
        if self.tasks is None:
            return find_task(name, sources)
        tasks = self.tasks()
        if name not in tasks:
            cure = f"it does {', '.join(tasks)}; engine: transformers does all, and functions of your own"
            raise UsageError(f"engine {self.name} does no {name}", cure, field="task")
        return tasks[name]
