"""One small forward through a model whose inputs nobody has given: does it run where it was placed?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .loading import loaded

if TYPE_CHECKING:
    import torch


INPUTS = (TypeError, ValueError, AttributeError, LookupError, AssertionError)
"""What a forward raises that misses an input, or gets one that it is not made for."""


def forward_once(model: torch.nn.Module) -> str | None:
    """Run the model over a few tokens or one empty image or sound. Return None, or why its inputs are not known: it
    takes several, or others. Raise UsageError where the forward reaches for a weight that is streamed, RuntimeError
    where a model of transformers does not run where it was placed."""
    import torch

    inputs = _inputs(model)
    if inputs is None:
        return f"the inputs of {type(model).__name__} are not known here"
    try:
        with torch.inference_mode():
            model(**inputs) if isinstance(inputs, dict) else model(inputs)
    except (RuntimeError, *INPUTS) as error:
        if isinstance(error, RuntimeError) and hasattr(model, "main_input_name"):
            raise
        given = f"{' and '.join(inputs)} alone" if isinstance(inputs, dict) else "a batch of tokens"
        return f"{type(model).__name__} does not take {given}: {error}"
    return None


def _inputs(model: Any) -> dict[str, torch.Tensor] | torch.Tensor | None:
    """transformers' models say what they take; of others it is tried whether they take tokens."""
    import torch

    device = loaded(model).homes.main
    tokens = torch.ones((1, 4), dtype=torch.int64, device=device)
    name = getattr(model, "main_input_name", None)
    if name is None:
        return tokens
    made = {name: tokens}
    if name != "input_ids":
        shape = _empty_shape(name, model.config)
        if shape is None:
            return None
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        made = {name: torch.zeros(shape, dtype=dtype, device=device)}
    if getattr(model.config, "is_encoder_decoder", False):
        made["decoder_input_ids"] = tokens[:, :1]
    return made


def _empty_shape(name: str, config: Any) -> tuple[int, ...] | None:
    """Of one image or sound, as the argument of that name takes it. What sees may have a config of its own."""
    if name == "pixel_values":
        vision = getattr(config, "vision_config", None) or getattr(config, "encoder", config)
        side = getattr(vision, "image_size", None) or 224
        return (1, getattr(vision, "num_channels", 3), *(side if isinstance(side, list | tuple) else (side, side)))
    if name == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        return (1, config.num_mel_bins, 2 * config.max_source_positions)
    return (1, 16_000) if name == "input_values" else None
