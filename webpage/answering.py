"""What a model needs, as the page shows it. In a child process, so that what a model's headers or config set going is
bounded from outside: `python -m bigpipe.webpage.answering` reads a question as JSON and prints the answer.

    answer({"model": "facebook/opt-125m", "options": {"batch_size": 4}})["estimate"]    as of `bigpipe estimate --json`

Nothing of a repository ever runs here.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import bigpipe
from bigpipe.bigmodel.footprint import Estimate, capped_length, misfits, report_json
from bigpipe.errors import BigpipeError, UsageError
from bigpipe.files import parse_json, write_file
from bigpipe.fit import as_options, fits
from bigpipe.machine import Gpu, Machine, detect
from bigpipe.names import listed
from bigpipe.orchestrator.report import answered, json_text, refused

from .gpus import GPUS
from .placements import drawn_placement
from .questions import Question
from .recipes import recipe_for

BATCHES = (1, 2, 4, 8, 16, 32)
LENGTHS = (512, 2048, 8192, 32768)
PASTED = "config.json"


def answer(
    question: Mapping[str, Any], *, roots: Sequence[Path] = (), memo: Path | None = None, offline: bool = False
) -> dict[str, Any]:
    """Return `estimate`, which is what `bigpipe estimate --json` prints, and `page`, the tables that the page shows
    beside it; None where there is no estimate. question: the fields of a `Question`. roots: directories whose models
    may be looked at; none: only repositories. Raise nothing: errors are fields."""
    asked = Question(**question)
    options = {**asked.options, "memo": memo, "offline": offline}
    try:
        with _looked_at(asked, roots) as model:
            made = bigpipe.estimate(model, **options)
            data = answered(report_json([made]), misfits([made]))
            return {"estimate": data, "page": _page(asked, model, made, options)}
    except (BigpipeError, OSError, RecursionError, ValueError, TypeError) as error:
        return {"estimate": refused("estimate", error, {}), "page": None}


@contextmanager
def _looked_at(asked: Question, roots: Sequence[Path]) -> Iterator[str]:
    """Give what to look at, in the directory it is named from. Raise UsageError for what may not be looked at."""
    if not asked.config:
        yield require_reachable(asked.model, roots)
        return
    if asked.model:
        raise UsageError("a model and a config are both given", "keep the one that is meant", field="config")
    require_config(asked.config)
    before = os.getcwd()
    with tempfile.TemporaryDirectory(prefix="bigpipe-") as folder:
        write_file(Path(folder) / PASTED, asked.config, durable=False)
        os.chdir(folder)
        try:
            yield PASTED
        finally:
            os.chdir(before)


def require_config(text: str) -> None:
    """Raise UsageError for a text that is no JSON object."""
    cure = "paste the whole text of a config.json"
    try:
        found = parse_json(text)
    except ValueError as error:
        raise UsageError(f"the config is not JSON: {error}", cure, field="config") from error
    if not isinstance(found, dict):
        raise UsageError("the config is JSON, and no object", cure, field="config")


def require_reachable(model: str, roots: Sequence[Path]) -> str:
    """Return the model. Raise UsageError for none, and for a path outside the directories, whether it exists or not."""
    if not model:
        raise UsageError("no model is named", "give a repository, its address, a path, or a config", field="model")
    if model.startswith((".", "/", "~")) or ".." in Path(model).parts or os.path.lexists(model):
        place = Path(model).resolve()
        if not any(place.is_relative_to(root.resolve()) for root in roots):
            cure = "start `bigpipe ui` in a directory that holds it, or with --also DIR"
            raise UsageError(f"{model} is not in a directory that this page may read", cure, field="model")
    return model


def _page(asked: Question, model: str, made: Estimate, options: Mapping[str, Any]) -> dict[str, Any]:
    store = options["memo"] and options["memo"].parent
    here = detect(store or Path.cwd())
    machine = _machine(asked, here)
    memory = min((gpu.memory for gpu in machine.gpus), default=None)
    focus = _in_dtype(asked.run_in, made)
    return {
        "about": _about(made),
        "dtypes": [_row(made, dtype) for dtype in (found.dtype for found in made.budgets)],
        "accelerate": _as_accelerate(model, options),
        "cache": _cache(focus, memory),
        "run_in": asked.run_in,
        "device": _device_name(machine, here),
        "memory": memory,
        "fits": _on_each(made, here),
        "change": None if memory is None else _change(focus, asked.run_in, memory),
        "placement": drawn_placement(asked, model, focus.budgets[0], machine, options),
        "recipe": None if asked.config else recipe_for(asked, made, focus, memory),
    }


def _in_dtype(dtype: str, made: Estimate) -> Estimate:
    """The same estimate for one dtype, which need not be among those asked for."""
    known = [found for found in made.budgets if found.dtype == dtype]
    return replace(made, budgets=tuple(known or [replace(made.budgets[0], dtype=dtype)]))


def _about(made: Estimate) -> dict[str, Any]:
    return {
        "model": made.model,
        "revision": made.revision,
        "source": made.source,
        "class": made.architecture.class_name,
        "parameters": made.budgets[0].counts.parameters,
        "batch_size": made.workload.batch_size,
        "sequence_length": made.workload.sequence_length,
        "stored": dict(made.checkpoint) if made.checkpoint else None,
        "notes": list(made.notes),
    }


def _row(made: Estimate, dtype: str) -> dict[str, Any]:
    budget = made[dtype]
    bases = {name: getattr(budget, name).basis for name in ("weights", "kv_cache", "activations", "runtime")}
    return {"dtype": dtype, **budget.metrics(), "bases": bases}


def _as_accelerate(model: str, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """accelerate's own columns, of the bare model, which is what it counts. None of them where it has no such model."""
    try:
        bare = bigpipe.estimate(model, **{**options, "head": "none"}).as_json()
    except BigpipeError:
        return []
    return [{"dtype": dtype, **found["accelerate"]} for dtype, found in bare["dtypes"].items()]


