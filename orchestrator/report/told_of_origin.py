"""What `--json` holds of where a published model comes from, as models; `answers` says which is which."""

from __future__ import annotations

from typing import Literal

from .told_of_recipes import Answer, Strict


class ComparedFile(Strict):
    """One file of a published model."""

    name: str
    """Relative path."""
    became: Literal["equal", "different", "not recomputed"]
    """The last: nothing says what it must be, such as a card."""
    bytes: int
    """Of a weight file: of its tensors, without the header."""
    equal_bytes: int
    """Of these, those that are what the source gives."""
    tensors: int
    """Of a weight file; 0 for others."""
    note: str
    """What it was compared with, or why it was not."""


class Unlike(Strict):
    """Something that is not what the source gives."""

    name: str
    """Of the tensor; "" for a whole file."""
    file: str
    """That holds it; "" where it is not there."""
    what: Literal["bytes", "dtype", "shape", "missing", "extra", "text"]
    """`text`: of a file beside the weights."""
    detail: str
    """In words."""


class Reproduced(Answer):
    """A published quantized model, recomputed from its source."""

    equal: bool
    """All that can be recomputed is equal."""
    published: str
    """As it was asked for."""
    commit: str | None
    """Of the published repository."""
    source: str
    """What it was made from."""
    source_commit: str | None
    """Of the source's repository."""
    pinned: bool
    """The source's commit is on record, or was named; else the source is as it is now."""
    scheme: str
    """Its format."""
    files: list[ComparedFile]
    """Weights first."""
    differences: list[Unlike]
    """In the order of the source; empty where it is equal."""
    notes: list[str]
    """What else to know."""


class Attested(Answer):
    """What was written of a published model for other tools."""

    directory: str
    """The model's."""
    digest: str
    """Of all its files, as `model.sig` names it: sha256:…"""
    signed: bool
    """With the key that was given."""
    files: list[str]
    """Paths of the attestations."""
    notes: list[str]
    """What could not be said."""


class Unlisted(Strict):
    """A file that is not as a document says."""

    file: str
    """Relative path."""
    problem: Literal["changed", "missing", "extra"]
    """How."""
    against: str
    """Name of the document."""


class CheckedDirectory(Answer):
    """A published model beside what is said of it."""

    directory: str
    """The model's."""
    files: int
    """How many were hashed."""
    bytes: int
    """Of these."""
    documents: dict[str, Literal["signed", "not checked", "not signed"]]
    """Name of each that it was held against. `not checked`: signed, and no key was given."""
    findings: list[Unlisted]
    """What is not as they say."""
