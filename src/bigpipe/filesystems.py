"""File systems behind addresses such as `s3://bucket/folder`, opened by fsspec, and what their libraries raise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from .errors import BigpipeError, NotAuthorised, Transient, UsageError, chain_of

AWAY = frozenset({
    "ConnectionError", "TimeoutError", "gaierror", "HTTPClientError", "ClientConnectionError", "ServiceRequestError",
    "ServiceResponseError", "TransportError",
})  # fmt: skip
"""Classes, by name, of what cannot be reached: Python's, botocore's, aiohttp's, azure's, google.auth's."""
REFUSED = frozenset({
    "PermissionError", "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError",
    "ClientAuthenticationError", "DefaultCredentialsError", "RefreshError",
})  # fmt: skip
BUSY = frozenset({408, 429, 500, 502, 503, 504})


def open_address(address: str, *, field: str = "", **options: Any) -> tuple[Any, str]:
    """Return the fsspec file system of an address, and the path on it. field: the argument that names it. options: of
    fsspec. Raise UsageError where fsspec knows no such file system, or its package is not installed."""
    from fsspec.core import url_to_fs

    try:
        system, root = url_to_fs(address, **options)
    except Exception as error:  # foreign code, which may look for files
        cause = f"{address} cannot be opened: {type(error).__name__}: {error}"
        raise UsageError(cause, "install the fsspec package for it, or use another", field=field) from error
    return system, root


def require_scheme(address: str) -> None:
    """Raise UsageError for an address of a kind that fsspec does not know. No package is imported, nothing is asked."""
    from fsspec.registry import known_implementations, registry

    known = {*known_implementations, *registry}
    for part in address.split("::"):
        scheme = part.partition("://")[0]
        if scheme not in known:
            cause = f"{address[:200]}: {scheme} is no kind of address that fsspec knows"
            raise UsageError(cause, "write it as s3://bucket/folder, or give a path")


def is_local(system: Any) -> bool:
    """Return whether a file system is this machine's own."""
    return "file" in protocols(system)


def is_web(system: Any) -> bool:
    """Return whether a file system is a plain web server."""
    return not protocols(system).isdisjoint(("http", "https"))


def protocols(system: Any) -> frozenset[str]:
    """Return the names that addresses on a file system begin with."""
    protocol = getattr(system, "protocol", ())
    return frozenset((protocol,) if isinstance(protocol, str) else protocol)


def is_address(text: str, *, login: bool = False) -> bool:
    """Return whether this is a place on the web. login: it may hold a name and a password."""
    try:
        url = urlsplit(text)
        (url.hostname or "").encode("idna")  # what DNS cannot hold, the socket refuses with an error of its own
        named = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        return named and (login or url.username is None)
    except ValueError:
        return False


@contextmanager
def foreign_errors(address: str, kind: type[BigpipeError]) -> Iterator[None]:
    """Raise what a file system's library raises, each with classes of its own: as Transient where the service is away
    or busy now, as NotAuthorised where it lets nobody in, else as `kind`. A BigpipeError stays as it is."""
    try:
        yield
    except BigpipeError:
        raise
    except Exception as error:
        raise _told(f"{address}: {type(error).__name__}: {error}", list(chain_of(error)), kind) from error


def _told(cause: str, chain: Sequence[BaseException], kind: type[BigpipeError]) -> BigpipeError:
    names = {base.__name__ for error in chain for base in type(error).__mro__}
    statuses = set(map(_status, chain))
    if names & REFUSED or statuses & {401, 403}:
        return NotAuthorised(cause, "check the credentials that its fsspec package reads")
    if names & AWAY or statuses & BUSY:
        return Transient(cause, "run again later; check the network, and where the service is")
    return kind(cause, "check the address")


def _status(error: BaseException) -> int:
    """The HTTP status that an error is about, where its package tells it: botocore, gcsfs, azure; 0 where none does."""
    response = getattr(error, "response", None)
    answered = response.get("ResponseMetadata") if isinstance(response, Mapping) else None
    told = answered.get("HTTPStatusCode") if isinstance(answered, Mapping) else None
    for status in (told, getattr(error, "status_code", None), getattr(error, "code", None)):
        if str(status).isdecimal():
            return int(str(status))
    return 0
