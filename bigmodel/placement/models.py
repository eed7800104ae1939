"""A placement for a model where it lies: a directory, or a repository on the Hub of which only headers are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.architecture import Architecture
from bigpipe.bigmodel.checkpoint import ModelDescription, dtype_name
from bigpipe.bigmodel.footprint import architecture_of, cut_length, look
from bigpipe.bigmodel.formats import PLAIN, Agreement, agree, decoded, format_of, uncomputable
from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import DoesNotFit
from bigpipe.fit import Misfit
from bigpipe.machine import MACHINE, Machine, detect
from bigpipe.names import Given, checked
from bigpipe.sizes import format_size
from bigpipe.trust import Trust

from .computing import cast_ring, choose_dtype
from .fitting import Trial
from .headroom import headroom_of
from .placement import Placement, PlacementRequest, as_map
from .products import products_of
from .speeds import Speeds, speeds_of
from .stored import stored_bytes, stored_dtype
from .strategies import place_architecture
from .streaming import Streamed, room_for_experts, streamed

if TYPE_CHECKING:
    import torch


@checked(machine=MACHINE, speeds=Given((Speeds,), "Speeds"))
def place(
    model: str | Path | torch.nn.Module,
    *,
    architecture: Mapping[str, Any] | None = None,
    device_map: str | int | torch.device | Mapping[str, int | str | torch.device] = "auto",
    max_memory: Mapping[int | str, int | str] | None = None,
    no_split_module_classes: str | Sequence[str] | None = None,
    dtype: str | torch.dtype | None = None,
    compute_dtype: str | torch.dtype = "auto",
    special_dtypes: Mapping[str, str | torch.dtype] | None = None,
    batch_size: int = 1,
    sequence_length: int = 2048,
    machine: Machine | None = None,
    speeds: Speeds | None = None,
    revision: str = "main",
    subfolder: str | None = None,
    variant: str | None = None,
    trust: Trust | Sequence[str] = (),
    trust_remote_code: bool = False,
    base: Path | None = None,
    memo: Path | None = None,
    offline: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Placement:
    """Return where each part of a model goes, at the size it is stored or loaded in. `load` takes the answer.

    model: a checkpoint directory, a `config.json`, a repository (`owner/name`) or its address; or a torch module, whose
      parameters may be empty.
    architecture: a custom class, as in a manifest: {"class": "module:Class", "config": {…}}.
    device_map, max_memory, no_split_module_classes, dtype, compute_dtype, special_dtypes, batch_size, sequence_length:
      those of `PlacementRequest`. Quantized weights count at their quantized size.
    subfolder, variant: which model of a repository or directory, as in `from_pretrained`.
    machine: whose devices they are; None: this one's. speeds: what `optimal` weighs by; None: as measured on this
      machine and kept in `memo`, or ordinary ones.
    trust: modules that a custom class may come from, looked for in `base` first; trust_remote_code: may the
      checkpoint's own Python files run? memo: where answers about architectures are kept.

    No weight moves, and torch is not imported here. Raises UsageError for a wrong map or device, DoesNotFit with the
    smallest change that fits, InvalidCheckpoint, Offline, NotAuthorised, GatedRepository, Transient.
    """
    request = PlacementRequest(
        device_map=as_map(device_map), max_memory=max_memory, no_split_module_classes=no_split_module_classes,
        dtype=None if dtype is None else dtype_name(dtype),
        compute_dtype=dtype_name(compute_dtype),
        special_dtypes={name: dtype_name(wanted) for name, wanted in (special_dtypes or {}).items()},
        batch_size=batch_size, sequence_length=sequence_length,
    )  # fmt: skip
    sources = Sources(
        trust=Trust.of(trust), trust_remote_code=trust_remote_code, base=base, memo=memo, offline=offline,
        environment=environment,
    )  # fmt: skip
    sighting = look(model, revision, sources, own=architecture, variant=variant, subfolder=subfolder)
    built, _ = architecture_of(sighting, "auto", sources)
    agreement = Agreement(built) if sighting.architecture else agree(sighting.description, built, memo)
    placed = place_model(
        sighting.description, agreement.architecture, request, machine or detect(Path.cwd()), memo=memo, speeds=speeds
    )
    return replace(placed, explanation=(*placed.explanation, *agreement.notes))


def place_model(
    model: ModelDescription,
    architecture: Architecture,
    request: PlacementRequest,
    machine: Machine,
    *,
    memo: Path | None = None,
    speeds: Speeds | None = None,
    beside: Mapping[str, int] = MappingProxyType({}),
) -> Placement:
    """Return the placement of a model that has been looked at. Raises UsageError and DoesNotFit, as `place` does.
    beside: tensor → bytes that an adapter holds where it is used."""
    refused, model = uncomputable(model), decoded(model)
    if request.device_map == "optimal" and speeds is None and memo is not None:
        speeds = speeds_of(machine, memo)
    stored = stored_bytes(model, architecture, memo)

    def placed(request: PlacementRequest, computed: str | None = None) -> Placement:
        dtype = request.dtype or stored_dtype(model)
        taken = headroom_of(
            architecture, computed or dtype, request.batch_size, request.sequence_length, format_of(model)
        ).with_beside(beside)
        found = place_architecture(
            architecture,
            replace(request, dtype=dtype),
            tensor_bytes=stored.of(plain=request.dtype is None, skip=request.special_dtypes),
            headroom=replace(taken, casting=cast_ring(architecture, request, computed)) if computed else taken,
            machine=machine,
            speeds=speeds,
        )
        return replace(found, compute_dtype=computed)

    def attempt(request: PlacementRequest) -> Placement:
        dtype, placement = request.dtype or stored_dtype(model), placed(request)
        chosen = choose_dtype(
            request, placement, dtype, format_of(model) is PLAIN, lambda: products_of(machine, memo) if memo else None
        )
        if chosen.dtype != dtype:
            placement = placed(request, chosen.dtype)
        notes = [
            refused and refused.cause,
            chosen.why and f"Computed in {chosen.dtype}: {chosen.why}",
            cut_length(architecture, request.sequence_length),
        ]
        explanation = (*placement.explanation, *(f"{note}." for note in notes if note))
        moved = streamed(architecture, placement, stored_dtype(model), stored.of())
        told = _with_streaming(replace(placement, explanation=explanation), architecture, moved, chosen.dtype)
        return replace(told, dtype=request.dtype, measured=(*placement.measured, *chosen.measured))

    try:
        return attempt(request)
    except DoesNotFit as error:
        raise Trial(machine, attempt).cured(request, Misfit.of(error)).error() from None


def _with_streaming(placement: Placement, architecture: Architecture, moved: Streamed, dtype: str) -> Placement:
    """Tells what a token moves, and which experts stay. dtype: what is computed in."""
    kept, total = room_for_experts(architecture, placement, dtype)
    return replace(
        placement,
        streamed_bytes_per_token=moved.by(1, kept / max(total, 1)),
        kept_experts=kept,
        explanation=(*placement.explanation, *_told_of_experts(moved, kept)),
    )


def _told_of_experts(moved: Streamed, kept: int) -> Iterator[str]:
    for count in moved.experts:
        yield (
            f"Of {count} experts a token moves {moved.chosen}."
            if moved.chosen
            else f"All {count} experts of a layer are moved: the config does not say how many a token chooses."
        )
    if kept:
        yield f"{format_size(kept)} of the experts used most often stay in memory."
