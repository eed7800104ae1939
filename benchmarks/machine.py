"""What a benchmark's numbers depend on: the machine, the date, the versions. And how both arms are timed."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil

PACKAGES = ("bigpipe-ml", "torch", "transformers", "accelerate", "bitsandbytes", "huggingface_hub", "safetensors")


def facts() -> dict[str, Any]:
    """Cores, memory, processor, Python, versions, date."""
    return {
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "processor": _processor(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def whole_process(command: Sequence[str], **options: Any) -> tuple[float, int]:
    """Seconds of wall time and peak resident bytes (of the largest process) of a command, from start to exit."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {process.returncode}")
    return seconds, usage.ru_maxrss * 1024


def alternate(arms: dict[str, Callable[[], Any]], rounds: int, warm_up: bool = True) -> dict[str, list[Any]]:
    """A B, B A, A B, …; with a round first that is not counted."""
    results: dict[str, list[Any]] = {name: [] for name in arms}
    for number in range(0 if warm_up else 1, rounds + 1):
        order = list(arms.items())
        for name, arm in order if number % 2 == 0 else reversed(order):
            answer = arm()
            if number:
                results[name].append(answer)
    return results


def median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 4)


def medians(results: dict[str, list[tuple[float, int]]]) -> dict[str, dict[str, float]]:
    """Of each arm's rounds, as `whole_process` gives them: seconds, and peak MiB."""
    return {
        arm: {"seconds": median([r[0] for r in runs]), "peak_mib": median([r[1] / 2**20 for r in runs])}
        for arm, runs in results.items()
    }
