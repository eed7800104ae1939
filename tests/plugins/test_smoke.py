"""Smoke runs of recipes about models: small ones of the same kind, through every kind, with nothing written outside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.contexts import forecast_context, stage_context
from support.hub import LoopbackHub
from support.hub_state import files_of
from support.models import make_checkpoint
from support.workshop import Workshop, statuses

from bigpipe.bigmodel.checkpoint import describe_checkpoint, open_checkpoint
from bigpipe.bigmodel.formats import format_of
from bigpipe.bigmodel.quantization import quantize_checkpoint
from bigpipe.bigmodel.tasks import TASKS
from bigpipe.errors import BigpipeError, Offline, UsageError
from bigpipe.orchestrator.stage import SMOKE, Forecast
from bigpipe.plugins.dispatch import STAGE as DISPATCH, DispatchParams
from bigpipe.plugins.distributed_infer import STAGE as INFER, InferParams
from bigpipe.plugins.download import STAGE as DOWNLOAD, DownloadParams
from bigpipe.plugins.evaluate import STAGE as EVALUATE, EvaluateParams
from bigpipe.plugins.finetune import STAGE as FINETUNE, FinetuneParams
from bigpipe.plugins.quantize import STAGE as QUANTIZE, QuantizeParams
from bigpipe.plugins.save import STAGE as SAVE, SaveParams

LARGE = {"hidden_size": 160, "word_embed_proj_dim": 160, "ffn_dim": 640, "num_hidden_layers": 9,
         "num_attention_heads": 10}  # fmt: skip
RECIPE = """\
version: 1
name: to-the-hub
stages:
  download: {uses: download, with: {repo: org/model}, cache: false}
  shard: {uses: shard, inputs: download, with: {max_shard_size: 5GB, dtype: float16}, cache: false}
  quantize: {uses: quantize, inputs: shard, with: {scheme: int8}, gates: ["ratio >= 100"]}
  dispatch:
    uses: dispatch
    inputs: quantize
    with: {device_map: auto, max_memory: {0: 22GiB, cpu: 48GiB, disk: 200GiB}, batch_size: 8}
  generate:
    uses: distributed-infer
    inputs: {model: quantize, placement: dispatch}
    with: {task: text-generation, prompts: prompts.jsonl, batch_size: 8, max_new_tokens: 512, split: static}
    launch: {num_processes: 8}
  save:
    uses: save
    inputs: {model: quantize, results: generate}
    with: {to: "hf://ada/model-int8", private: false}
"""


@pytest.fixture(scope="module")
def pickled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OPT in several .bin files."""
    folder = tmp_path_factory.mktemp("pickled")
    return make_checkpoint(folder, "opt", format="bin", max_shard_size="2MB", **LARGE)


