"""Finds out what a model is, from the least that tells: a directory, a `config.json`, a repository or its URL."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import unquote, urlsplit

from bigpipe.bigmodel.architecture import (
    LIBRARIES,
    Architecture,
    Head,
    describe_architecture,
    missing_snapshot,
    outline,
    read_request,
)
from bigpipe.bigmodel.checkpoint import (
    ARCHITECTURE_FILE,
    MAX_CONFIG,
    ModelDescription,
    describe_checkpoint,
    find_weight_files,
    is_index,
    read_json,
)
from bigpipe.bigmodel.formats import PLAIN, Agreement, agree, decoded, format_of, left_out, plain_dtype
from bigpipe.bigmodel.hub import (
    COMMIT,
    OFFICIAL,
    Choice,
    Hub,
    Library,
    Repository,
    cached_commit,
    describe_pipeline,
    describe_repository,
)
from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import InvalidCheckpoint, NotAuthorised, NoWeights, Offline, UsageError, first_few
from bigpipe.names import listed, or_path
from bigpipe.sizes import format_size

if TYPE_CHECKING:
    import torch

REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """What was seen of a model."""

    name: str
    description: ModelDescription
    revision: str | None = None
    """The commit, for repositories."""
    source: Literal["headers", "config"] = "headers"
    fetched_bytes: int = 0
    library: str | None = None
    components: Mapping[str, Any] = field(default_factory=dict)
    """Of a diffusers pipeline."""
    notes: tuple[str, ...] = ()
    architecture: Architecture | None = None
    """Where that was seen itself."""
    subfolder: str | None = None
    """The folder that was looked at: the one asked for, or that of the address."""


def look(
    model: str | Path | torch.nn.Module,
    revision: str,
    sources: Sources,
    library: str | None = None,
    own: Mapping[str, Any] | None = None,
    *,
    variant: str | None = None,
    subfolder: str | None = None,
) -> Sighting:
    """Look at a model where it lies, or at a module. own: the description of its class, as in a manifest. variant,
    subfolder: which model of a repository or directory.
    Raises UsageError where `model` is nothing; the errors of `describe_checkpoint` and `describe_repository`."""
    if library not in (None, *LIBRARIES):
        raise UsageError(f"library {library!r} is not known", f"use {listed(LIBRARIES, 'or')}", field="library_name")
    if not isinstance(model, str | Path):
        asked = {"revision": revision != "main", "variant": variant, "subfolder": subfolder}
        for name in (name for name, given in asked.items() if given):
            raise UsageError(f"{name} belongs to a path or repository, and a module is given", "leave it out")
        return _look_at_module(model)
    choice, below = Choice(library=cast(Library | None, library), variant=variant), subfolder and subfolder.rstrip("/")
    found = _look(model, revision, sources, choice, below)
    return found if own is None else replace(found, description=replace(found.description, custom=dict(own)))


def _look_at_module(model: torch.nn.Module) -> Sighting:
    """Its parameters may have no values yet."""
    from bigpipe.bigmodel.architecture import describe_module

    seen = describe_module(model)
    tensors = {tensor.name: (tensor.dtype, tensor.shape) for tensor in seen.tensors() if tensor.persistent}
    described = ModelDescription(
        config=dict(seen.config) or None, tensors=tensors, format=None, tied={}, path=None, custom=None
    )
    return Sighting(name=type(model).__name__, description=described, architecture=seen)


def _look(model: str | Path, revision: str, sources: Sources, choice: Choice, subfolder: str | None) -> Sighting:
    path = Path(model)
    if os.path.exists(path):  # Path.exists raises where the name is longer than a file's may be
        if revision != "main":
            raise UsageError(f"revision belongs to a repository, and {path} is a path", "leave it out")
        return replace(_look_locally(path, choice, subfolder), subfolder=subfolder)
    hub = Hub.of(sources)
    repo, revision, below = _parse(str(model), revision, hub.endpoint)
    subfolder = subfolder or below
    try:
        return _look_remotely(repo, revision, hub, sources, choice, subfolder)
    except (UsageError, NotAuthorised) as error:
        raise or_path(error, str(model)) from error
    except Offline as error:
        commit = cached_commit(hub, repo, revision)
        snapshot = hub.folder(repo) / "snapshots" / (commit or revision)
        if not snapshot.is_dir():
            raise or_path(error, str(model)) from error
        found = _look_locally(snapshot, choice, subfolder)
        return replace(found, name=repo, revision=snapshot.name, subfolder=subfolder)


def _parse(model: str, revision: str, endpoint: str) -> tuple[str, str, str | None]:
    """`owner/name`, revision and folder of a repository or of an address in it:
    https://huggingface.co/owner/name/tree/main/text_encoder, of the Hub itself or of the one at `endpoint`."""
    folder: list[str] = []
    if model.startswith(("http://", "https://")):
        if not any(model.startswith(f"{place}/") for place in (endpoint, *OFFICIAL)):
            cause = f"{model} is no address of the Hub at {endpoint}"
            raise UsageError(cause, "give owner/name; a mirror's own address goes into HF_ENDPOINT")
        parts = [unquote(part) for part in urlsplit(model).path.strip("/").split("/")]  # refs%2Fpr%2F1 is one of them
        if parts[0] in ("datasets", "spaces") or (len(parts) > 2 and parts[2] not in ("tree", "blob", "resolve")):
            raise UsageError(f"{model} is the address of no model", "give owner/name, or the address of its files")
        if len(parts) > 3 and parts[2] in ("tree", "blob", "resolve"):
            revision, folder = parts[3], parts[4:] if parts[2] == "tree" else parts[4:-1]
        model = "/".join(parts[:2])
    if not REPOSITORY.fullmatch(model):
        raise UsageError(
            f"{model!r} is neither a path that exists nor the name of a repository",
            "give a directory, a config.json, owner/name, or a repository's address",
        )
    return model, revision, "/".join(folder) or None


