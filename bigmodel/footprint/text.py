"""Estimates as a terminal shows them: a table as wide as there is room for, a picture of each budget, and what fits."""

from __future__ import annotations

from collections.abc import Sequence
from shutil import get_terminal_size
from typing import TYPE_CHECKING, TextIO

from bigpipe.fit import as_options
from bigpipe.sizes import format_size, format_transfer

from .budgets import Budget, Term
from .grounds import as_accelerate, grounds

if TYPE_CHECKING:
    from .estimates import Estimate

BAR = 40
"""Columns of a picture at the most."""
SIGNS = {"weights": "█", "kv_cache": "▓", "activations": "▒", "runtime": "░"}
FREE, BEYOND = "·", "×"
LEGEND = "█ weights  ▓ KV cache  ▒ activations  ░ runtime  · free  × does not fit"
TRAINING_LEGEND = "█ training step  ░ runtime  · free  × does not fit"
TRAINING = {"adamw": "AdamW", "adamw_8bit": "8-bit AdamW", "sgd": "SGD", "lora": "LoRA"}
DROPPED = (
    "basis",
    "parameters",
    "AdamW",
    "8-bit AdamW",
    "SGD",
    "LoRA",
    "largest layer",
    "runtime",
    "activations",
    "KV cache",
)
"""Columns to leave out where the terminal is narrow, one after the other."""

Row = dict[str, str]


def report(estimates: Sequence[Estimate], *, compared: bool, explain: bool, stream: TextIO) -> str:
    """What the command prints on `stream`: as wide as its terminal; files and pipes have room for whole lines."""
    width = get_terminal_size().columns if stream.isatty() else None
    if compared:
        return compare(estimates, width=width)
    return "\n\n".join(estimate.render(width=width, explain=explain) for estimate in estimates)


def render(estimate: Estimate, *, width: int | None = None, explain: bool = False) -> str:
    rows = [_row(estimate, found) for found in estimate.budgets]
    lines = [_headline(estimate), *table(rows, width), *_stored(estimate)]
    lines += [f"note: {note}" for note in estimate.notes]
    if estimate.head == "none":
        lines += ["as accelerate estimate-memory counts:", *table(list(map(_accelerate, estimate.budgets)), width)]
    lines += _picture(estimate, width)
    if explain:
        lines += [line for found in estimate.budgets for line in explanation(estimate, found)]
    return "\n".join(lines)


def table(rows: Sequence[Row], width: int | None) -> list[str]:
    """Columns as wide as what stands in them; less important ones are left out until a line fits."""
    names = list(rows[0])
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    widths["basis"] = max((len(row.get("basis", "")) for row in rows), default=0)
    for name in DROPPED:
        if width is None or sum(widths[name] + 2 for name in names) - 2 <= width:
            break
        names = [kept for kept in names if kept != name]
    head = {name: "" if name in ("basis", "dtype") else name for name in names}
    return ["  ".join(_cell(name, row[name], widths[name]) for name in names).rstrip() for row in (head, *rows)]


def _cell(name: str, text: str, width: int) -> str:
    return text.ljust(width) if name in ("dtype", "basis", "model", "fits") else text.rjust(width)


def _headline(estimate: Estimate) -> str:
    where = f" at {estimate.revision[:12]}" if estimate.revision else ""
    fetched = f", {format_transfer(estimate.fetched_bytes)} fetched" if estimate.fetched_bytes else ""
    return (
        f"{estimate.model}{where}: {estimate.architecture.class_name}, {estimate.budgets[0].parameters:,} parameters; "
        f"from {estimate.source}{fetched}; {_tokens(estimate)}"
    )


def _tokens(estimate: Estimate) -> str:
    return f"{estimate.workload.batch_size} × {estimate.workload.sequence_length} tokens"


def _row(estimate: Estimate, found: Budget) -> Row:
    row = {
        "dtype": found.dtype,
        "weights": format_size(found.weights.bytes),
        "KV cache": format_size(found.kv_cache.bytes),
        "activations": format_size(found.activations.bytes),
        "runtime": format_size(found.runtime.bytes),
        "total": format_size(found.inference),
        "largest layer": format_size(found.largest_layer),
    }
    for name in TRAINING if estimate.train else ("adamw",):
        row[TRAINING[name]] = _size_of(found.training[name])
    return {**row, "basis": " | ".join(map(_basis, (found.weights, found.kv_cache, found.activations, found.runtime)))}


def _size_of(term: Term | None) -> str:
    return format_size(term.bytes) if term else "–"


def _basis(term: Term) -> str:
    if term.basis != "calibrated" or not term.bytes:
        return term.basis
    # Of next to nothing, what kernels take for themselves is many times as much: no share to tell people
    share = round((term.high - term.bytes) / term.bytes * 100)
    return f"±{share} %" if share <= 100 else f"up to {format_size(term.high)}"


def _stored(estimate: Estimate) -> list[str]:
    if estimate.checkpoint is None:
        return []
    form, method = estimate.checkpoint["format"], estimate.checkpoint["quantization"]
    quantized = f", quantized with {method}" if method else ""
    elements = ", ".join(f"{count:,} {dtype}" for dtype, count in estimate.checkpoint["dtypes"].items())
    components = estimate.checkpoint.get("components", {}).items()
    parts = "; " + ", ".join(f"{name} {format_size(size)}" for name, size in components) if components else ""
    return [f"stored: {format_size(estimate.checkpoint['bytes'])} of {form}{quantized} ({elements}){parts}"]


