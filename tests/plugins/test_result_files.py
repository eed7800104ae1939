"""What the stage writes besides lines: pictures of a task of the user's, through the death of a rank; Parquet."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from support.contexts import check_context
from support.inferring import context, infer, start
from support.models import make_checkpoint

from bigpipe.bigmodel.publishing import Contents
from bigpipe.errors import BigpipeError, UsageError
from bigpipe.orchestrator.report.firstrows import first_results
from bigpipe.plugins import inferring
from bigpipe.plugins.distributed_infer import InferParams

DRAWING = """
import io, os, signal
from pathlib import Path
from PIL import Image
from bigpipe.bigmodel.tasks import ResultFile

def draw(model, rows):
    answers = []
    for row in rows:
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (row["index"], row["seed"], len(row["prompt"]))).save(file, "png")
        answers.append({"image": ResultFile(file.getvalue(), ".png")})
    killed = Path(__file__).with_name("killed")
    if rows[0]["index"] == 3 and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return answers
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "opt", dtype="float16")


def test_pictures_of_a_task_of_ones_own_outlive_the_rank_that_drew_them(tmp_path: Path, model: Path) -> None:
    from PIL import Image

    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "mytasks.py").write_text(DRAWING)
    prompts = ["a dog", "a cat", "a chicken", "an owl", "a fly"]
    outcome = start(folder, model, 2, task="mytasks:draw", prompts=prompts, seed=40)
    assert (folder / "killed").exists()
    out = folder / "work/out"
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    names = [f"files/{index:06}.png" for index in range(5)]
    assert rows == [
        {"index": index, "prompt": prompt, "image": name}
        for index, (prompt, name) in enumerate(zip(prompts, names, strict=True))
    ]
    for index, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
        content = (out / name).read_bytes()
        assert Image.open(io.BytesIO(content)).getpixel((3, 3)) == (index, 40 + index, len(prompt))
        assert outcome.files[name] == (hashlib.sha256(content).hexdigest(), len(content))
    found = [path.relative_to(out).as_posix() for path in sorted(out.rglob("*")) if path.is_file()]
    assert found == [*names, "results.jsonl"]
    assert sorted(Contents(results=out).files()) == sorted(f"results/{name}" for name in found)


def test_parquet_in_parts_is_the_same_on_any_number_of_ranks(tmp_path: Path, model: Path) -> None:
    pytest.importorskip("pyarrow")
    asked = InferParams(
        task="text-generation", prompts=["a", "b c", "d", "e f g", "h"], max_new_tokens=3, batch_size=2,
        output_format="parquet", rows_per_file=2,
    )  # fmt: skip
    written = []
    for ranks in (1, 3):
        ctx = context(tmp_path / str(ranks), model, ranks)
        assert infer(asked, ctx).prompts == 5
        written.append({path.name: path.read_bytes() for path in ctx.out.iterdir()})
    assert written[0] == written[1]
    assert sorted(written[0]) == [f"results-0000{part}-of-00003.parquet" for part in (1, 2, 3)]
    assert [prompt for prompt, _ in first_results(ctx.out, 3)] == ["a", "b c", "d"]


def checked(folder: Path, **fields: Any) -> None:
    asked = {"task": "text-generation", "prompts": ["a"], "output_format": "parquet", **fields}
    inferring.check(InferParams(**asked), check_context(folder, base=folder))


def test_a_plan_says_what_parquet_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked(tmp_path)
    with pytest.raises(BigpipeError, match=r"prompt 1: .* 'prompt' is a list, and a text in a row before it"):
        checked(tmp_path, prompts=["a", {"prompt": [{"role": "user", "content": "b"}]}])
    monkeypatch.setattr("bigpipe.bigmodel.tasks.promptfiles.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="output_format: parquet needs pyarrow, which is not installed") as refused:
        checked(tmp_path)
    assert (refused.value.field, "bigpipe-ml[parquet]" in str(refused.value.cure)) == ("output_format", True)
