"""Which files of a directory make a checkpoint, and which may be opened at all.

File names come from a repository somebody else wrote: an index may name `../secret`, a link may lead anywhere, a file
may be a FIFO. Only regular files are opened, and links only where they lead into the checkpoint itself, or to what the
store, a Hub cache, DVC or git-annex keeps by its digest (that is how all of them leave links).
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bigpipe.errors import InvalidCheckpoint

from .choosing import (
    BIN_SUFFIXES,
    NO_WEIGHTS,
    check_named,
    choose_weights,
    is_index,
    is_module,
    no_weights,
    refuse_adapter,
)
from .tensors import FETCH_AGAIN, OUR_LIMIT, invalid

FileFormat = Literal["safetensors", "bin"]

WEIGHT_SUFFIXES = frozenset({
    ".safetensors", *BIN_SUFFIXES, ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ot", ".npz", ".tflite",
    ".pb",
})  # fmt: skip
UNFINISHED = (".part", ".partial", ".incomplete", ".lock")
POINTER_SIZE = 1024
"""Bytes. A pointer of git-lfs is smaller."""
MAX_INDEX = 32 * 2**20
"""Bytes. 60 layers of 384 experts, of three matrices in three tensors each, have names and files of 23 million."""
MAX_CONFIG = 10_000_000


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """What to read: the files in order and, where there is an index, the file of each tensor."""

    format: FileFormat
    files: tuple[Path, ...]
    weight_map: dict[str, str] = field(default_factory=dict)
    index: Path | None = None


def find_weight_files(path: Path, coming: Collection[str] = (), *, among: Collection[str] | None = None) -> WeightFiles:
    """Return the weight files of a directory, of an index file, or the one file itself. Raise InvalidCheckpoint.
    In a directory safetensors comes before `.bin`, and the usual names before others.
    coming: names of weight files that count as if they were there already. among: the names of those that count of what
    is there; None: all."""
    if path.is_dir():
        names = os.listdir(path) if among is None else [name for name in among if "/" not in name]
        here = {name for name in names if not (path / name).is_dir()}.union(coming)
        chosen = choose_weights(here, path)
        if chosen is None:
            nested = (file.relative_to(path).as_posix() for file in path.glob("*/*"))
            raise no_weights(path, {*os.listdir(path), *nested})
        refuse_adapter(here, path)
        if chosen.index is None:
            return _read_files(tuple(path / name for name in chosen.files), path, coming)
        file = path / chosen.index
    elif path.exists():
        file = path
    else:
        raise InvalidCheckpoint(f"{path}: there is no such file or directory", "give the path of a checkpoint")
    if file.name.endswith(".json"):
        if not is_index(file.name) and "weight_map" not in read_json(file, file.parent, MAX_INDEX):
            raise InvalidCheckpoint(f"{file}: is no index of weight files", "give its directory, or a weight file")
        return _read_index(file, file.parent, coming)
    return _read_files((file,), file.parent, coming)


def _read_files(files: tuple[Path, ...], directory: Path, coming: Collection[str]) -> WeightFiles:
    for file in files:
        if file.name not in coming:
            check_file(file, directory)
    return WeightFiles(file_format_of(files[0]), files)


def file_format_of(file: Path) -> FileFormat:
    """Return the format by the suffix. Raise InvalidCheckpoint for one that is not read here."""
    if file.suffix == ".safetensors":
        return "safetensors"
    if file.suffix in BIN_SUFFIXES:
        return "bin"
    cause = f"{file}: {file.suffix or 'no suffix'} is no format bigpipe reads"
    raise InvalidCheckpoint(cause, "give .safetensors, .bin, .pt or .pth")


def _read_index(index: Path, directory: Path, coming: Collection[str]) -> WeightFiles:
    """An index in transformers' form `{"weight_map": {tensor: file}}` or accelerate's bare `{tensor: file}`."""
    content = read_json(index, directory, MAX_INDEX, unique=True)
    weight_map = content.get("weight_map", content)
    if not isinstance(weight_map, dict) or not weight_map:
        raise invalid(index, "has no weight_map", FETCH_AGAIN)
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]", name):
            cause = f"names the file {str(name)[:200]!r}, which is not a plain file name"
            cure = "an index may only name files beside it; do not use this checkpoint"
            raise invalid(index, cause, cure, tensor=tensor)
    files = tuple(directory / name for name in sorted(set(weight_map.values())))
    for file in (file for file in files if file.name not in coming):
        if not os.path.lexists(file):
            raise invalid(index, f"names {file.name}, which is not there", "fetch the missing file")
        check_file(file, directory)
    check_named(weight_map.values(), index)
    formats = {file_format_of(file) for file in files}
    if len(formats) > 1:
        raise invalid(index, "mixes safetensors and torch files", "save the model in one format")
    return WeightFiles(formats.pop(), files, weight_map, index)


def read_json(file: Path, directory: Path, limit: int, *, unique: bool = False) -> dict[str, Any]:
    """Return a JSON object from a file of the checkpoint, of at most `limit` bytes. Raise as `parse_object`."""
    return parse_object(_read(file, directory, limit), file, unique=unique)


def read_json_list(file: Path, directory: Path, limit: int) -> list[Any]:
    """Return a JSON list from a file of the checkpoint, of at most `limit` bytes. Raise as `parse_object`."""
    content = _parse(_read(file, directory, limit), file)
    if not isinstance(content, list):
        raise invalid(file, "is not a JSON list", FETCH_AGAIN)
    return content


def _read(file: Path, directory: Path, limit: int) -> bytes:
    check_file(file, directory)
    if file.stat().st_size > limit:
        raise invalid(file, f"is larger than {limit} bytes", OUR_LIMIT)
    return file.read_bytes()


def parse_object(text: bytes, file: Path | str, *, unique: bool = False) -> dict[str, Any]:
    """Return a JSON object; of a key that stands twice the last, as everybody reads a config.
    unique: of an index, where it would be two places of one tensor. Raise InvalidCheckpoint, naming `file`."""
    content = _parse(text, file, unique)
    if not isinstance(content, dict):
        raise invalid(file, "is not a JSON object", FETCH_AGAIN)
    return content


def _parse(text: bytes, file: Path | str, unique: bool = False) -> Any:
    refuse_pointer(text[:POINTER_SIZE], file)
    try:
        return json.loads(text, object_pairs_hook=unique_keys if unique else None)
    except (ValueError, RecursionError) as error:
        raise invalid(file, f"is not JSON: {str(error)[:200]}", FETCH_AGAIN) from None


def refuse_pointer(beginning: bytes, file: Path | str) -> None:
    """Raise InvalidCheckpoint where a file is what git-lfs or git-annex leaves in place of one that was not fetched.
    Formats: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md, https://git-annex.branchable.com/internals/pointer_file/"""
    if re.match(rb"(\.\./)*(\.git)?/?annex/objects/\S+\s*$", beginning):
        raise invalid(file, "is a pointer of git-annex, and what it points to is not here", "run `git annex get .`")
    if beginning.startswith(b"version https://git-lfs.github.com/spec/"):
        cause = "is a pointer of git-lfs: the repository was cloned without its large files"
        raise invalid(file, cause, "run `git lfs pull` in the repository, or download them")


