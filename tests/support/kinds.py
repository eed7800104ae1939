"""Small stage kinds for tests of the engine: the ports and fields of the real ones, and nothing to compute."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from bigpipe.orchestrator.stage import (
    FileOrLiteral,
    Forecast,
    ForecastContext,
    Metrics,
    Params,
    Port,
    Size,
    Stage,
    StageContext,
    StageResult,
)


class NoMetrics(Metrics):
    pass


class SourceMetrics(Metrics):
    bytes: int
    commit: str | None = None


class Synthetic(Params):
    config: str | dict[str, Any]
    dtype: str = "float16"


class SourceParams(Params):
    repo: str | None = None
    revision: str = "main"
    include: list[str] = Field(default_factory=list)
    synthetic: Synthetic | None = None


class DtypeMetrics(Metrics):
    weights: int
    inference_high: int
    training: dict[str, int]


class EstimateMetrics(Metrics):
    float16: DtypeMetrics | None = None
    int8: DtypeMetrics | None = None


class EstimateParams(Params):
    dtypes: list[Literal["float32", "float16", "int8"]] = Field(["float16"], min_length=1)
    batch_size: int = Field(1, ge=1)


class QuantizeParams(Params):
    scheme: Literal["int8", "nf4", "fp4"]
    threshold: float = 6.0
    skip_modules: list[str] | None = None
    double: bool = False


class QuantizeMetrics(Metrics):
    bytes: int
    ratio: float


Device = Literal["cpu", "disk"]


class PlaceParams(Params):
    device_map: Literal["auto", "sequential"] | dict[str, int | Device] = "auto"
    max_memory: dict[int | str, Size] | None = None


class PlaceMetrics(Metrics):
    predicted: dict[str, int]
    load_seconds: float


class InferParams(Params):
    prompts: Annotated[str | list[str], FileOrLiteral]
    max_new_tokens: int = 32
    generation: dict[str, Any] = Field(default_factory=dict)


class InferMetrics(Metrics):
    tokens: int
    peak: dict[str, int]


class SaveParams(Params):
    to: str
    card: dict[str, Any] = Field(default_factory=dict)


def nothing_to_run(params: Params, context: StageContext) -> StageResult:
    return StageResult(NoMetrics())


def nothing_to_forecast(params: Params, context: ForecastContext) -> Forecast:
    return Forecast()


def kind(name: str, params: type[Params], metrics: type[Metrics], inputs: dict[str, Port], output: str | None,
         **more: Any) -> Stage[Any]:  # fmt: skip
    return Stage(
        kind=name, version=1, params=params, metrics=metrics, inputs=inputs, output=output,
        run=nothing_to_run, forecast=nothing_to_forecast, **more,
    )  # fmt: skip


CHECKPOINT = Port("checkpoint")

KINDS: dict[str, Stage[Any]] = {
    stage.kind: stage
    for stage in (
        kind("source", SourceParams, SourceMetrics, {}, "checkpoint", secrets=("HF_TOKEN",)),
        kind("estimate", EstimateParams, EstimateMetrics, {"model": Port("checkpoint", optional=True)}, "report"),
        kind("quantize", QuantizeParams, QuantizeMetrics, {"model": CHECKPOINT}, "checkpoint"),
        kind("place", PlaceParams, PlaceMetrics, {"model": CHECKPOINT}, "placement"),
        kind("infer", InferParams, InferMetrics,
             {"model": CHECKPOINT, "placement": Port("placement", optional=True)}, "results", runs_in="ranks"),
        kind("save", SaveParams, NoMetrics,
             {"model": Port("checkpoint", optional=True), "results": Port("results", optional=True),
              "reports": Port("report", optional=True, many=True)}, "report", needs_input=True),
    )
}  # fmt: skip
