"""Rows that ranks die of are computed alone, then given up; a batch that is larger than memory is halved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from bigpipe.bigmodel.inference import Found, Record, WorkPlan, plan_work
from bigpipe.bigmodel.inference.deaths import BEGUN, begin
from bigpipe.bigmodel.inference.records import FAILED, LOG, append, open_log
from bigpipe.bigmodel.inference.working import answer_batch
from bigpipe.bigmodel.tasks import Answer, Row
from bigpipe.errors import DoesNotFit, StageFailed
from bigpipe.files import LogFile

ROWS = [Row(number, text, {"prompt": text}) for number, text in enumerate("abcdef")]
KILLED = "was ended by SIGKILL"


def planned(folder: Path, *, lost: dict[int, str], max_errors: int = 0) -> WorkPlan:
    return plan_work(folder, ROWS, lambda row: 1, ranks=2, batch_size=2, lost=lost, max_errors=max_errors)


def queues(plan: WorkPlan) -> list[list[int]]:
    return [list(queue) for queue in plan.queues]


def dies(folder: Path, rank: int, rows: list[int]) -> dict[int, str]:
    (folder / f"rank-{rank}").mkdir(exist_ok=True)
    with LogFile(folder / f"rank-{rank}" / BEGUN) as log:
        begin(log, rows)
    return {rank: KILLED}


def finish(folder: Path, rows: Sequence[int]) -> None:
    with open_log(folder / "rank-1" / LOG) as log:
        append(log, [Record(row, ROWS[row].digest, {"text": "."}) for row in rows])


def test_a_batch_that_two_ranks_died_of_is_computed_row_by_row_and_a_third_death_is_the_rows_own(
    tmp_path: Path,
) -> None:
    assert queues(planned(tmp_path, lost={})) == [[0, 1, 2]]
    once = planned(tmp_path, lost=dies(tmp_path, 1, [2, 3]))
    assert (queues(once), once.suspects) == ([[0, 1, 2]], [])
    twice = planned(tmp_path, lost=dies(tmp_path, 0, [2, 3]))
    assert (queues(twice), twice.suspects, twice.finished) == ([[0, 2]], [2, 3], 0)
    finish(tmp_path, [2])
    third = planned(tmp_path, lost=dies(tmp_path, 0, [3]), max_errors=1)
    assert (queues(third), third.suspects, third.finished) == ([[0, 2]], [], 1)
    with Found(third.rows, tmp_path) as found:
        record = found[3]
    assert record.payload == {"error": f"RankDied: its rank {KILLED}, 3 times"}


def test_more_rows_that_ranks_died_of_than_may_fail_end_it(tmp_path: Path) -> None:
    for _ in range(2):
        planned(tmp_path, lost=dies(tmp_path, 0, [4]))
    with pytest.raises(StageFailed, match=r"max_errors allows 0; prompt 4: RankDied: its rank was ended by SIGKILL"):
        planned(tmp_path, lost=dies(tmp_path, 0, [4]))
    assert queues(planned(tmp_path, lost={})) == [[0, 1, 2]], "whoever runs it again has a new try"


def test_what_a_dead_rank_had_finished_or_others_began_is_not_suspected(tmp_path: Path) -> None:
    for _ in range(3):
        dies(tmp_path, 1, [4, 5])
        dies(tmp_path, 0, [0, 1])
        finish(tmp_path, [0, 1])
        plan = planned(tmp_path, lost=dies(tmp_path, 0, [2, 3]), max_errors=2)
    assert queues(plan) == [[2]]
    with Found(plan.rows, tmp_path) as found:
        assert not {0, 1, 4, 5}.intersection(found.rows(FAILED))


def test_what_a_rank_was_at_when_another_died_is_not_held_against_it_later(tmp_path: Path) -> None:
    dies(tmp_path, 1, [4, 5])  # ended by the launcher, as rank 0 had died
    planned(tmp_path, lost=dies(tmp_path, 0, [2, 3]))
    for _ in range(2):
        plan = planned(tmp_path, lost=dies(tmp_path, 1, [0, 1]))
    assert plan.suspects == [0, 1]


def gigantic() -> None:
    import torch

    torch.empty(2**60)


def out_of_memory_of_python() -> None:
    raise MemoryError


def of_a_gpu() -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory")


def of_a_driver() -> None:
    raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")


def of_a_library_on_a_gpu() -> None:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.mark.parametrize("fail", [gigantic, out_of_memory_of_python, of_a_gpu, of_a_driver, of_a_library_on_a_gpu])
def test_a_batch_that_is_larger_than_memory_is_halved_until_it_fits(fail: object) -> None:
    sizes, told = [], []

    def answer(rows: Sequence[Row]) -> list[Answer]:
        sizes.append(len(rows))
        if len(rows) > 2:
            fail()  # type: ignore[operator]
        return [Answer({"text": row.prompt}) for row in rows]

    answers = answer_batch(answer, ROWS, told.append, told.append)
    assert [answer.payload["text"] for answer in answers] == list("abcdef")
    assert sizes == [6, 3, 2, 1, 3, 2, 1]
    assert len(told) == 3
    assert "a batch of 6 prompts, the first is 0: computed as 3 and 3" in told[0]


@pytest.mark.parametrize("fail", [gigantic, of_a_driver])
def test_a_row_that_is_larger_than_memory_itself_is_told(fail: Callable[[], None]) -> None:
    def answer(rows: Sequence[Row]) -> list[Answer]:
        fail()
        return []

    with pytest.raises(DoesNotFit, match="prompt 0 does not fit"):
        answer_batch(answer, ROWS, print)
