"""What a plan says of the disk, held against runs on a disk of that size."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from support.workshop import Workshop, environment

import bigpipe
from bigpipe.machine import detect

MB = 10**6
RECIPE = """\
version: 1
name: chain
stages:
  download:
    uses: download
    cache: KEPT
    with:
      synthetic:
        config: {model_type: gpt2, architectures: [GPT2LMHeadModel], n_layer: 12, n_embd: 256, n_head: 4,
                 vocab_size: 1000, n_positions: 128}
        format: bin
        max_shard_size: 3MB
  shard: {uses: shard, inputs: download, with: {max_shard_size: 2MB}, cache: false}
  quantize: {uses: quantize, inputs: shard, with: {scheme: int8}}
"""
KEPT, PASSED = RECIPE.replace("KEPT", "true"), RECIPE.replace("KEPT", "false")


def sizes(plan: bigpipe.Plan) -> dict[str, int]:
    return {name: node.forecast.write_bytes for name, node in plan.nodes.items()}


def planned(workshop: Workshop, text: str, **options: object) -> bigpipe.Plan:
    workshop.manifest.write_text(text)
    return bigpipe.plan(workshop.manifest, **options)


def test_of_what_passes_on_the_plan_counts_two_files(workshop: Workshop) -> None:
    plan = planned(workshop, KEPT)
    written = sizes(plan)
    between = plan.peak_disk - written["download"] - written["quantize"]
    assert between == 2 * plan.nodes["shard"].forecast.file_bytes < 5 * MB
    assert written["shard"] > 18 * MB


def test_one_at_a_time_it_counts_all_of_it(workshop: Workshop) -> None:
    plan = planned(workshop, KEPT, jobs=1)
    assert plan.peak_disk == sum(sizes(plan).values())
    assert plan.followed == {}
    plan = planned(workshop, PASSED, jobs=1)
    assert plan.peak_disk == sizes(plan)["download"] + sizes(plan)["shard"]


def test_two_that_pass_on_are_there_at_the_same_time(workshop: Workshop) -> None:
    plan = planned(workshop, PASSED)
    files = {name: plan.nodes[name].forecast.file_bytes for name in ("download", "shard")}
    assert plan.peak_disk <= sizes(plan)["quantize"] + 4 * files["download"] + 2 * files["shard"]
    assert plan.peak_disk >= sizes(plan)["quantize"] + 2 * files["download"] + 2 * files["shard"]


@pytest.mark.parametrize(
    "change",
    [
        ("scheme: int8}", "scheme: int8}, timeout: 1h"),
        ("scheme: int8}", 'scheme: int8}, when: "${stages.download.metrics.bytes} > 0"'),
        ("  quantize:", "  estimate: {uses: estimate, inputs: shard}\n  quantize:"),
    ],
)
def test_where_somebody_waits_for_all_of_it_it_is_counted_whole(workshop: Workshop, change: tuple[str, str]) -> None:
    plan = planned(workshop, KEPT.replace(*change))
    assert plan.peak_disk == sum(size for size in sizes(plan).values() if size)


def test_without_memory_for_both_it_is_counted_whole(workshop: Workshop) -> None:
    small = replace(detect(workshop.folder), memory_available=300 * 2**20)
    plan = planned(workshop, KEPT, machine=small)
    assert plan.peak_disk == sum(sizes(plan).values())


def test_what_fits_only_while_it_passes_fits_and_the_other_way_is_named(workshop: Workshop) -> None:
    machine = replace(detect(workshop.folder), disk_free=38 * MB)
    assert planned(workshop, KEPT, machine=machine).errors() == []
    [error] = planned(workshop, KEPT, machine=machine, jobs=1).errors()
    assert "of disk; 38.0 MB are free" in str(error)
    assert "run without `--jobs 1`: that needs" in str(error)
    # Estimate wants all of the download, which then lies there beside what is made of it; in turn, it goes before.
    text = PASSED.replace("{max_shard_size: 2MB}, cache: false", "{max_shard_size: 2MB}")
    text = text.replace("  shard:", "  estimate: {uses: estimate, inputs: download}\n  shard:")
    machine = replace(machine, disk_free=42 * MB)
    [error] = planned(workshop, text, machine=machine).errors()
    assert "run with `--jobs 1`: that needs" in str(error)
    assert planned(workshop, text, machine=machine, jobs=1).errors() == []


def on_a_disk_of(size: int, workshop: Workshop, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command with its store on a file system of that many bytes."""
    if subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    store = workshop.folder / "store"
    store.mkdir(exist_ok=True)
    script = f'mount -t tmpfs -o size={size} tmpfs {store} && exec "$@"'
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", sys.executable, "-m", "bigpipe", *arguments],
        cwd=workshop.folder, env=environment(workshop.folder), capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("text", [KEPT, PASSED], ids=["kept", "passed"])
def test_a_run_stays_within_what_was_planned(workshop: Workshop, text: str) -> None:
    size = planned(workshop, text).peak_disk + 2 * MB  # some 200 small files, a page each
    done = on_a_disk_of(size, workshop, "run", "recipe.yaml", "--json")
    assert done.returncode == 0, done.stderr
    nodes = json.loads(done.stdout.splitlines()[-1])["nodes"]
    assert {node["status"] for node in nodes.values()} == {"succeeded"}
    refused = on_a_disk_of(size, workshop, "run", "recipe.yaml", "--jobs", "1")
    assert refused.returncode != 0
    assert "run without `--jobs 1`" in refused.stderr


def test_the_plan_says_how_much_lies_there_at_a_time(workshop: Workshop) -> None:
    workshop.manifest.write_text(KEPT)
    assert "MB of disk at a time" in workshop.command("plan", "recipe.yaml").stdout
    assert workshop.json("plan", "recipe.yaml")["peak_disk_bytes"] < 36 * MB
    assert workshop.json("plan", "recipe.yaml", "--jobs", "1")["peak_disk_bytes"] > 45 * MB
