"""The encoders of `four_bit` and `int8` as torch operations, for a GPU; bit for bit the same on every device.

Only what IEEE 754 defines to the last bit is used: comparisons, one product, one quotient, rounding to even. So a
checkpoint has the same bytes wherever it was made, and a run that was broken off on a GPU may be finished without one.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import BLOCK
from .codes import decision_bounds
from .floats import BITS, Bits

if TYPE_CHECKING:
    import torch

CHUNK = 1 << 20
"""Numbers encoded at a time: enough for a kernel launch to cost little beside its work."""
_SMALLEST = 1e-38  # of bitsandbytes: what a block of zeros is divided by
_MAGNITUDE = {"float16": 0x7FFF, "bfloat16": 0x7FFF, "float32": 0x7FFFFFFF}


class _Device:
    """One thread's way to a device: a stream of its own, and memory there that bits are copied into and out of."""

    def __init__(self, device: str, dtype: str, size: int) -> None:
        import torch

        self.device = torch.device(device)
        self.dtype = dtype
        on_gpu = self.device.type == "cuda"
        signed = {2: torch.int16, 4: torch.int32}[BITS[dtype].itemsize]
        self._staged = torch.empty(size, dtype=signed, pin_memory=on_gpu)
        self._stream = torch.cuda.Stream(self.device) if on_gpu else None  # type: ignore[no-untyped-call]

    def running(self) -> contextlib.AbstractContextManager[Any]:
        import torch

        return torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext()

    def upload(self, bits: Bits) -> torch.Tensor:
        """The bits as signed integers on the device, flat."""
        staged = self._staged[: bits.size]
        staged.numpy()[...] = bits.reshape(-1).view(staged.numpy().dtype)
        return staged.to(self.device, non_blocking=True)

    def floats(self, bits: torch.Tensor) -> torch.Tensor:
        """What the bits stand for, as fp32."""
        import torch

        return bits.view(getattr(torch, self.dtype)).float()

    def largest(self, rows: torch.Tensor) -> torch.Tensor:
        """Largest magnitude of each row, fp32: magnitudes compare as integers do, NaN above infinity."""
        return self.floats((rows & _MAGNITUDE[self.dtype]).amax(dim=1))


class DeviceFourBitEncoder:
    """`four_bit.FourBitEncoder` on a torch device."""

    def __init__(self, device: str, dtype: str, quant_type: str, size: int = CHUNK) -> None:
        import torch

        self._device = _Device(device, dtype, size)
        bounds, codes = decision_bounds(quant_type)
        self._zero = int(codes[int(np.count_nonzero(bounds < 0))])
        with self._device.running():
            self._bounds = torch.from_numpy(bounds.copy()).to(self._device.device)
            self._codes = torch.from_numpy(codes.copy()).to(self._device.device)

    def absmax(self, bits: Bits) -> NDArray[np.float32]:
        with self._device.running():
            found: NDArray[np.float32] = self._absmax(self._device.upload(bits)).cpu().numpy()
        return found

    def encode(self, bits: Bits, measured: Any = None) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        with self._device.running():
            uploaded = self._device.upload(bits)
            absmax = self._absmax(uploaded)
            packed = self._packed(self._scaled(self._device.floats(uploaded), absmax))
            return packed.cpu().numpy(), absmax.cpu().numpy()

    def _absmax(self, bits: torch.Tensor) -> torch.Tensor:
        import torch

        rest = bits.numel() % BLOCK
        padded = torch.nn.functional.pad(bits, (0, BLOCK - rest)) if rest else bits
        absmax = self._device.largest(padded.view(-1, BLOCK))
        if rest:
            absmax[-1] = absmax[-1].clamp_min(_SMALLEST)
        return absmax

    def _scaled(self, values: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
        """Whole blocks times the reciprocal of their absmax, a short one divided by it, as bitsandbytes does."""
        import torch

        full = values.numel() // BLOCK
        inverse = torch.ones_like(absmax[:full]) / absmax[:full].clamp_min(_SMALLEST)
        whole = values[: full * BLOCK].view(-1, BLOCK) * inverse[:, None]
        return torch.cat([whole.view(-1), values[full * BLOCK :] / absmax[-1]])

    def _packed(self, scaled: torch.Tensor) -> torch.Tensor:
        import torch

        index = torch.bucketize(scaled, self._bounds, out_int32=True)
        index = index.masked_fill(scaled.isnan(), self._codes.numel() - 1)
        nibbles = self._codes[index]
        if nibbles.numel() % 2:
            nibbles = torch.nn.functional.pad(nibbles, (0, 1), value=self._zero)
        pairs = nibbles.view(-1, 2)
        return (pairs[:, 0] << 4) | pairs[:, 1]


class DeviceInt8Encoder:
    """`int8.Int8Encoder` on a torch device."""

    def __init__(self, device: str, size: int = CHUNK) -> None:
        self._device = _Device(device, "float16", size)

    def encode(self, bits: Bits, measured: Any = None) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        import torch

        with self._device.running():
            uploaded = self._device.upload(bits).view(bits.shape)
            scales = self._device.largest(uploaded)
            factors = (torch.ones_like(scales) / scales) * 127
            scaled = (self._device.floats(uploaded) * factors[:, None]).round()
            # NaN comes of rows that are zero or infinite, and becomes 0; what a device makes of it is its own affair.
            codes = scaled.masked_fill(scaled.isnan(), 0).to(torch.int8)
            return codes.cpu().numpy(), scales.cpu().numpy()
