"""What `evaluate` needs: where both models go, side by side, and the memory of them and of a batch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from bigpipe.bigmodel.checkpoint import ModelDescription
from bigpipe.bigmodel.evaluation import Known, Question, at_work, comparing, place_pair, together_windows
from bigpipe.bigmodel.footprint import Workload
from bigpipe.bigmodel.formats import format_of
from bigpipe.bigmodel.placement import Placement, Together, beyond_headroom
from bigpipe.errors import DoesNotFit
from bigpipe.fit import Misfit
from bigpipe.orchestrator.stage import Forecast, ForecastContext, StageContext

from .evaluate import EvaluateParams
from .library import sources_of
from .placed import computed_in
from .ranked import (
    CUDA_BASE,
    RANK_BASE,
    UNSIZED,
    alone,
    held_in_ram,
    misfits_of_gpus,
    misfits_of_unplaced,
    on_its_gpu,
)
from .wired import agreed, attached, single_model

PORTS = ("model", "baseline")


def tokens_at_most(params: EvaluateParams, text: str) -> int:
    """Return how many tokens are read of a text: one rarely has less than a byte."""
    size = len(text.encode())
    return min(size, params.max_tokens or size)


def question(params: EvaluateParams) -> Question:
    """Return what is asked."""
    return Question(**params.model_dump(exclude={"dtype"}))


def with_memory(params: EvaluateParams, ctx: ForecastContext, known: Forecast, tokens: int) -> Forecast:
    """What both models, an adapter and the batches under way take. Nothing where a model is not known yet. tokens: of
    the text, at most."""
    models = [single_model(ctx, port) for port in PORTS if port in ctx.inputs]
    placed = ctx.input("placement")
    placement = ctx.described("placement", Placement)
    each = placement.gpus if placement else int(bool(ctx.machine.gpus) and placed is None)
    misfits = misfits_of_gpus(each, ctx)
    if any(model is None or model.tensors is None for model in models) or (placed is not None and placement is None):
        return replace(known, unknown=(UNSIZED,), misfits=misfits)
    try:
        described = [model for model in models if model is not None]
        work = workload(params, described, ctx, tokens)
        sides = sides_of(params, described, placement, work, ctx)
    except DoesNotFit as error:
        return replace(known, misfits=(Misfit.of(error),))
    local = ctx.launch.local_processes
    held = sum(held_in_ram(model, where, params.dtype, ctx) for model, where in sides)
    beside = sum(adapter.nbytes.values()) if (adapter := attached(ctx, models[0])) else 0
    beside += _foreseen_together(params, sides, work, ctx, tokens).more
    ram = RANK_BASE + (CUDA_BASE if each else held + beside + _at_work(params, sides, work, ctx))
    of_a_rank = _vram(params, sides, work, ctx, beside)
    vram = {rank * each + gpu: size for rank in range(local) for gpu, size in of_a_rank.items()}
    if placed is None:
        misfits = misfits or misfits_of_unplaced(vram, ctx)
    return replace(known, ram=ram * local, vram=vram, misfits=misfits)


def _vram(params: EvaluateParams, sides: Sides, work: Workload, ctx: ForecastContext, beside: int) -> Counter[int]:
    """Per GPU of a rank: what its models are placed with, and what a batch of windows takes beyond that. beside: an
    adapter and further batches, on the first."""
    found: Counter[int] = Counter()
    for model, where in sides:
        gpus = {device: need.total for device, need in where.needs.items() if isinstance(device, int)}
        if not gpus:
            continue
        architecture, dtype = agreed(model, sources_of(ctx)).architecture, computed_in(model, where, ctx, params.dtype)
        more = beyond_headroom(where, architecture, dtype, work, format_of(model), caching=False)
        found.update({gpu: size + more.get(gpu, 0) for gpu, size in gpus.items()})
    if found:
        first = agreed(sides[0][0], sources_of(ctx)).architecture
        found[min(found)] += beside + comparing(first, work, len(sides))
    return found


Sides = list[tuple[ModelDescription, Placement]]


def sides_of(
    params: EvaluateParams,
    models: list[ModelDescription],
    placement: Placement | None,
    work: Workload,
    ctx: ForecastContext | StageContext,
) -> Sides:
    """Each model with where it goes."""
    if placement is None:
        return [(model, on_its_gpu(model, params.dtype, ctx) or alone(ctx.machine)) for model in models]
    known = [Known(model, agreed(model, sources_of(ctx)).architecture) for model in models]
    if len(known) == 1:
        return [(models[0], placement)]
    return list(zip(models, place_pair(placement, known[0], known[1], work, ctx.machine, ctx.memo), strict=True))


def workload(
    params: EvaluateParams, models: Sequence[ModelDescription], ctx: ForecastContext | StageContext, tokens: int
) -> Workload:
    """Return that of a batch of windows. models: the one that is evaluated, and its baseline where there is one.
    tokens: of the text, at most."""
    asked, baseline = question(params), models[1] if len(models) > 1 else None
    return asked.workload(asked.check(models[0], baseline, sources_of(ctx))[0], tokens)


def together_of(params: EvaluateParams, sides: Sides, work: Workload, ctx: ForecastContext | StageContext) -> Together:
    """Return how many batches go through streamed layers together, at most, and what each holds while it waits."""
    placed = [
        (where, agreed(model, sources_of(ctx)).architecture, computed_in(model, where, ctx, params.dtype))
        for model, where in sides
    ]
    return together_windows(placed, work, ctx.machine, ctx.launch.local_processes, ctx.memo)


def _foreseen_together(
    params: EvaluateParams, sides: Sides, work: Workload, ctx: ForecastContext, tokens: int
) -> Together:
    """No more of them than a rank has."""
    models = [model for model, _ in sides]
    _, stride = question(params).check(models[0], models[1] if len(models) > 1 else None, sources_of(ctx))
    batches = math.ceil(math.ceil(tokens / stride) / params.batch_size)
    found = together_of(params, sides, work, ctx)
    return replace(found, count=max(1, min(found.count, math.ceil(batches / ctx.launch.num_processes))))


def _at_work(params: EvaluateParams, sides: Sides, work: Workload, ctx: ForecastContext) -> int:
    architectures = [agreed(model, sources_of(ctx)).architecture for model, _ in sides]
    dtypes = [computed_in(model, where, ctx, params.dtype) for model, where in sides]
    return at_work(list(zip(architectures, dtypes, strict=True)), work)
