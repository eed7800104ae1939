"""A store that others share, in a directory: what comes from there, what goes there, and who is believed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from contextlib import nullcontext
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from support.sharing import given, opened, taken, tree
from support.stores import contents, fill, killed_at, publish, record
from support.workshop import environment, statuses

import bigpipe
from bigpipe import files
from bigpipe.errors import DoesNotFit, GateFailed, Interrupted, ManifestError, Transient, UsageError
from bigpipe.files import seal
from bigpipe.orchestrator import commands
from bigpipe.orchestrator.contract import LogLine, NodeFinished, NodeStarted
from bigpipe.orchestrator.planning import Action
from bigpipe.orchestrator.running import sharing
from bigpipe.orchestrator.store.claims import LARGEST, Claim, Wrong, read_claim
from bigpipe.orchestrator.store.fetching import known_rate, lacking, note_rate
from bigpipe.orchestrator.store.layout import hex_of
from bigpipe.orchestrator.store.remote import PIECE, Away, Beats, open_remote
from bigpipe.orchestrator.store.store import Store
from bigpipe.orchestrator.store.work import fetching_key
from bigpipe.redaction import conceal

FILES = {"config.json": b"{}", "weights/one": b"1" * 5000, "weights/two": b"1" * 5000, "empty": b""}
HEAD = "version: 1\nname: shared\nparams: {text: hello}\nstages:\n"
CHAIN = HEAD + (
    '  a: {uses: write, with: {text: "${params.text}"}}\n'
    "  b: {uses: join, inputs: {first: a}, with: {squeeze: true}, cache: false}\n"
    "  c: {uses: join, inputs: {first: b, second: a}, gates: ['characters > 2']}\n"
)


class Plain(LocalFileSystem):
    """A directory as a file system that is not known to be one."""

    protocol = "plain"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("plain://"))


class Slow(Plain):
    """Takes a quarter of a second for each piece of a file, and says so."""

    protocol = "slow"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("slow://"))

    def put_file(self, lpath, rpath, callback, **options):
        for _ in range(6):
            time.sleep(0.25)
            callback.relative_update(1)
        super().put_file(lpath, rpath)


ACTING = """
from bigpipe.orchestrator.stage import Forecast, Metrics, Params, Planning, Stage, StageResult
class Nothing(Params): pass
class Done(Metrics): pass
def act(params, context):
    (context.out / "receipt").write_text("done")
    return StageResult(Done())
STAGE = Stage(kind="act", version=1, params=Nothing, metrics=Done, inputs={}, output="receipt", run=act,
              runs_in="inline", forecast=lambda params, context: Forecast(),
              planning=Planning(present=lambda params, receipt, context: True))
"""


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "one") as opened_store:
        yield opened_store


@pytest.fixture
def second(tmp_path):
    with Store(tmp_path / "two") as opened_store:
        yield opened_store


@pytest.fixture
def shared(tmp_path) -> Path:
    return tmp_path / "shared"


class Told:
    """Hears what a run says of the remote store."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def report(self, event) -> None:
        if isinstance(event, LogLine) and event.node == "remote store":
            self.lines.append(event.line)


def the_object(shared: Path, content: bytes) -> Path:
    (found,) = [path for path in (shared / "v1/objects").iterdir() if path.read_bytes() == content]
    return found


