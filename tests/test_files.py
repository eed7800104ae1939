"""Writing so that it stays written: what a reader, a crash and a full disk meet."""

from __future__ import annotations

import ast
import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bigpipe.errors import DoesNotFit, StageFailed, UsageError
from bigpipe.files import (
    FileWriter,
    LogFile,
    copy_file,
    explain,
    explained,
    give_name,
    is_partial,
    lies_in,
    link,
    make_directory,
    only_a_shell_reads,
    partial_name,
    require_space,
    write_file,
    write_named,
)


def test_a_file_that_somebody_names_is_written_where_its_link_leads_with_its_mode(tmp_path: Path) -> None:
    site, name = tmp_path / "site" / "page.html", tmp_path / "page.html"
    name.symlink_to(site)
    assert write_named(name, "first") == 5
    site.chmod(0o640)
    assert write_named(name, "again") == 5
    assert (name.is_symlink(), site.read_text(), stat.S_IMODE(site.stat().st_mode)) == (True, "again", 0o640)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


class TestWholeFiles:
    @pytest.mark.parametrize("durable", [True, False])
    def test_a_file_is_replaced_and_nothing_is_left_beside_it(self, tmp_path, durable):
        path = tmp_path / "record"
        path.write_text("old")
        assert write_file(path, "nüw", durable=durable) == (hashlib.sha256("nüw".encode()).hexdigest(), 4)
        assert path.read_text() == "nüw"
        assert names(tmp_path) == ["record"]

    def test_a_link_is_replaced_and_what_it_leads_to_stays(self, tmp_path):
        (tmp_path / "blob").write_text("theirs")
        (tmp_path / "file").symlink_to("blob")
        write_file(tmp_path / "file", b"ours")
        assert (tmp_path / "blob").read_text() == "theirs"
        assert not (tmp_path / "file").is_symlink()

    def test_a_failed_write_leaves_the_old_file_and_nothing_else(self, tmp_path):
        (tmp_path / "taken").mkdir()
        with pytest.raises(IsADirectoryError):
            write_file(tmp_path / "taken", b"content")
        assert names(tmp_path) == ["taken"]

    def test_several_writers_of_one_name_never_mix(self, tmp_path):
        path, contents = tmp_path / "file", [bytes([number]) * 100_000 for number in range(8)]
        threads = [threading.Thread(target=write_file, args=(path, content)) for content in contents]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert path.read_bytes() in contents
        assert names(tmp_path) == ["file"]

    def test_the_mode_is_that_of_any_new_file_or_the_one_asked_for(self, tmp_path):
        write_file(tmp_path / "ours", b"")
        write_file(tmp_path / "private", b"", mode=0o600)
        (tmp_path / "any").touch()
        assert (tmp_path / "ours").stat().st_mode == (tmp_path / "any").stat().st_mode
        assert (tmp_path / "private").stat().st_mode & 0o777 == 0o600

    def test_unfinished_names_are_told_apart(self, tmp_path):
        assert is_partial(partial_name(tmp_path / "file").name)
        assert partial_name(tmp_path / "file") != partial_name(tmp_path / "file")
        assert not is_partial("file")
        assert not is_partial(".gitattributes")

    @pytest.mark.parametrize("path", [".", "", "..", "/", "../.."])
    def test_a_path_that_is_a_directory_by_its_name_is_one_for_the_errors_too(self, path):
        with pytest.raises(UsageError, match="Is a directory"), explained(Path(path)):
            write_file(Path(path), b"")


class TestSyncing:
    """macOS alone has F_FULLFSYNC; any command of fcntl that works, or does not, stands for it here."""

    def test_where_there_is_a_full_sync_it_is_used(self, tmp_path, monkeypatch):
        monkeypatch.setattr(fcntl, "F_FULLFSYNC", fcntl.F_GETFD, raising=False)
        monkeypatch.setattr(os, "fsync", None)
        write_file(tmp_path / "file", b"content")
        assert names(tmp_path) == ["file"]

    def test_a_drive_without_one_is_synced_as_any(self, tmp_path, monkeypatch):
        synced = []
        monkeypatch.setattr(fcntl, "F_FULLFSYNC", 1 << 20, raising=False)
        monkeypatch.setattr(os, "fsync", synced.append)
        write_file(tmp_path / "file", b"content")
        assert len(synced) == 2


