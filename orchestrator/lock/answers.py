"""`<manifest>.lock.answers.gz`: what the sources of a locked recipe said, for plans where they cannot be asked.

gzip of JSON, node → question → answer; the questions and answers are the kinds' own affair (`Pinned.known`). The same
answers give the same bytes, and a file that says them already is not written again.
"""

from __future__ import annotations

import gzip
import json
import shlex
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

from bigpipe.errors import UsageError
from bigpipe.files import parse_json, read_file, write_file
from bigpipe.orchestrator.contract import Json
from bigpipe.redaction import redact_value

LIMIT = 256 * 2**20
"""Bytes of answers, unpacked: those of a model with 400,000 tensors take a tenth."""
Answers = Mapping[str, Mapping[str, Json]]
Illegible = Callable[[UsageError], None]
"""What is done about a file that cannot be read as what it is called."""


def refuse(error: UsageError) -> None:
    raise error


def unmind(error: UsageError) -> None:
    """It is written anew."""


def answers_path(lock: Path) -> Path:
    """Return where the answers of a lock file lie: beside it."""
    return lock.with_name(f"{lock.name}.answers.gz")


def read_answers(lock: Path, illegible: Illegible = refuse) -> Answers:
    """Return node → question → answer; none where there is no such file. Raise UsageError where it is not one.
    illegible: what is done about that instead, by who writes it anew."""
    path = answers_path(lock)
    try:
        text = _unpacked(read_file(path, LIMIT))
        answers = parse_json(text) if len(text) <= LIMIT else None
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, zlib.error) as error:
        illegible(_wrong(lock, str(error)))
        return {}
    if not isinstance(answers, dict) or not all(isinstance(found, dict) for found in answers.values()):
        illegible(_wrong(lock, f"more than {LIMIT} bytes" if answers is None else "no answers by node"))
        return {}
    return answers


def _unpacked(data: bytes) -> bytes:
    """At most one byte more than LIMIT. Raise zlib.error."""
    unpacking = zlib.decompressobj(wbits=31)
    text = unpacking.decompress(data, LIMIT + 1)
    if len(text) <= LIMIT and not unpacking.eof:
        raise zlib.error("it is cut short")
    return text


def writing(lock: Path) -> str:
    """Return the command that writes a lock file."""
    return f"bigpipe lock {shlex.quote(str(lock).removesuffix('.lock'))}"


def again_by(lock: Path) -> str:
    """Return what to do about a lock file that cannot be read: beside no manifest, git perhaps gave it."""
    beside = lock.suffix == ".lock" and lock.with_suffix("").exists()
    return f"write it again: {writing(lock)}" if beside else "name one that `bigpipe lock` wrote"


def _wrong(lock: Path, cause: str) -> UsageError:
    again = f"remove it, or write it again: {writing(lock)}"
    return UsageError(f"{answers_path(lock)} is not what `bigpipe lock` wrote: {cause}", again)


def write_answers(lock: Path, answers: Answers) -> None:
    """Write what is not there already; with nothing to say there is no file. Raise UsageError."""
    path = answers_path(lock)
    try:
        if not answers:
            path.unlink(missing_ok=True)
        elif not path.exists() or _text(read_answers(lock, unmind)) != _text(answers):
            write_file(path, gzip.compress(_text(answers), mtime=0))
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}", "make room, or writable") from error


def _text(answers: Answers) -> bytes:
    return redact_value(json.dumps(answers, sort_keys=True, separators=(",", ":"))).encode()
