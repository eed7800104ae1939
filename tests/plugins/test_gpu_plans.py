"""What plans foresee of GPUs, on machines that are described: no GPU is needed here."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.contexts import forecast_context
from support.launching import MACHINE
from support.models import make_checkpoint
from support.workshop import Workshop

from bigpipe.bigmodel.architecture import describe_architecture
from bigpipe.bigmodel.checkpoint import describe_checkpoint
from bigpipe.bigmodel.footprint import Budget, Workload
from bigpipe.bigmodel.placement import Placement, batches_together, place
from bigpipe.bigmodel.training import Lora, Training, foreseen_adapter
from bigpipe.errors import DoesNotFit
from bigpipe.orchestrator.stage import Forecast, ForecastContext, Gpu, Launch
from bigpipe.plugins import dispatch_needs, evaluating, inference_needs, training_needs
from bigpipe.plugins.dispatch import DispatchParams
from bigpipe.plugins.distributed_infer import InferParams
from bigpipe.plugins.evaluate import EvaluateParams
from bigpipe.plugins.finetune import FinetuneParams

GIB = 2**30
H200 = replace(MACHINE, gpus=(Gpu(0, "H200", 139 * GIB, 139 * GIB),))
TEXT = "Return the number of occurrences of the argument. Raise ValueError if it is not present in the list.\n" * 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "opt", dtype="float16")


def planned(folder: Path, model: Path, placement: Placement | None = None, **more: Any) -> ForecastContext:
    """On a machine with one GPU, unless another is given."""
    (folder / "base").mkdir(exist_ok=True)
    (folder / "base/text.txt").write_text(TEXT)
    inputs = {"model": (Forecast(output=describe_checkpoint(model)),)}
    if placement is not None:
        inputs["placement"] = (Forecast(output=placement),)
    return forecast_context(folder, **{"inputs": inputs, "machine": H200, **more})


def infer(ctx: ForecastContext, **fields: Any) -> Forecast:
    asked = {"task": "text-generation", "prompts": ["one", "two"], "max_new_tokens": 5, **fields}
    return inference_needs.forecast(InferParams(**asked), ctx)


def evaluate(ctx: ForecastContext, **fields: Any) -> Forecast:
    return evaluating.forecast(EvaluateParams(data="text.txt", **fields), ctx)


def test_a_plan_for_a_gpu_that_is_not_there_says_so_and_what_fits(workshop: Workshop, model: Path) -> None:
    """Layers would stream through it, several batches at once: of these nothing can be reckoned."""
    machine = workshop.folder / "bare.json"
    machine.write_text(json.dumps(asdict(MACHINE)))
    workshop.manifest.write_text(f"""\
version: 1
name: larger
stages:
  download: {{uses: download, with: {{path: "{model}"}}}}
  dispatch: {{uses: dispatch, inputs: download, with: {{max_memory: {{0: 50000B, cpu: 1GiB}}}}}}
  generate:
    uses: distributed-infer
    inputs: {{model: download, placement: dispatch}}
    with: {{task: text-generation, prompts: [a, b, c], max_new_tokens: 5}}
""")
    done = workshop.command("plan", "recipe.yaml", "--machine", str(machine))
    assert done.returncode == DoesNotFit.exit_code, done.stderr
    assert "max_memory names GPU 0; test has no GPU" in done.stderr
    assert "set max_memory.0 to 0; the model fits on the CPU" in done.stderr


def test_a_gpu_that_is_not_there_has_no_room_for_more_batches(model: Path) -> None:
    streamed = place(model, device_map={"": 0, "model.decoder.layers": "cpu"}, machine=H200)
    given = streamed, describe_architecture(model), Workload(sequence_length=20), "float16"
    found = batches_together(*given, MACHINE)
    assert found.count == 1
    assert "must fit" in found.why
    assert batches_together(*given, H200).count > 1


@pytest.mark.parametrize("part", ["lm_head", "model.decoder.layers.0.activation_fn"])
def test_a_map_that_gives_a_gpu_no_bytes_of_its_own_computes_there_all_the_same(
    tmp_path: Path, model: Path, part: str
) -> None:
    """As the run does it: a tied head lies there once more, and all else passes through."""
    placement = place(model, device_map={part: 0, "": "cpu"}, sequence_length=15, machine=H200)
    in_ram = place(model, device_map="cpu", sequence_length=15, machine=H200)
    head = 2 * 264 * 32 if part == "lm_head" else 0
    assert placement.weights == {**({0: head} if head else {}), **in_ram.weights}
    assert placement.main == 0
    gpu = placement.needs[0]
    assert gpu.streaming > 0
    assert gpu.activations == in_ram.needs["cpu"].activations
    assert gpu.kv_cache == in_ram.needs["cpu"].kv_cache
    found = infer(planned(tmp_path, model, placement)).vram
    assert found is not None
    assert found[0] >= gpu.total


def test_who_is_not_placed_takes_of_a_gpu_what_it_would_take_if_it_were(tmp_path: Path, model: Path) -> None:
    """On a CPU it uses none. What a function of the user's own takes nobody knows: it runs beside nobody else."""
    placed = planned(tmp_path, model, place(model, device_map=0, sequence_length=1, machine=H200))
    for kind in (infer, evaluate):
        for fields in ({}, {"batch_size": 2}):
            found = kind(planned(tmp_path, model), **fields)
            assert found.vram == kind(placed, **fields).vram
            assert set(found.vram or ()) == {0}
        narrow, wide = (kind(planned(tmp_path, model), dtype=dtype).vram for dtype in ("float16", "float32"))
        assert (wide or {})[0] > (narrow or {})[0]
        assert kind(planned(tmp_path, model, machine=MACHINE)).vram == {}
    assert infer(planned(tmp_path, model), task="own:function").vram is None
    assert infer(planned(tmp_path, model, machine=MACHINE), task="own:function").vram == {}


