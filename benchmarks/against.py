"""This checkout against another one, in one run: what a change costs or gives.

    python benchmarks/against.py CHECKOUT [--only noop plan …] [--rounds 5] [--size 1.3B] [--folder DIR]

Every row is done by both, as whole processes that alternate, with the same interpreter and libraries: seven stages
and 343 with nothing to do, the first plan of 10,000 nodes (written out, and as a matrix), the estimate of
Llama-3.1-405B from a loopback Hub, resharding, int8, double-quantized nf4, and the whole recipe of `recipe.py`.
Only the command and what `import bigpipe` offers are used, so that any two checkouts can be compared. Files are written
cold and synced inside the timing. Medians; the ratio is ours to theirs.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from machine import alternate, facts, median, whole_process
from noop import ROOT, planned, seven, wide
from recipe import QUANTIZE, RECIPE, SERVER, SHARD
from reshard import forget

Arm = tuple[Sequence[str], dict[str, str], Path]
"""A command, its environment, and the folder it runs in."""
RESHARD = """
import bigpipe, sys
bigpipe.save_checkpoint(sys.argv[1], sys.argv[2], max_shard_size="200MB")
"""
INT8 = """
import bigpipe, sys
bigpipe.quantize_checkpoint(sys.argv[1], sys.argv[2], scheme="int8")
"""
NF4 = """
import bigpipe, sys
bigpipe.quantize_checkpoint(sys.argv[1], sys.argv[2], scheme="nf4", bnb_4bit_use_double_quant=True)
"""
SOURCE = """
import sys
from pathlib import Path
from reshard import make_source
make_source(Path(sys.argv[1]), sys.argv[2], "safetensors", "500MB")
"""
"""Files of 500 MB, as the loopback Hub serves them."""
COMMAND = [sys.executable, "-m", "bigpipe"]


class Sides:
    """Both checkouts, each with a folder and a store of its own."""

    def __init__(self, other: Path, folder: Path, rounds: int) -> None:
        self.folder = folder
        self.rounds = rounds
        self.checkouts = {"ours": ROOT, "theirs": other.resolve()}

    def environment(self, side: str) -> dict[str, str]:
        return {
            **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
            "PYTHONPATH": str(self.checkouts[side] / "src"),
            "PYTHONPYCACHEPREFIX": str(self.place(side) / "bytecode"),
            "BIGPIPE_HOME": str(self.place(side) / "store"),
            "OMP_NUM_THREADS": str(os.cpu_count()),
        }

    def place(self, side: str) -> Path:
        path = self.folder / side
        path.mkdir(exist_ok=True)
        return path

    def compare(self, arm: Callable[[str], Callable[[], tuple[float, float, int]]]) -> dict[str, Any]:
        """arm: side → what runs it once and gives seconds of wall time, of processor time, and peak bytes."""
        results = alternate({side: arm(side) for side in self.checkouts}, self.rounds)
        row: dict[str, Any] = {
            side: {
                "seconds": median([run[0] for run in runs]),
                "processor_seconds": median([run[1] for run in runs]),
                "peak_mib": round(max(run[2] for run in runs) / 2**20),
            }
            for side, runs in results.items()
        }
        for unit in ("seconds", "processor_seconds"):
            row[f"ratio of {unit}"] = round(row["ours"][unit] / row["theirs"][unit], 3)
        return row


def timed(command: Sequence[str], **options: Any) -> tuple[float, float, int]:
    """Seconds of wall time, of processor time with all children's, and peak resident bytes of the largest process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds, peak = whole_process(command, **options)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak


def noop(sides: Sides, stages: int) -> dict[str, Any]:
    def arm(side: str) -> Callable[[], tuple[float, float, int]]:
        folder = sides.place(side)
        command = seven(folder) if stages == 7 else wide(folder, stages)
        options = {"cwd": folder, "env": sides.environment(side)}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **options)
        return partial(timed, command, **options)

    return sides.compare(arm)


def plan(sides: Sides, shape: str) -> dict[str, Any]:
    def arm(side: str) -> Callable[[], tuple[float, float, int]]:
        folder = sides.place(side)
        return partial(timed, planned(folder, 10000)[shape], cwd=folder, env=sides.environment(side))

    return sides.compare(arm)


