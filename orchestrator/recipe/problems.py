"""What can be wrong in a manifest: the codes, and the list that collects every problem before any is raised."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import NoReturn

from bigpipe.errors import ManifestError, Place, Problem


class Fault(StrEnum):
    """Each is explained, with an example and the cure, in docs/reference/errors.md."""

    NOT_TEXT = "BP001"
    FILE_TOO_LARGE = "BP002"
    TOO_DEEP = "BP003"
    ALIAS_EXPANSION = "BP004"
    SYNTAX = "BP005"
    NOT_A_MAP = "BP006"
    SEVERAL_DOCUMENTS = "BP007"
    DUPLICATE_KEY = "BP008"
    TAG = "BP009"
    KEY_NOT_TEXT = "BP010"
    AMBIGUOUS_SCALAR = "BP011"
    BAD_ALIAS = "BP012"

    WRONG_VERSION = "BP101"
    MISSING_FIELD = "BP102"
    UNKNOWN_FIELD = "BP103"
    WRONG_TYPE = "BP104"
    NOT_A_CHOICE = "BP105"
    BAD_VALUE = "BP106"
    BAD_NAME = "BP107"
    UNKNOWN_KIND = "BP108"
    BROKEN_KIND = "BP109"
    UNTRUSTED_KIND = "BP110"
    NOT_THERE = "BP111"

    UNKNOWN_REFERENCE = "BP201"
    BAD_REFERENCE = "BP202"
    ENVIRONMENT_UNSET = "BP203"
    SECRET_REFERENCE = "BP204"  # noqa: S105 - a code, not a password
    PARAMETER_REQUIRED = "BP205"
    BAD_ARGUMENT = "BP206"
    MISPLACED_REFERENCE = "BP207"

    UNKNOWN_STAGE = "BP301"
    UNKNOWN_PORT = "BP302"
    MISSING_PORT = "BP303"
    WRONG_ARTIFACT = "BP304"
    NOT_MANY = "BP305"
    CYCLE = "BP306"
    BAD_MATRIX = "BP307"
    NO_VARIANT = "BP308"
    TOO_MANY_NODES = "BP309"
    NO_RANKS = "BP310"
    BAD_FIRST = "BP311"

    CONDITION_SYNTAX = "BP401"
    UNKNOWN_METRIC = "BP402"
    BAD_UNIT = "BP403"
    NOT_UPSTREAM = "BP404"

    REFUSED_VARIABLE = "BP501"
    UNDECLARED_SECRET = "BP502"  # noqa: S105
    PASSWORD = "BP503"  # noqa: S105


MAX_PROBLEMS = 200
"""Enough to repair; a file that has more is not a manifest, and each costs a search for its cure."""

Keys = tuple[str | int, ...]
"""Keys and indexes from the top of a document."""


class Problems:
    """Collects; a problem that every variant of a matrix repeats is kept once."""

    def __init__(self, place_at: Callable[..., Place] = Place) -> None:
        """place_at: finds a path in the document that the problems are about; see `Document.place_at`."""
        self._place_at = place_at
        self._found: dict[tuple[Fault, Place, str], Problem] = {}
        self._added = 0

    def __len__(self) -> int:
        return self._added

    def add(
        self, code: Fault, at: Place | Keys, cause: str, cure: str = "", *, key: bool = False, part: str = ""
    ) -> None:
        """Note a problem at a place, or at a path in the document. key, part: as for `Document.place_at`."""
        place = at if isinstance(at, Place) else self._place_at(at, key=key, part=part)
        self._added += 1
        self._found.setdefault((code, place, cause), Problem(code.value, place, cause, cure))
        if len(self._found) >= MAX_PROBLEMS:
            raise self.error()

    def fail(self, code: Fault, at: Place | Keys, cause: str, cure: str, *, key: bool = False) -> NoReturn:
        """Note a problem after which nothing can be read, and raise all of them."""
        self.add(code, at, cause, cure, key=key)
        raise self.error()

    def error(self) -> ManifestError:
        return ManifestError(list(self._found.values()))

    def raise_if_any(self) -> None:
        if self._found:
            raise self.error()
