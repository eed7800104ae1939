"""Files that pass from whoever makes them to those that use them, one by one, as they are finished.

    Outlet, OpenOutlet    the end of the producer, in its process: with nobody who waits for its files, with somebody
    Inlet, OpenInlet      the end of a consumer, in its process: with all files there, and with files that still come
    Handover              the folder between them, and the engine's hand in it

One folder per producer:

    lets-go            is there where the producer's files are not kept (`cache: false`)
    contents.json      what will come: file name → size; written once, when all heads are known
    heads/NAME         the first bytes of each file to come
    files/NAME         the consumer's input: other files as copies, files to come as links once they are whole
    arrived/NAME       [name, [sha256, size]] of each file that is there
    consumers.json     {"consumers": [...], "forgo": bool}: the engine's answer to the contents
    taken/CONSUMER/NAME, wanted/CONSUMER.THREAD
                       what a consumer does not need again, and what it is waiting for
    gone/NAME          files that were let go because nobody needs them again

Neither end knows what the files mean. Names are plain file names; other files, in folders of their own, are all there
before the contents are.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .errors import StageFailed
from .files import copy_file, give_name, is_partial, link, make_directory, make_folders, write_file

PAUSE = 0.01
"""Seconds between two looks at the folder."""
AHEAD = 2
"""Files at most, finished and unfinished ones, that lie between a producer and consumers whose input is not kept."""
CONTENTS, CONSUMERS, LETS_GO = "contents.json", "consumers.json", "lets-go"
Heads = Mapping[str, tuple[bytes, int]]
"""File name → (first bytes, size) of the files to come."""


class Handover:
    """The folder, and what both ends and the engine read there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = folder / "files"

    @classmethod
    def make(cls, folder: Path, *, lets_go: bool) -> Handover:
        """Set one up in an empty folder. lets_go: the producer's files may go as soon as all have taken them."""
        made = cls(folder)
        make_directory(made.files, durable=False)
        if lets_go:
            write_file(folder / LETS_GO, "", durable=False)
        return made

    @property
    def announced(self) -> bool:
        return (self.folder / CONTENTS).exists()

    @cached_property
    def contents(self) -> dict[str, int]:
        sizes: dict[str, int] = json.loads((self.folder / CONTENTS).read_bytes())
        return sizes

    def answer(self, consumers: Iterable[str], *, forgo: bool) -> None:
        """Tell the producer who takes its files. forgo: those that all of them have taken may go."""
        self.tell(CONSUMERS, {"consumers": [_flat(consumer) for consumer in consumers], "forgo": forgo})

    def arrived(self) -> dict[str, tuple[str, int]]:
        """Relative path → (hex sha256, size) of everything that is there, or was."""
        marks = (self.read(f"arrived/{mark}") for mark in self.names("arrived"))
        return {name: (digest, size) for name, (digest, size) in marks}

    def gone(self) -> set[str]:
        return self.names("gone")

    def lead(self, name: str, target: Path) -> None:
        """From now on `files/NAME` is that file."""
        link(target, self.files / name)

    def keep(self, name: str, path: Path) -> None:
        """From now on `files/NAME` is that file itself, which may then lose its own name."""
        give_name(path, self.files / name)

    def tell(self, name: str, content: object = None) -> None:
        """Readers of this file see all of it or nothing."""
        path = self.folder / name
        make_folders(path.parent, durable=False)
        write_file(path, json.dumps(content), durable=False)

    def read(self, name: str) -> Any:
        """What was told there; None where nothing was."""
        try:
            return json.loads((self.folder / name).read_bytes())
        except FileNotFoundError:
            return None

    def names(self, folder: str) -> set[str]:
        try:
            return {name for name in os.listdir(self.folder / folder) if not is_partial(name)}
        except FileNotFoundError:
            return set()


class Outlet:
    """The producer's end; of this one nobody takes anything. Safe for threads."""

    waited_for = False
    """Is anybody waiting for the files?"""
    lets_go = False
    """May files be removed as soon as they are taken, so that not all are there at a time?"""
    ahead = AHEAD
    """How many may lie there at a time then, unless those who take them need more."""

    def announce(self, heads: Heads) -> None:
        """Say what will come. Everything else in the output must be there, and is passed on now. Raise StageFailed
        where an earlier attempt announced something else."""

    def begin(self, name: str) -> None:
        """Wait until there is room for one more file: without end only where somebody takes what is there."""

    def finished(self, name: str, sha256: str, size: int) -> None:
        """This file is in the output, whole and on the disk. One that was not announced goes to nobody. Raise
        StageFailed where an earlier attempt finished it with other bytes, which somebody may have used."""


NOBODY = Outlet()


