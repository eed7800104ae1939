"""A lock file says what a recipe was made of and what came out, and is held against what is there now."""

import hashlib
import re
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.stores import publish

from bigpipe.errors import StageFailed, Stale, UsageError
from bigpipe.orchestrator.lock import lockfile, read_lock
from bigpipe.orchestrator.lock.lockfile import git_blob
from bigpipe.orchestrator.planning import lock_path
from bigpipe.orchestrator.planning.keys import Difference, Identity
from bigpipe.orchestrator.stage import Pinned, PinnedFile
from bigpipe.orchestrator.store.store import Store

COMMIT, NEXT_COMMIT = "c0ffee" + "0" * 34, "decade" + "0" * 34


@dataclass
class Node:
    name: str
    inputs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    kind: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(reproducible=True, reviewed=()))

    @property
    def producers(self):
        return [name for names in self.inputs.values() for name in names]


@dataclass
class Recipe:
    path: Path
    name: str = "opt"
    text: str = ""
    params: dict[str, object] = field(default_factory=lambda: {"gpu": "22GiB"})


class Session:
    """A recipe of two nodes, resolved: download → shard@a=1.5."""

    def __init__(self, folder):
        self.store = Store(folder / "store")
        self.recipe = Recipe(folder / "opt.yaml")
        self.arguments = {}
        self.nodes = [Node("download"), Node("shard@a=1.5", {"model": ("download",)})]
        self.pins = Pinned({"revision": COMMIT}, "asked")
        self.identities = {
            "download": Identity(kind="download", version=1, params={"repo": "facebook/opt", "include": None}),
            "shard@a=1.5": Identity(kind="shard", version=3, params={"dtype": "float16"}, packages={"torch": "2.13"}),
        }

    @property
    def lock(self):
        return read_lock(lock_path(self.recipe.path))

    def identity(self, node):
        found = self.identities[node.name]
        return replace(found, params={**found.params, **self.pinned(node).values})

    def pinned(self, node):
        return self.pins if node.name == "download" else Pinned({}, "")

    def asked(self, node):
        return {"revision": "main"}

    def change(self, node, **params):
        self.identities[node] = replace(self.identities[node], params={**self.identities[node].params, **params})

    def run(self, weights=b"weights"):
        """Runs both nodes; node → what has its record."""
        first = self.identity(self.nodes[0])
        done = publish(
            self.store, "download", {"w": weights, "config.json": b"{}"},
            key=first.key({}), partial=first.partial, identity=first.as_json,
        )  # fmt: skip
        second, inputs = self.identity(self.nodes[1]), {"model": [done.digest]}
        other = publish(
            self.store, "shard", {"s": b"shard of " + weights}, inputs=inputs,
            key=second.key(inputs), partial=second.partial, identity=second.as_json, tools={"bigpipe-ml": "0.1.0"},
        )  # fmt: skip
        return {"download": done, "shard@a=1.5": other}


def enforce_outputs(session, records):
    accept = lockfile.enforcing_outputs(session)
    for node in session.nodes:
        accept(node, records[node.name])


@pytest.fixture
def session(tmp_path):
    return Session(tmp_path)


def text(session):
    return lock_path(session.recipe.path).read_text()


class TestWriting:
    def test_it_lies_beside_the_manifest_and_reads_like_a_text_for_review(self, session):
        path = lockfile.write_lock(session)
        assert path.name == "opt.yaml.lock"
        assert path.stat().st_mode & 0o777 == 0o644
        assert path.read_text() == lockfile.HEADER + (
            "inputs:\n"
            "  download:\n"
            "    asked:\n"
            "      revision: main\n"
            "    inputs: {}\n"
            "    kind: download\n"
            "    params:\n"
            "      include: null\n"
            "      repo: facebook/opt\n"
            f"      revision: {COMMIT}\n"
            "    pins:\n"
            f"      revision: {COMMIT}\n"
            "    version: 1\n"
            "  shard@a=1.5:\n"
            "    inputs:\n"
            "      model:\n"
            "      - download\n"
            "    kind: shard\n"
            "    params:\n"
            "      dtype: float16\n"
            "    version: 3\n"
            "params:\n"
            "  gpu: 22GiB\n"
            "recipe: opt\n"
            "version: 1\n"
        )

    def test_it_reads_back_and_is_not_written_again_for_nothing(self, session):
        path = lockfile.write_lock(session)
        lock = session.lock
        assert (lock.path, lock.inputs["download"].pins) == (path, {"revision": COMMIT})
        inode = path.stat().st_ino
        lockfile.write_lock(session)
        assert path.stat().st_ino == inode

    def test_what_the_source_promises_is_locked_before_anything_is_fetched(self, session):
        files = {"w": PinnedFile(7, sha256="ab" * 32), "config.json": PinnedFile(2, git_blob="cd" * 20)}
        session.pins = Pinned({"revision": COMMIT}, "asked", lambda: files)
        lockfile.write_lock(session)
        assert session.lock.inputs["download"].files == {
            "w": PinnedFile(size=7, sha256="ab" * 32),
            "config.json": PinnedFile(size=2, git_blob="cd" * 20),
        }

    def test_strings_that_yaml_would_take_for_something_else_survive(self, session):
        odd = {"a": "no", "b": "12:30:45", "c": "1e-5", "d": "", "e": "ü\n#x", "f": 1e-5, "g": ["null", None, True]}
        session.change("shard@a=1.5", **odd)
        lockfile.write_lock(session)
        assert session.lock.inputs["shard@a=1.5"].params == {"dtype": "float16", **odd}
        lockfile.check_lock(session)


