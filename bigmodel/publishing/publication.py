"""Publishes a model: its files, a card, results, reports and provenance, all or nothing where the destination can.

check_destination    may it be written, and may what is there be replaced? Only what the same step of the same
                     recipe wrote and nobody has changed since
publish              writes it, and gives a receipt
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.checkpoint import is_part
from bigpipe.errors import InvalidCheckpoint, StageFailed, UsageError
from bigpipe.files import explained, lies_in, real_folders, write_file
from bigpipe.sizes import counted

from .destinations import Destination, Directory, Receipt, Stored
from .provenance import PROVENANCE, SCHEMA, Provenance

CARD = "README.md"
SMALL = 10_000_000
"""Bytes of a file that may be read during a plan."""
CURE = "choose another destination, or write overwrite: true to replace it as a whole"


def check_destination(
    target: Destination,
    *,
    base: Path | None = None,
    overwrite: bool = False,
    maker: tuple[str, str] | None = None,
) -> None:
    """Raise, before anything is computed, what would keep `target` from being written. base: the recipe's directory. A
    destination is replaced as a whole, so it must not hold that, or somebody's home. maker: who will write, recipe and
    node; None: not known."""
    if isinstance(target, Directory):
        kept = [Path.home(), *([base] if base else [])]
        if any(lies_in(place, target.path) for place in kept):
            raise UsageError(
                f"to: {target.path} would be replaced as a whole, and it holds the recipe or your home directory",
                "name a directory of its own, such as dist/model",
                field="to",
            )
        if (target.path / ".git").exists():
            cause = f"to: {target.path} is a git repository, and would be replaced as a whole"
            raise UsageError(cause, "name a directory in it", field="to")
    target.check()
    if not overwrite:
        require_replaceable(target, maker, longest=SMALL)


def require_replaceable(
    target: Destination, maker: tuple[str, str] | None = None, *, longest: int | None = None
) -> None:
    """Raise UsageError where `target` holds what bigpipe did not write, another maker wrote, or somebody changed.
    maker: recipe and node; None: not known yet. longest: bytes of a file that may be read; None: whatever there are."""
    there = target.listing()
    if not there or target.is_broken_off():
        return
    provenance = _provenance(target, there)
    if provenance is None:
        raise UsageError(
            f"to: {target.url} is there already, with {counted(len(there), 'file')} that bigpipe did not write",
            CURE,
            field="to",
        )
    by = (str(provenance.get("recipe")), str(provenance.get("node")))
    if maker is not None and by != maker:
        raise UsageError(f"to: {target.url} was written by node {by[1]} of recipe {by[0]!r}", CURE, field="to")
    told = provenance.get("files")
    written: Mapping[str, Any] = told if isinstance(told, dict) else {}
    names = [name for name in there if name != PROVENANCE]
    if changed := [name for name in names if not _as_written(target, name, there[name], written, longest)]:
        raise UsageError(
            f"to: {target.url} was changed since it was saved: {', '.join(sorted(changed)[:4])}", CURE, field="to"
        )


def _provenance(target: Destination, there: Mapping[str, Stored]) -> dict[str, Any] | None:
    """What the `provenance.json` there says; None where there is none of bigpipe's."""
    if PROVENANCE not in there or there[PROVENANCE].size > SMALL:
        return None
    try:
        found = json.loads(target.read(PROVENANCE))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.get("schema") == SCHEMA else None


