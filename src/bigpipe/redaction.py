"""What is neither shown nor written: values of secrets, passwords in addresses, and signs that move a terminal.

    conceal(values)     from now on these are masked in all that this process says or records
    redact(text)        the text with them, and passwords in addresses, masked
    redact_value(text)  the same of what we state ourselves, where a short secret is but a word like any other
    redact_fields(…)    JSON of ours: names stay, texts of others are redacted, the rest are values
    mask(text)          data with them masked, where they are words of their own; what only looks like a secret stays
    printable(text)     the text with signs that move a terminal spelled out

Errors are redacted as they are made, events and records as they are passed on, what is printed as it is printed. What
a model or a person wrote is data: it is masked alone.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, unquote

HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "HF_API_TOKEN")
"""HF_TOKEN and the names it has had."""
MASK = "***"
CREDENTIAL = re.compile(
    r"(?:AWS|FSSPEC|AZURE|GOOGLE|GCS|S3)_(?:\w+_)?"
    r"(?:SECRET|SECRET_KEY|SECRET_ACCESS_KEY|TOKEN|PASSWORD|ACCOUNT_KEY|STORAGE_KEY|API_KEY|CONNECTION_STRING)"
)
"""Variables that hold what the packages of fsspec sign with. Not the name that goes with it, `AWS_ACCESS_KEY_ID`, which
may be any word."""
SHORTEST = 4
"""Values shorter than this are left alone: masking every `a` would spoil the text and give the value away."""
SHORTEST_ENCODED = 8
"""Bytes of a value that is looked for in base64 too."""
SHORTEST_IN_DATA = 8
"""Characters of a value that is looked for in data, and in what we state. Shorter ones are words that any text may
have, such as the `EMPTY` that a server of one's own takes for a key: masked, they would take the name of a file, a node
or a metric with them. What a program or server says of a failure is masked from `SHORTEST` on."""
NAMES = frozenset({
    "action", "after", "became", "commit", "created", "device", "digest", "directory", "event", "field", "file",
    "inputs", "key", "kind", "lock", "manifest", "model", "name", "needs", "node", "nodes", "path", "place", "recipe",
    "run", "runs", "started", "status", "store", "time", "type", "unit", "uses",
})  # fmt: skip
"""Fields of JSON of ours that name something: who reads them looks for just that."""
VALUES = frozenset({"asked", "env", "facts", "parameters", "params", "pins"})
"""Fields of JSON of ours below which others choose what things are called, and what they hold."""
TEXTS = frozenset({
    "cause", "cure", "details", "error", "line", "lines", "message", "note", "reason", "result", "summary", "task",
    "text", "verdict", "what", "why",
})  # fmt: skip
"""Fields of JSON of ours that hold what somebody else may have said."""
_MARKUP = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#x27;"})
# As text: `re` compiles a pattern when it is first searched for, and keeps it.
_ADDRESS = (
    r"(?i)://(?:(?P<user>[^/\s:@'\"]*):[^/\s'\"]*@"  # https://name:password@host
    r"|(?:(?<=http://)|(?<=https://))[^/\s:@'\"]+@)"  # https://token@host, but not abfs://container@account
)
_SIGNATURE = (
    r"(?i)(?P<name>[?&](?:X-Amz-(?:Signature|Credential|Security-Token)|Signature|Policy|sig|token|access_token)=)"
    r"[^&\s'\"]+"
)
_HEADER = r"(?i)(?P<name>\bAuthorization['\"]?[:=]\s*['\"]?(?:Bearer|Basic)\s+)[^\s'\"]+"
_GIVEN_AWAY = (
    r"\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{40,}|glpat-[\w-]{20,}|xox[abprs]-[\w-]{20,}"
    r"|sk-[\w-]{32,}|AIza[\w-]{35})"
)
"""Tokens that their makers gave a form: the Hub's, GitHub's, GitLab's, Slack's, OpenAI's and Google's."""
_BEGINNINGS = ("hf_", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "xox", "sk-", "AIza")
_MOVING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters of both sets but newline and tab, what turns the direction of writing, halves of a pair."""
_SEQUENCE = (
    "\x1b\\[[0-9;:<=>?]*[ -/]*[@-~]|\x9b[0-9;:<=>?]*[ -/]*[@-~]"  # CSI: colours, the cursor
    "|(?:\x1b[\\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\\\|\x9c)?"  # OSC, DCS…: titles, clipboard
    "|\x1b[ -/]*[0-~]"
)


