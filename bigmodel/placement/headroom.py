"""What generating takes besides weights, and at which layers: what a placement leaves room for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice, pairwise

from bigpipe.bigmodel.architecture import Architecture, deciding_blocks, encodes, text_config
from bigpipe.bigmodel.footprint import (
    Budget,
    Workload,
    capped_length,
    compute_bytes,
    kv_cache,
    layer_kinds,
)
from bigpipe.bigmodel.formats import PLAIN, Format

from .devices import Device, is_computing
from .placement import Placement
from .tree import prefixes


@dataclass(frozen=True, slots=True, kw_only=True)
class Headroom:
    """Sizes in bytes."""

    cache: Mapping[str, int] = field(default_factory=dict)
    """Tensor → keys, values and states that lie where it is used: those of a layer, at its attention's first tensor."""
    activations: int = 0
    """On each device that computes."""
    runtime: int = 0
    """On each GPU in use."""
    casting: int = 0
    """Of the ring that weights are cast into for each use, where the CPU computes."""

    def with_beside(self, beside: Mapping[str, int]) -> Headroom:
        """Return it with what an adapter holds where a tensor is used: it stays there, as keys and values do."""
        both = {name: self.cache.get(name, 0) + beside.get(name, 0) for name in {**self.cache, **beside}}
        return replace(self, cache=both) if beside else self


def headroom_of(
    architecture: Architecture, dtype: str, batch_size: int, sequence_length: int, stored: Format = PLAIN
) -> Headroom:
    """Return what generating with a model of this dtype takes, by the same count as an estimate's.

    stored: the format its matrices are packed in; what they are unpacked into for a product counts as activations.
    """
    workload = Workload(batch_size=batch_size, sequence_length=sequence_length)
    found = Budget(architecture, dtype, workload)
    shares = _shares(architecture, batch_size, capped_length(architecture, sequence_length), compute_bytes(dtype))
    return Headroom(
        cache=_divided(found.kv_cache.bytes, shares) if found.kv_cache.bytes else {},
        activations=found.activations.bytes + _unpacked(architecture, workload, stored),
        runtime=found.runtime.high,
    )


def _unpacked(architecture: Architecture, workload: Workload, stored: Format) -> int:
    return Budget(architecture, stored.name, workload).unpacked[0] if stored.packing else 0


def beyond_headroom(
    placement: Placement,
    architecture: Architecture,
    dtype: str,
    workload: Workload,
    stored: Format,
    *,
    caching: bool = True,
) -> dict[Device, int]:
    """Return the bytes that a batch takes, on each device that computes, beyond what a placement keeps room for: keys
    and values where the layers keep them, if they do (`caching`), and activations on each. dtype: computed in. stored:
    as in `headroom_of`."""
    found, main = Budget(architecture, dtype, workload), placement.main
    activations = found.activations.bytes + _unpacked(architecture, workload, stored)
    kept = {device: need for device, need in placement.needs.items() if is_computing(device, main)}
    cached = sum(need.kv_cache for need in kept.values())
    more = max(0, found.kv_cache.bytes - cached) if caching else 0
    return {
        device: (more * need.kv_cache // cached if cached else more * (device == main))
        + max(0, activations - need.activations)
        for device, need in kept.items()
    }


def _divided(total: int, shares: Mapping[str, int]) -> dict[str, int]:
    """`total` in proportion to the shares, to the byte."""
    whole = sum(shares.values())
    ends = [total * end // whole for end in accumulate(shares.values(), initial=0)]
    return {name: end - start for name, (start, end) in zip(shares, pairwise(ends), strict=True)}


def _shares(architecture: Architecture, batch_size: int, length: int, itemsize: int) -> dict[str, int]:
    """First tensor of each layer's attention → bytes that the layer caches by its kind; 1 each where that is unknown,
    and of an encoder-decoder, whose decoder's layers are alike.

    A model without blocks keeps all of it at its first tensor.
    """
    anchors = _anchors(architecture)
    text = text_config(architecture.config)
    kinds = [] if encodes(architecture.config) else layer_kinds(text)
    stacks: dict[str, list[str]] = {}
    for block in anchors:
        stacks.setdefault(block.rpartition(".")[0], []).append(block)
    for blocks in stacks.values():
        if len(blocks) == len(kinds):
            alone = {kind: {**text, "layer_types": [kind], "num_kv_shared_layers": 0} for kind in kinds}
            sizes = {kind: kv_cache(config, batch_size, length, itemsize).bytes for kind, config in alone.items()}
            if any(sizes.values()):
                return {anchors[block]: sizes[kind] for block, kind in zip(blocks, kinds, strict=True)}
    return dict.fromkeys(anchors.values(), 1) or {tensor.name: 1 for tensor in islice(architecture.tensors(), 1)}


def _anchors(architecture: Architecture) -> dict[str, str]:
    """Block that meets tokens that are made → the first tensor of its attention, or the first of all. Others keep
    nothing."""
    blocks = set(deciding_blocks(architecture))
    found: dict[str, str] = {}
    for tensor in architecture.tensors():
        for block in blocks.intersection(prefixes(tensor.name)):
            known = found.setdefault(block, tensor.name)
            if _is_attention(tensor.name) and not _is_attention(known):
                found[block] = tensor.name
    return found


def _is_attention(name: str) -> bool:
    return "attn" in name or "attention" in name
