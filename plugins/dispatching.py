"""How `dispatch` does it.

The placement is computed from headers and the architecture alone, so a plan shows the one that the run will give. The
run then loads the model as placed, runs a forward, and writes down what each device holds beside what was predicted.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.architecture import Architecture, ModuleSpec, describe_architecture
from bigpipe.bigmodel.checkpoint.description import ModelDescription, describe_checkpoint
from bigpipe.bigmodel.checkpoint.tensors import tensor_nbytes
from bigpipe.bigmodel.footprint.activations import prefill, shape_of
from bigpipe.bigmodel.footprint.kvcache import cache_of
from bigpipe.bigmodel.footprint.weights import compute_bytes
from bigpipe.bigmodel.placement import Device, Placement, place_architecture
from bigpipe.bigmodel.placement.budget import devices_of
from bigpipe.bigmodel.placement.measuring import measured_speeds
from bigpipe.bigmodel.placement.models import stored_bytes, stored_dtype
from bigpipe.bigmodel.placement.speeds import Speeds
from bigpipe.bigmodel.placement.tree import INDIVISIBLE
from bigpipe.bigmodel.sources import Sources
from bigpipe.files import write_file
from bigpipe.orchestrator.stage import (
    DoesNotFit,
    Forecast,
    ForecastContext,
    Gpu,
    Machine,
    Misfit,
    StageContext,
    StageResult,
    UsageError,
    format_size,
)
from bigpipe.sizes import exact_size

from .dispatch import DispatchMetrics, DispatchParams
from .placed_model import PLACEMENT, PlacedModel
from .sources import sources_of

PICTURE = "placement.txt"
GPU_RUNTIME = 512 * 2**20
"""Bytes of a GPU that the CUDA context, the libraries' workspaces and the allocator's rounding take (a bound)."""
RAM_SHARE = 0.8
"""Of this machine's RAM, what weights may fill where max_memory is left out."""
PROCESS = 600 * 2**20
"""Bytes of a process that has imported torch, transformers and bitsandbytes, and holds no model."""
UNLIMITED = 2**60


@dataclass(frozen=True, slots=True)
class Placed:
    """A placement with what follows from it. Sizes in bytes."""

    placement: Placement
    architecture: Architecture
    predicted: Mapping[Device, int]
    streamed: int
    headroom: Mapping[Device, int]
    """What generating takes on each GPU besides."""
    largest_streamed: int


def compute(params: DispatchParams, model: ModelDescription, machine: Machine, sources: Sources) -> Placed:
    """The placement of a model on a machine. Raises UsageError and DoesNotFit, as `place` does."""
    trusted = model.path is not None and sources.trust_remote_code
    architecture = describe_architecture(
        model.path if model.path is not None and trusted else dict(model.config or {}),
        custom=model.custom,
        sources=sources,
    )
    dtype = params.dtype or stored_dtype(model)
    headroom = _headroom(params, architecture, dtype, machine)
    placement = place_architecture(
        architecture,
        device_map=params.device_map,
        max_memory=_caps(params, machine),
        no_split_module_classes=params.no_split_module_classes,
        dtype=dtype,
        special_dtypes=params.special_dtypes,
        tensor_bytes=stored_bytes(model, architecture, plain=params.dtype is None, skip=params.special_dtypes),
        headroom=headroom if params.max_memory is None else {},
        speeds=_speeds(machine, sources.memo) if params.device_map == "optimal" else None,
    )
    return Placed(
        placement=replace(placement, dtype=params.dtype),
        architecture=architecture,
        predicted=_predicted(placement, architecture, dtype),
        streamed=_streamed(params, placement, architecture, model, dtype),
        headroom=_room(params, placement, architecture, dtype),
        largest_streamed=max(placement.streaming.values(), default=0),
    )


def _speeds(machine: Machine, memo: Path | None) -> Speeds | None:
    """Of this machine as measured once; of another one that a plan is made for, nothing is known."""
    if memo is None or machine.name != os.uname().nodename:
        return None
    return measured_speeds(memo, gpus=[gpu.name for gpu in machine.gpus])


def _caps(params: DispatchParams, machine: Machine) -> dict[int | str, int | str] | None:
    """Total memory, not what happens to be free: the placement must not depend on the moment."""
    if params.max_memory is not None:
        return dict(params.max_memory)
    if not isinstance(params.device_map, str):
        return None
    gpus: dict[int | str, int | str] = {gpu.index: gpu.memory for gpu in machine.gpus}
    return {**gpus, "cpu": int(machine.memory * RAM_SHARE), "disk": UNLIMITED}