class TestLargeFiles:
    def test_a_file_has_its_name_only_once_it_is_whole(self, tmp_path):
        with FileWriter(tmp_path / "file", 6) as writer:
            writer.write(b"def", 3)
            writer.write(b"abc", 0)
            (partial,) = tmp_path.iterdir()
            assert is_partial(partial.name)
            assert partial.read_bytes() == b"abcdef"
            writer.settle()
        assert (tmp_path / "file").read_bytes() == b"abcdef"
        assert names(tmp_path) == ["file"]

    def test_an_error_removes_what_was_written(self, tmp_path):
        with pytest.raises(TypeError), FileWriter(tmp_path / "file") as writer:
            writer.write("no bytes", 0)
        assert names(tmp_path) == []

    def test_writers_of_one_file_do_not_meet(self, tmp_path):
        with FileWriter(tmp_path / "file") as one, FileWriter(tmp_path / "file") as other:
            one.write(b"abc", 0)
            other.write(b"longer", 0)
            other.settle()
            one.settle()
        assert (tmp_path / "file").read_bytes() == b"abc"
        assert names(tmp_path) == ["file"]

    def test_a_name_that_cannot_be_had_is_an_error_with_a_cure(self, tmp_path):
        (tmp_path / "file").mkdir()
        cause = f"cannot be where it is named: {tmp_path / 'file'}: Is a directory"
        with pytest.raises(UsageError, match=cause), FileWriter(tmp_path / "file") as writer:
            writer.settle()
        assert names(tmp_path) == ["file"]


class TestCopies:
    def test_bytes_digest_and_progress(self, tmp_path):
        source, content = tmp_path / "source", os.urandom(9 * 2**20)
        source.write_bytes(content)
        seen: list[int] = []
        copied = copy_file(source, tmp_path / "made" / "copy", progress=seen.append)
        assert copied == (hashlib.sha256(content).hexdigest(), len(content))
        assert (tmp_path / "made" / "copy").read_bytes() == content
        assert sum(seen) == len(content)

    def test_a_source_that_changes_meanwhile_is_refused(self, tmp_path):
        source = tmp_path / "source"
        source.write_bytes(b"abc")

        def touch(size):
            os.utime(source, ns=(0, 0))

        with pytest.raises(StageFailed, match="changed while it was copied"):
            copy_file(source, tmp_path / "copy", progress=touch)
        assert names(tmp_path) == ["source"]


class TestLogs:
    def test_what_was_appended_is_kept_in_order_over_reopening(self, tmp_path):
        for line in (b"one\n", b"two\n"):
            with LogFile(tmp_path / "log") as log:
                log.append(line, durable=True)
        assert (tmp_path / "log").read_bytes() == b"one\ntwo\n"

    def test_what_may_wait_comes_with_the_next_or_at_the_end(self, tmp_path):
        with LogFile(tmp_path / "log") as log:
            log.append(b"one\n", later=True)
            assert (tmp_path / "log").read_bytes() == b""
            log.append(b"two\n")
            assert (tmp_path / "log").read_bytes() == b"one\ntwo\n"
            log.append(b"three\n", later=True)
        assert (tmp_path / "log").read_bytes() == b"one\ntwo\nthree\n"


class TestNames:
    def test_a_link_takes_the_place_of_what_was_there(self, tmp_path):
        (tmp_path / "one").write_text("1")
        (tmp_path / "name").write_text("old")
        link("one", tmp_path / "name")
        link("one", tmp_path / "name")
        assert (tmp_path / "name").readlink() == Path("one")
        assert names(tmp_path) == ["name", "one"]

    def test_a_second_name_outlives_the_first(self, tmp_path):
        (tmp_path / "one").write_text("1")
        (tmp_path / "two").write_text("old")
        give_name(tmp_path / "one", tmp_path / "two")
        (tmp_path / "one").unlink()
        assert (tmp_path / "two").read_text() == "1"
        assert names(tmp_path) == ["two"]

    def test_directories_are_made_with_their_parents_and_a_file_in_the_way_is_an_error(self, tmp_path):
        make_directory(tmp_path / "a" / "b" / "c", mode=0o700)
        make_directory(tmp_path / "a" / "b" / "c")
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700
        (tmp_path / "file").touch()
        with pytest.raises(FileExistsError):
            make_directory(tmp_path / "file")


