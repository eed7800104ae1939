"""What a stage's context lets the library use and run, and how models are loaded where `dispatch` placed them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import BigpipeError, NotAuthorised, Transient, UsageError
from bigpipe.machine import Machine
from bigpipe.orchestrator.stage import CheckContext, ForecastContext, Json, Pinned, StageContext

if TYPE_CHECKING:
    import torch

    from bigpipe.bigmodel.adapters import Attachment
    from bigpipe.bigmodel.checkpoint import AdapterDescription, ModelDescription
    from bigpipe.bigmodel.execution import HostMemory
    from bigpipe.bigmodel.formats import Agreement
    from bigpipe.bigmodel.hub import Need
    from bigpipe.bigmodel.placement import Limit, Placement

PLACEMENT = "placement.json"
"""What `dispatch` writes and `distributed-infer` reads."""


@contextmanager
def about(field: str) -> Iterator[None]:
    """Let errors that name no field of the stage, or part of it (`inputs.model`), be about this one."""
    try:
        yield
    except BigpipeError as error:
        error.field = error.field or field
        raise


def sources_of(context: CheckContext | ForecastContext | StageContext) -> Sources:
    """The context's trust, directories and Hub. Code that came with the model runs where its download is trusted."""
    lineage = context.lineage if isinstance(context, StageContext) else ()
    downloads = [node for node in lineage if node.kind == "download"]
    trusted = [context.trust.allows_code(node.params.get("repo"), node.metrics.get("commit")) for node in downloads]
    return Sources(
        trust=context.trust,
        trust_remote_code=any(trusted),
        base=context.base,
        memo=context.memo,
        offline=context.offline,
        environment=context.environment,
        known=context.known if isinstance(context, CheckContext) else {},
    )


def dtype_facts(params: Any, machine: Machine) -> Mapping[str, Json]:
    """What the key of a stage that computes with `params.dtype` depends on: where none is given, the kind of device and
    its memory choose it."""
    if params.dtype:
        return {}
    return {"gpus": sorted({gpu.name for gpu in machine.gpus})} if machine.gpus else {"memory": machine.memory}


def pin_revision(repo: str, revision: str, context: CheckContext) -> Pinned:
    """The commit that a branch or tag of a repository means now."""
    from bigpipe.bigmodel.hub import Hub, resolve_commit

    hub = Hub.of(sources_of(context))
    asked = f"the Hub cache {hub.cache}" if hub.offline else f"{hub.endpoint}, just now"
    return Pinned({"revision": resolve_commit(repo, revision, hub=hub)}, asked)


