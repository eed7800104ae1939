"""Which weight files of a model can pass on one by one as they come, and how each of them begins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bigpipe.bigmodel.checkpoint.arrivals import Head
from bigpipe.bigmodel.checkpoint.bytesource import FileSource
from bigpipe.bigmodel.checkpoint.files import BIN_SUFFIXES, MAX_INDEX, read_json

from .rangesource import RangeSource
from .repository import Hub, HubFile, Repository

READERS = 8
"""Headers read at a time."""
GUESS = 64 * 2**10
"""Bytes fetched at once where a header may be short."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def may_pass(names: Iterable[str]) -> list[str]:
    """The safetensors files at the root, where no other format lies beside them."""
    root = sorted(name for name in names if "/" not in name)
    if any(name.endswith(BIN_SUFFIXES) for name in root):
        return []
    return [name for name in root if name.endswith(".safetensors")]


def are_the_model(weights: Sequence[str], folder: Path) -> bool:
    """Are these files, no more and no fewer, what `open_checkpoint` would read? The index lies in `folder` already."""
    if not (folder / INDEX).is_file():
        return list(weights) == [SINGLE]
    if SINGLE in weights:
        return False
    index = read_json(folder / INDEX, folder, MAX_INDEX)
    weight_map = index.get("weight_map", index)
    return isinstance(weight_map, dict) and set(map(str, weight_map.values())) == set(weights)


def directory_heads(folder: Path, names: Iterable[str]) -> dict[str, tuple[bytes, int]]:
    """Name → (head, size). Raises InvalidCheckpoint."""
    heads = {}
    for name in names:
        with FileSource(folder / name) as source:
            head = Head.of(source, folder / name)
        heads[name] = head.content, head.size
    return heads


def repository_heads(repository: Repository, files: Sequence[HubFile], hub: Hub) -> dict[str, tuple[bytes, int]]:
    """Name → (head, size), from the Hub cache or by HTTP range. Raises InvalidCheckpoint, Transient, Offline…"""

    def read(file: HubFile) -> tuple[str, tuple[bytes, int]]:
        cached = hub.folder(repository.repo) / "snapshots" / repository.commit / file.path
        if cached.is_file() and cached.stat().st_size == file.size:
            return file.path, directory_heads(cached.parent, [cached.name])[cached.name]
        head = Head.of(RangeSource(hub, repository.repo, repository.commit, file, GUESS), Path(file.path))
        return file.path, (head.content, head.size)

    with ThreadPoolExecutor(READERS, "head") as pool:
        return dict(pool.map(read, files))
