"""What a model needs in memory in one dtype: each term with its bytes, how sure they are, and how they come about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

from bigpipe.bigmodel.architecture import Architecture, is_named, read_limit, text_config
from bigpipe.bigmodel.formats import converted_modules, matrix_shape
from bigpipe.bigmodel.memo import kept
from bigpipe.errors import UsageError
from bigpipe.sizes import format_size

from . import activations
from .activations import Shape
from .cpu_peak import beside_weights
from .kvcache import Cache, cache_of
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
LARGEST = 2**40
"""Of what a user says: what is reckoned with it is a number that a float holds."""
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
    headless: bool = False
    """A plain forward of the body alone, an encoder-decoder's encoder: it makes no logits."""
    kv_dtype: str | None = None
    """Of cached keys and values; None: the dtype that the model computes in."""
    output_length: int | None = None
    """Tokens that an encoder-decoder makes; None: as many as it reads."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "sequence_length", "lora_rank"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= LARGEST:
                raise UsageError(f"{name} is {value!r:.60}", f"it must be 1 to {LARGEST:,}", field=name)


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


@dataclass(frozen=True, repr=False)
class Budget:
    """One row of an estimate: a model in one dtype, each term counted when it is first asked for. Sizes in bytes.

    Raises UsageError for a dtype that is neither plain nor a format, and for what the workload asks in vain.
    """

    architecture: Architecture = field(repr=False)
    dtype: str
    workload: Workload

    def __repr__(self) -> str:
        most = format_size(self.inference_high)
        return f"<Budget {self.dtype}: {format_size(self.inference)} to infer, {most} at most>"

    def __post_init__(self) -> None:
        _ = self.counts, self.cached, self.adapters  # whose errors are the caller's

    @cached_property
    def counts(self) -> Weights:
        return weigh(self.architecture, self.dtype, double_quant=self.workload.double_quant)

    @cached_property
    def shape(self) -> Shape:
        return activations.shape_of(self.architecture)

    @cached_property
    def length(self) -> int:
        return capped_length(self.architecture, self.workload.sequence_length)

    @property
    def itemsize(self) -> int:
        return compute_bytes(self.dtype)

    @property
    def cached(self) -> int:
        """Bytes per cached element."""
        return self.itemsize if self.workload.kv_dtype is None else kv_bytes(self.workload.kv_dtype)

    @cached_property
    def cache(self) -> Cache:
        work = self.workload
        return cache_of(
            self.architecture, work.batch_size, self.length, self.cached, work.output_length, headless=work.headless
        )

    @property
    def adapters(self) -> int:
        return adapters_of(self.architecture, self.workload.lora_rank, self.workload.lora_targets)

    @property
    def inference(self) -> int:
        return sum(term.bytes for term in self._parts)

    @property
    def inference_high(self) -> int:
        return sum(term.high for term in self._parts)

    @property
    def _parts(self) -> tuple[Term, ...]:
        return self.weights, self.kv_cache, self.activations, self.runtime

    def needed(self, train: str | None) -> int | None:
        """Return bytes at the upper end, of a training step or of inference; None where it cannot be trained so."""
        if train is None:
            return self.inference_high
        term = self.training[train]
        return term.high + self.runtime.high if term else None

    def metrics(self) -> dict[str, Any]:
        """The terms by the names that gates and reports use."""
        return {
            "parameters": self.counts.parameters,
            "total": self.counts.total,
            "largest_layer": self.counts.largest_layer,
            "weights": self.weights.bytes,
            "stored": self.counts.stored,
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
        names = ("weights", "buffers", "kv_cache", "activations", "runtime", "cpu", "stored", "quantizing")
        found = {name: getattr(self, name) for name in names}
        found |= {f"training.{name}": term for name, term in self.training.items()}
        return {name: term for name, term in found.items() if term}

    def as_json(self) -> dict[str, Any]:
        return {**self.metrics(), "terms": {name: asdict(term) for name, term in self.terms().items()}}

    @cached_property
    def weights(self) -> Term:
        """Parameters and buffers as they are held in memory, scales and unconverted modules included."""
        formula = "Σ unique tensors · bytes, buffers included"
        if self.counts.converted:
            formula += f"; {self.counts.converted} matrices packed, {self.counts.scales} bytes of scales and tables"
        return self._counted(self.counts.loaded, formula)

    @cached_property
    def buffers(self) -> Term:
        return Term.exact(self.counts.buffers, "Σ buffers, saved or not")

    @cached_property
    def stored(self) -> Term:
        """Of the checkpoint this dtype is written to, without headers; under double quantization a few bytes of each
        matrix depend on its values."""
        stored, matrices, packing = self.counts.stored, self.counts.converted, self.counts.packing
        fewer, more = packing.spread() if packing else (0, 0)
        if self.architecture.outlined or not (fewer or more):
            return self._counted(stored, "Σ saved tensors · bytes")
        formula = f"Σ saved tensors · bytes; {matrices} states hold a number of the data"
        return Term(stored, "bound", stored - matrices * fewer, stored + matrices * more, formula)

    def _counted(self, size: int, formula: str) -> Term:
        if self.architecture.outlined:
            return Term.about(size, "calibrated", 0.01, f"{formula}; the class is unknown")
        return Term.exact(size, formula)

    @cached_property
    def kv_cache(self) -> Term:
        cache = self.cache
        tokens = f"{self.workload.batch_size} × {self.length} tokens"
        formula = f"{cache.kind}: {tokens}, {self.cached} bytes per element"
        return Term.exact(cache.bytes, formula) if cache.exact else Term(cache.bytes, "bound", 0, cache.bytes, formula)

    @cached_property
    def activations(self) -> Term:
        if not self.shape.hidden and self.architecture.library != "timm":
            # Pipelines and classes of one's own: what people add for inference where nothing is known (EleutherAI)
            size = self.counts.loaded // 5
            return Term(size, "bound", 0, 2 * size, "a fifth of the weights; nothing is known of its forward")
        found = activations.prefill(
            self.shape, self.workload.batch_size, self.length, self.itemsize,
            image=_image(self.architecture), all_logits=self.workload.all_logits, headless=self.workload.headless,
        )  # fmt: skip
        unpacked, words = self.unpacked
        size = found.bytes + self.cache.prefill_extra + unpacked
        formula = found.formula
        formula += " + keys beyond the window until the first step" if self.cache.prefill_extra else ""
        formula += f" + {words}" if unpacked else ""
        if not found.known or self.architecture.outlined or not self.cache.exact:
            return Term.about(size, "bound", GUESSED_MARGIN, formula)
        low, high = int(size * (1 - CALIBRATED_MARGIN)), int(size * (1 + CALIBRATED_MARGIN)) + SCRATCH
        return Term(size, "calibrated", low, high, formula)

    @property
    def unpacked(self) -> tuple[int, str]:
        """What a product with a packed matrix takes besides, in bytes and in words."""
        packing, tokens = self.counts.packing, self.workload.batch_size * self.length
        if packing is None:
            return 0, ""
        return packing.transient(tokens, self.shape.hidden, self.shape.inner, self.counts.largest_matrix)

    @cached_property
    def runtime(self) -> Term:
        return runtime_of(sum(len(module.tensors) for module in self.architecture.modules))

    @cached_property
    def quantizing(self) -> Term | None:
        """What a 16-bit checkpoint needs besides, at the peak, to be quantized while it loads; None: not a quantized
        dtype. A checkpoint that was quantized before needs none of it."""
        if self.counts.packing is None:
            return None
        low, usual, high = (size * self.counts.largest_matrix for size in self.counts.packing.quantizing)
        return Term(usual, "bound", low, high, "largest matrix in 16 bits, its copies and codes; 0 if quantized before")

    @cached_property
    def cpu(self) -> Term:
        """The peak of anonymous memory on a CPU, weights included, above what the process holds without a model."""
        found = beside_weights(
            self.architecture, self.shape, self.workload.batch_size, self.length, self.itemsize,
            image=_image(self.architecture), all_logits=self.workload.all_logits, headless=self.workload.headless,
            output_length=self.workload.output_length, cache_itemsize=self.cached,
        )  # fmt: skip
        other = found.bytes + self.unpacked[0]
        margin = int(other * (CALIBRATED_MARGIN if found.known else GUESSED_MARGIN))
        size = self.counts.loaded + other
        return Term(
            size, "calibrated" if found.known else "bound", max(size - margin - found.scratch, self.counts.loaded),
            size + margin + SCRATCH,
            f"weights + cache + {found.formula} + {format_size(found.scratch)} that kernels keep",
        )  # fmt: skip

    @cached_property
    def training(self) -> Mapping[str, Term | None]:
        """By optimizer; None where the dtype cannot be trained so."""
        weights, workload, count = self.counts, self.workload, self.counts.parameters
        mixed = weights.dtype != "float32"
        kept = activations.activations_kept(
            self.shape, workload.batch_size, self.length, mixed=mixed, checkpointing=workload.gradient_checkpointing
        )
        lora = self.adapters
        frozen = Term.about(
            weights.loaded + 16 * lora + kept, "bound", 0.2, f"frozen weights + 16·{lora} + activations"
        )
        if weights.dtype not in TRAINED:
            return {**dict.fromkeys(OPTIMIZERS), "lora": frozen}
        states = _adam_8bit_states(self.architecture)
        sizes = {
            "adamw": (count * 16, f"parameters · ({'2+2+12' if mixed else '4+4+8'})"),
            "adamw_8bit": (count * 8 + states, "parameters · 8 + 8-bit states with scales"),
            "sgd": (count * 8, f"parameters · ({'2+2+4' if mixed else '4+4'})"),
        }
        terms = {
            name: Term.about(size + weights.buffers + kept, "bound", MARGINS[name], f"{text} + activations")
            for name, (size, text) in sizes.items()
        }
        return {**terms, "lora": frozen}


def runtime_of(tensors: int) -> Term:
    """Return what a process takes of each GPU besides its tensors. tensors: how many parameters and buffers it has."""
    low, usual, high = CONTEXT
    formula = "CUDA context + cuBLAS workspace; + 512 bytes per tensor at most"
    return Term(usual + WORKSPACE, "bound", low, high + WORKSPACE + ROUNDING * tensors, formula)


def kv_bytes(dtype: str) -> int:
    """Per cached element. Raises UsageError for a dtype that no cache is kept in."""
    if dtype not in KV_BYTES:
        raise UsageError(f"kv_dtype {dtype!r} is not known to estimate", f"use {', '.join(KV_BYTES)}")
    return KV_BYTES[dtype]


def capped_length(architecture: Architecture, length: int) -> int:
    """The tokens of a sequence that is read, at most what the model's positions allow."""
    limit = read_limit(architecture.config)
    return length if limit is None else min(length, limit)


