"""How `merge` does it: what is changed is computed as it is read, by the loop that writes every other checkpoint."""

from __future__ import annotations

from dataclasses import replace

from bigpipe.bigmodel.adapters import Bound, Merge, is_packed, merge_opened, merging_memory
from bigpipe.bigmodel.architecture import untied
from bigpipe.bigmodel.checkpoint import (
    AdapterDescription,
    ModelDescription,
    describe_checkpoint,
    open_adapter,
    open_checkpoint,
)
from bigpipe.bigmodel.writing import WORKERS, planned_bytes
from bigpipe.orchestrator.stage import CheckContext, Forecast, ForecastContext, StageContext, StageResult
from bigpipe.sizes import counted, format_transfer

from .library import about, sources_of
from .merge import MergeMetrics, MergeParams
from .wired import require_class, single_model, wired_adapters

RAM = 400 * 2**20
"""Peak of the worker process besides what it holds of one run of rows: interpreter, torch, buffers for the files."""
RATE = 300 * 10**6
"""Bytes per second where nothing better is known: one core's sha256 and a product of narrow matrices per row."""


def check(params: MergeParams, context: CheckContext) -> None:
    """Refuses before the download an adapter for another model, and a method that is not done here."""
    _changes(params, context)


def _changes(params: MergeParams, context: CheckContext) -> tuple[ModelDescription, list[Bound]] | None:
    """The model and what changes in it; None where one of them is not known yet."""
    described, adapters = single_model(context), wired_adapters(context)
    if described is None or described.tensors is None or len(adapters) < len(context.inputs.get("adapter", ())):
        return None
    with about("inputs.model"):
        require_class(described)
    with about("inputs.adapter"):
        return described, _merge(params).changes(described, adapters, sources_of(context))


def _merge(params: MergeParams) -> Merge:
    return Merge(**params.model_dump())


def forecast(params: MergeParams, context: ForecastContext) -> Forecast:
    """Exact numbers of tensors and bytes, from the headers of both."""
    found = _changes(params, context)
    if found is None:
        unknown = ("size after merging, and memory: the tensors of the model or the adapter are not known yet",)
        return Forecast(download_bytes=0, vram={}, unknown=unknown)
    described, bounds = found
    merged = len({bound.name for bound in bounds})
    size, metrics, output = _sizes(params, described, bounds)
    trained = {adapter.base_model for adapter in wired_adapters(context)} - {None}
    return Forecast(
        download_bytes=0,
        vram={},
        write_bytes=size,
        ram=RAM + min(WORKERS, context.machine.cpus) * merging_memory(described, bounds),
        seconds=size / RATE,
        metrics={"merged": merged, **metrics},
        output=describe_checkpoint(context.artifact) if context.artifact else output,
        summary=f"{counted(merged, 'tensor')} changed, +{format_transfer(size)}",
        details=(
            *_merge(params).conversion.notes(described),
            *(f"the adapter was trained on {name}" for name in sorted(map(str, trained))),
            *_whose_tokenizer(params, wired_adapters(context)),
        ),
    )


def _whose_tokenizer(params: MergeParams, adapters: list[AdapterDescription]) -> list[str]:
    brought = params.tokenizer == "adapter" and any(adapter.brings_tokenizer for adapter in adapters)
    return ["the tokenizer is the adapter's, and so is the chat template, where it brings one"] if brought else []


def _sizes(
    params: MergeParams, described: ModelDescription, bounds: list[Bound]
) -> tuple[int, dict[str, int], ModelDescription]:
    """Bytes to be written, the metrics that are known, and what comes of it. What is packed again keeps its size, but
    for a few bytes of the states that are stored beside it."""
    if is_packed(described):
        packed = replace(untied(described), format="safetensors", tied={})
        return packed.nbytes or 0, {}, packed
    plans, output = _merge(params).of(described, bounds)
    size = planned_bytes(plans)
    return size, {"bytes": size}, output


def run(params: MergeParams, context: StageContext) -> StageResult:
    """Writes the weights anew and refers to the model's side files; whole files of an earlier attempt are kept."""
    saved = merge_opened(
        open_checkpoint(context.input("model")),
        [open_adapter(path) for path in context.inputs["adapter"]],
        context.out,
        _merge(params),
        sources=sources_of(context),
        linked=True,
        progress=lambda done, total: context.progress(done, total, "B", "weights"),
        journal=context.scratch / "finished",
    )
    return StageResult(MergeMetrics(merged=saved.merged, bytes=saved.bytes), saved.files)
