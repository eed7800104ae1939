"""Whole pipelines through recipes: from a Hub, over ranks, to pictures beside the results."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from support.contexts import MACHINE, check_context, forecast_context, stage_context
from support.hub import LoopbackHub
from support.media import make_pipeline
from support.models import make_checkpoint
from support.workshop import Workshop

from bigpipe.bigmodel.checkpoint import ModelDescription
from bigpipe.bigmodel.hub import describe_pipeline
from bigpipe.errors import UsageError
from bigpipe.orchestrator.stage import Forecast, Gpu, StageResult
from bigpipe.plugins import estimating, pipelines
from bigpipe.plugins.distributed_infer import InferParams
from bigpipe.plugins.estimate import EstimateParams
from bigpipe.plugins.wired import Pipeline

pytest.importorskip("diffusers", exc_type=Exception)

MANIFESTS = Path(__file__).parents[2] / "manifests"
REPO = "stable-diffusion-v1-5/stable-diffusion-v1-5"
PROMPTS = ["a dog", "a cat", "a chicken"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny")


@pytest.fixture
def server(folder: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        hub.create(REPO, files)
        yield hub


def test_the_recipe_draws_from_a_hub_on_any_number_of_ranks(
    workshop: Workshop, server: LoopbackHub, folder: Path
) -> None:
    import torch
    from diffusers import DiffusionPipeline
    from PIL import Image

    shutil.copytree(MANIFESTS, workshop.folder / "manifests")
    environment = server.environment(workshop.folder / "hf")
    recipe, few = "manifests/stable_diffusion_ranks.yaml", ("-p", "steps=2", "--json")
    planned = json.loads(workshop.command("plan", recipe, *few, **environment).stdout)["nodes"]["draw"]["forecast"]
    assert planned["metrics"] == {"prompts": 3, "compute_dtype": "float32"}
    weights = sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))
    assert 2 * (500 * 2**20 + 0.97 * weights) < planned["ram"] < 2 * (500 * 2**20 + weights)
    gpus = tuple(Gpu(index, "GPU", 2**34, 2**34) for index in range(2))
    (workshop.folder / "gpus.json").write_text(json.dumps(asdict(replace(MACHINE, gpus=gpus))))
    beside = workshop.command("plan", recipe, *few, "--machine", "gpus.json", **environment).stdout
    vram = json.loads(beside)["nodes"]["draw"]["forecast"]["vram"]
    assert set(vram) == {"0", "1"}
    assert min(vram.values()) > 512 * 2**20, "a context and a workspace are there too"
    drawn = []
    for ranks in ("2", "1"):
        done = workshop.command("run", recipe, "-p", f"ranks={ranks}", *few, **environment)
        assert done.returncode == 0, done.stderr
        drawn.append(json.loads(done.stdout.splitlines()[-1])["nodes"]["draw"])
    out = Path(drawn[0]["path"])
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert rows == [
        {"index": index, "prompt": prompt, "image": f"files/{index:06}.png"} for index, prompt in enumerate(PROMPTS)
    ]
    assert drawn[0]["digest"] == drawn[1]["digest"]
    assert drawn[0]["metrics"]["compute_dtype"] == "float32"
    saved = workshop.folder / "dist/pictures/results"
    plain = DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    plain.set_progress_bar_config(disable=True)
    for row in rows:
        wanted = plain(row["prompt"], generator=torch.Generator().manual_seed(17 + row["index"]), num_inference_steps=2)
        made = Image.open(io.BytesIO((saved / row["image"]).read_bytes()))
        assert made.tobytes() == wanted.images[0].tobytes()


RECIPE = """\
version: 1
name: pictures
stages:
  download: {uses: download, with: {path: MODEL}}
  dispatch: {uses: dispatch, inputs: download}
  draw:
    uses: distributed-infer
    inputs: INPUTS
    with: {task: text-to-image, prompts: [a dog], MORE}
"""


@pytest.mark.parametrize(
    ("inputs", "more", "cause"),
    [
        ("download", "generation: {}", "text-to-image needs a pipeline of diffusers, and the model is none"),
        ("{model: download, placement: dispatch}", "generation: {}", "placement"),
        ("download", "generation: {num_inference_steps: 0}", "num_inference_steps"),
        ("download", "max_new_tokens: 4", "text-to-image makes no tokens"),
        ("download", "engine: openai, serving: {url: 'http://127.0.0.1:1', model: m}", "text-to-image"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_the_plan(
    workshop: Workshop, tmp_path: Path, inputs: str, more: str, cause: str
) -> None:
    make_checkpoint(workshop.folder / "model", "opt", dtype="float16")
    text = RECIPE.replace("MODEL", "model").replace("INPUTS", inputs).replace("MORE", more)
    workshop.manifest.write_text(text)
    planned = workshop.command("plan", str(workshop.manifest))
    assert planned.returncode == 2
    assert "recipe.yaml:" in planned.stderr
    assert cause in planned.stderr
    assert "Traceback" not in planned.stderr


def test_without_diffusers_the_plan_says_what_to_install(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigpipe.bigmodel.tasks.processing.find_spec", lambda name: None)
    asked: dict[str, Any] = {"task": "text-to-image", "prompts": PROMPTS}
    wired = Forecast(output=Pipeline(ModelDescription(config={}, path=folder)))
    with pytest.raises(UsageError, match="text-to-image needs diffusers, which is not installed") as refused:
        pipelines.check(InferParams(**asked), check_context(tmp_path, base=tmp_path, inputs={"model": (wired,)}))
    assert "bigpipe-ml[diffusers]" in str(refused.value.cure)


def test_an_estimate_of_a_pipeline_is_forecast_as_it_is_made(folder: Path, tmp_path: Path) -> None:
    wired = Forecast(output=Pipeline(describe_pipeline(folder)))
    params = EstimateParams.model_validate({"dtypes": ["float16"]})
    foreseen = estimating.forecast(params, forecast_context(tmp_path, inputs={"model": (wired,)}))
    made = estimating.run(params, stage_context(tmp_path / "run", inputs={"model": (folder,)}))
    assert isinstance(made, StageResult)
    assert foreseen.metrics == made.metrics.model_dump(mode="json")
    elsewhere = Forecast(output=Pipeline(ModelDescription(config=None)))
    assert estimating.forecast(params, forecast_context(tmp_path, inputs={"model": (elsewhere,)})).unknown


def test_weights_that_are_cast_for_a_gpu_are_in_ram_before(folder: Path, tmp_path: Path) -> None:
    model = describe_pipeline(folder)
    machine = replace(MACHINE, gpus=(Gpu(0, "GPU", 2**34, 2**34),))
    context = forecast_context(tmp_path, inputs={"model": (Forecast(output=Pipeline(model)),)}, machine=machine)

    def ram(dtype: str | None) -> int:
        params = InferParams.model_validate({"task": "text-to-image", "prompts": ["a"], "dtype": dtype})
        return pipelines.forecast(params, context).ram or 0

    floats = sum(math.prod(shape) for dtype, shape in (model.tensors or {}).values() if dtype == "float32")
    assert ram(None) == ram("float32") > 0
    assert ram("bfloat16") - ram("float32") == 2 * floats > 0
