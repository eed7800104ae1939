"""A Hub that lies ends in a documented error, or in the right bytes: in bounded seconds and bytes, and nowhere else."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.enemy import TOKEN, Asked, Change, Enemy, Said, Script, drip, silence
from support.under_attack import Victims, moves

from attack.hub_answers import FILES, WEIGHTS, Case, cases
from attack.hub_uploads import uploads

CASES, UPLOADS = cases(), uploads()
SENT = {**FILES, "README.md": b"# saved\n", "more.bin": bytes(70_000)}
CODES = {"UsageError": 2, "DoesNotFit": 4, "NotAuthorised": 5, "GatedRepository": 5, "StageFailed": 6, "NoWeights": 6,
         "InvalidCheckpoint": 6, "Transient": 75, "Offline": 75}  # fmt: skip
"""The errors that may come of a server, as docs/reference/errors.md lists them, and their exit codes."""
SECONDS = 45
"""On a machine that does much else; alone none takes 15."""
SLEPT = 120
"""Seconds of pauses that the client may make, in time limits twenty times shorter than those it has by itself."""
BYTES = 200 << 20
MEMORY = 1200 << 20
SHORT = 5
ASKED = 600
"""Requests."""
RULES = (
    "commit: a path",
    "name: escapes",
    "name: twice",
    "name: below a file",
    "name: a long part",
    "size: huge",
    "size: nothing",
    "LFS: two sizes",
    "sizes: none of many",
    "listing: too much",
    "listing: a long number",
    "X-Repo-Commit: a path",
    "X-Repo-Commit: another",
    "ETag: a path",
    "ETag: another",
    "X-HF-Warning: escapes",
    "X-HF-Warning: much",
    "Content-Range: 'bytes 5-9/99'",
    "head: later, '86400'",
    "cdn: later, '99999999999999999999'",
    "head: later, '²'",
    "info: a bomb",
    "info: slow headers",
    "info: beginnings without end",
    "cdn: a body without end",
    "cdn: a bomb",
    "info: 403 with errors of a number",
    "branches of numbers",
    "everything lies on another host",
)
SENDING_RULES = (
    "create: again and again",
    "commit: a branch",
    "preupload: a list",
    "organisations: odd names",
    "verify: on another host",
    "put: to a file",
    "put: later, '86400'",
    "mode: not by LFS",
)
"""One lie for each rule."""


def tree(folder: Path) -> dict[str, str]:
    found = sorted(folder.rglob("*"))
    return {path.relative_to(folder).as_posix(): _digest(path) for path in found if not path.is_dir()}


def _digest(path: Path) -> str:
    return os.readlink(path) if path.is_symlink() else hashlib.sha256(path.read_bytes()).hexdigest()


class Scene:
    """A user's folder that nobody touches, and an enemy."""

    def __init__(self, root: Path, enemy: Enemy, victims: Victims, seconds: float = SECONDS) -> None:
        self.root, self.enemy, self.victims, self.seconds = root, enemy, victims, seconds
        self.canary = root / "canary"
        self.canary.mkdir(exist_ok=True)
        for name in (".bashrc", ".ssh/authorized_keys", "blobs"):
            (self.canary / name).parent.mkdir(exist_ok=True)
            (self.canary / name).write_text("# the user's own\n")
        self.before = tree(self.canary)
        enemy.canary = str(self.canary).removeprefix("/")
        self.number = 0
        self.source = root / "0"
        for name, data in SENT.items():
            self.source.mkdir(exist_ok=True)
            (self.source / name).write_bytes(data)

    def _home(self) -> Path:
        self.number += 1
        home = self.root / str(self.number)
        home.mkdir()
        self.enemy.reset()
        return home

    def play_upload(self, case: Case) -> list[str]:
        """Return what is wrong with the end of it, where a model is sent."""
        home = self._home()
        self.enemy.files, self.enemy.change = {"config.json": b"{}", "stale.bin": b"old"}, case.change
        asked = {"url": self.enemy.url, "home": str(home), "source": str(self.source), "token": TOKEN}
        outcome = self.victims.ask({"act": "upload", **asked})
        there = outcome.get("ok") and self.enemy.present != SENT
        lost = ["something else is there"] if there else []
        return [*lost, *self._faults(case, outcome, home, {}), *self._spoilt(home)]

    def play(self, case: Case) -> list[str]:
        """Return what is wrong with the end of it, where a model is fetched."""
        home = self._home()
        self.enemy.files = {**FILES, **case.files}
        self.enemy.change, self.enemy.listing = case.change, case.listing
        revision = case.revision or (self.enemy.commit if case.pinned else "main")
        asked = {"url": self.enemy.url, "home": str(home), "revision": revision, "include": case.include}
        outcome = self.victims.ask({"act": "fetch", "token": TOKEN, **asked})
        return [*self._faults(case, outcome, home, self.enemy.files), *self._spoilt(home)]

    def _faults(self, case: Case, outcome: dict[str, Any], home: Path, right: dict[str, bytes]) -> Iterator[str]:
        if outcome.get("ok"):
            wanted = {name: hashlib.sha256(data).hexdigest() for name, data in right.items()}
            got = {name: _digest((home / "out" / name).resolve()) for name in tree(home / "out")}
            if got != wanted:
                yield f"other files: {got.keys() ^ wanted.keys() or 'other bytes'}"
            if case.refused:
                yield "it was believed"
        elif CODES.get(outcome["error"]) != outcome["exit_code"]:
            yield f"{outcome['error']}: {outcome['cause'][-1500:]}"
        elif case.ends not in ("", outcome["error"]):
            yield f"{outcome['error']} where {case.ends} was due: {outcome['cause']}"
        elif case.refused is False:
            yield f"refused: {outcome['cause']}"
        elif not outcome["cause"] or not outcome["cure"]:
            yield f"no cause or no cure: {outcome['cause']!r} {outcome['cure']!r}"
        text = outcome.get("cause", "") + outcome.get("cure", "") + outcome.get("said", "")
        if any(moves(sign) and sign != "\n" for sign in text):
            yield f"signs that move a terminal: {text!r}"
        if len(text) > 20_000:
            yield f"says {len(text)} characters"
        if TOKEN in text:
            yield "says the token"
        for limit, what in ((self.seconds, "seconds"), (SLEPT, "slept"), (MEMORY, "rss")):
            if outcome.get(what, 0) > limit:
                yield f"{what}: {outcome[what]:.0f}"
        if len(self.enemy.log) > ASKED:
            yield f"asked {len(self.enemy.log)} times"
        if self.enemy.sent > BYTES:
            yield f"took {self.enemy.sent} bytes"

    def _spoilt(self, home: Path) -> Iterator[str]:
        if tree(self.canary) != self.before:
            yield "the canary is dead"
        if strangers := {path.name for path in home.iterdir()} - {
            "cache",
            "memo",
            "out",
            "said",
            "scratch",
            "receipt.json",
        }:
            yield f"files beside the cache: {strangers}"
        if strangers := {path.name for path in self.root.iterdir() if not path.name.isdigit()} - {"canary", "victims"}:
            yield f"files elsewhere: {strangers}"
        if odd := [path.name for path in home.rglob("*") if any(map(moves, path.name))]:
            yield f"names that move a terminal: {odd}"
        for path in (home / "memo").rglob("*"):
            if path.is_file() and b"\x1b" in path.read_bytes():
                yield f"an escape sequence is remembered in {path}"
        for asked in self.enemy.log:
            if "authorization" in asked.headers and not asked.headers["host"].startswith("127.0.0.1"):
                yield f"the token went to {asked.headers['host']}{asked.path}"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    root = tmp_path_factory.mktemp("enemy")
    with Enemy(FILES) as enemy, Victims(root / "victims") as victims:
        yield Scene(root, enemy, victims)


