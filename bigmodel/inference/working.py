"""What one rank does: chunk after chunk of its queue, each answer written down before the next chunk begins, and synced
while that one is computed: a kill costs the chunk under way, a power cut the one before it too."""

from __future__ import annotations

import json
import math
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.tasks import OVERFLOWS, Answer, Answerer, Row
from bigpipe.errors import BigpipeError, DoesNotFit, StageFailed
from bigpipe.files import LogFile, write_file
from bigpipe.fit import out_of_memory
from bigpipe.redaction import redact
from bigpipe.sizes import counted

from .deaths import BEGUN, begin
from .ending import finishing, until
from .lines import strict
from .records import LOG, Record, check_errors, encoded, open_log
from .resultfiles import keep_files, without_files
from .workfolder import PEAKS, TIMES, WorkPlan

Work = Callable[[int], None]
NOTE_SECONDS = 1.0
"""Between two notes of when a rank was at work."""


def one_by_one(work: Work, chunks: Iterable[int], together: int) -> None:
    for chunk in chunks:
        work(chunk)


def side_by_side(work: Work, chunks: Iterable[int], together: int) -> None:
    """Do the work of so many chunks at a time, each in a thread. Once one fails no further chunk begins, and its error
    is raised when those under way have ended."""
    left, taking, failed = iter(chunks), threading.Lock(), threading.Event()

    def lane() -> None:
        try:
            while not failed.is_set():
                with taking:
                    chunk = next(left, None)
                if chunk is None:
                    return
                work(chunk)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(together) as pool:
        for lane_done in [pool.submit(lane) for _ in range(together)]:
            lane_done.result()


@dataclass(frozen=True, slots=True)
class Bound:
    """A task on a loaded model, or on one that others hold."""

    answer: Answerer
    each: Callable[[Work, Iterable[int], int], None] = one_by_one
    """Does the work of each chunk, asked for as it begins. So many may be under way, while one computes."""
    computes: bool = True
    """In this process, with torch. Otherwise others are asked, and torch is not imported."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How far a rank is."""

    done: int
    """Rows."""
    expected: int
    """Rows that it can expect to do, as things stand."""
    whole: int
    """Rows that all ranks together do."""
    tokens: int
    busy: float
    """Seconds in which it computed."""


def compute_share(
    folder: Path,
    rank: int,
    world_size: int,
    bind: Callable[[], Bound],
    *,
    max_errors: int = 0,
    progress: Callable[[Pace], None] = lambda pace: None,
    log: Callable[[str], None] = lambda text: None,
    warn: Callable[[str], None] = lambda text: None,
) -> None:
    """Answer the rows of one rank as the plan in `folder` says, and write only to `folder/rank-N`.

    bind: loads the model; called where there is something to do. progress: told how far this rank is, first before
    `bind`. log: gets the traceback of a row that failed. warn: told where a batch was larger than memory, and halved,
    and of secrets in answers.
    Raise StageFailed where more than `max_errors` rows fail or the plan was made for another `world_size`, DoesNotFit
    where one row is larger than memory, and every BigpipeError of the task.
    """
    plan = WorkPlan.read(folder)
    if plan.ranks != world_size:
        cause = f"the work was divided for {counted(plan.ranks, 'rank')}, and {world_size} came up"
        raise StageFailed(cause, "run it again; `launch.num_processes` says how many there should be")
    queue, suspects, done = plan.queue(folder, rank), plan.suspects_queue(folder, rank), 0
    whole = plan.to_do
    tokens, busy, began = 0, 0.0, 0.0
    if not (queue or suspects):
        return

    def tell() -> None:
        progress(Pace(done, queue.expected + suspects.expected, whole, tokens, busy))

    tell()  # before the model loads
    bound = bind()
    failed: list[Record] = []
    masked: list[int] = []
    writing, noted = threading.Lock(), 0.0
    own = folder / f"rank-{rank}"

    def note() -> None:
        nonlocal noted
        noted = ended
        write_file(own / PEAKS, json.dumps(_peaks(bound.computes)), durable=False)
        if not began:  # others took what there was while the model was loaded
            return
        times = {"began": began, "ended": time.time(), "busy": busy, "prompts": done, "tokens": tokens}
        write_file(own / TIMES, json.dumps(times), durable=False)

    with open_log(own / LOG) as records_log, LogFile(own / BEGUN) as begun_log, ThreadPoolExecutor(1) as disk:
        syncing = disk.submit(records_log.sync)
        ended = time.monotonic()

        def compute(numbers: Sequence[int]) -> None:
            nonlocal done, ended, tokens, busy, began, syncing
            with writing:
                batch, started = [plan.rows[number] for number in numbers], time.monotonic()
                began = began or time.time()
                begin(begun_log, numbers)
            answers = answer_batch(bound.answer, batch, log, warn, computes=bound.computes)
            with writing:
                seconds, ended = time.monotonic() - max(started, ended), time.monotonic()
                records = _records(plan, own, batch, answers, seconds)
                records_log.append(encoded(records, masked.append))
                syncing.result()  # of the chunk before
                syncing = disk.submit(records_log.sync)
                failed.extend(record for record in records if record.failed)
                check_errors(len(failed), max_errors, failed, plan.rows)
                done += len(records)
                tokens += sum(record.tokens for record in records)
                busy += seconds
                if ended - noted >= NOTE_SECONDS:
                    note()
                tell()

        with finishing() as told:
            bound.each(lambda chunk: compute(plan.chunks[chunk]), until(told, queue), plan.together)
            bound.each(lambda row: compute([row]), until(told, suspects), 1)
            syncing.result()
            note()
        tell()  # others may have taken what it expected
        if masked:
            held = f"{counted(len(masked), 'answer')} held the value of a secret, in whose place *** stands"
            warn(f"{held}; the first is of prompt {min(masked)}")


