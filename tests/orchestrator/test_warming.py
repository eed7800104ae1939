"""Workers that start before their turn: used, right, and gone when nobody needs them. Real processes throughout."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from support.launching import gone, wait_for
from support.workshop import environment, statuses

from bigpipe.machine import detect
from bigpipe.orchestrator.contract import OneAtATime
from bigpipe.orchestrator.planning import make_plan, open_session, with_parameters
from bigpipe.orchestrator.running import run_plan

RECIPE = """\
version: 1
name: brooding
params: {{seconds: 2.0}}
secrets: [SECRET]
stages:
  wait: {{uses: sleep, with: {{seconds: "${{params.seconds}}"}}{wait}}}
  brood:
    uses: brood
    inputs: {{after: wait}}
    env: {{WORD: egg, BALLAST: "{ballast}"}}{brood}
"""


@pytest.fixture
def recipe(workshop, monkeypatch):
    """The recipe's text; `wait` and `brood` add to its nodes."""
    monkeypatch.setenv("SECRET", "a secret")

    def text(*, wait: str = "", brood: str = "") -> str:
        return RECIPE.format(wait=wait, brood=f"\n    {brood}" if brood else "", ballast=ballast(workshop))

    return text


def ballast(workshop):
    return workshop.folder / "ballast"


def pids(workshop) -> list[int]:
    """Of the processes that imported the module, in order."""
    return [int(line) for line in ballast(workshop).read_text().split()] if ballast(workshop).exists() else []


def seen(result) -> tuple[dict, dict]:
    return tuple(result.nodes[name].record.metrics for name in ("wait", "brood"))


def test_a_worker_imports_while_its_producer_runs(workshop, recipe):
    result = workshop.run(recipe())
    wait, brood = seen(result)
    assert brood["imported"] < wait["ended"]
    assert pids(workshop) == [brood["pid"]]
    assert workshop.ran == ["wait", "brood"]
    (log,) = (workshop.folder / "store").glob("runs/*/nodes/brood/1/log.txt")
    assert "ballast for egg" in log.read_text()
    assert set(statuses(workshop.run()).values()) == {"cached"}


def test_the_result_is_that_of_one_at_a_time(workshop, recipe, tmp_path):
    early = workshop.run(recipe())
    ballast(workshop).unlink()
    late = workshop.run(jobs=1, store=tmp_path / "other")
    wait, brood = seen(late)
    assert brood["imported"] > wait["ended"]
    assert pids(workshop) == [brood["pid"]]
    assert late.nodes["brood"].key == early.nodes["brood"].key
    assert late.nodes["brood"].digest == early.nodes["brood"].digest


@pytest.mark.parametrize("declared", [True, False])
def test_it_sees_its_own_environment_alone(workshop, recipe, declared):
    """`wait` has another word and, where `brood` has not, the secret."""
    more = "secrets: [SECRET]"
    text = recipe(brood=more) if declared else recipe(wait=f", env: {{WORD: stone}}, {more}")
    wait, brood = seen(workshop.run(text))
    assert brood["imported"] < wait["ended"]
    assert (brood["word"], brood["secret"]) == ("egg", len("a secret") if declared else 0)
    assert pids(workshop) == [brood["pid"]]


def test_none_for_what_is_cached_or_may_come_out_cached(workshop, recipe):
    workshop.run(recipe())
    before = pids(workshop)
    result = workshop.run(force=["wait"])
    assert statuses(result)["wait"] == "succeeded"
    assert pids(workshop)[: len(before)] == before
    assert len(pids(workshop)) - len(before) == (statuses(result)["brood"] == "succeeded")
    if statuses(result)["brood"] == "succeeded":
        assert seen(result)[1]["imported"] > seen(result)[0]["ended"]


@pytest.mark.parametrize(
    "more",
    [
        {"brood": 'when: "${stages.wait.metrics.ended} > 0"'},
        {"wait": ', gates: ["ended > 0"]'},
        {"brood": "with: {idle: true}"},
    ],
    ids=["when", "gate", "nothing to import"],
)
def test_none_where_the_node_may_be_skipped_or_needs_nothing(workshop, recipe, more):
    wait, brood = seen(workshop.run(recipe(**more), params={"seconds": "0.5"}))
    assert brood["imported"] > wait["ended"]


def test_none_where_memory_would_not_do(workshop, recipe):
    """On a machine that is told: what this one has left moves while other tests run beside this one."""
    workshop.manifest.write_text(recipe(wait=", resources: {ram: 2GiB}"))
    machine = replace(detect(workshop.folder), memory_available=2**31 + 2**27)
    session = open_session(workshop.manifest, params={}, given_machine=machine)
    with session.store:
        wait, brood = seen(run_plan(session, with_parameters(make_plan(session)), OneAtATime()))
    assert brood["imported"] > wait["ended"]


def test_a_second_attempt_starts_afresh(workshop, recipe):
    result = workshop.run(recipe(brood="retries: 1\n    with: {tires: true}"))
    first, second = pids(workshop)
    assert first != second == seen(result)[1]["pid"]


def test_it_ends_with_a_producer_that_fails(workshop, recipe):
    failing = recipe().replace('sleep, with: {seconds: "${params.seconds}"}', "flaky, with: {times: 9}, retries: 1")
    result = workshop.run(failing)
    assert statuses(result) == {"wait": "failed", "brood": "skipped"}
    (process,) = pids(workshop)
    assert gone(process)


def running(workshop, text: str, seconds: float) -> tuple[subprocess.Popen[bytes], int]:
    """A command whose worker waits; and that worker."""
    workshop.manifest.write_text(text)
    command = [sys.executable, "-m", "bigpipe", "run", "recipe.yaml", "-p", f"seconds={seconds}"]
    process = subprocess.Popen(
        command, cwd=workshop.folder, env=environment(workshop.folder),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return process, wait_for(lambda: pids(workshop))[0]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_it_ends_with_the_command(workshop, recipe, number, code):
    process, worker = running(workshop, recipe(), 60)
    assert not gone(worker)
    process.send_signal(number)
    assert process.wait(timeout=20) == code
    wait_for(lambda: gone(worker), 10)


def test_one_that_died_is_replaced(workshop, recipe):
    process, worker = running(workshop, recipe(), 5)
    os.kill(worker, signal.SIGKILL)
    assert process.wait(timeout=30) == 0
    assert len(pids(workshop)) == 2
    assert set(statuses(workshop.run(params={"seconds": "5"})).values()) == {"cached"}
