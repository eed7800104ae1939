"""A fine-tuning from a checkpoint's directory to an adapter's: one rank of it, what comes of all, and the whole in one.

train_rank     loads, attaches, trains, evaluates; rank 0 writes the adapter, each what it measured
finish_ranks   what all ranks measured, as one
finetune       both, in this process
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.architecture import position_limit, read_limit
from bigpipe.bigmodel.checkpoint import describe_adapter, describe_checkpoint
from bigpipe.bigmodel.execution import HostMemory, as_placement, load
from bigpipe.bigmodel.placement import HALVES, stored_dtype
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.tasks import Row, known_architecture
from bigpipe.errors import UsageError
from bigpipe.files import copy_file, make_directory, refuse_overlap, write_file
from bigpipe.names import PATH, TEXT, Given, checked
from bigpipe.sizes import counted
from bigpipe.trust import Trust
from bigpipe.versions import require

from .adapting import attach, check_adapter, copies_in, require_peft, trained, trained_on, write_adapter
from .examples import (
    Examples,
    check_model,
    check_rows,
    input_column_of,
    read_data,
    reading,
    require_sound_reader,
    sounds_of,
)
from .forecast import foreseen_adapter
from .settings import Lora, TaskName, Training
from .stepping import Trainer, seeded

if TYPE_CHECKING:
    from bigpipe.bigmodel.checkpoint import ModelDescription

MEASURED, ADAPTER = "measured.json", "adapter"
"""In each rank's folder: what it measured; and of rank 0 the adapter."""
UNBOUNDED = 2**62
"""Bytes: weights that are trained around are never streamed."""


def unbounded(what: str) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """All that one rank works on."""

    model: Path
    training: Training
    rows: Sequence[Row]
    eval_rows: Sequence[Row] = ()
    input_column: str = ""
    adapter: Path | None = None
    dtype: str | None = None
    base_model: str | None = None
    """The repository that the model came from, and its commit."""
    revision: str | None = None
    sources: Sources = field(default_factory=Sources)
    bounded: Callable[[str], AbstractContextManager[None]] = unbounded


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class TrainedAdapter:
    """What a fine-tuning gave."""

    path: Path
    """A directory of peft's own files."""
    losses: Sequence[float] = field(repr=False)
    """The mean loss of a token in each step."""
    eval_loss: float | None
    trainable_parameters: int
    tokens_per_second: float
    """Learnt from, all ranks together."""
    peak: dict[str, int]
    """Bytes by device: a GPU's number, or `cpu` for the resident memory of the largest rank."""
    files: dict[str, tuple[str, int]] = field(repr=False)
    """Name → (hex sha256, bytes)."""

    @property
    def steps(self) -> int:
        return len(self.losses)

    def __repr__(self) -> str:
        losses = f", loss {self.losses[0]:.4g} → {self.losses[-1]:.4g}" if self.losses else ""
        parameters = counted(self.trainable_parameters, "parameter")
        return f"<TrainedAdapter {self.path}: {counted(self.steps, 'step')}{losses}, {parameters}>"


def computing_dtype(model: ModelDescription, gpu: bool, asked: str | None = None) -> str:
    """Return what floating weights are held and computed in: on a CPU float32; on a GPU as they are stored, but
    bfloat16 in place of float16, whose gradients vanish below 6e-8."""
    if asked is not None:
        return asked
    stored = stored_dtype(model)
    return "bfloat16" if gpu and stored in HALVES else "float32"


def train_rank(
    work: Work,
    folder: Path,
    *,
    rank: int = 0,
    ranks: int = 1,
    local_rank: int = 0,
    progress: Callable[[int, int, str], None] = lambda done, total, words: None,
    log: Callable[[str], None] = lambda text: None,
) -> None:
    """Do one rank's part. folder: of all ranks; each writes only to `folder/rank-N`, rank 0 states to go on from, too,
    and the adapter.

    Raise StageFailed for a loss or gradients that are no numbers, with the step, and every error of loading and
    attaching.
    """
    import torch
    from transformers import set_seed

    examples, others, *lengths = _examples(work)
    if rank == 0:
        _say_cut(examples.cut + others.cut, lengths, log)
    model = _load(work, local_rank, torch.cuda.is_available())
    set_seed(work.training.seed)  # peft draws the first values, alike on all ranks
    adapted = attach(model, work.training, work.adapter)
    if rank:
        set_seed(work.training.seed_of(rank))
    first, own = folder / "rank-0", folder / f"rank-{rank}"
    make_directory(own)
    trainer = Trainer(adapted, examples, work.training, first, rank, ranks, progress)
    done = trainer.run()
    loss = trainer.evaluate(others) if work.eval_rows else None
    files: dict[str, tuple[str, int]] = {}
    if rank == 0:
        beside = copies_in(work.adapter) if work.adapter is not None else {}
        files = write_adapter(adapted, own / ADAPTER, *_origin(work), beside)
    count = sum(parameter.numel() for _, parameter in trained(adapted))
    measured = {**asdict(done), "eval_loss": loss, "parameters": count, "peak": _peaks(), "files": files}
    write_file(own / MEASURED, json.dumps(measured))


