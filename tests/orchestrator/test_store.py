"""What is published is there, whole, read-only, and noticed when it changes."""

import hashlib
import os
import random
import signal
import stat
import threading
import time

import pytest
from support.stores import contents, fill, in_child, in_memory, killed_at, objects, publish, record

from bigpipe.errors import BigpipeError, Interrupted, StageFailed, UsageError
from bigpipe.orchestrator.hashing import digest_of
from bigpipe.orchestrator.locks import Lock
from bigpipe.orchestrator.store import KeyRecord, Store, default_root


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store") as opened:
        yield opened


@pytest.fixture
def memory(tmp_path):
    with in_memory(tmp_path) as place:
        yield place


def sha256(data):
    return hashlib.sha256(data).hexdigest()


class TestPublishing:
    def test_what_is_published_is_found_again(self, store):
        files = {"config.json": b"{}", "weights/a.bin": b"aaaa", "weights/b.bin": b"bb"}
        done = publish(store, "shard", files)
        found = store.find(done.key)
        assert found == done
        assert found.files["weights/a.bin"] == {"sha256": sha256(b"aaaa"), "size": 4}
        assert found.digest == digest_of(
            "artifact", [[name, sha256(files[name]), len(files[name])] for name in sorted(files)]
        )
        assert store.intact(found)
        assert contents(store, found) == files

    def test_nothing_is_created_before_it_is_needed(self, tmp_path):
        opened = Store(tmp_path / "a" / "store")
        assert opened.find(record("x").key) is None
        assert not opened.with_partial(record("x").partial)
        assert opened.last(tmp_path / "m.yaml", "m", "x") is None
        assert opened.ls() == []
        assert opened.gc(dry_run=True).freed == ()
        assert not (tmp_path / "a").exists()

    def test_the_store_is_private_and_its_objects_are_read_only_with_one_name_each(self, store):
        publish(store, "shard", {"a": b"a", "b/c": b"c"})
        assert stat.S_IMODE(store.root.stat().st_mode) == 0o700
        for path in objects(store):
            facts = path.lstat()
            assert stat.S_ISREG(facts.st_mode)
            assert (stat.S_IMODE(facts.st_mode), facts.st_nlink) == (0o444, 1)

    def test_an_artifact_is_links_into_the_objects_and_a_store_can_be_moved(self, store, tmp_path):
        done = publish(store, "shard", {"a": b"a", "b/c": b"c"})
        links = [path for path in store.artifact_path(done.digest).rglob("*") if not path.is_dir()]
        assert all(path.is_symlink() and not os.path.isabs(path.readlink()) for path in links)
        store.close()
        store.root.rename(tmp_path / "elsewhere")
        moved = Store(tmp_path / "elsewhere")
        assert moved.intact(moved.find(done.key))
        assert contents(moved, done) == {"a": b"a", "b/c": b"c"}

    def test_equal_bytes_are_kept_once(self, store):
        one = publish(store, "one", {"a": b"same", "b": b"same"})
        other = publish(store, "other", {"c/d": b"same"})
        assert len(objects(store)) == 1
        assert store.intact(one)
        assert store.intact(other)

    def test_two_computations_may_give_the_same_artifact(self, store):
        one, other = publish(store, "one", {"a": b"x"}), publish(store, "other", {"a": b"x"})
        assert one.digest == other.digest
        assert one.key != other.key

    def test_files_a_stage_hashed_itself_are_not_read_again(self, store):
        said = "ab" * 32  # would anybody look, it would be found out
        done = publish(store, "shard", {"a": b"12345"}, {"a": (said, 5)})
        assert done.files["a"]["sha256"] == said

    @pytest.mark.parametrize("known", [("ab" * 32, 4), ("AB" * 32, 5), ("../../x", 5)])
    def test_a_report_that_cannot_be_true_is_refused(self, store, known):
        with pytest.raises(StageFailed, match="a in the output has 5 bytes"):
            publish(store, "shard", {"a": b"12345"}, {"a": known})

    def test_a_reported_file_that_is_not_there_is_refused(self, store):
        with pytest.raises(StageFailed, match="did not write: b"):
            publish(store, "shard", {"a": b"12345"}, {"b": (sha256(b""), 0)})

    def test_a_kind_without_output_has_a_record_only(self, store):
        done = publish(store, "check", {}, artifact_type=None)
        assert done.digest is None
        assert store.intact(store.find(done.key))
        assert not (store.root / "artifacts").exists()

    def test_an_empty_artifact_is_one_too(self, store):
        done = publish(store, "nothing", {})
        assert store.intact(store.find(done.key))
        assert store.artifact_path(done.digest).is_dir()

    def test_metrics_survive_even_where_json_has_no_number_for_them(self, store):
        publish(store, "a", {}, metrics={"perplexity": float("inf"), "loss": 0.1})
        assert store.find(record("a").key).metrics == {"perplexity": float("inf"), "loss": 0.1}

    def test_a_partial_key_is_known_once_a_record_has_it(self, store):
        assert not store.with_partial(record("shard").partial)
        publish(store, "shard", {"a": b"a"})
        assert store.with_partial(record("shard").partial)

    def test_work_done_again_replaces_the_record(self, store):
        publish(store, "a", {"x": b"1"}, run="first")
        publish(store, "a", {"x": b"2"}, run="second")
        found = store.find(record("a").key)
        assert found.run == "second"
        assert contents(store, found) == {"x": b"2"}

    def test_an_object_somebody_wrote_to_is_replaced_by_the_good_bytes_at_hand(self, store):
        publish(store, "a", {"x": b"good"})
        objects(store)[0].write_bytes(b"evil")
        done = publish(store, "b", {"y": b"good"})
        assert contents(store, done) == {"y": b"good"}
        assert store.intact(store.find(record("a").key))

    def test_an_input_that_changed_since_it_was_found_is_not_passed_on(self, store):
        first = publish(store, "shard", {"config.json": b"{}"})
        config = store.artifact_path(first.digest) / "config.json"
        with open(config, "r+b") as file:  # a stage that writes through a link (root may)
            file.write(b"[]")
        with pytest.raises(StageFailed, match="vanished or changed"):
            publish(store, "quantize", {"config.json": config})
        assert store.find(record("quantize").key) is None

    def test_a_reference_written_to_while_it_is_published_is_noticed(self, store, tmp_path):
        blob = tmp_path / "blob"
        blob.write_bytes(b"weights")
        said = {"w": (sha256(b"weights"), 7)}
        done = publish(store, "download", {"w": blob, "x": b""}, said)
        assert store.intact(done)
        os.utime(blob, ns=(0, 0))
        blob.write_bytes(b"weighty")
        assert not store.intact(done)

    def test_a_store_whose_parts_lie_elsewhere_works_too(self, store, tmp_path):
        """People move the large folder to a large disk and leave a link."""
        (tmp_path / "large").mkdir()
        store.root.mkdir()
        (store.root / "objects").symlink_to(tmp_path / "large")
        first = publish(store, "one", {"a": b"1", "b": b"2"})
        second = publish(store, "two", {"a": store.artifact_path(first.digest) / "a"})
        assert store.artifact_path(second.digest).joinpath("a").readlink().parts[:2] == ("..", "..")
        assert len(list((tmp_path / "large").iterdir())) == 2
        assert store.intact(second)

    def test_an_output_on_another_file_system_is_copied(self, store):
        from tempfile import TemporaryDirectory

        if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == store.root.parent.stat().st_dev:
            pytest.skip("needs a second file system")
        with TemporaryDirectory(dir="/dev/shm") as other:
            from pathlib import Path

            fill(Path(other), {"a": b"far"})
            done = store.publish(record("far"), Path(other))
            assert contents(store, done) == {"a": b"far"}
            assert os.listdir(other) == []


