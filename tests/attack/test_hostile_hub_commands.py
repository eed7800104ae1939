"""The command itself against a Hub that lies: how it ends, what it prints, and what it leaves."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support.enemy import TOKEN, Enemy
from support.under_attack import moves

from attack.hub_answers import FILES, Case, cases

RECIPE = """\
version: 1
name: fetching
stages:
  download: {uses: download, with: {repo: org/model, revision: "REVISION"}}
"""
ENDS = (0, 2, 4, 5, 6, 75)
SECONDS = 100
MANY, FEW = 100, 1
WAITED_FOR = ("always", "later", "limited", "status 5", "status 408", "status 429")
"""Parts of names: the client repeats these questions with pauses that only `test_hostile_hub` cuts short."""
CASES = [case for case in cases() if not any(part in case.name for part in WAITED_FOR) and not case.include]


@pytest.fixture(scope="module")
def enemy() -> Iterator[Enemy]:
    with Enemy(FILES) as found:
        yield found


def command(home: Path, url: str, *arguments: str) -> tuple[int | None, str]:
    """Exit code, None where it does not end; and all that it said."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "PYTHONPATH") if name in os.environ}
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(home / "hf"), "HOME": str(home / "user"), "HF_TOKEN": TOKEN}
    client = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "bigpipe", *arguments, "--store", str(home / "store")],
        env={**kept, **settings, **client, "NO_PROXY": "127.0.0.1,localhost"},
        cwd=home,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        return None, said.decode("utf-8", "replace")
    return process.returncode, said.decode("utf-8", "replace")


def play(enemy: Enemy, home: Path, case: Case) -> list[str]:
    """Return what is wrong with the end of `plan`, `run` and `estimate`."""
    (home / "user").mkdir(parents=True)
    (home / "user" / ".bashrc").write_text("# the user's own\n")
    enemy.reset()
    enemy.files, enemy.change, enemy.listing = {**FILES, **case.files}, case.change, case.listing
    revision = case.revision or (enemy.commit if case.pinned else "main")
    (home / "recipe.yaml").write_text(RECIPE.replace("REVISION", revision))
    faults = []
    for arguments in (("plan", "recipe.yaml"), ("run", "recipe.yaml", "--json"), ("estimate", "org/model")):
        begun = time.monotonic()
        code, said = command(home, enemy.url, *arguments)
        if code not in ENDS or "Traceback" in said:
            faults.append(f"{arguments[0]}: exit {code} after {time.monotonic() - begun:.0f} s: {said[-1500:]}")
        if any(moves(sign) and sign not in "\n\t" for sign in said):
            faults.append(f"{arguments[0]}: moves the terminal: {said!r}")
        if arguments[0] == "run":
            json.loads(next(line for line in said.splitlines() if line.startswith('{"schema"')))
            faults += ["run: it was believed"] if code == 0 and case.refused and "auth" not in case.name else []
            faults += [f"run: refused: {said}"] if code and case.refused is False else []
        faults += [f"{arguments[0]}: says the token"] if TOKEN in said else []
    return [*faults, *left_behind(home)]


def left_behind(home: Path) -> Iterator[str]:
    if [path.name for path in (home / "user").rglob("*") if path.name != ".cache"] != [".bashrc"]:
        yield f"the user's folder: {sorted(map(str, (home / 'user').rglob('*')))}"
    if (home / "user" / ".bashrc").read_text() != "# the user's own\n":
        yield "the user's file is another"
    if strangers := {path.name for path in home.iterdir()} - {"user", "hf", "store", "recipe.yaml"}:
        yield f"files beside: {strangers}"
    texts = [path for path in (home / "store").rglob("*") if path.is_file() and not path.is_symlink()]
    for path in texts:
        content = path.read_bytes()
        if b"\x1b" in content or TOKEN.encode() in content:
            yield f"an escape sequence, or the token, in {path}"


def test_some_lies(enemy: Enemy, seed: int, tmp_path: Path) -> None:
    chosen = random.Random(seed).sample(CASES, FEW)  # noqa: S311
    assert {
        case.name: faults for case in chosen if (faults := play(enemy, tmp_path / str(CASES.index(case)), case))
    } == {}


@pytest.mark.attack
@pytest.mark.timeout(7200)
def test_many_lies(enemy: Enemy, seed: int, tmp_path: Path) -> None:
    chosen = [Case("honest", refused=False), *random.Random(seed).sample(CASES, MANY)]  # noqa: S311
    places = ((case, tmp_path / str(number)) for number, case in enumerate(chosen))
    assert {case.name: faults for case, place in places if (faults := play(enemy, place, case))} == {}
