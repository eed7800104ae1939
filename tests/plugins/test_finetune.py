"""`finetune` over ranks, through kills, in a recipe, and what a plan says of it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from support.contexts import Lineage, check_context, forecast_context
from support.launching import MACHINE, TESTS, make_job
from support.media import make_whisper, tones, write_wav
from support.models import make_checkpoint
from support.workshop import Workshop, statuses

from bigpipe.bigmodel.architecture import describe_architecture
from bigpipe.bigmodel.checkpoint import AdapterDescription, ModelDescription, describe_checkpoint
from bigpipe.bigmodel.quantization import quantize_checkpoint
from bigpipe.bigmodel.training import TrainedAdapter, check_adapter
from bigpipe.errors import GateFailed, UsageError
from bigpipe.orchestrator.contract.events import Event, LogLine, Progress
from bigpipe.orchestrator.launch.executors import executor
from bigpipe.orchestrator.launch.jobs import Outcome
from bigpipe.orchestrator.stage import Forecast, Gpu, Launch
from bigpipe.plugins import finetuning, training_needs
from bigpipe.plugins.finetune import STAGE, FinetuneParams, in_words

pytest.importorskip("peft")
ROWS = ["the cat sat on the mat", "hello world", "paris is in france", "a cat is in paris", "on and on", "a mat!"]
FIELDS: dict[str, Any] = {"data": ROWS, "max_steps": 6, "learning_rate": 1e-2, "save_steps": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "opt")


def params(**fields: Any) -> FinetuneParams:
    return FinetuneParams(**{**FIELDS, **fields})


def start(folder: Path, model: Path, ranks: int = 1, report: Any = bool, **fields: Any) -> Outcome:
    """What the command does: a launcher, and so many ranks."""
    folder.mkdir(exist_ok=True)
    job = make_job(
        folder, stage=STAGE, module="bigpipe.plugins.finetune:STAGE", params={**FIELDS, **fields}, timeout=280,
        report=report, inputs={"model": (model,)}, launch=Launch(num_processes=ranks),
        lineage=(Lineage("download", "download", "k", "d", {"repo": "owner/name"}, {"commit": "c" * 40}),),
        parent_environment={
            **os.environ, "PYTHONPATH": f"{TESTS.parent / 'src'}:{TESTS}", "OMP_NUM_THREADS": "1",
        },
    )  # fmt: skip
    return executor("ranks").start(job)


def adapter(folder: Path) -> bytes:
    return (folder / "work" / "out" / "adapter_model.safetensors").read_bytes()


def check(tmp_path: Path, model: Path, ranks: int = 1, **fields: Any) -> None:
    wired = {"model": (Forecast(output=describe_checkpoint(model)),)}
    ctx = check_context(tmp_path, inputs=wired, machine=MACHINE, launch=Launch(num_processes=ranks))
    finetuning.check(params(**fields), ctx)


def test_ranks_share_the_rows_of_a_step(tmp_path: Path, model: Path) -> None:
    """Two ranks with a row each take the rows that one takes with two batches."""
    events: list[Event] = []
    plain = make_checkpoint(tmp_path / "llama", "llama")  # which has no dropout of its own
    lora = {"lora_dropout": 0.0}
    two = start(tmp_path / "two", plain, ranks=2, report=events.append, num_train_epochs=1, max_steps=None, lora=lora)
    assert two.metrics["steps"] == 3
    told = [event for event in events if isinstance(event, Progress) and event.task == "training"]
    assert (told[-1].done, told[-1].total, told[-1].rank) == (3, 3, 0)
    assert told[-1].note.startswith("loss ")
    one = start(tmp_path / "one", plain, max_steps=3, batch_size=2, lora=lora)
    # The same three steps in another order of rows: not the same numbers, but close to them
    assert two.metrics["loss"]["curve"][0][1] == pytest.approx(one.metrics["loss"]["curve"][0][1], rel=0.1)
    config = json.loads((tmp_path / "two" / "work" / "out" / "adapter_config.json").read_bytes())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", "c" * 40)
    assert str(tmp_path) not in json.dumps(config)


def test_metrics_and_their_words(tmp_path: Path, model: Path) -> None:
    events: list[Event] = []
    made = start(tmp_path, model, report=events.append, eval_data=ROWS[:2], max_length=8)
    said = [event.line for event in events if isinstance(event, LogLine)]
    assert f"{sum(len(text) > 8 for text in [*ROWS, *ROWS[:2]])} rows longer than 8 tokens: cut to that" in said
    metrics = made.metrics
    assert metrics["steps"] == 6
    assert metrics["trainable_parameters"] == 2 * 2 * 8 * (32 + 32)
    assert metrics["loss"]["curve"] == [[n, loss] for n, (_, loss) in enumerate(metrics["loss"]["curve"], 1)]
    assert metrics["loss"]["first"] == metrics["loss"]["curve"][0][1]
    assert metrics["loss"]["last"] == metrics["loss"]["curve"][-1][1]
    assert metrics["eval_loss"] > 0
    assert metrics["peak"]["cpu"] > 0
    assert in_words(metrics).startswith(f"loss {metrics['loss']['first']:.4g} → {metrics['loss']['last']:.4g} in 6 ")


def test_a_curve_has_200_points_at_most_the_first_and_the_last_among_them() -> None:
    for steps in (1, 2, 199, 200, 201, 400, 600, 1000, 4001):
        made = TrainedAdapter(
            path=Path(), losses=list(map(float, range(steps))), eval_loss=None, trainable_parameters=1,
            tokens_per_second=1.0, peak={}, files={},
        )  # fmt: skip
        loss = finetuning.metrics_of(made).loss
        assert loss is not None
        assert len(loss.curve) <= 200
        assert len(loss.curve) > min(steps, 200) / 2
        assert [loss.curve[0], loss.curve[-1]] == [[1, 0.0], [steps, steps - 1.0]]


RECIPE = """
version: 1
name: tune
params: {{scheme: int8, ranks: 1, bound: 100}}
stages:
  download: {{uses: download, with: {{path: {model}}}}}
  quantize: {{uses: quantize, inputs: download, with: {{scheme: "${{params.scheme}}"}}}}
  finetune:
    uses: finetune
    inputs: quantize
    with: {{data: rows.jsonl, max_steps: 3, learning_rate: 0.001}}
    launch: {{num_processes: "${{params.ranks}}"}}
    gates: ["loss.last <= ${{params.bound}}"]
