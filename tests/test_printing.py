"""What others print while a command works."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from hypothesis import given, strategies as st
from support.workshop import Workshop, environment

from bigpipe.cli import cli
from bigpipe.commandline.printing import Others, others_apart, own_stdout, say
from bigpipe.commandline.streams import listen
from bigpipe.redaction import conceal
from bigpipe.tables import Screen as Terminal, columns


class Screen(io.StringIO):
    encoding = "utf-8"


def test_others_print_to_stderr_cleaned_and_whole_lines(monkeypatch) -> None:
    out, err = Screen(), Screen()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    conceal(["s3cr3t-of-others"])
    with others_apart():
        sys.stdout.write("from a \x1b[31mkind s3cr3t-of-")
        say("an answer")
        sys.stdout.write("others\nnot ended")
        assert own_stdout() is out
        assert not sys.stdout.isatty()
    assert (sys.stdout, sys.stderr) == (out, err)
    assert out.getvalue() == "an answer\n"
    assert err.getvalue() == "from a kind ***\nnot ended\n"


def test_where_nobody_can_be_asked_there_is_an_input_that_says_nothing(monkeypatch) -> None:
    for name, stream in (("stdin", None), ("stdout", Screen()), ("stderr", Screen())):
        monkeypatch.setattr(sys, name, stream)  # as Python leaves it where descriptor 0 is closed
    listen()
    assert sys.stdin is not None
    assert sys.stdin.fileno() == 0


FILES = {
    "export github recipe-é.yaml": "name: é",
    "graph recipe-é.yaml --format dot": '"a@text=é"',
    "plan recipe-é.yaml --markdown": "a@text=é",
    "shard ./é --print-recipe": "é",
}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_and_what_is_to_be_a_file_can_be_read_whatever_the_locale(
    workshop: Workshop, monkeypatch, encoding: str
) -> None:
    monkeypatch.chdir(workshop.folder)
    manifest = workshop.folder / "recipe-é.yaml"
    stage = "{uses: write, matrix: {text: [é, b]}, with: {text: '${matrix.text}'}}"
    manifest.write_text(f"version: 1\nname: é\nstages:\n  a: {stage}\n", encoding="utf-8")
    assert json.loads(printed("graph recipe-é.yaml --json", encoding, monkeypatch))["manifest"] == str(manifest)
    for command, text in FILES.items():
        assert text in printed(command, encoding, monkeypatch).decode("utf-8"), command


def printed(command: str, encoding: str, monkeypatch) -> bytes:
    """What a command prints in this process, where a locale has this encoding."""
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding, "backslashreplace", write_through=True))
    cli.main(command.split(), standalone_mode=False)
    return out.getvalue()


def test_a_home_that_a_shell_left_standing_is_one_for_results_too(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for command in ("evaluate ./model --data ./text", "quantize ./model --scheme int8"):
        assert f"{tmp_path}/z" in printed(f"{command} --out=~/z --print-recipe", "utf-8", monkeypatch).decode(), command


def test_a_bar_that_never_ends_its_line_takes_no_memory() -> None:
    screen = Screen()
    others = Others(screen)
    for done in range(1000):
        others.write(f"\r{done} of 1000 " + "=" * 1000)
    assert len(others._open) < 2000
    others.write("x" * 100_000)
    assert len(others._open) < 2000
    others.end()
    assert screen.getvalue().startswith("999 of 1000")


WORDS = st.text("abcdefgh-", min_size=1, max_size=30)
CELLS = st.lists(WORDS, max_size=8).map(" ".join)


@given(st.integers(1, 4).flatmap(lambda count: st.lists(st.tuples(*[CELLS] * count), min_size=1, max_size=5)))
@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_table_is_never_wider_than_its_screen_and_loses_nothing(width: int, rows: list[tuple[str, ...]]) -> None:
    lines = columns(rows, Terminal(width)).splitlines()
    assert all(len(line) <= width or len(line.rstrip()) <= width for line in lines), lines
    assert "".join("".join(lines).split()) == "".join("".join(map("".join, rows)).split())


@pytest.mark.parametrize("width", [1, 2, 5])
def test_the_narrowest_screen_breaks_words_and_nothing_else(width: int) -> None:
    assert "".join(columns([("alpha", "beta"), ("", "")], Terminal(width)).split()) == "alphabeta"


TABLES = ("ls", "show", "status recipe.yaml", "plan recipe.yaml", "graph recipe.yaml", "graph recipe.yaml --run last",
          "kinds", "gc --dry-run --keep-runs 1")  # fmt: skip


RECIPE = """\
version: 1
name: tables
stages:
  first: {uses: write, with: {text: "how wide is a table?"}}
  second: {uses: join, inputs: {first: first}, gates: ["characters > 2"]}
  a-stage-with-a-long-name: {uses: join, inputs: {first: first, second: second}}
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    workshop = Workshop(tmp_path_factory.mktemp("tables"))
    workshop.manifest.write_text(RECIPE)
    for _ in range(2):
        assert workshop.command("run", "recipe.yaml").returncode == 0
    return workshop


def on_a_terminal(workshop: Workshop, command: str, width: int, **environ: str) -> str:
    """What a command prints on a terminal of that many columns."""
    ours, theirs = pty.openpty()
    # What stands in COLUMNS wins over the terminal, and some who run tests set it
    given = {name: value for name, value in environment(workshop.folder).items() if name not in ("COLUMNS", "LINES")}
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    done = subprocess.run(
        [sys.executable, "-m", "bigpipe", *command.split()], cwd=workshop.folder, stdout=theirs,
        stderr=subprocess.PIPE, env={**given, "TERM": "xterm", **environ}, text=True,
    )  # fmt: skip
    os.close(theirs)
    assert done.returncode == 0, done.stderr
    printed = b""
    while part := _read(ours):
        printed += part
    os.close(ours)
    return printed.decode().replace("\r\n", "\n")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # nobody is at its other end any more
        return b""


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_tables_of_commands_fit_their_terminal(ran: Workshop, width: int) -> None:
    for command in TABLES:
        lines = re.sub(r"\x1b\[[0-9;]*m", "", on_a_terminal(ran, command, width)).splitlines()
        tables = [line for line in lines if not line.startswith(("run ", str(ran.folder), "machine: ", "would free "))]
        assert [line for line in tables if len(line.rstrip()) > width] == [], command
        assert len(tables) > 1, command


def test_colours_are_for_terminals_that_want_them(ran: Workshop) -> None:
    assert "\x1b[2mcached" in on_a_terminal(ran, "show", 80)
    assert "\x1b" not in on_a_terminal(ran, "show", 80, NO_COLOR="1")
    assert "\x1b" not in on_a_terminal(ran, "show", 80, TERM="dumb")
    assert "\x1b" not in ran.command("show").stdout, "it is no terminal"
    assert "\x1b[2mcached" in ran.command("show", FORCE_COLOR="1").stdout
