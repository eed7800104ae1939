"""What is published is there, whole, read-only, and noticed when it changes."""

import hashlib
import io
import os
import stat
import sys
import time

import pytest
from support.stores import contents, fill, objects, publish, record

from bigpipe.errors import BigpipeError, Interrupted, StageFailed
from bigpipe.files import open_regular, partial_name
from bigpipe.orchestrator.lock.lockfile import locked_digests
from bigpipe.orchestrator.store.hashing import digest_of
from bigpipe.orchestrator.store.layout import default_root
from bigpipe.orchestrator.store.store import KeyRecord, Store


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store") as opened:
        yield opened


def last(store, manifest, name, node):
    key = store.last_keys(manifest, name).get(node)
    return store.find(key) if key else None


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
        assert last(opened, tmp_path / "m.yaml", "m", "x") is None
        assert opened.ls() == []
        assert opened.gc(locked_digests, dry_run=True).freed == ()
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
        with pytest.raises(StageFailed, match="an object that has changed"):
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

    def test_what_a_kill_left_unwritten_is_no_part_of_it(self, store):
        wanted = record("a")
        with store.lock(wanted.key) as work:
            fill(work.out, {"file": b"whole", "sub/other": b"whole", ".gitattributes": b"", "theirs.part": b""})
            fill(work.out, {partial_name(work.out / "sub" / "other").relative_to(work.out).as_posix(): b"who"})
            done = store.publish(wanted, work.out)
        assert sorted(contents(store, done)) == [".gitattributes", "file", "sub/other", "theirs.part"]

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

    @pytest.mark.parametrize("kind", ["link", "file", "gone"])
    def test_an_output_directory_that_was_replaced_is_refused_and_what_it_links_to_stays(self, store, tmp_path, kind):
        theirs = tmp_path / "theirs"
        fill(theirs, {"file": b"precious"})
        with store.lock(record("a").key) as work:
            work.out.rmdir()
            if kind == "link":
                work.out.symlink_to(theirs)
            elif kind == "file":
                work.out.write_bytes(b"")
            with pytest.raises(StageFailed, match="output directory is"):
                store.publish(record("a"), work.out)
        assert (theirs / "file").read_bytes() == b"precious"
        assert not (theirs / "file").is_symlink()


class TestRemembering:
    def test_the_last_record_is_found_by_manifest_and_else_by_name(self, store, tmp_path):
        one, other, third = (tmp_path / name for name in ("a.yaml", "b.yaml", "c.yaml"))
        first, second = publish(store, "x1", {"a": b"1"}), publish(store, "x2", {"a": b"2"})
        store.remember(one, None, "recipe", {"x": first.key})
        store.remember(other, None, "recipe", {"x": second.key})
        assert last(store, one, "recipe", "x") == first
        assert last(store, other, "recipe", "x") == second
        assert last(store, third, "recipe", "x") == second
        assert last(store, third, "another", "x") is None
        assert last(store, one, "recipe", "y") is None

    def test_nodes_are_merged_and_their_history_is_kept(self, store, tmp_path):
        path = tmp_path / "a.yaml"
        records = [publish(store, f"x{number}", {"a": b"%d" % number}) for number in range(3)]
        for done in records:
            store.remember(path, None, "recipe", {"x": done.key})
        store.remember(path, None, "recipe", {"y": records[0].key})
        store.remember(path, None, "recipe", {"x": records[2].key})
        assert store.history(path, "recipe", "x") == records
        assert last(store, path, "recipe", "y") == records[0]

    def test_a_key_without_a_record_does_not_hide_the_last_one(self, store, tmp_path):
        done = publish(store, "x", {"a": b"1"})
        store.remember(tmp_path / "a.yaml", None, "recipe", {"x": done.key})
        store.remember(tmp_path / "a.yaml", None, "recipe", {"x": record("new").key})
        assert last(store, tmp_path / "a.yaml", "recipe", "x") == done

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
    assert [(record.node, made.bytes, made.referenced_bytes, made.dropped) for made, record in (new, old)] == [
        ("new", 1, 0, False),
        ("old", 9, 7, False),
    ]


def test_finding_and_trusting_open_two_records_and_no_object(store):
    done = publish(store, "a", {f"f{number}": b"%d" % number for number in range(8)})
    opened = []

    def note(frame, event, function):
        wraps = frame.f_code is open_regular.__code__ and function is not os.open  # what it has opened by then
        if event == "c_call" and function in (os.open, open, io.open) and not wraps:
            opened.append(frame)

    sys.setprofile(note)
    try:
        assert store.intact(store.find(done.key))
    finally:
        sys.setprofile(None)
    assert len(opened) == 2


def test_a_record_of_a_later_version_is_a_miss_and_stays(store):
    from bigpipe.files import seal

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
