"""Sizes in bytes and other counts, as people write and read them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from .errors import UsageError

UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
MOST = 2**63 - 1
"""Bytes; what files and memory can have at the most."""
TOO_MUCH = 2**1000
"""Counts that a float has no room for; nobody has as much, but what others count may say so."""
LONGEST = 100 * 365 * 86400
"""Seconds; who speaks of more means that there is no end to it."""
DIGITS = 40
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(value: int | str) -> int:
    """Bytes of `10GiB`, `10GB`, `1.5 TiB`, `30GIB`, `1024` or an int.

    Letters may have any case but for the final one: a lowercase `b` after a prefix means bits, as in Hugging Face's
    own parser, and nobody stores a model in bits, so it is refused.

    Raises ValueError with cause and cure.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{value!r} is not a size; write bytes or a number with a unit, such as 10GiB")
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"a size cannot be negative: {value}")
        return _within_reason(value)
    match = _SIZE.fullmatch(value)
    if match is not None and f"{match[2].lower()}b" in UNITS and match[2].lower() not in UNITS:
        meant = f"{match[1]}{match[2].capitalize()}B"
        raise ValueError(f"{value!r} is not a size; did you mean {meant!r}?")
    if match is None or match[2].lower() not in UNITS:
        raise ValueError(f"{value!r} is not a size; write bytes or a number with a unit, such as 10GiB or 10GB")
    number, unit = match.groups()
    if len(unit) > 1 and unit.endswith("b"):
        raise ValueError(f"{value!r} means bits; write {number}{unit[:-1]}B for bytes")
    if len(number) > DIGITS:
        raise ValueError(f"a size of {len(number)} digits is more than there is; write fewer")
    whole, _, fraction = number.partition(".")
    # Integer arithmetic: 0.1 has no exact binary fraction, and sizes are compared to the byte.
    return _within_reason(int(whole + fraction) * UNITS[unit.lower()] // 10 ** len(fraction))


def _within_reason(nbytes: int) -> int:
    if nbytes > MOST:
        raise ValueError(f"a size of more than {MOST:,} bytes is more than there is; write a smaller one")
    return nbytes


BARE = 10**6
"""Fewer bytes than this are not written without a unit: whoever writes `5` means gigabytes."""


def is_bare(value: int | str) -> bool:
    """Return whether it is a number without a unit that nobody means as bytes."""
    text = value.strip() if isinstance(value, str) else repr(value)
    return re.fullmatch(r"\d{1,40}(\.\d{1,40})?", text, re.ASCII) is not None and 0 < float(text) < BARE


def refuse_bare(value: int | str) -> None:
    """Raise ValueError, with cause and cure, for a number without a unit that nobody means as bytes."""
    if is_bare(value):
        text = value.strip() if isinstance(value, str) else repr(value)
        raise ValueError(f"{text} has no unit; write {text}GB or {text}GiB, or {text}B if it is bytes")


def size_of(name: str, value: int | str) -> int:
    """`parse_size` of an argument of this name; a number is bytes, a text has its unit. Raises UsageError."""
    try:
        if isinstance(value, str):
            refuse_bare(value)
        return parse_size(value)
    except ValueError as error:
        cause, _, cure = str(error).partition("; ")
        raise UsageError(f"{name}: {cause}", cure, field=name) from None


def format_size(size: float) -> str:
    """`12.2 GiB`: binary units, one decimal, as memory is sold and reported."""
    return _format(size, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def format_transfer(size: float) -> str:
    """`25.7 GB`: decimal units, one decimal, as disks and networks count."""
    return _format(size, 1000, ("B", "kB", "MB", "GB", "TB"))


BOUNDLESS = 2**59
"""Bytes that no disk has: a file system that has no end says so many."""


def format_free(size: int, what: str = "") -> str:
    """`69.2 GiB free`, or that there is no limit. what: what is free."""
    if size >= BOUNDLESS:
        return f"no limit of {what or 'space'}"
    return f"{format_size(size)} {what} free" if what else f"{format_size(size)} free"


def _format(size: float, base: int, units: tuple[str, ...]) -> str:
    size = size if abs(size) < TOO_MUCH else math.inf if size > 0 else -math.inf
    power = 0
    while power < len(units) - 1 and abs(size) >= base ** (power + 1):
        power += 1
    return f"{size / base**power:.{min(power, 1)}f} {units[power]}"


def exact_size(size: int) -> str:
    """The shortest text with a unit that `parse_size` reads back as these bytes: `48GiB`, `5GB`, `1025B`."""
    if size:
        for unit in ("TiB", "GiB", "MiB", "TB", "GB", "MB", "KiB", "kB", "B"):
            if size % UNITS[unit.lower()] == 0:
                return f"{size // UNITS[unit.lower()]}{unit}"
    return str(size)


@dataclass(frozen=True, slots=True)
class Total:
    """A sum of bytes, some of which may not be known."""

    known: int = 0
    """Of those that are."""
    whole: bool = True
    """All of them are."""

    @classmethod
    def of(cls, sizes: Iterable[int | None]) -> Total:
        """Return the sum of sizes; None: one that is not known."""
        found = list(sizes)
        return cls(sum(size or 0 for size in found), None not in found)

    @property
    def exact(self) -> int | None:
        """The sum; None where part of it is not known."""
        return self.known if self.whole else None

    def __str__(self) -> str:
        """`25.7 GB`, `at least 25.7 GB`, or `unknown bytes`."""
        if not self.whole:
            return f"at least {format_transfer(self.known)}" if self.known else "unknown bytes"
        return format_transfer(self.known)


def format_duration(seconds: float, *, whole: bool = False) -> str:
    """`0.42 s`, `12.3 s`, `4 min 5 s`, `1 h 2 min`. whole: `12 s`, of what is not known any better. It may come from a
    server, and be infinite."""
    if seconds > LONGEST:
        return "more than 100 years"
    if round(seconds, 1) < 60 and not whole:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (0 if hours else rest, "s")]
    return " ".join(f"{count} {unit}" for count, unit in parts if count) or "0 s"


def format_figure(number: float) -> str:
    """`1,234`, `0.9993`: whole numbers as they are, others to four digits."""
    return f"{number:,}" if isinstance(number, int) else f"{number:.4g}"


def counted(number: int, noun: str, ending: str = "s") -> str:
    """`1 file`, `2 files`."""
    return f"{number:,} {noun}{'' if number == 1 else ending}"
