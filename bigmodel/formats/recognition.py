"""What a checkpoint is stored in: told by its config, else by its tensors; and whether it can be computed with.

Formats of other tools are sized as they are stored, and cannot be computed with. Their methods are those of
transformers 5.23 (`quantizers/auto.py`) and of what else is common on the Hub; the names are those that the tools' own
modules give their tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.checkpoint import CASTABLE
from bigpipe.bigmodel.memo import kept
from bigpipe.errors import InvalidCheckpoint, UsageError

from .bitsandbytes import scheme_of
from .decoding import WithoutScales, are_floats, decoding_of
from .format import PLAIN, Format, Tensors
from .registry import BUILT_IN, named, offered

if TYPE_CHECKING:
    from bigpipe.bigmodel.checkpoint import ModelDescription

FOREIGN = tuple(
    Format(name=method, title=title, method=method, tensors=tuple(tensors), computes=False)
    for method, title, *tensors in (
        ("gptq", "GPTQ", ".qweight", ".g_idx"),
        ("awq", "AWQ", ".qweight", ".qzeros", ".scales"),
        ("fp8", "fp8 with a scale per block, as DeepSeek and Qwen store it", "", "_scale_inv"),
        ("modelopt", "NVIDIA ModelOpt", ".weight", ".weight_scale_2"),
        ("compressed-tensors", "compressed-tensors", ".weight_packed", ".weight_scale"),
        ("compressed-tensors", "weights with scales beside them", ".weight", ".weight_scale"),
        ("eetq", "EETQ", ".weight", ".weight_scales"),
        ("hqq", "HQQ", ".W_q"),
        ("aqlm", "AQLM", ".codes", ".codebooks"),
        ("mxfp4", "MXFP4", "_blocks", "_scales"),
        ("torchao", "torchao", "_qdata", "_scale"),
        ("quanto", "quanto", "._data", "._scale"),
        ("vptq", "VPTQ", ".indices", ".centroids"),
        ("quip", "QuIP#", ".Qidxs", ".SU"),
        ("exl2", "ExLlamaV2", ".q_weight", ".q_scale"),
        ("exl3", "ExLlamaV3", ".trellis", ".suh"),
        ("mlx", "MLX", ".weight", ".scales", ".biases"),
        ("gptq", "GPTQ or AWQ", ".qweight"),
        ("auto-round", "AutoRound"),
        ("bitnet", "BitNet"),
        ("fbgemm_fp8", "FBGEMM fp8"),
        ("fp_quant", "FP-Quant"),
        ("gguf", "GGUF"),
        ("higgs", "HIGGS"),
        ("mxfp8", "MXFP8"),
        ("nvfp4", "NVFP4"),
        ("quark", "AMD Quark"),
        ("sinq", "SINQ"),
        ("spqr", "SpQR"),
    )
)

EIGHT_BITS = Format(name="float8-plain", title="8-bit floats without scales", decoding=WithoutScales())
"""Plain numbers that nothing computes with as they are."""
PLAIN_DTYPES = CASTABLE | {"int64", "bool"}
"""What no format packs weights in."""


def recognise(quantization: Mapping[str, Any] | None, tensors: Tensors | None) -> Format:
    """Return the format of a checkpoint: as its `quantization_config` says, else as its tensors tell.

    A method that nobody here has heard of is a format too, which cannot be computed with.
    """
    quantization = quantization or {}
    producer = quantization.get("producer")  # how ModelOpt named itself before it wrote a quant_method
    before = producer.get("name") if isinstance(producer, Mapping) else None
    method = str(scheme_of(quantization) or quantization.get("quant_method") or before or "")
    if not method:
        return _shown(tensors or {})
    foreign = next((found for found in FOREIGN if _same(found.method, method)), None)
    if method in BUILT_IN or (foreign is None and method in offered()):
        return named(method)
    if foreign is not None and (decoding := decoding_of(quantization, tensors or {})):
        return replace(foreign, decoding=decoding)
    return foreign or Format(name=method, title=method, method=method, computes=False)


@kept
def format_of(described: ModelDescription) -> Format:
    """Return the format of a checkpoint that was described. Raise InvalidCheckpoint where its config says that weights
    are packed, and none is."""
    found, stored = recognise(described.quantization, described.tensors), described.tensors
    said = (described.config or {}).get("quantization_config")
    if said and not isinstance(said, Mapping):
        cause = f"{_place(described)}quantization_config is {said!r:.80}, and says nothing of how weights are packed"
        raise InvalidCheckpoint(cause, "take it out of config.json, or write what transformers saves there")
    if found.packing and (odd := found.packing.wrong(described.quantization or {})):
        raise InvalidCheckpoint(f"{_place(described)}quantization_config: {odd}", "mend it in config.json")
    dtypes = {dtype for dtype, _ in (stored or {}).values()}
    if described.quantization and found.tensors and dtypes and dtypes <= PLAIN_DTYPES:
        told = ", ".join(sorted(dtypes & CASTABLE))
        raise InvalidCheckpoint(
            f"{_place(described)}quantization_config says that weights are {found.title}, and all that is stored is"
            f" plain: {told}",
            "take quantization_config out of config.json if these weights are meant, or bring those that it belongs to",
        )
    return found


def uncomputable(described: ModelDescription) -> UsageError | None:
    """Return why no model can be run from a checkpoint: its format is only known by name. None where one can."""
    found = format_of(described)
    if found.computes or found.decoding:
        return None
    return UsageError(
        f"{_place(described)}its weights are {found.title} ({found.method}), which cannot be computed with here",
        f"start from the weights before they were quantized; `quantize` makes {', '.join(BUILT_IN)} of them",
    )


def computable(described: ModelDescription) -> None:
    """Raise UsageError for a checkpoint in a format that no model can be run from here."""
    if error := uncomputable(described):
        raise error


def castable(described: ModelDescription, dtype: str) -> None:
    """Raise UsageError for a checkpoint whose scales must keep their dtype."""
    found = format_of(described)
    if found is not PLAIN and found.decoding is None:
        raise UsageError(
            f"{_place(described)}dtype {dtype} would change the scales of quantized weights ({found.title})",
            "leave dtype out, or let quantize come after shard",
        )


def _place(described: ModelDescription) -> str:
    return f"{described.path}: " if described.path else ""


def _same(one: str, other: str) -> bool:
    return one.replace("_", "-") == other.lower().replace("_", "-")


def _shown(tensors: Tensors) -> Format:
    """By how names end. Codes are no wide floats, while a plain model may well call a parameter `scales`."""
    endings: dict[str, set[str]] = {}
    for name, (dtype, _) in tensors.items():
        endings.setdefault(f".{name.rpartition('.')[2]}", set()).add(dtype)
    packed = [ending for ending, dtypes in endings.items() if not dtypes.issubset(CASTABLE)]
    for known in (*map(named, BUILT_IN), *FOREIGN):
        codes, *beside = known.tensors or ("\0",)
        if any(e.endswith(codes) for e in packed) and all(any(e.endswith(b) for e in endings) for b in beside):
            return known
    return EIGHT_BITS if any(are_floats(*stored) for stored in tensors.values()) else PLAIN