def cut_length(architecture: Architecture, length: int) -> str | None:
    """Return a sentence where the model takes fewer tokens than that."""
    kept = capped_length(architecture, length)
    return None if kept == length else f"{length} tokens are more than the model takes: counted with {kept}"


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


@kept
def _adam_8bit_states(architecture: Architecture) -> int:
    """Two states of one byte with a float32 scale per 256 elements; small tensors keep float32."""
    parameters = [tensor.elements for tensor in architecture.tensors() if not tensor.buffer and tensor.floating]
    return sum(8 * n if n < SMALL_TENSOR else 2 * (n + 4 * -(-n // 256)) for n in parameters)


@kept
def adapters_of(architecture: Architecture, rank: int, targets: tuple[str, ...] = ()) -> int:
    """Parameters of rank-r adapters on linear modules: Σ r·(in + out). Raises UsageError for a target that is none."""
    modules = converted_modules(architecture)
    for target in targets:
        if not any(is_named(module.name, target) for module in modules):
            kinds = dict.fromkeys(module.name.rpartition(".")[2] for module in modules)
            raise UsageError(
                f"LoRA target {target!r} names no linear module of {architecture.class_name}",
                f"use {', '.join(kinds)}" if kinds else "it has none: choose another way to train it",
            )
    chosen = [module for module in modules if not targets or any(is_named(module.name, end) for end in targets)]
    return rank * sum(sum(matrix_shape(module)) for module in chosen)
