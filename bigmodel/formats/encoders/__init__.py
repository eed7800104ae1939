"""From numbers to codes: bitsandbytes' formats bit for bit, in numpy and, for GPUs, in torch."""

BLOCK = 64
"""Numbers that share one scale in the 4-bit formats."""
NESTED_BLOCK = 256
"""Scales that share one under double quantization."""
