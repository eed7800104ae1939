"""The client of `huggingface_hub`, guarded: every answer is checked, and every exchange has a budget.

    guard_answers(endpoint)            once, before the client is used
    request(address, …)                one metadata request
    with downloading(…): …             around what the client does by itself

Tokens are sent to the Hub that they are for, and nowhere else.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from bigpipe.errors import Transient
from bigpipe.filesystems import is_address

from .exchange import Exchange, charge_sockets, current, exchanging
from .responses import BUSY, ELSEWHERE, asked_pause, check_answer

PATIENCE = 5.0
"""The longest `Retry-After` that a metadata request waits for, in seconds."""
SLOWEST = 50_000
"""Bytes a second. An answer that comes at less is waited for twice as long as one that does not come at all."""
SLOWEST_FILE = 10_000
"""Bytes a second, of one file in either direction."""
MAX_ANSWER = 32 * 2**20
"""Bytes of one answer. A listing takes some 300 per file."""
STEPS, PAUSES = 6, 30
"""Patience with files, and the pauses that may be asked for, in the client's own time limits (HF_HUB_DOWNLOAD_TIMEOUT,
10 s). The Hub counts requests over five minutes."""
OFFICIAL = ("https://huggingface.co", "https://hf.co")

_guarding = threading.Lock()
_guarded: list[Callable[[], Any]] = []
_endpoints: set[tuple[str, str, int]] = set()


def guard_answers(endpoint: str) -> None:
    """See that every client of `huggingface_hub` in this process checks what it is answered, by this Hub or another."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    with _guarding:
        _endpoints.update(map(_origin, (endpoint, constants.ENDPOINT, *OFFICIAL)))
        if _guarded:
            return
        make = getattr(_http, "_GLOBAL_CLIENT_FACTORY", _http.default_client_factory)

        def guarded() -> Any:
            client = make()
            hooks = client.event_hooks
            client.event_hooks = {
                "request": [*hooks.get("request", []), _check_request],
                "response": [*hooks.get("response", []), _check_response],
            }
            client.headers["Accept-Encoding"] = "gzip"
            charge_sockets(client, _unknown)
            return client

        _http.set_client_factory(guarded)
        _guarded.append(guarded)


def clean_token(token: str | None) -> str | None:
    """Return a token as the client reads one: a secret that comes from a file ends in a newline, and no header may."""
    return re.sub(r"[\r\n]", "", token or "").strip() or None


def _origin(address: str) -> tuple[str, str, int]:
    try:
        url = urlsplit(address)
        return url.scheme, url.hostname or "", url.port or (80 if url.scheme == "http" else 443)
    except ValueError:
        return "", "", 0


def _ours(address: str) -> bool:
    return _origin(address) in _endpoints


def _secure() -> bool:
    return all(scheme != "http" for scheme, _, _ in _endpoints)


def _check_request(request: Any) -> None:
    address = str(request.url)
    if _ours(address):
        return
    if not is_address(address) or (_secure() and request.url.scheme == "http"):
        raise Transient(f"a Hub sends requests to {address[:80]!r}, which is no safe place", ELSEWHERE)
    request.headers.pop("Authorization", None)


def _check_response(response: Any) -> None:
    check_answer(response, current() or _unknown(), secure=_secure(), ours=_ours)


def _unknown() -> Exchange:
    """Of a request that belongs to no exchange: what the client asks in threads of its own while it uploads."""
    step = _step()
    return Exchange(patience=2 * STEPS * step, slowest=SLOWEST_FILE, limit=MAX_ANSWER, pause=PAUSES * step)


def _step() -> float:
    constants = sys.modules["huggingface_hub.constants"]
    return float(constants.HF_HUB_DOWNLOAD_TIMEOUT)


def longest_silence() -> float:
    """Return the seconds after which a file of which nothing comes is given up, whoever brings it."""
    return (2 * STEPS + PAUSES) * _step()


def downloading(name: str, size: int, *, commit: str, digest: str) -> Exchange:
    """Return the exchange of one file, of which the listing tells size and digest ("" where it does not)."""
    step = _step()
    return Exchange(
        patience=STEPS * step,
        slowest=SLOWEST_FILE,
        limit=size,
        pause=PAUSES * step,
        asked_for=name,
        commit=commit,
        digest=digest,
        size=size,
    )


def asking(timeout: float, limit: int = MAX_ANSWER, **known: Any) -> Exchange:
    """Return the exchange of one metadata request, each step of which may take `timeout` seconds. known: fields of an
    `Exchange` for messages, and of the file that is asked about."""
    anyhow = float("inf")  # how long it waits is decided in `request`
    return Exchange(patience=2 * timeout, slowest=SLOWEST, limit=limit, pause=anyhow, **known)


def uploading(name: str) -> Exchange:
    """Return the exchange of what the client asks in this thread while it uploads."""
    exchange = _unknown()
    exchange.asked_for = name
    return exchange


def request(
    address: str,
    *,
    token: str | None,
    timeout: float,
    query: Mapping[str, str],
    headers: Mapping[str, str],
    limit: int = MAX_ANSWER,
) -> Any:
    """Return the response to one GET, or to a second one where the first met a limit or a server out of order; it
    has been read. timeout: seconds for each of its steps. At most `limit` bytes are read: a server that ignores a Range
    header would send the whole file.
    Raise Transient where there are more, or they come too slowly; and the errors of `huggingface_hub`."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    guard_answers(address)
    sent = {**build_hf_headers(token=token, library_name="bigpipe"), **headers}
    with exchanging(asking(timeout, limit)):
        for last in (False, True):
            with get_session().stream("GET", address, params=dict(query), headers=sent, timeout=timeout) as response:
                wait = _pause(response.headers)
                if last or wait > PATIENCE or response.status_code not in BUSY:
                    hf_raise_for_status(response)
                    response.read()
                    return response
            time.sleep(wait)
    return None


def _pause(headers: Any) -> float:
    """Seconds; half a second where the header is missing, an endless wait where it is a date."""
    told = headers.get("Retry-After")
    if told is None and "RateLimit" not in headers:
        return 0.5
    return asked_pause(headers) if (told or "0").isdigit() else float("inf")


def http_client(unknown: Callable[[], Exchange], connections: int, timeout: float, *, proxies: bool = True) -> Any:
    """Return a client for a server that is no Hub, of the library that `huggingface_hub` stands on (httpx, or its
    successor httpx2): it follows nobody, and all it sends and reads is charged. unknown: for what belongs to no
    exchange. connections: at once. timeout: seconds of each step. proxies: those of the environment are used."""
    from importlib import import_module

    from huggingface_hub.utils import _http

    with _http.default_client_factory() as example:
        library = import_module(type(example).__module__.partition(".")[0])
    limits = library.Limits(max_connections=connections, max_keepalive_connections=connections)
    client = library.Client(limits=limits, timeout=timeout, trust_env=proxies, follow_redirects=False)
    client.headers["User-Agent"] = "bigpipe"
    charge_sockets(client, unknown)
    return client
