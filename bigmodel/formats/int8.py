"""LLM.int8() (arXiv 2208.07339) as bitsandbytes 0.50 stores and loads it: int8 codes, and a float32 scale per row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from . import bitsandbytes
from .format import Encoder, Format, Packing, Shape, Shapes, StoredTensor

if TYPE_CHECKING:
    import torch

    from .format import Scales


@dataclass(frozen=True)
class Int8(Packing):
    llm_int8_threshold: float = 6.0
    """Activations beyond it are computed in 16 bits; no stored byte depends on it."""

    bits: ClassVar[int] = 8
    takes: ClassVar[tuple[str, ...]] = ("llm_int8_threshold",)
    quantizing: ClassVar[tuple[int, int, int]] = (2, 4, 5)
    keeps_inputs: ClassVar[bool] = True
    """bitsandbytes 0.50 holds them apart from what torch saves for gradients (`MatMul8bitFp`: `ctx.A`; `MatMul8bitLt`:
    `ctx.tensors`), where checkpointing does not see them."""
    by_rows: ClassVar[bool] = True
    through: ClassVar[str | None] = "float16"

    @property
    def suffixes(self) -> tuple[str, ...]:
        return "weight", "weight_format", "SCB"

    def stored(self, shape: Shape, dtype: str, measured: Any = None) -> tuple[StoredTensor, ...]:
        return (
            StoredTensor("weight", "int8", shape),
            StoredTensor("SCB", "float32", shape[:1]),
            StoredTensor("weight_format", "uint8", (), loaded=0),
        )

    def transient(self, tokens: int, hidden: int, inner: int, largest: int) -> tuple[int, str]:
        return tokens * (hidden + 4 * inner), "int8 inputs and int32 products"

    def learning(self, largest: int, itemsize: int) -> int:
        """In what is computed in (bitsandbytes 0.50: `MatMul8bitFp` on a CPU, `MatMul8bitLt.backward` on a GPU)."""
        return itemsize * largest

    def config(self, skipped: list[str] | None) -> dict[str, Any]:
        return bitsandbytes.config(skipped, load_in_8bit=True, llm_int8_threshold=float(self.llm_int8_threshold))

    def encoder(self, dtype: str, size: int, device: str | None = None) -> Encoder:
        if device is None:
            from .encoders.int8 import Int8Encoder

            return Int8Encoder(size)
        from .encoders.devices import DeviceInt8Encoder

        return DeviceInt8Encoder(device, size)

    def beside(self, shape: Shape, dtype: str, scales: Scales, measured: Any, threads: int) -> dict[str, bytes]:
        return {"SCB": scales.tobytes(), "weight_format": b"\0"}

    def wrong(self, config: Mapping[str, Any]) -> str | None:
        found = config.get("llm_int8_threshold", 0.0)
        fits = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
        return None if fits else f"llm_int8_threshold is {found!r:.80}, and no number"

    def module(self, linear: torch.nn.Module, shapes: Shapes, config: Mapping[str, Any]) -> torch.nn.Module:
        from bitsandbytes.nn import Linear8bitLt

        rows, columns = shapes["weight"]
        threshold = float(config.get("llm_int8_threshold", self.llm_int8_threshold))
        return bitsandbytes.module(linear, rows, columns, Linear8bitLt, has_fp16_weights=False, threshold=threshold)

    def attach(self, module: Any, parts: Mapping[str, torch.Tensor]) -> None:
        from bitsandbytes.nn import Int8Params

        codes, scales = parts["weight"], parts["SCB"]
        module.weight = Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)

    def detach(self, module: Any) -> None:
        module.state.CB = module.state.SCB = None


INT8 = Format(
    name="int8", title="bitsandbytes int8", method="bitsandbytes", tensors=(".weight", ".SCB"), packing=Int8()
)
