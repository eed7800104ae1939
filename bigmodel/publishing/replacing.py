"""What may be overwritten: what the same step of the same recipe wrote and nobody has changed since."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigpipe.errors import UsageError
from bigpipe.sizes import counted

from .destinations import Destination, Directory, Seen
from .provenance import PROVENANCE, SCHEMA

SMALL = 10_000_000
"""Bytes of a file that may be read during a plan."""
CURE = "choose another destination, or write overwrite: true to replace it as a whole"


def check_destination(target: Destination, *, base: Path | None = None, overwrite: bool = False) -> None:
    """Raise, before anything is computed, what would keep `target` from being written.

    base: the recipe's directory. A destination is replaced as a whole, so it must not hold that, or somebody's home.
    """
    if isinstance(target, Directory):
        kept = [Path.home(), *([base.resolve()] if base else [])]
        if any(target.path == place or target.path in place.parents for place in kept):
            raise UsageError(
                f"to: {target.path} would be replaced as a whole, and it holds the recipe or your home directory",
                "name a directory of its own, such as dist/model",
            )
        if (target.path / ".git").exists():
            raise UsageError(
                f"to: {target.path} is a git repository, and would be replaced as a whole", "name a directory in it"
            )
    target.check()
    if not overwrite:
        require_replaceable(target)


def require_replaceable(target: Destination, maker: tuple[str, str] | None = None) -> None:
    """Raise UsageError where `target` holds what bigpipe did not write, another maker wrote, or somebody changed.

    maker: recipe and node; None: not known yet.
    """
    there = target.listing()
    if not there:
        return
    provenance = _provenance(target, there)
    if provenance is None:
        raise UsageError(
            f"to: {target.url} is there already, with {counted(len(there), 'file')} that bigpipe did not write", CURE
        )
    by = (str(provenance.get("recipe")), str(provenance.get("node")))
    if maker is not None and by != maker:
        raise UsageError(f"to: {target.url} was written by node {by[1]} of recipe {by[0]!r}", CURE)
    written: Mapping[str, Any] = provenance.get("files") or {}
    changed = [name for name in there if name != PROVENANCE and not _as_written(target, name, there[name], written)]
    if changed:
        raise UsageError(f"to: {target.url} was changed since it was saved: {', '.join(sorted(changed)[:4])}", CURE)


def _provenance(target: Destination, there: Mapping[str, Seen]) -> dict[str, Any] | None:
    """What the `provenance.json` there says; None where there is none of bigpipe's."""
    if PROVENANCE not in there or there[PROVENANCE].size > SMALL:
        return None
    try:
        found = json.loads(target.read(PROVENANCE))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("schema") == SCHEMA else None


def _as_written(target: Destination, name: str, seen: Seen, written: Mapping[str, Any]) -> bool:
    """Small files by digest: an edit may keep the size. Large ones, and what can be had again, by size."""
    listed = written.get(name)
    if not isinstance(listed, Mapping) or listed.get("size") != seen.size:
        return False
    return target.keeps_versions or seen.size > SMALL or target.digest(name) == listed.get("sha256")
