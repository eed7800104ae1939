"""The whole way from the name of a published model to what is equal in it and what is not."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from bigpipe.bigmodel.architecture import set_free
from bigpipe.bigmodel.checkpoint import ARCHITECTURE_FILE, Checkpoint, describe_opened, open_checkpoint
from bigpipe.bigmodel.formats import PLAIN, decode, decoded, format_of
from bigpipe.bigmodel.hub import COMMIT, Choice, DirectorySource, Hub, HubSource, Watch
from bigpipe.bigmodel.publishing import PROVENANCE
from bigpipe.bigmodel.quantization import torch_threads
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.writing import cast_while_read, encode_config
from bigpipe.errors import InvalidCheckpoint, UsageError
from bigpipe.files import hash_file
from bigpipe.names import PATH, checked
from bigpipe.trust import Trust

from .comparing import Comparison, compare
from .expecting import Expected, expect_of_others, expect_ours
from .listing import paths_below
from .records import ADDRESS, CURE, Record, Source, read_record
from .results import Became, ComparedFile, Difference, Reproduction

CARD = "README.md"

ReportProgress = Callable[[int, int, str], None]
"""Called with bytes done, all bytes or None, and what is done."""


@dataclass(frozen=True, slots=True)
class Found:
    """A model where its files can be read."""

    name: str
    commit: str | None
    checkpoint: Checkpoint

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder


@checked(published=PATH)
def reproduce(
    published: str | Path,
    source: str | Path | None = None,
    *,
    trust: Trust | Sequence[str] = (),
    base: Path | None = None,
    memo: Path | None = None,
    offline: bool = False,
    progress: ReportProgress = lambda done, total, task: None,
) -> Reproduction:
    """Recompute a published quantized model from its source, and return which bytes are equal and which are not.

    published, source: a directory, `owner/name` or `owner/name@revision` on the Hub. source: what the model was made
      from; None: as its provenance, or the `base_model` of its card, says. What lies on the Hub goes through its cache.
    trust: modules that the model's own class may come from, looked for in `base` first. memo: a directory where answers
      about classes are kept. offline: what lies in the Hub cache is taken. progress: told of bytes done.

    Models of bigpipe, and of transformers with bitsandbytes: int8, nf4, fp4, double quantization or not. It takes less
    than 256 MB of memory besides the largest tensor. Raise UsageError where nobody says what it was made from, or it
    cannot be recomputed; InvalidCheckpoint for damaged files, and the errors of the Hub.
    """
    sources = Sources(trust=Trust.of(trust), base=base, memo=memo, offline=offline)
    with _found(_asked(published), sources, progress) as there:
        record = read_record(there.name, there.folder, describe_opened(there.checkpoint))
        asked = _source(there.name, record, source)
        with _found(asked, sources, progress) as origin:
            if asked.local:
                origin = replace(origin, checkpoint=_as_taken(origin.checkpoint, asked.choice))
            return _reproduced(there, origin, record, asked, sources, progress)


def _asked(model: str | Path) -> Source:
    """What somebody calls a model. Raise UsageError where that is neither a directory nor a repository."""
    if os.path.exists(model):
        return Source(place=os.fspath(model), local=True)
    match = ADDRESS.fullmatch(os.fspath(model))
    if match is None:
        cause = f"{os.fspath(model)!r} is neither a directory nor the name of a repository"
        raise UsageError(cause, "give a directory, owner/name or owner/name@revision")
    return Source(place=match["repo"], commit=match["revision"])


def _source(name: str, record: Record, given: str | Path | None) -> Source:
    """What the model was made from: as is said now, with what is recorded of the same repository; else as recorded."""
    if given is None:
        if record.source is None:
            raise UsageError(f"nobody says what {name} was made from: {record.unsaid}", CURE)
        return record.source
    asked = _asked(given)
    recorded = record.source
    if asked.local:
        return replace(asked, choice=record.choice)
    if recorded is not None and recorded.place == asked.place:
        return replace(recorded, commit=asked.commit or recorded.commit)
    return asked


@contextmanager
def _found(asked: Source, sources: Sources, progress: ReportProgress) -> Iterator[Found]:
    """The model, as long as its links to the Hub cache are needed."""
    if asked.local:
        yield Found(asked.place, None, open_checkpoint(Path(asked.place, asked.subfolder or "")))
        return
    with TemporaryDirectory(prefix="bigpipe-") as scratch:
        hub = HubSource(asked.place, asked.commit or "main", asked.choice, Hub.of(sources), asked.subfolder)
        brought = hub.bring(Path(scratch), Watch(report=progress))
        yield Found(asked.place, brought.commit, open_checkpoint(scratch))


def _as_taken(checkpoint: Checkpoint, choice: Choice) -> Checkpoint:
    """A directory's checkpoint with those side files that a download takes along; with all where they are not all that
    it was told to take."""
    try:
        chosen = DirectorySource(checkpoint.path, choice).chosen()
    except UsageError:
        return checkpoint
    taken = {checkpoint.folder / file.path for file in chosen}
    return replace(checkpoint, extras=tuple(extra for extra in checkpoint.extras if extra in taken))


def _reproduced(
    there: Found, origin: Found, record: Record, asked: Source, sources: Sources, progress: ReportProgress
) -> Reproduction:
    _refuse_quantized(origin)
    source = decode(origin.checkpoint)
    for dtype in record.casts:
        source = cast_while_read(source, dtype)
    settings = replace(record.settings, threads=torch_threads())
    described = describe_opened(source)
    try:
        if record.ours:
            expected = expect_ours(described, settings, sources)
        else:
            expected = expect_of_others(described, describe_opened(there.checkpoint), settings, sources)
    except InvalidCheckpoint as error:
        cause = f"{there.name} cannot come from {origin.name}: {error.cause}"
        raise InvalidCheckpoint(cause, CURE) from None
    source = set_free(source, [part.source for part in expected.parts])
    comparison, summed = compare(
        there.checkpoint, source, expected.parts, settings, lambda done, total: progress(done, total, "recompute")
    )
    made = _made(there, expected)
    carried = {extra.relative_to(origin.folder).as_posix(): extra for extra in origin.checkpoint.extras}
    files = [*_weight_files(comparison), *_side_files(comparison, there, made, carried, record.ours)]
    if record.ours:
        comparison.differences.extend(_absent(there, [*made, *carried]))
    pinned = asked.commit is not None and COMMIT.fullmatch(asked.commit) is not None
    return Reproduction(
        published=there.name,
        commit=there.commit,
        source=origin.name,
        source_commit=origin.commit,
        pinned=pinned,
        scheme=settings.scheme,
        files=tuple(files),
        differences=tuple(comparison.differences),
        notes=(*([] if pinned else [_unpinned(origin)]), *record.notes, *expected.notes, *summed),
    )


def _refuse_quantized(origin: Found) -> None:
    """Raise UsageError for a source that is quantized itself."""
    found = format_of(decoded(describe_opened(origin.checkpoint)))
    if found is not PLAIN:
        raise UsageError(f"the source {origin.name} is quantized itself: it is {found.title}", CURE)


def _unpinned(origin: Found) -> str:
    if origin.commit is None:
        return "the source is a directory: nothing says that it is what was published under its name"
    return f"no commit of the source is on record: it is taken as it is now, {origin.commit}"


def _weight_files(comparison: Comparison) -> Iterator[ComparedFile]:
    different = {each.file for each in comparison.differences}
    for file in comparison.published.files:
        tensors = [each for each in comparison.published.tensors.values() if each.file == file]
        yield ComparedFile(
            name=file.name,
            became="different" if file.name in different else "equal",
            bytes=sum(tensor.nbytes for tensor in tensors),
            equal_bytes=comparison.equal[file.name],
            tensors=len(tensors),
        )


def _made(there: Found, expected: Expected) -> dict[str, bytes]:
    """Files beside the weights that bigpipe writes anew, by name. What code a class had when it was downloaded does not
    stand in its source, nor in a byte of the weights: that is taken as it was published."""
    made = {}
    if expected.config is not None:
        made["config.json"] = encode_config(expected.config)
    if expected.custom is not None:
        custom, published = dict(expected.custom), describe_opened(there.checkpoint).custom or {}
        custom.pop("source", None)
        told = {"source": published["source"]} if "source" in published else {}
        made[ARCHITECTURE_FILE] = encode_config({**custom, **told})
    return made


def _side_files(
    comparison: Comparison, there: Found, made: Mapping[str, bytes], carried: Mapping[str, Path], ours: bool
) -> Iterator[ComparedFile]:
    """Everything else. What bigpipe published is known to the byte, but for the card and what says how it was made."""
    for file in (path for path in paths_below(there.folder) if path.is_file()):
        name = file.relative_to(there.folder).as_posix()
        if file in comparison.published.files:
            continue
        if name in made:
            same, note = file.read_bytes() == made[name], "as recomputed"
        elif name in carried and name not in (CARD, PROVENANCE, "config.json"):
            same, note = hash_file(file) == hash_file(carried[name]), "as in the source"
        else:
            same, note = None, "read" if name.endswith(".index.json") else ""
        size = file.stat().st_size
        became = _became(same, ours)
        if became == "different":
            comparison.differences.append(Difference("", name, "text", f"is not {note}"))
        note = note if same is not False else f"not {note}"
        yield ComparedFile(name=name, became=became, bytes=size, equal_bytes=size if same else 0, note=note)


def _absent(there: Found, names: Iterable[str]) -> Iterator[Difference]:
    """Files that bigpipe would have published beside the weights, and that are not there."""
    for name in dict.fromkeys(names):
        if name not in (CARD, PROVENANCE) and not (there.folder / name).is_file():
            yield Difference("", name, "missing", "the source gives it, and it is not there")


def _became(same: bool | None, ours: bool) -> Became:
    """Others write the files beside the weights anew: that these are not the source's says nothing."""
    if same:
        return "equal"
    return "different" if same is False and ours else "not recomputed"
