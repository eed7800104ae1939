"""Every way a download goes wrong, again and again: the bytes are right, or there is an error and no snapshot."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.hub import LoopbackHub

from bigpipe.bigmodel.hub import Hub, Repository, describe, fetch
from bigpipe.errors import Transient

ROUNDS = 30
ATTEMPTS = 6
FAULTS: dict[str, dict[str, Any]] = {
    "429": {"kind": "status", "status": 429, "headers": {"Retry-After": "0"}},
    "5xx": {"kind": "status", "status": 503},
    "cut": {"kind": "cut"},
    "garbage": {"kind": "garbage", "method": "GET"},
    "slow": {"kind": "slow", "rate": 1000},
    "hang": {"kind": "hang", "seconds": 5},
    "html": {"kind": "html"},
    "redirect": {"kind": "redirect"},
    "etag": {"kind": "etag"},
}
PLACES = ("/cdn/", "/resolve/", "model.safetensors", "config.json", "/api/")


def tried(attempt: Callable[[], Any]) -> Any:
    """What a run that is repeated gets; anything but a transient error is a failure of the test."""
    for _ in range(ATTEMPTS):
        try:
            return attempt()
        except Transient:
            continue
    pytest.fail(f"no success in {ATTEMPTS} attempts")


def a_round(seed: int, faults: dict[str, dict[str, Any]], root: Path, *, moves: bool = False) -> None:
    chance = random.Random(seed)  # noqa: S311
    files = {"config.json": chance.randbytes(700), "model.safetensors": chance.randbytes(2500)}
    with LoopbackHub() as server:
        server.create("org/model", files)
        hub = replace(Hub.from_environment(server.environment(root)), memo=root / "memo", timeout=0.5)
        for name in chance.choices(list(faults), k=2 if faults else 0):
            settings = dict(faults[name])
            server.fail(settings.pop("kind"), chance.choice(PLACES), times=chance.randint(1, 2), **settings)
        repository: Repository = tried(lambda: describe("org/model", "main", hub=hub))
        if moves:
            server.commit("org/model", {"model.safetensors": chance.randbytes(2500)})
        snapshot = tried(lambda: fetch(repository, repository.files))
        assert {name: file.path.read_bytes() for name, file in snapshot.files.items()} == files, f"seed {seed}"
        assert snapshot.files.keys() == files.keys()


@pytest.fixture(autouse=True)
def _impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    monkeypatch.setattr("huggingface_hub.file_download._ETAG_RETRY_TIMEOUT", 0.5)
    sleep = time.sleep
    monkeypatch.setattr("time.sleep", lambda seconds: sleep(min(seconds, 0.05)))


def rounds(count: int, seed: int, faults: dict[str, dict[str, Any]], root: Path, *, moves: bool = False) -> None:
    chance = random.Random(seed)  # noqa: S311
    for number in range(count):
        a_round(chance.randrange(2**32), faults, root / str(number), moves=moves)


@pytest.mark.fault
@pytest.mark.parametrize("fault", [*FAULTS, "moves"])
def test_one_fault_at_a_time(fault: str, seed: int, tmp_path: Path) -> None:
    rounds(ROUNDS, seed, {} if fault == "moves" else {fault: FAULTS[fault]}, tmp_path, moves=fault == "moves")


@pytest.mark.fault
@pytest.mark.parametrize("moves", [False, True])
def test_faults_together(moves: bool, seed: int, tmp_path: Path) -> None:
    rounds(ROUNDS, seed, FAULTS, tmp_path, moves=moves)


def test_a_few_of_them(seed: int, tmp_path: Path) -> None:
    rounds(4, seed, {name: FAULTS[name] for name in ("5xx", "cut", "garbage", "html")}, tmp_path, moves=True)