"""


def test_a_recipe_tunes_a_quantized_model_and_knows_it_again(tmp_path: Path, model: Path) -> None:
    shop = Workshop(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ROWS))
    options: dict[str, Any] = {"store": tmp_path / "store"}
    first = shop.run(RECIPE.format(model=model), **options)
    assert statuses(first) == dict.fromkeys(("download", "quantize", "finetune"), "succeeded")
    assert sorted(path.name for path in first.path("finetune").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    again = shop.run(**options)
    assert statuses(again)["finetune"] == "cached"
    assert shop.command("report", "-o", "page.html").returncode == 0
    page = (tmp_path / "page.html").read_text()
    assert "Curve of loss: finetune" in page
    assert "<polyline" in page
    shop.manifest.write_text(RECIPE.format(model=model).replace("max_steps: 3", "max_steps: 3, save_steps: 1"))
    assert statuses(shop.run(**options))["finetune"] == "cached"
    shop.manifest.write_text(RECIPE.format(model=model).replace("bound: 100", "bound: 0.1"))
    with pytest.raises(GateFailed, match=r"loss.last <= 0.1"):
        shop.run(**options)
    plan = shop.command("plan", "recipe.yaml", "-p", "ranks=2", "-p", "bound=100")
    assert "facts.ranks 1 → 2" in plan.stdout


def test_what_a_plan_says(tmp_path: Path, model: Path) -> None:
    wired = {"model": (Forecast(output=describe_checkpoint(model)),)}
    ctx = forecast_context(tmp_path, inputs=wired, machine=MACHINE, launch=Launch(num_processes=2))
    said = training_needs.forecast(params(), ctx)
    assert said.metrics == {"steps": 6, "trainable_parameters": 2048}
    assert said.ram is not None
    assert said.ram > 2 * training_needs.RANK_BASE
    assert "6 steps over 6 rows, 2 ranks; 2,048 parameters on 4 modules" in said.summary


def test_a_plan_counts_what_an_encoder_reads(tmp_path: Path) -> None:
    """A few words to make of a long text: its tokens take most of the memory, up to max_length."""
    model = make_checkpoint(tmp_path / "t5", "t5")
    wired = {"model": (Forecast(output=describe_checkpoint(model)),)}

    def ram(tokens: int, **fields: Any) -> int:
        rows = [{"input": "a" * tokens, "text": "yes"}] * 2
        asked = params(task="seq2seq-lm", **{"data": rows, **fields})
        found = training_needs.forecast(asked, forecast_context(tmp_path, inputs=wired, machine=MACHINE)).ram
        assert found is not None
        return found

    layer = 34 * 32 * 2  # of 32 numbers, in float32
    assert ram(500, gradient_checkpointing=False) - ram(5, gradient_checkpointing=False) >= 2 * 495 * layer
    assert ram(500) > ram(5)
    assert ram(500, max_length=50) == ram(50, max_length=50)
    assert (
        ram(5, data=[{"input": "a", "text": "b" * 9}] * 1000) > ram(5, data=[{"input": "a", "text": "b" * 9}]) + 10**6
    )


WRONG = {
    "column": ({"data": [{"body": "x"}]}, "row|there is no 'text'"),
    "empty": ({"data": [*ROWS, ""]}, r"data\[6\]: there is nothing to learn in 'text'"),
    "missing": ({"data": "rows.jsonl"}, "there is no file rows.jsonl"),
    "rows": ({"batch_size": 4, "gradient_accumulation_steps": 2}, "6 rows, which is too few: a step takes 8"),
    "module": ({"lora": {"target_modules": ["q_prj"]}}, "the model has no linear module 'q_prj'"),
    "pattern": ({"lora": {"target_modules": "no.*"}}, "matches no module"),
    "task": ({"task": "seq2seq-lm", "input_column": "a", "data": [{"a": "x", "text": "y"}]}, "seq2seq-lm is for"),
    "sound": ({"task": "speech-seq2seq", "data": [{"audio": "no.wav", "text": "y"}]}, "there is no file no.wav"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_plan_refuses(tmp_path: Path, model: Path, name: str) -> None:
    fields, cause = WRONG[name]
    with pytest.raises(UsageError, match=cause) as error:
        check(tmp_path, model, **fields)
    assert error.value.cure
    if name == "module":
        assert error.value.field == "lora.target_modules"
        assert "q_proj" in error.value.cure


def test_a_plan_refuses_a_format_that_is_not_computed_with_and_names_it(tmp_path: Path, model: Path) -> None:
    described = describe_checkpoint(model)
    config = {**(described.config or {}), "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 16}}
    stored = (described.tensors or {}).items()
    codes = {name.removesuffix("weight") + "qweight": ("int32", shape) for name, (_, shape) in stored}
    wired = {"model": (Forecast(output=replace(described, config=config, tensors=codes)),)}
    for asked in (training_needs.forecast, finetuning.check):
        with pytest.raises(UsageError, match=r"its weights are .* \(awq\), which cannot be computed with here"):
            asked(params(), forecast_context(tmp_path, inputs=wired, machine=MACHINE))


def test_a_plan_refuses_what_peft_does_not_adapt_and_foresees_what_it_does(tmp_path: Path) -> None:
    """A class that holds its experts in one parameter: peft is asked, without weights."""
    mixture = make_checkpoint(tmp_path / "mixtral", "mixtral")
    for lora, field in (
        ({"target_modules": ["w1"]}, "lora.target_modules"),
        ({"target_modules": "all-linear"}, "lora.lora_dropout"),
    ):
        with pytest.raises(UsageError, match="peft cannot adapt MixtralForCausalLM") as error:
            check(tmp_path, mixture, lora=lora)
        assert error.value.field == field
    check(tmp_path, mixture)
    wired = {"model": (Forecast(output=describe_checkpoint(mixture)),)}
    said = training_needs.forecast(params(), forecast_context(tmp_path, inputs=wired, machine=MACHINE))
    assert "4 modules" in said.summary


def goes_on(folder: Path, model: ModelDescription, adapter: AdapterDescription) -> AdapterDescription:
    """What a plan foresees of a `finetune` that goes on from an adapter."""
    wired = {"model": (Forecast(output=model),), "adapter": (Forecast(output=adapter),)}
    finetuning.check(params(), check_context(folder, inputs=wired))
    found = training_needs.forecast(params(), forecast_context(folder, inputs=wired, machine=MACHINE)).output
    assert isinstance(found, AdapterDescription)
    return found


def test_a_plan_goes_on_from_adapters_that_finetune_makes_and_merge_does_not_take(tmp_path: Path) -> None:
    """Of experts that a class holds in one parameter."""
    mixture = describe_checkpoint(make_checkpoint(tmp_path / "mixtral", "mixtral"))
    shapes = {"self_attn.q_proj.lora_A": (8, 32), "self_attn.q_proj.lora_B": (32, 8)}
    for module, inputs, outputs in (("mlp.experts.base_layer", 32, 128), ("mlp.experts", 64, 32)):
        shapes |= {f"{module}.lora_A": (4 * 8, inputs), f"{module}.lora_B": (outputs, 4 * 8)}
    prefix = "base_model.model.model.layers"
    tensors = {
        f"{prefix}.{layer}.{name}.weight": ("float32", each) for layer in (0, 1) for name, each in shapes.items()
    }
    config = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]}
    config |= {"target_parameters": ["gate_up_proj", "down_proj"]}
    made = AdapterDescription(config=config, tensors=tensors)
    assert goes_on(tmp_path, mixture, made).tensors == tensors
    other = {name.replace("layers.1", "layers.7"): each for name, each in (made.tensors or {}).items()}
    with pytest.raises(UsageError, match=r"made for another model: MixtralForCausalLM has no .*layers\.7") as error:
        goes_on(tmp_path, mixture, replace(made, tensors=other))
    assert error.value.field == "inputs.adapter"


def test_an_adapter_of_a_convolution_is_gone_on_from_though_it_is_not_merged(tmp_path: Path) -> None:
    path = tmp_path / "whisper"
    make_whisper(path)
    architecture = describe_architecture(path)
    name = next(module.name for module in architecture.modules if module.name.endswith("encoder.conv1"))
    outputs, inputs, width = architecture.by_name[name].tensors[0].shape
    shapes = {"lora_A": (4, inputs, width), "lora_B": (outputs, 4, 1)}
    tensors = {f"base_model.model.{name}.{part}.weight": ("float32", shape) for part, shape in shapes.items()}
    adapter = AdapterDescription(config={"peft_type": "LORA", "r": 4, "target_modules": ["conv1"]}, tensors=tensors)
    check_adapter(adapter, describe_checkpoint(path), architecture)


def test_a_plan_refuses_weights_of_the_model_beside_an_adapter_where_they_are_quantized(tmp_path: Path) -> None:
    plain = make_checkpoint(tmp_path / "model", "llama")
    quantize_checkpoint(plain, tmp_path / "int8", scheme="int8", skip_modules=[])
    prefix, pair = "base_model.model.lm_head", {"lora_A": (4, 32), "lora_B": (264, 4)}
    tensors = {f"{prefix}.{name}.weight": ("float32", shape) for name, shape in pair.items()}
    tensors[f"{prefix}.base_layer.weight"] = ("float32", (264, 32))
    adapter = AdapterDescription(config={"peft_type": "LORA", "r": 4, "target_modules": ["lm_head"]}, tensors=tensors)
    goes_on(tmp_path, describe_checkpoint(plain), adapter)
    with pytest.raises(
        UsageError, match="weights of the model itself, which are quantized in this one: lm_head"
    ) as error:
        goes_on(tmp_path, describe_checkpoint(tmp_path / "int8"), adapter)
    assert error.value.field == "inputs.adapter"


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"num_train_epochs": 1}, "either max_steps or num_train_epochs"),
        ({"max_steps": None}, "either max_steps or num_train_epochs"),
        ({"learning_rate": 0}, "greater than 0"),
        ({"learning_rate": -1e-4}, "greater than 0"),
        ({"input_column": "x"}, "input_column has no meaning"),
    ],
)
def test_fields_are_refused_where_they_are_written(fields: dict[str, Any], cause: str) -> None:
    with pytest.raises(ValidationError, match=cause):
        params(**fields)


def test_what_decides_the_dtype_is_in_the_key_where_none_is_given() -> None:
    gpu = replace(MACHINE, gpus=(Gpu(0, "L4", 24 << 30, 24 << 30),))
    assert STAGE.planning.facts is not None
    assert STAGE.planning.facts(params(), gpu) == {"gpu": True}
    assert STAGE.planning.facts(params(), MACHINE) == {"gpu": False}
    assert STAGE.planning.facts(params(dtype="float32"), gpu) == {}


def test_sounds_that_rows_name_enter_the_key(tmp_path: Path) -> None:
    pytest.importorskip("soundfile")
    whisper = make_whisper(tmp_path / "whisper")
    write_wav(tmp_path / "a.wav", tones(0.2, 16_000))
    shop = Workshop(tmp_path)
    shop.manifest.write_text(f"""
