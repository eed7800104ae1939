"""How `download` does it: what can be told of a source beforehand, and how a model comes from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.architecture import Architecture, describe_architecture
from bigpipe.bigmodel.checkpoint.description import ARCHITECTURE_FILE, ModelDescription, describe_checkpoint
from bigpipe.bigmodel.checkpoint.files import MAX_CONFIG, read_json
from bigpipe.bigmodel.hub.heads import are_the_model, directory_heads, may_pass, repository_heads
from bigpipe.bigmodel.hub.remote import describe_repository
from bigpipe.bigmodel.hub.repository import Hub, HubFile, Repository, check_access, describe, resolve_commit
from bigpipe.bigmodel.hub.selection import check_index, detect, select
from bigpipe.bigmodel.hub.snapshot import Fetched, fetch, missing_bytes
from bigpipe.bigmodel.writing.conversion import planned_bytes
from bigpipe.bigmodel.writing.synthetic import plan_synthetic, synthetic_description, write_synthetic
from bigpipe.files import copy_file, free_space, link, make_directory, write_file
from bigpipe.orchestrator.stage import (
    BigpipeError,
    CheckContext,
    Forecast,
    ForecastContext,
    Misfit,
    NotAuthorised,
    Pinned,
    PinnedFile,
    StageContext,
    StageResult,
    Transient,
    UsageError,
)
from bigpipe.sizes import counted, format_transfer

from .download import CustomClass, DownloadMetrics, DownloadParams, Synthetic
from .sources import sources_of

Files = dict[str, tuple[str, int]]
"""Relative path → (hex sha256, size)."""


def pin(params: DownloadParams, ctx: CheckContext) -> Pinned | None:
    """The commit that a branch or tag means now."""
    hub = Hub.from_environment(ctx.environment, offline=ctx.offline)
    commit = resolve_commit(params.repo or "", params.revision, hub=hub, memo=ctx.memo)
    return Pinned({"revision": commit}, f"{hub.endpoint}, just now", lambda: listing(params, ctx, commit))


def listing(params: DownloadParams, ctx: CheckContext, commit: str) -> dict[str, PinnedFile]:
    """What a repository holds at a commit of the files to take; nothing where it cannot be asked."""
    hub = Hub.from_environment(ctx.environment, offline=ctx.offline)
    try:
        repository = describe(params.repo or "", commit, hub=hub, memo=ctx.memo)
    except (Transient, NotAuthorised):
        return {}
    chosen = _chosen_remotely(repository, params)
    files = {file.path: PinnedFile(file.size, file.sha256, None if file.sha256 else file.blob_id) for file in chosen}
    if content := _class_file(params):
        files[ARCHITECTURE_FILE] = PinnedFile(len(content), hashlib.sha256(content).hexdigest())
    return files


def check(params: DownloadParams, ctx: CheckContext) -> None:
    """Trust, token, gate, and whether a directory is a checkpoint: what would fail later fails now."""
    if params.architecture is not None:
        ctx.trust.require_module(params.architecture.class_, f"architecture.class {params.architecture.class_}")
    if params.path is not None:
        folder = ctx.base / params.path
        if detect(_chosen_locally(params, folder)) != "diffusers":
            describe_checkpoint(folder)
    if params.repo is not None and not ctx.offline:
        try:
            check_access(params.repo, hub=Hub.from_environment(ctx.environment))
        except Transient:
            return  # the forecast tells what is not known, and the run may go on from the Hub cache


def forecast(params: DownloadParams, ctx: ForecastContext) -> Forecast:
    found = Forecast()
    if params.repo is not None:
        found = _forecast_repository(params, ctx)
    elif params.path is not None:
        found = _forecast_directory(params, ctx)
    elif params.synthetic is not None:
        found = _forecast_synthetic(params, params.synthetic, ctx)
    if ctx.artifact is not None:
        found = replace(found, output=_description_of(ctx.artifact) or found.output)
    return replace(found, output=_with_class(found.output, params))


def _forecast_repository(params: DownloadParams, ctx: ForecastContext) -> Forecast:
    hub = Hub.from_environment(ctx.environment, offline=ctx.offline)
    try:
        repository = describe(params.repo or "", ctx.pins.get("revision", params.revision), hub=hub, memo=ctx.memo)
    except (Transient, NotAuthorised) as error:
        return Forecast(unknown=(f"size of {params.repo}: {error.cause}",), summary="size not known")
    files = _chosen_remotely(repository, params)
    missing = missing_bytes(repository, files, hub)
    sizes = {**{file.path: file.size for file in files}, **_class_sizes(params)}
    total = sum(sizes.values())
    return Forecast(
        download_bytes=missing,
        write_bytes=sum(_class_sizes(params).values()),
        fetches_to=hub.cache,
        metrics={"bytes": total, "files": len(sizes), "commit": repository.commit},
        output=_describe_repository(repository, params, hub, ctx),
        misfits=tuple(_cache_misfits(missing, hub)),
        summary=f"{counted(len(sizes), 'file')}, {format_transfer(total)}{'' if missing else ', all in the Hub cache'}",
    )


def _describe_repository(
    repository: Repository, params: DownloadParams, hub: Hub, ctx: ForecastContext
) -> ModelDescription | None:
    """From the config, the index and the headers of the weights, by HTTP range; no weights move."""
    if params.include or params.exclude:
        return None  # what these leave is described once it is here
    library = params.library_name
    try:
        found = describe_repository(repository.repo, repository.commit, hub=hub, memo=ctx.memo, library=library)
    except (Transient, NotAuthorised, UsageError):
        return None
    return found.description


def _cache_misfits(missing: int, hub: Hub) -> list[Misfit]:
    """The Hub cache may lie on another disk than the store, so its space is looked at here."""
    free = free_space(hub.cache)
    if missing <= free:
        return []
    cause = f"{format_transfer(missing)} to download, {format_transfer(free)} free for the Hub cache {hub.cache}"
    return [Misfit(cause, f"free {format_transfer(missing - free)} there, or set HF_HOME to a larger disk")]


def _forecast_directory(params: DownloadParams, ctx: ForecastContext) -> Forecast:
    folder = ctx.base / (params.path or "")
    names = _chosen_locally(params, folder)
    sizes = {**{name: (folder / name).stat().st_size for name in names}, **_class_sizes(params)}
    return Forecast(
        download_bytes=0,
        write_bytes=sum(sizes.values()),
        file_bytes=_largest_passing(names, sizes),
        metrics={"bytes": sum(sizes.values()), "files": len(sizes), "fetched_bytes": 0, "commit": None},
        output=_description_of(folder),
        summary=f"{format_transfer(sum(sizes.values()))} copied from {params.path}",
    )


def _largest_passing(names: Sequence[str], sizes: Mapping[str, int]) -> int:
    """Bytes of the largest weight file, where these pass on one by one."""
    return max((sizes[name] for name in may_pass(names)), default=0)


def _forecast_synthetic(params: DownloadParams, synthetic: Synthetic, ctx: ForecastContext) -> Forecast:
    config, architecture = _read_synthetic(params, synthetic, ctx)
    described = synthetic_description(config, architecture, dtype=synthetic.dtype, format=synthetic.format)
    plans = plan_synthetic(described, synthetic.max_shard_size)
    size = planned_bytes(plans, synthetic.format)
    return Forecast(
        download_bytes=0,
        write_bytes=size,
        file_bytes=max(planned_bytes([plan], synthetic.format) for plan in plans),
        metrics={"fetched_bytes": 0, "commit": None},
        output=described,
        summary=f"{format_transfer(size)} made up, in {counted(len(plans), 'file')}",
    )


def _read_synthetic(
    params: DownloadParams, synthetic: Synthetic, ctx: ForecastContext | StageContext
) -> tuple[dict[str, Any], Architecture]:
    """The config, from its file where it is one, and what its class consists of."""
    config = synthetic.config
    if isinstance(config, str):
        file = ctx.base / config
        if not file.is_file():
            raise UsageError(f"synthetic.config: there is no file {file}", "relative paths start at the manifest")
        config = read_json(file, file.parent, MAX_CONFIG)
    custom = _class_description(params.architecture) if params.architecture else None
    architecture = describe_architecture(
        config,
        library_name=params.library_name,
        custom=custom,
        sources=sources_of(ctx),
    )
    return config, architecture


def _description_of(folder: Path) -> ModelDescription | None:
    """None for what has no single checkpoint to describe, such as a diffusers pipeline."""
    try:
        return describe_checkpoint(folder)
    except UsageError:
        return None


def _with_class(description: ModelDescription | None, params: DownloadParams) -> ModelDescription | None:
    if description is None or params.architecture is None:
        return description
    return replace(description, custom=_class_description(params.architecture))


def _class_description(architecture: CustomClass) -> dict[str, Any]:
    return {
        "class": architecture.class_,
        "config": architecture.config,
        "no_split_module_classes": architecture.no_split_module_classes,
        "tokenizer": architecture.tokenizer,
    }


def _class_file(params: DownloadParams) -> bytes | None:
    """What `bigpipe_architecture.json` holds, where the model's class is the user's own."""
    if params.architecture is None:
        return None
    return (json.dumps(_class_description(params.architecture), indent=2, sort_keys=True) + "\n").encode()


def _class_sizes(params: DownloadParams) -> dict[str, int]:
    content = _class_file(params)
    return {} if content is None else {ARCHITECTURE_FILE: len(content)}


def _chosen_remotely(repository: Repository, params: DownloadParams) -> list[HubFile]:
    names = [file.path for file in repository.files]
    library = params.library_name or detect(names, hint=repository.library)
    chosen = set(select(names, include=params.include, exclude=params.exclude, library=library))
    return [file for file in repository.files if file.path in chosen]


def _chosen_locally(params: DownloadParams, folder: Path) -> list[str]:
    if not folder.is_dir():
        raise UsageError(f"path: there is no directory {folder}", "relative paths start at the manifest's directory")
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return select(names, include=params.include, exclude=params.exclude, library=params.library_name)


def run(params: DownloadParams, ctx: StageContext) -> StageResult:
    commit, fetched = None, 0
    files: Files = {}
    if params.repo is not None:
        commit, fetched, files = _from_hub(params, ctx)
    elif params.path is not None:
        files = _from_directory(params, ctx.base / params.path, ctx)
    elif params.synthetic is not None:
        files = _synthesize(params, params.synthetic, ctx)
    for name in files:
        if name.endswith(".index.json"):
            check_index(files, name, json.loads((ctx.out / name).read_bytes()))
    files |= _write_class(params, ctx.out)
    size = sum(size for _, size in files.values())
    return StageResult(DownloadMetrics(bytes=size, files=len(files), fetched_bytes=fetched, commit=commit), files)


def _from_hub(params: DownloadParams, ctx: StageContext) -> tuple[str, int, Files]:
    hub = Hub.from_environment(ctx.environment, offline=ctx.offline)
    repository = describe(params.repo or "", ctx.pins.get("revision", params.revision), hub=hub, memo=ctx.memo)
    chosen = _chosen_remotely(repository, params)
    for misfit in _cache_misfits(missing_bytes(repository, chosen, hub), hub):
        raise misfit.error()
    ctx.log(f"{repository.repo} at {repository.commit}: {counted(len(chosen), 'file')}")

    def report(done: int, total: int, task: str) -> None:
        ctx.progress(done, total, task=task)

    weights = may_pass(file.path for file in chosen) if ctx.outlet.waited_for else []
    snapshot = fetch(
        repository, [file for file in chosen if file.path not in weights], hub=hub, memo=ctx.memo, report=report
    )
    files, fetched = _link_all(snapshot.files, ctx.out), snapshot.fetched_bytes
    if weights:
        coming = [file for file in chosen if file.path in weights]
        _announce(params, weights, lambda: repository_heads(repository, coming, hub), ctx)

        def arrived(name: str, file: Fetched) -> None:
            files.update(_link_all({name: file}, ctx.out))
            ctx.outlet.finished(name, file.sha256, file.size)

        snapshot = fetch(repository, coming, hub=hub, memo=ctx.memo, report=report, arrived=arrived)
        fetched += snapshot.fetched_bytes
    return repository.commit, fetched, {file.path: files[file.path] for file in chosen}


def _link_all(found: Mapping[str, Fetched], out: Path) -> Files:
    for name, file in found.items():
        make_directory((out / name).parent)
        link(file.path, out / name)
    return {name: (file.sha256, file.size) for name, file in found.items()}


def _announce(
    params: DownloadParams,
    weights: Sequence[str],
    heads: Callable[[], Mapping[str, tuple[bytes, int]]],
    ctx: StageContext,
) -> None:
    """Tells who waits for these files what is coming.

    Where that cannot be known beforehand nobody is told anything: consumers then start when all is here.
    """
    if not ctx.outlet.waited_for or not are_the_model(weights, ctx.out):
        return
    _write_class(params, ctx.out)
    try:
        ctx.outlet.announce(heads())
    except BigpipeError as error:
        ctx.log(f"what follows starts when all files are here: {error.cause}")


def _from_directory(params: DownloadParams, folder: Path, ctx: StageContext) -> Files:
    names = _chosen_locally(params, folder)
    total, done = sum((folder / name).stat().st_size for name in names), 0

    def progress(size: int) -> None:
        nonlocal done
        done += size
        ctx.progress(done, total, task="copy")

    weights = may_pass(names) if ctx.outlet.waited_for else []
    files = {name: copy_file(folder / name, ctx.out / name, progress=progress) for name in names if name not in weights}
    _announce(params, weights, lambda: directory_heads(folder, weights), ctx)
    for name in weights:
        ctx.outlet.begin(name)
        files[name] = copy_file(folder / name, ctx.out / name, progress=progress)
        ctx.outlet.finished(name, *files[name])
    return {name: files[name] for name in names}


def _synthesize(params: DownloadParams, synthetic: Synthetic, ctx: StageContext) -> Files:
    config, architecture = _read_synthetic(params, synthetic, ctx)
    _write_class(params, ctx.out)
    saved = write_synthetic(
        config,
        architecture,
        ctx.out,
        dtype=synthetic.dtype,
        seed=synthetic.seed,
        format=synthetic.format,
        max_shard_size=synthetic.max_shard_size,
        progress=lambda done, total: ctx.progress(done, total, task="write"),
        journal=ctx.scratch / "finished",
        outlet=ctx.outlet,
    )
    return dict(saved.files)


def _write_class(params: DownloadParams, out: Path) -> Files:
    content = _class_file(params)
    return {} if content is None else {ARCHITECTURE_FILE: write_file(out / ARCHITECTURE_FILE, content)}
