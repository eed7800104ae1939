"""A repository on the Hub as a destination: one upload, one commit, checked against the Hub's own listing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from bigpipe.bigmodel.checkpoint import is_part
from bigpipe.bigmodel.hub import (
    COMMIT,
    LOGIN,
    NOT_A_HUB,
    Hub,
    Login,
    Repository,
    address_of,
    check_access,
    describe,
    exchanging,
    faults_of_card,
    guard_answers,
    hub_errors,
    read_range,
    uploading,
    whoami,
)
from bigpipe.environment import ONLINE
from bigpipe.errors import NotAuthorised, Offline, StageFailed, Transient, UsageError, first_few
from bigpipe.files import CHUNK, link, make_directory, make_folders

from .destinations import Destination, Receipt, Report, Stored

MOST_REGULAR = 64 * 2**20
"""Bytes. The Hub takes 10 MB outside LFS."""
TOKENS = f"make one that may write, under Settings → Access Tokens on the Hub, and {LOGIN}"
REQUESTS = "refs/pr/"
"""How the revisions of pull requests begin. They are no branches, and take commits."""


@dataclass(frozen=True, slots=True)
class HubRepository(Destination):
    repo: str
    """owner/name"""
    hub: Hub
    revision: str = "main"
    private: bool = True
    """Of a repository that is made; one that exists stays as it is."""
    head: str | None = None
    """The commit that is replaced, and no later one; None: whatever there is."""
    keeps_versions: ClassVar[bool] = True

    @property
    def url(self) -> str:
        return f"{self.hub.endpoint}/{self.repo}"

    @property
    def name(self) -> str:
        return self.repo

    def names(self) -> list[str]:
        return [address_of(self.repo, self.revision, hub=self.hub)]

    def pinned(self) -> Self:
        described = self._described()
        return replace(self, head=described.commit) if described else self

    def check(self) -> None:
        if self.repo.count("/") != 1 or not all(self.repo.split("/")):
            raise UsageError(f"hf://{self.repo} does not name a repository", "write it as hf://owner/name")
        if COMMIT.fullmatch(self.revision):
            raise UsageError(f"revision {self.revision} is a commit, and nothing can be added to it", "name a branch")
        if self.hub.offline:
            cause = f"hf://{self.repo} cannot be written while asking the Hub is switched off"
            raise Offline(cause, f"run {ONLINE}, or save to a directory")
        login = whoami(self.hub)
        if login.reads_only:
            raise NotAuthorised(f"the token of {login.user} may only read, not write to {self.repo}", TOKENS)
        if not self._is_request:  # who opened one may write to it, whoever's the repository is
            self._require_rights(login)
        if self.revision != "main":
            self._require_branch()

    def check_card(self, text: str) -> None:
        if faults := faults_of_card(text, hub=self.hub):
            cause = f"{self.hub.endpoint} does not take the model card: {'; '.join(faults)}"
            cure = "say it otherwise in `card`; a licence of your own is {license: other, license_name: its-name}"
            raise UsageError(cause, cure, field="card")

    @property
    def _is_request(self) -> bool:
        return self.revision.startswith(REQUESTS)

    def _require_rights(self, login: Login) -> None:
        """Raise NotAuthorised where the user, or the token, may not write there."""
        owner = self.repo.split("/")[0]
        if owner not in login.names:
            cause = f"the token's user {login.user} may not write to {owner}"
            raise NotAuthorised(cause, f"use {login.user}/…, or {LOGIN}")
        if not login.may_write(self.repo):
            raise NotAuthorised(f"the token of {login.user} is not for writing to {self.repo}", TOKENS)
        try:
            check_access(self.repo, hub=self.hub, write=True)
        except UsageError:  # no such repository yet
            if self.listing() is not None:
                raise

    def _require_branch(self) -> None:
        """Raise UsageError for a tag, and for a pull request that is not there: a branch alone is made."""
        from huggingface_hub import HfApi

        guard_answers(self.hub.endpoint)
        try:
            with hub_errors(self.hub.endpoint, self.repo, self.revision), exchanging(uploading(self.repo)):
                found = HfApi(endpoint=self.hub.endpoint, token=self.hub.token).list_repo_refs(
                    self.repo, include_pull_requests=True
                )
        except UsageError:  # no such repository yet
            found = None
        branches, tags = ({ref.name for ref in refs} for refs in ((found.branches, found.tags) if found else ((), ())))
        requests = {ref.ref for ref in (found and found.pull_requests) or ()}
        if self.revision in tags - branches:
            cause = f"revision {self.revision} is a tag of {self.repo}, and nothing can be added to it"
            raise UsageError(cause, f"name a branch, such as {first_few(sorted(branches), 3)}", field="revision")
        if self._is_request and self.revision not in requests:
            cause = f"{self.repo} has no pull request {self.revision}"
            raise UsageError(cause, "open it on the Hub first, or name a branch", field="revision")

    def _described(self) -> Repository | None:
        """What the branch means, or `head`; None where there is no such branch, or repository, yet."""
        with suppress(UsageError):
            return describe(self.repo, self.head or self.revision, hub=self.hub)
        return None

    def listing(self) -> Mapping[str, Stored] | None:
        described = self._described()
        files = [file for file in described.files if is_part(file.path)] if described else []
        return {file.path: Stored("", file.size, file.etag) for file in files} or None

    def read(self, name: str) -> bytes:
        return read_range(self.repo, self.head or self.revision, name, 0, 10_000_000, hub=self.hub)

    def digest(self, name: str) -> str:
        """Not by reading: a changed file has another mark, and the mark of an LFS file is its sha256."""
        seen = self.listing() or {}
        return seen[name].mark if name in seen else ""

    def replacing(self, scratch: Path) -> AbstractContextManager[Path]:
        staging = scratch / "upload"
        make_directory(staging, durable=False)
        return nullcontext(staging)

    def put(self, new: Path, name: str, source: Path, report: Report) -> Stored:
        """Linked, not copied: the client reads through the link and sends the bytes."""
        make_folders((new / name).parent, durable=False)
        link(source.resolve(), new / name)
        size = source.stat().st_size
        sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with source.open("rb") as file:
            while chunk := file.read(CHUNK):
                sha256.update(chunk)
                git.update(chunk)
        report(size)
        return Stored(sha256.hexdigest(), size, git.hexdigest())

    def finish(self, new: Path, stored: Mapping[str, Stored]) -> Receipt:
        for path in new.rglob("*"):
            if path.is_symlink() and path.relative_to(new).as_posix() not in stored:
                path.unlink()
        commit = self._upload(new, stored)
        there = {file.path: file for file in describe(self.repo, commit, hub=self.hub).files}
        files = {}
        for name, sent in stored.items():
            file = there.get(name)
            if file is None or file.size != sent.size or file.etag not in (sent.sha256, sent.mark):
                cause = f"{self.url} does not hold {name} as it was sent, at commit {commit}"
                raise StageFailed(cause, "somebody may have written there at the same time; run again")
            files[name] = replace(sent, mark=file.etag)
        return Receipt(self.url, files, commit)

    def _upload(self, staging: Path, stored: Mapping[str, Stored]) -> str:
        """One commit. (The client's `upload_folder` makes several of a large folder, one after the other.)"""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        guard_answers(self.hub.endpoint)
        api: Any = HfApi(endpoint=self.hub.endpoint, token=self.hub.token, library_name="bigpipe")
        with hub_errors(self.hub.endpoint, self.repo, self.revision), exchanging(uploading(self.repo)):
            if not self._is_request:
                api.create_repo(self.repo, private=self.private, exist_ok=True)
            added = [CommitOperationAdd(name, staging / name) for name in sorted(stored)]
            # A branch that is not there yet begins as main is now, and not before all files are sent
            revision = self.revision if self._described() else "main"
            api.preupload_lfs_files(self.repo, added, revision=revision, free_memory=False)
            self._check_modes(added, stored)
            if revision != self.revision:
                api.create_branch(self.repo, branch=self.revision, exist_ok=True)
            stale = [
                CommitOperationDelete(name, is_folder=False) for name in self.listing() or {} if name not in stored
            ]
            sent = api.create_commit(
                self.repo, [*stale, *added], revision=self.revision, commit_message="Save with bigpipe",
                parent_commit=self.head,
            )  # fmt: skip
        if not isinstance(sent.oid, str) or not COMMIT.fullmatch(sent.oid):
            raise Transient(f"{self.url} took the files, and names no commit: {str(sent.oid)[:80]!r}", NOT_A_HUB)
        return str(sent.oid)

    def _check_modes(self, added: Iterable[Any], stored: Mapping[str, Stored]) -> None:
        """What a Hub wants within the commit itself is encoded in memory."""
        for addition in added:
            name, mode = addition.path_in_repo, getattr(addition, "_upload_mode", None)
            if mode == "regular" and stored[name].size > MOST_REGULAR:
                raise Transient(f"{self.url} takes {name} of {stored[name].size} bytes not by LFS", NOT_A_HUB)
