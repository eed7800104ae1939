"""text-generation: `{"text": …}`, the continuation of each prompt without the prompt; where several are asked for, all
of them under `texts` besides."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict

from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import UsageError

from .arguments import GENERATION_CONFIG, OFFLOADED, as_floats, check_names, check_values, said_by_config
from .task import OVERFLOWS, Answer, Answerer, Arguments, Task, TaskOptions, seeds_of
from .together import afresh, counts_padding, most_together, pads_ordinarily
from .tokenizing import (
    OWN_FUNCTION,
    check_length,
    embedded,
    encode,
    has_weights,
    known_architecture,
    load_tokenizer,
    pad,
    require_template,
    require_tokenizer,
)

if TYPE_CHECKING:
    import torch

    from bigpipe.bigmodel.checkpoint import ModelDescription

    from .rows import Row

BY_THE_CLOCK = {"max_time": None}
"""What a model's own file may end texts by: how far they come depends on the machine, and on what else it does."""
_seeds: ContextVar[Sequence[int]] = ContextVar("seeds", default=())
"""Of the rows of the batch that this thread generates."""
_broken: ContextVar[list[torch.Tensor] | None] = ContextVar("broken", default=None)
"""Whether a score that this thread generates by was no number so far, a bool where it was computed."""


class Generation(Arguments):
    """Arguments of transformers' `generate`, as GenerationConfig documents them: `do_sample`, `temperature`, `top_p`,
    `num_beams`, `stop_strings` … `num_return_sequences` gives `texts` too."""

    model_config = ConfigDict(extra="allow")


def _check_model(model: ModelDescription, arguments: Mapping[str, Any], sources: Sources) -> None:
    architecture = known_architecture(model, sources)
    if architecture is not None and architecture.config.get("num_mel_bins"):
        raise UsageError(f"{architecture.class_name} hears, and reads no prompts", OWN_FUNCTION)
    check_generation(model, arguments, sources)


def check_generation(model: ModelDescription, arguments: Mapping[str, Any], sources: Sources) -> None:
    """Raise UsageError for a model that makes no text, and for arguments of `generate` that do not go with it."""
    require_tokenizer(model)
    architecture = known_architecture(model, sources)
    if architecture is not None and not (architecture.generates and architecture.output_embedding):
        cause = f"{architecture.class_name} generates no text"
        cure = "take a model that does, the task feature-extraction, or `module:function`"
        raise UsageError(cause, cure, field="task")
    config = architecture.config if architecture else None
    own, file = own_arguments(model)
    check_values(arguments, own, sources, config, file)


def own_arguments(model: ModelDescription) -> tuple[Mapping[str, Any] | None, str]:
    """Return what the model's own file says to `generate`, and the file's name; None where it is not here yet. Raise
    InvalidCheckpoint for a file that is none."""
    from bigpipe.bigmodel.checkpoint import MAX_CONFIG, read_json

    if model.path is not None and (model.path / GENERATION_CONFIG).is_file():
        return read_json(model.path / GENERATION_CONFIG, model.path, MAX_CONFIG), GENERATION_CONFIG
    return (said_by_config(model.config or {}) if has_weights(model) else None), "config.json"


@dataclass(frozen=True, slots=True)
class Encoding:
    """Rows as a model reads them."""

    inputs: dict[str, torch.Tensor]
    """By the names of `forward`, `input_ids` among them, where the model computes, padded where texts begin (before an
    encoder-decoder: where they end)."""
    tokens: list[int]
    """Of each row, without padding."""


def require_generate(model: Any) -> None:
    """Raise UsageError for a loaded model that has no `generate` of transformers'."""
    if not hasattr(model, "generate") or not hasattr(model, "generation_config"):
        raise UsageError(f"{type(model).__name__} has no `generate` of transformers'", OWN_FUNCTION)


def _bind(model: Any, path: Path, options: TaskOptions, sources: Sources) -> Answerer:
    require_generate(model)
    tokenizer = load_tokenizer(path, sources, options.bounded, embedded(model))
    # A decoder goes on where the prompt ends, so that is where all rows must meet.
    side = "right" if getattr(model.config, "is_encoder_decoder", False) else "left"

    def read(rows: Sequence[Row]) -> Encoding:
        encoded = encode(tokenizer, rows, options.bounded, going_on=True)
        return Encoding(pad(model, tokenizer, encoded, side), [len(each["input_ids"]) for each in encoded])

    return generator(model, tokenizer, read, options, options.arguments)


