"""Merges adapters into a model's checkpoint, rows at a time: what is changed is decoded as it is read.

merge_adapter
  bind                   which stored tensor each tensor of an adapter changes
  changed_checkpoint     the checkpoint with those tensors made by `arithmetic.Changed`
  writing.convert        files, digests, resuming: as of any other checkpoint
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bigpipe.bigmodel.architecture import architecture_of, untied_checkpoint
from bigpipe.bigmodel.checkpoint import (
    DECODED,
    MAX_CONFIG,
    Adapter,
    AdapterDescription,
    Checkpoint,
    Made,
    ModelDescription,
    TensorInfo,
    check_file,
    describe_opened,
    is_of_tokenizer,
    is_template,
    open_adapter,
    open_checkpoint,
    read_json,
    tensor_nbytes,
)
from bigpipe.bigmodel.formats import BUILT_IN, PLAIN, decode, decoded, format_of, set_apart
from bigpipe.bigmodel.quantization import Settings, requantize, torch_threads
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.writing import (
    Conversion,
    Files,
    ReportProgress,
    ShardPlan,
    convert,
    is_cast,
    refuse_in_place,
)
from bigpipe.errors import UsageError
from bigpipe.files import copy_file, link, make_folders, refuse_overlap, write_file
from bigpipe.names import PATH, Given, checked
from bigpipe.sizes import counted, format_transfer, size_of
from bigpipe.trust import Trust
from bigpipe.versions import require

from .arithmetic import Changed, LowRank, one_thread_each
from .changes import Bound, bind, combined
from .method import Combination, require_weights
from .unpacking import unpacked

Whose = Literal["adapter", "model"]
"""Whose tokenizer and chat template a merged model has. adapter: of the first that brings a whole one, else the
model's."""
TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """How adapters are merged."""

    max_shard_size: int
    """Bytes of a file, unless one tensor alone has more."""
    dtype: str | None = None
    """Of floating-point tensors, which are cast to it before anything is added; None: as they are."""
    weights: tuple[float, ...] | None = None
    """One for each of several adapters; None: 1 for each."""
    combination: Combination = "cat"
    tokenizer: Whose = "adapter"

    @property
    def conversion(self) -> Conversion:
        return Conversion(max_shard_size=self.max_shard_size, dtype=self.dtype)

    def changes(
        self, described: ModelDescription, adapters: Sequence[AdapterDescription], sources: Sources = Sources()
    ) -> list[Bound]:
        """Return what adapters change in a model whose tensors are known. Raise as `bind` and `combined`."""
        if not adapters:
            raise UsageError("no adapter is given", "give one, as peft saved it", field="inputs.adapter")
        weights = require_weights(self.weights, len(adapters), self.combination)
        _require_mergeable(described, self.dtype)
        architecture = architecture_of(described, sources)
        bounds = [bind(adapter, described, architecture, sources.memo) for adapter in adapters]
        found = (
            bounds[0] if len(adapters) == 1 and self.weights is None else combined(bounds, weights, self.combination)
        )
        _refuse_packed(described, found)
        return found

    def of(self, described: ModelDescription, bounds: Iterable[Bound]) -> tuple[list[ShardPlan], ModelDescription]:
        """Return the files of the merged checkpoint, and what it is. Raise as `Conversion.of`."""
        plain = decoded(described)
        stored = dict(plain.tensors or {})
        apart = {bound.target: stored[bound.stored] for bound in bounds if bound.apart}
        tied = {alias: kept for alias, kept in plain.tied.items() if alias not in apart}
        config = _untied(plain.config) if apart and plain.config else plain.config
        return self.conversion.of(replace(plain, tensors={**stored, **apart}, tied=tied, config=config))


def _require_mergeable(described: ModelDescription, dtype: str | None) -> None:
    """Raise UsageError for weights that are packed in a way that is not unpacked here."""
    found = format_of(described)
    if found is PLAIN or found.decoding is not None:
        return
    if found.name not in BUILT_IN:
        cause = f"the checkpoint is quantized ({found.title})"
        raise UsageError(cause, "merge into the weights before they were quantized", field="inputs.model")
    if dtype is not None:
        raise UsageError(f"dtype {dtype}: the checkpoint is quantized ({found.title})", "leave it out", field="dtype")


