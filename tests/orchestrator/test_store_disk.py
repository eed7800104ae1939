"""Disks that are full, read-only or broken: a clear error, nothing lost, nothing poisoned.

A small tmpfs in a mount namespace of its own; system calls that strace makes fail or kill at each of their turns.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from support.stores import contents, publish, record

from bigpipe.orchestrator.store.store import Store

FILES = {"config.json": b"{}", "w/1.bin": b"1" * 9000, "w/2.bin": b"2" * 9000}
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


MAKE = """
import os
from pathlib import Path
from support.stores import fill, record
from bigpipe.orchestrator.lock.lockfile import locked_digests
from bigpipe.orchestrator.store.store import Store

root = Path(os.environ["ROOT"])
FILES = {"config.json": b"{}", "w/1.bin": b"1" * 9000, "w/2.bin": b"2" * 9000}
with Store(root) as store, store.lock(record("a").key) as work:
    if not (work.scratch / "finished").exists():
        fill(work.out, FILES)
        (work.scratch / "finished").touch()
    os.write(1, b"publishing")
    if store.find(record("a").key) is None:
        store.publish(record("a"), work.out)
    work.done()
"""
CALLS = [
    "fsync",
    "rename",
    "symlink",
    "chmod",
    "utimensat",
    "unlink",
    "rmdir",
    "mkdir",
    "write",
    "pwrite64",
    "close",
    "flock",
]


def strace(*options):
    found = shutil.which("strace")
    if found is None:
        pytest.skip("strace is not installed")
    return [found, "-f", "-qq", *options]


def turns(tmp_path):
    """How often each system call is made by a publishing, Python's own start included."""
    log = tmp_path / "trace"
    done = python(MAKE, *strace("-o", str(log), "-e", f"trace={','.join(CALLS)}"), ROOT=str(tmp_path / "counted"))
    if done.returncode:
        pytest.skip(f"strace does not work here: {done.stderr[-200:]}")
    return Counter(line.split(maxsplit=1)[1].partition("(")[0] for line in log.read_text().splitlines())


def survives(root):
    """Nothing half done is found; made again, it is right."""
    with Store(root) as store:
        found = store.find(record("a").key)
        if found is not None:
            assert store.intact(found)
            assert contents(store, found) == FILES
        assert store.verify().clean
    again = python(MAKE, ROOT=str(root))
    assert again.returncode == 0, again.stderr
    with Store(root) as store:
        found = store.find(record("a").key)
        assert store.intact(found)
        assert contents(store, found) == FILES
        assert store.verify().clean


@pytest.mark.fault
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fault", ["error=EIO", "error=ENOSPC", "signal=SIGKILL"])
def test_a_fault_at_every_system_call_of_a_publishing(tmp_path, fault):
    for call, count in turns(tmp_path).items():
        # `close` is called by the hundred while Python starts; what follows "publishing" are the last of them.
        for turn in range(max(1, count - 120), count + 1):
            root = tmp_path / f"{call}-{turn}"
            done = python(MAKE, *strace("-o", "/dev/null", "-e", f"inject={call}:{fault}:when={turn}"), ROOT=str(root))
            if "publishing" in done.stdout and done.returncode not in (0, 137, -9):
                assert "StageFailed" in done.stderr or "UsageError" in done.stderr, (
                    call,
                    turn,
                    done.stderr,
                )
            survives(root)
            shutil.rmtree(root)


READ = """
import os, sys
from pathlib import Path
from support.stores import record
from bigpipe.errors import StageFailed
from bigpipe.orchestrator.lock.lockfile import locked_digests
from bigpipe.orchestrator.store.store import Store

store = Store(Path(os.environ["ROOT"]))
try:
    found = store.find(record("a").key)
    print("whole" if found is not None and store.intact(found) else "miss")
except StageFailed as error:
    print(error)
"""


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
    inject = ["-P", str(path), "-e", "trace=read,readv", "-e", "inject=read,readv:error=EIO"]
    said = python(READ, *strace("-o", "/dev/null", *inject), ROOT=str(store.root))
    if said.returncode:
        pytest.skip(f"strace does not work here: {said.stderr[-200:]}")
    assert "Input/output error" in said.stdout
    assert path.exists()
    assert not (store.root / "quarantine").exists()
    assert python(READ, ROOT=str(store.root)).stdout == "whole\n"


LOSE_POWER = """
import os, subprocess
from support.stores import contents, publish
from bigpipe.orchestrator.lock.lockfile import locked_digests
from bigpipe.orchestrator.store.store import Store

def run(*command):
    subprocess.run(command, check=True, capture_output=True)

image, mounted, copy, after = (disk / name for name in ("image", "mounted", "copy", "after"))
mounted.mkdir()
after.mkdir()
with open(image, "wb") as file:
    file.truncate(64 * 2**20)
run("mkfs.ext4", "-q", str(image))
run("mount", "-o", "loop,commit=600", str(image), str(mounted))
told = []
try:
    for number in range(6):
        files = {"config.json": b"{}", "w/1.bin": bytes([number]) * 9000, "w/2.bin": os.urandom(300_000)}
        with Store(mounted / "store") as store:
            done = publish(store, str(number), files)
        run("cp", "--sparse=always", str(image), str(copy))  # what the disk has; the rest is in memory, and lost
        run("mount", "-o", "loop", str(copy), str(after))
        try:
            with Store(after / "store") as store:
                found = store.find(done.key)
                told.append(found == done and store.intact(found) and contents(store, found) == files
                            and store.verify().clean)
        finally:
            run("umount", str(after))
finally:
    run("umount", str(mounted))
import json
print(json.dumps(told))
"""


@pytest.mark.fault
def test_power_lost_right_after_publishing_keeps_what_is_recorded(tmp_path):
    """An ext4 that writes nothing by itself for ten minutes: only what was synced survives."""
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("needs root and mkfs.ext4")
    done = python(f"from pathlib import Path\ndisk = Path({str(tmp_path)!r})\n{LOSE_POWER}")
    if "CalledProcessError" in done.stderr and "mount" in done.stderr:
        pytest.skip(f"no loop device: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True] * 6
