"""Manifests that nobody meant: each is a recipe that can be planned, or an error with its place; never a traceback."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from attack.forks import Commands
from attack.manifests import PLAIN, fields, params, texts, written
from attack.test_arguments import make_folder
from bigpipe.errors import BigpipeError, ManifestError
from bigpipe.orchestrator.recipe.graph import load_recipe

ENVIRONMENT = {"HOME": "/nowhere", "HF_TOKEN": "canary-6b1f"}
SHORT = 1_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("manifests")
    make_folder(found)
    return found


@pytest.fixture(scope="module")
def commands(folder) -> Iterator[Commands]:
    with Commands(folder) as found:
        yield found


def loads(folder: Path, manifest: str | bytes) -> bool:
    """Can it be loaded? Raise AssertionError where neither that nor what is wrong comes out, with places."""
    path = folder / "m.yaml"
    path.write_bytes(written(manifest))
    try:
        load_recipe(path, environment=ENVIRONMENT)
    except BigpipeError as refused:
        error = refused
    else:
        return True
    assert "canary-6b1f" not in str(error)
    assert not {"\x1b", "\x00", "\x7f"} & set(str(error))
    if isinstance(error, ManifestError):
        assert error.problems
        assert all(problem.place.line > 0 and problem.cause for problem in error.problems)
    return False


def check_loading(folder: Path, manifests: Sequence[str | bytes]) -> list[str | bytes]:
    """Return those that can be loaded. Raise AssertionError with those that end in anything but an error of ours."""
    good, wrong = [], []
    for manifest in manifests:
        try:
            if loads(folder, manifest):
                good.append(manifest)
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error!s:.300}: {manifest[-300:]!r}")
    assert wrong == []
    return good


def faults(commands: Commands, manifests: Sequence[str | bytes]) -> list[str]:
    """What is wrong with how plans of these end."""
    found = []
    for manifest in manifests:
        (commands.folder / "r.yaml").write_bytes(written(manifest))
        ended = commands.call("plan", "r.yaml", "--offline")
        if ended.crash:
            found.append(f"{manifest[-300:]!r}: {ended.crash}")
    return found


def test_there_are_many():
    assert len(list(texts())) >= 200
    assert len(list(fields())) + len(list(params())) >= 8_000


def test_every_text_is_a_recipe_or_problems_with_places(folder):
    check_loading(folder, list(texts()))


def test_fields_with_strange_values_are_recipes_or_problems_with_places(folder):
    every = [*fields(), *(manifest for _, manifest in params())]
    check_loading(folder, random.Random(12).sample(every, SHORT))  # noqa: S311


@pytest.mark.attack
def test_each_field_with_each_value_is_a_recipe_or_problems_with_places(folder):
    check_loading(folder, [*fields(), *(manifest for _, manifest in params())])


@pytest.mark.attack
@pytest.mark.parametrize("kind", PLAIN)
def test_what_can_be_loaded_of_a_kind_can_be_planned_or_is_refused(commands, kind):
    assert faults(commands, check_loading(commands.folder, [manifest for of, manifest in params() if of == kind])) == []


@pytest.mark.attack
def test_what_else_can_be_loaded_can_be_planned_or_is_refused(commands):
    assert faults(commands, check_loading(commands.folder, [*texts(), *fields()])) == []


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        (f"download, with: {{path: model, subfolder: {'a' * 5000}}}", "is no folder"),
        ("distributed-infer, launch: {num_processes: 9223372036854775808}", "it must be at most 65536"),
        ("distributed-infer, launch: {num_machines: 65537}", "it must be at most 65536"),
    ],
)
def test_what_was_a_bug_or_had_no_end(commands, stage, said):
    (commands.folder / "r.yaml").write_text(f"version: 1\nstages:\n  s: {{uses: {stage}}}\n")
    ended = commands.call("plan", "r.yaml", "--offline")
    assert (ended.crash, ended.code) == ("", 2)
    assert said in ended.said
