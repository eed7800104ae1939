"""Pictures of prompts, on a tiny pipeline that is made here: what diffusers itself gives for a row and its seed."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from support.media import make_pipeline

from bigpipe.bigmodel.checkpoint import ModelDescription
from bigpipe.bigmodel.hub import describe_pipeline
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.tasks import (
    Answer,
    Answerer,
    Row,
    TaskOptions,
    computing_dtype,
    find_task,
    load_pipeline,
    read_prompts,
)
from bigpipe.errors import UsageError

pytest.importorskip("diffusers", exc_type=Exception)

PROMPTS = ["a dog", "a cat", "a chicken"]
FEW: dict[str, Any] = {"num_inference_steps": 2}
TASK = find_task("text-to-image", Sources())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny")


def bind(folder: Path, seed: int = 0, **arguments: Any) -> Answerer:
    options = TaskOptions(arguments={**FEW, **arguments}, seed=seed)
    return TASK.bind(load_pipeline(folder, "float32", "cpu", options.bounded), folder, options, Sources())


def rows(prompts: list[str]) -> list[Row]:
    return read_prompts(prompts, "prompt", Path())


def pixels(answer: Answer) -> list[bytes]:
    """Of each picture of a row."""
    from PIL import Image

    made = answer.payload.get("images") or [answer.payload["image"]]
    assert all(each.ending == ".png" for each in made)
    return [Image.open(io.BytesIO(each.content)).convert("RGB").tobytes() for each in made]


def assert_alike(one: bytes, other: bytes) -> None:
    """But for what another batch rounds otherwise: one of 255 steps."""
    assert len(one) == len(other)
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) <= 1


def plainly(folder: Path, prompt: str, seed: int, **arguments: Any) -> bytes:
    """What a script with diffusers draws."""
    import torch
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(prompt, generator=torch.Generator().manual_seed(seed), **{**FEW, **arguments})
    return bytes(made.images[0].tobytes())


def test_pictures_are_those_of_a_plain_script(folder: Path) -> None:
    answer = bind(folder, seed=7)
    found = [pixels(answer([row])[0])[0] for row in rows(PROMPTS)]
    assert found == [plainly(folder, prompt, 7 + index) for index, prompt in enumerate(PROMPTS)]
    assert len(set(found)) == len(PROMPTS)


def test_a_row_is_drawn_alike_whoever_stands_beside_it(folder: Path) -> None:
    answer = bind(folder)
    alone, together = [answer([row])[0] for row in rows(PROMPTS)], answer(rows(PROMPTS))
    for one, other in zip(alone, together, strict=True):
        assert_alike(pixels(one)[0], pixels(other)[0])
    assert [pixels(each) for each in together] == [pixels(each) for each in answer(rows(PROMPTS))]


def test_numbers_that_are_none_make_no_picture(folder: Path) -> None:
    options = TaskOptions(arguments=FEW)
    pipeline = load_pipeline(folder, "float32", "cpu", options.bounded)
    weight = next(pipeline.vae.decoder.parameters())
    weight.data = weight.data * math.nan
    with pytest.raises(ValueError, match=r"no number.*dtype: float32"):
        TASK.bind(pipeline, folder, options, Sources())(rows(PROMPTS[:1]))


def test_several_pictures_of_a_prompt(folder: Path) -> None:
    first, second = (pixels(each) for each in bind(folder, num_images_per_prompt=2)(rows(PROMPTS[:2])))
    assert len({*first, *second}) == 4
    for picture, answer in zip((first[0], second[0]), bind(folder)(rows(PROMPTS[:2])), strict=True):
        assert_alike(picture, pixels(answer)[0])


def test_arguments_reach_the_pipeline(folder: Path) -> None:
    given: dict[str, Any] = {"guidance_scale": 2.5, "negative_prompt": "a bird", "height": 48, "width": 24, "eta": 0.5}
    found = bind(folder, **given)(rows(PROMPTS[:1]))[0]
    assert pixels(found)[0] == plainly(folder, PROMPTS[0], 0, **given)
    assert len(pixels(found)[0]) == 48 * 24 * 3


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"width": 30}, "width"),
        ({"guidance_scale": "high"}, "guidance_scale"),
        ({"output_type": "np"}, "output_type"),
        ({"prompt": "a"}, "prompt"),
    ],
)
def test_arguments_are_refused_where_they_are_written(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(UsageError) as error:
        list(TASK.checked(arguments, rows(PROMPTS), None))
    assert error.value.field == f"generation.{field}"


def test_an_argument_that_the_pipeline_does_not_take(folder: Path) -> None:
    with pytest.raises(UsageError, match="StableDiffusionPipeline takes no argument 'guidence_scale'") as error:
        bind(folder, guidence_scale=1.0)
    assert "guidance_scale" in str(error.value.cure)


def test_a_prompt_that_the_pipeline_would_cut(folder: Path) -> None:
    bind(folder)(rows(["a" * 14]))
    with pytest.raises(ValueError, match="17 tokens, and the pipeline reads 16"):
        bind(folder)(rows(["a" * 15]))


@pytest.mark.parametrize(
    "index",
    [
        {"_class_name": ["pipeline", "Mine"]},
        {"_class_name": None},
        {"unet": ["os.path", "join"]},
        {"unet": ["diffusers", "UNet2DConditionModel", "more"]},
        {"unet": [3, "Popen"]},
        {"vae": ["diffusers", "../vae"]},
    ],
)
def test_a_pipeline_with_code_of_its_own_is_refused_before_it_is_loaded(tmp_path: Path, index: dict[str, Any]) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **index}))
    with pytest.raises(UsageError, match=r"model_index\.json names"):
        TASK.check_model(ModelDescription(config={}, path=tmp_path), {}, Sources())


def test_a_part_of_another_library_is_not_made(tmp_path: Path) -> None:
    path = make_pipeline(tmp_path / "odd", vae=["subprocess", "Popen"])
    TASK.check_model(describe_pipeline(path), {}, Sources())
    with pytest.raises(UsageError, match="takes its vae from subprocess"):
        bind(path)


def test_pickles_are_not_read(tmp_path: Path, folder: Path) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file

    path = shutil.copytree(folder, tmp_path / "pickled")
    weights = path / "unet/diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(UsageError, match="no pipeline that can be used: OSError: Error no file named diffusion"):
        bind(path)


@pytest.mark.parametrize("parts", ["*", "[uv]*"])
def test_a_variant_that_is_alone_is_taken(tmp_path: Path, folder: Path, parts: str) -> None:
    """In all parts, or in some: then diffusers takes the others plain."""
    import shutil

    path = shutil.copytree(folder, tmp_path / "variant")
    for weights in path.glob(f"{parts}/*.safetensors"):
        weights.rename(weights.with_suffix(".fp16.safetensors"))
    assert pixels(bind(path)(rows(PROMPTS[:1]))[0]) == pixels(bind(folder)(rows(PROMPTS[:1]))[0])


def test_variants_that_do_not_go_together_are_told(tmp_path: Path, folder: Path) -> None:
    import shutil

    path = shutil.copytree(folder, tmp_path / "variants")
    for part, variant in {"unet": "fp16", "vae": "bf16"}.items():
        weights = path / part / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_suffix(f".{variant}.safetensors"))
    with pytest.raises(UsageError, match=r"no variant is one of all its parts \(unet: fp16; vae: bf16\)"):
        bind(path)


def test_what_is_computed_in(folder: Path) -> None:
    described = describe_pipeline(folder)
    assert computing_dtype(described, None, gpu=False) == "float32"
    assert computing_dtype(described, "bfloat16", gpu=False) == "bfloat16"
    half = ModelDescription(config={}, tensors={"a.w": ("float16", (9, 9)), "b.w": ("float32", (3, 3))})
    assert computing_dtype(half, None, gpu=True) == "float16"
    assert computing_dtype(half, None, gpu=False) == "float32"
