"""Destinations as people write them: a path, a URL, a repository of the Hub."""

from __future__ import annotations

import os
from pathlib import Path

from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import UsageError
from bigpipe.files import only_a_shell_reads
from bigpipe.filesystems import is_local, open_address

from .destinations import Destination, Directory, FileSystem


def open_destination(
    to: str, sources: Sources = Sources(), *, revision: str = "main", private: bool = True
) -> Destination:
    """Return where `to` leads: a path (from `sources.base`), an fsspec URL, or `hf://owner/name` at `revision`.
    private: of a repository that is made. Raise UsageError for an address that no file system here knows."""
    if cure := only_a_shell_reads(to, home=False):
        raise UsageError(f"to: {to[:200]} would be a name with a dollar sign in it", cure, field="to")
    if to.startswith("hf://"):
        from bigpipe.bigmodel.hub import Hub

        from .upload import HubRepository

        return HubRepository(to.removeprefix("hf://").strip("/"), Hub.of(sources), revision, private)
    if "://" in to:
        return _open_url(to, sources)
    return _directory(os.path.join(sources.base or Path.cwd(), os.path.expanduser(to)))


def _directory(path: str) -> Directory:
    """Raise UsageError where nothing of that name can be, or be written beside."""
    found = Directory(Path(os.path.realpath(path)))
    if not found.path.name:
        raise UsageError(f"to: {path} has nothing beside it", "name a directory of its own", field="to")
    if os.path.ismount(found.path):
        cause = f"to: {path} is where another file system begins, and cannot be exchanged for a new version"
        raise UsageError(cause, "name a directory in it", field="to")
    try:
        os.lstat(found.beside())
    except FileNotFoundError:
        return found
    except OSError as error:
        raise UsageError(f"to: {path[:200]} cannot be: {error.strerror}", "give another name", field="to") from error
    return found


def _open_url(to: str, sources: Sources) -> Destination:
    """`file://` is a directory like any other, and must not look like anything else (`simplecache::file://`)."""
    system, root = open_address(to, field="to")
    if is_local(system):
        return _directory(root)
    if is_local(getattr(system, "fs", None)):
        cause = f"{to} is a directory of this machine behind another file system"
        raise UsageError(cause, "write its path", field="to")
    return FileSystem(to.rstrip("/"), system, root, sources.offline)
