"""What is asked of a fine-tuning, as plain values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from bigpipe.errors import UsageError

TaskName = Literal["causal-lm", "seq2seq-lm", "speech-seq2seq"]


@dataclass(frozen=True, slots=True)
class Lora:
    """peft's LoraConfig, as far as it is offered."""

    r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    target_modules: tuple[str, ...] | str | None = None
    """Ends of the names of modules, or one regular expression over whole names; None: peft's own default."""

    def __post_init__(self) -> None:
        for name in ("r", "lora_alpha"):
            _require_count(name, getattr(self, name))
        if not (type(self.lora_dropout) in (int, float) and 0 <= self.lora_dropout < 1):
            cure = "it must be a number from 0 on, below 1"
            raise UsageError(f"lora_dropout is {self.lora_dropout!r:.60}", cure, field="lora_dropout")


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How it is trained. Ranks are counted in: each of them takes `batch_size` rows at a time."""

    task: TaskName = "causal-lm"
    lora: Lora = field(default_factory=Lora)
    max_steps: int | None = None
    num_train_epochs: int | None = None
    learning_rate: float = 2e-4
    batch_size: int = 1
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = True
    max_length: int = 512
    end: bool = False
    seed: int = 0
    save_steps: int = 10

    def __post_init__(self) -> None:
        if (self.max_steps is None) == (self.num_train_epochs is None):
            raise UsageError(LENGTH, "write one of them", field="max_steps")
        if self.task not in get_args(TaskName):
            raise UsageError(f"task is {self.task!r:.60}", f"use one of {', '.join(get_args(TaskName))}", field="task")
        rate = self.learning_rate
        if not (type(rate) in (int, float) and math.isfinite(rate) and rate > 0):
            raise UsageError(f"learning_rate is {rate!r:.60}", "it must be more than 0", field="learning_rate")
        for name in ("max_steps", "num_train_epochs", *COUNTS):
            if getattr(self, name) is not None or name in COUNTS:
                _require_count(name, getattr(self, name))
        if type(self.end) is not bool:
            raise UsageError(f"end is {self.end!r:.60}", "it must be True or False", field="end")
        if type(self.seed) is not int or not 0 <= self.seed < SEEDS:
            raise UsageError(f"seed is {self.seed!r:.60}", "give a whole number from 0 on, below 2³²", field="seed")

    def seed_of(self, rank: int) -> int:
        """Return what a rank draws from, once the adapter has its first values: a number that numpy takes."""
        return (self.seed + rank) % SEEDS

    def steps(self, rows: int, ranks: int) -> int:
        """Return how many times the adapter is changed."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.num_train_epochs is not None  # noqa: S101 (one of them is given)
        return self.num_train_epochs * self.steps_of_an_epoch(rows, ranks)

    def steps_of_an_epoch(self, rows: int, ranks: int) -> int:
        batches = math.ceil(math.ceil(rows / ranks) / self.batch_size)
        return math.ceil(batches / self.gradient_accumulation_steps)


def _require_count(name: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise UsageError(f"{name} is {value!r:.60}", "it must be 1 or more", field=name)


SEEDS = 2**32
"""Numbers that numpy takes for a seed."""
COUNTS = ("batch_size", "gradient_accumulation_steps", "max_length", "save_steps")
LENGTH = "either max_steps or num_train_epochs says how long to train"
