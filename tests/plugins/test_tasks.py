"""Tasks in the stage: the same bytes over ranks, the layers in memory or streamed together, and what a plan refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from support.contexts import forecast_context
from support.inferring import context, infer, results, start, streaming
from support.launching import MACHINE
from support.media import make_vit, make_whisper, tones, write_picture, write_wav
from support.models import make_with_head
from support.workshop import Workshop

from bigpipe.bigmodel.checkpoint import describe_checkpoint
from bigpipe.orchestrator.stage import Forecast
from bigpipe.plugins.distributed_infer import STAGE, InferParams

TEXTS = ["hello world", "the cat sat", "paris is in france.", "on a mat", "is a cat a mat?"]
TASKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "text-classification": ("bert", "ForSequenceClassification", {"num_labels": 3}),
    "token-classification": ("bert", "ForTokenClassification", {"num_labels": 3}),
    "fill-mask": ("bert", "ForMaskedLM", {}),
    "text2text-generation": ("t5", "ForConditionalGeneration", {}),
    "scoring": ("llama", "ForCausalLM", {}),
}
STAYS = {"bert": "bert.embeddings.word_embeddings", "t5": "shared", "llama": "model.embed_tokens"}


def prompts(task: str) -> list[Any]:
    if task == "scoring":
        return [{"prompt": text, "continuation": ["a cat", "paris"]} for text in TEXTS]
    return [f"{text} [MASK]" for text in TEXTS] if task == "fill-mask" else TEXTS


@pytest.fixture(scope="module", params=TASKS)
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(task: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, head, changes = TASKS[task]
    return make_with_head(tmp_path_factory.mktemp("model"), architecture, head, **changes)


def test_two_ranks_and_streamed_layers_give_what_one_rank_gives(tmp_path: Path, task: str, model: Path) -> None:
    asked = InferParams(task=task, prompts=prompts(task), batch_size=2, dtype="float32")
    one, two, disk = (context(tmp_path / name, model, 1 + (name == "two")) for name in ("one", "two", "disk"))
    assert infer(asked, one).errors == 0
    assert infer(asked, two).prompts == len(TEXTS)
    placed = streaming(tmp_path, model, STAYS[TASKS[task][0]])
    metrics = infer(asked, replace(disk, inputs={**disk.inputs, "placement": (placed,)}))
    assert metrics.micro_batches == 3
    assert min(metrics.tokens, metrics.prompt_tokens) > 0
    assert results(one) == results(two) == results(disk)
    assert all(set(line) > {"index", "prompt"} for line in results(one))


def test_pictures_are_rows_of_two_ranks_and_of_streamed_layers(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    model = make_vit(tmp_path / "model", num_hidden_layers=3)
    for number in range(5):
        write_picture(tmp_path / f"pictures/{number}.png", number)
    asked = InferParams(task="image-classification", prompts="pictures/*.png", batch_size=2, dtype="float32")
    one, two, disk = (
        context(tmp_path / name, model, 1 + (name == "two"), base=tmp_path) for name in ("one", "two", "disk")
    )
    assert infer(asked, one).prompts == infer(asked, two).prompts == 5
    placed = streaming(tmp_path, model, "vit.embeddings")
    infer(asked, replace(disk, inputs={**disk.inputs, "placement": (placed,)}))
    assert results(one) == results(two) == results(disk)
    assert [line["prompt"] for line in results(one)] == [f"pictures/{number}.png" for number in range(5)]
    assert all(set(line) == {"index", "prompt", "label", "score"} for line in results(one))


def test_sounds_are_rows_of_two_ranks_and_of_streamed_layers(tmp_path: Path) -> None:
    model = make_whisper(tmp_path / "model")
    for number, seconds in enumerate((1.0, 33.0, 2.0)):
        write_wav(tmp_path / f"sounds/{number}.wav", tones(seconds, 8000, number), 8000)
    fields: dict[str, Any] = {"prompts": "sounds/*.wav", "batch_size": 2, "dtype": "float32"}
    asked = InferParams(task="automatic-speech-recognition", generation={"language": "en"}, **fields)
    one, two, disk = (
        context(tmp_path / name, model, 1 + (name == "two"), base=tmp_path) for name in ("one", "two", "disk")
    )
    assert infer(asked, one).prompts == infer(asked, two).prompts == 3
    placed = streaming(tmp_path, model, "model.decoder.embed_tokens")
    infer(asked, replace(disk, inputs={**disk.inputs, "placement": (placed,)}))
    assert results(one) == results(two) == results(disk)
    assert [line["prompt"] for line in results(one)] == [f"sounds/{number}.wav" for number in range(3)]
    with pytest.raises(ValidationError, match="makes as many tokens as it needs") as error:
        InferParams(task="automatic-speech-recognition", prompts="sounds/*.wav", max_new_tokens=5)
    assert error.value.errors()[0]["loc"] == ("max_new_tokens",)


def test_each_sound_needs_what_the_encoder_makes_of_30_seconds(tmp_path: Path) -> None:
    inputs = {"model": (Forecast(output=describe_checkpoint(make_whisper(tmp_path / "model"))),)}
    for number in range(64):
        write_wav(tmp_path / f"{number}.wav", tones(0.1, 8000), 8000)
    ctx = forecast_context(tmp_path, inputs=inputs, machine=MACHINE).within(base=tmp_path)
    asked = InferParams(task="automatic-speech-recognition", prompts="*.wav", dtype="float32")
    single, many = (STAGE.forecast(asked.model_copy(update={"batch_size": each}), ctx).ram for each in (1, 64))
    assert single is not None
    assert many is not None
    assert many - single >= 63 * 1500 * (2 * 64 + 4 * 32) * 4, "frames, widths of its feed-forward part, bytes"


def test_more_pictures_at_once_need_more_memory(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    for number in range(64):
        write_picture(tmp_path / f"{number}.png")
    found = []
    for side, batch_size in ((32, 1), (32, 64), (256, 64)):
        model = make_vit(tmp_path / str(side), image_size=side)
        ctx = forecast_context(
            tmp_path, inputs={"model": (Forecast(output=describe_checkpoint(model)),)}, machine=MACHINE
        )
        asked = InferParams(task="image-classification", prompts="*.png", batch_size=batch_size)
        found.append(STAGE.forecast(asked, ctx.within(base=tmp_path)).ram)
    assert None not in found
    assert found[0] < found[1] < found[2]


def test_a_template_makes_prompts_of_columns_and_results_hold_them(tmp_path: Path) -> None:
    model = make_with_head(tmp_path / "model", "bert", "ForSequenceClassification", num_labels=3)
    (tmp_path / "rows.csv").write_text("name,place\nthe cat,a mat\nhello,world\n")
    ctx, plain = context(tmp_path / "one", model, base=tmp_path), context(tmp_path / "two", model)
    asked: dict[str, Any] = {"task": "text-classification", "dtype": "float32"}
    infer(InferParams(prompts="rows.csv", template="{name} is on {place}.", **asked), ctx)
    infer(InferParams(prompts=["the cat is on a mat.", "hello is on world."], **asked), plain)
    assert results(ctx) == results(plain)


def test_a_template_and_a_column_at_once() -> None:
    for task in ("fill-mask", "own:task"):
        with pytest.raises(ValidationError, match="the template names the fields") as error:
            InferParams(task=task, prompts="a.csv", template="{a}", column="a")
        assert error.value.errors()[0]["loc"] == ("column",)
    with pytest.raises(ValidationError, match="names no field") as error:
        InferParams(task="fill-mask", prompts="a.csv", template="a")
    assert error.value.errors()[0]["loc"] == ("template",)


def test_two_launched_ranks_classify(tmp_path: Path) -> None:
    model = make_with_head(tmp_path / "model", "bert", "ForSequenceClassification", num_labels=3)
    one = context(tmp_path / "one", model)
    infer(InferParams(task="text-classification", prompts=TEXTS), one)
    two = start(tmp_path / "two", model, 2, task="text-classification", prompts=TEXTS)
    lines = (tmp_path / "two/work/out/results.jsonl").read_text().splitlines()
    for found, wanted in zip(map(json.loads, lines), results(one), strict=True):  # another number of threads
        assert found == {**wanted, "score": pytest.approx(wanted["score"], abs=1e-6)}
    assert two.metrics["prompts"] == len(TEXTS)


RECIPE = """version: 1
name: tasks
stages:
  download: {uses: download, with: {path: model}}
  classify:
    uses: distributed-infer
    inputs: download
    with:
      task: TASK
      prompts: PROMPTS
      generation: ARGUMENTS
