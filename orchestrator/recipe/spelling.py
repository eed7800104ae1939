"""Numbers that are written otherwise than Python writes them, and stand in texts as they are written: a tag `v2.10`."""

from __future__ import annotations

from bigpipe.orchestrator.contract import Json


class Spelt:
    spelling: str
    """How the number is written: `2.10`, `1e3`, `0x10`."""

    def __str__(self) -> str:
        """What becomes of it where a text is taken: fields of pydantic that coerce numbers ask for it too."""
        return self.spelling


class _Float(Spelt, float):
    pass


class _Integer(Spelt, int):
    pass


def spelt(number: int | float, text: str) -> int | float:
    """Return a number that is still known as it is written."""
    if str(number) == text:
        return number
    found = _Integer(number) if isinstance(number, int) else _Float(number)
    found.spelling = text
    return found


def plain(value: Json) -> Json:
    """Return a value with the numbers alone, at any depth."""
    if isinstance(value, dict):
        return {key: plain(child) for key, child in value.items()}
    if isinstance(value, list):
        return [plain(child) for child in value]
    if not isinstance(value, Spelt):
        return value
    return int(value) if isinstance(value, int) else float(value)  # type: ignore[arg-type]  # it is one of both
