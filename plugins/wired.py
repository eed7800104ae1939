"""What is wired to a stage: models and adapters, as far as plans know them, and whether they belong together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import NoWeights, UsageError
from bigpipe.orchestrator.stage import CheckContext, ForecastContext

from .library import about, sources_of

if TYPE_CHECKING:
    from bigpipe.bigmodel.adapters import Attachment
    from bigpipe.bigmodel.checkpoint import AdapterDescription, ModelDescription
    from bigpipe.bigmodel.formats import Agreement


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What a download foresees of several models in one folder, as diffusers puts them together."""

    description: ModelDescription
    """Their tensors, named by component, as far as they are known. Its path is where the files lie, if they do."""


def single_model(context: CheckContext | ForecastContext, port: str = "model") -> ModelDescription | None:
    """What is known of the model on a port. Raise UsageError for a pipeline of several, NoWeights for parts of one."""
    from bigpipe.bigmodel.checkpoint import AdapterDescription, ModelDescription

    wired = context.input(port)
    described = wired.output if wired else None
    if isinstance(described, NoWeights):
        raise described
    if isinstance(described, AdapterDescription):
        cause = f"{described.where} holds an adapter, which is not a model by itself"
        raise UsageError(cause, "wire it to a port `adapter`, and the model it belongs to here", field=f"inputs.{port}")
    if isinstance(described, Pipeline):
        cause = "the model is a pipeline of diffusers: several models, of which none is the one"
        cure = "download one of them: its folder as `path`, or `subfolder`; a whole one draws by the task text-to-image"
        raise UsageError(cause, cure)
    return described if isinstance(described, ModelDescription) else None


def wired_pipeline(context: CheckContext | ForecastContext, what: str) -> ModelDescription:
    """What is known of the pipeline on the port `model`. Raise UsageError for what is none, which `what` needs."""
    from bigpipe.bigmodel.checkpoint import ModelDescription

    wired = context.input("model")
    described = wired.output if wired else None
    if described is not None and not isinstance(described, Pipeline):
        cause = f"{what} needs a pipeline of diffusers, and the model is none: it has no model_index.json"
        raise UsageError(cause, "download a whole pipeline, such as Stable Diffusion", field="inputs.model")
    return described.description if described else ModelDescription(config=None)


def wired_adapters(context: CheckContext | ForecastContext) -> list[AdapterDescription]:
    """What is known of the adapters on port `adapter`. Raise UsageError where something else is wired there."""
    from bigpipe.bigmodel.checkpoint import AdapterDescription

    found = []
    for wired in context.inputs.get("adapter", ()):
        if isinstance(wired.output, AdapterDescription):
            found.append(wired.output)
        elif wired.output is not None:
            cause = "what is wired to the port `adapter` holds a model, and no adapter_config.json"
            raise UsageError(
                cause,
                "wire a download of peft's own files, a finetune, or a command that produces one",
                field="inputs.adapter",
            )
    return found


def untaken_tokenizer(context: ForecastContext) -> list[str]:
    """Say so where an adapter brings a tokenizer, and the model's is used."""
    try:
        brought = any(adapter.brings_tokenizer for adapter in wired_adapters(context))
    except UsageError:  # said where it is checked
        return []
    return ["tokenizer and chat template are the model's, not the adapter's: `merge` takes those"] if brought else []


def attached(context: CheckContext | ForecastContext, model: ModelDescription | None) -> Attachment | None:
    """What becomes of the adapter on port `adapter` where the model is loaded; None where there is none, or one of both
    is not known yet. Raise UsageError and InvalidCheckpoint where they do not belong together."""
    from bigpipe.bigmodel.adapters import attachment

    with about("inputs.adapter"):
        found = wired_adapters(context)
        if not found or model is None or model.tensors is None:
            return None
        here = agreed_here(model, context)
        return attachment(found[0], model, here.architecture, context.memo) if here else None


def require_class(model: ModelDescription) -> None:
    """Raise UsageError where the weights are known, and nothing says of which class they are."""
    if model.tensors is not None and not model.says_class:
        where = f"{model.path} has" if model.path else "the model comes with"
        cure = "bring its config.json along, or name a class of your own: `architecture` of download"
        raise UsageError(f"{where} no config.json, so nobody knows the class of its weights", cure)


def agreed_here(model: ModelDescription, context: CheckContext) -> Agreement | None:
    """As `agreed`; None where the class is trusted code that comes with the download."""
    try:
        return agreed(model, sources_of(context))
    except UsageError:
        if not (context.trust.remote_code and (model.config or {}).get("auto_map")):
            raise
        return None


def agreed(model: ModelDescription, sources: Sources) -> Agreement:
    """How a checkpoint fits the class that will be loaded. Raise InvalidCheckpoint where it does not, and UsageError
    where that class is not known, or its code may not run."""
    from bigpipe.bigmodel.architecture import architecture_of
    from bigpipe.bigmodel.formats import agree

    return agree(model, architecture_of(model, sources), sources.memo)
