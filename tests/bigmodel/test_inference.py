"""Exactly-once inference from Python: a work plan, ranks that come and go, one line per row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from bigpipe.bigmodel.inference import Bound, Pace, WorkPlan, compute_share, merge_results, plan_work
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.tasks import Answer, Row, read_prompts
from bigpipe.bigmodel.tasks.task import TaskOptions, function_task
from bigpipe.errors import StageFailed

ROWS = read_prompts([f"row {number}" for number in range(7)], "prompt", Path())


def counting(calls: list[int], fails: Callable[[int], bool] = lambda index: False) -> Callable[[], Bound]:
    """Bind an answerer that notes which rows it computes, and fails on some of them."""

    def answer(rows: Sequence[Row]) -> list[Answer]:
        if wrong := [row.index for row in rows if fails(row.index)]:
            raise ValueError(f"row {wrong[0]} is wrong")
        calls.extend(row.index for row in rows)
        return [Answer({"length": len(row.prompt)}, 1) for row in rows]

    return lambda: Bound(answer)


def share_out(folder: Path, rows: Sequence[Row] = ROWS, **options: Any) -> WorkPlan:
    """Rows of one length, in the shares of `split: static`, so that a test knows who does what."""
    return plan_work(folder, rows, lambda row: 1, **{"split": "static", **options})


def queues(plan: WorkPlan) -> list[list[int]]:
    return [list(queue) for queue in plan.queues]


def lines(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_one_rank_stops_and_others_take_over(tmp_path: Path) -> None:
    plan = share_out(tmp_path, batch_size=2, ranks=2)
    assert queues(plan) == [[0, 1], [2, 3]]
    assert list(plan.rows) == list(WorkPlan.read(tmp_path).rows) == ROWS
    assert [plan.batch(chunk) for chunk in range(4)] == [ROWS[:2], ROWS[2:4], ROWS[4:6], ROWS[6:]]
    assert [plan.rows.digest(row.index) for row in ROWS] == [row.digest for row in ROWS]
    calls: list[int] = []
    compute_share(tmp_path, 0, 2, counting(calls))
    with pytest.raises(StageFailed, match="3 prompts without a result, the first is 4"):
        merge_results(tmp_path, tmp_path)
    again = share_out(tmp_path, batch_size=2, ranks=3)
    assert (again.finished, [len(queue) for queue in queues(again)]) == (2, [1, 1, 0])
    for rank in range(3):
        compute_share(tmp_path, rank, 3, counting(calls))
    assert calls == [0, 1, 2, 3, 4, 5, 6]
    summary, files = merge_results(tmp_path, tmp_path)
    assert (summary["prompts"], summary["errors"], summary["tokens"]) == (7, 0, 7)
    written = (tmp_path / "results.jsonl").read_bytes()
    assert files == {"results.jsonl": (hashlib.sha256(written).hexdigest(), len(written))}
    assert lines(tmp_path) == [{"index": row.index, "prompt": row.prompt, "length": 5} for row in ROWS]


def test_a_timeline_says_when_each_rank_was_at_work_in_the_last_attempt(tmp_path: Path) -> None:
    told: list[Pace] = []
    share_out(tmp_path, batch_size=2, ranks=2)
    compute_share(tmp_path, 1, 2, counting([]))
    share_out(tmp_path, batch_size=2, ranks=3)
    for rank in range(3):
        compute_share(tmp_path, rank, 3, counting([]), progress=told.append)
    times = merge_results(tmp_path, tmp_path)[0]["timeline"]
    assert {rank: (each["prompts"], each["tokens"]) for rank, each in times.items()} == {"0": (2, 2), "1": (2, 2)}
    assert times["0"]["began"] == 0
    assert all(0 <= each["began"] <= each["ended"] and each["busy"] >= 0 for each in times.values())
    assert [(pace.done, pace.expected, pace.tokens) for pace in told] == [(0, 2, 0), (2, 2, 2), (2, 2, 2)] * 2
    assert {pace.whole for pace in told} == {4}
    assert told[1].busy == pytest.approx(times["0"]["busy"], abs=0.001)


def test_what_a_rank_did_is_noted_to_its_end(tmp_path: Path) -> None:
    share_out(tmp_path, batch_size=2, ranks=1)
    compute_share(tmp_path, 0, 1, counting([]))
    timeline = merge_results(tmp_path, tmp_path)[0]["timeline"]
    assert (timeline["0"]["prompts"], timeline["0"]["tokens"]) == (7, 7)


def test_a_rank_that_came_too_late_was_not_at_work(tmp_path: Path) -> None:
    share_out(tmp_path, ROWS[:2], batch_size=2, ranks=2, split="queue")

    def bind() -> Bound:
        compute_share(tmp_path, 0, 2, counting([]))
        return counting([])()

    compute_share(tmp_path, 1, 2, bind)
    timeline = merge_results(tmp_path, tmp_path)[0]["timeline"]
    assert (list(timeline), timeline["0"]["began"]) == (["0"], 0)


def test_a_rank_without_work_binds_nothing(tmp_path: Path) -> None:
    share_out(tmp_path, ROWS[:1], batch_size=2, ranks=2)
    compute_share(tmp_path, 1, 2, lambda: pytest.fail("the model was loaded"))


def test_rows_that_failed_are_tried_again_and_counted(tmp_path: Path) -> None:
    calls: list[int] = []
    share_out(tmp_path, batch_size=4, ranks=1)
    with pytest.raises(StageFailed, match=r"2 prompts failed, and max_errors allows 1; prompt 3"):
        compute_share(tmp_path, 0, 1, counting(calls, lambda index: index in (1, 3)), max_errors=1)
    assert share_out(tmp_path, batch_size=4, ranks=1).finished == 0
    compute_share(tmp_path, 0, 1, counting(calls, lambda index: index == 3), max_errors=1)
    summary, _ = merge_results(tmp_path, tmp_path, max_errors=1)
    assert summary["errors"] == 1
    assert [line["index"] for line in lines(tmp_path) if "error" in line] == [3]
    with pytest.raises(StageFailed, match="max_errors allows 0"):
        merge_results(tmp_path, tmp_path)


def test_records_of_other_rows_and_of_padding_count_for_nothing(tmp_path: Path) -> None:
    other = read_prompts([f"other {number}" for number in range(7)], "prompt", Path())
    share_out(tmp_path, other, batch_size=2, ranks=1)
    compute_share(tmp_path, 0, 1, counting([]))
    plan = share_out(tmp_path, batch_size=3, ranks=2, pad=True)
    assert plan.finished == 0
    assert queues(plan) == [[0, 1], [2, 2]]
    for rank in range(2):
        compute_share(tmp_path, rank, 2, counting([]))
    assert merge_results(tmp_path, tmp_path)[0]["tokens"] == 7


def test_an_answer_that_is_no_json_is_an_error_of_its_row(tmp_path: Path) -> None:
    share_out(tmp_path, ROWS[:2], batch_size=2, ranks=1)

    def answer(rows: Sequence[Row]) -> list[Answer]:
        return [Answer({"score": float("nan") if row.index else 1.0}) for row in rows]

    compute_share(tmp_path, 0, 1, lambda: Bound(answer), max_errors=1)
    merge_results(tmp_path, tmp_path, max_errors=1)
    assert "score is nan, which no result can hold" in str(lines(tmp_path)[1]["error"])


def test_numbers_of_numpy_and_torch_are_numbers(tmp_path: Path) -> None:
    share_out(tmp_path, ROWS[:2], batch_size=2, ranks=1)
    scores: list[Any] = [numpy.float32(0.5), torch.tensor(3)]

    def answer(rows: Sequence[Row]) -> list[Answer]:
        return [Answer({"score": [scores[row.index]], "of": {"n": numpy.int64(row.index)}}) for row in rows]

    compute_share(tmp_path, 0, 1, lambda: Bound(answer))
    merge_results(tmp_path, tmp_path)
    assert [(line["score"], line["of"]) for line in lines(tmp_path)] == [([0.5], {"n": 0}), ([3], {"n": 1})]


class Calls:
    """An object that can be called, and has no name."""

    def __call__(self, model: object, rows: list[dict[str, Any]], k: int = 1) -> list[dict[str, int]]:
        return [{"k": k} for _ in rows] if k else []


def test_an_object_that_can_be_called_is_a_task() -> None:
    task = function_task("mine:calls", Calls())
    assert task.bind(None, Path(), TaskOptions(), Sources())(ROWS[:2]) == [Answer({"k": 1})] * 2
    with pytest.raises(TypeError, match="calls must give a list of 2 dicts"):
        task.bind(None, Path(), TaskOptions(arguments={"k": 0}), Sources())(ROWS[:2])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([Answer({})], "the task gives 1 answer for 2 rows"),
        ([{}, {}], "the task gives a list of dict"),
        (iter(()), "the task gives a tuple_iterator"),
    ],
)
def test_a_task_that_gives_something_else_is_to_blame_and_no_prompt(tmp_path: Path, given: Any, said: str) -> None:
    share_out(tmp_path, ROWS[:2], batch_size=2, ranks=1)
    with pytest.raises(StageFailed, match=said):
        compute_share(tmp_path, 0, 1, lambda: Bound(lambda rows: given), max_errors=2)
