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
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.placement import gathers

from .lanes import Lanes

if TYPE_CHECKING:
    import torch

OUTPUT = 8 * 2**20
"""Bytes that one product makes at the most, which then lie there twice."""
ENOUGH = 2**18
"""Numbers that were equal. Sums in another order, rounded to bfloat16, differ in one of some ten thousand."""
TERMS = 64
"""Numbers of a row that are not 0, from which on its sums show their order; of a short row half of them."""
TRIALS = 64
"""Kinds of products of one matrix's shape that are tried at the most: rows may come in a new number each time."""
LINE = 64
"""Bytes of a line of the cache: alignment within it may decide how a matrix is read."""


@dataclass(slots=True, eq=False)
class Given:
    """The rows of a lane, and what it gets for them."""

    rows: torch.Tensor
    made: Any = None
    part: Sequence[Given] = ()
    """With whose rows these are multiplied; nothing where they go alone."""

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
        self._lanes.meet(self, self._divide)
        if given.made is None and given.part:
            with suppress(Exception):  # whoever it concerns hears of it alone
                self._multiply(given.part)
        made: torch.Tensor = self._alone(given.rows) if given.made is None else given.made
        return made

    def _worth(self, rows: torch.Tensor) -> bool:
        """Few rows of a lane, on the CPU, of which nothing is learnt."""
        import torch

        weight = self._weight
        return (
            self._lanes.among_others
            and rows.device.type == "cpu" == weight.device.type
            and rows.dtype == weight.dtype
            and rows.dim() > 1
            and min(weight.shape) > 0
            and gathers(prod(rows.shape[:-1]))
            and torch.is_inference_mode_enabled()
            and not torch.is_autocast_enabled("cpu")
        )

    def _divide(self) -> None:
        """Let those that make no more than `OUTPUT` together be multiplied at once, when the first of them goes on: by
        then those before them have used what they got."""
        given, self._given = self._given, []
        width = self._weight.nbytes // given[0].rows.shape[-1]
        part: list[Given] = []
        for each in given:
            if part and (sum(other.count for other in part) + each.count) * width > OUTPUT:
                part = []
            part.append(each)
            each.part = part

    def _multiply(self, part: Sequence[Given]) -> None:
        import torch

        for each in part:
            each.part = ()
        trial = self._trial(part) if len(part) > 1 else None
        if trial is None or trial.refuted:
            return
        proven = trial.equal >= ENOUGH
        alone = [None if proven else self._alone(each.rows) for each in part]
        rows = torch.cat([each.rows.flatten(end_dim=-2) for each in part])
        made = self._alone(rows)
        for each, wanted, found in zip(part, alone, torch.split(made, [each.count for each in part]), strict=True):
            if wanted is None:
                each.made = found.reshape(*each.rows.shape[:-1], -1).clone()  # in memory of its own, as it is alone
            else:
                each.made = wanted
                trial.refuted |= not torch.equal(found, wanted.flatten(end_dim=-2))
        if not proven:
            trial.equal += min(int(made.count_nonzero()), _telling(rows) * made.shape[-1])

    def _trial(self, part: Sequence[Given]) -> Trial | None:
        import torch

        weight = self._weight
        matrix = (type(self.module), tuple(weight.shape), weight.dtype, self.module.bias is None)
        state = (weight.requires_grad, weight.stride(), weight.data_ptr() % LINE, torch.get_num_threads())
        rows = tuple((each.rows.shape, each.rows.stride(), each.rows.data_ptr() % LINE) for each in part)
        return self._trials.of(matrix, (state, rows))


def _telling(rows: torch.Tensor) -> int:
    """How many of the rows tell by their products in which order these are added: not those of zeros but for a few."""
    return int((rows.count_nonzero(dim=-1) >= min(TERMS, rows.shape[-1] / 2)).sum())


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
            if vars(product.module).get("forward") is product:
                del product.module.forward


def _multiplies_rows(module: torch.nn.Module) -> bool:
    """Is this its class's own forward, and nothing of it for more than one row?"""
    import torch
    from transformers.pytorch_utils import Conv1D

    return type(module) in (torch.nn.Linear, Conv1D) and "forward" not in vars(module)
