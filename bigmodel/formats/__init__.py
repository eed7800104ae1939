"""The formats that weights are stored in, one value each: plain, bitsandbytes int8, nf4 and fp4, and others' by name.

    recognise(quantization_config, tensors) -> Format      what a checkpoint is stored in
    packing_of("nf4", bnb_4bit_use_double_quant=True)      what it does to a matrix: sizes, encoding, modules

A further one is a file with a `Format` in it, named in the entry-point group `bigpipe.formats`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .agreement import Agreement, agree, cure_of_missing, match_stored, packed_modules, refuse_strangers
    from .bitsandbytes import PASTED
    from .format import PLAIN, Decoding, Encoder, Format, MeasuringEncoder, Packing, StoredTensor, Tensors
    from .four_bit import FourBit, rounded_weights, stored_offset
    from .matrices import converted_modules, default_skips, known_modules, matrix_shape, name_matcher, weight_of
    from .packed import PackedWeight, replace_linears, set_apart
    from .plain import decode, decoded, decoding_memory, left_out, plain_dtype, without_quantization
    from .recognition import EIGHT_BITS, castable, computable, format_of, recognise, uncomputable
    from .registry import (
        BUILT_IN,
        distribution_of,
        idle_options,
        named,
        names,
        packing_of,
        read_options,
        require_known,
        version_of,
    )
    from .widths import DTYPES, PLAIN_DTYPES, WORTHWHILE, asked, dtypes, has_double_quant, packing, require_dtype, width

__getattr__, __all__ = face(__name__)
