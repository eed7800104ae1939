"""How `estimate` does it: looks at a model's headers or config, and counts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from bigpipe.bigmodel.footprint import Estimate, Sighting, Workload, estimate_sighting, look
from bigpipe.bigmodel.formats import DTYPES
from bigpipe.bigmodel.hub import Hub, check_access
from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import NotAuthorised, Transient, UsageError
from bigpipe.files import write_file
from bigpipe.orchestrator.stage import CheckContext, Forecast, ForecastContext, Metrics, StageContext, StageResult
from bigpipe.sizes import format_size
from bigpipe.versions import require

from .estimate import DtypeMetrics, EstimateMetrics, EstimateParams
from .library import is_offline, line_of, sources_of
from .wired import Pipeline, single_model

RAM = 96 * 2**20
"""Of the engine's own process for the largest headers; a class that must be built is built in a child."""
WORK = {"batch_size", "sequence_length", "kv_dtype", "lora_rank", "lora_targets", "gradient_checkpointing"}
"""Fields that are the workload's own."""
REPORT_BYTES = 64 * 2**10


def check(params: EstimateParams, context: CheckContext) -> None:
    _check_source(params, "model" in context.inputs)
    if params.repo is None:
        return
    sources = sources_of(context)
    if is_offline(context):
        _look(params, context.base, context.pins if isinstance(context, ForecastContext) else {}, sources)
        return
    with suppress(Transient):  # of which the forecast tells, and which may have passed when it runs
        check_access(params.repo, hub=Hub.of(sources))


def _check_source(params: EstimateParams, wired: bool) -> None:
    given = [name for name in ("repo", "path") if getattr(params, name) is not None]
    given += ["inputs.model"] if wired else []
    if len(given) != 1:
        raise UsageError(
            f"estimate looks at one model; {' and '.join(given) or 'nothing'} is given",
            "wire inputs: model, or write repo: or path: under `with`",
        )


COSTS: Mapping[str, Any] = MappingProxyType({"download_bytes": 0, "write_bytes": REPORT_BYTES, "ram": RAM, "vram": {}})
"""What a look at headers takes, whatever they say."""


def _unsized(why: str) -> Forecast:
    return Forecast(**COSTS, unknown=(why,), summary="sizes not known")


def forecast(params: EstimateParams, context: ForecastContext) -> Forecast:
    """The run's own numbers wherever headers or a config can be had now."""
    _check_source(params, "model" in context.inputs)
    try:
        sighting = _forecast_sighting(params, context)
    except (Transient, NotAuthorised) as error:
        return _unsized(f"size of {params.repo}: {error.cause}")
    if sighting is None:
        return _unsized("sizes: the input's config is not known yet")
    try:
        made = _estimate(params, sighting, sources_of(context))
    except UsageError as error:
        if not context.trust.remote_code:
            raise
        return _unsized(f"sizes, until its trusted code is here: {error.cause}")
    if made.architecture.outlined and context.trust.remote_code:
        return _unsized("sizes: its trusted code is asked once it is here")
    sizes = ", ".join(f"{found.dtype} {format_size(found.inference)}" for found in made.budgets)
    length, asked = made.workload.sequence_length, params.sequence_length
    return Forecast(
        **COSTS,
        metrics=_metrics(made).model_dump(mode="json"),
        summary=f"{sizes} at {made.workload.batch_size} × {length} tokens" + (f" of {asked}" if asked > length else ""),
        details=made.notes,
    )


def _forecast_sighting(params: EstimateParams, context: ForecastContext) -> Sighting | None:
    if "model" not in context.inputs:
        return _look(params, context.base, context.pins, sources_of(context))
    pipeline = context.described("model", Pipeline)
    if pipeline is not None:  # its parts are known where its files lie
        known = pipeline.description
        if known.path is None or known.tensors is None:
            return None
        there = look(known.path, "main", sources_of(context), params.library_name)
        return replace(there, name="the model", description=known)
    described = single_model(context)
    if described is None or not described.says_class:
        return None
    seen: Literal["config", "headers"] = "config" if described.tensors is None else "headers"
    return Sighting(name="the model", description=described, source=seen, library=params.library_name)


def _look(params: EstimateParams, base: Path, pins: Mapping[str, str], sources: Sources) -> Sighting:
    model = params.repo or "" if params.path is None else base / params.path
    revision = "main" if params.repo is None else pins.get("revision", params.revision)
    found = look(model, revision, sources, params.library_name, variant=params.variant, subfolder=params.subfolder)
    return found if params.path is None else replace(found, name=params.path)


def _estimate(params: EstimateParams, sighting: Sighting, sources: Sources) -> Estimate:
    work = Workload(double_quant=params.bnb_4bit_use_double_quant, **params.model_dump(include=WORK))
    made = estimate_sighting(sighting, dtypes=params.dtypes, head=params.head, workload=work, sources=sources)
    return replace(made, train=params.train)


def _metrics(made: Estimate) -> Metrics:
    found = {
        dtype: DtypeMetrics(**values, training_high=made[dtype].needed(made.train) if made.train else None)
        for dtype, values in made.metrics().items()
    }
    own = {dtype: found.pop(dtype) for dtype in DTYPES if dtype in found}
    return EstimateMetrics.model_validate({**own, "formats": found, "sequence_length": made.workload.sequence_length})


def run(params: EstimateParams, context: StageContext) -> StageResult:
    """Write report.json (`bigpipe.estimate/1`) and report.txt (the table)."""
    sources = sources_of(context)
    if "model" in context.inputs:
        sighting = replace(look(context.input("model"), "main", sources, params.library_name), name=_name(context))
    else:
        sighting = _look(params, context.base, context.pins, sources)
    # What was fetched depends on what was known before; a report must not
    made = replace(_estimate(params, sighting, sources), fetched_bytes=0)
    if made.architecture.outlined:  # where its class can be had, the same key has other numbers
        require(f"an estimate of {sighting.name} to keep", "torch", "transformers", "accelerate")
    for line in made.render().splitlines():
        context.log(line)
    report = json.dumps(made.as_json(), indent=2, ensure_ascii=False) + "\n"
    files = {"report.json": report, "report.txt": made.render() + "\n"}
    return StageResult(_metrics(made), {name: write_file(context.out / name, text) for name, text in files.items()})


def _name(context: StageContext) -> str:
    """What the model was called where it came from; a path into the store would tell nobody anything."""
    for ancestor in line_of(context, context.input("model")):
        source = ancestor.params.get("repo") or ancestor.params.get("path")
        if isinstance(source, str):
            return source
    return context.lineage[-1].node if context.lineage else "model"
