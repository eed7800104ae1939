"""`save` killed, or failing, at every system call: its destination holds the old version or the new one, whole."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from support.forking import Ending, forked, turns
from support.hub import LoopbackHub

from bigpipe.bigmodel.hub import Hub
from bigpipe.bigmodel.publishing import Contents, Destination, Directory, Provenance, publish
from bigpipe.bigmodel.publishing.destinations import FileSystem
from bigpipe.bigmodel.publishing.upload import HubRepository

CALLS = ("fsync", "rename", "renameat2", "symlink", "link", "unlink", "rmdir", "mkdir", "write", "pwrite64",
         "fallocate", "openat", "close", "flock", "getdents64", "sendfile")  # fmt: skip
PROVENANCE = Provenance(recipe="kept", node="save")


def model(folder: Path, letter: str) -> Path:
    """Several files, one in a folder of its own; the versions share some names, and each has a file of its own."""
    (folder / "sub").mkdir(parents=True)
    files = {"config.json": "{}", "sub/part": letter * 9000, f"only-{letter}": letter, "weights.bin": letter * 70_000}
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def local(place: Path) -> Destination:
    return Directory(place / "model")


def remote(place: Path) -> Destination:
    """A file system that only fsspec knows, where nothing but single files can be replaced at once."""
    from fsspec.implementations.dirfs import DirFileSystem
    from fsspec.implementations.local import LocalFileSystem

    (place / "far").mkdir(exist_ok=True)
    system = DirFileSystem(str(place / "far"), LocalFileSystem(), skip_instance_cache=True)
    return FileSystem("far://model", system, "m")


def save(target: Destination, source: Path, scratch: Path) -> None:
    publish(Contents(model=source), target, PROVENANCE, scratch=scratch)


def versions(place: Path) -> list[str]:
    """Every whole version that lies anywhere in the destination's folder."""
    found = []
    for path in place.rglob("weights.bin"):
        folder, letter = path.parent, path.read_text()[:1]
        whole = {"config.json": 2, "sub/part": 9000, f"only-{letter}": 1, "weights.bin": 70_000}
        right = all((folder / name).is_file() and (folder / name).stat().st_size == n for name, n in whole.items())
        if right and set((folder / "sub/part").read_text()) == {letter} == set(path.read_text()):
            found.append(letter)
    return found


def named(target: Destination) -> str:
    """The one whole version under the destination's own name."""
    listed = {name for name in target.listing() or {} if name not in ("README.md", "provenance.json")}
    letter = target.read("weights.bin")[:1].decode()
    assert listed == {"config.json", "sub/part", f"only-{letter}", "weights.bin"}
    assert {target.read("sub/part"), target.read("weights.bin")} == {letter.encode() * 9000, letter.encode() * 70_000}
    files = json.loads(target.read("provenance.json"))["files"]
    assert all(sha256(target.read(name)).hexdigest() == files[name]["sha256"] for name in listed)
    return letter


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    return in_memory


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "scratch").mkdir()
    return model(tmp_path / "old", "a"), model(tmp_path / "new", "b")


def prepared(tmp_path: Path, where: Callable[[Path], Destination], old: Path, number: int) -> Path:
    place = tmp_path / f"place-{number}"
    place.mkdir()
    save(where(place), old, tmp_path / "scratch")
    return place


WHERE = pytest.mark.parametrize("where", [local, remote])


def sweep(
    tmp_path: Path, two: tuple[Path, Path], where: Callable[[Path], Destination], fault: str, calls: tuple[str, ...],
    *also: str,
) -> int:  # fmt: skip
    """A fault at each turn of each call; then a second run that fails at once; then one that does not."""
    old, new = two
    scratch, tried = tmp_path / "scratch", 0

    def saving(place: Path, *faults: str) -> Ending:
        watch = [part for one in faults for part in ("-e", f"inject={one}")]
        return forked(lambda: save(where(place), new, scratch), watch=["-o", os.devnull, *watch])

    save(where(prepared(tmp_path, where, old, -1)), new, scratch)  # everything is imported
    place = prepared(tmp_path, where, old, 0)
    counted = turns(lambda: save(where(place), new, scratch), calls, tmp_path / "calls")
    points = [point for point, shown in counted.items() if shown or "signal" in fault]
    if also:  # there is more to do then
        points += [(call, 1 + sum(call == other for other, _ in points) + more) for call in calls for more in range(2)]
    for call, turn in points:
        tried += 1
        place = prepared(tmp_path, where, old, tried)
        ended = saving(place, f"{call}:{fault}:when={turn}", *also)
        told = f"{call} {turn}: {ended}"
        assert ended.in_order, told
        assert versions(place), told
        assert where is remote or also or named(where(place)), told  # its name is never without one
        failing = saving(place, "pwrite64,write,sendfile:error=ENOSPC:when=2+")  # the disk is full
        assert versions(place), f"{told}, then {failing}"
        save(where(place), new, scratch)
        assert named(where(place)) == "b", told
        assert not list(place.glob(".*bigpipe*")) + list(place.glob("*/*/.bigpipe*")), told
        shutil.rmtree(place)
    return tried


