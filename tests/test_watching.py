"""`ps`, `log --follow`, `show --watch`: a run that goes on, seen from another process; and what shells complete."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.commanding import start
from support.workshop import Workshop, environment

KIND = '''
import time
from bigpipe.orchestrator.stage import Forecast, Metrics, Params, Stage, StageResult

class SlowParams(Params):
    """Say a word, tell how far it is, and say the next one when there is a file of that name beside the recipe."""
    words: tuple[str, ...] = ()

def slow(params, context):
    for number, word in enumerate(params.words):
        while not (context.base / word).exists():
            time.sleep(0.01)
        context.log(word)
        context.progress(number + 1, len(params.words), "words", "saying", tokens=7 * number, busy=float(number))
    (context.out / "text").write_text(" ".join(params.words))
    return StageResult(Metrics())

SLOW = Stage(kind="slow", version=1, params=SlowParams, metrics=Metrics, inputs={}, output="text", run=slow,
             forecast=lambda params, context: Forecast())
'''
RECIPE = """
version: 1
name: slowly
params: {mood: calm, muck: none}
trust: {modules: [slowkind]}
stages:
  first: {uses: "slowkind:SLOW", with: {words: [one]}}
  talk: {uses: "slowkind:SLOW", with: {words: [hello, again, goodbye]}, needs: [first]}
"""
MATRIX = """
  say: {uses: "slowkind:SLOW", matrix: {mood: [calm, wild]}, with: {words: ["${matrix.mood}"]}}
