"""From an address as people write it to a destination."""

from __future__ import annotations

from pathlib import Path

from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import UsageError

from .destinations import Destination, Directory, FileSystem


def open_destination(
    to: str, sources: Sources = Sources(), *, revision: str = "main", private: bool = True
) -> Destination:
    """Return where `to` leads: a path (from `sources.base`), an fsspec URL, or `hf://owner/name` at `revision`.

    private: of a repository that is made. Raise UsageError for an address that no file system here knows.
    """
    if to.startswith("hf://"):
        from bigpipe.bigmodel.hub import Hub

        from .upload import HubRepository

        hub = Hub.of(sources)
        return HubRepository(to.removeprefix("hf://").strip("/"), hub, revision, private)
    if "://" in to:
        return _open_url(to)
    return Directory(((sources.base or Path.cwd()) / Path(to).expanduser()).resolve())


def _open_url(to: str) -> Destination:
    """`file://` is a directory like any other."""
    from fsspec.core import url_to_fs

    try:
        system, root = url_to_fs(to)
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"{to} cannot be opened: {error}", "install the fsspec package for it, or use another"
        ) from error
    if "file" in ((system.protocol,) if isinstance(system.protocol, str) else system.protocol):
        return Directory(Path(root))
    return FileSystem(to.rstrip("/"), system, root)
