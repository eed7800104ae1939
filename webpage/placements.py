"""Where the parts of a model would go on a machine, in a dtype or format that it need not be stored in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from bigpipe.bigmodel.architecture import Architecture
from bigpipe.bigmodel.checkpoint import ModelDescription
from bigpipe.bigmodel.footprint import Budget, architecture_of, look
from bigpipe.bigmodel.formats import PLAIN, format_of
from bigpipe.bigmodel.placement import Device, Placement, PlacementRequest, place_model
from bigpipe.bigmodel.quantization import Settings, understand
from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import BigpipeError, UsageError
from bigpipe.fit import Need, lacking
from bigpipe.machine import Machine

from .questions import Question

QUANTIZED = ("int8", "nf4", "fp4")


def drawn_placement(
    asked: Question, model: str, budget: Budget, machine: Machine, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return per device what it holds, of how much, and `stored`, the format of a checkpoint that is packed already and
    placed as it is; or why there is no placement, and the cure. budget: of the dtype that it is run in."""
    work = budget.workload
    sources = Sources(memo=options["memo"], offline=options["offline"])
    choice = {name: options.get(name) for name in ("variant", "subfolder")}
    try:
        _require_computed(budget)
        seen = look(model, options.get("revision", "main"), sources, options.get("library_name"), **choice)
        architecture, _ = architecture_of(seen, "auto", sources)
        described, dtype = _described(seen.description, architecture, asked, sources)
        request = PlacementRequest(dtype=dtype, batch_size=work.batch_size, sequence_length=work.sequence_length)
        placed = place_model(described, architecture, request, machine, memo=options["memo"])
    except BigpipeError as error:
        return {"devices": [], "explanation": [], "error": {"cause": error.cause, "cure": error.cure}, "stored": None}
    stored = format_of(seen.description)
    return {
        "devices": _devices(placed, machine), "explanation": list(placed.told), "error": None,
        "stored": None if stored is PLAIN else stored.title,
    }  # fmt: skip


def _require_computed(budget: Budget) -> None:
    """Raise UsageError for keys and values in another dtype than the model computes in: a placement keeps no others."""
    computed = replace(budget, workload=replace(budget.workload, kv_dtype=None))
    if budget.kv_cache.bytes != computed.kv_cache.bytes:
        cause = f"a placement keeps keys and values as they are computed, and {budget.workload.kv_dtype} was asked for"
        raise UsageError(cause, "leave `Keys and values in` as computed to see one")


def _described(
    model: ModelDescription, architecture: Architecture, asked: Question, sources: Sources
) -> tuple[ModelDescription, str | None]:
    """The model as it is once it is in the wanted format, and the dtype it is then loaded as; None: as stored."""
    if format_of(model) is not PLAIN:
        return model, None
    if asked.run_in not in QUANTIZED:
        return model, asked.run_in
    if model.tensors is None:
        own = {tensor.name: (tensor.dtype, tensor.shape) for tensor in architecture.tensors() if tensor.persistent}
        model = replace(model, tensors=own)
    double = bool(asked.options.get("double_quant")) and asked.run_in != "int8"
    settings = Settings(scheme=asked.run_in, bnb_4bit_use_double_quant=double)
    return understand(model, settings, architecture=architecture, sources=sources)[1], None


def _devices(placed: Placement, machine: Machine) -> list[dict[str, Any]]:
    """What each device holds, of how much: of what a machine has, as placements count, not of what is free just now."""
    rooms: dict[Device, tuple[str, int]] = {
        gpu.index: (f"GPU {gpu.index}: {gpu.name}", gpu.memory) for gpu in machine.gpus
    }
    rooms |= {"cpu": ("CPU memory", machine.memory), "disk": ("disk", machine.disk_free)}
    return [_device(device, label, room, placed) for device, (label, room) in rooms.items()]


def _device(device: Device, label: str, room: int, placed: Placement) -> dict[str, Any]:
    held = asdict(placed.needs.get(device) or Need(weights=placed.weights.get(device, 0)))
    parts = sum(where == device for where in placed.device_map.values())
    total = sum(held.values())
    return {
        "device": str(device), "label": label, "room": room, "parts": parts, **held, "total": total,
        "lacks": lacking({device: total}, {device: room}).get(device, 0),
    }  # fmt: skip
