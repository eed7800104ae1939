"""A rerun where nothing changed: the seven stages of the quickstart, against `dvc repro` with seven stages.

    python benchmarks/noop.py [--dvc PATH] [--rounds 11] [--stages 343]

Whole processes, start to exit, alternating. dvc is not a dependency: give its path, from an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import alternate, facts, medians, whole_process

ROOT = Path(__file__).parents[1]
BIGPIPE = [str(Path(sys.executable).parent / "bigpipe")]


def quickstart(folder: Path) -> list[str]:
    for name in ("manifests", "models"):
        shutil.copytree(ROOT / name, folder / name)
    return [*BIGPIPE, "run", "manifests/quickstart.yaml"]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dvc", default=shutil.which("dvc"))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--stages", type=int, default=7, help="7: the quickstart; more: that many cached nodes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {**os.environ, "BIGPIPE_HOME": str(folder / "store")}
        ours = quickstart(folder) if arguments.stages == 7 else wide(folder, arguments.stages)
        subprocess.run(ours, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
        arms = {"bigpipe": lambda: whole_process(ours, cwd=folder, env=environment)}
        if arguments.dvc:
            theirs = dvc_project(arguments.dvc, folder / "dvc", arguments.stages)
            arms["dvc"] = lambda: whole_process(theirs, cwd=folder / "dvc")
        results = alternate(arms, arguments.rounds)
    table = medians(results)
    report = {"benchmark": f"no-op rerun, {arguments.stages} stages", "arms": table, "machine": facts()}
    if "dvc" in table:
        report["ratio"] = round(table["dvc"]["seconds"] / table["bigpipe"]["seconds"], 2)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
