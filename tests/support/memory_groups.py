"""A control group whose processes together may not hold more memory than a limit: beyond it the kernel kills one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

FIRST, SECOND = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
"""Where the two versions of control groups have the controller of memory."""


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    path: Path
    limit: str
    """The file that takes the limit."""

    def set(self, nbytes: int) -> None:
        (self.path / self.limit).write_text(str(nbytes))


def there() -> bool:
    """May this process make one?"""
    return os.geteuid() == 0 and _parent() is not None


def _parent() -> tuple[Path, str] | None:
    if (FIRST / "memory.limit_in_bytes").exists():
        return FIRST, "memory.limit_in_bytes"
    control = SECOND / "cgroup.subtree_control"
    return (SECOND, "memory.max") if control.exists() and "memory" in control.read_text().split() else None


@contextmanager
def memory_group() -> Iterator[MemoryGroup]:
    """An empty group; a process joins by writing its number to `cgroup.procs`, and counts from there on."""
    found = _parent()
    assert found is not None
    group = MemoryGroup(found[0] / f"bigpipe-{uuid4().hex}", found[1])
    group.path.mkdir()
    try:
        yield group
    finally:
        group.path.rmdir()
