"""An evaluation from files to numbers: the steps that a stage takes one by one, and all of them in this process.

prepare     text → tokens → windows, shared out
Bound       each rank's windows, by `inference.compute_share`
conclude    the union of all ranks' windows → numbers
"""

from __future__ import annotations

import json
import math
import os
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.architecture import architecture_of
from bigpipe.bigmodel.checkpoint import ModelDescription, describe_checkpoint
from bigpipe.bigmodel.execution import as_placement, load
from bigpipe.bigmodel.footprint import Workload
from bigpipe.bigmodel.formats import agree, default_skips, format_of, packed_modules, set_apart
from bigpipe.bigmodel.inference import MISSING, Bound, Found, WorkPlan, compute_share, gather, plan_work
from bigpipe.bigmodel.placement import Placement, as_map
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.tasks import Bounded
from bigpipe.errors import StageFailed, UsageError
from bigpipe.files import explained, make_directory, refuse_overlap, write_file
from bigpipe.machine import detect
from bigpipe.names import FLAG, PATH, TEXT, Given, checked
from bigpipe.sizes import counted
from bigpipe.trust import Trust
from bigpipe.versions import require

from .layers import LayerLoss, Layers, lose_least
from .placing import Known, place_pair
from .reporting import write_report
from .summary import Evaluation, summarise
from .texts import place_in, read_texts
from .windows import (
    Tokens,
    check_model,
    check_pair,
    check_same_tokens,
    check_windows,
    plan_windows,
    positions_of,
    tokenize,
    tokens_of,
    windows_of,
)
from .working import Pair, bind_windows

if TYPE_CHECKING:
    import torch

