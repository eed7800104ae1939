"""Prompts as rows, from a list, from a file, or from a glob of them."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from string import Formatter
from typing import Any, Literal

from bigpipe.bigmodel.checkpoint import check_fetched
from bigpipe.errors import InvalidCheckpoint, UsageError
from bigpipe.files import missing

from .promptfiles import PROMPTS, Wording, how_to_convert, read_rows

Reads = Literal["text", "picture", "sound"]
"""What the rows of a task are."""
MEDIA: Mapping[str, Reads] = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"), "picture"),
    **dict.fromkeys((".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf"), "sound"),
}
"""Ending → what a file of that name is, as a row."""
_canonical = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode
_written = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt. `data` is its JSON object; its `column` holds a text or a list of chat messages; of a picture or a
    sound the path, from the recipe's directory where it lies below that."""

    index: int
    prompt: Any
    data: dict[str, Any]
    reads: Reads = "text"
    place: str = ""
    """Where it stands: `rows.jsonl:7`, `prompts[6]`."""
    field: str = ""
    """The argument, or field of a stage, that it came by: of one that is written there `prompts[6]`."""
    arguments: Mapping[str, Any] | None = None
    """Of a request: the arguments of the task that it asks for, over the stage's."""

    @property
    def digest(self) -> str:
        """Return 64 bits of the sha256 of the object, in hex: with the index, what identifies a record."""
        return hashlib.sha256(_canonical(self.data).encode()).hexdigest()[:16]

    @property
    def nbytes(self) -> int:
        """Return the bytes of its prompt in UTF-8, of a chat as JSON with its tools: more tokens it rarely has."""
        chat = self.prompt if not self.data.get("tools") else [self.prompt, self.data["tools"]]
        text = self.prompt if isinstance(self.prompt, str) else json.dumps(chat, ensure_ascii=False)
        return len(text.encode())

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """Return the tools of a chat, which stand beside it as a list or its JSON; None where there are none. Raise
        UsageError, naming the row, for what is no list of objects."""
        given = self.data.get("tools")
        try:
            found = json.loads(given) if isinstance(given, str) and given.strip() else given or None
        except ValueError:
            found = given
        if found is not None and not (isinstance(found, list) and all(isinstance(tool, dict) for tool in found)):
            raise self.wrong("'tools' is no list of tools", "write a list of objects, as chat templates take it")
        return found or None

    def wrong(self, cause: str, cure: str, field: str = "prompts") -> UsageError:
        """Return the error that says what is wrong with it, and where it stands. field: where nobody knows of it."""
        return UsageError(f"{self.place or f'row {self.index}'}: {cause}", cure, field=self.field or field)


@dataclass(frozen=True, slots=True)
class Prompts:
    """The rows of a list, or of the files that a path or glob names, in their order. Each iteration reads the files
    anew, line by line, so that rows may be more than memory holds; it raises UsageError naming file and line."""

    given: str | Sequence[Any]
    """A path or glob relative to `base`, each of whose files is read as its ending says; or texts, chats, objects."""
    column: str
    base: Path
    template: str | None = None
    """Makes the prompt of a row's fields, in place of its `column`."""
    wording: Wording = PROMPTS
    """What rows are called in errors."""
    request: Callable[[Any, str], tuple[Any, Mapping[str, Any]]] | None = None
    """Makes prompt and arguments of an object and its place, in place of its `column`."""
    limit: int | None = None
    """Rows that are taken, from the first on; None: all."""

    def __iter__(self) -> Iterator[Row]:
        rows = islice(self._rows(), None if self.limit is None else min(self.limit, sys.maxsize))
        first = next(rows, None)
        if first is None:
            cause = f"{self.wording.field}: there is no {self.wording.row} in {self.given!r:.200}"
            raise UsageError(cause, "give one at least", field=self.wording.field)
        yield first
        yield from rows

    def _rows(self) -> Iterator[Row]:
        files = named_files(self.given, self.base, self.wording) if isinstance(self.given, str) else []
        if any(path.suffix.lower() in MEDIA for path in files):
            if self.template is not None:
                cause = "a picture or a sound has no fields that a template could name"
                raise UsageError(cause, "leave the template out", field="template")
            for index, path in enumerate(files):
                yield _of_file(index, path, self.column, self.base, self.wording)
            return
        parts = None if self.template is None else template_parts(self.template)
        for index, (where, data) in enumerate(self._objects(files)):
            field = self.wording.field if isinstance(self.given, str) else where
            arguments = None
            if self.request is not None:
                prompt, arguments = self.request(data, where)
            else:
                prompt = _filled(data, parts, where) if parts else _prompt(data, self.column, where, self.wording)
            if isinstance(self.given, str):  # which nobody named: a prompt is a text
                data = {name: cell for name, cell in data.items() if not isinstance(cell, bytes)}
            require_writable(data, where)
            yield Row(index, prompt, data, place=where, field=field, arguments=arguments)

    def _objects(self, files: Sequence[Path]) -> Iterator[tuple[str, Any]]:
        """(place, object) of each."""
        for path in files:
            yield from read_rows(path, self.column, self.wording)
        for number, prompt in enumerate(() if isinstance(self.given, str) else self.given):
            data = prompt if isinstance(prompt, dict) else {self.column: prompt}
            _refuse_keys(data, where := f"{self.wording.field}[{number}]")
            yield where, data


