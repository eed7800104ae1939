"""Which commit a file belongs to, as git says it: for records of what a recipe was."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .environment import inherited

if TYPE_CHECKING:
    import subprocess

SECONDS = 5.0
"""How long git may take, in a checkout with very many files; then nothing is said."""


class Checkout:
    """The checkout that a file lies in. git starts at once and is waited for when its answer is wanted."""

    def __init__(self, file: Path) -> None:
        self._asked: list[subprocess.Popen[bytes]] = []
        if any((folder / ".git").exists() for folder in file.absolute().parents):
            with suppress(OSError):  # there is no git
                self._asked = [
                    _ask(file, ["status", "--porcelain=v2", "--branch", "--untracked-files=no"]),
                    _ask(file, ["ls-files", "--error-unmatch", "--", file.name]),
                ]

    @cached_property
    def state(self) -> dict[str, Any] | None:
        """`commit`, 40 or 64 hexadecimal digits, and `dirty`: is the file not in it, or anything else changed since?
        None outside a checkout, and where git does not say."""
        answers = [_answer(asked) for asked in self._asked]
        if not answers or answers[0] is None:
            return None
        lines = answers[0].decode(errors="replace").splitlines()
        commit = next((line.split()[-1] for line in lines if line.startswith("# branch.oid ")), "(initial)")
        if commit == "(initial)":
            return None
        changed = any(not line.startswith("#") for line in lines)
        return {"commit": commit, "dirty": changed or answers[1] is None}


@dataclass(frozen=True, slots=True)
class Origin:
    """What a file is in whichever checkout it lies: the same in a second one, and in one that moved."""

    remote: str
    """`github.com/owner/name`, of any protocol and without a password; where there is none, the checkout's folder."""
    inside: str
    """The path of the file from the top of the checkout."""
    top: str
    """The checkout's folder."""


def origin_of(file: Path) -> Origin | None:
    """Return which file of which repository this is; None outside a checkout, and where git does not say."""
    if not any((folder / ".git").exists() for folder in file.absolute().parents):
        return None
    try:
        asked = [_ask(file, ["rev-parse", "--show-toplevel"]), _ask(file, ["config", "--get-regexp", _URLS])]
    except OSError:  # there is no git
        return None
    top, urls = map(_answer, asked)
    if not top:
        return None
    folder = os.fsdecode(top).rstrip("\n")
    named = dict(line.split(" ", 1) for line in os.fsdecode(urls or b"").splitlines() if " " in line)
    url = named.get("remote.origin.url") or next(iter(named.values()), folder)
    inside = os.path.relpath(os.path.realpath(file.absolute().parent), os.path.realpath(folder))
    return Origin(_address(url), os.path.normpath(os.path.join(inside, file.name)), folder)


_URLS = r"^remote\..*\.url$"


def _address(url: str) -> str:
    """`https://user:token@github.com/owner/name.git` and `git@github.com:owner/name` are `github.com/owner/name`."""
    _, separator, rest = url.partition("://")
    if not separator and not re.match(r"[^/]+:", url):
        return os.path.normpath(url)  # a folder
    rest = rest if separator else url.replace(":", "/", 1)
    host, _, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{host.rpartition('@')[2]}/{path.rstrip('/')}".removesuffix(".git")


def _ask(file: Path, question: Sequence[str]) -> subprocess.Popen[bytes]:
    """Nothing that the checkout configures is run for it."""
    import subprocess

    return subprocess.Popen(
        ["git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", *question],
        cwd=file.absolute().parent, env={**inherited(os.environ), "GIT_OPTIONAL_LOCKS": "0"},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def _answer(asked: subprocess.Popen[bytes]) -> bytes | None:
    import subprocess

    try:
        out, _ = asked.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        asked.kill()
        asked.communicate()
        return None
    return out if asked.returncode == 0 else None
