"""From a checkpoint and settings to a quantized one: what is asked for is read, outlined, written and told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.architecture import Architecture, describe_module, set_free
from bigpipe.bigmodel.checkpoint import ARCHITECTURE_FILE, Checkpoint, describe_opened, open_checkpoint
from bigpipe.bigmodel.formats import decode, left_out
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.writing import (
    Files,
    PlannedTensor,
    ReportProgress,
    carry_side_files,
    encode_config,
    refuse_in_place,
    require_size,
)
from bigpipe.files import write_file
from bigpipe.names import PATH, Given, checked
from bigpipe.sizes import counted, format_transfer, size_of
from bigpipe.trust import Trust

from .outline import Converted, Kept, Outline, Settings, understand

if TYPE_CHECKING:
    import torch

SOURCE = Given((*PATH.kinds, Checkpoint), "a path, or what open_checkpoint returned")


@dataclass(frozen=True, slots=True, repr=False)
class QuantizedCheckpoint:
    """What was written."""

    files: dict[str, tuple[str, int]]
    """Relative path → (hex sha256, size). Files that were linked, not written, are not among them."""
    shards: int
    bytes: int
    """Of all tensors, without file headers."""
    source_bytes: int
    """Of the tensors it was made from."""
    quantized: tuple[str, ...]
    """Modules, by name."""
    skipped: tuple[str, ...]
    """Linear modules that were left as they are."""
    notes: tuple[str, ...] = ()
    """What was odd about the input, in words."""

    def __repr__(self) -> str:
        size = f"{counted(self.shards, 'shard')}, {format_transfer(self.bytes)} of {format_transfer(self.source_bytes)}"
        return f"<QuantizedCheckpoint: {size}, {counted(len(self.quantized), 'module')} quantized>"


@checked(architecture=Given((Architecture, Mapping), "a dict or an Architecture"), source=SOURCE)
def quantize_checkpoint(
    source: str | Path | Checkpoint,
    out: str | Path,
    *,
    scheme: str | None = None,
    max_shard_size: int | str = "5GB",
    model: torch.nn.Module | None = None,
    architecture: Architecture | Mapping[str, Any] | None = None,
    parts: Path | None = None,
    device: str | None = None,
    trust: Trust | Sequence[str] = (),
    base: Path | None = None,
    memo: Path | None = None,
    progress: ReportProgress | None = None,
    **options: Any,
) -> QuantizedCheckpoint:
    """Quantize a checkpoint into the directory `out`, which `transformers`' `from_pretrained` loads as it is.

    scheme: a format, such as int8, nf4 or fp4. options: BitsAndBytesConfig's, as `Settings` has them:
      `llm_int8_threshold`, `bnb_4bit_use_double_quant`, `bnb_4bit_compute_dtype`, `skip_modules`,
      `keep_in_fp32_modules`, and `dtype`; or as people paste them (`load_in_4bit=True`, without a scheme). The weights
      of linear modules are converted, but for `skip_modules` (None: the output head and whatever is tied); everything
      else becomes `dtype` (float16), or float32 where `keep_in_fp32_modules` or the model's class says so.
    model: a module of the checkpoint's class, whose parameters may be empty, where the checkpoint does not name it.
    architecture: the same said otherwise: a custom class, as in a manifest ({"class": "module:Class", "config": {…}}),
      or what the model is; None asks the class that the checkpoint names, in a child process.
    parts: a directory where finished files are kept for later runs. device: a torch device that encodes, such as
      "cuda:0"; the bytes are the same.
    trust: modules that the model's own class may come from, looked for in `base` first. memo: a directory where answers
      about classes are kept.

    Raise UsageError (settings, or an input that is quantized already), InvalidCheckpoint, DoesNotFit, and StageFailed
    for a device that rounds differently from the CPU.
    """
    settings = Settings.read({**options, **({} if scheme is None else {"scheme": scheme})}, device)
    if device is not None:
        from .encoding import check_device

        check_device(device, settings)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    return quantize_described(
        checkpoint,
        Path(out),
        settings,
        architecture=architecture if model is None else describe_module(model),
        sources=Sources(trust=Trust.of(trust), base=base, memo=memo),
        max_shard_size=size_of("max_shard_size", max_shard_size),
        parts=parts,
        progress=progress,
    )


def quantize_described(
    checkpoint: Checkpoint,
    out: Path,
    settings: Settings,
    *,
    architecture: Architecture | Mapping[str, Any] | None = None,
    sources: Sources = Sources(),
    max_shard_size: int = 5 * 10**9,
    parts: Path | None = None,
    linked: bool = False,
    progress: ReportProgress | None = None,
) -> QuantizedCheckpoint:
    """`quantize_checkpoint` with its settings as a value; sources as in `understand`. linked: side files become links
    instead of copies."""
    from .stream import split, write_quantized  # brings numpy, which a plan does not need

    refuse_in_place(checkpoint, out)
    require_size(max_shard_size)
    stored, left = checkpoint.nbytes, left_out(describe_opened(checkpoint))
    checkpoint = decode(checkpoint)
    described = describe_opened(checkpoint)
    if isinstance(architecture, Mapping):
        described, architecture = replace(described, custom={**(described.custom or {}), **architecture}), None
    outlined, quantized = understand(described, settings, architecture=architecture, sources=sources)
    checkpoint = set_free(checkpoint, [part.source for part in outlined.parts])
    groups = split(outlined, checkpoint, max_shard_size)

    def beside() -> Files:
        """The config, transformers' own or a custom class's description, says how the weights are stored."""
        carried = carry_side_files(checkpoint, out, config=quantized.config, linked=linked)
        if quantized.custom is not None:
            carried[ARCHITECTURE_FILE] = write_file(out / ARCHITECTURE_FILE, encode_config(quantized.custom))
        return carried

    written, plans = write_quantized(checkpoint, groups, out, settings, parts, progress, beside)
    return QuantizedCheckpoint(
        files=written,
        shards=len(plans),
        bytes=sum(plan.nbytes for plan in plans),
        source_bytes=stored,
        quantized=outlined.quantized,
        skipped=outlined.skipped,
        notes=(*left, *outlined.notes, outlined.remains),
    )


def requantize(
    checkpoint: Checkpoint,
    out: Path,
    settings: Settings,
    weights: Mapping[str, str],
    *,
    max_shard_size: int,
    parts: Path | None,
    linked: bool,
    progress: ReportProgress | None,
) -> QuantizedCheckpoint:
    """Write a quantized checkpoint in which some weights are plain numbers again: these are packed, all else stays as
    it is. weights: stored name → module; their matrices are (out, in), and packed from the dtype that they have."""
    from .stream import split, write_quantized

    refuse_in_place(checkpoint, out)
    require_size(max_shard_size)

    def part(name: str) -> Converted | Kept:
        tensor = checkpoint.tensors[name]
        if name not in weights:
            return Kept(name, tensor.dtype, (PlannedTensor(name, tensor.dtype, tensor.shape),))
        rows, columns = tensor.shape
        return Converted(name, weights[name], tensor.dtype, tensor.dtype, (rows, columns), False, settings.packing)

    outlined = Outline(tuple(map(part, checkpoint.tensors)), tuple(weights.values()), ())
    groups = split(outlined, checkpoint, max_shard_size)
    beside = partial(carry_side_files, checkpoint, out, linked=linked)
    written, plans = write_quantized(checkpoint, groups, out, settings, parts, progress, beside)
    return QuantizedCheckpoint(
        files=written, shards=len(plans), bytes=sum(plan.nbytes for plan in plans), source_bytes=checkpoint.nbytes,
        quantized=outlined.quantized, skipped=(),
    )  # fmt: skip
