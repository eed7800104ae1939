"""GPUs that people ask about, and their memory as the driver reports it (`nvidia-smi`, MiB in all): with what driver
and firmware keep for themselves, which `bigpipe.machine` leaves out for a GPU that is there."""

from __future__ import annotations

from collections.abc import Mapping

MIB = 2**20
GPUS: Mapping[str, int] = {
    "RTX 3060": 12288 * MIB,
    "T4": 15360 * MIB,
    "RTX 4080": 16376 * MIB,
    "A10G": 23028 * MIB,
    "RTX 4090": 24564 * MIB,
    "RTX 5090": 32607 * MIB,
    "A100 40GB": 40960 * MIB,
    "L40S": 46068 * MIB,
    "H100 80GB": 81559 * MIB,
    "H200": 143771 * MIB,
    "B200": 183359 * MIB,
}
"""Name → bytes, the smallest first."""
MOST_AT_ONCE = 16
"""GPUs of one machine."""
