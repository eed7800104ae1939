"""Loads a checkpoint into its model, placed over GPUs, RAM and disk, without ever holding it twice.

    load
      open_checkpoint        names → byte ranges, validated
      build_empty            the class, empty; buffers true
      set_apart, match       which bytes make which parameter
      replace_linears        modules of their format where weights are packed
      _settle                what stays: windows into the file, or copies on its device
      stand_in               what is streamed has something in its place that tells of it
      WeightStream.add       what is streamed: hooks on its groups
      as_streamed            what such a model cannot do says so

On the CPU a weight stored in the dtype it computes in is not read at all: the file is its memory.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.architecture import (
    describe_architecture,
    describe_module,
    kept_in_float32,
    require_module,
    tied_groups,
)
from bigpipe.bigmodel.checkpoint import (
    Checkpoint,
    MappedFiles,
    Matches,
    ModelDescription,
    TensorInfo,
    TensorRecipe,
    describe_opened,
    dtype_name,
    exempt,
    match,
    open_adapter,
    open_checkpoint,
)
from bigpipe.bigmodel.formats import (
    PackedWeight,
    computable,
    cure_of_missing,
    decode,
    format_of,
    refuse_strangers,
    replace_linears,
    set_apart,
)
from bigpipe.bigmodel.placement import Device, Placement, PlacementRequest, as_map, prefixes, stored_dtype
from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import InvalidCheckpoint, UsageError, first_few
from bigpipe.machine import detect
from bigpipe.names import Given, as_names, checked, refuse_unknown
from bigpipe.trust import Trust
from bigpipe.versions import require

from .away import stand_in
from .empty import build_empty, emptied, read_generation_config
from .experts import moved_by_a_token
from .homes import DeviceMap, Homes, HostMemory, as_placement, host_memory, loading_dtype
from .offload import WeightStream, cut_into_groups, follow_devices
from .slots import Slot
from .streamed import as_streamed

if TYPE_CHECKING:
    import torch

Packed = Matches[PackedWeight[TensorInfo]]


@dataclass(slots=True)
class Loaded:
    """What `load` knows of a model: `loaded(model)`."""

    homes: Homes
    """Inputs belong on `homes.main`."""
    stream: WeightStream = field(default_factory=WeightStream)
    held: Counter[Device] = field(default_factory=Counter)
    """Bytes of weights and buffers by home. On disk: stored bytes; elsewhere: bytes in memory."""
    streamed: int = 0
    """Stored bytes that a forward over one token moves from RAM or disk to where it computes; 0 if all is there."""
    unused: tuple[str, ...] = ()
    """Stored tensors that belong to nothing in the model."""


@checked(memory=Given((HostMemory,), "a HostMemory of bigpipe.bigmodel.execution, or leave it out"))
def load(
    path: str | Path,
    placement: Placement | DeviceMap | str | int | torch.device | None = None,
    *,
    adapter: str | Path | None = None,
    model: torch.nn.Module | None = None,
    architecture: Mapping[str, Any] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    dtype: str | torch.dtype | None = None,
    special_dtypes: Mapping[str, str | torch.dtype] | None = None,
    no_split_module_classes: str | Sequence[str] | None = None,
    memory: HostMemory | None = None,
    first_gpu: int = 0,
    trust: Trust | Sequence[str] = (),
    base: Path | None = None,
    trust_remote_code: bool = False,
) -> torch.nn.Module:
    """Return the checkpoint at `path` as a model in evaluation mode, ready for forward and `generate`. As after
    `from_pretrained`, its parameters take gradients where the class says so: a forward outside
    `torch.inference_mode()` or `no_grad` keeps what a backward would need.

    placement: a `Placement` or a device map {prefix: GPU number | "cpu" | "disk"}; left out, all goes to the CPU.
      Where a GPU is named, what lives in RAM or on disk computes on the first of them. A device alone (`cuda:0`) holds
      all; a mode (`auto`) is that of `place`, within `max_memory`, and with its defaults.
    adapter: a folder of peft's files, for this model: its matrices stand beside the weights, in float32, and whatever
      it trained otherwise is put into the weights as they are read.
    model: an empty model of a class that the checkpoint does not name itself. architecture: such a class, as in a
      manifest: {"class": "module:Class", "config": {…}}.
    dtype: what floating weights are cast to; `auto` is as stored; left out, the placement's or `loading_dtype`'s
      choice. Quantized weights stay as they are.
    special_dtypes: parameter name → dtype, where another one is wanted; left out, the placement's.
    no_split_module_classes: blocks that are streamed as a whole; left out, the placement's, else the model's own.
    memory: RAM that the model may fill; left out, what `host_memory` allows of this machine's.
    first_gpu: added to the map's GPU numbers, which are a rank's own.
    trust: modules that a custom class may come from; looked for in `base` first. trust_remote_code: may the
      checkpoint's own Python files run?

    Raise InvalidCheckpoint, UsageError (untrusted or unknown class, a format that cannot be computed with, a map that
    misses modules) and DoesNotFit (a GPU that is not there).
    """
    import psutil

    require("load", "torch", "transformers", "accelerate")
    if model is not None:
        model = require_module(model)
    if first_gpu < 0:
        raise UsageError(f"first_gpu is {first_gpu}", "give the number of a GPU, 0 or more", field="first_gpu")
    computable(describe_opened(stored := open_checkpoint(path)))
    checkpoint = decode(stored)
    described = describe_opened(checkpoint)
    if architecture is not None:
        described = replace(described, custom={**(described.custom or {}), **architecture})
    sources = Sources(trust=Trust.of(trust), trust_remote_code=trust_remote_code, base=base)
    special = {name: dtype_name(wanted) for name, wanted in (special_dtypes or {}).items()}
    asked: dict[str, Any] = {
        "dtype": stored_dtype(described) if dtype == "auto" else None if dtype is None else dtype_name(dtype),
        "special_dtypes": None if special_dtypes is None else special,
        "no_split_module_classes": None if no_split_module_classes is None else as_names(no_split_module_classes),
    }
    given = {name: value for name, value in asked.items() if value is not None}
    if isinstance(placement, str) and isinstance(as_map(placement), str):
        request = PlacementRequest(device_map=placement, max_memory=max_memory, **given)
        placement = _placed(checkpoint, described, model, request, sources)
    elif max_memory is not None:
        raise UsageError("max_memory bounds what a mode may choose, and none is given", "give one, such as 'auto'")
    placement = replace(as_placement(placement), **given)
    placement = replace(placement, compute_dtype=None) if "dtype" in given else placement
    homes, there = Homes(placement, first_gpu), psutil.virtual_memory()
    memory = memory or host_memory(placement, there.total, there.available)
    wanted = _floating(loading_dtype(described, placement, memory))
    model = emptied(model, wanted) if model is not None else build_empty(checkpoint.folder, described, wanted, sources)
    _refuse_unknown(model, placement)
    if placement.no_split_module_classes is not None:
        model._no_split_modules = list(placement.no_split_module_classes)  # type: ignore[assignment]
    if adapter is None:
        _fill(model, checkpoint, described, homes, wanted, memory)
    else:
        from bigpipe.bigmodel.adapters import attach, attachment, changed_checkpoint  # most models come without one

        opened, outline = open_adapter(adapter), describe_module(model)
        found = attachment(opened.described, described, outline)
        model._bigpipe_adapter = str(adapter) if found.beside else None  # type: ignore[assignment]
        checkpoint = changed_checkpoint(checkpoint, [opened], found.within)
        _fill(model, checkpoint, described, homes, wanted, memory)
        for device, size in attach(model, found, opened, dtype_name(wanted), homes.execution).items():
            loaded(model).held["cpu" if device.type == "cpu" else device.index - homes.first_gpu] += size
    read_generation_config(model, checkpoint.folder)
    return model.eval()


def _refuse_unknown(model: torch.nn.Module, placement: Placement) -> None:
    """Raise UsageError for names of the placement, or of a map, that mean nothing the model has."""
    modules = dict(model.named_modules(remove_duplicate=False))
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False)),
    }  # fmt: skip
    parts = {part for name in (*modules, *tensors) for part in prefixes(name)}
    floats = {name for name, tensor in tensors.items() if tensor.is_floating_point()}
    classes = {type(module).__name__ for module in modules.values()}
    refuse_unknown("placement", placement.device_map, parts, "parts", "a key is a module or tensor of it, or a prefix")
    refuse_unknown("special_dtypes", placement.special_dtypes, floats, "tensors of floats", "name them in full")
    refuse_unknown(
        "no_split_module_classes", placement.no_split_module_classes or (), classes, "classes", "name those of blocks"
    )


def loaded(model: torch.nn.Module) -> Loaded:
    """Return what is known of a model that `load` made. Raise UsageError for any other."""
    found = getattr(model, "_bigpipe_loaded", None)
    if not isinstance(found, Loaded):
        raise UsageError("this model was not loaded by bigpipe", "load it with bigpipe.load")
    return found


def _placed(
    checkpoint: Checkpoint,
    described: ModelDescription,
    model: torch.nn.Module | None,
    request: PlacementRequest,
    sources: Sources,
) -> Placement:
    """As `place` does it, on this machine."""
    from bigpipe.bigmodel.placement import place_model  # with all that searches; most come with their placement

    if model is not None:
        architecture = describe_module(model)
    else:
        architecture = describe_architecture(checkpoint.folder, custom=described.custom, sources=sources)
    return place_model(described, architecture, request, detect(Path.cwd()))


def _floating(name: str) -> torch.dtype:
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UsageError(f"dtype {name!r} is not one that weights are loaded as", "use float32, float16 or bfloat16")
    return dtype


def _fill(
    model: torch.nn.Module,
    checkpoint: Checkpoint,
    described: ModelDescription,
    homes: Homes,
    dtype: torch.dtype,
    memory: HostMemory,
) -> None:
    aliases = {alias: checkpoint.tensors[kept] for alias, kept in checkpoint.tied.items()}
    matches = match(model, *set_apart({**checkpoint.tensors, **aliases}, format_of(described)))
    refuse_strangers(
        f"{checkpoint.path}: ",
        matches.unused,
        checkpoint.tensors.keys() - matches.unused,
        {name for name, _ in model.named_modules()},
        type(model).__name__,
        described.config or {},
    )
    _share_recipes(model, matches, checkpoint)
    initialised = _check_complete(model, matches, checkpoint)
    homes.check_covers(dict.fromkeys([*(name for name, _ in model.named_parameters()), *matches.plain]))
    replace_linears(model, matches.packed, described.quantization, lambda part: checkpoint.read(part.name))
    state = Loaded(homes, unused=tuple(matches.unused))
    slots = dict(_slots(model, matches, dtype, homes.placement.special_dtypes))
    streamed = _settle(slots, state, memory.cast)
    _settle_unstored(model, matches, initialised, state)
    stand_in(streamed, homes)
    groups = cut_into_groups(model, streamed, homes)
    state.stream.add(groups)
    state.stream.experts.keep(homes.placement.kept_experts if homes.main.type != "cpu" else memory.experts)
    if groups:
        as_streamed(model, homes.main, checkpoint.path)
    state.streamed = moved_by_a_token(model, groups, state.stream.experts)
    if homes.main.type != "cpu":
        follow_devices(model, homes, {group.module for group in groups if group.table is not None})
    model.hf_device_map = dict(homes.placement.device_map)  # type: ignore[assignment]
    model._bigpipe_loaded = state  # type: ignore[assignment]
    model._bigpipe_source = checkpoint.path.absolute()  # type: ignore[assignment]


def _share_recipes(model: torch.nn.Module, matches: Packed, checkpoint: Checkpoint) -> None:
    """Give every name of a tied group the recipe of the one that is stored; different bytes are not tied."""
    for names in tied_groups(model):
        stored = [name for name in names if name in matches.plain]
        if not stored:
            continue
        first = matches.plain[stored[0]]
        for name in names:
            if name not in matches.plain or _equal(matches.plain[name], first, checkpoint):
                matches.plain[name] = first


def _equal(one: TensorRecipe, other: TensorRecipe, checkpoint: Checkpoint) -> bool:
    """Do they make the same tensor? Bytes are read only where dtypes and shapes are the same."""
    if one.sources == other.sources:
        return True
    if [(s.dtype, s.shape) for s in one.sources] != [(s.dtype, s.shape) for s in other.sources]:
        return False
    stored = [(checkpoint.chunks(source.name) for source in recipe.sources) for recipe in (one, other)]
    return all(a == b for pair in zip(*stored, strict=True) for a, b in zip(*pair, strict=True))


def _check_complete(model: torch.nn.Module, matches: Packed, checkpoint: Checkpoint) -> Sequence[str]:
    """Raise InvalidCheckpoint for parameters that nothing is stored for, UsageError for such buffers that have no
    values of their own either. Return the parameters that are left out on purpose, which are initialised."""
    if lost := [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in matches.plain]:
        raise UsageError(
            f"buffers without values, of which {checkpoint.path} holds none: {first_few(lost)}",
            "build the model with accelerate's init_empty_weights(include_buffers=False), or on the CPU",
        )
    ignored = exempt(model, "missing")
    missing = [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if name not in matches.plain and name.removesuffix(".weight") not in matches.packed
    ]
    if bad := [name for name in missing if not ignored.search(name)]:
        raise InvalidCheckpoint(
            f"{checkpoint.path} holds no weights for {first_few(bad)} of {type(model).__name__}",
            cure_of_missing(checkpoint.tensors),
        )
    _initialise(model, missing)
    return missing


def _initialise(model: Any, names: Sequence[str]) -> None:
    """Parameters that checkpoints leave out on purpose get what their class gives them, as in `from_pretrained`."""
    import torch

    for name in names:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        for other in module._parameters.values():
            if other is not None:
                other._is_hf_initialized = other.device.type == "meta" and other is not module._parameters[attribute]
        empty = module._parameters[attribute]
        module._parameters[attribute] = torch.nn.Parameter(torch.empty_like(empty, device="cpu"))
        model._init_weights(module)


def _slots(
    model: torch.nn.Module, matches: Packed, dtype: torch.dtype, special_dtypes: Mapping[str, str]
) -> Iterator[tuple[str, Slot]]:
    """By name of the parameter or stored buffer, in the order of modules."""
    plain, strict = (tuple(getattr(model, f"_keep_in_fp32_modules{end}", None) or ()) for end in ("", "_strict"))
    kept = kept_in_float32(plain, strict, str(dtype).removeprefix("torch."))
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if path in matches.packed:
            weight = matches.packed[path]
            parts = {suffix: TensorRecipe((part,)) for suffix, part in weight.parts.items()}
            yield f"{prefix}weight", Slot(module, "weight", parts, dtype, weight.packing)
        for attribute, empty in [*module._parameters.items(), *module._buffers.items()]:
            name = prefix + attribute
            if empty is None or name not in matches.plain or (attribute == "weight" and path in matches.packed):
                continue
            recipe = matches.plain[name]
            _check_shape(name, empty, recipe)
            wanted = _special_dtype(name, empty, kept, special_dtypes)
            yield name, Slot(module, attribute, {attribute: recipe}, wanted)


def _check_shape(name: str, empty: torch.Tensor, recipe: TensorRecipe) -> None:
    """Raise InvalidCheckpoint where the stored tensors do not make what is to be filled."""
    first, more, wanted = recipe.sources[0], len(recipe.sources) - 1, list(empty.shape)
    try:
        made = list(recipe.read(_outline, empty.dtype).shape)
        problem = f"has shape {made}, and {name} takes {wanted}" if made != wanted else ""
    except Exception as error:  # the rules are the class's own, and torch may refuse what they are given
        problem = f"cannot be put together to {name}: {str(error).strip().partition(chr(10))[0]}"
    if empty.is_floating_point() and "float" not in first.dtype and name.rpartition(".")[2] in ("weight", "bias"):
        problem = f"is stored as {first.dtype}, and {name} holds floats"
    if problem:
        cause = f"{first.file}: {first.name} {f'with {more} more ' if more else ''}{problem}"
        raise InvalidCheckpoint(cause, "check that config.json is the one that was saved with these weights")


def _outline(stored: TensorInfo) -> torch.Tensor:
    import torch

    return torch.empty(stored.shape, device="meta")


def _special_dtype(
    name: str, empty: torch.Tensor, kept: re.Pattern[str] | None, special_dtypes: Mapping[str, str]
) -> torch.dtype:
    import torch

    if not empty.is_floating_point():
        return empty.dtype
    if name in special_dtypes:
        chosen: torch.dtype = getattr(torch, special_dtypes[name])
        return chosen
    wide = kept is not None and isinstance(empty, torch.nn.Parameter) and kept.search(name)
    return torch.float32 if wide else empty.dtype


def _settle(slots: Mapping[str, Slot], state: Loaded, budget: int) -> dict[str, Slot]:
    """Fill what stays in memory; return what is streamed. budget: bytes of RAM for what is cast. Weights with a dtype
    of their own are held in it whatever the budget."""
    settled: set[str] = set()
    always = state.homes.placement.special_dtypes
    tied: dict[tuple[object, Device], list[str]] = defaultdict(list)
    for name, slot in slots.items():
        tied[slot.content, state.homes.placement.device_of(name)].append(name)
    for (_, home), names in tied.items():
        slot, device = slots[names[0]], state.homes.execution(names[0])
        stored, scratch = sum(source.nbytes for source in slot.sources), sum(slot.scratch(device))
        on_host = home == "cpu" and device.type == "cpu"
        stays = isinstance(home, int) or (on_host and (scratch <= budget or any(name in always for name in names)))
        if stays:
            budget -= scratch if on_host else 0
            _fill_slots([slots[name] for name in names], state.stream.files, device)
            settled.update(names)
        state.held[home] += scratch or stored if stays else stored
    return {name: slot for name, slot in slots.items() if name not in settled}


def _fill_slots(slots: Sequence[Slot], files: MappedFiles, device: torch.device) -> None:
    """Give all of them the one tensor that the first is filled with."""
    import torch

    first, *others = slots
    first.attach(first.stage(files, device, partial(torch.empty, device=device)))
    if first.scratch(device):
        files.drop(first.sources)
    for other in others:
        setattr(other.module, other.attribute, getattr(first.module, first.attribute))


def _settle_unstored(model: torch.nn.Module, matches: Packed, initialised: Sequence[str], state: Loaded) -> None:
    """Buffers that no checkpoint holds stay where they are used, and so do initialised parameters; most are small."""
    import torch

    for path, module in model.named_modules():
        for attribute, value in [*module._parameters.items(), *module._buffers.items()]:
            name, buffer = f"{path}.{attribute}".strip("."), attribute in module._buffers
            if value is None or (name in matches.plain if buffer else name not in initialised):
                continue
            device = state.homes.execution(name)
            there = value.detach().to(device)
            setattr(module, attribute, there if buffer else torch.nn.Parameter(there, value.requires_grad))
            state.held["cpu" if device.type == "cpu" else device.index - state.homes.first_gpu] += value.nbytes
