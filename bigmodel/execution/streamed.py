"""What a model of transformers is told of itself where its weights are streamed: they are read when a layer computes,
so that nothing which goes through all of its parameters can do what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.errors import UsageError

if TYPE_CHECKING:
    import torch

CASTS = ("half", "bfloat16", "float", "double")


def as_streamed(model: torch.nn.Module, device: torch.device, source: Path) -> None:
    """Let `model.device` be where its inputs belong; transformers takes its first parameter's, which may be away. What
    would save, cast, move or copy its weights raises UsageError. source: the checkpoint that they are read from."""
    own = type(model)
    if not isinstance(getattr(own, "device", None), property):
        return
    load = f'bigpipe.load("{source}", DEVICE_MAP'
    casts = {
        name: _refusal("are not here to be cast", f"load it in that dtype: {load}, dtype=DTYPE)") for name in CASTS
    }
    save = f'save what it was loaded from: bigpipe.save_checkpoint("{source}", OUT)'
    cast, move = casts["half"], _refusal("are not here to be moved", f"load it there: {load})")

    def to(self: Any, *arguments: Any, **named: Any) -> Any:
        """Nothing, where the model is there."""
        import torch

        parsed: Any = torch._C._nn._parse_to(*arguments, **named)
        there, dtype = parsed[:2]
        if dtype is not None:
            return cast(self)
        here = there is None or (there.type == device.type and there.index in (None, device.index))
        return self if here else move(self)

    names = {
        "__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__, "to": to,
        "device": property(lambda self: device), "save_pretrained": _refusal("are not here to be saved", save),
        "__deepcopy__": _refusal("are not here to be copied", f"load it a second time: {load})"),
    }  # fmt: skip
    model.__class__ = type(own.__name__, (own,), {**casts, **names})


def _refusal(what: str, cure: str) -> Callable[..., Any]:
    def refuse(self: Any, *arguments: Any, **named: Any) -> Any:
        raise UsageError(f"the weights of this {type(self).__name__} are streamed, and {what}", cure)

    return refuse