def is_packed(described: ModelDescription) -> bool:
    """Return whether its matrices are packed, and merged by unpacking them."""
    return format_of(described).packing is not None


def _refuse_packed(described: ModelDescription, bounds: Iterable[Bound]) -> None:
    """Raise UsageError for changes of packed weights that are not added to them."""
    tensors = described.tensors or {}
    for bound in bounds if is_packed(described) else ():
        dtype, _ = tensors.get(bound.stored, ("", ()))
        if bound.apart or ("float" not in dtype and not isinstance(bound.change, LowRank)):
            cause = f"{bound.target}: only pairs of matrices are merged into a quantized model"
            raise UsageError(cause, "merge into the weights before they were quantized, and quantize then")


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a model whose head is stored beside the embedding, as peft's merge leaves it. T5's kind means by
    the field whether outputs are scaled, and unties what is stored twice without it."""
    if config.get("model_type") in SCALED:
        return dict(config)
    text = config.get("text_config")
    part = {"text_config": _untied(text)} if isinstance(text, Mapping) and "tie_word_embeddings" in text else {}
    return {**config, **part, "tie_word_embeddings": False}


@dataclass(frozen=True, slots=True, repr=False)
class MergedCheckpoint:
    """What was written."""

    files: Files
    """Relative path → (hex sha256, size). Files that were linked, not written, are not among them."""
    shards: int
    bytes: int
    """Of the weight files, headers included."""
    merged: int
    """Stored tensors that an adapter changed."""

    def __repr__(self) -> str:
        size = f"{counted(self.shards, 'shard')}, {format_transfer(self.bytes)}"
        return f"<MergedCheckpoint: {size}, {counted(self.merged, 'tensor')} changed>"


SCALED = frozenset({"t5", "mt5", "longt5", "umt5", "switch_transformers", "udop"})
"""Model types whose `tie_word_embeddings` is about more than ties."""
ADAPTERS = Given((*PATH.kinds, Adapter, list, tuple), "a folder of peft's files, or a list of such folders")


@checked(
    source=Given((*PATH.kinds, Checkpoint), "a path, or what open_checkpoint returned"), adapter=ADAPTERS,
    weights=Given((list, tuple), "a number for each adapter, in a list"),
)  # fmt: skip
def merge_adapter(
    source: str | Path | Checkpoint,
    adapter: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    combination: Combination = "cat",
    tokenizer: Whose = "adapter",
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    trust: Trust | Sequence[str] = (),
    base: Path | None = None,
    memo: Path | None = None,
    progress: ReportProgress | None = None,
) -> MergedCheckpoint:
    """Merge a LoRA adapter into a checkpoint and write the model into the directory `out`: the bytes of peft's
    `merge_and_unload`, without holding the model.

    source: the model that it was trained on. adapter: a folder with `adapter_config.json` and
      `adapter_model.safetensors` (or `.bin`); several with `weights`, one for each, and a `combination` as peft's
      `add_weighted_adapter` names it (`cat`: the sum of what each would add; `linear`: the product of sums).
    tokenizer: whose the result has, with its chat template: the adapter's, if a whole one lies beside it, or the
      model's.
    dtype: what the model is cast to before anything is added; None: as stored.
    trust, base: of modules with the model's own class. memo: a directory where answers about classes are kept.

    Raise UsageError (an adapter for another model, or of a method that is not done here), InvalidCheckpoint (an adapter
    that holds NaN, sums that have no room in the dtype, damaged files) and DoesNotFit.
    """
    require("merge_adapter", "torch", "transformers")
    given = [adapter] if isinstance(adapter, str | Path) else list(adapter)
    if odd := [each for each in given if not isinstance(each, str | Path)]:
        raise UsageError(f"adapter names {odd[0]!r:.60}", f"give {ADAPTERS.words}", field="adapter")
    size = size_of("max_shard_size", max_shard_size)
    weighed = None if weights is None else tuple(weights)
    return merge_opened(
        source if isinstance(source, Checkpoint) else open_checkpoint(source),
        [open_adapter(each) for each in given],
        Path(out),
        Merge(max_shard_size=size, dtype=dtype, weights=weighed, combination=combination, tokenizer=tokenizer),
        sources=Sources(trust=Trust.of(trust), base=base, memo=memo),
        progress=progress,
    )


def merge_opened(
    checkpoint: Checkpoint,
    adapters: Sequence[Adapter],
    out: Path,
    merge: Merge,
    *,
    sources: Sources = Sources(),
    linked: bool = False,
    progress: ReportProgress | None = None,
    journal: Path | None = None,
) -> MergedCheckpoint:
    """`merge_adapter` of what is open; linked and journal as `convert` takes them."""
    refuse_in_place(checkpoint, out)
    refuse_overlap(out, [path for adapter in adapters for path in (adapter.path, adapter.file)])
    trained_with = next((each for each in adapters if each.tokenizer and merge.tokenizer == "adapter"), None)
    if trained_with is None:
        return _merge(checkpoint, adapters, out, merge, sources, linked, progress, journal)
    own = any(map(is_template, trained_with.tokenizer)) or _template_within(trained_with.path) is not None
    merged = _merge(_without_tokenizer(checkpoint, own), adapters, out, merge, sources, linked, progress, journal)
    files = {**merged.files, **_carry_tokenizer(trained_with, out, linked)}
    if not own and (template := _template_within(checkpoint.folder)) and not (out / TEMPLATE).exists():
        files[TEMPLATE] = write_file(out / TEMPLATE, template.encode())
    return replace(merged, files=files)


def _without_tokenizer(checkpoint: Checkpoint, templates: bool) -> Checkpoint:
    """Without its chat templates too, or with these."""

    def stays(extra: Path) -> bool:
        name = extra.relative_to(checkpoint.folder).as_posix()
        return not is_of_tokenizer(name) or (is_template(name) and not templates)

    return replace(checkpoint, extras=tuple(filter(stays, checkpoint.extras)))


def _template_within(folder: Path) -> str | None:
    """Return the chat template that stands in a tokenizer's config; None where none does."""
    path = folder / "tokenizer_config.json"
    found = read_json(path, folder, MAX_CONFIG).get("chat_template") if path.exists() else None
    return found if isinstance(found, str) else None


