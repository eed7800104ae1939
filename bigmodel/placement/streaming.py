"""What a forward moves to where it computes, by the number of its tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bigpipe.bigmodel.architecture import Architecture, expert_tensors, experts_per_token, repeats, visited_share
from bigpipe.bigmodel.checkpoint import tensor_nbytes

from .devices import is_computing
from .placement import Placement
from .tree import INDIVISIBLE


@dataclass(frozen=True, slots=True)
class Streamed:
    """Stored bytes of what does not lie where it computes."""

    always: int
    """That every forward moves."""
    row: int
    """Of embeddings, for each token."""
    experts: Mapping[int, int]
    """By how many there are beside each other, of all layers."""
    chosen: int
    """Experts of a layer that a token chooses; 0: not known, and all are moved."""

    def by(self, tokens: int, kept: float = 0.0) -> int:
        """Return what a forward over so many tokens is expected to move: E·(1 − (1 − k/E)^tokens) experts of each
        layer. kept: the share of the experts that stays where it computes."""
        moved = sum(size * visited_share(count, self.chosen, tokens) for count, size in self.experts.items())
        return self.always + tokens * self.row + int(moved * (1 - kept))

    def beside_tables(self, tokens: int) -> int:
        """Return what such a forward is expected to move of all but embeddings."""
        return self.by(tokens) - tokens * self.row

    def share(self, tokens: int) -> float:
        """Return the share of it all, tables apart, that a forward over so many tokens is expected to move."""
        whole = self.always + sum(self.experts.values())
        return self.beside_tables(tokens) / max(whole, 1)


def streamed(
    architecture: Architecture, placement: Placement, dtype: str, stored: Mapping[str, int],
    runs: Callable[[str], bool] = lambda name: True,
) -> Streamed:  # fmt: skip
    """Return what a placement streams: tied weights at each use, an embedding by rows unless it is part of a block,
    layers as often as a forward runs them.

    dtype: of tensors that are stored under other names than the model's. stored: bytes by the model's own names. runs:
    does the forward run what holds the tensor of that name?
    """
    main, classes = placement.main, placement.no_split_module_classes
    whole = INDIVISIBLE | frozenset(architecture.no_split if classes is None else classes)
    blocks = tuple(f"{module.name}." for module in architecture.modules if module.class_name in whole)
    experts, found = expert_tensors(architecture), Counter[int]()
    always = row = 0
    for module in architecture.modules:
        table = module.class_name == "Embedding" and not module.name.startswith(blocks)
        for tensor in module.tensors:
            away = not is_computing(placement.device_of(tensor.name), main)
            if not (tensor.persistent and away and runs(tensor.name)):
                continue
            known = stored.get(architecture.aliases.get(tensor.name, tensor.name))
            size = known or tensor_nbytes(architecture.dtype_of(tensor, dtype), tensor.shape)
            size *= repeats(architecture.config, tensor.name)
            if table:
                row += size // tensor.shape[0]
            elif count := experts.get(tensor.name):
                found[count] += size
            else:
                always += size
    return Streamed(always, row, found, experts_per_token(architecture.config))


def room_for_experts(architecture: Architecture, placement: Placement, dtype: str) -> tuple[int, int]:
    """Return (bytes of streamed experts that there is room for where they compute, bytes of all that could stay). Only
    those that a class holds in one stay by themselves. dtype: what they are computed in."""
    main = placement.main
    experts = expert_tensors(architecture, listed=False)
    sizes = (
        tensor_nbytes(architecture.dtype_of(tensor, dtype), tensor.shape)
        for tensor in architecture.tensors()
        if tensor.name in experts and not is_computing(placement.device_of(tensor.name), main)
    )
    total, cap, need = sum(sizes), placement.max_memory.get(main), placement.needs.get(main)
    return max(0, min(total, (cap or 0) - (need.total if need else 0))), total
