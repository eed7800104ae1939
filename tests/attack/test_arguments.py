"""Every option and argument of every command, with values that nobody meant."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from attack.forks import Commands, Ended
from bigpipe.cli import cli

QUICKSTART = Path(__file__).parents[2] / "models/quickstart"
RECIPE = """\
version: 1
name: case
params: {b: model, n: 3, f: 1.5, t: true, l: [1], m: {a: 1}}
stages:
  download: {uses: download, with: {path: '${params.b}'}}
"""
VALUES = (
    "", " ", "-", "--", "-1", "0", "9" * 400, "1e999", "nan", "inf", "-inf", "0x10", "0o17", "1_000", "true", "null",
    "~", "\x1b[2J\x07", "a\nb", "\x7f\x08", os.fsdecode(b"\xff"), os.fsdecode(b"\xc3\x28"), "a" * 5000, "/" * 300, "/",
    ".", "..", "../..", "/dev/zero", "/dev/full", "/dev/null", "/proc/self/mem", "/proc/x/y", "folder", "fifo", "loop",
    "locked", "binary", "nowhere", "model", "zip://a::file:///etc/x", "http://127.0.0.1:1/x", "file:///etc/passwd",
    "hf://a/b", "__main__:x", "os:system", ":", "..:x", "a/b", "\u202egpj.exe", "раураl/х", "ｍｏｄｅｌ", "１２", "🦀",
    "{a: !!python/object/apply:os.system [x]}", "&a [*a]", "[" * 5000, "${env.HF_TOKEN}", "${params.b}", "a=b", "=",
    "b=", "*", "?[", "$(id)", "'; rm -rf x", "\ufeffx", "%s%n", "{}",
)  # fmt: skip
PLAIN = {
    "manifest": "r.yaml", "manifests": "r.yaml", "node": "download", "nodes": "download", "models": "model",
    "file": "new.yaml", "run": "last", "other": "last", "kind": "save", "kinds": "a:b",
}  # fmt: skip
PARAMETERS = ("b", "n", "f", "t", "l", "m")
SHORT = 60
SLOW = frozenset({"run", "doctor", "ui"})
"""Commands that start workers, or go on."""


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> Iterator[Commands]:
    folder = tmp_path_factory.mktemp("arguments")
    make_folder(folder)
    with Commands(folder) as found:
        yield found


def make_folder(folder: Path) -> None:
    shutil.copytree(QUICKSTART, folder / "model")
    (folder / "r.yaml").write_text(RECIPE)
    os.mkfifo(folder / "fifo")
    (folder / "folder").mkdir()
    (folder / "locked").write_text("x")
    (folder / "locked").chmod(0)
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "loop").symlink_to("loop")


def calls() -> list[list[str]]:
    """Of those that take long, every fifth."""
    found = {name: list(calls_of(name, command)) for name, command in cli.commands.items()}
    return [[name, *call] for name, each in found.items() for call in each[:: 5 if name in SLOW else 1]]


def calls_of(name: str, command: click.Command) -> Iterator[list[str]]:
    arguments = [each for each in command.params if isinstance(each, click.Argument)]
    needed = [PLAIN.get(str(each.name), "new") for each in arguments if each.required]
    more = ["--model", "a/b"] if name == "init" else []
    for index, _ in enumerate(arguments):
        for value in VALUES:
            line = [PLAIN.get(str(each.name), "new") for each in arguments[: max(index + 1, len(needed))]]
            line[index] = value
            yield [*more, "--", *line]
    for option in command.params:
        if not isinstance(option, click.Option):
            continue
        if option.is_flag:
            yield [*needed, *more, option.opts[0]]
            continue
        taken = () if option.name == "model" else more
        for value in VALUES:
            written = [f"{each}={value}" for each in PARAMETERS] if option.name == "params" else []
            yield from ([*needed, *taken, option.opts[0], each] for each in [value, *written])


def faults(ended: list[Ended]) -> list[str]:
    return [each.crash for each in ended if each.crash]


def test_there_are_many():
    assert len(calls()) >= 2000


def test_some_of_them_end_with_a_documented_exit_code_and_a_cure(commands):
    chosen = random.Random(12).sample([call for call in calls() if call[0] not in SLOW], SHORT)  # noqa: S311
    assert faults([commands.call(*call) for call in chosen]) == []


@pytest.mark.attack
@pytest.mark.parametrize("name", cli.commands)
def test_each_of_them_ends_with_a_documented_exit_code_and_a_cure(commands, name):
    assert faults([commands.call(*call) for call in calls() if call[0] == name]) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("validate", "fifo"), "it is no regular file"),
        (("plan", "/dev/zero"), "it is no regular file"),
        (("plan", "/"), "Is a directory"),
        (("plan", "r.yaml", "--machine", "/dev/zero"), "it is no regular file"),
        (("ls", "--store", "locked"), "locked"),
        (("gc", "--store", "model"), "is no store: it holds README.md, config.json"),
        (("run", "r.yaml", "--store", "."), "is no store: it holds"),
        (("run", "r.yaml", "-p", os.fsdecode(b"b=\xff")), "is no UTF-8"),
        (("init", "/proc/x/r.yaml", "--model", "a/b"), "/proc/x/r.yaml cannot be written"),
        (("show", "--store", "a" * 5000), "File name too long"),
        (("run", "r.yaml", "--events", "../.."), "../.. is a directory"),
        (("kinds", "--", ":"), "':' is not module:name of a stage kind"),
        (("kinds", "--", "..:x"), "'..:x' is not module:name"),
        (("estimate", "model", "--memory", "9" * 400), "a size of 400 digits is more than there is"),
        (("estimate", "model", "--memory", "9" * 39), "bytes is more than there is"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_of_its_kind_is_a_mistake_of_the_call(commands, arguments, said):
    ended = commands.call(*arguments)
    assert (ended.crash, ended.code) == ("", 2)
    assert said in ended.said