def _carry_tokenizer(adapter: Adapter, out: Path, linked: bool) -> Files:
    written = {}
    for name in adapter.tokenizer:
        check_file(adapter.path / name, adapter.path)
        make_folders((out / name).parent)
        if linked:
            link(os.path.abspath(adapter.path / name), out / name)
        else:
            written[name] = copy_file(adapter.path / name, out / name)
    return written


def _merge(
    checkpoint: Checkpoint,
    adapters: Sequence[Adapter],
    out: Path,
    merge: Merge,
    sources: Sources,
    linked: bool,
    progress: ReportProgress | None,
    journal: Path | None,
) -> MergedCheckpoint:
    checkpoint = untied_checkpoint(checkpoint)
    described = describe_opened(checkpoint)
    bounds = merge.changes(described, [adapter.described for adapter in adapters], sources)
    if is_packed(described):
        return _merge_packed(checkpoint, adapters, bounds, out, merge, linked, progress, journal)
    changed = changed_checkpoint(decode(checkpoint), adapters, bounds, merge.dtype)
    with one_thread_each():
        saved = convert(
            changed, out, merge.conversion, linked=linked, progress=progress, journal=journal,
            restated=changed.config != checkpoint.config,
        )  # fmt: skip
    return MergedCheckpoint(saved.files, saved.shards, saved.bytes, len({bound.name for bound in bounds}))


