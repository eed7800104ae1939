"""`distributed-infer`: prompts in, one result per prompt out, over as many ranks as asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from bigpipe.bigmodel.engines import EngineName, find_engine
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.tasks import BuiltIn, Task, built_in, faults, require_known
from bigpipe.errors import UsageError
from bigpipe.orchestrator.stage import (
    Bytes,
    Choices,
    Code,
    ContentField,
    Metrics,
    Params,
    Planning,
    Port,
    Ranks,
    Stage,
    late,
)

from .library import dtype_facts


def _known(task: str) -> str:
    try:
        require_known(task)
    except UsageError as error:
        raise ValueError(f"{error.cause}; {error.cure}") from error
    return task


def _template(text: str | None) -> str | None:
    if text is None:
        return None
    from bigpipe.bigmodel.tasks import template_parts

    try:
        template_parts(text)
    except UsageError as error:
        raise ValueError(f"{error.cause.removeprefix('template: ')}; {error.cure}") from error
    return text


class InferParams(Params):
    task: Annotated[BuiltIn | Code, AfterValidator(_known)]
    """What is done, or `module:name`: a function, called (model, rows, **generation) and giving a dict per row, or a
    `Task`."""
    prompts: Annotated[
        str | Annotated[list[str | list[dict[str, Any]] | dict[str, Any]], Field(min_length=1)],
        ContentField("file", names=True),
    ]
    """A file (`.jsonl .ndjson .json .csv .tsv .parquet .txt`), a glob of them, a directory that holds them, or a
    list of texts or chats. Pictures and sounds are files, each of them a row: `pictures/*.png`."""
    column: str = "prompt"
    """The field of each JSON object, or the column of a table, that holds the prompt."""
    row_format: Literal["prompts", "openai-batch"] = "prompts"
    """openai-batch: rows are requests of OpenAI's Batch API, `{"custom_id", "method", "url", "body"}`, and results its
    responses; of text-generation for `/v1/chat/completions` and `/v1/completions`, of feature-extraction for
    `/v1/embeddings`."""
    limit: int | None = Field(None, ge=1)
    """How many rows are taken, from the first on; null: all."""
    template: Annotated[str | None, AfterValidator(_template)] = None
    """The prompt, made of a row's fields: `"Classify: {text}"`. null: the prompt is `column`."""
    batch_size: int = Field(1, ge=1)
    """Prompts that are computed together, at most: those of like length, the same ones whatever the number of ranks."""
    batch_tokens: int | None = Field(None, ge=1)
    """Prompt tokens of a batch at most, padded to its longest; a prompt that is longer is computed alone. A token is
    reckoned as a byte. null: `batch_size` alone bounds a batch."""
    micro_batches: int | None = Field(None, ge=1)
    """Batches that go through streamed layers together, so that one reading of the weights serves them all. null: as
    many as hide the reading, where their keys and values fit. Results are the same."""
    max_new_tokens: int = Field(32, ge=1)
    """The longest continuation; of text-generation, and of a function that takes it."""
    generation: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the task, listed below by its name; those of a function are its own."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of record i: seed + i."""
    dtype: Literal["float64", "float32", "float16", "bfloat16"] | None = None
    """What to compute in. null: as the placement says, else as stored; on a CPU that holds all weights float32, where
    they fit half of its RAM as that and it multiplies much faster in it, measured once for models beyond 256 MiB."""
    split: Literal["queue", "static"] = "queue"
    """How ranks get batches. queue: each takes the next when it has done one, the longest first. static: contiguous
    shares, as accelerate's `split_between_processes` gives them. Results are the same."""
    engine: EngineName = "transformers"
    """Who holds the model. transformers: the ranks. openai: a server that is there and speaks OpenAI's API, of which
    one process asks `serving.concurrency` questions at once; nothing is wired to `model`. vllm: a server of vLLM's,
    which is started on this machine's GPUs and asked in the same way (extra `vllm`)."""
    serving: dict[str, Any] = Field(default_factory=dict)
    """Settings of the engine, listed below by its name."""
    apply_padding: bool = False
    """With `split: static`: every rank computes as many batches; the last one is repeated, and dropped at the merge."""
    max_errors: int = Field(0, ge=0)
    """How many prompts may fail; their results hold the error. One more fails the stage."""
    output_format: Literal["jsonl", "parquet"] = "jsonl"
    """How results are written: lines of JSON, or Parquet, whose columns hold one type each (extra `parquet`)."""
    rows_per_file: int | None = Field(None, ge=1)
    """Rows of each file of results, `results-00001-of-00004.jsonl` …; null: all in one, `results.jsonl`."""

    @model_validator(mode="after")
    def _fields_have_effect(self) -> InferParams:
        if problems := [*_wrong_settings(self), *(_unknown_arguments(self) or (*_idle(self), *_unanswered(self)))]:
            raise ValidationError.from_exception_data("InferParams", problems)
        return self


