"""Peak anonymous memory of a forward or a generation on a CPU, above what the process holds without a model.

Three things differ from a GPU. Kernels keep buffers of their own that no tensor shows. oneDNN, which multiplies in
16 bits, compiles a kernel for every shape of a product and keeps it; experts get as many shapes as there are different
numbers of tokens routed to them. Attention whose queries and values differ in width (multi-head latent attention) has
no flash kernel, so its scores are written out. The numbers were fitted to the calibration set of `benchmarks/peaks.py`,
with torch 2.13 and transformers 5.23 on a CPU with AVX-512, where the allocator returns what is freed
(`GLIBC_TUNABLES=glibc.malloc.mmap_threshold=1048576`); as glibc comes, tensors of less than 32 MiB leave holes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bigpipe.bigmodel.architecture import Architecture, text_config

from .activations import Shape, prefill
from .kvcache import cache_of

MIB = 2**20
LAST_LOGITS_SCRATCH = 13 * MIB
"""What float32 products keep for themselves (7 to 16 MiB were seen)."""
ALL_LOGITS_SCRATCH = 32 * MIB
"""The same, where one of them has a vocabulary's width and a row per token (12 to 45 MiB)."""
HALF_SCRATCH = 10 * MIB
"""16-bit products (2 to 13 MiB)."""
HALF_ALL_LOGITS_SCRATCH = 18 * MIB
"""The same with a row of logits per token (3 to 23 MiB)."""
PRODUCT = 700 * 2**10
"""A compiled 16-bit product (0.65 to 0.8 MiB were seen)."""
KEPT_PRODUCTS = 1024
"""oneDNN's ONEDNN_PRIMITIVE_CACHE_CAPACITY as it comes."""
UNEVENNESS = 4
"""Variance of the tokens per expert, over that of even chances: the least by which no model of the calibration set was
given too few products (0.3 to 10 were seen)."""
WRITTEN_OUT_SCORES = 4 + 4 + 1
"""Bytes per score at the peak: float32 before and after the softmax, and which of them are -inf."""
MAPPED = MIB
"""Blocks of so many bytes are mapped one by one, smaller ones come from the heap: the allocator's threshold, above."""
HOLES = 0.25
"""Of a cache whose tensors come from the heap: keys that grow by a token do not fit where they were. Grown by itself, a
cache left 10 to 26 % of its size as holes in one order of growing, and all of it in another."""
BUCKETS = 54
"""Bytes per pair of tokens while T5 sorts their distances into buckets: int64, six or seven at once."""


@dataclass(frozen=True, slots=True)
class CpuPeak:
    """Bytes beside the weights."""

    bytes: int
    scratch: int
    """What of it no tensor shows."""
    formula: str
    known: bool


def beside_weights(
    architecture: Architecture,
    shape: Shape,
    batch_size: int,
    length: int,
    itemsize: int,
    *,
    image: tuple[int, int] | None,
    all_logits: bool,
    headless: bool,
    output_length: int | None,
    cache_itemsize: int,
) -> CpuPeak:
    """The cache, the largest phase and what kernels keep. See `activations.prefill` for the arguments.

    output_length: tokens that an encoder-decoder makes while it generates; None: as many as it reads.
    """
    config = text_config(architecture.config)
    found = prefill(shape, batch_size, length, itemsize, image=image, all_logits=all_logits, headless=headless)
    plain = all_logits or headless
    cache = cache_of(architecture, batch_size, length, cache_itemsize, headless=headless)
    attention = _attention(config, shape, batch_size, length, itemsize)
    masks = batch_size * length**2 * itemsize if shape.scores and len(set(config.get("layer_types") or ())) > 1 else 0
    formula, size = found.formula, found.bytes
    if attention > size:
        formula, size = "attention: scores written out", attention
    size += masks  # one for each kind of layer
    if image is not None:
        size += batch_size * 3 * image[0] ** 2 * itemsize
    if config.get("is_encoder_decoder") and not plain:
        # The encoder is done before the first key is cached
        cache = cache_of(architecture, batch_size, length, cache_itemsize, output_length)
        heard = config.get("max_source_positions") if config.get("num_mel_bins") else None
        encoder = prefill(shape, batch_size, heard or length, itemsize, headless=True)
        size = max(size if attention == size else 0, encoder.bytes, cache.bytes)
        formula, held = "the encoder's largest phase, or the cache", 0
    else:
        held = cache.bytes + cache.prefill_extra
        if not plain and (holes := _holes(config, cache.bytes)):
            formula, held = f"{formula} + a quarter of the cache as holes", held + holes
    scratch = _scratch(shape, itemsize, not headless and (all_logits or not shape.last_logits))
    if itemsize == 2 and shape.experts:
        scratch += PRODUCT * _products(architecture, shape.experts, batch_size * length)
    return CpuPeak(held + size + scratch, scratch, formula, found.known and cache.exact)


