"""Fine-tuning: low-rank adapters (LoRA, arXiv 2106.09685) trained by peft on a model that stays as it is stored.

    finetune(model, data, out, task="causal-lm", max_steps=100)

`settings` says what is asked for, `targets` which modules get adapters, `examples` makes rows what a model learns from,
`adapting` puts peft's adapter on a loaded model and writes its files, `rehearsing` asks peft about one that is not
loaded, `order` says which rows a step takes, `stepping` is the loop, `saved` what it leaves on the disk, `finetuning`
the whole, and `forecast` the memory it takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .adapting import check_adapter, require_peft
    from .examples import TASKS, check_model, check_rows, input_column_of, read_data, require_sound_reader, sounds_of
    from .finetuning import TrainedAdapter, Work, computing_dtype, finetune, finish_ranks, train_rank
    from .forecast import TrainingMemory, foreseen_adapter, parameters_of, stored_beside, training_memory
    from .settings import Lora, TaskName, Training

__getattr__, __all__ = face(__name__)