def check_fetched(file: Path) -> None:
    """Raise as `refuse_pointer`, by what the file holds."""
    if file.stat().st_size < POINTER_SIZE:
        refuse_pointer(file.read_bytes(), file)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object. Raise ValueError where a key stands twice."""
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return content


def check_file(file: Path, directory: Path) -> None:
    """Raise InvalidCheckpoint unless `file` is a regular file that may be opened for a checkpoint in `directory`."""
    try:
        target = Path(os.path.realpath(file, strict=True))
        mode = target.stat().st_mode
    except OSError as error:
        real = os.path.realpath(file)
        if cure := next((cure for place, cure in NOT_FETCHED.items() if place in real), ""):
            raise invalid(file, f"is a link to {real}, which is not there", cure) from None
        raise invalid(file, f"cannot be opened: {error.strerror}", "fetch the file again") from None
    if not stat.S_ISREG(mode):
        raise invalid(file, "is not a regular file", "do not use this checkpoint")
    root = Path(os.path.realpath(directory))
    if not (target.is_relative_to(root) or _is_store(root) or _is_kept_by_digest(target)):
        cure = "copy the file into the checkpoint, or do not use this checkpoint"
        raise invalid(file, f"is a link to {target}, outside the checkpoint", cure)


NOT_FETCHED = dict.fromkeys(("/files/md5/", "/.dvc/"), "run `dvc pull`") | {"/annex/objects/": "run `git annex get .`"}
"""Where a link leads that its program left for a file that is not here → how it comes."""


def _is_kept_by_digest(target: Path) -> bool:
    """Whose name is what its bytes are, in a place where only a program puts files: nobody keeps a key of theirs so,
    and nobody who does not know the bytes can name them."""
    return is_object(target) or is_hub_blob(target) or _is_versioned(target)


def _is_versioned(target: Path) -> bool:
    # DVC: <cache>/files/md5/4d/7a…, before 3.0 .dvc/cache/4d/7a…; git-annex: .git/annex/objects/…/KEY/KEY
    path = target.as_posix()
    in_dvc = re.search(r"(/files/md5|/\.dvc/cache)/[0-9a-f]{2}/[0-9a-f]{16,}$", path)
    in_annex = re.search(r"/annex/objects/([^/]+/){1,2}([A-Z0-9_]+(-[sSmC][0-9]+)*--[^/]+)/\2$", path)
    return in_dvc is not None or in_annex is not None


def is_hub_blob(target: Path) -> bool:
    # <cache>/models--org--name/blobs/<sha1 or sha256>
    kind = re.match(r"(models|datasets|spaces)--", target.parent.parent.name)
    return target.parent.name == "blobs" and bool(re.fullmatch(r"[0-9a-f]{40}([0-9a-f]{24})?", target.name) and kind)


def is_object(target: Path) -> bool:
    # <store>/objects/…/<sha256>
    return "objects" in target.parts[-4:-1] and bool(re.fullmatch(r"[0-9a-f]{60,64}", target.name))


def _is_store(directory: Path) -> bool:
    # <store>/artifacts/<sha256>, <store>/work/<sha256>/out: these links were made here, not by whoever made the model.
    within = not {"artifacts", "work"}.isdisjoint(directory.parts[-3:-1])
    return within and any(re.fullmatch(r"[0-9a-f]{64}", part) for part in directory.parts[-2:])


def side_files(directory: Path) -> tuple[Path, ...]:
    """Return what travels with the weights: configs, tokenizer, licence, code. Links are checked as for weights."""
    found: list[Path] = []
    for folder, folders, names in os.walk(directory):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        weights = {name for name in names if Path(name).suffix in WEIGHT_SUFFIXES and name not in NO_WEIGHTS}
        if Path(folder).parent == directory and is_module(Path(folder).name, os.listdir(directory)):
            weights = set()  # those of a part of this model
        if weights and Path(folder) != directory:
            folders.clear()
            continue  # another model, or this one in another format
        side = [
            name for name in sorted(names) if name not in weights and not name.startswith(".") and not is_index(name)
        ]
        found += [Path(folder, name) for name in side if not name.endswith(UNFINISHED)]
    for file in found:
        check_file(file, directory)
    return tuple(found)
