"""How `download` does it: what can be told of a source beforehand, and how a model comes from it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.architecture import class_source, describe_architecture, shrunk
from bigpipe.bigmodel.checkpoint import (
    ARCHITECTURE_FILE,
    MAX_CONFIG,
    AdapterDescription,
    ModelDescription,
    adapter_weights,
    describe_adapter,
    describe_if_single,
    read_json,
)
from bigpipe.bigmodel.hub import (
    Brought,
    Choice,
    DirectorySource,
    Expected,
    Hub,
    HubSource,
    Source,
    Watch,
    describe_pipeline,
)
from bigpipe.bigmodel.writing import SyntheticModel, Traffic, encode_config, planned_bytes, read_shape
from bigpipe.errors import BigpipeError, NotAuthorised, Transient
from bigpipe.files import write_file
from bigpipe.modules import code_files, is_reference, top_level
from bigpipe.orchestrator.stage import CheckContext, Forecast, ForecastContext, PinnedFile, StageContext, StageResult
from bigpipe.sizes import counted, format_transfer

from .download import DownloadMetrics, DownloadParams, Synthetic
from .library import about, is_offline, sources_of
from .wired import Pipeline

if TYPE_CHECKING:
    from .miniatures import Miniature

PIPELINE = "model_index.json"
"""In the root of a folder of several models."""
UNSEEN = (
    f"the repository's {ARCHITECTURE_FILE} names a class, whose source enters no key: write `architecture`, and what "
    "is made with it is made again when it is edited"
)


def listing(params: DownloadParams, context: CheckContext, commit: str) -> dict[str, PinnedFile]:
    """What a repository holds at a commit of the files to take; nothing where it cannot be asked."""
    try:
        chosen = _source(params, context, {"revision": commit}).chosen()
    except (Transient, NotAuthorised):
        return {}
    files = {
        file.path: PinnedFile(file.size, file.sha256, None if file.sha256 else file.blob_id or None) for file in chosen
    }
    own = _own(params, context).items()
    return files | {name: PinnedFile(len(content), hashlib.sha256(content).hexdigest()) for name, content in own}


def only(params: DownloadParams, context: ForecastContext) -> list[str]:
    """The files that are taken of a repository where they may not be all that are asked for."""
    source = _source(params, context, context.pins)
    with suppress(BigpipeError):  # which the check tells
        return source.only() if isinstance(source, HubSource) else []
    return []


def check(params: DownloadParams, context: CheckContext) -> None:
    """Trust, token, gate, and whether a directory is a checkpoint: what would fail later fails now."""
    if params.architecture is not None:
        reference = params.architecture.class_
        with about("architecture.class"):
            context.trust.require_module(reference, f"architecture.class {reference}")
    if params.synthetic is None:
        pins = context.pins if isinstance(context, ForecastContext) else {}
        try:
            _source(params, context, pins).check()
        except Transient:  # of which the forecast tells, and which may have passed when it runs
            if is_offline(context):
                raise


def _source(params: DownloadParams, context: CheckContext | StageContext, pins: Mapping[str, str]) -> Source:
    choice = Choice(**params.choice())
    if params.path is not None:
        return DirectorySource(context.base / params.path, choice, params.subfolder)
    revision, hub = pins.get("revision", params.revision), Hub.of(sources_of(context))
    return HubSource(params.repo or "", revision, choice, hub, params.subfolder)


def source_of_class(params: DownloadParams, base: Path) -> list[Path]:
    """Return the Python files of the class that a directory's own `bigpipe_architecture.json` names; [] without one."""
    with suppress(BigpipeError):  # which the check tells
        if told := _came_along(params, base):
            return [file for _, file in code_files(top_level(told["class"]), base)]
    return []


def _came_along(params: DownloadParams, base: Path) -> dict[str, Any] | None:
    """What `bigpipe_architecture.json` says that lies in the directory and is taken, where it names a class."""
    told = _lies_there(params, base)
    return told if told and is_reference(str(told.get("class"))) else None