def _records(
    plan: WorkPlan, own: Path, batch: Sequence[Row], answers: Sequence[Answer], seconds: float
) -> list[Record]:
    """seconds: those of the batch, which its rows share; where several are under way, those since the last was done."""
    share = round(seconds / len(batch), 6)
    made = []
    for row, answer in zip(batch, answers, strict=True):
        payload, files = keep_files(own, row.index, len(plan.rows), answer.payload)
        made.append(Record(row.index, plan.rows.digest(row.index), payload, answer.tokens, share, answer.read, files))
    return made


def answer_batch(
    answerer: Answerer,
    rows: Sequence[Row],
    log: Callable[[str], None],
    warn: Callable[[str], None] = lambda text: None,
    *,
    computes: bool = True,
) -> list[Answer]:
    """Return the answers of a batch. Where one row breaks it, each is tried alone, and the broken one says why; where
    memory runs out, each half. Nothing is kept for a backward, unless the answerer asks torch for gradients itself.
    warn: told where a batch is halved: other shapes may give other last bits. computes: see `Bound`."""
    try:
        with _no_grad() if computes else nullcontext():
            answers = answerer(rows)
        _require_answers(answers, rows)
        return _writable(answers)
    except BigpipeError:
        raise
    except Exception as error:
        if len(rows) == 1:
            return [_failed(rows[0], error, log)]
        parts = _parts(rows, error, warn)
    # Out here the error, and all tensors that its frames held, are gone.
    if computes:
        _empty_caches()
    return [answer for part in parts for answer in answer_batch(answerer, part, log, warn, computes=computes)]


def _require_answers(answers: object, rows: Sequence[Row]) -> None:
    """Raise StageFailed where a task of somebody's own gives something else: that is no row's fault."""
    if not isinstance(answers, list) or not all(isinstance(each, Answer) for each in answers):
        of = f" of {type(answers[0]).__name__}" if isinstance(answers, list) and answers else ""
        raise StageFailed(f"the task gives a {type(answers).__name__}{of}", "mend it: it gives a list of Answers")
    if len(answers) != len(rows):
        cause = f"the task gives {counted(len(answers), 'answer')} for {counted(len(rows), 'row')}"
        raise StageFailed(cause, "mend it: it gives an answer for each row, in their order")


def _writable(answers: list[Answer]) -> list[Answer]:
    """Return the answers, numbers of numpy and torch among them as Python's. Raise as `_require_writable`."""
    try:
        _require_writable([without_files(answer.payload) for answer in answers])
    except TypeError:
        answers = [replace(answer, payload=_plain(answer.payload)) for answer in answers]
        _require_writable([without_files(answer.payload) for answer in answers])
    return answers


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _require_writable(payloads: Sequence[Mapping[str, object]]) -> None:
    """Raise ValueError, or TypeError, for an answer that no record can hold."""
    try:
        strict(payloads).encode()
    except ValueError as error:
        if not str(error).startswith("Out of range float"):
            raise
        found = next(filter(None, (_no_number(payload, "") for payload in payloads)))
        raise ValueError(f"{found}, which no result can hold: {OVERFLOWS}") from error


def _no_number(value: object, place: str) -> str | None:
    """What of an answer is infinite or no number: `features[3] is nan`; None where nothing is."""
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{place} is {value}"
    if isinstance(value, Mapping):
        within = ((f"{place}.{name}".lstrip("."), inner) for name, inner in value.items())
    else:
        several = value if isinstance(value, list | tuple) else ()
        within = ((f"{place}[{number}]", inner) for number, inner in enumerate(several))
    return next((said for where, inner in within if (said := _no_number(inner, where)) is not None), None)


def _no_grad() -> AbstractContextManager[None]:
    import torch

    return torch.no_grad()


def _empty_caches() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _parts(rows: Sequence[Row], error: Exception, warn: Callable[[str], None]) -> list[Sequence[Row]]:
    """What is tried of a batch that failed."""
    if not out_of_memory(error):
        return [[row] for row in rows]
    half = (len(rows) + 1) // 2
    warn(
        f"memory ran out for a batch of {counted(len(rows), 'prompt')}, the first is {rows[0].index}: computed as "
        f"{half} and {len(rows) - half}, whose numbers may differ in their last bits from those of the whole"
    )
    return [rows[:half], rows[half:]]


def _failed(row: Row, error: Exception, log: Callable[[str], None]) -> Answer:
    """The answer that says why. Raise DoesNotFit where not even one row fits."""
    if out_of_memory(error):
        raise DoesNotFit(
            f"prompt {row.index} does not fit: {str(error).partition(chr(10))[0]}",
            "shorten it, lower max_new_tokens, or place more of the model on cpu or disk",
        ) from error
    log(f"prompt {row.index}: " + "".join(traceback.format_exception(error)))
    said = f"{type(error).__name__}: {error}".encode("utf-8", "backslashreplace").decode()
    return Answer({"error": redact(said)})


def _peaks(computes: bool) -> dict[str, int]:
    """Bytes by device: the resident memory of this process, and what it took of each GPU."""
    import resource

    peaks = {"cpu": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if not computes:
        return peaks
    import torch

    if torch.cuda.is_available():
        used = {gpu: torch.cuda.max_memory_allocated(gpu) for gpu in range(torch.cuda.device_count())}
        peaks |= {str(gpu): size for gpu, size in used.items() if size}
    return peaks
