"""Strict YAML with positions.

The file is read as YAML 1.2's core schema (yaml.org/spec/1.2.2 §10.3) from PyYAML's event stream, not with its
constructors, which follow YAML 1.1: here `no`, `on`, `12:30:45` and `2024-01-01` are text, `1e-5` is a number, and
what the two versions read differently (`0777`) is an error. Composing from events rather than with `yaml.compose()`
keeps nesting off the C stack and lets depth and alias limits stop a hostile file before it is expanded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NoReturn, TypeAlias

import yaml

from bigpipe.errors import Place
from bigpipe.orchestrator.contract import Json

from .problems import Fault, Keys, Problems
from .spelling import spelt

MAX_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_ALIAS_EXPANSION = 10_000
"""Nodes that all aliases of a file together may stand for."""
MAX_NUMBER_LENGTH = 40
MAX_SHOWN_LINE = 1_000

# PyYAML's stubs give the C loader no base that `yaml.parse` takes; wheels without libyaml have only the other.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_START = yaml.Mark("", 0, 0, 0, None, 0)
_LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
# The complement of the spec's c-printable (§5.1): naming the printable ranges themselves compiles for 8 ms.
_NOT_PRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff]")
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_WRITTEN_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")
"""As `str` writes one."""
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
_NOT_FINITE = r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
_CONSTANTS: dict[str, bool | None] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip
_SYNTAX_CURES = (
    ("mapping values are not allowed", "put a text with ': ' in it into quotes, and check the indentation"),
    ("expected ',' or", "close the bracket, or put a comma between the values"),
    ("is still open", "close the bracket, or put a comma between the values"),
    ("cannot start any token", "put the text in quotes"),
    ("no ':' after it", "write `key: value`"),
    ("is never closed", "close it with the same sign, \" or '; inside it, write \"…\\\"…\" or '…''…'"),
    ("by its indentation", "begin it under the first letter of the key that it stands beside"),
)
_NO_COLON = "a key stands here with no ':' after it"
_SYNTAX_CAUSES = (
    ("could not find expected ':'", _NO_COLON),
    ("while scanning a quoted scalar", "the quote that opens here is never closed"),
    ("parsing a block mapping, did not find expected key", "this line fits none above it by its indentation"),
)
"""What is said instead of the parser's own words."""
_FLOW = "expected ',' or"
_BARE_REFERENCE = "a reference without quotes opens a map of its own here"

Scalar: TypeAlias = "str | int | float | bool | None"
Key: TypeAlias = "str | int"


@dataclass(slots=True, eq=False)
class Item:
    """A value and where it stands: lines and columns count from 0, the end is exclusive. Aliases share one Item."""

    value: Scalar | list[Item] | dict[Key, Item]
    start_mark: yaml.Mark
    end_mark: yaml.Mark
    keys: dict[Key, Item] = field(default_factory=dict)
    """Of a map: where each key stands."""
    plain: bool = False
    """An unquoted scalar, whose type was read from its form."""
    source: str = ""
    """A plain scalar as it was written, where that differs from `value`: `1e-5`."""
    size: int = 1
    height: int = 1
    argument: str = ""
    """What was typed on a command line to make it; see `Place.argument`."""


class Document:
    def __init__(self, file: str, text: str) -> None:
        self.file, self.text = file, text
        self.lines = _LINE_BREAK.split(text)
        self.root = Item(None, _START, _START)

    def place(self, item: Any) -> Place:
        """item: an Item, or one of PyYAML's events."""
        place = self.place_between(item.start_mark, item.end_mark)
        return replace(place, argument=item.argument) if getattr(item, "argument", "") else place

    def place_between(self, start: yaml.Mark, end: yaml.Mark) -> Place:
        """Return the place of what stands there, to the end of its first line at most."""
        text = self.line(start)
        width = (end.column if end.line == start.line else len(text.rstrip())) - start.column
        shown = text if len(text) <= MAX_SHOWN_LINE else ""
        return Place(self.file, start.line + 1, start.column + 1, shown, max(1, width))

    def line(self, mark: yaml.Mark) -> str:
        return self.lines[mark.line] if mark.line < len(self.lines) else ""

    def find(self, path: Sequence[Key]) -> tuple[Item, int]:
        """Return the Item at `path`, or the nearest above it that exists; and how much of the path it covers."""
        item = self.root
        for depth, part in enumerate(path):
            child = child_of(item, part)
            if child is None:
                return item, depth
            item = child
        return item, len(path)

    def place_at(self, path: Sequence[Key], *, key: bool = False, part: str = "") -> Place:
        """Return where `path` stands, or the nearest above it that exists; with `key`, its key rather than its value.
        `part` narrows the caret to that text inside a value written on one line, where it is found there."""
        item, depth = self.find(path)
        if key and depth:
            above, _ = self.find(path[: depth - 1])
            return self.place(above.keys.get(path[depth - 1], item))
        place = self.place(item)
        if part and item.start_mark.line == item.end_mark.line:
            return place.narrowed(part, item.end_mark.column)
        return place

    def typed(self, arguments: Mapping[Keys, str]) -> None:
        """Note what was typed to make each part, and all that is inside it."""
        for path, argument in sorted(arguments.items(), key=lambda each: len(each[0])):
            item, depth = self.find(path)
            if depth == len(path):
                above, _ = self.find(path[:-1])
                _note(item, argument)
                _note(above.keys.get(path[-1] if path else "", item), argument)


