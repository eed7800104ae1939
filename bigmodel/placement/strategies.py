"""Chooses where everything goes, by the mode asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from bigpipe.bigmodel.architecture import Architecture
from bigpipe.errors import DoesNotFit, UsageError
from bigpipe.sizes import format_size

from .balance import balanced_caps, smaller
from .budget import Budget, Device, ordered_budget, read_budget
from .custom import read_device_map
from .greedy import Filling, fill
from .optimal import solve
from .result import Placement
from .speeds import Speeds
from .tree import Tree, prefixes

FLOATS = ("float32", "float16", "bfloat16")
MODES = ("auto", "balanced", "balanced_low_0", "sequential", "optimal")


def place_architecture(
    architecture: Architecture,
    *,
    device_map: str | Mapping[str, int | str] = "auto",
    max_memory: Mapping[int | str, int | str] | None = None,
    no_split_module_classes: Sequence[str] | None = None,
    dtype: str | None = None,
    special_dtypes: Mapping[str, str] | None = None,
    tensor_bytes: Mapping[str, int] | None = None,
    headroom: Mapping[Device, int] | None = None,
    speeds: Speeds | None = None,
) -> Placement:
    """A device for every parameter and buffer, never more on one than its cap.

    device_map: auto (the same as balanced), balanced, balanced_low_0, sequential as in accelerate; optimal, the fewest
    predicted seconds per token at these `speeds`; or a map of name prefixes to devices. max_memory: bytes of weights
    and buffers per device; devices not in it are not used; None: what this machine has free, and the disk.
    no_split_module_classes: None for the model's own. dtype: what floats are loaded as; special_dtypes: tensor name →
    dtype. tensor_bytes: true bytes of tensors as stored, for quantized checkpoints; names the architecture lacks
    (`….weight.absmax`) go with their module. headroom: bytes per device to leave free.

    Raises UsageError for a wrong map or device, DoesNotFit with the smallest change that fits.
    """
    for name in (dtype, *(special_dtypes or {}).values()):
        if name is not None and name not in FLOATS:
            raise UsageError(f"dtype {name!r} is not one that weights are loaded as", f"use {', '.join(FLOATS)}")
    tree = Tree(
        architecture, no_split=no_split_module_classes, dtype=dtype, special_dtypes=special_dtypes,
        tensor_bytes=tensor_bytes,
    )  # fmt: skip
    if isinstance(device_map, Mapping):
        budget = read_budget(max_memory, headroom) if max_memory is not None else Budget({})
        devices = read_device_map(tree, device_map)
        strategy = "custom"
    elif device_map == "optimal":
        budget = read_budget(max_memory, headroom)
        speeds = speeds or Speeds()
        solution = solve(tree, budget, speeds)
        if solution is None:
            raise _too_big(tree, budget)
        devices = _simplified(tree, _with_weightless(tree, solution.devices))
        placed = _placement(tree, budget, devices, device_map, dtype, solution.seconds)
        predicted = f"Predicted {solution.seconds:.3g} s per token, at {speeds.describe()}."
        return replace(placed, explanation=(*placed.explanation, predicted))
    elif device_map in MODES:
        budget = read_budget(max_memory, headroom)
        devices = _simplified(tree, _choose(tree, budget, device_map).devices)
        strategy = device_map
    else:
        raise UsageError(f"device_map {device_map!r} is not a mode", f"use one of {', '.join(MODES)}, or a map")
    return _placement(tree, budget, devices, strategy, dtype)


def _choose(tree: Tree, budget: Budget, mode: str) -> Filling:
    if not budget.caps:
        raise DoesNotFit("max_memory leaves no device with room", "give one more than 0 bytes, such as cpu: 8GiB")
    best = _best(tree, budget, mode)
    if best is None:
        raise _too_big(tree, budget)
    return best


def _best(tree: Tree, budget: Budget, mode: str) -> Filling | None:
    """The best answer; where the first GPU is too small to stream layers through it, the best without it."""
    for skipped in range(len(budget.gpus) + 1):
        unused = budget.gpus[:skipped]
        reduced = Budget({device: cap for device, cap in budget.caps.items() if device not in unused})
        if reduced.room is not None and reduced.room < tree.size(""):
            return None
        best = _cheapest(tree, reduced, mode)
        if best is not None and not best.left:
            return best
    return None


def _cheapest(tree: Tree, budget: Budget, mode: str) -> Filling | None:
    """Of the sound answers, the first of those that leave the fewest bytes to the disk, then to the CPU."""

    def cost(filling: Filling) -> tuple[int, int, int]:
        off_gpus = filling.on("cpu") if budget.gpus else 0
        return tree.union_size(filling.left), filling.on("disk"), off_gpus

    caps = budget.caps if mode == "sequential" else balanced_caps(tree, budget, low_zero=mode == "balanced_low_0")
    shared = list(_answers(tree, budget, caps))
    answers = shared if caps == budget.caps else [*shared, *_answers(tree, budget, budget.caps)]
    best = min(answers, key=cost, default=None)
    if best is None or any(cost(best)):
        # A device that had no room for the part at hand may have room for a later one.
        idle = best is None or any(not best.on(device) for device in budget.devices if device != "disk")
        again = _answers(tree, budget, budget.caps, returning=True) if idle else ()
        return min([*answers, *again], key=cost, default=None)
    idle = any(not best.on(gpu) for gpu in budget.gpus)
    if best not in shared or (idle and mode in ("auto", "balanced")):
        return _evened(tree, budget, mode) or best
    return best


def _answers(
    tree: Tree, budget: Budget, caps: Mapping[Device, int | None], *, returning: bool = False
) -> Iterator[Filling]:
    """Sound answers, first with room kept for streaming, then without."""
    for streaming in dict.fromkeys([frozenset({budget.main, "cpu"}), frozenset({budget.main}), frozenset[Device]()]):
        filling = fill(tree, caps, streaming & set(budget.devices), returning=returning)
        if _fits(tree, budget, filling.devices):
            yield filling


def _fits(tree: Tree, budget: Budget, devices: Mapping[str, Device]) -> bool:
    weights, streaming = _loads(tree, devices)
    return not _over(budget, weights, streaming)


def _over(budget: Budget, weights: Mapping[Device, int], streaming: Mapping[Device, int]) -> dict[Device, int]:
    """Device → bytes it lacks."""
    needs = {device: weights.get(device, 0) + streaming.get(device, 0) for device in {*weights, *streaming}}
    caps = {device: budget.caps.get(device, 0) for device in needs}
    return {d: need - cap for d, need in needs.items() if (cap := caps[d]) is not None and need > cap}


def _loads(tree: Tree, devices: Mapping[str, Device]) -> tuple[dict[Device, int], dict[Device, int]]:
    """(bytes held per device, bytes of the largest layer that streams through the device that runs it).

    That device is the first GPU in use, else the CPU.
    """
    where = {tensor: device for tensor in tree.tensors if (device := _device_of(devices, tensor)) is not None}
    weights: dict[Device, int] = {}
    for storage, size in tree.nbytes.items():
        if storage in where:
            weights[where[storage]] = weights.get(where[storage], 0) + size
    main: Device = min((device for device in weights if isinstance(device, int)), default="cpu")
    offloaded = {"cpu", "disk"} - {main}
    layers = (
        [tensor for tensor in tree.tensors_of(layer) if where.get(tree.storage(tensor)) in offloaded]
        for layer in tree.layers([""])
        if not tree.is_table(layer)
    )
    largest = max(map(tree.union_size, layers), default=0)
    return weights, {main: largest} if largest else {}


def _device_of(devices: Mapping[str, Device], tensor: str) -> Device | None:
    return next((devices[part] for part in reversed(list(prefixes(tensor))) if part in devices), None)


def _evened(tree: Tree, budget: Budget, mode: str) -> Filling | None:
    """Everything on the GPUs with the smallest equal share, or for balanced_low_0 the least on the first GPU.

    For where accelerate's shares leave a GPU empty: a large part that no share holds, or a model of few parts.
    """
    limited = budget.gpus[:1] if mode == "balanced_low_0" else budget.gpus

    def filled(share: int) -> Filling:
        caps: dict[Device, int | None] = {gpu: budget.caps[gpu] for gpu in budget.gpus}
        return fill(tree, caps | {gpu: smaller(share, budget.caps[gpu]) for gpu in limited}, frozenset())

    share = _smallest(0, tree.size(""), lambda share: not filled(share).left)
    return None if share is None else filled(share)


def _smallest(low: int, high: int, holds: Callable[[int], bool], step: int = 1) -> int | None:
    """The smallest number in the range for which `holds`, to within `step`; None where it does not at the end.

    What holds for a number is taken to hold for all larger ones.
    """
    if not holds(high):
        return None
    while low + step <= high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return high


def _too_big(tree: Tree, budget: Budget) -> DoesNotFit:
    """Names the cap whose raise adds the fewest bytes (one device's, or all GPUs' alike), and a device to add."""
    total, caps = tree.size(""), budget.caps
    groups: list[tuple[Device, ...]] = [(device,) for device in caps]
    equal = len(budget.gpus) > 1 and len({caps[gpu] for gpu in budget.gpus}) == 1
    if equal:
        groups = [budget.gpus, *(group for group in groups if group[0] not in budget.gpus)]
    raises: dict[tuple[Device, ...], int] = {}
    for group in groups:
        cap = caps[group[0]]
        works = partial(_works, tree, caps, group)
        size = None if cap is None else _smallest(cap, total * 2, works, step=max(1, total >> 14))
        raises |= {group: size} if size is not None else {}
    cures = []
    if raises:
        group = min(raises, key=lambda group: (raises[group] - (caps[group[0]] or 0)) * len(group))
        name = f"{group[0]}-{group[-1]}" if len(group) > 1 else str(group[0])
        cures.append(f"raise max_memory of {name} from {format_size(caps[group[0]] or 0)} to {_up(raises[group])}")
    cures += [f"add {d} to max_memory" for d in ("cpu", "disk") if d not in caps and _works(tree, caps, (d,), None)][:1]
    room = "" if budget.room is None else f"; max_memory gives {format_size(budget.room)}"
    layer = max(map(tree.size, tree.layers([""])))
    return DoesNotFit(
        f"the model's weights and buffers take {format_size(total)}, its largest layer {format_size(layer)}{room}",
        ", or ".join(cures) or "raise max_memory",
    )


def _works(tree: Tree, caps: Mapping[Device, int | None], devices: tuple[Device, ...], cap: int | None) -> bool:
    """Does the model fit with another cap for these devices?"""
    return _best(tree, ordered_budget({**caps, **dict.fromkeys(devices, cap)}), "sequential") is not None


def _up(size: int) -> str:
    """Rounded up to a tenth of the unit, as it may be written into max_memory."""
    unit, name = (2**30, "GiB") if size >= 2**30 else (2**20, "MiB") if size >= 2**20 else (1, "")
    return f"{math.ceil(size / unit * 10) / 10:.1f}{name}" if name else str(size)


def _simplified(tree: Tree, devices: Mapping[str, Device]) -> dict[str, Device]:
    """The shortest map: a module stands for all its parts where they are on one device. In the model's order."""

    def visit(part: str) -> Iterator[tuple[str, Device]]:
        if part in devices:
            yield part, devices[part]
            return
        pieces = [found for piece in tree.split(part) for found in visit(piece)] if tree.is_module(part) else []
        places = {device for _, device in pieces}
        yield from [(part, places.pop())] if len(places) == 1 else pieces

    return dict(visit(""))