def _needs(params: DispatchParams, architecture: Architecture, dtype: str) -> tuple[int, int]:
    """What generating needs besides weights: (bytes of the cache, of activations)."""
    width = compute_bytes(dtype)
    length = min(params.sequence_length, _positions(architecture) or params.sequence_length)
    cache = cache_of(architecture, params.batch_size, length, width).bytes
    return cache, prefill(shape_of(architecture), params.batch_size, length, width).bytes


def _headroom(params: DispatchParams, architecture: Architecture, dtype: str, machine: Machine) -> dict[Device, int]:
    """What placing leaves free: the cache spread over the GPUs, activations and runtime on each."""
    cache, active = _needs(params, architecture, dtype)
    gpus = [gpu.index for gpu in machine.gpus]
    if not gpus:
        return {"cpu": cache + active}
    return {gpu: cache // len(gpus) + active + GPU_RUNTIME for gpu in gpus}


def _room(params: DispatchParams, placement: Placement, architecture: Architecture, dtype: str) -> dict[Device, int]:
    """What generating takes besides weights on each GPU that computes: keys and values lie where their layers run."""
    cache, active = _needs(params, architecture, dtype)
    main = _main(placement)
    runs = [_runs(placement, module.name, main) for module in architecture.modules if _is_block(architecture, module)]
    runs = runs or [main]
    room: dict[Device, int] = {}
    for device in {home for home in placement.device_map.values() if isinstance(home, int)}:
        room[device] = cache * runs.count(device) // len(runs) + active + GPU_RUNTIME
    return room


def _is_block(architecture: Architecture, module: ModuleSpec) -> bool:
    return module.class_name in architecture.no_split


def _runs(placement: Placement, name: str, main: Device) -> Device:
    """Where a block computes; one that is split between devices counts for the first GPU."""
    try:
        home = placement.device_of(name)
    except KeyError:
        return main
    return home if isinstance(home, int) else main


def _positions(architecture: Architecture) -> int | None:
    found = architecture.config.get("max_position_embeddings") or architecture.config.get("n_positions")
    return found if isinstance(found, int) else None


def _main(placement: Placement) -> Device:
    """Where what lies in RAM or on disk computes."""
    return min((device for device in placement.device_map.values() if isinstance(device, int)), default="cpu")


def _predicted(placement: Placement, architecture: Architecture, dtype: str) -> dict[Device, int]:
    """Buffers that no checkpoint holds cannot lie on disk: they stay where they are used."""
    predicted, main = dict(placement.weights), _main(placement)
    for tensor in architecture.tensors():
        home = placement.device_of(tensor.name)
        if tensor.buffer and not tensor.persistent and home in ("cpu", "disk") and home != main:
            size = tensor_nbytes(architecture.dtype_of(tensor, dtype), tensor.shape)
            predicted[home] = predicted.get(home, 0) - size
            predicted[main] = predicted.get(main, 0) + size
    return {device: size for device, size in predicted.items() if size}


def _streamed(
    params: DispatchParams, placement: Placement, architecture: Architecture, model: ModelDescription, dtype: str
) -> int:
    """Stored bytes: of tied weights at each use, of an embedding one row unless it is part of a block."""
    main, stored = _main(placement), stored_bytes(model, architecture)
    classes = params.no_split_module_classes
    whole = INDIVISIBLE | frozenset(architecture.no_split if classes is None else classes)
    blocks = tuple(f"{module.name}." for module in architecture.modules if module.class_name in whole)
    total = 0
    for module in architecture.modules:
        table = module.class_name == "Embedding" and not module.name.startswith(blocks)
        for tensor in module.tensors:
            home = placement.device_of(tensor.name)
            if not tensor.persistent or home == main or isinstance(home, int):
                continue
            known = stored.get(architecture.aliases.get(tensor.name, tensor.name))
            size = known or tensor_nbytes(architecture.dtype_of(tensor, dtype), tensor.shape)
            total += size // tensor.shape[0] if table else size
    return total


def forecast(params: DispatchParams, ctx: ForecastContext) -> Forecast:
    if ctx.artifact is not None:
        return _forecast_of(ctx.artifact)
    wired = ctx.input("model")
    model = wired.output if wired is not None else None
    if not isinstance(model, ModelDescription) or (model.config is None and model.custom is None):
        missing = _missing(params, ctx, _mapped(params))
        return Forecast(
            download_bytes=0,
            unknown=("the placement: the model's headers are not known yet",),
            misfits=(_missing_gpus(params, ctx, None, missing),) if missing else (),
        )
    unknown = () if model.tensors is not None else ("the model's stored sizes: taken from its config",)
    try:
        placed = compute(params, model, ctx.machine, sources_of(ctx))
    except DoesNotFit as error:
        return Forecast(download_bytes=0, misfits=(Misfit(error.cause, error.cure),), unknown=unknown)
    except UsageError as error:
        if not (ctx.trust.remote_code and (model.config or {}).get("auto_map")):
            raise
        return Forecast(download_bytes=0, unknown=(f"the placement, until the trusted code is here: {error.cause}",))
    predicted = {str(device): size for device, size in placed.predicted.items()}
    return Forecast(
        download_bytes=0,
        write_bytes=4096 + 64 * len(placed.placement.device_map),
        ram=PROCESS + 2 * placed.largest_streamed if params.verify != "none" else None,
        vram=_vram(placed),
        metrics={"predicted": predicted, "streamed_bytes_per_token": placed.streamed},
        output=placed.placement,
        unknown=unknown,
        misfits=tuple(_misfits(params, ctx, model, placed)),
        details=(*placed.placement.picture().splitlines(), *placed.placement.explanation),
        summary=", ".join(f"{_label(device)} {format_size(size)}" for device, size in placed.predicted.items()),
    )


def _vram(placed: Placed) -> dict[int, int]:
    return {gpu: size + placed.headroom.get(gpu, 0) for gpu, size in placed.predicted.items() if isinstance(gpu, int)}


def _forecast_of(artifact: Path) -> Forecast:
    placement = PlacedModel.read(artifact).placement
    return Forecast(download_bytes=0, write_bytes=0, output=placement, details=tuple(placement.picture().splitlines()))


def _label(device: Device) -> str:
    return f"cuda:{device}" if isinstance(device, int) else device


def _misfits(params: DispatchParams, ctx: ForecastContext, model: ModelDescription, placed: Placed) -> Iterator[Misfit]:
    """Devices that are not there, and RAM that is not."""
    if missing := _missing(params, ctx, set(placed.placement.device_map.values())):
        yield _missing_gpus(params, ctx, model, missing)
        return
    if full := _full(placed, ctx.machine):
        yield _too_full(params, ctx, model, placed, full)
    ram = placed.predicted.get("cpu", 0)
    if ram > ctx.machine.memory:
        fits = format_size(ctx.machine.memory * RAM_SHARE).replace(" ", "")
        yield Misfit(
            f"places {format_size(ram)} of weights in RAM; {ctx.machine.name} has {format_size(ctx.machine.memory)}",
            f"lower max_memory.cpu to {fits}, and let disk take the rest",
            {"max_memory": {**{str(key): size for key, size in (params.max_memory or {}).items()}, "cpu": fits}},
        )


def _full(placed: Placed, machine: Machine) -> list[Gpu]:
    wanted = _vram(placed)
    return [gpu for gpu in machine.gpus if wanted.get(gpu.index, 0) > gpu.memory]


def _too_full(
    params: DispatchParams, ctx: ForecastContext, model: ModelDescription, placed: Placed, full: list[Gpu]
) -> Misfit:
    """With the smallest change that fits: a smaller batch, else less of the weights; each is tried."""
    first = full[0]
    wanted, room = _vram(placed)[first.index], placed.headroom.get(first.index, 0)
    cause = (
        f"needs {format_size(wanted)} on GPU {first.index} ({first.name}), which has {format_size(first.memory)}: "
        f"{format_size(wanted - room)} of weights, the rest for generating with batch_size {params.batch_size}"
    )

    def fits(change: Mapping[str, Any]) -> bool:
        changed = params.model_copy(update=dict(change))
        try:
            tried = compute(changed, model, ctx.machine, sources_of(ctx))
        except (DoesNotFit, UsageError):
            return False
        return not _full(tried, ctx.machine)

    low, high = 0, params.batch_size
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits({"batch_size": middle}) else (low, middle)
    if low:
        return Misfit(cause, f"set batch_size to {low}", {"batch_size": low})
    caps: dict[int | str, Any] = {str(key): exact_size(size) for key, size in (params.max_memory or {}).items()}
    for gpu in full:
        caps[str(gpu.index)] = _mebibytes(gpu.memory - placed.headroom.get(gpu.index, 0))
    if isinstance(params.device_map, str) and caps and fits({"max_memory": caps}):
        lowered = ", ".join(f"max_memory.{gpu.index} to {caps[str(gpu.index)]}" for gpu in full)
        return Misfit(cause, f"lower {lowered}, and let other devices take the rest", {"max_memory": caps})
    return Misfit(cause, "quantize first, give more devices, or plan for another --machine")


def _mebibytes(size: int) -> str:
    return f"{max(0, size) // 2**20}MiB"


def _mapped(params: DispatchParams) -> set[int]:
    """The GPUs a custom map names."""
    named = params.device_map.values() if isinstance(params.device_map, dict) else ()
    return {int(device) for device in named if str(device).isdigit()}


def _missing(params: DispatchParams, ctx: ForecastContext, used: Collection[Device]) -> list[int]:
    """The GPUs that are used or given memory, and are not there."""
    named = {device for key, size in (params.max_memory or {}).items() if size for device in devices_of(key)}
    wanted = {device for device in (*used, *named) if isinstance(device, int)}
    return sorted(wanted - {gpu.index for gpu in ctx.machine.gpus})


def _missing_gpus(
    params: DispatchParams, ctx: ForecastContext, model: ModelDescription | None, missing: list[int]
) -> Misfit:
    """model None: not known yet, so that nobody can say whether the other devices hold it."""
    count = len(ctx.machine.gpus)
    has = f"{count} GPU{'s' * (count > 1)}" if count else "no GPU"
    numbers = ", ".join(map(str, missing))
    if isinstance(params.device_map, dict):
        named = [name or '""' for name, device in params.device_map.items() if str(device) in map(str, missing)]
        return Misfit(
            f"device_map names GPU {numbers}; {ctx.machine.name} has {has}",
            f"map {', '.join(named)} to {'a GPU below ' + str(count) + ', ' if count else ''}cpu or disk",
        )
    cause = f"max_memory names GPU {numbers}; {ctx.machine.name} has {has}"
    caps = {key: size for key, size in (params.max_memory or {}).items() if not set(devices_of(key)) & set(missing)}
    zero = ", ".join(f"{key}: 0" for key in params.max_memory or {} if set(devices_of(key)) & set(missing))
    change = {"max_memory": {str(key): exact_size(size) for key, size in caps.items()}}
    written = zero.replace(": ", " to ")
    if model is None:
        return Misfit(cause, f"set max_memory.{written}; the rest is known once the model's headers are", change)
    try:
        without = params.model_copy(update={"max_memory": caps})
        compute(without, model, ctx.machine, sources_of(ctx))
    except DoesNotFit as error:
        return Misfit(cause, f"set max_memory to {{{zero}}} for these, and {error.cure}")
    rest = " and ".join(_label(device) for key in caps for device in devices_of(key))
    return Misfit(cause, f"set max_memory.{written}; the model fits {rest}", change)


def run(params: DispatchParams, ctx: StageContext) -> StageResult:
    model = describe_checkpoint(ctx.input("model"))
    placed = compute(params, model, ctx.machine, sources_of(ctx))
    kept = PlacedModel(placed.placement, dict(params.special_dtypes), params.no_split_module_classes)
    predicted = {str(device): size for device, size in placed.predicted.items()}
    metrics = DispatchMetrics(predicted=predicted, streamed_bytes_per_token=placed.streamed)
    if params.verify != "none":
        metrics = _verify(params, ctx, kept, metrics)
    told = metrics.model_dump(exclude={"load_seconds"})
    picture = [kept.placement.picture(), "", *kept.placement.explanation, ""]
    files = {
        PLACEMENT: write_file(ctx.out / PLACEMENT, json.dumps({**kept.as_json(), **told}, indent=2) + "\n"),
        PICTURE: write_file(ctx.out / PICTURE, "\n".join(picture)),
    }
    return StageResult(metrics, files)


def _verify(params: DispatchParams, ctx: StageContext, kept: PlacedModel, metrics: DispatchMetrics) -> DispatchMetrics:
    """Loads the model as placed and, if asked to, runs it; tells where it is not as predicted."""
    import accelerate  # noqa: F401  what importing costs is not loading
    from transformers import PreTrainedModel  # noqa: F401

    from bigpipe.bigmodel.execution.loading import loaded
    from bigpipe.bigmodel.execution.probe import forward_once

    started = time.monotonic()
    # Held as stored: what computes in another dtype is cast at each use
    model = kept.load(ctx, memory=None if params.dtype else 0)
    seconds = time.monotonic() - started
    state = loaded(model)
    measured = {str(home): size for home, size in state.held.items()}
    if params.verify == "forward" and (reason := forward_once(model)):
        ctx.log(f"no forward was run: {reason}")
    _compare(metrics.predicted, measured, ctx)
    found = {"measured": measured, "load_seconds": round(seconds, 3), "streamed_bytes_per_token": state.streamed}
    return metrics.model_copy(update=found)


def _compare(predicted: Mapping[str, int], measured: Mapping[str, int], ctx: StageContext) -> None:
    for device in dict.fromkeys([*predicted, *measured]):
        told, found = predicted.get(device, 0), measured.get(device, 0)
        if abs(told - found) > 0.01 * max(told, found):
            ctx.log(f"{device}: {format_size(found)} of weights, {format_size(told)} were predicted")


def check(params: DispatchParams, ctx: Any) -> None:
    """Device names and sizes that no machine could take."""
    for key in params.max_memory or {}:
        devices_of(key)
    if isinstance(params.device_map, dict) and not params.device_map:
        raise UsageError("device_map is empty", 'write {"": cpu}, or a mode such as auto')
