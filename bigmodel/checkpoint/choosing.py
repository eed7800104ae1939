"""Which files of a folder are the model, by their names alone: of a directory, of a Hub's listing, of files to come.

Repositories keep the same weights in several formats, precisions and frameworks side by side. The order is the one in
which transformers and diffusers look, and where it leaves a choice nobody makes one: the names are told.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from bigpipe.errors import InvalidCheckpoint, NoWeights, first_few

BIN_SUFFIXES = (".bin", ".pt", ".pth")
NOT_A_MODEL = re.compile(r"\.|training_args|optimizer|scheduler|scaler|rng_state|random_states|openvino_|ggml")
"""Trainers and other programs leave these beside a model: torch files, or called so, but no weights that are read here.
Hidden ones are what systems leave beside every file."""
NO_WEIGHTS = ("spk_dict.pt",)
"""What loaders read beside the weights, and is called as if it were some: the voices of Qwen2.5-Omni."""
ADAPTER = re.compile(r"adapter|pytorch_lora_weights")
"""What peft, mlx and diffusers call the weights that are added to those of a model."""
ADAPTER_CONFIG = "adapter_config.json"
CONSOLIDATED = "consolidated"
"""How Mistral's and Meta's own programs name the weights that they read, whose tensors have other names."""
NO_PART = (".git", ".gitattributes", ".github", ".gitignore", ".cache")
"""At the top of a clone, which OpenSSF's model signing leaves out too, and of what `hf download --local-dir` brought:
no part of the model."""
OTHERS = (".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".ckpt", ".tflite", ".npz", ".pb", ".nemo", ".mlmodel", ".distcp")

_TOKENIZER_CONFIG = "tokenizer_config.json"
_VOCABULARY = (
    "tokenizer.json", "tokenizer.model*", "vocab.json", "vocab.txt", "*.tiktoken", "spiece.model",
    "sentencepiece*.model",
)  # fmt: skip
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*")
_TOKENIZER = (
    *_VOCABULARY, _TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "merges.txt", *_TEMPLATES,
)  # fmt: skip
_USUAL = (
    ("model", ".safetensors"), ("pytorch_model", ".bin"),
    ("diffusion_pytorch_model", ".safetensors"), ("diffusion_pytorch_model", ".bin"),
)  # fmt: skip
_STEMS = {stem for stem, _ in _USUAL}
_VARIANT = re.compile(r"fp16|bf16|fp32|fp8|non_ema|ema")
"""What is taken for one after a name that is not usual."""
_WEIGHTS = re.compile(
    r"(?P<stem>.+?)(?:\.(?P<variant>\w+))?(?:-(?P<number>\d+)-of-(?P<count>\d+)(?:\.(?P<late>\w+))?)?"
    r"(?P<suffix>\.(?:safetensors|bin|pt|pth))"
)
_INDEX = re.compile(
    r"(?P<stem>.+?)(?:\.(?P<variant>\w+))?(?P<suffix>\.(?:safetensors|bin))(?:\.(?P<late>\w+))?"
    r"\.index(?:\.(?P<last>\w+))?\.json"
)


@dataclass(frozen=True, slots=True)
class WeightSet:
    """The weight files of one model, in order, and the index that tells which tensor is where."""

    files: tuple[str, ...]
    index: str | None = None


@dataclass(frozen=True, slots=True)
class _Name:
    """A file's name, taken apart."""

    whole: str
    stem: str
    suffix: str
    variant: str | None
    number: int = 0
    count: int = 0
    """Of how many shards; 0: it is not one of several."""


def choose_weights(names: Collection[str], where: object, variant: str | None = None) -> WeightSet | None:
    """Return the weights among the names of one folder; None where there are none that are read here.
    variant: as `fp16` in `model.fp16.safetensors`; None: the plain ones, or a variant that is alone.
    Raise InvalidCheckpoint, naming `where`, for shards of which one is missing, and for two sets of equal right."""
    found = [name for name in map(_weight_name, sorted(names)) if name is not None]
    wanted = [name for name in found if name.variant == variant]
    if variant is None and not wanted:
        wanted = found
    if len(told := {name.variant for name in wanted}) > 1:
        raise _ambiguous(where, wanted)
    indexes = [name for name in map(_index_name, sorted(names)) if name.variant in (told or {variant})]
    for stem, suffix in _USUAL:
        usual = [name for name in wanted if (name.stem, name.suffix) == (stem, suffix)]
        index = next((name.whole for name in indexes if (name.stem, name.suffix) == (stem, suffix)), None)
        if usual or index:
            return _set(usual or [name for name in wanted if name.suffix == suffix], index, where)
    if len(indexes) == 1:
        return WeightSet(tuple(name.whole for name in wanted), indexes[0].whole)
    for suffixes in ((".safetensors",), BIN_SUFFIXES):
        if same := [name for name in wanted if name.suffix in suffixes]:
            return _set(same, None, where)
    return None


