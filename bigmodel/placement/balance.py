"""Softer caps that spread a model over its GPUs, as accelerate's `get_balanced_memory` computes them.

Keys and values count with the layers that use them, where the budget is to hold them too.
"""

from __future__ import annotations

from .budget import MemoryBudget
from .devices import Device
from .tree import Tree


def balanced_caps(tree: Tree, budget: MemoryBudget, *, low_zero: bool = False) -> dict[Device, int | None]:
    """Equal shares with a margin for all GPUs but the last, which keeps its cap for what the shares leave over.

    low_zero: the first GPU gets only what the others have no room for.
    """
    caps = dict(budget.caps)
    gpus = budget.gpus
    if len(gpus) < 2:
        return caps
    share = tree.load("") // (len(gpus) - 1 if low_zero else len(gpus)) + _margin(tree)
    for gpu in gpus[1:-1] if low_zero else gpus[:-1]:
        caps[gpu] = smaller(share, caps[gpu])
    if low_zero:
        others = [caps[gpu] for gpu in gpus[1:]]
        room = None if None in others else sum(cap for cap in others if cap is not None)
        needed = 0 if room is None else max(0, tree.load("") - room)
        caps[gpus[0]] = smaller(needed, caps[gpus[0]])
    return caps


def _margin(tree: Tree) -> int:
    """1.25 × the larger of: the largest kind of unsplit block, the mean of the modules without children."""
    blocks: dict[str, int] = {}
    for part in tree.sizes:
        module = tree.architecture.by_name.get(part) if part else None
        if module is not None and module.class_name in tree.no_split:
            blocks.setdefault(module.class_name, tree.load(part))
    tensors = set(_leaves(list(tree.sizes)))
    final = _leaves([part for part in tree.sizes if part not in tensors])
    mean = sum(map(tree.load, final)) // max(len(final), 1)
    return int(1.25 * max(max(blocks.values(), default=0), mean))


def _leaves(parts: list[str]) -> list[str]:
    """Parts that hold no other part."""
    parents = {part.rpartition(".")[0] for part in parts if "." in part}
    return [part for part in parts if part and part not in parents]


def smaller(size: int, cap: int | None) -> int:
    """The tighter of a size and a cap; None is no cap."""
    return size if cap is None else min(size, cap)
