"""`bigpipe.testing`: stages are run and forecast as in a recipe, without one."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError
from support import stages
from support.models import make_checkpoint

from bigpipe.errors import DoesNotFit, StageFailed, UsageError
from bigpipe.plugins.shard import STAGE as SHARD
from bigpipe.testing import forecast_stage, run_stage


@pytest.mark.parametrize(("stage", "here"), [(stages.INLINE, True), (stages.PROCESS, False)])
def test_a_stage_runs_where_its_kind_asks_for(stage, here, tmp_path):
    done = run_stage(stage, {"do": "succeed", "text": "words"}, folder=tmp_path, environment={"SHOWN": "yes"})
    assert (done.metrics.pid == os.getpid()) is here
    assert done.metrics.shown == "yes"
    assert done.out == tmp_path / "out"
    assert (done.out / "made").read_text() == "words"


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
