"""Requests of OpenAI's Batch API as rows, and its responses as results.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": …, "messages": […], …}}
    {"id": "batch_req_…", "custom_id": "a", "response": {"status_code": 200, "body": {…}, …}, "error": null}

The forms are those of https://platform.openai.com/docs/api-reference/batch. A field of a body is heeded, or refused
with its line. `created` is 0, so that the same requests give the same bytes.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from bigpipe.errors import UsageError
from bigpipe.redaction import mask, redact_json

from .rows import Prompts, Row

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
URLS: Mapping[str, str] = {CHAT: "text-generation", COMPLETIONS: "text-generation", EMBEDDINGS: "feature-extraction"}
"""Address of a request → the task that answers it."""
SAYS_NOTHING = frozenset({"model", "user", "metadata", "store"})
"""Fields of a body that change nothing of an answer's text."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "stream": (False,), "echo": (False,), "logprobs": (False,), "top_logprobs": (0,),
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "suffix": ("",), "tools": ([],),
    "tool_choice": ("none",), "response_format": ({"type": "text"},), "encoding_format": ("float",),
}  # fmt: skip
"""Fields that are taken with what is their default alone, which null stands for too."""
MOST_STOPS, HOTTEST = 4, 2


@dataclass(frozen=True, slots=True)
class Requests:
    """The rows of files of requests, read as `Prompts` are. Raises UsageError with line and field for a request that is
    not one, that asks for what is not done, or that has the `custom_id` of another."""

    prompts: Prompts

    def __iter__(self) -> Iterator[Row]:
        names = array("Q")
        for row in self.prompts:
            names.append(_number(row))
            yield row
        self._require_unique(names)

    def _require_unique(self, names: array[int]) -> None:
        import numpy as np

        order = np.argsort(np.asarray(names), kind="stable")
        ordered = np.asarray(names)[order]
        again = np.flatnonzero(ordered[1:] == ordered[:-1])
        if len(again):
            twice = names[int(order[again[0]])]
            first, second = [row for row in self.prompts if _number(row) == twice][:2]
            cause = f"custom_id {second.data['custom_id']!r:.80} is that of {first.place} too"
            raise second.wrong(cause, "give each request its own")


def _number(row: Row) -> int:
    return int.from_bytes(hashlib.sha256(row.data["custom_id"].encode()).digest()[:8], "big")


def request_reader(task: str, max_new_tokens: int) -> Callable[[Any, str], tuple[Any, dict[str, Any]]]:
    """Return what takes a request and its place, and gives its prompt and the arguments of the task that it asks for.
    max_new_tokens: the most that one may ask for."""

    def read(data: Any, where: str) -> tuple[Any, dict[str, Any]]:
        body = _envelope(data, where, task)
        asked, field = _Asked(body, where, max_new_tokens), PROMPTS[data["url"]]
        prompt = _chat(body, where) if data["url"] == CHAT else _one_text(body.get(field), where, f"body.{field}")
        arguments = asked.sampling() if task == "text-generation" else {}
        taken = SAYS_NOTHING | {field} | (SAMPLING if task == "text-generation" else frozenset())
        for name, value in body.items():
            if name in taken or value is None or any(value == neutral for neutral in NEUTRAL.get(name, ())):
                continue
            only = f" but as {NEUTRAL[name][0]!r}" if name in NEUTRAL else ""
            _refuse(where, f"body.{name}", f"is not done here{only}", "leave it out")
        return prompt, arguments

    return read


PROMPTS: Mapping[str, str] = {CHAT: "messages", COMPLETIONS: "prompt", EMBEDDINGS: "input"}
SAMPLING = frozenset({"max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop"})


def _refuse(where: str, field: str, wrong: str, cure: str) -> NoReturn:
    raise UsageError(f"{where}: {field} {wrong}", cure, field="prompts")


def _envelope(data: Any, where: str, task: str) -> dict[str, Any]:
    """The body of a request whose other fields are right."""
    if not isinstance(data, dict):
        raise UsageError(f"{where}: a request is an object", "write one per line", field="prompts")
    form = '{"custom_id": …, "method": "POST", "url": "/v1/chat/completions", "body": {…}}'
    for name in ("custom_id", "method", "url", "body"):
        if name not in data:
            _refuse(where, name, "is missing", f"write requests as {form}")
    if not isinstance(data["custom_id"], str) or not data["custom_id"]:
        _refuse(where, "custom_id", f"is {data['custom_id']!r:.60}, and no text", "give each request a name of its own")
    if data["method"] != "POST":
        _refuse(where, "method", f"is {data['method']!r:.60}", "write POST")
    if data["url"] not in URLS:
        _refuse(where, "url", f"is {data['url']!r:.80}", f"write {', '.join(URLS)}")
    if URLS[data["url"]] != task:
        _refuse(where, "url", f"{data['url']} asks for {URLS[data['url']]}, and the task is {task}", "run it apart")
    body = data["body"]
    if not isinstance(body, dict):
        _refuse(where, "body", "is no object", f"write requests as {form}")
    if not isinstance(body.get("model"), str):
        _refuse(where, "body.model", "is no text", "name a model: responses repeat its name")
    return body


