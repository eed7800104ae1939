"""A long text as tokens, a piece at a time: what a tokenizer holds of a text is some hundred times its bytes.

A piece begins with the last characters of the one before, and both must have the same tokens in the middle of these:
there they are put together. What a tokenizer makes of the ends of a piece, where it does not see what stands around
them, is in neither.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

PIECE = 2**20
"""Characters that are read at once."""
SHARED = 2**12
"""Characters that two pieces have in common."""
ALIKE = 32
"""Tokens in a row that both must have there."""


@dataclass(slots=True)
class Encoded:
    """Tokens of a text, and where each stands: from a character to before another, (0, 0) for a special one."""

    ids: array[int]
    begins: array[int]
    ends: array[int]

    def spans(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Return where some of the tokens stand."""
        return list(zip(self.begins[begin:end], self.ends[begin:end], strict=True))

    def holds(self, most: int | None, before: int) -> bool:
        """Return whether the first `most` tokens all stand before a character; of None, nothing ever does."""
        return most is not None and len(self.ids) >= most and 0 < self.ends[most - 1] <= before

    def same(self, place: int, other: Encoded, there: int) -> bool:
        """Return whether as many tokens as two pieces must agree in are the other's, from a place on in each."""
        mine, others = slice(place, place + ALIKE), slice(there, there + ALIKE)
        pairs = ((self.ids, other.ids), (self.begins, other.begins), (self.ends, other.ends))
        return len(self.ids) >= mine.stop and all(own[mine] == its[others] for own, its in pairs)

    def go_on(self, place: int, other: Encoded, there: int) -> None:
        """Put the other's tokens from a place on behind this one's before a place."""
        for own, its in ((self.ids, other.ids), (self.begins, other.begins), (self.ends, other.ends)):
            own[place:] = its[there:]


def encode(
    tokenizer: Any, text: str, bounded: Callable[[], AbstractContextManager[None]], most: int | None = None
) -> Encoded:
    """Return the tokens of a text as a fast tokenizer has them, with the special ones around it; of those beyond the
    first `most`, as many as there happen to be. bounded: around each piece."""
    found = _piece(tokenizer, text, 0, PIECE, bounded)
    begin = PIECE - SHARED
    while begin + SHARED < len(text) and not found.holds(most, begin):
        following = _piece(tokenizer, text, begin, begin + PIECE, bounded)
        seam = _seam(found, following, begin)
        if seam is None:  # one word without an end, as the tokenizer has it
            return _piece(tokenizer, text, 0, len(text), bounded)
        found.go_on(seam[0], following, seam[1])
        begin += PIECE - SHARED
    return found


def _piece(
    tokenizer: Any, text: str, begin: int, end: int, bounded: Callable[[], AbstractContextManager[None]]
) -> Encoded:
    with bounded():
        encoded = tokenizer(text[begin:end], return_offsets_mapping=True, verbose=False)
        spans = encoded["offset_mapping"]
        begins, ends = (array("q", (span[side] + begin if span[1] else 0 for span in spans)) for side in (0, 1))
        return Encoded(array("i", encoded["input_ids"]), begins, ends)


def _seam(found: Encoded, following: Encoded, begin: int) -> tuple[int, int] | None:
    """The places of the first token that both have, with those after it, from the middle on of what they share, which
    begins at `begin`; None where there is none."""
    places: dict[int, int] = {}
    for number, (first, last) in enumerate(zip(following.begins, following.ends, strict=True)):
        if first >= begin + SHARED:
            break
        if last:
            places.setdefault(first, number)
    place = len(found.ids)
    while place and (found.begins[place - 1] >= begin + SHARED // 2 or not found.ends[place - 1]):
        place -= 1
    for own in range(place, len(found.ids)):
        same = places.get(found.begins[own]) if found.ends[own] else None
        if same is not None and found.same(own, following, same):
            return own, same
    return None
