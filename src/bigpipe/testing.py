"""For tests of stage kinds: a real attempt of a stage, and its forecast, without a recipe.

>>> from bigpipe.testing import run_stage
>>> done = run_stage(STAGE, {"prefix": "model."}, inputs={"model": checkpoint}, folder=tmp_path)
>>> done.metrics.tensors, done.out
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UsageError
from .machine import detect
from .modules import top_level
from .orchestrator.contract import Event, Forecast, ForecastContext, Launch, LogLine, Metrics, Stage, Surroundings
from .orchestrator.launch import run_alone

__all__ = ["StageRun", "forecast_stage", "run_stage"]


@dataclass(frozen=True, slots=True)
class StageRun:
    """What an attempt gave."""

    metrics: Metrics
    """As the kind's own metrics model."""
    out: Path
    """The directory that would become the artifact."""
    files: Mapping[str, tuple[str, int]]
    """Relative path → (sha256 in hex, size in bytes) of the files that the stage hashed itself."""
    lines: tuple[str, ...]
    """What it logged or printed."""
    seconds: float
    peak_rss: int
    """Bytes."""


def run_stage(
    stage: Stage[Any],
    params: Mapping[str, Any] = {},
    *,
    inputs: Mapping[str, str | Path | Sequence[str | Path]] = {},
    folder: str | Path,
    base: str | Path | None = None,
    num_processes: int = 1,
    environment: Mapping[str, str] = {},
    timeout: float | None = None,
) -> StageRun:
    """Run one attempt of a stage as a recipe would: in the process, the child or the ranks that the kind asks for with
    these params.

    params: as under `with:`. inputs: port → directory of an artifact, or several; a relative one as this process sees
    it. folder: takes what the attempt makes; run again in the same one, it finds its earlier work in `out` and
    `scratch`. base: what relative paths in the params are relative to; by default `folder`. num_processes: of a kind
    that runs as ranks. environment: what the stage sees as `context.environment`. timeout: seconds.

    Raise the stage's own BigpipeError, StageFailed where it crashes, UsageError where it is not an attribute of a
    module, or of the script that is run itself, or a port is not one of its own, ValidationError for wrong params.
    """
    lines: list[str] = []

    def report(event: Event) -> None:
        if isinstance(event, LogLine):
            lines.append(event.line)

    folder, settled = Path(folder), stage.with_params(stage.params.model_validate(dict(params)))
    module = _location(stage, settled)
    outcome = run_alone(
        stage, module, params, _surroundings(folder, base, num_processes, environment), folder.absolute(),
        inputs={port: _paths(given) for port, given in _wired(settled, inputs)},
        parent_environment=_with_path(module), report=report, timeout=timeout,
    )  # fmt: skip
    told = {name: value for name, value in outcome.metrics.items() if name not in settled.metrics.model_computed_fields}
    metrics = settled.metrics.model_validate(told)
    return StageRun(metrics, folder / "out", outcome.files, tuple(lines), outcome.seconds, outcome.peak_rss)


def forecast_stage(
    stage: Stage[Any],
    params: Mapping[str, Any] = {},
    *,
    inputs: Mapping[str, Forecast] = {},
    folder: str | Path,
    base: str | Path | None = None,
    environment: Mapping[str, str] = {},
) -> Forecast:
    """Return what a stage forecasts. inputs: port → forecast of what is wired to it; the rest as for `run_stage`."""
    read = stage.params.model_validate(dict(params))
    settled = stage.with_params(read)
    wired = {port: (forecast,) for port, forecast in _wired(settled, inputs)}
    context = ForecastContext(surroundings=_surroundings(Path(folder), base, 1, environment), inputs=wired)
    return settled.forecast(read, context)


def _paths(given: str | Path | Sequence[str | Path]) -> tuple[Path, ...]:
    """Absolute, as a worker is given them: it works in another directory."""
    return tuple(Path(path).absolute() for path in ([given] if isinstance(given, str | Path) else given))


def _surroundings(folder: Path, base: str | Path | None, ranks: int, environment: Mapping[str, str]) -> Surroundings:
    return Surroundings(
        base=Path(base or folder).absolute(),
        machine=detect(folder),
        memo=folder.absolute() / "memo",
        launch=Launch(num_processes=ranks),
        environment=environment,
    )


def _wired(stage: Stage[Any], inputs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    unknown = sorted(name for name in inputs if stage.port(name) is None)
    missing = [name for name, port in stage.inputs.items() if not port.optional and name not in inputs]
    if unknown or missing:
        wrong = f"has no port {unknown[0]}" if unknown else f"needs its port {missing[0]}"
        raise UsageError(f"{stage.kind} {wrong}", f"its ports: {', '.join(stage.inputs) or 'none'}")
    return list(inputs.items())


def _location(stage: Stage[Any], settled: Stage[Any]) -> str:
    parts = [part.__module__ for part in (stage.params, stage.metrics, stage.run, stage.forecast)]
    main = sys.modules["__main__"]  # which holds what it imported, too, and may have a second name
    others = [*(name for name, module in sys.modules.items() if module is not main), "__main__"]
    for name in dict.fromkeys([*parts, *others]):
        for attribute, value in list(getattr(sys.modules.get(name), "__dict__", {}).items()):
            if value is not stage:
                continue
            if name == "__main__" and settled.runs_in != "inline":
                cause = f"the Stage of kind {stage.kind} stands in the script, or notebook, that is run itself"
                raise UsageError(cause, "put it into a module of its own, and import it: workers import it from there")
            return f"{name}:{attribute}"
    raise UsageError(f"the Stage of kind {stage.kind} is no attribute of a module", "workers import it from there")


def _with_path(module: str) -> dict[str, str]:
    top = sys.modules[top_level(module)]
    place = next(iter(getattr(top, "__path__", ())), None) or getattr(top, "__file__", None)  # a notebook has neither
    home = Path(place or "").parent
    return {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(home)])}
