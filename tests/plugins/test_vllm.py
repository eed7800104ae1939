"""`engine: vllm`: what a plan refuses, the server as a child, and what is left when it, or we, die. The server is a
program that stands in for vLLM's."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.api import follows
from support.contexts import check_context, forecast_context
from support.launching import MACHINE, TESTS, gone, make_job, wait_for
from support.models import make_checkpoint

from bigpipe.bigmodel.checkpoint import ModelDescription, describe_checkpoint
from bigpipe.bigmodel.engines import find_engine
from bigpipe.errors import DoesNotFit, Interrupted, StageFailed, UsageError
from bigpipe.orchestrator.launch.executors import executor
from bigpipe.orchestrator.launch.jobs import Outcome
from bigpipe.orchestrator.stage import Forecast, Gpu
from bigpipe.plugins import serving
from bigpipe.plugins.distributed_infer import STAGE, InferParams

STANDIN = TESTS / "support" / "standin"
GPUS = replace(MACHINE, gpus=tuple(Gpu(number, "made up", 2**36, 2**36) for number in range(2)))
PROMPTS = [f"prompt {number}" for number in range(12)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "opt", dtype="float16")


def params(**fields: Any) -> InferParams:
    text = {"max_new_tokens": 5} if fields.get("task", "text-generation") == "text-generation" else {}
    return InferParams(**{"task": "text-generation", "prompts": PROMPTS, "engine": "vllm", **text, **fields})


def start(folder: Path, model: Path, trouble: str = "", *, wait: bool = True, **fields: Any) -> Outcome:
    given = params(**fields)
    stage, environment = STAGE.with_params(given), {"VLLM_STANDIN": trouble}
    job = make_job(
        folder, stage=stage, module="bigpipe.plugins.distributed_infer:STAGE", machine=GPUS, environment=environment,
        params=given.model_dump(exclude_unset=True), inputs={"model": (model,)},
        parent_environment={**os.environ, "PYTHONPATH": f"{STANDIN}:{TESTS.parent / 'src'}:{TESTS}"},
        cancelled=(cancelled := threading.Event()),
    )  # fmt: skip
    if not wait:
        threading.Thread(target=lambda: (wait_for(lambda: told(folder)), time.sleep(0.2), cancelled.set())).start()
    return executor(stage.runs_in).start(job)


def told(folder: Path) -> Mapping[str, Any]:
    """What the server printed when it was started."""
    log = folder / "attempt" / "log.txt"
    lines = log.read_text().splitlines() if log.exists() else []
    return next((json.loads(line[line.index("{") :]) for line in lines if '"engine":' in line), {})


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "work" / "out" / "results.jsonl").read_text().splitlines()]


def nothing_is_left(folder: Path) -> bool:
    found = told(folder)
    return gone(found["server"]) and gone(found["engine"])


def test_a_server_is_started_asked_and_ended(tmp_path: Path, model: Path) -> None:
    settings = {"tensor_parallel_size": 2, "max_model_len": 64, "gpu_memory_utilization": 0.5, "concurrency": 4}
    outcome = start(tmp_path, model, serving=settings, dtype="bfloat16")
    assert [line["text"] for line in results(tmp_path)] == [follows(prompt, 5) for prompt in PROMPTS]
    assert outcome.metrics["tokens"] == 5 * len(PROMPTS)
    wanted = {
        "model_tag": str(model), "host": "127.0.0.1", "served_model_name": ["model"], "dtype": "bfloat16",
        "tensor_parallel_size": 2, "data_parallel_size": 1, "max_model_len": 64, "gpu_memory_utilization": 0.5,
        "runner": "auto",
    }  # fmt: skip
    assert told(tmp_path).items() >= wanted.items()
    assert wait_for(lambda: nothing_is_left(tmp_path))
    assert "shutting down" in (tmp_path / "attempt" / "log.txt").read_text()


def test_a_server_goes_on_with_a_message_that_the_assistant_has_begun(tmp_path: Path, model: Path) -> None:
    asked = {"role": "user", "content": "a"}
    start(tmp_path, model, prompts=[[asked], [asked, {"role": "assistant", "content": "b"}]])
    assert (tmp_path / "attempt" / "log.txt").read_text().count("goes on with a message") == 1


def test_embeddings_are_asked_of_a_pooling_server(tmp_path: Path, model: Path) -> None:
    start(tmp_path, model, task="feature-extraction", batch_size=5)
    assert results(tmp_path)[0]["features"] == [len("prompt 0"), 0.5, -1.0]
    assert told(tmp_path)["runner"] == "pooling"


@pytest.mark.parametrize(("trouble", "fields", "said"), [
    ("memory", {}, "(?s)ended with exit status 1.*No available memory for the cache blocks"),
    ("port", {}, "found its port taken, 3 times over"),
    ("endless", {"serving": {"startup": 1.5}}, r"takes no questions 1\.5 s after it was started"),
    ("dies", {"serving": {"concurrency": 1}}, r"(?s)ended by signal 9 \(SIGKILL\).*engine core died"),
])  # fmt: skip
def test_a_server_that_does_not_serve_is_told_of(
    tmp_path: Path, model: Path, trouble: str, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(StageFailed, match=said):
        start(tmp_path, model, trouble, **fields)
    if trouble == "port":
        return
    assert wait_for(lambda: nothing_is_left(tmp_path))
    if trouble == "dies":
        start(tmp_path, model)
        assert [line["text"] for line in results(tmp_path)] == [follows(prompt, 5) for prompt in PROMPTS]
        assert "2 of 12 batches were finished before" in (tmp_path / "attempt" / "log.txt").read_text()


@pytest.mark.parametrize("how", ["interrupted", "killed"])
def test_no_server_outlives_who_asks_it(tmp_path: Path, model: Path, how: str) -> None:
    if how == "interrupted":
        with pytest.raises(Interrupted):
            start(tmp_path, model, "endless", wait=False)
    else:

        def kill() -> None:
            wait_for(lambda: told(tmp_path))
            (worker,) = (tmp_path / "attempt" / "processes").glob("*/*")
            os.kill(int(worker.name), signal.SIGKILL)

        killing = threading.Thread(target=kill)
        killing.start()
        with pytest.raises(StageFailed, match="SIGKILL"):
            start(tmp_path, model, "endless")
        killing.join()
    assert wait_for(lambda: nothing_is_left(tmp_path))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STANDIN))


def check(folder: Path, model: Path, given: InferParams, **changes: Any) -> None:
    described = describe_checkpoint(model)
    edit: Callable[[ModelDescription], ModelDescription] = changes.pop("edit", lambda found: found)
    inputs = {"model": (Forecast(output=edit(described)),)}
    ctx = check_context(folder, base=folder, memo=folder, inputs=inputs, **{"machine": GPUS, **changes})
    serving.check(given, ctx)


PACKED = {"x.qweight": ("int32", (1, 1)), "x.qzeros": ("int32", (1, 1)), "x.scales": ("float16", (1,))}


def packed(method: str) -> Callable[[ModelDescription], ModelDescription]:
    def edit(found: ModelDescription) -> ModelDescription:
        config = {**(found.config or {}), "quantization_config": {"quant_method": method}}
        return replace(found, config=config, tensors=PACKED)

    return edit


@pytest.mark.usefixtures("installed")
def test_a_plan_refuses_what_vllm_cannot_do(tmp_path: Path, model: Path) -> None:
    check(tmp_path, model, params())
    check(tmp_path, model, params(serving={"data_parallel_size": 2}))
    with pytest.raises(DoesNotFit, match=r"would take 1 GPU.*there are 0"):
        check(tmp_path, model, params(), machine=MACHINE)
    with pytest.raises(DoesNotFit, match=r"would take 4 GPUs"):
        check(tmp_path, model, params(serving={"data_parallel_size": 2, "tensor_parallel_size": 2}))
    with pytest.raises(UsageError, match="computes in no float64"):
        check(tmp_path, model, params(dtype="float64"))
    with pytest.raises(UsageError, match="128 positions"):
        check(tmp_path, model, params(max_new_tokens=128))
    for method in ("eetq", "mlx"):
        with pytest.raises(UsageError, match=f"does not compute with weights packed as {method}"):
            check(tmp_path, model, params(), edit=packed(method))
    check(tmp_path, model, params(), edit=packed("awq"))
    with pytest.raises(UsageError, match=r"needs config\.json"):
        check(tmp_path, model, params(), edit=lambda found: replace(found, config=None))
    with pytest.raises(UsageError, match="a class of your own"):
        check(tmp_path, model, params(), edit=lambda found: replace(found, custom={"class": "m:C"}))
    with pytest.raises(UsageError, match="needs a tokenizer"):
        check(tmp_path, model, params(), edit=lambda found: replace(found, path=None, names=frozenset({"config.json"})))
    chat = [[{"role": "user", "content": "a"}]]
    with pytest.raises(UsageError, match="no chat template"):
        check(tmp_path, model, params(prompts=chat))


def test_a_plan_says_what_to_install_and_where(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="needs vllm, not installed here") as error:
        check(tmp_path, model, params())
    assert "bigpipe-ml[vllm]" in error.value.cure
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UsageError, match="runs on Linux, and this is darwin"):
        check(tmp_path, model, params())


def test_a_plan_counts_the_share_of_each_gpu_that_it_takes(tmp_path: Path, model: Path) -> None:
    """Whatever the model needs: nothing else finds room beside it."""
    inputs = {"model": (Forecast(output=describe_checkpoint(model)),)}
    ctx = forecast_context(tmp_path, inputs=inputs, machine=GPUS)
    for serving_, vram in (
        ({}, {0: int(0.9 * 2**36)}),
        ({"tensor_parallel_size": 2, "gpu_memory_utilization": 0.5}, {0: 2**35, 1: 2**35}),
        ({"data_parallel_size": 2}, {0: int(0.9 * 2**36), 1: int(0.9 * 2**36)}),
    ):
        assert serving.forecast(params(serving=serving_), ctx).vram == vram


def test_what_the_server_depends_on_is_in_the_key_and_how_it_is_asked_is_not() -> None:
    stage = STAGE.with_params(params(serving={"tensor_parallel_size": 2}))
    assert stage.packages == ("vllm",)
    assert set(stage.inputs) == {"model"}
    assert not stage.inputs["model"].optional
    assert find_engine("vllm").apart == ("concurrency", "timeout", "retries", "longest_wait", "startup")