def xet_at(way: str, storage: str | None = None, answer: Callable[[], Said | Script] = lambda: Said(404)) -> Change:
    """The weights are said to lie in Xet. way: where its token is given; storage: where that says the bytes are."""

    def change(asked: Asked, said: Said) -> Said | Script:
        if asked.kind == "head" and asked.name == WEIGHTS:
            return said.having(X_Xet_Hash="a" * 64, X_Xet_Refresh_Route=way)
        if asked.path == "/xet" and storage is not None:
            return Said().having(X_Xet_Cas_Url=storage, X_Xet_Access_Token="t", X_Xet_Token_Expiration="99999999999")
        return answer() if asked.path.startswith("/cas/") else said

    return change


def xet_cases(url: str) -> list[Case]:
    way, storage = f"{url}/xet", f"{url}/cas"
    ways = ("http://localhost:1/xet", "file:///etc/passwd", "javascript:x", "//localhost/xet", "")
    cases = [Case(f"Xet by way of {there!r}", xet_at(there), refused=False) for there in ways]
    places = (None, "http://127.0.0.1:1", "file:///etc", "no address", "")
    cases += [Case(f"Xet at {place!r}", xet_at(way, place), refused=True) for place in places]
    answers = (Said(404), Said(403), Said(200, (), b"<html>"), Said(200, (), b"[" * 50_000), Said(204))
    cases += [
        Case(f"Xet says {said.status}", xet_at(way, storage, lambda said=said: said), refused=True) for said in answers
    ]
    drips: tuple[Callable[[], Script], ...] = (silence, lambda: drip(b" " * 900, 0.1, first=b"HTTP/1.1 200 OK\r\n\r\n"))
    return cases + [Case(f"Xet is slow, {n}", xet_at(way, storage, slow), refused=True) for n, slow in enumerate(drips)]


