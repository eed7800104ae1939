"""What a checkpoint is and what each of its tensors becomes, from headers and config: for a plan as for a run."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from bigpipe.bigmodel.architecture import Architecture, ask_names, describe_architecture
from bigpipe.bigmodel.checkpoint import ModelDescription
from bigpipe.bigmodel.formats import PLAIN, format_of
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.writing import config_with_dtype
from bigpipe.errors import UsageError

from .outline import Outline, outline
from .settings import Settings


def understand(
    described: ModelDescription,
    settings: Settings,
    *,
    architecture: Architecture | None = None,
    sources: Sources = Sources(),
) -> tuple[Outline, ModelDescription]:
    """Return the outline of a quantization, and the checkpoint that comes of it, sizes as of `Outline.nbytes`.

    architecture: what the model is; None: asked of `describe_architecture`, which takes `sources`. The tensors of
    `described` must be known. Raise UsageError and InvalidCheckpoint.
    """
    refuse_quantized(described)
    if described.config is None and described.custom is None and architecture is None:
        raise UsageError(
            "the checkpoint has no config that names its class, so nobody knows which weights are linear layers'",
            "bring its config.json, or describe its class under `architecture`",
        )
    config = described.config or {}
    if architecture is None:
        architecture = describe_architecture(config, custom=described.custom, sources=sources)
    plain = described.custom is None and described.config is not None and architecture.library == "transformers"
    names = partial(ask_names, config, memo=sources.memo) if plain else None
    outlined = outline(described.tensors or {}, described.tied, architecture, settings, names)
    quantization = {"quantization_config": settings.as_config(architecture)}
    return outlined, replace(
        described,
        config=None if described.config is None else config_with_dtype(config, settings.dtype) | quantization,
        custom=None if described.custom is None else {**described.custom, **quantization},
        tensors={tensor.name: (tensor.dtype, tensor.shape) for part in outlined.parts for tensor in part.outputs},
        format="safetensors",
        tied={},
    )


def refuse_quantized(described: ModelDescription) -> None:
    """Raises UsageError for a checkpoint that is quantized already: its codes are no numbers to be rounded again."""
    found = format_of(described)
    if found is not PLAIN:
        raise UsageError(
            f"the checkpoint is quantized already ({found.title})",
            "leave this step out, or start from the weights before they were quantized",
        )
