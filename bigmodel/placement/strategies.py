"""Chooses where everything goes, by the mode asked for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from bigpipe.bigmodel.architecture import Architecture
from bigpipe.errors import DoesNotFit, UsageError, first_few
from bigpipe.fit import Need, lacking, nearest, totals
from bigpipe.machine import Machine, detect
from bigpipe.names import refuse_unknown
from bigpipe.sizes import counted, format_size

from .budget import Homes, MemoryBudget, homes_of, memory_of, needs_of, weights_of
from .devices import Caps, Device, is_computing, named, one_device, read_max_memory
from .fitting import over_a_cap, too_small
from .greedy import Filling, fill
from .headroom import Headroom
from .optimal import Solution, solve
from .placement import Placement, PlacementRequest
from .speeds import Speeds
from .tree import Tree, prefixes, tied_as_loaded


def place_architecture(
    architecture: Architecture,
    request: PlacementRequest,
    *,
    tensor_bytes: Mapping[str, int] | None = None,
    headroom: Headroom | None = None,
    machine: Machine | None = None,
    speeds: Speeds | None = None,
) -> Placement:
    """Return a device for every parameter and buffer, never more on one than its cap.

    tensor_bytes: true bytes of tensors as stored, for quantized checkpoints; names the architecture lacks
    (`….weight.absmax`) go with their module. headroom: what generating takes besides; `max_memory` caps weights and
    buffers, as in Hugging Face, and only without it room is left for the rest. machine: whose memory it is; None: this
    one's. speeds: what `optimal` weighs by.

    Raises UsageError for a wrong map or device, DoesNotFit with the smallest change that fits.
    """
    _refuse_unknown(architecture, request)
    budget = _budget(request, headroom, machine)
    tree = Tree(
        tied_as_loaded(architecture, request.dtype, request.special_dtypes), dtype=request.dtype,
        no_split=request.no_split_module_classes, special_dtypes=request.special_dtypes, tensor_bytes=tensor_bytes,
        cache=budget.headroom.cache if budget.headroom else None,
    )  # fmt: skip
    speeds = speeds or Speeds()
    devices, solution = _devices(tree, budget, request, speeds)
    homes = homes_of(tree, devices)
    if budget.memory and (
        misfit := over_a_cap(needs_of(tree, devices, budget.headroom), budget, request.max_memory or {})
    ):
        raise misfit.error()
    weights, needs = weights_of(tree, homes), needs_of(tree, devices, headroom)
    no_split = request.no_split_module_classes
    return Placement(
        strategy=request.mode or "custom",
        dtype=request.dtype,
        device_map=devices,
        weights=weights,
        max_memory={device: None if cap == math.inf else int(cap) for device, cap in budget.caps.items()},
        special_dtypes=dict(request.special_dtypes),
        no_split_module_classes=None if no_split is None else tuple(no_split),
        needs=needs,
        seconds_per_token=solution.seconds if solution else None,
        explanation=tuple(_explain(tree, budget, homes, weights, needs)),
        measured=(_predicted(solution, speeds),) if solution else (),
    )


def _refuse_unknown(architecture: Architecture, request: PlacementRequest) -> None:
    if request.no_split_module_classes is not None:
        classes = {module.class_name for module in architecture.modules}
        cure = "name classes of its modules, such as those of its blocks"
        refuse_unknown("no_split_module_classes", request.no_split_module_classes, classes, "classes", cure)
    floats = {tensor.name for module in architecture.modules for tensor in module.tensors if tensor.floating}
    cure = "name its parameters in full, such as lm_head.weight"
    refuse_unknown("special_dtypes", request.special_dtypes, floats, "tensors of floats", cure)


def _budget(request: PlacementRequest, headroom: Headroom | None, machine: Machine | None) -> MemoryBudget:
    if request.max_memory is not None:
        return MemoryBudget(read_max_memory(request.max_memory))
    if request.mode is None:
        return MemoryBudget({})
    return MemoryBudget(memory_of(machine or detect(Path.cwd())), headroom)


def _devices(
    tree: Tree, budget: MemoryBudget, request: PlacementRequest, speeds: Speeds
) -> tuple[dict[str, Device], Solution | None]:
    """(part → device, what it stands on where the mode weighs time)."""
    if isinstance(request.device_map, Mapping):
        return _checked(tree, request.device_map), None
    if not budget.caps:
        cure = "give one more than 0 bytes, such as cpu: 8GiB"
        raise DoesNotFit("max_memory leaves no device with room", cure, field="max_memory")
    if request.device_map == "optimal":
        solution = solve(tree, budget, speeds)
        if solution is not None:
            return _simplified(tree, _with_weightless(tree, solution.devices)), solution
    elif best := _best(tree, budget, request.device_map):
        return _simplified(tree, best.devices), None
    raise too_small(tree, budget, request, lambda budget: _best(tree, budget, "sequential") is not None).error()


def _checked(tree: Tree, device_map: Mapping[str, int | str]) -> dict[str, Device]:
    """The map with its devices checked. Raises UsageError on unknown names, and listing all that is not covered."""
    devices = {name: one_device(device) for name, device in device_map.items()}
    known = {part for tensor in tree.tensors for part in prefixes(tensor)}
    known.update(module.name for module in tree.architecture.modules)
    refuse_unknown(
        "device_map", devices, known, "parts", "a key is a module or tensor of the model, or a prefix of one"
    )
    missing = _uncovered(tree, devices)
    if missing:
        raise UsageError(
            f"device_map gives no device to {first_few(missing)}",
            'add them, or give everything that is not listed a device with the key ""',
        )
    return devices


def _uncovered(tree: Tree, devices: Mapping[str, Device]) -> list[str]:
    """The largest parts of which nothing has a device, and the tensors that lack one elsewhere."""
    bare = [t for t in tree.tensors if not any(part in devices for part in prefixes(t))]
    touched = {part for name in devices for part in prefixes(name)}
    tops = [next((part for part in prefixes(tensor) if part not in touched), tensor) for tensor in bare]
    return list(dict.fromkeys(tops))


def _best(tree: Tree, budget: MemoryBudget, mode: str) -> Filling | None:
    """The best answer; where the first GPU is too small to stream layers through it, the best without it."""
    for skipped in range(len(budget.gpus) + 1):
        reduced = budget.without(budget.gpus[:skipped])
        if reduced.room < tree.size[""]:
            return None
        if tree.cached[""] > reduced.room_to_compute:
            continue
        best = _cheapest(tree, reduced, mode)
        if best is not None and not best.left:
            return best
    return None


def _cheapest(tree: Tree, budget: MemoryBudget, mode: str) -> Filling | None:
    """Of the sound answers, the first of those that leave the fewest bytes to the disk, then to the CPU."""

    def cost(filling: Filling) -> tuple[int, int, int]:
        off_gpus = filling.used["cpu"] if budget.gpus else 0
        return tree.union_size(filling.left), filling.used["disk"], off_gpus

    caps = budget.caps if mode == "sequential" else _balanced_caps(tree, budget, low_zero=mode == "balanced_low_0")
    shared = list(_answers(tree, budget, caps))
    answers = shared if caps == budget.caps else [*shared, *_answers(tree, budget, budget.caps)]
    best = min(answers, key=cost, default=None)
    if best is None or any(cost(best)):
        # A device that had no room for the part at hand may have room for a later one.
        idle = best is None or any(not best.used[device] for device in budget.caps if device != "disk")
        again = _answers(tree, budget, budget.caps, returning=True) if idle else ()
        return min([*answers, *again], key=cost, default=None)
    idle = any(not best.used[gpu] for gpu in budget.gpus)
    if best not in shared or (idle and mode in ("auto", "balanced")):
        return _evened(tree, budget, mode) or best
    return best


def _balanced_caps(tree: Tree, budget: MemoryBudget, *, low_zero: bool = False) -> Caps:
    """Equal shares with a margin for all GPUs but the last, which keeps its cap for what the shares leave over.

    low_zero: the first GPU gets only what the others have no room for.
    """
    caps = dict(budget.caps)
    gpus = budget.gpus
    if len(gpus) < 2:
        return caps
    share = tree.load("") // (len(gpus) - 1 if low_zero else len(gpus)) + _margin(tree)
    for gpu in gpus[1:-1] if low_zero else gpus[:-1]:
        caps[gpu] = min(share, caps[gpu])
    if low_zero:
        needed = max(0, tree.load("") - sum(caps[gpu] for gpu in gpus[1:]))
        caps[gpus[0]] = min(needed, caps[gpus[0]])
    return caps


def _margin(tree: Tree) -> int:
    """1.25 × the larger of: the largest kind of unsplit block, the mean of the modules without children."""
    blocks: dict[str, int] = {}
    for part in tree.size:
        module = tree.architecture.by_name.get(part) if part else None
        if module is not None and module.class_name in tree.no_split:
            blocks.setdefault(module.class_name, tree.load(part))
    tensors = set(_leaves(list(tree.size)))
    final = _leaves([part for part in tree.size if part not in tensors])
    mean = sum(map(tree.load, final)) // max(len(final), 1)
    return int(1.25 * max(max(blocks.values(), default=0), mean))


def _leaves(parts: list[str]) -> list[str]:
    """Parts that hold no other part."""
    parents = {part.rpartition(".")[0] for part in parts if "." in part}
    return [part for part in parts if part and part not in parents]


def _answers(tree: Tree, budget: MemoryBudget, caps: Caps, *, returning: bool = False) -> Iterator[Filling]:
    """Sound answers, first with room kept for streaming, then without: as accelerate keeps it, then as much as layers
    take of a GPU where they are streamed."""
    kept = dict.fromkeys([frozenset({budget.main, "cpu"}), frozenset({budget.main}), frozenset[Device]()])
    for streaming, twice in itertools.product(kept, (False, True) if budget.gpus else (False,)):
        if twice and not streaming:
            continue
        among = streaming & set(budget.caps)
        filling = _filled(tree, caps, budget.main, among, twice=twice, returning=returning)
        needs = needs_of(tree, filling.devices, budget.headroom)
        if not lacking(totals(needs), budget.memory):
            yield filling


def _filled(
    tree: Tree, caps: Caps, main: Device, streaming: frozenset[Device], *, twice: bool, returning: bool
) -> Filling:
    """A filling whose main device has room for what stays there of the parts that are streamed."""
    reserve, cap = 0, caps.get(main, 0)
    while True:
        room = {**caps, main: cap - reserve} if cap else caps
        filling = fill(tree, room, streaming, twice=twice, returning=returning)
        streamed = (part for part, device in filling.devices.items() if not is_computing(device, main))
        staying = sum(tree.staying[part] for part in streamed)
        if not cap or staying <= reserve or staying > cap:
            return filling
        reserve = staying


def _evened(tree: Tree, budget: MemoryBudget, mode: str) -> Filling | None:
    """Everything on the GPUs with the smallest equal share, or for balanced_low_0 the least on the first GPU.

    For where accelerate's shares leave a GPU empty: a large part that no share holds, or a model of few parts.
    """
    limited = budget.gpus[:1] if mode == "balanced_low_0" else budget.gpus

    def filled(share: int) -> Filling:
        caps: dict[Device, float] = {gpu: budget.caps[gpu] for gpu in budget.gpus}
        return fill(tree, caps | {gpu: min(share, budget.caps[gpu]) for gpu in limited}, frozenset())

    share = nearest(tree.load(""), -1, lambda share: not filled(share).left)
    return None if share is None else filled(share)


def _simplified(tree: Tree, devices: Mapping[str, Device]) -> dict[str, Device]:
    """The shortest map: a module stands for all its parts where they are on one device. In the model's order."""

    def visit(part: str) -> Iterator[tuple[str, Device]]:
        if part in devices:
            yield part, devices[part]
            return
        inside = tree.split(part) if part in tree.architecture.by_name else ()
        pieces = [found for piece in inside for found in visit(piece)]
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


def _predicted(solution: Solution, speeds: Speeds) -> str:
    return f"Predicted {solution.seconds:.3g} s per token, at {speeds.describe()}; {solution.describe()}."


def _explain(
    tree: Tree, budget: MemoryBudget, homes: Homes, weights: Mapping[Device, int], needs: Mapping[Device, Need]
) -> Iterator[str]:
    yield f"{format_size(sum(weights.values()))} of weights and buffers on {counted(len(weights), 'device')}."
    for device, need in needs.items():
        if need.streaming:
            size = format_size(need.streaming)
            yield f"{named(device)} keeps {size} free for layers that are streamed through it."
    empty = [device for device in budget.gpus if device not in weights]
    if empty:
        yield f"Nothing is on {', '.join(map(named, empty))}."
    for kept, *others in tree.architecture.tied:
        apart = [name for name in others if homes.get(name) != homes.get(kept)]
        if apart and kept in homes:
            yield f"{', '.join(apart)} is tied to {kept}, and a copy of it: that is on {named(homes[kept])}."
