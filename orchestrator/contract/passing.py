"""Files that pass from a running stage to those that use them, one by one, as they are finished.

One folder per producer, in the store's temporary folder of this process:

    lets-go            is there where the producer's files are not kept (`cache: false`)
    contents.json      what will come: file name → size; written once, when all heads are known
    heads/NAME         the first bytes of each file to come
    files/NAME         the consumer's input: other files as copies, files to come as links once they are whole
    arrived/NAME       {"sha256", "size"} of each file that is there
    consumers.json     {"consumers": [...], "forgo": bool}: the engine's answer to the contents
    taken/CONSUMER/NAME, wanted/CONSUMER.THREAD
                       what a consumer does not need again, and what it is waiting for
    gone/NAME          files that were let go because nobody needs them again

An `Outlet` is the producer's end, in its worker; an `Inlet` the consumer's. Neither knows what the files mean. Names
are plain file names; other files, in folders of their own, are all there before the contents are.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from bigpipe.errors import StageFailed
from bigpipe.files import PARTIAL, copy_file, give_name, is_partial, link, write_file

PAUSE = 0.01
"""Seconds between two looks at the folder."""
AHEAD = 2
"""Files at most, finished and unfinished ones, that lie between a producer and consumers whose input is not kept."""
CONTENTS, CONSUMERS, LETS_GO = "contents.json", "consumers.json", "lets-go"


class Handover:
    """The folder, and what both ends and the engine read there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = folder / "files"

    @property
    def announced(self) -> bool:
        return (self.folder / CONTENTS).exists()

    @cached_property
    def contents(self) -> dict[str, int]:
        sizes: dict[str, int] = json.loads((self.folder / CONTENTS).read_bytes())
        return sizes

    @property
    def lets_go(self) -> bool:
        return (self.folder / LETS_GO).exists()

    def arrived(self) -> dict[str, tuple[str, int]]:
        """Relative path → (hex sha256, size) of everything that is there, or was."""
        found = {}
        for mark in _names(self.folder / "arrived"):
            name, (digest, size) = json.loads((self.folder / "arrived" / mark).read_bytes())
            found[name] = digest, size
        return found

    def gone(self) -> set[str]:
        return _names(self.folder / "gone")

    def mark(self, kind: str, name: str, content: object = None) -> None:
        path = self.folder / kind / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, content)

    def lead(self, name: str, target: Path) -> None:
        """From now on `files/NAME` is that file."""
        link(target, self.files / name)

    def keep(self, name: str, path: Path) -> None:
        """From now on `files/NAME` is that file itself, which may then lose its own name."""
        give_name(path, self.files / name)


