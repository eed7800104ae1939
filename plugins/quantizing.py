"""How `quantize` does it: streamed, in constant memory and without torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bigpipe.bigmodel.checkpoint import describe_checkpoint, open_checkpoint
from bigpipe.bigmodel.formats import decoding_memory, idle_options
from bigpipe.bigmodel.quantization import Settings, quantize_described, refuse_quantized, understand
from bigpipe.errors import UsageError
from bigpipe.orchestrator.stage import CheckContext, Forecast, ForecastContext, Machine, StageContext, StageResult
from bigpipe.sizes import counted, format_transfer

from .library import about, sources_of
from .quantize import QuantizeMetrics, QuantizeParams
from .wired import require_class, single_model

RAM = 192 * 2**20
"""Peak of the worker process besides what it holds of one transposed weight: interpreter, numpy, reused buffers."""
GPU_RAM = 3 * 2**30
"""More where a GPU encodes: torch with CUDA's libraries."""
HELD = "the state of each matrix holds a number of the data"
WORKERS = 4
"""Threads that decode and encode, at most."""
RATE = 350 * 10**6
"""Bytes of input per second where nothing better is known: two cores, an ordinary disk."""


def check(params: QuantizeParams, context: CheckContext) -> None:
    """Refuses before the download what is quantized already, weights of which nobody knows the class, and options that
    a format of another distribution has no use for."""
    for name in idle_options(params.scheme, params.model_fields_set):
        raise UsageError(f"{name} has no meaning for scheme {params.scheme}", "remove it", field=name)
    if described := single_model(context):
        with about("inputs.model"):
            require_class(described)
            refuse_quantized(described)


def forecast(params: QuantizeParams, context: ForecastContext) -> Forecast:
    """Exact sizes, from the input's headers and its class; under double quantization to a few bytes per weight."""
    described = single_model(context)
    if described is None or described.tensors is None:
        return _unsized("the tensors of the input are not known yet")
    if not described.says_class:
        return _unsized("the input has no config that names its class")
    with about("inputs.model"):
        refuse_quantized(described)
    settings = _settings(params, context.machine)
    try:
        outlined, quantized = understand(described, settings, sources=sources_of(context))
    except UsageError:
        if not (context.trust.remote_code and (described.config or {}).get("auto_map")):
            raise
        return _unsized("its trusted code is asked once it is here")
    before, after = described.nbytes or 0, outlined.nbytes
    metrics: dict[str, Any] = {"quantized": len(outlined.quantized), "skipped": len(outlined.skipped)}
    low, high = outlined.interval(settings)
    if low == high:
        metrics |= {"bytes": after, "ratio": before / after}
    held = WORKERS * decoding_memory(described) + outlined.largest_transposed
    bound = () if low == high else (f"weights: {low:,} to {high:,} bytes (bound: {HELD})",)
    output = describe_checkpoint(context.artifact) if context.artifact else None
    return Forecast(
        download_bytes=0,
        vram={},
        write_bytes=after,
        ram=RAM + held + (GPU_RAM if context.machine.gpus else 0),
        seconds=before / RATE,
        metrics=metrics,
        output=output or quantized,
        summary=f"{params.scheme}, {counted(len(outlined.quantized), 'module')}, +{format_transfer(after)}",
        details=(*outlined.notes, outlined.remains, *bound),
    )


def _unsized(why: str) -> Forecast:
    return Forecast(download_bytes=0, vram={}, unknown=(f"size after quantization, and memory: {why}",))


def _settings(params: QuantizeParams, machine: Machine) -> Settings:
    return Settings(**params.model_dump(), threads=machine.cpus)


def _device(params: QuantizeParams, context: StageContext) -> str | None:
    """A GPU, where there is one that gives the same bytes; torch is imported only where a GPU was seen."""
    if not context.machine.gpus:
        return None
    from bigpipe.bigmodel.quantization import usable_device

    device = usable_device(_settings(params, context.machine))
    context.log(f"encoding on {device or 'the CPU: torch cannot use the GPU here, or it rounds differently'}")
    return device


def run(params: QuantizeParams, context: StageContext) -> StageResult:
    """Files finished by an earlier attempt, or by another run with the same settings for these modules, are kept."""
    checkpoint = open_checkpoint(context.open("model"))
    result = quantize_described(
        checkpoint,
        context.out,
        replace(_settings(params, context.machine), device=_device(params, context)),
        sources=sources_of(context),
        parts=context.parts,
        linked=True,
        progress=lambda done, total: context.progress(done, total, "B", "weights"),
    )
    for note in result.notes:
        context.log(note)
    left = ", ".join(result.skipped) or "none"
    context.log(f"{len(result.quantized)} modules are {params.scheme} now; linear modules left as they were: {left}")
    metrics = QuantizeMetrics(
        bytes=result.bytes,
        ratio=result.source_bytes / result.bytes,
        quantized=len(result.quantized),
        skipped=len(result.skipped),
    )
    return StageResult(metrics, result.files)