def answers_of(
    context: CheckContext, repo: str, commit: str, need: Need, choice: Mapping[str, Any], subfolder: str | None
) -> Mapping[str, Json]:
    """What a lock keeps of a model, see `hub.answers`; nothing where it cannot be asked, or holds no model."""
    from bigpipe.bigmodel.hub import Choice, Hub, answers

    try:
        hub = Hub.of(sources_of(context))
        return answers(repo, commit, hub=hub, need=need, choice=Choice(**choice), subfolder=subfolder)
    except (Transient, NotAuthorised, UsageError):
        return {}


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What a download foresees of several models in one folder, as diffusers puts them together."""


def single_model(context: CheckContext | ForecastContext, port: str = "model") -> ModelDescription | None:
    """What is known of the model on a port. Raise UsageError for a pipeline of several."""
    from bigpipe.bigmodel.checkpoint import AdapterDescription, ModelDescription

    wired = context.input(port)
    described = wired.output if wired else None
    if isinstance(described, AdapterDescription):
        cause = f"{described.where} holds an adapter, which is not a model by itself"
        raise UsageError(cause, "wire it to a port `adapter`, and the model it belongs to here", field=f"inputs.{port}")
    if isinstance(described, Pipeline):
        cause = "the model is a pipeline of diffusers: several models, of which none is the one"
        raise UsageError(cause, "download one of them: its folder as `path`, or `subfolder`")
    return described if isinstance(described, ModelDescription) else None


def wired_adapters(context: CheckContext | ForecastContext) -> list[AdapterDescription]:
    """What is known of the adapters on port `adapter`. Raise UsageError where something else is wired there."""
    from bigpipe.bigmodel.checkpoint import AdapterDescription

    found = []
    for wired in context.inputs.get("adapter", ()):
        if isinstance(wired.output, AdapterDescription):
            found.append(wired.output)
        elif wired.output is not None:
            cause = "what is wired to the port `adapter` holds a model, and no adapter_config.json"
            raise UsageError(cause, "wire a download of peft's own files, or a finetune", field="inputs.adapter")
    return found


def attached(context: CheckContext | ForecastContext, model: ModelDescription | None) -> Attachment | None:
    """What becomes of the adapter on port `adapter` where the model is loaded; None where there is none, or one of both
    is not known yet. Raise UsageError and InvalidCheckpoint where they do not belong together."""
    from bigpipe.bigmodel.adapters import attachment

    with about("inputs.adapter"):
        found = wired_adapters(context)
        if not found or model is None or model.tensors is None:
            return None
        try:
            architecture = agreed(model, sources_of(context)).architecture
        except UsageError:
            if not (context.trust.remote_code and (model.config or {}).get("auto_map")):
                raise
            return None  # its code comes with the download
        return attachment(found[0], model, architecture, context.memo)


def require_class(model: ModelDescription) -> None:
    """Raise UsageError where the weights are known, and nothing says of which class they are."""
    if model.tensors is not None and model.config is None and model.custom is None:
        where = f"{model.path} has" if model.path else "the model comes with"
        cure = "bring its config.json along, or name a class of your own: `architecture` of download"
        raise UsageError(f"{where} no config.json, so nobody knows the class of its weights", cure)


def agreed(model: ModelDescription, sources: Sources) -> Agreement:
    """How a checkpoint fits the class that will be loaded. Raise InvalidCheckpoint where it does not, and UsageError
    where that class is not known, or its code may not run."""
    from bigpipe.bigmodel.architecture import describe_architecture
    from bigpipe.bigmodel.formats import agree

    source = model.path if model.path is not None and sources.trust_remote_code else dict(model.config or {})
    return agree(model, describe_architecture(source, custom=model.custom, sources=sources), sources.memo)


def hub_reads(repo: str, revision: str, context: ForecastContext) -> list[str]:
    """What is read of a repository at a revision: the Hub's own, and the Hub cache, where its files stay."""
    from bigpipe.bigmodel.hub import COMMIT, Hub, addresses

    commit = context.pins.get("revision") or (revision if COMMIT.fullmatch(revision) else None)
    return [str(Hub.of(sources_of(context)).cache.absolute()), *addresses(repo, revision, commit)]


def read_placement(artifact: Path) -> Placement:
    from bigpipe.bigmodel.placement import Placement

    return Placement.from_json(json.loads((artifact / PLACEMENT).read_bytes()))


def memory_here(
    placement: Placement, context: ForecastContext | StageContext, processes: int = 1, available: int | None = None
) -> HostMemory:
    """Return what each of `processes` of a stage may take of its machine. available: bytes of RAM, where they are known
    better than from when the machine was looked at."""
    from bigpipe.bigmodel.execution import host_memory
    from bigpipe.bigmodel.placement import products_of

    machine, memo = context.machine, context.memo
    available = machine.memory_available if available is None else available
    return host_memory(placement, machine.memory, available, processes, lambda: products_of(machine, memo))


def computed_in(
    model: ModelDescription,
    placement: Placement,
    context: ForecastContext | StageContext,
    dtype: str | None = None,
) -> str:
    """Return the dtype that a placed model computes in. dtype: the one asked for; it wins."""
    from bigpipe.bigmodel.execution import loading_dtype

    return loading_dtype(model, placement, memory_here(placement, context), dtype)


def told_limit(limit: Limit) -> dict[str, Any]:
    """The metrics that say it."""
    return {"bound_by": limit.bound_by, "limit_tokens_per_second": round(limit.tokens_per_second, 3)}


def load_placed(
    placement: Placement,
    context: StageContext,
    *,
    dtype: str | None = None,
    as_stored: bool = False,
    rank: int = 0,
    ranks: int = 1,
    port: str = "model",
) -> torch.nn.Module:
    """The model on a port, placed; that on port `model` with the adapter on port `adapter`, if one is wired. dtype:
    wins over the placement's. as_stored: nothing is held in another dtype than it is stored in. rank, ranks: of those
    on this machine, which share its memory and own as many GPUs each."""
    import psutil

    from bigpipe.bigmodel.execution import load

    if dtype is not None:
        placement = replace(placement, compute_dtype=None)
    memory = memory_here(placement, context, ranks, psutil.virtual_memory().available)
    return load(
        context.input(port),
        placement,
        adapter=context.input("adapter") if port == "model" and "adapter" in context.inputs else None,
        dtype=dtype,
        memory=replace(memory, cast=0) if as_stored else memory,
        first_gpu=rank * placement.gpus,
        trust=context.trust,
        base=context.base,
        trust_remote_code=sources_of(context).trust_remote_code,
    )
