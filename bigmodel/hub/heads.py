"""Which weight files of a model can pass on one by one as they come, and what each of them will hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bigpipe.bigmodel.checkpoint import BIN_SUFFIXES, NOT_A_MODEL, FileSource, files_to_come, format_of, read_head
from bigpipe.errors import InvalidCheckpoint

from .rangesource import GUESS, READERS, reading
from .repository import Hub, HubFile, Repository


def may_pass(names: Iterable[str]) -> list[str]:
    """The weight files at the root, where they all have one format."""
    root = sorted(name for name in names if "/" not in name)
    found = [name for name in root if name.endswith((".safetensors", *BIN_SUFFIXES)) and not NOT_A_MODEL.match(name)]
    return found if len({format_of(Path(name)) for name in found}) == 1 else []


def are_the_model(weights: Sequence[str], folder: Path) -> bool:
    """Are these files, no more and no fewer, what `open_checkpoint` would read? The index lies in `folder` already."""
    try:
        found = files_to_come(folder, weights)
    except InvalidCheckpoint:
        return False
    return {file.name for file in found.files} == set(weights)


def directory_heads(folder: Path, names: Iterable[str]) -> dict[str, tuple[bytes, int]]:
    """Name → (head, size). Raises InvalidCheckpoint."""
    heads = {}
    for name in names:
        with FileSource(folder / name) as source:
            heads[name] = read_head(source, folder / name)
    return heads


def repository_heads(repository: Repository, files: Sequence[HubFile], hub: Hub) -> dict[str, tuple[bytes, int]]:
    """Name → (head, size), from the Hub cache or by HTTP range. Raises InvalidCheckpoint, Transient, Offline…"""

    def read(file: HubFile) -> tuple[str, tuple[bytes, int]]:
        with reading(hub, repository, file, GUESS) as (source, name):
            return file.path, read_head(source, name)

    with ThreadPoolExecutor(READERS, "head") as pool:
        return dict(pool.map(read, files))
