"""The loop: caching, early cutoff, failures, gates, dropped bytes, parallel nodes, interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.workshop import statuses

import bigpipe
from bigpipe.errors import DoesNotFit, GateFailed, StageFailed, Transient, UsageError
from bigpipe.orchestrator.contract import NodeRetried, NodeStarted
from bigpipe.orchestrator.store.hashing import StatMemo

CHAIN = """\
version: 1
name: chain
params: {text: hello, separator: " "}
stages:
  a: {uses: write, with: {text: "${params.text}"}}
  b: {uses: write, with: {text: world}}
  c:
    uses: join
    inputs: {first: a, second: b}
    with: {separator: "${params.separator}"}
  d: {uses: join, inputs: {first: c}}
"""


def test_second_run_is_all_cached(workshop):
    first = workshop.run(CHAIN)
    assert sorted(workshop.ran) == ["a", "b", "c", "d"]
    assert first.exit_code == 0
    assert (first.path("d") / "text").read_text() == "hello world"
    second = workshop.run()
    assert workshop.ran == []
    assert set(statuses(second).values()) == {"cached"}


def test_only_what_depends_on_a_changed_parameter_runs(workshop):
    workshop.run(CHAIN)
    result = workshop.run(params={"separator": "-"})
    assert workshop.ran == ["c", "d"]
    assert statuses(result) == {"a": "cached", "b": "cached", "c": "succeeded", "d": "succeeded"}
    assert "params.separator   → -" in result.nodes["c"].reason or "→ -" in result.nodes["c"].reason


def test_comments_and_layout_run_nothing(workshop):
    workshop.run(CHAIN)
    workshop.run("# a comment\n" + CHAIN.replace('{text: hello, separator: " "}', "\n  separator: ' '\n  text: hello"))
    assert workshop.ran == []


def test_equal_bytes_stop_a_rerun(workshop):
    """`text: b` twice with another node before it: the same digest, so what follows is cached."""
    text = CHAIN.replace('{separator: "${params.separator}"}', "{squeeze: true}")
    workshop.run(text)
    workshop.run(text, params={"text": "HELLO"})
    assert workshop.ran == ["a", "c"]


def test_an_edited_file_reruns_its_reader(workshop):
    text = "version: 1\nname: x\nstages:\n  a: {uses: write, with: {source: input.txt}}\n"
    (workshop.folder / "input.txt").write_text("one")
    workshop.run(text)
    (workshop.folder / "input.txt").write_text("two")
    result = workshop.run()
    assert workshop.ran == ["a"]
    assert (result.path("a") / "text").read_text() == "hellotwo"
    workshop.run()
    assert workshop.ran == []


EDITED = """\
version: 1
name: edited
stages:
  a: {uses: sleep, with: {seconds: 1.5, tag: a}}
  b: {uses: write, needs: [a], with: {source: input.txt}}
"""


def test_a_file_that_is_edited_before_its_reader_s_turn_is_not_taken_for_what_it_was(workshop):
    """The key was made of the file as the plan saw it."""
    source = workshop.folder / "input.txt"
    source.write_text("one")

    def edit(event):
        if isinstance(event, NodeStarted) and event.node == "a":
            source.write_text("two")

    first = workshop.run(EDITED, progress=edit)
    assert statuses(first) == {"a": "succeeded", "b": "failed"}
    assert first.exit_code == 75
    assert "b: params.source" in first.errors[0].cause
    assert first.errors[0].place.line == 5
    assert (workshop.run().path("b") / "text").read_text() == "hellotwo"
    source.write_text("one")
    assert (workshop.run().path("b") / "text").read_text() == "helloone"


def test_forced_node_runs_again_and_nothing_else(workshop):
    workshop.run(CHAIN)
    workshop.run(force=["b"])
    assert workshop.ran == ["b"]


def test_a_part_of_a_variant_s_name_forces_those_it_means(workshop):
    text = """\
version: 1
name: forced
stages:
  a: {uses: write, matrix: {t: [x, y], u: [v, w]}, with: {text: "${matrix.t}${matrix.u}"}}
  b: {uses: write, with: {text: b}}
"""
    workshop.run(text)
    workshop.run(force=["a@t=x"])
    assert sorted(workshop.ran) == ["a@t=x,u=v", "a@t=x,u=w"]
    assert list(bigpipe.orchestrator.commands.why(workshop.manifest, "a@u=v")) == ["a@t=x,u=v", "a@t=y,u=v"]


def test_what_is_forced_must_be_among_what_is_to_run(workshop):
    workshop.run(CHAIN)
    with pytest.raises(UsageError, match="d cannot be forced: it is not among the nodes that are to run"):
        workshop.run(nodes=["c"], force=["d"])


def test_selected_node_runs_with_its_ancestors_only(workshop):
    result = workshop.run(CHAIN, nodes=["c"])
    assert set(result.nodes) == {"a", "b", "c"}


def test_failure_skips_dependents_and_has_its_exit_code(workshop):
    text = """\