def _wrong_settings(params: InferParams) -> Iterator[InitErrorDetails]:
    """Each setting of the engine is refused where it stands."""
    model = find_engine(params.engine).settings
    for error in faults(f"engine {params.engine}", model, params.serving, "serving"):
        *loc, name = error.field.split(".")
        value = params.serving if not loc else params.serving.get(name)
        yield _refusal((*loc, name), f"{error.cause}; {error.cure}", value)


def _task(params: InferParams) -> Task | None:
    """A built-in one; None for one of the user's own, which is nobody's to import here."""
    engine = find_engine(params.engine)
    return None if engine.tasks is None and ":" in params.task else engine.find_task(params.task, Sources())


def _unknown_arguments(params: InferParams) -> list[InitErrorDetails]:
    """A task that the engine does not do, and each argument of one that it does, are refused where they stand."""
    try:
        task = _task(params)
    except UsageError as error:
        return [_refusal(("task",), f"{error.cause}; {error.cure}", params.task)]
    if task is None:
        return []
    found = []
    for name, value in params.generation.items():
        try:
            task.require_arguments({name: value})
        except UsageError as error:
            of_key = ("[key]",) if error.field.endswith("[key]") else ()
            found.append(_refusal(("generation", name, *of_key), f"{error.cause}; {error.cure}", value))
    return found


def _idle(params: InferParams) -> Iterator[InitErrorDetails]:
    """Fields that somebody wrote and nothing heeds."""
    idle, task = _idle_where_served(params), _task(params)
    own = task is None
    if task is not None and (task.own_length or not task.makes_tokens):
        makes = "as many tokens as it needs" if task.own_length else "no tokens"
        idle["max_new_tokens"] = f"{params.task} makes {makes}; leave it out"
    if params.row_format == "openai-batch":
        told = "a request says its prompt itself; leave it out"
        idle |= {"column": told, "template": told}
    elif params.template is not None:
        idle["column"] = "the template names the fields that make the prompt; leave one of them out"
    elif not own and isinstance(params.prompts, list) and not any(isinstance(each, dict) for each in params.prompts):
        idle["column"] = "it names a field of objects, and these prompts are texts or chats; leave it out"
    if params.split == "queue" and params.apply_padding:
        idle["apply_padding"] = (
            "ranks take from one queue, and have no shares to pad; say split: static, or leave it out"
        )
    if "chat" in params.serving and params.task != "text-generation":
        why = f"{params.task} asks no chats; leave it out"
        yield _refusal(("serving", "chat"), why, params.serving["chat"])
    for name in (name for name in idle if name in params.model_fields_set):
        yield _refusal((name,), idle[name], getattr(params, name))


def makes_as_told(params: InferParams) -> bool:
    """Return whether `max_new_tokens` alone bounds each answer. Of a function of the user's own only where somebody
    wrote the field: it may not take it. Requests say their own lengths."""
    task = _task(params)
    own = "max_new_tokens" in params.model_fields_set
    heeded = own if task is None else task.makes_tokens and not task.own_length
    return heeded and params.row_format == "prompts"


