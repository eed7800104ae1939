"""Writes checkpoints in one pass and constant memory.

    save_checkpoint(source, out)               reshard, convert or cast: byte ranges through reused buffers
    write_checkpoint(out, plans, produce)      one weight file after the other, then the index
        for each plan:
            kept, if an earlier attempt finished it (journal)
            ShardWriter.write(tensor)          reading and computing here, writing and hashing in threads of their own
            ShardWriter.settle                 sync, rename, journal: while the next file is being written
        with several workers, so many files side by side

A file has its final name only once it is whole and on the disk.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from bigpipe.bigmodel.checkpoint.arrivals import Delivery, Uses
from bigpipe.bigmodel.checkpoint.files import Format
from bigpipe.bigmodel.checkpoint.tensors import CASTABLE, SAFETENSORS_NAMES
from bigpipe.bigmodel.checkpoint.view import Checkpoint, open_checkpoint
from bigpipe.errors import DoesNotFit, Interrupted, UsageError
from bigpipe.sizes import format_transfer, size_of

from .casting import is_cast
from .containers import Container, container
from .journal import Journal
from .plans import NAMES, Layout, PlannedTensor, ShardPlan, encode_index, index_file, laid_out, plan_shards
from .ranges import RangeReaders
from .shards import PARTIAL, Lanes, Piece, ShardWriter, write_file
from .sidefiles import carry_side_files, config_with_dtype

__all__ = [
    "Layout", "Meter", "PlannedTensor", "ReportProgress", "SavedCheckpoint", "ShardPlan", "check_space", "convert",
    "plan_conversion", "plan_shards", "planned_bytes", "remove_leftovers", "save_checkpoint", "write_checkpoint",
]  # fmt: skip

_METADATA = {"format": "pt"}
"""Tells other tools that names and shapes are torch's."""
WORKERS = 4
"""Files written side by side at most, one per core: one sha256 is slower than a disk. Each takes about 20 MB."""
Produce = Callable[[PlannedTensor], Iterable[Piece]]
"""Gives a tensor's bytes in pieces. A piece must stay as it is until three more have been taken, of whatever tensor."""
ReportProgress = Callable[[int, int], None]
"""Called with the bytes of tensors done and their total."""


@dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    """What was written: every file, relative to the output, with (hex sha256, size)."""

    files: dict[str, tuple[str, int]] = field(default_factory=dict)
    shards: int = 0
    bytes: int = 0
    """Of the weight files, headers included."""