def _look_remotely(
    repo: str, revision: str, hub: Hub, sources: Sources, choice: Choice, subfolder: str | None
) -> Sighting:
    found = describe_repository(repo, revision, hub=hub, choice=choice, subfolder=subfolder, need="sizes")
    description = found.description
    if sources.trust_remote_code and (description.config or {}).get("auto_map"):
        description = replace(description, path=_fetch_code(found.repository, revision))
    return Sighting(
        name=repo,
        revision=found.repository.commit,
        description=description,
        source="config" if found.source == "config" else "headers",
        fetched_bytes=found.fetched_bytes,
        library=choice.library or found.library,
        components=found.components,
        notes=(found.difference,) if found.difference else (),
        subfolder=subfolder,
    )


def _fetch_code(repository: Repository, revision: str) -> Path:
    """Brings the repository's own Python files, which the caller trusts at exactly this commit, into the Hub cache."""
    if not COMMIT.fullmatch(revision):
        raise UsageError(
            f"the code of {repository.repo} may run only at a commit, and {revision!r} can move",
            f"read it at {repository.commit} and, if you trust it, ask for that revision",
        )
    from bigpipe.bigmodel.hub import fetch

    code = [file for file in repository.files if "/" not in file.path and file.path.endswith((".py", ".json"))]
    fetch(repository, code)
    return repository.snapshot


def _look_locally(path: Path, choice: Choice, subfolder: str | None = None) -> Sighting:
    from bigpipe.bigmodel.hub import DirectorySource

    source, library = DirectorySource(path, choice, subfolder), choice.library
    if subfolder:
        source.require_subfolder()
        path = source.folder
    if path.is_dir() and library in (None, "diffusers") and (path / "model_index.json").is_file():
        request, description = read_request(path, library_name="diffusers"), describe_pipeline(path, choice)
        return Sighting(
            name=str(path), description=description, source="headers" if description.tensors else "config",
            library="diffusers", components=dict(request.config),
        )  # fmt: skip
    if choice.variant:
        among = [file.path for file in source.chosen()]
        return Sighting(name=str(path), description=describe_checkpoint(path, among=among), library=library)
    directory = path if path.is_dir() else path.parent
    missing = _missing_weights(path)
    if missing is None:
        return Sighting(name=str(path), description=describe_checkpoint(path), library=library)
    file = path / "config.json" if path.is_dir() else path
    custom = directory / ARCHITECTURE_FILE
    gguf = path.is_dir() and any(path.glob("*.gguf"))
    if not file.is_file() and not custom.is_file():
        if gguf:
            raise missing
        raise UsageError(
            f"{path} holds no weights, no config.json and no {ARCHITECTURE_FILE}", "give the directory of a model"
        )
    config = read_json(file, directory, MAX_CONFIG) if file.is_file() else None
    described = _described(config, read_json(custom, directory, MAX_CONFIG) if custom.is_file() else None, directory)
    notes = (f"{missing.cause}; sizes are those of its config",) if gguf else ()
    return Sighting(name=str(path), description=described, source="config", library=library, notes=notes)