def _set(names: list[_Name], index: str | None, where: object) -> WeightSet:
    """One file, or else shards: a file that is whole comes before the same in parts."""
    whole = [name for name in names if not name.count]
    if whole and (index is None or whole[0].stem in _STEMS):
        if len(whole) > 1:
            raise _ambiguous(where, whole)
        return WeightSet((whole[0].whole,))
    if index is None:
        if len({(name.stem, name.suffix, name.count) for name in names}) > 1:
            raise _ambiguous(where, names)
        _check_whole(names, where)
    return WeightSet(tuple(name.whole for name in sorted(names, key=lambda name: name.number)), index)


def check_named(files: Iterable[str], index: object) -> None:
    """Raise InvalidCheckpoint where an index names fewer shards of a model than these say themselves that there are: of
    an upload that broke off, or of another version."""
    shards: defaultdict[tuple[object, ...], list[_Name]] = defaultdict(list)
    for name in filter(None, map(_weight_name, sorted(set(files)))):
        shards[name.stem, name.suffix, name.variant, name.count].append(name)
    for same in shards.values():
        if len(same) < (count := same[0].count):
            cause = f"{index}: names {len(same)} of {count} shards ({first_few([each.whole for each in same])})"
            raise InvalidCheckpoint(cause, "fetch the index that belongs to them; the upload may be unfinished")


def _check_whole(shards: list[_Name], where: object) -> None:
    count, there = shards[0].count, [shard.number for shard in shards]
    if sorted(there) not in (list(range(1, count + 1)), list(range(count))):
        cause = f"{where}: holds {len(there)} of {count} shards ({first_few([shard.whole for shard in shards])})"
        raise InvalidCheckpoint(cause, "fetch those that are missing; the upload may be unfinished")


def _ambiguous(where: object, names: Sequence[_Name]) -> InvalidCheckpoint:
    cause = f"{where}: which of {', '.join([name.whole for name in names][:8])} is the model?"
    cure = f"name the one file or index; of a download leave out the others, such as `exclude: [{names[-1].whole}]`"
    return InvalidCheckpoint(cause, cure)


def _weight_name(name: str) -> _Name | None:
    if (match := _WEIGHTS.fullmatch(name)) is None or NOT_A_MODEL.match(name) or ADAPTER.match(name):
        return None
    if name.startswith(CONSOLIDATED) or name in NO_WEIGHTS:
        return None
    return _name(match, int(match["number"] or 0), int(match["count"] or 0))


def _index_name(name: str) -> _Name:
    """An index whose name says nothing has an empty stem; what is none, a variant that nothing has."""
    if (match := _INDEX.fullmatch(name)) is not None:
        return _name(match)
    return _Name(name, "", "", None if is_index(name) else name)


def _name(match: re.Match[str], number: int = 0, count: int = 0) -> _Name:
    parts = match.groupdict()
    stem, variant = match["stem"], match["variant"] or match["late"] or parts.get("last")
    if variant in ("safetensors", "bin"):  # model.safetensors-00001-of-00002.safetensors
        variant = None
    if match["variant"] and variant and stem not in _STEMS and not _VARIANT.fullmatch(variant):
        stem, variant = f"{stem}.{variant}", None
    return _Name(match.string, stem, match["suffix"], variant, number, count)


