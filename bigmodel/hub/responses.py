"""What a server says is looked at before a library acts on it: the headers of each answer, and its body while it comes.

`huggingface_hub` names files of its cache after what a server says (`ETag`, `X-Repo-Commit`), goes where it is sent
(`Location`), waits as long as it is told to (`Retry-After`), and unpacks whatever is packed.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any
from urllib.parse import urljoin, urlsplit

from bigpipe.errors import Transient
from bigpipe.filesystems import is_address
from bigpipe.redaction import printable

from .exchange import Exchange

COMMIT = re.compile(r"[0-9a-f]{40}")
DIGEST = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
PLAIN = re.compile(r"(?:W/)?\"?(?!\.)[\w.+=-]{1,128}\"?", re.ASCII)
"""An ETag that is a file's name, whatever a mirror makes of them."""
SIZE = re.compile(r"[0-9]{1,15}", re.ASCII)
PIECES = re.compile(r"bytes ([0-9]{1,15})-([0-9]{1,15})/(?:[0-9]{1,15}|\*)", re.ASCII)
ASKED_PIECE = re.compile(r"bytes=([0-9]+)-([0-9]*)", re.ASCII)
XET_HASH = re.compile(r"[0-9a-f]{64}")
EXHAUSTED = re.compile(r";\s*r\s*=\s*0+\s*;\s*t\s*=\s*([0-9]{1,15})", re.ASCII)
"""In the header `RateLimit`: nothing remains, for so many seconds."""
BUSY = (408, 429, 500, 502, 503, 504)
PACKED = ("gzip", "x-gzip", "deflate")
TOLD = {"x-hf-warning", "x-error-message", "x-request-id", "x-amzn-trace-id", "x-amz-cf-id"}
"""Headers that the client shows, by name."""
NOT_A_HUB = "check HF_ENDPOINT: a mirror must speak the Hub's API"
ELSEWHERE = "check HF_ENDPOINT and the proxy"
NO_RANGE = "a proxy in between may drop the Range header; try again, or without it"
MAX_ERROR = 1 << 16
"""Bytes of an answer that says what went wrong, or where to go."""
MAX_MESSAGE = 400
"""Characters."""


def check_answer(response: Any, exchange: Exchange, *, secure: bool, ours: Callable[[str], bool]) -> None:
    """Raise Transient where its headers are not what a Hub says, or contradict what is known of the file; else leave in
    it only what may be shown and read. secure: it must not lead away from TLS. ours: is an address one of the Hub's?"""
    host = response.request.url.host
    exchange.answered(host)
    _check_names(response, exchange, host)
    _check_place(response, host, secure)
    _check_piece(response, host)
    _check_pause(response, exchange, host)
    for name, text in list(response.headers.items()):
        if name in TOLD or not text.isprintable():
            response.headers[name] = shown(text).encode("ascii", "replace").decode()
    _drop_odd_xet(response, ours)
    if response.request.method != "HEAD":
        bound_body(response, exchange)


def bound_body(response: Any, exchange: Exchange) -> None:
    """Let no more of its body be read than the exchange allows, however it is packed; of an answer that is an error
    leave one plain line, `{"errors": [{"message": …}]}`. Reading raises Transient where there is more."""
    host = response.request.url.host
    if response.status_code >= 400:
        _say_plainly(response, host)
    else:
        _bound(response, host, exchange)


def _check_names(response: Any, exchange: Exchange, host: str) -> None:
    head, commit = response.headers, response.headers.get("X-Repo-Commit")
    named = [head.get(name) for name in ("ETag", "X-Linked-Etag") if response.request.method == "HEAD"]
    wrong = [] if commit is None or COMMIT.fullmatch(commit) else [commit]
    wrong += [name for name in named if name is not None and not PLAIN.fullmatch(name)]
    if wrong:
        raise Transient(f"{host} names a file or commit {wrong[0][:80]!r}, which no Hub does", NOT_A_HUB)
    if commit is not None and exchange.commit and commit != exchange.commit:
        raise _contradiction(host, exchange, f"commit {commit}", exchange.commit)
    if response.request.method == "HEAD" and response.status_code < 400:
        _hold_against_the_listing(response, exchange, host)


