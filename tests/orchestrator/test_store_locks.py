"""Many processes, and processes that die: the work is done once, nothing is lost, nothing is mixed."""

import os
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.stores import contents, fill, in_child, in_memory, killed_at, publish, record

from bigpipe.errors import Interrupted
from bigpipe.files import LogFile, is_held, partial_name
from bigpipe.orchestrator.store.locks import StoreLock, if_free
from bigpipe.orchestrator.store.store import Store


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store") as opened:
        yield opened


@pytest.fixture
def memory(tmp_path):
    with in_memory(tmp_path) as place:
        yield place


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

    def test_what_was_begun_under_a_key_of_the_same_family_is_gone_on_with(self, store):
        def begin(key, family):
            with store.lock(record(key).key) as work:
                store.resume_alike(family, record(key).key, work)
                found = [path.name for path in work.scratch.iterdir()]
                fill(work.scratch, {f"by-{key}": b"rows"})
                fill(work.out, {f"results-of-{key}": b"half"})
                return found, [path.name for path in work.out.iterdir()]

        assert begin("a", "one") == ([], ["results-of-a"])
        assert begin("b", "two") == ([], ["results-of-b"])
        with store.lock(record("a").key):  # somebody is at it
            assert begin("c", "one") == ([], ["results-of-c"])
        with store.lock(record("c").key) as work:
            work.done()
        assert begin("d", "one") == (["by-a"], ["results-of-d"])
        assert sorted(begin("d", "one")[0]) == ["by-a", "by-d"]
        assert sorted(begin("a", "one")[0]) == ["by-a", "by-d"]
        assert store.verify().clean

    def test_what_a_killed_writer_left_goes_before_the_work_goes_on(self, store):
        with store.lock(record("a").key) as work:
            fill(work.out, {"w/shard-1": b"finished", partial_name(Path("w/shard-2")).as_posix(): b"torn"})
        with store.lock(record("a").key) as work:
            assert [path.name for path in (work.out / "w").iterdir()] == ["shard-1"]

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
            with pytest.raises(Interrupted), store.lock(record("a").key, cancelled=cancelled):
                pass

    def test_workers_that_outlived_their_run_are_waited_for(self, store):
        with store.lock(record("a").key) as work:
            orphan = StoreLock(work.folder / "lock", shared=True)
            orphan.acquire()
        heard = []
        threading.Timer(0.2, orphan.release).start()
        with store.lock(record("a").key, waiting=heard.append) as work:
            assert not orphan.held
            worker = StoreLock(work.folder / "lock", shared=True)
            assert worker.try_acquire()  # one's own workers may start
            worker.release()
        assert heard == ["processes that an earlier run left behind"]

    def test_a_process_that_was_forked_meanwhile_keeps_nothing(self, store, tmp_path):
        lock, log = StoreLock(tmp_path / "lock"), LogFile(tmp_path / "log")
        lock.acquire()
        log.hold()
        with outlived(lock.release):  # there, it lets nothing of ours go
            assert not StoreLock(lock.path).try_acquire()
            lock.release()
            log.close()
            with if_free(lock.path) as free:
                assert free
            assert not is_held(tmp_path / "log")

    def test_a_forked_process_that_enters_is_somebody_else(self, store, monkeypatch):
        own = store.enter()._presence.enter()
        monkeypatch.setattr(os, "getpid", lambda: 1)
        assert store.enter()._presence.enter() != own
        assert not own.with_name(f"{own.name}.lock").exists()  # it held the one before no more: as of the dead


@contextmanager
def outlived(action):
    """Within, a fork of this process lives, which has done `action`."""
    done, end = os.pipe(), os.pipe()
    if not (child := os.fork()):
        try:
            action()
            os.write(done[1], b"x")
            os.close(end[1])
            os.read(end[0], 1)
        finally:
            os._exit(0)
    try:
        os.close(done[1])
        assert os.read(done[0], 1) == b"x"
        yield
    finally:
        os.close(end[1])
        os.waitpid(child, 0)
        os.close(done[0])
        os.close(end[0])


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

    def test_work_that_was_done_under_another_key_is_published_by_whoever_comes_next(self, memory):
        """As a follower's is: its journal lies in the folder where it worked."""
        (memory / "blob").write_bytes(b"hub")

        def follow(root):
            with Store(root) as mine, mine.lock(record("provisional").key) as work, mine.lock(record("a").key) as final:
                fill(work.out, FILES | {"blob": memory / "blob"})
                mine.publish(record("a"), work.out)
                final.done()
                work.done()

        step, journals, died = 0, 0, True
        while died:
            step += 1
            root = memory / f"store-{step}"
            died = killed_at(step, lambda root=root: follow(root))
            journal = root / "work" / record("provisional").key[7:] / "publish.json"
            begun = journal.exists()
            with Store(root) as after, after.lock(record("b").key) as other:
                after.resume_work(record("provisional").key, other)
                found = after.find(record("a").key)
                assert not begun or found is not None, step
                assert found is None or contents(after, found) == FILES | {"blob": b"hub"}
                journals += begun
                assert not journal.exists(), step
            assert after.verify().clean, step
        assert journals > 20

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