def read_prompts(
    prompts: str | Sequence[Any], column: str, base: Path, template: str | None = None, wording: Wording = PROMPTS,
    limit: int | None = None,
) -> list[Row]:  # fmt: skip
    """Return all rows of `Prompts`, which raises UsageError."""
    return list(Prompts(prompts, column, base, template, wording, limit=limit))


def _of_file(index: int, path: Path, column: str, base: Path, wording: Wording) -> Row:
    """A picture or a sound, which is a row by itself."""
    reads, told = MEDIA.get(path.suffix.lower()), f"{wording.field}: "
    if reads is None:
        cure = how_to_convert(path) or "name those alone"
        raise UsageError(f"{told}{path} is no picture or sound, as others beside it are", cure)
    name = (path.relative_to(base) if path.is_relative_to(base) else path).as_posix()
    require_writable({column: name}, f"{told}{str(path)!a}")
    return Row(index, name, {column: name}, reads, str(path), wording.field)


def template_parts(template: str) -> list[tuple[str, str | None]]:
    """Return the pieces of `Classify: {text}`: a text, and the name of the field that follows it, if one does; braces
    that are meant are doubled. Raise UsageError for a template that is no such text, or names no field."""
    cure = 'write fields in braces, "Classify: {text}", and braces that are meant twice: {{'
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise UsageError(f"template: {error}", cure) from error
    for _, name, form, conversion in parts:
        if name is not None and (not name or form or conversion):
            raise UsageError(f"template: {{{name}}} is more than the name of a field", cure)
    if not any(name for _, name, _, _ in parts):
        raise UsageError("template: it names no field, so that all prompts would be the same", cure)
    return [(text, name) for text, name, _, _ in parts]


def _filled(data: Any, parts: Sequence[tuple[str, str | None]], where: str) -> str:
    if not isinstance(data, dict):
        raise UsageError(f"{where}: a template needs an object with fields", "write one object per line")
    made = ""
    for text, name in parts:
        if name is not None and name not in data:
            raise UsageError(f"{where}: there is no {name!r}, only {_names(data)}", "the template names it")
        value = "" if name is None else data[name]
        if not isinstance(value, str | int | float):
            raise UsageError(f"{where}: {name!r} is neither a text nor a number", "a template takes no other")
        made += f"{text}{value}"
    return made


def _names(data: dict[str, Any]) -> str:
    return ", ".join(map(repr, data)) or "nothing"


def of_folder(name: str) -> str:
    """Return the glob of the files in a directory."""
    return os.path.join(glob.escape(name), "*")


