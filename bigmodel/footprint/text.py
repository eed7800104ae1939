"""Budgets as a terminal shows them: a table as wide as there is room for, a picture of each, and how it comes about."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

from bigpipe.sizes import format_size
from bigpipe.tables import Screen, columns

from .budgets import Budget, Term
from .grounds import as_accelerate, grounds

BAR = 40
"""Columns of a picture at the most."""
SHORTEST_BAR = 8
ENDLESS = 10_000
"""Characters of a line in a file or a pipe."""
SIGNS = {"weights": "█", "kv_cache": "▓", "activations": "▒", "runtime": "░"}
FREE, BEYOND = "·", "×"
LEGEND = "█ weights  ▓ KV cache  ▒ activations  ░ runtime  · free  × does not fit"
TRAINING_LEGEND = "█ training step  ░ runtime  · free  × does not fit"
TRAINING = {"adamw": "AdamW", "adamw_8bit": "8-bit AdamW", "sgd": "SGD", "lora": "LoRA"}
DROPPED = (
    "basis", "parameters", "AdamW", "8-bit AdamW", "SGD", "LoRA", "largest layer", "runtime", "activations", "KV cache",
    "weights",
)  # fmt: skip
"""Columns to leave out where the terminal is narrow, one after the other."""

Row = dict[str, str]


def table(rows: Sequence[Row], width: int | None) -> list[str]:
    """Columns as wide as what stands in them; less important ones are left out until a line fits. Where none does,
    lines are broken."""
    names = list(rows[0])
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    widths["basis"] = max((len(row.get("basis", "")) for row in rows), default=0)
    dropped = iter(DROPPED)
    while not (fits := width is None or sum(widths[name] + 2 for name in names) - 2 <= width):
        if (least := next(dropped, None)) is None:
            break
        names = [name for name in names if name != least]
    head = {name: "" if name in ("basis", "dtype") else name for name in names}
    if not fits:
        return columns([[row[name] for name in names] for row in (head, *rows)], Screen(width)).splitlines()
    return ["  ".join(_cell(name, row[name], widths[name]) for name in names).rstrip() for row in (head, *rows)]


def _cell(name: str, text: str, width: int) -> str:
    return text.ljust(width) if name in ("dtype", "basis", "model", "fits") else text.rjust(width)


def row(found: Budget, train: str | None) -> Row:
    shown = {
        "dtype": found.dtype,
        "weights": format_size(found.weights.bytes),
        "KV cache": format_size(found.kv_cache.bytes),
        "activations": format_size(found.activations.bytes),
        "runtime": format_size(found.runtime.bytes),
        "total": format_size(found.inference),
        "largest layer": format_size(found.counts.largest_layer),
    }
    for name in TRAINING if train else ("adamw",):
        term = found.training[name]
        shown[TRAINING[name]] = format_size(term.bytes) if term else "–"
    return {
        **shown,
        "basis": " | ".join(map(_basis, (found.weights, found.kv_cache, found.activations, found.runtime))),
    }


def _basis(term: Term) -> str:
    if term.basis != "calibrated" or not term.bytes:
        return term.basis
    # Of next to nothing, what kernels take for themselves is many times as much: no share to tell people
    share = round((term.high - term.bytes) / term.bytes * 100)
    return f"±{share} %" if share <= 100 else f"up to {format_size(term.high)}"


def accelerate_row(found: Budget) -> Row:
    sizes = (format_size(value) if value is not None else "N/A" for value in as_accelerate(found).values())
    return {
        "dtype": found.dtype,
        **dict(zip(("Largest Layer", "Total Size", "Training using Adam"), sizes, strict=True)),
    }


def pictures(budgets: Sequence[tuple[str, Budget, str]], scale: int, width: int | None, train: str | None) -> list[str]:
    """(label, budget, what is written behind its bar) as lines; scale: bytes of a whole bar."""
    width = width or ENDLESS
    labels, tails = (max(map(len, texts)) for texts in ([row[0] for row in budgets], [row[2] for row in budgets]))
    beside = labels + SHORTEST_BAR + tails + 6 <= width
    room = max(SHORTEST_BAR, min(BAR, width - labels - 6 - tails * beside))
    between = "  " if beside else "\n    "
    lines = [f"{label:{labels}s}  {_bar(found, scale, room, train)}{between}{said}" for label, found, said in budgets]
    return [*lines, fill(TRAINING_LEGEND if train else LEGEND, width)]


def _bar(found: Budget, scale: int, columns: int, train: str | None) -> str:
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


def explanation(found: Budget) -> list[str]:
    """Each term with its interval, its formula, the numbers that went in, and where it comes from."""
    lines = ["", f"{found.dtype}: how each term comes about"]
    for (name, term), (inputs, source) in zip(found.terms().items(), grounds(found).values(), strict=True):
        told = [
            f"{label} {value:,}" if isinstance(value, int) else f"{label} {value}" for label, value in inputs.items()
        ]
        lines += [
            f"  {name.replace('_', ' ')}: {format_size(term.bytes)}, {_interval(term)}",
            f"    formula  {term.formula}",
            f"    inputs   {', '.join(told)}",
            f"    source   {source}",
        ]
    return lines


def _interval(term: Term) -> str:
    if term.basis == "exact":
        return f"exact ({term.bytes:,} bytes)"
    return f"{term.basis}, {format_size(term.low)} to {format_size(term.high)}"
