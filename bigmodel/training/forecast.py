"""Memory that a fine-tuning takes, before it starts: from headers and the architecture alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from bigpipe.bigmodel.adapters import PREFIX, copies
from bigpipe.bigmodel.architecture import Architecture, position_limit, text_config
from bigpipe.bigmodel.checkpoint import CASTABLE, AdapterDescription, ModelDescription, itemsize, tensor_nbytes
from bigpipe.bigmodel.execution import cast_bytes
from bigpipe.bigmodel.footprint import Budget, Workload, activations_kept, capped_length
from bigpipe.bigmodel.formats import PLAIN, format_of, set_apart
from bigpipe.bigmodel.sources import Sources
from bigpipe.sizes import format_size

from .rehearsing import Tensors, rehearse
from .settings import Training
from .targets import find_targets, unknown_ends

PER_PARAMETER = 16
"""Of an adapter, in float32: itself, its gradient, and Adam's two moments."""


def foreseen_adapter(
    model: ModelDescription, architecture: Architecture, training: Training, sources: Sources = Sources()
) -> AdapterDescription:
    """Return what a new adapter will hold. Raise UsageError for modules that the model does not have, and for what peft
    does not adapt. The run asks this too, before it loads anything."""
    asked = training.lora
    found = find_targets(architecture, asked.target_modules)
    config: dict[str, Any] = {"peft_type": "LORA", "r": asked.r, "lora_alpha": asked.lora_alpha}
    tensors: Tensors = {}
    if found is None:
        source = model.path if model.path is not None and sources.trust_remote_code else dict(model.config or {})
        tensors, named = rehearse(source, training, unknown_ends(architecture, asked.target_modules), sources)
        config |= named
    else:
        for name, (outputs, inputs) in found.items():
            tensors[f"{PREFIX}{name}.lora_A.weight"] = ("float32", (asked.r, inputs))
            tensors[f"{PREFIX}{name}.lora_B.weight"] = ("float32", (outputs, asked.r))
        config["target_modules"] = sorted({name.rsplit(".", 3)[-3] for name in tensors})
    return AdapterDescription(config=config, tensors=tensors, where="the adapter that is trained")


def parameters_of(adapter: AdapterDescription) -> tuple[int, int]:
    """Return how many numbers of an adapter are trained, and for how many modules. Weights of the model that its file
    holds too are none of them."""
    held = set(copies(adapter))
    tensors = {name: each for name, each in (adapter.tensors or {}).items() if name not in held}
    count = sum(math.prod(shape) for _, shape in tensors.values())
    return count, sum(name.endswith(".lora_A.weight") for name in tensors)


def stored_beside(adapter: AdapterDescription) -> int:
    """Return the bytes of the model's weights that an adapter's file holds, and one that goes on from it, too."""
    tensors = adapter.tensors or {}
    return sum(tensor_nbytes(*tensors[name]) for name in copies(adapter))


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes that one rank holds besides its libraries."""

    windows: int
    """Frozen weights that are windows into their files, of a CPU: shared by all ranks of a machine."""
    weights: int
    """Frozen weights of its own: cast, or on a GPU."""
    adapter: int
    activations: int

    @property
    def own(self) -> int:
        return self.weights + self.adapter + self.activations

    def told(self) -> str:
        frozen = format_size(self.windows + self.weights)
        adapter, kept = format_size(self.adapter), format_size(self.activations)
        return f"{frozen} frozen weights, {adapter} adapter with gradients and Adam's moments, {kept} activations"


def training_memory(
    model: ModelDescription,
    architecture: Architecture,
    parameters: int,
    training: Training,
    dtype: str,
    longest: int,
    *,
    gpu: bool,
    given: int = 0,
) -> TrainingMemory:
    """Return what a step takes. parameters: of the adapter. dtype: computed in. longest: tokens of the longest row;
    given: of the longest input that an encoder reads (sounds have one length); what is more than `max_length`, or the
    positions of the half that it is for, is cut.
    """
    stored = sum(tensor_nbytes(own, shape) for own, shape in (model.tensors or {}).values())
    cast = cast_bytes(model, dtype)
    packed = stored - _cast_from(model, dtype)
    made = position_limit(architecture.config) or training.max_length
    length = min(training.max_length, max(longest, 1), made)
    read = capped_length(architecture, min(training.max_length, max(given, 1)))
    scheme = format_of(model)
    work = Workload(batch_size=training.batch_size, sequence_length=length, all_logits=True)
    budget = Budget(architecture, dtype if scheme is PLAIN else scheme.name, work)
    encoded = {
        "causal-lm": 0,
        "seq2seq-lm": read,
        "speech-seq2seq": text_config(architecture.config).get("max_source_positions") or 0,
    }[training.task]
    kept = activations_kept(
        budget.shape, training.batch_size, length, mixed=dtype != "float32",
        checkpointing=training.gradient_checkpointing,
    )  # fmt: skip
    if encoded:
        kept += activations_kept(
            budget.shape, training.batch_size, encoded, mixed=dtype != "float32",
            checkpointing=training.gradient_checkpointing, headless=True,
        )  # fmt: skip
    packing, largest, shape = budget.counts.packing, budget.counts.largest_matrix, budget.shape
    unpacked = packing.learning(largest, itemsize(dtype)) if packing is not None else 0
    if packing is not None and packing.keeps_inputs and training.gradient_checkpointing:
        # Of keys, queries and values together; of what they give; of both halves of the feed-forward part
        widths = 3 * shape.hidden + shape.inner
        kept += shape.layers * training.batch_size * (length + encoded) * widths * itemsize(dtype)
    return TrainingMemory(
        windows=0 if gpu else packed,
        weights=cast + (packed if gpu else 0),
        adapter=PER_PARAMETER * parameters,
        activations=kept + max(budget.unpacked[0], unpacked),
    )


def _cast_from(model: ModelDescription, dtype: str) -> int:
    """Stored bytes of the weights that `cast_bytes` counts."""
    single, _ = set_apart(model.tensors or {}, format_of(model))
    cast = [(own, shape) for own, shape in single.values() if own in CASTABLE and own != dtype]
    return sum(tensor_nbytes(own, shape) for own, shape in cast)
