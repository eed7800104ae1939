"""Evaluation as a stage: the same bytes on any number of ranks, through kills, and what a plan refuses at its place."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.adapters import tuned
from support.contexts import forecast_context, inputs
from support.inferring import as_rank, context
from support.launching import MACHINE
from support.models import make_checkpoint, save_model, tiny_model
from support.workshop import Workshop, environment, statuses

import bigpipe
from bigpipe.bigmodel.checkpoint import describe_adapter, describe_checkpoint
from bigpipe.bigmodel.execution import loaded
from bigpipe.bigmodel.inference import WorkPlan
from bigpipe.bigmodel.placement import place
from bigpipe.errors import InvalidCheckpoint, UsageError
from bigpipe.orchestrator.stage import Forecast, StageContext
from bigpipe.plugins import evaluating
from bigpipe.plugins.evaluate import STAGE, EvaluateMetrics, EvaluateParams, result_line
from bigpipe.plugins.ranked import load_on_rank
from bigpipe.trust import Trust

TEXT = "Return the number of occurrences of the argument. Raise ValueError if it is not present in the list.\n" * 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "opt", dtype="float16")


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    for scheme in ("int8", "nf4"):
        bigpipe.quantize_checkpoint(model, folder / scheme, scheme=scheme)
    return {scheme: folder / scheme for scheme in ("int8", "nf4")}


def evaluate(parameters: EvaluateParams, ctx: StageContext) -> EvaluateMetrics:
    """All that the launcher does, in this process."""
    (ctx.base / "text.txt").write_text(TEXT)
    evaluating.prepare(parameters, ctx)
    for rank in range(ctx.world_size):
        evaluating.run(parameters, as_rank(ctx, rank))
    metrics = evaluating.finish(parameters, ctx).metrics
    assert isinstance(metrics, EvaluateMetrics)
    return metrics


def report(ctx: StageContext) -> bytes:
    return (ctx.out / "report.json").read_bytes()


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_any_number_of_ranks_gives_the_same_bytes(
    tmp_path: Path, model: Path, made: dict[str, Path], scheme: str
) -> None:
    asked = EvaluateParams(data="text.txt", sequence_length=32, batch_size=2)
    written = []
    for ranks in (1, 2, 3):
        ctx = context(
            tmp_path / str(ranks), made[scheme], ranks, inputs={"model": (made[scheme],), "baseline": (model,)}
        )
        metrics = evaluate(asked, ctx)
        assert metrics.kl is not None
        assert metrics.peak["cpu"] > 0
        written.append(report(ctx))
    assert len(set(written)) == 1


def test_streamed_batches_go_through_both_models_together(tmp_path: Path, model: Path, made: dict[str, Path]) -> None:
    """Under a cap that holds neither; the layers are brought once for several batches."""
    placement = place(made["nf4"], max_memory={"cpu": "60KiB", "disk": "1GiB"})
    (tmp_path / "placement.json").write_text(json.dumps(placement.as_json()))
    asked = EvaluateParams(data="text.txt", sequence_length=32)
    inputs = {"model": (made["nf4"],), "baseline": (model,)}
    whole, streamed = (context(tmp_path / name, model, inputs=inputs) for name in ("whole", "streamed"))
    streamed = context(tmp_path / "streamed", model, inputs={**inputs, "placement": (tmp_path,)})
    evaluate(asked, streamed)
    assert WorkPlan.read(streamed.scratch).together > 1
    disk = place(model, device_map={"": "disk"})
    assert loaded(load_on_rank(streamed, None, disk, "baseline")).streamed > 0
    evaluate(asked, whole)
    found, wanted = (json.loads(report(ctx)) for ctx in (streamed, whole))
    assert found["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-3)  # float16 against float32
    assert found["tokens"] == wanted["tokens"]


RECIPE = """\
version: 1
name: good-enough
stages:
  download: {uses: download, with: {path: MODEL}}
  quantize: {uses: quantize, inputs: download, matrix: {scheme: [int8, nf4]}, with: {scheme: "${matrix.scheme}"}}
  evaluate:
    uses: evaluate
    inputs: {model: quantize, baseline: download}
    with: {data: text.txt, sequence_length: 32, batch_size: 8}
    gates: ["kl.mean + kl.mean_stderr <= BOUND"]
    on_fail: continue
