"""What is done with a batch of prompts: a task is a value, found by its name.

A built-in task is one file and its name in `registry`; any other is `module:name` in a trusted module, where the name
is that of a `Task` or of a plain function.
"""

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .arguments import sequences_of
    from .diffusing import computing_dtype, load_pipeline
    from .processing import load_processor, require_library, require_processor
    from .promptfiles import READERS, Wording, read_rows, require_pyarrow
    from .registry import TASKS, BuiltIn, built_in, find_task, require_known, task_arguments
    from .requests import URLS, Requests, request_reader, response
    from .rows import (
        Prompts,
        Row,
        named_files,
        read_prompts,
        require_fetched,
        require_writable,
        template_parts,
        textless,
    )
    from .sounds import read_sound, sound_seconds
    from .task import OVERFLOWS, Answer, Answerer, Arguments, ResultFile, Task, TaskOptions, faults, refuse_arguments
    from .text_generation import own_arguments
    from .tokenizing import (
        ANSWERED,
        OTHER_TOKENIZER,
        Asking,
        Bounded,
        beyond,
        ending,
        known_architecture,
        load_tokenizer,
        refuse_looking_ahead,
        require_going_on,
        require_template,
        require_tokenizer,
        vocabulary,
    )

__getattr__, __all__ = face(__name__)
