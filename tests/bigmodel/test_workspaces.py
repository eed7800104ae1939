"""A user's own folder as DVC, git-annex and the Hub cache leave it; and links that lead where they should not."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.models import make_checkpoint

import bigpipe
from bigpipe.bigmodel.hub import Choice, DirectorySource, Watch
from bigpipe.errors import InvalidCheckpoint


def dvc(folder: Path, file: Path) -> Path:
    md5 = hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()
    return folder / ".dvc/cache/files/md5" / md5[:2] / md5[2:]


def dvc_2(folder: Path, file: Path) -> Path:
    md5 = hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()
    return folder / ".dvc/cache" / md5[:2] / md5[2:]


def dvc_elsewhere(folder: Path, file: Path) -> Path:
    return folder / "shared" / dvc(folder, file).relative_to(folder / ".dvc/cache")


def annex(folder: Path, file: Path) -> Path:
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    key = f"SHA256E-s{file.stat().st_size}--{sha256}{file.suffix}"
    return folder / ".git/annex/objects/1w/6V" / key / key


WORKSPACES: list[Callable[[Path, Path], Path]] = [dvc, dvc_2, dvc_elsewhere, annex]


def versioned(folder: Path, kept: Callable[[Path, Path], Path]) -> Path:
    """`model/` with links in place of its files."""
    model = folder / "model"
    make_checkpoint(model, "llama", max_shard_size="20KB")
    for number, file in enumerate(sorted(model.iterdir())):
        place = kept(folder, file)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.rename(place)
        file.symlink_to(place if number % 2 else os.path.relpath(place, model))
    return model


@pytest.mark.parametrize("kept", WORKSPACES)
def test_files_that_a_program_keeps_by_digest_are_used(tmp_path: Path, kept: Callable[[Path, Path], Path]) -> None:
    model = versioned(tmp_path, kept)
    plain = tmp_path / "plain"
    make_checkpoint(plain, "llama", max_shard_size="20KB")
    source = DirectorySource(model, Choice())
    source.check()
    brought = source.bring(tmp_path / "out", Watch())
    assert {name: (tmp_path / "out" / name).read_bytes() for name in brought.files} == {
        file.name: file.read_bytes() for file in plain.iterdir()
    }
    found, wanted = bigpipe.open_checkpoint(model), bigpipe.open_checkpoint(plain)
    assert {name: found.read(name) for name in found.tensors} == {name: wanted.read(name) for name in wanted.tensors}


@pytest.mark.parametrize(("kept", "cure"), [(dvc, "dvc pull"), (annex, "git annex get")])
def test_what_was_not_fetched_is_said_with_its_command(
    tmp_path: Path, kept: Callable[[Path, Path], Path], cure: str
) -> None:
    model = versioned(tmp_path, kept)
    next(model.glob("*.safetensors")).resolve().unlink()
    with pytest.raises(InvalidCheckpoint, match="is not there") as caught:
        DirectorySource(model, Choice()).check()
    assert cure in caught.value.cure


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("link", ["/annex/objects/{}\n", "../.git/annex/objects/aa/bb/{}/{}"])
def test_a_pointer_of_git_annex_is_named(tmp_path: Path, name: str, link: str) -> None:
    """In a checkout whose files are unlocked, or whose file system has no links."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    DirectorySource(tmp_path, Choice()).check()
    (tmp_path / name).write_text(link.replace("{}", "SHA256E-s3--aa.safetensors"))
    with pytest.raises(InvalidCheckpoint, match="is a pointer of git-annex") as caught:
        DirectorySource(tmp_path, Choice()).check()
    assert "git annex get" in caught.value.cure


@pytest.mark.parametrize(
    "place",
    [
        "home/id_rsa", ".dvc/cache/id_rsa", "files/md5/4d/id_rsa", ".git/annex/objects/aa/bb/id_rsa/id_rsa",
        ".git/annex/objects/aa/bb/SHA256E-s3--aa/id_rsa", "model/../.dvc/config.local",
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["LICENSE", "merges.txt", "model.safetensors", "config.json"])
def test_a_link_to_any_other_file_is_refused(tmp_path: Path, place: str, name: str) -> None:
    model = tmp_path / "model"
    make_checkpoint(model, "llama")
    secret = tmp_path / place
    secret.parent.mkdir(parents=True, exist_ok=True)
    secret.write_text("{}")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    for go in (lambda: DirectorySource(model, Choice()).bring(tmp_path / "out", Watch()),
               lambda: bigpipe.open_checkpoint(model)):  # fmt: skip
        with pytest.raises(InvalidCheckpoint, match="outside the checkpoint"):
            go()
    assert not (tmp_path / "out" / name).exists()


@pytest.mark.parametrize("cache", [".dvc/cache/files/md5/4d", ".git/annex/objects/aa/bb/SHA256E-s2--aa"])
def test_a_link_that_only_passes_such_a_place_is_refused(tmp_path: Path, cache: str) -> None:
    """A repository brings the link in the cache along."""
    model = tmp_path / "model"
    make_checkpoint(model, "llama")
    (tmp_path / "id_rsa").write_text("secret")
    passed = tmp_path / cache / ("a" * 30 if "dvc" in cache else "SHA256E-s2--aa")
    passed.parent.mkdir(parents=True)
    passed.symlink_to(tmp_path / "id_rsa")
    (model / "LICENSE").symlink_to(passed)
    with pytest.raises(InvalidCheckpoint, match="outside the checkpoint"):
        DirectorySource(model, Choice()).bring(tmp_path / "out", Watch())


def test_links_of_a_pipeline_lead_nowhere_either(tmp_path: Path) -> None:
    (tmp_path / "pipeline/unet").mkdir(parents=True)
    (tmp_path / "pipeline/model_index.json").write_text("{}")
    make_checkpoint(tmp_path / "unet", "llama")
    weights = tmp_path / "pipeline/unet/diffusion_pytorch_model.safetensors"
    (tmp_path / "unet/model.safetensors").rename(weights)
    source = DirectorySource(tmp_path / "pipeline", Choice())
    source.check()
    assert source.expect().description is None
    assert set(source.bring(tmp_path / "out", Watch()).files) == {
        "model_index.json", "unet/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    (tmp_path / "id_rsa").write_text("secret")
    (tmp_path / "pipeline/unet/notes.txt").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(InvalidCheckpoint, match="outside the checkpoint"):
        source.expect()
    with pytest.raises(InvalidCheckpoint, match="outside the checkpoint"):
        source.bring(tmp_path / "again", Watch())


def test_links_to_folders_are_not_followed(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", "llama")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/config.json").write_text("{}")
    names = [file.path for file in DirectorySource(tmp_path / "model", Choice(include=["*"])).chosen()]
    (tmp_path / "model/runs").symlink_to(tmp_path / "runs")
    assert [file.path for file in DirectorySource(tmp_path / "model", Choice(include=["*"])).chosen()] == names
    assert not [file for file in bigpipe.open_checkpoint(tmp_path / "model").extras if "runs" in str(file)]
