"""A placement for a model where it lies: a directory, or a repository on the Hub of which only headers are read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bigpipe.bigmodel.architecture.structure import Architecture
from bigpipe.bigmodel.checkpoint.description import ModelDescription
from bigpipe.bigmodel.checkpoint.naming import set_quantized_apart
from bigpipe.bigmodel.checkpoint.tensors import tensor_nbytes
from bigpipe.bigmodel.footprint.sighting import Sources, architecture_of, look
from bigpipe.bigmodel.hub.repository import Hub

from .budget import Device
from .result import Placement
from .speeds import Speeds
from .strategies import FLOATS, place_architecture


def place(
    model: str | Path,
    *,
    device_map: str | Mapping[str, Device] = "auto",
    max_memory: Mapping[int | str, int | str] | None = None,
    no_split_module_classes: Sequence[str] | None = None,
    dtype: str | None = None,
    special_dtypes: Mapping[str, str] | None = None,
    speeds: Speeds | None = None,
    revision: str = "main",
    trust_modules: Sequence[str] = (),
    trust_remote_code: bool = False,
    base: Path | None = None,
    memo: Path | None = None,
    offline: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Placement:
    """Where each part of a model would go, at the size it is stored or loaded in. `load` takes the answer.

    model: a checkpoint directory, a `config.json`, a repository (`owner/name`) or its address.
    device_map, max_memory, no_split_module_classes, special_dtypes, speeds: see `strategies.place_architecture`.
    dtype: what floats are loaded as; None: as stored. Quantized weights count at their quantized size.
    trust_modules: modules that a custom class may come from, looked for in `base` first; trust_remote_code: may the
      checkpoint's own Python files run? memo: where answers about architectures are kept.

    No weight moves, and torch is not imported here. Raises UsageError for a wrong map or device, DoesNotFit with the
    smallest change that fits, InvalidCheckpoint, Offline, NotAuthorised, GatedRepository, Transient.
    """
    sources = Sources(
        memo=memo, hub=Hub.from_environment(environment, offline=offline), modules=trust_modules, base=base,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    sighting = look(model, revision, sources)
    architecture, _ = architecture_of(sighting, "auto", sources)
    stored = stored_bytes(sighting.description, architecture, plain=dtype is None, skip=special_dtypes or ())
    placement = place_architecture(
        architecture, device_map=device_map, max_memory=max_memory, no_split_module_classes=no_split_module_classes,
        dtype=dtype or stored_dtype(sighting.description), special_dtypes=special_dtypes, tensor_bytes=stored,
        speeds=speeds,
    )  # fmt: skip
    return replace(placement, dtype=dtype)


def stored_dtype(model: ModelDescription) -> str:
    """The dtype of the floating weights: the config's, where tensors have it, or the one that most bytes have."""
    sizes: dict[str, int] = {}
    for dtype, shape in (model.tensors or {}).values():
        if dtype in FLOATS:
            sizes[dtype] = sizes.get(dtype, 0) + tensor_nbytes(dtype, shape)
    config = model.config or {}
    named = str(config.get("dtype") or config.get("torch_dtype"))
    return named if named in (sizes or FLOATS) else max(sizes, key=lambda dtype: sizes[dtype], default="float32")


def stored_bytes(
    model: ModelDescription, architecture: Architecture, *, plain: bool = True, skip: Collection[str] = ()
) -> dict[str, int]:
    """Bytes on disk by the model's own tensor names. A quantized weight counts with its scales and tables.

    plain: of weights that are not quantized too. skip: names to leave out.
    """
    tensors = model.tensors or {}
    sizes = {name: tensor_nbytes(dtype, shape) for name, (dtype, shape) in tensors.items()}
    single, quantized = set_quantized_apart(sizes)
    stored = {**(single if plain else {}), **{f"{m}.weight": sum(parts.values()) for m, parts in quantized.items()}}
    known = {tensor.name for module in architecture.modules for tensor in module.tensors}
    named = ((_own_name(name, known, architecture), size) for name, size in stored.items())
    return {name: size for name, size in named if name is not None and name not in skip}


def _own_name(stored: str, known: set[str], architecture: Architecture) -> str | None:
    """The model's name of a stored tensor: the same, or with the base model's prefix added or taken off."""
    bodies = [child.rpartition(".")[2] for child in architecture.modules[0].children]
    names = [stored, *(f"{body}.{stored}" for body in bodies), stored.partition(".")[2]]
    return next((name for name in names if name in known), None)
