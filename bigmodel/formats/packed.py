"""Packed weights of a checkpoint, told apart from its other tensors, and put into a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from bigpipe.errors import InvalidCheckpoint, UsageError

from .format import Format, Packing
from .registry import BUILT_IN, named

if TYPE_CHECKING:
    import torch

    from bigpipe.bigmodel.checkpoint import TensorInfo

T = TypeVar("T")
FLAGS = {"Linear8bitLt": "is_loaded_in_8bit", "Linear4bit": "is_loaded_in_4bit"}
"""Class of bitsandbytes → what transformers says of a model that has it, by which peft chooses its own module."""


@dataclass(frozen=True, slots=True)
class PackedWeight(Generic[T]):
    packing: Packing
    parts: Mapping[str, T]
    """By suffix: what follows the module's name and a dot; `weight` has the codes."""


def set_apart(tensors: Mapping[str, T], format: Format) -> tuple[dict[str, T], dict[str, PackedWeight[T]]]:
    """Return (other tensors by name, packed weights by module), told by stored names.

    format: of the checkpoint; bitsandbytes' own are always looked for.
    """
    plain = dict(tensors)
    packed: dict[str, PackedWeight[T]] = {}
    for packing in dict.fromkeys(known.packing for known in (*map(named, BUILT_IN), format) if known.packing):
        mark = f".{packing.suffixes[-1]}"
        for module in sorted(name.removesuffix(mark) for name in tensors if name.endswith(mark)):
            names = {suffix: f"{module}.{suffix}" for suffix in packing.suffixes}
            parts = {suffix: plain.pop(name) for suffix, name in names.items() if name in plain}
            packed[module] = PackedWeight(packing, parts)
    return plain, packed


def uncomputed(stored: str, parameter: str, class_name: str) -> UsageError:
    """Return the error for a packed weight that is a part of a parameter: experts, which older classes held one by
    one. stored: the name of its module."""
    cause = f"{stored} is packed by itself, and {class_name} holds it in one tensor with others, {parameter}"
    return UsageError(f"{cause}: nothing here computes with that", "start from the weights before they were quantized")


def replace_linears(
    model: torch.nn.Module,
    packed: Mapping[str, PackedWeight[TensorInfo]],
    config: Mapping[str, Any] | None,
    read: Callable[[TensorInfo], bytes],
) -> None:
    """Put an empty module of its format wherever `packed` names one, and let the model say so, as `from_pretrained`
    does: what saves or adapts it asks there. config: `quantization_config`; read: gives the bytes of a small tensor.

    Raise InvalidCheckpoint for a module that the model does not have, and as `Packing.refuse_misstated`; UsageError for
    one that is a part of a parameter.
    """
    modules, whole = dict(model.named_modules()), {name for name, _ in model.named_parameters()}
    replaced: set[torch.nn.Module] = set()
    for name, weight in packed.items():
        if name in whole:
            file = _file(weight.parts.values())
            raise uncomputed(f"{file}: a quantized weight", name, type(model).__name__)
        if name not in modules:
            raise InvalidCheckpoint(
                f"{_file(weight.parts.values())} holds a quantized weight for {name}, which the model does not have",
                "check that config.json is the one that was saved with these weights",
            )
        weight.packing.refuse_misstated(modules[name], weight.parts, read)
        shapes = {suffix: part.shape for suffix, part in weight.parts.items()}
        made = weight.packing.module(modules[name], shapes, config or {})
        model.set_submodule(name, made)
        replaced.add(made)
        if (flag := FLAGS.get(type(made).__name__)) is not None:
            setattr(model, flag, True)
    _call_children(model, replaced)
    if packed and config:
        _tell(model, config)


def _call_children(model: torch.nn.Module, packed: Set[torch.nn.Module]) -> None:
    """Let torch's encoders call those of their children that are packed: where nothing speaks against it, they take the
    numbers of their weights and multiply by these themselves."""
    from torch.nn import TransformerEncoder, TransformerEncoderLayer

    for module in model.modules():
        if not isinstance(module, TransformerEncoder | TransformerEncoderLayer) or packed.isdisjoint(module.modules()):
            continue
        if isinstance(module, TransformerEncoder):
            module.use_nested_tensor = False
        else:
            module.activation_relu_or_gelu = 0


def _tell(model: Any, config: Mapping[str, Any]) -> None:
    """A class of the user's own has no config of transformers that could say it: there it is the model's own word."""
    if hasattr(getattr(model, "config", None), "save_pretrained"):
        model.config.quantization_config = _of_transformers(config)
    else:
        model._bigpipe_quantization = dict(config)


def _of_transformers(config: Mapping[str, Any]) -> Any:
    """As transformers holds it, which names dtypes without `torch.`. What it does not know, a format of others, is a
    bare one that says the same."""
    from transformers.quantizers.auto import AutoQuantizationConfig
    from transformers.utils.quantization_config import QuantizationConfigMixin

    config = {name: value.removeprefix("torch.") if isinstance(value, str) else value for name, value in config.items()}
    try:
        return AutoQuantizationConfig.from_dict(config)
    except (ValueError, TypeError):
        bare = QuantizationConfigMixin(quant_method=config.get("quant_method"))
        vars(bare).update(config)
        return bare


def _file(parts: Iterable[TensorInfo]) -> str:
    return str(next(iter(parts)).file)