class TestBytes:
    def test_a_second_store_has_the_same_artifact_and_every_byte_was_compared(self, store, second, shared):
        made = publish(store, "a", FILES)
        remote, heard = opened(shared, store)
        assert given(remote, store, made)
        assert not given(remote, store, made)  # it is there
        got = taken(opened(shared, second)[0], second, record("a", metrics={}))
        assert (got.digest, got.files, got.metrics) == (made.digest, made.files, made.metrics)
        assert contents(second, got) == FILES
        assert second.intact(got)
        assert second.verify().clean
        assert heard == []
        assert len(list((shared / "v1/objects").iterdir())) == 3  # two files have the same bytes

    def test_one_flipped_byte_is_refused_and_the_right_bytes_take_its_place(self, store, second, shared):
        made = publish(store, "a", FILES)
        given(opened(shared, store)[0], store, made)
        damaged = the_object(shared, b"1" * 5000)
        damaged.chmod(0o600)
        damaged.write_bytes(b"1" * 4999 + b"0")
        remote, heard = opened(shared, second)
        with pytest.raises(Wrong, match="other bytes"):
            taken(remote, second, record("a"))
        assert second.find(record("a").key) is None
        assert len(heard) == 1
        again = publish(second, "a", FILES)
        assert given(remote, second, again)
        assert damaged.read_bytes() == b"1" * 5000

    @pytest.mark.parametrize("size", [0, 10, 4999, 5001])
    def test_an_object_of_another_size_is_refused(self, store, second, shared, size):
        made = publish(store, "a", FILES)
        given(opened(shared, store)[0], store, made)
        damaged = the_object(shared, b"1" * 5000)
        damaged.unlink()
        damaged.write_bytes(b"1" * size)
        remote, _ = opened(shared, second)
        if size > 5000:  # what is more than was asked for is never asked for
            assert contents(second, taken(remote, second, record("a"))) == FILES
        else:
            with pytest.raises(Wrong, match="another size"):
                taken(remote, second, record("a"))
            assert given(opened(shared, store)[0], store, made)  # another size is not there
        assert (damaged.read_bytes() == b"1" * 5000) is (size < 5000)
        assert not remote.away

    def test_a_record_whose_object_is_gone_is_refused(self, store, second, shared):
        made = publish(store, "a", FILES)
        given(opened(shared, store)[0], store, made)
        the_object(shared, b"1" * 5000).unlink()
        with pytest.raises(Wrong, match="not there"):
            taken(opened(shared, second)[0], second, record("a"))
        assert given(opened(shared, store)[0], store, made)

    def test_what_a_killed_process_had_fetched_is_gone_on_with_but_not_believed(self, store, second, shared):
        large = os.urandom(2 * PIECE + 5)
        made = publish(store, "a", {"large": large})
        given(opened(shared, store)[0], store, made)
        for begun, first in (
            (large[: PIECE + 7], PIECE + 7),
            (b"0" * (PIECE + 7), PIECE + 7),
            (b"0" * len(large), len(large)),
            (large + b"more", 0),
        ):
            with Store(second.root.with_name(f"store-{len(begun)}-{begun[:1].hex()}")) as third:
                work = third.layout.working(fetching_key(made.key))
                (work / "scratch").mkdir(parents=True)
                sha256 = str(made.files["large"]["sha256"])
                (work / "scratch" / f"{sha256}.coming").write_bytes(begun)
                (work / "out").mkdir()
                (work / "out" / "stray").write_bytes(b"of something else")
                if first == 0:
                    (work / "out" / "large").write_bytes(b"0" * len(large))
                (work / "out" / "link").symlink_to("/etc/hostname")
                moved: list[int] = []
                got = taken(opened(shared, third)[0], third, record("a"), moved)
                assert contents(third, got) == {"large": large}
                assert moved[0] == first
                assert sum(moved) == len(large)

    def test_what_is_interrupted_is_not_recorded(self, store, second, shared):
        made = publish(store, "a", FILES)
        given(opened(shared, store)[0], store, made)
        remote, cancelled = opened(shared, second)[0], threading.Event()
        cancelled.set()
        with pytest.raises(Interrupted):
            second.receive(remote.find(made.key).recorded(record("a")), remote, kept=True, cancelled=cancelled)
        assert second.find(made.key) is None

    def test_how_fast_it_came_foretells_how_long_it_takes(self, store, second, shared):
        remote = opened(shared, second)[0]
        note_rate(second.layout, remote, 1000, 0.001)  # too little to say anything
        assert known_rate(second.layout, remote) is None
        note_rate(second.layout, remote, 2**21, 2.0)
        assert known_rate(second.layout, remote) == 2**20
        assert known_rate(second.layout, opened(shared / "other", second)[0]) is None

    def test_what_the_store_has_already_does_not_come(self, store, second, shared):
        made = publish(store, "a", FILES)
        given(opened(shared, store)[0], store, made)
        publish(second, "b", {"other": b"1" * 5000})
        there = the_object(shared, b"1" * 5000)
        there.unlink()
        assert contents(second, taken(opened(shared, second)[0], second, record("a"))) == FILES

    def test_what_has_rotted_here_comes(self, store, second, shared):
        made = publish(store, "a", FILES)
        given(opened(shared, store)[0], store, made)
        publish(second, "b", {"other": b"1" * 5000})
        rotten = second.layout.object(the_object(shared, b"1" * 5000).name)
        rotten.chmod(0o600)
        rotten.write_bytes(b"0" * 5000)
        assert contents(second, taken(opened(shared, second)[0], second, record("a"))) == FILES

    def test_more_than_is_free_does_not_begin_to_come(self, store, second, shared):
        made = publish(store, "a", FILES)
        given(opened(shared, store)[0], store, made)
        path = shared / "v1/keys" / f"{hex_of(made.key)}.json"
        claim = Claim.of(made, kept=True)
        huge = {"one": {"sha256": "0" * 64, "size": 2**53}}
        grown = made.model_copy(update={"files": huge}).holding({"one": ("0" * 64, 2**53)})
        path.unlink()
        path.write_bytes(Claim.of(grown, kept=True).sealed())
        assert claim.key == grown.key
        with pytest.raises(DoesNotFit):
            taken(opened(shared, second)[0], second, record("a"))

    def test_only_what_has_still_to_come_needs_room(self, store, second, shared, monkeypatch):
        """Not what another artifact here has, and what a killed process had fetched."""
        made = publish(
            store, "a", {"here": b"1" * 5000, "fetched": b"2" * 4000, "begun": b"3" * 3000, "new": b"4" * 20}
        )
        given(opened(shared, store)[0], store, made)
        publish(second, "b", {"other": b"1" * 5000})
        work = second.layout.working(fetching_key(made.key))
        begun = f"scratch/{made.files['begun']['sha256']}.coming"
        fill(work, {"out/fetched": b"2" * 4000, begun: b"3" * 2900})
        assert lacking(second.layout, made) == 120
        for free in (119, 120):
            monkeypatch.setattr(files, "free_space", lambda path, free=free: free)
            with pytest.raises(DoesNotFit) if free < 120 else nullcontext():
                taken(opened(shared, second)[0], second, record("a"))
        assert second.find(made.key).digest == made.digest


