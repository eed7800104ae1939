"""Brings a model's files into a directory: links to the Hub cache, or copies from another directory.

Where somebody waits for them (see `bigpipe.passing`), weight files are announced by their heads and pass on one by one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from bigpipe.bigmodel.checkpoint import (
    ADAPTER_CONFIG,
    AdapterDescription,
    ModelDescription,
    adapter_weights,
    check_fetched,
    check_file,
    describe_adapter,
    describe_checkpoint,
    describe_if_single,
    is_index,
    no_weights,
    parse_object,
)
from bigpipe.errors import (
    BigpipeError,
    InvalidCheckpoint,
    NotAuthorised,
    NoWeights,
    Offline,
    Transient,
    UsageError,
    first_few,
)
from bigpipe.files import copy_file, free_space, link, make_folders
from bigpipe.fit import Misfit
from bigpipe.names import is_text
from bigpipe.passing import NOBODY, Heads, Outlet
from bigpipe.sizes import counted, format_transfer

from .access import check_access
from .errors import CURE_OFFLINE
from .heads import are_the_model, directory_heads, may_pass, repository_heads
from .remote import describe_remote_adapter, describe_repository
from .repository import Hub, HubFile, Repository, describe
from .selection import Choice, adapter_files, check_index, detect, weight_files
from .snapshot import Fetched, Report, fetch, missing_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a source will give, known before anything is brought. Sizes in bytes."""

    sizes: Mapping[str, int]
    """Of all files, by relative path."""
    description: ModelDescription | AdapterDescription | NoWeights | None
    """NoWeights: what is wrong where a model is needed, as only parts of one lie in folders of their own. None for what
    has no single checkpoint to describe, or cannot be known yet."""
    commit: str | None = None
    missing: int = 0
    """To be downloaded."""
    cache: Path | None = None
    """The Hub cache, where files stay; None: they are copied."""
    misfits: tuple[Misfit, ...] = ()
    lacking: str = ""
    """What may not come although it is asked for, and why; "" where all comes."""

    @property
    def largest_passing(self) -> int:
        """Of the weight files, where these pass on one by one."""
        return max((self.sizes[name] for name in may_pass(self.sizes)), default=0)


