"""ENOSPC, EIO, EINTR and SIGKILL at every durable system call of what the store and the writers do.

Each turn runs in a fork of this process, which strace attaches to; counting begins with the action, so no turn is spent
on Python's start. `make fault` takes every call at every turn, the short form a few of them.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.forking import forked, turns
from support.stores import contents, fill, in_memory, publish, record

from bigpipe.bigmodel.checkpoint import open_checkpoint
from bigpipe.bigmodel.writing import Conversion, convert
from bigpipe.files import explained, read_sealed, write_sealed
from bigpipe.orchestrator.lock import lockfile
from bigpipe.orchestrator.store.artifacts import load_artifact
from bigpipe.orchestrator.store.store import Store

CALLS = (
    "openat", "write", "pwrite64", "fallocate", "fsync", "fdatasync", "rename", "renameat2", "link", "symlink", "chmod",
    "utimensat", "ftruncate", "unlink", "rmdir", "mkdir", "close", "flock",
)  # fmt: skip
FAULTS = ("error=EIO", "error=ENOSPC", "error=EINTR", "signal=SIGKILL")
FILES = {"config.json": b"{}", "w/1.bin": b"1" * 9000, "w/2.bin": b"2" * 9000}
OTHER = {"config.json": b"{}", "x": b"other"}


@dataclass(frozen=True)
class Scenario:
    prepare: Callable[[Path], object]
    """Makes what the action finds, once."""
    action: Callable[[Path], object]
    """Works on a copy of it, and is interrupted."""
    check: Callable[[Path], object]
    """Asserts that nothing was lost, nothing half done counts, and the action can be done now."""


def make(root: Path) -> None:
    with Store(root) as store, store.lock(record("a").key) as work:
        with explained(work.folder):  # as an executor does with what a stage lets through
            if not (work.scratch / "finished").exists():
                fill(work.out, FILES)
                (work.scratch / "finished").touch()
        if store.find(record("a").key) is None:
            store.publish(record("a"), work.out)
        work.done()


def made(root: Path) -> None:
    with Store(root) as store:
        found = store.find(record("a").key)
        if found is not None:
            assert store.intact(found)
            assert contents(store, found) == FILES
        assert store.verify().clean
    make(root)
    with Store(root) as store:
        found = store.find(record("a").key)
        assert store.intact(found)
        assert contents(store, found) == FILES
        assert store.verify().clean


def leave_a_journal(root: Path) -> None:
    """A run that publishes, and dies with half of its files moved."""
    journal = root / "work" / record("a").key[7:] / "publish.json"

    moved = []

    def die_at_the_second(event: str, _: object) -> None:
        if event == "os.link":
            moved.append(event)
            if len(moved) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    def dying() -> None:
        sys.addaudithook(die_at_the_second)
        make(root)

    assert forked(dying).code == -signal.SIGKILL
    assert journal.exists()


def enter(root: Path) -> None:
    with Store(root) as store:
        store.enter()


def with_garbage(root: Path) -> None:
    (root.parent / "kept.yaml").write_text("")
    (root.parent / "gone.yaml").write_text("")
    with Store(root) as store:
        for name, files in (("a", FILES), ("b", OTHER), ("c", {"y": b"only here"})):
            publish(store, name, files)
        store.remember(root.parent / "kept.yaml", None, "kept", {"a": record("a").key})
        store.remember(root.parent / "gone.yaml", None, "gone", {"b": record("b").key})
    (root.parent / "gone.yaml").unlink()


def collect(root: Path) -> None:
    with Store(root) as store:
        store.gc(lockfile.locked_digests)


def collected(root: Path) -> None:
    for _ in range(2):  # as it was left, and after another round
        with Store(root) as store:
            kept = store.find(record("a").key)
            assert store.intact(kept)
            assert contents(store, kept) == FILES
            other = store.find(record("b").key)
            assert other is None or not store.intact(other) or contents(store, other) == OTHER
            assert store.verify(repair=True).clean or store.verify().clean
        collect(root)
    with Store(root) as store:
        assert store.find(record("b").key) is None
        assert {path.name for path in store.layout.objects.iterdir()} == store_objects(store, kept.digest)


def store_objects(store: Store, digest: str) -> set[str]:
    return load_artifact(store.layout, digest).objects


def harmed(root: Path) -> None:
    with Store(root) as store:
        first, second = publish(store, "a", FILES), publish(store, "b", OTHER)
    path = root / "objects" / first.files["w/1.bin"]["sha256"]
    path.chmod(0o644)
    path.write_bytes(b"2" * 9000)
    (root / "keys" / f"{second.key[7:]}.json").write_bytes(b"torn")
    tree = root / "artifacts" / second.digest[7:]
    (tree / "x").unlink()
    shutil.rmtree(root / "roots", ignore_errors=True)
    (root / "roots").write_bytes(b"a file")


def repair(root: Path) -> None:
    with Store(root) as store:
        store.verify(repair=True)


def repaired(root: Path) -> None:
    repair(root)
    with Store(root) as store:
        assert store.verify().clean
        for name, files in (("a", FILES), ("b", OTHER)):
            found = store.find(record(name).key)
            if found is None or not store.intact(found):
                found = publish(store, name, files)
            assert store.intact(found)
            assert contents(store, found) == files
        assert store.verify().clean


def two_artifacts(root: Path) -> None:
    with Store(root) as store:
        publish(store, "a", FILES)
        publish(store, "b", OTHER)


def let_go(root: Path) -> None:
    with Store(root) as store:
        store.drop(store.find(record("a").key).digest, record("a").key)


def let_go_of(root: Path) -> None:
    with Store(root) as store:
        first, second = store.find(record("a").key), store.find(record("b").key)
        assert store.intact(second)
        assert contents(store, second) == OTHER
        assert not store.intact(first) or contents(store, first) == FILES
    let_go(root)
    with Store(root) as store:
        assert not store.intact(first)
        assert contents(store, second) == OTHER
        assert store.verify().clean


LOCKS = [
    lockfile.LockFile.model_validate({"recipe": f"sha256:{digit * 64}", "params": {}, "inputs": {}, "outputs": {}})
    for digit in "01"
]


def write_lock(root: Path, which: int = 1) -> None:
    root.mkdir(exist_ok=True)
    lockfile.write(root / "recipe.yaml.lock", LOCKS[which])


def locked(root: Path) -> None:
    found = lockfile.read_lock(root / "recipe.yaml.lock")
    assert found is not None
    assert found.recipe in {lock.recipe for lock in LOCKS}
    write_lock(root)
    assert lockfile.read_lock(root / "recipe.yaml.lock").recipe == LOCKS[1].recipe


def converted(root: Path, out: str) -> None:
    source = open_checkpoint(Path(__file__).parents[2] / "models" / "quickstart")
    conversion = Conversion(max_shard_size=source.nbytes // 3, dtype="float16")
    convert(source, root / out, conversion, journal=root / "notes")


def write_weights(root: Path) -> None:
    with explained(root):
        converted(root, "out")


def written(root: Path) -> None:
    for path in (root / "out").glob("*.safetensors"):  # whatever has its name is whole
        assert path.read_bytes() == (root / "right" / path.name).read_bytes()
    write_weights(root)
    right = {path.name: path.read_bytes() for path in (root / "right").iterdir()}
    assert {path.name: path.read_bytes() for path in (root / "out").iterdir()} == right


def sealed(root: Path) -> None:
    with explained(root):
        write_sealed(root / "record.json", {"value": "new"})


SCENARIOS = {
    "publishing": Scenario(lambda root: None, make, made),
    "taking up a journal": Scenario(leave_a_journal, enter, made),
    "gc": Scenario(with_garbage, collect, collected),
    "verify --repair": Scenario(harmed, repair, repaired),
    "dropping": Scenario(two_artifacts, let_go, let_go_of),
    "lock file": Scenario(lambda root: write_lock(root, 0), write_lock, locked),
    "weights": Scenario(lambda root: converted(root, "right"), write_weights, written),
    "record": Scenario(
        lambda root: (root.mkdir(), write_sealed(root / "record.json", {"value": "old"})),
        sealed,
        lambda root: read_sealed(root / "record.json")["value"] in ("old", "new") or pytest.fail("torn"),
    ),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("share", [0.005, pytest.param(1.0, marks=[pytest.mark.fault, pytest.mark.timeout(3600)])])
def test_a_fault_at_every_system_call(tmp_path, scenario, share, seed):
    """share: of all turns of all calls with every fault, those that are taken."""
    told = SCENARIOS[scenario]
    dice = random.Random(seed)  # noqa: S311
    with in_memory(tmp_path) as place:
        (place / "before").mkdir()
        told.prepare(place / "before" / "root")
        told.action(copy(place, "warm"))  # imports are done once, and not where they are broken
        copy(place, "counted")
        calls = turns(lambda: told.action(place / "counted" / "root"), CALLS, place / "log")
        points = [
            (*point, fault) for point, may_fail in calls.items() for fault in FAULTS if may_fail or "KILL" in fault
        ]
        taken = dice.sample(points, max(3, round(share * len(points))))
        print(f"{scenario}: {len(taken)} of {len(points)}")  # noqa: T201
        for call, turn, fault in taken:
            root = copy(place, "now")
            ending = forked(
                lambda root=root: told.action(root),
                watch=["-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={turn}"],
            )
            assert ending.in_order, (call, turn, fault, ending)
            try:
                told.check(root)
            except AssertionError as error:
                raise AssertionError(f"after {fault} at {call} {turn}: {ending}: {error}") from error


def copy(place: Path, name: str) -> Path:
    """What was prepared, again: a store may be copied, its bytes are then read once."""
    shutil.rmtree(place / name, ignore_errors=True)
    shutil.copytree(place / "before", place / name, symlinks=True)
    return place / name / "root"


@pytest.mark.parametrize("what", ["object", "record", "facts", "reference"])
def test_an_io_error_is_an_error_and_not_a_mismatch(tmp_path, what):
    (tmp_path / "blob").write_bytes(b"hub")
    with Store(tmp_path / "store") as store:
        done = publish(store, "a", {"x": b"made", "blob": tmp_path / "blob"})
    path = {
        "object": store.root / "objects" / done.files["x"]["sha256"],
        "record": store.root / "keys" / f"{done.key[7:]}.json",
        "facts": store.root / "artifacts" / f"{done.digest[7:]}.json",
        "reference": tmp_path / "blob",
    }[what]
    path.chmod(0o440)  # to be read again

    def look() -> None:
        again = Store(store.root)
        assert again.intact(again.find(done.key))

    inject = ["-o", "/dev/null", "-P", str(path), "-e", "trace=read,readv", "-e", "inject=read,readv:error=EIO"]
    assert "StageFailed: " in (said := forked(look, watch=inject).said)
    assert "Input/output error" in said
    assert path.exists()
    assert not (store.root / "quarantine").exists()
    assert forked(look).code == 0
