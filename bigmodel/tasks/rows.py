"""Prompts as rows, from a list, from JSONL or text files, or from a glob of them."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigpipe.errors import UsageError


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt. `data` is its JSON object; its `column` holds a text or a list of chat messages."""

    index: int
    prompt: Any
    data: dict[str, Any]

    @property
    def digest(self) -> str:
        """Return 64 bits of the sha256 of the object, in hex: with the index, what identifies a record."""
        text = json.dumps(self.data, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_prompts(prompts: str | Sequence[Any], column: str, base: Path) -> list[Row]:
    """Return the rows of a list, or of the files that a path or glob (relative to `base`) names, in their order.

    `.jsonl` and `.json` files hold an object per line; of other files each line that is not blank is a prompt.
    Raise UsageError naming file and line.
    """
    found = _from_files(prompts, column, base) if isinstance(prompts, str) else _from_list(prompts, column)
    rows = [Row(index, data[column], data) for index, data in enumerate(found)]
    if not rows:
        raise UsageError(f"there is no prompt in {prompts!r}", "give one at least")
    return rows


def _from_list(prompts: Sequence[Any], column: str) -> Iterator[dict[str, Any]]:
    for number, prompt in enumerate(prompts):
        data = prompt if isinstance(prompt, dict) else {column: prompt}
        yield _checked(data, column, f"prompts[{number}]")


def _from_files(pattern: str, column: str, base: Path) -> Iterator[dict[str, Any]]:
    whole = base / pattern
    paths = [whole] if whole.is_file() else sorted(Path(name) for name in glob.glob(str(whole), recursive=True))
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise UsageError(f"prompts: there is no file {pattern}", f"relative paths start at {base}")
    for path in paths:
        yield from _from_file(path, column)


def _from_file(path: Path, column: str) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"prompts: {path} cannot be read: {error}", "give a UTF-8 text or JSONL file") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix not in (".jsonl", ".json"):
            yield {column: line.rstrip("\r")}
            continue
        try:
            data = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{path}:{number}: not JSON: {error}", "write one object per line") from error
        yield _checked(data, column, f"{path}:{number}")


def _checked(data: Any, column: str, where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise UsageError(f"{where}: a prompt is an object with {column!r}, or a text", "write one object per line")
    if column not in data:
        names = ", ".join(map(repr, data)) or "nothing"
        raise UsageError(f"{where}: there is no {column!r}, only {names}", "set `column` to the one with the prompt")
    if not isinstance(data[column], str | list):
        raise UsageError(f"{where}: {column!r} is neither a text nor a list of messages", "write it as one of these")
    return data
