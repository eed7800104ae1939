"""Saves a checkpoint that lies on disk, or in memory as accelerate's `save_model` does."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.architecture import BUFFERS, COMPILED, require_module
from bigpipe.bigmodel.checkpoint import (
    ARCHITECTURE_FILE,
    CASTABLE,
    CHUNK,
    Checkpoint,
    FileFormat,
    ModelDescription,
    Tensors,
    beyond,
    dtype_name,
    find_aliases,
    open_checkpoint,
    overflows,
    reaches,
)
from bigpipe.bigmodel.formats import PLAIN, castable, rounded_weights, set_apart
from bigpipe.errors import InvalidCheckpoint, UsageError, first_few
from bigpipe.files import hash_file, write_file
from bigpipe.names import checked
from bigpipe.sizes import size_of

from .conversion import Conversion, convert, encode_config, refuse_in_place
from .plans import PlannedTensor
from .writer import Files, ReportProgress, SavedCheckpoint, Traffic, write_checkpoint

if TYPE_CHECKING:
    import torch


@checked()
def save_checkpoint(
    source: str | Path | Checkpoint | torch.nn.Module | Mapping[str, Any],
    out: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    dtype: str | torch.dtype | None = None,
    format: FileFormat = "safetensors",
    progress: ReportProgress | None = None,
) -> SavedCheckpoint:
    """Write a checkpoint, resharded, converted or cast, into the directory `out`.

    source: a checkpoint on disk, which goes there with its config, tokenizer and other files (streamed in constant
    memory, without torch), or a torch module (of transformers: its config too) or a state dict. Of names that share
    storage one is stored in safetensors, all in `.bin`. Raise InvalidCheckpoint, DoesNotFit, and UsageError, for
    tensors without data, a model with an adapter beside its weights, and a dtype for quantized weights too.
    """
    size, wanted = size_of("max_shard_size", max_shard_size), None if dtype is None else dtype_name(dtype)
    conversion = Conversion(max_shard_size=size, dtype=wanted, format=format)
    if not isinstance(source, str | Path | Checkpoint):
        return _save_module(source, Path(out), conversion, progress)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    return convert(checkpoint, Path(out), conversion, progress=progress)


def _save_module(
    source: torch.nn.Module | Mapping[str, Any], out: Path, conversion: Conversion, progress: ReportProgress | None
) -> SavedCheckpoint:
    """Tensors are copied one at a time, and only if they are not contiguous, not on the CPU, or cast."""
    if not isinstance(source, Mapping):
        source = require_module(source)
    _refuse_adapter(source)
    _refuse_rounded(source)
    if (origin := getattr(source, "_bigpipe_source", None)) is not None:
        with suppress(InvalidCheckpoint):  # what it was loaded from may be gone, or another by now
            refuse_in_place(open_checkpoint(origin), out)
    state, ties = (source, None) if isinstance(source, Mapping) else (_state(source), _ties(source))
    tensors, tied = _unique(state, ties if conversion.format == "safetensors" else None)
    described = {name: (dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    if conversion.dtype is not None:
        castable(ModelDescription(config=None, tensors=described), conversion.dtype)
    plans = conversion.plans(described, tied)
    stored = conversion.dtype if conversion.dtype in CASTABLE else _dtype(described)
    return write_checkpoint(
        out,
        plans,
        lambda planned: _pieces(tensors[planned.name], planned),
        traffic=Traffic(progress),
        beside=partial(_save_config, source, stored, out),
    )


def _dtype(tensors: Tensors) -> str | None:
    """The dtype of most numbers that are not packed."""
    sizes: Counter[str] = Counter()
    for dtype, shape in set_apart(tensors, PLAIN)[0].values():
        sizes[dtype] += math.prod(shape) if dtype in CASTABLE else 0
    return max(+sizes, key=lambda dtype: sizes[dtype], default=None)


def _refuse_adapter(source: torch.nn.Module | Mapping[str, Any]) -> None:
    """Raise UsageError for a model of which an adapter would be lost, or stored among its weights."""
    if (beside := getattr(source, "_bigpipe_adapter", None)) is not None:
        cause = f"the adapter {beside} stands beside this model's weights, and is in none of them"
        raise UsageError(cause, "merge_adapter(MODEL, ADAPTER, OUT) writes both as one")
    modules = () if isinstance(source, Mapping) else source.modules()
    if any(type(module).__module__.partition(".")[0] == "peft" for module in modules):
        cause = (
            f"{type(source).__name__} holds an adapter of peft, and no loader of models takes the names of its weights"
        )
        raise UsageError(cause, "save the adapter by its save_pretrained; merge_adapter(MODEL, ADAPTER, OUT) makes one")


def _refuse_rounded(source: torch.nn.Module | Mapping[str, Any]) -> None:
    """Raise UsageError for a model whose scales are no longer those of its checkpoint, and for which nothing tells."""
    if not isinstance(source, Mapping) and (rounded := rounded_weights(source)):
        cause = f"bitsandbytes rounded the scales of {first_few(rounded)} when they computed on this CPU"
        cure = "save the model before its first forward, or load it with bigpipe.load, which keeps what was stored"
        raise UsageError(cause, cure)


def _state(model: torch.nn.Module) -> dict[str, Any]:
    """Its tensors, named as if no part of it were compiled."""
    return {name.replace(f"{COMPILED}.", ""): tensor for name, tensor in model.state_dict().items()}


def _ties(model: torch.nn.Module) -> frozenset[str] | None:
    """The names that a class of transformers ties when it loads. None where no class tells: what shares its storage."""
    found = vars(model).get("all_tied_weights_keys")
    return frozenset((*found, *found.values())) if isinstance(found, Mapping) else None


def _unique(
    state: Mapping[str, Any], ties: Collection[str] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors that are stored, and alias → stored name. ties: the names that may be aliases; None: all."""
    import torch

    places: dict[str, tuple[Any, ...] | None] = {}
    for name, tensor in state.items():
        if isinstance(tensor, str):
            continue  # bitsandbytes keeps the name of a layout among its weights; the Hub's own writer skips it too
        if not isinstance(tensor, torch.Tensor) or not _holds_data(tensor):
            cure = (
                "load the model completely, with nothing offloaded or sharded, before saving it; unpack what a library"
            )
            cure += " keeps in tensors of its own"
            raise UsageError(f"{name!r} has no data here, or is not a dense tensor", cure)
        seen = (tensor.is_conj(), tensor.is_neg())
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), seen)
        places[name] = place if tensor.numel() else None
    tied = find_aliases(places)
    tied = {alias: kept for alias, kept in tied.items() if ties is None or (alias in ties and kept in ties)}
    return {name: state[name] for name in places if name not in tied}, tied


