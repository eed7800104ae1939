"""Many runs over one store: each body runs once, a dead holder is taken over, and without locks nothing breaks."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from support.forking import forked, together
from support.stores import contents, fill, record
from support.workshop import Workshop, statuses

import bigpipe
from bigpipe.orchestrator.store.store import Store

FULL = [pytest.mark.fault, pytest.mark.timeout(3600)]
NO_LOCKS = ["-o", "/dev/null", "-e", "trace=flock", "-e", "inject=flock:retval=0"]
"""strace answers in the kernel's place: every lock is granted, none is kept, as on some network file systems."""
REFUSED = ["-o", "/dev/null", "-e", "trace=flock", "-e", "inject=flock:error=ENOLCK"]

STREAMS = """\
version: 1
name: together
stages:
  pour: {uses: pour, with: {count: 4, pace: 0.02}}
  sip: {uses: sip, inputs: {first: pour}}
"""
CHAIN = """\
version: 1
name: together
stages:
  pour: {uses: pour, with: {count: 4, pace: 0.02}}
  strain: {uses: strain, inputs: {first: pour}}
  sip: {uses: sip, inputs: {first: strain}}
"""
VARIANTS = """\
version: 1
name: together
stages:
  pour: {uses: pour, with: {count: 4, pace: 0.02}}
  sip: {uses: sip, inputs: {first: pour}, matrix: {pace: [0.0, 0.01]}, with: {pace: "${matrix.pace}"}}
"""
EQUAL = """\
version: 1
name: together
stages:
  pour: {uses: pour, matrix: {letter: [a, ab]}, with: {count: 4, letter: "${matrix.letter}"}}
  sip: {uses: sip, inputs: {first: pour}, with: {pace: 0.01}}
"""
RECIPES = {"streams": STREAMS, "a chain": CHAIN, "variants of one input": VARIANTS, "variants of equal weights": EQUAL}


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store") as opened:
        yield opened


