"""An artifact as real files in a directory of somebody's own, which the store does not know."""

from __future__ import annotations

import os
from pathlib import Path

from bigpipe.errors import StageFailed, UsageError
from bigpipe.files import (
    copy_file,
    explained,
    is_partial,
    make_directory,
    move,
    partial_name,
    require_space,
    sync_directory,
)

from .artifacts import load_artifact, remove_tree
from .layout import Layout

REPAIR = "`bigpipe verify --repair` sets it aside; then run the recipe again"

WITHIN = "artifact"
"""What is copied within a directory lies below a partial name of this until all is there."""


def take_out(layout: Layout, digest: str, directory: Path) -> dict[str, int]:
    """Copy an artifact to `directory`, which appears as a whole or not at all; return relative path → bytes. An empty
    directory that is there stays what it is, a working directory or a volume: all is copied within it first. What a
    killed one had begun within it goes.

    Every file is compared with its digest while it is copied. Raise UsageError where something is at `directory`, or
    the artifact's bytes are not kept; StageFailed where they are damaged; DoesNotFit for a full disk.
    """
    artifact = load_artifact(layout, digest)
    if artifact is None or artifact.dropped:
        raise UsageError(f"the bytes of {digest} are not in the store", "run the recipe again, without `cache: false`")
    there = directory.is_dir() and not directory.is_symlink()
    begun = os.listdir(directory) if there else []
    if os.path.lexists(directory) and not (there and all(map(_is_begun, begun))):
        raise UsageError(f"{directory} is there already", "name a directory that is not there, or an empty one")
    require_space(directory, artifact.bytes)
    beside = partial_name(directory.absolute() / WITHIN if there else directory.absolute())
    try:
        with explained(beside):
            make_directory(beside.parent)
            make_directory(beside)
        for name, entry in artifact.files.items():
            source = Path(entry.path(layout))
            if not source.is_file():
                raise StageFailed(f"{source}, which is {name} of {digest}, is missing", REPAIR)
            with explained(beside / name):
                copied = copy_file(source, beside / name)
            if copied != (entry.sha256, entry.size):
                raise StageFailed(f"{source}, which is {name} of {digest}, is damaged", REPAIR)
        with explained(directory):
            for folder in [path for path in beside.rglob("*") if path.is_dir()]:
                sync_directory(folder)
            sync_directory(beside)
            if there:
                for path in sorted(beside.iterdir()):
                    move(path, directory / path.name)
                for name in begun:
                    remove_tree(directory / name)
                sync_directory(directory)
            else:
                move(beside, directory.absolute(), durable=True)
    finally:
        if beside.exists():
            remove_tree(beside)
    return {name: entry.size for name, entry in artifact.files.items()}


def _is_begun(name: str) -> bool:
    return is_partial(name) and name.startswith(f".{WITHIN}.")