def _holes(config: Mapping[str, Any], cache: int) -> int:
    """Of one that has grown to `cache` bytes. Its last token is never cached, so the tensors are that much smaller."""
    layers = config.get("num_hidden_layers")
    layers = layers if isinstance(layers, int) else 0  # LXMERT has them by kind
    return int(cache * HOLES) if cache <= 2 * layers * MAPPED else 0


def _attention(config: Mapping[str, Any], shape: Shape, batch_size: int, length: int, itemsize: int) -> int:
    pairs = length * length
    if config.get("relative_attention_num_buckets") and shape.heads and "d_kv" in config:
        biases = 2 * shape.heads * pairs * itemsize + 7 * batch_size * length * shape.hidden * itemsize
        return max(biases, BUCKETS * pairs)
    rotary, latent = int(config.get("qk_rope_head_dim") or 0), int(config.get("kv_lora_rank") or 0)
    queries, values = int(config.get("qk_nope_head_dim") or 0) + rotary, int(config.get("v_head_dim") or 0)
    if not latent or queries == values:
        return 0
    # As the math kernel of scaled_dot_product_attention has it, allocation by allocation: 16-bit queries, keys and
    # values are copied to float32, queries are scaled into a new tensor, and the mask is one for all heads
    copies = 4 * shape.heads * (queries if itemsize == 4 else 3 * queries + values)
    expanded = shape.heads * (3 * queries + queries - rotary + values)
    width = copies + itemsize * (expanded + latent + rotary + 3 * shape.hidden)
    return batch_size * (pairs * (WRITTEN_OUT_SCORES * shape.heads + 4) + length * width)


def _products(architecture: Architecture, chosen: int, tokens: int) -> int:
    """Shapes of products with stacked experts that one forward compiles; `chosen` of them see each token.

    Expected different values among the numbers of tokens of all experts of all layers, taken to be normal around the
    mean. They count once per shape of a matrix, whatever the layer.
    """
    stacks: dict[tuple[int, ...], list[int]] = {}
    for tensor in architecture.tensors():
        if len(tensor.shape) == 3:
            stacks.setdefault(tuple(tensor.shape[1:]), []).append(tensor.shape[0])
    return min(KEPT_PRODUCTS, sum(_different_loads(counts, chosen, tokens) for counts in stacks.values()))


def _different_loads(counts: list[int], chosen: int, tokens: int) -> int:
    share = min(chosen / max(counts), 1.0)
    spread = math.sqrt(UNEVENNESS * tokens * share * (1 - share))
    if spread < 1:
        return 1
    densities = (math.exp(-((step / 4) ** 2) / 2) / (spread * math.sqrt(2 * math.pi)) for step in range(-20, 21))
    expected = sum(spread / 4 * (1 - math.exp(-sum(counts) * density)) for density in densities)
    return min(math.ceil(expected), sum(counts), tokens)


def _scratch(shape: Shape, itemsize: int, all_logits: bool) -> int:
    if itemsize == 4:
        return ALL_LOGITS_SCRATCH if all_logits and shape.vocabulary else LAST_LOGITS_SCRATCH
    return HALF_ALL_LOGITS_SCRATCH if all_logits and shape.vocabulary else HALF_SCRATCH
