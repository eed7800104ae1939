"""Rows of several lanes are multiplied at once, and each lane gets the bits that it gets alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from bigpipe.bigmodel.execution.gathered import ENOUGH, OUTPUT, Trials, gathered
from bigpipe.bigmodel.execution.lanes import Lanes

WIDTH = 256


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many rows torch was asked to multiply at once, each time."""
    found: list[int] = []
    linear = torch.nn.functional.linear

    def counting(rows: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        found.append(rows.flatten(end_dim=-2).shape[0])
        return linear(rows, *weights)

    monkeypatch.setattr(torch.nn.functional, "linear", counting)
    return found


def through(
    module: torch.nn.Module, batches: Sequence[torch.Tensor], inference: bool = True, trials: Trials | None = None
) -> list[torch.Tensor]:
    """What each batch becomes, all of them going through the module again and again, in lanes."""
    lanes: Lanes[object] = Lanes(lambda need: None, lambda need: None, lambda need: 0)
    found: dict[int, torch.Tensor] = {}
    times = 2 + ENOUGH // sum(batch.numel() for batch in batches)

    def work(number: int) -> None:
        with torch.inference_mode(inference):
            for _ in range(times):
                found[number] = module(batches[number])

    with gathered([module], lanes, trials or Trials()):
        lanes.run(work, range(len(batches)), len(batches), lambda: lambda: None)
    assert "forward" not in vars(module)
    return [found[number] for number in range(len(batches))]


def batches(counts: Sequence[int], dtype: torch.dtype = torch.float32, width: int = WIDTH) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, 1, width, generator=generator).to(dtype) for count in counts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", [(1, 1, 1), (2, 2), (8, 8, 8, 3), (5, 64), (65, 3)], ids=str)
@pytest.mark.parametrize("kind", [torch.nn.Linear, Conv1D])
def test_each_gets_the_bits_that_it_gets_alone(
    kind: type[torch.nn.Module], counts: Sequence[int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    module = kind(WIDTH, WIDTH).to(dtype)
    given = batches(counts, dtype)
    with torch.inference_mode():
        alone = [module(batch) for batch in given]
    for made, wanted in zip(through(module, given), alone, strict=True):
        assert torch.equal(made, wanted)
        assert made.shape == wanted.shape
        assert made.untyped_storage().nbytes() == wanted.untyped_storage().nbytes()


def test_what_was_equal_often_enough_is_left_to_one_product(multiplied: list[int]) -> None:
    module = torch.nn.Linear(WIDTH, WIDTH)
    through(module, batches((8, 8, 8)))
    assert multiplied[:4] == [8, 8, 8, 24]
    if multiplied[4] == 8:  # equal so far
        assert multiplied[-1] == 24
    else:
        pytest.skip("this machine adds up eight rows in another order than twenty-four")


def test_what_differs_once_is_never_left_to_one_product(multiplied: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """By more than bits: whatever is computed, a third of the rows more, in another way."""
    counting = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda rows, *weights: counting(rows, *weights) + (rows.shape[0] > 8)
    )
    module, given = torch.nn.Linear(WIDTH, WIDTH), batches((8, 8, 8))
    with torch.inference_mode():
        alone = [module(batch) for batch in given]
    multiplied.clear()
    assert all(map(torch.equal, through(module, given), alone))
    assert multiplied.count(24) == 1


def test_a_product_that_would_be_large_is_cut(multiplied: list[int]) -> None:
    width = OUTPUT // 4 // 16
    through(torch.nn.Linear(8, width), batches((8, 8, 8), width=8))
    assert max(multiplied) == 16


def test_what_learns_or_is_in_another_type_goes_alone(multiplied: list[int]) -> None:
    module = torch.nn.Linear(WIDTH, WIDTH)
    through(module, batches((8, 8)), inference=False)
    lanes: Lanes[object] = Lanes(lambda need: None, lambda need: None, lambda need: 0)
    with gathered([module], lanes, Trials()), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        module(batches((8,))[0])
    assert set(multiplied) == {8}


def test_an_error_is_that_of_the_batch_alone_and_the_others_go_on() -> None:
    module, given = torch.nn.Linear(WIDTH, WIDTH), [*batches((8, 8)), *batches((8,), width=WIDTH + 1)]
    lanes: Lanes[object] = Lanes(lambda need: None, lambda need: None, lambda need: 0)
    found: dict[int, object] = {}

    def work(number: int) -> None:
        with torch.inference_mode():
            try:
                found[number] = module(given[number])
            except RuntimeError as error:
                found[number] = str(error)

    with gathered([module], lanes, Trials()):
        lanes.run(work, range(3), 3, lambda: lambda: None)
    assert "shapes cannot be multiplied" in str(found[2])
    with torch.inference_mode():
        assert all(torch.equal(found[number], module(given[number])) for number in range(2))


def test_what_proves_nothing_or_lies_otherwise_is_no_proof(multiplied: list[int]) -> None:
    """Sums of zeros are equal in any order, and a matrix is multiplied in another way by rows with other strides."""
    module, given = torch.nn.Linear(WIDTH, WIDTH), batches((8, 8, 8))
    for batch in given:
        batch[..., 3:] = 0
    through(module, given)
    assert multiplied[-2] == 8, "each alone to the end, whether or not all are tried at once too"
    trials, wide = Trials(), torch.randn(3, 8, 7, WIDTH, generator=torch.Generator().manual_seed(0))
    through(module, [each[:, -1] for each in wide], trials=trials)
    other = [each[:, -1:] for each in wide]
    with torch.inference_mode():
        alone = [module(batch) for batch in other]
    assert all(map(torch.equal, through(module, other, trials=trials), alone))


def test_a_single_row_without_a_batch_goes_alone() -> None:
    module, given = torch.nn.Linear(WIDTH, WIDTH), [batch[0, 0] for batch in batches((1, 1))]
    assert [made.shape for made in through(module, given)] == [(WIDTH,)] * 2
