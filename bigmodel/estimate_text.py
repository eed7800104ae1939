"""An estimate as a terminal shows it: a table, where it came from, and what fits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigpipe.sizes import format_size, format_transfer

from .budget import Budget, Term

if TYPE_CHECKING:
    from .estimates import Estimate

COLUMNS = ("weights", "KV cache", "activations", "runtime", "total", "largest layer", "AdamW")
BAR = 40


def render(estimate: Estimate) -> str:
    lines = [_headline(estimate), _header()]
    lines += [_row(found) for found in estimate.budgets]
    lines += [f"note: {note}" for note in estimate.notes]
    if estimate.memory is not None:
        lines += [line for found in estimate.budgets for line in _verdict(estimate, found, estimate.memory)]
    return "\n".join(lines)


def _headline(estimate: Estimate) -> str:
    where = f" at {estimate.revision[:12]}" if estimate.revision else ""
    fetched = f", {format_transfer(estimate.fetched_bytes)} fetched" if estimate.fetched_bytes else ""
    first = estimate.budgets[0]
    work = estimate.workload
    tokens = f"{work.batch_size} × {work.sequence_length} tokens"
    return (
        f"{estimate.model}{where}: {estimate.architecture.class_name}, {first.parameters:,} parameters; "
        f"from {estimate.source}{fetched}; {tokens}"
    )


def _header() -> str:
    return f"{'':10s}" + "".join(f"{name:>15s}" for name in COLUMNS)


def _row(found: Budget) -> str:
    adamw = found.training["adamw"]
    sizes = [
        found.weights.bytes, found.kv_cache.bytes, found.activations.bytes, found.runtime.bytes, found.inference,
        found.largest_layer,
    ]  # fmt: skip
    cells = [format_size(size) for size in sizes] + [format_size(adamw.bytes) if adamw else "–"]
    basis = " | ".join(_basis(term) for term in (found.weights, found.kv_cache, found.activations, found.runtime))
    return f"{found.dtype:10s}" + "".join(f"{cell:>15s}" for cell in cells) + f"   {basis}"


def _basis(term: Term) -> str:
    if term.basis != "calibrated":
        return term.basis
    return f"±{(term.high - term.bytes) / term.bytes * 100:.0f} %" if term.bytes else "calibrated"


def _verdict(estimate: Estimate, found: Budget, memory: int) -> list[str]:
    verdict = estimate.verdict(found.dtype, memory)
    high = format_size(found.inference_high)
    if verdict.fits:
        answer = f"yes ({high} at most)"
    elif verdict.change is not None:
        size = format_size(verdict.change.bytes)
        answer = f"no ({high} at most). Smallest change that fits: {verdict.change.option} ({size})"
    else:
        answer = f"no ({high} at most), and no smaller batch, length or dtype does; spread it over devices (`dispatch`)"
    return [f"{found.dtype:10s}{_bar(found, memory)}  {format_size(memory)} GPU: {answer}"]


def _bar(found: Budget, memory: int) -> str:
    """The budget as a share of the memory: weights █, cache ▓, activations and runtime ▒, beyond it ×."""
    parts = ((found.weights, "█"), (found.kv_cache, "▓"), (found.activations, "▒"), (found.runtime, "▒"))
    filled, picture = 0.0, ""
    for term, sign in parts:
        filled += term.bytes / max(memory, 1) * BAR
        picture += sign * (round(min(filled, 2 * BAR)) - len(picture))
    inside = picture[:BAR].ljust(BAR, "░")
    return f"▕{inside}▏" if len(picture) <= BAR else f"▕{inside[:-1]}×▏"