"""


@pytest.fixture
def shop(workshop: Workshop, model: Path) -> Workshop:
    (workshop.folder / "text.txt").write_text(TEXT)
    return workshop


def test_a_gate_between_them_stops_nf4_and_lets_int8_pass(shop: Workshop, model: Path) -> None:
    text = RECIPE.replace("MODEL", str(model))
    free = shop.run(text.replace("BOUND", "100"))
    assert free.exit_code == 0, [str(error) for error in free.errors]
    found = {name: state.record.metrics for name, state in free.nodes.items() if name.startswith("evaluate")}
    losses = {name: metrics["kl"]["mean"] + metrics["kl"]["mean_stderr"] for name, metrics in found.items()}
    assert 0 < losses["evaluate@scheme=int8"] < losses["evaluate@scheme=nf4"]
    bound = sum(losses.values()) / 2
    result = shop.run(text.replace("BOUND", f"{bound:.12f}"))
    assert result.exit_code == 3
    assert statuses(result)["evaluate@scheme=int8"] == "cached"
    assert statuses(result)["evaluate@scheme=nf4"] == "failed"
    assert "kl.mean" in str(result.errors[0])


@pytest.mark.filterwarnings("ignore")
def test_a_model_with_an_adapter_is_as_good_as_the_merged_model(tmp_path: Path, model: Path) -> None:
    adapter = tuned(model, tmp_path / "lora", r=4, target_modules="all-linear")
    bigpipe.merge_adapter(model, adapter, tmp_path / "merged", dtype="float32")
    asked = EvaluateParams(data="text.txt", sequence_length=32, dtype="float32")
    ctx = context(tmp_path / "with", model, inputs={"model": (model,), "adapter": (adapter,), "baseline": (model,)})
    metrics = evaluate(asked, ctx)
    merged = bigpipe.evaluate(tmp_path / "merged", ctx.base / "text.txt", sequence_length=32, dtype="float32")
    assert metrics.perplexity == pytest.approx(merged.perplexity.value, rel=1e-4)
    assert metrics.perplexity != metrics.baseline_perplexity
    again = bigpipe.evaluate(model, ctx.base / "text.txt", adapter=adapter, sequence_length=32, dtype="float32")
    assert again.perplexity.value == metrics.perplexity


def killed_after(shop: Workshop, records: int) -> None:
    """Run the recipe, and SIGKILL all of it once a rank has written down so many windows."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bigpipe", "run", "recipe.yaml"], cwd=shop.folder, env=environment(shop.folder),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        logs = list((shop.folder / "store").glob("work/*/scratch/rank-*/records.jsonl"))
        if sum(len(log.read_bytes().splitlines()) for log in logs) >= records:
            break
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it was killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_a_killed_evaluation_goes_on_where_it_was(shop: Workshop, model: Path) -> None:
    text = f"""\
version: 1
name: long
stages:
  download: {{uses: download, with: {{path: "{model}"}}}}
  evaluate:
    uses: evaluate
    inputs: {{model: download, baseline: download}}
    with: {{data: text.txt, sequence_length: 16, stride: 1}}
    launch: {{num_processes: 2}}
"""
    shop.manifest.write_text(text)
    killed_after(shop, 20)
    done = shop.command("run", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    told = next(line for line in done.stderr.splitlines() if "were finished before" in line)
    assert int(told.split(": ")[-1].split()[0]) >= 20, told
    metrics = shop.json("show", "evaluate")
    assert metrics
    again = bigpipe.evaluate(model, shop.folder / "text.txt", baseline=model, sequence_length=16, stride=1)
    found = bigpipe.run(shop.manifest, check=False).nodes["evaluate"].record.metrics
    assert found["perplexity"] == again.perplexity.value
    assert found["kl"]["max"] == 0


CASES: list[tuple[str, str, str, str]] = [
    ("a missing column", "data: rows.jsonl", "there is no 'text', only 'body'", "rows.jsonl"),
    ("another column", "data: rows.jsonl, column: text", "there is no 'text', only 'body'", "text}"),
    ("an empty file", "data: empty.txt", "empty.txt holds no text", "empty.txt"),
    ("a missing file", "data: none.txt", "there is no file none.txt", "none.txt"),
    ("more than positions", "data: text.txt, sequence_length: 999", "the model has 128 positions", "999"),
    ("a stride too long", "data: text.txt, stride: 999", "stride is 999 and a window has 128 tokens", "999"),
    ("both", "data: text.txt, sequence_length: 8, stride: 9", "stride 9 is above sequence_length 8", ""),
    ("no baseline", "data: text.txt, per_layer: true", "none is wired", "true"),
    ("a bound of nothing", "data: text.txt, per_layer_bound: 1", "per_layer_bound belongs to per_layer", ""),
]
"""What is given, the cause, and what stands at the place that is named; of a whole map its beginning."""


@pytest.mark.parametrize(("given", "cause", "place"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_plan_refuses_what_cannot_be_evaluated_at_its_place(
    shop: Workshop, model: Path, given: str, cause: str, place: str
) -> None:
    (shop.folder / "rows.jsonl").write_text('{"body": "one"}\n')
    (shop.folder / "empty.txt").write_text("\n")
    line = f"  evaluate: {{uses: evaluate, inputs: download, with: {{{given}}}}}"
    shop.manifest.write_text(
        f'version: 1\nname: odd\nstages:\n  download: {{uses: download, with: {{path: "{model}"}}}}\n{line}\n'
    )
    done = shop.command("plan", "recipe.yaml")
    assert done.returncode == 2, done.stdout + done.stderr
    assert cause in done.stderr
    assert "Traceback" not in done.stderr
    named = re.search(r"recipe\.yaml:5:(\d+)", done.stderr)
    assert named, done.stderr
    assert line[int(named[1]) - 1 :].startswith(place)


@pytest.mark.parametrize(("architecture", "cause"), [("bert", "makes no text"), ("t5", "reads a prompt apart")])
def test_a_plan_refuses_models_that_do_not_go_on_with_a_text(
    shop: Workshop, tmp_path: Path, architecture: str, cause: str
) -> None:
    path = make_checkpoint(tmp_path / "odd", architecture)
    shop.manifest.write_text(
        f'version: 1\nname: odd\nstages:\n  download: {{uses: download, with: {{path: "{path}"}}}}\n'
        "  evaluate: {uses: evaluate, inputs: download, with: {data: text.txt}}\n"
    )
    done = shop.command("plan", "recipe.yaml")
    assert (done.returncode, cause in done.stderr) == (2, True), done.stderr


def test_a_plan_refuses_a_baseline_of_another_vocabulary(shop: Workshop, tmp_path: Path, model: Path) -> None:
    larger = save_model(tiny_model("opt", vocab_size=272), tmp_path / "larger")
    shop.manifest.write_text(
        f'version: 1\nname: odd\nstages:\n  one: {{uses: download, with: {{path: "{model}"}}}}\n'
        f'  two: {{uses: download, with: {{path: "{larger}"}}}}\n'
        "  evaluate: {uses: evaluate, inputs: {model: one, baseline: two}, with: {data: text.txt}}\n"
    )
    done = shop.command("plan", "recipe.yaml")
    assert done.returncode == 2, done.stdout
    assert "the baseline has a vocabulary of 272 tokens, and the model one of 264" in done.stderr
    assert "recipe.yaml:6:" in done.stderr


def test_a_plan_refuses_a_baseline_that_cannot_be_evaluated_at_its_own_place(
    shop: Workshop, tmp_path: Path, model: Path
) -> None:
    other = make_checkpoint(tmp_path / "other", "t5")
    line = "  evaluate: {uses: evaluate, inputs: {model: one, baseline: two}, with: {data: text.txt}}"
    shop.manifest.write_text(
        f'version: 1\nname: odd\nstages:\n  one: {{uses: download, with: {{path: "{model}"}}}}\n'
        f'  two: {{uses: download, with: {{path: "{other}"}}}}\n{line}\n'
    )
    done = shop.command("plan", "recipe.yaml")
    assert done.returncode == 2, done.stdout
    assert f"recipe.yaml:6:{line.index('two') + 1}: " in done.stderr
    assert "T5ForConditionalGeneration does no evaluation: it reads a prompt apart" in done.stderr


@pytest.mark.parametrize("who", ["model", "baseline"])
def test_a_stage_and_python_say_which_of_both_cannot_be_evaluated(tmp_path: Path, model: Path, who: str) -> None:
    """Also that it is the one without a tokenizer where its files are not here yet."""
    (tmp_path / "text.txt").write_text(TEXT)
    paths = {"model": model, "baseline": model}
    wired = {port: (Forecast(output=describe_checkpoint(path)),) for port, path in paths.items()}
    bare = replace(describe_checkpoint(model), path=None, names=("config.json", "model.safetensors"))
    asked, given = EvaluateParams(data="text.txt"), {**wired, who: (Forecast(output=bare),)}
    with pytest.raises(UsageError, match=f"evaluation needs a tokenizer, and the {who} has none") as refused:
        evaluating.check(asked, forecast_context(tmp_path, base=tmp_path, inputs=given))
    assert refused.value.field == f"inputs.{who}"
    both = {**paths, who: make_checkpoint(tmp_path / "bert", "bert")}
    with pytest.raises(UsageError, match="BertForMaskedLM does no evaluation: it makes no text") as refused:
        bigpipe.evaluate(both["model"], tmp_path / "text.txt", baseline=both["baseline"])
    assert refused.value.field == f"inputs.{who}"
    with pytest.raises(UsageError, match="it makes no text") as refused:
        evaluating.prepare(asked, context(tmp_path / "stage", model, base=tmp_path, inputs=inputs(**both)))
    assert refused.value.field == f"inputs.{who}"


@pytest.mark.parametrize("who", ["model", "baseline"])
def test_a_plan_refuses_a_class_of_ones_own(tmp_path: Path, model: Path, who: str) -> None:
    """Which has no config of transformers that could say what it is."""
    (tmp_path / "text.txt").write_text(TEXT)
    known = describe_checkpoint(model)
    own = replace(known, config=None, tensors=None, custom={"class": "mine:Net", "config": {}})
    wired = {port: (Forecast(output=own if port == who else known),) for port in ("model", "baseline")}
    around = forecast_context(tmp_path, base=tmp_path, inputs=wired, trust=Trust(modules=("mine",)))
    with pytest.raises(UsageError, match=r"evaluation needs a model of transformers.* the class mine:Net") as refused:
        evaluating.check(EvaluateParams(data="text.txt"), around)
    assert refused.value.field == f"inputs.{who}"


def test_a_plan_takes_a_baseline_that_is_not_known_yet(tmp_path: Path, model: Path) -> None:
    """As that of a tool that has not run."""
    (tmp_path / "text.txt").write_text(TEXT)
    wired = {"model": (Forecast(output=describe_checkpoint(model)),), "baseline": (Forecast(),)}
    asked = EvaluateParams(data="text.txt", per_layer=True)
    evaluating.check(asked, forecast_context(tmp_path, base=tmp_path, inputs=wired))
    alone = forecast_context(tmp_path, base=tmp_path, inputs={"model": wired["model"]})
    with pytest.raises(UsageError, match="none is wired"):
        evaluating.check(asked, alone)


def test_a_plan_refuses_windows_beyond_the_positions_of_the_baseline(tmp_path: Path, model: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    short = make_checkpoint(tmp_path / "short", "opt", max_position_embeddings=64)
    wired = {
        "model": (Forecast(output=describe_checkpoint(model)),),
        "baseline": (Forecast(output=describe_checkpoint(short)),),
    }
    with pytest.raises(UsageError, match="sequence_length is 65, and the baseline has 64 positions") as error:
        evaluating.check(
            EvaluateParams(data="text.txt", sequence_length=65), forecast_context(tmp_path, base=tmp_path, inputs=wired)
        )
    assert error.value.field == "sequence_length"


@pytest.mark.filterwarnings("ignore")
def test_a_plan_refuses_an_adapter_of_another_model(tmp_path: Path, model: Path) -> None:
    adapter = tuned(make_checkpoint(tmp_path / "other", "llama"), tmp_path / "lora", r=4, target_modules=["q_proj"])
    (tmp_path / "text.txt").write_text(TEXT)
    wired = {
        "model": (Forecast(output=describe_checkpoint(model)),),
        "adapter": (Forecast(output=describe_adapter(adapter)),),
    }
    with pytest.raises((UsageError, InvalidCheckpoint)) as error:
        evaluating.check(EvaluateParams(data="text.txt"), forecast_context(tmp_path, base=tmp_path, inputs=wired))
    assert error.value.field == "inputs.adapter"


def test_a_text_that_is_too_short_is_said_at_its_place_before_a_model_loads(shop: Workshop, model: Path) -> None:
    (shop.folder / "text.txt").write_text("a")
    shop.manifest.write_text(
        f'version: 1\nname: odd\nstages:\n  download: {{uses: download, with: {{path: "{model}"}}}}\n'
        "  evaluate: {uses: evaluate, inputs: download, with: {data: text.txt}}\n"
    )
    done = shop.command("run", "recipe.yaml")
    assert done.returncode == 2, done.stderr
    assert "recipe.yaml:5:" in done.stderr
    assert "the text has 1 token, and the first is never scored" in done.stderr


def foreseen(folder: Path, asked: EvaluateParams, **ports: Path) -> Forecast:
    (folder / "base").mkdir(exist_ok=True)
    (folder / "base/text.txt").write_text(TEXT)
    described = {port: (Forecast(output=describe_checkpoint(path)),) for port, path in ports.items()}
    return evaluating.forecast(asked, forecast_context(folder, inputs=described, machine=MACHINE))


def test_a_plan_counts_both_models(tmp_path: Path, model: Path, made: dict[str, Path]) -> None:
    asked = EvaluateParams(data="text.txt", dtype="float32")
    alone, both = foreseen(tmp_path, asked, model=model), foreseen(tmp_path, asked, model=model, baseline=model)
    weights = 2 * bigpipe.open_checkpoint(model).nbytes  # float16, held as float32
    assert alone.ram is not None
    assert both.ram is not None
    logits = 128 * 264 * 4
    assert both.ram - alone.ram == pytest.approx(weights + logits, rel=0.02)
    assert "404 B of text over 1 rank" in both.summary


def test_a_plan_counts_no_longer_window_than_there_is_text(tmp_path: Path) -> None:
    """Llama 3.1 has 131,072 positions, whatever it is given to read."""
    far = make_checkpoint(tmp_path / "far", "llama", max_position_embeddings=2**17)
    all_positions = foreseen(tmp_path, EvaluateParams(data="text.txt"), model=far, baseline=far)
    assert all_positions == foreseen(
        tmp_path, EvaluateParams(data="text.txt", sequence_length=len(TEXT)), model=far, baseline=far
    )
    few = foreseen(tmp_path, EvaluateParams(data="text.txt", max_tokens=50), model=far, baseline=far)
    assert (few.ram or 0) < (all_positions.ram or 0)


def test_a_line_for_the_table() -> None:
    metrics = {"perplexity": 37.312, "perplexity_stderr": 1.14, "tokens": 5589}
    assert result_line(metrics) == "perplexity 37.31 ± 1, 5,589 tokens"
    compared = {**metrics, "perplexity_ratio": 1.01199, "kl": {"mean": 0.00913}}
    assert result_line(compared) == "perplexity 37.31 ± 1, 1.0120 × the baseline's, KL 0.00913, 5,589 tokens"
    assert STAGE.kind == "evaluate"