def generator(
    model: Any, tokenizer: Any, read: Callable[[Sequence[Row]], Encoding], options: TaskOptions,
    arguments: Mapping[str, Any], apart: Callable[[Row], bool] = lambda row: False,
) -> Answerer:  # fmt: skip
    """Return what answers rows with the text that the model makes of each. read: how it reads them, which raises
    ValueError for rows that it cannot. arguments: of `generate`, which the model has. apart: rows for which it gives
    different answers are not read together."""
    from bigpipe.bigmodel.execution import loaded

    goes_on, given = not model.config.is_encoder_decoder, as_floats(arguments)
    draw_alone(model)
    most, begin, ordinary = most_together(model), afresh(model), pads_ordinarily(tokenizer)
    asked = {**BY_THE_CLOCK, "max_new_tokens": options.max_new_tokens, "pad_token_id": tokenizer.pad_token_id, **given}
    if isinstance(watermark := asked.get("watermarking_config"), dict):
        from transformers import WatermarkingConfig

        asked["watermarking_config"] = WatermarkingConfig.from_dict(watermark)
    own = model.generation_config.to_dict()
    if loaded(model).homes.main.type == "cpu":
        asked |= _offloaded_nowhere({**own, **asked})

    def answer(rows: Sequence[Row]) -> list[Answer]:
        parts: dict[str, list[Row]] = {}
        for row in rows:
            parts.setdefault(json.dumps([apart(row), _without_seed(row)], sort_keys=True), []).append(row)
        found = {row.index: made for part in parts.values() for row, made in zip(part, alike(part), strict=True)}
        return [found[row.index] for row in rows]

    def alike(rows: Sequence[Row]) -> list[Answer]:
        """Of rows that ask for the same."""
        import torch

        settings = _settled(asked, given, _without_seed(rows[0]))
        settled = {**own, **settings}
        if len(rows) > 1 and _one_by_one(settled):
            return [alike([row])[0] for row in rows]
        if settled.get("stop_strings"):
            settings["tokenizer"] = tokenizer
        cut, length = _cutter(settled, tokenizer), settings["max_new_tokens"]
        found = read(rows)
        alone = max(found.tokens) + length > most or counts_padding(settled, goes_on, ordinary)
        if alone and len({*found.tokens}) > 1:
            return [alike([row])[0] for row in rows]
        if goes_on:
            check_length(model, max(found.tokens), length)
        else:  # what is read and what is made have positions of their own
            check_length(model, max(found.tokens), encoded=True)
            check_length(model, 1, length)
        seeds = [(row.arguments or {}).get("seed", options.seed + row.index) for row in rows]
        begin()
        with torch.inference_mode(), drawing(seeds), computing_numbers():
            torch.manual_seed(seeds[0])
            made = model.generate(**found.inputs, **settings)
        made = getattr(made, "sequences", made)  # of a model whose own file asks for more than tokens
        start = found.inputs["input_ids"].shape[1] if goes_on else 1  # an encoder-decoder's first token is given
        with options.bounded("the tokenizer of the model"):
            ended = [cut(tokens, start) for tokens in made.tolist()]
            each = len(ended) // len(rows)
            texts = [ended[first : first + each] for first in range(0, len(ended), each)]
            return [
                _answer(tokenizer, row, made, read) for row, made, read in zip(rows, texts, found.tokens, strict=True)
            ]

    return answer


def _without_seed(row: Row) -> dict[str, Any]:
    """What a request asks of `generate`, but for its seed: rows that differ in no more are computed together."""
    return {name: value for name, value in (row.arguments or {}).items() if name != "seed"}


def _settled(asked: Mapping[str, Any], given: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the stage, over them those of a request. given: what somebody wrote. A request that samples
    knows no other bound than its own, and one that does not none at all."""
    unset: dict[str, Any] = {}
    if own.get("do_sample") is True:
        unset = {"top_k": given.get("top_k", 0)}
    elif own.get("do_sample") is False:
        unset = dict.fromkeys(("temperature", "top_p", "top_k"))
    return {**asked, **unset, **own}


def _offloaded_nowhere(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Where the CPU computes, keys and values lie in RAM anyway: what they are asked to be there."""
    name = str(settings.get("cache_implementation"))
    here = name.removeprefix(OFFLOADED)
    return {} if here == name else {"cache_implementation": here.lstrip("_") or None}


def _one_by_one(settings: Mapping[str, Any]) -> bool:
    """Does transformers draw for the whole batch, or take no batch?"""
    draws_beams = settings.get("do_sample") and (settings.get("num_beams") or 1) > 1
    guesses = settings.get("prompt_lookup_num_tokens") or settings.get("assistant_early_exit")
    return bool(draws_beams or guesses)


def _answer(tokenizer: Any, row: Row, found: list[tuple[list[int], bool]], read: int) -> Answer:
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens, _ in found]
    more: dict[str, Any] = {"texts": texts} if len(texts) > 1 else {}
    if row.arguments is not None:
        more["finish_reason"] = "stop" if found[0][1] else "length"
    return Answer({"text": texts[0], **more}, sum(len(tokens) for tokens, _ in found), read)


