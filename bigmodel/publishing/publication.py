"""Publishes a model: its files, a card, results, reports and provenance, all or nothing where the destination can."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bigpipe.errors import InvalidCheckpoint, StageFailed
from bigpipe.files import write_file

from .destinations import Destination, Receipt
from .provenance import PROVENANCE, Provenance
from .replacing import require_replaceable

CARD = "README.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """Directories whose files are published. Links are followed."""

    model: Path | None = None
    """Goes to the root, with a model card."""
    results: Path | None = None
    reports: Mapping[str, Path] = field(default_factory=dict)
    """By name. One lies directly in `reports/`, several in a folder each."""

    def files(self) -> dict[str, Path]:
        """Return name at the destination → the file whose bytes go there."""
        folders = {"results/": self.results}
        for name, folder in self.reports.items():
            folders[f"reports/{name}/" if len(self.reports) > 1 else "reports/"] = folder
        files: dict[str, Path] = {}
        for prefix, directory in {**folders, "": self.model}.items():
            for path in sorted(directory.rglob("*")) if directory else ():
                if path.is_file():
                    files.setdefault(prefix + path.relative_to(directory or path).as_posix(), path.resolve())
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
    if not overwrite:
        require_replaceable(target, provenance.maker)
    files = contents.files()
    if contents.model is not None:
        from .card import card_of

        files[CARD] = scratch / CARD
        write_file(files[CARD], card_of(contents.model, provenance, target.name, card or {}), durable=False)
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
        return target.finish(
            new, stored, partial(inspect, contents.model) if contents.model else lambda directory: None
        )


def inspect(model: Path, written: Path) -> None:
    """Read a written checkpoint through its own index, as a loader would, and compare it with `model`.

    Raise StageFailed where they differ. Weights that we cannot read ourselves are saved as they are.
    """
    try:
        expected = _tensors(model)
    except InvalidCheckpoint:
        return
    found = _tensors(written)
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise StageFailed(
            f"what was saved does not read back as the model: {', '.join(wrong[:4])} differ",
            "the disk or another process changed it meanwhile; run again",
        )


def _tensors(directory: Path) -> dict[str, Any]:
    from bigpipe.bigmodel.checkpoint import open_checkpoint

    opened = open_checkpoint(directory)
    return {**{name: (tensor.dtype, tensor.shape) for name, tensor in opened.tensors.items()}, **opened.tied}