def estimate(sides: Sides) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT / "tests"))
    from estimate import repositories
    from support.hub import LoopbackHub

    number = iter(range(10**6))
    with LoopbackHub() as hub:
        repositories(hub)

        def arm(side: str) -> Callable[[], tuple[float, float, int]]:
            environment = {**sides.environment(side), **hub.environment(sides.folder / "home"), "OMP_NUM_THREADS": "1"}
            command = [*COMMAND, "estimate", "bench/headers", "--json", "--store"]
            return lambda: timed([*command, str(sides.place(side) / f"new{next(number)}")], env=environment)

        return sides.compare(arm)


def converted(sides: Sides, code: str, source: Path) -> dict[str, Any]:
    def run(side: str) -> tuple[float, float, int]:
        out = sides.place(side) / "out"
        forget(source)
        try:
            return timed([sys.executable, "-c", code, str(source), str(out)], env=sides.environment(side))
        finally:
            shutil.rmtree(out, ignore_errors=True)
            os.sync()

    return sides.compare(lambda side: partial(run, side))


@contextmanager
def serving(source: Path, folder: Path) -> Iterator[dict[str, str]]:
    """A Hub on loopback with the model `org/model`; gives the environment that leads there."""
    told = folder / "environment"
    paths = os.pathsep.join(str(ROOT / name) for name in ("tests", "src"))
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, source, told, "0"],
        stdin=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
    )
    try:
        while not told.exists():
            if server.poll() is not None:
                raise SystemExit("the Hub on loopback did not start")
        yield dict(line.split("=", 1) for line in told.read_text().splitlines())
    finally:
        if server.stdin:
            server.stdin.close()
        server.wait()


def whole(sides: Sides, source: Path) -> dict[str, Any]:
    with serving(source, sides.folder) as hub:

        def run(side: str) -> tuple[float, float, int]:
            folder = sides.place(side)
            for name in ("store", "hf"):
                shutil.rmtree(folder / name, ignore_errors=True)
            (folder / "recipe.yaml").write_text(RECIPE.format(shard=SHARD, quantize=QUANTIZE["int8"]))
            environment = {**sides.environment(side), **hub, "HF_HOME": str(folder / "hf")}
            os.sync()
            return timed([*COMMAND, "run", "recipe.yaml"], env=environment, cwd=folder)

        return sides.compare(lambda side: partial(run, side))


def rows(source: Path) -> dict[str, Callable[[Sides], dict[str, Any]]]:
    return {
        "noop": partial(noop, stages=7),
        "noop-343": partial(noop, stages=343),
        "plan": partial(plan, shape="written out"),
        "plan-matrix": partial(plan, shape="a matrix"),
        "estimate": estimate,
        "reshard": partial(converted, code=RESHARD, source=source),
        "int8": partial(converted, code=INT8, source=source),
        "nf4": partial(converted, code=NF4, source=source),
        "recipe": partial(whole, source=source),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--only", nargs="+", default=[], choices=list(rows(Path())), metavar="ROW")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", default="1.3B", help="of the OPT checkpoint that is converted")
    parser.add_argument("--folder", help="on the disk to measure; a temporary folder otherwise")
    arguments = parser.parse_args()
    report: dict[str, Any] = {"benchmark": "against another checkout", "rounds": arguments.rounds, "arms": {}}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        source = Path(name) / "source"
        chosen = arguments.only or list(rows(source))
        if {"reshard", "int8", "nf4", "recipe"} & set(chosen):
            # In a process of its own: a child's peak memory counts from its parent's.
            make = [sys.executable, "-c", SOURCE, str(source), arguments.size]
            subprocess.run(make, check=True, cwd=ROOT / "benchmarks")
        for row in chosen:
            folder = Path(name) / row
            folder.mkdir()
            report["arms"][row] = rows(source)[row](Sides(arguments.checkout, folder, arguments.rounds))
            print(f"{row}: {json.dumps(report['arms'][row])}", file=sys.stderr, flush=True)
            shutil.rmtree(folder)
    report["load"] = os.getloadavg()
    print(json.dumps({**report, "machine": facts()}, indent=2))


if __name__ == "__main__":
    main()
