"""The calls of `import bigpipe`, called wrongly: an error of ours, with cause and cure, before anything is written."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

import bigpipe
from bigpipe import errors
from bigpipe.bigmodel.publishing.addresses import open_destination
from bigpipe.errors import BigpipeError, UsageError
from bigpipe.orchestrator.planning import open_session
from bigpipe.orchestrator.store.remote import open_remote

QUICKSTART = Path(__file__).parents[1] / "models" / "quickstart"


def test_recipes_that_lie_near_are_named(tmp_path):
    (tmp_path / "mkdocs.yml").write_text("site_name: x\n")
    (tmp_path / "manifests").mkdir()
    for name in ("one", "two"):
        (tmp_path / "manifests" / f"{name}.yaml").write_text("version: 1\nstages:\n  a: {}\n")
    with pytest.raises(bigpipe.BigpipeError, match="there is no manifest") as error:
        bigpipe.run(tmp_path / "nope.yaml")
    assert error.value.cure == "recipes here: manifests/one.yaml and manifests/two.yaml"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda out: bigpipe.save_checkpoint(QUICKSTART, out, max_shard_size="10GBs"), "max_shard_size: '10GBs' is"),
        (lambda out: bigpipe.save_checkpoint(QUICKSTART, out, max_shard_size="10Gb"), "means bits\n  write 10GB"),
        (lambda out: bigpipe.save_checkpoint(QUICKSTART, out, dtype="f16"), "choose one of bfloat16, float16"),
        (lambda out: bigpipe.save_checkpoint(QUICKSTART, out, format="pickle"), "choose one of safetensors, bin"),
        (lambda out: bigpipe.quantize_checkpoint(QUICKSTART, out, scheme="int9"), "choose one of int8, nf4, fp4"),
        (lambda out: bigpipe.quantize_checkpoint(out / "none", out, scheme="int8"), "no such file or directory"),
        (lambda out: bigpipe.open_checkpoint(QUICKSTART / "config.json"), "give its directory, or a"),
        (lambda out: bigpipe.estimate(QUICKSTART, dtypes="int9"), "did you mean 'int8'?"),
        (lambda out: bigpipe.estimate(QUICKSTART, memory="lots"), "memory: 'lots' is not a size"),
        (lambda out: bigpipe.place(QUICKSTART, dtype="float17"), "use float32, float16, bfloat16"),
        (lambda out: bigpipe.place(QUICKSTART, max_memory={"gpu": "1GB"}), "name a GPU (0, cuda:0)"),
        (lambda out: bigpipe.place(QUICKSTART, max_memory={"cpu": "x"}), "max_memory of cpu: 'x' is not a size"),
        (lambda out: bigpipe.place(QUICKSTART, device_map="autos"), "use one of auto"),
        (lambda out: bigpipe.load(QUICKSTART, dtype="float17"), "use float32, float16, bfloat16, float64"),
        (lambda out: bigpipe.load(QUICKSTART, dtype="int8"), "use float32, float16, bfloat16, float64"),
        (lambda out: bigpipe.run(out / "missing.yaml"), "there is no manifest"),
    ],
)
def test_a_wrong_call_says_what_is_right(call, says, tmp_path):
    with pytest.raises(bigpipe.BigpipeError) as error:
        call(tmp_path / "out")
    assert says in str(error.value)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("jobs", [0, -1])
@pytest.mark.parametrize("call", [bigpipe.run, bigpipe.plan])
def test_fewer_than_one_node_at_a_time_is_refused(tmp_path: Path, call: Any, jobs: int) -> None:
    (tmp_path / "r.yaml").write_text("version: 1\nstages:\n  d: {uses: download, with: {path: .}}\n")
    with pytest.raises(UsageError, match=f"jobs is {jobs}"):
        call(tmp_path / "r.yaml", jobs=jobs, store=tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_parameter_that_is_none_is_not_the_text_null(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("version: 1\nparams: {x: a}\nstages:\n  d: {uses: download, with: {repo: a/b}}\n")
    with pytest.raises(UsageError, match="params: x is None"):
        bigpipe.load_manifest(tmp_path / "r.yaml", params={"x": None})


def test_a_destination_that_a_shell_would_have_read_is_refused(tmp_path: Path) -> None:
    for to in ("$HOME/m", "s3://$BUCKET/m"):
        with pytest.raises(UsageError, match="would be a name with a dollar sign in it"):
            open_destination(to)
    with pytest.raises(UsageError, match="would be a name with a dollar sign in it"):
        open_remote("$SCRATCH/shared", tmp_path, tmp_path / "store", {})


@pytest.mark.parametrize("way", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "--offline", "env"])
@pytest.mark.parametrize("kind", ["download", "estimate"])
@pytest.mark.parametrize("revision", ["main", "a" * 40])
def test_what_nobody_here_knows_is_refused_by_the_plan_where_the_hub_may_not_be_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, kind: str, revision: str
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    if way in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(way, "1")
    environment = ", env: {HF_HUB_OFFLINE: '1'}" if way == "env" else ""
    stage = f"{{uses: {kind}, with: {{repo: o/none, revision: {revision}}}{environment}}}"
    (tmp_path / "r.yaml").write_text(f"version: 1\nstages:\n  d: {stage}\n")
    plan = bigpipe.plan(tmp_path / "r.yaml", store=tmp_path / "store", offline=way == "--offline")
    (error,) = plan.errors()
    assert (error.status, error.node, way.replace("env", "HF_HUB_OFFLINE") in str(error.cure)) == (75, "d", True)


@pytest.mark.parametrize("revision", ["main", "a" * 40])
def test_what_may_never_run_is_not_refused_for_the_hub(tmp_path: Path, revision: str) -> None:
    counted = "{uses: command, with: {argv: [wc], produces: report, metrics: m.json}}"
    stage = f"{{uses: download, with: {{repo: o/none, revision: {revision}}}, env: {{HF_HOME: {tmp_path}}}"
    (tmp_path / "r.yaml").write_text(
        f'version: 1\nstages:\n  a: {counted}\n  d: {stage}, when: "${{stages.a.metrics.lines}} > 5"}}\n'
    )
    plan = bigpipe.plan(tmp_path / "r.yaml", store=tmp_path / "store", offline=True)
    assert [str(node.action) for node in plan.nodes.values()] == ["run", "maybe"]
    assert plan.errors() == []


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
@pytest.mark.parametrize(("said", "offline"), [("1", True), ("True", True), ("on", True), ("YES", True), ("0", False)])
def test_a_run_is_offline_where_the_environment_says_so_to_huggingface_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str, offline: bool
) -> None:
    monkeypatch.setenv(name, said)
    (tmp_path / "r.yaml").write_text("version: 1\nstages:\n  d: {uses: download, with: {repo: a/b}}\n")
    assert open_session(tmp_path / "r.yaml", params={}, store=tmp_path / "store").offline is offline


TYPES = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, BigpipeError)]
PROBLEM = errors.Problem("BP101", errors.Place("r.yaml", 1, 2, "a: b"), "is wrong", "mend it")


@pytest.mark.parametrize("kind", TYPES)
def test_an_error_of_each_class_comes_whole_out_of_a_process_pool(kind: type[BigpipeError]) -> None:
    error = kind([PROBLEM]) if kind is errors.ManifestError else kind("it is so", "do that")  # type: ignore[arg-type]
    error.place, error.node, error.plan = PROBLEM.place, "a", lambda: "functions of a recipe do not go along"
    again = pickle.loads(pickle.dumps(error))  # noqa: S301  our own
    assert type(again) is kind
    assert vars(again) == vars(error) | {"plan": None}
    assert (str(again), again.args, again.as_json()) == (str(error), error.args, error.as_json())


def test_the_error_of_a_refused_run_pickles(tmp_path: Path) -> None:
    stage = "{uses: command, resources: {ram: 100TiB}, with: {argv: ['true'], produces: checkpoint}}"
    (tmp_path / "r.yaml").write_text(f"version: 1\nstages:\n  a: {stage}\n")
    with pytest.raises(errors.DoesNotFit) as told:
        bigpipe.run(tmp_path / "r.yaml", store=tmp_path / "store")
    assert told.value.plan is not None
    assert str(pickle.loads(pickle.dumps(told.value))) == str(told.value)  # noqa: S301  our own
