"""How `distributed-infer` does it: every record exactly once, whatever the ranks.

    prepare   prompts → rows with ids; rows → chunks (fixed once, whatever the ranks); missing chunks → ranks
    run       each rank: its chunks, one batch each, appended to its own log
    finish    the union of all logs, by index → results.jsonl

A chunk is a batch: `batch_size` prompts in their order. Ranks get chunks as accelerate's `split_between_processes`
gives out elements, so the same batches form, and the same bits come out, on any number of ranks and after any crash.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.execution.generation import Answer, Task, check_task, has_tokenizer, make_task
from bigpipe.bigmodel.execution.loading import TOTAL_SHARE, fits_widened
from bigpipe.bigmodel.execution.prompts import Row, read_prompts
from bigpipe.bigmodel.execution.recordlog import Record, RecordLog, read_log
from bigpipe.bigmodel.placement import Placement
from bigpipe.orchestrator.stage import (
    BigpipeError,
    CheckContext,
    DoesNotFit,
    Forecast,
    ForecastContext,
    Misfit,
    StageContext,
    StageFailed,
    StageResult,
    UsageError,
)

from .distributed_infer import InferMetrics, InferParams
from .placed_model import PlacedModel, whole
from .sources import sources_of

if TYPE_CHECKING:
    import torch

RESULTS = "results.jsonl"
LOG = "records.jsonl"
PEAKS = "peaks.json"
COUNTED = ("prompts", "inferring")
"""Unit and task of the progress."""
MEMORY_SHARE = 0.6
"""Of the memory available, what the ranks of one machine may fill with weights cast to another dtype."""
WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}
CUDA_BASE = 3 * 2**30
"""Bytes of CUDA's libraries and pinned buffers in a rank that has GPUs: a bound."""
RANK_BASE = 500 * 2**20
"""Bytes of a rank that has imported torch and transformers and holds no model."""


def check(params: InferParams, ctx: CheckContext) -> None:
    """Prompts, task and trust, before anything is downloaded."""
    check_task(params.task, params.generation, ctx.trust)
    read_prompts(params.prompts, params.column, ctx.base)
    model = next((forecast.output for forecast in ctx.inputs.get("model", ())), None)
    if ":" in params.task or model is None:
        return
    if model.custom is not None:
        raise UsageError(
            f"task {params.task} needs a model of transformers; this one is of the class {model.custom.get('class')}",
            "use the task `module:function` with a function of yours, called (model, rows, **generation)",
        )
    if model.path is not None and _is_whole(model.path) and not has_tokenizer(model.path):
        raise UsageError(
            f"task {params.task} needs a tokenizer, and {model.path} has none",
            "download it with the model (`include`), or use the task `module:function`",
        )


def _is_whole(path: Path) -> bool:
    """Are the weights there too? Before a download, a directory may hold the config alone."""
    return any(True for pattern in ("*.safetensors", "*.bin") for _ in path.glob(pattern))


