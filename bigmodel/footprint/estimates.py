"""What a model needs in memory, per dtype, before a byte of its weights moves.

    >>> print(bigpipe.estimate("facebook/opt-13b", dtypes=["int8"], batch_size=4, memory="16GiB").render())

`look` finds what the model is from headers, `architecture_of` its modules, `budget` the bytes of one dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any, TextIO, get_args

from bigpipe.bigmodel.architecture import Architecture, Head
from bigpipe.bigmodel.checkpoint import ModelDescription, tensor_nbytes
from bigpipe.bigmodel.formats import asked, format_of, has_double_quant, packing
from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import DoesNotFit, UsageError
from bigpipe.fit import as_options
from bigpipe.names import as_names, checked, did_you_mean, listed
from bigpipe.sizes import format_size, format_transfer, size_of
from bigpipe.tables import html_table
from bigpipe.trust import Trust

from .budgets import OPTIMIZERS, Budget, Workload, capped_length, cut_length
from .changes import Question, Verdict
from .grounds import as_accelerate, grounds
from .sighting import Sighting, architecture_of, look
from .text import TRAINING, Row, accelerate_row, explanation, pictures, row, table

if TYPE_CHECKING:
    import torch

SCHEMA = "bigpipe.estimate/1"
DTYPES = ("float32", "float16", "int8", "int4")


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Estimate:
    """What a model needs in memory, one `Budget` per dtype, in bytes."""

    model: str
    revision: str | None
    source: str
    """headers or config."""
    fetched_bytes: int
    head: Head
    workload: Workload
    """With the sequence length as capped by the model."""
    architecture: Architecture = field(repr=False)
    checkpoint: Mapping[str, Any] | None
    """Of the weights as they are stored now: bytes, format, elements per dtype, quantization, bytes per component."""
    budgets: tuple[Budget, ...]
    notes: tuple[str, ...] = ()
    memory: int | None = None
    train: str | None = None
    """The optimizer of a training step, where `memory` is to hold one."""
    subfolder: str | None = None
    """The folder of the repository or directory that holds the model: the one asked for, or that of the address."""

    def __repr__(self) -> str:
        sizes = ", ".join(f"{found.dtype} {format_size(found.inference)}" for found in self.budgets)
        return f"<Estimate of {self.model}, {self.tokens}: {sizes}>"

    def _repr_html_(self) -> str:
        rows = [row(found, self.train) for found in self.budgets]
        notes = "\n".join([*self._stored(), *(f"note: {note}" for note in self.notes)])
        return html_table(self._headline(), [*rows[0]], [[*each.values()] for each in rows], notes)

    def __getitem__(self, dtype: str) -> Budget:
        found = next((found for found in self.budgets if found.dtype == dtype), None)
        if found is None:
            names = [budget.dtype for budget in self.budgets]
            raise UsageError(
                f"nothing was estimated in {dtype!r}",
                did_you_mean(str(dtype), names, otherwise="there are"),
                field="dtypes",
            )
        return found

    def verdict(self, dtype: str, memory: int) -> Verdict:
        """Does it fit into `memory` bytes, and if not, what is the least that must change?"""
        return Question(self[dtype], self.train, memory).answer()

    def misfit(self, memory: int) -> DoesNotFit | None:
        """Return why no dtype fits, with the smallest change that does; None where one fits."""
        verdicts = [self.verdict(found.dtype, memory) for found in self.budgets]
        if any(verdict.fits for verdict in verdicts):
            return None
        cure = next((verdict.cure for verdict in reversed(verdicts) if verdict.cure is not None), None)
        names = ", ".join(found.dtype for found in self.budgets)
        change = as_options(cure.change) if cure else "spread it over devices (`dispatch`)"
        return DoesNotFit(f"{self.model} does not fit into {format_size(memory)} in {names}", change)

    def as_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "schema": SCHEMA,
            "model": self.model,
            "revision": self.revision,
            "source": self.source,
            "fetched_bytes": self.fetched_bytes,
            "class": self.architecture.class_name,
            "head": self.head,
            **asdict(self.workload),
            "lora_targets": list(self.workload.lora_targets),
            "checkpoint": dict(self.checkpoint) if self.checkpoint else None,
            "notes": list(self.notes),
            "dtypes": {found.dtype: found.as_json() for found in self.budgets},
        }
        for found in self.budgets:
            told = data["dtypes"][found.dtype]
            for name, (inputs, source) in grounds(found).items():
                told["terms"][name] |= {"inputs": dict(inputs), "source": source}
            if self.head == "none":
                told["accelerate"] = as_accelerate(found)
        if self.memory is not None:
            data |= {"memory": self.memory, "train": self.train}
            for found in self.budgets:
                verdict = self.verdict(found.dtype, self.memory)
                cure = verdict.cure
                change = {"option": as_options(cure.change), "bytes": verdict.bytes} if cure else None
                data["dtypes"][found.dtype] |= {"fits": verdict.fits, "smallest_change": change}
        return data

    def metrics(self) -> dict[str, Any]:
        """Per dtype, the numbers that gates read."""
        return {found.dtype: found.metrics() for found in self.budgets}

    def render(self, *, width: int | None = None, explain: bool = False) -> str:
        """For a terminal of `width` columns, or one without end."""
        lines = [self._headline(), *table([row(found, self.train) for found in self.budgets], width), *self._stored()]
        lines += [f"note: {note}" for note in self.notes]
        if self.head == "none":
            lines += ["as accelerate estimate-memory counts:", *table([*map(accelerate_row, self.budgets)], width)]
        scale = self.memory or max(found.inference for found in self.budgets)
        said = [self._said(found) if self.memory else format_size(found.inference) for found in self.budgets]
        rows = [(found.dtype, found, words) for found, words in zip(self.budgets, said, strict=True)]
        lines += pictures(rows, scale, width, self.train)
        if explain:
            lines += [line for found in self.budgets for line in explanation(found)]
        return "\n".join(lines)

    @property
    def tokens(self) -> str:
        return f"{self.workload.batch_size} × {self.workload.sequence_length} tokens"

    def _headline(self) -> str:
        where = f" at {self.revision[:12]}" if self.revision else ""
        fetched = f", {format_transfer(self.fetched_bytes)} fetched" if self.fetched_bytes else ""
        size = f"{self.budgets[0].counts.parameters:,} parameters"
        return (
            f"{self.model}{where}: {self.architecture.class_name}, {size}; from {self.source}{fetched}; {self.tokens}"
        )

    def _stored(self) -> list[str]:
        if self.checkpoint is None:
            return []
        form, method = self.checkpoint["format"], self.checkpoint["quantization"]
        quantized = f", quantized with {method}" if method else ""
        elements = ", ".join(f"{count:,} {dtype}" for dtype, count in self.checkpoint["dtypes"].items())
        components = self.checkpoint.get("components", {}).items()
        parts = "; " + ", ".join(f"{name} {format_size(size)}" for name, size in components) if components else ""
        kind = f" of {form}" if form else ""
        return [f"stored: {format_size(self.checkpoint['bytes'])}{kind}{quantized} ({elements}){parts}"]

    def _said(self, budget: Budget) -> str:
        """Whether this dtype fits into the memory, and what would."""
        memory = self.memory or 0
        found, high = self.verdict(budget.dtype, memory), budget.needed(self.train)
        what = f" for training with {TRAINING[self.train]}" if self.train else ""
        device = f"{format_size(memory)} GPU{what}"
        most = f"{format_size(high)} at most" if high is not None else f"{budget.dtype} is not trained so"
        if found.fits:
            return f"{device}: yes ({most})"
        if found.cure is not None:
            change = as_options(found.cure.change)
            return f"{device}: no ({most}). Smallest change that fits: {change} ({format_size(found.bytes or 0)})"
        return f"{device}: no ({most}), and no smaller batch, length or dtype does; spread it over devices (`dispatch`)"


def report_json(estimates: Sequence[Estimate]) -> dict[str, Any]:
    """Return `bigpipe.estimate/1`, or where there are several, `bigpipe.estimates/1` with all of them."""
    found = [each.as_json() for each in estimates]
    return found[0] if len(found) == 1 else {"schema": "bigpipe.estimates/1", "estimates": found}


def misfits(estimates: Sequence[Estimate]) -> list[DoesNotFit]:
    """Return an error for every model that fits its `memory` in none of its dtypes."""
    return [error for each in estimates if each.memory is not None and (error := each.misfit(each.memory)) is not None]


def report(estimates: Sequence[Estimate], *, compared: bool, explain: bool, stream: TextIO) -> str:
    """What the command prints on `stream`: as wide as its terminal; files and pipes have room for whole lines."""
    width = get_terminal_size().columns if stream.isatty() else None
    if compared:
        return compare(estimates, width=width)
    return "\n\n".join(estimate.render(width=width, explain=explain) for estimate in estimates)


def compare(estimates: Sequence[Estimate], *, width: int | None = None) -> str:
    """Several models as one table, dtype by dtype, and their pictures on one scale."""
    first = estimates[0]
    pairs = [(found.dtype, estimate) for found in first.budgets for estimate in estimates]
    rows = [_compared(estimate, dtype) for dtype, estimate in pairs]
    scale = first.memory or max(estimate[dtype].inference for dtype, estimate in pairs)
    widest = max(len(dtype) for dtype, _ in pairs)
    drawn = [
        (f"{dtype:{widest}s}  {estimate.model}", estimate[dtype], shown["total"])
        for (dtype, estimate), shown in zip(pairs, rows, strict=True)
    ]
    longest = max(estimates, key=lambda found: found.workload.sequence_length)
    lines = [f"{len(estimates)} models; {longest.tokens}", *table(rows, width)]
    lines += [f"note: {estimate.model}: {note}" for estimate in estimates for note in estimate.notes]
    return "\n".join([*lines, *pictures(drawn, scale, width, first.train)])


def _compared(estimate: Estimate, dtype: str) -> Row:
    budget = estimate[dtype]
    shown = row(budget, estimate.train)
    del shown["dtype"], shown["basis"]
    if estimate.memory is not None:
        found = estimate.verdict(dtype, estimate.memory)
        least = as_options(found.cure.change) if found.cure else "nothing that was tried"
        shown["fits"] = f"fits {format_size(estimate.memory)}" if found.fits else f"no; {least} would"
    return {"dtype": dtype, "model": estimate.model, "parameters": f"{budget.counts.parameters:,}", **shown}


@checked()
def estimate(
    model: str | Path | torch.nn.Module,
    *,
    architecture: Mapping[str, Any] | None = None,
    dtypes: str | torch.dtype | Sequence[str | torch.dtype] | None = None,
    head: Head = "auto",
    batch_size: int = 1,
    sequence_length: int = 2048,
    library_name: str | None = None,
    revision: str = "main",
    subfolder: str | None = None,
    variant: str | None = None,
    memory: int | str | None = None,
    double_quant: bool = False,
    kv_dtype: str | torch.dtype | None = None,
    lora_rank: int = 8,
    lora_targets: str | Sequence[str] = (),
    gradient_checkpointing: bool = False,
    train: str | None = None,
    trust: Trust | Sequence[str] = (),
    trust_remote_code: bool = False,
    base: Path | None = None,
    memo: Path | None = None,
    offline: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Estimate:
    """An estimate for a repository (`owner/name` or its address), a checkpoint directory, a bare `config.json`, or a
    torch module, whose parameters may be empty.

    architecture: a custom class, as in a manifest: {"class": "module:Class", "config": {…}}.
    dtypes: of `float32 float16 bfloat16 float8 int8 int4 nf4 fp4`; int4 is accelerate's word for any 4-bit format.
    head: auto is the class the config names; none is the bare model, which is what accelerate counts.
    sequence_length: capped at what the model's positions allow.
    subfolder, variant: which model of a repository or directory, as in `from_pretrained`.
    memory: bytes or `24GiB`; the estimate then says whether each dtype fits, and the smallest change that does.
    kv_dtype: of cached keys and values, `float32 float16 bfloat16 float8 int8`; None: what the model computes in.
    lora_targets: the ends of the names of the linear modules that get adapters (`q_proj`); all but the head if empty.
    train: `adamw adamw_8bit sgd lora`; `memory` is then to hold a training step instead of inference.
    trust: modules that the model's own class may come from, looked for in `base` first; trust_remote_code: may the
      Python files that came with the model run?
    memo: where answers are kept; what is known of a commit is not fetched again, and a class is built once.

    No weight moves, and torch is not imported here. Raises UsageError, InvalidCheckpoint, Offline, NotAuthorised,
    GatedRepository, Transient, each with its cure.
    """
    workload = Workload(
        batch_size=batch_size, sequence_length=sequence_length, double_quant=double_quant, lora_rank=lora_rank,
        lora_targets=as_names(lora_targets), gradient_checkpointing=gradient_checkpointing,
        kv_dtype=None if kv_dtype is None else asked(kv_dtype),
    )  # fmt: skip
    if train is not None and train not in OPTIMIZERS:
        raise UsageError(f"optimizer {train!r} is not known to estimate", f"use {', '.join(OPTIMIZERS)}")
    if head not in get_args(Head):
        raise UsageError(f"head is {head!r}", f"use {listed(get_args(Head), 'or')}", field="head")
    limit = None if memory is None else size_of("memory", memory)
    sources = Sources(
        trust=Trust.of(trust), trust_remote_code=trust_remote_code, base=base, memo=memo, offline=offline,
        environment=environment,
    )  # fmt: skip
    sighting = look(model, revision, sources, library_name, architecture, variant=variant, subfolder=subfolder)
    given = (dtypes,) if isinstance(dtypes, str) or not isinstance(dtypes, Sequence) else dtypes
    wanted = None if dtypes is None else [asked(dtype) for dtype in given]
    made = estimate_sighting(sighting, dtypes=wanted, head=head, workload=workload, sources=sources)
    return replace(made, memory=limit, train=train)


def estimate_sighting(
    sighting: Sighting,
    *,
    dtypes: Sequence[str] | None = None,
    head: Head = "auto",
    workload: Workload,
    sources: Sources,
) -> Estimate:
    """An estimate for a model that has been looked at."""
    wanted = tuple(dict.fromkeys(dtypes or DTYPES))
    for dtype in wanted:
        packing(dtype)  # an unknown one is refused before anything is asked
    if workload.double_quant and not any(map(has_double_quant, wanted)):
        cause = f"double quantization has no meaning for {listed(wanted)}"
        raise UsageError(cause, "add nf4 to dtypes, or leave it out", field="double_quant")
    architecture, notes = architecture_of(sighting, head, sources)
    cut = cut_length(architecture, workload.sequence_length)
    capped = replace(workload, sequence_length=capped_length(architecture, workload.sequence_length))
    return Estimate(
        model=sighting.name,
        revision=sighting.revision,
        source=sighting.source,
        fetched_bytes=sighting.fetched_bytes,
        head=head,
        workload=capped,
        architecture=architecture,
        checkpoint=_checkpoint(sighting.description, pipeline=bool(sighting.components)),
        budgets=tuple(Budget(architecture, dtype, capped) for dtype in wanted),
        notes=(*sighting.notes, *notes, *filter(None, [cut])),
        subfolder=sighting.subfolder,
    )


def _checkpoint(description: ModelDescription, *, pipeline: bool) -> dict[str, Any] | None:
    if description.tensors is None:
        return None
    dtypes: dict[str, int] = {}
    components: dict[str, int] = {}
    for name, (dtype, shape) in description.tensors.items():
        dtypes[dtype] = dtypes.get(dtype, 0) + math.prod(shape)
        if pipeline:
            component = name.partition(".")[0]
            components[component] = components.get(component, 0) + tensor_nbytes(dtype, shape)
    stored = format_of(description)
    return {
        "bytes": description.nbytes, "format": description.format, "dtypes": dtypes,
        "quantization": stored.method or None, **({"components": components} if components else {}),
    }  # fmt: skip