class TestOrder:
    def test_a_record_is_not_there_before_its_objects(self, store, shared):
        made = publish(store, "a", FILES)
        (shared / "v1").mkdir(parents=True)
        (shared / "v1/objects").write_bytes(b"no directory")
        with pytest.raises(Away):
            given(opened(shared, store)[0], store, made)
        assert not (shared / "v1/keys").exists()

    @pytest.mark.parametrize("steps", [range(2, 90, 11), pytest.param(range(1, 200), marks=pytest.mark.fault)])
    def test_killed_at_any_point_of_a_push_nothing_is_half_there(self, store, tmp_path, steps):
        made = publish(store, "a", FILES)
        whole = killed = 0
        for step in steps:
            shared = tmp_path / f"shared-{step}"
            if not killed_at(step, lambda to=shared: given(opened(to, store)[0], store, made)):
                whole += 1
            killed += 1
            with Store(tmp_path / f"store-{step}") as other:
                remote, heard = opened(shared, other)
                if remote.find(made.key) is not None:
                    assert contents(other, taken(remote, other, record("a"))) == FILES
                assert heard == []
                for path in (shared / "v1/objects").glob("[!.]*"):
                    assert path.read_bytes() in FILES.values()
            given(opened(shared, store)[0], store, made)  # the next one completes it
            assert remote.find(made.key) is not None
        assert whole < killed

    @pytest.mark.parametrize("protocol", ["plain", "memory"])
    def test_other_file_systems(self, store, second, tmp_path, protocol):
        """One whose files are there while they are written, and one where a file is there as a whole."""
        fsspec.register_implementation("plain", Plain, clobber=True)
        address = f"{protocol}://{tmp_path}/shared"
        first, other = publish(store, "a", FILES), publish(second, "a", {"x": b"other"})
        remote, heard = opened(address, store)
        assert given(remote, store, first)
        assert not given(remote, store, first)
        given(remote, second, other)
        with Store(tmp_path / "three") as third:
            assert contents(third, taken(opened(address, third)[0], third, record("a"))) == FILES
        assert heard == []
        left = [path.name for path in (tmp_path / "shared").rglob("*") if path.name.endswith(".part")]
        assert left == []

    def test_the_first_writer_of_a_key_stays(self, store, second, shared):
        first, other = publish(store, "a", {"x": b"first"}), publish(second, "a", {"x": b"other"})
        assert given(opened(shared, store)[0], store, first)
        before = tree(shared / "v1/keys")
        given(opened(shared, second)[0], second, other)
        assert tree(shared / "v1/keys") == before
        assert opened(shared, second)[0].find(other.key).digest == first.digest

    @pytest.mark.parametrize("protocol", ["file", "plain", "memory"])
    def test_who_comes_second_in_spite_of_a_look_is_told(self, store, tmp_path, protocol):
        """Both saw that nothing was there."""
        fsspec.register_implementation("plain", Plain, clobber=True)
        remote, source = opened(f"{protocol}://{tmp_path}/shared", store)[0], tmp_path / "source"
        path = remote._path("keys", "x")
        for content in (b"first", b"second"):
            source.write_bytes(content)
            with pytest.raises(FileExistsError) if content == b"second" else nullcontext():
                remote._send(path, source, Beats(lambda size: None), replaces=False)
        assert remote._system.cat_file(path) == b"first"
        remote._send(path, source, Beats(lambda size: None), replaces=True)
        assert remote._system.cat_file(path) == b"second"

    def test_of_eight_who_write_a_record_at_once_one_has_written_it(self, store, shared):
        made, wrote, start = publish(store, "a", FILES), [], threading.Barrier(8)

        def offer() -> None:
            remote, _ = opened(shared, store)
            assert remote.find(made.key) is None
            start.wait()
            wrote.append(given(remote, store, made, kept=False))

        threads = [threading.Thread(target=offer) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(wrote) == [False] * 7 + [True]

    def test_eight_writers_at_once_leave_one_whole_record(self, store, shared, tmp_path):
        stores = [Store(tmp_path / f"writer-{number}") for number in range(8)]
        made = [publish(each, "a", {"x": b"%d" % number * 1000}) for number, each in enumerate(stores)]
        failed: list[BaseException] = []

        def offer(number: int) -> None:
            try:
                given(opened(shared, stores[number])[0], stores[number], made[number])
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=offer, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []
        got = taken(opened(shared, store)[0], store, record("a"))
        assert got.digest in {each.digest for each in made}
        assert contents(store, got)["x"] in {b"%d" % number * 1000 for number in range(8)}
        assert [path for path in (shared / "v1").rglob(".*")] == []
        for each in stores:
            each.close()


def claimed(**changes: object) -> bytes:
    """The record of a file, with something else in it."""
    made = record("a").holding({"x": ("a" * 64, 3)})
    return seal({**Claim.of(made, kept=True).model_dump(mode="json"), **changes})


def named(*names: str) -> bytes:
    made = record("a").holding({name: ("a" * 64, 3) for name in names})
    return Claim.of(made, kept=True).sealed()


KEY = record("a").key
POISON = {
    "not sealed": b"{}",
    "empty": b"",
    "flipped": claimed()[:-40] + bytes([claimed()[-40] ^ 1]) + claimed()[-39:],
    "another key": Claim.of(record("b").holding({"x": ("a" * 64, 3)}), kept=True).sealed(),
    "too large": claimed(metrics={"note": "a" * LARGEST}),
    "nested": b'{"sha256": "' + b"0" * 64 + b'", "record":\n' + b"[" * 100_000 + b"\n}\n",
    "deep metrics": claimed(metrics={"a": json.loads("[" * 900 + "]" * 900)}),
    "more fields": claimed(more=1),
    "no list": claimed(files=[]),
    "no number": claimed(metrics={"loss": float("nan")}),
    "a time": claimed(created="9999-12-31T23:59:59+00:00"),
    "a digest of its own": claimed(digest="sha256:" + "0" * 64),
    "no digest": claimed(digest=None),
    "a size below nothing": claimed(files={"x": {"sha256": "a" * 64, "size": -1}}),
    "a size that is a text": claimed(files={"x": {"sha256": "a" * 64, "size": "3"}}),
    "a size beyond all": claimed(files={"x": {"sha256": "a" * 64, "size": 10**400}}),
    "no sha256": Claim.of(record("a").holding({"x": ("../../etc", 3)}), kept=True).sealed(),
    "above": named("../x"),
    "above within": named("a/../../x"),
    "absolute": named("/etc/passwd"),
    "here": named("a/./x"),
    "nothing": named(""),
    "no name": named("a//x"),
    "a NUL": named("a\0b"),
    "a folder that is a file": named("a", "a/b"),
    "a long name": named("a" * 256),
    "a long path": named("/".join(["a"] * 600)),
    "a name of ours": named(".x.0123456789abcdef.part"),
    "seconds without end": claimed(seconds=float("inf")),
    "true seconds": claimed(seconds=True),
}


class TestBelief:
    def test_what_is_right_is_read(self):
        assert read_claim(claimed(), KEY).files["x"].size == 3

    @pytest.mark.parametrize("name", POISON)
    def test_what_no_store_would_write_is_refused(self, name, store, shared):
        with pytest.raises(Wrong):
            read_claim(POISON[name], KEY)
        path = shared / "v1/keys" / f"{hex_of(KEY)}.json"
        path.parent.mkdir(parents=True)
        path.write_bytes(POISON[name])
        remote, heard = opened(shared, store)
        assert remote.find(KEY) is None
        assert remote.find(KEY) is None
        assert len(heard) == 1
        assert "is not believed" in heard[0]
        assert not remote.away

    def test_a_secret_is_not_shared(self, store, shared):
        conceal(["a-secret-of-somebody"])
        made = publish(store, "a", FILES, metrics={"note": "a-secret-of-somebody"})
        with pytest.raises(Wrong, match="secret"):
            given(opened(shared, store)[0], store, made)
        assert not shared.exists()

    def test_nothing_of_who_made_it_or_where_is_shared(self, store, shared):
        given(opened(shared, store)[0], store, publish(store, "a", FILES))
        for content in tree(shared / "v1/keys").values():
            assert b"/recipes/one.yaml" not in content
            assert b"20260102-030405" not in content

    def test_a_password_of_an_address_is_shown_nowhere(self, store, monkeypatch):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-key-of-the-bucket")
        remote, heard = opened("http://somebody:pass-of-somebody@127.0.0.1:9/x", store)
        assert remote.find(KEY) is None
        told = "".join([*heard, remote.name, remote.away, repr(remote)])
        assert "pass-of-somebody" not in told
        remote.leave(Exception("the-key-of-the-bucket"))
        assert "the-key" not in str(Transient("the-key-of-the-bucket"))


class TestTrouble:
    def test_what_never_answers_is_left_after_so_many_seconds(self, store, shared):
        given(opened(shared, store)[0], store, publish(store, "b", FILES))
        path = shared / "v1/keys" / f"{hex_of(KEY)}.json"
        os.mkfifo(path)
        remote, heard = opened(shared, store, patience=0.1)
        assert remote.find(KEY) is None
        assert remote.away
        assert remote.find(record("b").key) is None
        assert len(heard) == 1
        assert "going on without it" in heard[0]
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))  # lets the thread go that waits for it

    def test_what_is_slow_but_moves_is_waited_for(self, store, tmp_path):
        fsspec.register_implementation("slow", Slow, clobber=True)
        remote, heard = opened(f"slow://{tmp_path}/shared", store, patience=0.8)
        assert given(remote, store, publish(store, "a", {"x": b"1"}), kept=False)
        assert heard == []

    def test_an_interruption_does_not_wait_for_what_never_answers(self, store, second, shared):
        given(opened(shared, store)[0], store, publish(store, "a", FILES))
        path = the_object(shared, b"1" * 5000)
        path.unlink()
        os.mkfifo(path)
        remote, heard = opened(shared, second, patience=60)
        timer, began = threading.Timer(0.3, remote.stopped.set), time.monotonic()
        timer.start()
        with pytest.raises(Interrupted):
            taken(remote, second, record("a"))
        assert time.monotonic() - began < 20
        assert heard == []
        timer.join()
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))

    def test_what_can_only_be_read_is_read(self, store, second, shared, tmp_path):
        """A server of files that takes none, and knows no ranges."""
        given(opened(shared, store)[0], store, publish(store, "a", FILES))

        class Quiet(SimpleHTTPRequestHandler):
            def __init__(self, *arguments) -> None:
                super().__init__(*arguments, directory=str(shared))

            def log_message(self, *arguments) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            remote, heard = opened(f"http://127.0.0.1:{server.server_address[1]}", second)
            assert contents(second, taken(remote, second, record("a"))) == FILES
            with pytest.raises(Away):
                given(remote, second, publish(second, "b", FILES))
            server.shutdown()
        assert heard == []

    @pytest.mark.parametrize(
        "address", ["nowhere://x", "simplecache::nowhere://x", "s3:/bucket", "one/within", "file://{one}", ".."]
    )
    def test_an_address_that_cannot_be_is_said_before_anything_is_asked(self, store, tmp_path, monkeypatch, address):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UsageError):
            opened(address.format(one=store.root), store)


