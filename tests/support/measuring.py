"""A kind that measures what it is told."""

from __future__ import annotations

from bigpipe.orchestrator.stage import Forecast, Metrics, Params, Stage, StageContext, StageResult


class MeasureParams(Params):
    value: str = "1"


class MeasureMetrics(Metrics):
    value: float
    parts: dict[str, list[float | None]]


def measure(params: MeasureParams, context: StageContext) -> StageResult:
    (context.out / "text").write_text(params.value)
    return StageResult(MeasureMetrics(value=1.0, parts={"a": [0.5, None, float(params.value)]}))


STAGE = Stage(
    kind="measure", version=1, params=MeasureParams, metrics=MeasureMetrics, inputs={}, output="text",
    runs_in="inline", run=measure, forecast=lambda params, context: Forecast(),
)  # fmt: skip
