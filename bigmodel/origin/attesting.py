"""Writes attestations of a published model, and checks a directory against them and against its provenance."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.checkpoint import MAX_CONFIG, invalid, read_json
from bigpipe.bigmodel.publishing import PROVENANCE, Published, Stored, read_card, read_provenance
from bigpipe.errors import StageFailed, UsageError
from bigpipe.files import explained, lies_in, make_folders, write_file
from bigpipe.names import PATH, checked
from bigpipe.sizes import counted, format_transfer

from .bundles import bundle, open_bundle, read_private_key, read_public_key
from .listing import files_of, model_name, require_directory, root_digest
from .records import commit_of
from .statements import SIGNATURE, Subject, bill_of_materials, provenance_statement, signature_statement

SIGNED = "model.sig"
BUILT = "provenance.sigstore.json"
MATERIALS = "bom.cdx.json"
TAKE_AGAIN = "take it as it was published"

Report = Callable[[int, int], None]


def beside(directory: Path) -> Path:
    """Return where the attestations of a directory lie, unless it is said otherwise: beside it, so that it stays as it
    was published."""
    named = directory if directory.name not in ("", "..") else Path(os.path.abspath(directory))
    return named.parent / f"{model_name(directory)}.attestations"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Attested:
    """What was written of a published model."""

    directory: str
    digest: str
    """Of all its files, as `model.sig` names it."""
    signed: bool
    files: tuple[str, ...]
    """Paths of the attestations."""
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        sealed = "signed" if self.signed else "not signed"
        return f"<Attested {self.directory}: {counted(len(self.files), 'attestation')}, {sealed}>"

    def as_json(self) -> dict[str, Any]:
        """Return what `attest --json` prints."""
        told = {"directory": self.directory, "digest": f"sha256:{self.digest}", "signed": self.signed}
        return {"schema": "bigpipe.attest/1", **told, "files": list(self.files), "notes": list(self.notes)}

    def render(self) -> str:
        """Return it as text."""
        head = f"{self.directory}: sha256:{self.digest}, {'signed' if self.signed else 'not signed'}"
        return "\n".join([head, *(f"wrote {file}" for file in self.files), *(f"note: {note}" for note in self.notes)])


@checked(directory=PATH)
def attest(
    directory: str | Path,
    out: str | Path | None = None,
    *,
    key: str | Path | None = None,
    progress: Report = lambda done, total: None,
) -> Attested:
    """Write what other tools check a published model by, and return where.

    directory: of real files, as `save` writes them. out: a directory for the attestations; None: `NAME.attestations`
      beside it. key: a PEM file with a private key on P-256, P-384 or P-521; None: nothing is signed. progress: told of
      bytes hashed.

    `model.sig` has the digest of every file (OpenSSF model signing), `provenance.sigstore.json` how it was built (SLSA
    v1, where bigpipe's `provenance.json` is there), both as in-toto statements in Sigstore bundles; `bom.cdx.json` what
    it consists of (CycloneDX 1.6). The same files and key give the same statements. Raise UsageError,
    InvalidCheckpoint, and StageFailed where the files are not those that `provenance.json` names.
    """
    folder = Path(directory)
    target = Path(out) if out is not None else beside(folder)
    if lies_in(target, folder):
        raise UsageError(
            f"{target} lies in the model that is attested", "choose a directory outside of it", field="out"
        )
    private = read_private_key(Path(key)) if key is not None else None
    subject = _subject(folder, files_of(folder, progress))
    if subject.published is not None:
        _require_as_built(folder, subject.files, subject.published)
    texts = {SIGNED: bundle(signature_statement(subject), private), MATERIALS: _text(bill_of_materials(subject))}
    if subject.published is not None:
        texts[BUILT] = bundle(provenance_statement(subject, subject.published), private)
    with explained(target):
        make_folders(target)
        for name, text in texts.items():
            write_file(target / name, text)
    notes = (
        () if subject.published else (f"no {BUILT}: there is no {PROVENANCE} of bigpipe's, so nobody knows the build",)
    )
    return Attested(
        directory=str(folder), digest=root_digest(subject.files), signed=private is not None,
        files=tuple(str(target / name) for name in sorted(texts)), notes=notes,
    )  # fmt: skip


def _require_as_built(folder: Path, files: Mapping[str, Stored], published: Published) -> None:
    """Raise StageFailed for files that are not those of the build that a statement would be about."""
    first = next(_differences(files, _listed(published), PROVENANCE), None)
    if first is not None:
        cause = (
            f"{folder} is not as its {PROVENANCE} says, so that build is not its own: {first.file} is {first.problem}"
        )
        raise StageFailed(cause, f"{TAKE_AGAIN}; or leave {PROVENANCE} away, and nothing is said of the build")


def _text(told: Mapping[str, Any]) -> str:
    return json.dumps(told, indent=2) + "\n"


def _subject(folder: Path, files: Mapping[str, Stored]) -> Subject:
    card, published = read_card(folder), read_provenance(folder)
    config = read_json(folder / "config.json", folder, MAX_CONFIG) if "config.json" in files else {}
    base, scheme = None, None
    if published is not None:
        scheme = published.provenance.param("quantize", "scheme")
        if (download := published.provenance.last("download")) and (repo := download.params.get("repo")):
            base = (str(repo), commit_of(download.metrics.get("commit")))
    elif isinstance(card.base, str):
        base = (card.base, commit_of(card.commit))
    return Subject(
        name=model_name(folder), files=files, published=published, config=config, card=card.metadata, base=base,
        scheme=scheme,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Finding:
    """A file that is not as a document says."""

    file: str
    problem: str
    """changed, missing or extra."""
    against: str
    """The document."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Checked:
    """A directory beside what is said of it."""

    directory: str
    files: int
    bytes: int
    documents: Mapping[str, str]
    """Name of each that it was held against → `signed` (with the key that was given), `not checked` (signed, and no key
    was given) or `not signed`."""
    findings: tuple[Finding, ...] = ()

    def __repr__(self) -> str:
        held = f"{counted(self.files, 'file')}, {counted(len(self.documents), 'document')}"
        return f"<Checked {self.directory}: {held}, {counted(len(self.findings), 'difference')}>"

    @property
    def error(self) -> StageFailed | None:
        """Return why it is not what is said; None where it is."""
        if not self.findings:
            return None
        first = self.findings[0]
        cause = f"{self.directory} is not as {first.against} says: {first.file} is {first.problem}"
        return StageFailed(cause, TAKE_AGAIN)

    def as_json(self) -> dict[str, Any]:
        """Return what `verify DIRECTORY --json` prints."""
        findings = [{"file": each.file, "problem": each.problem, "against": each.against} for each in self.findings]
        told = {"directory": self.directory, "files": self.files, "bytes": self.bytes}
        return {"schema": "bigpipe.directory/1", **told, "documents": dict(self.documents), "findings": findings}

    def render(self) -> str:
        """Return it as text."""
        lines = [f"{self.directory}: {counted(self.files, 'file')}, {format_transfer(self.bytes)} hashed"]
        for name, sealed in self.documents.items():
            wrong = [each for each in self.findings if each.against == name]
            lines.append(f"{name} ({sealed}): {'all as it says' if not wrong else counted(len(wrong), 'difference')}")
            lines += [f"  {each.file} is {each.problem}" for each in wrong]
        return "\n".join(lines)


@checked(directory=PATH)
def check_directory(
    directory: str | Path,
    attestations: str | Path | None = None,
    *,
    key: str | Path | None = None,
    progress: Report = lambda done, total: None,
) -> Checked:
    """Hash a published model, and return what is not as its `provenance.json` and its attestations say.

    attestations: the directory that `attest` wrote; None: `NAME.attestations` beside it, where that is there. key: a
      PEM file with the public key that they must be signed with; None: signatures are not checked. progress: told of
      bytes hashed. Nothing is asked of a network.

    Raise UsageError where nothing says what must be there, InvalidCheckpoint for documents that are damaged,
    StageFailed for one that is not signed with the key.
    """
    folder = Path(directory)
    public = read_public_key(Path(key)) if key is not None else None
    place = Path(attestations) if attestations is not None else beside(folder)
    sealed: dict[str, str] = {}
    said: dict[str, Mapping[str, str]] = {}
    names = [name for name in (SIGNED, BUILT) if (place / name).is_file()]
    if public is not None and SIGNED not in names:
        raise UsageError(f"a key is given, and there is no {place / SIGNED}", "say where it is: --attestations DIR")
    if attestations is not None and not names:
        cause = f"there is neither {SIGNED} nor {BUILT} in {place}"
        raise UsageError(cause, "name the directory that `bigpipe attest` wrote: --attestations DIR")
    for name in names:
        opened = open_bundle(place / name, public)
        sealed[name] = "signed" if opened.checked else "not checked" if opened.signed else "not signed"
        said[name] = _stated(place / name, opened.statement)
    require_directory(folder)
    if (published := read_provenance(folder)) is not None:
        sealed[PROVENANCE], said[PROVENANCE] = "not signed", _listed(published)
    if not said:
        cause = f"nothing says what {folder} must hold: there is no {PROVENANCE} in it, and no {place / SIGNED}"
        raise UsageError(cause, "say where its attestations are: --attestations DIR")
    files = files_of(folder, progress)
    findings = [finding for name, told in said.items() for finding in _differences(files, told, name)]
    size = sum(file.size for file in files.values())
    return Checked(directory=str(folder), files=len(files), bytes=size, documents=sealed, findings=tuple(findings))


def _listed(published: Published) -> dict[str, str]:
    """What a provenance says of the files beside it."""
    return {name: file.sha256 for name, file in published.files.items()}


def _stated(file: Path, statement: Mapping[str, Any]) -> dict[str, str]:
    """File → sha256, as a statement says. Raise InvalidCheckpoint where it says no such thing."""
    try:
        if statement["predicateType"] != SIGNATURE:
            return {each["name"]: each["digest"]["sha256"] for each in statement["subject"]}
        told = {each["name"]: each["digest"] for each in statement["predicate"]["resources"]}
        root = root_digest({name: Stored(sha256, 0) for name, sha256 in told.items()})
        if root != statement["subject"][0]["digest"]["sha256"]:
            raise ValueError("its digests do not add up to that of the model")
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise invalid(file, f"is not a statement about files: {error}", TAKE_AGAIN) from None
    return told


def _differences(files: Mapping[str, Stored], told: Mapping[str, str], document: str) -> Iterator[Finding]:
    for name in sorted({*files, *told} - ({PROVENANCE} if document == PROVENANCE else set())):
        if name not in files:
            yield Finding(name, "missing", document)
        elif name not in told:
            yield Finding(name, "extra", document)
        elif files[name].sha256 != told[name]:
            yield Finding(name, "changed", document)