@pytest.fixture(scope="module")
def ran_once(tmp_path_factory) -> Path:
    """Where CHAIN has run, and what it gave is in `one` and `shared`."""
    folder = tmp_path_factory.mktemp("once")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", environment(folder)["PYTHONPATH"])
        (folder / "recipe.yaml").write_text(CHAIN)
        told = Told()
        made = bigpipe.run(folder / "recipe.yaml", store=folder / "one", remote=str(folder / "shared"), reporter=told)
    assert statuses(made) == dict.fromkeys("abc", "succeeded")
    assert told.lines == []
    return folder


@pytest.fixture
def warmed(workshop, ran_once, shared, tmp_path) -> dict[str, object]:
    """Options of a run on a second store, with a remote store where everything is."""
    workshop.manifest.write_text(CHAIN)
    shutil.copytree(ran_once / "shared", shared)
    return {"store": tmp_path / "two", "remote": str(shared)}


def key_of(workshop, node: str) -> str:
    return bigpipe.plan(workshop.manifest, remote="").nodes[node].decision.key


class TestRuns:
    def test_a_second_store_runs_nothing(self, workshop, warmed, tmp_path):
        plan = bigpipe.plan(workshop.manifest, **warmed)
        assert [node.action for node in plan.nodes.values()] == [Action.REMOTE] * 3
        assert (plan.fetch_bytes, plan.download_bytes, plan.write_bytes) == (5 + 11, 0, 0)
        assert plan.peak_disk == 16
        assert "5 B to fetch" in plan.render()
        got = workshop.run(**warmed)
        assert workshop.ran == []
        assert statuses(got) == dict.fromkeys("abc", "cached")
        assert (got.path("c") / "text").read_text() == "HELLO hello"
        assert got.path("b") is None  # its bytes are kept nowhere
        with Store(tmp_path / "two") as second:
            assert second.verify().clean
        alone = workshop.run(store=tmp_path / "two", remote="")  # what came is there for good
        assert workshop.ran == []
        assert statuses(alone) == dict.fromkeys("abc", "cached")

    def test_a_gate_that_does_not_hold_is_told_before_a_byte_comes(self, workshop, warmed):
        with pytest.raises(GateFailed):
            workshop.run(CHAIN.replace("characters > 2", "characters > 20"), **warmed)
        assert not (warmed["store"] / "objects").exists()

    def test_bytes_that_are_kept_nowhere_are_made_where_they_are_needed(self, workshop, warmed):
        workshop.manifest.write_text(CHAIN.replace("second: a}", "second: a}, with: {separator: '-'}"))
        plan = bigpipe.plan(workshop.manifest, **warmed)
        assert {name: str(node.action) for name, node in plan.nodes.items()} == {"a": "remote", "b": "run", "c": "run"}
        got = workshop.run(**warmed)
        assert workshop.ran == ["b", "c"]
        assert statuses(got) == {"a": "cached", "b": "succeeded", "c": "succeeded"}

    def test_a_record_without_bytes_is_nothing_to_whoever_keeps_them(self, workshop, warmed):
        workshop.manifest.write_text(CHAIN.replace(", cache: false", ""))
        plan = bigpipe.plan(workshop.manifest, **warmed)
        assert [str(node.action) for node in plan.nodes.values()] == ["remote", "run", "run"]

    def test_what_is_made_in_its_place_is_shared_with_its_bytes_and_stays_so(self, workshop, warmed, shared, tmp_path):
        kept = CHAIN.replace(", cache: false", "")
        for text, store in ((kept, "two"), (CHAIN, "three")):
            key = workshop.run(text, store=tmp_path / store, remote="").nodes["b"].key
            commands.push(workshop.manifest, store=tmp_path / store, remote=str(shared))
            assert read_claim((shared / "v1/keys" / f"{hex_of(key)}.json").read_bytes(), key).kept
        workshop.manifest.write_text(kept)
        pulled = commands.pull(workshop.manifest, store=tmp_path / "four", remote=str(shared))
        assert [node.status for node in pulled.nodes.values()] == ["fetched"] * 3

    def test_an_interruption_while_it_is_slow_fails_nothing(self, workshop, shared, tmp_path, capsys):
        """Neither in the thread that shares what a gave, nor where it is asked for b, whose turn does not come."""
        recipe = HEAD + "  a: {uses: write}\n  b: {uses: join, inputs: {first: a}}\n"
        made = workshop.run(recipe, store=tmp_path / "one", remote="")
        (shared / "v1/keys").mkdir(parents=True)

        def interrupted(event) -> None:
            if isinstance(event, NodeStarted):
                for node in "ab":
                    os.mkfifo(shared / "v1/keys" / f"{hex_of(made.nodes[node].key)}.json")
            elif isinstance(event, NodeFinished) and event.status == "succeeded":
                signal.raise_signal(signal.SIGINT)

        got = workshop.run(store=tmp_path / "two", remote=str(shared), progress=interrupted)
        assert statuses(got) == {"a": "succeeded", "b": "skipped"}
        assert got.exit_code == 130
        assert got.nodes["b"].error is None

    def test_what_cannot_be_shared_now_stops_no_thread(self, workshop, shared, tmp_path):
        recipe = HEAD + "  a: {uses: write}\n"
        workshop.run(recipe, store=tmp_path / "one", remote="")
        plan = bigpipe.plan(workshop.manifest, store=tmp_path / "one", remote=str(shared))
        session, record = plan.session, plan.nodes["a"].decision.record
        (shared / "v1/keys").mkdir(parents=True)
        os.mkfifo(shared / "v1/keys" / f"{hex_of(record.key)}.json")
        session.remote.stopped.set()
        assert sharing.give(session, plan.nodes["a"].node, record, lambda event: None) == "refused"

    def test_what_is_forced_runs(self, workshop, warmed):
        got = workshop.run(**warmed, nodes=["a"], force=["a"])
        assert workshop.ran == ["a"]
        assert statuses(got) == {"a": "succeeded"}

    def test_what_was_flipped_is_made_again_and_the_rest_comes(self, workshop, warmed, shared):
        damaged = the_object(shared, b"HELLO hello")
        damaged.chmod(0o600)
        damaged.write_bytes(b"HELLO hellO")
        told = Told()
        got = workshop.run(**warmed, reporter=told)
        assert statuses(got) == {"a": "cached", "b": "succeeded", "c": "succeeded"}
        assert (got.path("c") / "text").read_text() == "HELLO hello"
        assert damaged.read_bytes() == b"HELLO hello"
        assert any("other bytes" in line for line in told.lines)

    @pytest.mark.parametrize(
        "change",
        [
            {"kind": "join"},
            {"artifact_type": "adapter"},
            {"metrics": {"x": 1}},
            {"files": {"text": {"sha256": "0" * 64, "size": 2**53}}, "digest": ...},
            {"files": {}, "digest": None, "artifact_type": ""},
        ],
    )
    def test_a_record_that_cannot_be_is_refused_in_a_line(self, workshop, warmed, shared, change):
        """Of another kind, of nothing where something must be, or of more than is free here, which is no misfit."""
        key = key_of(workshop, "a")
        path = shared / "v1/keys" / f"{hex_of(key)}.json"
        claim = read_claim(path.read_bytes(), key)
        if change.get("digest"):
            change = {**change, "digest": record("a").holding({"text": ("0" * 64, 2**53)}).digest}
        path.chmod(0o600)
        path.write_bytes(Claim.model_validate({**claim.model_dump(), **change}).sealed())
        told = Told()
        plan = bigpipe.plan(workshop.manifest, ["a"], **warmed, reporter=told)
        assert plan.nodes["a"].action is Action.RUN
        assert plan.errors() == []
        assert len(told.lines) == 1

    @pytest.mark.parametrize(
        "change",
        [{}, {"kind": "join"}, {"artifact_type": "adapter"}, {"metrics": {"x": 1}}, {"kept": False}],
        ids=["right", "kind", "type", "metrics", "without its files"],
    )
    def test_what_a_run_would_not_take_is_not_shared(self, workshop, ran_once, warmed, shared, change):
        """Though it is here, so that no run asks for it."""
        key = key_of(workshop, "a")
        path = shared / "v1/keys" / f"{hex_of(key)}.json"
        claim = read_claim(path.read_bytes(), key)
        path.chmod(0o600)
        path.write_bytes(Claim.model_validate({**claim.model_dump(), **change}).sealed())
        told = Told()
        plan = bigpipe.plan(workshop.manifest, ["a"], store=ran_once / "one", remote=str(shared), reporter=told)
        assert plan.nodes["a"].action is Action.CACHED
        assert commands.shared(plan) == {"a": not change}
        assert len(told.lines) == (bool(change) and "kept" not in change)

    def test_what_is_away_or_cannot_be_written_costs_a_line(self, workshop, shared, tmp_path):
        away, closed = Told(), Told()
        recipe = HEAD + "  a: {uses: write}\n  b: {uses: join, inputs: {first: a}}\n"
        workshop.manifest.write_text(recipe)
        bigpipe.plan(workshop.manifest, remote="http://127.0.0.1:9/x", reporter=away)
        assert len(away.lines) == 1
        shared.mkdir()
        (shared / "v1").write_bytes(b"no directory")
        got = workshop.run(recipe, store=tmp_path / "one", remote=str(shared), reporter=closed)
        assert got.exit_code == 0
        assert len(closed.lines) == 1
        pushed = commands.push(workshop.manifest, store=tmp_path / "one", remote=str(shared))
        assert [type(error) for error in pushed.errors] == [Transient]

    def test_what_acts_outside_the_store_is_done_by_everybody(self, workshop, shared, tmp_path):
        (tmp_path / "acting.py").write_text(ACTING)
        recipe = HEAD.replace("stages:", "trust: {modules: [acting]}\nstages:") + "  act: {uses: 'acting:STAGE'}\n"
        options = {"remote": str(shared)}
        for store in ("one", "two"):
            got = workshop.run(recipe, store=tmp_path / store, **options)
            assert statuses(got) == {"act": "succeeded"}
        pushed = commands.push(workshop.manifest, store=tmp_path / "two", **options)
        assert {name: node.status for name, node in pushed.nodes.items()} == {"act": "own"}
        assert not shared.exists()

    @pytest.mark.parametrize(
        "work", [commands.push, commands.pull, lambda *_, **options: commands.run(*_, jobs=1, **options), commands.run]
    )
    def test_nobody_frees_what_a_command_is_about_to_find(self, workshop, ran_once, tmp_path, monkeypatch, work):
        plans, real = [], commands.make_plan

        def planned(session, **options):
            with Store(ran_once / "one") as other, pytest.raises(Transient, match="another run uses the store"):
                other.gc(lambda path: set())
            plans.append(session)
            return real(session, **options)

        monkeypatch.setattr(commands, "make_plan", planned)
        workshop.manifest.write_text(CHAIN)
        work(workshop.manifest, store=ran_once / "one", remote=str(ran_once / "shared"))
        assert len(plans) == 1

    def test_push_and_pull(self, workshop, ran_once, shared, tmp_path):
        workshop.manifest.write_text(CHAIN)

        def did(work, store: Path, *nodes: str) -> list[str]:
            done = work(workshop.manifest, nodes, store=store, remote=str(shared))
            assert done.errors == ()
            return [node.status for node in done.nodes.values()]

        with pytest.raises(UsageError, match="there is no store at"):
            did(commands.pull, tmp_path / "two")
        assert did(commands.push, ran_once / "one", "a") == ["sent"]
        assert did(commands.pull, tmp_path / "three", "b", "c") == ["fetched", "absent", "absent"]
        plan = bigpipe.plan(workshop.manifest, store=tmp_path / "two", remote=str(shared))
        assert commands.shared(plan) == {"a": True, "b": False, "c": None}
        assert did(commands.push, ran_once / "one") == ["there", "sent", "sent"]
        assert did(commands.pull, tmp_path / "two") == ["fetched"] * 3
        assert did(commands.pull, tmp_path / "two") == ["here"] * 3
        with Store(tmp_path / "two") as second:
            assert second.verify().clean
            assert {one.kind for one in second.gc(lambda path: set(), dry_run=True).freed} <= {"temporary"}
        workshop.run(store=tmp_path / "two", remote="")
        assert workshop.ran == []

    def test_what_a_killed_pull_had_fetched_is_no_garbage(self, workshop, warmed, monkeypatch):
        key = key_of(workshop, "a")
        monkeypatch.delattr(sharing, "fetch")
        with pytest.raises(NameError):
            commands.pull(workshop.manifest, ["a"], **warmed)
        with Store(warmed["store"]) as second:
            work = second.layout.working(fetching_key(key))
            fill(work, {"scratch/0.coming": b"12"})
            second.gc(lambda path: set())
            assert work.exists()
            publish(second, "a", {"text": b"made here"}, key=key)
            second.gc(lambda path: set())
            assert not work.exists()

    def test_another_result_that_was_there_first_stays(self, workshop, shared, tmp_path):
        recipe = HEAD + "  a: {uses: write, with: {stamp: true}}\n"
        workshop.run(recipe, store=tmp_path / "one", remote=str(shared))
        workshop.run(store=tmp_path / "two", remote="")
        pushed = commands.push(workshop.manifest, store=tmp_path / "two", remote=str(shared))
        assert pushed.nodes["a"].status == "other"
        assert len(tree(shared / "v1/objects")) == 1


