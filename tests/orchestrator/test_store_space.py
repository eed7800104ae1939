"""What the store lets go, and what it must not; what it says of what it holds."""

import os
import signal
import subprocess
import time
from dataclasses import asdict
from datetime import UTC, datetime, timedelta

import pytest
from support.stores import contents, fill, in_child, in_memory, killed_at, objects, publish, record

from bigpipe.errors import Transient, UsageError
from bigpipe.orchestrator.lock import lockfile
from bigpipe.orchestrator.lock.lockfile import locked_digests
from bigpipe.orchestrator.store.garbage import RUNS, Keeping
from bigpipe.orchestrator.store.keeping import all_roots, root_path
from bigpipe.orchestrator.store.layout import write_sealed
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
        deleted = tmp_path / "deleted.yaml"
        deleted.write_text("version: 1\n")
        store.remember(deleted, None, "deleted", {"x": other.key})
        deleted.unlink()
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

    def test_unfinished_work_with_other_values_stays_for_a_while(self, store, recipe):
        keys = {variant: record(variant).key for variant in ("int8", "nf4")}
        for variant, key in keys.items():
            store.remember(recipe, None, "recipe", {"quantize": key}, variant, ["quantize"])
            with store.lock(key) as work:
                fill(work.out, {"shard": b"12345"})
        store.gc(locked_digests)
        assert {path.name for path in (store.root / "work").iterdir()} == {key[7:] for key in keys.values()}
        store.gc(locked_digests, NOW)
        assert [path.name for path in (store.root / "work").iterdir()] == [keys["nf4"][7:]]

    @pytest.mark.parametrize("dropped", [False, True])
    def test_unfinished_work_goes_where_what_it_was_to_give_is_there(self, store, recipe, dropped):
        """Of a forced run that was killed, say; not where its bytes were let go, and are made again."""
        done = publish(store, "a", {"shard": b"12345"})
        if dropped:
            store.drop(done.digest, done.key)
        store.remember(recipe, None, "recipe", {"x": done.key})
        with store.lock(done.key) as work:
            fill(work.out, {"shard": b"12"})
        freed = [item.name for item in store.gc(locked_digests).freed if item.kind == "work"]
        assert freed == [] if dropped else [f"work/{done.key[7:]}"]

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


def git(place, *words):
    own = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *own, *words], cwd=place, check=True, capture_output=True, text=True).stdout


def checkout(place, *names, remote="https://name:secret-word@example.org/team/recipes.git"):
    """A checkout with recipes in it, all committed."""
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("version: 1\n")
    git(place, "init", "-q", "-b", "main")
    if remote:
        git(place, "remote", "add", "origin", remote)
    git(place, "add", ".")
    git(place, "commit", "-qm", "recipes")
    return place


def aged(store, days):
    """Let all that the roots of a store tell have happened some days earlier."""
    for root in all_roots(store.layout):
        early = (datetime.now(UTC) - timedelta(days=days)).isoformat()
        variants = {name: {**used, "used": early} for name, used in root.variants.items()}
        write_sealed(root_path(store.layout, root.manifest), {**asdict(root), "variants": variants})


NOW = Keeping(age=timedelta())


