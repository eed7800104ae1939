"""Which of a repository's files a model needs: one weight format, the configs, the tokenizer.

Repositories keep the same weights in several formats, precisions and frameworks side by side; taking all of them would
double or triple the bytes. The rules follow what transformers, diffusers and timm load by themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath as Name
from typing import Any, Literal

from bigpipe.bigmodel.checkpoint import (
    ADAPTER_CONFIG,
    NO_WEIGHTS,
    WeightSet,
    adapter_weights,
    check_named,
    choose_weights,
    is_index,
    is_module,
    is_part,
    no_weights,
    refuse_adapter,
    tokenizer_files,
    variants,
)
from bigpipe.errors import InvalidCheckpoint, UsageError, first_few

Library = Literal["transformers", "diffusers", "timm"]

SIDE_SUFFIXES = (
    ".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".spm", ".vocab", ".bpe", ".codes", ".tokenizer",
)  # fmt: skip
LEGAL = ("README.md", "LICENSE*", "NOTICE*", "COPYING*", "USE_POLICY*")
SIDE_NAMES = (*LEGAL, "tokenizer.model.*", "*.ttf")
"""A processor of videos may bring the font in which it writes their seconds (Ernie 4.5 VL)."""
SIDE_FOLDERS = ("additional_chat_templates/*", "custom_generate/*", "speaker_embeddings/*")
"""Where transformers keeps chat templates besides the first, `generate` of the model's own, and Bark's voices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which files of a model to take.
    include: globs over whole relative paths (`*` crosses `/`, as on the Hub); given, they replace the rules here. What
    git and the Hub's client keep is taken only by one that begins with a dot.
    exclude: globs of what is left out before anything is chosen. library: whose rules; left out, as `detect` finds.
    variant: of the weights, as `fp16` in `model.fp16.safetensors`; of a pipeline's parts, where they have it."""

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    library: Library | None = None
    variant: str | None = None

    def among(self, names: Iterable[str], hint: str | None = None) -> list[str]:
        """Return the names to take, sorted. hint: the library that the Hub's metadata names.
        Raise UsageError where a glob of `include` matches nothing, nothing is left, or no weights are of the variant;
        InvalidCheckpoint where there are several models, or not all shards of one."""
        names = sorted(names)
        for glob in self.include:
            if not any(fnmatchcase(name, glob) for name in names):
                cause = f"include: {glob!r} matches none of {len(names)} files"
                raise UsageError(cause, f"there are {first_few(names)}", field="include")
        left = _without(names, self.exclude)
        if self.include:
            left = [name for name in left if any(_takes(glob, name) for glob in self.include)]
        else:
            left = adapter_files(left) or self._model_files(left, hint)
        if not left and not (self.include or self.exclude):
            raise no_weights("this model", names)
        if not left:
            raise UsageError("no file is left to take", f"there are {first_few(names)}; see include and exclude")
        refuse_adapter([name for name in left if "/" not in name], "the model's folder")
        return left

    def _model_files(self, names: list[str], hint: str | None) -> list[str]:
        sets = self.weights(names, hint)
        return sorted({*_side_files(names, set(sets)), *weight_files(sets)})

    def weights(self, names: Iterable[str], hint: str | None = None) -> dict[str, WeightSet | None]:
        """Return folder → its weights, for each folder that the library reads: `` is the root. Raise as `among`."""
        names = list(names)
        below = _folders(names, self.library or detect(names, hint=hint))
        found = {folder: choose_weights(beside, folder or "this model") for folder, beside in below.items()}
        if self.variant is None:
            return found
        wanted = {
            folder: choose_weights(beside, folder or "this model", self.variant) for folder, beside in below.items()
        }
        if not any(wanted.values()):
            there = first_few(variants(Name(name).name for name in names))
            cause = f"variant: there are no weights of {self.variant!r}"
            raise UsageError(cause, f"there are {there or 'none'}", field="variant")
        return {folder: wanted[folder] or weights for folder, weights in found.items()}


ANY = Choice()
"""What the library itself would take."""


def weight_files(sets: Mapping[str, WeightSet | None], *, indexes: bool = True) -> list[str]:
    """Return the relative paths of the weights in folders, and of their indexes."""
    chosen = [(folder, found) for folder, found in sets.items() if found is not None]
    named = [(folder, (*found.files, found.index if indexes else None)) for folder, found in chosen]
    return [_join(folder, name) for folder, names in named for name in names if name]