def _chat(body: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        _refuse(where, "body.messages", "is no list of messages", "write them as {role: user, content: …}")
    made = []
    for number, message in enumerate(messages):
        field = f"body.messages[{number}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            _refuse(where, field, "has no role", "write it as {role: user, content: …}")
        made.append({**message, "content": _content(message.get("content"), where, f"{field}.content")})
    return made


def _content(content: Any, where: str, field: str) -> str:
    """A text, or parts that are texts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    texts = []
    for number, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            place = f"{field}[{number}]" if isinstance(content, list) else field
            _refuse(where, place, "is no text", "write a text: pictures and sounds are not read here")
        texts.append(part["text"])
    return "".join(texts)


def _one_text(given: Any, where: str, field: str) -> str:
    texts = given if isinstance(given, list) else [given]
    if len(texts) == 1 and isinstance(texts[0], str):
        return texts[0]
    if len(texts) > 1 and all(isinstance(text, str) for text in texts):
        _refuse(where, field, f"holds {len(texts)} texts", "write a request for each")
    _refuse(where, field, "is no text", "write a text: tokens are not taken")


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a body asks of `generate`."""

    body: Mapping[str, Any]
    where: str
    most: int

    def sampling(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if (length := self._length()) is not None:
            found["max_new_tokens"] = length
        heat, share = self._number("temperature", 0, HOTTEST), self._number("top_p", 0, 1)
        if heat == 0 or share == 0:  # the likeliest token alone
            found["do_sample"] = False
        elif heat is not None or (share is not None and share < 1):
            found |= {"do_sample": True, "temperature": 1.0 if heat is None else heat}
            found["top_p"] = 1.0 if share is None else share
        if (seed := self.body.get("seed")) is not None:
            if type(seed) is not int:
                _refuse(self.where, "body.seed", f"is {seed!r:.60}, and no whole number", "write one, or leave it out")
            found["seed"] = seed % 2**63
        if stops := self._stops():
            found["stop_strings"] = stops
        return found

    def _length(self) -> int | None:
        for name in ("max_completion_tokens", "max_tokens"):
            value = self.body.get(name)
            if value is None:
                continue
            if type(value) is not int or value < 1:
                _refuse(self.where, f"body.{name}", f"is {value!r:.60}", "write a whole number from 1")
            if value > self.most:
                cause = f"is {value}, and memory is planned for {self.most} new tokens"
                _refuse(self.where, f"body.{name}", cause, f"raise max_new_tokens of the stage to {value}")
            return int(value)
        return None

    def _number(self, name: str, least: float, most: float) -> float | None:
        value = self.body.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            _refuse(self.where, f"body.{name}", f"is {value!r:.60}", f"write a number from {least} to {most}")
        return float(value)

    def _stops(self) -> list[str]:
        given = self.body.get("stop")
        stops = [given] if isinstance(given, str) else [] if given is None else given
        if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
            cure = f"write a text, or up to {MOST_STOPS} of them, none of them empty"
            _refuse(self.where, "body.stop", f"is {given!r:.60}", cure)
        return stops


def response(row: Row, payload: Mapping[str, Any], read: int, made: int) -> dict[str, Any]:
    """Return the line of results of a request. payload: what the task gave. read, made: tokens of prompt and answer."""
    key = f"{row.digest}{row.index:08x}"
    own = {name: row.data[name] for name in ("custom_id", "url")} | {"model": row.data["body"]["model"]}
    data = redact_json(own, mask)
    line: dict[str, Any] = {"id": f"batch_req_{key}", "custom_id": data["custom_id"], "response": None, "error": None}
    if "error" in payload:
        kind, _, said = str(payload["error"]).partition(": ")
        if kind == "RankDied":  # nothing answered
            return line | {"error": {"code": "server_error", "message": said}}
        wrong = kind == "ValueError"
        told = {"message": said, "type": "invalid_request_error" if wrong else "server_error"}
        body: dict[str, Any] = {"error": {**told, "param": None, "code": None}}
        return line | {"response": _answered(key, 400 if wrong else 500, body)}
    usage = {"prompt_tokens": read, "total_tokens": read + made}
    if data["url"] == EMBEDDINGS:
        found = {"object": "embedding", "index": 0, "embedding": payload["features"]}
        usage["total_tokens"] = read
        body = {"object": "list", "data": [found], "model": data["model"], "usage": usage}
        return line | {"response": _answered(key, 200, body)}
    chat, text = data["url"] == CHAT, _before_stop(payload["text"], (row.arguments or {}).get("stop_strings", ()))
    choice: dict[str, Any] = (
        {"message": {"role": "assistant", "content": text, "refusal": None}} if chat else {"text": text}
    )
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{key}", "object": "chat.completion" if chat else "text_completion",
        "created": 0, "model": data["model"],
        "choices": [{"index": 0, **choice, "logprobs": None, "finish_reason": payload["finish_reason"]}],
        "usage": {**usage, "completion_tokens": made},
    }  # fmt: skip
    return line | {"response": _answered(key, 200, body)}


def _answered(key: str, status: int, body: Mapping[str, Any]) -> dict[str, Any]:
    return {"status_code": status, "request_id": f"req_{key}", "body": body}


def _before_stop(text: str, stops: Any) -> str:
    """What stands before the first of the texts that end an answer."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]
