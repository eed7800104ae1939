"""A server that speaks OpenAI's API, asked one question at a time by each of several threads.

Each answer has a budget of seconds and bytes, whatever the server does (`hub.Exchange`); a question is repeated where
that may help, and a pause that the server asks for is kept up to a bound. The key goes to the address that was written
and nowhere else: no answer leads away from it.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from urllib.parse import urlsplit

from bigpipe.bigmodel.hub import BUSY, Exchange, asked_pause, bound_body, exchanging, http_client
from bigpipe.errors import BigpipeError, NotAuthorised, Transient, UsageError
from bigpipe.files import parse_json
from bigpipe.redaction import conceal
from bigpipe.sizes import format_duration

LEAST = 2**20
"""Bytes that an answer may have, whatever was asked."""
SLOWEST = 10_000
"""Bytes a second: an answer that comes at less costs the patience that the timeout is."""
FIRST_WAIT = 0.5
"""Seconds before the first repetition, where the server asks for no pause; then twice as long each time."""
AGAIN = frozenset({*BUSY, 409, 425})
"""Statuses after which the same question may be answered."""
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class NoAnswer(Exception):
    """To one question: the server refuses it, or what it says is no answer. The next one may have one."""


class _Again(Exception):
    """Asking once more may help."""

    def __init__(self, at_last: Exception, pause: float = 0.0) -> None:
        """at_last: what is raised if it does not. pause: seconds that the server asks for."""
        super().__init__()
        self.at_last, self.pause = at_last, pause


def _nothing_known() -> None:
    """Nobody knows why it cannot be reached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A server, as one model of it is asked."""

    url: str
    """Up to where the API's own paths begin."""
    model: str
    key: str | None = field(default=None, repr=False)
    chat: bool = False
    """Texts are asked as the message of a user."""
    length_field: str = "max_tokens"
    """What a question calls the most tokens that are made."""
    goes_on: bool = False
    """Does it go on with a message that the assistant has begun, where it is told to? vLLM's server does."""
    timeout: float = 600.0
    """Seconds that an answer may take."""
    retries: int = 5
    """How often a question is repeated."""
    longest_wait: float = 60.0
    """Seconds, the longest pause that a server may ask for."""
    client: Any = field(repr=False)
    lost: Callable[[], None] = field(default=_nothing_known, repr=False)
    """Asked where the server cannot be reached: raises the error, where it is known why."""

    def ask(self, path: str, question: Mapping[str, Any], limit: int) -> dict[str, Any]:
        """Return the JSON object that the server answers with. path: of the API, `/completions`. limit: bytes of the
        answer at most.

        Raise NoAnswer where there is none to this question; Transient where the server cannot be reached, or takes no
        more; NotAuthorised; and UsageError where the address is not that of such a server, or has no such model."""
        content = json.dumps({"model": self.model, **question}, ensure_ascii=False).encode("utf-8", "backslashreplace")
        for number in count():
            try:
                return self._answer(path, content, limit)
            except _Again as error:
                if number >= self.retries:
                    raise error.at_last from error
                longest = min(FIRST_WAIT * 2**number, self.longest_wait)
                # Jitter, not a secret: those who were refused together are not to come back together
                time.sleep(max(error.pause, longest * random.uniform(0.5, 1.0)))  # noqa: S311
        raise AssertionError  # `count` has no end

    def is_well(self) -> bool:
        """Return whether it answers `/health`, as vLLM's server does once it takes questions."""
        with suppress(Exception), exchanging(Exchange(patience=self.timeout, slowest=SLOWEST, limit=LEAST)):
            well: bool = self.client.get(f"{self.url.removesuffix('/v1')}/health").status_code == 200
            return well
        return False

    def _answer(self, path: str, content: bytes, limit: int) -> dict[str, Any]:
        host = urlsplit(self.url).netloc
        exchange = Exchange(patience=self.timeout, slowest=SLOWEST, limit=limit)
        with self._errors(host), exchanging(exchange):
            request = self.client.build_request("POST", f"{self.url}{path}", content=content, headers=self._headers())
            response = self.client.send(request, stream=True)
            try:
                exchange.answered(host)
                bound_body(response, exchange)
                body = response.read()
            finally:
                response.close()
        if response.status_code != 200:
            self._refused(host, response, _said(body))
        try:
            found = parse_json(body)
        except ValueError as error:
            raise NoAnswer(f"{host} answers with what is no JSON: {error}") from error
        if not isinstance(found, dict):
            raise NoAnswer(f"{host} answers with a {type(found).__name__}, where an object is due")
        return found

    def _headers(self) -> dict[str, str]:
        key = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "gzip", **key}

    @contextmanager
    def _errors(self, host: str) -> Iterator[None]:
        """What the library of the client raises, by the names of its classes: two libraries spell them alike."""
        try:
            yield
        except BigpipeError as error:  # more bytes, or seconds, than the exchange allows
            raise _Again(NoAnswer(error.cause)) from error
        except Exception as error:
            names = {base.__name__ for base in type(error).__mro__}
            if "HTTPError" not in names:
                raise
            if names & {"ConnectError", "ConnectTimeout", "ProxyError"}:
                self.lost()
                cause = f"{host} cannot be reached: {error or type(error).__name__}"
                raise _Again(Transient(cause, "see that the server runs, and that `url` is its address")) from error
            how = f"in {self.timeout:g} s" if "TimeoutException" in names else f"to its end: {error}"
            raise _Again(NoAnswer(f"{host} does not answer {how}")) from error

    def _refused(self, host: str, response: Any, said: str) -> None:
        """Raise the error that another status than 200 stands for."""
        status = int(response.status_code)
        told = f"{host} answers {status}{f': {said}' if said else ''}"
        if status in AGAIN or status >= 500:
            pause = asked_pause(response.headers)
            if pause > self.longest_wait:
                cause = f"{told}, and asks for a pause of {format_duration(pause, whole=True)}"
                raise Transient(cause, "run again after that time: what is answered stays; or raise `longest_wait`")
            cure = "run again later: what is answered stays; or lower `concurrency`"
            raise _Again(Transient(told, cure) if status == 429 else NoAnswer(told), pause)
        if status in (401, 403):
            cure = "set the variable that `serving.secret` names" if self.key else "name a variable: `serving.secret`"
            raise NotAuthorised(told, f"{cure} to a key that the server takes", field="serving")
        if status in (404, 405):
            cure = "`url` ends where the API's own paths begin, mostly in /v1; `model` is one that the server has"
            raise UsageError(told, cure, field="serving")
        if status < 400:
            cure = "write the address that it leads to: a key goes to none that is not written"
            raise UsageError(f"{told}, which leads elsewhere or nowhere", cure, field="serving.url")
        raise NoAnswer(told)


def _said(body: bytes) -> str:
    """The line that `bound_body` leaves of an error."""
    try:
        found = parse_json(body)
    except ValueError:
        return ""
    errors = found.get("errors") if isinstance(found, dict) else None
    return str(errors[0]["message"]) if errors else ""


@contextmanager
def connecting(url: str, connections: int, **settings: Any) -> Iterator[Endpoint]:
    """Give the endpoint at an address while its connections are open, so many at once. settings: the rest of its
    fields. From here on its key is shown nowhere."""
    conceal(filter(None, [settings.get("key")]))
    url = url.rstrip("/")
    near = urlsplit(url).hostname in LOOPBACK  # no proxy leads there
    timeout = settings["timeout"]

    def unknown() -> Exchange:
        return Exchange(patience=timeout, slowest=SLOWEST, limit=LEAST)

    with http_client(unknown, connections, timeout, proxies=not near) as client:
        yield Endpoint(url=url, client=client, **settings)