def _missing_weights(path: Path) -> NoWeights | None:
    """None: there are some."""
    if path.is_file():
        bare = path.suffix == ".json" and not is_index(path.name)
        return NoWeights(f"{path}: is no weight file") if bare else None
    try:
        find_weight_files(path)
    except NoWeights as error:
        return error
    return None


def _described(config: Mapping[str, Any] | None, custom: Mapping[str, Any] | None, path: Path) -> ModelDescription:
    return ModelDescription(config=config, tensors=None, format=None, tied={}, path=path, custom=custom)


def architecture_of(sighting: Sighting, head: Head, sources: Sources) -> tuple[Architecture, tuple[str, ...]]:
    """The model's architecture, and notes on what is not as it should be.

    From the class, or, where that is unknown or may not run, from the names of the stored tensors.
    """
    if sighting.architecture is not None:
        return sighting.architecture, ()
    description = decoded(sighting.description)
    try:
        built = _built(sighting, head, sources)
    except UsageError as error:
        if description.tensors is None or description.own_class is not None:
            raise
        if format_of(description) is not PLAIN:
            raise UsageError(
                f"{error.cause}; and its weights are packed, so that their shapes do not tell the model's", error.cure
            ) from error
        note = f"{error.cause}; so sizes are from stored tensors alone, without buffers and with guessed blocks"
        return outline(description.tensors, description.config, description.tied), (note,)
    slow = missing_snapshot((description.config or {}).get("model_type"))
    try:
        agreement = agree(description, built, ask=False) if head == "auto" else Agreement(built)
    except InvalidCheckpoint as error:
        return built, (f"{error.cause}; sizes are those of the config", *filter(None, [slow]))
    built = agreement.architecture
    notes = *_decoded(sighting.description), *agreement.notes, *_differences(built, description, head)
    return built, (*notes, *filter(None, [slow]))


def _decoded(stored: ModelDescription) -> tuple[str, ...]:
    """What a checkpoint becomes where it is run, in words; nothing where that is what is stored."""
    plain = decoded(stored)
    if plain is stored or stored.nbytes is None or plain.nbytes is None:
        return ()
    sizes = f"{format_size(stored.nbytes)} are stored, and {format_size(plain.nbytes)} of {plain_dtype(stored)} are run"
    return (f"{format_of(stored).title}: {sizes}", *left_out(stored))


def _built(sighting: Sighting, head: Head, sources: Sources) -> Architecture:
    description = sighting.description
    source: Mapping[str, Any] | Path = sighting.components or description.config or {}
    if sources.trust_remote_code and description.path is not None:
        source = description.path
    if not source and description.own_class is None:
        raise UsageError("the model has no config that names its class", "describe its class under `architecture`")
    try:
        return describe_architecture(
            source, library_name=sighting.library, head=head, custom=description.custom, sources=sources
        )
    except (UsageError, InvalidCheckpoint) as error:
        raise type(error)(f"{sighting.name}: {error.cause}", error.cure) from error


def _differences(architecture: Architecture, description: ModelDescription, head: Head) -> tuple[str, ...]:
    """Does the checkpoint hold what the class has? Compared by count: class and file may name tensors differently."""
    if description.tensors is None or head == "none" or format_of(description) is not PLAIN:
        return ()
    stored = {name: math.prod(shape) for name, (_, shape) in description.tensors.items()}
    wanted = {tensor.name: tensor.elements for tensor in architecture.tensors() if tensor.persistent}
    if sum(stored.values()) == sum(wanted.values()):
        return ()
    missing, unused = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    words = [f"the checkpoint holds {sum(stored.values()):,} elements and its class {sum(wanted.values()):,}"]
    words += [f"not in the checkpoint: {first_few(missing, 3)}"] if missing else []
    words += [f"not in the class: {first_few(unused, 3)}"] if unused else []
    return ("; ".join(words),)
