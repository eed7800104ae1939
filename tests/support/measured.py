"""A machine of known speeds: what was measured of this one, written where it is remembered."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from bigpipe.bigmodel.memo import remember
from bigpipe.bigmodel.placement import Speeds, speeds
from bigpipe.bigmodel.placement.products import ANSWER_VERSION, ROWS
from bigpipe.machine import Machine
from bigpipe.versions import package_version

HERE = Machine(os.uname().nodename, cpus=2, memory=2**34, memory_available=2**34, disk_free=2**34)
KEY = [ANSWER_VERSION, package_version("torch"), list(ROWS)]
NO_HALVES = {"float32": (10, 40, 80), "bfloat16": (5, 8, 9), "float16": (16, 20, 22)}
"""GFLOP/s with 1, 8 and 64 rows of a CPU that multiplies halves slowly."""
GOOD_HALVES = {"float32": (10, 40, 80), "bfloat16": (20, 100, 180), "float16": (20, 90, 170)}


def rates(figures: Mapping[str, tuple[float, ...]]) -> dict[str, dict[int, float]]:
    return {dtype: dict(zip(ROWS, (1e9 * each for each in found), strict=True)) for dtype, found in figures.items()}


def knowing(memo: Path, figures: Mapping[str, tuple[float, ...]], known: Speeds | None = None) -> Path:
    """A memo in which these are the rates of this machine, and its bandwidths if they are given."""
    remember(memo / "speeds" / f"{HERE.name}-products.json", {"key": KEY, "rates": rates(figures)})
    if known is not None:
        key = [speeds.ANSWER_VERSION, []]
        remember(memo / "speeds" / f"{HERE.name}.json", {"key": key, "speeds": asdict(known)})
    return memo