class TestLinks:
    def test_files_outside_the_store_are_referenced_where_they_lie(self, store, tmp_path):
        blob = tmp_path / "hub" / "blobs" / "abc"
        fill(tmp_path / "hub", {"blobs/abc": b"weights", "snapshots/1/model.bin": blob})
        before = blob.stat()
        done = publish(store, "download", {"model.bin": tmp_path / "hub/snapshots/1/model.bin", "own": b"own"})
        after = blob.stat()
        assert (before.st_mode, before.st_ino, before.st_nlink, before.st_mtime_ns, before.st_ctime_ns) == (
            after.st_mode, after.st_ino, after.st_nlink, after.st_mtime_ns, after.st_ctime_ns,
        )  # fmt: skip
        assert store.artifact_path(done.digest).joinpath("model.bin").readlink() == blob
        assert [path.name for path in objects(store)] == [sha256(b"own")]
        assert done.files["model.bin"]["sha256"] == sha256(b"weights")
        assert store.intact(done)

    def test_a_referenced_file_that_vanished_is_a_miss(self, store, tmp_path):
        (tmp_path / "blob").write_bytes(b"weights")
        done = publish(store, "download", {"model.bin": tmp_path / "blob"})
        (tmp_path / "blob").rename(tmp_path / "gone")
        assert not store.intact(store.find(done.key))
        (tmp_path / "gone").rename(tmp_path / "blob")
        assert store.intact(store.find(done.key))

    def test_a_referenced_file_that_changed_is_a_miss_and_stays_where_it_is(self, store, tmp_path):
        (tmp_path / "blob").write_bytes(b"weights")
        done = publish(store, "download", {"model.bin": tmp_path / "blob"})
        time.sleep(0.02)
        (tmp_path / "blob").write_bytes(b"weighty")
        assert not store.intact(store.find(done.key))
        assert (tmp_path / "blob").read_bytes() == b"weighty"

    def test_a_reference_hashed_before_is_not_read_again(self, store, tmp_path):
        (tmp_path / "blob").write_bytes(b"weights")
        time.sleep(0.06)  # a file written this very moment is never trusted
        publish(store, "one", {"a": tmp_path / "blob"})
        assert sha256(b"weights").encode() in (store.memo / "files.jsonl").read_bytes()

    def test_a_link_to_an_inputs_file_shares_its_object(self, store):
        first = publish(store, "shard", {"config.json": b"{}", "w": b"1"})
        config = store.artifact_path(first.digest) / "config.json"
        second = publish(store, "quantize", {"config.json": config, "w": b"2"})
        assert len(objects(store)) == 3
        assert contents(store, second) == {"config.json": b"{}", "w": b"2"}
        assert config.read_bytes() == b"{}"

    def test_a_link_to_an_inputs_reference_is_a_reference_to_the_same_file(self, store, tmp_path):
        (tmp_path / "blob").write_bytes(b"weights")
        first = publish(store, "download", {"model.bin": tmp_path / "blob"})
        second = publish(store, "copy", {"m": store.artifact_path(first.digest) / "model.bin"})
        assert store.artifact_path(second.digest).joinpath("m").readlink() == tmp_path / "blob"

    def test_links_within_the_output_and_to_its_scratch_are_the_files_they_lead_to(self, store):
        wanted = record("a")
        with store.lock(wanted.key) as work:
            fill(work.scratch, {"piece": b"piece"})
            fill(work.out, {"file": b"file", "piece": work.scratch / "piece"})
            (work.out / "alias").symlink_to("file")
            done = store.publish(wanted, work.out)
            work.done()
        assert contents(store, done) == {"alias": b"file", "file": b"file", "piece": b"piece"}
        assert store.intact(done)

    def test_a_part_becomes_an_object_and_stays_usable_as_a_part(self, store):
        fill(store.parts, {"quantize/shard-1": b"int8"})
        part = store.parts / "quantize" / "shard-1"
        first = publish(store, "one", {"w-1": part})
        assert part.is_symlink()
        assert part.read_bytes() == b"int8"
        second = publish(store, "two", {"x-1": part, "y": b"new"})
        assert len(objects(store)) == 2
        assert store.intact(first)
        assert contents(store, second) == {"x-1": b"int8", "y": b"new"}

    def test_a_hard_link_is_broken_rather_than_shared(self, store, tmp_path):
        outside = tmp_path / "outside"
        outside.write_bytes(b"shared")
        outside.chmod(0o640)
        wanted = record("a")
        with store.lock(wanted.key) as work:
            os.link(outside, work.out / "a")
            done = store.publish(wanted, work.out)
        assert stat.S_IMODE(outside.stat().st_mode) == 0o640
        assert objects(store)[0].stat().st_ino != outside.stat().st_ino
        outside.write_bytes(b"edited")
        assert contents(store, done) == {"a": b"shared"}
        assert store.intact(done)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda out, tmp: (out / "a").symlink_to(tmp / "none"), "a in the output is a link to nothing"),
            (lambda out, tmp: (out / "a").symlink_to(tmp), "a in the output is a link to a directory"),
            (lambda out, tmp: os.mkfifo(out / "a"), "a in the output is no regular file"),
            (lambda out, tmp: (out / "a").symlink_to("/dev/null"), "a in the output is no regular file"),
            (lambda out, tmp: (out / "a").symlink_to(out.parents[2] / "keys" / "k"), "store's own working area"),
            (lambda out, tmp: open(os.fsencode(out) + b"/\xff", "w").close(), "not UTF-8"),
        ],
    )
    def test_what_an_artifact_cannot_hold_is_refused_by_name(self, store, tmp_path, make, message):
        fill(store.root, {"keys/k": b"k"})
        with store.lock(record("a").key) as work:
            make(work.out, tmp_path)
            with pytest.raises(StageFailed, match=message):
                store.publish(record("a"), work.out)
        assert store.find(record("a").key) is None


