"""How `download` does it: what can be told of a source beforehand, and how a model comes from it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.architecture import Architecture, describe_architecture
from bigpipe.bigmodel.checkpoint import ARCHITECTURE_FILE, describe_checkpoint, describe_if_single
from bigpipe.bigmodel.hub import (
    Choice,
    Expected,
    Files,
    Hub,
    Repository,
    bring_directory,
    bring_repository,
    check_access,
    describe,
    detect,
    expect_directory,
    expect_repository,
    resolve_commit,
)
from bigpipe.bigmodel.writing import (
    encode_config,
    plan_synthetic,
    planned_bytes,
    read_shape,
    synthetic_description,
    write_synthetic,
)
from bigpipe.files import write_file
from bigpipe.orchestrator.stage import (
    CheckContext,
    Forecast,
    ForecastContext,
    NotAuthorised,
    Pinned,
    PinnedFile,
    StageContext,
    StageResult,
    Transient,
)
from bigpipe.sizes import counted, format_transfer

from .download import DownloadMetrics, DownloadParams, Synthetic
from .sources import sources_of


def pin(params: DownloadParams, context: CheckContext) -> Pinned | None:
    """The commit that a branch or tag means now."""
    hub = Hub.of(sources_of(context))
    commit = resolve_commit(params.repo or "", params.revision, hub=hub, memo=context.memo)
    return Pinned({"revision": commit}, f"{hub.endpoint}, just now", lambda: listing(params, context, commit))


def listing(params: DownloadParams, context: CheckContext, commit: str) -> dict[str, PinnedFile]:
    """What a repository holds at a commit of the files to take; nothing where it cannot be asked."""
    try:
        repository = describe(params.repo or "", commit, hub=Hub.of(sources_of(context)), memo=context.memo)
    except (Transient, NotAuthorised):
        return {}
    chosen = _choice(params).of_repository(repository)
    files = {file.path: PinnedFile(file.size, file.sha256, None if file.sha256 else file.blob_id) for file in chosen}
    own = {
        name: PinnedFile(len(content), hashlib.sha256(content).hexdigest()) for name, content in _own(params).items()
    }
    return {**files, **own}


def check(params: DownloadParams, context: CheckContext) -> None:
    """Trust, token, gate, and whether a directory is a checkpoint: what would fail later fails now."""
    if params.architecture is not None:
        reference = params.architecture.class_
        context.trust.require_module(reference, f"architecture.class {reference}")
    if params.path is not None:
        folder = context.base / params.path
        if detect(_choice(params).of_directory(folder)) != "diffusers":
            describe_checkpoint(folder)
    if params.repo is not None and not context.offline:
        try:
            check_access(params.repo, hub=Hub.of(sources_of(context)))
        except Transient:
            return  # the forecast tells what is not known, and the run may go on from the Hub cache


def _choice(params: DownloadParams) -> Choice:
    return Choice(include=params.include, exclude=params.exclude, library=params.library_name)


def _custom(params: DownloadParams) -> dict[str, Any] | None:
    """What `bigpipe_architecture.json` says, where the model's class is the user's own."""
    return params.architecture.model_dump(by_alias=True) if params.architecture else None


def _own(params: DownloadParams) -> dict[str, bytes]:
    """Files of the artifact that come from the params."""
    custom = _custom(params)
    return {} if custom is None else {ARCHITECTURE_FILE: encode_config(custom)}


def forecast(params: DownloadParams, context: ForecastContext) -> Forecast:
    if params.synthetic is not None:
        found = _forecast_synthetic(params, params.synthetic, context)
    else:
        try:
            found = _forecast_of(_expected(params, context), params)
        except (Transient, NotAuthorised) as error:
            found = Forecast(unknown=(f"size of {params.repo}: {error.cause}",), summary="size not known")
    described = describe_if_single(context.artifact) if context.artifact else None
    described = described or found.output
    if described is not None and params.architecture is not None:
        described = replace(described, custom=_custom(params))
    return replace(found, output=described)


def _expected(params: DownloadParams, context: ForecastContext) -> Expected:
    if params.repo is None:
        return expect_directory(context.base / (params.path or ""), _choice(params))
    hub = Hub.of(sources_of(context))
    return expect_repository(_repository(params, hub, context), _choice(params), hub, context.memo)


def _repository(params: DownloadParams, hub: Hub, context: ForecastContext | StageContext) -> Repository:
    revision = context.pins.get("revision", params.revision)
    return describe(params.repo or "", revision, hub=hub, memo=context.memo)


def _forecast_of(expected: Expected, params: DownloadParams) -> Forecast:
    own = {name: len(content) for name, content in _own(params).items()}
    sizes = {**expected.sizes, **own}
    total, copied = sum(sizes.values()), expected.cache is None
    metrics = {"bytes": total, "files": len(sizes), "commit": expected.commit}
    remote = f"{counted(len(sizes), 'file')}, {format_transfer(total)}"
    remote += "" if expected.missing else ", all in the Hub cache"
    return Forecast(
        download_bytes=expected.missing,
        write_bytes=total if copied else sum(own.values()),
        file_bytes=expected.largest_passing if copied else 0,
        fetches_to=expected.cache,
        metrics={**metrics, "fetched_bytes": 0} if copied else metrics,
        output=expected.description,
        misfits=expected.misfits,
        summary=f"{format_transfer(total)} copied from {params.path}" if copied else remote,
    )


def _forecast_synthetic(params: DownloadParams, synthetic: Synthetic, context: ForecastContext) -> Forecast:
    config, architecture = _made_of(params, synthetic, context)
    described = synthetic_description(config, architecture, dtype=synthetic.dtype, format=synthetic.format)
    plans = plan_synthetic(described, synthetic.max_shard_size)
    size = planned_bytes(plans)
    return Forecast(
        download_bytes=0,
        write_bytes=size,
        file_bytes=max(planned_bytes([plan]) for plan in plans),
        metrics={"fetched_bytes": 0, "commit": None},
        output=described,
        summary=f"{format_transfer(size)} made up, in {counted(len(plans), 'file')}",
    )


def _made_of(
    params: DownloadParams, synthetic: Synthetic, context: ForecastContext | StageContext
) -> tuple[dict[str, Any], Architecture]:
    """The config, and what its class consists of."""
    config = read_shape(synthetic.config, context.base)
    library, custom = params.library_name, _custom(params)
    return config, describe_architecture(config, library_name=library, custom=custom, sources=sources_of(context))


def run(params: DownloadParams, context: StageContext) -> StageResult:
    own = {name: write_file(context.out / name, content) for name, content in _own(params).items()}
    files, commit, fetched = _bring(params, context)
    files |= own
    size = sum(size for _, size in files.values())
    return StageResult(DownloadMetrics(bytes=size, files=len(files), fetched_bytes=fetched, commit=commit), files)


def _bring(params: DownloadParams, context: StageContext) -> tuple[Files, str | None, int]:
    """(files, commit, fetched bytes)"""
    if params.repo is not None:
        return _from_hub(params, context)
    if params.path is not None:
        return _from_directory(params, context.base / params.path, context), None, 0
    assert params.synthetic is not None  # noqa: S101  exactly one is given
    return _synthesize(params, params.synthetic, context), None, 0


def _from_hub(params: DownloadParams, context: StageContext) -> tuple[Files, str, int]:
    hub = Hub.of(sources_of(context))
    repository = _repository(params, hub, context)
    chosen = [file for file in _choice(params).of_repository(repository) if file.path not in _own(params)]
    context.log(f"{repository.repo} at {repository.commit}: {counted(len(chosen), 'file')}")
    files, fetched = bring_repository(
        repository, chosen, context.out, hub=hub, memo=context.memo, outlet=context.outlet, log=context.log,
        report=lambda done, total, task: context.progress(done, total, task=task),
    )  # fmt: skip
    return files, repository.commit, fetched


def _from_directory(params: DownloadParams, folder: Path, context: StageContext) -> Files:
    names = [name for name in _choice(params).of_directory(folder) if name not in _own(params)]
    return bring_directory(
        folder, names, context.out, outlet=context.outlet, log=context.log,
        progress=lambda done, total: context.progress(done, total, task="copy"),
    )  # fmt: skip


def _synthesize(params: DownloadParams, synthetic: Synthetic, context: StageContext) -> Files:
    config, architecture = _made_of(params, synthetic, context)
    saved = write_synthetic(
        config,
        architecture,
        context.out,
        dtype=synthetic.dtype,
        seed=synthetic.seed,
        format=synthetic.format,
        max_shard_size=synthetic.max_shard_size,
        progress=lambda done, total: context.progress(done, total, task="write"),
        journal=context.scratch / "finished",
        outlet=context.outlet,
    )
    return dict(saved.files)