def _unanswered(params: InferParams) -> Iterator[InitErrorDetails]:
    """What requests cannot be answered with."""
    if params.row_format != "openai-batch":
        return
    from bigpipe.bigmodel.tasks import URLS

    tasks = sorted(set(URLS.values()))
    if params.task not in tasks:
        yield _refusal(("task",), f"requests are answered by {' and '.join(tasks)}", params.task)
    if params.output_format != "jsonl":
        why = "responses of the Batch API are lines of JSON; leave it out"
        yield _refusal(("output_format",), why, params.output_format)
    if (params.generation.get("num_return_sequences") or 1) != 1:
        why = "a request gets one answer; leave num_return_sequences out"
        yield _refusal(("generation", "num_return_sequences"), why, params.generation["num_return_sequences"])


def _idle_where_served(params: InferParams) -> dict[str, str]:
    engine = find_engine(params.engine)
    if engine.serve is None:
        return {}
    ranks = f"engine {params.engine} has no ranks: one process asks; leave it out"
    idle = dict.fromkeys(("micro_batches", "split", "apply_padding"), ranks)
    if params.task != "feature-extraction":
        one = f"engine {params.engine} is asked a prompt at a time, and makes its batches itself; leave it out"
        idle |= dict.fromkeys(("batch_size", "batch_tokens"), one)
    if params.row_format == "openai-batch":
        idle["row_format"] = "requests say how each of them is answered, which only the ranks heed; leave it out"
    if not engine.takes_model:
        idle["dtype"] = "the server computes in what it does; leave it out"
    return idle


def _refusal(loc: tuple[str, ...], why: str, value: Any) -> InitErrorDetails:
    return {"type": PydanticCustomError("value_error", "{error}", {"error": why}), "loc": loc, "input": value}


class RankTime(Metrics):
    began: float
    """Seconds after the first rank began its first batch."""
    ended: float
    """Seconds after the first rank began its first batch."""
    busy: float
    """Seconds in which it computed."""
    prompts: int
    """That it answered."""
    tokens: int
    """Of these."""


class InferMetrics(Metrics):
    prompts: int = 0
    """All of them, with those that failed."""
    errors: int = 0
    """Prompts whose result is an error."""
    tokens: int = 0
    """Made; of scoring those scored; read, where a task does neither."""
    micro_batches: int = 1
    """Batches of a rank that were under way together."""
    tokens_per_second: float = 0.0
    """Of all ranks together, while the slowest was computing."""
    idle: float = 0.0
    """Share of the ranks' time spent waiting for the slowest."""
    timeline: dict[str, RankTime] = Field(default_factory=dict)
    """Rank → when it was at work, in the attempt that finished."""
    prompt_tokens: int = 0
    """Read, as far as the task tells."""
    compute_dtype: str = ""
    """What was computed in."""
    bound_by: str = ""
    """Where layers are streamed: what bounds the speed, `bandwidth`, `compute` or `memory`."""
    limit_tokens_per_second: float | None = None
    """Where layers are streamed: the most that this machine's bandwidths and products allow, all ranks together, of the
    tokens that `tokens` counts."""
    share_of_limit: float | None = None
    """Reached. More than 1 where files came from the page cache."""
    peak: dict[str, Bytes] = Field(default_factory=dict)
    """Bytes by device: a GPU's number, or `cpu` for the resident memory of the largest rank."""


EXTRAS = late("bigpipe.plugins.extras:of_inference")


