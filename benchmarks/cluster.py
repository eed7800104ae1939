"""What sending nodes to a Ray cluster costs: a chain of nodes that do next to nothing, there and here.

    python benchmarks/cluster.py [--nodes 12] [--rounds 3]

Two raylets on this machine, on addresses of the loopback device. The seconds of a node are those of its record: from
when it has its turn until it is published. The first node on a machine starts a worker of Ray's, and is told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import facts, median

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
BIGPIPE = [sys.executable, "-m", "bigpipe"]


def chain(nodes: int) -> str:
    lines = ["version: 1", "name: chain", "stages:", "  n0: {uses: write}"]
    lines += [
        f"  n{number}: {{uses: write, inputs: {{after: n{number - 1}}}, with: {{text: '{number}'}}}}"
        for number in range(1, nodes)
    ]
    return "\n".join(lines) + "\n"


def seconds(folder: Path, environment: dict[str, str], *options: str) -> tuple[list[float], float]:
    """Of each node, and of the whole command."""
    began = time.monotonic()
    done = subprocess.run(
        [*BIGPIPE, "run", "chain.yaml", "--json", "--store", f"store-{time.monotonic_ns()}", *options],
        cwd=folder, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    nodes = json.loads(done.stdout.splitlines()[-1])["nodes"]
    return [node["seconds"] for node in nodes.values()], time.monotonic() - began


def main() -> None:
    from support.raylets import raylets
    from support.workshop import environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rest: dict[str, list[float]] = {"here": [], "ray": []}
    first: dict[str, list[float]] = {"here": [], "ray": []}
    whole: dict[str, list[float]] = {"here": [], "ray": []}
    with tempfile.TemporaryDirectory() as name, raylets(("127.0.0.2",), ("127.0.0.3",)) as cluster:
        folder = Path(name)
        (folder / "chain.yaml").write_text(chain(arguments.nodes))
        around = {**os.environ, **environment(folder), **cluster.environment}
        for _ in range(arguments.rounds):
            for arm, options in {"here": ("--jobs", "1"), "ray": ("--executor", cluster.executor)}.items():
                nodes, took = seconds(folder, around, *options)
                first[arm].append(nodes[0])
                rest[arm] += nodes[1:]
                whole[arm].append(took)
    arms: dict[str, Any] = {
        arm: {
            "seconds_per_node": round(median(rest[arm]), 3),
            "slowest_node": round(max(rest[arm]), 3),
            "first_node": round(median(first[arm]), 3),
            "whole_command": round(median(whole[arm]), 2),
        }
        for arm in rest
    }
    overhead = arms["ray"]["seconds_per_node"] - arms["here"]["seconds_per_node"]
    print(json.dumps({**facts(), "nodes": arguments.nodes, "arms": arms, "overhead_seconds": round(overhead, 3)}))


if __name__ == "__main__":
    main()
