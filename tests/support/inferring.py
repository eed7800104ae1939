"""Inference over ranks: in this process, with real ranks, and in a process that a test can kill.

python -m support.inferring FOLDER MODEL RANKS FIELDS
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.placement import place
from bigpipe.orchestrator.contract.events import Event
from bigpipe.orchestrator.launch.executors import executor
from bigpipe.orchestrator.launch.jobs import Outcome
from bigpipe.orchestrator.stage import Launch, StageContext, Trust
from bigpipe.plugins import inferring
from bigpipe.plugins.distributed_infer import STAGE, InferMetrics, InferParams
from support.contexts import stage_context
from support.launching import MACHINE, TESTS, make_job


class Reports(list[Any]):
    report = list.append


def context(folder: Path, model: Path, ranks: int = 1, **changes: Any) -> StageContext:
    fields: dict[str, Any] = {
        "node": "generate", "inputs": {"model": (model,)}, "out": folder / "out", "scratch": folder / "scratch",
        "parts": folder / "parts", "memo": folder / "memo", "base": folder, "machine": MACHINE,
        "launch": Launch(num_processes=ranks), "world_size": ranks, "reporter": Reports(),
    }  # fmt: skip
    return stage_context(folder, **{**fields, **changes})


def as_rank(ctx: StageContext, rank: int) -> StageContext:
    folder = ctx.scratch / f"rank-{rank}"
    folder.mkdir(exist_ok=True)
    return replace(ctx, rank=rank, rank_dir=folder)


def infer(parameters: InferParams, ctx: StageContext) -> InferMetrics:
    """All that the launcher does, in this process."""
    inferring.prepare(parameters, ctx)
    for rank in range(ctx.world_size):
        inferring.run(parameters, as_rank(ctx, rank))
    metrics = inferring.finish(parameters, ctx).metrics
    assert isinstance(metrics, InferMetrics)
    return metrics


def results(ctx: StageContext) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ctx.out / "results.jsonl").read_text().splitlines()]


def streaming(folder: Path, model: Path, stays: str = "model.decoder.embed_tokens", **max_memory: int) -> Path:
    """The folder of a placement by which layers are streamed, but for one module."""
    placement = place(model, device_map={"": "disk", stays: "cpu"}, max_memory=max_memory or None)
    assert placement.streamed_bytes_per_token
    (folder / "placement.json").write_text(json.dumps(placement.as_json()))
    return folder


def start(
    folder: Path, model: Path, ranks: int, report: Callable[[Event], object] = bool, placement: Path | None = None,
    **fields: Any,
) -> Outcome:  # fmt: skip
    """placement: the folder of one."""
    folder.mkdir(exist_ok=True)
    placed = {"placement": (placement,)} if placement else {}
    job = make_job(
        folder, stage=STAGE, module="bigpipe.plugins.distributed_infer:STAGE", params=fields, timeout=280,
        report=report, inputs={"model": (model,), **placed}, launch=Launch(num_processes=ranks),
        trust=Trust(modules=("mytasks",)),
        parent_environment={**os.environ, "PYTHONPATH": f"{TESTS.parent / 'src'}:{TESTS}"},
    )  # fmt: skip
    return executor("ranks").start(job)


def main(folder: str, model: str, ranks: str, fields: str) -> None:
    def tell(event: Event) -> None:
        sys.stdout.write(json.dumps(event.as_json()) + "\n")
        sys.stdout.flush()

    start(Path(folder), Path(model), int(ranks), tell, **json.loads(Path(fields).read_bytes()))


if __name__ == "__main__":
    main(*sys.argv[1:])
