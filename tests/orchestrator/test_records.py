"""What a run was, as it is on disk: while it goes on, after it ended, and beside another one."""

import json
import os
import signal
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.stores import in_child

from bigpipe.errors import UsageError
from bigpipe.orchestrator.contract.events import LogLine, NodeFinished, NodeStarted, Progress, RunFinished, RunStarted
from bigpipe.orchestrator.planning.keys import Difference
from bigpipe.orchestrator.running.records import (
    NodeRun,
    RunRecorder,
    diff,
    latest_run,
    list_runs,
    load_run,
    log_files,
    meant,
    new_run_id,
    node_folder,
    run_ids,
)

NODE = SimpleNamespace(kind=SimpleNamespace(kind="write"), predecessors=())


@dataclass
class Recipe:
    path: Path = Path("/recipes/one.yaml")
    name: str = "one"
    text: str = "version: 1\n"
    params: dict[str, object] = field(default_factory=lambda: {"gpu": "22GiB"})
    nodes: dict[str, object] = field(
        default_factory=lambda: defaultdict(
            lambda: SimpleNamespace(kind=SimpleNamespace(kind="write"), predecessors=())
        )
    )


def finished(node, status="succeeded", **changes):
    facts = {"seconds": 1.23456, "peak_rss": 1000, "metrics": {"bytes": 5}, "digest": "sha256:" + "a" * 64}
    return NodeFinished(node, status, **(facts | changes))


def ran(**nodes):
    shape = {"key": "sha256:" + "b" * 64, "peak_rss": 1000, "status": "succeeded", "seconds": 1.0}
    return {name: NodeRun(**{**shape, **data}) for name, data in nodes.items()}


def run(runs, name, nodes, status="succeeded", recipe=None):
    recorder = RunRecorder(runs / name, name, recipe or Recipe())
    recorder.report(RunStarted(name, "/recipes/one.yaml", tuple(nodes)))
    for node, data in nodes.items():
        recorder.report(NodeStarted(node, "first run"))
        recorder.report(finished(node, data.get("status", "succeeded"), error=data.get("error", "")))
    recorder.report(RunFinished(name, status, 2.0))
    recorder.finish(status, ran(**nodes), 2.0)
    return load_run(runs, name)


def test_ids_sort_by_time_and_never_meet(tmp_path):
    noon, later = datetime(2026, 1, 3, 12, 0, 0, tzinfo=UTC), datetime(2026, 1, 3, 12, 0, 1, tzinfo=UTC)
    moments = [noon + timedelta(milliseconds=number) for number in range(1000)]
    ids = [new_run_id(moment) for moment in [*moments, later]]
    assert ids == sorted(ids)
    assert new_run_id(noon).startswith("20260103-120000-")
    assert len({new_run_id(noon) for _ in range(100)}) == 100


def test_a_run_after_one_of_a_clock_that_was_ahead_is_the_last(tmp_path):
    """For ten years `get`, `show` and `log` took that run for the latest, and gc kept it instead of others."""
    now = datetime(2026, 1, 3, 12, tzinfo=UTC)
    ahead = new_run_id(now + timedelta(days=3650, milliseconds=999))
    run(tmp_path, ahead, {})
    (tmp_path / "zz-no-run").mkdir()
    for _ in range(2):
        assert latest_run(tmp_path) == load_run(tmp_path, "last").run
        run(tmp_path, new_run_id(now, after=latest_run(tmp_path)), {})
    assert run_ids(tmp_path)[0] == ahead
    assert len(run_ids(tmp_path)) == 3
    assert new_run_id(now, after="").startswith("20260103-120000-000")
    assert latest_run(tmp_path / "nowhere") == ""


def test_a_record_says_what_the_run_was(tmp_path):
    record = run(
        tmp_path,
        "r1",
        {"shard": {"metrics": {"bytes": 5}}, "save": {"status": "failed", "error": "disk full"}},
        "failed",
    )
    assert (record.run, record.status, record.seconds) == ("r1", "failed", 2.0)
    assert (record.recipe, record.manifest, record.params) == ("one", "/recipes/one.yaml", {"gpu": "22GiB"})
    assert record.text == "version: 1\n"
    assert record.nodes["shard"].metrics == {"bytes": 5}
    assert (record.nodes["save"].status, record.nodes["save"].error) == ("failed", "disk full")


