"""A server that holds the model is asked while whoever asks is killed: every record once, few asked again."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from support.api import KEY, MODEL, Api, follows
from support.commanding import left_of, start
from support.workshop import Workshop

KILLS = int(os.environ.get("BIGPIPE_TEST_KILLS", "100"))
RECORDS, AT_ONCE, TOKENS = 500, 4, 8
PAUSE = 0.02
"""Seconds that the server takes for an answer."""


@pytest.mark.fault
@pytest.mark.timeout(3 * 3600)
def test_kills_lose_nothing_and_ask_again_what_was_under_way(tmp_path: Path, seed: int) -> None:
    """The command or its worker is killed while it starts or asks, and the same command follows, until all is there."""
    draw = random.Random(seed)  # noqa: S311
    kills = rounds = 0
    while kills < KILLS:
        rounds += 1
        workshop = Workshop(tmp_path / f"round-{rounds}")
        workshop.folder.mkdir()
        prompts = [f"prompt {rounds} {number}" for number in range(RECORDS)]
        with Api(key=KEY) as server:
            server.change = lambda asked, reply: replace(reply, after=PAUSE)
            workshop.manifest.write_text(recipe(server.url, prompts))
            killed = 0
            while not _live(workshop, draw if kills + killed < KILLS else None):
                killed += 1
                assert left_of(workshop.folder / "store") == [], "a process outlived its command by 10 s"
            assert len({asked.text for asked in server.asked}) == RECORDS
            assert len(server.asked) <= RECORDS + AT_ONCE * killed
        (found,) = workshop.folder.glob("store/artifacts/*/results.jsonl")
        lines = [json.loads(line) for line in found.read_text().splitlines()]
        assert [(line["index"], line["prompt"], line["text"]) for line in lines] == [
            (index, prompt, follows(prompt, TOKENS)) for index, prompt in enumerate(prompts)
        ]
        kills += killed
    print(f"{kills} kills in {rounds} rounds of {RECORDS} records")  # noqa: T201


def recipe(url: str, prompts: list[str]) -> str:
    serving = {"url": url, "model": MODEL, "secret": "API_KEY", "concurrency": AT_ONCE}
    given = {
        "task": "text-generation", "prompts": prompts, "max_new_tokens": TOKENS, "engine": "openai", "serving": serving
    }  # fmt: skip
    return (
        "version: 1\nname: asks\nsecrets: [API_KEY]\nstages:\n"
        f"  answer:\n    uses: distributed-infer\n    secrets: [API_KEY]\n    with: {json.dumps(given)}\n"
    )


def _live(workshop: Workshop, draw: random.Random | None) -> bool:
    """Start the command, and kill somebody where there is a draw. Return whether it ended well."""
    started = start(
        workshop, "run", "recipe.yaml", environ={"API_KEY": KEY}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    with started as process:
        if draw is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(draw.uniform(0, 6))
            with contextlib.suppress(psutil.NoSuchProcess):
                command = psutil.Process(process.pid)
                draw.choice([command, *command.children(recursive=True)]).kill()
        return process.wait(timeout=600) == 0
