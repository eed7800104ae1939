"""Power lost at any moment: an ext4 that writes nothing by itself for ten minutes, so only what was synced survives.

It lies in a file. While everybody who writes there is stopped, the file is copied: what the disk has, without what is
in memory. The copy is mounted, its journal replayed, and looked at. Needs root, mkfs.ext4 and a loop device.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from support.forking import forked
from support.stores import contents, in_memory, publish, record
from support.workshop import environment

import bigpipe
from bigpipe.orchestrator.store.store import Store

FULL = [pytest.mark.fault, pytest.mark.timeout(3600)]
ROOT = Path(__file__).parents[2]
RECIPE = """\
version: 1
name: power
stages:
  download: {uses: download, with: {path: model}}
  shard: {uses: shard, inputs: download, with: {max_shard_size: 100KB, dtype: float16}}
  quantize: {uses: quantize, inputs: shard, with: {scheme: int8}}
  dispatch: {uses: dispatch, inputs: quantize, with: {max_memory: {cpu: 1GiB}, sequence_length: 16}}
"""
OWN_MOUNTS = 0x00020000
"""CLONE_NEWNS of <linux/sched.h>: what is mounted goes with the process."""


def tell(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)


class Disk:
    """An ext4 in a file, mounted at `path`."""

    def __init__(self, folder: Path) -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(OWN_MOUNTS):
            raise OSError(ctypes.get_errno(), "unshare")
        tell("mount", "--make-rprivate", "/")
        self.image, self.path, self._copy, self._after = (
            folder / name for name in ("image", "mounted", "copy", "after")
        )
        self.path.mkdir()
        self._after.mkdir()
        with open(self.image, "wb") as file:
            file.truncate(128 * 2**20)
        tell("mkfs.ext4", "-q", self.image)
        tell("mount", "-o", "loop,commit=600", self.image, self.path)

    @contextmanager
    def after_a_cut(self) -> Iterator[Path]:
        """What is there when power comes back."""
        tell("cp", "--sparse=always", self.image, self._copy)
        tell("mount", "-o", "loop", self._copy, self._after)
        try:
            yield self._after
        finally:
            tell("umount", self._after)


@pytest.fixture
def place(tmp_path) -> Iterator[Path]:
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None or not Path("/dev/loop-control").exists():
        pytest.skip("needs root, mkfs.ext4 and loop devices")
    with in_memory(tmp_path) as found:
        yield found


def in_own_mounts(action: Callable[[], None]) -> None:
    ending = forked(action, seconds=3000)
    if "mount" in ending.said and "CalledProcessError" in ending.said:
        pytest.skip(f"needs a loop device that can be mounted: {ending.said[-200:]}")
    assert ending.code == 0, ending.said


@contextmanager
def stopped(process: int) -> Iterator[None]:
    """Nobody below this process is in a system call: an fsync that was begun has ended."""
    family = [psutil.Process(process)]
    with contextlib.suppress(psutil.NoSuchProcess):
        for member in family:  # grows while it is walked
            member.suspend()
            while any(state(thread) not in "TtZX" for thread in Path(f"/proc/{member.pid}/task").glob("*")):
                time.sleep(0.001)
            family += [child for child in member.children() if child not in family]
    try:
        yield
    finally:
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.resume()


def state(thread: Path) -> str:
    with contextlib.suppress(OSError):
        return (thread / "stat").read_text().rpartition(")")[2].split()[0]
    return "X"


def number_of(done: int) -> dict[str, bytes]:
    return {"config.json": b"{}", "w/1.bin": bytes([done % 256]) * 9000, "w/2.bin": b"%d" % done * 30_000}


def work_without_end(root: Path, tell_of: int) -> None:
    """Publish one artifact after the other, and say so each time."""
    with Store(root) as store:
        done = 0
        while True:
            publish(store, str(done), number_of(done))
            os.write(tell_of, b".")
            done += 1
            time.sleep(0.05)  # what comes next would bring to the disk what this one may have forgotten


@pytest.mark.parametrize("cuts", [4, pytest.param(100, marks=FULL)])
def test_what_was_published_survives_a_cut_at_any_moment(place, seed, cuts):
    def action() -> None:
        disk, dice = Disk(place), random.Random(seed)  # noqa: S311
        heard, told = os.pipe()
        worker = os.fork()
        if worker == 0:
            work_without_end(disk.path / "store", told)
        published = 0
        for _ in range(cuts):
            time.sleep(dice.uniform(0.0, 0.2))
            with stopped(worker):
                os.set_blocking(heard, False)
                with contextlib.suppress(BlockingIOError):
                    published += len(os.read(heard, 65536))
                with disk.after_a_cut() as found, Store(found / "store") as store:
                    assert store.verify().clean
                    for done in range(published + 1):
                        known = store.find(record(str(done)).key)
                        assert known is not None or done >= published, (done, published)
                        if known is not None:
                            assert store.intact(known)
                            assert contents(store, known) == number_of(done)
        os.kill(worker, signal.SIGKILL)
        assert published > cuts // 2

    in_own_mounts(action)


@pytest.mark.fault
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("cuts", [30])
def test_a_recipe_goes_on_after_a_cut_at_any_moment(place, seed, cuts):
    """What its events call finished is there and whole; the rest is made, and the results are the same."""
    shutil.copytree(ROOT / "models" / "quickstart", place / "model")
    (place / "recipe.yaml").write_text(RECIPE)

    def digests(store: Path) -> dict[str, str | None]:
        done = bigpipe.run(place / "recipe.yaml", store=store)
        return {name: state.digest for name, state in done.nodes.items()}

    def action() -> None:
        disk, dice = Disk(place), random.Random(seed)  # noqa: S311
        right, made, done = digests(place / "right"), 0, 0
        while made < cuts:
            store, events = disk.path / f"store-{done}", place / f"events-{done}"
            shutil.rmtree(disk.path / f"store-{done - 1}", ignore_errors=True)
            done += 1
            command = [sys.executable, "-m", "bigpipe", "run", "recipe.yaml", "--events", str(events), "--store", store]
            process = subprocess.Popen(command, cwd=place, env=environment(place), stderr=subprocess.DEVNULL)
            while made < cuts:
                time.sleep(dice.uniform(0.1, 1.0))
                if process.poll() is not None:
                    break
                with stopped(process.pid), disk.after_a_cut() as found:
                    made += 1
                    survives(found / store.name, finished(events), right, digests)
            process.kill()
            process.wait()

    in_own_mounts(action)


def finished(events: Path) -> set[str]:
    lines = events.read_text().splitlines() if events.exists() else []
    told = [json.loads(line) for line in lines if line.endswith("}")]
    return {line["node"] for line in told if line["event"] == "node_finished" and line["status"] == "succeeded"}


def survives(store: Path, known: set[str], right: dict, digests: Callable[[Path], dict]) -> None:
    with Store(store) as opened:
        # The record of a run that goes on, and answers that can be asked again, are not synced.
        torn = {found.path.relative_to(store).parts[0] for found in opened.verify(repair=True).findings}
        assert torn <= {"runs", "memo"}
        assert opened.verify().clean
        there = {item.node: item for _, item in opened.ls()}
        assert known <= there.keys()
        assert all(opened.intact(item) for item in there.values())
    assert digests(store) == right