class TestReading:
    def test_there_may_be_none(self, session):
        assert session.lock is None
        with pytest.raises(UsageError, match="there is no lock file") as error:
            lockfile.enforce(session)
        assert error.value.cure == f"write it: bigpipe lock {session.recipe.path}"
        session.arguments = {"need": "1"}
        with pytest.raises(UsageError) as error:
            lockfile.enforce(session)
        assert error.value.cure.endswith(" -p need=1")
        lockfile.record_outputs(session, session.run())
        assert session.lock is None

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("recipe: x\n<<<<<<< ours\nversion: 1\n=======\n", "opt.yaml.lock:2:1: .* has a merge conflict"),
            ("<<<<<<< ours\n=======\n>>>>>>> theirs\n", "opt.yaml.lock:1:1: .* has a merge conflict"),
            ("a: b: c", "is not YAML as it is written: line 1: mapping values"),
            ("[1, 2]", "is not one of ours: Input"),
            ("", "is not one of ours: it is empty"),
            ("recipe: x\nversoin: 1\n", "not one of ours: versoin: Extra inputs"),
            ("recipe: x\ninputs: {a: {kind: k}}\n", r"inputs\.a\.version: Field required"),
            ("recipe: !!python/object/apply:os.system ['true']\n", "is not YAML"),
        ],
    )
    def test_what_is_no_lock_file_is_said_with_the_cure(self, session, content, message):
        session.recipe.path.touch()
        path = lock_path(session.recipe.path)
        path.write_text(content)
        with pytest.raises(UsageError) as error:
            _ = session.lock
        assert re.search(message, str(error.value))
        assert error.value.cure == f"write it again: bigpipe lock {session.recipe.path}"
        assert lockfile.write_lock(session) == lockfile.check_lock(session) == path

    def test_no_recipe_is_taken_for_one(self, session):
        lock_path(session.recipe.path).write_text("stages: {}")
        with pytest.raises(UsageError, match="is a recipe, not a lock file"):
            lockfile.write_lock(session)


