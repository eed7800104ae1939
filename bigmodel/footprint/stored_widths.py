"""How wide the keys and values of a model are whose class is unknown, from the shapes of its stored projections.

Configs of such models name their heads as they like: `multi_query_group_num`, lists by layer, blocks with no attention.
The projections are there, whatever they are called in the config.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from bigpipe.bigmodel.architecture import Architecture, deciding_blocks
from bigpipe.bigmodel.memo import kept

KEYS, VALUES, BOTH = (
    re.compile(rf"(to_|w)?({names})(_proj|_lin|_layer)?") for names in ("k|keys?", "v|values?", "kv|key_value")
)
"""Last part of the name, in small letters, of a projection that makes these and nothing else."""
FUSED = re.compile(r"(to_|w)?(_?pack|qkv|query_key_value|c_attn)(_proj)?")
"""Of one that makes queries too: LLaMA's `qkv_proj`, GPT-2's `c_attn`, Baichuan's `W_pack`."""
ATTENTION = re.compile(r"attn|attention")
Shape = tuple[int, ...]


@kept
def cached_elements(architecture: Architecture) -> int:
    """Return the elements that all layers of an outline cache of a token, at most: where what attends has projections
    that are not known here, as many as if it were as wide as the embeddings. 0: nothing attends."""
    blocks = tuple(f"{name}." for name in deciding_blocks(architecture))
    widths: dict[str, int] = {}
    for module in architecture.modules:
        if f"{module.name}.".startswith(blocks):
            block = next(block for block in blocks if f"{module.name}.".startswith(block))
            widths[block] = widths.get(block, 0) + _attending(_projections(architecture, module.children))
    attending = {
        block
        for block in blocks
        if any(name.startswith(block) and ATTENTION.search(name[len(block) :]) for name in architecture.by_name)
    }
    return sum(width or (block in attending) * 2 * _embedded(architecture) for block, width in widths.items())


def _projections(architecture: Architecture, modules: tuple[str, ...]) -> dict[str, Shape]:
    """Last part of the name of each that is a projection → the shape of its weight, [outputs, inputs] of most."""
    found = (architecture.by_name[name] for name in modules)
    return {
        module.name.rpartition(".")[2].lower(): tensor.shape
        for module in found
        if module.linear
        for tensor in module.tensors
        if len(tensor.shape) == 2
    }


def _attending(projections: Mapping[str, Shape]) -> int:
    """Width of the keys and values that these make together; 0 where they make none, or in no way known here."""
    keys, values, both = (
        sum(shape[0] for name, shape in projections.items() if made.fullmatch(name)) for made in (KEYS, VALUES, BOTH)
    )
    if both or (keys and values):
        return both or keys + values
    fused = next((max(shape) for name, shape in projections.items() if FUSED.fullmatch(name)), 0)
    behind = [shape[1] for name, shape in projections.items() if not FUSED.fullmatch(name)]
    # What comes behind attention takes what queries are wide; there are no fewer of these than of keys
    queries = max(behind[0] if len(behind) == 1 else 0, fused // 3)
    return max(0, fused - queries)


def _embedded(architecture: Architecture) -> int:
    module = architecture.by_name.get(architecture.input_embedding or "")
    return max((tensor.shape[-1] for tensor in module.tensors if tensor.shape), default=0) if module else 0
