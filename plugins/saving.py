"""How `save` does it: the library publishes, this says what and where. The artifact is the receipt.

A later run is a hit only while the destination still matches the receipt.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

from bigpipe.bigmodel.publishing import RECEIPT, Destination, Directory, Receipt, is_present, open_destination
from bigpipe.errors import StageFailed, UsageError
from bigpipe.files import existing, free_space, write_file
from bigpipe.fit import Misfit
from bigpipe.orchestrator.stage import CheckContext, Forecast, ForecastContext, StageContext, StageResult
from bigpipe.sizes import counted, format_transfer

from .library import about, made_by, sources_of
from .save import SaveMetrics, SaveParams

if TYPE_CHECKING:
    from bigpipe.bigmodel.publishing import Contents


def _destination(params: SaveParams, context: CheckContext | StageContext) -> Destination:
    return open_destination(params.to, sources_of(context), revision=params.revision, private=params.private)


def check(params: SaveParams, context: CheckContext) -> None:
    """Everything about the destination that can be told before the expensive steps."""
    from bigpipe.bigmodel.publishing import check_destination

    if not any(context.inputs.values()):
        raise UsageError("save has nothing to save", "wire at least one of its ports: model, results, reports")
    if params.card and not context.inputs.get("model"):
        cure = "wire inputs: model, or leave it out"
        raise UsageError("card is the metadata of a model card, and no model is saved", cure, field="card")
    target = _destination(params, context)
    with about("to"):
        maker = (context.recipe_name, context.node) if context.node else None
        check_destination(target, base=context.base, overwrite=params.overwrite, maker=maker)
    if context.inputs.get("model") and (card := _foreseen_card(params, context)):
        target.check_card(card)


def _foreseen_card(params: SaveParams, context: CheckContext) -> str:
    from bigpipe.bigmodel.checkpoint import ModelDescription  # not for `present`, which every run asks
    from bigpipe.bigmodel.publishing import foreseen_card

    described = context.described("model", ModelDescription)
    return foreseen_card(described.path if described else None, params.card)


def writes(params: SaveParams, context: ForecastContext) -> dict[str, list[str]]:
    return {"to": _destination(params, context).names()}


def forecast(params: SaveParams, context: ForecastContext) -> Forecast:
    from bigpipe.bigmodel.checkpoint import ModelDescription  # not for `present`, which every run asks

    described = context.described("model", ModelDescription)
    size = described.nbytes if described else None
    target = None if "://" in params.to else _destination(params, context)
    if size is None:
        unknown = ("size of what is saved: what is wired is not known yet",)
        return Forecast(download_bytes=0, vram={}, summary=f"to {params.to}", unknown=unknown)
    if not isinstance(target, Directory):
        return Forecast(download_bytes=0, write_bytes=0, vram={}, summary=f"{format_transfer(size)} to {params.to}")
    here, store = existing(target.path.parent), existing(context.memo)
    same_disk = store.stat().st_dev == here.stat().st_dev
    return Forecast(
        download_bytes=0,
        vram={},
        write_bytes=size if same_disk else 0,
        metrics={"url": target.url},
        misfits=() if same_disk else _misfits(size, here),
        summary=f"{format_transfer(size)} to {params.to}",
    )


def _misfits(size: int, place: Path) -> tuple[Misfit, ...]:
    """Of a disk that is not the store's, whose room the engine knows."""
    free = free_space(place)
    if size <= free:
        return ()
    cause = f"{format_transfer(size)} to save, {format_transfer(free)} free at {place}"
    return (Misfit(cause, f"free {format_transfer(size - free)} there, or choose another destination"),)


def run(params: SaveParams, context: StageContext) -> StageResult:
    from bigpipe.bigmodel.publishing import Provenance, Step, publish

    told = [step.name for step in fields(Step)]
    steps = tuple(
        Step(**{name: value for name, value in asdict(item).items() if name in told}) for item in context.lineage
    )
    receipt = publish(
        _contents(context),
        _destination(params, context),
        Provenance(
            recipe=context.recipe_name,
            node=context.node,
            model=made_by(context, context.input("model")) if context.inputs.get("model") else "",
            text=context.recipe,
            steps=steps,
            params=context.recipe_params,
            git=context.git,
        ),
        scratch=context.scratch,
        card=params.card,
        overwrite=params.overwrite,
        progress=lambda done, total: context.progress(done, total, task="save"),
    )
    write_file(context.out / RECEIPT, receipt.text())
    context.log(f"saved {counted(len(receipt.files), 'file')} to {receipt.url}")
    metrics = SaveMetrics(url=receipt.url, bytes=receipt.bytes, files=len(receipt.files), commit=receipt.commit)
    return StageResult(metrics)


def _contents(context: StageContext) -> Contents:
    from bigpipe.bigmodel.publishing import Contents

    single = {port: context.input(port) for port in ("model", "results") if context.inputs.get(port)}
    reports = enumerate(context.inputs.get("reports", ()))
    named = {made_by(context, path) or str(number): path for number, path in reports}
    return Contents(model=single.get("model"), results=single.get("results"), reports=named)


def present(params: SaveParams, artifact: Path, context: CheckContext) -> bool:
    """Does the destination still hold what the receipt lists?"""
    try:
        return is_present(_destination(params, context), Receipt.read(artifact))
    except (StageFailed, UsageError):  # of a receipt that is damaged, an address that leads nowhere
        return False
