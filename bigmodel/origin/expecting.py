"""What must be stored of a source under the settings of a published model, by the names that it has there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bigpipe.bigmodel.architecture import Architecture, ask_names, describe_architecture
from bigpipe.bigmodel.checkpoint import ModelDescription
from bigpipe.bigmodel.formats import format_of, name_matcher, set_apart, without_quantization
from bigpipe.bigmodel.quantization import Converted, Kept, Outline, Settings, model_names, understand
from bigpipe.bigmodel.sources import Sources

Part = Converted | Kept


@dataclass(frozen=True, slots=True)
class Expected:
    parts: tuple[Part, ...]
    """Of the source, whose outputs are called as they are published."""
    config: Mapping[str, Any] | None = None
    """What config.json must hold to the byte, where bigpipe wrote it."""
    notes: tuple[str, ...] = ()
    custom: Mapping[str, Any] | None = None
    """As `config`, of `bigpipe_architecture.json`."""


def expect_ours(source: ModelDescription, settings: Settings, sources: Sources) -> Expected:
    """Return what `quantize` makes of a source. Raise as `understand`."""
    outlined, quantized = understand(source, settings, sources=sources)
    return Expected(outlined.parts, quantized.config, outlined.notes, quantized.custom)


def expect_of_others(
    source: ModelDescription, published: ModelDescription, settings: Settings, sources: Sources
) -> Expected:
    """Return what transformers and bitsandbytes store of a source, loaded as the class that the published config names.
    Raise as `understand`.

    `save_pretrained` calls tensors as the class does, leaves out what the class does not have, and stores one of tied
    tensors.
    """
    config = without_quantization(published.config or {})
    architecture = describe_architecture(config, custom=published.custom, sources=sources)
    settings = replace(settings, skip_modules=_heeded(settings.skip_modules, architecture))
    source = replace(source, config=config, custom=published.custom)
    outlined, _ = understand(source, settings, architecture=architecture, sources=sources)
    asked = partial(ask_names, config, memo=sources.memo) if architecture.library == "transformers" else None
    converted = {outlined.names[part.source] for part in outlined.parts if isinstance(part, Converted)}
    there = model_names(architecture, _plain_names(published), (), converted, asked)
    return Expected(tuple(_renamed(outlined, architecture, {name: stored for stored, name in there.items()})))


def _heeded(skips: Any, architecture: Architecture) -> list[str] | None:
    """Names of modules that a config says were skipped, without those that mean none: nobody minds them elsewhere."""
    if skips is None:
        return None
    linear = [module.name for module in architecture.modules if module.linear]
    return [entry for entry in skips if any(map(name_matcher([entry]), linear))]


def _plain_names(published: ModelDescription) -> list[str]:
    """The names that its tensors would have if they were not packed."""
    plain, packed = set_apart(published.tensors or {}, format_of(published))
    return [*plain, *(f"{module}.weight" for module in packed)]


def _renamed(outlined: Outline, architecture: Architecture, there: Mapping[str, str]) -> Iterator[Part]:
    """there: the model's name → the one that is published."""
    known = {name for name, tensor in architecture.specs.items() if tensor.persistent}
    groups = {name: group for group in architecture.tied for name in group}
    own = {outlined.names[part.source] for part in outlined.parts}
    for part in outlined.parts:
        name = outlined.names[part.source]
        if name in there:
            yield _called(part, there[name])
            continue
        twin = next((other for other in groups.get(name, ()) if other in there), None)
        if twin is not None and twin not in own:
            yield _called(part, there[twin])
        elif twin is None and name in known:
            yield part


def _called(part: Part, name: str) -> Part:
    if isinstance(part, Converted):
        return replace(part, module=name.removesuffix(".weight"))
    return replace(part, outputs=(replace(part.outputs[0], name=name),))
