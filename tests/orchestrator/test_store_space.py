"""What the store lets go, and what it must not; what it says of what it holds."""

import os
import signal
import time

import pytest
from support.stores import contents, fill, in_child, in_memory, killed_at, objects, publish, record

from bigpipe.errors import Transient, UsageError
from bigpipe.orchestrator.lock import lockfile
from bigpipe.orchestrator.lock.lockfile import locked_digests
from bigpipe.orchestrator.store.garbage import RUNS
from bigpipe.orchestrator.store.store import Store


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store") as opened:
        yield opened


def names(store):
    return sorted(path.name for path in objects(store))


def living(root):
    """A process that uses the store until it is killed: its number."""
    told, tell = os.pipe()
    process = os.fork()
    if process == 0:
        store = Store(root)
        store.enter()
        os.write(tell, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(told, 1)
    os.close(told)
    os.close(tell)
    return process


def kill(process):
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


class TestDrop:
    def test_the_bytes_go_and_the_digests_stay(self, store):
        done = publish(store, "shard", {"a": b"12345", "b": b"123"})
        assert store.drop(done.digest, done.key) == 8
        assert objects(store) == []
        assert not store.artifact_path(done.digest).exists()
        found = store.find(done.key)
        assert found == done
        assert not store.intact(found)
        assert [(artifact.dropped, artifact.bytes) for artifact, _ in store.ls()] == [(True, 8)]
        assert store.verify().clean

    def test_dropping_twice_frees_nothing_more_and_made_again_it_is_there_again(self, store):
        done = publish(store, "shard", {"a": b"12345"})
        store.drop(done.digest, done.key)
        assert store.drop(done.digest, done.key) == 0
        again = publish(store, "shard", {"a": b"12345"})
        assert store.intact(again)
        store.close()
        store.enter()
        assert store.intact(again)
        assert store.drop(done.digest, done.key) == 5

    def test_bytes_that_another_artifact_holds_stay(self, store):
        one = publish(store, "one", {"a": b"mine", "config": b"shared"})
        other = publish(store, "other", {"b": b"yours", "config": b"shared"})
        assert store.drop(one.digest, one.key) == len(b"mine")
        assert contents(store, other) == {"b": b"yours", "config": b"shared"}
        assert store.intact(other)

    def test_an_artifact_that_another_computation_gave_too_stays(self, store):
        one, other = publish(store, "one", {"a": b"x"}), publish(store, "other", {"a": b"x"})
        assert store.drop(one.digest, one.key) == 0
        assert store.intact(one)
        assert store.drop(other.digest, other.key) == 1
        assert not store.intact(one)

    def test_made_again_by_one_of_two_it_goes_when_that_one_lets_go(self, store):
        one, other = publish(store, "one", {"a": b"x"}), publish(store, "other", {"a": b"x"})
        for done in (one, other):
            store.drop(done.digest, done.key)
        publish(store, "other", {"a": b"x"})
        assert store.intact(one)
        assert store.drop(other.digest, other.key) == 1

    def test_threads_that_publish_anew_and_let_go_at_once_lose_nothing(self, store, tmp_path):
        """Bytes that were let go once and are made again are not swept by somebody else's letting go."""
        from threading import Thread

        with in_memory(tmp_path) as place, Store(place / "store") as busy:
            kept = publish(busy, "kept", {"a": b"kept"})

            def let_go():
                for number in range(40):
                    done = publish(busy, f"other-{number}", {"b": b"%d" % number})
                    busy.drop(done.digest, done.key)

            thread = Thread(target=let_go)
            thread.start()
            while thread.is_alive():
                busy.drop(kept.digest, kept.key)
                assert busy.intact(publish(busy, "kept", {"a": b"kept"}))
            thread.join()

    def test_referenced_files_are_not_ours_to_drop(self, store, tmp_path):
        (tmp_path / "blob").write_bytes(b"weights")
        done = publish(store, "download", {"w": tmp_path / "blob", "own": b"1"})
        assert store.drop(done.digest, done.key) == 1
        assert (tmp_path / "blob").read_bytes() == b"weights"

    def test_another_process_may_be_reading_so_the_last_to_leave_frees_it(self, store):
        done = publish(store, "shard", {"a": b"12345"})
        other = living(store.root)
        try:
            assert store.drop(done.digest, done.key) == 0
            assert store.intact(done)
        finally:
            kill(other)
        store.close()
        assert objects(store) == []

    def test_what_a_killed_run_let_go_is_freed_by_the_next(self, store):
        done = publish(store, "shard", {"a": b"12345"})
        other = living(store.root)
        store.drop(done.digest, done.key)
        kill(other)
        with Store(store.root) as another:
            another.enter()  # not alone: `store` is still here
            assert store.intact(done)
        store.close()
        with Store(store.root) as following:
            following.enter()
            assert objects(following) == []


class TestGarbage:
    @pytest.fixture
    def recipe(self, tmp_path):
        path = tmp_path / "recipe.yaml"
        path.write_text("version: 1\n")
        return path

    def test_what_an_existing_manifest_names_stays_and_the_rest_goes(self, store, recipe, tmp_path):
        kept = publish(store, "kept", {"a": b"kept", "c": b"shared"})
        other = publish(store, "other", {"b": b"other", "c": b"shared"})
        store.remember(recipe, None, "recipe", {"x": kept.key})
        store.remember(tmp_path / "deleted.yaml", None, "deleted", {"x": other.key})
        promised = store.gc(locked_digests, dry_run=True)
        assert store.intact(other)
        assert store.gc(locked_digests) == type(promised)(
            False, promised.freed, promised.kept_artifacts, promised.kept_bytes
        )
        assert (promised.kept_artifacts, promised.kept_bytes) == (1, 10)
        assert {item.kind for item in promised.freed} >= {"record", "artifact", "object", "root"}
        assert sum(item.bytes for item in promised.freed if item.kind == "object") == 5
        assert contents(store, kept) == {"a": b"kept", "c": b"shared"}
        assert store.intact(store.find(kept.key))
        assert store.find(other.key) is None
        assert not store.with_partial(other.partial)
        assert store.verify().clean
        assert store.gc(locked_digests).freed == ()

    def test_what_was_run_before_an_edit_goes(self, store, recipe):
        old, new = publish(store, "old", {"a": b"old"}), publish(store, "new", {"a": b"new"})
        for done in (old, new):
            store.remember(recipe, None, "recipe", {"x": done.key})
        store.gc(locked_digests)
        assert store.find(old.key) is None
        assert store.history(recipe, "recipe", "x") == [new]

    def test_an_existing_lock_file_keeps_what_it_names(self, store, tmp_path):
        done = publish(store, "locked", {"a": b"locked"})
        path = tmp_path / "gone.yaml.lock"
        outputs = {"x": lockfile.locked_output(done, None)}
        lockfile.write(path, lockfile.LockFile(recipe="gone", outputs=outputs))
        store.remember(tmp_path / "gone.yaml", path, "gone", {})
        store.gc(locked_digests)
        assert store.intact(store.find(done.key))
        path.unlink()
        store.gc(locked_digests)
        assert store.find(done.key) is None

    def test_of_the_runs_the_latest_stay(self, store):
        fill(store.runs, {f"20260101-000000-{number:06x}/run.json": b"{}" for number in range(RUNS + 2)})
        assert [item.name for item in store.gc(locked_digests).freed if item.kind == "run"] == [
            "runs/20260101-000000-000000", "runs/20260101-000000-000001",
        ]  # fmt: skip
        assert len(list(store.runs.iterdir())) == RUNS

    def test_a_lock_file_nobody_can_read_stops_it(self, store, tmp_path):
        done = publish(store, "locked", {"a": b"locked"})
        (tmp_path / "m.yaml.lock").write_text("<<<<<<< ours\n")
        store.remember(tmp_path / "m.yaml", tmp_path / "m.yaml.lock", "m", {})
        with pytest.raises(UsageError, match=r"m\.yaml\.lock"):
            store.gc(locked_digests)
        assert store.intact(done)

    def test_it_waits_for_nobody_while_another_run_uses_the_store(self, store):
        publish(store, "a", {"a": b"a"})
        other = living(store.root)
        try:
            with pytest.raises(Transient, match="another run"):
                store.gc(locked_digests)
            assert len(objects(store)) == 1
        finally:
            kill(other)
        store.gc(locked_digests)
        assert objects(store) == []

    def test_unfinished_work_stays_as_long_as_a_manifest_names_it(self, store, recipe):
        for name in ("named", "nameless"):
            with store.lock(record(name).key) as work:
                fill(work.out, {"shard": b"12345"})
        store.remember(recipe, None, "recipe", {"x": record("named").key})
        report = store.gc(locked_digests)
        assert [item.name for item in report.freed if item.kind == "work"] == [f"work/{record('nameless').key[7:]}"]
        assert (store.root / "work" / record("named").key[7:] / "out" / "shard").exists()

    def test_parts_that_are_objects_stay_and_others_go(self, store, recipe):
        fill(store.parts, {"q/one": b"one", "q/two": b"two", "q/three": b"three"})
        kept = publish(store, "kept", {"a": store.parts / "q" / "one"})
        publish(store, "gone", {"a": store.parts / "q" / "two"})
        store.remember(recipe, None, "recipe", {"x": kept.key})
        store.gc(locked_digests)
        assert [path.name for path in (store.parts / "q").iterdir()] == ["one"]
        assert (store.parts / "q" / "one").read_bytes() == b"one"

    def test_it_frees_what_was_set_aside_and_what_crashes_left(self, store):
        done = publish(store, "a", {"x": b"bytes"})
        objects(store)[0].chmod(0o644)
        objects(store)[0].write_bytes(b"evil!")
        assert not store.intact(done)
        (store.root / "keys" / ".x.json.1.2").write_bytes(b"torn")
        freed = store.gc(locked_digests).freed
        assert {item.kind for item in freed} >= {"quarantine", "temporary"}
        assert list((store.root / "quarantine").iterdir()) == []

    def test_a_store_it_was_collected_in_works_on(self, store, recipe):
        publish(store, "a", {"x": b"1"})
        store.gc(locked_digests)
        done = publish(store, "a", {"x": b"1"})
        assert store.intact(done)
        assert store.with_partial(done.partial)

    def test_killed_midway_it_leaves_a_whole_store(self, tmp_path):
        with in_memory(tmp_path) as place:
            (place / "recipe.yaml").touch()
            died, step = True, 0
            while died:
                step += 1
                root = place / f"store-{step}"
                with Store(root) as store:
                    kept = publish(store, "kept", {"a": b"kept", "c": b"shared"})
                    gone = publish(store, "gone", {"b": b"gone", "c": b"shared"})
                    store.remember(place / "recipe.yaml", None, "recipe", {"x": kept.key})
                died = killed_at(step, lambda root=root: Store(root).gc(locked_digests) and None)
                with Store(root) as store:
                    assert store.intact(store.find(kept.key)), step
                    found = store.find(gone.key)
                    assert found is None or not store.intact(found) or contents(store, found), step
                    store.gc(locked_digests)
                    assert names(store) == sorted(file["sha256"] for file in kept.files.values()), step
                    assert store.verify().clean, step
            assert step > 15


class TestVerify:
    def damage(self, path, data=b"evil"):
        path.chmod(0o644)
        facts = path.stat()
        path.write_bytes(data)
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # nothing but its bytes tells

    def test_a_whole_store_is_clean_and_every_byte_is_read(self, store, tmp_path):
        (tmp_path / "blob").write_bytes(b"weights")
        publish(store, "a", {"x": b"12", "y": tmp_path / "blob", "z": b"12"})
        report = store.verify()
        assert report.clean
        assert (report.artifacts, report.files, report.bytes) == (1, 2, 9)

    @pytest.mark.parametrize("repair", [False, True])
    def test_a_damaged_object_is_found_although_stat_says_nothing(self, store, repair):
        done = publish(store, "a", {"x": b"good", "y": b"fine"})
        other = publish(store, "b", {"y": b"fine"})
        path = store.root / "objects" / done.files["x"]["sha256"]
        self.damage(path)
        report = store.verify(repair=repair)
        found = [(item.path, item.problem, item.repaired) for item in report.findings if item.problem != "writable"]
        assert found == [(path, "damaged", repair)]
        if repair:
            assert not path.exists()
            assert store.verify().clean
            assert not store.intact(store.find(done.key))
            assert store.intact(other)
            assert contents(store, publish(store, "a", {"x": b"good", "y": b"fine"})) == {"x": b"good", "y": b"fine"}
            assert store.verify().clean

    def test_a_reference_that_vanished_or_changed_is_found_and_left_alone(self, store, tmp_path):
        for name in ("one", "two"):
            (tmp_path / name).write_bytes(b"blob " + name.encode())
            publish(store, name, {"w": tmp_path / name})
        (tmp_path / "one").unlink()
        self.damage(tmp_path / "two", b"blob TWO")
        report = store.verify(repair=True)
        assert sorted((item.path.name, item.problem) for item in report.findings) == [
            ("one", "missing"),
            ("two", "damaged"),
        ]
        assert (tmp_path / "two").read_bytes() == b"blob TWO"
        assert store.verify().clean

    @pytest.mark.parametrize("what", ["keys", "artifacts", "roots"])
    def test_a_damaged_record_is_found_and_only_repair_moves_it(self, store, tmp_path, what):
        done = publish(store, "a", {"x": b"good"})
        store.remember(tmp_path / "m.yaml", None, "m", {"x": done.key})
        path = next((store.root / what).glob("*.json"))
        data = path.read_bytes()
        path.write_bytes(data.replace(b"1", b"2", 1))
        assert [item.path for item in store.verify().findings] == [path]
        assert path.exists()
        assert [item.repaired for item in store.verify(repair=True).findings] == [True]
        assert store.verify().clean
        found = store.find(done.key)
        assert found is None or not store.intact(found) or what == "roots"

    def test_a_tree_is_rebuilt_and_a_writable_object_protected(self, store):
        done = publish(store, "a", {"x": b"good"})
        (store.artifact_path(done.digest) / "extra").touch()
        objects(store)[0].chmod(0o644)
        assert sorted(item.problem for item in store.verify().findings) == ["damaged", "writable"]
        assert all(item.repaired for item in store.verify(repair=True).findings)
        assert store.verify().clean
        assert os.listdir(store.artifact_path(done.digest)) == ["x"]
        assert store.intact(done)

    def test_an_artifact_nobody_recorded_any_more_is_missing(self, store):
        done = publish(store, "a", {"x": b"good"})
        (store.root / "artifacts" / f"{done.digest[7:]}.json").unlink()
        assert [item.problem for item in store.verify().findings] == ["missing"]
        store.verify(repair=True)
        assert store.verify().clean
        assert not store.intact(store.find(done.key))

    def test_objects_that_no_artifact_holds_are_read_too(self, store):
        fill(store.root, {f"objects/{'0' * 64}": b"not nothing", "objects/oddly-named": b""})
        assert [item.problem for item in store.verify(repair=True).findings] == ["damaged", "damaged"]
        assert objects(store) == []


def test_children_do_not_disturb(store):
    """A process forked from one that uses the store may use it as well."""

    def child():
        with Store(store.root) as mine:
            publish(mine, "child", {"a": b"child"})

    publish(store, "parent", {"a": b"parent"})
    assert in_child(child) == 0
    assert contents(store, store.find(record("child").key)) == {"a": b"child"}
