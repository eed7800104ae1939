"""`finetune`: low-rank adapters (LoRA) trained by peft, on a model that stays as it is stored, over ranks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from bigpipe.orchestrator.stage import (
    Bytes,
    ContentField,
    Json,
    Machine,
    Metrics,
    Params,
    Planning,
    Port,
    Ranks,
    Stage,
    late,
)

Data = Annotated[str | list[str | dict[str, Any]], ContentField("file")]


class LoraParams(Params):
    """peft's LoraConfig, as far as it is offered."""

    r: int = Field(default=8, ge=1, le=2**16)
    """The rank."""
    lora_alpha: int = Field(default=16, ge=1)
    """The adapter counts lora_alpha / r times."""
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    """Share of an adapter's inputs that is left out, at random, while it is trained."""
    target_modules: list[str] | str | None = None
    """Ends of the names of linear modules, a regular expression over whole names, or `all-linear`. null: peft's own
    choice for the architecture."""


class FinetuneParams(Params):
    task: Literal["causal-lm", "seq2seq-lm", "speech-seq2seq"] = "causal-lm"
    """What is learnt: to continue texts, to make a text of another, or to write down what is said (Whisper)."""
    data: Data
    """A file (`.jsonl .ndjson .json .csv .tsv .parquet .txt`), a glob of them, or a list of rows."""
    column: str = "text"
    """The field of a row that holds the text, or the chat, to learn."""
    input_column: str | None = Field(None, min_length=1)
    """The field that holds what the text is made of: of speech-seq2seq the file of the sound, from the recipe's
    directory. null: `input`, or `audio`."""
    eval_data: Data | None = None
    """Rows as in `data`, for `eval_loss`."""
    limit: int | None = Field(None, ge=1)
    """How many rows of each are taken, from the first on; null: all."""
    lora: LoraParams = LoraParams()
    """The adapter's shape; one that goes on from an `adapter` has that one's."""
    max_steps: int | None = Field(None, ge=1)
    """How often the adapter is changed; this or num_train_epochs."""
    num_train_epochs: int | None = Field(None, ge=1)
    """How often all rows are gone through."""
    learning_rate: float = Field(2e-4, gt=0)
    """Of AdamW without weight decay, at the beginning; it falls linearly to 0."""
    batch_size: int = Field(1, ge=1)
    """Rows that a rank computes together."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Batches of each rank between two changes of the adapter."""
    gradient_checkpointing: bool = True
    """Compute activations again rather than keep them: less memory, a third more time."""
    max_length: int = Field(512, ge=2)
    """Tokens of a text, at most; longer ones are cut."""
    end: bool = False
    """Does each text that is no chat end with the token that the model ends its answers with? The tokenizers of most
    models add none: without it, a model that learns questions with answers is not taught where an answer ends."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Of the adapter's first values, the order of rows, and dropout."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """What to compute in. null: on a CPU float32; on a GPU as stored, bfloat16 in place of float16."""
    save_steps: int = Field(10, ge=1)
    """Steps between two states that a run which was killed goes on from. The result is the same."""

    @model_validator(mode="after")
    def _one_length(self) -> FinetuneParams:
        if (self.max_steps is None) == (self.num_train_epochs is None):
            raise ValueError("either max_steps or num_train_epochs says how long to train; write one of them")
        if self.task == "causal-lm" and self.input_column is not None:
            raise ValueError("input_column has no meaning for causal-lm, which learns texts alone; leave it out")
        return self


class Losses(Metrics):
    first: float
    """Of the first step: the mean of a token."""
    last: float
    """Of the last step."""
    curve: list[list[float]] = Field(default_factory=list)
    """[step, loss] from the first step to the last, 200 at most."""


class FinetuneMetrics(Metrics):
    loss: Losses | None = None
    eval_loss: float | None = None
    """The mean of a token over `eval_data`, after the last step."""
    steps: int = 0
    trainable_parameters: int = 0
    tokens_per_second: float = 0.0
    """Learnt from, of all ranks together."""
    peak: dict[str, Bytes] = Field(default_factory=dict)
    """Bytes by device: a GPU's number, or `cpu` for the resident memory of the largest rank."""


def in_words(metrics: Mapping[str, Json]) -> str:
    loss = metrics.get("loss") or {}
    words = [f"loss {loss['first']:.4g} → {loss['last']:.4g} in {metrics.get('steps')} steps"] if loss else []
    words += [f"eval_loss {metrics['eval_loss']:.4g}"] if metrics.get("eval_loss") is not None else []
    return ", ".join([*words, f"{metrics.get('trainable_parameters', 0):,} parameters"])


def unmeasured(params: FinetuneParams, ports: Collection[str], metric: str) -> tuple[str, str] | None:
    if metric == "eval_loss" and params.eval_data is None:
        return "`eval_data`", "write `eval_data: …` under `with`, rows that are not learnt"
    return None


def facts(params: FinetuneParams, machine: Machine) -> Mapping[str, Json]:
    """What decides the dtype where none is given: whether there is a GPU."""
    return {} if params.dtype else {"gpu": bool(machine.gpus)}


STAGE = Stage(
    kind="finetune",
    version=5,
    params=FinetuneParams,
    metrics=FinetuneMetrics,
    inputs={"model": Port("checkpoint"), "adapter": Port("adapter", optional=True)},
    output="adapter",
    run=late("bigpipe.plugins.finetuning:run"),
    forecast=late("bigpipe.plugins.training_needs:forecast"),
    runs_in="ranks",
    ranks=Ranks(
        prepare=late("bigpipe.plugins.finetuning:prepare"),
        finish=late("bigpipe.plugins.finetuning:finish"),
        counted=True,
        mixes=False,
    ),
    planning=Planning(
        check=late("bigpipe.plugins.finetuning:check"),
        leads_to=late("bigpipe.plugins.finetuning:leads_to"),
        facts=facts,
        apart=lambda params: ("save_steps",),
        smaller=("batch_size", "max_length", "dtype"),
        heeds_code=True,
        extras=late("bigpipe.plugins.extras:of_training"),
    ),
    packages=("torch", "transformers", "tokenizers", "bitsandbytes", "peft"),
    smoke=late("bigpipe.plugins.smoking:finetune"),
    reproducible=False,
    unmeasured=unmeasured,
    title="Trains a low-rank adapter (LoRA) on a model, plain or quantized, over one or more ranks.",
    result_line=in_words,
)