class TestEnforcing:
    def changes(self, session):
        return lockfile.check(session.lock, lockfile.current(session))

    def test_what_was_locked_holds(self, session):
        lockfile.write_lock(session)
        assert lockfile.check_lock(session) == lock_path(session.recipe.path)
        lockfile.enforce(session)

    def test_every_difference_is_named(self, session):
        lockfile.write_lock(session)
        session.pins = Pinned({"revision": NEXT_COMMIT}, "asked")
        session.change("shard@a=1.5", dtype="float32")
        changed = replace(session.identities["shard@a=1.5"], version=4, code="edited", env={"A": "1"})
        session.identities["shard@a=1.5"] = changed
        expected = [
            Difference("inputs.download.params.revision", COMMIT, NEXT_COMMIT),
            Difference("inputs.download.pins.revision", COMMIT, NEXT_COMMIT),
            Difference("inputs.shard@a=1.5.version", 3, 4),
            Difference("inputs.shard@a=1.5.code", None, "edited"),
            Difference("inputs.shard@a=1.5.params.dtype", "float16", "float32"),
            Difference("inputs.shard@a=1.5.env.A", "(absent)", "1"),
        ]
        assert self.changes(session) == expected
        with pytest.raises(Stale, match="6 values differ") as error:
            lockfile.enforce(session)
        assert all(str(item) in str(error.value) for item in expected)
        assert error.value.cure == f"if that is meant: bigpipe lock {session.recipe.path}"

    def test_machines_and_packages_may_differ(self, session):
        lockfile.write_lock(session)
        session.identities["shard@a=1.5"] = replace(
            session.identities["shard@a=1.5"], packages={"torch": "3.0"}, facts={"memory": 1}
        )
        lockfile.enforce(session)

    def test_a_run_of_some_nodes_is_held_to_those(self, session):
        lockfile.write_lock(session)
        session.change("shard@a=1.5", dtype="float32")
        session.nodes = session.nodes[:1]
        lockfile.enforce(session)
        with pytest.raises(Stale):
            lockfile.check_lock(session)

    def test_new_and_removed_nodes_are_differences(self, session):
        lockfile.write_lock(session)
        session.nodes = [session.nodes[0], Node("extra")]
        session.identities["extra"] = Identity(kind="save", version=1, params={})
        assert self.changes(session) == [
            Difference("inputs.extra", "(absent)", "save"),
            Difference("inputs.shard@a=1.5", "shard", "(absent)"),
        ]

    def test_another_wiring_is_a_difference(self, session):
        lockfile.write_lock(session)
        before = session.lock
        session.nodes[1] = Node("shard@a=1.5", {"model": (), "adapter": ("download",)})
        assert self.changes(session) == [
            Difference("inputs.shard@a=1.5.inputs.adapter", "(absent)", ["download"]),
            Difference("inputs.shard@a=1.5.inputs.model", ["download"], []),
        ]
        older = {name: item.model_copy(update={"inputs": None}) for name, item in before.inputs.items()}
        assert lockfile.check(before.model_copy(update={"inputs": older}), lockfile.current(session)) == []

    def test_files_are_compared_by_what_both_sides_know(self, session):
        session.pins = Pinned(
            {"revision": COMMIT},
            "",
            lambda: {"w": PinnedFile(7, sha256="ab" * 32), "c": PinnedFile(2, git_blob="c" * 40)},
        )
        lockfile.write_lock(session)
        session.pins = Pinned(
            {"revision": COMMIT},
            "",
            lambda: {"w": PinnedFile(7, git_blob="d" * 40), "c": PinnedFile(2, git_blob="c" * 40)},
        )
        assert self.changes(session) == []
        session.pins = Pinned(
            {"revision": COMMIT}, "", lambda: {"w": PinnedFile(8, sha256="ef" * 32), "new": PinnedFile(1)}
        )
        assert self.changes(session) == [
            Difference("inputs.download.files.c", 2, "(absent)"),
            Difference("inputs.download.files.new", "(absent)", 1),
            Difference("inputs.download.files.w.size", 7, 8),
            Difference("inputs.download.files.w.sha256", "ab" * 32, "ef" * 32),
        ]


