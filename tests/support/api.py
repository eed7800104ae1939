"""A server that speaks OpenAI's API, as its reference and vLLM's server have it, over a toy of a model.

    with Api() as api:
        api.change = lambda asked, reply: replace(reply, status=429) if asked.number == 1 else reply

The toy reads and writes bytes: a token is one, what follows a text is the text turned round, and a token's
log-probability is minus its value.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

MODEL = "toy"
KEY = "sk-c4n4ry-c4n4ry"


@dataclass(frozen=True)
class Asked:
    path: str
    body: dict[str, Any]
    headers: Mapping[str, str]
    number: int
    """Of all that this server was asked, from 1."""

    @property
    def text(self) -> str:
        """The prompt, of a chat its last message."""
        given = self.body.get("prompt") or self.body.get("input") or self.body["messages"][-1]["content"]
        return str(given)


@dataclass(frozen=True)
class Reply:
    body: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    after: float = 0.0
    """Seconds before it begins."""
    sends: int | None = None
    """Bytes of the body, before the connection is cut; None: all."""
    each: float = 0.0
    """Seconds between two bytes."""


class Api(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *, port: int = 0, key: str | None = None, model: str = MODEL) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.key, self.model = key, model
        self.asked: list[Asked] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.change: Callable[[Asked, Reply], Reply] = lambda asked, reply: reply

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what some tests are about."""

    def reply(self, asked: Asked) -> Reply:
        if self.key and asked.headers.get("authorization") != f"Bearer {self.key}":
            return _error(401, "Incorrect API key provided")
        answer = ANSWERS.get(asked.path)
        if answer is None:
            return _error(404, "Not Found")
        if asked.body.get("model") != self.model:
            return _error(404, f"The model `{asked.body.get('model')}` does not exist.")
        return Reply(json.dumps({"model": self.model, **answer(asked.body)}).encode())


def error_body(text: str) -> bytes:
    return json.dumps({"error": {"message": text, "type": "invalid_request_error", "code": None}}).encode()


def _error(status: int, text: str) -> Reply:
    return Reply(error_body(text), status)


def follows(text: str, most: int, seed: int | None = None) -> str:
    """What the toy makes of a text; drawn with a seed, the seed too."""
    return (text[::-1] if seed is None else f"{seed}:{text[::-1]}")[:most]


def _usage(read: str, made: int = 0) -> dict[str, Any]:
    return {"usage": {"prompt_tokens": len(read.encode()), "completion_tokens": made}}


def _choices(texts: list[str], wrap: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return {"choices": [{"index": n, "finish_reason": "stop", **wrap(text)} for n, text in enumerate(texts)]}


def _made(text: str, body: Mapping[str, Any]) -> list[str]:
    made = [follows(text, body.get("max_tokens") or body["max_completion_tokens"], body.get("seed"))] * body.get("n", 1)
    return [each.partition(body["stop"])[0] if body.get("stop") else each for each in made]


def _complete(body: Mapping[str, Any]) -> dict[str, Any]:
    text = body["prompt"]
    if body.get("echo"):
        values = [None, *(-float(byte) for byte in text.encode()[1:])]
        best = [None, *({chr(byte): -float(byte), "~": -100.0} for byte in text.encode()[1:])]
        told = {"tokens": list(text), "token_logprobs": values, "top_logprobs": best}
        return {**_choices([text], lambda one: {"text": one, "logprobs": told}), **_usage(text)}
    made = _made(text, body)
    return {**_choices(made, lambda one: {"text": one, "logprobs": None}), **_usage(text, sum(map(len, made)))}


def _chat(body: Mapping[str, Any]) -> dict[str, Any]:
    text = " ".join(each["content"] for each in body["messages"])
    made = _made(text, body)
    told = _choices(made, lambda one: {"message": {"role": "assistant", "content": one}})
    return {**told, **_usage(text, sum(map(len, made)))}


def _embed(body: Mapping[str, Any]) -> dict[str, Any]:
    given = body["input"]
    data = [{"index": n, "embedding": [len(text), 0.5, -1]} for n, text in enumerate(given)]
    return {"data": data[::-1], **_usage("".join(given))}


ANSWERS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "/v1/completions": _complete,
    "/v1/chat/completions": _chat,
    "/v1/embeddings": _embed,
}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Api

    def log_message(self, *arguments: Any) -> None:
        """Nothing: tests look at `asked`."""

    def do_GET(self) -> None:
        if self.path == "/health":
            self._send(Reply(b""))
        else:
            self._send(_error(404, "Not Found"))

    def do_POST(self) -> None:
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            headers = {name.lower(): value for name, value in self.headers.items()}
            asked = Asked(self.path, body, headers, len(server.asked) + 1)
            server.asked.append(asked)
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            reply = server.change(asked, server.reply(asked))
            time.sleep(reply.after)
        finally:
            with server.lock:
                server.at_once -= 1
        self._send(reply)

    def _send(self, reply: Reply) -> None:
        self.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        sent = reply.body if reply.sends is None else reply.body[: reply.sends]
        with suppress(OSError):
            for piece in [sent] if not reply.each else [sent[n : n + 1] for n in range(len(sent))]:
                self.wfile.write(piece)
                time.sleep(reply.each)
        self.close_connection = reply.sends is not None