class TestWhatIsNamedElsewhere:
    @pytest.mark.parametrize("remote", ["https://name:secret-word@example.org/team/recipes.git", None])
    def test_a_recipe_of_another_branch_or_a_moved_checkout_keeps_what_it_ran_for_a_while(
        self, store, tmp_path, remote
    ):
        place = checkout(tmp_path / "one", "m/r.yaml", remote=remote)
        done = publish(store, "a", {"a": b"a"})
        store.remember(place / "m" / "r.yaml", None, "r", {"a": done.key})
        git(place, "checkout", "-qb", "other")
        git(place, "rm", "-q", "m/r.yaml")
        store.gc(locked_digests)
        assert store.intact(store.find(done.key))
        place.rename(tmp_path / "two")
        aged(store, 29)
        store.gc(locked_digests)
        assert store.intact(store.find(done.key))
        aged(store, 32)
        store.gc(locked_digests)
        assert store.find(done.key) is None

    def test_a_moved_checkout_is_known_by_another_recipe_that_ran_there(self, store, tmp_path):
        place = checkout(tmp_path / "one", "m/r.yaml", "other.yaml")
        done, other = publish(store, "a", {"a": b"a"}), publish(store, "b", {"b": b"b"})
        store.remember(place / "m" / "r.yaml", None, "r", {"a": done.key})
        place.rename(tmp_path / "two")
        git(tmp_path / "two", "remote", "set-url", "origin", "git@example.org:team/recipes")
        store.remember(tmp_path / "two" / "other.yaml", None, "other", {"b": other.key})
        store.gc(locked_digests, NOW)
        assert store.intact(store.find(done.key))
        (tmp_path / "two" / "m" / "r.yaml").unlink()
        store.gc(locked_digests, NOW)
        assert store.find(done.key) is None

    def test_of_many_checkouts_that_are_gone_the_last_counts(self, store, tmp_path):
        keys = []
        for name in ("one", "two"):
            place = checkout(tmp_path / name, "r.yaml", "other.yaml")
            keys.append(publish(store, name, {"a": name.encode()}).key)
            store.remember(place / "r.yaml", None, "r", {"a": keys[-1]})
            place.rename(tmp_path / "away" if name == "two" else tmp_path / "gone")
        other = publish(store, "b", {"b": b"b"})
        store.remember(tmp_path / "away" / "other.yaml", None, "other", {"b": other.key})
        store.gc(locked_digests, NOW)
        assert [store.find(key) is not None for key in keys] == [False, True]

    def test_no_password_of_a_remote_is_written(self, store, tmp_path):
        place = checkout(tmp_path / "one", "r.yaml")
        store.remember(place / "r.yaml", None, "r", {"a": publish(store, "a", {"a": b"a"}).key})
        assert "secret-word" not in "".join(path.read_text() for path in store.layout.roots.iterdir())
        assert all_roots(store.layout)[0].remote == "example.org/team/recipes"


class TestAge:
    def test_other_parameters_stay_for_a_while_and_what_was_before_an_edit_goes(self, store, tmp_path):
        (tmp_path / "r.yaml").touch()
        edited, other, last = (publish(store, name, {"a": name.encode()}) for name in ("edited", "other", "last"))
        for done, variant in ((edited, "x"), (other, "x"), (last, "y")):
            store.remember(tmp_path / "r.yaml", None, "r", {"a": done.key}, variant)
        store.gc(locked_digests)
        assert [store.find(done.key) is not None for done in (edited, other, last)] == [False, True, True]
        aged(store, 32)
        store.gc(locked_digests)
        assert [store.find(done.key) is not None for done in (other, last)] == [False, True]

    def test_used_again_is_young_again(self, store, tmp_path):
        (tmp_path / "r.yaml").touch()
        one, two = publish(store, "one", {"a": b"1"}), publish(store, "two", {"a": b"2"})
        store.remember(tmp_path / "r.yaml", None, "r", {"a": two.key}, "y")
        store.remember(tmp_path / "r.yaml", None, "r", {"a": one.key}, "x")
        aged(store, 32)
        store.remember(tmp_path / "r.yaml", None, "r", {"a": one.key}, "x")
        store.remember(tmp_path / "r.yaml", None, "r", {"a": two.key}, "y")
        store.gc(locked_digests)
        assert store.find(one.key) is not None

    def test_what_is_younger_than_somebody_says_stays(self, store):
        young = publish(store, "young", {"a": b"1"}, created=datetime.now(UTC).isoformat(timespec="seconds"))
        old = publish(store, "old", {"a": b"2"})
        fill(store.runs, {"20260101-000000-000000/run.json": b"{}"})
        with store.lock(record("work").key) as work:
            fill(work.out, {"shard": b"12345"})
        week = Keeping(age=timedelta(days=7), runs=0)
        assert {item.kind for item in store.gc(locked_digests, week).freed}.isdisjoint({"run", "work"})
        assert store.intact(store.find(young.key))
        assert store.find(old.key) is None
        assert {item.kind for item in store.gc(locked_digests, Keeping(age=timedelta(), runs=0)).freed} >= {
            "run",
            "work",
        }
        assert store.find(young.key) is None

    def test_it_says_which_node_and_when(self, store):
        publish(store, "quantize@scheme=int8", {"a": b"12345"})
        freed = store.gc(locked_digests, dry_run=True).freed
        told = {
            item.kind: (item.node, item.created[:10], item.bytes)
            for item in freed
            if item.kind in ("object", "artifact")
        }
        assert told["object"] == ("quantize@scheme=int8", "2026-01-02", 5)
        assert told["artifact"][:2] == ("quantize@scheme=int8", "2026-01-02")


