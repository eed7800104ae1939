"""What glibc does in workers with memory that is freed. Another C library ignores it, and so does a glibc that is older
than what it is told."""

from __future__ import annotations

import ctypes
import os

ALLOCATOR = (
    "glibc.malloc.mmap_threshold=1048576:glibc.malloc.trim_threshold=33554432:glibc.malloc.hugetlb=1:"
    "glibc.malloc.arena_max=1"
)
"""GLIBC_TUNABLES of a worker: what is freed goes back from 1 MiB up. Left to itself glibc raises that bound to 32 MiB
as larger blocks are freed, and keeps smaller ones in a heap with holes: small models then need 3 to 21 % more than
their tensors, and than a plan says. Mapping costs page faults, a sixth of a prefill, most of which huge pages save
again; without a trim threshold it would be 128 KiB. All threads share a heap: batches that go together run in threads
of their own, one at a time, and with a heap for each four of them held twice what their tensors take."""
MMAP_THRESHOLD = -3
"""`M_MMAP_THRESHOLD` of mallopt(3)."""
LARGEST_KEPT = 32 * 2**20
"""Bytes of the threshold that glibc takes at most (`DEFAULT_MMAP_THRESHOLD_MAX` of malloc.c)."""


def keep_freed_blocks() -> None:
    """From now on keep freed blocks of less than 32 MiB for the next ones, in a process that nobody limits: a forward
    of short texts takes and frees blocks of a few MiB by the dozen, and mapping each of them anew takes up to a third
    of its time. Nothing where the allocator was set by somebody else."""
    if os.environ.get("GLIBC_TUNABLES") == ALLOCATOR and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(MMAP_THRESHOLD, LARGEST_KEPT)
