"""Rows that name pictures, in a recipe: their bytes are part of the key, and the plan tells of one that is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.media import make_llava, write_picture
from support.models import POINTER
from support.workshop import Workshop

from bigpipe.errors import UsageError
from bigpipe.plugins import finetuning, inference_needs
from bigpipe.plugins.distributed_infer import InferParams
from bigpipe.plugins.finetune import FinetuneParams

RECIPE = """\
version: 1
name: pictures
stages:
  download: {uses: download, with: {path: model}}
  tell:
    uses: distributed-infer
    inputs: download
    with: {task: image-text-to-text, prompts: rows.jsonl, max_new_tokens: 4}
    launch: {num_processes: 2}
"""


@pytest.fixture
def folder(workshop: Workshop) -> Path:
    make_llava(workshop.folder / "model")
    rows = []
    for number, name in enumerate("abc"):
        write_picture(workshop.folder / f"pictures/{name}.png", seed=number)
        rows.append(json.dumps({"prompt": "what is this", "image": f"pictures/{name}.png"}))
    (workshop.folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    workshop.manifest.write_text(RECIPE)
    return workshop.folder


def action(workshop: Workshop) -> str:
    found: str = workshop.json("plan", "recipe.yaml")["nodes"]["tell"]["action"]
    return found


def test_a_changed_picture_runs_the_stage_again(workshop: Workshop, folder: Path) -> None:
    done = workshop.command("run", "recipe.yaml", "--json")
    assert done.returncode == 0, done.stderr
    node = json.loads(done.stdout.splitlines()[-1])["nodes"]["tell"]
    rows = [json.loads(line) for line in (Path(node["path"]) / "results.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert len({row["text"] for row in rows}) == 3
    assert action(workshop) == "cached"
    write_picture(folder / "pictures/b.png", seed=9)
    assert action(workshop) == "run"
    write_picture(folder / "pictures/b.png", seed=1)
    assert action(workshop) == "cached"


def test_a_picture_that_is_not_there_is_told_with_its_row(workshop: Workshop, folder: Path) -> None:
    (folder / "pictures/b.png").unlink()
    planned = workshop.command("plan", "recipe.yaml")
    assert planned.returncode == 2
    assert "rows.jsonl:2: there is no file pictures/b.png" in planned.stderr
    assert "recipe.yaml:8:" in planned.stderr


def test_what_rows_name_and_was_not_fetched_is_told_with_its_row(tmp_path: Path) -> None:
    for name in ("a.png", "a.wav"):
        (tmp_path / name).write_text(POINTER)
    asked = {"task": "image-text-to-text", "prompts": [{"prompt": "what", "image": "a.png"}]}
    with pytest.raises(UsageError, match=r"prompts\[0\]: .*a\.png: is a pointer of git-lfs"):
        inference_needs.leads_to(InferParams.model_validate(asked), tmp_path)
    asked = {"task": "speech-seq2seq", "data": [{"audio": "a.wav", "text": "hello"}], "max_steps": 1}
    with pytest.raises(UsageError, match=r"data\[0\]: .*a\.wav: is a pointer of git-lfs"):
        finetuning.leads_to(FinetuneParams.model_validate(asked), tmp_path)
