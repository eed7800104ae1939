"""The formats that weights are stored in, one value each: plain, bitsandbytes int8, nf4 and fp4, and others' by name.

    recognise(quantization_config, tensors) -> Format      what a checkpoint is stored in
    packing_of("nf4", bnb_4bit_use_double_quant=True)      what it does to a matrix: sizes, encoding, modules

A further one is a file with a `Format` in it, named in the entry-point group `bigpipe.formats`.
"""

from .bitsandbytes import PASTED, read_pasted
from .dtypes import DTYPES, PLAIN_DTYPES, WORTHWHILE, dtypes, has_double_quant, packing, width
from .format import PLAIN, Encoder, Format, MeasuringEncoder, Packing, StoredTensor, Tensors
from .matrices import converted_modules, default_skips, matrix_shape, name_matcher, weight_of
from .packed import PackedWeight, replace_linears, set_apart
from .registry import BUILT_IN, castable, computable, format_of, named, names, packing_of, recognise, version_of

__all__ = [
    "BUILT_IN", "DTYPES", "PASTED", "PLAIN", "PLAIN_DTYPES", "WORTHWHILE", "Encoder", "Format", "MeasuringEncoder",
    "PackedWeight", "Packing", "StoredTensor", "Tensors", "castable", "computable", "converted_modules",
    "default_skips", "dtypes", "format_of", "has_double_quant", "matrix_shape", "name_matcher", "named", "names",
    "packing", "packing_of", "read_pasted", "recognise", "replace_linears", "set_apart", "version_of",
    "weight_of", "width",
]  # fmt: skip
