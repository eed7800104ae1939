"""Products that lanes compute at once: the rows of all that come to the same matrix are multiplied by it together.

Eight rows take a CPU hardly less time than sixty-four: it waits for the matrix, which comes from RAM for each product.

    lane 1   8 rows ┐
    lane 2   8 rows ┼ 24 rows × matrix ┬ 8 rows   lane 1 goes on
    lane 3   8 rows ┘                  ├ 8 rows   lane 2 goes on
                                       └ 8 rows   lane 3 goes on

Each lane must get the bits that it gets alone. Libraries choose the order in which they add by the number of rows, by
types and by alignment, not by the numbers. So whatever they have not been seen to do is done both ways: what lanes get
is what they get alone, and only after enough numbers were equal, without exception, are such products left to one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.placement import GATHERED

from .lanes import Lanes

if TYPE_CHECKING:
    import torch

OUTPUT = 8 * 2**20
"""Bytes that one product makes at the most; it is there beside what each lane takes of it."""
ENOUGH = 2**18
"""Numbers that were equal. Sums in another order, rounded to bfloat16, differ in one of some ten thousand."""
TRIALS = 64
"""Kinds of products of one matrix's shape that are tried at the most: rows may come in a new number each time."""
LINE = 64
"""Bytes of a line of the cache: alignment within it may decide how a matrix is read."""


@dataclass(slots=True)
class Given:
    """The rows of a lane, and what it gets for them."""

    rows: torch.Tensor
    made: Any = None

    @property
    def count(self) -> int:
        return prod(self.rows.shape[:-1])


@dataclass(slots=True)
class Trial:
    """What is known of one kind of product."""

    equal: int = 0
    """Numbers that were the same both ways."""
    refuted: bool = False


@dataclass(slots=True)
class Trials:
    """Of all kinds of products, by the matrix's shape and type, and then by how many rows come from whom."""

    found: dict[Any, dict[Any, Trial]] = field(default_factory=lambda: defaultdict(dict))

    def of(self, matrix: Any, rows: Any) -> Trial | None:
        """Return None where too many were tried."""
        known = self.found[matrix]
        if rows not in known and len(known) >= TRIALS:
            return None
        return known.setdefault(rows, Trial())


class Product:
    """The forward of one module, which multiplies each row by a matrix, as lanes call it."""

    def __init__(self, module: torch.nn.Module, lanes: Lanes[Any], trials: Trials) -> None:
        self.module = module
        self._alone: Callable[..., torch.Tensor] = module.forward
        self._lanes = lanes
        self._trials = trials
        self._given: list[Given] = []

    @property
    def _weight(self) -> torch.Tensor:
        """What stands there now."""
        weight: torch.Tensor = getattr(self.module, "weight")  # noqa: B009 torch types it as a module too
        return weight

    def __call__(self, *arguments: Any, **named: Any) -> torch.Tensor:
        if named or len(arguments) != 1 or not self._worth(arguments[0]):
            return self._alone(*arguments, **named)
        given = Given(arguments[0])
        self._given.append(given)
        self._lanes.meet(self, self._compute)
        made: torch.Tensor = given.made
        return made

    def _worth(self, rows: torch.Tensor) -> bool:
        """Few rows, on the CPU, of which nothing is learnt."""
        import torch

        weight = self._weight
        return (
            rows.device.type == "cpu" == weight.device.type
            and rows.dtype == weight.dtype
            and 0 < prod(rows.shape[:-1]) <= GATHERED
            and torch.is_inference_mode_enabled()
            and not torch.is_autocast_enabled("cpu")
        )

    def _compute(self) -> None:
        import torch

        given, self._given = self._given, []
        with torch.inference_mode():  # whichever lane it is that computes
            for part in self._parts(given):
                self._multiply(part)

    def _parts(self, given: Sequence[Given]) -> Iterator[list[Given]]:
        """Return those that are multiplied at once; they make no more than `OUTPUT` together."""
        width = self._weight.nbytes // given[0].rows.shape[-1]
        part: list[Given] = []
        for each in given:
            if part and (sum(other.count for other in part) + each.count) * width > OUTPUT:
                yield part
                part = []
            part.append(each)
        yield part

    def _multiply(self, given: Sequence[Given]) -> None:
        import torch

        trial = self._trial(given) if len(given) > 1 else None
        proven = trial is not None and trial.equal >= ENOUGH and not trial.refuted
        if not proven:
            for each in given:
                each.made = self._alone(each.rows)
        if trial is None or trial.refuted:
            return
        rows = torch.cat([each.rows.flatten(end_dim=-2) for each in given])
        parts = torch.split(self._alone(rows), [each.count for each in given])
        for each, made in zip(given, parts, strict=True):
            if proven:
                each.made = made.reshape(*each.rows.shape[:-1], -1).clone()  # in memory of its own, as it is alone
            elif torch.equal(made, each.made.flatten(end_dim=-2)):
                trial.equal += int(made.count_nonzero())
            else:
                trial.refuted = True

    def _trial(self, given: Sequence[Given]) -> Trial | None:
        import torch

        weight, first = self._weight, given[0].rows
        matrix = (type(self.module), tuple(weight.shape), weight.dtype, self.module.bias is None)
        rows = tuple((each.count, each.rows.is_contiguous(), each.rows.data_ptr() % LINE) for each in given)
        return self._trials.of(matrix, (rows, first.dtype, weight.data_ptr() % LINE, torch.get_num_threads()))


@contextmanager
def gathered(modules: Iterable[torch.nn.Module], lanes: Lanes[Any], trials: Trials) -> Iterator[None]:
    """Inside, those of these modules that multiply each row by a matrix do so for all lanes that meet there at once."""
    products = [Product(module, lanes, trials) for module in modules if _multiplies_rows(module)]
    for product in products:
        product.module.forward = product
    try:
        yield
    finally:
        for product in products:
            del product.module.forward


def _multiplies_rows(module: torch.nn.Module) -> bool:
    """Is this its class's own forward, and nothing of it for more than one row?"""
    import torch
    from transformers.pytorch_utils import Conv1D

    return type(module) in (torch.nn.Linear, Conv1D) and "forward" not in vars(module)
