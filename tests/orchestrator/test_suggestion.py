"""The `-p` in front of a cure: only where the recipe has the parameter, and only where the plan with it fits."""

from __future__ import annotations

import json

import bigpipe

RECIPE = """\
version: 1
name: gpus
params: {gpu: 22GiB, memory: {0: 22GiB, cpu: 10GiB}, none: 1}
stages:
  download: {uses: download, with: {path: model}}
  whole: {uses: dispatch, inputs: download, with: {max_memory: "${params.memory}", verify: none}}
  one: {uses: dispatch, inputs: download, with: {max_memory: {0: "${params.gpu}", cpu: 1GiB}, verify: none}}
  fixed: {uses: dispatch, inputs: download, with: {max_memory: {0: 1GiB, cpu: 1GiB}, verify: none}}
"""


def test_suggestions(workshop):
    from support.models import make_checkpoint

    make_checkpoint(workshop.folder / "model")
    workshop.manifest.write_text(RECIPE)

    def plan(*arguments: str) -> tuple[int, str]:
        done = workshop.command("plan", "recipe.yaml", *arguments)
        return done.returncode, done.stderr

    code, text = plan("whole")
    assert code == 4
    assert "whole: max_memory names GPU 0" in text
    assert "-p 'memory={cpu: 10GiB}' fits" in text
    assert plan("whole", "-p", "memory={cpu: 10GiB}")[0] == 0
    assert "-p gpu=0 fits" in plan("one")[1]
    assert plan("one", "-p", "gpu=0")[0] == 0
    assert "-p 'memory={cpu: 10GiB}' -p gpu=0 fits" in plan("whole", "one")[1]
    code, text = plan("fixed")
    assert code == 4
    assert "-p" not in text


GATED = """\
version: 1
name: gated
params: {batch: 64, limit: 50KiB}
stages:
  download: {uses: download, with: {path: model}}
  estimate:
    uses: estimate
    inputs: download
    with: {dtypes: [float16], batch_size: "${params.batch}", sequence_length: 64}
    gates: ["float16.kv_cache <= ${params.limit}"]
  fixed: {uses: estimate, inputs: download, with: {dtypes: [float16]}, gates: ["float16.parameters <= 1"]}
"""


def test_a_gate_that_a_forecast_decides(workshop):
    """The largest batch whose keys and values take 50 KiB; nothing where no parameter decides."""
    from support.models import make_checkpoint

    make_checkpoint(workshop.folder / "model")
    workshop.manifest.write_text(GATED)

    def plan(*arguments: str) -> tuple[int, str]:
        done = workshop.command("plan", "recipe.yaml", *arguments)
        return done.returncode, done.stderr

    code, text = plan("estimate")
    assert code == 3
    assert "passes; or change the gate" in text, text
    batch = int(text.partition("-p batch=")[2].split()[0])
    assert plan("estimate", "-p", f"batch={batch}")[0] == 0
    assert plan("estimate", "-p", f"batch={batch + 1}")[0] == 3
    code, text = plan("fixed")
    assert code == 3
    assert "-p" not in text
    assert "change the recipe so that the gate holds" in text
    # Two gates at once: what passes must pass whole
    assert "-p" not in plan("estimate", "fixed")[1]


CHOSEN = """\
version: 1
name: chosen
params: {scheme: int8, least: 0.0}
stages:
  download: {uses: download, with: {path: model}}
  quantize:
    {uses: quantize, inputs: download, with: {scheme: "${params.scheme}"}, gates: ["ratio >= ${params.least}"]}
"""


def test_a_gate_that_another_choice_passes(workshop):
    """`nf4` packs two numbers in a byte where `int8` packs one; no scheme packs a thousand."""
    from support.models import make_checkpoint

    make_checkpoint(workshop.folder / "model")
    workshop.manifest.write_text(CHOSEN)

    def ratio(scheme: str) -> float:
        return bigpipe.plan(workshop.manifest, params={"scheme": scheme}).nodes["quantize"].forecast.metrics["ratio"]

    between = (ratio("int8") + ratio("nf4")) / 2
    assert ratio("int8") < between
    refused = workshop.command("plan", "recipe.yaml", "-p", f"least={between}")
    assert refused.returncode == 3
    assert "-p scheme=nf4 passes" in refused.stderr
    assert workshop.command("plan", "recipe.yaml", "-p", f"least={between}", "-p", "scheme=nf4").returncode == 0
    hopeless = workshop.command("plan", "recipe.yaml", "-p", "least=1000")
    assert hopeless.returncode == 3
    assert "-p" not in hopeless.stderr


def test_a_choice_under_which_a_gate_is_not_decided_passes_nothing(workshop):
    recipe = """\
version: 1
name: forgets
params: {forgets: nothing}
stages:
  a: {uses: write, with: {forgets: "${params.forgets}", text: hello}, gates: ["characters <= 3"]}
"""
    workshop.manifest.write_text(recipe)
    [error] = bigpipe.plan(workshop.manifest).errors()
    assert error.cure == "change the recipe so that the gate holds, or the gate"
    assert bigpipe.plan(workshop.manifest, params={"forgets": "all"}).errors() == []


RANKS = """\
version: 1
name: ranks
params: {ranks: 3}
stages:
  download: {uses: download, with: {path: model}}
  generate:
    uses: distributed-infer
    inputs: download
    with: {task: text-generation, prompts: [Hello]}
    launch: {num_processes: "${params.ranks}"}
"""


def test_a_number_of_ranks(workshop):
    """What stands under `launch` is read anew with each `-p` that is tried."""
    from support.models import make_checkpoint

    make_checkpoint(workshop.folder / "model")
    workshop.manifest.write_text(RANKS)
    gpus = [{"index": index, "name": "H100", "memory": 80 * 2**30, "free": 80 * 2**30} for index in range(2)]
    sizes = {"memory": 2**40, "memory_available": 2**40, "disk_free": 2**40}
    (workshop.folder / "box.json").write_text(json.dumps({"name": "box", "cpus": 8, **sizes, "gpus": gpus}))
    done = workshop.command("plan", "recipe.yaml", "--machine", "box.json")
    assert done.returncode == 4
    assert "-p ranks=2 fits" in done.stderr
    assert workshop.command("plan", "recipe.yaml", "--machine", "box.json", "-p", "ranks=2").returncode == 0