def _origin(work: Work) -> tuple[str | None, str | None]:
    """The repository that the model came from, and its commit: where nobody says it, what the adapter says that is gone
    on from."""
    if work.base_model is not None or work.adapter is None:
        return work.base_model, work.revision
    return trained_on(work.adapter)


def _examples(work: Work) -> tuple[Examples, Examples, int, int]:
    """Rows and other rows as examples, and how many tokens a text has at most that is learnt, or read by an encoder: no
    more than the model has positions for. A row that cannot be learnt from is told before anything is loaded."""
    described = describe_checkpoint(work.model)
    architecture = known_architecture(described, work.sources)
    config = architecture.config if architecture else described.config or {}
    length, given = (
        work.training.max_length if limit is None else min(work.training.max_length, limit)
        for limit in (position_limit(config), read_limit(config))
    )
    read = reading(
        work.training.task, architecture, work.model, work.sources, work.bounded, end=work.training.end
    )  # fmt: skip
    made, others = (read.examples(rows, work.input_column, length, given) for rows in (work.rows, work.eval_rows))
    return made, others, length, given


def _load(work: Work, local_rank: int, gpu: bool) -> Any:
    dtype = computing_dtype(describe_checkpoint(work.model), gpu, work.dtype)
    return load(
        work.model,
        as_placement({"": 0 if gpu else "cpu"}),
        dtype=dtype,
        memory=HostMemory(cast=UNBOUNDED, widen=UNBOUNDED, experts=UNBOUNDED),
        first_gpu=local_rank,
        trust=work.sources.trust,
        base=work.sources.base,
        trust_remote_code=work.sources.trust_remote_code,
    )


def _say_cut(rows: int, lengths: Sequence[int], log: Callable[[str], None]) -> None:
    """lengths: of what is learnt, of what an encoder reads."""
    if rows:
        learnt, read = (counted(length, "token") for length in lengths)
        said = learnt if learnt == read else f"{learnt} to learn, or {read} to read"
        log(f"{counted(rows, 'row')} longer than {said}: cut to that")