def write_checkpoint(
    out: str | Path,
    plans: Sequence[ShardPlan],
    produce: Produce,
    *,
    metadata: Mapping[str, str] | None = None,
    format: Format = "safetensors",
    layout: Layout = "sorted",
    progress: ReportProgress | None = None,
    journal: Path | None = None,
    fingerprint: Callable[[str], str] = lambda file: "",
    workers: int = 1,
    delivery: Delivery | None = None,
    settled: Callable[[str], None] = lambda file: None,
) -> SavedCheckpoint:
    """Writes the planned weight files and, where there are several, their index into the directory `out`.

    `produce` is called once per tensor, in the order of the plans; with several `workers`, so many files are written
    side by side, and it is called from as many threads. With a `journal` (a path outside `out`), files that
    an earlier attempt finished are verified and kept, if it was for the same plan and `fingerprint` (of a file's name:
    whatever else its bytes depend on). Weight files of the same naming scheme that are not in the plans are removed.
    A `delivery` hears of weight files as they become whole, `settled` of their names.

    Raises DoesNotFit where the disk is too small, before anything is written if that can be known.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    known = Journal(journal, out, fingerprint)
    containers = [container(plan, format, metadata or _METADATA, layout) for plan in plans]
    remove_leftovers(out, format, {plan.file for plan in plans})
    todo = list(zip(plans, containers, strict=True))
    check_space(out, _needed([file.size for plan, file in todo if not _has_size(out / plan.file, file.size)], delivery))
    if delivery is not None:
        delivery.announce({plan.file: (file.announced, file.size) for plan, file in todo})
    meter = Meter(sum(plan.nbytes for plan in plans), 0, progress)
    writing = _Writing(out, deque(todo), produce, meter, known, delivery, settled)
    writing.run(min(workers, len(todo)))
    files = writing.files
    if len(plans) > 1:
        name = index_file(format)
        files[name] = write_file(out / name, encode_index(plans))
        if delivery is not None:
            delivery.finished(name, *files[name])
    ordered = {plan.file: files.pop(plan.file) for plan in plans}
    return SavedCheckpoint({**ordered, **files}, len(plans), sum(file.size for file in containers))


@dataclass
class _Writing:
    """The files of one checkpoint, written by one or several threads."""

    out: Path
    todo: deque[tuple[ShardPlan, Container]]
    produce: Produce
    meter: Meter
    known: Journal
    delivery: Delivery | None
    settled: Callable[[str], None]
    files: dict[str, tuple[str, int]] = field(default_factory=dict)

    def run(self, workers: int) -> None:
        if workers <= 1:
            self.work()
            return
        with ThreadPoolExecutor(workers, "shard") as pool:
            jobs = [pool.submit(self.work) for _ in range(workers)]
            try:
                for job in as_completed(jobs):
                    job.result()
            except BaseException:
                self.todo.clear()
                self.meter.stop()
                raise

    def work(self) -> None:
        """Writes files until there are none left."""
        with Lanes() as lanes:
            while (following := self._next()) is not None:
                self.write(*following, lanes)

    def _next(self) -> tuple[ShardPlan, Container] | None:
        with suppress(IndexError):  # not `if self.todo`: another thread may take the last one in between
            return self.todo.popleft()
        return None

    def write(self, plan: ShardPlan, file: Container, lanes: Lanes) -> None:
        def settled(sha256: str) -> None:
            self.known.record(plan.file, file, sha256)
            self._done(plan.file, sha256, file.size)

        if (found := self.known.finished(plan.file, file)) is not None:
            self.meter.skip(plan.nbytes)
            self._done(plan.file, *found)
            return
        if self.delivery is not None:
            self.delivery.begin(plan.file)
            if self.delivery.lets_go:
                check_space(self.out, file.size)
        with ShardWriter(self.out / plan.file, file, lanes) as shard:
            for tensor in plan.tensors:
                shard.write(tensor.name, self.meter.count(self.produce(tensor)), tensor.nbytes)
            shard.all_written()
            lanes.settle(lambda: shard.settle(settled))

    def _done(self, file: str, sha256: str, size: int) -> None:
        self.files[file] = sha256, size
        if self.delivery is not None:
            self.delivery.finished(file, sha256, size)
        self.settled(file)


class Meter:
    """Counts bytes as they pass, in any thread; reports ten times a second."""

    def __init__(self, total: int, done: int, report: ReportProgress | None) -> None:
        self.total = total
        self.done = done
        self.report = report
        self._told = 0.0
        self._lock = threading.Lock()
        self._stopped = False

    def stop(self) -> None:
        """Ends the counting in other threads at their next piece."""
        self._stopped = True

    def skip(self, size: int) -> None:
        """Counts what need not be made."""
        self._add(size)

    def count(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            if self._stopped:
                raise Interrupted("another file of this checkpoint could not be written")
            yield piece
            self._add(memoryview(piece).nbytes)

    def _add(self, size: int) -> None:
        with self._lock:
            self.done += size
            now = time.monotonic()
            if self.report is not None and (now - self._told > 0.1 or self.done == self.total):
                self._told = now
                self.report(self.done, self.total)


def remove_leftovers(out: Path, format: Format, planned: set[str]) -> None:
    """Removes weight files and indexes of an earlier save under the same names, and unfinished files."""
    prefix, suffix = NAMES[format].split("{}")
    pattern = re.compile(
        rf"{re.escape(prefix)}(-\d{{5}}-of-\d{{5}})?{re.escape(suffix)}(\.index\.json)?({re.escape(PARTIAL)})?"
    )
    for name in os.listdir(out):
        if pattern.fullmatch(name) and name not in planned:
            (out / name).unlink()


def _needed(sizes: Sequence[int], delivery: Delivery | None) -> int:
    """Bytes that files to be written take at a time: fewer than all of them where they go once they are taken."""
    if delivery is None or not delivery.lets_go:
        return sum(sizes)
    return sum(sorted(sizes)[-delivery.ahead :])


def _has_size(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def check_space(out: Path, needed: int) -> None:
    """Raises DoesNotFit where the disk of `out` has less than `needed` bytes free."""
    disk = os.statvfs(out)
    free = disk.f_bavail * disk.f_frsize
    if needed > free:
        raise DoesNotFit(
            f"{out}: {format_transfer(needed)} are to be written, and the disk has {format_transfer(free)} free",
            f"free {format_transfer(needed - free)} there, or work on another disk",
        )


def save_checkpoint(
    source: str | Path | Checkpoint,
    out: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    dtype: str | None = None,
    format: Format = "safetensors",
    progress: ReportProgress | None = None,
) -> SavedCheckpoint:
    """Reshards, converts or casts a checkpoint into the directory `out`, with its config, tokenizer and other files.

    Reads and writes byte ranges in constant memory, without torch. Aliases of tied weights are dropped in safetensors
    and kept as shared storages in `.bin`. `dtype` changes floating-point tensors only.
    """
    out, limit = Path(out), size_of("max_shard_size", max_shard_size)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    saved = convert(checkpoint, out, max_shard_size=limit, dtype=dtype, format=format, progress=progress)
    config = config_with_dtype(checkpoint.config, dtype) if dtype and checkpoint.config is not None else None
    return SavedCheckpoint(
        {**saved.files, **carry_side_files(checkpoint, out, config=config)}, saved.shards, saved.bytes
    )


def plan_conversion(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    tied: Mapping[str, str],
    *,
    max_shard_size: int,
    dtype: str | None = None,
    format: Format = "safetensors",
) -> list[ShardPlan]:
    """The files that `convert` writes for tensors of these (dtype, shape). UsageError for what cannot be written."""
    if dtype is not None and dtype not in CASTABLE:
        raise UsageError(f"dtype {dtype} cannot be cast to", f"choose one of {', '.join(sorted(CASTABLE))}")
    if format not in NAMES:
        raise UsageError(f"format {format!r} is not known", f"choose one of {', '.join(NAMES)}")
    planned = []
    for name, (stored, shape) in tensors.items():
        kept = dtype if dtype is not None and is_cast(stored, dtype) else stored
        if format == "safetensors" and kept not in SAFETENSORS_NAMES:
            raise UsageError(
                f"tensor {name!r}: safetensors has no {kept}", "write format: bin, or cast the tensor first"
            )
        planned.append(PlannedTensor.of(name, kept, shape))
    return plan_shards(planned, max_shard_size, format, tied)


def planned_bytes(plans: Sequence[ShardPlan], format: Format) -> int:
    """Bytes of the planned weight files, headers included."""
    return sum(container(plan, format, _METADATA, "sorted").size for plan in plans)


def convert(
    checkpoint: Checkpoint,
    out: Path,
    *,
    max_shard_size: int,
    dtype: str | None = None,
    format: Format = "safetensors",
    progress: ReportProgress | None = None,
    journal: Path | None = None,
    delivery: Delivery | None = None,
) -> SavedCheckpoint:
    """Writes a checkpoint's weights anew: `save_checkpoint` without side files.

    `journal` and `delivery` as in `write_checkpoint`.
    """
    _check_apart(checkpoint, out)
    if dtype is not None and "quantization_config" in (checkpoint.config or {}):
        raise UsageError(
            f"{checkpoint.path}: is quantized; its scales must keep their dtype",
            "leave dtype out, or cast before quantizing",
        )
    stored = {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()}
    plans = plan_conversion(stored, checkpoint.tied, max_shard_size=max_shard_size, dtype=dtype, format=format)
    if format == "safetensors":
        # In the order of the file, so that it is hashed in passing.
        plans = [ShardPlan(plan.file, tuple(laid_out(plan, "sorted"))) for plan in plans]
    sources = {plan.file: {checkpoint.tensors[tensor.name].file for tensor in plan.tensors} for plan in plans}

    def fingerprint(file: str) -> str:
        return repr(sorted((source.name, checkpoint.identity(source)) for source in sources[file]))

    with RangeReaders(checkpoint, dtype) as readers:
        arrivals = checkpoint.arrivals
        return write_checkpoint(
            out,
            plans,
            readers.produce,
            metadata={"format": checkpoint.metadata.get("format", "pt")},
            format=format,
            progress=progress,
            journal=journal,
            fingerprint=fingerprint,
            workers=min(WORKERS, cores()),
            delivery=delivery,
            settled=Uses(arrivals, sources, readers.close).settled if arrivals else lambda file: None,
        )


def _check_apart(checkpoint: Checkpoint, out: Path) -> None:
    directory = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    if os.path.realpath(directory) == os.path.realpath(out):
        raise UsageError(
            f"{out}: is where the source is", "write to another directory; a checkpoint is never changed in place"
        )


def cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