"""


@pytest.mark.parametrize(
    ("task", "prompts", "arguments", "place", "cause"),
    [
        ("fill-mask", "[a]", "{}", "9:13", "BertForSequenceClassification does no fill-mask"),
        ("text-classification", "[a]", "{topk: 2}", "11:20", "did you mean 'top_k'?"),
        ("text-classification", "[a]", "{top_k: 0}", "11:27", "greater than or equal to 1, and 0 is given"),
        ("scoring", "[{prompt: a, continuation: b}]", "{}", "9:13", "BertForSequenceClassification does no scoring"),
        ("scoring", "[a]", "{}", "9:13", "BertForSequenceClassification does no scoring"),
        ("text-classification", "[a]", "{pair: b}", "10:16", "needs 'b', which prompt 0 does not have"),
        ("text-classification", "[[{role: user, content: a}]]", "{}", "10:17", "prompts[0]: this is a chat"),
    ],
)
def test_a_plan_refuses_it_at_its_place(
    workshop: Workshop, task: str, prompts: str, arguments: str, place: str, cause: str
) -> None:
    make_with_head(workshop.folder / "model", "bert", "ForSequenceClassification", num_labels=3)
    text = RECIPE.replace("TASK", task).replace("PROMPTS", prompts).replace("ARGUMENTS", arguments)
    workshop.manifest.write_text(text)
    said = workshop.command("plan", str(workshop.manifest))
    assert said.returncode == 2
    assert f"recipe.yaml:{place}:" in said.stderr
    assert cause in said.stderr