def _settled(params: InferParams) -> Stage[InferParams]:
    """With ranks and a model; where a server holds it, one process, and a model where it is that server's. A pipeline
    is placed by nobody, and takes no adapter."""
    engine, model = find_engine(params.engine), {"model": Port("checkpoint")}
    task = built_in(params.task)
    if task is not None and task.library == "diffusers":
        return replace(
            STAGE,
            inputs=model,
            run=late("bigpipe.plugins.pipelines:run"),
            forecast=late("bigpipe.plugins.pipelines:forecast"),
            ranks=replace(
                STAGE.ranks,
                prepare=late("bigpipe.plugins.pipelines:prepare"),
                finish=late("bigpipe.plugins.pipelines:finish"),
            ),
            planning=replace(
                STAGE.planning, check=late("bigpipe.plugins.pipelines:check"), leads_to=None, heeds_code=False
            ),
            packages=(*STAGE.packages, "diffusers"),
            settled=None,
        )
    if engine.serve is None:
        return replace(STAGE, inputs={**STAGE.inputs, **model}, settled=None)
    return replace(
        STAGE,
        inputs=model if engine.takes_model else {},
        run=late("bigpipe.plugins.serving:run"),
        forecast=late("bigpipe.plugins.serving:forecast"),
        runs_in="process",
        ranks=Ranks(),
        planning=Planning(
            check=late("bigpipe.plugins.serving:check"), apart=_apart, resumed=_resumed, smaller=(), extras=EXTRAS
        ),
        packages=engine.packages,
        asks=not engine.takes_model,
        settled=None,
    )


STREAMED = ("limit_tokens_per_second", "share_of_limit")
"""What is measured only where layers are streamed."""


def unmeasured(params: InferParams, ports: Collection[str], metric: str) -> tuple[str, str] | None:
    """Whether a placement streams layers, nobody knows before it is there; without one, nothing does."""
    if metric in STREAMED and "placement" not in ports:
        return (
            "a placement",
            "leave it out, or let ranks compute by one that streams layers: wire inputs: placement to a dispatch",
        )
    return None


def _apart(params: InferParams) -> Sequence[str]:
    return [
        "split",
        "apply_padding",
        "micro_batches",
        *(f"serving.{name}" for name in find_engine(params.engine).apart),
    ]


def _resumed(params: InferParams) -> Sequence[str]:
    """How results are written, and how many rows may fail. Which rows there are, too, where each is computed alone: a
    record is of one row by its fields. A picture's or a sound's are its name, and its content may be another."""
    from bigpipe.bigmodel.tasks import READERS

    alone = params.batch_size == 1 and params.batch_tokens is None
    texts = not isinstance(params.prompts, str) or PurePath(params.prompts).suffix.lower() in READERS
    return ["max_errors", "output_format", "rows_per_file", *(("prompts", "limit") if alone and texts else ())]


STAGE = Stage(
    kind="distributed-infer",
    version=14,
    params=InferParams,
    metrics=InferMetrics,
    inputs={
        "model": Port("checkpoint", optional=True),  # that of a server is its own
        "placement": Port("placement", optional=True),
        "adapter": Port("adapter", optional=True),
    },
    output="results",
    run=late("bigpipe.plugins.inferring:run"),
    forecast=late("bigpipe.plugins.inference_needs:forecast"),
    runs_in="ranks",
    ranks=Ranks(
        prepare=late("bigpipe.plugins.inferring:prepare"),
        finish=late("bigpipe.plugins.inferring:finish"),
        replaced=True,
        mixes=False,
    ),
    planning=Planning(
        apart=_apart,
        resumed=_resumed,
        check=late("bigpipe.plugins.inferring:check"),
        facts=dtype_facts,
        leads_to=late("bigpipe.plugins.inference_needs:leads_to"),
        smaller=("batch_size", "batch_tokens", "micro_batches", "max_new_tokens", "dtype"),
        heeds_code=True,
        extras=EXTRAS,
    ),
    settled=_settled,
    choices=(
        Choices(field="task", decides="generation", models=late("bigpipe.bigmodel.tasks:task_arguments")),
        Choices(field="engine", decides="serving", models=late("bigpipe.bigmodel.engines:engine_settings")),
    ),
    packages=("torch", "transformers", "tokenizers", "bitsandbytes"),
    smoke=late("bigpipe.plugins.smoking:infer"),
    unmeasured=unmeasured,
    reproducible=False,
    title="Runs a model over prompts on one or more ranks and gathers one result per prompt.",
)
