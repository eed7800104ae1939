"""A hit trusts what `stat` says only as far as it can be trusted; a changed byte is never used."""

import hashlib
import os

import pytest
from support.forking import forked
from support.stores import contents, in_memory, objects, publish

from bigpipe.orchestrator.store.artifacts import walk
from bigpipe.orchestrator.store.store import Store


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store") as opened:
        yield opened


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def test_a_directory_that_cannot_be_read_is_not_taken_for_an_empty_one(tmp_path):
    """Its files would neither be synced nor removed."""
    with in_memory(tmp_path) as place:
        place.chmod(0o755)
        (place / "inside").mkdir(mode=0)
        ending = forked(lambda: list(walk(place)), user=65534)
        (place / "inside").chmod(0o700)
    assert "PermissionError" in ending.said


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

    @pytest.mark.parametrize("harm", ["extra", "missing", "elsewhere", "file", "gone", "all", "link"])
    def test_a_damaged_tree_is_rebuilt(self, store, tmp_path, harm):
        files = {"x": b"bytes", "sub/y": b"other"}
        done = publish(store, "a", files)
        tree = store.artifact_path(done.digest)
        if harm == "extra":
            (tree / "sub" / "evil.py").write_text("import os")
        elif harm == "gone":
            (tree / "sub" / "y").unlink()
            (tree / "sub").rmdir()
        elif harm in ("all", "link"):
            tree.rename(tmp_path / "tree")
            if harm == "link":
                tree.symlink_to(tmp_path / "tree")
        else:
            (tree / "x").unlink()
        if harm == "elsewhere":
            (tree / "x").symlink_to(tmp_path)
        if harm == "file":
            (tree / "x").write_bytes(b"bytes")
        assert store.intact(store.find(done.key))
        assert contents(store, done) == files
        assert not list(tree.rglob("evil.py"))