def _lies_there(params: DownloadParams, base: Path) -> dict[str, Any] | None:
    if params.path is None or params.miniature:
        return None
    source = DirectorySource(base / params.path, Choice(**params.choice()), params.subfolder)
    file = source.folder / ARCHITECTURE_FILE
    if not os.path.isfile(file) or ARCHITECTURE_FILE not in {each.path for each in source.chosen()}:
        return None
    return read_json(file, source.folder, MAX_CONFIG)


def _asked(params: DownloadParams, base: Path) -> dict[str, Any]:
    """The class that is asked for, and how the weights that lie in the directory are packed, if they are."""
    assert params.architecture is not None  # noqa: S101  the caller looked
    packed = {name: told for name, told in (_lies_there(params, base) or {}).items() if name == "quantization_config"}
    return {**params.architecture.model_dump(by_alias=True), **packed}


def _custom(params: DownloadParams, context: CheckContext | StageContext) -> dict[str, Any] | None:
    """What `bigpipe_architecture.json` says, where the model's class is the user's own. With the digest of its source
    the artifact becomes another one when the class is edited, and so does all that is made with it."""
    given = params.architecture
    told = _came_along(params, context.base) if given is None else _asked(params, context.base)
    if told is None or (given is None and not context.trust.allows_module(told["class"])):
        return None
    return {**told, "source": f"sha256:{class_source(told['class'], context.base)}"}


def _own(params: DownloadParams, context: CheckContext | StageContext) -> dict[str, bytes]:
    """Files of the artifact that come from the params, and from what they lead to."""
    custom = _custom(params, context)
    return {ARCHITECTURE_FILE: encode_config(custom)} if custom else {}


def forecast(params: DownloadParams, context: ForecastContext) -> Forecast:
    try:
        found = _forecast_of(params)(params, context)
    except (Transient, NotAuthorised) as error:
        found = Forecast(vram={}, unknown=(f"size of {params.repo}: {error.cause}",), summary="size not known")
    described = (_describe(context.artifact) if context.artifact else None) or found.output
    if isinstance(described, ModelDescription) and (custom := _custom(params, context)) is not None:
        described = replace(described, custom=custom)
    return replace(found, output=described)


def _forecast_of(params: DownloadParams) -> Callable[[DownloadParams, ForecastContext], Forecast]:
    if params.miniature:
        return _forecast_miniature
    return _forecast_synthetic if params.synthetic else _forecast_source


def _miniature(params: DownloadParams, context: CheckContext | StageContext, pins: Mapping[str, str]) -> Miniature:
    from .miniatures import miniature  # of recipes that are only tried

    with about("repo" if params.repo else "path"):
        return miniature(_source(params, context, pins), sources_of(context))


def require_miniature(params: DownloadParams, context: ForecastContext) -> None:
    """Raise UsageError where no small model can be made of it; as the source where that cannot be asked."""
    _miniature(params, context, context.pins)


