"""Where things lie in a store, and its records, which tell whether they are damaged.

objects/HEX             files by sha256, read-only, one name each
artifacts/HEX/          a tree of links into objects and to referenced files; what stages and people read
artifacts/HEX.json      what the tree holds, and what `stat` said of each file when its bytes were last known
keys/HEX.json           what a computation gave
partials/HEX            computations that share everything but their inputs
roots/HEX.json          what a manifest's nodes were last
released/HEX.json       artifacts whose bytes nobody wants to keep (`cache: false`)
runs/ID/                what happened in a run
work/HEX/{out,scratch}  what a node has done so far
parts/                  pieces that stages reuse over edits
memo/                   answers that were dear to get
tmp/ locks/ quarantine/

A record is one line of JSON in an envelope that holds the sha256 of that line, so any changed byte is seen.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from bigpipe import files
from bigpipe.errors import StageFailed, UsageError, first_few
from bigpipe.files import Damaged, read_sealed

if TYPE_CHECKING:
    from bigpipe.orchestrator.contract import Json

T = TypeVar("T")
PRIVATE = 0o700
explained = partial(
    files.explained,
    owner="the store",
    free="free space (`bigpipe gc` drops what no manifest names)",
    mend="let `bigpipe verify --repair` set aside what is not as the store made it",
    other="choose another store with --store DIR or BIGPIPE_HOME",
)
"""Turns every OSError within into an error with a cure."""
make_directory = partial(files.make_directory, mode=PRIVATE)
"""Creates a directory of the store and its parents, readable by its owner alone."""


def default_root(environment: Mapping[str, str] | None = None) -> Path:
    """Return `$BIGPIPE_HOME`, else `bigpipe` in the XDG cache directory."""
    environment = os.environ if environment is None else environment
    if home := environment.get("BIGPIPE_HOME"):
        return Path(os.path.abspath(os.path.expanduser(home)))
    cache = environment.get("XDG_CACHE_HOME", "")
    return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "bigpipe"


def memo_directory(store: str | Path | None = None) -> Path:
    """Return where a store keeps answers that are dear to get."""
    return (Path(store).absolute() if store else default_root()) / "memo"


def hex_of(digest: str) -> str:
    """Return the 64 hex digits of `sha256:…`, safe as a file name. Raise ValueError for anything else."""
    algorithm, _, digits = digest.partition(":")
    if algorithm != "sha256" or not is_hex(digits):
        raise ValueError(f"{digest!r} is not a digest such as sha256:0123…")
    return digits


def is_hex(text: str) -> bool:
    """Return whether it is a sha256 as 64 lowercase hex digits."""
    return len(text) == 64 and not text.strip("0123456789abcdef")


def write_sealed(path: Path, value: Json) -> None:
    """Write a record durably, in a directory that is made where it is missing."""
    make_directory(path.parent)
    files.write_sealed(path, value)


def names_in(folder: Path) -> list[str]:
    """Return the names in a directory of the store, which need not be there, sorted."""
    while True:
        try:
            return sorted(os.listdir(folder))
        except FileNotFoundError:
            return []
        except InterruptedError:  # Python tries calls again that a signal broke off (PEP 475), opendir(3) not
            continue


def sealed_digests(folder: Path) -> list[str]:
    """Return `sha256:HEX` of the records `HEX.json` in a directory of the store, sorted."""
    return [f"sha256:{name[:-5]}" for name in names_in(folder) if name.endswith(".json") and len(name) == 69]


def record_path(folder: Path, digest: str) -> Path:
    """Return where a directory of the store has the record of a digest."""
    return folder / f"{hex_of(digest)}.json"


JOURNAL = "publish.json"
"""In a work folder: what the publishing that began there still has to do."""
FAMILY = "family"
"""In a work folder: a digest that all keys have whose work may go on with what was begun there."""


class Layout:
    """The paths of a store. Creates nothing."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.objects = root / "objects"
        self.artifacts = root / "artifacts"
        self.keys = root / "keys"
        self.partials = root / "partials"
        self.roots = root / "roots"
        self.released = root / "released"
        self.runs = root / "runs"
        self.work = root / "work"
        self.parts = root / "parts"
        self.memo = memo_directory(root)
        self.meetings = root / "meetings"
        self.tmp = root / "tmp"
        self.locks = root / "locks"
        self.quarantine = root / "quarantine"
        self.folders = (
            root, self.quarantine, self.objects, self.artifacts, self.keys, self.partials, self.roots, self.released,
            self.runs, self.work, self.parts, self.memo, self.meetings, self.tmp, self.locks,
        )  # fmt: skip

    def check(self) -> None:
        """Raise StageFailed where something else stands in place of a folder, before work is done in vain; UsageError
        where it stands in place of the store."""
        self.refuse_file()
        for folder in self.folders[1:]:
            if os.path.lexists(folder) and not folder.is_dir():  # in this order: others may be making it
                cure = "let `bigpipe verify --repair` set it aside"
                raise StageFailed(f"what should be a folder of the store is none: {folder}", cure)

    @property
    def there(self) -> bool:
        """Is there anything where the store is to be?"""
        return os.path.lexists(self.root)

    def refuse_file(self) -> None:
        """Raise UsageError where something that is no directory stands in place of the store."""
        if self.there and not self.root.is_dir():
            cure = "remove what is there, or choose another store with --store DIR or BIGPIPE_HOME"
            raise UsageError(f"the store is no directory: {self.root}", cure)

    def refuse_foreign(self) -> None:
        """Raise UsageError where the directory is somebody else's: a store removes what it does not know; and where
        it is none."""
        self.refuse_file()
        ours = {path.name for path in vars(self).values() if isinstance(path, Path) and path.parent == self.root}
        with explained(self.root):
            names = names_in(self.root)
        others = [name for name in names if name not in ours and name[0] != "." and name != "lost+found"]
        if others and not (self.keys.is_dir() and self.locks.is_dir()):
            cause = f"{self.root} is no store: it holds {first_few(others, 3)}"
            raise UsageError(cause, "name a directory that is empty, or not there yet: --store DIR or BIGPIPE_HOME")

    def object(self, sha256: str) -> Path:
        return self.objects / sha256

    def tree(self, digest: str) -> Path:
        return self.artifacts / hex_of(digest)

    def artifact(self, digest: str) -> Path:
        return record_path(self.artifacts, digest)

    def key(self, key: str) -> Path:
        return record_path(self.keys, key)

    def partial(self, partial: str) -> Path:
        return self.partials / hex_of(partial)

    def working(self, key: str) -> Path:
        return self.work / hex_of(key)

    def working_lock(self, key: str) -> Path:
        return self.locks / f"{hex_of(key)}.lock"

    def load(self, path: Path, read: Callable[[Json], T]) -> T | None:
        """Return what `read` makes of a record, or None. A damaged record goes to quarantine and is none."""
        with explained(path):
            try:
                return read(read_sealed(path))
            except (FileNotFoundError, NotADirectoryError):
                return None
            except (Damaged, ValueError, TypeError, KeyError):
                self.set_aside(path)
        return None

    def set_aside(self, path: Path, *, replaced: bool = False) -> None:
        """Move a damaged file or tree to quarantine, where `gc` frees it; nothing where nothing is: another process may
        have done it first. replaced: a file only has another name there, until something takes its own."""
        mark = os.urandom(8).hex()
        if path == self.quarantine:
            path = self.root / f"{path.name}.{mark}"
            files.move(self.quarantine, path)
        if os.path.lexists(path):
            make_directory(self.quarantine)
            aside = self.quarantine / f"{path.name}.{mark}"
            with suppress(FileNotFoundError):
                if replaced:
                    files.give_name(path, aside)
                else:
                    files.move(path, aside)
