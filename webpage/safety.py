"""Who may ask, and what a browser may do with the answer.

A page on loopback is within reach of every site that its user has open: a site may send requests to it, and under a
name that turns to 127.0.0.1 (DNS rebinding) even read the answers. So a request must name a host that is ours, come
from no other site, and, where it changes something, carry what only our own page knows. Where other machines can reach
the page, it also needs the token that was printed at the start.
"""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_BODY = 2 * 2**20
"""Bytes of a request."""
BODY_SECONDS = 10
READING = frozenset({"GET", "HEAD"})
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True, slots=True)
class Rules:
    """names: hosts that the page answers to, beside addresses in digits. token: who does not bring it stays outside;
    None on loopback. form_token: what forms of the page carry."""

    names: frozenset[str]
    token: str | None = field(default=None, repr=False)
    form_token: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)

    def knows_host(self, host: str) -> bool:
        """Is this the page's own? A name that someone else may point here is not; an address in digits is nobody's."""
        name = _split(f"//{host}").hostname or ""
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self.names
        return True

    def knows_token(self, token: str) -> bool:
        return self.token is None or _same(token, self.token)

    def is_own_form(self, token: str) -> bool:
        return _same(token, self.form_token)


def _split(address: str) -> SplitResult:
    """The parts of an address; none of what is no address."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


def _same(one: str, other: str) -> bool:
    return secrets.compare_digest(one.encode("utf-8", "replace"), other.encode("utf-8", "replace"))


class Guard:
    """An ASGI application around another."""

    def __init__(self, inner: ASGIApp, rules: Rules) -> None:
        self._inner, self._rules = inner, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)

        async def sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                found = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    found.setdefault(name, value)
            await send(message)

        answer = self._refusal(scope, headers) or self._greeting(scope, headers)
        if answer is not None:
            await answer(scope, receive, sealed)
            return
        await self._inner(scope, receive, sealed)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """Why a request is not answered, whoever sends it."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._rules.knows_host(hosts[0]):
            cure = "open it by its address in digits, or start `bigpipe ui --host NAME`"
            return PlainTextResponse(f"this page does not answer to that name: {cure}", 421)
        if scope["method"] not in READING | {"POST"}:
            return PlainTextResponse("only GET and POST", 405, {"Allow": "GET, HEAD, POST"})
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not _is_arrival(scope, headers):
            return PlainTextResponse("another site sent this; open the page itself", 403)
        origin = headers.get("origin")
        if scope["method"] == "POST" and origin is not None and _split(origin).netloc != hosts[0]:
            return PlainTextResponse("another site sent this; open the page itself", 403)
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length[:12]) > LARGEST_BODY:
            return PlainTextResponse(f"at most {LARGEST_BODY} bytes", 413)
        return None

    def _greeting(self, scope: Scope, headers: Headers) -> Response | None:
        """Takes the token from the address into a cookie, and keeps out whoever has neither."""
        rules = self._rules
        if rules.token is None:
            return None
        pairs = parse_qsl(scope["query_string"].decode("latin-1"))
        given = next((value for name, value in pairs if name == "token"), None)
        if given is not None and scope["method"] in READING and rules.knows_token(given):
            rest = urlencode([(name, value) for name, value in pairs if name != "token"])
            path = f"/{scope['path'].lstrip('/')}"
            answer = RedirectResponse(f"{path}?{rest}" if rest else path, 303)
            answer.set_cookie(cookie_name(scope), given, httponly=True, samesite="strict", path="/")
            return answer
        if rules.knows_token(_cookie(headers.getlist("cookie"), cookie_name(scope)) or _bearer(headers)):
            return None
        return PlainTextResponse("open the address that `bigpipe ui` printed, with its token", 401)


def _is_arrival(scope: Scope, headers: Headers) -> bool:
    """A link elsewhere to the page's front, which asks for nothing."""
    navigates = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    return navigates and scope["method"] == "GET" and scope["path"] == "/" and not scope["query_string"]


def cookie_name(scope: Scope) -> str:
    """One per port, since browsers do not tell ports apart."""
    return f"bigpipe-{scope['server'][1]}"


def _cookie(lines: Iterable[str], name: str) -> str:
    found = (cookie_parser(line).get(name) for line in lines)  # what other programs on this host set may be anything
    return next((value for value in found if value is not None), "")


def _bearer(headers: Headers) -> str:
    kind, _, token = headers.get("authorization", "").partition(" ")
    return token if kind.lower() == "bearer" else ""
