"""`estimate`: what a model needs in memory, per dtype, as metrics that gates can read and a report for people.

Everything is known from headers and configs, so the forecast gives the same numbers as the run: a gate on them is
decided before a byte of weights moves.

This is what the kind takes and gives; `estimating` does it, and is imported only then: every command reads every kind.
"""

from __future__ import annotations

from bigpipe.orchestrator.stage import (
    CheckContext,
    Forecast,
    ForecastContext,
    Pinned,
    Port,
    Stage,
    StageContext,
    StageResult,
)

from .estimate_params import EstimateMetrics, EstimateParams


def pin(params: EstimateParams, context: CheckContext) -> Pinned | None:
    """The commit that a branch or tag means now."""
    if params.repo is None:
        return None
    from . import estimating

    return estimating.pin(params, context)


def check(params: EstimateParams, context: CheckContext) -> None:
    """One model, and access to it."""
    from . import estimating

    estimating.check(params, context)


def forecast(params: EstimateParams, context: ForecastContext) -> Forecast:
    from . import estimating

    return estimating.forecast(params, context)


def run(params: EstimateParams, context: StageContext) -> StageResult:
    from . import estimating

    return estimating.run(params, context)


STAGE = Stage(
    kind="estimate",
    version=1,
    params=EstimateParams,
    metrics=EstimateMetrics,
    inputs={"model": Port("checkpoint", optional=True)},
    output="report",
    run=run,
    forecast=forecast,
    check=check,
    pin=pin,
    runs_in="inline",
    packages=("transformers",),
    secrets=("HF_TOKEN",),
    title="Say what a model needs in memory, per dtype, before its weights move",
)
