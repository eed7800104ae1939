"""Which of a repository's files a model needs: one weight format, the configs, the tokenizer.

Repositories keep the same weights in several formats, precisions and frameworks side by side; taking all of them would
double or triple the bytes. The rules follow what transformers, diffusers and timm load by themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath as Name
from typing import Any, Literal

from bigpipe.bigmodel.checkpoint import NOT_A_MODEL
from bigpipe.errors import InvalidCheckpoint, UsageError, first_few

Library = Literal["transformers", "diffusers", "timm"]

SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".spm", ".vocab")
SIDE_NAMES = ("README.md", "LICENSE*", "NOTICE*")
VARIANT = re.compile(r".+\.(fp16|bf16|fp32|non_ema|ema)(-\d+-of-\d+)?")
SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which files of a model to take.
    include: globs over whole relative paths (`*` crosses `/`, as on the Hub); given, they replace the rules here.
    exclude: globs taken away in either case. library: whose rules; left out, as `detect` finds."""

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    library: Library | None = None

    def among(self, names: Iterable[str], hint: str | None = None) -> list[str]:
        """Return the names to take, sorted. hint: the library that the Hub's metadata names.
        Raise UsageError where a glob of `include` matches nothing, or nothing is left."""
        names = sorted(names)
        for glob in self.include:
            if not any(fnmatchcase(name, glob) for name in names):
                cause = f"include: {glob!r} matches none of {len(names)} files"
                raise UsageError(cause, f"there are {first_few(names)}")
        wanted = [name for name in names if _matches(name, self.include)]
        if not self.include:
            wanted = _needed(names, self.library or detect(names, hint=hint))
        left = [name for name in wanted if not _matches(name, self.exclude)]
        if not left:
            raise UsageError("no file is left to take", f"there are {first_few(names)}; see include and exclude")
        return left


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


def check_index(names: Iterable[str], index_name: str, index: Any) -> None:
    """Raise InvalidCheckpoint unless every shard that an index names is among the files."""
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InvalidCheckpoint(f"{index_name} has no weight_map", "fetch the model again, or from another revision")
    folder = Name(index_name).parent
    below = {Name(name).name if Name(name).parent == folder else name for name in names}
    missing = sorted(set(weight_map.values()) - below)
    if missing:
        cure = "the upload may be unfinished: choose another revision, or widen include"
        raise InvalidCheckpoint(f"{index_name} names {first_few(missing)}, which is not there", cure)


def _needed(names: list[str], library: Library) -> list[str]:
    """Root files only, for diffusers also the folders of its components."""
    folders: dict[Name, list[Name]] = {}
    for name in map(Name, names):
        if library == "diffusers" or len(name.parts) == 1:
            folders.setdefault(name.parent, []).append(name)
    chosen: list[Name] = []
    for beside in folders.values():
        weights = _weights(beside)
        chosen += weights
        chosen += [name for name in beside if _is_side_file(name) and not _indexes_others(name, weights)]
    return sorted(map(str, chosen))


def _is_side_file(name: Name) -> bool:
    return not name.name.startswith(".") and (name.name.endswith(SIDE_SUFFIXES) or _matches(name.name, SIDE_NAMES))


def _indexes_others(name: Name, weights: list[Name]) -> bool:
    """Is this the index of weights that were not chosen?"""
    if not name.name.endswith(".index.json"):
        return False
    indexed = Name(name.name.removesuffix(".index.json"))
    return not any((_stem(w), w.suffix) == (indexed.stem, indexed.suffix) for w in weights if SHARD.fullmatch(w.stem))


def _stem(name: Name) -> str:
    """`model-00001-of-00003.safetensors` → `model`."""
    shard = SHARD.fullmatch(name.stem)
    return shard["stem"] if shard else name.stem


def _weights(beside: list[Name]) -> list[Name]:
    """One set of weights among the files of one folder: safetensors before .bin, the plain name before variants."""
    for suffix in (".safetensors", ".bin"):
        files = [name for name in beside if name.suffix == suffix and not NOT_A_MODEL.match(name.name)]
        files = [name for name in files if not VARIANT.fullmatch(name.stem)] or files
        for stem in ("model", "pytorch_model", "diffusion_pytorch_model"):
            named = [name for name in files if _stem(name) == stem]
            if named:
                return [name for name in named if not SHARD.fullmatch(name.stem)] or named
        # Mistral's own format lies beside the one that transformers reads, and is the same weights again.
        files = [name for name in files if not _stem(name).startswith("consolidated")] or files
        if files:
            return files
    return []
