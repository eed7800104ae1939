"""What the loopback Hub keeps: repositories as commits, branches and tags over blobs, with git's and LFS's digests."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .hub_answers import FileRange

LFS_SUFFIXES = (".bin", ".safetensors", ".h5", ".msgpack", ".onnx", ".pt", ".model")
HOLLOW = 1 << 29
"""Bytes. A larger file must be all holes."""


def git_blob_id(data: bytes) -> str:
    """The name git gives to a file: sha1 of `blob SIZE\\0` and the bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@dataclass(frozen=True, slots=True)
class Blob:
    """One version of one file: bytes in memory, or a path whose bytes are sent from disk."""

    content: bytes | Path
    size: int
    sha256: str
    git_id: str
    """Of the file, or of its LFS pointer."""
    lfs: bool

    def chunks(self, start: int, end: int) -> Iterable[bytes]:
        """The bytes `start` ≤ position < `end`."""
        if isinstance(self.content, bytes):
            return (self.content[start:end],)
        return FileRange(self.content, start, end)

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_id


def blob(name: str, content: bytes | Path, *, lfs: bool | None = None) -> Blob:
    if isinstance(content, Path):
        size = content.stat().st_size
        sha256 = _made_up(content) if size > HOLLOW else _sha256(content)
    else:
        sha256, size = hashlib.sha256(content).hexdigest(), len(content)
    if lfs is None:
        lfs = name.endswith(LFS_SUFFIXES)
    if not lfs:
        data = content.read_bytes() if isinstance(content, Path) else content
        return Blob(data, size, sha256, git_blob_id(data), False)
    return Blob(content, size, sha256, git_blob_id(lfs_pointer(sha256, size)), True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _made_up(path: Path) -> str:
    """For files of holes, which tests may read headers of but never download: hashing 400 GB of zeros takes minutes."""
    assert path.stat().st_blocks * 512 < 2**24, f"{path} is no file of holes"
    return hashlib.sha256(f"{path.name} {path.stat().st_size}".encode()).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def _bytes(item: Blob) -> bytes:
    return b"".join(item.chunks(0, item.size))


def _header(item: Blob) -> list[tuple[str, list[int]]]:
    """(dtype, shape) of every tensor in a safetensors file."""
    length = int.from_bytes(b"".join(item.chunks(0, 8)), "little")
    header = json.loads(b"".join(item.chunks(8, min(8 + length, item.size))))
    return [(entry["dtype"], entry["shape"]) for name, entry in header.items() if name != "__metadata__"]


@dataclass(slots=True)
class Repository:
    id: str
    private: bool = False
    gated: Literal[False, "auto", "manual"] = False
    members: set[str] = field(default_factory=set)
    """Users who may see it while it is private or gated."""
    authors: dict[str, str] = field(default_factory=dict)
    """Pull request → the user who opened it."""
    library: str | None = "transformers"
    card: dict[str, Any] = field(default_factory=dict)
    told_counts: Any = None
    """What it says of elements by dtype instead of counting them."""
    commits: dict[str, Mapping[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, Blob | None], branch: str = "main") -> str:
        """Put `files` (None: deleted) on top of the branch, or of nothing; the new commit's 40 hex digits."""
        parent = self.branches.get(branch, "")
        merged = {**self.commits.get(parent, {}), **files}
        tree = {name: item for name, item in merged.items() if item is not None}
        listing = json.dumps([parent, branch, sorted((name, item.git_id) for name, item in tree.items())])
        commit = hashlib.sha1(listing.encode(), usedforsecurity=False).hexdigest()
        self.commits[commit] = tree
        self.branches[branch] = commit
        return commit

    def resolve(self, revision: str) -> str | None:
        if revision in self.branches or revision in self.tags:
            return self.branches.get(revision) or self.tags.get(revision)
        if len(revision) >= 7:
            return next((commit for commit in self.commits if commit.startswith(revision)), None)
        return None

    def info(self, commit: str, *, blobs: bool) -> dict[str, Any]:
        """As `/api/models/{repo}/revision/{revision}` answers."""
        return {
            "_id": hashlib.sha256(self.id.encode()).hexdigest()[:24],
            "id": self.id,
            "modelId": self.id,
            "sha": commit,
            "private": self.private,
            "gated": self.gated,
            "disabled": False,
            "library_name": self.library,
            "cardData": self.card,
            "tags": [tag for tag in (self.library,) if tag],
            "lastModified": "2026-01-01T00:00:00.000Z",
            "siblings": [self._sibling(name, item, blobs) for name, item in sorted(self.commits[commit].items())],
            **self._config(commit),
            **self._counts(commit),
        }

    def _config(self, commit: str) -> dict[str, Any]:
        """The Hub repeats what tells a transformers model's class."""
        item = self.commits[commit].get("config.json")
        try:
            config = json.loads(_bytes(item)) if item else {}
            return {"config": {name: config[name] for name in ("architectures", "model_type") if name in config}}
        except (ValueError, TypeError, RecursionError):
            return {}

    def _counts(self, commit: str) -> dict[str, Any]:
        """Elements by dtype of `model.safetensors`, or of the files in its index, where their headers can be read."""
        if self.told_counts is not None:
            return {"safetensors": self.told_counts}
        files = self.commits[commit]
        try:
            names = {"model.safetensors"}
            if "model.safetensors" not in files:
                names = set(json.loads(_bytes(files["model.safetensors.index.json"]))["weight_map"].values())
            counts: dict[str, int] = {}
            for name in names:
                for dtype, shape in _header(files[name]):
                    counts[dtype] = counts.get(dtype, 0) + math.prod(shape)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            return {}
        return {"safetensors": {"parameters": counts, "total": sum(counts.values())}}

    @staticmethod
    def _sibling(name: str, item: Blob, blobs: bool) -> dict[str, Any]:
        sibling: dict[str, Any] = {"rfilename": name}
        if blobs:
            sibling |= {"size": item.size, "blobId": item.git_id}
            if item.lfs:
                pointer = len(lfs_pointer(item.sha256, item.size))
                sibling["lfs"] = {"sha256": item.sha256, "size": item.size, "pointerSize": pointer}
        return sibling

    def tree(self, commit: str, folder: str = "", *, recursive: bool = False) -> list[dict[str, Any]]:
        """As `/api/models/{repo}/tree/{revision}/{folder}` answers: folders first met, then their files."""
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for name, item in sorted(self.commits[commit].items()):
            if not name.startswith(prefix):
                continue
            parents = name[len(prefix) :].split("/")[:-1]
            for depth in range(1, len(parents) + 1 if recursive else min(2, len(parents) + 1)):
                path = prefix + "/".join(parents[:depth])
                entries[path] = {"type": "directory", "path": path, "oid": git_blob_id(path.encode()), "size": 0}
            if recursive or not parents:
                entries[name] = self.entry(name, item)
        return list(entries.values())

    @staticmethod
    def entry(name: str, item: Blob) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "oid": item.git_id, "size": item.size}
        if item.lfs:
            pointer = len(lfs_pointer(item.sha256, item.size))
            entry["lfs"] = {"oid": item.sha256, "size": item.size, "pointerSize": pointer}
        return entry


def files_of(folder: Path) -> dict[str, Path]:
    """Every file below `folder` under its relative name, as `LoopbackHub.create` takes them."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
