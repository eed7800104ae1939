"""Whether a device may encode: it is asked for a sample first, which must come out as numpy encodes it."""

from __future__ import annotations

import numpy as np

from bigpipe.bigmodel.formats.encoders.floats import BITS, Bits, convert, widen_any
from bigpipe.errors import BigpipeError, StageFailed, UsageError

from .settings import Settings

SAMPLE = 1 << 15
COLUMNS = 128


def usable_device(settings: Settings) -> str | None:
    """The GPU to encode on; None where there is none that torch can use, or none that gives the same bytes."""
    try:
        import torch

        if not torch.cuda.is_available():
            return None
        check_device("cuda", settings)
    except (BigpipeError, ImportError, RuntimeError):
        return None
    return "cuda"


def check_device(device: str, settings: Settings) -> None:
    """Raises UsageError where torch has no such device, StageFailed where it encodes a sample differently."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # CPU builds of torch assert
        first = str(error).partition("\n")[0]
        raise UsageError(
            f"device {device!r} cannot be used: {first}", "leave device out to encode on the CPU"
        ) from None
    if _encoded(device, settings) != _encoded(None, settings):
        raise StageFailed(
            f"device {device!r} rounds differently from the CPU in a sample of numbers",
            "leave device out to encode on the CPU",
        )


def _encoded(device: str | None, settings: Settings) -> tuple[bytes, bytes]:
    """(codes, scales) of a sample; device None: by numpy."""
    packing, dtype = settings.packing, settings.packing.through or settings.dtype
    sample = _sample(dtype)
    encoder = packing.encoder(dtype, sample.size, device)
    codes, scales = encoder.encode(sample.reshape(-1, COLUMNS) if packing.by_rows else sample)
    return codes.tobytes(), scales.tobytes()


def _sample(dtype: str) -> Bits:
    """Zeros, numbers of every finite magnitude, and such as weights are."""
    random = np.random.default_rng(0)
    width = BITS[dtype]
    wild = random.integers(0, 1 << 8 * width.itemsize, SAMPLE).astype(width)
    wild[~np.isfinite(widen_any(wild, dtype, np.empty(SAMPLE, np.float32)))] = 0
    tame = random.standard_normal(SAMPLE).astype(np.float32).view(np.uint32)
    return np.concatenate([np.zeros(2 * COLUMNS, width), wild, convert(tame, "float32", dtype)])