@dataclass(frozen=True, slots=True)
class Brought:
    files: dict[str, tuple[str, int]]
    """Relative path → (hex sha256, size)."""
    commit: str | None = None
    fetched_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Who is told while files come."""

    report: Report = lambda done, total, task: None
    outlet: Outlet = NOBODY
    """Told of weight files."""
    log: Callable[[str], None] = lambda line: None


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository on the Hub at a revision."""

    repo: str
    revision: str
    choice: Choice
    hub: Hub
    subfolder: str | None = None
    """Which is taken as if it were the root."""

    def check(self) -> None:
        """Raise as `check_access` where the login may not read it, which is not asked offline; and as `bring` before
        anything is fetched."""
        if not self.hub.offline:
            check_access(self.repo, hub=self.hub)
        self._require_weights()

    def _require_weights(self) -> None:
        """Who names the files says what is wanted."""
        repository, files = self._described()
        names = [file.path for file in files]
        if self.choice.include or adapter_files(names):
            return
        if not any(self.choice.weights(names, repository.library).values()):
            if self.hub.offline:
                raise Offline(f"there are no weights of {self.repo} in the Hub cache {self.hub.cache}", CURE_OFFLINE)
            raise no_weights(repository.repo, [file.path for file in repository.files])

    def _described(self) -> tuple[Repository, list[HubFile]]:
        repository, files = self._asked_for()
        return repository, self._those_here(repository, files) if self.hub.offline else files

    def _asked_for(self) -> tuple[Repository, list[HubFile]]:
        repository = describe(self.repo, self.revision, hub=self.hub)
        if self.subfolder:
            repository = repository.below(self.subfolder)
        chosen = set(self.choice.among([file.path for file in repository.files], repository.library))
        return repository, [file for file in repository.files if file.path in chosen]

    def _those_here(self, repository: Repository, files: list[HubFile]) -> list[HubFile]:
        """Offline a model that is in the cache is enough: who filled it may have left the licence out, and a commit's
        listing knows of it. Where its weights are not there, all that is missing is told."""
        names = [file.path for file in files]
        here = [file for file in files if file.may_be(repository.cached(file))]
        adapter = adapter_weights(names)
        weights = [ADAPTER_CONFIG, adapter] if adapter else weight_files(self.choice.weights(names, repository.library))
        needed = {*weights, "config.json"}.intersection(names)
        return here if weights and needed <= {file.path for file in here} else files

    def chosen(self) -> list[HubFile]:
        """Return the files to take. Raise as `describe` and `Choice.among`."""
        return self._described()[1]

    def only(self) -> list[str]:
        """Return the names of the files to take where these may not be all that are asked for, as offline; else none.
        Raise as `chosen`."""
        repository, files = self._described()
        return [file.path for file in files] if self._lacking(repository, files) else []

    def _lacking(self, repository: Repository, files: list[HubFile]) -> str:
        here = {file.path for file in files}
        left = [file.path for file in self._asked_for()[1] if file.path not in here] if self.hub.offline else []
        if repository.whole and not left:
            return ""
        what = first_few(left) if repository.whole else "whatever the Hub cache does not have"
        return f"{what} of {self.repo}: asking the Hub is switched off"

    def expect(self) -> Expected:
        """Return what comes, by the repository's listing, config, index and headers; no weights move."""
        repository, files = self._described()
        missing = missing_bytes(repository, files)
        return Expected(
            sizes={file.path: file.size for file in files},
            description=self._description(repository, [file.path for file in files]),
            commit=repository.commit,
            missing=missing,
            cache=self.hub.cache,
            misfits=_misfits(missing, self.hub),
            lacking=self._lacking(repository, files),
        )

    def _description(
        self, repository: Repository, names: list[str]
    ) -> ModelDescription | AdapterDescription | NoWeights | None:
        if self._holds_only_parts(repository, names):
            return no_weights(repository.repo, [file.path for file in repository.files])
        try:
            if adapter_weights(names):
                return describe_remote_adapter(repository, names)
            commit = repository.commit
            found = describe_repository(self.repo, commit, hub=self.hub, choice=self.choice, subfolder=self.subfolder)
            return replace(found.description, names=frozenset(names))
        except (Transient, NotAuthorised, UsageError):
            return None

    def _holds_only_parts(self, repository: Repository, names: list[str]) -> bool:
        """Is there neither a config nor weights where a model has them?"""
        parts = (
            detect(names, hint=repository.library) == "diffusers" or "config.json" in names or adapter_weights(names)
        )
        return not parts and Choice().weights([name for name in names if "/" not in name]).get("") is None

    def bring(self, out: Path, watch: Watch, skip: Collection[str] = ()) -> Brought:
        """Fetch files into the Hub cache and link them in `out`, but those that `skip` names.
        Raise as `chosen` and `fetch`, DoesNotFit, NoWeights, and InvalidCheckpoint where an index names a file that is
        not among them."""
        self._require_weights()
        repository, files = self._described()
        chosen = {file.path: file for file in files if file.path not in skip}
        watch.log(f"{repository.repo} at {repository.commit}: {counted(len(chosen), 'file')}")
        if lacking := self._lacking(repository, files):
            watch.log(f"left out: {lacking}")
        for misfit in _misfits(missing_bytes(repository, chosen.values()), self.hub):
            raise misfit.error()
        bringing = _Bringing(out, watch, chosen, _indexes(chosen, self.choice, repository.library))

        def arrived(name: str, file: Fetched) -> None:
            make_folders((out / name).parent)
            link(file.path, out / name)
            bringing.arrived(name, file.sha256, file.size)

        weights = [chosen[name] for name in bringing.passing]
        snapshot = fetch(repository, [chosen[name] for name in bringing.side], report=watch.report)
        for name, file in snapshot.files.items():
            arrived(name, file)
        fetched = snapshot.fetched_bytes
        if weights:
            bringing.announce(lambda: repository_heads(repository, weights))
            fetched += fetch(repository, weights, report=watch.report, arrived=arrived).fetched_bytes
        return bringing.done(repository.commit, fetched)