def _note(item: Item, argument: str) -> None:
    item.argument = argument
    inner = item.value.values() if isinstance(item.value, dict) else item.value if isinstance(item.value, list) else ()
    for child in (*inner, *item.keys.values()):
        _note(child, argument)


def child_of(item: Item, part: Key) -> Item | None:
    if isinstance(item.value, dict):
        return item.value.get(part)
    if isinstance(item.value, list) and isinstance(part, int) and 0 <= part < len(item.value):
        return item.value[part]
    return None


def to_python(item: Item) -> Json:
    """Return the plain value; every alias expands to a value of its own."""
    value = item.value
    if isinstance(value, dict):
        return {key: to_python(child) for key, child in value.items()}
    if isinstance(value, list):
        return [to_python(child) for child in value]
    return value


def read_document(file: str, data: bytes, arguments: Mapping[Keys, str] = MappingProxyType({})) -> Document:
    """Parse one YAML document whose top level is a map. `file` is what places call it. arguments: what was typed on a
    command line to make which part. Raise ManifestError with every problem found; a syntax error ends the search."""
    document = _compose(file, data)
    document.typed(arguments)
    if not isinstance(document.root.value, dict):
        what = "the file is empty" if document.root.start_mark is _START else "the top level is not a map"
        place = document.place_between(_START, _START)
        Problems().fail(Fault.NOT_A_MAP, place, what, "start with `version: 1`, or use `bigpipe init`")
    return document


def read_value(text: str) -> Json:
    """Return one YAML value outside a manifest (`-p name={a: 1}`), under the same rules. Raise ManifestError with
    places inside `text`."""
    return to_python(_compose("-p", text.encode("utf-8", "surrogatepass")).root)


def _compose(file: str, data: bytes) -> Document:
    document, problems = Document(file, _decode(file, data)), Problems()
    _Composer(document, problems).compose()
    problems.raise_if_any()
    return document


def _decode(file: str, data: bytes) -> str:
    start, before, text = Place(file, 1, 1), "", ""
    if len(data) > MAX_BYTES:
        cause = f"{len(data):,} bytes; a manifest holds at most {MAX_BYTES:,}"
        Problems().fail(Fault.FILE_TOO_LARGE, start, cause, "keep prompts and other data in files of their own")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        Problems().fail(Fault.NOT_TEXT, start, "the file is UTF-16", "save it as UTF-8")
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8")
        cause, cure = f"byte 0x{data[error.start]:02x} is not UTF-8", "save the file as UTF-8"
    else:
        bad = _NOT_PRINTABLE.search(text)
        if bad is None:
            return text
        before, cause = text[: bad.start()], f"the character U+{ord(bad[0]):04X} cannot stand in YAML"
        cure = 'remove it, or write it as an escape in "…"'
    lines = _LINE_BREAK.split(before)
    Problems().fail(Fault.NOT_TEXT, Place(file, len(lines), len(lines[-1]) + 1), cause, cure)


@dataclass(slots=True, eq=False)
class _Open:
    """A collection whose end has not come yet."""

    item: Item
    anchor: str | None
    key: Item | None = None
    """One whose value has not come yet."""
    merges: list[Item] = field(default_factory=list)