class Redactor:
    """Replaces values by `***`, also as JSON, Python, a URL, HTML, a shell or base64 spell them, and each line of a
    value that has several."""

    def __init__(self, values: Iterable[str]) -> None:
        self.values = frozenset(values)
        words = {form for value in self.values for form in _spelled(value) if len(form) >= SHORTEST}
        self._long = {form for form in words if len(form) >= SHORTEST_IN_DATA}
        self._codes = {form for value in self.values for form in _coded(value)}
        self._forms = _longest_first(words | self._codes)

    @cached_property
    def _anywhere(self) -> re.Pattern[str] | None:
        return _any_of(self._forms)

    @cached_property
    def _in_values(self) -> re.Pattern[str] | None:
        return _any_of(_longest_first(self._long | self._codes))

    @cached_property
    def _in_data(self) -> re.Pattern[str] | None:
        return _any_of(_longest_first(self._codes), _longest_first(self._long))

    def text(self, text: str) -> str:
        return self._anywhere.sub(MASK, text) if self._anywhere else text

    def value(self, text: str) -> str:
        return self._in_values.sub(MASK, text) if self._in_values else text

    def data(self, text: str) -> str:
        return self._in_data.sub(MASK, text) if self._in_data else text

    def begun(self, text: str) -> int:
        """Return how many characters at the end of `text` may be the beginning of a value that goes on."""
        longest = min(len(self._forms[0]) - 1 if self._forms else 0, len(text))
        ends = (text[-length:] for length in range(longest, 0, -1))
        return next((len(end) for end in ends if any(form.startswith(end) for form in self._forms)), 0)


def _longest_first(forms: Iterable[str]) -> list[str]:
    return sorted(forms, key=len, reverse=True)


def _any_of(forms: Sequence[str], words: Sequence[str] = ()) -> re.Pattern[str] | None:
    """words: forms that stand alone, or behind the letter of an escaped line's end."""
    found = [*map(re.escape, forms)]
    if words:
        found.append(rf"(?:(?<!\w)|(?<=\\[nrt]))(?:{'|'.join(map(re.escape, words))})(?!\w)")
    return re.compile("|".join(found)) if found else None


def _parts(value: str) -> set[str]:
    return {value, value.strip(), *value.splitlines()}


def _spelled(value: str) -> Iterator[str]:
    for part in _parts(value):
        for once in _escaped(part):
            yield from (once, *_quoted(once))


def _coded(value: str) -> Iterator[str]:
    """In base64, where it stands amid other letters."""
    for part in _parts(value):
        data = part.encode("utf-8", "surrogateescape")
        if len(data) >= SHORTEST_ENCODED:
            for offset in range(3):  # it may begin at any byte of three
                inner = base64.b64encode(bytes(offset) + data).decode().rstrip("=")
                inner = inner[(0, 2, 3)[offset] : -1 if (offset + len(data)) % 3 else None]
                yield from (inner, inner.translate({ord("+"): "-", ord("/"): "_"}))


def _escaped(part: str) -> set[str]:
    in_address = {
        quote(part, safe="", errors="replace"),
        quote(part, errors="replace"),
        quote_plus(part, errors="replace"),
    }
    small = {re.sub("%[0-9A-F]{2}", lambda code: code[0].lower(), form) for form in in_address}
    return {part, part.translate(_MARKUP), shlex.quote(part).strip("'"), *in_address, *small, *_quoted(part)}


def _quoted(part: str) -> set[str]:
    return {json.dumps(part)[1:-1], json.dumps(part, ensure_ascii=False)[1:-1], repr(part)[1:-1]}


_known = Redactor(())


def conceal(values: Iterable[str]) -> None:
    """Mask these values from now on in all that this process shows or writes. What was a secret stays one."""
    global _known
    if more := {value for value in values if value} - _known.values:
        _known = Redactor(_known.values | more)


def conceal_environment(environment: Mapping[str, str], names: Iterable[str] = ()) -> None:
    """Conceal these variables and what is a secret in any environment: the Hub's tokens, also the one that
    `hf auth login` left on disk, the credentials of buckets, and passwords in addresses, such as those of proxies."""
    conceal(environment[name] for name in (*names, *HUB_TOKENS) if name in environment)
    signing = (environment[name] for name in environment if CREDENTIAL.fullmatch(name))
    conceal(value for value in signing if len(value) >= SHORTEST_ENCODED)
    conceal(filter(None, [stored_hub_token(environment)]))
    for value in environment.values():
        if "://" in value and (found := re.search(r"://([^/\s:@]*):([^/\s]*)@", value)):
            name, password = map(unquote, found.groups())
            # The last is what a header has in base64. A short one is masked where it stands in an address alone.
            conceal(each for each in (found[2], password, f"{name}:{password}") if len(each) >= SHORTEST_ENCODED)


def stored_hub_token(environment: Mapping[str, str]) -> str | None:
    """Return the token that `hf auth login` left on disk. None where there is none."""
    cache = environment.get("XDG_CACHE_HOME") or os.path.join(environment.get("HOME", ""), ".cache")
    home = environment.get("HF_HOME") or os.path.join(cache, "huggingface")
    path = Path(os.path.expanduser(environment.get("HF_TOKEN_PATH") or os.path.join(home, "token")))
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def without_passwords(address: str) -> str:
    """Return the address without the name and password in it."""
    return re.sub(r"(?<=://)[^/\s]*@", "", address)


