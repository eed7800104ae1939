"""Which weight files an earlier, interrupted attempt has finished."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .containers import Container


class Journal:
    """A file of JSON lines outside the output, one per finished weight file; without a path it remembers nothing.

    A line counts only for a file with the same name, the same head (so the same tensors at the same places) and the
    same fingerprint of what it is made of, and only if its bytes still have the sha256 written down.
    """

    def __init__(self, path: Path | None, out: Path, fingerprint: Callable[[str], str]) -> None:
        self.path = path
        self.out = out
        self.fingerprint = fingerprint
        self._lines = {line["file"]: line for line in _lines(path)} if path is not None else {}

    def finished(self, file: str, container: Container) -> tuple[str, int] | None:
        """(hex sha256, size) of a file that need not be written again."""
        line = self._lines.get(file)
        target = self.out / file
        if line is None or not target.is_file() or target.is_symlink():
            return None
        if line["plan"] != self._plan(file, container):
            return None
        if target.stat().st_size != line["size"] or _hash(target) != line["sha256"]:
            return None
        return line["sha256"], line["size"]

    def record(self, file: str, container: Container, sha256: str) -> None:
        """Notes a file that is whole and on the disk."""
        if self.path is None:
            return
        line = {"file": file, "plan": self._plan(file, container), "sha256": sha256, "size": container.size}
        with open(self.path, "ab") as journal:
            # A torn last line must not swallow this one.
            journal.write(b"\n" + json.dumps(line).encode() + b"\n")
            journal.flush()
            os.fsync(journal.fileno())

    def _plan(self, file: str, container: Container) -> str:
        return hashlib.sha256(
            json.dumps([self.fingerprint(file), container.size]).encode() + container.head
        ).hexdigest()


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    found = []
    for raw in text.splitlines():
        try:
            line = json.loads(raw)
        except ValueError:
            continue
        if isinstance(line, dict) and {"file", "plan", "sha256", "size"} <= set(line):
            found.append(line)
    return found


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