class TestNaming:
    def address(self, workshop, text: str, remote: str | None = None, **options) -> str | None:
        workshop.manifest.write_text(text)
        found = bigpipe.plan(workshop.manifest, remote=remote, **options).session.remote
        return found and found.address

    def test_the_option_comes_before_the_environment_and_that_before_the_recipe(self, workshop, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path.parent)
        text = HEAD.replace("stages:", "remote: beside\nstages:") + "  a: {uses: write}\n"
        assert self.address(workshop, text) == f"file://{tmp_path}/beside"
        monkeypatch.setenv("BIGPIPE_REMOTE", "elsewhere")
        assert self.address(workshop, text) == f"file://{tmp_path.parent}/elsewhere"
        assert self.address(workshop, text, "memory://here") == "memory://here"
        assert self.address(workshop, text, "") is None
        assert self.address(workshop, text, "memory://here", offline=True) is None
        monkeypatch.setenv("BIGPIPE_REMOTE", "")
        assert self.address(workshop, text) is None

    def test_a_recipe_may_only_read(self, workshop, shared, tmp_path):
        mapped = f"remote: {{url: {shared}, publish: false, timeout: 5s}}\nstages:"
        workshop.run(HEAD.replace("stages:", mapped) + "  a: {uses: write}\n", store=tmp_path / "one")
        assert not shared.exists()
        workshop.run(store=tmp_path / "two", remote=str(shared))
        assert shared.exists()
        session = bigpipe.plan(workshop.manifest, store=tmp_path / "three").session
        assert (session.remote.publishes, session.remote.patience) == (False, 5.0)

    def test_keys_say_nothing_of_it(self, workshop, shared, tmp_path):
        plain = HEAD + "  a: {uses: write}\n"
        workshop.manifest.write_text(plain)
        without = bigpipe.plan(workshop.manifest).nodes["a"].decision.key
        made = workshop.run(plain.replace("stages:", f"remote: {shared}\nstages:"), store=tmp_path / "one")
        assert made.nodes["a"].key == without

    @pytest.mark.parametrize(
        ("written", "place"),
        [("s3://a:secret-of-b@c/d", (4, 9)), ("s3://${env.HOME}", (4, 9)), ("{uri: x}", (4, 10)), ("[a]", (4, 9))],
    )
    def test_what_is_wrong_with_it_is_told_at_its_place(self, workshop, written, place):
        workshop.manifest.write_text(HEAD.replace("stages:", f"remote: {written}\nstages:") + "  a: {uses: write}\n")
        with pytest.raises(ManifestError) as caught:
            bigpipe.load_manifest(workshop.manifest)
        assert (caught.value.problems[0].place.line, caught.value.problems[0].place.column) == place
        assert "secret-of-b" not in str(caught.value)

    @pytest.mark.parametrize("address", ["store/inside", ".", "file://{}/store", "local://{}/store"])
    def test_the_store_itself_is_none(self, tmp_path, address):
        with pytest.raises(UsageError, match="is the store itself, or lies in it"):
            open_remote(address.format(tmp_path), tmp_path, tmp_path / "store", {})
