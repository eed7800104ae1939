"""Which of a repository's files a model needs: one weight format, the configs, the tokenizer.

Repositories keep the same weights in several formats, precisions and frameworks side by side; taking all of them would
double or triple the bytes. The rules follow what transformers, diffusers and timm load by themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any, Literal

from bigpipe.errors import InvalidCheckpoint, UsageError, first_few

Library = Literal["transformers", "diffusers", "timm"]

SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".spm", ".vocab")
SIDE_NAMES = ("README.md", "LICENSE*", "NOTICE*")
NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states)\b.*")
"""What trainers leave beside a model: torch files, but no weights."""
VARIANT = re.compile(r".+\.(fp16|bf16|fp32|non_ema|ema)(-\d+-of-\d+)?")
SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}")


def select(
    names: Iterable[str],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    library: Library | None = None,
) -> list[str]:
    """The names to take, sorted.

    include: globs over whole relative paths (`*` crosses `/`, as on the Hub); given, they replace the choice below.
    exclude: globs taken away in either case.
    Raises UsageError where a glob of `include` matches nothing, or nothing is left.
    """
    names = sorted(names)
    for glob in include:
        if not any(fnmatchcase(name, glob) for name in names):
            raise UsageError(f"include: {glob!r} matches none of {len(names)} files", f"there are {first_few(names)}")
    wanted = [name for name in names if matches(name, include)] if include else _needed(names, library or detect(names))
    left = [name for name in wanted if not matches(name, exclude)]
    if not left:
        raise UsageError("no file is left to take", f"there are {first_few(names)}; see include and exclude")
    return left


def matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def detect(names: Iterable[str], config: dict[str, Any] | None = None, hint: str | None = None) -> Library:
    """Whose model this is: diffusers has a `model_index.json`; timm's config names an `architecture`, not a model type.

    hint: the library the Hub's own metadata names.
    """
    if "model_index.json" in set(names):
        return "diffusers"
    if hint == "timm" or (config is not None and "architecture" in config and "model_type" not in config):
        return "timm"
    return "transformers"


def check_index(names: Iterable[str], index_name: str, index: Any) -> None:
    """Every shard an index names must be among the files. Raises InvalidCheckpoint."""
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InvalidCheckpoint(f"{index_name} has no weight_map", "fetch the model again, or from another revision")
    folder = _folder(index_name)
    below = {_base(name) if _folder(name) == folder else name for name in names}
    missing = sorted(set(weight_map.values()) - below)
    if missing:
        raise InvalidCheckpoint(
            f"{index_name} names {first_few(missing)}, which is not there",
            "the upload may be unfinished: choose another revision, or widen include",
        )


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _bare(name: str) -> str:
    """`a/model.fp16.bin` → `model.fp16`."""
    base = _base(name)
    return base.rpartition(".")[0] or base


def _needed(names: list[str], library: Library) -> list[str]:
    """Root files only, for diffusers also the folders of its components."""
    reachable = names if library == "diffusers" else [name for name in names if "/" not in name]
    chosen: list[str] = []
    for folder in dict.fromkeys(_folder(name) for name in reachable):
        beside = [name for name in reachable if _folder(name) == folder]
        weights = _weights(beside)
        chosen += weights
        chosen += [name for name in beside if _is_side_file(name) and not _indexes_others(name, weights)]
    return sorted(chosen)


def _is_side_file(name: str) -> bool:
    base = _base(name)
    return not base.startswith(".") and (base.endswith(SIDE_SUFFIXES) or matches(base, SIDE_NAMES))


def _indexes_others(name: str, weights: list[str]) -> bool:
    """Is this the index of weights that were not chosen?"""
    if not name.endswith(".index.json"):
        return False
    indexed = PurePosixPath(name.removesuffix(".index.json"))
    shards = [w for w in weights if _stem(w) == indexed.stem and SHARD.fullmatch(PurePosixPath(w).stem)]
    return not any(PurePosixPath(shard).suffix == indexed.suffix for shard in shards)


def _is_weight(name: str, suffix: str) -> bool:
    return name.endswith(suffix) and not NO_WEIGHTS.fullmatch(_base(name))


def _stem(name: str) -> str:
    """`model-00001-of-00003.safetensors` → `model`."""
    stem = _bare(name)
    shard = SHARD.fullmatch(stem)
    return shard["stem"] if shard else stem


def _weights(beside: list[str]) -> list[str]:
    """One set of weights among the files of one folder: safetensors before .bin, the plain name before variants."""
    for suffix in (".safetensors", ".bin"):
        files = [name for name in beside if _is_weight(name, suffix)]
        plain = [name for name in files if not VARIANT.fullmatch(_bare(name))]
        files = plain or files
        for stem in ("model", "pytorch_model", "diffusion_pytorch_model"):
            named = [name for name in files if _stem(name) == stem]
            single = [name for name in named if not SHARD.fullmatch(_bare(name))]
            if named:
                return single or named
        # Mistral's own format lies beside the one that transformers reads, and is the same weights again.
        files = [name for name in files if not _stem(name).startswith("consolidated")] or files
        if files:
            return files
    return []