class Outlet:
    """The producer's end. Safe for threads."""

    def __init__(self, folder: Path, out: Path) -> None:
        self.handover = Handover(folder)
        self.out = out
        self._lock = threading.Lock()
        self._begun: set[str] = set()
        self.ahead = AHEAD

    @property
    def lets_go(self) -> bool:
        """May files be removed as soon as they are taken?"""
        return self.handover.lets_go

    def announce(self, heads: Mapping[str, tuple[bytes, int]]) -> None:
        """name → (first bytes, size) of all files to come. Everything else in `out` is passed on now.

        Raises StageFailed where an earlier attempt announced something else.
        """
        sizes = {name: size for name, (_, size) in heads.items()}
        if self.handover.announced and self.handover.contents != sizes:
            raise StageFailed("the stage announced other files than in its attempt before", "run again")
        if self.handover.announced:
            return
        for folder, _, names in os.walk(self.out):
            for path in (Path(folder, name) for name in names):
                if path.name not in heads and not path.name.endswith(PARTIAL):
                    self._pass_on(path)
        for name, (head, _) in heads.items():
            path = self.handover.folder / "heads" / name
            path.parent.mkdir(exist_ok=True)
            write_file(path, head, durable=False)
        write(self.handover.folder / CONTENTS, sizes)

    def _pass_on(self, path: Path) -> None:
        name = path.relative_to(self.out)
        self._arrive(str(name), *copy_file(path, self.handover.files / name, durable=False))

    def begin(self, name: str) -> None:
        """Waits until there is room for one more file: without end only where somebody takes what is there."""
        if not self.handover.announced:
            return
        while not self._admit(name):
            time.sleep(PAUSE)

    def _admit(self, name: str) -> bool:
        with self._lock:
            answer = _read(self.handover.folder / CONSUMERS)
            taken = self._let_go(answer) if answer and answer["forgo"] else set()
            there = (_names(self.handover.folder / "arrived") | self._begun) & set(self.handover.contents)
            free = answer is not None and (not answer["forgo"] or self._starving(answer["consumers"], there))
            if free or len(there - taken) < AHEAD:
                self._begun.add(name)
                return True
            return False

    def _starving(self, consumers: Collection[str], there: set[str]) -> bool:
        """Is every consumer waiting for a file that is not even begun? Then nothing will be taken before it comes."""
        folder = self.handover.folder / "wanted"
        marks = {mark: _read(folder / mark) for mark in _names(folder)}
        waiting = {mark.rpartition(".")[0] for mark, name in marks.items() if name is not None and name not in there}
        return waiting.issuperset(consumers)

    def _let_go(self, answer: Mapping[str, Any]) -> set[str]:
        """Removes what every consumer has taken; gives all that was ever removed."""
        folder = self.handover.folder
        arrived = _names(folder / "arrived") & set(self.handover.contents)
        taken = [_names(folder / "taken" / consumer) for consumer in answer["consumers"]]
        free = arrived.intersection(*taken)
        for name in free - self.handover.gone():
            # The mark first: what is marked may or may not be there, what is not marked is.
            self.handover.mark("gone", name)
            (self.handover.files / name).unlink(missing_ok=True)
            (self.out / name).unlink(missing_ok=True)
        return free

    def finished(self, name: str, sha256: str, size: int) -> None:
        """`out/NAME` is whole and on the disk. Of what was never announced nobody hears.

        Raises StageFailed where an earlier attempt finished it with other bytes, which somebody may have used.
        """
        if not self.handover.announced:
            return
        if name in self.handover.contents:
            known = _read(self.handover.folder / "arrived" / name)
            if known is not None and known != [name, [sha256, size]]:
                raise StageFailed(f"{name} has other bytes than in the attempt before", "run again")
            if name in self.handover.gone():  # made again, though nobody needs it
                (self.out / name).unlink()
                return
            self.handover.lead(name, self.out / name)
        self._arrive(name, sha256, size)

    def _arrive(self, name: str, sha256: str, size: int) -> None:
        self.handover.mark("arrived", name.replace("/", "\\"), [name, [sha256, size]])


class Inlet:
    """The consumer's end. Safe for threads."""

    def __init__(self, folder: Path, consumer: str) -> None:
        self.handover = Handover(folder)
        self.folder = self.handover.files
        self._consumer = consumer.replace("/", "\\")
        self._known: dict[str, str] = {}

    def heads(self) -> Mapping[str, tuple[bytes, int]]:
        """File name → (first bytes, size) of all files to come."""
        return self._heads

    @cached_property
    def _heads(self) -> dict[str, tuple[bytes, int]]:
        folder = self.handover.folder / "heads"
        return {name: ((folder / name).read_bytes(), size) for name, size in self.handover.contents.items()}

    def wait(self, name: str) -> str:
        """Returns once the file is there; its sha256 in hex. If it never comes, the engine ends this process."""
        if name not in self._known:
            folder, waiter = self.handover.folder, f"{self._consumer}.{threading.get_ident()}"
            if not (folder / "arrived" / name).exists():
                self.handover.mark("wanted", waiter, name)
            while (found := _read(folder / "arrived" / name)) is None:
                time.sleep(PAUSE)
            (folder / "wanted" / waiter).unlink(missing_ok=True)
            self._known[name] = found[1][0]
        return self._known[name]

    def taken(self, name: str) -> None:
        """The file is not needed again, not even by another attempt: what was made of it is on the disk."""
        self.handover.mark(f"taken/{self._consumer}", name)


def write(path: Path, content: object) -> None:
    """Readers see all of it or nothing."""
    write_file(path, json.dumps(content), durable=False)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def _names(folder: Path) -> set[str]:
    try:
        return {name for name in os.listdir(folder) if not is_partial(name)}
    except FileNotFoundError:
        return set()
