"""What a placed model computes in, and what casting to it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bigpipe.bigmodel.architecture import Architecture
from bigpipe.errors import UsageError

from .devices import is_computing
from .placement import Placement, PlacementRequest
from .products import HALVES, Products, computing_dtype
from .tree import Tree


@dataclass(frozen=True, slots=True)
class Chosen:
    """What to compute in."""

    dtype: str
    why: str = ""
    """Nothing where there was no choice."""
    measured: tuple[str, ...] = ()
    """Sentences on the measurements that it stands on."""


def choose_dtype(
    request: PlacementRequest, placement: Placement, dtype: str, plain: bool, products: Callable[[], Products | None]
) -> Chosen:
    """Return what to compute in.

    dtype: of what is loaded. plain: is nothing packed? products: measures the machine. Raise UsageError where another
    dtype was asked for and weights cannot be cast to it at each use.
    """
    main, asked = placement.main, request.compute_dtype
    free = main == "cpu" and plain and request.dtype is None
    if asked != "auto":
        wanted = dtype if asked == "stored" else asked
        if wanted != dtype and not free:
            raise UsageError(
                f"compute_dtype {wanted} is not what {dtype} weights compute in here",
                "set `dtype` alone: weights are cast at each use where a CPU computes with plain ones, as stored",
                field="compute_dtype",
            )
        return Chosen(wanted, "as asked" if wanted != dtype else "")
    streams = any(not is_computing(home, main) for home in placement.weights)
    measured = products() if free and streams and dtype in HALVES else None
    if measured is None:
        return Chosen(dtype)
    rows = request.batch_size
    return Chosen(*computing_dtype(dtype, rows, measured), (measured.describe(dtype, rows),))


def cast_ring(architecture: Architecture, request: PlacementRequest, computed: str) -> int:
    """Return the bytes of the two largest layers that are cast: one computes while the next one is made."""
    tree = Tree(architecture, no_split=request.no_split_module_classes, dtype=computed)
    return 2 * max((tree.union_size([layer]) for layer in tree.layers([""]) if not tree.is_table(layer)), default=0)
