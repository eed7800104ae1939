"""A rerun where nothing changed: seven stages on the quickstart's model, against `dvc repro` with seven stages.

    python benchmarks/noop.py [--dvc PATH] [--rounds 11] [--stages 343]
    python benchmarks/noop.py --plan 10000 [--rounds 11]

--plan: the first plan of that many nodes instead, each written out, and as a matrix. dvc is not a dependency: give its
path, from an environment of its own.

Whole processes, start to exit, alternating.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from machine import alternate, facts, median, medians, whole_process

ROOT = Path(__file__).parents[1]
BIGPIPE = [sys.executable, "-m", "bigpipe"]


def seven(folder: Path) -> list[str]:
    for name in ("manifests", "models"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(Path(__file__).with_name("seven.yaml"), folder / "manifests")
    return [*BIGPIPE, "run", "manifests/seven.yaml"]


def wide(folder: Path, stages: int) -> list[str]:
    """`stages` download nodes of tiny directories: the engine's own cost per cached node."""
    lines = ["version: 1", "name: wide", "stages:"]
    for number in range(stages):
        directory = folder / "data" / str(number)
        directory.mkdir(parents=True)
        shutil.copytree(ROOT / "models/quickstart", directory, dirs_exist_ok=True)
        (directory / "number.json").write_text(str(number))
        lines.append(f"  s{number}: {{uses: download, with: {{path: data/{number}}}}}")
    (folder / "wide.yaml").write_text("\n".join(lines) + "\n")
    return [*BIGPIPE, "run", "wide.yaml"]


def planned(folder: Path, nodes: int) -> dict[str, list[str]]:
    """`nodes` nodes of two shapes: a download that is never asked for, and shards of it. No kind has headers to reckon
    with, so that planning them is the engine's own cost."""
    download = "  d: {uses: download, with: {repo: owner/model}}"
    sizes = range(1, nodes)
    written = [f"  s{size}: {{uses: shard, inputs: d, with: {{max_shard_size: {size}MB}}}}" for size in sizes]
    axis = f"matrix: {{size: {list(sizes)}}}"
    matrix = f'  s: {{uses: shard, inputs: d, {axis}, with: {{max_shard_size: "${{matrix.size}}MB"}}}}'
    commands = {}
    for shape, stages in {"written out": written, "a matrix": [matrix]}.items():
        manifest = folder / f"{shape.replace(' ', '-')}.yaml"
        manifest.write_text("\n".join(["version: 1", "name: planned", "stages:", download, *stages]) + "\n")
        commands[shape] = [*BIGPIPE, "plan", "--offline", manifest.name]
    return commands


def dvc_project(dvc: str, folder: Path, stages: int) -> list[str]:
    folder.mkdir()
    for command in (["git", "init", "-q"], [dvc, "init", "-q"]):
        subprocess.run(command, cwd=folder, check=True)
    (folder / "s0.txt").write_text("start")
    lines = ["stages:"]
    for number in range(1, stages + 1):
        lines += [
            f"  s{number}:",
            f"    cmd: cp s{number - 1}.txt s{number}.txt",
            f"    deps: [s{number - 1}.txt]",
            f"    outs: [s{number}.txt]",
        ]
    (folder / "dvc.yaml").write_text("\n".join(lines) + "\n")
    subprocess.run([dvc, "repro", "-q"], cwd=folder, check=True)
    return [dvc, "repro", "-q"]


def timed(command: list[str], **options: Any) -> tuple[float, int, float]:
    """As `whole_process`, and seconds of processor time: other work on the machine changes these less."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds, peak = whole_process(command, **options)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, peak, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dvc", default=shutil.which("dvc"))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--stages", type=int, default=7, help="7: of seven kinds; more: that many cached nodes")
    parser.add_argument("--plan", type=int, metavar="NODES")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {**os.environ, "BIGPIPE_HOME": str(folder / "store")}
        if arguments.plan:
            ours = planned(folder, arguments.plan)
        else:
            ours = {"": seven(folder) if arguments.stages == 7 else wide(folder, arguments.stages)}
            subprocess.run(ours[""], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
        arms = {
            f"bigpipe {shape}".strip(): partial(timed, command, cwd=folder, env=environment)
            for shape, command in ours.items()
        }
        if arguments.dvc and not arguments.plan:
            theirs = dvc_project(arguments.dvc, folder / "dvc", arguments.stages)
            arms["dvc"] = partial(timed, theirs, cwd=folder / "dvc")
        results = alternate(arms, arguments.rounds)
    table = medians(results)
    for arm, runs in results.items():
        table[arm] |= {"processor_seconds": median([run[2] for run in runs]), "slowest": max(run[0] for run in runs)}
    what = f"plan, {arguments.plan} nodes" if arguments.plan else f"no-op rerun, {arguments.stages} stages"
    report = {"benchmark": what, "arms": table, "machine": facts()}
    if "dvc" in table:
        report["ratio"] = round(table["dvc"]["seconds"] / table["bigpipe"]["seconds"], 2)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
