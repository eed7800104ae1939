"""Which tensor goes into which file: shard plans equal to huggingface_hub's, so that any tool reads the result."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bigpipe.bigmodel.checkpoint import FileFormat, tensor_nbytes
from bigpipe.errors import UsageError

USUAL: Mapping[FileFormat, str] = {"safetensors": "model{}.safetensors", "bin": "pytorch_model{}.bin"}
NAMES: Mapping[str, Mapping[FileFormat, str]] = {
    "diffusers": {"safetensors": "diffusion_pytorch_model{}.safetensors", "bin": "diffusion_pytorch_model{}.bin"},
}
"""Library → what it calls weight files, where these are not the usual names."""
SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.\w+$)")


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return tensor_nbytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One weight file: its name and its tensors."""

    file: str
    tensors: tuple[PlannedTensor, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Alias → tensor of this file whose bytes it shares. Only torch files hold these."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def format(self) -> FileFormat:
        return "bin" if self.file.endswith(".bin") else "safetensors"


def require_size(max_shard_size: int) -> None:
    """Raise UsageError for files that could hold nothing."""
    if max_shard_size < 1:
        raise UsageError(f"max_shard_size is {max_shard_size}", "give a size, such as 5GB", field="max_shard_size")


def plan_shards(
    tensors: Sequence[PlannedTensor],
    max_shard_size: int,
    format: FileFormat = "safetensors",
    tied: Mapping[str, str] | None = None,
    library: str = "transformers",
) -> list[ShardPlan]:
    """Return files of at most `max_shard_size` bytes that hold these tensors, in the order given.

    Greedy, as huggingface_hub.split_torch_state_dict_into_shards: a tensor larger than the limit gets a file of its own
    at once, others fill the current file. `tied` (alias → name) matters to torch files, which keep the aliases; in
    safetensors they are dropped. library: who loads the files, by whose names they go. Raise UsageError for a limit
    that leaves no room.
    """
    require_size(max_shard_size)
    shards: list[list[PlannedTensor]] = []
    current: list[PlannedTensor] = []
    filled = 0
    for tensor in tensors:
        if tensor.nbytes > max_shard_size:
            shards.append([tensor])
            continue
        if filled + tensor.nbytes > max_shard_size:
            shards.append(current)
            current, filled = [], 0
        current.append(tensor)
        filled += tensor.nbytes
    if current or not shards:
        shards.append(current)
    names = [file_name(format, number, len(shards), library) for number in range(len(shards))]
    kept = tied if format == "bin" else None
    return [ShardPlan(name, tuple(shard), _aliases(shard, kept)) for name, shard in zip(names, shards, strict=True)]


def file_name(format: FileFormat, number: int, count: int, library: str = "transformers") -> str:
    """Return `model-00002-of-00006.safetensors` for number 1 of 6, `model.safetensors` where there is only one."""
    return NAMES.get(library, USUAL)[format].format("" if count == 1 else f"-{number + 1:05d}-of-{count:05d}")


def _aliases(shard: Sequence[PlannedTensor], tied: Mapping[str, str] | None) -> dict[str, str]:
    names = {tensor.name for tensor in shard}
    return {alias: name for alias, name in (tied or {}).items() if name in names}


def index_file(file: str) -> str:
    """Return the name of the index of shards, of which `file` is one."""
    return SHARD.sub("", file) + ".index.json"


def is_ours(name: str) -> bool:
    """Is this what a weight file that is written here is called, or its index?"""
    plain = SHARD.sub("", name.removesuffix(".index.json"))
    return any(scheme.format("") == plain for names in (USUAL, *NAMES.values()) for scheme in names.values())


def encode_index(plans: Sequence[ShardPlan]) -> bytes:
    """Return the index of a sharded checkpoint, in the form transformers writes it."""
    weight_map = {tensor.name: plan.file for plan in plans for tensor in plan.tensors}
    weight_map.update({alias: plan.file for plan in plans for alias in plan.aliases})
    index = {"metadata": {"total_size": sum(plan.nbytes for plan in plans)}, "weight_map": weight_map}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
