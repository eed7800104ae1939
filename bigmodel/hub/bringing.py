"""Brings a model's files into a directory: links to the Hub cache, or copies from another directory.

Where somebody waits for them (see `bigpipe.passing`), weight files are announced by their heads and pass on one by one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.checkpoint import ModelDescription, describe_if_single
from bigpipe.errors import BigpipeError, NotAuthorised, Transient, UsageError
from bigpipe.files import copy_file, free_space, link, make_directory
from bigpipe.fit import Misfit
from bigpipe.passing import NOBODY, Heads, Outlet
from bigpipe.sizes import format_transfer

from .heads import are_the_model, directory_heads, may_pass, repository_heads
from .remote import describe_repository
from .repository import Hub, HubFile, Repository
from .selection import Library, check_index, detect, select
from .snapshot import Fetched, Report, fetch, missing_bytes

Files = dict[str, tuple[str, int]]
"""Relative path → (hex sha256, size)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which files to take; see `select`."""

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    library: Library | None = None

    def of_repository(self, repository: Repository) -> list[HubFile]:
        names = [file.path for file in repository.files]
        chosen = set(self._among(names, self.library or detect(names, hint=repository.library)))
        return [file for file in repository.files if file.path in chosen]

    def of_directory(self, folder: Path) -> list[str]:
        """Return relative paths, sorted. Raise UsageError where there is no such directory."""
        if not folder.is_dir():
            raise UsageError(
                f"path: there is no directory {folder}", "relative paths start at the manifest's directory"
            )
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        return self._among(names, self.library)

    def _among(self, names: Iterable[str], library: Library | None) -> list[str]:
        return select(names, include=self.include, exclude=self.exclude, library=library)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a source will give, known before anything is brought. Sizes in bytes."""

    sizes: Mapping[str, int]
    """Of all files, by relative path."""
    description: ModelDescription | None
    """None for what has no single checkpoint to describe, or cannot be known yet."""
    commit: str | None = None
    missing: int = 0
    """To be downloaded."""
    cache: Path | None = None
    """The Hub cache, where files stay; None: they are copied."""
    misfits: tuple[Misfit, ...] = ()

    @property
    def largest_passing(self) -> int:
        """Of the weight files, where these pass on one by one."""
        return max((self.sizes[name] for name in may_pass(self.sizes)), default=0)


def expect_repository(repository: Repository, choice: Choice, hub: Hub, memo: Path | None = None) -> Expected:
    """Return what a repository will give, by its listing, config, index and headers; no weights move."""
    files = choice.of_repository(repository)
    missing = missing_bytes(repository, files, hub)
    return Expected(
        sizes={file.path: file.size for file in files},
        description=_description(repository, choice, hub, memo),
        commit=repository.commit,
        missing=missing,
        cache=hub.cache,
        misfits=cache_misfits(missing, hub),
    )


def _description(repository: Repository, choice: Choice, hub: Hub, memo: Path | None) -> ModelDescription | None:
    if choice.include or choice.exclude:
        return None  # what these leave is described once it is here
    try:
        found = describe_repository(repository.repo, repository.commit, hub=hub, memo=memo, library=choice.library)
    except (Transient, NotAuthorised, UsageError):
        return None
    return found.description


def expect_directory(folder: Path, choice: Choice) -> Expected:
    """Return what a directory will give. Raise UsageError where there is none, InvalidCheckpoint for wrong headers."""
    sizes = {name: (folder / name).stat().st_size for name in choice.of_directory(folder)}
    return Expected(sizes=sizes, description=describe_if_single(folder))


def cache_misfits(missing: int, hub: Hub) -> tuple[Misfit, ...]:
    """Return what does not fit where so many bytes are to come into the Hub cache, which may have its own disk."""
    free = free_space(hub.cache)
    if missing <= free:
        return ()
    cause = f"{format_transfer(missing)} to download, {format_transfer(free)} free for the Hub cache {hub.cache}"
    return (Misfit(cause, f"free {format_transfer(missing - free)} there, or set HF_HOME to a larger disk"),)


def bring_repository(
    repository: Repository,
    chosen: Sequence[HubFile],
    out: Path,
    *,
    hub: Hub,
    memo: Path | None = None,
    report: Report = lambda done, total, task: None,
    outlet: Outlet = NOBODY,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[Files, int]:
    """Fetch files into the Hub cache and link them in `out`. Return the files, and the bytes that were fetched.

    outlet: where weight files are told of; `log` is told why they cannot be announced. Raise as `fetch`, DoesNotFit,
    and InvalidCheckpoint where an index names a file that is not among them.
    """
    for misfit in cache_misfits(missing_bytes(repository, chosen, hub), hub):
        raise misfit.error()
    passing = set(may_pass(file.path for file in chosen) if outlet.waited_for else ())
    files: Files = {}

    def arrived(name: str, file: Fetched) -> None:
        make_directory((out / name).parent)
        link(file.path, out / name)
        files[name] = (file.sha256, file.size)
        if name in passing:
            outlet.finished(name, *files[name])

    side = [file for file in chosen if file.path not in passing]
    snapshot = fetch(repository, side, hub=hub, memo=memo, report=report)
    for name, file in snapshot.files.items():
        arrived(name, file)
    fetched = snapshot.fetched_bytes
    if passing:
        weights = [file for file in chosen if file.path in passing]
        _announce(passing, out, outlet, lambda: repository_heads(repository, weights, hub), log)
        fetched += fetch(repository, weights, hub=hub, memo=memo, report=report, arrived=arrived).fetched_bytes
    return _checked({file.path: files[file.path] for file in chosen}, out), fetched


def bring_directory(
    folder: Path,
    names: Sequence[str],
    out: Path,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    outlet: Outlet = NOBODY,
    log: Callable[[str], None] = lambda line: None,
) -> Files:
    """Copy files, which may change where they are, into `out`. Return them. Otherwise as `bring_repository`."""
    passing = may_pass(names) if outlet.waited_for else []
    total, done = sum((folder / name).stat().st_size for name in names), 0

    def report(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    side = [name for name in names if name not in passing]
    files = {name: copy_file(folder / name, out / name, progress=report) for name in side}
    _announce(passing, out, outlet, lambda: directory_heads(folder, passing), log)
    for name in passing:
        outlet.begin(name)
        files[name] = copy_file(folder / name, out / name, progress=report)
        outlet.finished(name, *files[name])
    return _checked({name: files[name] for name in names}, out)


def _announce(
    weights: Collection[str], out: Path, outlet: Outlet, heads: Callable[[], Heads], log: Callable[[str], None]
) -> None:
    """Where what comes cannot be known beforehand nobody is told anything: all wait until all is here."""
    if not outlet.waited_for or not are_the_model(sorted(weights), out):
        return
    try:
        outlet.announce(heads())
    except BigpipeError as error:
        log(f"what follows starts when all files are here: {error.cause}")


def _checked(files: Files, out: Path) -> Files:
    for name in files:
        if name.endswith(".index.json"):
            index: Any = json.loads((out / name).read_bytes())
            check_index(files, name, index)
    return files
