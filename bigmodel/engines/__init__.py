"""Who answers a task's rows: the model in this process, or a server that speaks OpenAI's API; an engine is a value,
found by its name.

    transformers   the ranks hold the model
    openai         an endpoint that is there already
    vllm           a server of vLLM's, started here for as long as it is asked
"""

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .endpoint import Endpoint, NoAnswer
    from .engine import Engine, Wanted
    from .registry import ENGINES, EngineName, engine_settings, find_engine

__getattr__, __all__ = face(__name__)
