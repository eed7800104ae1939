"""Chunks that are cut once, queues that many processes take from, and shares as accelerate gives them."""

from __future__ import annotations

import itertools
import multiprocessing
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bigpipe
from bigpipe.bigmodel.inference.sharing import Queue, assign, chunked, share_out
from bigpipe.errors import UsageError


def test_chunks_hold_rows_of_like_length_in_the_order_of_their_first() -> None:
    assert chunked([5, 1, 9, 1, 5], 2) == [[0, 2], [1, 4], [3]]
    assert chunked([7] * 5, 2) == [[0, 1], [2, 3], [4]], "equal lengths keep the order of the rows"
    assert chunked([5, 1, 9], 1) == [[0], [1], [2]], "as accelerate's split has them"
    assert chunked([], 3) == []


def test_a_chunk_has_no_more_tokens_than_asked_for_but_for_a_row_that_is_longer_itself() -> None:
    draw = random.Random(0)  # noqa: S311
    lengths = [max(1, int(draw.lognormvariate(3, 1))) for _ in range(500)]
    chunks = chunked(lengths, 16, 100)
    assert sorted(row for chunk in chunks for row in chunk) == list(range(500))
    assert chunks == sorted(chunks)
    for chunk in chunks:
        assert len(chunk) <= 16
        assert len(chunk) == 1 or len(chunk) * max(lengths[row] for row in chunk) <= 100
    assert max(map(len, chunks)) == 16
    assert max(lengths) > 100


def test_what_costs_most_is_taken_first() -> None:
    def shares(missing: list[int], *options: Any, **more: Any) -> list[list[int]]:
        return [list(share) for share in share_out(missing, [5, 9, 5, 1][: len(missing)], *options, **more)]

    assert shares([3, 4, 6, 7], 2, "queue") == [[4, 3, 6, 7]]
    assert shares([3, 4, 6, 7], 2, "static") == [[3, 4], [6, 7]]
    assert shares([3, 4, 6], 2, "static", pad=True) == [[3, 4], [6, 6]]


def take_all(path: Path, count: int, ranks: int, rank: int, answers: Any) -> None:
    answers.put(list(Queue(path, range(count), [1] * count, ranks, rank)))


def test_processes_that_take_from_one_queue_get_each_thing_once(tmp_path: Path) -> None:
    many = multiprocessing.get_context("fork")
    answers, count = many.Queue(), 20_000
    takers = [many.Process(target=take_all, args=(tmp_path / "queue", count, 4, rank, answers)) for rank in range(4)]
    for taker in takers:
        taker.start()
    taken = [answers.get(timeout=60) for _ in takers]
    for taker in takers:
        taker.join()
    assert sorted(thing for each in taken for thing in each) == list(range(count))
    assert all(each == sorted(each) for each in taken)


def test_what_ranks_can_expect_comes_to_all_there_is(tmp_path: Path) -> None:
    sizes = [4, 4, 3, 2, 1]
    queues = [Queue(tmp_path / "queue", range(5), sizes, 3, rank) for rank in range(3)]
    assert [queue.expected for queue in queues] == [5, 5, 4]
    first = iter(queues[0])
    assert [next(first), next(first)] == [0, 1]
    assert queues[0].expected == 8 + 2
    assert list(queues[1]) == [2, 3, 4]
    assert list(first) == []
    assert [queue.expected for queue in queues[:2]] == [8, 6]
    assert not Queue(tmp_path / "queue", range(5), sizes, 3, 2), "nothing is left"


@pytest.fixture
def states() -> Iterator[Any]:
    from accelerate import PartialState

    def state(rank: int, ranks: int) -> Any:
        made = PartialState(cpu=True)
        made.num_processes, made.process_index = ranks, rank
        return made

    yield state
    PartialState._reset_state()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("pad", [False, True])
def test_inputs_are_split_as_accelerate_splits_them(states: Any, ranks: int, pad: bool) -> None:
    for length in range(1 if pad else 0, 16):
        for rank in range(ranks):
            whole = [f"prompt {number}" for number in range(length)]
            given: list[Any] = [whole, {"a": whole, "b": list(range(length))}, "as it is"]
            if not pad:  # accelerate pads no tuple, and tensors with the help of the other ranks
                given += [tuple(whole), torch.arange(2.0 * length).reshape(length, 2), {"t": torch.arange(length)}]
            for inputs in given:
                with bigpipe.split_between_processes(inputs, pad, rank=rank, world_size=ranks) as share:
                    pass
                copy = dict(inputs) if isinstance(inputs, dict) else inputs
                with states(rank, ranks).split_between_processes(copy, apply_padding=pad) as wanted:
                    assert_same(share, wanted)
            assert assign(whole, ranks, pad=pad)[rank] == split(whole, pad, rank, ranks)
            assert split(tuple(whole), pad, rank, ranks) == tuple(split(whole, pad, rank, ranks))
            tensor = torch.arange(length)
            assert split(tensor, pad, rank, ranks).tolist() == split(list(range(length)), pad, rank, ranks)


def split(inputs: Any, pad: bool, rank: int, ranks: int) -> Any:
    with bigpipe.split_between_processes(inputs, pad, rank=rank, world_size=ranks) as share:
        return share


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_same(one[name], other[name])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def test_the_variables_of_torchrun_say_whose_share_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with bigpipe.split_between_processes(["a dog", "a cat"]) as share:
        assert share == ["a dog", "a cat"], "alone"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = {"prompt": ["a dog", "a cat", "a chicken"]}
    with bigpipe.split_between_processes(given, apply_padding=True) as share:
        assert share == {"prompt": ["a chicken", "a chicken"]}
    assert given == {"prompt": ["a dog", "a cat", "a chicken"]}, "what was given stays as it was"


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(UsageError, match="several lengths"):
        split({"a": [1, 2], "b": [1]}, False, 0, 2)
    with pytest.raises(UsageError, match="nothing to pad with"):
        split([], True, 0, 2)
    with pytest.raises(UsageError, match="rank 2 is none of 2"):
        split([1], False, 2, 2)
    with pytest.raises(UsageError, match="rank '0' is none of 2"):
        split([1], False, "0", 2)  # type: ignore[arg-type]
    for odd in (3, torch.tensor(3), {"x": [1, 2], "y": [3, 4]}):
        for ranks in (1, 2):
            with pytest.raises(UsageError, match=r"'odd' of the dict is a \w+, and has no entries to share out"):
                split({"prompt": ["a", "b"], "odd": odd}, False, 0, ranks)


def test_a_single_number_goes_to_all_as_it_is() -> None:
    for number in (3, torch.tensor(3)):
        assert [split(number, pad, rank, 2) for pad in (False, True) for rank in range(2)] == [number] * 4


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_variable_of_torchrun_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "x")
    with pytest.raises(UsageError, match=f"the variable {name} is 'x', and no number"), (
        bigpipe.split_between_processes([1])
    ):  # fmt: skip
        pass


def test_a_dataset_is_split_by_its_rows(states: Any) -> None:
    datasets = pytest.importorskip("datasets")
    for length, rank, pad in itertools.product(range(1, 8), range(3), (False, True)):
        given = datasets.Dataset.from_dict({"a": list(range(length))})
        wanted = split(list(range(length)), pad, rank, 3)
        assert split(given, pad, rank, 3)["a"] == wanted
