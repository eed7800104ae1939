"""The files of a published model by their digests, and by what names one refers to a model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from bigpipe.bigmodel.checkpoint import NO_PART
from bigpipe.bigmodel.publishing import Stored
from bigpipe.errors import UsageError
from bigpipe.files import explained, hash_file


def files_of(directory: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Stored]:
    """Return every file below a directory, by relative path, hashed. Raise UsageError where it is no directory, or
    holds a link, whose bytes are not its own."""
    require_directory(directory)
    with explained(directory):
        paths = paths_below(directory)
        if links := [path for path in paths if path.is_symlink()]:
            cause = f"{links[0]} is a link, and what it leads to may change"
            raise UsageError(cause, "take a directory of real files, as `save` and `bigpipe get` write them")
        sizes = {path: path.stat().st_size for path in paths if path.is_file()}
        found, done = {}, 0
        for path, size in sizes.items():
            found[path.relative_to(directory).as_posix()] = Stored(hash_file(path), size)
            done += size
            progress(done, sum(sizes.values()))
    return found


def require_directory(directory: Path) -> None:
    """Raise UsageError where it is none."""
    if not directory.is_dir():
        raise UsageError(f"there is no directory {directory}", "name one that holds a published model")


def paths_below(directory: Path) -> list[Path]:
    """Return files and directories of a model in order, without what belongs to a clone or a download: at the top
    alone, as OpenSSF's model signing has it, which both must agree with."""
    return [path for path in sorted(directory.rglob("*")) if path.relative_to(directory).parts[0] not in NO_PART]


def root_digest(files: Mapping[str, Stored]) -> str:
    """Return the sha256 of all digests in the order given: what OpenSSF's model signing calls the model by."""
    return hashlib.sha256(b"".join(bytes.fromhex(file.sha256) for file in files.values())).hexdigest()


def model_name(directory: Path) -> str:
    return os.path.basename(os.path.abspath(directory))


def package_url(repo: str, commit: str | None) -> str:
    """Return how other tools call a model on the Hub: https://github.com/package-url/purl-spec, type huggingface."""
    return f"pkg:huggingface/{repo}" + (f"@{commit}" if commit else "")