def refuse_adapter(names: Collection[str], where: object) -> None:
    """Raise InvalidCheckpoint where the files of a folder are a whole model and an adapter beside it: transformers adds
    the one to the other where peft is installed, and reads the model alone where it is not."""
    if ADAPTER_CONFIG not in names or not any(map(_weight_name, sorted(names))):
        return
    raise InvalidCheckpoint(
        f"{where}: holds a model and an adapter ({ADAPTER_CONFIG}); with peft transformers reads both, else the one",
        "leave the adapter out if the model is meant (a download: `exclude: adapter*`), or merge it into the model;"
        " take it alone if the adapter is meant (`include: adapter*`)",
    )


def is_of_tokenizer(name: str) -> bool:
    """Return whether a file, by its relative path, belongs to a tokenizer, or is a chat template."""
    return any(fnmatchcase(name, glob) for glob in _TOKENIZER)


def is_template(name: str) -> bool:
    """Return whether a file, by its relative path, holds a chat template and nothing else."""
    return any(fnmatchcase(name, glob) for glob in _TEMPLATES)


def tokenizer_files(names: Iterable[str]) -> list[str]:
    """Return the files of a whole tokenizer among relative paths, with its chat templates, sorted; none where it lacks
    its config or a vocabulary."""
    found = sorted(filter(is_of_tokenizer, names))
    whole = _TOKENIZER_CONFIG in found and any(fnmatchcase(name, glob) for name in found for glob in _VOCABULARY)
    return found if whole else []


def is_part(name: str) -> bool:
    """Return whether a file, by its relative path, may be a part of a model. What git and the Hub's client keep for
    themselves is none, and the Hub takes none of it."""
    parts = Path(name).parts
    return parts[0] not in NO_PART and not {".git", ".cache"}.intersection(parts)


def is_index(name: str) -> bool:
    """Return whether a file of this name is an index of weight files."""
    return name == "index.json" or bool(re.search(r"\.index(\.\w+)?\.json$", name))


def is_module(folder: str, names: Collection[str]) -> bool:
    """Return whether a folder beside these names is a part of a sentence-transformers model, which its modules.json
    lists: `1_Pooling`, `2_Dense`. Such a part may have weights of its own."""
    return "modules.json" in names and re.fullmatch(r"[0-9]+_\w+", folder) is not None


def variants(names: Iterable[str]) -> list[str]:
    """Return the variants of weights that there are, sorted."""
    found = {name.variant for name in map(_weight_name, names) if name is not None}
    return sorted(variant for variant in found if variant)


def no_weights(where: object, names: Collection[str]) -> NoWeights:
    """Return the error for files, by relative path, among which no weights are found that are read here."""
    for told in _told(sorted(names)):
        return NoWeights(f"{where}: {told[0]}", told[1])
    return NoWeights(f"{where}: no weights were found", "name one with .safetensors or torch .bin files")


def _told(names: list[str]) -> Iterator[tuple[str, str]]:
    root = [name for name in names if "/" not in name]
    suffixes = (".safetensors", *BIN_SUFFIXES)
    if away := [name for name in root if name.removesuffix(".dvc").endswith(suffixes) and name.endswith(".dvc")]:
        yield f"its weights are tracked by DVC ({first_few(away)}), and not here", "run `dvc pull`"
    if adapters := [name for name in root if ADAPTER.match(name) and name.endswith(suffixes)]:
        cause = f"holds an adapter ({first_few(adapters)}), which is not a model by itself"
        yield cause, "merge it into the model that it was trained for (the stage kind `merge`), and give that"
    if gguf := [name for name in root if name.endswith(".gguf")]:
        cause = f"its weights are GGUF ({first_few(gguf)}), which is not read here"
        yield cause, "give the model that they were made of, with .safetensors or torch .bin files"
    if own := [name for name in root if name.startswith(CONSOLIDATED) and name.endswith(suffixes)]:
        cause = f"its weights ({first_few(own)}) are named for Mistral's or Meta's own program, which is not read here"
        yield cause, "give the same model as transformers reads it (model*.safetensors), or the one file by its name"
    if others := [name for name in root if name.endswith(OTHERS)]:
        yield (
            f"its weights ({first_few(others)}) are of a kind that is not read here",
            "give .safetensors or torch .bin",
        )
    if below := sorted({Path(name).parent.as_posix() for name in names if "/" in name and name.endswith(suffixes)}):
        cure = f"it has weights in {first_few(below)}; open one of these (a download: `subfolder`)"
        yield "no weights were found", cure