def _as_written(target: Destination, name: str, seen: Stored, written: Mapping[str, Any], longest: int | None) -> bool:
    """By digest: an edit may keep the size, as weights of the same shapes do. What may not be read, and what can be had
    again, by size."""
    listed = written.get(name)
    if not isinstance(listed, Mapping) or listed.get("size") != seen.size:
        return False
    unread = longest is not None and seen.size > longest
    return target.keeps_versions or unread or target.digest(name) == listed.get("sha256")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """Directories whose files are published, but what git and the Hub's client keep there. Links are followed."""

    model: Path | None = None
    """Goes to the root, with a model card."""
    results: Path | None = None
    reports: Mapping[str, Path] = field(default_factory=dict)
    """By name. One lies directly in `reports/`, several in a folder each."""

    @property
    def folders(self) -> tuple[Path, ...]:
        given = (self.model, self.results, *self.reports.values())
        return tuple(folder for folder in given if folder is not None)

    def files(self) -> dict[str, Path]:
        """Return name at the destination → the file whose bytes go there."""
        folders = {"results/": self.results}
        for name, folder in self.reports.items():
            folders[f"reports/{name}/" if len(self.reports) > 1 else "reports/"] = folder
        files: dict[str, Path] = {}
        for prefix, directory in {**folders, "": self.model}.items():
            for path in sorted(directory.rglob("*")) if directory else ():
                name = path.relative_to(directory or path).as_posix()
                if path.is_file() and is_part(name):
                    files.setdefault(prefix + name, path.resolve())
        files.pop(PROVENANCE, None)
        return files


def publish(
    contents: Contents,
    target: Destination,
    provenance: Provenance,
    *,
    scratch: Path,
    card: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Receipt:
    """Put `contents` at `target` in place of all that is there, and return what was written.

    scratch: a directory for what is made on the way. card: metadata of the model card besides what is known.
    overwrite: replace whatever is there, not only what the same maker wrote. progress: (bytes done, of all).

    Raise UsageError where something is there that may not be replaced, StageFailed where it reads back differently,
    and the errors of the destination.
    """
    with explained(scratch, other="choose another destination"):
        files = contents.files()
        _refuse_own(contents, files.values(), target)
        if not overwrite:
            target = target.pinned()
            require_replaceable(target, provenance.maker)
        if contents.model is not None:
            from .card import card_of

            text = card_of(contents.model, provenance, target.name, card or {})
            target.check_card(text)
            files[CARD] = scratch / CARD
            write_file(files[CARD], text, durable=False)
        return _transfer(files, contents.model, target, provenance, scratch, progress)


def _transfer(
    files: Mapping[str, Path],
    model: Path | None,
    target: Destination,
    provenance: Provenance,
    scratch: Path,
    progress: Callable[[int, int], None],
) -> Receipt:
    total, done = sum(path.stat().st_size for path in files.values()), 0

    def report(size: int) -> None:
        nonlocal done
        done += size
        progress(min(done, total), total)

    with target.replacing(scratch) as new:
        stored = {name: target.put(new, name, path, report) for name, path in sorted(files.items())}
        # Last: it holds the digests of the others, and tells that they are all there
        write_file(scratch / PROVENANCE, provenance.json(stored), durable=False)
        stored[PROVENANCE] = target.put(new, PROVENANCE, scratch / PROVENANCE, report)
        if model is not None and isinstance(target, Directory):  # elsewhere the digests of all files must do
            inspect(model, new)
        return target.finish(new, stored)


def _refuse_own(contents: Contents, files: Collection[Path], target: Destination) -> None:
    """Raise UsageError where replacing the target would remove, or change, what is to be published."""
    if not isinstance(target, Directory):
        return
    inside = any(lies_in(target.path, folder) for folder in contents.folders)
    if inside or any(lies_in(place, target.path) for place in {*contents.folders, *real_folders(files)}):
        cause = f"to: {target.path} is, holds, or lies in a directory of what is to be saved"
        raise UsageError(cause, "choose a directory outside of it", field="to")


def inspect(model: Path, written: Path) -> None:
    """Read a written checkpoint through its own index, as a loader would, and compare it with `model`. Raise
    StageFailed where they differ. Weights that we cannot read ourselves are saved as they are."""
    try:
        expected = _tensors(model)
    except InvalidCheckpoint:
        return
    found = _tensors(written)
    wrong = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    if wrong:
        cause = f"what was saved does not read back as the model: {', '.join(sorted(wrong)[:4])} differ"
        raise StageFailed(cause, "the disk or another process changed it meanwhile; run again")


def _tensors(directory: Path) -> dict[str, Any]:
    from bigpipe.bigmodel.checkpoint import open_checkpoint

    opened = open_checkpoint(directory)
    return {**{name: (tensor.dtype, tensor.shape) for name, tensor in opened.tensors.items()}, **opened.tied}
