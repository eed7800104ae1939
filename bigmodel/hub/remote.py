"""A model on the Hub, known from its small files and the headers of its weights: no weight is downloaded.

What is fetched, in this order, and no more than is needed: the commit's listing, `config.json`, the index, and the
header of every weight file by HTTP range, several at a time. Where the config is of a family in the snapshot
(`known_architecture`) and the index agrees with it in every name and in the sum of bytes, the index tells all there is
to know of sizes, and no header is read. A commit never changes, so what was learnt of it is kept under `memo`. Files
that lie in the Hub cache already are read there.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from bigpipe.bigmodel.architecture import known_architecture
from bigpipe.bigmodel.checkpoint import (
    ARCHITECTURE_FILE,
    FETCH_AGAIN,
    MAX_CONFIG,
    MAX_INDEX,
    SAFETENSORS_NAMES,
    ByteSource,
    FileSource,
    Format,
    ModelDescription,
    Tensors,
    format_of,
    invalid,
    read_header,
    tensor_nbytes,
)
from bigpipe.bigmodel.memo import recall, remember
from bigpipe.errors import UsageError

from .heads import GUESS, READERS, reading
from .repository import Hub, HubFile, Repository, describe
from .selection import check_index, detect, select

Need = Literal["sizes", "layout"]
"""sizes: names, dtypes and shapes, in any order. layout: in the order of their bytes, as a shard plan needs them."""

COUNTED = ("model.safetensors", "model.safetensors.index.json")
"""What the Hub counts: one of these at the root of a repository. It knows nothing of `.bin` or of components."""
ENTRY = 150
"""Bytes that a tensor takes in a header besides its name, at most: dtype, a shape of three, two offsets."""
ANSWER_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteModel:
    repository: Repository
    description: ModelDescription
    library: str
    source: Literal["headers", "index", "config"]
    """What the tensors were learnt from; config: there are no weights, or none that are read here."""
    fetched_bytes: int
    """Over the network, this time."""
    components: Mapping[str, Any] = field(default_factory=dict)
    """diffusers: {"model_index": …, "components": {name: config}}; empty for single models."""

    @property
    def difference(self) -> str | None:
        """What the Hub counts otherwise, in words; None where it agrees or does not count."""
        if self.components or self.description.format != "safetensors":
            return None
        return difference(self.repository, self.description.tensors, self.description.config)


def describe_repository(
    repo: str,
    revision: str = "main",
    *,
    hub: Hub,
    memo: Path | None = None,
    library: str | None = None,
    need: Need = "layout",
) -> RemoteModel:
    """What a repository holds at `revision`.

    Raises Offline, NotAuthorised, GatedRepository, UsageError (no such model, no weights and no config), Transient,
    and InvalidCheckpoint, naming the file and byte, where a header or index is not what it should be.
    """
    answers: list[int] = []
    hub = replace(hub, meter=answers.append)
    repository = describe(repo, revision, hub=hub, memo=memo)
    file = _memo_file(hub, repository, memo, need) if memo else None
    found = _from_json(recall(file), repository) if file else None
    if found is None:
        found = _Reader(hub, repository, library, need).read()
        if file:
            remember(file, _as_json(found))
    return replace(found, fetched_bytes=sum(answers))


class _Reader:
    """Fetches the small files of one commit."""

    def __init__(self, hub: Hub, repository: Repository, library: str | None, need: Need) -> None:
        self.hub = hub
        self.repository = repository
        self.need = need
        self.names = [file.path for file in repository.files]
        self.library = library

    def read(self) -> RemoteModel:
        config = self.json("config.json", MAX_CONFIG)
        library = self.library or detect(self.names, config, self.repository.library)
        index = self.json("model_index.json", MAX_CONFIG) if library == "diffusers" else None
        components = self.components(index) if index else {}
        custom = self.json(ARCHITECTURE_FILE, MAX_CONFIG)
        weights = self.weights(library)
        if not weights and config is None and not components:
            raise UsageError(
                f"{self.repository.repo} holds neither weights in safetensors or .bin nor a config.json",
                f"it holds {', '.join(self.names[:8]) or 'nothing'}; is it a model?",
            )
        tensors, tied, source = self.tensors(weights, config)
        description = ModelDescription(
            config=config, tensors=tensors, format=_format([file.path for file in weights]), tied=tied, path=None,
            custom=custom,
        )  # fmt: skip
        return RemoteModel(
            repository=self.repository, description=description, library=library, source=source, fetched_bytes=0,
            components=components,
        )  # fmt: skip

    def json(self, name: str, limit: int) -> dict[str, Any] | None:
        """A JSON object of the repository; None where there is no such file. Read from the Hub cache if it is there."""
        file = self.repository.file(name)
        if file is None:
            return None
        if file.size > limit:
            raise invalid(name, f"has {file.size} bytes, more than {limit}", FETCH_AGAIN)
        with reading(self.hub, self.repository, file) as (source, _):
            content = source.read(0, file.size)
        try:
            data = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise invalid(f"{self.repository.repo}/{name}", f"is not JSON: {str(error)[:200]}", FETCH_AGAIN) from None
        if not isinstance(data, dict):
            raise invalid(f"{self.repository.repo}/{name}", "is not a JSON object", FETCH_AGAIN)
        return data

    def components(self, index: Mapping[str, Any]) -> dict[str, Any]:
        names = [name for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2]
        found = {name: self.json(f"{name}/config.json", MAX_CONFIG) for name in names}
        configs = {name: config for name, config in found.items() if config is not None}
        return {"model_index": dict(index), "components": configs}

    def weights(self, library: str) -> list[HubFile]:
        try:
            names = select(self.names, library=library)  # type: ignore[arg-type]
        except UsageError:
            return []
        chosen = [name for name in names if name.endswith((".safetensors", ".bin"))]
        return [file for file in self.repository.files if file.path in chosen]

    def tensors(
        self, weights: list[HubFile], config: Mapping[str, Any] | None
    ) -> tuple[Tensors | None, dict[str, str], Literal["headers", "index", "config"]]:
        if not weights:
            return None, {}, "config"
        index = self.index(weights)
        if index is not None and self.need == "sizes" and weights[0].path.endswith(".safetensors"):
            tensors = tensors_of_index(index, config)
            if tensors is not None and difference(self.repository, tensors, config) is None:
                return tensors, {}, "index"
        tensors, tied = self.headers(weights, index)
        return tensors, tied, "headers"

    def index(self, weights: list[HubFile]) -> dict[str, Any] | None:
        """The index of a model in several files at the root of the repository."""
        if len(weights) < 2 or any("/" in file.path for file in weights):
            return None
        suffix = PurePosixPath(weights[0].path).suffix
        candidates = [name for name in self.names if name.endswith(f"{suffix}.index.json") and "/" not in name]
        stem = weights[0].path.split("-")[0]
        name = next((name for name in candidates if name.startswith(stem)), None)
        if name is None:
            return None
        index = self.json(name, MAX_INDEX)
        check_index(self.names, name, index)
        return index

    def headers(self, weights: list[HubFile], index: Mapping[str, Any] | None) -> tuple[Tensors, dict[str, str]]:
        weight_map = index["weight_map"] if index else {}
        guesses: dict[str, int] = {}
        for name, file in weight_map.items():
            guesses[file] = guesses.get(file, 64) + len(name) + ENTRY
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(READERS) as pool:
            read = pool.map(lambda file: self.header(file, guesses.get(file.path, GUESS)), weights)
            found = {file.path: contents for file, contents in zip(weights, read, strict=True)}
        joined = _joined(found)
        for tensor, file in weight_map.items():
            if not any(tensor in names for names in found.get(file, ())):
                name = f"{self.repository.repo}'s index"
                raise invalid(name, f"says this tensor is in {file}, and it is not", FETCH_AGAIN, tensor=tensor)
        return joined

    def header(self, file: HubFile, guess: int) -> tuple[Tensors, dict[str, str]]:
        with reading(self.hub, self.repository, file, min(guess, MAX_CONFIG)) as (source, name):
            return _read(source, name)


def _read(source: ByteSource, file: Path) -> tuple[Tensors, dict[str, str]]:
    if file.name.endswith(".safetensors"):
        header = read_header(source, file)
        return {tensor.name: (tensor.dtype, tensor.shape) for tensor in header.tensors}, {}
    from bigpipe.bigmodel.checkpoint import read_torch_names

    return read_torch_names(source)


def pipeline_tensors(path: Path) -> tuple[Tensors, dict[str, str], Format | None]:
    """(tensors, tied, format) of a pipeline's directory, as `describe_repository` names them. None has no weights."""
    names = [file.relative_to(path).as_posix() for file in (*path.glob("*"), *path.glob("*/*")) if file.is_file()]
    weights = [name for name in select(names, library="diffusers") if name.endswith((".safetensors", ".bin"))]
    found = {}
    for name in weights:
        with FileSource(path / name) as source:
            found[name] = _read(source, path / name)
    return *_joined(found), _format(weights)


