"""Digests: of JSON values in one canonical form, and of files.

Every digest of a value carries a tag, so that two kinds of things that look alike (a key and a tree, say) can never
have the same digest.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from bigpipe.orchestrator.contract import Json

CHUNK = 4 * 2**20
"""Bytes read at a time. Large enough that system calls cost nothing, small enough for the second-level cache."""
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical(value: Json) -> bytes:
    """Return the one UTF-8 JSON text of a value: keys sorted, no spaces, tuples as lists.

    Different values have different texts: `1`, `1.0`, `true` and `"1"` stay apart.

    Raise ValueError for NaN and infinities, TypeError for what JSON has no word for (maps with keys that are not
    strings among them: `{1: …}` and `{"1": …}` would look the same).
    """
    _refuse_other_keys(value)
    # File names may hold bytes that are no UTF-8, which Python keeps as lone surrogates; `surrogatepass` keeps them
    # apart from the characters that a pair of `\ud800\udc00` escapes would stand for.
    return _ENCODER.encode(value).encode("utf-8", "surrogatepass")


def _refuse_other_keys(value: Json) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} of a map is not a string")
            if isinstance(item, (dict, list, tuple)):
                _refuse_other_keys(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _refuse_other_keys(item)


def digest_of(tag: str, value: Json) -> str:
    """Return `sha256:…` of the canonical JSON of `[tag, value]`."""
    return "sha256:" + hashlib.sha256(canonical([tag, value])).hexdigest()


def hex_of(digest: str) -> str:
    """Return the 64 hex digits of `sha256:…`, safe as a file name. Raise ValueError for anything else."""
    algorithm, _, digits = digest.partition(":")
    if algorithm != "sha256" or not is_hex(digits):
        raise ValueError(f"{digest!r} is not a digest such as sha256:0123…")
    return digits


def is_hex(text: str) -> bool:
    """Return whether it is a sha256 as 64 lowercase hex digits."""
    return len(text) == 64 and not text.strip("0123456789abcdef")


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's bytes in hex. Raise OSError; never takes an I/O error for an end of file."""
    return hash_and_facts(path)[0]


def hash_and_facts(path: str | Path) -> tuple[str, os.stat_result, os.stat_result]:
    """Return what `hash_file` does, and what `stat` said of the file before and after it was read."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        state, before = hashlib.sha256(), os.fstat(descriptor)
        buffer = memoryview(bytearray(min(CHUNK, max(1, before.st_size))))
        while count := os.readv(descriptor, [buffer]):
            state.update(buffer[:count])
        return state.hexdigest(), before, os.fstat(descriptor)
    finally:
        os.close(descriptor)