def adapter_files(names: Iterable[str]) -> list[str]:
    """Return the files of an adapter at the root, sorted, and of the tokenizer with which it was trained; none where
    what is there is no adapter of peft's, or a model too."""
    names = list(names)
    root = [name for name in names if "/" not in name]
    weights = adapter_weights(root)
    beside = [name for name in root if _matches(name, LEGAL)]
    return sorted([ADAPTER_CONFIG, weights, *beside, *tokenizer_files(names)]) if weights is not None else []


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _without(names: list[str], exclude: Sequence[str]) -> list[str]:
    """The names that nobody left out. An index goes with the last of the weights that it may name."""
    left = [name for name in names if not _matches(name, exclude)]
    gone = {_beside(name) for name in names if not is_index(name)} - {
        _beside(name) for name in left if not is_index(name)
    }
    return [name for name in left if not is_index(name) or _beside(name) not in gone]


def _beside(name: str) -> tuple[str, str]:
    """The folder and the ending of weights, or of those that an index of this name is about."""
    folder, _, file = name.rpartition("/")
    return folder, Name(file.partition(".index")[0]).suffix


def _takes(glob: str, name: str) -> bool:
    return fnmatchcase(name, glob) and (glob.startswith(".") or is_part(name))


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def detect(names: Iterable[str], config: dict[str, Any] | None = None, hint: str | None = None) -> Library:
    """Return whose model this is. diffusers has a `model_index.json`; timm names an `architecture`, and no model type.
    hint: the library the Hub's own metadata names."""
    if "model_index.json" in set(names):
        return "diffusers"
    if hint == "timm" or (config is not None and "architecture" in config and "model_type" not in config):
        return "timm"
    return "transformers"


def check_index(names: Iterable[str], index_name: str, index: Any) -> dict[str, str]:
    """Return tensor → shard of an index, which is transformers' or accelerate's bare one. Raise InvalidCheckpoint
    unless every shard that it names is among the files, and it names all of them."""
    weight_map = index.get("weight_map", index) if isinstance(index, dict) else None
    if not weight_map or not isinstance(weight_map, dict) or not all(isinstance(at, str) for at in weight_map.values()):
        raise InvalidCheckpoint(f"{index_name} has no weight_map", "fetch the model again, or from another revision")
    folder = Name(index_name).parent
    below = {Name(name).name if Name(name).parent == folder else name for name in names}
    missing = sorted(set(weight_map.values()) - below)
    if missing:
        cure = (
            "the upload may be unfinished: choose another revision, widen include, or, offline, run once with a network"
        )
        raise InvalidCheckpoint(f"{index_name} names {first_few(missing)}, which is not there", cure)
    check_named(weight_map.values(), index_name)
    return dict(weight_map)


def _folders(names: list[str], library: Library) -> dict[str, list[str]]:
    """Folder → the names in it, of those whose weights are read: the root; of a pipeline those below it; of
    sentence-transformers also those of its modules."""
    folders: dict[str, list[str]] = {}
    there = frozenset(names)
    for name in names:
        folder, _, file = name.rpartition("/")
        if library == "diffusers":
            wanted = folder.count("/") == 0 and folder != ""  # single files of whole pipelines lie in the root
        else:
            wanted = folder == "" or is_module(folder, there)
        if wanted:
            folders.setdefault(folder, []).append(file)
    return folders


def _side_files(names: list[str], folders: Collection[str]) -> list[str]:
    """Configs, tokenizer, licence and code in the folders whose weights are read, and the root; and what loaders keep
    in folders of its own."""
    found = [Name(name) for name in names if not is_index(name) and not Name(name).name.startswith(".")]
    wanted = {*folders, ""}
    return [
        str(name)
        for name in found
        if _matches(str(name), SIDE_FOLDERS)
        or (str(name.parent).removeprefix(".") in wanted and _is_side_file(name.name))
    ]


def _is_side_file(name: str) -> bool:
    return name.endswith(SIDE_SUFFIXES) or _matches(name, SIDE_NAMES) or name in NO_WEIGHTS
