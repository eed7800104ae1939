"""text2text-generation: `{"text": …}`, what an encoder-decoder such as T5 or BART makes of each prompt. It is
text-generation but for the models that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import UsageError

from . import text_generation
from .tokenizing import known_architecture

if TYPE_CHECKING:
    from bigpipe.bigmodel.checkpoint import ModelDescription


def _check_model(model: ModelDescription, arguments: Mapping[str, Any], sources: Sources) -> None:
    text_generation.TASK.check_model(model, arguments, sources)
    architecture = known_architecture(model, sources)
    if architecture is not None and not architecture.config.get("is_encoder_decoder"):
        cause = f"{architecture.class_name} does no text2text-generation: it goes on with its prompt"
        raise UsageError(cause, "use the task text-generation", field="task")


TASK = replace(text_generation.TASK, name="text2text-generation", check_model=_check_model)
