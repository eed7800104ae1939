"""A model on the Hub, known from its small files and the headers of its weights: no weight is downloaded.

What is fetched, in this order, and no more than is needed: the commit's listing, `config.json`, the index, and the
header of every weight file by HTTP range, several at a time. Where the config is of a family in the snapshot
(`known_architecture`), the index agrees with it in every name and in the sum of bytes, and the Hub counts the same
elements by dtype, there is no more to know of sizes, and no header is read. A commit never changes, so what was learnt
of it is kept under `memo`. Files that lie in the Hub cache already are read there.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bigpipe.bigmodel.architecture import known_architecture
from bigpipe.bigmodel.checkpoint import (
    ADAPTER_CONFIG,
    ARCHITECTURE_FILE,
    MAX_CONFIG,
    MAX_INDEX,
    OUR_LIMIT,
    SAFETENSORS_NAMES,
    AdapterDescription,
    Contents,
    FileFormat,
    FileSource,
    ModelDescription,
    Tensors,
    WeightSet,
    adapter_weights,
    check_weight_map,
    file_format_of,
    invalid,
    is_index,
    join_contents,
    parse_object,
    read_contents,
    tensor_nbytes,
    tokenizer_files,
)
from bigpipe.errors import Offline, UsageError

from .heads import GUESS, RangeSource, check_content, reading
from .repository import READERS, Hub, HubFile, Repository, as_listing, describe, question
from .selection import ANY, Choice, check_index, detect, weight_files

Need = Literal["sizes", "layout"]
"""sizes: names, dtypes and shapes, in any order. layout: in the order of their bytes, as a shard plan needs them."""

COUNTED = ("model.safetensors", "model.safetensors.index.json")
"""What the Hub counts: one of these at the root of a repository. It knows nothing of `.bin` or of components."""
ENTRY = 150
"""Bytes that a tensor takes in a header besides its name, at most: dtype, a shape of three, two offsets."""
ANSWER_VERSION = 4
Origin = Literal["headers", "index", "config"]


@dataclass(frozen=True, slots=True)
class RemoteModel:
    repository: Repository
    description: ModelDescription
    library: str
    source: Origin
    """What the tensors were learnt from; config: there are no weights, or none that are read here."""
    components: Mapping[str, Any]
    """diffusers: {"model_index": …, "components": {name: config}}; empty for single models."""
    fetched_bytes: int = 0
    """Over the network, this time."""

    @property
    def difference(self) -> str | None:
        """What the Hub counts otherwise, in words; None where it agrees or does not count."""
        if self.components or self.description.format != "safetensors":
            return None
        return _difference(self.repository, self.description.tensors, self.description.config)


def describe_repository(
    repo: str,
    revision: str = "main",
    *,
    hub: Hub,
    need: Need = "layout",
    choice: Choice = ANY,
    subfolder: str | None = None,
) -> RemoteModel:
    """Return what a repository holds at `revision`, among the files of a choice and below a folder if so said.
    Raise Offline, NotAuthorised, GatedRepository, UsageError (no such model, no weights and no config), Transient, and
    InvalidCheckpoint, naming the file and byte, where a header or index is not what it should be."""
    fetched: list[int] = []
    repository = describe(repo, revision, hub=replace(hub, meter=fetched.append))
    facts = _facts(repository, need, {**asdict(choice), "subfolder": subfolder})
    if subfolder:
        repository = repository.below(subfolder)
    if choice.include or choice.exclude:
        taken = set(choice.among([file.path for file in repository.files], repository.library))
        files = tuple(file for file in repository.files if file.path in taken)
        repository = replace(repository, files=files)
    if choice.include or choice.exclude or choice.variant:
        repository = replace(repository, elements=None)  # the Hub counts the plain weights, and all of them
    found = _from_json(hub.recall(*facts), repository)
    if found is None:
        try:
            found = _read(repository, Choice(library=choice.library, variant=choice.variant), need)
            hub.remember(_as_json(found), *facts)
        except Offline:
            if (found := _from_json(hub.told(*facts), repository)) is None:
                raise
    return replace(found, fetched_bytes=sum(fetched))


def describe_remote_adapter(repository: Repository, names: Collection[str]) -> AdapterDescription:
    """Return what an adapter's config and the header of its weights say. names: the files that count, an adapter's
    among them. Raise as `describe_repository`."""
    facts = "adapter", ANSWER_VERSION, repository.repo, repository.commit, repository.subfolder, sorted(names)
    answer = repository.hub.recall(*facts)
    if not isinstance(answer, dict):
        file = adapter_weights(names)
        outline = _headers(repository, [each for each in repository.files if each.path == file], {}).outline
        tensors = [[name, dtype, shape] for name, (dtype, shape) in outline.items()]
        answer = {"config": _json(repository, ADAPTER_CONFIG) or {}, "tensors": tensors}
        repository.hub.remember(answer, *facts)
    outlined = {name: (dtype, tuple(shape)) for name, dtype, shape in answer["tensors"]}
    brings = bool(tokenizer_files(names))
    return AdapterDescription(config=answer["config"], tensors=outlined, where=repository.repo, brings_tokenizer=brings)


def answers(
    repo: str,
    commit: str,
    *,
    hub: Hub,
    need: Need = "layout",
    choice: Choice = ANY,
    subfolder: str | None = None,
) -> dict[str, Any]:
    """Return question → answer, for `Hub.known`: a commit's listing, its config, and the names, dtypes and shapes of
    its tensors. Raise as `describe_repository`."""
    found = describe_repository(repo, commit, hub=hub, need=need, choice=choice, subfolder=subfolder)
    repository, listing = describe(repo, commit, hub=hub), question("listing", repo, commit)
    asked = question(*_facts(repository, need, {**asdict(choice), "subfolder": subfolder}))
    return {listing: as_listing(repository), asked: _as_json(found)}


def _facts(repository: Repository, need: Need, asked: Mapping[str, object]) -> tuple[object, ...]:
    told = {name: value for name, value in asked.items() if value}
    return "model", ANSWER_VERSION, repository.repo, repository.commit, need, *([told] if told else [])


def _read(repository: Repository, choice: Choice, need: Need) -> RemoteModel:
    names = [file.path for file in repository.files]
    config = _json(repository, "config.json")
    library = choice.library or detect(names, config, repository.library)
    components = _components(repository) if library == "diffusers" else {}
    weights = _weights(names, replace(choice, library=library))
    if not weights and config is None and not components:
        cause = f"{repository.repo} holds neither weights in safetensors or .bin nor a config.json"
        raise UsageError(cause, f"it holds {', '.join(names[:8]) or 'nothing'}; is it a model?")
    tensors, tied, source = _tensors(repository, weights, config, need)
    form, custom = _format(weights), _json(repository, ARCHITECTURE_FILE)
    described = ModelDescription(config=config, tensors=tensors, format=form, tied=tied, custom=custom)
    return RemoteModel(repository, described, library, source, components)


def _json(repository: Repository, name: str, limit: int = MAX_CONFIG) -> dict[str, Any] | None:
    """A JSON object of the repository; None where there is no such file. Read from the Hub cache if it is there."""
    file = repository.file(name)
    if file is None:
        return None
    if file.size > limit:
        raise invalid(name, f"has {file.size} bytes, more than {limit}", OUR_LIMIT)
    with reading(repository, file) as (source, _):
        content = source.read(0, file.size)
        if isinstance(source, RangeSource):
            check_content(repository, file, content)
        return parse_object(content, f"{repository.repo}/{name}", unique=is_index(name))


def _components(repository: Repository) -> dict[str, Any]:
    index = _json(repository, "model_index.json")
    if not index:
        return {}
    names = [name for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2]
    found = {name: _json(repository, f"{name}/config.json") for name in names}
    return {"model_index": index, "components": {name: config for name, config in found.items() if config is not None}}


def _weights(names: list[str], choice: Choice) -> dict[str, WeightSet]:
    """Folder → weights: of a pipeline those of its parts, of other models those at the root."""
    sets = choice.weights(names)
    wanted = sets if choice.library == "diffusers" else {"": sets.get("")}
    return {folder: found for folder, found in wanted.items() if found is not None}


def _tensors(
    repository: Repository, weights: Mapping[str, WeightSet], config: Mapping[str, Any] | None, need: Need
) -> tuple[Tensors | None, dict[str, str], Origin]:
    if not weights:
        return None, {}, "config"
    files, weight_map = weight_files(weights, indexes=False), {}
    if "" in weights and (name := weights[""].index) is not None:
        index = _json(repository, name, MAX_INDEX)
        weight_map = check_index([file.path for file in repository.files], name, index)
        files = sorted(set(weight_map.values()))
        told = need == "sizes" and _format(weights) == "safetensors"
        tensors = _tensors_of_index(index or {}, weight_map, config) if told else None
        if tensors is not None and _counts(repository) == _elements(tensors):  # else nobody has seen the dtypes
            return tensors, {}, "index"
    contents = _headers(repository, [file for file in repository.files if file.path in files], weight_map)
    check_weight_map(f"{repository.repo}'s index", weight_map, contents)
    return contents.outline, contents.tied, "headers"


def _headers(repository: Repository, weights: Sequence[HubFile], weight_map: Mapping[str, str]) -> Contents:
    from concurrent.futures import ThreadPoolExecutor

    guesses: dict[str, int] = {}
    for name, file in weight_map.items():
        guesses[file] = guesses.get(file, 64) + len(name) + ENTRY

    def read(file: HubFile) -> Contents:
        with reading(repository, file, min(guesses.get(file.path, GUESS), MAX_CONFIG)) as (source, name):
            return read_contents(source, name, placed=False)

    with ThreadPoolExecutor(READERS) as pool:
        found = dict(zip((Path(file.path) for file in weights), pool.map(read, weights), strict=True))
    return join_contents(found, _component)


def _component(file: Path) -> str:
    """What the names of a pipeline's tensors begin with, as its modules' names do."""
    return f"{file.parent.name}." if file.parent.name else ""


def describe_pipeline(path: Path, choice: Choice = ANY, among: Collection[str] | None = None) -> ModelDescription:
    """Return the tensors of a pipeline's directory, named as `describe_repository` names them; none without weights.
    choice: of which variant they are. among: the files that count, by relative path; None: all."""
    folders = [path, *(folder for folder in path.iterdir() if folder.is_dir() and not folder.is_symlink())]
    files = [file for folder in folders for file in folder.iterdir() if file.is_file()]
    there = [file.relative_to(path).as_posix() for file in files]
    names = there if among is None else [name for name in there if name in among]
    found = {}
    weights = _weights(names, Choice(library="diffusers", variant=choice.variant))
    for name in weight_files(weights, indexes=False):
        with FileSource(path / name) as source:
            found[Path(name)] = read_contents(source, path / name, placed=False)
    contents = join_contents(found, _component)
    tensors, form = contents.outline or None, _format(weights)
    return ModelDescription(config={}, tensors=tensors, format=form, tied=contents.tied, path=path)


def _format(weights: Mapping[str, WeightSet]) -> FileFormat | None:
    return next((file_format_of(Path(found.files[0])) for found in weights.values() if found.files), None)


def _tensors_of_index(
    index: Mapping[str, Any], weight_map: Mapping[str, str], config: Mapping[str, Any] | None
) -> Tensors | None:
    """Names, dtypes and shapes, where the index and a config of a known family agree about all of them; else None.
    They agree where the names are the same and `total_size` is the sum of bytes in the config's dtype: a tensor of
    another shape or dtype would have to be made up for by another one."""
    if config is None or config.get("quantization_config"):
        return None
    told = index.get("metadata") if "weight_map" in index else None
    dtype, total = config.get("dtype") or config.get("torch_dtype"), (told or {}).get("total_size")
    architecture = known_architecture(config)
    if architecture is None or not isinstance(dtype, str) or not isinstance(total, int | float):
        return None
    dtype = dtype.removeprefix("torch.")
    expected = {tensor.name: (dtype, tensor.shape) for tensor in architecture.tensors() if tensor.persistent}
    try:
        size = sum(tensor_nbytes(dtype, shape) for _, shape in expected.values())
    except KeyError:
        return None
    if set(weight_map) != set(expected) or size != total:
        return None
    return {name: expected[name] for name in weight_map}


DESCRIBED, FOUND = ("config", "format", "tied", "custom"), ("library", "source", "components")
"""Fields of the description and of the model that are remembered as they are."""


def _as_json(model: RemoteModel) -> dict[str, Any]:
    tensors = [[name, dtype, shape] for name, (dtype, shape) in (model.description.tensors or {}).items()]
    described = {name: getattr(model.description, name) for name in DESCRIBED}
    return {**described, "tensors": tensors, **{name: getattr(model, name) for name in FOUND}}


def _from_json(data: Any, repository: Repository) -> RemoteModel | None:
    try:
        tensors = {name: (dtype, tuple(shape)) for name, dtype, shape in data["tensors"]}
        for dtype, shape in tensors.values():
            tensor_nbytes(dtype, shape)
        known = None if data["source"] == "config" else tensors
        described = ModelDescription(tensors=known, **{name: data[name] for name in DESCRIBED})
        return RemoteModel(repository, described, **{name: data[name] for name in FOUND})
    except (KeyError, TypeError, ValueError):
        return None  # nothing, or a damaged memory: asked anew


def _difference(repository: Repository, tensors: Tensors | None, config: Mapping[str, Any] | None) -> str | None:
    """What the Hub counts otherwise than `tensors`, in words.
    None where they agree, where the Hub gives no counts, and where it counts something else: packed formats by the
    values that are packed in them."""
    counted, packed = _counts(repository), bool((config or {}).get("quantization_config"))
    if not counted or not tensors or packed or counted == (found := _elements(tensors)):
        return None
    return f"the Hub counts {_words(counted)}, and the files hold {_words(found)}; the files are believed"


def _counts(repository: Repository) -> dict[str, int]:
    """Safetensors dtype → elements of the plain weights at the root, as the Hub counts them. Empty: it does not."""
    if all(repository.file(name) is None for name in COUNTED):
        return {}
    return {name: count for name, count in (repository.elements or {}).items() if count}


def _elements(tensors: Tensors) -> dict[str, int]:
    """Safetensors dtype → elements."""
    found: dict[str, int] = {}
    for dtype, shape in tensors.values():
        name = SAFETENSORS_NAMES.get(dtype, dtype)
        found[name] = found.get(name, 0) + math.prod(shape)
    return {name: count for name, count in found.items() if count}


def _words(counts: Mapping[str, int]) -> str:
    return " and ".join(f"{count:,} elements of {name}" for name, count in sorted(counts.items())) or "no elements"