def _cutter(settings: Mapping[str, Any], tokenizer: Any) -> Callable[[list[int], int], tuple[list[int], bool]]:
    """Return what takes all tokens of a row and where those made begin, and gives the latter up to the end of the text,
    with what ended it, and whether something did. What follows is padding, which need be no token that decoding leaves
    out."""
    import torch
    from transformers import StopStringCriteria

    ends, padding, stops = settings.get("eos_token_id"), settings.get("pad_token_id"), settings.get("stop_strings")
    last = frozenset(ends if isinstance(ends, list) else [ends])
    stopped = StopStringCriteria(tokenizer, stops) if stops else None

    def cut(tokens: list[int], start: int) -> tuple[list[int], bool]:
        made = tokens[start:]
        end = next((place for place, token in enumerate(made, 1) if token in last), 0)
        if stopped and not end:
            padded = len(list(takewhile(lambda token: token == padding, reversed(made))))
            # Without a token that ends texts transformers pads none: behind a stop it goes on with the longest
            first = len(made) - padded if ends is not None else 1
            for stop in range(max(first, 1), len(made) + 1):
                if stopped(torch.tensor([tokens[: start + stop]]), None)[0]:
                    return made[:stop], True
        return made[: end or len(made)], bool(end)

    return cut


TASK = Task(
    name="text-generation", bind=_bind, arguments=Generation, check_arguments=check_names, check_model=_check_model,
    row_check=require_template, makes_tokens=True, side_by_side=True,
)  # fmt: skip


def draw_alone(model: Any) -> None:
    """From here on `model.generate` looks at its scores inside `computing_numbers`, and draws the tokens of each text
    from a generator of its own, inside `drawing`. After all processors that transformers puts in order, the token is
    chosen by the Gumbel-max rule (Maddison et al. 2014, arXiv 1411.0030), which draws exactly from the softmax of the
    scores. Beams are drawn by transformers, and so is all else with a transformers that is built otherwise."""
    ordinary = getattr(model, "_get_logits_processor", None)
    if ordinary is None:
        return

    def processors(*arguments: Any, **named: Any) -> Any:
        found, seeds = ordinary(*arguments, **named), _seeds.get()
        config = named.get("generation_config") or arguments[0]
        if (broken := _broken.get()) is not None:
            found.insert(0, _observer(broken))
        if seeds and config.do_sample and (config.num_beams or 1) == 1:
            found.append(_row_sampler(seeds, config.num_return_sequences or 1))
        return found

    model._get_logits_processor = processors


@contextmanager
def drawing(seeds: Sequence[int]) -> Iterator[None]:
    """Inside, and in this thread alone, a row's texts are drawn by its seed."""
    before = _seeds.set(seeds)
    try:
        yield
    finally:
        _seeds.reset(before)


@contextmanager
def computing_numbers() -> Iterator[None]:
    """Raise ValueError at the end where texts were generated in this thread by scores that are infinite or no numbers:
    what is likeliest of these means nothing. Asked once, lest a GPU waits at each token."""
    broken: list[torch.Tensor] = []
    before = _broken.set(broken)
    try:
        yield
    finally:
        _broken.reset(before)
    if broken and bool(broken[0]):
        raise ValueError(f"the model's scores are infinite or no numbers, and say no token: {OVERFLOWS}")


def _observer(broken: list[torch.Tensor]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    import torch

    def observe(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """−∞ is what no token can be, and is a score."""
        wrong = ~(scores < torch.inf).all()
        broken[:] = [wrong.logical_or(*broken) if broken else wrong]
        return scores

    return observe


def _row_sampler(seeds: Sequence[int], texts: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    import torch

    generators = [torch.Generator().manual_seed(own) for seed in seeds for own in seeds_of(seed, texts)]

    def choose(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[rows · texts, vocabulary] → the same, with all but the token drawn at −∞."""
        uniform = torch.stack([torch.rand(scores.shape[1], generator=each, dtype=torch.float64) for each in generators])
        noise = -torch.log(-torch.log(uniform.clamp_min(torch.finfo(torch.float64).tiny)))
        chosen = (scores.double() + noise.to(scores.device)).argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)

    return choose
