"""Versions of installed distributions: in keys, in records, and in what is remembered of a class."""

from __future__ import annotations

import re
from functools import cache


@cache
def package_version(name: str) -> str | None:
    """None where there is no such distribution."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        found = distribution(name)
    except PackageNotFoundError:
        return None
    # `found.version` parses all of the metadata, the whole README among it
    written = re.search(r"^Version: (\S+)$", found.read_text("METADATA") or "", re.MULTILINE)
    return written[1] if written else found.version


def __getattr__(name: str) -> str:
    """`__version__` is bigpipe's own; looked up when it is asked for."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return package_version("bigpipe-ml") or "0"
