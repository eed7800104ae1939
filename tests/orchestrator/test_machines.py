"""Several machines without a person: what schedulers say, how machines meet, and a run over two of them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from string import Template
from typing import Any

import jsonschema
import pytest
from support.launching import TESTS, make_job, wait_for

from bigpipe.errors import DoesNotFit, Interrupted, StageFailed, Transient, UsageError
from bigpipe.orchestrator import machines
from bigpipe.orchestrator.contract.types import Launch
from bigpipe.orchestrator.launch import (
    Meeting,
    Standing,
    attend,
    effective_launch,
    meeting as meetings,
    ranks,
    standing,
)
from bigpipe.orchestrator.launch.jobs import AttemptFolder
from bigpipe.orchestrator.launch.schedulers import node_names
from bigpipe.orchestrator.launch.supervision import supervise
from bigpipe.orchestrator.planning import open_session
from bigpipe.orchestrator.report.inspection import log_lines
from bigpipe.orchestrator.store import Store

SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NNODES": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "gpu[01-04]", "SLURM_STEP_NODELIST": "gpu[03-04]",
}  # fmt: skip
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none", "RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
    "GROUP_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400",
}  # fmt: skip
OPERATOR = {
    "PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "train-node-0-0.train",
    "PET_MASTER_PORT": "29400", "JOB_COMPLETION_INDEX": "1",
}  # fmt: skip
INDEXED = {"JOB_COMPLETION_INDEX": "2", "HOSTNAME": "train-2.headless"}


@pytest.mark.parametrize(("environment", "wanted"), [
    ({}, None),
    (SLURM, Standing("SLURM", "7.0", 1, 2, "gpu03", ("gpu03", "gpu04"))),
    (TORCHRUN, Standing("torchrun", "none 10.0.0.1:29400", 1, 3, "10.0.0.1")),
    ({**SLURM, **TORCHRUN}, Standing("torchrun", "none 10.0.0.1:29400", 1, 3, "10.0.0.1")),
    (OPERATOR, Standing("the training operator", "train-node-0-0.train", 1, 2, "train-node-0-0.train")),
    ({**OPERATOR, "PET_MASTER_ADDR": "", "PET_RDZV_ENDPOINT": "a-0:1"},
     Standing("the training operator", "a-0", 1, 2, "a-0")),
    (INDEXED, Standing("Kubernetes", "train", 2, None, "train-0.headless")),
    ({**INDEXED, "HOSTNAME": "mine"}, Standing("Kubernetes", "mine", 2, None, None)),
], ids=str)  # fmt: skip
def test_schedulers_say_which_machine_this_is(environment: Mapping[str, str], wanted: Standing | None) -> None:
    assert standing(environment) == wanted


@pytest.mark.parametrize(("environment", "told"), [
    ({**SLURM, "SLURM_NODEID": "one"}, "SLURM_NODEID is 'one', and no number"),
    ({**SLURM, "SLURM_NODEID": "2"}, "SLURM says that this is machine 2 of 2"),
    ({**SLURM, "SLURM_LOCALID": "3"}, "process 3 on its machine"),
    ({**TORCHRUN, "LOCAL_RANK": "1"}, "process 1 on its machine"),
    ({**OPERATOR, "PET_NNODES": "1:4"}, "PET_NNODES is '1:4', and no number"),
    ({**SLURM, "SLURM_STEP_NODELIST": "a[1-9999999]"}, "a list of nodes is"),
], ids=str)  # fmt: skip
def test_odd_variables_are_refused(environment: Mapping[str, str], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        standing(environment)


@pytest.mark.parametrize(("text", "names"), [
    ("a", ["a"]), ("a,b", ["a", "b"]), ("gpu[01-03,7],login", ["gpu01", "gpu02", "gpu03", "gpu7", "login"]),
    ("r[1-2]n[08-09]", ["r1n08", "r1n09", "r2n08", "r2n09"]), ("127.0.0.[1-2]", ["127.0.0.1", "127.0.0.2"]), ("", []),
])  # fmt: skip
def test_a_list_of_nodes_is_spelled_out(text: str, names: list[str]) -> None:
    assert list(node_names(text)) == names


def test_the_launch_is_completed_by_what_the_scheduler_says(tmp_path: Path) -> None:
    two = Launch(num_processes=4, num_machines=2)
    found = effective_launch(two, tmp_path, lambda: standing(SLURM))
    assert (found.machine_rank, found.main_process_ip, found.local_processes) == (1, "gpu03", 2)
    own = Launch(num_processes=4, num_machines=2, main_process_ip="10.1.1.1")
    assert effective_launch(own, tmp_path, lambda: standing(SLURM)).main_process_ip == "10.1.1.1"
    one = Launch(num_processes=4)
    assert effective_launch(one, tmp_path, lambda: pytest.fail("nobody need know")) == one
    for launch, place, told in (
        (Launch(num_processes=3, num_machines=3), SLURM, "num_machines is 3, and SLURM started 2"),
        (Launch(num_processes=3, num_machines=2), SLURM, "spread evenly"),
        (Launch(num_machines=15), {}, "1 processes cannot be spread evenly over 15 machines"),
        (two, {**INDEXED, "HOSTNAME": "mine", "JOB_COMPLETION_INDEX": "1"}, "does not say where machine 0 is"),
    ):
        with pytest.raises(UsageError, match=told):
            effective_launch(launch, tmp_path, lambda place=place: standing(place))  # type: ignore[misc]


PLACES = [Standing("SLURM", "7.0", rank, 3, "a", ("a", "b", "c")) for rank in range(3)]


def quiet() -> None:
    """Nothing is wrong."""


def test_who_does_not_come_is_named(tmp_path: Path) -> None:
    coming = threading.Thread(
        target=lambda: attend(tmp_path, PLACES[1], 10, lambda *given: 0, lambda line: None), daemon=True
    )
    coming.start()
    meeting = Meeting(tmp_path, PLACES[0], 3, limit=0.8)
    with pytest.raises(Transient, match=r"machine 2 \(c\) of 3 did not come within 0\.8 s") as error, meeting.held():
        meeting.call(tmp_path / "job", "node", quiet)
    assert "a file system that all machines share" in error.value.cure
    coming.join(10)
    with pytest.raises(Transient, match=r"machine 0 \(a\) did not come within 0\.3 s"):
        attend(tmp_path, PLACES[1], 0.3, lambda *given: 0, lambda line: None)


@pytest.mark.parametrize("left", [False, True])
def test_machines_are_called_and_leave_with_the_status_of_the_run(tmp_path: Path, left: bool) -> None:
    """left: what an earlier run left there means nothing."""
    if left:
        (tmp_path / "old").mkdir()
        (tmp_path / "here-1.json").write_text('{"number": "0"}')
        (tmp_path / "old" / "welcome-1.json").write_text('{"number": "0"}')
        (tmp_path / "old" / "end.json").write_text('{"status": 9}')
    calls: list[Any] = []

    def start(job: Path, node: str, over: Any) -> int:
        calls.append((job, node))
        return len(calls) - 1

    statuses: list[int] = []
    others = [
        threading.Thread(target=lambda place=place: statuses.append(attend(tmp_path, place, 10, start, calls.append)))
        for place in PLACES[1:2]
    ]
    for other in others:
        other.start()
    meeting = Meeting(tmp_path, PLACES[0], 2, limit=10)
    with suppress(DoesNotFit), meeting.held():
        first = meeting.call(tmp_path / "job", "one", quiet)
        assert wait_for(lambda: meeting.has_all(first))
        second = meeting.call(tmp_path / "job", "two", quiet)
        assert wait_for(lambda: meeting.has_all(second))
        raise DoesNotFit("too large")
    for other in others:
        other.join(10)
    assert statuses == [4]
    assert [call for call in calls if isinstance(call, tuple)] == [(tmp_path / "job", "one"), (tmp_path / "job", "two")]
    assert not list(tmp_path.glob("*"))


def test_who_comes_when_the_run_has_ended_hears_how_it_ended(tmp_path: Path) -> None:
    """All was cached, say, and machine 1 started a second later."""
    said, statuses = list[str](), list[int]()

    def say(line: str) -> None:
        said.append(line)
        late.start()

    late = threading.Thread(
        target=lambda: statuses.append(attend(tmp_path, PLACES[1], 10, lambda *given: 0, lambda line: None))
    )
    with suppress(DoesNotFit), Meeting(tmp_path, PLACES[0], 2, limit=100).held(say):
        raise DoesNotFit("too large")
    late.join(10)
    assert statuses == [4]
    assert not list(tmp_path.glob("*"))
    assert said == ["the run has ended; machine 1 (b) would still wait for it, and is awaited for 100 s at the most"]


@pytest.mark.parametrize(("error", "limit"), [(Interrupted("by hand"), 100), (ZeroDivisionError(), 100), (None, 0)])
def test_nobody_is_awaited_for_long_without_need(tmp_path: Path, error: Exception | None, limit: float) -> None:
    """Where whoever interrupts reaches all machines, where this one has a bug, or where the time for coming is over."""
    with suppress(Interrupted, ZeroDivisionError), Meeting(tmp_path, PLACES[0], 2, limit).held(pytest.fail):
        if error is not None:
            raise error
    assert not list(tmp_path.glob("*"))


def test_who_has_gone_is_not_awaited_and_who_knows_of_the_end_comes_for_another_run(tmp_path: Path) -> None:
    meeting = Meeting(tmp_path, PLACES[0], 3, limit=100)
    for rank in (1, 2):
        (tmp_path / f"here-{rank}.json").write_text('{"number": "5"}')
    with meeting.held(pytest.fail):
        welcomes = wait_for(lambda: [path for path in tmp_path.glob("*/welcome-*") if len(meeting._welcomed) == 2])
        session = welcomes[0].parent
        (session / "joined-1").write_text('"5"')
        assert meeting._missing() == [2]
        (session / "joined-1").unlink()  # it was ended
        (session / "read-2").write_text("true")
        (tmp_path / "here-2.json").write_text('{"number": "6"}')
        meeting._welcome()
        assert meeting._welcomed[2] == "5"


def test_each_run_of_a_job_has_a_meeting_of_its_own_which_is_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    places, stage = [], "{uses: command, with: {argv: ['true', '${params.rank}'], produces: report}}"
    (tmp_path / "recipe.yaml").write_text(
        f"version: 1\nname: x\nparams: {{rank: 4}}\nstages:\n  a: {stage}\n  b: {stage}\n"
    )
    for params in ({}, {"rank": "8"}):
        for nodes in ([], ["a"]):
            session = open_session(tmp_path / "recipe.yaml", nodes, params=params, store=tmp_path / "store")
            places.append(machines.meeting_place_of(session))
    assert len({*places}) == 4
    with Store(tmp_path / "store") as store, Meeting(places[0], PLACES[0], 2, limit=0).held():
        (places[0] / "here-1.json").write_text('{"number": "5"}')
        assert store.verify(repair=True).clean
        assert (places[0] / "here-1.json").exists()
        (places[1] / "0123456789abcdef").mkdir(parents=True)  # of one that was killed
    with Store(tmp_path / "store") as store:
        store.gc(lambda path: set())
    assert not places[1].exists()


@pytest.mark.parametrize("how", ["silent", "left"])
def test_a_machine_that_has_gone_is_told_of(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meetings, "PATIENCE", 0.5)
    monkeypatch.setattr(meetings, "LEAVING", 0.1)
    (tmp_path / "here-1.json").write_text('{"number": "5"}')
    meeting = Meeting(tmp_path, PLACES[0], 2, limit=10)
    with meeting.held():
        (welcome,) = wait_for(lambda: list(tmp_path.glob("*/welcome-1.json")))
        joined = welcome.parent / "joined-1"
        joined.write_text('"5"')
        call = meeting.call(tmp_path / "job", "one", quiet)
        assert not meeting.has_all(call)
        if how == "silent":
            time.sleep(0.6)
        else:
            joined.unlink()
        with pytest.raises(StageFailed, match=r"machine 1 \(b\) has gone, or is not heard of"):
            meeting.has_all(call)


def test_ranks_of_a_call_that_is_over_are_ended_for_the_next_one(tmp_path: Path) -> None:
    calls: list[str] = []

    def start(job: Path, node: str, over: Any) -> int:
        calls.append(node)
        while node == "one":
            over()
            time.sleep(0.01)
        return 0

    other = threading.Thread(target=lambda: attend(tmp_path, PLACES[1], 10, start, lambda line: None), daemon=True)
    other.start()
    meeting = Meeting(tmp_path, PLACES[0], 2, limit=10)
    with meeting.held():
        first = meeting.call(tmp_path / "job", "one", quiet)
        assert wait_for(lambda: calls == ["one"])
        assert meeting.done(first) == {}
        meeting.end(first)
        meeting.settle(first, quiet)
        assert meeting.done(first) == {1: 1}
        second = meeting.call(tmp_path / "job", "two", quiet)
        assert wait_for(lambda: meeting.has_all(second))
        assert meeting.done(second) == {1: 0}
    other.join(10)
    assert calls == ["one", "two"]


def test_a_machine_that_comes_again_does_no_earlier_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str]] = []
    dies = threading.Event()

    def attended(name: str) -> None:
        def check() -> None:
            if name == "first" and dies.is_set():
                raise Transient("killed")

        def start(job: Path, node: str, over: Any) -> int:
            calls.append((name, node))
            while node == "two" and name == "first":
                over()
                time.sleep(0.01)
            return 0

        with suppress(Transient):
            attend(tmp_path, PLACES[1], 10, start, lambda line: None, check)

    machines = [threading.Thread(target=attended, args=(name,), daemon=True) for name in ("first", "again")]
    machines[0].start()
    meeting = Meeting(tmp_path, PLACES[0], 2, limit=10)
    with meeting.held():
        one = meeting.call(tmp_path / "job", "one", quiet)
        assert wait_for(lambda: meeting.has_all(one))
        two = meeting.call(tmp_path / "job", "two", quiet)
        assert wait_for(lambda: ("first", "two") in calls)
        dies.set()
        machines[0].join(10)
        machines[1].start()
        assert wait_for(lambda: list(tmp_path.glob("*/joined-1")))
        with pytest.raises(StageFailed, match="has gone"):
            meeting.done(two)  # it is not who was called
        three = meeting.call(tmp_path / "job", "three", quiet)
        assert wait_for(lambda: meeting.has_all(three))
    machines[1].join(10)
    assert calls == [("first", "one"), ("first", "two"), ("again", "three")]


def test_a_call_that_came_and_was_over_between_two_looks_is_found_by_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, looking, between, statuses = meetings._read, threading.Event(), threading.Event(), list[int]()

    def look(path: Path) -> Any:
        if path.name == "call-1.json" and not between.is_set():
            looking.set()
            return between.wait(10) and None
        return read(path)

    def start(job: Path, node: str, over: Any) -> int:
        over()
        return 0

    monkeypatch.setattr(meetings, "_read", look)
    other = threading.Thread(
        target=lambda: statuses.append(attend(tmp_path, PLACES[1], 10, start, lambda line: None)), daemon=True
    )
    other.start()
    meeting = Meeting(tmp_path, PLACES[0], 2, limit=10)
    with meeting.held():
        first = meeting.call(tmp_path / "job", "one", quiet)
        meeting.end(first)
        assert looking.wait(10)
        between.set()
        meeting.settle(first, quiet)
        assert meeting.done(first) == {1: 1}
        second = meeting.call(tmp_path / "job", "two", quiet)
        assert wait_for(lambda: meeting.has_all(second))
        assert meeting.done(second) == {1: 0}
    other.join(10)
    assert statuses == [0]


@pytest.mark.parametrize("machine", [1, 0])
def test_what_killed_a_rank_elsewhere_is_not_told_by_the_memory_here(tmp_path: Path, machine: int) -> None:
    """machine: whose log holds what it prints; 0: a person started it."""
    two = Launch(num_processes=2, num_machines=2, main_process_ip="10.0.0.1", main_process_port=29500)
    (tmp_path / "attempt").mkdir()
    supervisor = supervise(make_job(tmp_path, "RANKS", launch=two))
    told = supervisor.crash("rank 1", -signal.SIGKILL, 1, machine)
    assert "rank 1 was ended by SIGKILL" in told.cause
    assert "memory ran out on its machine, if `dmesg` there says so; else somebody killed it" in told.cure
    assert "peaked" not in told.cure
    assert "its memory peaked at" in supervisor.crash("rank 0", -signal.SIGKILL, 0).cure


def test_the_log_of_ranks_elsewhere_has_the_last_state_of_a_bar_and_a_line_without_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printing = "import sys; sys.stdout.write('1%\\r2%\\r3%\\nwhat(): no memory')"
    monkeypatch.setattr(ranks, "worker_command", lambda *given: [sys.executable, "-c", printing])
    launch = Launch(num_processes=2, num_machines=2, machine_rank=1, main_process_ip="10.0.0.1", main_process_port=1)
    job, told = make_job(tmp_path, "RANKS", launch=launch), list[str]()
    folder = AttemptFolder(tmp_path / "attempt")
    folder.path.mkdir()
    status = ranks.start_here(job.stage, job.surroundings, os.environ, folder.job, quiet, told.append)
    assert (status, told) == (0, ["3%", "what(): no memory"])
    assert folder.log_of(1).read_text() == "3%\nwhat(): no memory\n"


RECIPE = """
version: 1
name: two
trust: {modules: [support]}
stages:
  work:
    uses: support.stages:$KIND
    with: {do: $DO, rank: $RANK, text: $TEXT, seconds: $SECONDS}
    launch: {num_processes: 2, num_machines: 2, join_seconds: 60}
