"""What a kind measures is a finite number, or null: nothing else can be compared, or told in JSON."""

from __future__ import annotations

import json

import pytest
from support.workshop import Workshop, statuses

from bigpipe.errors import StageFailed

RECIPE = """\
version: 1
name: measured
trust: {modules: [support]}
stages:
  m: {uses: "support.measuring:STAGE", with: {value: "%s"}, gates: ["value != 0"]}
"""


def refuse(constant: str) -> None:
    pytest.fail(f"{constant} is no JSON")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_metric_that_is_no_finite_number_fails_its_node(workshop: Workshop, value: str) -> None:
    result = workshop.run(RECIPE % value)
    assert (statuses(result), result.exit_code) == ({"m": "failed"}, 6)
    assert isinstance(result.errors[0], StageFailed)
    assert f"measured parts.a.2 = {value}" in result.errors[0].cause
    json.loads(json.dumps(result.as_json()), parse_constant=refuse)


def test_null_and_finite_numbers_are_metrics(workshop: Workshop) -> None:
    result = workshop.run(RECIPE % "1e308", check=True)
    assert result["m"].metrics["parts"]["a"] == [0.5, None, 1e308]
