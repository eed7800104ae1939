"""Bytes are believed by digest: a changed one is never used, wherever it lies and whoever finds it first."""

from __future__ import annotations

import os
import random
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
from support.forking import together
from support.stores import contents, fill, in_memory, killed_at, objects, publish, record

from bigpipe.bigmodel.checkpoint import open_checkpoint
from bigpipe.bigmodel.memo import recall, remember
from bigpipe.bigmodel.quantization import quantize_checkpoint
from bigpipe.bigmodel.writing import Conversion, convert
from bigpipe.errors import StageFailed, UsageError
from bigpipe.files import write_sealed
from bigpipe.orchestrator.running.records import RunRecord, load_run
from bigpipe.orchestrator.store.store import Store

FULL = [pytest.mark.fault, pytest.mark.timeout(3600)]
QUICKSTART = Path(__file__).parents[2] / "models" / "quickstart"
FILES = {"config.json": b'{"a": 1}', "w/model.safetensors": bytes(range(256))}


@pytest.fixture
def place(tmp_path):
    with in_memory(tmp_path) as found:
        yield found


def flip(path: Path, dice: random.Random) -> None:
    """Change a bit of a file, or of where a link leads; of a file nothing else: neither its size nor its times."""
    data = bytearray(os.fsencode(path.readlink()) if path.is_symlink() else path.read_bytes())
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    if path.is_symlink():
        path.unlink()
        if 0 not in data:
            os.symlink(bytes(data), path)
        return
    facts = path.stat()
    with open(path, "r+b") as file:
        file.write(data)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


@pytest.mark.parametrize("flips", [300, pytest.param(5000, marks=FULL)])
def test_in_objects_trees_and_records(place, seed, flips):
    dice = random.Random(seed)  # noqa: S311
    store = Store(place / "store")
    publish(store, "a", FILES)
    for _ in range(flips):
        places = [*objects(store), *(store.root / "keys").iterdir(), *(store.root / "artifacts").glob("*.json")]
        places += [path for path in (store.root / "artifacts").rglob("*") if path.is_symlink()]
        flip(dice.choice(places), dice)
        found = store.find(record("a").key)
        if found is not None and store.intact(found):
            assert contents(store, found) == FILES
            assert found == record("a", digest=found.digest, files=found.files)
        else:
            publish(store, "a", FILES)


@pytest.mark.parametrize("flips", [50, pytest.param(2000, marks=FULL)])
def test_an_object_that_rotted_is_replaced_by_whoever_publishes_its_bytes(place, seed, flips):
    """Its size and times are as they were, and nobody has looked since."""
    dice = random.Random(seed)  # noqa: S311
    store = Store(place / "store")
    publish(store, "a", FILES)
    for number in range(flips):
        flip(dice.choice(objects(store)), dice)
        other = publish(store, str(number), {**FILES, "own": b"%d" % number})
        assert contents(store, other)["w/model.safetensors"] == FILES["w/model.safetensors"]
        assert store.intact(other)
        found = store.find(record("a").key)
        assert store.intact(found)
        assert contents(store, found) == FILES


def test_an_object_that_is_replaced_is_there_all_the_time(place, seed):
    """Who publishes the same bytes beside it, where locks mean nothing, is to find it."""
    dice = random.Random(seed)  # noqa: S311
    store = Store(place / "store")
    publish(store, "a", {"x": b"bytes"})
    (path,) = objects(store)

    def act(which: int) -> None:
        if which:
            while not (place / "done").exists():
                os.lstat(path)
        else:
            for number in range(100):
                flip(path, dice)
                publish(store, str(number), {"x": b"bytes"})
            (place / "done").touch()

    assert [ending.said for ending in together(2, act)] == ["", ""]
    assert len(list((store.root / "quarantine").iterdir())) == 100


def test_a_link_to_an_object_that_rotted_is_not_passed_on(place):
    store = Store(place / "store")
    first = publish(store, "a", FILES)
    linked = store.artifact_path(first.digest) / "config.json"
    flip(Path(os.path.realpath(linked)), random.Random(1))  # noqa: S311
    with pytest.raises(StageFailed, match="a link to an object that has changed"):
        publish(store, "b", {"config.json": linked})
    assert not store.intact(store.find(first.key))
    publish(store, "a", FILES)
    assert contents(store, publish(store, "b", {"config.json": linked})) == {"config.json": FILES["config.json"]}


@pytest.mark.parametrize("share", [0.1, pytest.param(1.0, marks=FULL)])
def test_what_a_dead_run_left_is_read_before_it_is_taken_up(place, seed, share):
    """Killed at each step of a publishing; then a bit changes in what lies in its work folder or in the objects."""
    dice, step, died, journals = random.Random(seed), 0, True, 0  # noqa: S311
    while died:
        step += 1
        if dice.random() > share and step < 150:
            continue
        root = place / f"store-{step}"
        died = killed(step, root)
        changed = [p for p in root.rglob("*") if p.is_file() and not p.is_symlink() and p.stat().st_size == 256]
        journals += bool(changed) and any(root.glob("work/*/publish.json"))
        for path in changed:
            path.chmod(0o644)
            flip(path, dice)
        with Store(root) as store:
            store.enter()
            found = store.find(record("a").key)
            if found is None or not store.intact(found):
                found = publish(store, "a", FILES)
            assert contents(store, found) == FILES, step
            store.verify(repair=True)
            assert store.verify().clean
        shutil.rmtree(root)
    assert journals > 0


def killed(step: int, root: Path) -> bool:
    """Whether a publishing was killed at this step: it had not ended before."""

    def make() -> None:
        with Store(root) as store, store.lock(record("a").key) as work:
            fill(work.out, FILES)
            store.publish(record("a"), work.out)
            work.done()

    return killed_at(step, make)


