"""`download`: a model from the Hub, from a directory, or made up in the shape of a config.

From the Hub nothing is copied: the artifact refers to the blobs where the Hub cache keeps them, each verified once. A
directory is copied, because it may change; synthetic weights are streamed to disk in constant memory.

This is what the kind takes and gives; `sources` does it, and is imported only then: every command reads every kind.
"""

from __future__ import annotations

from collections.abc import Mapping

from bigpipe.orchestrator.stage import (
    CheckContext,
    Forecast,
    ForecastContext,
    Json,
    Machine,
    Pinned,
    Stage,
    StageContext,
    StageResult,
)

from .download_params import DownloadMetrics, DownloadParams


def pin(params: DownloadParams, ctx: CheckContext) -> Pinned | None:
    """The commit that a branch or tag means now."""
    if params.repo is None:
        return None
    from . import sources

    return sources.pin(params, ctx)


def check(params: DownloadParams, ctx: CheckContext) -> None:
    """Trust, token, gate, and whether a directory is a checkpoint: what would fail later fails now."""
    from . import sources

    sources.check(params, ctx)


def forecast(params: DownloadParams, ctx: ForecastContext) -> Forecast:
    from . import sources

    return sources.forecast(params, ctx)


def run(params: DownloadParams, ctx: StageContext) -> StageResult:
    from . import sources

    return sources.run(params, ctx)


def facts(params: DownloadParams, machine: Machine) -> Mapping[str, Json]:
    """Which tensors a made-up model has is decided by the library that defines its class."""
    if params.synthetic is None or params.architecture is not None:
        return {}
    from importlib import metadata

    library = params.library_name or "transformers"
    return {library: metadata.version(library)}


STAGE = Stage(
    kind="download",
    version=1,
    params=DownloadParams,
    metrics=DownloadMetrics,
    inputs={},
    output="checkpoint",
    run=run,
    forecast=forecast,
    check=check,
    pin=pin,
    facts=facts,
    secrets=("HF_TOKEN",),
    title="Bring a model here: from the Hub at a commit, from a directory, or made up in the shape of a config",
)