def small_synthetic(params: DownloadParams, context: ForecastContext) -> Synthetic:
    """What it makes up, made small, in several files where there were some."""
    assert params.synthetic is not None  # noqa: S101  the caller looked
    written, whole = params.synthetic, _synthetic(params, context)
    small = written.model_copy(update={"config": shrunk(whole.given, whole.architecture.config)})
    if written.max_shard_size >= (whole.description.nbytes or 0):
        return small
    size = _synthetic(params.model_copy(update={"synthetic": small}), context).description.nbytes or 0
    return small.model_copy(update={"max_shard_size": max(size // 2, 1)})


def _forecast_miniature(params: DownloadParams, context: ForecastContext) -> Forecast:
    return _miniature(params, context, context.pins).forecast(context.pins.get("revision"))


def _describe(artifact: Path) -> ModelDescription | AdapterDescription | Pipeline | None:
    if (artifact / PIPELINE).is_file():
        return Pipeline(describe_pipeline(artifact))
    if adapter_weights([path.name for path in artifact.iterdir()]):
        return describe_adapter(artifact)
    return describe_if_single(artifact)


def _forecast_source(params: DownloadParams, context: ForecastContext) -> Forecast:
    expected = _source(params, context, context.pins).expect()
    own = {name: len(content) for name, content in _own(params, context).items()}
    sizes = {**expected.sizes, **own}
    total, copied = sum(sizes.values()), expected.cache is None
    metrics = {"bytes": total, "files": len(sizes), "commit": expected.commit}
    cached = "" if expected.missing else ", all in the Hub cache"
    remote = f"{counted(len(sizes), 'file')}, {format_transfer(total)}{cached}"
    return Forecast(
        vram={},
        download_bytes=expected.missing,
        write_bytes=total if copied else sum(own.values()),
        file_bytes=expected.largest_passing if copied else 0,
        fetches_to=expected.cache,
        metrics={**metrics, "fetched_bytes": 0} if copied else metrics,
        output=_foreseen(params, expected, context) if PIPELINE in sizes else expected.description,
        misfits=expected.misfits,
        unknown=(f"left out: {expected.lacking}",) if expected.lacking else (),
        summary=f"{format_transfer(total)} copied from {params.path}" if copied else remote,
    )


def _foreseen(params: DownloadParams, expected: Expected, context: ForecastContext) -> Pipeline:
    if params.path is not None:
        folder = context.base / params.path / (params.subfolder or "")
        return Pipeline(describe_pipeline(folder, Choice(**params.choice()), expected.sizes))
    found = expected.description
    return Pipeline(found if isinstance(found, ModelDescription) else ModelDescription(config=None))


def _forecast_synthetic(params: DownloadParams, context: ForecastContext) -> Forecast:
    model = _synthetic(params, context)
    sizes = [planned_bytes([plan]) for plan in model.plans]
    return Forecast(
        vram={},
        download_bytes=0,
        write_bytes=sum(sizes),
        file_bytes=max(sizes),
        metrics={"fetched_bytes": 0, "commit": None},
        output=model.description,
        summary=f"{format_transfer(sum(sizes))} made up, in {counted(len(sizes), 'file')}",
    )


def _synthetic(params: DownloadParams, context: CheckContext | StageContext) -> SyntheticModel:
    assert params.synthetic is not None  # noqa: S101  the caller looked
    config, library = read_shape(params.synthetic.config, context.base), params.library_name
    sources = sources_of(context)
    architecture = describe_architecture(config, library_name=library, custom=_custom(params, context), sources=sources)
    return SyntheticModel(config, architecture, **params.synthetic.model_dump(exclude={"config"}))


def run(params: DownloadParams, context: StageContext) -> StageResult:
    own = {name: write_file(context.out / name, content) for name, content in _own(params, context).items()}

    def report(done: int, total: int, task: str = "write") -> None:
        context.progress(done, total, task=task)

    if params.synthetic is not None:
        journal, traffic = context.scratch / "finished", Traffic(report, context.outlet)
        saved = _synthetic(params, context).write(context.out, journal=journal, traffic=traffic)
        brought = Brought(files=dict(saved.files))
    elif params.miniature:
        watch = Watch(report=report, outlet=context.outlet, log=context.log)
        brought = _miniature(params, context, context.pins).bring(context.out, context.scratch, watch)
    else:
        watch = Watch(report=report, outlet=context.outlet, log=context.log)
        brought = _source(params, context, context.pins).bring(context.out, watch, skip=own)
    if params.repo is not None and ARCHITECTURE_FILE in brought.files:
        context.log(UNSEEN)
    files = {**brought.files, **own}
    size, commit = sum(size for _, size in files.values()), brought.commit
    metrics = DownloadMetrics(bytes=size, files=len(files), fetched_bytes=brought.fetched_bytes, commit=commit)
    return StageResult(metrics, files, type="adapter" if adapter_weights(files) else "")
