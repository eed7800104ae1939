"""What stands in the place of a weight while it is away: it tells of the weight, and has no numbers.

A tensor on meta alone will not do: of products with one, some of torch's on a CPU give memory that nobody has written.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.checkpoint import dtype_name
from bigpipe.errors import UsageError

from .slots import Slot

if TYPE_CHECKING:
    import torch

    from .homes import Homes

TELLING = frozenset({
    "shape", "size", "numel", "nelement", "dim", "ndim", "ndimension", "stride", "storage_offset", "layout", "__len__",
    "dtype", "itemsize", "element_size", "nbytes", "is_floating_point", "is_complex", "is_signed", "is_contiguous",
    "is_meta", "is_sparse", "is_quantized", "is_nested", "is_leaf", "is_inference", "requires_grad", "requires_grad_",
    "grad", "grad_fn", "retains_grad", "untyped_storage",
})  # fmt: skip
"""Attributes and methods of a tensor that tell nothing of its numbers."""


def stand_in(streamed: Mapping[str, Slot], homes: Homes) -> None:
    """Put what tells of them in the places of weights that are streamed, by name; those that are tied share one."""
    made: dict[tuple[int, torch.device], torch.Tensor] = {}
    for name, slot in streamed.items():
        device, empty = homes.execution(name), slot.placeholder
        if (id(empty), device) not in made:
            made[id(empty), device] = _away()(empty, name, device, _what_keeps(name, slot, device, homes))
        slot.placeholder = made[id(empty), device]
        slot.detach()


def _what_keeps(name: str, slot: Slot, device: torch.device, homes: Homes) -> str:
    """Return what keeps the weight in the memory that computes. One that lies in RAM and computes there is only cast
    anew at each use, for want of room."""
    if device.type == "cpu" and homes.home(name) == "cpu":
        return f"special_dtypes: {{{name}: {dtype_name(slot.dtype)}}}"
    home = "cpu" if device.type == "cpu" else (device.index or 0) - homes.first_gpu
    return f"device_map: {{{name.rpartition('.')[0] or name}: {home}}}"


@cache
def _away() -> Any:
    """The class, which needs torch."""
    import torch

    class Away(torch.Tensor):
        """A parameter or buffer that is elsewhere. Whatever needs its numbers raises UsageError."""

        full_name: str
        computing: torch.device
        """Where it computes."""
        cure: str

        @staticmethod
        def __new__(cls: Any, empty: torch.Tensor, full_name: str, computing: torch.device, cure: str) -> Any:
            made = torch.Tensor._make_subclass(cls, empty.detach(), empty.requires_grad)
            made._is_param = isinstance(empty, torch.nn.Parameter)  # so torch knows parameters of other classes
            made.full_name, made.computing, made.cure = full_name, computing, cure
            return made

        def __repr__(self, **named: Any) -> str:  # type: ignore[override]
            return f"{self.full_name}, streamed: {list(self.shape)} {self.dtype}"

        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = getattr(function, "__name__", "")
            if name in ("__get__", "__set__"):
                name = getattr(function.__self__, "__name__", "")
            if name == "device":
                return args[0].computing
            if name in TELLING:
                with torch._C.DisableTorchFunctionSubclass():
                    return function(*args, **(kwargs or {}))
            raise _refusal(next(leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if type(leaf) is cls))

    return Away


def _refusal(away: Any) -> UsageError:
    cause = f"{away.full_name} is streamed, and is here while its module, or the block around it, computes"
    others = "name the class of the block that reads it in no_split_module_classes, or call its module"
    return UsageError(cause, f"keep it in memory: {away.cure}; or {others}")
