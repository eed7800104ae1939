"""`bigpipe.testing`: stages are run and forecast as in a recipe, without one."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError
from support import stages
from support.models import make_checkpoint

from bigpipe.errors import DoesNotFit, StageFailed, UsageError
from bigpipe.orchestrator.launch.leaving import await_threads, write_out
from bigpipe.orchestrator.stage import Forecast
from bigpipe.plugins.shard import STAGE as SHARD
from bigpipe.testing import forecast_stage, run_stage


@pytest.mark.parametrize(("stage", "here"), [(stages.INLINE, True), (stages.PROCESS, False)])
def test_a_stage_runs_where_its_kind_asks_for(stage, here, tmp_path):
    done = run_stage(stage, {"do": "succeed", "text": "words"}, folder=tmp_path, environment={"SHOWN": "yes"})
    assert (done.metrics.pid == os.getpid()) is here
    assert done.metrics.shown == "yes"
    assert done.out == tmp_path / "out"
    assert (done.out / "made").read_text() == "words"


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("stage", "late"), [(stages.INLINE, False), (stages.PROCESS, True)])
def test_what_a_kind_left_open_is_written_and_its_threads_end(stage, late, tmp_path):
    done = run_stage(stage, {"do": "open", "text": "" if late else "inline"}, folder=tmp_path)
    made = {path.name: path.read_text() for path in done.out.iterdir()}
    stages.close_all()
    assert made == {name: "rows" for name in ("cycle", "global", *["late"][:late])}


def test_a_thread_that_does_not_end_fails_what_it_may_still_write(tmp_path, capsys):
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="endless")
    thread.start()
    said = "kind mine: the thread endless still works 0 s after `run` returned"
    try:
        await_threads("mine", tmp_path, seconds=0)
        assert said in capsys.readouterr().out
        with (tmp_path / "rows").open("w"), pytest.raises(StageFailed, match=said):
            await_threads("mine", tmp_path, seconds=0)
    finally:
        end.set()
        thread.join()


def test_only_files_of_the_attempt_are_written_out(tmp_path):
    (tmp_path / "out").mkdir()
    with (tmp_path / "out/rows").open("w") as rows, (tmp_path / "other").open("w") as other:
        rows.write("rows")
        other.write("rows")
        write_out(tmp_path / "out")
        assert ((tmp_path / "out/rows").read_text(), (tmp_path / "other").read_text()) == ("rows", "")


def test_ranks_are_really_launched(tmp_path):
    done = run_stage(stages.RANKS, folder=tmp_path, num_processes=2)
    assert (done.out / "merged").read_text() == "0/2 1/2"


def test_what_it_says_and_the_errors_it_raises_arrive(tmp_path):
    assert "plain line" in run_stage(stages.PROCESS, {"do": "talk"}, folder=tmp_path).lines
    with pytest.raises(DoesNotFit, match="20 GiB"):
        run_stage(stages.PROCESS, {"do": "fail"}, folder=tmp_path)
    with pytest.raises(StageFailed, match="KeyError"):
        run_stage(stages.PROCESS, {"do": "crash"}, folder=tmp_path)


def test_a_built_in_kind_over_a_checkpoint_and_the_same_path_in_its_forecast(tmp_path):
    model = make_checkpoint(tmp_path / "model")
    done = run_stage(SHARD, {"max_shard_size": "10KB"}, inputs={"model": tmp_path / "model"}, folder=tmp_path / "work")
    shards = [path.name for path in done.out.glob("*.safetensors")]
    assert len(shards) == done.metrics.shards > 1
    assert set(shards) <= set(done.files)
    assert json.loads((done.out / "config.json").read_text()) == json.loads((Path(model) / "config.json").read_text())


def test_a_forecast(tmp_path):
    assert forecast_stage(stages.INLINE, folder=tmp_path) == stages._forecast(stages.Action(), None)


@pytest.mark.parametrize("inputs", [{"modle": "."}, {}])
def test_wrong_ports_are_named(inputs, tmp_path):
    with pytest.raises(UsageError, match="its ports: model"):
        run_stage(SHARD, inputs={port: Path(path) for port, path in inputs.items()}, folder=tmp_path)


def test_wrong_params_and_a_stage_that_nobody_can_import(tmp_path):
    with pytest.raises(ValidationError, match="nonsense"):
        run_stage(stages.INLINE, {"nonsense": 1}, folder=tmp_path)
    with pytest.raises(UsageError, match="no attribute of a module"):
        run_stage(replace(stages.PROCESS, version=2), folder=tmp_path)


def test_paths_are_texts_or_relative_too(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    ways = ["model", Path("model"), [Path("model")], tmp_path / "model"]
    done = [
        run_stage(SHARD, {"max_shard_size": "10KB"}, inputs={"model": given}, folder=f"work-{number}")
        for number, given in enumerate(ways)
    ]
    assert all(each.files == done[0].files for each in done)
    assert done[0].out == Path("work-0", "out")
    assert forecast_stage(stages.INLINE, folder="work", base="model") == Forecast()


def test_a_kind_is_what_it_is_with_these_params(tmp_path):
    there = run_stage(stages.SETTLED, folder=tmp_path / "there")
    assert there.metrics.pid != os.getpid()
    here = run_stage(stages.SETTLED, {"text": "here"}, inputs={"model": tmp_path}, folder=tmp_path / "here")
    assert here.metrics.pid == os.getpid()
    for ask in (run_stage, forecast_stage):
        with pytest.raises(UsageError, match="settled needs its port model"):
            ask(stages.SETTLED, {"text": "here"}, folder=tmp_path)
    foreseen = forecast_stage(stages.SETTLED, {"text": "here"}, inputs={"model": Forecast()}, folder=tmp_path)
    assert foreseen.seconds == 7.0
    assert forecast_stage(stages.SETTLED, folder=tmp_path).seconds != 7.0


PARTS = """
from pydantic import computed_field
from bigpipe.orchestrator.stage import Forecast, Metrics, Params, StageResult