def _peaks() -> dict[str, int]:
    """Bytes by device: the resident memory of this process, and what it took of each GPU."""
    import resource

    import torch

    peaks = {"cpu": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    for gpu in range(torch.cuda.device_count()) if torch.cuda.is_available() else ():
        if used := torch.cuda.max_memory_allocated(gpu):
            peaks[str(gpu)] = used
    return peaks


def finish_ranks(folder: Path, out: Path, ranks: int) -> TrainedAdapter:
    """Put the adapter into `out`, and return what all ranks gave together."""
    make_directory(out)
    measured = [json.loads((folder / f"rank-{rank}" / MEASURED).read_bytes()) for rank in range(ranks)]
    first, peak = measured[0], Counter[str]()
    for name in first["files"]:
        copy_file(folder / "rank-0" / ADAPTER / name, out / name)
    for each in measured:
        peak |= Counter(each["peak"])
    return TrainedAdapter(
        path=out,
        losses=first["losses"],
        eval_loss=first["eval_loss"],
        trainable_parameters=first["parameters"],
        tokens_per_second=round(first["tokens"] / first["seconds"], 3) if first["seconds"] else 0.0,
        peak=dict(sorted(peak.items())),
        files={name: (sha256, size) for name, (sha256, size) in first["files"].items()},
    )


ROWS = Given((*PATH.kinds, list, tuple, type(None)), "a file or a glob, or a list of rows")
TARGETS = Given((str, list, tuple, set), "ends of names in a list, or one regular expression")


@checked(
    model=PATH, data=ROWS, eval_data=ROWS, adapter=PATH, column=TEXT, input_column=TEXT, target_modules=TARGETS,
    base_model=TEXT, revision=TEXT,
)  # fmt: skip
def finetune(
    model: str | Path,
    data: str | Path | Sequence[Any],
    out: str | Path,
    *,
    task: TaskName = "causal-lm",
    column: str = "text",
    input_column: str | None = None,
    eval_data: str | Path | Sequence[Any] | None = None,
    adapter: str | Path | None = None,
    r: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.05,
    target_modules: Sequence[str] | str | None = None,
    dtype: str | None = None,
    base_model: str | None = None,
    revision: str | None = None,
    trust: Trust | Sequence[str] = (),
    progress: Callable[[int, int, str], None] = lambda done, total, words: None,
    **training: Any,
) -> TrainedAdapter:
    """Train a low-rank adapter on the checkpoint at `model`, in this process, and write peft's files into `out`.

    data, eval_data: rows, or a file or a glob of them (`.jsonl .ndjson .json .csv .tsv .parquet .txt`); each row's
      `column` is the text that is learnt, its `input_column` (`input`, of speech `audio`) what it is learnt from.
    adapter: a directory of an adapter to go on from, whose own settings hold.
    r, lora_alpha, lora_dropout, target_modules: as in peft's LoraConfig.
    dtype: to compute in; None: on a CPU float32.
    base_model, revision: the repository that the model came from, and its commit, for the adapter's config; None: what
      that of `adapter` names.
    training: max_steps or num_train_epochs, learning_rate, batch_size, gradient_accumulation_steps,
      gradient_checkpointing, max_length (tokens), seed.
    progress: called with steps done, all steps, and loss and speed in words.

    Random numbers of this process go on afterwards as if none had been drawn. Raise UsageError for data or a model that
    the task is not for, and for an adapter that is not gone on from, InvalidCheckpoint for files that are damaged,
    StageFailed for a loss or gradients that are no numbers, with the step.
    """
    require("finetune", "torch", "transformers", "accelerate")
    require_peft()
    refuse_overlap(Path(out), [Path(path) for path in (model, adapter) if path is not None])
    targets = target_modules if isinstance(target_modules, str | None) else tuple(target_modules)
    asked = _training(task, Lora(r, lora_alpha, lora_dropout, targets), training)
    base, given = Path(os.curdir).absolute(), input_column_of(task, input_column)
    rows = _rows(data, column, given, base)
    others = _rows(eval_data, column, given, base, "eval_data")
    path, sources = Path(model), Sources(trust=Trust.of(trust), base=base)
    check_rows(rows, asked.batch_size, asked.gradient_accumulation_steps, ranks=1)
    if task == "speech-seq2seq":
        require_sound_reader(sounds_of([*rows, *others], given, base))
    described = describe_checkpoint(path)
    architecture = check_model(task, described, [*rows, *others], sources)
    if architecture is not None and adapter is None:
        foreseen_adapter(described, architecture, asked, sources)
    elif architecture is not None and adapter is not None:
        check_adapter(describe_adapter(Path(adapter)), described, architecture, sources.memo)
    work = Work(
        model=path, training=asked, rows=rows, eval_rows=others, input_column=given,
        adapter=Path(adapter) if adapter is not None else None, dtype=dtype, base_model=base_model, revision=revision,
        sources=sources,
    )  # fmt: skip
    with TemporaryDirectory() as folder, seeded(asked.seed):
        train_rank(work, Path(folder), progress=progress)
        return finish_ranks(Path(folder), Path(out), 1)


def _training(task: TaskName, lora: Lora, given: dict[str, Any]) -> Training:
    known = [name for name in Training.__dataclass_fields__ if name not in ("task", "lora", "save_steps")]
    for name in given.keys() - set(known):
        raise UsageError(f"finetune takes no {name!r}", f"it takes {', '.join(known)}", field=name)
    return Training(task=task, lora=lora, **given)


def _rows(source: Any, column: str, input_column: str, base: Path, field: str = "data") -> list[Row]:
    if source is None:
        return []
    return read_data(os.fspath(source) if isinstance(source, Path) else source, column, input_column, base, field)