def _hold_against_the_listing(response: Any, exchange: Exchange, host: str) -> None:
    """What the client takes as a file's digest and size, where the listing told them. Other names are a mirror's."""
    head = response.headers
    digest = (head.get("X-Linked-Etag") or head.get("ETag") or "").removeprefix("W/").strip('"')
    if exchange.digest and DIGEST.fullmatch(digest) and digest != exchange.digest:
        raise _contradiction(host, exchange, f"digest {digest}", exchange.digest)
    size = head.get("X-Linked-Size") or (None if response.has_redirect_location else head.get("Content-Length"))
    if size is not None and not SIZE.fullmatch(size):
        raise Transient(f"{host} tells the size {size[:80]!r}{exchange.for_what}", NOT_A_HUB)
    if size is not None and exchange.size not in (None, int(size)):
        raise _contradiction(host, exchange, f"size {size}", str(exchange.size))


def _contradiction(host: str, exchange: Exchange, told: str, known: str) -> Transient:
    cause = f"{host} tells the {told}{exchange.for_what}, but {known} was told before"
    return Transient(cause, "run again; a mirror, or a proxy in between, gives something else than was asked for")


def _check_place(response: Any, host: str, secure: bool) -> None:
    """Other hosts may be named, as CDNs are; they see no token, and what comes from them is verified."""
    if not response.has_redirect_location:
        return
    place = response.headers["Location"]
    try:
        address = urljoin(str(response.request.url), place)
    except ValueError:
        address = ""
    if not is_address(address) or not place.isprintable():
        raise Transient(f"{host} sends requests to {place[:80]!r}, which is no place on the web", ELSEWHERE)
    if secure and urlsplit(address).scheme != "https":
        raise Transient(f"{host} sends requests away from TLS, to {place[:80]!r}", ELSEWHERE)


def _check_piece(response: Any, host: str) -> None:
    if response.status_code != 206:
        return
    asked, told = response.request.headers.get("Range", ""), response.headers.get("Content-Range", "")
    wanted, given = ASKED_PIECE.fullmatch(asked), PIECES.fullmatch(told)
    if wanted is None or given is None or int(wanted[1]) != int(given[1]) or int(given[2]) > int(wanted[2] or given[2]):
        raise Transient(
            f"{host} sends {told[:80] or 'a part'!r} where {asked or 'the whole'!r} was asked for", NO_RANGE
        )


def _check_pause(response: Any, exchange: Exchange, host: str) -> None:
    for name in ("RateLimit", "Retry-After"):
        if not response.headers.get(name, "").isascii():
            del response.headers[name]  # the client would take digits of any script for a number
    if response.status_code in BUSY:
        exchange.wait(asked_pause(response.headers), host, response.status_code)


def asked_pause(headers: Any) -> float:
    """Return the seconds that a server wants to be left alone; 0 where it says none, a date, or what is no number."""
    found = EXHAUSTED.search(headers.get("RateLimit", ""))
    text = found[1] if found else headers.get("Retry-After", "").strip()
    return float(text) if text.isdigit() else 0.0


def _drop_odd_xet(response: Any, ours: Callable[[str], bool]) -> None:
    """Without this header the client takes the file by HTTP. The way leads to where a token is sent."""
    told = response.headers.get("X-Xet-Hash")
    if told is None:
        return
    way = response.links.get("xet-auth", {}).get("url") or response.headers.get("X-Xet-Refresh-Route", "")
    if not XET_HASH.fullmatch(told) or not ours(way):
        del response.headers["X-Xet-Hash"]


def _bound(response: Any, host: str, exchange: Exchange) -> None:
    """Let the body be unpacked and counted here, not in httpx, which unpacks what is packed several times over."""
    limit = exchange.limit if response.status_code < 300 else MAX_ERROR
    stream = response.stream
    response.stream = _body(stream)(_delivered(stream, exchange), stream.close)
    pieces = _pieces(response, host)

    def counted() -> Iterator[bytes]:
        size = 0
        for piece in pieces:
            size += len(piece)
            if size > limit:
                raise Transient(f"{host} answered with more than the {limit} bytes that were asked for", NO_RANGE)
            yield piece

    response.stream = _body(stream)(counted(), stream.close)