class Told(Metrics):
    number: int = 1

    @computed_field
    @property
    def twice(self) -> int:
        return 2 * self.number

def run(params, context):
    return StageResult(Told(number=2))

def forecast(params, context):
    return Forecast()
"""
ASSEMBLED = """
from bigpipe.orchestrator.stage import Params, Stage
from own_parts import Told, run, forecast
STAGE = Stage(kind="mine", version=1, params=Params, metrics=Told, inputs={}, output=None, run=run, forecast=forecast)
"""


def test_a_stage_may_be_put_together_anywhere_of_whatever_parts(tmp_path, monkeypatch):
    (tmp_path / "own_space").mkdir()  # without an __init__.py
    (tmp_path / "own_space" / "stages.py").write_text(ASSEMBLED)
    (tmp_path / "own_parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "__mp_main__", sys.modules["__main__"])  # of multiprocessing
    stage = importlib.import_module("own_space.stages").STAGE
    monkeypatch.setitem(vars(sys.modules["__main__"]), "STAGE", stage)
    done = run_stage(stage, folder=tmp_path / "work")
    assert (done.metrics.number, done.metrics.twice) == (2, 4)


SCRIPT = """
from dataclasses import replace

from support import stages

from bigpipe.orchestrator.stage import Stage
from bigpipe.testing import run_stage

def run(params, context):
    return stages.act(params, context)

STAGE = replace(stages.INLINE, run=run, runs_in=WHERE)

if __name__ == "__main__":
    run_stage(STAGE, folder="work")
"""


@pytest.mark.parametrize("where", ["process", "inline"])
def test_a_kind_in_the_script_itself_runs_inline_alone(where, tmp_path):
    script = SCRIPT.replace("WHERE", repr(where))
    ended = subprocess.run(
        [sys.executable, "-"], input=script, text=True, capture_output=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    if where == "inline":
        assert (ended.returncode, ended.stderr) == (0, "")
    else:
        assert "a module of its own" in ended.stderr
        assert "bug" not in ended.stderr
