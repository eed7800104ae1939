"""How `save` does it, and what lies where at the destination.

    model files     at the root, with a model card (README.md)
    results/        what distributed-infer gave
    reports/        what estimate gave
    provenance.json every step with its parameters, metrics and digests, and the sha256 of every file

The artifact is a receipt. A later run is a hit only while the destination still matches it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.writing.destinations import (
    Destination,
    Directory,
    Inspect,
    Seen,
    Session,
    Stored,
    open_url,
    still_holds,
)
from bigpipe.errors import InvalidCheckpoint
from bigpipe.files import free_space, write_file
from bigpipe.orchestrator.stage import (
    BigpipeError,
    CheckContext,
    Forecast,
    ForecastContext,
    Lineage,
    Misfit,
    StageContext,
    StageFailed,
    StageResult,
    Transient,
    UsageError,
    format_size,
)
from bigpipe.sizes import counted, format_transfer

from .save import SaveMetrics, SaveParams

PROVENANCE = "provenance.json"
SMALL = 10_000_000
"""Bytes of a file that may be read during a plan."""
PROVENANCE_SCHEMA = "bigpipe.provenance/1"
RECEIPT = "receipt.json"
RECEIPT_SCHEMA = "bigpipe.receipt/1"
UNTOLD = frozenset({"files", "fetched_bytes"})
"""Metrics that say nothing about the model."""
TASKS = re.compile(r"[a-z]+(-[a-z]+)+")
"""Names of pipeline tasks on the Hub; a `module:function` is none."""


def destination(params: SaveParams, base: Path, environment: Mapping[str, str], *, offline: bool) -> Destination:
    if params.to.startswith("hf://"):
        from bigpipe.bigmodel.hub.repository import Hub
        from bigpipe.bigmodel.writing.upload import HubRepository

        hub = Hub.from_environment(environment, offline=offline)
        return HubRepository(params.to.removeprefix("hf://").strip("/"), hub, params.revision, params.private)
    if "://" in params.to:
        return open_url(params.to)
    return Directory((base / Path(params.to).expanduser()).resolve())


def check(params: SaveParams, ctx: CheckContext) -> None:
    """Everything about the destination that can be told before the expensive steps."""
    if not any(ctx.inputs.values()):
        raise UsageError("save has nothing to save", "wire at least one of its ports: model, results, reports")
    target = destination(params, ctx.base, ctx.environment, offline=ctx.offline)
    if isinstance(target, Directory):
        _check_place(target.path, ctx.base)
    target.check()
    _check_replaceable(params, target, None)


def _check_place(path: Path, base: Path) -> None:
    """A destination is replaced as a whole, so it must not hold the recipe, or somebody's home."""
    if any(path == kept or path in kept.parents for kept in (base.resolve(), Path.home())):
        raise UsageError(
            f"to: {path} would be replaced as a whole, and it holds the recipe or your home directory",
            "name a directory of its own, such as dist/model",
        )
    if (path / ".git").exists():
        raise UsageError(f"to: {path} is a git repository, and would be replaced as a whole", "name a directory in it")


def _check_replaceable(params: SaveParams, target: Destination, made_by: tuple[str, str] | None) -> None:
    """Refuse to replace what this recipe did not write, or what was changed since. made_by: recipe and node."""
    there = None if params.overwrite else target.listing()
    if not there:
        return
    provenance = _read_provenance(target, there)
    cure = "choose another destination, or write overwrite: true to replace it as a whole"
    if provenance is None:
        raise UsageError(
            f"to: {target.url} is there already, with {counted(len(there), 'file')} that bigpipe did not write", cure
        )
    by = (str(provenance.get("recipe")), str(provenance.get("node")))
    if made_by is not None and by != made_by:
        raise UsageError(f"to: {target.url} was written by node {by[1]} of recipe {by[0]!r}", cure)
    written: dict[str, Any] = provenance.get("files") or {}
    changed = [name for name in there if name != PROVENANCE and not _as_written(params, target, name, there, written)]
    if changed:
        raise UsageError(f"to: {target.url} was changed since it was saved: {', '.join(sorted(changed)[:4])}", cure)


def _as_written(
    params: SaveParams, target: Destination, name: str, there: Mapping[str, Seen], written: Mapping[str, Any]
) -> bool:
    """Small files by digest: an edit may keep the size. Large ones by size; the Hub keeps every version anyway."""
    listed = written.get(name)
    if not isinstance(listed, Mapping) or listed.get("size") != there[name].size:
        return False
    if params.to.startswith("hf://") or there[name].size > SMALL:
        return True
    return target.digest(name) == listed.get("sha256")