def _delivered(stream: Iterable[bytes], exchange: Exchange) -> Iterator[bytes]:
    for piece in stream:
        exchange.delivered += len(piece)
        yield piece


def _pieces(response: Any, host: str) -> Iterable[bytes]:
    """The unpacked body, which the headers then no longer call packed."""
    packing = response.headers.pop("Content-Encoding", "identity").strip().lower()
    if packing in ("identity", ""):
        return response.stream  # type: ignore[no-any-return]
    if packing not in PACKED:
        raise Transient(f"{host} packs its answer as {packing[:80]!r}, which was not asked for", ELSEWHERE)
    response.headers.pop("Content-Length", None)
    return _unpacked(response.stream, host)


def _unpacked(stream: Iterable[bytes], host: str) -> Iterator[bytes]:
    """gzip and zlib (RFC 1952, RFC 1950), in pieces that are small however much a few bytes stand for."""
    unpacking = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
    try:
        for packed in stream:
            while packed and not unpacking.eof:
                yield unpacking.decompress(packed, MAX_ERROR)
                packed = unpacking.unconsumed_tail
            if unpacking.eof:
                return
        yield unpacking.flush()
    except zlib.error as error:
        raise Transient(f"{host} sends what cannot be unpacked: {error}", "run again later") from error
    raise Transient(f"{host} sends a packed answer without its end", "run again later")


def _body(stream: Any) -> Any:
    """Return a class of streams, of the httpx that made this one."""
    return _body_class(next(base for base in type(stream).__mro__ if base.__name__ == "SyncByteStream"))


@cache
def _body_class(base: Any) -> Any:
    class Body(base):  # type: ignore[misc]
        def __init__(self, pieces: Iterable[bytes], close: Callable[[], None]) -> None:
            self._pieces = pieces
            self.close = close

        def __iter__(self) -> Iterator[bytes]:
            yield from self._pieces

    return Body


def _say_plainly(response: Any, host: str) -> None:
    """Leave of an answer with an error one line: the client would take any JSON for what it expects."""
    stream, content = response.stream, bytearray()
    for piece in _pieces(response, host):
        content += piece
        if len(content) > MAX_ERROR:
            break
    stream.close()
    body = json.dumps(_plain_error(bytes(content[:MAX_ERROR]), response.headers.get("Content-Type", ""))).encode()
    response.headers.pop("Transfer-Encoding", None)
    response.headers.update({"Content-Type": "application/json", "Content-Length": str(len(body))})
    response.stream = _body(stream)([body], lambda: None)


def _plain_error(content: bytes, kind: str) -> dict[str, Any]:
    """What the client reads of an error: one short line, and the address of a repository that is there already."""
    try:
        told = json.loads(content)
    except (ValueError, RecursionError):
        told = {"error": content.decode("utf-8", "replace")} if "html" not in kind.lower() else {}
    found = told if isinstance(told, dict) else {}
    texts = [found.get("error"), found.get("error_description")]
    if isinstance(inner := found.get("error"), dict):  # as APIs like OpenAI's have it
        texts.append(inner.get("message"))
    texts += [found.get("message"), found.get("detail")]
    texts += [one.get("message") for one in _listed(found.get("errors")) if isinstance(one, dict)]
    said = shown(" ".join(text for item in texts for text in (item, *_listed(item)) if isinstance(text, str)))
    url = found.get("url")
    return {"errors": [{"message": said}] if said else []} | ({"url": shown(url)} if isinstance(url, str) else {})


def _listed(found: Any) -> list[Any]:
    return found if isinstance(found, list) else []


def shown(text: str) -> str:
    """Return a text of a server as one short line."""
    line = " ".join(printable(text).split())
    return line if len(line) <= MAX_MESSAGE else f"{line[:MAX_MESSAGE]}…"
