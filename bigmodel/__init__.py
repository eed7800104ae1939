"""Read, size, convert, quantize, place, load and run checkpoints larger than memory. Knows nothing of stages."""
