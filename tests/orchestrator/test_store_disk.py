"""Disks that are full or read-only: a clear error, nothing lost, nothing poisoned.

A small tmpfs in a mount namespace of its own.
"""

import errno
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from bigpipe.errors import BigpipeError
from bigpipe.orchestrator.store import Store

TESTS = Path(__file__).parents[1]


def python(code, *command, **environment):
    """Runs code in another Python, perhaps under another command; what it printed as JSON, or its exit status."""
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])
    return subprocess.run(
        [*command, sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def on_small_disk(tmp_path, code, options="size=1m"):
    """Runs code with `disk` as the path of a tmpfs of its own. Skips where nobody may mount one."""
    (tmp_path / "disk").mkdir()
    mount = f'mount -t tmpfs -o {options} none {tmp_path / "disk"} && exec "$@"'
    try:
        done = python(
            f"from pathlib import Path\ndisk = Path({str(tmp_path / 'disk')!r})\n{code}",
            "unshare",
            "-Urm",
            "sh",
            "-c",
            mount,
            "sh",
        )
    except FileNotFoundError:
        pytest.skip("unshare is not installed")
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no tmpfs of our own: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


FULL = """
import json, os
from support.stores import contents, fill, publish, record
from bigpipe.errors import StageFailed
from bigpipe.orchestrator.lock.lockfile import locked_digests
from bigpipe.orchestrator.store.store import Store

FILES = {"config.json": b"{}", "w/1.bin": b"1" * 9000, "w/2.bin": b"2" * 9000}
told = []
for free in range(0, 25):
    root = disk / f"store-{free}"
    with Store(root) as store:
        publish(store, "before", {"x": b"before"})
        with store.lock(record("a").key) as work:
            fill(work.out, FILES)
            with open(disk / "ballast", "wb", buffering=0) as ballast:
                try:
                    while True:
                        ballast.write(bytes(4096))
                except OSError:
                    pass
                ballast.truncate(max(0, os.fstat(ballast.fileno()).st_size - 4096 * free))
            failed = None
            try:
                store.publish(record("a"), work.out)
            except StageFailed as error:
                failed = [error.cause, error.cure]
        (disk / "ballast").unlink()
        assert (failed is None) == (store.find(record("a").key) is not None)
        assert store.verify().clean
        with store.lock(record("a").key) as work:
            found = store.find(record("a").key) or store.publish(record("a"), work.out)
            work.done()
        assert store.intact(found), free
        assert contents(store, found) == FILES, free
        assert contents(store, store.find(record("before").key)) == {"x": b"before"}
        told.append(failed)
    import shutil
    shutil.rmtree(root)
print(json.dumps(told))
"""


def test_a_disk_that_fills_while_publishing_says_so_and_loses_nothing(tmp_path):
    """With every number of free pages from none to enough: what was made is published once there is room."""
    told = on_small_disk(tmp_path, FULL)
    assert told[-1] is None
    failures = [failure for failure in told if failure is not None]
    assert len(failures) >= 3
    for cause, cure in failures:
        assert cause.startswith("the disk of the store is full: ")
        assert " free" in cause
        assert "bigpipe gc" in cure


GARBAGE = """
import json
from support.stores import publish
from bigpipe.orchestrator.lock.lockfile import locked_digests
from bigpipe.orchestrator.store.store import Store

with Store(disk / "store") as store:
    publish(store, "a", {"x": bytes(500_000)})
    with open(disk / "ballast", "wb", buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(4096))
        except OSError:
            pass
    print(json.dumps(store.gc(locked_digests).freed_bytes))
"""


def test_garbage_can_be_collected_on_a_full_disk(tmp_path):
    assert on_small_disk(tmp_path, GARBAGE) > 500_000


READ_ONLY = """
import json, os, subprocess
from support.stores import contents, publish, record
from bigpipe.errors import UsageError
from bigpipe.orchestrator.lock.lockfile import locked_digests
from bigpipe.orchestrator.store.store import Store

with Store(disk / "store") as store:
    done = publish(store, "a", {"x": b"made"})
os.chmod(disk / "store" / "objects" / done.files["x"]["sha256"], 0o400)  # to be read again and noted, which cannot be
subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
store = Store(disk / "store")
found = store.find(done.key)
assert store.intact(found) and store.intact(found)
assert contents(store, found) == {"x": b"made"}
assert [item.problem for item in store.verify().findings] == []
assert store.gc(locked_digests, dry_run=True).freed_bytes > 0
told = []
for attempt in (store.enter, lambda: store.gc(locked_digests), store.lock(record("b").key).__enter__):
    try:
        attempt()
    except UsageError as error:
        told.append([error.cause, error.cure])
print(json.dumps(told))
"""


def test_a_read_only_store_can_be_read_and_says_what_it_cannot(tmp_path):
    told = on_small_disk(tmp_path, READ_ONLY)
    assert len(told) == 3
    for cause, cure in told:
        assert cause.startswith("the store may not be used: ")
        assert "Read-only file system" in cause
        assert "--store DIR" in cure


@pytest.mark.parametrize(("number", "succeeds"), [(errno.EINTR, True), (errno.EIO, False)])
def test_a_listing_that_is_broken_off_is_tried_again_and_one_that_fails_is_told(
    tmp_path, monkeypatch, number, succeeds
):
    """Python repeats what a signal broke off, but not opendir(3); file systems that others serve break it off."""
    Store(tmp_path / "store").close()
    listed, broken = os.listdir, {str(tmp_path / "store")}

    def listdir(folder):
        if str(folder) in broken:
            broken.remove(str(folder))
            raise OSError(number, os.strerror(number), str(folder))
        return listed(folder)

    monkeypatch.setattr(os, "listdir", listdir)
    with Store(tmp_path / "store") as store, nullcontext() if succeeds else pytest.raises(BigpipeError, match="store"):
        store.gc(lambda path: frozenset())
    assert not broken