def _merge_packed(
    checkpoint: Checkpoint,
    adapters: Sequence[Adapter],
    bounds: Sequence[Bound],
    out: Path,
    merge: Merge,
    linked: bool,
    progress: ReportProgress | None,
    journal: Path | None,
) -> MergedCheckpoint:
    """Unpack what is changed, add, and pack it again, as peft does with bitsandbytes; the codes of all else stay."""
    described = describe_opened(checkpoint)
    format, config = format_of(described), described.quantization or {}
    _, packed = set_apart(checkpoint.tensors, format)
    weights = {bound.stored: bound.stored.removesuffix(".weight") for bound in bounds}
    weights = {name: module for name, module in weights.items() if module in packed}
    tensors = dict(checkpoint.tensors)
    for name, module in weights.items():
        for suffix in packed[module].parts:
            tensors.pop(f"{module}.{suffix}")
        tensors[name] = unpacked(checkpoint, module, packed[module])
    changed = changed_checkpoint(replace(checkpoint, tensors=tensors), adapters, bounds, "float32", only=weights)
    double = any("weight.nested_absmax" in packed[module].parts for module in weights.values())
    compute = str(config.get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch.")
    settings = Settings(
        scheme=format.name, threads=torch_threads(), bnb_4bit_use_double_quant=double, dtype="float32",
        bnb_4bit_compute_dtype=compute if compute in ("float16", "bfloat16") else "float32",
    )  # fmt: skip
    with one_thread_each():
        saved = requantize(
            changed, out, settings, weights, max_shard_size=merge.max_shard_size, parts=journal, linked=linked,
            progress=progress,
        )  # fmt: skip
    sizes = (size for name, (_, size) in saved.files.items() if name.endswith(".safetensors"))
    return MergedCheckpoint(saved.files, saved.shards, sum(sizes), len({bound.name for bound in bounds}))


def changed_checkpoint(
    checkpoint: Checkpoint,
    adapters: Sequence[Adapter],
    bounds: Iterable[Bound],
    dtype: str | None = None,
    only: Container[str] | None = None,
) -> Checkpoint:
    """Return a checkpoint whose changed tensors are made as they are read. dtype: what they are cast to first; only:
    those of these stored names, None: all."""
    grouped: dict[tuple[str, str], list[Bound]] = {}
    for bound in bounds:
        grouped.setdefault((bound.name, bound.stored), []).append(bound)
    tensors = dict(checkpoint.tensors)
    for (name, stored), changes in grouped.items():
        wanted = dtype if only is None or stored in only else None
        tensors[name] = _changed(name, checkpoint.tensors[stored], changes, adapters, wanted)
    apart = {bound.target for changes in grouped.values() for bound in changes if bound.apart}
    return replace(
        checkpoint,
        tensors=tensors,
        tied={alias: kept for alias, kept in checkpoint.tied.items() if alias not in apart},
        config=_untied(checkpoint.config) if apart and checkpoint.config else checkpoint.config,
    )


def _changed(
    name: str, tensor: TensorInfo, bounds: Sequence[Bound], adapters: Sequence[Adapter], dtype: str | None
) -> TensorInfo:
    wanted = dtype if dtype is not None and is_cast(tensor.dtype, dtype) else tensor.dtype
    decoder = Changed(
        name, tensor.shape, tensor.dtype, wanted, tensor.made.decoder if tensor.made else None, len(tensor.stored),
        tuple(bound.change for bound in bounds),
    )  # fmt: skip
    taken = [adapters[number].tensors[part] for bound in bounds for number, part in bound.parts]
    made = Made((*tensor.stored, *taken), decoder)
    return TensorInfo(name, wanted, tensor.shape, tensor.stored[0].file, -1, made=made)


def merging_memory(described: ModelDescription, bounds: Iterable[Bound]) -> int:
    """Return the bytes that one run of changed rows takes at the most, what is read and the result included."""
    tensors, most = decoded(described).tensors or {}, 0
    for bound in bounds:
        dtype, shape = tensors.get(bound.stored, ("float32", ()))
        if isinstance(bound.change, LowRank):  # a packed weight has another shape as it is stored
            shape = bound.change.rows, bound.change.columns
        row = tensor_nbytes("float32", shape[1:])
        rows = shape[0] if bound.change.whole else max(1, DECODED // max(1, tensor_nbytes(dtype, shape[1:])))
        parts = sum(size for _, size in bound.change.ranges(0, min(rows, shape[0])))
        most = max(most, 4 * row * min(rows, shape[0]) + 3 * parts)
    return most