def test_who_is_not_placed_and_too_large_for_a_gpu_is_told_to_be_placed(tmp_path: Path, model: Path) -> None:
    small = replace(H200, gpus=(Gpu(0, "small", 2**20, 2**20),))
    for found in (infer, evaluate, partial(infer, task="own:function")):
        assert not found(planned(tmp_path, model)).misfits
        (misfit,) = found(planned(tmp_path, model, machine=small)).misfits
        assert misfit.cause.endswith("on GPU 0 (small), which has 1.0 MiB")
        assert "placement to a dispatch" in str(misfit.cure)


def test_a_model_that_was_placed_in_ram_takes_ram_though_there_are_gpus(tmp_path: Path, model: Path) -> None:
    placed = place(model, device_map="cpu", dtype="float32", machine=H200)
    for kind in (infer, evaluate):
        beside_a_gpu, without = (kind(planned(tmp_path, model, placed, machine=there)) for there in (H200, MACHINE))
        assert beside_a_gpu.ram == without.ram
        assert beside_a_gpu.vram == {}


def test_a_batch_that_is_larger_than_it_was_placed_for_takes_more_of_a_gpu(tmp_path: Path, model: Path) -> None:
    """Keys, values and activations of 63 rows more."""
    placement = place(model, device_map=0, sequence_length=15, machine=H200)
    ctx = planned(tmp_path, model, placement)
    found = [infer(ctx, prompts=["a" * 10] * 64, batch_size=rows).vram for rows in (1, 64)]
    architecture = describe_architecture(model)
    small, large = (
        Budget(architecture, "float16", Workload(batch_size=rows, sequence_length=15, output_length=5))
        for rows in (1, 64)
    )
    assert large.kv_cache.bytes - small.kv_cache.bytes == 63 * placement.needs[0].kv_cache
    grown = large.kv_cache.bytes - small.kv_cache.bytes + large.activations.bytes - small.activations.bytes
    assert found == [{0: placement.needs[0].total}, {0: placement.needs[0].total + grown}]
    roomy = place(model, device_map=0, batch_size=64, sequence_length=15, machine=H200)
    assert infer(planned(tmp_path, model, roomy), prompts=["a" * 10] * 64, batch_size=64).vram == {
        0: roomy.needs[0].total
    }


def test_a_batch_takes_of_each_gpu_what_its_layers_keep(tmp_path: Path, model: Path) -> None:
    split = {"": 0, "model.decoder.layers.1": 1}
    placement = place(model, device_map=split, sequence_length=15, machine=H200)
    ctx = planned(
        tmp_path, model, placement, machine=replace(H200, gpus=(H200.gpus[0], replace(H200.gpus[0], index=1)))
    )
    one, many = (infer(ctx, prompts=["a" * 10] * 64, batch_size=rows).vram for rows in (1, 64))
    assert one is not None
    assert many is not None
    assert many[0] - one[0] == many[1] - one[1] > 63 * placement.needs[1].kv_cache > 0


def test_windows_take_their_logits_of_a_gpu(tmp_path: Path, model: Path) -> None:
    """Those of every token, where a placement keeps room for the last one's; those of a baseline wait beside them."""
    placement = place(model, device_map=0, sequence_length=128, machine=H200)
    ctx = planned(tmp_path, model, placement)
    alone, wide = (evaluate(ctx, batch_size=size).vram for size in (1, 8))
    both = evaluate(replace(ctx, inputs={**ctx.inputs, "baseline": ctx.inputs["model"]})).vram
    assert alone is not None
    assert wide is not None
    assert both is not None
    need, logits, slices = placement.needs[0], 128 * 264, 8 * 2**24
    forwards = [2 * rows * (logits + 128 * 32) for rows in (1, 8)]  # with what is as wide as the model beside them
    assert alone[0] - need.total == forwards[0] - need.activations + slices
    assert wide[0] - need.total == forwards[1] - need.activations + slices
    assert both[0] - 2 * need.total == 2 * (forwards[0] - need.activations) + slices + 4 * logits


