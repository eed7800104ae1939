"""Writes the weight files of a checkpoint in one pass and constant memory: whatever it is made of, and however.

    write_checkpoint(out, plans, produce)      planned files, then their index
    prepare                                    no weights of an earlier save are left, whatever becomes of this one
    beside                                     config and tokenizer: they are there before the weights are whole
    write_files(files, finished)               for each file, in one or several threads:
        Finished.find                          kept, if an earlier attempt or run finished it
        OutputFile.content                     its tensors, and who produces their bytes
        ShardWriter.write                      producing here, writing and hashing in threads of their own
        Finished.note, FileWriter.settle       its sha256 is noted, then it is synced and has its name

A file has its final name only once it is whole and on the disk.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from bigpipe.bigmodel.checkpoint import Uses
from bigpipe.errors import Interrupted
from bigpipe.files import explained, is_partial, make_directory, require_space, write_file
from bigpipe.passing import NOBODY, OpenInlet, Outlet
from bigpipe.sizes import counted, format_transfer

from .containers import METADATA, Container, container
from .finished import Finished, key_of
from .plans import PlannedTensor, ShardPlan, encode_index, index_file, is_ours
from .shards import Lanes, Piece, ShardWriter

Produce = Callable[[PlannedTensor], Iterable[Piece]]
"""Gives a tensor's bytes in pieces. A piece must stay as it is until three more have been taken, of whatever tensor."""
ReportProgress = Callable[[int, int], None]
"""Called with the bytes of tensors done and their total."""
Settle = Callable[[], None]
Files = dict[str, tuple[str, int]]
"""Path relative to the output → (hex sha256, size)."""
WriteBeside = Callable[[], Files]
"""Writes what lies beside the weights: config, tokenizer and the like."""


@dataclass(frozen=True, slots=True, repr=False)
class SavedCheckpoint:
    files: Files = field(default_factory=dict)
    shards: int = 0
    bytes: int = 0
    """Of the weight files, headers included."""

    def __repr__(self) -> str:
        return f"<SavedCheckpoint: {counted(self.shards, 'shard')}, {format_transfer(self.bytes)}>"


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One weight file to be written."""

    name: str
    nbytes: int
    """Of its tensors; where they are known only once they are made, nearly."""
    key: Callable[[], str]
    """Digest of everything its bytes depend on. May wait for what the file is made of, as `content` may."""
    content: Callable[[], tuple[Container, Produce]]
    """The file, and who produces the bytes of its tensors."""
    sources: frozenset[Path] = frozenset()
    """The files it is made of."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Who else has to do with the files of a checkpoint while they are written."""

    progress: ReportProgress | None = None
    outlet: Outlet = NOBODY
    """Hears of weight files as they become whole."""
    inlet: OpenInlet | None = None
    """Where the files come from that they are made of, if those are still being made."""
    close: Callable[[Path], None] = lambda file: None
    """Told, from any thread, of each of those that nobody reads any more."""


ALONE = Traffic()


def write_checkpoint(
    out: str | Path,
    plans: Sequence[ShardPlan],
    produce: Produce,
    *,
    metadata: Mapping[str, str] = METADATA,
    journal: Path | None = None,
    fingerprint: Callable[[str], str] = lambda file: "",
    workers: int = 1,
    sources: Mapping[str, Iterable[Path]] = MappingProxyType({}),
    traffic: Traffic = ALONE,
    beside: WriteBeside = dict,
) -> SavedCheckpoint:
    """Write the planned weight files and, where there are several, their index into the directory `out`.

    `produce` is called once per tensor, file by file in the order of their bytes; with several `workers`, so many files
    are written side by side, and it is called from as many threads. With a `journal` (a directory outside `out`), files
    that an earlier attempt finished are verified and kept, if it was for the same plan and `fingerprint` (of a file's
    name: whatever else its bytes depend on). The weights of an earlier save are removed before anything is written, so
    that one which is broken off leaves none that could be taken for a model. sources: file name → the files that it is
    made of.

    Raise DoesNotFit where the disk is too small, before anything is written if that can be known.
    """
    out = Path(out)
    containers = {plan.file: container(plan, metadata) for plan in plans}

    def output(plan: ShardPlan) -> OutputFile:
        name, file = plan.file, containers[plan.file]
        return OutputFile(
            name, plan.nbytes, lambda: key_of(name, fingerprint(name), file.size, file.head.hex()),
            lambda: (file, produce), frozenset(sources.get(name, ())),
        )  # fmt: skip

    finished = Finished(out, journal)
    at_once = traffic.inlet is None and not traffic.outlet.lets_go
    prepare(finished, {plan.file: plan.nbytes if at_once else 0 for plan in plans})
    others = beside()
    traffic.outlet.announce({name: (file.announced, file.size) for name, file in containers.items()})
    files = write_files([output(plan) for plan in plans], finished, workers=workers, traffic=traffic)
    index = write_index(out, plans)
    for name, digest in index.items():
        traffic.outlet.finished(name, *digest)
    return SavedCheckpoint({**files, **index, **others}, len(plans), sum(file.size for file in containers.values()))


