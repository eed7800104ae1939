"""Run every benchmark of this folder and print the machine and one table; `make bench` does it.

    python benchmarks/run.py [--only reshard quantize] [--size 7B] [--rounds 3] [--folder DIR] [--json FILE]

Checkpoints of OPT's shape are made up for it: 2.6 GB at 1.3B, 13.3 GB at 7B, 25.7 GB at 13B, and as much again is
written beside them, so give a folder on the disk to measure. transformers holds a whole model in memory, twice for a
while; where that is too much, run the script itself with `--arms`. --json keeps what the scripts printed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
VARIANTS: dict[str, list[list[str]]] = {
    "against": [],
    "reshard": [["--cold"], ["--cold", "--source", "bin"]],
    "quantize": [["--scheme", "int8"], ["--scheme", "nf4"]],
}
"""Scripts that stand for several rows, or for none: `against` needs another checkout. The others run once."""


def rows(only: list[str], given: dict[str, str | None]) -> Iterator[list[str]]:
    """Commands: each script, each of its variants, with those of the given options that it knows."""
    for script in sorted(HERE.glob("*.py")):
        text = script.read_text()
        if script == Path(__file__) or "__main__" not in text or (only and script.stem not in only):
            continue
        options = [part for name, value in given.items() if value and f'"{name}"' in text for part in (name, value)]
        for variant in VARIANTS.get(script.stem, [[]]):
            yield [script.name, *variant, *options]


def show(report: dict[str, Any]) -> None:
    for arm, numbers in report.get("arms", {}).items():
        print(f"  {arm:28s} " + "  ".join(f"{key} {value}" for key, value in numbers.items()))
    for key, value in report.items():
        if key.startswith("ratio"):
            print(f"  {key}: {value}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="of a script, without .py")
    parser.add_argument("--size", choices=("125M", "1.3B", "7B", "13B"), help="of the checkpoints; 1.3B left out")
    parser.add_argument("--rounds")
    parser.add_argument("--folder", help="on the disk to measure; a temporary folder otherwise")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    given = {"--size": arguments.size, "--rounds": arguments.rounds, "--folder": arguments.folder}
    reports, failed = [], []
    for script, *options in rows(arguments.only, given):
        print(f"== {' '.join([Path(script).stem, *options])}", flush=True)
        done = subprocess.run([sys.executable, HERE / script, *options], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"  failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
            failed.append(script)
            continue
        reports.append(json.loads(done.stdout))
        show(reports[-1])
    if reports:
        print("machine: " + json.dumps(reports[-1].get("machine", {})))
    if arguments.json:
        arguments.json.write_text(json.dumps(reports, indent=2) + "\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
