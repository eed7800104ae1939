"""One answer of a Hub: asked for with a budget of seconds and bytes, its headers checked before a library acts on them.

`huggingface_hub` names files of its cache after what a server says (`ETag`, `X-Repo-Commit`), so that a server could
write where it likes. Every client that it makes in this process refuses such answers.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from bigpipe.errors import Transient

PATIENCE = 5.0
"""The longest `Retry-After` that a metadata request waits for, in seconds."""
SLOWEST = 50_000
"""Bytes a second. An answer that comes at less is waited for twice as long as one that does not come at all."""
MAX_ANSWER = 128 * 2**20
"""Bytes of one answer. A listing takes some 300 per file."""
COMMIT = re.compile(r"[0-9a-f]{40}")
PLAIN = re.compile(r"(?:W/)?\"?(?!\.)[\w.+=-]{1,128}\"?", re.ASCII)
"""An ETag that is a file's name, whatever a mirror makes them of."""
NO_RANGE = "a proxy in between may drop the Range header; try again, or without it"
NOT_A_HUB = "check HF_ENDPOINT: a mirror must speak the Hub's API"

_guarding = threading.Lock()
_guarded: list[Callable[[], Any]] = []


def guard_answers() -> None:
    """See that every client of `huggingface_hub` in this process checks the headers that it is answered."""
    from huggingface_hub.utils import _http

    with _guarding:
        if _guarded:
            return
        make = getattr(_http, "_GLOBAL_CLIENT_FACTORY", _http.default_client_factory)

        def guarded() -> Any:
            client = make()
            hooks = dict(client.event_hooks)
            client.event_hooks = {**hooks, "response": [*hooks.get("response", []), _check_headers]}
            return client

        _http.set_client_factory(guarded)
        _guarded.append(guarded)


def _check_headers(response: Any) -> None:
    commit = response.headers.get("X-Repo-Commit")
    named = [response.headers.get(name) for name in ("ETag", "X-Linked-Etag") if response.request.method == "HEAD"]
    wrong = [] if commit is None or COMMIT.fullmatch(commit) else [commit]
    wrong += [name for name in named if name is not None and not PLAIN.fullmatch(name)]
    if wrong:
        cause = f"{response.request.url.host} names a file or commit {wrong[0][:80]!r}, which no Hub does"
        raise Transient(cause, NOT_A_HUB)


def request(
    address: str,
    *,
    token: str | None,
    timeout: float,
    query: Mapping[str, str],
    headers: Mapping[str, str],
    limit: int = MAX_ANSWER,
    method: str = "GET",
) -> Any:
    """Return the response to one request, or to a second one where the first met a limit or a server out of order, with
    what was read as its `extensions["content"]`. timeout: seconds for each of its steps. At most `limit` bytes are
    read: a server that ignores a Range header would send the whole file.
    Raise Transient where there are more, or they come too slowly; and the errors of `huggingface_hub`."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    guard_answers()
    sent = {**build_hf_headers(token=token, library_name="bigpipe"), **headers}
    for last in (False, True):
        with get_session().stream(method, address, params=dict(query), headers=sent, timeout=timeout) as response:
            wait = _retry_after(response.headers.get("Retry-After"))
            if last or wait > PATIENCE or response.status_code not in (429, 500, 502, 503, 504):
                hf_raise_for_status(response)
                response.extensions["content"] = _read(response, limit, 2 * timeout)
                return response
        time.sleep(wait)
    return None


def _read(response: Any, limit: int, seconds: float) -> bytes:
    content, begun, host = bytearray(), time.monotonic(), response.request.url.host
    for chunk in response.iter_bytes():
        content += chunk
        if len(content) > limit:
            raise Transient(f"{host} answered with more than the {limit} bytes that were asked for", NO_RANGE)
        if time.monotonic() - begun > seconds + len(content) / SLOWEST:
            cause = f"{host} sends its answer too slowly: {len(content)} bytes in {time.monotonic() - begun:.0f} s"
            raise Transient(cause, "run again later, or over another network")
    return bytes(content)


def _retry_after(value: str | None) -> float:
    """Seconds; half a second where the header is missing, an endless wait where it is a date."""
    if value is None:
        return 0.5
    return float(value) if value.isdecimal() else float("inf")
