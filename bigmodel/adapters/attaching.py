"""An adapter beside a loaded model: each pair of matrices adds its product to what its module gives, as in peft.

Nothing of the model is replaced: weights may be streamed, packed, or on any device. What an adapter does otherwise than
by pairs (whole modules, rows of embeddings, biases, DoRA) is put into the weights as they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.architecture import Architecture
from bigpipe.bigmodel.checkpoint import Adapter, AdapterDescription, ModelDescription, open_checkpoint
from bigpipe.bigmodel.formats import decoded
from bigpipe.errors import UsageError

from .arithmetic import Added, Dora, LowRank, as_tensor
from .changes import Bound, bind

if TYPE_CHECKING:
    import torch

WIDE = {"float64": "float64"}
"""Dtype of the model → what the matrices are held in, where that is not float32: peft's `autocast_adapter_dtype`."""
PACKED = ("Linear8bitLt", "Linear4bit")
"""Classes of bitsandbytes, for which peft rounds a product before it adds it."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """What becomes of an adapter where the model is loaded."""

    beside: tuple[Bound, ...]
    """Pairs, and the biases of their B: held in float32 where the module computes."""
    within: tuple[Bound, ...]
    """Put into the weights as they are read."""

    @property
    def nbytes(self) -> dict[str, int]:
        """Return the bytes held beside each weight, by the model's name of it."""
        found: dict[str, int] = {}
        for bound in self.beside:
            found[bound.target] = found.get(bound.target, 0) + _held(bound)
        return found


def _held(bound: Bound) -> int:
    change = bound.change
    if not isinstance(change, LowRank):
        return 0  # a bias of B: as many numbers as there are outputs
    return sum(4 * pair.rank * (change.rows + change.columns) for pair in change.pairs)


def attachment(
    adapter: AdapterDescription, described: ModelDescription, architecture: Architecture, memo: Path | None = None
) -> Attachment:
    """Return what becomes of an adapter beside a model. Raise as `bind`, and UsageError for what would have to be put
    into a weight that is packed."""
    bounds, tensors = bind(adapter, described, architecture, memo), decoded(described).tensors or {}
    paired = {bound.target.rpartition(".")[0] for bound in bounds if isinstance(bound.change, LowRank)}

    def stands_beside(bound: Bound) -> bool:
        of_pair = isinstance(bound.change, Added) and bound.target.rpartition(".")[0] in paired
        return isinstance(bound.change, LowRank) or of_pair

    within = tuple(bound for bound in bounds if not stands_beside(bound))
    for bound in within:
        dtype, _ = tensors.get(bound.stored, ("", ()))
        if "float" not in dtype:
            kind = "use_dora" if isinstance(bound.change, Dora) else "a trained weight"
            cause = f"{adapter.where}: {kind} of {bound.target}, whose weight is quantized in this model"
            raise UsageError(cause, "run it on the model before it was quantized, or merge it there and quantize then")
    return Attachment(tuple(bound for bound in bounds if stands_beside(bound)), within)


def attach(
    model: torch.nn.Module, found: Attachment, adapter: Adapter, dtype: str, device_of: Callable[[str], torch.device]
) -> Mapping[torch.device, int]:
    """Let each pair of an adapter add to what its module gives. dtype: what the model computes in. device_of: where a
    module computes. Return the bytes held, by device."""
    import torch

    held: dict[torch.device, int] = {}
    modules, wide = dict(model.named_modules()), getattr(torch, WIDE.get(dtype, "float32"))
    biases = {each.target.rpartition(".")[0]: each for each in found.beside if isinstance(each.change, Added)}
    stored = open_checkpoint(adapter.file)

    def read(name: str) -> torch.Tensor:
        tensor = adapter.tensors[name]
        return as_tensor(memoryview(stored.read(name)), tensor.dtype, tensor.shape).to(wide)

    for bound in (each for each in found.beside if isinstance(each.change, LowRank)):
        name = bound.target.rpartition(".")[0]
        device, module = device_of(name), modules[name]
        extra = [part for _, part in biases[name].parts] if name in biases else []
        matrices = [read(part).to(device) for part in (*(part for _, part in bound.parts), *extra)]
        held[device] = held.get(device, 0) + sum(matrix.nbytes for matrix in matrices)
        module.register_forward_hook(_product(module, bound.change, matrices))
    return held


def read_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Return all tensors of an adapter as they are stored, under their names in the file."""
    stored = open_checkpoint(adapter.file)
    return {
        name: as_tensor(memoryview(stored.read(name)), tensor.dtype, tensor.shape)
        for name, tensor in adapter.tensors.items()
    }


def _product(module: torch.nn.Module, change: Any, matrices: Sequence[torch.Tensor]) -> Callable[..., torch.Tensor]:
    """What is called after the module's forward. The operations are those of peft's `lora.Linear`, `lora.Embedding`
    and its layers for bitsandbytes, in their order."""
    import torch

    a, b, *more = matrices
    bias, scaling = (more[0] if more else None), change.pairs[0].scaling
    packed = type(module).__name__ in PACKED

    def after(module: torch.nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        if change.rounded:
            rows = inputs[0].to(a.device)  # they were looked up where the table lies
            added = (torch.nn.functional.embedding(rows, a.T) @ b.T) * scaling
            scale = getattr(module, "embed_scale", None)
            added = added if scale is None else added * torch.as_tensor(scale).to(added)
        else:
            made = torch.nn.functional.linear(inputs[0].to(a.dtype), a)
            added = torch.nn.functional.linear(made, b, bias) * scaling
        summed: torch.Tensor = output + added.to(output.dtype) if packed else (output + added).to(output.dtype)
        return summed

    return after