def test_an_adapter_takes_its_bytes_of_a_gpu_that_was_placed_without_it(tmp_path: Path, model: Path) -> None:
    described = describe_checkpoint(model)
    training = Training(max_steps=1, lora=Lora(r=4, target_modules=("q_proj",)))
    adapter = foreseen_adapter(described, describe_architecture(model), training)
    placed = planned(tmp_path, model, place(model, device_map=0, sequence_length=128, machine=H200))
    for kind in (infer, evaluate):
        beside = replace(placed, inputs={**placed.inputs, "adapter": (Forecast(output=adapter),)})
        without, found = kind(placed).vram, kind(beside).vram
        assert without is not None
        assert found == {0: without[0] + 2 * 4 * 4 * (32 + 32)}  # two layers, rank 4, float32


@pytest.mark.parametrize("main", [0, "cpu"])
def test_windows_that_go_through_streamed_layers_together_take_memory_each(
    tmp_path: Path, model: Path, main: Any
) -> None:
    """Hidden states, and the baseline's logits that wait; of a text with one window there is one batch."""
    rest = "disk" if main == "cpu" else "cpu"
    placement = place(model, device_map={"": main, "model.decoder.layers": rest}, machine=H200)
    ctx = planned(tmp_path, model, placement, machine=MACHINE if main == "cpu" else H200)
    ctx = replace(ctx, inputs={**ctx.inputs, "baseline": ctx.inputs["model"]})
    asked = {"dtype": "float32", "sequence_length": 16, "stride": 16}
    one, many = (evaluate(ctx, max_tokens=tokens, **asked) for tokens in (16, None))
    taken = [found.ram if main == "cpu" else (found.vram or {}).get(0) for found in (one, many)]
    assert None not in taken
    states, logits, workspace = 4 * 16 * 32 * 4, 16 * 264 * 4, 0 if main == "cpu" else 32 * 2**20
    count = batches_together(
        placement, describe_architecture(model), Workload(sequence_length=16, all_logits=True), "float32", ctx.machine,
        memo=ctx.memo, caching=False,
    ).count  # fmt: skip
    assert count > 1
    more = min(count, math.ceil(len(TEXT) / 16)) - 1
    within = 16 * (2 * 64 + 4 * 32) * 4 if main == "cpu" else 0  # where all wait to be multiplied at once
    assert taken[1] - taken[0] == more * (states + within + logits + workspace)


def test_each_batch_that_goes_along_has_a_workspace_of_its_own_on_a_gpu(model: Path) -> None:
    sizes = []
    for main, rest in ((0, "cpu"), ("cpu", "disk")):
        placement = place(model, device_map={"": main, "model.decoder.layers": rest}, machine=H200)
        given = placement, describe_architecture(model), Workload(sequence_length=100), "float16"
        sizes.append(batches_together(*given, H200).size)
        assert batches_together(*given, H200, asked=2).size == sizes[-1]
    assert sizes[0] - sizes[1] == 32 * 2**20


def test_what_the_driver_and_its_libraries_take_is_foreseen(tmp_path: Path, model: Path) -> None:
    """Context and workspace on a GPU; in RAM CUDA's libraries, which a placement that is tried loads too."""
    asked = FinetuneParams(data=[{"text": "one"}], max_steps=1, lora={"target_modules": ["q_proj"]})
    trained = training_needs.forecast(asked, planned(tmp_path, model))
    assert trained.vram is not None
    assert trained.vram[0] > 512 * 2**20
    placed, in_ram = (
        dispatch_needs.forecast(DispatchParams(device_map={"": home}), planned(tmp_path, model)) for home in (0, "cpu")
    )
    assert placed.ram is not None
    assert in_ram.ram is not None
    assert placed.ram - in_ram.ram == 3 * GIB


def rank_misfits(found: Forecast) -> list[str]:
    return [f"{field}: {value}" for misfit in found.misfits for field, value in misfit.change.items()]


@pytest.mark.parametrize("known", [True, False])
def test_more_ranks_than_gpus_are_refused_by_each_kind(tmp_path: Path, model: Path, known: bool) -> None:
    """Also where nothing is known of the model; they would compute on the CPU what the key says of the GPU."""
    asked = FinetuneParams(data=[{"text": "one"}, {"text": "two"}], max_steps=1, lora={"target_modules": ["q_proj"]})
    given: dict[str, Any] = {} if known else {"inputs": {"model": (Forecast(),)}}
    for ranks, cure in ((1, []), (2, ["launch.num_processes: 1"])):
        ctx = planned(tmp_path, model, launch=Launch(num_processes=ranks), **given)
        found = [training_needs.forecast(asked, ctx), evaluate(ctx), infer(ctx)]
        assert [rank_misfits(each) for each in found] == [cure] * 3
        bare = planned(tmp_path, model, launch=Launch(num_processes=ranks), machine=MACHINE, **given)
        assert not any(kind.misfits for kind in (training_needs.forecast(asked, bare), evaluate(bare), infer(bare)))
    placed = {"model": (Forecast(),), "placement": (Forecast(),)}
    where_nobody_knows = planned(tmp_path, model, inputs=placed, launch=Launch(num_processes=2))
    assert not evaluate(where_nobody_knows).misfits
    assert not infer(where_nobody_knows).misfits