@dataclass(frozen=True, slots=True)
class DirectorySource:
    """A directory, whose files may change where they are."""

    directory: Path
    choice: Choice
    subfolder: str | None = None
    """Which is taken as if it were the root."""

    @property
    def folder(self) -> Path:
        return self.directory / (self.subfolder or "")

    def chosen(self) -> list[HubFile]:
        """Return the files to take, sorted, without digests. Links to folders are not followed.
        Raise UsageError where there is no such directory, InvalidCheckpoint where a file is a link that leads
        elsewhere, or has a name that is no UTF-8."""
        if not self.directory.is_dir():
            cause = f"path: there is no directory {self.directory}"
            raise UsageError(cause, "relative paths start at the manifest's directory")
        self.require_subfolder()
        paths = [path.relative_to(self.folder) for path in sorted(self.folder.rglob("*")) if path.is_file()]
        names = self.choice.among([path.as_posix() for path in paths])
        if bad := next((name for name in names if not is_text(name)), None):
            raise InvalidCheckpoint(f"{self.folder} has a file named {bad!a}, which is no UTF-8", "rename it")
        for name in names:
            check_file(self.folder / name, self.folder)
            check_fetched(self.folder / name)
        return [HubFile(name, (self.folder / name).stat().st_size, "") for name in names]

    def require_subfolder(self) -> None:
        """Raise UsageError where the folder is not there, or a link."""
        place = self.directory
        for part in Path(self.subfolder or "").parts:
            place /= part
            leads_on = os.path.islink(place)
            if part in ("..", "/") or not os.path.isdir(place) or leads_on:  # `Path` raises where a name is too long
                what = "a link" if leads_on else "no folder"
                folders = sorted(path.name for path in place.parent.iterdir() if path.is_dir())
                there = f"{place.parent} has {first_few(folders) or 'none'}"
                cure = "give what it leads to as path" if leads_on else there
                raise UsageError(f"subfolder: {place} is {what}", cure, field="subfolder")

    def check(self) -> None:
        """Raise InvalidCheckpoint unless it holds a pipeline, or weights whose headers are right."""
        names = [file.path for file in self.chosen()]
        if adapter_weights(names):
            describe_adapter(self.folder)
        elif detect(names) != "diffusers":
            describe_checkpoint(self.folder, among=names)

    def expect(self) -> Expected:
        """Return what comes. Raise as `chosen`, and InvalidCheckpoint for wrong headers."""
        sizes = {file.path: file.size for file in self.chosen()}
        if adapter_weights(sizes):
            return Expected(sizes=sizes, description=describe_adapter(self.folder))
        return Expected(sizes=sizes, description=describe_if_single(self.folder, among=sizes))

    def bring(self, out: Path, watch: Watch, skip: Collection[str] = ()) -> Brought:
        """Copy files into `out`. Otherwise as `HubSource.bring`."""
        sizes = {file.path: file.size for file in self.chosen() if file.path not in skip}
        bringing, done = _Bringing(out, watch, sizes, _indexes(sizes, self.choice)), 0

        def report(size: int) -> None:
            nonlocal done
            done += size
            watch.report(done, sum(sizes.values()), "copy")

        for name in bringing.side:
            bringing.arrived(name, *copy_file(self.folder / name, out / name, progress=report))
        bringing.announce(lambda: directory_heads(self.folder, bringing.passing))
        for name in bringing.passing:
            watch.outlet.begin(name)
            bringing.arrived(name, *copy_file(self.folder / name, out / name, progress=report))
        return bringing.done()


class _Bringing:
    """Files on their way into a directory: the others before the weights that pass on one by one."""

    def __init__(self, out: Path, watch: Watch, names: Collection[str], indexes: Collection[str]) -> None:
        self.out = out
        self.watch = watch
        self.names = names
        self.indexes = indexes
        self.passing = may_pass(names) if watch.outlet.waited_for else []
        self.side = [name for name in names if name not in self.passing]
        self._files: dict[str, tuple[str, int]] = {}

    def announce(self, heads: Callable[[], Heads]) -> None:
        """Where what comes cannot be known beforehand nobody is told anything: all wait until all is here."""
        if not are_the_model(self.passing, self.out):
            return
        try:
            self.watch.outlet.announce(heads())
        except BigpipeError as error:
            self.watch.log(f"what follows starts when all files are here: {error.cause}")

    def arrived(self, name: str, sha256: str, size: int) -> None:
        self._files[name] = sha256, size
        if name in self.passing:
            self.watch.outlet.finished(name, sha256, size)

    def done(self, commit: str | None = None, fetched_bytes: int = 0) -> Brought:
        for name in self.indexes:
            check_index(self.names, name, parse_object((self.out / name).read_bytes(), name))
        return Brought({name: self._files[name] for name in self.names}, commit, fetched_bytes)


def _indexes(names: Collection[str], choice: Choice, hint: str | None = None) -> list[str]:
    """Of files to take, the indexes by which weights are read: another format's may lie beside them without its
    shards."""
    if not any(map(is_index, names)):
        return []
    return [name for name in weight_files(Choice(library=choice.library).weights(names, hint)) if is_index(name)]


Source = HubSource | DirectorySource


def _misfits(missing: int, hub: Hub) -> tuple[Misfit, ...]:
    """Return what does not fit where so many bytes are to come into the Hub cache, which may have its own disk."""
    free = free_space(hub.cache)
    if missing <= free:
        return ()
    cause = f"{format_transfer(missing)} to download, {format_transfer(free)} free for the Hub cache {hub.cache}"
    return (Misfit(cause, f"free {format_transfer(missing - free)} there, or set HF_HOME to a larger disk"),)