@WHERE
def test_a_kill_around_the_swap_leaves_a_whole_version(tmp_path, two, where) -> None:
    assert sweep(tmp_path, two, where, "signal=SIGKILL", ("rename", "renameat2", "unlink", "sendfile")) >= 7


def test_a_kill_leaves_a_whole_version_where_directories_cannot_be_exchanged(tmp_path, two) -> None:
    """As on NFS: the old version is put aside first, and put back where the new one does not come."""
    assert sweep(tmp_path, two, local, "signal=SIGKILL", ("rename",), "renameat2:error=EINVAL") >= 3


@pytest.mark.fault
@pytest.mark.timeout(7200)
@WHERE
@pytest.mark.parametrize("fault", ["signal=SIGKILL", "error=ENOSPC", "error=EIO"])
def test_a_fault_at_every_system_call_leaves_a_whole_version(tmp_path, two, where, fault) -> None:
    tried = sweep(tmp_path, two, where, fault, CALLS)
    print(f"{tried} turns of {where.__name__} with {fault}")  # noqa: T201
    assert tried > 80


class Watched(LoopbackHub):
    """Kills its client at a request, before it has done what that asks for, or after."""

    victim = 0
    left = -1

    def take_fault(self, method: str, path: str):
        self.left -= 1
        if self.left == 0:
            os.kill(self.victim, signal.SIGKILL)
            time.sleep(0.05)
        return super().take_fault(method, path)


def save_to_hub(hub: Watched, source: Path, folder: Path) -> HubRepository:
    asked = Hub(hub.url, folder / "cache", "secret-token")
    target = HubRepository("ada/kept", asked)
    scratch = folder / "scratch"
    shutil.rmtree(scratch / "upload", ignore_errors=True)
    publish(Contents(model=source), target, PROVENANCE, scratch=scratch)
    return target


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own, in its LFS upload
@pytest.mark.parametrize("every", [5, pytest.param(1, marks=[pytest.mark.fault, pytest.mark.timeout(3600)])])
def test_a_kill_at_every_request_leaves_one_commit_or_the_other(tmp_path, two, monkeypatch, every) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    old, new = two
    with Watched() as hub:
        hub.users["secret-token"] = "ada"
        weights = sha256((new / "weights.bin").read_bytes()).hexdigest()
        seen = []
        for turn in itertools.count(1, every):
            target = save_to_hub(hub, old, tmp_path)
            assert named(target) == "a"
            hub.objects.pop(weights, None)  # so that it is sent again
            code = killed(hub, turn, lambda: save_to_hub(hub, new, tmp_path))
            seen.append(named(target))
            save_to_hub(hub, new, tmp_path)
            assert named(target) == "b", turn
            if code == 0:
                break
            assert code == -signal.SIGKILL
        assert seen[0] == "a"
        assert seen[-1] == "b"
        assert len(seen) > 10 / every


def killed(hub: Watched, turn: int, work: Callable[[], object]) -> int:
    ready, go = os.pipe()
    hub.victim = os.fork()
    if hub.victim == 0:
        os.close(go)
        os.read(ready, 1)
        with contextlib.suppress(BaseException):
            work()
            os._exit(0)
        os._exit(1)
    os.close(ready)
    hub.left = turn
    os.close(go)
    code = os.waitstatus_to_exitcode(os.waitpid(hub.victim, 0)[1])
    time.sleep(0.2)  # the request that it was killed at is served all the same
    hub.left = -1
    return code
