"""What the loopback Hub writes down, answers, and spoils on request."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

FaultKind = Literal["status", "cut", "garbage", "hang", "html", "slow", "redirect", "etag"]


@dataclass(slots=True)
class Request:
    """One answered request. `sent` counts the bytes of the body."""

    method: str
    path: str
    range: str | None
    user: str | None
    token: str | None
    agent: str
    status: int = 0
    sent: int = 0
    received: int = 0


@dataclass(slots=True)
class Fault:
    kind: FaultKind
    match: str
    times: int
    method: str | None
    status: int
    headers: Mapping[str, str]
    seconds: float
    rate: int


@dataclass(slots=True)
class Answer:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: Iterable[bytes] = ()
    size: int = 0


class Refusal(Exception):
    """Ends a request with an error as the Hub words it."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(status, code, message)
        self.answer = as_json({"error": message or code}, status)
        self.answer.headers |= {
            key: text for key, text in (("X-Error-Code", code), ("X-Error-Message", message)) if text
        }


def as_json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    data = json.dumps(value).encode()
    return Answer(status, {"Content-Type": "application/json; charset=utf-8", **(headers or {})}, [data], len(data))