@pytest.fixture
def hub(pickled: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        server.users["secret-token"] = "ada"
        server.create("org/model", files_of(pickled))
        yield server


@pytest.fixture
def shop(hub: LoopbackHub, workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    for name, value in {**hub.environment(tmp_path / "hf"), "HF_TOKEN": "secret-token"}.items():
        monkeypatch.setenv(name, value)
    workshop.manifest.write_text(RECIPE)
    rows = [json.dumps({"prompt": f"number {number}"}) for number in range(100)]
    (workshop.folder / "prompts.jsonl").write_text("\n".join(rows))
    return workshop


def test_from_pickles_on_the_hub_to_results_over_ranks(hub: LoopbackHub, shop: Workshop) -> None:
    result = shop.run(smoke=True)
    assert result.exit_code == 0, result.errors
    assert set(statuses(result).values()) == {"succeeded"}
    assert result["shard"].metrics["shards"] > 1
    assert result["quantize"].metrics["quantized"] == 4 * 6
    assert {"cpu", "disk"} == set(result["dispatch"].metrics["predicted"])
    assert result["generate"].metrics["prompts"] == 4
    assert len(result["generate"].metrics["timeline"]) == 2
    assert not result["save"].metrics["url"].startswith("hf://")
    assert result["quantize"].gates[0].passed is False
    assert "ada/model-int8" not in hub.repositories
    heads = sum(file.stat().st_size for file in (shop.folder / "hf").rglob("*.bin"))
    assert heads == 0
    assert not (shop.folder / "store" / "runs").exists()


def test_training_and_merging(workshop: Workshop, pickled: Path) -> None:
    workshop.manifest.write_text(f"""\
version: 1
stages:
  download: {{uses: download, with: {{path: {pickled}}}}}
  quantize: {{uses: quantize, inputs: download, with: {{scheme: nf4}}}}
  finetune:
    uses: finetune
    inputs: quantize
    with: {{data: [one, two, three, four, five], num_train_epochs: 3, lora: {{target_modules: [q_proj, v_proj]}}}}
  merge: {{uses: merge, inputs: {{model: download, adapter: finetune}}}}
  save: {{uses: save, inputs: {{model: merge}}, with: {{to: out, overwrite: true}}}}
""")
    result = workshop.run(smoke=True)
    assert result.exit_code == 0, result.errors
    assert result["finetune"].metrics["steps"] == 2
    assert result["merge"].metrics["merged"] == 8
    assert not (workshop.folder / "out").exists()


def small_model(source: Path, root: Path, **given: Any) -> Path:
    params = DownloadParams(path=str(source), miniature=True, **given)
    foreseen = DOWNLOAD.forecast(params, forecast_context(root))
    done = DOWNLOAD.run(params, stage_context(root))
    found = describe_checkpoint(root / "out")
    assert (found.config, found.tensors) == (foreseen.output.config, foreseen.output.tensors)
    assert sum(size for _, size in done.files.values()) == done.metrics.bytes  # type: ignore[attr-defined]
    return root / "out"


def test_a_small_model_comes_as_its_large_one_is_stored(pickled: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(pickled, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))  # as nobody stored it
    made = open_checkpoint(small_model(source, tmp_path))
    assert made.format == "bin"
    assert len(made.files) > 1
    assert {tensor.dtype for tensor in made.tensors.values()} == {"float32"}
    assert made.tied
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (pickled / "tokenizer.json").read_bytes()


def test_the_same_one_is_made_each_time(pickled: Path, tmp_path: Path) -> None:
    one, other = (small_model(pickled, tmp_path / name) for name in ("one", "other"))
    assert {path.name: path.read_bytes() for path in one.iterdir()} == {
        path.name: path.read_bytes() for path in other.iterdir()
    }


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_a_quantized_one_is_made_in_that_format(scheme: str, pickled: Path, tmp_path: Path) -> None:
    quantize_checkpoint(pickled, tmp_path / "quantized", scheme=scheme)
    made = describe_checkpoint(small_model(tmp_path / "quantized", tmp_path / "work"))
    assert format_of(made).name == scheme
    assert made.nbytes is not None
    assert made.nbytes < 500_000


def test_modules_that_are_left_alone_are_those_that_the_small_model_has(pickled: Path, tmp_path: Path) -> None:
    layer = "model.decoder.layers.8.fc1"
    quantize_checkpoint(pickled, tmp_path / "quantized", scheme="nf4", skip_modules=["lm_head", layer])
    made = describe_checkpoint(small_model(tmp_path / "quantized", tmp_path / "packed"))
    assert format_of(made).name == "nf4"
    plain = describe_checkpoint(small_model(pickled, tmp_path / "plain"))
    wired = {"model": (Forecast(output=plain),)}
    context = forecast_context(tmp_path, inputs=wired)

    def small(**given: Any) -> QuantizeParams:
        return QUANTIZE.smoke(QuantizeParams(scheme="nf4", **given), context)  # type: ignore[misc]

    params = small(skip_modules=["lm_head", layer], keep_in_fp32_modules=["model.decoder.layers.0.fc2", layer])
    assert params.skip_modules == ("lm_head",)
    assert params.keep_in_fp32_modules == ("model.decoder.layers.0.fc2",)
    assert small(skip_modules=[layer]).skip_modules == ()
    assert small().model_fields_set == {"scheme"}
    assert QUANTIZE.forecast(params, context).output is not None  # type: ignore[misc]


ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "org/model", "r": 2, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"adapter_config.json": ADAPTER, "adapter_model.safetensors": {}}, "is an adapter"),
        ({"model_index.json": {"_class_name": "StableDiffusionPipeline"}}, "pipeline of diffusers"),
        (
            {
                "config.json": {"model_type": "opt", "quantization_config": {"quant_method": "gptq", "bits": 4}},
                "model.safetensors": {"a.qweight": "int32"},
            },
            "GPTQ",
        ),
    ],
)
def test_what_no_small_one_is_made_of_is_named(files: dict[str, Any], words: str, tmp_path: Path) -> None:
    import numpy
    from safetensors.numpy import save_file

    source = tmp_path / "source"
    source.mkdir()
    for name, content in files.items():
        if name.endswith(".json"):
            (source / name).write_text(json.dumps(content))
        else:
            tensors = {key: numpy.zeros((8, 8), dtype) for key, dtype in content.items()}
            save_file(tensors or {"base_model.model.q_proj.lora_A.weight": numpy.zeros((2, 8))}, source / name)
    params = DownloadParams(path=str(source))
    with pytest.raises(UsageError, match=words):
        DOWNLOAD.smoke(params, forecast_context(tmp_path))  # type: ignore[misc]


def test_without_a_network_it_says_what_is_missing(hub: LoopbackHub, shop: Workshop) -> None:
    with pytest.raises(BigpipeError) as refused:
        shop.run(smoke=True, offline=True)
    assert isinstance(refused.value, Offline)
    assert "org/model" in str(refused.value)


