"""File systems behind addresses such as `s3://bucket/folder`, opened by fsspec, and what their libraries raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import BigpipeError, UsageError


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


@contextmanager
def foreign_errors(address: str, kind: type[BigpipeError]) -> Iterator[None]:
    """Raise as `kind` whatever a file system's library raises: each has classes of its own, and none is a bug of ours.
    A BigpipeError stays as it is."""
    try:
        yield
    except BigpipeError:
        raise
    except Exception as error:
        cause = f"{address}: {type(error).__name__}: {error}"
        raise kind(cause, "check the address and the credentials that its fsspec package reads") from error
