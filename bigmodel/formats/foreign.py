"""Formats of other tools: recognised by config and by tensors, sized as they are stored, and not computed with yet.

The methods are those of transformers 5.23 (`quantizers/auto.py`) and of what else is common on the Hub; the names are
those that the tools' own modules give their tensors.
"""

from __future__ import annotations

from .format import Format


def _foreign(method: str, title: str, *tensors: str) -> Format:
    return Format(name=method, title=title, method=method, tensors=tensors, computes=False)


FOREIGN: tuple[Format, ...] = (
    _foreign("gptq", "GPTQ", ".qweight", ".g_idx"),
    _foreign("awq", "AWQ", ".qweight", ".qzeros", ".scales"),
    _foreign("fp8", "fp8 with a scale per block, as DeepSeek and Qwen store it", "", "_scale_inv"),
    _foreign("modelopt", "NVIDIA ModelOpt", ".weight", ".weight_scale_2"),
    _foreign("compressed-tensors", "compressed-tensors", ".weight_packed", ".weight_scale"),
    _foreign("compressed-tensors", "weights with scales beside them", ".weight", ".weight_scale"),
    _foreign("eetq", "EETQ", ".weight", ".weight_scales"),
    _foreign("hqq", "HQQ", ".W_q"),
    _foreign("aqlm", "AQLM", ".codes", ".codebooks"),
    _foreign("mxfp4", "MXFP4", "_blocks", "_scales"),
    _foreign("torchao", "torchao", "_qdata", "_scale"),
    _foreign("quanto", "quanto", "._data", "._scale"),
    _foreign("vptq", "VPTQ", ".indices", ".centroids"),
    _foreign("quip", "QuIP#", ".Qidxs", ".SU"),
    _foreign("exl2", "ExLlamaV2", ".q_weight", ".q_scale"),
    _foreign("exl3", "ExLlamaV3", ".trellis", ".suh"),
    _foreign("mlx", "MLX", ".weight", ".scales", ".biases"),
    _foreign("gptq", "GPTQ or AWQ", ".qweight"),
    _foreign("auto-round", "AutoRound"),
    _foreign("bitnet", "BitNet"),
    _foreign("fbgemm_fp8", "FBGEMM fp8"),
    _foreign("fp_quant", "FP-Quant"),
    _foreign("gguf", "GGUF"),
    _foreign("higgs", "HIGGS"),
    _foreign("mxfp8", "MXFP8"),
    _foreign("nvfp4", "NVFP4"),
    _foreign("quark", "AMD Quark"),
    _foreign("sinq", "SINQ"),
    _foreign("spqr", "SpQR"),
)
