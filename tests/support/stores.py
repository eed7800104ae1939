"""Stores with something in them: records of made-up computations, published the way a run does it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from bigpipe.orchestrator.store.hashing import digest_of
from bigpipe.orchestrator.store.store import KeyRecord, Store

Content = bytes | Path
"""A file's bytes, or where a link leads."""


@contextmanager
def in_memory(otherwise: Path) -> Iterator[Path]:
    """A directory where fsync costs nothing, if there is such a place: for tests that publish thousands of times."""
    if not os.access("/dev/shm", os.W_OK):
        yield otherwise
        return
    with TemporaryDirectory(dir="/dev/shm") as place:
        yield Path(place)


def record(name: str, **changes: object) -> KeyRecord:
    """What a node called `name` is about to publish."""
    fields: dict[str, object] = {
        "key": digest_of("key", name),
        "partial": digest_of("partial", name),
        "identity": {"kind": "make", "version": 1, "params": {"name": name}},
        "kind": "make",
        "node": name,
        "manifest": "/recipes/one.yaml",
        "artifact_type": "checkpoint",
        "metrics": {"bytes": 1.5},
        "created": "2026-01-02T03:04:05+00:00",
        "run": "20260102-030405-000000",
    }
    return KeyRecord.model_validate(fields | changes)


def fill(out: Path, files: Mapping[str, Content]) -> None:
    for name, content in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            path.unlink(missing_ok=True)
            path.symlink_to(content)
        else:
            path.write_bytes(content)


def publish(
    store: Store,
    name: str,
    files: Mapping[str, Content],
    known: Mapping[str, tuple[str, int]] | None = None,
    **changes: object,
) -> KeyRecord:
    """Does the work of a node: locks its key, writes `files`, publishes, tidies up."""
    wanted = record(name, **changes)
    with store.lock(wanted.key) as work:
        fill(work.out, files)
        done = store.publish(wanted, work.out, known or {})
        work.done()
    return done


def contents(store: Store, done: KeyRecord) -> dict[str, bytes]:
    """What a reader of the artifact gets: relative path → bytes."""
    assert done.digest is not None
    tree = store.artifact_path(done.digest)
    return {str(path.relative_to(tree)): path.read_bytes() for path in sorted(tree.rglob("*")) if path.is_file()}


def objects(store: Store) -> list[Path]:
    return sorted((store.root / "objects").iterdir())


def in_child(action: Callable[[], None]) -> int:
    """Runs `action` in a forked process; its exit status, or minus the signal that killed it."""
    process = os.fork()
    if process == 0:
        status = 70
        try:
            action()
            status = 0
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def killed_at(step: int, action: Callable[[], None]) -> bool:
    """Runs `action` in a child that is killed (SIGKILL) just before the system call that is its `step`-th audited one
    (open, rename, chmod, mkdir, unlink, …). False: it ended before that."""
    remaining = [step]

    def die_in_time(event: str, _: object) -> None:
        if event == "open" or event.startswith("os."):
            remaining[0] -= 1
            if remaining[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def watched() -> None:
        sys.addaudithook(die_in_time)
        action()

    status = in_child(watched)
    assert status in (0, -signal.SIGKILL)
    return status != 0
