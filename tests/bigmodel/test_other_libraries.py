"""Models of diffusers and timm: per component, from headers alone where the library is missing, else from the class."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from support.contexts import forecast_context
from support.hub import LoopbackHub
from support.shells import nbytes, shell

from bigpipe.bigmodel.footprint import Estimate, estimate
from bigpipe.bigmodel.quantization import quantize_checkpoint
from bigpipe.bigmodel.writing import save_checkpoint
from bigpipe.plugins.download import STAGE, DownloadParams

Entry = tuple[str, str, tuple[int, ...]]
UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel", "sample_size": 8, "in_channels": 4, "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [32, 64], "layers_per_block": 1, "cross_attention_dim": 32, "attention_head_dim": 8,
    "norm_num_groups": 8,
}  # fmt: skip
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL", "block_out_channels": [32], "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"], "latent_channels": 4, "norm_num_groups": 8,
}  # fmt: skip
INDEX = {
    "_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "PNDMScheduler"], "safety_checker": [None, None],
}  # fmt: skip
COMPONENTS: dict[str, list[Entry]] = {
    "unet": [("conv_in.weight", "float16", (32, 4, 3, 3)), ("conv_in.bias", "float16", (32,)),
             ("mid_block.attentions.0.proj_in.weight", "float16", (64, 64, 1, 1))],
    "vae": [("encoder.conv_in.weight", "float32", (32, 3, 3, 3)), ("quant_conv.weight", "float32", (8, 8, 1, 1))],
}  # fmt: skip
RESNET: list[Entry] = [
    ("conv1.weight", "float32", (64, 3, 7, 7)), ("bn1.weight", "float32", (64,)), ("bn1.bias", "float32", (64,)),
    ("bn1.running_mean", "float32", (64,)), ("bn1.running_var", "float32", (64,)),
    ("bn1.num_batches_tracked", "int64", ()), ("fc.weight", "float32", (1000, 2048)), ("fc.bias", "float32", (1000,)),
]  # fmt: skip
ABSENT = "building the model needs a library"


@pytest.fixture
def server() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        yield hub


def pipeline(folder: Path, components: dict[str, list[Entry]]) -> dict[str, Path]:
    """A pipeline's files by name, in `folder`."""
    (folder / "scheduler").mkdir(parents=True)
    # Named after the test, as what a child said of a model is kept
    (folder / "model_index.json").write_text(json.dumps({**INDEX, "_name_or_path": folder.parent.name}))
    (folder / "scheduler/scheduler_config.json").write_text("{}")
    for name, config in (("unet", UNET), ("vae", VAE)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        shell(folder / name / "diffusion_pytorch_model.safetensors", components[name])
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.*")}


def both_ways(server: LoopbackHub, folder: Path, components: dict[str, list[Entry]]) -> list[Estimate]:
    """From a repository and from a directory with the same files."""
    server.create("org/pipeline", pipeline(folder / "pipeline", components))
    options: dict[str, Any] = {"dtypes": ["float16"], "memo": folder / "memo"}
    return [
        estimate("org/pipeline", environment=server.environment(folder / "home"), **options),
        estimate(folder / "pipeline", **options),
    ]


@pytest.fixture
def without_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it is not installed."""
    (tmp_path / "absent").mkdir()
    cause = "raise ModuleNotFoundError(\"No module named 'diffusers'\", name='diffusers')\n"
    (tmp_path / "absent" / "diffusers.py").write_text(cause)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "absent"), prepend=os.pathsep)


@pytest.mark.usefixtures("without_diffusers")
def test_a_pipeline_from_headers_alone(server: LoopbackHub, tmp_path: Path) -> None:
    sizes = {name: nbytes(entries) for name, entries in COMPONENTS.items()}
    for found in both_ways(server, tmp_path, COMPONENTS):
        assert found.source == "headers"
        assert ABSENT in found.notes[0]
        assert found.checkpoint is not None
        assert found.checkpoint["bytes"] == sum(sizes.values())
        assert found.checkpoint["components"] == sizes
        assert found["float16"].weights.bytes == sizes["unet"] + sizes["vae"] // 2
        assert set(found.architecture.modules[0].children) == set(sizes)
        assert "unet " in found.render()


@pytest.mark.usefixtures("without_diffusers")
@pytest.mark.parametrize("singles", [0, 1, 2])
def test_a_directory_with_single_files_of_it_in_the_root_is_the_pipeline(tmp_path: Path, singles: int) -> None:
    """As stable-diffusion-3.5-large and FLUX.1-dev are published; and of a part that has a variant, that one counts."""
    folder = tmp_path / "pipeline"
    pipeline(folder, COMPONENTS)
    for name in ("sd3_large.safetensors", "sd3_small.safetensors")[:singles]:
        shell(folder / name, RESNET)
    half = [(name, "float16", shape) for name, _, shape in COMPONENTS["vae"]]
    shell(folder / "vae/diffusion_pytorch_model.fp16.safetensors", half)
    unet = nbytes(COMPONENTS["unet"])
    for variant, vae in ((None, COMPONENTS["vae"]), ("fp16", half)):
        found = estimate(folder, dtypes=["float16"], variant=variant, memo=tmp_path / "memo")
        assert found.checkpoint is not None
        assert found.checkpoint["components"] == {"unet": unet, "vae": nbytes(vae)}
        params = DownloadParams.model_validate({"path": str(folder), "variant": variant})
        planned = STAGE.forecast(params, forecast_context(tmp_path)).output
        assert planned.description.nbytes == unet + nbytes(vae)


def test_a_pipeline_from_its_classes(server: LoopbackHub, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", exc_type=Exception)
    models = {
        "unet": diffusers.UNet2DConditionModel.from_config(UNET), "vae": diffusers.AutoencoderKL.from_config(VAE)
    }  # fmt: skip
    components = {
        name: [(key, "float16", tuple(tensor.shape)) for key, tensor in model.state_dict().items()]
        for name, model in models.items()
    }
    for found in both_ways(server, tmp_path, components):
        assert (found.notes, found.architecture.class_name) == ((), "StableDiffusionPipeline")
        assert found.checkpoint is not None
        assert found.checkpoint["components"] == {name: nbytes(entries) for name, entries in components.items()}
        assert found["float16"].counts.parameters == sum(model.num_parameters() for model in models.values())
        assert found["float16"].weights.basis == "exact"


@pytest.mark.skipif(find_spec("timm") is not None, reason="timm is installed")
def test_a_timm_repository_without_timm(server: LoopbackHub, tmp_path: Path) -> None:
    config = {"architecture": "resnet50", "num_classes": 1000, "pretrained_cfg": {"tag": "a1_in1k"}}
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": shell(tmp_path / "timm", RESNET)}
    server.create("timm/resnet50", files)
    found = estimate("timm/resnet50", dtypes=["float32"], environment=server.environment(tmp_path / "home"))
    assert ABSENT in found.notes[0]
    assert found.checkpoint is not None
    assert found.checkpoint["bytes"] == nbytes(RESNET)
    assert found["float32"].weights.bytes == nbytes(RESNET)
    # Statistics of batch norms are buffers, and a counter of them no float
    assert found["float32"].buffers.bytes == 2 * 64 * 4 + 8
    assert found["float32"].counts.parameters == sum(size for size in (64 * 147, 64, 64, 1000 * 2048, 1000))


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """timm and diffusers as they are beside a torchvision that was made for another torch."""
    cause = "operator torchvision::nms does not exist"
    for name in ("timm", "diffusers"):
        (tmp_path / "broken" / name).mkdir(parents=True)
        (tmp_path / "broken" / name / "__init__.py").write_text(f"raise RuntimeError({cause!r})\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"), prepend=os.pathsep)
    return cause


def test_a_library_that_is_broken_leaves_the_headers(server: LoopbackHub, tmp_path: Path, broken: str) -> None:
    config = {"architecture": "resnet50", "num_classes": 1000}
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": shell(tmp_path / "timm", RESNET)}
    server.create("timm/resnet50", files)
    found = estimate("timm/resnet50", dtypes=["float32"], environment=server.environment(tmp_path / "home"))
    assert "timm is installed" in found.notes[0]
    assert broken in found.notes[0]
    assert found["float32"].weights.bytes == nbytes(RESNET)
    for found in both_ways(server, tmp_path, COMPONENTS):
        assert "diffusers is installed" in found.notes[0]
        assert broken in found.notes[0]
        assert found.source == "headers"


@pytest.mark.parametrize(("library", "config"), [("timm", {"architecture": "resnet50"}), ("diffusers", UNET)])
def test_a_library_that_is_broken_and_no_weights(
    tmp_path: Path, broken: str, library: str, config: dict[str, Any]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "bigpipe", "estimate", str(tmp_path / "model"), "--store", str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert (
        f"{tmp_path / 'model'}: {library} is installed, but importing it fails: RuntimeError: {broken}" in done.stderr
    )
    assert f"python -c 'import {library}'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("limit", ["5GB", "30KB"])
def test_a_component_stays_one_that_diffusers_loads(tmp_path: Path, limit: str) -> None:
    diffusers = pytest.importorskip("diffusers", exc_type=Exception)
    sizes = {"sample_size": 8, "patch_size": 1, "in_channels": 4, "num_layers": 1, "attention_head_dim": 8}
    wide = dict.fromkeys(("joint_attention_dim", "caption_projection_dim", "pooled_projection_dim"), 64)
    model = diffusers.SD3Transformer2DModel(**sizes, **wide, num_attention_heads=8, out_channels=4)
    model.save_pretrained(tmp_path / "source")
    save_checkpoint(tmp_path / "source", tmp_path / "cast", dtype="float16", max_shard_size=limit)
    loaded = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "cast", torch_dtype=torch.float16)
    assert all(torch.equal(loaded.state_dict()[name], tensor.half()) for name, tensor in model.state_dict().items())
    assert "dtype" not in json.loads((tmp_path / "cast" / "config.json").read_bytes())

    quantize_checkpoint(tmp_path / "source", tmp_path / "nf4", scheme="nf4", max_shard_size=limit)
    stored = {path.name for path in (tmp_path / "nf4").iterdir() if path.name != "config.json"}
    assert all(name.startswith("diffusion_pytorch_model") for name in stored)
    settings = json.loads((tmp_path / "nf4" / "config.json").read_bytes())["quantization_config"]
    assert settings["llm_int8_skip_modules"] == ["proj_out.bias"]  # null is transformers' own choice; here it is none