version: 1
name: failing
stages:
  bad: {uses: flaky, with: {fatal: true}}
  after: {uses: join, inputs: {first: bad}}
"""
    result = workshop.run(text)
    assert statuses(result) == {"bad": "failed", "after": "skipped"}
    assert result.exit_code == 6
    assert "the toy is broken" in str(result.errors[0])
    with pytest.raises(StageFailed, match="the toy is broken"):
        bigpipe.run(workshop.manifest)


def test_a_bug_in_a_stage_names_its_log(workshop):
    result = workshop.run("version: 1\nname: x\nstages:\n  bad: {uses: flaky, with: {bug: true}}\n")
    assert result.exit_code == 6
    assert "KeyError" in str(result.errors[0])
    assert "log" in str(result.errors[0])


def test_keep_going_finishes_other_branches(workshop):
    text = """\
version: 1
name: branches
stages:
  bad: {uses: flaky, with: {fatal: true}}
  slow: {uses: sleep, with: {seconds: 0.3}}
  after_slow: {uses: join, inputs: {first: slow}}
"""
    assert statuses(workshop.run(text, keep_going=True))["after_slow"] == "succeeded"


def test_transient_failures_are_tried_again(workshop):
    text = "version: 1\nname: x\nstages:\n  a: {uses: flaky, with: {times: 1}, retries: 2}\n"
    result = workshop.run(text)
    assert result.exit_code == 0
    assert result.nodes["a"].record.metrics == {"attempts": 2}


def test_transient_failure_without_retries_exits_75(workshop):
    result = workshop.run("version: 1\nname: x\nstages:\n  a: {uses: flaky, with: {times: 1}}\n")
    assert isinstance(result.errors[0], Transient)
    assert result.exit_code == 75


def test_a_gate_known_beforehand_stops_before_anything_runs(workshop):
    text = "version: 1\nname: x\nstages:\n  a: {uses: write, with: {text: abc}, gates: ['characters > 3']}\n"
    workshop.manifest.write_text(text)
    with pytest.raises(GateFailed, match="characters > 3: 3"):
        bigpipe.run(workshop.manifest)
    assert workshop.ran == []


def test_a_gate_is_checked_after_the_run_and_on_cached_nodes(workshop):
    text = "version: 1\nname: x\nstages:\n  a: {uses: write, with: {text: abC}, gates: ['detail.upper == 0']}\n"
    assert workshop.run(text).exit_code == 3
    assert workshop.ran == ["a"]
    with pytest.raises(GateFailed, match=r"detail\.upper == 0: 1"):
        workshop.run(text)
    assert workshop.ran == []


def test_when_skips_a_node_and_what_needs_it(workshop):
    text = """\
version: 1
name: maybe
stages:
  a: {uses: write, with: {text: abC}}
  b: {uses: write, with: {text: x}, when: "${stages.a.metrics.detail.upper} > 5"}
  c: {uses: join, inputs: {first: b}}
  d: {uses: join, inputs: {first: a, second: b}}
"""
    assert statuses(workshop.run(text)) == {"a": "succeeded", "b": "skipped", "c": "skipped", "d": "succeeded"}


def test_what_does_not_fit_stops_before_anything_runs(workshop):
    workshop.manifest.write_text("version: 1\nname: x\nstages:\n  a: {uses: write, with: {misfit: true}}\n")
    with pytest.raises(DoesNotFit, match="-p device=cpu"):
        bigpipe.run(workshop.manifest)
    workshop.manifest.write_text("version: 1\nname: x\nstages:\n  a: {uses: write, with: {needs_ram: 900TiB}}\n")
    with pytest.raises(DoesNotFit, match=r"900.0 TiB of RAM"):
        bigpipe.run(workshop.manifest)


def test_dropped_bytes_are_made_again_only_when_a_consumer_must_run(workshop):
    text = CHAIN.replace("a: {uses: write,", "a: {uses: write, cache: false,")
    first = workshop.run(text)
    assert first.path("a") is None
    workshop.run()
    assert workshop.ran == []
    workshop.run(params={"separator": "+"})
    assert workshop.ran == ["a", "c", "d"]


def test_other_bytes_than_before_reach_what_was_cached_on_them(workshop):
    text = CHAIN.replace(
        'a: {uses: write, with: {text: "${params.text}"}}', "a: {uses: write, cache: false, with: {stamp: true}}"
    )
    text += "  e: {uses: join, inputs: {first: a, second: b}}\n"
    first = workshop.run(text)
    result = workshop.run(params={"separator": "+"})  # `c` demands `a`, which `e` was made from
    assert workshop.ran[0] == "a"
    assert sorted(workshop.ran) == ["a", "c", "d", "e"]
    assert result.nodes["e"].digest != first.nodes["e"].digest
    made = [(result.path(name) / "text").read_text().replace("+", " ") for name in "ce"]
    assert made[0] == made[1]
    assert result.path("a") is None
    workshop.run(params={"separator": "+"})
    assert workshop.ran == []


def test_independent_nodes_run_side_by_side(workshop):
    text = """\
