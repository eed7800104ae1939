"""What a model needs in memory in one dtype: each term with its bytes, how sure they are, and how they come about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from bigpipe.bigmodel.architecture import Architecture
from bigpipe.bigmodel.formats import converted_modules, matrix_shape
from bigpipe.bigmodel.memo import kept
from bigpipe.errors import UsageError

from . import activations
from .activations import Shape
from .cpu_peak import beside_weights
from .kvcache import Cache, cache_of, text_config
from .weights import Weights, compute_bytes, weigh

Basis = Literal["exact", "calibrated", "bound"]
"""exact: counted. calibrated: a formula whose coefficients were counted on real forwards. bound: not to be exceeded,
or a guess with room."""

MIB = 2**20
CONTEXT = (200 * MIB, 288 * MIB, 480 * MIB)
"""A CUDA context with lazily loaded kernels (CUDA 11.7 and later): low, usual, high."""
WORKSPACE = 32 * MIB
"""cuBLAS on sm90; 8 MiB before."""
ROUNDING = 512
"""The allocator gives multiples of this."""

SCRATCH = 16 * MIB
"""What kernels take for themselves and no tensor shows: 2 to 12 MiB on a CPU."""
CALIBRATED_MARGIN = 0.05
GUESSED_MARGIN = 0.4
SMALL_TENSOR = 4096
"""8-bit Adam keeps float32 states for tensors with fewer elements (bitsandbytes' min_8bit_size)."""
MARGINS = {"adamw": 0.2, "adamw_8bit": 0.2, "sgd": 0.3}
"""Of training. Gradients grow while activations go, which counts for more where there are no states."""
KV_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8": 1, "int8": 1}
"""Per element of a cache. The scales of a quantized one are not counted."""
TRAINED = ("float32", "float16", "bfloat16")
OPTIMIZERS = ("adamw", "adamw_8bit", "sgd", "lora")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    batch_size: int = 1
    sequence_length: int = 2048
    double_quant: bool = False
    lora_rank: int = 8
    lora_targets: tuple[str, ...] = ()
    """Ends of the names of the modules that get adapters; none: every linear module but the head."""
    gradient_checkpointing: bool = False
    all_logits: bool = False
    """A plain forward, whose logits are those of every token; else a generation, which asks for the last one's."""
    kv_dtype: str | None = None
    """Of cached keys and values; None: the dtype that the model computes in."""
    output_length: int | None = None
    """Tokens that an encoder-decoder makes; None: as many as it reads."""


@dataclass(frozen=True, slots=True)
class Term:
    bytes: int
    basis: Basis
    low: int
    high: int
    formula: str

    @classmethod
    def exact(cls, size: int, formula: str) -> Term:
        return cls(size, "exact", size, size, formula)

    @classmethod
    def about(cls, size: int, basis: Basis, margin: float, formula: str) -> Term:
        return cls(size, basis, int(size * (1 - margin)), int(size * (1 + margin)), formula)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """One row of an estimate. Sizes in bytes."""

    dtype: str
    parameters: int
    total: int
    """Every float tensor at the width the dtype's name promises, and integer buffers: accelerate's column."""
    largest_layer: int
    stored: int
    """Of the checkpoint this dtype is written to, without headers."""
    weights: Term
    """Parameters and buffers as they are held in memory, scales and unconverted modules included."""
    buffers: Term
    kv_cache: Term
    activations: Term
    runtime: Term
    cpu: Term
    """The peak of anonymous memory on a CPU, weights included, above what the process holds without a model."""
    on_disk: Term
    """`stored` with its interval: under double quantization a few bytes of each matrix depend on its values."""
    largest_matrix: int = 0
    """Elements of the largest matrix that is quantized."""
    quantizing: Term | None = None
    """What a 16-bit checkpoint needs besides, at the peak, to be quantized while it loads; None: not a quantized
    dtype. A checkpoint that was quantized before needs none of it."""
    training: Mapping[str, Term | None] = field(default_factory=dict)
    """By optimizer; None where the dtype cannot be trained so."""

    @property
    def inference(self) -> int:
        return sum(term.bytes for term in self._parts)

    @property
    def inference_high(self) -> int:
        return sum(term.high for term in self._parts)

    @property
    def _parts(self) -> tuple[Term, ...]:
        return self.weights, self.kv_cache, self.activations, self.runtime

    def metrics(self) -> dict[str, Any]:
        """The terms by the names that gates and reports use."""
        return {
            "parameters": self.parameters,
            "total": self.total,
            "largest_layer": self.largest_layer,
            "weights": self.weights.bytes,
            "stored": self.stored,
            "buffers": self.buffers.bytes,
            "kv_cache": self.kv_cache.bytes,
            "activations": self.activations.bytes,
            "runtime": self.runtime.bytes,
            "inference": self.inference,
            "inference_high": self.inference_high,
            "quantizing": self.quantizing.bytes if self.quantizing else None,
            "training": {name: term.bytes if term else None for name, term in self.training.items()},
        }

    def terms(self) -> dict[str, Term]:
        """By name; training as `training.adamw`, where the dtype can be trained so."""
        names = ("weights", "buffers", "kv_cache", "activations", "runtime", "cpu")
        trained = {f"training.{name}": term for name, term in self.training.items() if term}
        quantizing = {"quantizing": self.quantizing} if self.quantizing else {}
        return {**{name: getattr(self, name) for name in names}, "stored": self.on_disk, **quantizing, **trained}

    def as_json(self) -> dict[str, Any]:
        return {**self.metrics(), "terms": {name: asdict(term) for name, term in self.terms().items()}}


def budget(architecture: Architecture, dtype: str, workload: Workload) -> Budget:
    """Raises UsageError for a dtype that is neither plain nor a format."""
    weights = weigh(architecture, dtype, double_quant=workload.double_quant)
    shape = activations.shape_of(architecture)
    length = capped_length(architecture, workload.sequence_length)
    itemsize = compute_bytes(dtype)
    cached = itemsize if workload.kv_dtype is None else kv_bytes(workload.kv_dtype)
    cache = cache_of(architecture, workload.batch_size, length, cached, workload.output_length)
    return Budget(
        dtype=dtype,
        parameters=weights.parameters,
        total=weights.total,
        largest_layer=weights.largest_layer,
        stored=weights.stored,
        on_disk=_on_disk(architecture, weights),
        weights=_weights(architecture, weights),
        buffers=Term.exact(weights.buffers, "Σ buffers, saved or not"),
        kv_cache=_cache(cache, workload.batch_size, length, cached),
        activations=_activations(architecture, weights, shape, cache, workload, length),
        runtime=_runtime(architecture),
        cpu=_cpu(architecture, weights, shape, workload, length, cached),
        largest_matrix=weights.largest_matrix,
        quantizing=_quantizing(weights),
        training=_training(architecture, weights, shape, workload, length),
    )


def kv_bytes(dtype: str) -> int:
    """Per cached element. Raises UsageError for a dtype that no cache is kept in."""
    if dtype not in KV_BYTES:
        raise UsageError(f"kv_dtype {dtype!r} is not known to estimate", f"use {', '.join(KV_BYTES)}")
    return KV_BYTES[dtype]


def capped_length(architecture: Architecture, length: int) -> int:
    """The tokens of a sequence, at most what the model's positions allow."""
    text = text_config(architecture.config)
    if text.get("relative_attention_num_buckets") and "d_kv" in text:
        return length  # T5's distances know no last position, whatever its config says
    limits = [text.get(name) for name in ("max_position_embeddings", "n_positions", "max_target_positions")]
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    return min([length, *known])


def _weights(architecture: Architecture, weights: Weights) -> Term:
    formula = "Σ unique tensors · bytes, buffers included"
    if weights.converted:
        formula += f"; {weights.converted} matrices packed, {weights.scales} bytes of scales and tables"
    if architecture.outlined:
        return Term.about(weights.loaded, "calibrated", 0.01, formula + "; the class is unknown")
    return Term.exact(weights.loaded, formula)


def _on_disk(architecture: Architecture, weights: Weights) -> Term:
    formula = "Σ saved tensors · bytes"
    if architecture.outlined:
        return Term.about(weights.stored, "calibrated", 0.01, formula + "; the class is unknown")
    fewer, more = (weights.converted * size for size in (weights.packing.spread() if weights.packing else (0, 0)))
    if not fewer and not more:
        return Term.exact(weights.stored, formula)
    formula += f"; {weights.converted} states hold a number of the data"
    return Term(weights.stored, "bound", weights.stored - fewer, weights.stored + more, formula)


def _cache(cache: Cache, batch_size: int, length: int, itemsize: int) -> Term:
    formula = f"{cache.kind}: {batch_size} × {length} tokens, {itemsize} bytes per element"
    return Term.exact(cache.bytes, formula) if cache.exact else Term(cache.bytes, "bound", 0, cache.bytes, formula)


def _activations(
    architecture: Architecture, weights: Weights, shape: Shape, cache: Cache, workload: Workload, length: int
) -> Term:
    if not shape.hidden and architecture.library != "timm":
        # Pipelines and classes of one's own: what people add for inference where nothing is known (EleutherAI)
        size = weights.loaded // 5
        return Term(size, "bound", 0, 2 * size, "a fifth of the weights; nothing is known of its forward")
    itemsize = compute_bytes(weights.dtype)
    found = activations.prefill(
        shape, workload.batch_size, length, itemsize, image=_image(architecture), all_logits=workload.all_logits
    )
    unpacked, words = _unpacked(weights, shape, workload.batch_size * length)
    size = found.bytes + cache.prefill_extra + unpacked
    formula = f"{found.phase}: {found.formula}"
    formula += " + keys beyond the window until the first step" if cache.prefill_extra else ""
    formula += f" + {words}" if unpacked else ""
    known = found.known and not architecture.outlined and cache.exact
    if not known:
        return Term.about(size, "bound", GUESSED_MARGIN, formula)
    low, high = int(size * (1 - CALIBRATED_MARGIN)), int(size * (1 + CALIBRATED_MARGIN)) + SCRATCH
    return Term(size, "calibrated", low, high, formula)


def _unpacked(weights: Weights, shape: Shape, tokens: int) -> tuple[int, str]:
    """What a product with a packed matrix takes besides, in bytes and in words."""
    if weights.packing is None:
        return 0, ""
    return weights.packing.transient(tokens, shape.hidden, shape.inner, weights.largest_matrix)


def _image(architecture: Architecture) -> tuple[int, int] | None:
    """(pixels per side, patch) of a model that sees only."""
    config = architecture.config
    if architecture.library == "timm":
        return 224, 0
    if config.get("vocab_size") or text_config(config) is not config or architecture.generates:
        return None
    side, patch = config.get("image_size"), config.get("patch_size")
    if config.get("num_channels") and not isinstance(side, int):
        side = 224
    return (side, patch if isinstance(patch, int) else 0) if isinstance(side, int) else None


def _cpu(
    architecture: Architecture, weights: Weights, shape: Shape, workload: Workload, length: int, cached: int
) -> Term:
    itemsize = compute_bytes(weights.dtype)
    found = beside_weights(
        architecture, shape, workload.batch_size, length, itemsize, image=_image(architecture),
        all_logits=workload.all_logits, output_length=workload.output_length, cache_itemsize=cached,
    )  # fmt: skip
    other = found.bytes + _unpacked(weights, shape, workload.batch_size * length)[0]
    margin = int(other * (CALIBRATED_MARGIN if found.known else GUESSED_MARGIN))
    size = weights.loaded + other
    return Term(
        size, "calibrated" if found.known else "bound", max(size - margin - found.scratch, weights.loaded),
        size + margin + SCRATCH,
        f"weights + cache + {found.formula} + {found.scratch >> 20} MiB that kernels keep",
    )  # fmt: skip


def _quantizing(weights: Weights) -> Term | None:
    if weights.packing is None:
        return None
    low, usual, high = (size * weights.largest_matrix for size in weights.packing.quantizing)
    return Term(usual, "bound", low, high, "largest matrix in 16 bits, its copies and codes; 0 if quantized before")


def _runtime(architecture: Architecture) -> Term:
    low, usual, high = CONTEXT
    rounding = ROUNDING * sum(len(module.tensors) for module in architecture.modules)
    formula = "CUDA context + cuBLAS workspace; + 512 bytes per tensor at most"
    return Term(usual + WORKSPACE, "bound", low, high + WORKSPACE + rounding, formula)


def _training(
    architecture: Architecture, weights: Weights, shape: Shape, workload: Workload, length: int
) -> dict[str, Term | None]:
    mixed = weights.dtype != "float32"
    kept = activations.training(
        shape, workload.batch_size, length, mixed=mixed, checkpointing=workload.gradient_checkpointing
    )
    fixed = weights.buffers + kept
    lora = adapters(architecture, workload.lora_rank, workload.lora_targets)
    frozen = Term.about(weights.loaded + 16 * lora + kept, "bound", 0.2, f"frozen weights + 16·{lora} + activations")
    if weights.dtype not in TRAINED:
        return {**dict.fromkeys(OPTIMIZERS), "lora": frozen}
    states = _adam_8bit_states(architecture)
    count = weights.parameters
    sizes = {
        "adamw": (count * 16, "parameters · (4+4+8)" if not mixed else "parameters · (2+2+12)"),
        "adamw_8bit": (count * 8 + states, "parameters · 8 + 8-bit states with scales"),
        "sgd": (count * 8, "parameters · (4+4)" if not mixed else "parameters · (2+2+4)"),
    }
    terms = {
        name: Term.about(size + fixed, "bound", MARGINS[name], f"{text} + activations")
        for name, (size, text) in sizes.items()
    }
    return {**terms, "lora": frozen}


@kept
def _adam_8bit_states(architecture: Architecture) -> int:
    """Two states of one byte with a float32 scale per 256 elements; small tensors keep float32."""
    parameters = [tensor.elements for tensor in architecture.tensors() if not tensor.buffer and tensor.floating]
    return sum(8 * n if n < SMALL_TENSOR else 2 * (n + 4 * -(-n // 256)) for n in parameters)


@kept
def adapters(architecture: Architecture, rank: int, targets: tuple[str, ...] = ()) -> int:
    """Parameters of rank-r adapters on linear modules: Σ r·(in + out). Raises UsageError for a target that is none."""
    modules = converted_modules(architecture)
    for target in targets:
        if not any(_is_named(module.name, target) for module in modules):
            kinds = dict.fromkeys(module.name.rpartition(".")[2] for module in modules)
            raise UsageError(
                f"LoRA target {target!r} names no linear module of {architecture.class_name}",
                f"use {', '.join(kinds)}" if kinds else "it has none: choose another way to train it",
            )
    chosen = [module for module in modules if not targets or any(_is_named(module.name, end) for end in targets)]
    return rank * sum(sum(matrix_shape(module)) for module in chosen)


def _is_named(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
