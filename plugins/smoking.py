"""How the built-in kinds do little of what a recipe asks for, where it is only tried: their `Stage.smoke`.

What comes in is small already, and described by its forecast; few rows, few steps and few tokens are left.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from bigpipe.bigmodel.checkpoint import ModelDescription
from bigpipe.bigmodel.formats import known_modules
from bigpipe.bigmodel.placement import devices_of, one_device
from bigpipe.errors import DoesNotFit, UsageError
from bigpipe.orchestrator.stage import SMOKE, ForecastContext, Params

from .dispatch_needs import placing_of, predicted_weights, request_of
from .library import sources_of
from .wired import agreed, attached, single_model

if TYPE_CHECKING:
    from bigpipe.bigmodel.architecture import Architecture

    from .dispatch import DispatchParams
    from .distributed_infer import InferParams
    from .download import DownloadParams
    from .evaluate import EvaluateParams
    from .finetune import FinetuneParams
    from .merge import MergeParams
    from .quantize import QuantizeParams
    from .save import SaveParams
    from .shard import ShardParams

ROWS = 4
"""Of prompts."""
EXAMPLES = 16
"""Rows that are learnt."""
STEPS = 2
BATCH = 2
TOKENS = 4
"""Made of a prompt."""
WINDOW = 64
"""Tokens of a text that a model reads at a time."""
TEXT = 4 * WINDOW
"""Tokens of a text that is evaluated."""

PARTS = 128
"""Of a model, as finely as it is shared out among devices."""
WIDEST = 8
"""Bytes of a number that is loaded from one byte."""

P = TypeVar("P", bound=Params)
Weights = TypeVar("Weights", "ShardParams", "MergeParams")


def _with(params: P, **changes: object) -> P:
    """Changed where it is another value: what nobody wrote stays so."""
    different = {name: value for name, value in changes.items() if getattr(params, name) != value}
    return params.model_copy(update=different)


def download(params: DownloadParams, context: ForecastContext) -> DownloadParams:
    """A small model of the same kind. Raise as `miniatures.miniature`."""
    from .downloading import require_miniature, small_synthetic

    if params.synthetic is not None:
        return _with(params, synthetic=small_synthetic(params, context))
    if params.architecture is not None:
        cause = f"nobody but {params.architecture.class_} knows what a small model of it is"
        cure = "give it a small config and `synthetic` weights by a parameter: -p"
        raise UsageError(cause, cure, field="architecture")
    small = _with(params, miniature=True)
    require_miniature(small, context)
    return small


def in_several_files(params: Weights, context: ForecastContext) -> Weights:
    """Files so small that there are several, after a cast to half the width too."""
    described = context.described("model", ModelDescription)
    whole = described.nbytes if described else None
    return _with(params, max_shard_size=min(params.max_shard_size, whole // 4 or 1)) if whole else params


def quantize(params: QuantizeParams, context: ForecastContext) -> QuantizeParams:
    """Of the modules that are left alone, those that the small model has, too: it has fewer layers."""
    model, named = single_model(context), (params.skip_modules, params.keep_in_fp32_modules)
    if not any(named) or model is None or model.tensors is None:
        return params
    architecture = agreed(model, sources_of(context)).architecture
    return _with(
        params,
        skip_modules=known_modules(params.skip_modules, architecture),
        keep_in_fp32_modules=known_modules(params.keep_in_fp32_modules, architecture),
    )


def dispatch(params: DispatchParams, context: ForecastContext) -> DispatchParams:
    """The devices that are named and there are, each with a part of the model."""
    return _spread(_with(params, batch_size=min(params.batch_size, BATCH)), context)


def infer(params: InferParams, context: ForecastContext) -> InferParams:
    from .distributed_infer import makes_as_told

    few = {"limit": min(params.limit or ROWS, ROWS)}
    if makes_as_told(params):  # requests say their own lengths
        few["max_new_tokens"] = min(params.max_new_tokens, TOKENS)
    if params.micro_batches is not None:
        few["micro_batches"] = min(params.micro_batches, BATCH)
    return _with(params, batch_size=min(params.batch_size, BATCH), **few)


def finetune(params: FinetuneParams, context: ForecastContext) -> FinetuneParams:
    return _with(
        params,
        limit=min(params.limit or EXAMPLES, EXAMPLES),
        max_steps=min(params.max_steps or STEPS, STEPS),
        num_train_epochs=None,
        batch_size=min(params.batch_size, BATCH),
        gradient_accumulation_steps=min(params.gradient_accumulation_steps, BATCH),
        max_length=min(params.max_length, WINDOW),
        save_steps=1,
    )


def evaluate(params: EvaluateParams, context: ForecastContext) -> EvaluateParams:
    window = min(params.sequence_length or WINDOW, WINDOW)
    return _with(
        params,
        sequence_length=window,
        stride=min(params.stride, window) if params.stride else None,
        batch_size=min(params.batch_size, BATCH),
        max_tokens=min(params.max_tokens or TEXT, TEXT),
    )


def save(params: SaveParams, context: ForecastContext) -> SaveParams:
    """To a directory of the run's own."""
    folder = Path(context.environment[SMOKE]) / "saved" / context.node
    return type(params)(to=str(folder), overwrite=params.overwrite, card=params.card)


def _spread(params: DispatchParams, context: ForecastContext) -> DispatchParams:
    """Every device that is named and there takes a part of the model, as far as the mode can have it so; what is meant
    for GPUs that are not there goes to RAM."""
    model = single_model(context)
    if model is None or model.tensors is None:
        return params
    agreement = agreed(model, sources_of(context))
    tensors = {tensor.name for tensor in agreement.architecture.tensors()}
    dtypes = {name: dtype for name, dtype in params.special_dtypes.items() if name in tensors}
    params = _with(params, special_dtypes=dtypes)
    if isinstance(params.device_map, dict):
        return _with(params, device_map=_known_parts(params.device_map, agreement.architecture, context))
    if params.max_memory is None:
        return params
    attempt = placing_of(model, agreement, context, attached(context, model))
    most = 2 * (model.nbytes or 0) * WIDEST
    caps: dict[int | str, int] = {
        _here(device, context): max(size, most) for key, size in params.max_memory.items() for device in devices_of(key)
    }

    def used(caps: Mapping[int | str, int]) -> dict[str, int]:
        try:
            return predicted_weights(attempt(request_of(_with(params, max_memory=dict(caps)))))
        except DoesNotFit:
            return {}

    whole = sum(used(caps).values())
    for device, following in pairwise([*caps]):
        tried = ({**caps, device: whole * part // PARTS} for part in range(PARTS - 1, 0, -1))
        caps = next((each for each in tried if str(following) in used(each)), caps)
    return _with(params, max_memory=caps)


def _here(device: int | str, context: ForecastContext) -> int | str:
    there = [gpu.index for gpu in context.machine.gpus]
    return device if isinstance(device, str) or device in there else "cpu"


def _known_parts(
    device_map: Mapping[str, int | str], architecture: Architecture, context: ForecastContext
) -> dict[str, int | str]:
    """Those of a map that the small model has, too: it has fewer layers."""
    tensors = [tensor.name for module in architecture.modules for tensor in module.tensors]
    return {
        part: one_device(_here(one_device(device), context))
        for part, device in device_map.items()
        if not part or any(name == part or name.startswith(f"{part}.") for name in tensors)
    }