version: 1
name: parallel
stages:
  a: {uses: sleep, with: {seconds: 1.5, tag: a}}
  b: {uses: sleep, with: {seconds: 1.5, tag: b}}
"""
    result = workshop.run(text)
    a, b = (result.nodes[name].record.metrics for name in "ab")
    assert max(a["began"], b["began"]) < min(a["ended"], b["ended"])


def test_matrix_runs_every_variant(workshop):
    text = """\
version: 1
name: matrix
stages:
  a: {uses: write, matrix: {t: [x, y]}, with: {text: "${matrix.t}"}}
  b: {uses: join, inputs: {first: a}}
  all: {uses: join, inputs: {first: "a@t=x", rest: [b]}}
"""
    result = workshop.run(text)
    assert (result.path("all") / "text").read_text() == "x x y"


def test_variants_whose_names_differ_in_what_no_file_name_holds_do_their_own_work(workshop):
    text = """\
version: 1
name: matrix
stages:
  a: {uses: write, matrix: {t: ["x?", "x!", "x_", "%s"]}, with: {text: "${matrix.t}"}}
"""
    result = workshop.run(text % ("ü" * 100))
    texts = {name: (result.path(name) / "text").read_text() for name in result.nodes}
    assert texts == {f"a@t={value}": value for value in ("x?", "x!", "x_", "ü" * 100)}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_stops_children_and_keeps_what_was_finished(workshop, number, code):
    text = """\
version: 1
name: interrupted
stages:
  a: {uses: write}
  b: {uses: sleep, with: {seconds: 60}, inputs: {after: a}}
"""
    workshop.manifest.write_text(text)
    process = subprocess.Popen([sys.executable, "-m", "bigpipe", "run", "recipe.yaml"], cwd=workshop.folder)
    pid_file = workshop.folder / "pid-b"
    deadline = time.monotonic() + 30
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    child = int(pid_file.read_text())
    process.send_signal(number)
    assert process.wait(timeout=20) == code
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    result = workshop.run(text.replace("60", "0"))
    assert statuses(result)["a"] == "cached"


def test_the_result_is_one_json_line(workshop):
    workshop.manifest.write_text(CHAIN)
    done = subprocess.run(
        [sys.executable, "-m", "bigpipe", "run", "recipe.yaml", "--json"],
        cwd=workshop.folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    data = json.loads(done.stdout.splitlines()[-1])
    assert data["schema"] == "bigpipe.run/1"
    assert data["status"] == "succeeded"
    told = {"status", "kind", "after", "key", "digest", "path", "seconds", "peak_rss", "metrics", "gates", "foreseen"}
    assert set(data["nodes"]["d"]) == {*told, "result", "reason", "verdict", "tried", "error"}
    assert (Path(data["nodes"]["d"]["path"]) / "text").read_text() == "hello world"


def test_a_large_file_is_announced_before_it_is_read(workshop):
    (workshop.folder / "small").write_text("x" * 999)
    with (workshop.folder / "large").open("wb") as file:
        file.truncate(StatMemo.LARGE)  # a hole: it takes no room on the disk
    lines = []
    reporter = SimpleNamespace(report=lambda event: lines.append((event.node, event.line)))
    recipe = "version: 1\nname: r\nstages:\n"
    for name in ("small", "large"):
        recipe += f"  {name}: {{uses: write, with: {{source: {name}}}}}\n"
    workshop.manifest.write_text(recipe)
    bigpipe.plan(workshop.manifest, reporter=reporter)
    assert lines == [("large", "reading large, 1.1 GB, to know what it holds")]


def test_bytes_of_one_key_stay_where_one_of_two_nodes_keeps_them(workshop):
    recipe = """\
version: 1
name: twins
stages:
  a: {uses: write, cache: false}
  a2: {uses: join, inputs: {first: a}}
  b: {uses: write}
"""
    result = workshop.run(recipe)
    assert result.nodes["a"].key == result.nodes["b"].key
    assert (result.path("b") / "text").is_file()
    assert (result.path("a") / "text").is_file()
    assert {str(node.action) for node in bigpipe.plan(workshop.manifest).nodes.values()} == {"cached"}


def test_a_node_that_is_tried_again_says_which_attempt_begins(workshop):
    events = []
    text = "version: 1\nname: r\nstages:\n  a: {uses: flaky, with: {times: 1}, retries: 2}\n"
    assert workshop.run(text, progress=events.append).exit_code == 0
    assert [event.attempt for event in events if isinstance(event, NodeRetried)] == [2]
    assert "begins, from 2" in (Path(__file__).parents[2] / "docs" / "reference" / "answers.md").read_text()
