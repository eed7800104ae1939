"""The contexts a kind's functions are called with, for tests that call them without the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from bigpipe.orchestrator.contract.events import Event, LogLine, Progress
from bigpipe.orchestrator.stage import (
    CheckContext,
    Forecast,
    ForecastContext,
    Launch,
    Lineage,
    Machine,
    StageContext,
    Surroundings,
    Trust,
)

MACHINE = Machine("test", 2, 16 << 30, 8 << 30, 100 << 30)


class Recorder:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def report(self, event: Event) -> None:
        self.events.append(event)

    def progress(self, task: str = "") -> list[Progress]:
        return [event for event in self.events if isinstance(event, Progress) and event.task == task]

    @property
    def lines(self) -> list[str]:
        return [event.line for event in self.events if isinstance(event, LogLine)]


def stage_context(root: Path, **given: Any) -> StageContext:
    """Folders `out`, `scratch`, `parts`, `memo` and `base` under `root`, all made; `given` overrides any field, or any
    of the surroundings."""
    folders = {name: root / name for name in ("out", "scratch", "parts", "memo", "base")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    defaults: dict[str, Any] = {"node": "test", "inputs": {}, "machine": MACHINE, "reporter": Recorder(), **folders}
    return StageContext(**_nested({**defaults, **given}))


def check_context(root: Path, **given: Any) -> CheckContext:
    return CheckContext(**_nested({**_places(root, given), **given}))


def forecast_context(root: Path, **given: Any) -> ForecastContext:
    return ForecastContext(**_nested({**_places(root, given), **given}))


def _nested(given: dict[str, Any]) -> dict[str, Any]:
    around = {item.name: given.pop(item.name) for item in fields(Surroundings) if item.name in given}
    return {"surroundings": Surroundings(**around), **given}


def _places(root: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    places = {name: root / name for name in ("base", "memo") if name not in given}
    for folder in places.values():
        folder.mkdir(parents=True, exist_ok=True)
    return {"machine": MACHINE, **places}


def inputs(**ports: Path | Sequence[Path]) -> Mapping[str, tuple[Path, ...]]:
    return {port: (paths,) if isinstance(paths, Path) else tuple(paths) for port, paths in ports.items()}


__all__ = [
    "MACHINE", "Forecast", "Launch", "Lineage", "Recorder", "Trust", "check_context", "forecast_context", "inputs",
    "stage_context",
]  # fmt: skip