class TestTrust:
    def facts(self, store, done):
        return (store.root / "artifacts" / f"{done.digest[7:]}.json").read_bytes()

    def test_a_ctime_only_change_is_read_once_and_noted(self, store):
        done = publish(store, "a", {"x": b"bytes"})
        before = self.facts(store, done)
        objects(store)[0].chmod(0o440)
        assert store.intact(done)
        noted = self.facts(store, done)
        assert noted != before
        assert store.intact(done)
        assert self.facts(store, done) == noted

    def test_touched_but_equal_bytes_are_read_once_and_noted(self, store):
        done = publish(store, "a", {"x": b"bytes"})
        os.utime(objects(store)[0])
        assert store.intact(done)
        noted = self.facts(store, done)
        assert store.intact(done)
        assert self.facts(store, done) == noted

    def test_a_copy_of_a_store_is_read_once_and_trusted(self, store, tmp_path):
        import shutil

        done = publish(store, "a", {"x": b"bytes"})
        store.close()
        shutil.copytree(store.root, tmp_path / "copy", symlinks=True)
        copied = Store(tmp_path / "copy")
        assert copied.intact(copied.find(done.key))

    def test_a_write_right_after_publishing_is_noticed(self, store):
        """However coarse the clock: an object's mtime is one that no write can leave behind."""
        for number in range(50):
            done = publish(store, str(number), {"x": b"%04d" % number})
            path = store.root / "objects" / done.files["x"]["sha256"]
            with open(path, "r+b") as file:
                file.write(b"evil")
            assert not store.intact(done)

    @pytest.mark.parametrize("harm", ["flip", "cut", "grow", "remove", "directory", "link"])
    def test_a_damaged_object_is_a_miss_and_set_aside(self, store, tmp_path, harm):
        done = publish(store, "a", {"x": b"bytes", "y": b"other"})
        path = store.root / "objects" / sha256(b"bytes")
        data = {"flip": b"bytez", "cut": b"byte", "grow": b"bytes+"}.get(harm)
        path.chmod(0o644)
        if data is not None:
            path.write_bytes(data)
        else:
            path.unlink()
        if harm == "directory":
            path.mkdir()
        if harm == "link":
            (tmp_path / "same").write_bytes(b"bytes")
            path.symlink_to(tmp_path / "same")
        assert not store.intact(store.find(done.key))
        assert not os.path.lexists(path)
        again = publish(store, "a", {"x": b"bytes", "y": b"other"})
        assert store.intact(again)
        assert contents(store, again) == {"x": b"bytes", "y": b"other"}

    @pytest.mark.parametrize("harm", ["extra", "missing", "elsewhere", "file", "gone", "all"])
    def test_a_damaged_tree_is_rebuilt(self, store, tmp_path, harm):
        files = {"x": b"bytes", "sub/y": b"other"}
        done = publish(store, "a", files)
        tree = store.artifact_path(done.digest)
        if harm == "extra":
            (tree / "sub" / "evil.py").write_text("import os")
        elif harm == "gone":
            (tree / "sub" / "y").unlink()
            (tree / "sub").rmdir()
        elif harm == "all":
            tree.rename(tmp_path / "tree")
        else:
            (tree / "x").unlink()
        if harm == "elsewhere":
            (tree / "x").symlink_to(tmp_path)
        if harm == "file":
            (tree / "x").write_bytes(b"bytes")
        assert store.intact(store.find(done.key))
        assert contents(store, done) == files
        assert not list(tree.rglob("evil.py"))

    @pytest.mark.parametrize("flips", [300, pytest.param(5000, marks=pytest.mark.fault)])
    def test_flipped_bits_are_all_noticed(self, memory, flips):
        """In objects, trees and records: never is a changed byte used."""
        dice = random.Random(flips)  # noqa: S311
        files = {"config.json": b'{"a": 1}', "w/model.safetensors": bytes(range(256))}
        store = Store(memory / "store")
        publish(store, "a", files)
        for _ in range(flips):
            flip_one(store, dice)
            found = store.find(record("a").key)
            if found is not None and store.intact(found):
                assert contents(store, found) == files
                assert found == record("a", digest=found.digest, files=found.files)
            else:
                publish(store, "a", files)


