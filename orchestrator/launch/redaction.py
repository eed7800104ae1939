"""Keeps the values of secrets out of everything that is written or shown."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from urllib.parse import quote, quote_plus

from bigpipe.errors import BigpipeError
from bigpipe.orchestrator.contract import Event, Json

MASK = "***"
SHORTEST = 4
"""Values shorter than this are left alone: masking every `a` would spoil the text and give the value away."""


class Redactor:
    """Replaces secret values by `***`, also URL-quoted, JSON-escaped, and each line of a value that has several."""

    def __init__(self, values: Iterable[str]) -> None:
        forms: set[str] = set()
        for value in values:
            for part in {value, value.strip(), *value.splitlines()}:
                forms |= {part, quote(part, safe=""), quote_plus(part), json.dumps(part)[1:-1], repr(part)[1:-1]}
        masked = sorted((form for form in forms if len(form) >= SHORTEST), key=len, reverse=True)
        self.longest = max(map(len, masked), default=0)
        self._pattern = re.compile("|".join(map(re.escape, masked))) if masked else None

    @classmethod
    def of(cls, secrets: Iterable[str], environment: Mapping[str, str], parent: Mapping[str, str]) -> Redactor:
        """Return what masks these variables of `environment`, and the Hub token that lies where `parent` says."""
        return cls([*(environment.get(name, "") for name in secrets), stored_hub_token(parent) or ""])

    def text(self, text: str) -> str:
        return self._pattern.sub(MASK, text) if self._pattern else text

    def value(self, value: Json) -> Json:
        """The same, in every string of a JSON value, keys included."""
        if self._pattern is None:
            return value
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.text(str(key)): self.value(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(item) for item in value]
        return value

    def error(self, error: BigpipeError) -> BigpipeError:
        """The same error, its texts masked."""
        error.cause, error.cure = self.text(error.cause), self.text(error.cure)
        error.args = (error.cause, error.cure)
        return error

    def event(self, event: Event) -> Event:
        if self._pattern is None:
            return event
        return replace(event, **{field.name: self.value(getattr(event, field.name)) for field in fields(event)})


def stored_hub_token(environment: Mapping[str, str]) -> str | None:
    """The token that `hf auth login` left on disk, so that it can be masked too. None where there is none."""
    cache = environment.get("XDG_CACHE_HOME") or os.path.join(environment.get("HOME", ""), ".cache")
    home = environment.get("HF_HOME") or os.path.join(cache, "huggingface")
    path = Path(environment.get("HF_TOKEN_PATH") or os.path.join(home, "token")).expanduser()
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None
