"""What a stage's context lets the library use and run, and how models are loaded where `dispatch` placed them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import BigpipeError, NotAuthorised, Transient, UsageError
from bigpipe.machine import Machine
from bigpipe.orchestrator.stage import CheckContext, ForecastContext, Json, Lineage, Pinned, StageContext

if TYPE_CHECKING:
    from bigpipe.bigmodel.hub import Need
    from bigpipe.bigmodel.inference import Pace


@contextmanager
def about(field: str) -> Iterator[None]:
    """Let errors that name no field of the stage, or part of it (`inputs.model`), be about this one."""
    try:
        yield
    except BigpipeError as error:
        error.field = error.field or field
        raise


def sources_of(context: CheckContext | ForecastContext | StageContext) -> Sources:
    """The context's trust, directories and Hub. Code that came with a model runs where its download is trusted."""
    return Sources(
        trust=context.trust,
        trust_remote_code=isinstance(context, StageContext) and _trusts_code(context),
        base=context.base,
        memo=context.memo,
        offline=context.offline,
        environment=context.environment,
        known=context.known if isinstance(context, CheckContext) else {},
    )


def made_by(context: StageContext, artifact: Path) -> str:
    """Return the node that made an artifact, whose directory is named by its digest; "" where that is not known."""
    name = artifact.name.removeprefix("sha256:")
    known = (item.node for item in context.lineage if item.digest and item.digest.removeprefix("sha256:") == name)
    return next(known, "")


def line_of(context: StageContext, artifact: Path) -> Sequence[Lineage]:
    """Return the nodes that led to the model of an artifact; all that there were where that is not known."""
    from bigpipe.bigmodel.publishing import led_to

    return led_to(made_by(context, artifact), context.lineage) or context.lineage


def downloads_of(context: StageContext, artifact: Path) -> list[Lineage]:
    """Return those of `line_of` that brought something."""
    return [item for item in line_of(context, artifact) if item.kind == "download" and not item.left]


def _trusts_code(context: StageContext) -> bool:
    """Is a download trusted, and each by which code came into one of the inputs? The code of one model may not run
    because another one is trusted."""
    if not context.trust.remote_code:
        return False
    trusted = {
        item.node
        for item in context.lineage
        if item.kind == "download"
        and not item.left
        and context.trust.allows_code(item.params.get("repo"), _commit_of(item))
    }
    folders = [folder for folders in context.inputs.values() for folder in folders if any(folder.glob("*.py"))]
    brought = [item.node for folder in folders for item in downloads_of(context, folder)]
    return bool(trusted) and trusted.issuperset(brought)


def _commit_of(download: Lineage) -> Any:
    """The commit of a download, also of one that still runs: it then brings what it is pinned to."""
    return download.metrics.get("commit") or download.pins.get("revision") or download.params.get("revision")


def tell_pace(context: StageContext, unit: str, task: str) -> Callable[[Pace], None]:
    """Return what tells the run how far a rank is."""
    return lambda pace: context.progress(
        pace.done, pace.expected, unit, task, tokens=pace.tokens, busy=pace.busy, whole=pace.whole
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


def is_offline(context: CheckContext) -> bool:
    """Return whether the Hub may not be asked."""
    from bigpipe.bigmodel.hub import Hub

    return Hub.of(sources_of(context)).offline


def hub_reads(repo: str, revision: str, context: ForecastContext) -> list[str]:
    """What is read of a repository at a revision: the Hub's own, and the Hub cache, where its files stay."""
    from bigpipe.bigmodel.hub import Hub, address_of

    hub, commit = Hub.of(sources_of(context)), context.pins.get("revision")
    return [str(hub.cache.absolute()), address_of(repo, revision, commit and str(commit), hub=hub)]