def _read_provenance(target: Destination, there: Mapping[str, Seen]) -> dict[str, Any] | None:
    if PROVENANCE not in there or there[PROVENANCE].size > SMALL:
        return None
    try:
        found = json.loads(target.read(PROVENANCE))
    except (OSError, ValueError):
        return None
    is_ours = isinstance(found, dict) and found.get("schema") == PROVENANCE_SCHEMA
    return found if is_ours else None


def forecast(params: SaveParams, ctx: ForecastContext) -> Forecast:
    from bigpipe.bigmodel.checkpoint.description import ModelDescription

    described = ctx.input("model")
    size = described.output.nbytes if described and isinstance(described.output, ModelDescription) else None
    target = None if "://" in params.to else Directory((ctx.base / Path(params.to).expanduser()).resolve())
    if target is None or size is None:
        return Forecast(download_bytes=0, summary=f"to {params.to}")
    existing = next(place for place in target.path.parents if place.exists())
    same_disk = ctx.memo.exists() and ctx.memo.stat().st_dev == existing.stat().st_dev
    free = free_space(existing)
    misfits = []
    if not same_disk and size > free:
        cause = f"{format_transfer(size)} to save, {format_transfer(free)} free at {existing}"
        misfits.append(Misfit(cause, f"free {format_transfer(size - free)} there, or choose another destination"))
    return Forecast(
        download_bytes=0,
        write_bytes=size if same_disk else 0,
        metrics={"url": target.url},
        misfits=tuple(misfits),
        summary=f"{format_transfer(size)} to {params.to}",
    )


def run(params: SaveParams, ctx: StageContext) -> StageResult:
    target = destination(params, ctx.base, ctx.environment, offline=ctx.offline)
    _check_replaceable(params, target, (ctx.recipe_name, ctx.node))
    files = _gather(ctx)
    if "model" in ctx.inputs:
        files["README.md"] = _own_file(ctx, "README.md", _card(params, target, ctx))
    total, done = sum(path.stat().st_size for path in files.values()), 0

    def report(size: int) -> None:
        nonlocal done
        done += size
        ctx.progress(min(done, total), total, task="save")

    with target.session(ctx.scratch, report=report) as session:
        written = _put_all(session, files, ctx)
    receipt = {
        "schema": RECEIPT_SCHEMA,
        "url": written.url,
        "commit": written.commit,
        "files": {
            name: {"sha256": file.sha256, "size": file.size, "mark": file.mark}
            for name, file in sorted(written.files.items())
        },
    }
    write_file(ctx.out / RECEIPT, json.dumps(receipt, indent=2) + "\n")
    ctx.log(f"saved {counted(len(written.files), 'file')} to {written.url}")
    size = sum(file.size for file in written.files.values())
    return StageResult(SaveMetrics(url=written.url, bytes=size, files=len(written.files), commit=written.commit))


def _put_all(session: Session, files: Mapping[str, Path], ctx: StageContext) -> Any:
    """provenance.json last: it holds the digests of the others, and tells that they are all there."""
    digests = {name: session.put(name, path) for name, path in sorted(files.items())}
    listed = {name: {"sha256": sha256, "size": size} for name, (sha256, size) in digests.items()}
    session.put(PROVENANCE, _own_file(ctx, PROVENANCE, _provenance(ctx, listed)))
    return session.finish(inspection(ctx.input("model")) if "model" in ctx.inputs else lambda directory: None)


def inspection(model: Path) -> Inspect:
    """Reads a written checkpoint through its own index, as a loader would, and compares it with the one it was to be.

    Weights that we cannot read ourselves are saved as they are.
    """
    from bigpipe.bigmodel.checkpoint.view import open_checkpoint

    def contents(directory: Path) -> dict[str, Any]:
        opened = open_checkpoint(directory)
        tensors = {name: (tensor.dtype, tensor.shape) for name, tensor in opened.tensors.items()}
        return {**tensors, **opened.tied}

    def inspect(written: Path) -> None:
        try:
            expected = contents(model)
        except InvalidCheckpoint:
            return
        found = contents(written)
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        if wrong:
            raise StageFailed(
                f"what was saved does not read back as the model: {', '.join(wrong[:4])} differ",
                "the disk or another process changed it meanwhile; run again",
            )

    return inspect