def flip_one(store, dice):
    """Flips a bit of one object or record, or of where one link of a tree leads."""
    places = [*objects(store), *(store.root / "keys").iterdir(), *(store.root / "artifacts").glob("*.json")]
    places += [path for path in (store.root / "artifacts").rglob("*") if path.is_symlink()]
    path = dice.choice(places)
    data = bytearray(os.fsencode(path.readlink()) if path.is_symlink() else path.read_bytes())
    position = dice.randrange(len(data))
    data[position] ^= 1 << dice.randrange(8)
    if path.is_symlink():
        path.unlink()
        if 0 not in data:
            os.symlink(bytes(data), path)
    else:
        with open(path, "r+b") as file:
            file.write(data)


class TestLocks:
    def test_the_folders_are_kept_over_a_crash_until_the_work_is_done(self, store):
        def crash():
            with Store(store.root).lock(record("a").key) as work:
                fill(work.out, {"shard-1": b"finished"})
                fill(work.scratch, {"plan": b"plan"})
                os.kill(os.getpid(), signal.SIGKILL)

        assert in_child(crash) == -signal.SIGKILL
        with store.lock(record("a").key) as work:
            assert (work.out / "shard-1").read_bytes() == b"finished"
            assert (work.scratch / "plan").read_bytes() == b"plan"
            work.done()
        with store.lock(record("a").key) as work:
            assert list(work.out.iterdir()) == list(work.scratch.iterdir()) == []

    def test_two_threads_exclude_each_other_and_two_keys_do_not(self, store):
        entered, leave = threading.Event(), threading.Event()

        def hold():
            with store.lock(record("a").key):
                entered.set()
                leave.wait(10)

        thread = threading.Thread(target=hold)
        thread.start()
        assert entered.wait(10)
        heard = []
        with store.lock(record("b").key):
            pass
        threading.Timer(0.2, leave.set).start()
        with store.lock(record("a").key, waiting=heard.append):
            assert leave.is_set()
        thread.join()
        assert heard == [f"process {os.getpid()} on {os.uname().nodename}"]

    def test_waiting_can_be_cancelled(self, store):
        cancelled = threading.Event()
        with store.lock(record("a").key):
            threading.Timer(0.1, cancelled.set).start()
            started = time.monotonic()
            with pytest.raises(Interrupted), store.lock(record("a").key, cancelled=cancelled):
                pass
            assert time.monotonic() - started < 5

    def test_a_dead_holder_is_taken_over_at_once(self, store):
        for _ in range(5):
            ready, start = os.pipe()
            holder = os.fork()
            if holder == 0:
                with Store(store.root).lock(record("a").key):
                    os.write(start, b"x")
                    time.sleep(60)
            os.read(ready, 1)
            os.close(ready)
            os.close(start)
            threading.Timer(0.1, os.kill, (holder, signal.SIGKILL)).start()
            killed = time.monotonic() + 0.1
            with store.lock(record("a").key):
                assert time.monotonic() - killed < 2
            os.waitpid(holder, 0)

    def test_workers_that_outlived_their_run_are_waited_for(self, store):
        with store.lock(record("a").key) as work:
            orphan = Lock(work.folder / "lock", shared=True)
            orphan.acquire()
        heard = []
        threading.Timer(0.2, orphan.release).start()
        with store.lock(record("a").key, waiting=heard.append) as work:
            assert not orphan.held
            worker = Lock(work.folder / "lock", shared=True)
            assert worker.try_acquire()  # one's own workers may start
            worker.release()
        assert heard == ["processes that an earlier run left behind"]

    def test_eight_processes_do_the_work_once(self, store, tmp_path):
        bodies = tmp_path / "bodies"
        bodies.touch()

        def run():
            with Store(store.root) as mine, mine.lock(record("a").key) as work:
                found = mine.find(record("a").key)
                if found is None or not mine.intact(found):
                    with bodies.open("a") as file:
                        file.write("x")
                    time.sleep(0.05)
                    fill(work.out, {"a": b"made once"})
                    found = mine.publish(record("a"), work.out)
                    work.done()
                assert contents(mine, found) == {"a": b"made once"}

        race(8, run)
        assert bodies.read_text() == "x"

    def test_without_working_locks_the_work_is_done_twice_but_never_mixed(self, store, monkeypatch):
        """Some network file systems accept every lock and keep none."""
        monkeypatch.setattr("fcntl.flock", lambda descriptor, operation: None)

        def run():
            with Store(store.root) as mine, mine.lock(record("a").key) as work:
                assert list(work.out.iterdir()) == []
                for _ in range(20):
                    with (work.out / "a").open("ab") as file:
                        file.write(b"0123456789")
                    time.sleep(0.002)
                mine.publish(record("a"), work.out)
                work.done()

        for _ in range(3):
            race(8, run)
            monkeypatch.undo()
            assert contents(store, store.find(record("a").key)) == {"a": b"0123456789" * 20}
            assert store.verify().clean
            monkeypatch.setattr("fcntl.flock", lambda descriptor, operation: None)

    def test_a_file_system_without_locks_is_named(self, store, monkeypatch):
        def flock(descriptor, operation):
            raise OSError(37, "No locks available")

        monkeypatch.setattr("fcntl.flock", flock)
        with pytest.raises(UsageError, match="has no locks") as error, Store(store.root).lock(record("a").key):
            pass
        assert "--store" in error.value.cure