class OpenOutlet(Outlet):
    waited_for = True

    def __init__(self, folder: Path, out: Path) -> None:
        self.handover = Handover(folder)
        self.lets_go = (folder / LETS_GO).exists()
        self.out = out
        self._lock = threading.Lock()
        self._begun: set[str] = set()

    def announce(self, heads: Heads) -> None:
        sizes = {name: size for name, (_, size) in heads.items()}
        if self.handover.announced:
            if self.handover.contents != sizes:
                raise StageFailed("the stage announced other files than in its attempt before", "run again")
            return
        for path in self.out.rglob("*"):
            name = path.relative_to(self.out).as_posix()
            if path.is_file() and name not in heads and not is_partial(path.name):
                self._arrive(name, *copy_file(path, self.handover.files / name, durable=False))
        make_directory(self.handover.folder / "heads", durable=False)
        for name, (head, _) in heads.items():
            write_file(self.handover.folder / "heads" / name, head, durable=False)
        self.handover.tell(CONTENTS, sizes)

    def begin(self, name: str) -> None:
        while self.handover.announced and not self._admit(name):
            time.sleep(PAUSE)

    def _admit(self, name: str) -> bool:
        with self._lock:
            answer = self.handover.read(CONSUMERS)
            taken = self._let_go(answer) if answer and answer["forgo"] else set()
            there = (self.handover.names("arrived") | self._begun) & set(self.handover.contents)
            free = answer is not None and (not answer["forgo"] or self._starving(answer["consumers"], there))
            if free or len(there - taken) < AHEAD:
                self._begun.add(name)
                return True
            return False

    def _starving(self, consumers: Collection[str], there: set[str]) -> bool:
        """Is every consumer waiting for a file that is not even begun? Then nothing will be taken before it comes."""
        marks = {mark: self.handover.read(f"wanted/{mark}") for mark in self.handover.names("wanted")}
        waiting = {mark.rpartition(".")[0] for mark, name in marks.items() if name is not None and name not in there}
        return waiting.issuperset(consumers)

    def _let_go(self, answer: Mapping[str, Any]) -> set[str]:
        arrived = self.handover.names("arrived") & set(self.handover.contents)
        free = arrived.intersection(*(self.handover.names(f"taken/{consumer}") for consumer in answer["consumers"]))
        for name in free - self.handover.gone():
            # The mark first: what is marked may or may not be there, what is not marked is.
            self.handover.tell(f"gone/{name}")
            (self.handover.files / name).unlink(missing_ok=True)
            (self.out / name).unlink(missing_ok=True)
        return free

    def finished(self, name: str, sha256: str, size: int) -> None:
        if not self.handover.announced:
            return
        if name in self.handover.contents:
            known = self.handover.read(f"arrived/{name}")
            if known is not None and known != [name, [sha256, size]]:
                raise StageFailed(f"{name} has other bytes than in the attempt before", "run again")
            if name in self.handover.gone():  # made again, though nobody needs it
                (self.out / name).unlink()
                return
            self.handover.lead(name, self.out / name)
        self._arrive(name, sha256, size)

    def _arrive(self, name: str, sha256: str, size: int) -> None:
        self.handover.tell(f"arrived/{_flat(name)}", [name, [sha256, size]])


class Inlet:
    """The consumer's end; of this one all files are there. Safe for threads."""

    arriving = False
    """Do files still come?"""
    heads: Heads = MappingProxyType({})
    """Of those that do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        """Holds the other files from the start, and each file to come from when it has arrived."""

    def wait(self, name: str) -> None:
        """Return once the file is there. If it never comes, the engine ends this process."""

    def taken(self, name: str) -> None:
        """The file is not needed again, not even by another attempt: what was made of it is on the disk."""


class OpenInlet(Inlet):
    arriving = True

    def __init__(self, folder: Path, consumer: str) -> None:
        self.handover = Handover(folder)
        super().__init__(self.handover.files)
        self._consumer = _flat(consumer)
        self._known: dict[str, str] = {}

    @cached_property
    def heads(self) -> Heads:  # type: ignore[override]
        folder = self.handover.folder / "heads"
        return {name: ((folder / name).read_bytes(), size) for name, size in self.handover.contents.items()}

    def wait(self, name: str) -> None:
        if name in self._known:
            return
        waiter = f"wanted/{self._consumer}.{threading.get_ident()}"
        if self.handover.read(f"arrived/{name}") is None:
            self.handover.tell(waiter, name)
        while (found := self.handover.read(f"arrived/{name}")) is None:
            time.sleep(PAUSE)
        (self.handover.folder / waiter).unlink(missing_ok=True)
        self._known[name] = found[1][0]

    def sha256(self, name: str) -> str:
        """Return the digest of the file in hex, once it is there."""
        self.wait(name)
        return self._known[name]

    def taken(self, name: str) -> None:
        self.handover.tell(f"taken/{self._consumer}/{name}")


def _flat(name: str) -> str:
    return name.replace("/", "\\")