def named_files(pattern: str, base: Path, wording: Wording = PROMPTS) -> list[Path]:
    """Return the files that a path, a glob, or a directory that they lie in (relative to `base`) names, in their order.
    Raise UsageError for none, and for one whose content was not fetched."""

    def wrong(cause: str, cure: str) -> UsageError:
        return UsageError(f"{wording.field}: {cause}", cure)

    files = _named(pattern, base)
    if not files:
        raise wrong(*missing(pattern, base))
    for file in files:
        require_fetched(file, wrong)
    return files


def _named(pattern: str, base: Path) -> list[Path]:
    if os.path.isfile(base / pattern):
        return [base / pattern]
    inside = of_folder(pattern) if os.path.isdir(base / pattern) else pattern
    # Below `base`, whose own name may hold what a pattern is made of
    named = sorted(base / name for name in glob.glob(inside, root_dir=base, recursive=True))
    return [path for path in named if path.is_file()]


def require_fetched(file: Path, wrong: Callable[[str, str], UsageError]) -> None:
    """Raise `wrong` of a cause and a cure where git-lfs or git-annex left a pointer in place of a file, whose lines
    would be taken for what it holds. One that cannot be read is for its reader to tell."""
    try:
        with suppress(OSError):
            check_fetched(file)
    except InvalidCheckpoint as error:
        raise wrong(error.cause, error.cure) from error


def _prompt(data: Any, column: str, where: str, wording: Wording) -> Any:
    if not isinstance(data, dict):
        cause = f"{where}: a {wording.row} is an object with {column!r}, a text, or a chat"
        raise UsageError(cause, "write one object per line")
    if column not in data:
        cause = f"{where}: there is no {column!r}, only {_names(data)}"
        raise UsageError(cause, "set `column` to one of them", field="column")
    if not isinstance(data[column], str) and not _is_chat(data[column]):
        raise UsageError(f"{where}: {column!r} is neither a text nor a list of messages", _written_as(data[column]))
    return data[column]


def _written_as(prompt: Any) -> str:
    if prompt is None:
        return "write a text, or leave the row out"
    return "put it in quotes" if isinstance(prompt, int | float) else "write a message as {role: user, content: …}"


def textless(name: str, value: Any) -> tuple[str, str]:
    """Return what is wrong with the field of a row that is there and holds no text, and what to do."""
    if isinstance(value, Mapping) and "path" in value:  # as the Hub's sets of sounds and pictures have it
        return f"{name!r} holds what is in a file", "write that into a file, and the file's name into the row"
    number = isinstance(value, int | float)
    cure = _written_as(value) if value is None or number else "write a text, or name another column"
    return f"{name!r} holds no text{'' if value is not None else ': it is null'}", cure


def require_writable(data: dict[str, Any], where: str) -> None:
    """Raise UsageError, which says `where`, for a field that cannot be written as JSON in UTF-8: half of a surrogate
    pair, or a value of no JSON type."""
    if _unwritable(data) is None:
        return
    for name, value in data.items():
        if wrong := _unwritable({name: value}):
            raise UsageError(f"{where}: {name!r} {wrong}", "mend it, or leave it out")


def _refuse_keys(value: Any, where: str) -> None:
    """Raise UsageError for a key that is no text, at any depth: on its way to a worker it would become one."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in pairs:
        if isinstance(value, dict) and not isinstance(name, str):
            raise UsageError(f"{where}: {name!r} is a key, and no text", f"put it in quotes: {str(name)!r}")
        _refuse_keys(inner, where)


def _is_chat(prompt: Any) -> bool:
    """Messages have a role; what they say may be called otherwise by a template (`content`, `tool_calls`)."""
    messages = prompt if isinstance(prompt, list) else []
    return bool(messages) and all(isinstance(each, dict) and len(each) > 1 and "role" in each for each in messages)


def _unwritable(data: dict[str, Any]) -> str | None:
    """Why it cannot be written as JSON in UTF-8, as a record is."""
    try:
        _written(data).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        return f"holds half of a surrogate pair, {half!a}, which is no text"
    except (TypeError, ValueError, RecursionError) as error:
        return f"is no JSON value: {error}"
    return None
