"""Seconds that a plan predicts: what the node took when it last ran, and what it then takes again."""

from __future__ import annotations

import time

import bigpipe

RECIPE = """\
version: 1
name: slow
params: {tag: a}
stages:
  first: {uses: sleep, with: {seconds: 0.8, tag: "${params.tag}"}}
  second: {uses: sleep, needs: [first], with: {seconds: 0.4, tag: "${params.tag}"}}
"""


def test_predicted_and_taken(workshop):
    workshop.manifest.write_text(RECIPE)
    new = bigpipe.plan(workshop.manifest)
    assert [node.forecast.seconds for node in new.to_run] == [None, None]
    first = workshop.run()
    again = bigpipe.plan(workshop.manifest, params={"tag": "b"})
    predicted = {name: node.forecast.seconds for name, node in again.nodes.items()}
    # The recorded time is the work's own; what publishing took comes on top of it in the result
    for name, least in (("first", 0.8), ("second", 0.4)):
        assert least <= predicted[name] <= first.nodes[name].seconds + 0.001
    started = time.perf_counter()
    second = workshop.run(params={"tag": "b"})
    taken = time.perf_counter() - started
    # Sleeping is the same on every machine; starting two processes is not, so there is room for a busy one
    assert all(abs(predicted[name] - second.nodes[name].seconds) < 2 for name in predicted)
    assert abs(sum(predicted.values()) - taken) < 4
    assert ", about " in workshop.command("plan", "recipe.yaml", "-p", "tag=c").stdout
    assert bigpipe.plan(workshop.manifest, params={"tag": "b"}).to_run == []