TOKENS, TEXT_BYTES = "tokens.bin", "text.json"
LEAST = {"sequence_length": 2, "max_tokens": 2, "stride": 1, "batch_size": 1, "seed": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked, but for where it is computed."""

    data: str
    column: str = "text"
    sequence_length: int | None = None
    stride: int | None = None
    batch_size: int = 1
    max_tokens: int | None = None
    seed: int = 0
    per_layer: bool = False
    per_layer_bound: float | None = None

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not least <= value < 2**63):
                raise UsageError(f"{name} is {value!r:.40}", f"give a whole number from {least} on", field=name)
        if (bound := self.per_layer_bound) is not None and not (type(bound) in (int, float) and 0 <= bound < math.inf):
            raise UsageError(f"per_layer_bound is {bound!r:.40}", "give a number from 0 on", field="per_layer_bound")
        if bound is not None and not self.per_layer:
            cure = "ask for both, or leave it out"
            raise UsageError("per_layer_bound belongs to per_layer=True", cure, field="per_layer_bound")

    def check(self, model: ModelDescription, baseline: ModelDescription | None, sources: Sources) -> tuple[int, int]:
        """Return tokens of a window, and between the begins of two, which both models can read. baseline: None where
        there is none, or it is not known yet. Raise UsageError for what is known to be wrong, with the field that it is
        about: `inputs.baseline` where that cannot be evaluated."""
        described = {"model": model} if baseline is None else {"model": model, "baseline": baseline}
        known = {who: check_model(each, sources, who) for who, each in described.items()}
        if baseline is not None:
            check_pair(known["model"], known["baseline"])
        limits = {who: positions_of(described[who], architecture) for who, architecture in known.items()}
        return check_windows(limits, self.sequence_length, self.stride)

    def workload(self, length: int, tokens: int) -> Workload:
        """Return that of one batch. length: tokens of a window. tokens: of the text, at most."""
        return Workload(batch_size=self.batch_size, sequence_length=min(length, tokens), all_logits=True)


def prepare(
    folder: Path,
    question: Question,
    model: Path,
    baseline: Path | None,
    base: Path,
    sources: Sources,
    *,
    ranks: int = 1,
    together: int = 1,
    bounded: Bounded = lambda what: nullcontext(),
    asked: str = "",
) -> WorkPlan:
    """Read the text, cut it into windows and share out those that nobody has finished in `folder`. asked: what numbers
    depend on besides the tokens, where one folder may see several of it. together: batches that go through streamed
    layers together, at most: each rank has some. Raise UsageError for a text that is too short, and for a baseline that
    reads it as other tokens."""
    if question.per_layer and baseline is None:
        cure = "give the model it was made from as the baseline, or leave it out"
        raise UsageError("per_layer compares modules with a baseline's, and there is none", cure, field="per_layer")
    described = [describe_checkpoint(path) for path in (model, baseline) if path is not None]
    length, stride = question.check(described[0], described[1] if baseline else None, sources)
    text = read_texts(question.data, question.column, base)

    def read(path: Path, model: ModelDescription) -> Tokens:
        limit = tokens_of(check_model(model, sources))
        place = partial(place_in, question.data, question.column, base)
        windows = partial(windows_of, length=length, stride=stride)
        return tokenize(path, text, sources, bounded, windows, question.max_tokens, limit=limit, where=place)

    tokens = read(model, described[0])
    if baseline is not None:
        check_same_tokens(tokens, read(baseline, described[1]))
    make_directory(folder)
    write_file(folder / TOKENS, tokens.ids.tobytes())
    write_file(folder / TEXT_BYTES, json.dumps({"bytes": tokens.text_bytes}))
    rows = plan_windows(tokens, length, stride, asked)
    return plan_work(
        folder, rows, lambda row: row.data["end"] - row.data["begin"], batch_size=question.batch_size, ranks=ranks,
        together=lambda batching: min(together, math.ceil(len(batching.sizes) / ranks)),
    )  # fmt: skip


def tokens_in(folder: Path) -> int:
    """Return how many tokens `prepare` found in the text."""
    return (folder / TOKENS).stat().st_size // array("i").itemsize


def bind(folder: Path, question: Question, model: Any, baseline: Any = None) -> Bound:
    """Return what answers the windows in `folder`, by one or two models that `load` made."""
    ids = array("i", (folder / TOKENS).read_bytes())
    layers = Layers(model, baseline) if question.per_layer else None
    return bind_windows(Pair(model, baseline, layers), WorkPlan.read(folder), ids, question.seed)


def conclude(folder: Path, question: Question, model: ModelDescription, sources: Sources) -> Evaluation:
    """Return what came of all windows. Raise StageFailed where one has no record."""
    plan = WorkPlan.read(folder)
    with Found(plan.rows, folder) as found:
        if missing := [plan.rows[row].prompt for row in found.rows(MISSING)]:
            raise StageFailed(
                f"{counted(len(missing), 'window')} without numbers, the first is {missing[0]}", "run it again"
            )
        windows = [record.payload for _, record in gather(plan.rows, found)]
    layers = _layer_loss(windows, question, model, sources) if question.per_layer else None
    return summarise(windows, json.loads((folder / TEXT_BYTES).read_bytes())["bytes"], layers)


def _layer_loss(
    windows: Sequence[Mapping[str, Any]], question: Question, model: ModelDescription, sources: Sources
) -> LayerLoss:
    losses = [window["layers"] for window in windows if "layers" in window]
    _, packed = set_apart(model.tensors or {}, format_of(model))
    if not packed:
        return lose_least(losses, question.per_layer_bound, (), ())
    architecture = architecture_of(model, sources)
    skipped = (model.quantization or {}).get("llm_int8_skip_modules")
    if skipped is None:
        skipped = default_skips(architecture)
    return lose_least(losses, question.per_layer_bound, skipped, packed_modules(model, architecture, sources.memo))


@checked(
    model=PATH, data=PATH, baseline=PATH, adapter=PATH, folder=PATH, column=TEXT, per_layer=FLAG,
    placement=Given((Placement, Mapping, str, int, type(None)), "a Placement, a map, a mode"),
)  # fmt: skip
def evaluate(
    model: str | Path,
    data: str | Path,
    *,
    baseline: str | Path | None = None,
    adapter: str | Path | None = None,
    placement: Placement | Mapping[str, Any] | str | int | None = None,
    column: str = "text",
    sequence_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 1,
    max_tokens: int | None = None,
    seed: int = 0,
    per_layer: bool = False,
    per_layer_bound: float | None = None,
    dtype: str | torch.dtype | None = None,
    out: str | Path | None = None,
    folder: str | Path | None = None,
    trust: Trust | Sequence[str] = (),
    trust_remote_code: bool = False,
    base: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Return how well the model in a checkpoint's directory foresees a text, and how far it is from a baseline.

    data: a path or glob of texts, or of files of rows whose `column` is joined by blank lines; relative to `base`.
    baseline: the checkpoint that it is compared with: it reads the same windows, and no logits are kept.
    adapter: peft's own files, which the model runs with, and the baseline does not.
    placement: as `load` takes it. The baseline goes beside the model, under the same caps.
    sequence_length: tokens of a window (None: what both have positions for); stride: between two begins (None: half).
    batch_size: windows at once. max_tokens: how much of the text is read. seed: of what a model draws at random.
    per_layer: also what each module loses against the baseline's, on the same inputs; per_layer_bound: see `LayerLoss`.
    dtype: what both compute in, as `load` takes it. out: a directory for report.json and report.txt.
    folder: where finished windows are written down, to go on from after a crash; those of other files (by size and time
      of change), of another question, or computed in another dtype are not believed. progress: (windows done, of all).
    trust, trust_remote_code, base: as for `load`.

    Raise UsageError (data, windows or baseline that do not go with the model), InvalidCheckpoint, DoesNotFit, and
    StageFailed for logits that are no numbers, naming the token.
    """
    require("evaluate", "torch", "transformers", "accelerate")
    question = Question(
        data=str(data), column=column, sequence_length=sequence_length, stride=stride, batch_size=batch_size,
        max_tokens=max_tokens, seed=seed, per_layer=per_layer, per_layer_bound=per_layer_bound,
    )  # fmt: skip
    sources = Sources(trust=Trust.of(trust), trust_remote_code=trust_remote_code, base=base)
    own, other = Path(model), None if baseline is None else Path(baseline)
    read = [Path(path) for path in (model, baseline, adapter) if path is not None]
    for written in (out, folder):
        if written is not None:  # what is written there has names of its own, beside what is there
            refuse_overlap(Path(written), read, around=False)

    def bound(work: Path) -> Bound:
        places = _places(placement, own, other, question, sources, tokens_in(work))
        asked: dict[str, Any] = {
            "dtype": dtype, "trust": trust, "trust_remote_code": trust_remote_code, "base": base,
        }  # fmt: skip
        against = None if other is None else load(other, places[1], **asked)
        return bind(work, question, load(own, places[0], adapter=adapter, **asked), against)

    work = nullcontext(str(folder)) if folder is not None else TemporaryDirectory()
    with explained(Path(folder or out or model)), work as named:
        if out is not None:
            make_directory(Path(out))
        place = Path(named)
        computed = str(dtype), _dtypes_of(placement)
        files = [path and _files_of(Path(path)) for path in (model, baseline, adapter)]
        prepare(place, question, own, other, base or Path(), sources, asked=repr((question, *computed, files)))
        compute_share(place, 0, 1, lambda: bound(place), progress=lambda pace: progress(pace.done, pace.expected))
        found = conclude(place, question, describe_checkpoint(own), sources)
        if out is not None:
            write_report(found, {"with": asdict(question)}, Path(out))
    return found


def _files_of(path: Path) -> list[tuple[str, int, int]]:
    """Name, bytes and time of change (ns) of each file of a model or an adapter, of what it links to where it does."""
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    return [(os.fspath(file), (facts := file.stat()).st_size, facts.st_mtime_ns) for file in files]


def _dtypes_of(placement: Any) -> Any:
    """What of a placement decides in which dtype a model computes; a mode as it is written, which decides it here."""
    if isinstance(placement, str) and isinstance(as_map(placement), str):
        return placement
    placed = as_placement(placement)
    on_cpu = set(placed.device_map.values()) == {"cpu"}
    return placed.dtype, placed.compute_dtype, sorted(placed.special_dtypes.items()), on_cpu


def _places(
    placement: Any, own: Path, other: Path | None, question: Question, sources: Sources, tokens: int
) -> tuple[Any, Any]:
    """Where each of both goes, as `load` takes it. tokens: of the text."""
    if other is None or not isinstance(placement, Placement):
        return placement, placement
    known = [_look(path, sources) for path in (own, other)]
    length, _ = question.check(known[0].model, known[1].model, sources)
    return place_pair(placement, known[0], known[1], question.workload(length, tokens), detect(Path.cwd()))


def _look(path: Path, sources: Sources) -> Known:
    model = describe_checkpoint(path)
    return Known(model, agree(model, architecture_of(model, sources), sources.memo).architecture)
