"""One small forward through a model whose inputs nobody has given: does it run where it was placed?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bigpipe.errors import StageFailed

from .loading import loaded

if TYPE_CHECKING:
    import torch

TOKENS = 4


def forward_once(model: torch.nn.Module) -> str | None:
    """Runs the model over a few tokens or one empty image or sound. Gives None, or why its inputs are not known.

    Raises StageFailed where the forward reaches for a weight that is placed elsewhere.
    """
    import torch

    inputs = _inputs(model)
    if inputs is None:
        return f"the inputs of {type(model).__name__} are not known here"
    try:
        with torch.inference_mode():
            model(**inputs) if isinstance(inputs, dict) else model(inputs)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        if "meta" in str(error):
            raise StageFailed(
                f"{type(model).__name__} uses a weight outside the module that holds it: {str(error).splitlines()[0]}",
                "name the class of the block around that module in no_split_module_classes, so that it stays whole",
            ) from error
        if hasattr(model, "main_input_name"):
            raise
        return f"{type(model).__name__} does not take a batch of tokens: {error}"
    return None


def _inputs(model: Any) -> dict[str, torch.Tensor] | torch.Tensor | None:
    """transformers' models say what they take; of others it is tried whether they take tokens."""
    import torch

    device = loaded(model).device
    tokens = torch.ones((1, TOKENS), dtype=torch.int64, device=device)
    name = getattr(model, "main_input_name", None)
    if name is None:
        return tokens
    config, dtype = model.config, next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    made: dict[str, torch.Tensor] = {}
    if name == "input_ids":
        made["input_ids"] = tokens
    elif name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        side = getattr(vision, "image_size", None) or 224
        height, width = side if isinstance(side, list | tuple) else (side, side)
        image = (1, getattr(vision, "num_channels", 3), height, width)
        made["pixel_values"] = torch.zeros(image, dtype=dtype, device=device)
    elif name == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        sound = (1, config.num_mel_bins, 2 * config.max_source_positions)
        made["input_features"] = torch.zeros(sound, dtype=dtype, device=device)
    elif name == "input_values":
        made["input_values"] = torch.zeros((1, 16_000), dtype=dtype, device=device)
    else:
        return None
    if getattr(config, "is_encoder_decoder", False):
        made["decoder_input_ids"] = tokens[:, :1]
    return made