def forecast(params: InferParams, ctx: ForecastContext) -> Forecast:
    try:
        rows = read_prompts(params.prompts, params.column, ctx.base)
    except UsageError as error:
        return Forecast(unknown=(error.cause,))
    ranks = ctx.launch.num_processes
    batches = -(-len(rows) // params.batch_size)
    counts = [len(_share(len(rows), params.batch_size, rank, ranks)) for rank in range(ranks)]
    placed = ctx.input("placement")
    placement = placed.output if placed is not None and isinstance(placed.output, Placement) else None
    spread = f" ({' + '.join(map(str, counts))})" if 1 < ranks <= 8 else ""
    work = f"{_count(len(rows), 'prompt')} in {_count(batches, 'batch', 'es')} over {_count(ranks, 'rank')}"
    return Forecast(
        download_bytes=0,
        ram=_ram(params, ctx, placement),
        vram=_vram(placed, placement),
        metrics={"prompts": len(rows)},
        misfits=() if placed is not None and placed.misfits else tuple(_misfits(placement, ctx)),
        summary=work + spread,
    )


def _count(number: int, noun: str, ending: str = "s") -> str:
    return f"{number} {noun}{ending if number != 1 else ''}"


def _share(rows: int, batch_size: int, rank: int, ranks: int) -> range:
    """Rows of one rank."""
    first, last = split(-(-rows // batch_size), rank, ranks)
    return range(min(rows, first * batch_size), min(rows, last * batch_size))


def _ram(params: InferParams, ctx: ForecastContext, placement: Placement | None) -> int | None:
    """Of all ranks here. Weights that are windows into their files are page cache, and not counted."""
    wired = ctx.input("model")
    tensors = getattr(wired.output if wired else None, "tensors", None)
    local = ctx.launch.num_processes // ctx.launch.num_machines
    if tensors is None:
        return None
    if ctx.machine.gpus:
        return (RANK_BASE + CUDA_BASE) * local
    homes = set(placement.device_map.values()) if placement else {"cpu"}
    cap = (placement.max_memory.get("cpu") if placement else None) or ctx.machine.memory
    room = min(cap, int(ctx.machine.memory * TOTAL_SHARE))
    wide = params.dtype is None and homes == {"cpu"} and fits_widened(tensors, room)
    wanted = params.dtype or ("float32" if wide else None)
    cast = sum(_cast_bytes(dtype, shape, wanted) for dtype, shape in tensors.values())
    return RANK_BASE * local + min(cast * local, int(ctx.machine.memory_available * MEMORY_SHARE))


def _vram(placed: Forecast | None, placement: Placement | None) -> dict[int, int]:
    """Per GPU: the weights placed there and, where dispatch has said it, the room that generating needs besides."""
    if placed is None or placement is None or placed.misfits:
        return {}
    weights = {device: size for device, size in placement.weights.items() if isinstance(device, int)}
    return {device: max(size, placed.vram.get(device, 0)) for device, size in weights.items()}


def _cast_bytes(stored: str, shape: Sequence[int], wanted: str | None) -> int:
    if wanted is None or stored == wanted or stored not in WIDTHS:
        return 0
    return math.prod(shape) * WIDTHS[wanted]


def _misfits(placement: Placement | None, ctx: ForecastContext) -> list[Misfit]:
    each = PlacedModel(placement).gpus if placement else int(bool(ctx.machine.gpus))
    local = ctx.launch.num_processes // ctx.launch.num_machines
    there = len(ctx.machine.gpus)
    if each * local <= there:
        return []
    fits = there // each
    cure = (
        f"set launch.num_processes to {fits * ctx.launch.num_machines}" if fits else "place the model on cpu and disk"
    )
    return [Misfit(f"{local} ranks with {each} GPU(s) each need {each * local}, and there are {there}", cure)]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be computed, whatever the ranks: row ids and the chunks they form."""

    ids: list[tuple[int, str]]
    chunks: list[list[int]]
    """Row indexes."""

    @classmethod
    def of(cls, rows: Sequence[Row], batch_size: int) -> Plan:
        starts = range(0, len(rows), batch_size)
        return cls(
            ids=[(row.index, row.digest) for row in rows],
            chunks=[[row.index for row in rows[start : start + batch_size]] for start in starts],
        )

    @classmethod
    def read(cls, path: Path) -> Plan:
        data = json.loads(path.read_bytes())
        return cls([(index, digest) for index, digest in data["ids"]], data["chunks"])


def prepare(params: InferParams, ctx: StageContext) -> None:
    """Fixes the rows and chunks, and gives out what no earlier attempt has finished."""
    rows = read_prompts(params.prompts, params.column, ctx.base)
    plan = Plan.of(rows, params.batch_size)
    _write_whole(ctx.scratch / "rows.jsonl", "".join(json.dumps(asdict(row)) + "\n" for row in rows))
    _write_whole(ctx.scratch / "plan.json", json.dumps(asdict(plan)))
    done = finished_chunks(plan, ctx.scratch)
    missing = [chunk for chunk in range(len(plan.chunks)) if chunk not in done]
    if done:
        ctx.log(f"{len(done)} of {len(plan.chunks)} batches were finished before")
    ranks = assign(missing, ctx.launch.num_processes, pad=params.apply_padding)
    _write_whole(ctx.scratch / "assignment.json", json.dumps(ranks))


def split(length: int, rank: int, ranks: int) -> tuple[int, int]:
    """First and behind-last element of a rank's share: accelerate's `split_between_processes`."""
    each, extra = divmod(length, ranks)
    start = rank * each + min(rank, extra)
    return start, start + each + (rank < extra)


def assign(chunks: Sequence[int], ranks: int, *, pad: bool) -> list[list[tuple[int, bool]]]:
    """Per rank, its chunks and whether each is padding: repeats of the last one, until all have as many."""
    shares = [chunks[slice(*split(len(chunks), rank, ranks))] for rank in range(ranks)]
    longest = max(map(len, shares)) if pad else 0
    last = [(chunk, True) for chunk in chunks[-1:]]
    return [[*((chunk, False) for chunk in share), *last * (longest - len(share))] for share in shares]


def gather(plan: Plan, scratch: Path) -> dict[int, Record]:
    """The record of each row that any rank of any attempt wrote; one without an error before one with."""
    ids = dict(plan.ids)
    found: dict[int, Record] = {}
    for log in sorted(scratch.glob(f"rank-*/{LOG}")):
        for record in read_log(log):
            if record.padding or ids.get(record.index) != record.digest:
                continue
            if record.index not in found or found[record.index].failed:
                found[record.index] = record
    return found


def finished_chunks(plan: Plan, scratch: Path) -> set[int]:
    """Chunks with a good record of each of their rows. Rows that failed are tried again."""
    good = {index for index, record in gather(plan, scratch).items() if not record.failed}
    return {number for number, rows in enumerate(plan.chunks) if good.issuperset(rows)}


def run(params: InferParams, ctx: StageContext) -> StageResult:
    """One rank: its chunks, in their order."""
    assignment = json.loads((ctx.scratch / "assignment.json").read_bytes())
    if len(assignment) != ctx.world_size:
        raise StageFailed(
            f"the work was divided for {len(assignment)} ranks, and {ctx.world_size} came up",
            "run it again; `launch.num_processes` says how many there should be",
        )
    mine = assignment[ctx.rank]
    if mine:
        _work(params, ctx, mine)
    return StageResult(InferMetrics())


def _work(params: InferParams, ctx: StageContext, mine: Sequence[tuple[int, bool]]) -> None:
    assert ctx.rank_dir is not None  # noqa: S101  ranks have one
    plan = Plan.read(ctx.scratch / "plan.json")
    rows = [Row(**json.loads(line)) for line in (ctx.scratch / "rows.jsonl").read_text().splitlines()]
    batches = [[rows[index] for index in plan.chunks[chunk]] for chunk, _ in mine]
    errors, done, total = 0, 0, sum(map(len, batches))
    ctx.progress(done, total, *COUNTED)  # before the model loads, so that the sum over ranks is known from the start
    model = _load(params, ctx)
    task = make_task(
        params.task, model, ctx.input("model"), max_new_tokens=params.max_new_tokens, options=params.generation,
        seed=params.seed, sources=sources_of(ctx),
    )  # fmt: skip
    with RecordLog(ctx.rank_dir / LOG) as log:
        for (chunk, padding), batch in zip(mine, batches, strict=True):
            records = _compute(task, batch, chunk, padding, ctx)
            log.append(records)
            _write_whole(ctx.rank_dir / PEAKS, json.dumps(_peaks()))
            errors += sum(record.failed and not padding for record in records)
            _check_errors(errors, records, params.max_errors)
            done += len(batch)
            ctx.progress(done, total, *COUNTED)


def _compute(task: Task, batch: Sequence[Row], chunk: int, padding: bool, ctx: StageContext) -> list[Record]:
    started = time.monotonic()
    answers = answer(task, batch, ctx)
    seconds = (time.monotonic() - started) / len(batch)
    return [
        Record(row.index, row.digest, chunk, made.payload, made.tokens, seconds, padding)
        for row, made in zip(batch, answers, strict=True)
    ]


def _load(params: InferParams, ctx: StageContext) -> torch.nn.Module:
    import psutil

    local_rank = int(os.environ.get("LOCAL_RANK", ctx.rank))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", ctx.world_size))
    model = PlacedModel.read(ctx.input("placement")) if "placement" in ctx.inputs else whole(0 if _has_gpu() else "cpu")
    free = int(psutil.virtual_memory().available * MEMORY_SHARE / local_ranks)
    cap = model.placement.max_memory.get("cpu")
    memory = free if cap is None else min(free, cap)
    return model.load(ctx, dtype=params.dtype, memory=memory, first_gpu=local_rank * model.gpus)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def answer(task: Task, rows: Sequence[Row], ctx: StageContext) -> list[Answer]:
    """The answers of a batch. Where one row breaks it, each is tried alone, and the broken one says why."""
    import torch

    try:
        answers = task(rows)
        for made in answers:
            json.dumps(made.payload, allow_nan=False)
        return answers
    except BigpipeError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise DoesNotFit(
            f"a batch of {len(rows)} does not fit: {str(error).partition(chr(10))[0]}",
            "lower batch_size or max_new_tokens, or place more of the model on cpu or disk",
        ) from error
    except Exception as error:
        if len(rows) > 1:
            return [made for row in rows for made in answer(task, [row], ctx)]
        ctx.log(f"prompt {rows[0].index}: " + "".join(traceback.format_exception(error)), detail=True)
        return [Answer({"error": f"{type(error).__name__}: {error}"})]


def _check_errors(errors: int, records: Sequence[Record], allowed: int) -> None:
    if errors <= allowed:
        return
    index, error = next((record.index, record.payload["error"]) for record in records if record.failed)
    raise StageFailed(
        f"{errors} prompt(s) failed, and max_errors allows {allowed}; prompt {index}: {error}",
        "mend the prompt, or raise max_errors: the results then hold the error in its place",
    )


def _peaks() -> dict[str, int]:
    import resource

    import torch

    peaks = {"cpu": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        used = {gpu: torch.cuda.max_memory_allocated(gpu) for gpu in range(torch.cuda.device_count())}
        peaks |= {str(gpu): size for gpu, size in used.items() if size}
    return peaks


def finish(params: InferParams, ctx: StageContext) -> StageResult:
    """Merges by index: every row once, or the stage fails."""
    plan = Plan.read(ctx.scratch / "plan.json")
    rows = [Row(**json.loads(line)) for line in (ctx.scratch / "rows.jsonl").read_text().splitlines()]
    found = gather(plan, ctx.scratch)
    if missing := [row.index for row in rows if row.index not in found]:
        raise StageFailed(f"{len(missing)} prompts have no result, the first is {missing[0]}", "run it again")
    failed = [found[row.index] for row in rows if found[row.index].failed]
    _check_errors(len(failed), failed, params.max_errors)
    lines = [_line(row, found[row.index].payload) for row in rows]
    digest = _write_whole(ctx.out / RESULTS, "".join(lines))
    return StageResult(_metrics(found, len(failed), ctx), {RESULTS: digest})


def _line(row: Row, payload: Mapping[str, Any]) -> str:
    own = {"index": row.index, "prompt": row.prompt}
    return json.dumps({**own, **payload, **own}, ensure_ascii=False, allow_nan=False) + "\n"


def _metrics(found: Mapping[int, Record], errors: int, ctx: StageContext) -> InferMetrics:
    logs = sorted(ctx.scratch.glob(f"rank-*/{LOG}"))
    busy = [sum(record.seconds for record in read_log(log)) for log in logs]
    peaks: dict[str, int] = {}
    for file in ctx.scratch.glob(f"rank-*/{PEAKS}"):
        for device, size in json.loads(file.read_bytes()).items():
            peaks[device] = max(size, peaks.get(device, 0))
    tokens, longest = sum(record.tokens for record in found.values()), max(busy, default=0.0)
    ranks = max(ctx.launch.num_processes, len(busy))
    return InferMetrics(
        prompts=len(found),
        errors=errors,
        tokens=tokens,
        tokens_per_second=round(tokens / longest, 3) if longest else 0.0,
        idle=round(1 - sum(busy) / (ranks * longest), 4) if longest else 0.0,
        peak=dict(sorted(peaks.items())),
    )


def _write_whole(path: Path, text: str) -> tuple[str, int]:
    """Writes and renames, so that a crash leaves the old file or the new one. Gives (sha256, size)."""
    data = text.encode()
    partial = path.with_name(f".{path.name}.part")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return hashlib.sha256(data).hexdigest(), len(data)
