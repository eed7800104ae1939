"""Stages that `doctor` runs to see whether what bigpipe stands on works here: the launcher, torch, bitsandbytes.

They go through the same launcher as any stage, so a crash of a library takes only its own process along.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bigpipe.orchestrator.stage import Forecast, Metrics, Params, Ranks, Stage, StageContext, StageResult


class Nothing(Params):
    pass


class Found(Metrics):
    detail: str


def _quantize(params: Nothing, context: StageContext) -> StageResult:
    """Quantize a small matrix to nf4 and back on the device that stages would use."""
    import bitsandbytes
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = torch.randn(64, 64, device=device)
    packed, state = bitsandbytes.functional.quantize_4bit(matrix, quant_type="nf4")
    error = (bitsandbytes.functional.dequantize_4bit(packed, state) - matrix).abs().max().item()
    return StageResult(Found(detail=f"nf4 on {device}, largest error {error:.2f}"))


def _see_devices(params: Nothing, context: StageContext) -> StageResult:
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return StageResult(Found(detail=", ".join(names) or "no GPU that torch can use"))


def _meet(params: Nothing, context: StageContext) -> StageResult:
    """All ranks must meet for one to return."""
    import torch

    torch.distributed.barrier()
    return StageResult(Found(detail=torch.distributed.get_backend()))


def _count(params: Nothing, context: StageContext) -> StageResult:
    return StageResult(Found(detail=f"{context.world_size} ranks met"))


def _stage(kind: str, run: Callable[[Nothing, StageContext], StageResult], **more: Any) -> Stage[Nothing]:
    given = {"inputs": {}, "output": None, "forecast": lambda params, context: Forecast(), **more}
    return Stage(kind=kind, version=1, params=Nothing, metrics=Found, run=run, **given)


BITSANDBYTES = _stage("probe-bitsandbytes", _quantize)
TORCH = _stage("probe-torch", _see_devices)
RANKS = _stage("probe-ranks", _meet, runs_in="ranks", ranks=Ranks(finish=_count))
