"""What a user may ask of a quantization, and how transformers writes that into a config."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bigpipe.bigmodel.architecture import Architecture
from bigpipe.bigmodel.formats import Packing, default_skips, packing_of
from bigpipe.errors import UsageError
from bigpipe.machine import cores

DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """BitsAndBytesConfig's fields, as far as they matter to stored weights or to how those are used."""

    scheme: str
    """Name of a format."""
    llm_int8_threshold: float = 6.0
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_compute_dtype: str = "float16"
    skip_modules: tuple[str, ...] | None = None
    """Names or patterns of modules to leave alone. None: the output head and whatever is tied."""
    keep_in_fp32_modules: tuple[str, ...] = ()
    """Modules to leave alone and to store as float32."""
    dtype: str = "float16"
    """Of everything else; 4-bit weights are cast to it before they are quantized."""
    threads: int = 1
    """How many threads torch would sum with: in double quantization the mean's last bit depends on it."""
    device: str | None = None
    """Where weights are encoded: a torch device, or numpy on the CPU, which needs no torch. No byte depends on it."""
    packing: Packing = field(init=False)
    """What `scheme` does to a matrix, with those of the fields above that it takes."""

    def __post_init__(self) -> None:
        for name, value in (("dtype", self.dtype), ("bnb_4bit_compute_dtype", self.bnb_4bit_compute_dtype)):
            if value not in DTYPES:
                raise UsageError(f"{name} {value!r} is not possible", f"choose one of {', '.join(DTYPES)}")
        packing = packing_of(
            self.scheme,
            llm_int8_threshold=self.llm_int8_threshold,
            bnb_4bit_use_double_quant=self.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=self.bnb_4bit_compute_dtype,
        )
        object.__setattr__(self, "packing", packing)

    def as_config(self, architecture: Architecture) -> dict[str, Any]:
        """`quantization_config` as transformers 5.23 saves it."""
        skipped: Sequence[str] | None = self.skip_modules
        if self.keep_in_fp32_modules:
            # A list replaces transformers' own choice, so that has to be spelled out beside what is kept in float32
            skipped = [*(default_skips(architecture) if skipped is None else skipped), *self.keep_in_fp32_modules]
        return self.packing.config(None if skipped is None else list(skipped))


def torch_threads() -> int:
    """How many threads torch takes for itself by default, told without importing it."""
    try:
        return max(1, int(os.environ["OMP_NUM_THREADS"].split(",")[0]))
    except (KeyError, ValueError):
        return cores()