class TestErrors:
    @pytest.mark.parametrize(
        ("number", "kind", "cause", "cure"),
        [
            (errno.ENOSPC, StageFailed, "the disk is full: ", "free space there, or work on another disk"),
            (errno.EDQUOT, StageFailed, "the disk is full: ", "free space there, or work on another disk"),
            (errno.EROFS, UsageError, "a file may not be used: ", "make it readable and writable for you"),
            (errno.EACCES, UsageError, "a file may not be used: ", "make it readable and writable for you"),
            (errno.EIO, StageFailed, "a file cannot be read or written: ", "check the disk"),
        ],
    )
    def test_what_the_system_says_becomes_an_error_with_a_cure(self, tmp_path, number, kind, cause, cure):
        with pytest.raises(kind) as caught, explained(tmp_path / "x"):
            raise OSError(number, os.strerror(number))
        assert type(caught.value) is kind
        assert caught.value.cause.startswith(f"{cause}{tmp_path / 'x'}: ")
        assert caught.value.cure.startswith(cure)

    def test_the_owner_is_named_and_says_how_to_make_room(self, tmp_path):
        error = explain(
            OSError(errno.ENOSPC, "full"), tmp_path, 5_000_000, owner="the store", free="run gc", other="pass --store"
        )
        assert error.cause.startswith("the disk of the store is full: ")
        assert error.cause.endswith(", 5.0 MB needed")
        assert error.cure == "run gc, or pass --store"

    def test_space_is_asked_for_before(self, tmp_path):
        require_space(tmp_path / "not" / "yet", 1)
        with pytest.raises(DoesNotFit, match="TB are to be written, and the disk has"):
            require_space(tmp_path / "not" / "yet", 10**21)


STEPS = """
import sys
from pathlib import Path
from bigpipe.files import FileWriter, write_file
folder = Path(sys.argv[1])
write_file(folder / "small", b"content")
with FileWriter(folder / "large", 5) as writer:
    writer.write(b"bytes", 0)
    writer.settle()
"""


@pytest.mark.fault
def test_bytes_are_on_the_disk_before_their_name_and_the_name_before_the_return(tmp_path):
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    calls = "write,pwrite64,fsync,fdatasync,rename,renameat,renameat2"
    log = tmp_path / "log"
    done = subprocess.run(
        [strace, "-y", "-e", f"trace={calls}", "-o", log, sys.executable, "-c", STEPS, tmp_path], check=False
    )
    if done.returncode:
        pytest.skip("strace does not work here")
    steps = [line.partition("(")[0] for line in log.read_text().splitlines() if str(tmp_path) in line]
    assert steps == ["write", "fsync", "rename", "fsync", "pwrite64", "fsync", "rename", "fsync"]


ROOT = Path(__file__).parents[1]
WRITING = {"write_text", "write_bytes", "rename", "renames", "fsync", "fdatasync", "ftruncate", "truncate", "pwrite"}
"""Methods and functions of `os` that write, rename or sync whatever they are called on."""
OF_OS = {"os.write", "os.replace", "os.link", "os.posix_fallocate", "os.copy_file_range", "os.sendfile"}
OF_OTHERS = {"shutil.copy", "shutil.copy2", "shutil.copyfile", "shutil.copytree", "shutil.move", "tempfile.mkstemp"}
FLAGS = {"O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC", "O_APPEND"}
ELSEWHERE = {
    "commandline/streams.py: os.open": "the null device, in place of a closed stream",
    "orchestrator/launch/worker.py: os.open": "a pipe that the command made",
    "orchestrator/launch/ranks.py: os.open": "pipes",
    "orchestrator/launch/lifeline.py: write_text": "a setting of the kernel, in /proc",
    "orchestrator/store/locks.py: os.pwrite": "who holds a lock, in the lock file; nothing depends on it",
    "bigmodel/publishing/destinations.py: open": "fsspec's own files: object stores",
    "bigmodel/inference/sharing.py: os.open": "a queue of ranks",
    "bigmodel/inference/sharing.py: os.write": "a byte for each batch that was taken; records say what is finished",
    "orchestrator/sinks/child.py: os.write": "a pipe to the command",
    "plugins/commanding.py: shutil.copy2": "what a tool works on, with its modes, in the folder of one attempt",
}
"""What else writes, and what it writes to."""


def writes(path: Path) -> set[str]:
    """The calls in a source file that open for writing, write, rename or sync files."""
    return {name for call in ast.walk(ast.parse(path.read_text())) if (name := written_by(call)) is not None}