class TestRemoving:
    def test_an_artifact_goes_with_what_recorded_it_and_what_others_hold_stays(self, store, tmp_path):
        gone, twin = (
            publish(store, "gone", {"a": b"mine", "c": b"both"}),
            publish(store, "twin", {"a": b"mine", "c": b"both"}),
        )
        kept = publish(store, "kept", {"b": b"other", "c": b"both"})
        loose = publish(store, "nobody's", {"d": b"not named"})
        foreseen = store.remove([gone.digest], dry_run=True)
        assert store.intact(gone)
        freed = store.remove([gone.digest]).freed
        assert freed == foreseen.freed
        assert sum(item.bytes for item in freed if item.kind == "object") == 4
        assert [store.find(done.key) for done in (gone, twin)] == [None, None]
        assert not store.with_partial(gone.partial)
        assert store.with_partial(kept.partial)
        assert [store.intact(done) for done in (kept, loose)] == [True, True]
        assert store.verify().clean
        assert store.intact(publish(store, "gone", {"a": b"mine", "c": b"both"}))

    def test_nothing_goes_while_another_process_uses_the_store(self, store):
        done = publish(store, "a", {"a": b"a"})
        other = living(store.root)
        try:
            with pytest.raises(Transient, match="another run"):
                store.remove([done.digest])
            assert store.intact(done)
        finally:
            kill(other)

    def test_killed_midway_it_leaves_a_whole_store(self, tmp_path):
        with in_memory(tmp_path) as place:
            died, step = True, 0
            while died:
                step += 1
                root = place / f"store-{step}"
                with Store(root) as store:
                    kept = publish(store, "kept", {"a": b"kept", "c": b"shared"})
                    gone = publish(store, "gone", {"b": b"gone", "c": b"shared"})
                died = killed_at(step, lambda root=root, digest=gone.digest: Store(root).remove([digest]) and None)
                with Store(root) as store:
                    assert store.intact(store.find(kept.key)), step
                    found = store.find(gone.key)
                    assert found is None or not store.intact(found) or contents(store, found), step
                    store.remove([gone.digest])
                    assert names(store) == sorted(file["sha256"] for file in kept.files.values()), step
                    assert store.verify().clean, step
            assert step > 5


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
        before = (tmp_path / "two").stat()
        while (tmp_path / "clock").write_bytes(b"") or (tmp_path / "clock").stat().st_ctime_ns <= before.st_ctime_ns:
            pass  # until a change now has another time
        report = store.verify(repair=True)
        assert sorted((item.path.name, item.problem) for item in report.findings) == [
            ("one", "missing"),
            ("two", "damaged"),
        ]
        assert (tmp_path / "two").read_bytes() == b"blob TWO"
        after = (tmp_path / "two").stat()
        assert (after.st_mtime_ns, after.st_mode) == (before.st_mtime_ns, before.st_mode)
        assert after.st_ctime_ns > before.st_ctime_ns  # whoever remembers what it held reads it again
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