@pytest.mark.parametrize("rounds", [2, pytest.param(50, marks=FULL)])
def test_eight_processes_do_the_work_once(store, tmp_path, rounds):
    bodies = tmp_path / "bodies"

    def run(name: str) -> None:
        with Store(store.root) as mine, mine.lock(record(name).key) as work:
            found = mine.find(record(name).key)
            if found is None or not mine.intact(found):
                with bodies.open("a") as file:
                    file.write(f"{name} ")
                time.sleep(0.05)
                fill(work.out, {"a": b"made once"})
                found = mine.publish(record(name), work.out)
                work.done()
            assert contents(mine, found) == {"a": b"made once"}

    names = [str(number) for number in range(rounds)]
    for name in names:
        assert {ending.code for ending in together(8, lambda _, name=name: run(name))} == {0}
    assert bodies.read_text().split() == names


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("processes", "rounds"), [(3, 1), pytest.param(8, 50, marks=FULL)])
def test_runs_of_one_recipe_at_once_run_each_body_once(workshop, seed, recipe, processes, rounds):
    """Some follow the producer under a provisional key, some wait for it (`jobs: 1`) and have the true one."""
    if recipe != "streams" and processes == 3:
        pytest.skip("the short form runs one recipe")
    dice = random.Random(seed)  # noqa: S311
    workshop.manifest.write_text(RECIPES[recipe])
    for number in range(rounds // len(RECIPES) + 1):
        (workshop.folder / "journal").unlink(missing_ok=True)
        store = workshop.folder / f"store-{number}"
        starts = [(dice.uniform(0, 0.6), dice.choice([1, None])) for _ in range(processes)]

        def run(which: int, store: Path = store, starts: list = starts) -> None:
            delay, jobs = starts[which]
            time.sleep(delay)
            done = bigpipe.run(workshop.manifest, store=store, jobs=jobs)
            for name, state in done.nodes.items():
                assert (done.path(name) / "file-3").read_text().upper() == "A" * 1000, state

        endings = together(processes, run)
        assert [ending for ending in endings if ending.code] == [], starts
        assert [name for name, times in Counter(workshop.ran).items() if times > 1] == [], (recipe, starts)
        with Store(store) as opened:
            assert opened.verify().clean
            assert [path for path in opened.layout.work.iterdir() if any((path / "out").iterdir())] == []


SLOW_SIP = STREAMS.replace("{first: pour}", "{first: pour}, with: {pace: 1.0}")


def begin(workshop: Workshop, **options: object) -> int:
    """Start a run in a fork; return its process."""
    process = os.fork()
    if process == 0:
        os.setsid()
        os._exit(0 if bigpipe.run(workshop.manifest, check=False, **options).status == "succeeded" else 1)
    return process


def test_the_true_key_waits_for_the_provisional_one(workshop):
    """A run that finds the producer recorded does not do what the follower of another run is doing."""
    workshop.manifest.write_text(SLOW_SIP)
    follower = begin(workshop)
    deadline = time.monotonic() + 60
    while not list((workshop.folder / "store").glob("keys/*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert workshop.ran == ["pour", "sip"]
    assert bigpipe.run(workshop.manifest).status == "succeeded"
    assert os.waitpid(follower, 0)[1] == 0
    assert workshop.ran == ["pour", "sip"]


def test_a_run_that_waited_makes_no_bytes_again_that_went_as_they_were_made(workshop):
    """Its record is all that the second run asks of pour; and sip's last files are still at work when pour is done."""
    workshop.manifest.write_text(
        SLOW_SIP.replace("1.0", "0.4").replace(
            "uses: pour, with: {count: 4", "uses: pour, cache: false, with: {count: 6"
        )
    )
    first = begin(workshop)
    wait_for(workshop, 2)
    result = bigpipe.run(workshop.manifest)
    assert os.waitpid(first, 0)[1] == 0
    assert workshop.ran == ["pour", "sip"]
    assert (statuses(result)["sip"], result.path("pour")) == ("cached", None)


@pytest.mark.fault
def test_the_provisional_key_waits_for_the_true_one(workshop):
    """A follower that waited for a run with the true key looks whether the work is done. The producer of this one is
    patient: it waits 20 seconds for its follower, who is to be late."""
    workshop.manifest.write_text(SLOW_SIP.replace("1.0", "8.0"))
    bigpipe.run(workshop.manifest, nodes=["pour"])
    first = begin(workshop)
    wait_for(workshop, 2)
    assert bigpipe.run(workshop.manifest, force=["pour"]).status == "succeeded"
    assert os.waitpid(first, 0)[1] == 0
    assert workshop.ran == ["pour", "sip", "pour"]


@pytest.mark.parametrize("times", [5, pytest.param(50, marks=FULL)])
def test_a_dead_holder_is_taken_over(store, times):
    slowest = 0.0
    for _ in range(times):
        ready, start = os.pipe()
        holder = os.fork()
        if holder == 0:
            with Store(store.root).lock(record("a").key):
                os.write(start, b"x")
                time.sleep(60)
        os.read(ready, 1)
        os.close(ready)
        os.close(start)
        died = time.monotonic() + 0.1
        killer = threading.Timer(0.1, os.kill, (holder, signal.SIGKILL))
        killer.start()
        with store.lock(record("a").key):
            slowest = max(slowest, time.monotonic() - died)
        assert os.waitpid(holder, 0)[1] == signal.SIGKILL  # not the end of its sleep
        killer.join()
    assert slowest < 5


@pytest.mark.parametrize("times", [1, pytest.param(50, marks=FULL)])
def test_a_run_takes_over_from_one_that_was_killed_at_work(workshop, times):
    """The holder's worker dies with it; the next run's body begins within 5 seconds."""
    waits = []
    for number in range(times):
        workshop.manifest.write_text(
            f"version: 1\nname: taken\nstages:\n  nap: {{uses: sleep, with: {{seconds: 1.0, tag: n{number}}}}}\n"
        )
        (workshop.folder / "journal").unlink(missing_ok=True)
        holder = os.fork()
        if holder == 0:
            os.setsid()
            bigpipe.run(workshop.manifest, check=False)
            os._exit(0)
        wait_for(workshop, 1)
        threading.Timer(0.3, os.kill, (holder, signal.SIGKILL)).start()
        begun = time.monotonic() + 0.3
        taken = threading.Thread(target=wait_for, args=(workshop, 2))
        taken.start()
        heir = threading.Thread(target=lambda: waits.append(bigpipe.run(workshop.manifest).status))
        heir.start()
        taken.join()
        waited = time.monotonic() - begun
        heir.join()
        os.waitpid(holder, 0)
        assert waited < 5
        assert waits[-1] == "succeeded"
    assert len(waits) == times


def wait_for(workshop: Workshop, bodies: int) -> None:
    deadline = time.monotonic() + 60
    while len(workshop.ran) < bodies and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(workshop.ran) == bodies


@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=FULL)])
def test_without_working_locks_the_work_is_done_twice_but_never_mixed(tmp_path, rounds):
    for number in range(rounds):
        root = tmp_path / f"store-{number}"

        def run(_: int, root: Path = root) -> None:
            with Store(root) as mine, mine.lock(record("a").key) as work:
                assert not mine.keeps_others_out
                assert list(work.out.iterdir()) == []
                for _ in range(20):
                    with (work.out / "a").open("ab") as file:
                        file.write(b"0123456789")
                    time.sleep(0.002)
                found = mine.publish(record("a"), work.out)
                work.done()
                assert contents(mine, found) == {"a": b"0123456789" * 20}

        endings = together(8, run, watch=NO_LOCKS)
        assert "".join(ending.said for ending in endings if ending.code) == ""
        with Store(root) as store:
            assert contents(store, store.find(record("a").key)) == {"a": b"0123456789" * 20}
            assert store.verify().clean


@pytest.mark.fault
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("recipe", RECIPES)
def test_runs_without_working_locks_end_well(workshop, recipe):
    """Double work, never an error: whole runs with their workers, five times four of them."""
    workshop.manifest.write_text(RECIPES[recipe])
    for number in range(5):
        store = workshop.folder / f"store-{number}"

        def run(which: int, store: Path = store) -> None:
            done = bigpipe.run(workshop.manifest, store=store, jobs=which % 2 or None)
            for name in done.nodes:
                assert (done.path(name) / "file-3").read_text().upper() == "A" * 1000

        assert [ending for ending in together(4, run, watch=NO_LOCKS, seconds=240) if ending.code] == []
        with Store(store) as opened:
            assert opened.verify().clean


def test_a_file_system_without_locks_is_named(tmp_path):
    def run() -> None:
        with Store(tmp_path / "store").lock(record("a").key):
            pass

    ending = forked(run, watch=REFUSED)
    assert "UsageError: the file system of the store has no locks" in ending.said
    assert "--store" in ending.said
