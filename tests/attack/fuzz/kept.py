"""The inputs that are kept of each target, in `corpus/TARGET.txt`: one a line, in base64 of RFC 4648."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parent / "corpus"


def kept(target: str) -> list[bytes]:
    """Return the inputs of a target, those made by hand and those that fuzzing found."""
    return [base64.b64decode(line) for line in (FOLDER / f"{target}.txt").read_text("ascii").splitlines()]


def keep(target: str, inputs: Iterable[bytes]) -> None:
    """Write the inputs of a target, each once, the shortest first."""
    found = sorted(set(inputs), key=lambda data: (len(data), data))
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{target}.txt").write_text("".join(f"{base64.b64encode(data).decode()}\n" for data in found), "ascii")
