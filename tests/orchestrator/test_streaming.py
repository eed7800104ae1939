"""Consumers that take files one by one from a producer that still runs: the same results, and nothing too early."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from support.workshop import environment, statuses

import bigpipe

RECIPE = """\
version: 1
name: pouring
params: {count: 5, pour: 0.0, sip: 0.0, letter: a, keep: true}
stages:
  pour: {uses: pour, with: {count: "${params.count}", pace: "${params.pour}", letter: "${params.letter}"}}
  sip: {uses: sip, inputs: {first: pour}, with: {pace: "${params.sip}"}}
"""
DROPPING = RECIPE.replace("  sip:", "    cache: false\n  sip:").replace(
    '  pour: {uses: pour, with: {count: "${params.count}", pace: "${params.pour}", letter: "${params.letter}"}}',
    '  pour:\n    uses: pour\n    with: {count: "${params.count}", pace: "${params.pour}", letter: "${params.letter}"}',
)
STEADY, SLOW = {"pour": "0.05"}, {"pour": "0.3"}
"""The producer waits for its follower before the first file."""


def facts(result) -> dict[str, tuple[str | None, str | None]]:
    return {name: (state.key, state.digest) for name, state in result.nodes.items()}


def leftovers(workshop) -> list[str]:
    store = workshop.folder / "store"
    return [str(path) for room in ("work", "tmp") for path in (store / room).glob("*") if path.suffix != ".lock"]


def test_a_consumer_starts_before_its_producer_has_ended(workshop):
    result = workshop.run(RECIPE, params=STEADY)
    assert statuses(result) == {"pour": "succeeded", "sip": "succeeded"}
    pour, sip = (result.nodes[name].record.metrics for name in ("pour", "sip"))
    assert pour["began"] < sip["began"] < pour["ended"]
    assert "takes the files of pour as they are made" in result.nodes["sip"].reason
    assert (result.path("sip") / "file-4").read_text() == "A" * 1000
    assert (result.path("sip") / "others").read_text() == "note"
    assert set(statuses(workshop.run(params=STEADY)).values()) == {"cached"}
    assert leftovers(workshop) == []


def test_keys_and_digests_are_those_of_one_after_the_other(workshop, tmp_path):
    side_by_side = workshop.run(RECIPE, params=STEADY)
    in_turn = workshop.run(params=STEADY, jobs=1, store=tmp_path / "other")
    assert in_turn.nodes["sip"].record.metrics["began"] > in_turn.nodes["pour"].record.metrics["ended"]
    assert facts(side_by_side) == facts(in_turn)


def test_files_are_found_while_they_move_into_the_store(workshop):
    """Those who read on while their producer is published find each file where it was promised."""
    between = "  strain: {uses: strain, inputs: {first: pour}}\n  sip:"
    text = RECIPE.replace("  sip:", between).replace("first: pour}, with", "first: strain}, with")
    result = workshop.run(text, params={"count": "40", "sip": "0.05"})
    assert [(state.status, state.error) for state in result.nodes.values()] == [("succeeded", None)] * 3
    strain, sip = (result.nodes[name].record for name in ("strain", "sip"))
    assert sip.metrics["began"] < strain.metrics["ended"]
    assert {(result.path("sip") / f"file-{number}").read_text() for number in range(40)} == {"A" * 1000}
    assert leftovers(workshop) == []


def test_nothing_is_published_when_the_producer_fails(workshop):
    text = RECIPE.replace('letter: "${params.letter}"', 'letter: "${params.letter}", break_at: 4')
    result = workshop.run(text, params=STEADY)
    assert statuses(result) == {"pour": "failed", "sip": "skipped"}
    assert workshop.ran == ["pour", "sip"]
    assert result.nodes["sip"].reason == "pour failed"
    assert not list((workshop.folder / "store" / "keys").glob("*"))
    with pytest.raises(ProcessLookupError):
        os.kill(int((workshop.folder / "pid-sip").read_text()), 0)
    mended = workshop.run(RECIPE, params=STEADY)
    assert statuses(mended) == {"pour": "succeeded", "sip": "succeeded"}


def test_equal_bytes_are_not_published_twice(workshop):
    """`letter: ab` pours the same as `letter: a`: what was sipped of it meanwhile is thrown away."""
    first = workshop.run(RECIPE, params=STEADY)
    second = workshop.run(params={**STEADY, "letter": "ab"})
    assert workshop.ran == ["pour", "sip"]
    assert second.nodes["pour"].digest == first.nodes["pour"].digest
    assert second.nodes["sip"].record.run == first.run
    assert leftovers(workshop) == []


def test_a_certain_hit_is_waited_for(workshop):
    workshop.run(RECIPE, params=STEADY)
    workshop.run(params=STEADY, force=["pour"])
    assert workshop.ran == ["pour"]


def test_at_most_two_files_lie_between_where_they_are_not_kept(workshop, tmp_path):
    params = {"count": "10", "sip": "0.05"}
    result = workshop.run(DROPPING, params=params)
    assert statuses(result) == {"pour": "succeeded", "sip": "succeeded"}
    assert result.nodes["sip"].record.metrics["most"] <= 2
    assert result.path("pour") is None
    assert sorted(result.nodes["pour"].record.files) == [*(f"file-{number}" for number in range(10)), "note"]
    assert set(statuses(workshop.run(params=params)).values()) == {"cached"}
    assert leftovers(workshop) == []
    assert facts(workshop.run(params=params, jobs=1, store=tmp_path / "other")) == facts(result)


def test_bytes_that_were_let_go_are_made_again_for_whoever_needs_them(workshop):
    workshop.run(DROPPING, params={"count": "6", "sip": "0.05"})
    result = workshop.run(params={"count": "6", "sip": "0.06"})
    assert statuses(result) == {"pour": "succeeded", "sip": "succeeded"}
    assert (result.path("sip") / "file-5").read_text() == "A" * 1000


def test_a_second_consumer_that_does_not_follow_keeps_the_files(workshop):
    text = DROPPING + "  after: {uses: write, inputs: {after: pour}}\n"
    result = workshop.run(text, params={"count": "6", **STEADY})
    assert set(statuses(result).values()) == {"succeeded"}
    assert facts(result).keys() == {"pour", "sip", "after"}
    assert leftovers(workshop) == []


def test_a_file_goes_once_all_who_follow_have_taken_it(workshop):
    text = DROPPING.replace(
        'with: {pace: "${params.sip}"}', 'matrix: {pace: [0.0, 0.03]}, with: {pace: "${matrix.pace}"}'
    )
    result = workshop.run(text, params={"count": "10"})
    assert set(statuses(result).values()) == {"succeeded"}
    assert len(result.nodes) == 3
    for name, state in result.nodes.items():
        if name != "pour":
            assert state.record.metrics["most"] <= 2
            assert (result.path(name) / "file-9").read_text() == "A" * 1000
    assert result.path("pour") is None
    assert leftovers(workshop) == []


TWINS = DROPPING.replace("  sip: {", "  sip: {matrix: {tag: [a, b, c]}, ") + (
    '  after: {uses: write, inputs: {after: sip}, with: {text: "${matrix.tag}"}}\n'
)


@pytest.mark.parametrize(
    ("text", "jobs"),
    [(TWINS, None), (TWINS.replace("    cache: false\n", ""), 1)],
    ids=["let go, side by side", "kept, in turn"],
)
def test_of_nodes_that_do_the_same_work_one_does_it(workshop, text, jobs):
    """An axis that is declared above what it changes. They were waited for, each for the other, for ever."""
    workshop.manifest.write_text(text)
    plan = bigpipe.plan(workshop.manifest)
    assert [str(plan.nodes[f"sip@tag={tag}"].action) for tag in "abc"] == ["run", "cached", "cached"]
    result = workshop.run(jobs=jobs, force=["sip"])
    assert set(workshop.ran) == {"pour", "sip@tag=a", "after@tag=a", "after@tag=b", "after@tag=c"}
    assert statuses(result)["sip@tag=a"] == "succeeded"
    others = [result.nodes[f"sip@tag={tag}"] for tag in "bc"]
    assert [(str(state.status), state.reason) for state in others] == [("cached", "the same as sip@tag=a")] * 2
    assert {state.digest for state in others} == {result.nodes["sip@tag=a"].digest}
    assert set(statuses(workshop.run()).values()) == {"cached"}
    assert leftovers(workshop) == []


def test_who_has_ended_needs_no_file_any_more(workshop):
    """A follower that reads one file and takes none: the producer waited for it, and it for the producer."""
    text = DROPPING.replace('pace: "${params.sip}"', "skim: true")
    result = workshop.run(text, params={"count": "8"})
    assert statuses(result) == {"pour": "succeeded", "sip": "succeeded"}
    assert workshop.ran == ["pour", "sip"]
    assert leftovers(workshop) == []


def test_a_producer_that_tries_again_goes_on_where_its_consumer_is(workshop):
    text = RECIPE.replace('letter: "${params.letter}"', 'letter: "${params.letter}", tire_at: 3')
    result = workshop.run(text.replace("uses: pour,", "uses: pour, retries: 1,"), params=STEADY)
    assert statuses(result) == {"pour": "succeeded", "sip": "succeeded"}
    assert workshop.ran == ["pour", "sip", "pour"]


def test_a_file_nobody_was_told_of_sends_the_consumer_back(workshop):
    text = RECIPE.replace('letter: "${params.letter}"', 'letter: "${params.letter}", afterthought: true')
    said: list[str] = []
    reporter = SimpleNamespace(report=lambda event: said.append(getattr(event, "line", "")))
    result = workshop.run(text, params=STEADY, reporter=reporter)
    assert workshop.ran == ["pour", "sip", "sip"]
    assert (result.path("sip") / "others").read_text() == "afterthought note"
    assert result.nodes["sip"].record.metrics["done"] == 5  # nothing is left of what it made of other files
    assert "starts anew: pour gave other files than it passed on (afterthought)" in said


def test_a_consumer_that_fails_leaves_its_producer_alone(workshop):
    text = DROPPING.replace('pace: "${params.sip}"', 'pace: "${params.sip}", choke_at: file-3')
    result = workshop.run(text, params={"count": "8", "pour": "0.05"})
    assert statuses(result) == {"pour": "succeeded", "sip": "failed"}
    assert "wrong way" in str(result.errors[0])
    mended = workshop.run(DROPPING, params={"count": "8", "pour": "0.05"})
    assert statuses(mended)["sip"] == "succeeded"
    assert mended.nodes["pour"].digest == result.nodes["pour"].digest


def running(workshop, **params: str) -> subprocess.Popen[bytes]:
    """A run in a process of its own whose follower is at work."""
    arguments = [word for name, value in params.items() for word in ("-p", f"{name}={value}")]
    process = subprocess.Popen(
        [sys.executable, "-m", "bigpipe", "run", "recipe.yaml", *arguments],
        cwd=workshop.folder, env=environment(workshop.folder), stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not list((workshop.folder / "store").glob("work/*/out/file-1")) and time.monotonic() < deadline:
        time.sleep(0.02)
    while not (workshop.folder / "pid-sip").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return process


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.fault)],
)
@pytest.mark.parametrize("text", [RECIPE, pytest.param(DROPPING, marks=pytest.mark.fault)])
def test_an_ended_run_leaves_nobody_and_is_taken_up_again(workshop, tmp_path, number, code, text):
    params = {"count": "8", **SLOW}
    workshop.manifest.write_text(text)
    process = running(workshop, **params)
    process.send_signal(number)
    assert process.wait(timeout=20) == code
    follower = int((workshop.folder / "pid-sip").read_text())
    deadline = time.monotonic() + 10
    while alive(follower) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(follower)
    assert not list((workshop.folder / "store" / "keys").glob("*"))
    result = workshop.run(params={**params, "pour": "0.3"})
    assert statuses(result) == {"pour": "succeeded", "sip": "succeeded"}
    assert facts(workshop.run(params=params, jobs=1, store=tmp_path / "other")) == facts(result)
    assert leftovers(workshop) == []


def alive(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_a_follower_did_before_a_crash_is_found_under_its_true_key(workshop):
    """The producer is recorded before the second run: the consumer then runs alone, from where it was."""
    params = {"count": "8", **SLOW}
    workshop.manifest.write_text(RECIPE)
    process = running(workshop, **params)
    deadline = time.monotonic() + 10
    while len(list((workshop.folder / "store").glob("tmp/*/*/taken/sip/*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert statuses(workshop.run(nodes=["pour"], params=params)) == {"pour": "succeeded"}
    result = workshop.run(params=params)
    assert workshop.ran == ["sip"]
    assert result.nodes["sip"].record.metrics["done"] < 8
    assert leftovers(workshop) == []


def test_plan_and_progress_say_who_follows_whom(workshop):
    workshop.manifest.write_text(RECIPE)
    assert "beside pour, file by file" in workshop.command("plan", "recipe.yaml").stdout
    done = workshop.command("run", "recipe.yaml", "--json", "-p", "pour=0.05")
    assert "takes the files of pour as they are made" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["status"] == "succeeded"