class _Composer:
    def __init__(self, document: Document, problems: Problems) -> None:
        self.document, self.problems = document, problems
        self.anchors: dict[str, Item] = {}
        self.stack: list[_Open] = []
        self.documents = 0
        self.expanded = 0

    def compose(self) -> None:
        try:
            for event in yaml.parse(self.document.text, Loader=_LOADER):
                self._take(event)
        except yaml.MarkedYAMLError as error:
            self._fail(error)
        except (ValueError, OverflowError) as error:  # PyYAML without libyaml: chr() of an escape such as \UFFFFFFFF
            self._fail(yaml.MarkedYAMLError(problem=f"invalid escape: {error}"))

    def _take(self, event: Any) -> None:
        match type(event):
            case yaml.ScalarEvent:
                self._refuse_tag(event)
                self._attach(self._scalar(event), event.anchor)
            case yaml.MappingStartEvent | yaml.SequenceStartEvent:
                self._open(event)
            case yaml.MappingEndEvent | yaml.SequenceEndEvent:
                self._close(event)
            case yaml.AliasEvent:
                self._alias(event)
            case yaml.DocumentStartEvent:
                self.documents += 1
                if self.documents > 1:
                    self._stop(Fault.SEVERAL_DOCUMENTS, event, "a second document begins", "one manifest per file")

    def _report(self, code: Fault, at: Any, cause: str, cure: str) -> None:
        self.problems.add(code, self.document.place(at), cause, cure)

    def _stop(self, code: Fault, event: Any, cause: str, cure: str) -> NoReturn:
        self.problems.fail(code, self.document.place(event), cause, cure)

    def _refuse_tag(self, event: Any) -> None:
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self._report(Fault.TAG, event, f"the tag {tag}: tags are not read", "remove it, and quote text")

    def _scalar(self, event: Any) -> Item:
        text = event.value
        if event.implicit[0]:
            value = self._resolve(text, event)
            source = "" if isinstance(value, str) else text
            return Item(value, event.start_mark, event.end_mark, plain=True, source=source)
        if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
            self._report(Fault.NOT_TEXT, event, "the text holds NUL or half a character", "remove the escape")
        return Item(text, event.start_mark, event.end_mark)

    def _resolve(self, text: str, event: Any) -> Scalar:
        """YAML 1.2 core schema; what YAML 1.1 reads as another number, and what JSON cannot carry, is an error."""
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        if text[0] not in "+-.0123456789":
            return text
        if _LEADING_ZERO.fullmatch(text):
            cure = f"write {text.lstrip('+-0') or 0}, 0o{text.lstrip('+-')} for octal, or '{text}' for text"
            self._report(Fault.AMBIGUOUS_SCALAR, event, f"{text} is octal in YAML 1.1 only", cure)
            return 0
        whole = _INTEGER.fullmatch(text)
        if whole and len(text) <= MAX_NUMBER_LENGTH:
            return spelt(int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)), text)
        if whole or re.fullmatch(_NOT_FINITE, text) or (_FLOAT.fullmatch(text) and math.isinf(float(text))):
            cause = f"{text} has too many digits" if whole else f"{text} is not a finite number"
            self._report(Fault.AMBIGUOUS_SCALAR, event, cause, f"write '{text}' for text")
            return 0
        return spelt(float(text), text) if _FLOAT.fullmatch(text) else text

    def _open(self, event: Any) -> None:
        self._refuse_tag(event)
        if len(self.stack) >= MAX_DEPTH:
            self._stop(Fault.TOO_DEEP, event, f"nested more than {MAX_DEPTH} deep", "flatten it")
        value: Any = {} if isinstance(event, yaml.MappingStartEvent) else []
        self.stack.append(_Open(Item(value, event.start_mark, event.end_mark), event.anchor))

    def _close(self, event: Any) -> None:
        frame = self.stack.pop()
        frame.item.end_mark = event.end_mark
        for merged in frame.merges:
            self._merge(frame.item, merged)
        self._attach(frame.item, frame.anchor)

    def _alias(self, event: Any) -> None:
        target = self.anchors.get(event.anchor)
        if any(frame.anchor == event.anchor for frame in self.stack):
            self._stop(Fault.BAD_ALIAS, event, f"*{event.anchor} stands inside its own anchor", "break the loop")
        if target is None:
            cure = f"define it with &{event.anchor} above, or quote the text: '*{event.anchor}'"
            self._stop(Fault.BAD_ALIAS, event, f"no anchor named {event.anchor}", cure)
        self.expanded += target.size
        if self.expanded > MAX_ALIAS_EXPANSION:
            cause = f"aliases expand to more than {MAX_ALIAS_EXPANSION:,} values"
            self._stop(Fault.ALIAS_EXPANSION, event, cause, "write the values out, or use fewer aliases")
        if len(self.stack) + target.height > MAX_DEPTH:
            self._stop(Fault.TOO_DEEP, event, f"nested more than {MAX_DEPTH} deep through aliases", "flatten it")
        self._attach(target)

    def _attach(self, item: Item, anchor: str | None = None) -> None:
        if anchor is not None:
            self.anchors[anchor] = item
        if not self.stack:
            self.document.root = item
            return
        frame = self.stack[-1]
        parent = frame.item
        parent.size += item.size
        if item.height >= parent.height:
            parent.height = item.height + 1
        if isinstance(parent.value, list):
            parent.value.append(item)
        elif frame.key is None:
            frame.key = item
        elif isinstance(parent.value, dict):
            key, frame.key = frame.key, None
            self._enter(frame, parent.value, key, item)

    def _enter(self, frame: _Open, entries: dict[Key, Item], key: Item, item: Item) -> None:
        name, keys = key.value, frame.item.keys
        if name == "<<" and key.plain:
            if frame.merges:
                cure = "write both in one: `<<: [*a, *b]`; what the first has wins"
                self._report(Fault.DUPLICATE_KEY, key, "`<<` stands here twice", cure)
            frame.merges.append(item)
            return
        if isinstance(name, bool) or not isinstance(name, str | int):
            shown = "a list or map" if isinstance(name, list | dict) else key.source or "an empty text"
            self._report(Fault.KEY_NOT_TEXT, key, f"{shown} as a key", "write the key in quotes")
            return
        twin = keys.get(name) or keys.get(_other_form(name))
        if twin is not None:
            cause = f"the key {name!r} stands here twice; first on line {twin.start_mark.line + 1}"
            self._report(Fault.DUPLICATE_KEY, key, cause, "remove or rename one")
            return
        entries[name] = item
        keys[name] = key

    def _merge(self, target: Item, source: Item) -> None:
        """`<<: *a` or `<<: [*a, *b]`: keys written out win, then those of the map named first."""
        for part in source.value if isinstance(source.value, list) else [source]:
            if not isinstance(part.value, dict):
                self._report(Fault.BAD_ALIAS, part, "`<<` merges maps only", "name a map's anchor: `<<: *name`")
                continue
            for key, item in part.value.items():
                if isinstance(target.value, dict) and target.value.keys().isdisjoint((key, _other_form(key))):
                    target.value[key] = item
                    target.keys[key] = part.keys[key]

    def _fail(self, error: yaml.MarkedYAMLError) -> NoReturn:
        mark, opened = error.problem_mark or error.context_mark or _START, error.context_mark
        ended = not "".join(self.document.lines[mark.line :]).strip()
        cause = ", ".join(filter(None, (error.context, error.problem or "this is not YAML")))
        if opened and (ended or self._noticed_late(cause, opened, mark)):
            if not ended and _FLOW in cause:
                cause = f"this bracket is still open on line {mark.line + 1}"
            mark = opened  # show what was left open, not where that was noticed
        line = self.document.line(mark)
        if "mapping values" in cause and (above := self._without_colon(mark)) is not None:
            cause, mark, line = _NO_COLON, above, self.document.line(above)
        cause = next((words for phrase, words in _SYNTAX_CAUSES if phrase in cause), cause)
        if "${" in line and _FLOW in cause:
            cause = _BARE_REFERENCE
        if _indents_with_tabs(line, mark.column):
            cause = "a tab indents this line"
        self.problems.fail(
            Fault.SYNTAX, self.document.place_between(mark, mark), cause, _syntax_cure(cause, line, mark.column)
        )

    def _without_colon(self, mark: yaml.Mark) -> yaml.Mark | None:
        """The line above, where it is one word or two with nothing that makes a key of it: the parser took the next
        line for more of it."""
        above = self.document.lines[mark.line - 1] if mark.line else ""
        if not re.fullmatch(r"\s*[A-Za-z_][\w-]*( +\S+)?\s*", above) or ":" in above:
            return None
        start = len(above) - len(above.lstrip())
        return yaml.Mark("", 0, mark.line - 1, start, None, 0)

    def _noticed_late(self, cause: str, opened: yaml.Mark, mark: yaml.Mark) -> bool:
        """Was it noticed where what is wrong cannot be: after a key's line, or where a block goes on beside it?"""
        line = self.document.line(opened)
        beside = mark.column <= len(line) - len(line.lstrip())
        return opened.line < mark.line and ("could not find expected ':'" in cause or (_FLOW in cause and beside))


def _indents_with_tabs(line: str, column: int) -> bool:
    return "\t" in line[: column + 1] and not line[:column].strip()


def _other_form(name: Key) -> Key:
    """`0` for `"0"` and the other way round: JSON, and so every key and record, cannot tell them apart."""
    if isinstance(name, int):
        return str(name)
    return int(name) if _WRITTEN_INTEGER.fullmatch(name) else name


def _syntax_cure(cause: str, line: str, column: int) -> str:
    if _indents_with_tabs(line, column):
        return "indent with spaces, not tabs"
    if cause == _BARE_REFERENCE:
        return 'inside { } and [ ] write ${…} in quotes: "${…}"'
    usual = "check the indentation and brackets here and on the line above"
    return next((cure for phrase, cure in _SYNTAX_CURES if phrase in cause), usual)