class TestOutputs:
    def test_a_run_fills_in_what_it_gave(self, session):
        lockfile.write_lock(session)
        done = session.run()
        lockfile.record_outputs(session, done)
        lock = session.lock
        shard = done["shard@a=1.5"]
        assert lock.outputs["shard@a=1.5"].digest == shard.digest
        assert lock.outputs["shard@a=1.5"].packages == {"torch": "2.13"}
        assert lock.outputs["shard@a=1.5"].tools == {"bigpipe-ml": "0.1.0"}
        assert lock.inputs["download"].files["w"] == PinnedFile(size=7, sha256=hashlib.sha256(b"weights").hexdigest())
        lockfile.check_lock(session)
        before = text(session)
        lockfile.record_outputs(session, done)
        assert text(session) == before

    def test_a_run_with_other_inputs_does_not_move_the_lock(self, session):
        lockfile.write_lock(session)
        lockfile.record_outputs(session, session.run())
        before = text(session)
        session.pins = Pinned({"revision": NEXT_COMMIT}, "asked")
        lockfile.record_outputs(session, session.run(b"newer"))
        assert text(session) == before
        with pytest.raises(Stale):
            lockfile.check_lock(session)

    def test_what_others_write_meanwhile_stays(self, session, monkeypatch):
        """While files are hashed to see whether their inputs moved: another run, or `bigpipe lock`."""
        lockfile.write_lock(session)
        done, looked, real = session.run(), [], lockfile._input_now

        def meanwhile(asking, node):
            if not looked:
                looked.append(node)
                lockfile.record_outputs(session, {"download": done["download"]})
            return real(asking, node)

        monkeypatch.setattr(lockfile, "_input_now", meanwhile)
        lockfile.record_outputs(session, {"shard@a=1.5": done["shard@a=1.5"]})
        assert set(session.lock.outputs) == {"download", "shard@a=1.5"}

        def moved(asking, node):
            if len(looked) == 1:
                looked.append(node)
                session.pins = Pinned({"revision": NEXT_COMMIT}, "asked")
                lockfile.write_lock(session)
                session.pins = Pinned({"revision": COMMIT}, "asked")
            return real(asking, node)

        monkeypatch.setattr(lockfile, "_input_now", moved)
        other = done["shard@a=1.5"].model_copy(update={"digest": "sha256:" + "e" * 64})
        lockfile.record_outputs(session, {"shard@a=1.5": other})
        assert session.lock.inputs["download"].pins == {"revision": NEXT_COMMIT}
        assert session.lock.outputs == {}

    def test_locked_anew_outputs_of_changed_nodes_and_their_consumers_are_forgotten(self, session):
        lockfile.write_lock(session)
        lockfile.record_outputs(session, session.run())
        session.change("shard@a=1.5", dtype="float32")
        lockfile.write_lock(session)
        assert set(session.lock.outputs) == {"download"}
        lockfile.record_outputs(session, session.run())
        session.pins = Pinned({"revision": NEXT_COMMIT}, "asked")
        lockfile.write_lock(session)
        assert session.lock.outputs == {}

    def test_what_a_node_gave_when_it_was_wired_to_another_is_forgotten(self, session):
        lockfile.write_lock(session)
        lockfile.record_outputs(session, session.run())
        session.nodes[1] = Node("shard@a=1.5", {"adapter": ("download",)})
        lockfile.write_lock(session)
        assert set(session.lock.outputs) == {"download"}

    def test_a_placement_is_there_for_review(self, session):
        placed = publish(
            session.store, "place", {"placement.json": b'{"device_map": {"": "cpu"}}'}, artifact_type="placement"
        )
        tree = session.store.artifact_path(placed.digest)
        shown = {"placement.json": {"device_map": {"": "cpu"}}}
        assert lockfile.locked_output(placed, tree, ["placement.json", "none.json"]).review == shown
        assert lockfile.locked_output(placed, None, ["placement.json"]).review == {}

    def test_another_result_of_the_same_inputs_is_an_error_where_it_must_be_equal(self, session):
        lockfile.write_lock(session)
        done = session.run()
        lockfile.record_outputs(session, done)
        enforce_outputs(session, done)
        shard = done["shard@a=1.5"]
        done["shard@a=1.5"] = shard.model_copy(update={"digest": "sha256:" + "e" * 64})
        with pytest.raises(StageFailed, match="for the same inputs, packages and facts"):
            enforce_outputs(session, done)
        other_torch = {**shard.identity, "packages": {"torch": "3.0"}}
        done["shard@a=1.5"] = done["shard@a=1.5"].model_copy(update={"identity": other_torch})
        enforce_outputs(session, done)
        done["shard@a=1.5"] = shard.model_copy(update={"digest": "sha256:" + "e" * 64})
        session.nodes[1].kind.reproducible = False
        enforce_outputs(session, done)

    def test_other_files_than_promised_are_an_error(self, session):
        files = {"w": PinnedFile(7, sha256="ab" * 32), "config.json": PinnedFile(2, git_blob="cd" * 20)}
        session.pins = Pinned({"revision": COMMIT}, "asked", lambda: files)
        lockfile.write_lock(session)
        with pytest.raises(StageFailed, match="download brought other files") as error:
            enforce_outputs(session, session.run())
        assert "files.w.sha256" in str(error.value)
        assert "files.config.json.git_blob" in str(error.value)

    def test_promised_files_that_came_are_fine(self, session, tmp_path):
        (tmp_path / "c").write_bytes(b"{}")
        files = {
            "w": PinnedFile(7, sha256=hashlib.sha256(b"weights").hexdigest()),
            "config.json": PinnedFile(2, git_blob=git_blob(tmp_path / "c")),
        }
        session.pins = Pinned({"revision": COMMIT}, "asked", lambda: files)
        lockfile.write_lock(session)
        enforce_outputs(session, session.run())


def test_a_git_blob_is_what_git_says(tmp_path):
    (tmp_path / "file").write_bytes(b"some\0bytes\n")
    try:
        said = subprocess.run(["git", "hash-object", "file"], cwd=tmp_path, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    assert git_blob(tmp_path / "file") == said.stdout.strip()
