"""Run every benchmark of this folder and print one table. Each prints JSON; extra arguments go to all of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
NOT_BENCHMARKS = {"run.py", "machine.py"}


def main() -> None:
    for script in sorted(HERE.glob("*.py")):
        if script.name in NOT_BENCHMARKS:
            continue
        print(f"== {script.stem}", flush=True)
        done = subprocess.run([sys.executable, script, *sys.argv[1:]], capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}")
            continue
        report = json.loads(done.stdout)
        for arm, numbers in report.get("arms", {}).items():
            print(f"  {arm:28s} " + "  ".join(f"{key} {value}" for key, value in numbers.items()))
        for key, value in report.items():
            if key.startswith("ratio"):
                print(f"  {key}: {value}")


if __name__ == "__main__":
    main()