def _holds_data(tensor: torch.Tensor) -> bool:
    """Does a tensor hold its own numbers? One that only wraps others, as those of quantization libraries and
    of sharded models do, has no memory of its own: what it stands for is known to its class alone."""
    import torch

    if tensor.is_meta or tensor.layout != torch.strided:
        return False
    try:
        return tensor.numel() == 0 or tensor.data_ptr() != 0
    except RuntimeError:  # newer ones of them have no pointer at all
        return False


def _pieces(tensor: torch.Tensor, planned: PlannedTensor) -> Iterator[memoryview]:
    import torch

    whole = tensor.detach().to("cpu", getattr(torch, planned.dtype)).resolve_conj().resolve_neg().contiguous()
    roomy = reaches(planned.dtype, dtype_name(tensor.dtype)) or BUFFERS.search(planned.name)
    if not roomy and overflows(whole, [tensor]):
        raise beyond(planned.name, planned.dtype, "the model")
    if whole.numel():
        # as_strided: the one element of a view may keep a stride that `view` does not take.
        flat = whole.as_strided((whole.numel(),), (1,)).view(torch.uint8)
        content = memoryview(flat.numpy().data)
        for start in range(0, len(content), CHUNK):
            yield content[start : start + CHUNK]


def _save_config(model: Any, dtype: str | None, out: Path) -> Files:
    """Write what `model` says of itself, with the dtype of its weights, where these are of one."""
    if not hasattr(getattr(model, "config", None), "save_pretrained"):
        quantization = getattr(model, "_bigpipe_quantization", None)
        told = encode_config({"quantization_config": quantization})
        return {ARCHITECTURE_FILE: write_file(out / ARCHITECTURE_FILE, told)} if quantization else {}
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if dtype is not None:
        config.dtype = dtype
    config.save_pretrained(out)
    written = [out / "config.json"]
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        model.generation_config.save_pretrained(out)
        written.append(out / "generation_config.json")
    return {file.name: (hash_file(file), file.stat().st_size) for file in written}
