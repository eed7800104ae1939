"""Arguments under `generation`: what is wrong of one is underlined, its name or its value."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.workshop import Workshop

from bigpipe.errors import ManifestError
from bigpipe.orchestrator.recipe import load_recipe

RECIPE = """\
version: 1
stages:
  model: {{uses: download, with: {{path: {model}}}}}
  use: {{uses: distributed-infer, inputs: model, with: {{task: {task}, prompts: [a], generation: {{{argument}}}}}}}
"""


@pytest.mark.parametrize(
    ("task", "argument", "underlined", "says"),
    [
        ("text-generation", "temprature: 1.5", "temprature", "did you mean 'temperature'?"),
        ("text-generation", "max_length: 5", "max_length", "set max_new_tokens as a field of the stage"),
        ("scoring", "continuatoin: 5", "continuatoin", "did you mean 'continuation'?"),
        ("scoring", "continuation: 5", "5", "`bigpipe kinds distributed-infer` lists what it takes"),
    ],
)
def test_before_anything_is_asked(tmp_path: Path, task: str, argument: str, underlined: str, says: str) -> None:
    with pytest.raises(ManifestError) as refused:
        load_recipe(tmp_path / "recipe.yaml", text=RECIPE.format(model="m", task=task, argument=argument))
    problems = {problem.place: problem for problem in refused.value.problems}
    [(place, problem)] = problems.items()
    assert place.text[place.column - 1 :][: place.width] == underlined
    assert problem.cure == says


def test_a_value_that_transformers_does_not_take(workshop: Workshop) -> None:
    model = Path(__file__).parents[2] / "models/quickstart"
    text = RECIPE.format(model=model, task="text-generation", argument="temperature: hot")
    workshop.manifest.write_text(text)
    [error] = workshop.json("plan", "recipe.yaml")["errors"]
    assert text.splitlines()[error["line"] - 1][error["column"] - 1 :].startswith("hot}")
    assert 'generation.temperature takes float, and "hot" is given' in error["cause"]