def written_by(call: ast.AST) -> str | None:
    if not isinstance(call, ast.Call):
        return None
    name = ast.unparse(call.func)
    last = name.rpartition(".")[2]
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    words = {item.value for item in given if isinstance(item, ast.Constant) and isinstance(item.value, str)}
    flags = {item.attr for part in given for item in ast.walk(part) if isinstance(item, ast.Attribute)}
    if last == "open" and (any(re.fullmatch(r"[rwaxbt+]*[wax+][rwaxbt+]*", word) for word in words) or flags & FLAGS):
        return "os.open" if name == "os.open" else "open"
    if last.endswith("TemporaryFile") or name in OF_OS | OF_OTHERS:
        return name
    if last == "replace" and len(given) == 1 and not words:  # Path.replace; a string's takes two
        return None if name in ("replace", "dataclasses.replace") else last
    if last not in WRITING or "." not in name:
        return None
    return name if name.startswith("os.") else last


def test_nothing_else_writes_renames_or_syncs_files():
    rooms = [
        path for room in ("commandline", "orchestrator", "bigmodel", "plugins") for path in (ROOT / room).rglob("*.py")
    ]
    others = [path for path in (ROOT / "src" / "bigpipe").glob("*.py") if path.name not in ("files.py", "cli.py")]
    found = {
        f"{path.relative_to(ROOT)}: {name}" for path in [*rooms, *others, ROOT / "cli.py"] for name in writes(path)
    }
    assert found == set(ELSEWHERE)


@pytest.mark.parametrize(
    "source",
    [
        "path.write_text('x')", "open(path, 'w')", "path.open(mode='ab')", "os.open(path, os.O_RDWR | os.O_CREAT)",
        "os.replace(one, other)", "path.rename(other)", "path.replace(other)", "os.fsync(file)",
        "tempfile.NamedTemporaryFile(dir=folder)", "shutil.copyfile(one, other)", "os.pwrite(file, piece, 0)",
    ],
)  # fmt: skip
def test_each_way_to_write_is_seen(tmp_path, source):
    (tmp_path / "module.py").write_text(source)
    assert len(writes(tmp_path / "module.py")) == 1


@pytest.mark.parametrize(
    "source", ["open(path, 'rb')", "text.replace('a', 'b')", "replace(plan, size=1)", "path.open()"]
)
def test_reading_is_not_writing(tmp_path, source):
    (tmp_path / "module.py").write_text(source)
    assert writes(tmp_path / "module.py") == set()


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_a_directory_is_the_same_by_whatever_name(tmp_path: Path) -> None:
    """A directory that is mounted a second time has two names that no link tells to be one."""
    for name in ("model/deep", "twin"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to("model")
    code = (
        "from bigpipe.files import lies_in; from pathlib import Path; print(lies_in(Path('twin/new'), Path('model')))"
    )
    told = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f'mount --bind model twin && "{sys.executable}" -c "{code}"'],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    model = tmp_path / "model"
    assert [lies_in(tmp_path / way, model) for way in ("link/deep/new", "twin/../model", "mod", "twin", "..")] == [
        True, True, False, False, False,
    ]  # fmt: skip
    if told.returncode:
        pytest.skip("nothing may be mounted here")
    assert told.stdout == "True\n"


@pytest.mark.parametrize("address", ["s3://bucket/model", "hf://org/model", "https://example.org/x", "gs:/a"])
def test_an_address_is_no_directory_of_this_machine(tmp_path: Path, address: str) -> None:
    """`Path("s3://a/b")` is `s3:/a/b`, which could be made like any other."""
    with pytest.raises(UsageError, match=r"begins an address, and a directory of this machine is meant") as error:
        make_directory(tmp_path / address)
    assert "`save`" in error.value.cure
    assert not list(tmp_path.iterdir())
    (tmp_path / "gs:").mkdir()
    make_directory(tmp_path / "gs:/a")  # somebody has called a directory so
    make_directory(tmp_path / "12:30")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("~/models", "HOME"), ("$HOME/x", "HOME"), ("s3://$BUCKET/x", "BUCKET"), ("a/$RUN_1", "RUN_1"), ("~", "HOME"),
        ("a/b", ""), ("~old/x", ""), ("a/~/b", ""), ("cost$/x", ""), ("$1/x", ""), ("", ""),
    ],
)  # fmt: skip
def test_what_only_a_shell_reads_is_told(path: str, name: str) -> None:
    assert only_a_shell_reads(path).startswith(f"write ${{env.{name}}} for " if name else "")
    assert bool(only_a_shell_reads(path)) == bool(name)
    assert bool(only_a_shell_reads(path, home=False)) == ("$" in path and bool(name))
