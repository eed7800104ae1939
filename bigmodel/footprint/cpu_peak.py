"""Peak anonymous memory of a forward or a generation on a CPU, above what the process holds without a model.

Three things differ from a GPU. Kernels keep buffers of their own that no tensor shows. Products of grouped experts in
16 bits are computed on float32 copies. Attention whose queries and values differ in width (multi-head latent attention)
has no flash kernel, so its scores are written out. The numbers were fitted to the calibration set of
`benchmarks/peaks.py`, with torch 2.13 and transformers 5.23, where the allocator returns what is freed
(`GLIBC_TUNABLES=glibc.malloc.mmap_threshold=1048576`); as glibc comes, tensors of less than 32 MiB leave holes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bigpipe.bigmodel.architecture.structure import Architecture

from .activations import Shape, prefill
from .kvcache import NOTHING, kv_cache, text_config

MIB = 2**20
LAST_LOGITS_SCRATCH = 13 * MIB
"""What float32 products keep for themselves (7 to 16 MiB were seen)."""
ALL_LOGITS_SCRATCH = 32 * MIB
"""The same, where one of them has a vocabulary's width and a row per token (12 to 45 MiB)."""
HALF_SCRATCH = 10 * MIB
"""16-bit products (2 to 13 MiB)."""
HALF_ALL_LOGITS_SCRATCH = 18 * MIB
"""The same with a row of logits per token (3 to 23 MiB)."""
EXPERT_COPIES = 3
"""Times the bytes of the largest stack of experts in 16 bits: a float32 copy and one in the kernel's order."""
WRITTEN_OUT_SCORES = 2.25
"""Float32 matrices of scores alive at once, their mask included."""
LATENT_WIDTHS = {2: 80, 4: 48}
"""Bytes per element → bytes per token and element of all queries, beside the scores."""
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
    image: tuple[int, int] | None = None,
    all_logits: bool = False,
    output_length: int | None = None,
) -> CpuPeak:
    """The cache, the largest phase and what kernels keep. See `activations.prefill` for the arguments.

    output_length: tokens that an encoder-decoder makes while it generates; None: as many as it reads.
    """
    config = text_config(architecture.config)
    found = prefill(shape, batch_size, length, itemsize, image=image, all_logits=all_logits)
    cache = kv_cache(architecture.config, batch_size, length, itemsize) if architecture.generates else NOTHING
    attention = _attention(config, shape, batch_size, length, itemsize)
    masks = batch_size * length**2 * itemsize if shape.scores and len(set(config.get("layer_types") or ())) > 1 else 0
    formula, size = f"{found.phase}: {found.formula}", found.bytes
    if attention > size:
        formula, size = "attention: scores written out", attention
    size += masks  # one for each kind of layer
    if image is not None:
        size += batch_size * 3 * image[0] ** 2 * itemsize
    if config.get("is_encoder_decoder") and not all_logits:
        # The encoder is done before the first key is cached
        cache = kv_cache(architecture.config, batch_size, length, itemsize, output_length)
        encoder = prefill(shape, batch_size, length, itemsize, headless=True)
        size = max(size if attention == size else 0, encoder.bytes, cache.bytes)
        formula, held = "the encoder's largest phase, or the cache", 0
    else:
        held = cache.bytes + cache.prefill_extra
    scratch = _scratch(architecture, shape, itemsize, all_logits or not shape.last_logits)
    return CpuPeak(held + size + scratch, scratch, formula, found.known and cache.exact)


def _attention(config: Mapping[str, Any], shape: Shape, batch_size: int, length: int, itemsize: int) -> int:
    pairs = length * length
    if config.get("relative_attention_num_buckets") and shape.heads and "d_kv" in config:
        biases = 2 * shape.heads * pairs * itemsize + 7 * batch_size * length * shape.hidden * itemsize
        return max(biases, BUCKETS * pairs)
    queries = int(config.get("qk_nope_head_dim") or 0) + int(config.get("qk_rope_head_dim") or 0)
    if queries and queries != config.get("v_head_dim"):
        scores = int(WRITTEN_OUT_SCORES * 4 * shape.heads * pairs)
        return batch_size * (scores + LATENT_WIDTHS[itemsize] * length * shape.heads * queries)
    return 0


def _scratch(architecture: Architecture, shape: Shape, itemsize: int, all_logits: bool) -> int:
    if itemsize == 4:
        return ALL_LOGITS_SCRATCH if all_logits and shape.vocabulary else LAST_LOGITS_SCRATCH
    kept = HALF_ALL_LOGITS_SCRATCH if all_logits and shape.vocabulary else HALF_SCRATCH
    if not shape.experts:
        return kept
    stacks = (tensor.elements for tensor in architecture.tensors() if len(tensor.shape) == 3)
    return kept + EXPERT_COPIES * itemsize * max(stacks, default=0)