def test_it_can_be_read_while_the_run_goes_on_and_after_it_was_killed(tmp_path):
    def killed():
        recorder = RunRecorder(tmp_path / "r", "r", Recipe())
        recorder.report(RunStarted("r", "/recipes/one.yaml", ("shard", "save")))
        recorder.report(NodeStarted("shard", "params.dtype float32 → float16"))
        recorder.report(LogLine("shard", "halfway", detail=True))
        recorder._saved = 0.0  # a second later
        recorder.report(finished("shard"))
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(killed) == -signal.SIGKILL
    begun = datetime.fromisoformat(load_run(tmp_path).started).timestamp()
    os.utime(tmp_path / "r" / "events.jsonl", (begun + 7, begun + 7))
    os.utime(tmp_path / "r" / "run.json", (begun + 5, begun + 5))
    record = load_run(tmp_path)
    assert (record.status, record.seconds) == ("dead", 7.0)
    assert (record.nodes["shard"].status, record.nodes["shard"].seconds) == ("succeeded", 1.235)
    assert record.nodes["save"].status == "pending"


def test_every_event_is_kept_with_its_time(tmp_path):
    recorder = RunRecorder(tmp_path / "r", "r", Recipe())
    events = [
        RunStarted("r", "m", ("a",)),
        NodeStarted("a", ""),
        Progress("a", 1, 2),
        LogLine("a", "zeile ü"),
        finished("a"),
    ]
    for event in events:
        recorder.report(event)
    recorder.finish("succeeded", ran(a={}), 1.0)
    lines = [json.loads(line) for line in (tmp_path / "r" / "events.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["run_started", "node_started", "progress", "log", "node_finished"]
    assert all(datetime.fromisoformat(line["time"]) for line in lines)


def test_nodes_that_end_at_once_share_one_writing(tmp_path):
    recorder = RunRecorder(tmp_path / "r", "r", Recipe())
    names = tuple(f"n{number}" for number in range(300))
    recorder.report(RunStarted("r", "m", names))
    for name in names:
        recorder.report(finished(name, "cached"))
    assert not (tmp_path / "r" / "run.json").exists()
    recorder.finish("succeeded", ran(**{name: {"status": "cached"} for name in names}), 0.1)
    assert {node.status for node in load_run(tmp_path).nodes.values()} == {"cached"}


def test_work_that_begins_is_on_record_at_once(tmp_path):
    recorder = RunRecorder(tmp_path / "r", "r", Recipe())
    recorder.report(RunStarted("r", "m", ("a", "b", "c")))
    recorder.report(finished("a", "cached"))
    recorder.report(NodeStarted("b", "first run"))
    assert [node.status for node in load_run(tmp_path).nodes.values()] == ["cached", "running", "pending"]


def test_a_run_that_only_looks_is_on_record_after_a_second(tmp_path):
    recorder = RunRecorder(tmp_path / "r", "r", Recipe())
    recorder.report(RunStarted("r", "m", ("a", "b")))
    recorder._saved -= 1.1  # a second later
    recorder.flush()
    assert [node.status for node in load_run(tmp_path).nodes.values()] == ["pending", "pending"]


class TestFinding:
    @pytest.fixture
    def runs(self, tmp_path):
        for name in ("20260101-000000-aaaaaa", "20260101-000000-bbbbbb", "20260102-000000-cccccc"):
            run(tmp_path, name, {"a": {}})
        return tmp_path

    def test_by_id_by_its_start_and_the_last(self, runs):
        assert load_run(runs, "20260101-000000-bbbbbb").run == "20260101-000000-bbbbbb"
        assert (
            load_run(runs, "20260102").run
            == load_run(runs, "last").run
            == load_run(runs).run
            == "20260102-000000-cccccc"
        )
        assert [record.run[-6:] for record in list_runs(runs)] == ["aaaaaa", "bbbbbb", "cccccc"]

    def test_what_is_none_or_several_is_said(self, runs, tmp_path):
        with pytest.raises(UsageError, match="no run '2027'; the latest is 20260102-000000-cccccc"):
            load_run(runs, "2027")
        with pytest.raises(UsageError, match="several runs start with 20260101"):
            load_run(runs, "20260101")
        with pytest.raises(UsageError, match="no run is on record"):
            load_run(tmp_path / "nothing", "last")

    def test_a_damaged_record_is_named_and_hides_no_other(self, runs):
        (runs / "20260102-000000-cccccc" / "run.json").write_text('{"run":')
        with pytest.raises(UsageError, match="damaged"):
            load_run(runs)
        assert len(list_runs(runs)) == 2

    def test_logs_are_found_by_node_and_attempt(self, runs):
        folder = runs / "20260102-000000-cccccc"
        for attempt in (1, 2, 10):
            path = node_folder(folder, "a") / str(attempt) / "log.txt"
            path.parent.mkdir(parents=True)
            path.write_text(f"attempt {attempt}\n")
        assert [attempt for _, attempt, _ in log_files(runs, "last")] == [1, 2, 10]
        assert [path.read_text() for *_, path in log_files(runs, "last", "a")][-1] == "attempt 10\n"
        with pytest.raises(UsageError, match="has no node 'b'"):
            list(log_files(runs, "last", "b"))

    def test_a_stage_means_the_logs_of_all_its_variants(self, runs):
        nodes = ("q@s=int8", "q@s=nf4", "quick")
        run(runs, "20260103-000000-dddddd", {name: {} for name in nodes})
        for name in nodes:
            path = node_folder(runs / "20260103-000000-dddddd", name) / "1" / "log.txt"
            path.parent.mkdir(parents=True)
            path.touch()
        assert [name for name, *_ in log_files(runs, "last", "q")] == ["q@s=int8", "q@s=nf4"]
        assert [name for name, *_ in log_files(runs, "last", "q@s=nf4")] == ["q@s=nf4"]
        with pytest.raises(UsageError) as caught:
            list(log_files(runs, "last", "quik"))
        assert caught.value.cure == "did you mean 'quick'?"

    @pytest.mark.parametrize(
        ("text", "found"),
        [
            ("q@a=1", ["q@a=1,b=x", "q@a=1,b=y,z"]),
            ("q@b=x,a=1", ["q@a=1,b=x"]),
            ("q@b=y,z", ["q@a=1,b=y,z"]),
            ("q@b=x", ["q@a=1,b=x", "q@a=2,b=x"]),
            ("q", ["q@a=1,b=x", "q@a=2,b=x", "q@a=1,b=y,z"]),
            ("r", ["r"]),
        ],
    )
    def test_a_variant_is_named_as_in_the_recipe(self, text, found):
        nodes = ["q@a=1,b=x", "q@a=2,b=x", "q@a=1,b=y,z", "r"]
        assert meant("last", nodes, text, several=True) == found

    @pytest.mark.parametrize("text", ["q@a=3", "q@", "q@c=1", "q@b=y", "r@a=1"])
    def test_what_no_variant_has_means_none(self, text):
        with pytest.raises(UsageError, match="has no node"):
            meant("last", ["q@a=1,b=x", "q@a=1,b=y,z", "r"], text, several=True)


def test_no_two_nodes_share_a_folder_and_each_has_a_name_that_files_can_have(tmp_path):
    names = ["a@t=x?", "a@t=x!", "a@t=x_", "a@t=org/m", "a@t=org_m", "a@t=" + "ü" * 100, "a@t=" + "ü" * 99 + "é"]
    folders = [node_folder(tmp_path, name) for name in names]
    for folder in folders:
        folder.mkdir(parents=True)
        assert folder.parent == tmp_path / "nodes"
    assert len(set(folders)) == len(names)
    assert node_folder(tmp_path, "a@t=x_").name == "a@t=x_"


class TestDiff:
    def test_a_run_is_like_itself_and_like_one_that_found_it_all_cached(self, tmp_path):
        one = run(tmp_path, "r1", {"a": {"digest": "sha256:1"}})
        assert diff(one, one) == {}
        other = run(tmp_path, "r2", {"a": {"digest": "sha256:1", "status": "cached", "seconds": 0.0}})
        assert diff(one, other) == {}

    def test_params_nodes_digests_metrics_and_times_are_compared(self, tmp_path):
        one = run(tmp_path, "r1", {"a": {"digest": "sha256:1", "metrics": {"x": {"y": 1}}}, "gone": {}})
        other = run(
            tmp_path, "r2", {"a": {"digest": "sha256:2", "metrics": {"x": {"y": 2}}, "seconds": 3.0}, "new": {}},
            recipe=Recipe(params={"gpu": "40GiB"}),
        )  # fmt: skip
        found = diff(one, other, {"a": [Difference("params.scheme", "int8", "nf4")]})
        assert found[""] == [
            Difference("params.gpu", "22GiB", "40GiB"),
            Difference("nodes.gone", "succeeded", None),
            Difference("nodes.new", None, "succeeded"),
        ]
        assert found["a"] == [
            Difference("params.scheme", "int8", "nf4"),
            Difference("digest", "sha256:1", "sha256:2"),
            Difference("metrics.x.y", 1, 2),
            Difference("seconds", 1.0, 3.0),
        ]

    def test_a_failure_is_a_difference(self, tmp_path):
        one = run(tmp_path, "r1", {"a": {}})
        other = run(tmp_path, "r2", {"a": {"status": "failed"}}, "failed")
        assert Difference("status", "succeeded", "failed") in diff(one, other)["a"]
