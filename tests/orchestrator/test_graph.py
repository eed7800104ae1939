"""Recipes: axes, wiring, order. What goes wrong is in test_bad_manifests."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest
from support.kinds import KINDS

from bigpipe.errors import UsageError
from bigpipe.orchestrator.graph import Recipe, load_recipe


def recipe(folder: Path, text: str, **params: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text("version: 1\n" + dedent(text), encoding="utf-8")
    return load_recipe(path, params, environment={}, stages=KINDS)


SEVEN = """
    name: opt
    params: {gpu: 22GiB, schemes: [int8, nf4]}
    stages:
      save: {uses: save, inputs: {model: quantize@scheme=int8, reports: [estimate]}, with: {to: dist/opt}}
      source: {uses: source, with: {repo: facebook/opt-13b}}
      estimate:
        uses: estimate
        inputs: source
        with: {dtypes: [int8], batch_size: 4}
        gates: ["int8.inference_high <= ${params.gpu}"]
      quantize:
        uses: quantize
        inputs: source
        matrix: {scheme: "${params.schemes}"}
        when: ${stages.estimate.metrics.int8.weights} < 30GiB
        with: {scheme: "${matrix.scheme}"}
      place:
        uses: place
        inputs: quantize
        with: {max_memory: {0: "${params.gpu}", 1-7: 46GiB, cpu: 48GiB}}
      infer:
        uses: infer
        inputs: {model: quantize, placement: place}
        with: {prompts: [hello]}
        gates: ["peak.gpu <= ${stages.quantize.metrics.bytes} * 2"]
        launch: {num_processes: 2}
        timeout: 30m
    """


def test_nodes_come_in_topological_order_with_ties_in_file_order(tmp_path: Path) -> None:
    assert list(recipe(tmp_path, SEVEN).nodes) == [
        "source", "estimate", "quantize@scheme=int8", "save", "quantize@scheme=nf4",
        "place@scheme=int8", "place@scheme=nf4", "infer@scheme=int8", "infer@scheme=nf4",
    ]  # fmt: skip


def test_edges_come_from_inputs_needs_and_when(tmp_path: Path) -> None:
    graph = recipe(tmp_path, SEVEN).graph
    assert set(graph.predecessors("quantize@scheme=nf4")) == {"source", "estimate"}
    assert set(graph.predecessors("infer@scheme=nf4")) == {"quantize@scheme=nf4", "place@scheme=nf4"}
    assert set(graph.predecessors("save")) == {"quantize@scheme=int8", "estimate"}


def test_select_takes_ancestors_along(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, SEVEN)
    assert loaded.select(["place@scheme=nf4"]) == {"place@scheme=nf4", "quantize@scheme=nf4", "estimate", "source"}
    assert loaded.select(["quantize"]) == {"quantize@scheme=int8", "quantize@scheme=nf4", "estimate", "source"}
    with pytest.raises(UsageError, match="did you mean 'quantize'"):
        loaded.select(["quantise"])