def _with_weightless(tree: Tree, devices: Mapping[str, Device]) -> dict[str, Device]:
    """Parts without bytes go with what comes before them."""
    found: dict[str, Device] = {}
    last = next(iter(devices.values()))
    for part in tree.layers([""]):
        last = found[part] = devices.get(part, last)
    return found


def _placement(
    tree: Tree,
    budget: Budget,
    devices: dict[str, Device],
    strategy: str,
    dtype: str | None,
    seconds: float | None = None,
) -> Placement:
    weights, streaming = _loads(tree, devices)
    over = _over(budget, weights, streaming) if budget.caps else {}
    if over:
        device, lacking = next(iter(over.items()))
        held, passing = weights.get(device, 0), streaming.get(device, 0)
        raise DoesNotFit(
            f"device_map puts {format_size(held)} on {device}"
            + (f" and streams layers of up to {format_size(passing)} through it" if passing else "")
            + f"; max_memory leaves it {format_size(held + passing - lacking)}",
            f"raise max_memory of {device} to {_up(held + passing)}, or move parts elsewhere",
        )
    ordered = [d for d in (*sorted(d for d in weights if isinstance(d, int)), "cpu", "disk") if d in weights]
    return Placement(
        device_map=devices,
        weights={device: weights[device] for device in ordered},
        max_memory=dict(budget.caps),
        strategy=strategy,
        dtype=dtype,
        streaming=streaming,
        seconds_per_token=seconds,
        explanation=tuple(_explain(tree, budget, devices, weights, streaming)),
    )


def _explain(
    tree: Tree,
    budget: Budget,
    devices: Mapping[str, Device],
    weights: Mapping[Device, int],
    streaming: Mapping[Device, int],
) -> Iterator[str]:
    yield f"{format_size(sum(weights.values()))} of weights and buffers on {len(weights)} device(s)."
    for device, size in streaming.items():
        yield f"{_named(device)} keeps {format_size(size)} free for the largest layer that is streamed through it."
    empty = [device for device in budget.gpus if device not in weights]
    if empty:
        yield f"Nothing is on {', '.join(map(_named, empty))}."
    for group in tree.architecture.tied:
        kept = _device_of(devices, group[0])
        apart = [name for name in group[1:] if _device_of(devices, name) != kept]
        if apart and kept is not None:
            yield f"{', '.join(apart)} shares the bytes of {group[0]}, which are on {_named(kept)}."


def _named(device: Device) -> str:
    return f"GPU {device}" if isinstance(device, int) else f"the {'CPU' if device == 'cpu' else device}"
