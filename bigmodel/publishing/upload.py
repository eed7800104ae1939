"""A repository on the Hub as a destination: one upload, one commit, checked against the Hub's own listing."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from bigpipe.bigmodel.hub import COMMIT, LOGIN, Hub, check_access, describe, hub_errors, read_range, whoami
from bigpipe.errors import NotAuthorised, Offline, StageFailed, UsageError
from bigpipe.files import link, make_directory

from .destinations import Inspect, Report, Seen, Transfer
from .receipt import Receipt, Stored

GIT_ATTRIBUTES = ".gitattributes"
"""The Hub writes it itself."""


@dataclass(frozen=True, slots=True)
class HubRepository:
    repo: str
    """owner/name"""
    hub: Hub
    revision: str = "main"
    private: bool = True
    """Of a repository that is made; one that exists stays as it is."""
    message: str = "Save with bigpipe"
    keeps_versions: ClassVar[bool] = True

    @property
    def url(self) -> str:
        return f"{self.hub.endpoint}/{self.repo}"

    @property
    def name(self) -> str:
        return self.repo

    def check(self) -> None:
        if self.repo.count("/") != 1 or not all(self.repo.split("/")):
            raise UsageError(f"hf://{self.repo} does not name a repository", "write it as hf://owner/name")
        if COMMIT.fullmatch(self.revision):
            raise UsageError(f"revision {self.revision} is a commit, and nothing can be added to it", "name a branch")
        if self.hub.offline:
            raise Offline(f"hf://{self.repo} cannot be written while asking the Hub is switched off",
                          "run without --offline and HF_HUB_OFFLINE, or save to a directory")  # fmt: skip
        owner, spaces = self.repo.split("/")[0], whoami(self.hub)
        if owner not in spaces:
            raise NotAuthorised(
                f"the token's user {spaces[0]} may not write to {owner}", f"use {spaces[0]}/…, or {LOGIN}"
            )
        if self.listing() is not None:
            check_access(self.repo, hub=self.hub, write=True)

    def listing(self) -> Mapping[str, Seen] | None:
        try:
            described = describe(self.repo, self.revision, hub=self.hub)
        except UsageError:
            return None
        found = {file.path: Seen(file.size, file.etag) for file in described.files if file.path != GIT_ATTRIBUTES}
        return found or None

    def read(self, name: str) -> bytes:
        return read_range(self.repo, self.revision, name, 0, 10_000_000, hub=self.hub)

    def digest(self, name: str) -> str:
        """Not by reading: a changed file has another mark, and the mark of an LFS file is its sha256."""
        seen = self.listing() or {}
        return seen[name].mark if name in seen else ""

    @contextmanager
    def transfer(self, scratch: Path, *, report: Report) -> Iterator[Transfer]:
        staging = scratch / "upload"
        staging.mkdir(parents=True, exist_ok=True)
        yield _Upload(self, staging, report)


@dataclass(slots=True)
class _Upload:
    target: HubRepository
    staging: Path
    report: Report
    stored: dict[str, Stored] = field(default_factory=dict)

    def put(self, name: str, source: Path) -> tuple[str, int]:
        """Linked, not copied: the client reads through the link and sends the bytes."""
        make_directory((self.staging / name).parent, durable=False)
        link(source.resolve(), self.staging / name)
        size = source.stat().st_size
        sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with source.open("rb") as file:
            while chunk := file.read(1 << 22):
                sha256.update(chunk)
                git.update(chunk)
        self.stored[name] = Stored(sha256.hexdigest(), size, git.hexdigest())
        self.report(size)
        return sha256.hexdigest(), size

    def finish(self, inspect: Inspect) -> Receipt:
        for path in sorted(self.staging.rglob("*"), reverse=True):
            if path.is_symlink() and path.relative_to(self.staging).as_posix() not in self.stored:
                path.unlink()
        commit = self._upload()
        there = {file.path: file for file in describe(self.target.repo, commit, hub=self.target.hub).files}
        files = {}
        for name, stored in self.stored.items():
            file = there.get(name)
            if file is None or file.size != stored.size or file.etag not in (stored.sha256, stored.mark):
                raise StageFailed(
                    f"{self.target.url} does not hold {name} as it was sent, at commit {commit}",
                    "somebody may have written there at the same time; run again",
                )
            files[name] = Stored(stored.sha256, stored.size, file.etag)
        return Receipt(self.target.url, files, commit)

    def _upload(self) -> str:
        from huggingface_hub import HfApi

        target, hub = self.target, self.target.hub
        api: Any = HfApi(endpoint=hub.endpoint, token=hub.token, library_name="bigpipe")
        with hub_errors(hub.endpoint, target.repo, target.revision):
            api.create_repo(target.repo, private=target.private, exist_ok=True)
            if target.revision != "main":
                api.create_branch(target.repo, branch=target.revision, exist_ok=True)
        stale = [name for name in target.listing() or {} if name not in self.stored]
        with hub_errors(hub.endpoint, target.repo, target.revision):
            sent = api.upload_folder(
                repo_id=target.repo,
                folder_path=os.fspath(self.staging),
                revision=target.revision,
                commit_message=target.message,
                delete_patterns=[glob.escape(name) for name in stale] or None,
            )
        return str(sent.oid)