version: 1
name: hear
stages:
  download: {{uses: download, with: {{path: {whisper}}}}}
  finetune:
    uses: finetune
    inputs: download
    with:
      task: speech-seq2seq
      data: [{{audio: a.wav, text: hello world}}]
      max_steps: 2
      lora: {{target_modules: [q_proj, v_proj]}}
""")
    result = shop.run(store=tmp_path / "store")
    assert statuses(result)["finetune"] == "succeeded", result
    assert statuses(shop.run(store=tmp_path / "store"))["finetune"] == "cached"
    write_wav(tmp_path / "a.wav", tones(0.2, 16_000, seed=1))
    assert statuses(shop.run(store=tmp_path / "store"))["finetune"] == "succeeded"


def test_a_state_that_is_not_whole_is_not_believed(tmp_path: Path, model: Path) -> None:
    whole = start(tmp_path / "whole", model)
    folder = tmp_path / "broken"
    start(folder, model)
    (state,) = (folder / "work" / "scratch" / "rank-0").glob("state-*.safetensors")
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)
    again = start(folder, model)
    assert adapter(folder) == adapter(tmp_path / "whole")
    assert again.metrics["loss"] == whole.metrics["loss"]


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_memory_that_a_plan_foresees_is_what_a_rank_takes(tmp_path: Path, checkpointing: bool) -> None:
    """Within 15 %, where activations and weights are half of it."""
    wide: dict[str, Any] = {"hidden_size": 512, "ffn_dim": 2048, "num_hidden_layers": 6, "word_embed_proj_dim": 512}
    model = make_checkpoint(tmp_path / "model", "opt", vocab_size=16000, **wide)
    fields = {
        "data": ["a long row " * 30] * 8,
        "max_steps": 2,
        "batch_size": 8,
        "gradient_checkpointing": checkpointing,
    }
    wired = {"model": (Forecast(output=describe_checkpoint(model)),)}
    said = training_needs.forecast(params(**fields), forecast_context(tmp_path, inputs=wired, machine=MACHINE))
    assert said.ram is not None
    assert said.ram > 1.5 * training_needs.RANK_BASE
    taken = start(tmp_path / "run", model, **fields).metrics["peak"]["cpu"]
    assert taken == pytest.approx(said.ram, rel=0.15)