def _joined(found: Mapping[str, tuple[Tensors, Mapping[str, str]]]) -> tuple[Tensors, dict[str, str]]:
    """Tensors and aliases of all files. Those of a pipeline's component are named after it, as its modules are."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    tied: dict[str, str] = {}
    for file, (own, aliases) in found.items():
        component = PurePosixPath(file).parent.name
        prefix = f"{component}." if component else ""
        for name in (*own, *aliases):
            if prefix + name in tensors or prefix + name in tied:
                raise invalid(file, "stands in another file of this model too", FETCH_AGAIN, tensor=name)
        tensors.update((prefix + name, entry) for name, entry in own.items())
        tied.update((prefix + alias, prefix + name) for alias, name in aliases.items())
    return tensors, tied


def _format(weights: list[str]) -> Format | None:
    return format_of(Path(weights[0])) if weights else None


def tensors_of_index(index: Mapping[str, Any], config: Mapping[str, Any] | None) -> Tensors | None:
    """Names, dtypes and shapes, where the index and a config of a known family agree about all of them; else None.

    They agree where the names are the same and `total_size` is the sum of bytes in the config's dtype: a tensor of
    another shape or dtype would have to be made up for by another one.
    """
    if config is None or config.get("quantization_config"):
        return None
    dtype, total = config.get("dtype") or config.get("torch_dtype"), (index.get("metadata") or {}).get("total_size")
    architecture = known_architecture(config)
    if architecture is None or not isinstance(dtype, str) or not isinstance(total, int | float):
        return None
    dtype = dtype.removeprefix("torch.")
    expected = {tensor.name: (dtype, tensor.shape) for tensor in architecture.tensors() if tensor.persistent}
    try:
        size = sum(tensor_nbytes(dtype, shape) for _, shape in expected.values())
    except KeyError:
        return None
    if set(index["weight_map"]) != set(expected) or size != total:
        return None
    return {name: expected[name] for name in index["weight_map"]}


def _memo_file(hub: Hub, repository: Repository, memo: Path, need: Need) -> Path:
    key = ["remote model", ANSWER_VERSION, hub.endpoint, repository.repo, repository.commit, need]
    return memo / "remote" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()}.json"


DESCRIBED, FOUND = ("config", "format", "tied", "custom"), ("library", "source", "components")
"""Fields of the description and of the model that are remembered as they are."""


def _as_json(model: RemoteModel) -> dict[str, Any]:
    tensors = [[name, dtype, shape] for name, (dtype, shape) in (model.description.tensors or {}).items()]
    described = {name: getattr(model.description, name) for name in DESCRIBED}
    return {**described, "tensors": tensors, **{name: getattr(model, name) for name in FOUND}}


def _from_json(data: Any, repository: Repository) -> RemoteModel | None:
    try:
        tensors = {name: (dtype, tuple(shape)) for name, dtype, shape in data["tensors"]}
        known = None if data["source"] == "config" else tensors
        described = ModelDescription(tensors=known, path=None, **{name: data[name] for name in DESCRIBED})
        found = {name: data[name] for name in FOUND}
        return RemoteModel(repository=repository, description=described, fetched_bytes=0, **found)
    except (KeyError, TypeError, ValueError):
        return None  # nothing, or a damaged memory: asked anew


def difference(repository: Repository, tensors: Tensors | None, config: Mapping[str, Any] | None) -> str | None:
    """What the Hub counts otherwise than `tensors`, in words.

    None where they agree, where the Hub gives no counts, and where it counts something else: packed formats by the
    values that are packed in them.
    """
    counted = repository.elements
    packed = bool((config or {}).get("quantization_config"))
    if not counted or not tensors or packed or all(repository.file(name) is None for name in COUNTED):
        return None
    found: dict[str, int] = {}
    for dtype, shape in tensors.values():
        name = SAFETENSORS_NAMES.get(dtype, dtype)
        found[name] = found.get(name, 0) + math.prod(shape)
    stated = {name: count for name, count in counted.items() if count}
    if stated == {name: count for name, count in found.items() if count}:
        return None
    return f"the Hub counts {_words(stated)}, and the files hold {_words(found)}; the files are believed"


def _words(counts: Mapping[str, int]) -> str:
    return " and ".join(f"{count:,} elements of {name}" for name, count in sorted(counts.items())) or "no elements"
