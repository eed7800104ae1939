"""Names that nobody meant, of files, destinations, modules and parameters: mistakes of the user's, at once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from attack.hub_answers import ODD_NAMES
from bigpipe.bigmodel.publishing import open_destination
from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import ManifestError, UsageError
from bigpipe.files import read_file
from bigpipe.modules import source_files
from bigpipe.orchestrator.recipe.graph import load_recipe

QUICKSTART = Path(__file__).parents[2] / "models" / "quickstart"
NO_TEXT = os.fsdecode(b"a\xff")


@pytest.mark.parametrize(
    "to",
    [
        "/",
        "//",
        "/../..",
        "a" * 250,
        "a" * 5000,
        "a/" * 3000,
        "file:///",
        "zip://a::file:///etc/x",
        "tar://::",
        "/dev/shm",
    ],
)
def test_what_cannot_be_a_destination_is_refused(tmp_path, to):
    with pytest.raises(UsageError) as caught:
        open_destination(to, Sources(base=tmp_path))
    assert caught.value.field == "to"
    assert len(caught.value.cause) < 6000


def test_a_destination_of_a_user_that_is_none_is_a_folder(tmp_path):
    found = open_destination("~nobody-here/x", Sources(base=tmp_path))
    assert found.url == str(tmp_path / "~nobody-here/x")


@pytest.mark.parametrize("name", ["", "..", "builtins", "sys", "no_such_module_anywhere"])
def test_a_module_without_source_has_no_files(tmp_path, name):
    assert source_files(name, tmp_path) == []


def test_a_file_is_read_up_to_its_limit(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"12345")
    assert read_file(file, 5) == b"12345"
    with pytest.raises(OSError, match="it holds more than 4 B"):
        read_file(file, 4)
    with pytest.raises(OSError, match="it is no regular file"):
        read_file(Path("/dev/zero"), 4)
    with pytest.raises(IsADirectoryError):
        read_file(tmp_path, 4)


def test_parameters_and_variables_that_are_no_text_are_problems(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text(
        "version: 1\nparams: {b: model}\nstages: {d: {uses: download, with: {path: '${params.b}${env.X}'}}}\n"
    )
    for params, environment in (({"b": NO_TEXT}, {"X": "1"}), ({"b": "a\0"}, {"X": "1"}), ({}, {"X": NO_TEXT})):
        with pytest.raises(ManifestError, match="no UTF-8") as caught:
            load_recipe(path, params, environment=environment)
        str(caught.value).encode()


def test_a_name_in_a_model_folder_that_is_no_text_is_named(workshop) -> None:
    """Not called a fault of the kind."""
    model = workshop.folder / "model"
    shutil.copytree(QUICKSTART, model)
    with open(os.fsencode(model) + b"/\xff.json", "wb") as file:
        file.write(b"{}")
    workshop.manifest.write_text("version: 1\nname: n\nstages:\n  d: {uses: download, with: {path: model}}\n")
    told = workshop.command("run", "recipe.yaml")
    assert told.returncode == 6, told.stderr
    assert r"'\udcff.json', which is no UTF-8" in told.stderr
    assert "fault of its kind" not in told.stderr


ODDLY_NAMED = """\
version: 1
name: odd
stages:
  download: {uses: download, with: {path: model, include: ["*", ".*"]}}
  shard: {uses: shard, inputs: download, with: {max_shard_size: 1MB}}
  save: {uses: save, inputs: shard, with: {to: saved}}
"""


def test_files_of_a_model_may_have_any_name_from_the_download_to_the_copy(workshop) -> None:
    model, got = workshop.folder / "model", workshop.folder / "got"
    shutil.copytree(QUICKSTART, model)
    for name in ODD_NAMES.values():
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_bytes(name.encode())
    workshop.manifest.write_text(ODDLY_NAMED)
    told = workshop.command("run", "recipe.yaml")
    assert told.returncode == 0, told.stderr
    assert workshop.command("get", "download", "got").returncode == 0
    carried = [name for name in ODD_NAMES.values() if name[0] != "." and not name.endswith((".lock", ".incomplete"))]
    for folder, names in ((got, ODD_NAMES.values()), (workshop.folder / "saved", carried)):
        for name in names:
            assert (folder / name).read_bytes() == name.encode(), name
