"""`<manifest>.lock.answers.gz`: what the sources of a locked recipe said, for plans where they cannot be asked.

gzip of JSON, node → question → answer; the questions and answers are the kinds' own affair (`Pinned.known`). The same
answers give the same bytes, and a file that says them already is not written again.
"""

from __future__ import annotations

import gzip
import json
import shlex
import zlib
from collections.abc import Mapping
from pathlib import Path

from bigpipe.errors import UsageError
from bigpipe.files import parse_json, read_file, write_file
from bigpipe.orchestrator.contract import Json
from bigpipe.redaction import redact_value

LIMIT = 256 * 2**20
"""Bytes of answers, unpacked: those of a model with 400,000 tensors take a tenth."""
Answers = Mapping[str, Mapping[str, Json]]


def answers_path(lock: Path) -> Path:
    """Return where the answers of a lock file lie: beside it."""
    return lock.with_name(f"{lock.name}.answers.gz")


def read_answers(lock: Path) -> Answers:
    """Return node → question → answer; none where there is no such file. Raise UsageError where it is not one."""
    path = answers_path(lock)
    try:
        text = _unpacked(read_file(path, LIMIT))
        answers = parse_json(text) if len(text) <= LIMIT else None
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, zlib.error) as error:
        raise _wrong(lock, str(error)) from error
    if not isinstance(answers, dict) or not all(isinstance(found, dict) for found in answers.values()):
        raise _wrong(lock, f"more than {LIMIT} bytes" if answers is None else "no answers by node")
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


def _wrong(lock: Path, cause: str) -> UsageError:
    again = f"remove it, or write it again: {writing(lock)}"
    return UsageError(f"{answers_path(lock)} is not what `bigpipe lock` wrote: {cause}", again)


def write_answers(lock: Path, answers: Answers) -> None:
    """Write what is not there already; with nothing to say there is no file. Raise UsageError."""
    path = answers_path(lock)
    try:
        if not answers:
            path.unlink(missing_ok=True)
        elif not path.exists() or _text(read_answers(lock)) != _text(answers):
            write_file(path, gzip.compress(_text(answers), mtime=0))
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}", "make room, or writable") from error


def _text(answers: Answers) -> bytes:
    return redact_value(json.dumps(answers, sort_keys=True, separators=(",", ":"))).encode()