def fallen(play: Callable[[Case], list[str]], chosen: list[Case]) -> dict[str, list[str]]:
    return {case.name: faults for case in chosen if (faults := play(case))}


def test_the_enemy_is_a_hub_where_it_does_not_lie(scene: Scene) -> None:
    assert scene.play(Case("honest", refused=False)) == []
    assert scene.play(Case("honest, pinned", pinned=True, refused=False)) == []
    assert scene.play_upload(Case("honest", refused=False)) == []


def test_one_lie_for_each_rule(scene: Scene) -> None:
    assert fallen(scene.play, [case for case in CASES if case.name in RULES]) == {}
    assert fallen(scene.play_upload, [case for case in UPLOADS if case.name in SENDING_RULES]) == {}
    assert {*RULES, *SENDING_RULES} <= {case.name for case in (*CASES, *UPLOADS)}


def test_a_large_file_that_is_not_taken_by_lfs(tmp_path: Path) -> None:
    with Enemy({}) as enemy, Victims(tmp_path / "victims") as victims:
        scene = Scene(tmp_path, enemy, victims)
        with (scene.source / "weights.bin").open("wb") as weights:
            weights.truncate(65 << 20)
        case = next(case for case in UPLOADS if case.name == "mode: not by LFS")
        assert scene.play_upload(replace(case, refused=True)) == []
        assert not any(asked.kind == "commit" for asked in enemy.log)


def test_some_lies(scene: Scene, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311
    assert fallen(scene.play, chance.sample(CASES, SHORT)) == {}
    assert fallen(scene.play_upload, chance.sample(UPLOADS, SHORT)) == {}


@pytest.mark.attack
@pytest.mark.timeout(3600)
def test_every_lie(scene: Scene) -> None:
    assert len(CASES) >= 200
    assert fallen(scene.play, CASES) == {}


@pytest.mark.attack
@pytest.mark.timeout(3600)
def test_every_lie_while_a_model_is_sent(scene: Scene) -> None:
    assert len(UPLOADS) >= 200
    assert fallen(scene.play_upload, UPLOADS) == {}


@pytest.mark.attack
@pytest.mark.timeout(3600)
def test_every_lie_about_xet(tmp_path: Path) -> None:
    with Enemy(FILES) as enemy, Victims(tmp_path / "victims", HF_HUB_DISABLE_XET="0") as victims:
        scene = Scene(tmp_path, enemy, victims, seconds=90)
        assert fallen(scene.play, xet_cases(enemy.url)) == {}