"""


@contextmanager
def running(workshop: Workshop) -> Iterator[subprocess.Popen[bytes]]:
    (workshop.folder / "slowkind.py").write_text(KIND)
    workshop.manifest.write_text(RECIPE)
    process = start(workshop, "run", "recipe.yaml", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def until(workshop: Workshop, *arguments: str, has: str) -> str:
    """The answer of a command, asked until it says something."""
    deadline = time.monotonic() + 60
    while has not in (answer := workshop.command(*arguments)).stdout and time.monotonic() < deadline:
        time.sleep(0.1)
    assert has in answer.stdout, answer
    return answer.stdout


def say(workshop: Workshop, *words: str) -> None:
    for word in words:
        (workshop.folder / word).touch()


def test_a_run_is_listed_while_it_goes_on(workshop: Workshop) -> None:
    assert workshop.command("ps").stdout.startswith("nothing is running")
    with running(workshop) as process:
        say(workshop, "one", "hello")
        text = until(workshop, "ps", has="33 % 1/3 words")
        assert "1/2" in text
        assert "talk saying 33 %" in text
        (told,) = workshop.json("ps")["runs"]
        assert told["process"] == process.pid
        assert (told["recipe"], told["nodes"], told["done"]) == ("slowly", 2, 1)
        assert told["at"] == {"talk": "saying 33 % 1/3 words"}
        say(workshop, "again", "goodbye")
        assert process.wait(60) == 0
    assert workshop.json("ps")["runs"] == []


def test_a_run_that_was_killed_is_none_that_goes_on(workshop: Workshop) -> None:
    with running(workshop) as process:
        until(workshop, "ps", has="first")
        assert workshop.json("show", "last")["seconds"] > 0
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert workshop.json("ps")["runs"] == []
    assert workshop.json("show", "last")["status"] == "dead"


def test_a_log_is_followed_to_its_end(workshop: Workshop) -> None:
    with running(workshop) as process:
        until(workshop, "ps", has="first")
        with start(workshop, "log", "last", "--follow") as log, start(workshop, "log", "last", "talk", "-f") as talk:
            assert log.stdout is not None
            assert talk.stdout is not None
            say(workshop, "one")
            assert [log.stdout.readline() for _ in range(2)] == ["── first\n".encode(), b"one\n"]
            say(workshop, "hello")
            assert [log.stdout.readline() for _ in range(2)] == ["── talk\n".encode(), b"hello\n"]
            say(workshop, "again", "goodbye")
            assert log.stdout.read().split() == [b"again", b"goodbye"]
            assert talk.stdout.read().decode().split() == ["──", "talk", "hello", "again", "goodbye"]
            assert (process.wait(60), log.wait(60), talk.wait(60)) == (0, 0, 0)
    assert workshop.command("log", "last", "-f").stdout == workshop.command("log", "last").stdout


def test_what_is_followed_ends_when_nobody_reads_it(workshop: Workshop) -> None:
    with running(workshop) as process:
        until(workshop, "ps", has="first")
        with start(workshop, "log", "last", "-f") as log, start(workshop, "show", "last", "--watch") as shown:
            say(workshop, "one")
            for follower in (log, shown):
                assert follower.stdout is not None
                follower.stdout.readline()
                follower.stdout.close()
            say(workshop, "hello")
            try:
                assert (log.wait(60), shown.wait(60), process.poll()) == (0, 0, None)
            finally:
                process.kill()  # then they end in any case


def test_a_followed_log_ends_with_a_run_that_was_killed(workshop: Workshop) -> None:
    with running(workshop) as process:
        say(workshop, "one", "hello")
        until(workshop, "ps", has="1/3 words")
        with start(workshop, "log", "last", "talk", "--follow") as log:
            assert log.stdout is not None
            assert log.stdout.readline() == "── talk\n".encode()
            process.kill()
            assert log.stdout.read() == b"hello\n"
            assert log.wait(60) == 0


def test_a_record_is_shown_whenever_it_says_something_else(workshop: Workshop) -> None:
    with running(workshop) as process:
        until(workshop, "ps", has="first")
        with start(workshop, "show", "last", "--watch") as shown:
            assert shown.stdout is not None
            assert b": running in" in shown.stdout.readline()
            say(workshop, "one", "hello")
            ranks = next(line for line in shown.stdout if line.startswith(b"talk: "))
            assert ranks.decode().startswith("talk: saying 33 % 1/3 words"), "what counts tokens is told of each rank"
            say(workshop, "again", "goodbye")
            text = shown.stdout.read().decode()
            assert (process.wait(60), shown.wait(60)) == (0, 0)
    assert text.endswith(workshop.command("show", "last").stdout)
    assert "\x1b" not in text
    assert workshop.command("show", "last", "--watch", "--json").returncode == 2


ALL, ONE = "\x1b*", "\t"
"""Keys of bash: put in every completion; complete as far as there is but one way."""
BASHRC = """
eval "$(bigpipe completion bash)"
printed() { printf '\\n<%s>\\n' "$READLINE_LINE"; }
bind -x '"\\C-g": printed'
PS1='ready> '
"""


def completed(workshop: Workshop, key: str, *lines: str) -> list[str]:
    """What becomes of each line in an interactive bash with the printed script, once the key is struck after it."""
    folder = workshop.folder / "bin"
    folder.mkdir(exist_ok=True)
    (folder / "bigpipe").write_text('#!/bin/sh\nexec python -m bigpipe "$@"\n')
    (folder / "bigpipe").chmod(0o755)
    (folder / "bashrc").write_text(BASHRC)
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    around = {**environment(workshop.folder), "PATH": path, "TERM": "dumb"}
    master, slave = pty.openpty()
    command = ["bash", "--noprofile", "--rcfile", "bin/bashrc", "-i"]
    bash = subprocess.Popen(
        command, cwd=workshop.folder, env=around, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    try:
        shown(master, rb"ready> ")
        found = []
        for line in lines:
            os.write(master, f"\x15{line}{key}\x07".encode())
            found.append(shown(master, rb"<(.*)>\r\n")[1].decode())
        return found
    finally:
        bash.kill()
        bash.wait()
        os.close(master)


def shown(terminal: int, pattern: bytes, seconds: float = 60) -> re.Match[bytes]:
    """The first place of what a terminal shows from now on that is like the pattern."""
    text, end = b"", time.monotonic() + seconds
    while (found := re.search(pattern, text)) is None:
        assert select.select([terminal], [], [], max(0, end - time.monotonic()))[0], text
        text += os.read(terminal, 65536)
    return found


OFFERED = {
    "bigpipe re": "bigpipe report ",
    "bigpipe run recipe.yaml t": "bigpipe run recipe.yaml talk ",
    "bigpipe run recipe.yaml talk ": "bigpipe run recipe.yaml talk first say say@mood=calm say@mood=wild ",
    "bigpipe why recipe.yaml f": "bigpipe why recipe.yaml first ",
    "bigpipe run recipe.yaml say@": "bigpipe run recipe.yaml say@mood=calm @mood=wild ",
    "bigpipe run recipe.yaml say@mood=": "bigpipe run recipe.yaml say@mood=calm wild ",
    "bigpipe run recipe.yaml say@mood=w": "bigpipe run recipe.yaml say@mood=wild ",
    "bigpipe run recipe.yaml -p m": "bigpipe run recipe.yaml -p mood= muck= ",
    "bigpipe run recipe.yaml --force ta": "bigpipe run recipe.yaml --force talk ",
    "bigpipe run recipe.yaml --force=ta": "bigpipe run recipe.yaml --force=talk ",
    "bigpipe run recipe.yaml --force=say@mood=c": "bigpipe run recipe.yaml --force=say@mood=calm ",
    "bigpipe kinds qu": "bigpipe kinds quantize ",
    "bigpipe show l": "bigpipe show last ",
    "bigpipe estimate own": "bigpipe estimate owner/some-model ",
    "bigpipe merge own": "bigpipe merge owner/some-model ",
    "bigpipe merge . --adapter own": "bigpipe merge . --adapter owner/some-model ",
    "bigpipe quantize . --scheme n": "bigpipe quantize . --scheme nf4 ",
    "bigpipe quantize . --scheme=n": "bigpipe quantize . --scheme=nf4 ",
    "bigpipe quantize . --dtype ": "bigpipe quantize . --dtype float16 bfloat16 float32 ",
    "bigpipe run nowhere.yaml t": "bigpipe run nowhere.yaml t",
    "bigpipe run required.yaml -p n": "bigpipe run required.yaml -p need= ",
    "bigpipe run required.yaml d": "bigpipe run required.yaml d ",
    "bigpipe get t": "bigpipe get t",
}
"""A line → the same line with all that bash offers for its last word."""
GOES_ON = {
    "bigpipe run recipe.yaml -p moo": "bigpipe run recipe.yaml -p mood=",
    "bigpipe run recipe.yaml --param=moo": "bigpipe run recipe.yaml --param=mood=",
    "bigpipe run recipe.yaml -p mood=": "bigpipe run recipe.yaml -p mood=",
    "bigpipe run recipe.yaml -p mood=wild f": "bigpipe run recipe.yaml -p mood=wild first ",
    "bigpipe run recipe.yaml say@": "bigpipe run recipe.yaml say@mood=",
    "bigpipe plan rec": "bigpipe plan recipe.yaml ",
    "cd . && bigpipe  run recipe.yaml say@mood=c": "cd . && bigpipe  run recipe.yaml say@mood=calm ",
}
"""A line → what a TAB makes of it: no space where a value is to follow."""


def test_a_shell_completes(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    (workshop.folder / "slowkind.py").write_text(KIND)
    workshop.manifest.write_text(RECIPE + MATRIX)
    (workshop.folder / "required.yaml").write_text("params: {need: null}\nstages: {d: {uses: download}}\n")
    cache = workshop.folder / "hub" / "models--owner--some-model"
    cache.mkdir(parents=True)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache.parent))
    assert dict(zip(OFFERED, completed(workshop, ALL, *OFFERED), strict=True)) == OFFERED
    assert dict(zip(GOES_ON, completed(workshop, ONE, *GOES_ON), strict=True)) == GOES_ON


def test_runs_and_their_nodes_are_completed(workshop: Workshop) -> None:
    (workshop.folder / "slowkind.py").write_text(KIND)
    say(workshop, "one", "hello", "again", "goodbye", "calm", "wild")
    result = workshop.run(RECIPE + MATRIX)
    lines = [f"bigpipe diff {result.run[:12]}", "bigpipe get t", "bigpipe get say@mood=c"]
    expected = [f"bigpipe diff {result.run} ", "bigpipe get talk ", "bigpipe get say@mood=calm "]
    assert completed(workshop, ONE, *lines) == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_there_is_a_script_for_each_shell(workshop: Workshop, shell: str) -> None:
    found = workshop.command("completion", shell)
    assert f"_BIGPIPE_COMPLETE={shell}_complete" in found.stdout
