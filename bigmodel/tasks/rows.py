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
    `.jsonl` and `.json` files hold an object per line; of other files each line that is not blank is a prompt. Raise
    UsageError naming file and line."""
    if isinstance(prompts, str):
        given = [found for path in _files(prompts, base) for found in _lines(path, column)]
    else:
        objects = [prompt if isinstance(prompt, dict) else {column: prompt} for prompt in prompts]
        given = [(f"prompts[{number}]", data) for number, data in enumerate(objects)]
    if not given:
        raise UsageError(f"there is no prompt in {prompts!r}", "give one at least")
    return [_row(index, data, column, where) for index, (where, data) in enumerate(given)]


def _files(pattern: str, base: Path) -> list[Path]:
    whole = base / pattern
    named = [whole] if whole.is_file() else sorted(map(Path, glob.glob(str(whole), recursive=True)))
    if files := [path for path in named if path.is_file()]:
        return files
    raise UsageError(f"prompts: there is no file {pattern}", f"relative paths start at {base}")


def _lines(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    """(place, object) of each line that is not blank."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"prompts: {path} cannot be read: {error}", "give a UTF-8 text or JSONL file") from error
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                is_json = path.suffix in (".jsonl", ".json")
                yield f"{path}:{number}", json.loads(line) if is_json else {column: line.rstrip("\r")}
        except ValueError as error:
            raise UsageError(f"{path}:{number}: not JSON: {error}", "write one object per line") from error


def _row(index: int, data: Any, column: str, where: str) -> Row:
    if not isinstance(data, dict):
        raise UsageError(f"{where}: a prompt is an object with {column!r}, or a text", "write one object per line")
    if column not in data:
        names = ", ".join(map(repr, data)) or "nothing"
        raise UsageError(f"{where}: there is no {column!r}, only {names}", "set `column` to the one with the prompt")
    if not isinstance(data[column], str | list):
        raise UsageError(f"{where}: {column!r} is neither a text nor a list of messages", "write it as one of these")
    return Row(index, data[column], data)