def _machine(asked: Question, here: Machine) -> Machine:
    """This machine, or one with the GPUs that were asked for and the rest of this one."""
    if not asked.gpu:
        return here
    size = GPUS[asked.gpu]
    return replace(here, gpus=tuple(Gpu(number, asked.gpu, size, size) for number in range(asked.gpus)))


def _device_name(machine: Machine, here: Machine) -> str:
    counts = Counter(gpu.name for gpu in machine.gpus)
    names = [f"{count} × {name}" if count > 1 else name for name, count in counts.items()]
    what = listed(names, "and") if names else "this machine, which has no GPU"
    return f"{what}, here" if names and machine.gpus == here.gpus else what


def _cache(made: Estimate, memory: int | None) -> dict[str, Any]:
    """Bytes of keys and values by batch and length, and whether all fits in that much memory."""
    work, budget = made.workload, made.budgets[0]
    batches = sorted({*BATCHES, work.batch_size})
    lengths = sorted({capped_length(made.architecture, length) for length in (*LENGTHS, work.sequence_length)})
    rows = []
    for batch in batches:
        sizes = [replace(budget, workload=replace(work, batch_size=batch, sequence_length=at)) for at in lengths]
        cells = [
            {
                "bytes": found.kv_cache.bytes,
                "fits": None if memory is None else fits(found.inference_high, memory),
                "asked": found.workload == work,
            }
            for found in sizes
        ]
        rows.append({"batch": batch, "cells": cells})
    return {"lengths": lengths, "rows": rows}


def _on_each(made: Estimate, here: Machine) -> dict[str, Any]:
    """Which dtypes fit on one GPU of each sort, and what would make them."""
    own = {f"{gpu.name} (this machine's)": gpu.memory for gpu in here.gpus}
    dtypes = [found.dtype for found in made.budgets]
    sorts = {**own, **GPUS}
    rows = [
        {"gpu": name, "memory": memory, "cells": [_change(made, dtype, memory) for dtype in dtypes]}
        for name, memory in sorts.items()
    ]
    return {"dtypes": dtypes, "rows": rows}


def _change(made: Estimate, dtype: str, memory: int) -> dict[str, Any]:
    """Whether it fits, and the smallest change that does, as options of the command and as fields of the page."""
    verdict, needed = made.verdict(dtype, memory), made[dtype].needed(made.train)
    change = dict(verdict.cure.change) if verdict.cure else {}
    return {
        "fits": verdict.fits,
        "needed": needed,
        "option": as_options(change),
        "fields": {
            ("run_in" if name == "dtypes" else name): "true" if value is True else value
            for name, value in change.items()
        },
        "bytes": verdict.bytes,
    }


def main() -> None:
    """Answer the question on standard input. What anybody else prints goes to standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    given = json.load(sys.stdin)
    roots = [Path(root) for root in given["roots"]]
    memo = given["memo"] and Path(given["memo"])
    told = answer(given["question"], roots=roots, memo=memo, offline=given["offline"])
    out.write(json_text(told))
    out.close()


if __name__ == "__main__":
    main()