@pytest.mark.parametrize("flips", [200, pytest.param(5000, marks=FULL)])
def test_in_remembered_answers(place, seed, flips):
    dice, path = random.Random(seed), place / "memo" / "answer.json"  # noqa: S311
    answer = {"tensors": {"a": ["float16", [2, 3]]}, "bytes": 12}
    for _ in range(flips):
        remember(path, answer)
        assert recall(path) == answer
        flip(path, dice)
        assert recall(path) is None
    remember(path, answer)
    path.rename(path.with_name("other.json"))
    assert recall(path.with_name("other.json")) is None  # the answer to another question


@pytest.mark.parametrize("flips", [100, pytest.param(2000, marks=FULL)])
def test_in_the_records_of_runs(place, seed, flips):
    dice, path = random.Random(seed), place / "20260101-000000-aaaaaa" / "run.json"  # noqa: S311
    path.parent.mkdir()
    told = RunRecord(run=path.parent.name, manifest="m.yaml", recipe="m", status="succeeded", started="2026-01-01")
    for _ in range(flips):
        write_sealed(path, told.model_dump(mode="json"))
        assert load_run(place) == told
        flip(path, dice)
        with pytest.raises(UsageError, match="damaged"):
            load_run(place)


class TestFinishedFiles:
    """Weight files that an attempt or an earlier run finished, and what is noted of them."""

    @pytest.fixture
    def source(self, place):
        shutil.copytree(QUICKSTART, place / "source")
        return open_checkpoint(place / "source")

    def weights(self, out: Path) -> dict[str, str]:
        return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(out.glob("*.safetensors"))}

    @pytest.mark.parametrize("flips", [3, pytest.param(300, marks=FULL)])
    def test_in_a_part_its_note_or_its_link(self, place, seed, source, flips):
        dice = random.Random(seed)  # noqa: S311
        quantize_checkpoint(source, place / "right", scheme="int8", parts=place / "parts")
        right = self.weights(place / "right")
        for number in range(flips):
            flip(dice.choice([path for path in (place / "parts").rglob("*") if path.is_file()]), dice)
            out = place / f"out-{number}"
            quantize_checkpoint(source, out, scheme="int8", parts=place / "parts")
            assert self.weights(out) == right
            shutil.rmtree(out)

    @pytest.mark.parametrize("flips", [3, pytest.param(300, marks=FULL)])
    def test_in_a_file_of_the_attempt_before_or_its_note(self, place, seed, source, flips):
        dice, out = random.Random(seed), place / "out"  # noqa: S311
        conversion = Conversion(max_shard_size=source.nbytes // 3)
        convert(source, out, conversion, journal=place / "notes")
        right = self.weights(out)
        for _ in range(flips):
            flip(dice.choice([*out.glob("*.safetensors"), *(place / "notes").iterdir()]), dice)
            convert(source, out, conversion, journal=place / "notes")
            assert self.weights(out) == right

    def test_a_link_of_the_shelf_to_another_object_is_not_followed(self, place, source):
        """As a store leaves it: the file is an object, and on the shelf lies a link to that."""
        quantize_checkpoint(source, place / "right", scheme="int8", parts=place / "parts")
        (part,) = (path for path in (place / "parts").rglob("*.safetensors"))
        wrong = (QUICKSTART / "model.safetensors").read_bytes()
        (place / "objects").mkdir()
        lure = place / "objects" / sha256(wrong).hexdigest()
        lure.write_bytes(wrong)
        right = self.weights(place / "right")
        part.unlink()
        part.symlink_to(lure)
        quantize_checkpoint(source, place / "out", scheme="int8", parts=place / "parts")
        assert self.weights(place / "out") == right
        assert lure.read_bytes() == wrong

    def test_two_writers_of_one_part_do_not_meet(self, place, source):
        def quantize(number: int) -> None:
            quantize_checkpoint(source, place / f"out-{number}", scheme="int8", parts=place / "parts")

        endings = together(4, quantize)
        assert [ending for ending in endings if ending.code] == []
        found = [self.weights(place / f"out-{number}") for number in range(4)]
        assert found == [found[0]] * 4
        assert not list(place.rglob("*.part"))


def test_gc_keeps_the_note_of_a_part_that_it_keeps(place):
    recipe = place / "recipe.yaml"
    recipe.write_text("")
    with Store(place / "store") as store:
        fill(
            store.parts,
            {"q/one.safetensors": b"one", "q/one.json": b"1", "q/two.safetensors": b"2", "q/two.json": b"2"},
        )
        publish(store, "kept", {"a": store.parts / "q" / "one.safetensors"})
        store.remember(recipe, None, "recipe", {"a": record("kept").key})
        store.gc(lambda path: set())
        assert sorted(path.name for path in (store.parts / "q").iterdir()) == ["one.json", "one.safetensors"]


def test_a_copied_store_takes_up_its_own_work(place):
    """A journal names files within its store: a copy moves none of those of the store it was made from."""
    step, journal = 0, ()
    while not journal:
        step += 1
        shutil.rmtree(place / "store", ignore_errors=True)
        killed(step, place / "store")
        journal = tuple((place / "store").glob("work/*/publish.json"))
    shutil.copytree(place / "store", place / "copy", symlinks=True)
    work = journal[0].parent / "out"
    before = contents_of(work)
    with Store(place / "copy") as copy:
        assert contents(copy, publish(copy, "b", {"b": b"b"})) == {"b": b"b"}
        assert contents(copy, copy.find(record("a").key)) == FILES
    assert contents_of(work) == before == FILES
    assert not any(path.is_symlink() for path in work.rglob("*"))


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