def write_files(
    files: Sequence[OutputFile], finished: Finished, *, workers: int = 1, traffic: Traffic = ALONE
) -> Files:
    """Write what is not finished, `workers` files side by side; return all files in the order given."""
    uses = None
    if traffic.inlet is not None:
        uses = Uses(traffic.inlet, {file.name: file.sources for file in files}, traffic.close)
    writing = _Writing(finished, deque(files), traffic, uses, sum(file.nbytes for file in files))
    require_space(finished.out, writing.needed())
    writing.run(min(workers, len(files)))
    return {file.name: writing.files[file.name] for file in files}


def write_index(out: Path, plans: Sequence[ShardPlan]) -> Files:
    """Write the index of a checkpoint in several files; of one in a single file there is none."""
    if len(plans) < 2:
        return {}
    name = index_file(plans[0].file)
    with explained(out):
        return {name: write_file(out / name, encode_index(plans))}


def prepare(finished: Finished, planned: Mapping[str, int]) -> None:
    """Make the directory of the output; remove unfinished files, and the weights and indexes of earlier saves, of
    either format and any library: a loader would take those first, or those of two saves for one model. Planned ones
    (name → bytes) stay where they may be finished. Raise DoesNotFit, with all still there, where the planned ones have
    no room even in the place of what is removed."""
    out, kept = finished.out, planned if finished.inside else ()
    make_directory(out)
    there = os.listdir(out)
    gone = [out / name for name in there if is_partial(name) or (is_ours(name) and name not in kept)]
    missing = sum(size for name, size in planned.items() if name not in kept or name not in there)
    require_space(out, missing - sum(path.stat().st_blocks * 512 for path in gone))
    for path in gone:
        path.unlink()


@dataclass
class _Writing:
    """The files of one checkpoint, written by one or several threads."""

    finished: Finished
    todo: deque[OutputFile]
    traffic: Traffic
    uses: Uses | None
    total: int
    """Bytes of all tensors."""
    done: int = 0
    files: Files = field(default_factory=dict)
    stopped: bool = False
    """Threads end at their next piece."""
    told: float = 0.0
    """When progress was reported."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def needed(self) -> int:
        """Bytes that the files to be written take at a time, as far as can be told without waiting or reading."""
        finished, outlet = self.finished, self.traffic.outlet
        if self.traffic.inlet is None:
            missing = [file for file in self.todo if not finished.seems(file.name, file.key())]
        elif finished.shelved:
            return 0
        else:  # a key would wait
            missing = [file for file in self.todo if not (finished.out / file.name).is_file()]
        sizes = sorted(file.nbytes for file in missing)
        return sum(sizes[-outlet.ahead :] if outlet.lets_go else sizes)

    def run(self, workers: int) -> None:
        if workers <= 1:
            self.work(_at_once)
            return
        with ThreadPoolExecutor(workers, "settle") as settling, ThreadPoolExecutor(workers, "shard") as pool:
            jobs = [pool.submit(self.work, settling.submit) for _ in range(workers)]
            try:
                for job in as_completed(jobs):
                    job.result()
            except BaseException:
                self.todo.clear()
                self.stopped = True
                raise

    def work(self, start: Callable[[Settle], Future[None]]) -> None:
        """Writes files until there are none left. Each is settled while the next is written, if `start` returns."""
        settling = start(lambda: None)
        with Lanes() as lanes:
            for file in iter(self._next, None):
                before, settling = settling, start(self.write(file, lanes))
                before.result()
        settling.result()

    def _next(self) -> OutputFile | None:
        with suppress(IndexError):  # not `if self.todo`: another thread may take the last one in between
            return self.todo.popleft()
        return None

    def write(self, file: OutputFile, lanes: Lanes) -> Settle:
        """Write a file up to its last byte; return what makes it last."""
        key = file.key()
        found = self.finished.find(file.name, key)
        if found is not None:
            self._add(file.nbytes)
            return lambda: self._done(file.name, *found)
        outlet = self.traffic.outlet
        outlet.begin(file.name)
        if outlet.lets_go:
            require_space(self.finished.out, file.nbytes)
        container, produce = file.content()
        path, partial = self.finished.place(file.name, key)
        with ShardWriter(path, container, lanes, partial) as shard:
            for tensor in container.tensors:
                shard.write(tensor.name, self._count(produce(tensor)), tensor.nbytes)
            sha256 = shard.complete()

        def settle() -> None:
            with shard.file:
                self.finished.note(key, sha256)
                shard.file.settle()
            self.finished.show(file.name, key)
            self._done(file.name, sha256, container.size)

        return settle

    def _done(self, name: str, sha256: str, size: int) -> None:
        self.files[name] = sha256, size
        self.traffic.outlet.finished(name, sha256, size)
        if self.uses is not None:
            self.uses.settled(name)

    def _count(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            if self.stopped:
                raise Interrupted("another file of this checkpoint could not be written")
            yield piece
            self._add(memoryview(piece).nbytes)

    def _add(self, size: int) -> None:
        """Reports ten times a second."""
        with self.lock:
            self.done += size
            now = time.monotonic()
            if self.traffic.progress is not None and (now - self.told > 0.1 or self.done == self.total):
                self.told = now
                self.traffic.progress(self.done, self.total)


def _at_once(settle: Settle) -> Future[None]:
    done: Future[None] = Future()
    settle()
    done.set_result(None)
    return done
