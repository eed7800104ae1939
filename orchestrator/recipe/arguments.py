"""What programs give for parameters and fields, on its way through YAML: it arrives as the value it was."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from bigpipe.errors import UsageError
from bigpipe.orchestrator.contract import Json

_UNQUOTED = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
"""What JSON leaves as it is, and YAML breaks lines at or does not hold."""


class Argument(str):
    """What a program gives for a parameter: as a command line would write it, with the value that is meant."""

    value: Json

    @classmethod
    def of(cls, value: Json) -> Argument:
        """Raise ValueError or TypeError for what is no JSON."""
        text = json.dumps(value, allow_nan=False)
        argument = cls(quoted(value))
        argument.value = json.loads(text)
        return argument


def quoted(value: Json) -> str:
    """Return a value as JSON that YAML reads as the same value."""
    return _UNQUOTED.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


def written(params: Mapping[str, Any] | None) -> dict[str, str]:
    """Return parameters as a command line would write them: strings as they are, everything else as an Argument.
    Raise UsageError for what YAML does not hold, and for None, which no command line can write."""

    def text(name: object, value: Any) -> str:
        if value is None:
            raise UsageError(f"params: {name} is None", "leave it out, or give a text, a number, a list or a dict")
        try:
            return value if isinstance(value, str) else Argument.of(value)
        except (TypeError, ValueError) as error:
            raise UsageError(f"params: {name} is {value!r:.80}", "give texts, numbers, lists and dicts") from error

    return {str(name): text(name, value) for name, value in (params or {}).items()}
