"""Seconds that a plan predicts: what the node took when it last ran."""

from __future__ import annotations

import re

import pytest

import bigpipe
from bigpipe.orchestrator.stage import Forecast

RECIPE = """\
version: 1
name: slow
params: {tag: a}
stages:
  first: {uses: sleep, with: {seconds: 0.2, tag: "${params.tag}"}}
  second: {uses: sleep, needs: [first], with: {seconds: 0.1, tag: "${params.tag}"}}
"""


def test_predicted_and_taken(workshop):
    workshop.manifest.write_text(RECIPE)
    new = bigpipe.plan(workshop.manifest)
    assert [node.forecast.seconds for node in new.to_run] == [None, None]
    first = workshop.run()
    again = bigpipe.plan(workshop.manifest, params={"tag": "b"})
    predicted = {name: node.forecast.seconds for name, node in again.nodes.items()}
    # The recorded time is the work's own; what publishing took comes on top of it in the result
    assert predicted == {name: state.record.seconds for name, state in first.nodes.items()}
    workshop.run(params={"tag": "b"})
    told = workshop.command("plan", "recipe.yaml", "-p", "tag=c").stdout
    assert re.search(r"written, (under a second|about \d+ s)$", told, re.MULTILINE)
    assert bigpipe.plan(workshop.manifest, params={"tag": "b"}).to_run == []


CHAIN = """\
version: 1
name: chain
params: {layers: 1, size: 5GB}
stages:
  download: {uses: download, with: {synthetic: {config: {model_type: gpt2, architectures: [GPT2LMHeadModel],
    n_layer: "${params.layers}", n_embd: 64, n_head: 2, vocab_size: 100, n_positions: 32}}}}
  shard: {uses: shard, inputs: download, with: {max_shard_size: "${params.size}"}}
"""


def test_what_was_recorded_counts_for_more_than_a_rate(workshop):
    workshop.manifest.write_text(CHAIN)

    def planned(**params: str) -> Forecast:
        return bigpipe.plan(workshop.manifest, params=params).nodes["shard"].forecast

    by_rate = {layers: planned(layers=layers).seconds for layers in ("1", "2", "9")}
    record = workshop.run().nodes["shard"].record
    written = sum(file["size"] for file in record.files.values())
    alike = planned(layers="2")
    assert 1.2 < alike.write_bytes / written < 3
    assert alike.seconds == pytest.approx(record.seconds * alike.write_bytes / written)
    # Much more work is not so many times the start of a process, and other params may be quite another work
    assert planned(layers="9").seconds == by_rate["9"]
    assert abs(planned(layers="2", size="30KB").seconds - by_rate["2"]) < 0.01