def race(number, action):
    """Runs `action` in so many processes at once; all must succeed."""
    processes = []
    for _ in range(number):
        process = os.fork()
        if process == 0:
            status = 70
            try:
                action()
                status = 0
            finally:
                os._exit(status)
        processes.append(process)
    assert [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes] == [0] * number


FILES = {"config.json": b"{}", "w/1.bin": b"1" * 5000, "w/2.bin": b"2" * 5000, "same": b"{}"}


class TestCrashes:
    def make(self, root, memory):
        with Store(root) as mine, mine.lock(record("a").key) as work:
            if not (work.scratch / "finished").exists():
                with (memory / "bodies").open("a") as file:
                    file.write("x")
                fill(work.out, FILES)
                fill(work.out, {"blob": memory / "blob"})
                (work.scratch / "finished").touch()
            mine.publish(record("a"), work.out)
            work.done()

    def test_killed_at_any_step_nothing_finished_is_lost_and_nothing_half_done_is_found(self, memory):
        (memory / "blob").write_bytes(b"hub")
        step, resumed, died = 0, 0, True
        while died:
            step += 1
            root = memory / f"store-{step}"
            (memory / "bodies").write_text("")
            died = killed_at(step, lambda root=root: self.make(root, memory))
            after = Store(root)
            found = after.find(record("a").key)
            if found is not None:
                assert after.intact(found), step
                assert contents(after, found) == FILES | {"blob": b"hub"}
            assert after.verify().clean, step
            if found is None and (found := after.find(record("a").key)) is None:
                self.make(root, memory)
                found = after.find(record("a").key)
            else:
                resumed += 1
            assert after.intact(found), step
            assert contents(after, found) == FILES | {"blob": b"hub"}
            assert len((memory / "bodies").read_text()) <= 2
            after.close()
            with Store(root) as later:
                later.enter()
                assert not (root / "work" / found.key[7:] / "publish.json").exists(), step
            assert [path.name for path in (root / "tmp").iterdir()] == [], step
        assert step > 60
        assert resumed > 20

    def test_what_a_dead_run_was_publishing_is_there_for_whoever_comes_next(self, memory):
        """Even a run of another recipe finishes it: the journal is all it needs."""
        (memory / "blob").write_bytes(b"hub")
        root = memory / "store"
        step = 30
        while not (root / "work" / record("a").key[7:] / "publish.json").exists():
            step += 1
            in_child(lambda: __import__("shutil").rmtree(root, ignore_errors=True))
            (memory / "bodies").write_text("")
            assert killed_at(step, lambda: self.make(root, memory))
        with Store(root) as other:
            publish(other, "another", {"z": b"z"})
            assert contents(other, other.find(record("a").key)) == FILES | {"blob": b"hub"}
        assert not (root / "work" / record("a").key[7:]).exists()

    def test_a_journal_whose_files_are_gone_is_dropped_with_what_it_is_about(self, memory):
        (memory / "blob").write_bytes(b"hub")
        root = memory / "store"
        work = root / "work" / record("a").key[7:]
        step = 30
        while not (work / "publish.json").exists():
            step += 1
            in_child(lambda: __import__("shutil").rmtree(root, ignore_errors=True))
            killed_at(step, lambda: self.make(root, memory))
        (work / "out" / "config.json").unlink()
        with Store(root) as after, after.lock(record("a").key) as folders:
            assert after.find(record("a").key) is None
            assert list(folders.out.iterdir()) == []
        assert after.verify().clean

    def test_temporary_folders_of_dead_processes_are_removed_and_those_of_living_ones_kept(self, store):
        def crash():
            mine = Store(store.root)
            mine.enter()
            os.kill(os.getpid(), signal.SIGKILL)

        living = Store(store.root)
        living.enter()
        in_child(crash)
        assert len(list((store.root / "tmp").glob("*.lock"))) == 2
        store.enter()
        assert {path.name.partition("-")[0] for path in (store.root / "tmp").iterdir()} == {str(os.getpid())}
        assert len(list((store.root / "tmp").glob("*.lock"))) == 2
        living.close()
        store.close()
        assert list((store.root / "tmp").iterdir()) == []