def redact(text: str) -> str:
    """Return the text with all that is concealed masked, and with it passwords and signatures in addresses."""
    return _without_given_away(_known.text(text))


def redact_value(text: str) -> str:
    """Return what we state ourselves, as `redact` does a text; a secret that is short is taken for a word in it."""
    return _without_given_away(_known.value(text))


def _without_given_away(text: str) -> str:
    """What has the form of a secret is masked whatever is known."""
    if holds_token(text):
        text = re.sub(_GIVEN_AWAY, MASK, text)
    if "://" in text:
        text = re.sub(_SIGNATURE, rf"\g<name>{MASK}", re.sub(_ADDRESS, _without_password, text))
    return re.sub(_HEADER, rf"\g<name>{MASK}", text) if "uthoriz" in text or "UTHORIZ" in text else text


def _without_password(found: re.Match[str]) -> str:
    return f"://{found['user']}:{MASK}@" if found["user"] is not None else f"://{MASK}@"


def mask(text: str) -> str:
    """Return data with all that is concealed masked, where it is a word of its own. Data is what a model or a person
    wrote: what has but the form of a secret, as examples in code have it, stays as it is."""
    return _known.data(text)


def redact_json(value: Any, by: Callable[[str], str] = redact) -> Any:
    """Return the same JSON value, every string in it redacted; keys as what we state. by: `mask` for data."""
    if isinstance(value, str):
        return by(value)
    if value is None or isinstance(value, (int, float)):  # before Mapping, to which a look is dear
        return value
    if isinstance(value, Mapping):
        return {_key(key): redact_json(item, by) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        found = [redact_json(item, by) for item in value]
        return tuple(found) if isinstance(value, tuple) else found
    return value


def _key(key: Any) -> Any:
    return redact_value(key) if isinstance(key, str) else key


def redact_fields(value: Any, field: str = "") -> Any:
    """Return the same JSON of ours: what is known stays in a field of `NAMES` and in keys; what is in one of `TEXTS` is
    redacted, every other string is a value, and below one of `VALUES` all are, whatever they are called. field: whose
    value it is."""
    if field in VALUES:
        return redact_json(value, redact_value)
    if field == "metrics" and isinstance(value, Mapping):
        return redact_metrics(value)
    if isinstance(value, str):
        by = _without_given_away if field in NAMES else redact if field in TEXTS else redact_value
        return by(value)
    if value is None or isinstance(value, (int, float)):
        return value
    if isinstance(value, Mapping):
        return {
            _without_given_away(key) if isinstance(key, str) else key: redact_fields(item, str(key))
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        found = [redact_fields(item, field) for item in value]
        return tuple(found) if isinstance(value, tuple) else found
    return value


def redact_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics with what is in them as values; a name that a gate can ask for stays."""
    return {
        name if name.replace(".", "_").isidentifier() else redact_value(name): redact_json(value, redact_value)
        for name, value in metrics.items()
    }


def masked_texts(values: Iterable[Any], encode: Callable[[Any], str]) -> tuple[list[str], list[int]]:
    """Return JSON values that are data as `encode` spells them, with every string in them masked, and the numbers of
    those that had something to mask. Those that have nothing, as most, are spelled once and looked through together: a
    string without a backslash stands in JSON as it is."""
    values = list(values)
    texts = [encode(value) for value in values]
    if _is_clean("\n".join(texts)):
        return texts, []
    pairs = zip(texts, values, strict=True)
    masked = [text if _is_clean(text) else encode(redact_json(value, mask)) for text, value in pairs]
    return masked, [number for number, text in enumerate(texts) if masked[number] != text]


def _is_clean(text: str) -> bool:
    return "\\" not in text and mask(text) == text


def unfinished(text: str) -> int:
    """Return how many characters at the end of `text` may be the beginning of what is concealed."""
    return _known.begun(text)


def has_password(text: str) -> bool:
    """Does an address in the text hold a password, or a token in its place?"""
    return "://" in text and bool(re.search(_ADDRESS, text) or re.search(_SIGNATURE, text))


def holds_token(text: str) -> bool:
    """Does a token stand in the text, by the form that its maker gave it?"""
    return any(map(text.__contains__, _BEGINNINGS)) and re.search(_GIVEN_AWAY, text) is not None


def printable(text: str) -> str:
    """Return a text that moves nothing on a terminal: what a server, a model or a file's name holds may be in it."""
    return _MOVING.sub(lambda sign: repr(sign[0])[1:-1], text)


def printable_json(text: str) -> str:
    """Return the same JSON, what would move a terminal escaped as JSON does."""
    return _MOVING.sub(lambda sign: f"\\u{ord(sign[0]):04x}", text)


def plain(text: str) -> str:
    """Return a text that was meant for a terminal without its colours and movements."""
    return _MOVING.sub("", re.sub(_SEQUENCE, "", text))