"""


def machine(
    folder: Path,
    number: int,
    do: str = "succeed",
    text: str = "",
    options: tuple[str, ...] = (),
    *,
    kind: str = "RANKS",
    rank: int | str = 1,
    seconds: int = 100,
) -> subprocess.Popen[str]:
    """`bigpipe run` on a machine of two that SLURM started, by its addresses on the loopback device."""
    recipe = folder / "recipe.yaml"
    filled = {"DO": do, "TEXT": text or "''", "KIND": kind, "RANK": str(rank), "SECONDS": str(seconds)}
    recipe.write_text(Template(RECIPE).substitute(filled))
    given = {**SLURM, "SLURM_NODEID": str(number), "SLURM_STEP_NODELIST": "127.0.0.[1-2]"}
    path = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
    return subprocess.Popen(
        [sys.executable, "-m", "bigpipe", "run", str(recipe), *options], cwd=folder, text=True,
        env={**os.environ, **given, "PYTHONPATH": path, "BIGPIPE_HOME": str(folder / "store")},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def ended(processes: list[subprocess.Popen[str]]) -> tuple[list[int], str]:
    said = [process.communicate(timeout=150)[0] for process in processes]
    return [process.returncode for process in processes], "\n".join(said)


def test_two_machines_make_one_run(tmp_path: Path) -> None:
    statuses, said = ended([machine(tmp_path, rank, options=("--json",)) for rank in (1, 0)])
    assert statuses == [0, 0], said
    attended, drove = (json.loads(line) for line in said.splitlines() if line.startswith("{"))
    assert (attended["schema"], attended["status"], attended["exit_code"]) == ("bigpipe.run/1", "attended", 0)
    schema = json.loads((TESTS.parent / "schema/outputs.schema.json").read_text())
    for answer in (attended, drove):
        jsonschema.Draft202012Validator({**schema, "anyOf": [{"$ref": "#/$defs/bigpipe.run~11"}]}).validate(answer)
    assert drove["status"] == "succeeded"
    (merged,) = (tmp_path / "store" / "artifacts").glob("*/merged")
    assert merged.read_text() == "0/2 1/2"
    assert "machine 1 (127.0.0.2) waits for calls of machine 0 (127.0.0.1)" in said
    assert not list((tmp_path / "store" / "meetings").glob("*"))


@pytest.mark.fault
def test_an_error_on_another_machine_is_the_errors_of_the_run(tmp_path: Path) -> None:
    statuses, said = ended([machine(tmp_path, rank, "fail") for rank in (0, 1)])
    assert statuses == [4, 4], said
    assert "rank 1: 20 GiB do not fit" in said


@pytest.mark.fault
def test_the_trace_of_a_bug_on_another_machine_is_in_the_log_that_the_error_names(tmp_path: Path) -> None:
    statuses, said = ended([machine(tmp_path, rank, "crash") for rank in (0, 1)])
    assert statuses == [6, 6], said
    (named,) = {Path(path) for path in re.findall(r"the traceback is in (\S+)", said)}
    assert "Traceback" in named.read_text()
    lines = [*log_lines("last", "work", tmp_path / "store")]
    assert "── work, machine 1" in lines
    assert any("Traceback" in line for line in lines)


@pytest.mark.fault
@pytest.mark.parametrize("victim", [0, 1])
def test_a_machine_that_is_killed_ends_the_run_on_the_other(tmp_path: Path, victim: int) -> None:
    processes = [machine(tmp_path, rank, "sleep") for rank in (0, 1)]
    (asleep,) = wait_for(lambda: list((tmp_path / "store" / "work").glob("*/scratch/asleep-1")), seconds=60)
    time.sleep(0.5)
    begun = time.monotonic()
    processes[victim].send_signal(signal.SIGKILL)
    statuses, said = ended(processes)
    assert statuses[1 - victim] == (6 if victim else 75), said
    assert "rank 1 died" in said or "has gone" in said, said
    assert time.monotonic() - begun < 90
    wait_for(lambda: not Path(f"/proc/{asleep.read_text()}").exists())


@pytest.mark.fault
def test_ranks_on_both_machines_start_anew_where_one_died(tmp_path: Path) -> None:
    processes = [machine(tmp_path, rank, "once", kind="REPLACED", rank="null", seconds=1000) for rank in (0, 1)]
    statuses, said = ended(processes)
    assert statuses == [0, 0], said
    assert "the ranks are started again (1 of 3)" in said


@pytest.mark.fault
def test_a_machine_that_does_not_come_is_named_by_the_run(tmp_path: Path) -> None:
    process = machine(tmp_path, 0)
    (tmp_path / "recipe.yaml").write_text((tmp_path / "recipe.yaml").read_text().replace("60", "3"))
    statuses, said = ended([process])
    assert statuses == [75], said
    assert "machine 1 (127.0.0.2) of 2 did not come within" in said