def _gather(ctx: StageContext) -> dict[str, Path]:
    """Name at the destination → the file whose bytes go there, links resolved."""
    files: dict[str, Path] = {}
    reports = ctx.inputs.get("reports", ())
    folders = [("results/", path) for path in ctx.inputs.get("results", ())]
    # One report lies directly in reports/, several lie in a folder per node.
    folders += [
        (f"reports/{_node_of(path, i, ctx)}/" if len(reports) > 1 else "reports/", path)
        for i, path in enumerate(reports)
    ]
    folders += [("", path) for path in ctx.inputs.get("model", ())]
    for prefix, folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                files.setdefault(prefix + path.relative_to(folder).as_posix(), path.resolve())
    files.pop(PROVENANCE, None)
    return files


def _node_of(artifact: Path, position: int, ctx: StageContext) -> str:
    """An artifact's directory is named by its digest, which the lineage knows."""
    digest = artifact.name.removeprefix("sha256:")
    nodes = [item.node for item in ctx.lineage if item.digest and item.digest.removeprefix("sha256:") == digest]
    return nodes[-1] if nodes else str(position)


def _own_file(ctx: StageContext, name: str, text: str) -> Path:
    path = ctx.scratch / name
    write_file(path, text, durable=False)
    return path


def _provenance(ctx: StageContext, files: Mapping[str, Any]) -> str:
    steps = [
        {"node": item.node, "kind": item.kind, "key": item.key, "digest": item.digest, "params": dict(item.params),
         "metrics": dict(item.metrics)}
        for item in ctx.lineage
    ]  # fmt: skip
    content = {
        "schema": PROVENANCE_SCHEMA,
        "bigpipe": _version(),
        "recipe": ctx.recipe_name,
        "node": ctx.node,
        "text": ctx.recipe,
        "steps": steps,
        "files": files,
    }
    return json.dumps(content, indent=2) + "\n"


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("bigpipe-ml")
    except metadata.PackageNotFoundError:
        return "from source"


def _card(params: SaveParams, target: Destination, ctx: StageContext) -> str:
    from bigpipe.bigmodel.checkpoint.description import ARCHITECTURE_FILE
    from bigpipe.bigmodel.writing.card import LOADING, Card, front_matter

    model = ctx.input("model")
    source = _last(ctx.lineage, "download")
    quantize = _last(ctx.lineage, "quantize")
    infer = _last(ctx.lineage, "distributed-infer")
    task = str(infer.params.get("task")) if infer else ""
    by_transformers = (model / "config.json").is_file() and not (model / ARCHITECTURE_FILE).exists()
    # Of a directory its name is enough: where it lies on this machine is nobody else's business.
    where = target.path.name if isinstance(target, Directory) else params.to.removeprefix("hf://")
    readme = model / "README.md"
    return Card(
        title=where.rstrip("/").rpartition("/")[2],
        base_model=source.params.get("repo") if source else None,
        source="made-up weights" if source and source.params.get("synthetic") else "a local model",
        commit=source.metrics.get("commit") if source else None,
        scheme=str(quantize.params.get("scheme")) if quantize else None,
        license=front_matter(readme.read_text(errors="replace")).get("license") if readme.is_file() else None,
        library="transformers" if by_transformers else None,
        task=task if TASKS.fullmatch(task) else None,
        loading=LOADING.format(where=where) if by_transformers else "",
        measured=[row for item in ctx.lineage for row in _rows(item)],
        recipe=ctx.recipe,
        recipe_name=ctx.recipe_name,
        version=_version(),
        extra=params.card,
    ).text()


def _last(lineage: tuple[Lineage, ...], kind: str) -> Lineage | None:
    return next((item for item in reversed(lineage) if item.kind == kind), None)


def _rows(item: Lineage) -> list[tuple[str, str, str]]:
    """One row per number, nested ones by their path; only what was measured, not what was estimated."""
    if item.kind == "estimate":
        return []

    def flatten(prefix: str, value: Any) -> Iterator[tuple[str, str, str]]:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield from flatten(f"{prefix}.{key}" if prefix else str(key), inner)
        elif isinstance(value, int | float) and not isinstance(value, bool) and prefix not in UNTOLD:
            yield item.node, prefix, _readable(prefix, value)

    return list(flatten("", item.metrics))


def _readable(name: str, value: float) -> str:
    if re.search(r"bytes|predicted|measured|peak", name):
        return format_size(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def present(params: SaveParams, artifact: Path, ctx: CheckContext) -> bool:
    """Does the destination still hold what the receipt lists? Where it cannot be asked, the receipt is believed."""
    receipt = json.loads((artifact / RECEIPT).read_bytes())
    files = {name: Stored(file["sha256"], file["size"], file["mark"]) for name, file in receipt["files"].items()}
    try:
        return still_holds(destination(params, ctx.base, ctx.environment, offline=ctx.offline), files)
    except Transient:
        return True
    except (BigpipeError, OSError):
        return False