class TestRemembering:
    def test_the_last_record_is_found_by_manifest_and_else_by_name(self, store, tmp_path):
        one, other, third = (tmp_path / name for name in ("a.yaml", "b.yaml", "c.yaml"))
        first, second = publish(store, "x1", {"a": b"1"}), publish(store, "x2", {"a": b"2"})
        store.remember(one, None, "recipe", {"x": first.key})
        store.remember(other, None, "recipe", {"x": second.key})
        assert store.last(one, "recipe", "x") == first
        assert store.last(other, "recipe", "x") == second
        assert store.last(third, "recipe", "x") == second
        assert store.last(third, "another", "x") is None
        assert store.last(one, "recipe", "y") is None

    def test_nodes_are_merged_and_their_history_is_kept(self, store, tmp_path):
        path = tmp_path / "a.yaml"
        records = [publish(store, f"x{number}", {"a": b"%d" % number}) for number in range(3)]
        for done in records:
            store.remember(path, None, "recipe", {"x": done.key})
        store.remember(path, None, "recipe", {"y": records[0].key})
        store.remember(path, None, "recipe", {"x": records[2].key})
        assert store.history(path, "recipe", "x") == records
        assert store.last(path, "recipe", "y") == records[0]

    def test_a_key_without_a_record_does_not_hide_the_last_one(self, store, tmp_path):
        done = publish(store, "x", {"a": b"1"})
        store.remember(tmp_path / "a.yaml", None, "recipe", {"x": done.key})
        store.remember(tmp_path / "a.yaml", None, "recipe", {"x": record("new").key})
        assert store.last(tmp_path / "a.yaml", "recipe", "x") == done

    def test_a_run_that_finds_everything_cached_writes_nothing(self, store, tmp_path):
        done = publish(store, "x", {"a": b"1"})
        store.remember(tmp_path / "a.yaml", None, "recipe", {"x": done.key})
        root = next((store.root / "roots").iterdir())
        before = root.stat().st_ino
        store.remember(tmp_path / "a.yaml", None, "recipe", {"x": done.key})
        assert root.stat().st_ino == before