def _accelerate(found: Budget) -> Row:
    values = as_accelerate(found)
    sizes = {name: format_size(value) if value is not None else "N/A" for name, value in values.items()}
    return {
        "dtype": found.dtype,
        "Largest Layer": sizes["largest_layer"],
        "Total Size": sizes["total_size"],
        "Training using Adam": sizes["training_using_adam"],
    }


def _picture(estimate: Estimate, width: int | None) -> list[str]:
    scale = estimate.memory or max(found.inference for found in estimate.budgets)
    name = max(len(found.dtype) for found in estimate.budgets)
    columns = BAR if width is None else max(8, min(BAR, width - name - 14))
    lines = []
    for found in estimate.budgets:
        drawn = f"{found.dtype:{name}s}  {bar(found, scale, columns, train=estimate.train)}"
        if estimate.memory is None:
            lines.append(f"{drawn}  {format_size(found.inference)}")
        else:
            lines.append(f"{drawn}  {verdict(estimate, found.dtype)}")
    return [*lines, TRAINING_LEGEND if estimate.train else LEGEND]


def bar(found: Budget, scale: int, columns: int, *, train: str | None = None) -> str:
    """The budget as a share of `scale` bytes, and × at its end where there is more of it."""
    if train is None:
        parts = [(getattr(found, name).bytes, sign) for name, sign in SIGNS.items()]
    else:
        term = found.training[train]
        parts = [(term.bytes if term else 0, SIGNS["weights"]), (found.runtime.bytes, SIGNS["runtime"])]
    filled, picture = 0.0, ""
    for size, sign in parts:
        filled += size / max(scale, 1) * columns
        picture += sign * (round(min(filled, 2 * columns)) - len(picture))
    if len(picture) > columns:
        picture = picture[: columns - 1] + BEYOND
    return f"▕{picture.ljust(columns, FREE)}▏"


def verdict(estimate: Estimate, dtype: str) -> str:
    """In words, whether this dtype fits into the estimate's memory, and what would."""
    memory = estimate.memory or 0
    found, high = estimate.verdict(dtype, memory), estimate.needed(dtype)
    what = f" for training with {TRAINING[estimate.train]}" if estimate.train else ""
    device = f"{format_size(memory)} GPU{what}"
    most = f"{format_size(high)} at most" if high is not None else f"{dtype} is not trained so"
    if found.fits:
        return f"{device}: yes ({most})"
    if found.cure is not None:
        change = as_options(found.cure.change)
        return f"{device}: no ({most}). Smallest change that fits: {change} ({format_size(found.bytes or 0)})"
    return f"{device}: no ({most}), and no smaller batch, length or dtype does; spread it over devices (`dispatch`)"


def explanation(estimate: Estimate, found: Budget) -> list[str]:
    """Each term with its interval, its formula, the numbers that went in, and where it comes from."""
    lines = ["", f"{found.dtype}: how each term comes about"]
    given = grounds(estimate.architecture, found, estimate.workload)
    for name, term in found.terms().items():
        ground = given[name]
        inputs = ", ".join(f"{label} {_number(value)}" for label, value in ground.inputs.items())
        lines += [
            f"  {name.replace('_', ' ')}: {format_size(term.bytes)}, {_interval(term)}",
            f"    formula  {term.formula}",
            f"    inputs   {inputs}",
            f"    source   {ground.source}",
        ]
    return lines


def _interval(term: Term) -> str:
    if term.basis == "exact":
        return f"exact ({term.bytes:,} bytes)"
    return f"{term.basis}, {format_size(term.low)} to {format_size(term.high)}"


def _number(value: int | str) -> str:
    return f"{value:,}" if isinstance(value, int) else value


def compare(estimates: Sequence[Estimate], *, width: int | None = None) -> str:
    """Several models as one table, dtype by dtype, and their pictures on one scale."""
    budgets = [(found.dtype, estimate) for found in estimates[0].budgets for estimate in estimates]
    rows = [_compared(estimate, dtype) for dtype, estimate in budgets]
    scale = estimates[0].memory or max(estimate[dtype].inference for dtype, estimate in budgets)
    dtypes = max(len(row["dtype"]) for row in rows)
    labels = [f"{row['dtype']:{dtypes}s}  {row['model']}" for row in rows]
    room = max(map(len, labels))
    columns = BAR if width is None else max(8, min(BAR, width - room - 14))
    pictures = [
        f"{label:{room}s}  {bar(estimate[dtype], scale, columns, train=estimate.train)}  {row['total']}"
        for label, row, (dtype, estimate) in zip(labels, rows, budgets, strict=True)
    ]
    lines = [f"{len(estimates)} models; {_tokens(estimates[0])}", *table(rows, width)]
    lines += [f"note: {estimate.model}: {note}" for estimate in estimates for note in estimate.notes]
    lines += [
        f"note: {estimate.model} takes {estimate.workload.sequence_length} tokens at the most"
        for estimate in estimates
        if estimate.workload.sequence_length != estimates[0].workload.sequence_length
    ]
    return "\n".join([*lines, *pictures, TRAINING_LEGEND if estimates[0].train else LEGEND])


def _compared(estimate: Estimate, dtype: str) -> Row:
    row = _row(estimate, estimate[dtype])
    if estimate.memory is not None:
        found = estimate.verdict(dtype, estimate.memory)
        least = as_options(found.cure.change) if found.cure else "nothing that was tried"
        row["fits"] = f"fits {format_size(estimate.memory)}" if found.fits else f"no; {least} would"
    first = {"dtype": row.pop("dtype"), "model": estimate.model, "parameters": f"{estimate[dtype].parameters:,}"}
    row.pop("basis")
    return {**first, **row}
