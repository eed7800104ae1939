"""Other machines than this one for the attempts of a run, by name: `run --executor NAME[:ADDRESS]`.

    ray    tasks of a Ray cluster

Others come through the entry-point group `bigpipe.clusters`, as functions like `connect` in `onray`. What a cluster has
of its own stays behind its `executor`: the engine gives it a job, and gets an outcome.
"""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bigpipe.errors import Interrupted, UsageError
from bigpipe.files import NO_LOCKS, open_lock
from bigpipe.modules import foreign
from bigpipe.orchestrator.contract import Machine, late

if TYPE_CHECKING:
    import os

    from .executors import Executor

GROUP = "bigpipe.clusters"
POLL = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A machine of a cluster."""

    id: str
    """What the cluster calls it."""
    machine: Machine
    ram: int
    """Bytes of memory that the cluster gives out there."""
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Machines that attempts can be sent to. It decides which of them, and when."""

    name: str
    """What people call it: `ray at 10.0.0.1:6379`."""
    hosts: tuple[Host, ...]
    """As they were when the run began."""
    executor: Executor
    """Runs an attempt there. It heeds `Job.needs`."""
    close: Callable[[], None]


Connect = Callable[[str, "os.PathLike[str]"], Cluster]
"""(address, "" for the one that is found; root of the store) → the cluster. Raises UsageError, NotAuthorised and
Transient."""

CLUSTERS: Mapping[str, Connect] = {"ray": late("bigpipe.orchestrator.launch.onray:connect")}


def open_cluster(written: str, root: Path) -> Cluster:
    """Return the cluster that `NAME[:ADDRESS]` means. root: of the store. Raise UsageError where nobody offers one of
    this name, and what connecting raises."""
    name, _, address = written.partition(":")
    return _connect(name)(address, root)


def _connect(name: str) -> Connect:
    if name in CLUSTERS:
        return CLUSTERS[name]
    from importlib.metadata import entry_points

    for entry in entry_points(group=GROUP, name=name):
        with foreign(f"the executor {name!r} cannot be loaded from {entry.value}", "mend its distribution"):
            found: Connect = entry.load()
        return found
    known = ", ".join(CLUSTERS)
    raise UsageError(f"there is no executor {name!r}", f"give one of {known}, as in --executor ray:ADDRESS, or none")


def await_end(folder: Path, cancelled: threading.Event) -> None:
    """Wait until no worker holds this work folder: one that a cluster has lost may live a while. Raise Interrupted."""
    descriptor = open_lock(folder / "lock")
    with open(descriptor, "rb"):
        while not _free(descriptor):
            if cancelled.wait(POLL):
                raise Interrupted("interrupted while a lost worker was waited for", "run the same command again")


def _free(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True
