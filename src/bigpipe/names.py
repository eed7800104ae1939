"""Names that somebody wrote, against those that there are: what is probably meant, and an error where nothing is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

from .errors import UsageError, first_few


def is_text(text: str) -> bool:
    """Return whether it can be written down: bytes that are no UTF-8 reach Python as halves of characters, and no file
    name holds NUL."""
    return "\0" not in text and not any("\ud800" <= sign <= "\udfff" for sign in text)


def listed(words: Iterable[str], joint: str = "and") -> str:
    """Return `a, b and c`."""
    *most, last = list(words) or [""]
    return f"{', '.join(most)} {joint} {last}" if most else last


def closest(word: str, known: Sequence[str], most: int = 500) -> str | None:
    """Return the known word that `word` is probably a slip for. most: of the known ones that are compared."""
    folded = {name.lower().replace("_", "-"): name for name in known}
    same = folded.get(word.lower().replace("_", "-"))
    if same is not None:
        return same
    from difflib import get_close_matches

    # Comparing is quadratic in the length of words and linear in their number; both are the writer's to choose.
    return next(iter(get_close_matches(word[:100], known[:most], n=1, cutoff=0.6)), None)


def did_you_mean(word: str, known: Iterable[str], *, otherwise: str = "") -> str:
    """Return `did you mean 'x'?` where something known is close to `word`; else the known words, if they are few.
    `otherwise` introduces that list: `it takes` gives `it takes a, b and c`."""
    known = list(known)
    close = closest(word, known)
    if close is not None:
        return f"did you mean {close!r}?"
    return f"{otherwise} {listed(known)}" if otherwise and 0 < len(known) <= 20 else ""


def as_names(given: str | Iterable[str]) -> tuple[str, ...]:
    """Return names that may have been given as one text."""
    return (given,) if isinstance(given, str) else tuple(given)


def refuse_unknown(
    field: str,
    names: Iterable[str],
    known: Collection[str],
    what: str,
    cure: str,
    *,
    meant: Callable[[str], bool] | None = None,
) -> None:
    """Raise UsageError for names that mean nothing a model has, each with what was probably meant.

    field: the argument they stand in. what: what they should name, in the plural. known: names to suggest.
    meant: whether one means something; None: whether it is known.
    """
    unknown = [name for name in names if not (name in known if meant is None else meant(name))]
    if unknown:
        told = [_with_guess(name, known) for name in unknown]
        cause = f"{field} names {what} that the model does not have: {first_few(told)}"
        raise UsageError(cause, cure, field=f"{field}.{unknown[0]}")


def _with_guess(name: str, known: Collection[str]) -> str:
    close = closest(name, list(known), len(known))
    return f"{name} (did you mean {close}?)" if close else name
