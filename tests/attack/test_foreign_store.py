"""A directory that is somebody else's, given as the store: nothing in it is touched."""

from __future__ import annotations

import os

import pytest

from bigpipe.errors import UsageError
from bigpipe.orchestrator.lock import locked_digests
from bigpipe.orchestrator.store import Store
from bigpipe.orchestrator.store.locks import anybody


def everything_below(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "act",
    [
        lambda store: store.enter(),
        lambda store: store.gc(locked_digests),
        lambda store: store.verify(repair=True),
        lambda store: store.publish_forgone(None, {}),
    ],
    ids=["enter", "gc", "verify", "publish"],
)
def test_a_folder_with_other_things_in_it_is_refused(tmp_path, act):
    """As `/` is: it has a `tmp`, maybe a `work`, and much else."""
    for name in ("etc/passwd", "tmp/theirs/a", "tmp/theirs.lock", "work/main/a", "runs/a", "locks/a", "parts/a"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("theirs")
    before = everything_below(tmp_path)
    with pytest.raises(UsageError, match="is no store: it holds etc"):
        act(Store(tmp_path))
    assert everything_below(tmp_path) == before


def test_what_others_put_into_tmp_of_a_store_stays(tmp_path):
    with Store(tmp_path / "store") as store:
        store.enter()
        theirs = store.layout.tmp / "theirs"
        theirs.mkdir()
        dead = store.layout.tmp / "1-0123abcd"
        dead.mkdir()
        (store.layout.tmp / "1-0123abcd.lock").touch()
        anybody(store.layout)
        assert theirs.is_dir()
        assert not dead.exists()


def test_a_mount_point_and_hidden_files_are_no_reason_to_refuse(tmp_path):
    (tmp_path / "lost+found").mkdir()
    (tmp_path / ".DS_Store").touch()
    with Store(tmp_path) as store:
        store.enter()
    assert os.path.isdir(store.layout.tmp)
