"""A length that is cut is said by the plan and by the result, and gates see it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.models import make_checkpoint
from support.workshop import Workshop

from bigpipe.errors import GateFailed

RECIPE = """version: 1
name: cut
stages:
  download: {{uses: download, with: {{path: {model}}}}}
  estimate:
    uses: estimate
    inputs: download
    with: {{dtypes: [float32], sequence_length: {length}}}
    gates: ["sequence_length >= 64"]
  dispatch:
    uses: dispatch
    inputs: download
    with: {{max_memory: {{cpu: 1GiB}}, sequence_length: {length}, verify: none}}
    gates: ["sequence_length >= 32"]
"""


def test_plan_result_and_gates_see_what_is_left_of_a_length(workshop: Workshop, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "opt", max_position_embeddings=64)
    said = "4096 tokens are more than the model takes: counted with 64"
    workshop.manifest.write_text(RECIPE.format(model=model, length=4096))
    planned = workshop.command("plan", str(workshop.manifest), "--explain")
    assert planned.returncode == 0
    assert "1 × 64 tokens of 4096" in planned.stdout
    assert planned.stdout.count(said) >= 1
    result = workshop.run()
    assert result.nodes["estimate"].record.metrics["sequence_length"] == 64
    assert result.nodes["dispatch"].record.metrics["sequence_length"] == 64
    assert said in (result.path("estimate") / "report.txt").read_text()
    assert said in (result.path("dispatch") / "placement.txt").read_text()
    with pytest.raises(GateFailed, match="sequence_length"):
        workshop.run(RECIPE.format(model=model, length=48))
