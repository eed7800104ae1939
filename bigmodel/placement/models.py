"""A placement for a model where it lies: a directory, or a repository on the Hub of which only headers are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.architecture import (
    BUFFERS,
    Architecture,
    TensorSpec,
)
from bigpipe.bigmodel.checkpoint import CASTABLE, ModelDescription, dtype_name, tensor_nbytes
from bigpipe.bigmodel.footprint import architecture_of, cut_length, look
from bigpipe.bigmodel.formats import PLAIN, Agreement, agree, decoded, format_of, match_stored, set_apart, uncomputable
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
from .placement import FLOATS, Placement, PlacementRequest, as_map
from .products import products_of
from .speeds import Speeds, speeds_of
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


def stored_dtype(model: ModelDescription) -> str:
    """Return the dtype of the floating weights: the config's, where tensors have it, or the one of most bytes."""
    sizes: dict[str, int] = {}
    plain, _ = set_apart(model.tensors or {}, format_of(model))
    for dtype, shape in plain.values():
        if dtype in FLOATS:
            sizes[dtype] = sizes.get(dtype, 0) + tensor_nbytes(dtype, shape)
    config = model.config or {}
    named = str(config.get("dtype") or config.get("torch_dtype"))
    return named if named in (sizes or FLOATS) else max(sizes, key=lambda dtype: sizes[dtype], default="float32")


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """Bytes on disk by the model's own tensor names."""

    plain: Mapping[str, int]
    packed: Mapping[str, int]
    """Of quantized weights, each with its scales and tables."""

    def of(self, *, plain: bool = True, skip: Collection[str] = ()) -> dict[str, int]:
        """Return those of all tensors. plain: of weights that are not quantized too; skip: names to leave out."""
        sizes = {**(self.plain if plain else {}), **self.packed}
        return {name: size for name, size in sizes.items() if name not in skip}


def stored_bytes(model: ModelDescription, architecture: Architecture, memo: Path | None = None) -> StoredBytes:
    """Return the bytes of each tensor as it is stored. The class is asked what stored names mean only where weights are
    packed: of others the size is known without. memo: of its answers."""
    tensors = model.tensors or {}
    sizes = {name: tensor_nbytes(dtype, shape) for name, (dtype, shape) in tensors.items()}
    stored_in = format_of(model)
    single, quantized = set_apart(sizes, stored_in)
    known = {tensor.name: tensor for module in architecture.modules for tensor in module.tensors}
    makes: dict[str, list[TensorSpec]] = {}
    for own, sources in match_stored(model, architecture, memo, ask=bool(quantized)).made.items():
        for source in sources:
            makes.setdefault(source, []).extend([known[own]] if own in known else [])

    def named(sizes: Mapping[str, int]) -> dict[str, int]:
        found: Counter[str] = Counter()
        for name, size in sizes.items():
            own = _own_name(name, known, architecture)
            found.update(_shares(size, makes.get(name) or ([known[own]] if own else [])))
        return dict(found)

    packed = {f"{module}.weight": sum(weight.parts.values()) for module, weight in quantized.items()}
    elsewhere: dict[str, int] = {}
    if not stored_in.computes:
        typed = {name: (tensors[name][0], size) for name, size in single.items()}
        elsewhere = _packed_bytes(typed, architecture, known)
    return StoredBytes(named(single), {**named(packed), **elsewhere})


def _shares(size: int, tensors: Sequence[TensorSpec]) -> dict[str, int]:
    """Each tensor's part of bytes that lie together, by their elements."""
    shares: dict[str, int] = {}
    left, elements = size, sum(tensor.elements for tensor in tensors)
    for tensor in tensors:
        shares[tensor.name] = left * tensor.elements // max(elements, 1)
        left, elements = left - shares[tensor.name], elements - tensor.elements
    return shares


def _packed_bytes(
    stored: Mapping[str, tuple[str, int]], architecture: Architecture, known: Mapping[str, TensorSpec]
) -> dict[str, int]:
    """Parameter → its share of what lies in its module packed: codes, scales, zero points, orders.

    Tools name these differently (GPTQ and AWQ `qweight qzeros scales g_idx`, fp8 `weight_scale_inv`, MXFP4 `…_blocks
    …_scales`, one by one for experts that the class holds together), but they lie where the weight lies. Parameters of
    one module share its bytes by their elements. stored: name → (dtype, bytes).
    """
    plain: set[str] = set()
    bytes_of: dict[str, int] = {}
    for name, (dtype, size) in stored.items():
        own = _own_name(name, known, architecture)
        if own is not None and (dtype in CASTABLE or known[own].buffer):
            plain.add(own)
        elif not BUFFERS.search(name):
            module = _module_of(name, architecture)
            bytes_of[module] = bytes_of.get(module, 0) + size
    found: dict[str, int] = {}
    for module, size in bytes_of.items():
        packed = [t for t in architecture.by_name[module].tensors if not t.buffer and t.name not in plain]
        found.update(_shares(size, packed))
    return found


def _module_of(stored: str, architecture: Architecture) -> str:
    """The innermost module of the model that a stored name lies in; "" is the root."""
    inner = ""
    for name in architecture.spellings(stored):
        part = name.rpartition(".")[0]
        while part and part not in architecture.by_name:
            part = part.rpartition(".")[0]
        inner = max(inner, part, key=len)
    return inner


def _own_name(stored: str, known: Collection[str], architecture: Architecture) -> str | None:
    """The model's name of a stored tensor."""
    return next((name for name in architecture.spellings(stored) if name in known), None)