def test_a_class_of_ones_own_is_refused_and_synthetic_weights_are_made_small(tmp_path: Path) -> None:
    own = DownloadParams.model_validate({"repo": "org/model", "architecture": {"class": "mine:Net"}})
    with pytest.raises(UsageError, match="mine:Net"):
        DOWNLOAD.smoke(own, forecast_context(tmp_path))  # type: ignore[misc]
    config = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 32000}
    made_up = DownloadParams.model_validate({"synthetic": {"config": config, "max_shard_size": "1GB"}})
    small = DOWNLOAD.smoke(made_up, forecast_context(tmp_path))  # type: ignore[misc]
    assert small.synthetic is not None
    assert isinstance(small.synthetic.config, dict)
    assert small.synthetic.config["hidden_size"] == 64
    assert small.synthetic.max_shard_size < 10_000_000
    assert DOWNLOAD.forecast(small, forecast_context(tmp_path)).write_bytes < 30_000_000  # type: ignore[operator]


def test_few_rows_steps_and_tokens_are_left(tmp_path: Path) -> None:
    context = forecast_context(tmp_path, environment={SMOKE: "/tmp/smoke"}, node="save")
    infer = INFER.smoke(InferParams(task="text-generation", prompts="p.jsonl", batch_size=64), context)  # type: ignore[misc]
    assert (infer.limit, infer.max_new_tokens, infer.batch_size) == (4, 4, 2)
    tuned = FINETUNE.smoke(FinetuneParams(data="d.jsonl", num_train_epochs=3), context)  # type: ignore[misc]
    assert (tuned.max_steps, tuned.num_train_epochs, tuned.limit) == (2, None, 16)
    FinetuneParams.model_validate(tuned.model_dump())
    measured = EVALUATE.smoke(EvaluateParams(data="t.txt"), context)  # type: ignore[misc]
    assert (measured.max_tokens, measured.sequence_length) == (256, 64)
    saved = SAVE.smoke(SaveParams(to="hf://ada/x", private=False, revision="next"), context)  # type: ignore[misc]
    assert saved.to == "/tmp/smoke/saved/save"
    SaveParams.model_validate(saved.model_dump(exclude_unset=True))


def test_a_map_keeps_the_parts_that_the_small_model_has(pickled: Path, tmp_path: Path) -> None:
    described = describe_checkpoint(small_model(pickled, tmp_path / "model"))
    context = forecast_context(tmp_path, inputs={"model": (Forecast(output=described),)})
    written = {
        "model.decoder.embed_tokens": 3,
        "model.decoder.layers.0": 0,
        "model.decoder.layers.8": "disk",
        "": "cpu",
    }
    placed = DISPATCH.smoke(DispatchParams.model_validate({"device_map": written}), context)  # type: ignore[misc]
    assert placed.device_map == {"model.decoder.embed_tokens": "cpu", "model.decoder.layers.0": "cpu", "": "cpu"}


def test_rows_end_at_the_limit(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a\nb\nc\n")
    params = InferParams(task="text-generation", prompts="p.txt", limit=2)
    assert INFER.forecast(params, forecast_context(tmp_path, base=tmp_path)).metrics["prompts"] == 2


@pytest.mark.parametrize("task", [*TASKS, "mine:answer"])
def test_fields_that_a_task_does_not_heed_stay_unwritten(task: str, tmp_path: Path) -> None:
    params = InferParams(task=task, prompts=["a"])
    small = INFER.smoke(params, forecast_context(tmp_path))  # type: ignore[misc]
    written = small.model_dump(exclude_unset=True, by_alias=True)
    assert InferParams.model_validate(written).limit == 4
    assert ("max_new_tokens" in written) == (task in MAKE_TOKENS)


MAKE_TOKENS = ("text-generation", "text2text-generation", "image-text-to-text")


def test_a_function_that_is_given_a_length_is_given_a_small_one(tmp_path: Path) -> None:
    params = InferParams(task="mine:answer", prompts=["a"], max_new_tokens=64)
    small = INFER.smoke(params, forecast_context(tmp_path))  # type: ignore[misc]
    assert small.max_new_tokens == 4


def test_tasks_without_a_length_functions_and_requests_run(workshop: Workshop, pickled: Path) -> None:
    (workshop.folder / "mine.py").write_text("def answer(model, rows):\n    return [{'text': 'x'} for row in rows]\n")
    body = {"model": "m", "prompt": "Hello", "max_tokens": 64}
    request = {"custom_id": "one", "method": "POST", "url": "/v1/completions", "body": body}
    (workshop.folder / "requests.jsonl").write_text(json.dumps(request))
    workshop.manifest.write_text(f"""\
version: 1
trust: {{modules: [mine]}}
stages:
  download: {{uses: download, with: {{path: {pickled}}}}}
  features: {{uses: distributed-infer, inputs: download, with: {{task: feature-extraction, prompts: [one, two]}}}}
  mine: {{uses: distributed-infer, inputs: download, with: {{task: "mine:answer", prompts: [one, two]}}}}
  requests:
    uses: distributed-infer
    inputs: download
    with: {{task: text-generation, prompts: requests.jsonl, row_format: openai-batch, max_new_tokens: 64}}
""")
    result = workshop.run(smoke=True)
    assert result.exit_code == 0, result.errors
    assert {name: result[name].metrics["prompts"] for name in ("features", "mine", "requests")} == {
        "features": 2, "mine": 2, "requests": 1
    }  # fmt: skip