def test_the_store_lies_where_people_expect_it(tmp_path):
    assert default_root({"BIGPIPE_HOME": str(tmp_path)}) == tmp_path
    assert default_root({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "bigpipe"
    assert default_root({"XDG_CACHE_HOME": "relative"}).name == "bigpipe"
    assert default_root({}).parts[-2:] == (".cache", "bigpipe")


def test_artifacts_are_listed_newest_first_with_what_they_weigh(store, tmp_path):
    (tmp_path / "blob").write_bytes(b"weights")
    publish(store, "old", {"a": tmp_path / "blob", "b": b"12"}, created="2026-01-01T00:00:00+00:00")
    publish(store, "new", {"c": b"3"}, created="2026-02-01T00:00:00+00:00")
    new, old = store.ls()
    assert (new.node, new.bytes, new.files, new.present) == ("new", 1, 1, True)
    assert (old.node, old.bytes, old.referenced_bytes) == ("old", 9, 7)


def test_finding_and_trusting_cost_far_less_than_a_millisecond(store):
    files = {f"f{number}": b"%d" % number for number in range(8)}
    done = publish(store, "a", files)
    started = time.process_time()
    for _ in range(200):
        assert store.intact(store.find(done.key))
    assert (time.process_time() - started) / 200 < 0.001


def test_a_record_of_a_later_version_is_a_miss_and_stays(store):
    from bigpipe.orchestrator.durable import seal

    done = publish(store, "a", {"x": b"1"})
    path = store.root / "keys" / f"{done.key[7:]}.json"
    path.write_bytes(seal({**done.as_json(), "invented_later": 1}))
    assert store.find(done.key) is None
    assert path.exists()


def test_a_record_is_what_it_says(store):
    with pytest.raises(ValueError, match="extra"):
        KeyRecord.model_validate({**record("a").as_json(), "surprise": 1})
    with pytest.raises(BigpipeError):
        raise Interrupted("x")
