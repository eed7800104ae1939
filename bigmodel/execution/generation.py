"""Tasks: what is done with a batch of prompts. Each takes rows and gives one answer per row, in their order.

    text-generation      {"text": …}: the continuation, without the prompt
    feature-extraction   {"features": […]}: one vector per prompt
    module:function      what the user's function gives, called (model, rows, **generation)

Equal batches give equal answers. What is drawn at random depends on seed + index of the row alone, not on its batch.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import UsageError
from bigpipe.trust import Trust

from .loading import loaded
from .prompts import Row

if TYPE_CHECKING:
    import torch

TASKS = ("text-generation", "feature-extraction")
POOLINGS = ("mean", "last", "first")
"""Of a prompt's token vectors: their mean; the last token's, as for decoders; the first's, as for BERT's [CLS]."""


@dataclass(frozen=True, slots=True)
class Answer:
    payload: dict[str, Any]
    tokens: int = 0
    """Made, or for features read."""


Task = Callable[[Sequence[Row]], list[Answer]]


def check_task(task: str, options: Mapping[str, Any], trust: Trust) -> None:
    """Raises UsageError for what can be known to be wrong without a model: no torch."""
    if ":" in task:
        trust.require_module(task, f"task {task}")
    elif task not in TASKS:
        raise UsageError(f"task {task!r} is not known", f"use {', '.join(TASKS)}, or module:function")
    if task == "text-generation" and (taken := {"max_new_tokens", "seed"} & options.keys()):
        raise UsageError(f"generation sets {', '.join(sorted(taken))}", "set it as a field of the stage")
    if task == "feature-extraction":
        if unknown := options.keys() - {"pooling"}:
            raise UsageError(f"feature-extraction has no option {sorted(unknown)[0]!r}", "it takes `pooling` alone")
        if options.get("pooling", "mean") not in POOLINGS:
            raise UsageError(f"pooling {options['pooling']!r} is not known", f"use one of {', '.join(POOLINGS)}")


def make_task(
    task: str,
    model: torch.nn.Module,
    path: Path,
    *,
    max_new_tokens: int = 32,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    sources: Sources = Sources(),
) -> Task:
    """The task, bound to a model that `load` made from `path`, where its tokenizer lies too.

    options: keyword arguments of `generate` or of the function; `pooling` of feature-extraction.
    Raises UsageError where the model or its tokenizer cannot do it.
    """
    options = dict(options or {})
    check_task(task, options, sources.trust)
    if ":" in task:
        return _Function(_import(task, sources.base), model, {"max_new_tokens": max_new_tokens, **options}, seed)
    if task == "text-generation":
        if not hasattr(model, "generate") or not hasattr(model, "generation_config"):
            raise UsageError(
                f"{type(model).__name__} has no `generate` of transformers'",
                "use the task `module:function` with a function of yours, called (model, rows, **generation)",
            )
        return _TextGeneration(model, _tokenizer(path, sources.trust_remote_code), max_new_tokens, options, seed)
    if not hasattr(model, "base_model"):
        raise UsageError(f"{type(model).__name__} is no model of transformers'", "use the task `module:function`")
    return _FeatureExtraction(model, _tokenizer(path, sources.trust_remote_code), options.get("pooling", "mean"))


class _TextGeneration:
    def __init__(self, model: Any, tokenizer: Any, length: int, options: Mapping[str, Any], seed: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.length = length
        self.options = dict(options)
        self.seed = seed
        self.encoder_decoder = bool(model.config.is_encoder_decoder)

    def __call__(self, rows: Sequence[Row]) -> list[Answer]:
        import torch

        encoded = [_encode(self.tokenizer, row) for row in rows]
        if not self.encoder_decoder:
            for row, tokens in zip(rows, encoded, strict=True):
                self._check_length(row, len(tokens))
        # A decoder goes on where the prompt ends, so that is where all rows must meet.
        inputs = _pad(self.tokenizer, encoded, "right" if self.encoder_decoder else "left", loaded(self.model).device)
        seeds = [self.seed + row.index for row in rows]
        with torch.inference_mode(), draw_alone(self.model, seeds):
            torch.manual_seed(seeds[0])
            made = self.model.generate(
                **inputs, max_new_tokens=self.length, pad_token_id=self.tokenizer.pad_token_id, **self.options
            )
        if not self.encoder_decoder:
            made = made[:, inputs["input_ids"].shape[1] :]
        if len(made) != len(rows):
            raise UsageError(f"generation gave {len(made)} texts for {len(rows)} prompts", "ask for one per prompt")
        return [self._answer(tokens) for tokens in made.tolist()]

    def _answer(self, tokens: list[int]) -> Answer:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        start = 1 if self.encoder_decoder else 0  # the decoder's first token was given, not made
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        last = next((place for place, token in enumerate(tokens[start:]) if token in ends), len(tokens) - start - 1)
        return Answer({"text": text}, last + 1)

    def _check_length(self, row: Row, tokens: int) -> None:
        """Beyond its positions a model fails, on a GPU for good, or goes on with nonsense."""
        config = self.model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        if isinstance(limit, int) and tokens + self.length > limit:
            raise ValueError(
                f"{tokens} tokens and {self.length} new ones are more than the model's {limit} positions: "
                "shorten the prompt or max_new_tokens"
            )


class _FeatureExtraction:
    def __init__(self, model: Any, tokenizer: Any, pooling: Literal["mean", "last", "first"]) -> None:
        self.body = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
        self.device = loaded(model).device
        self.tokenizer = tokenizer
        self.pooling = pooling

    def __call__(self, rows: Sequence[Row]) -> list[Answer]:
        import torch

        encoded = [_encode(self.tokenizer, row) for row in rows]
        inputs = _pad(self.tokenizer, encoded, "right", self.device)
        with torch.inference_mode():
            hidden = self.body(**inputs).last_hidden_state.float().cpu()
        vectors = [self._pool(states[: len(tokens)]) for states, tokens in zip(hidden, encoded, strict=True)]
        return [
            Answer({"features": vector.tolist()}, len(tokens)) for vector, tokens in zip(vectors, encoded, strict=True)
        ]

    def _pool(self, states: torch.Tensor) -> torch.Tensor:
        """[tokens, width] float32 → [width]."""
        return {"mean": lambda: states.mean(0), "last": lambda: states[-1], "first": lambda: states[0]}[self.pooling]()


class _Function:
    def __init__(
        self, function: Callable[..., Any], model: torch.nn.Module, options: Mapping[str, Any], seed: int
    ) -> None:
        parameters = inspect.signature(function).parameters
        anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self.function = function
        self.model = model
        self.seed = seed
        self.options = {
            name: value for name, value in options.items() if name != "max_new_tokens" or anything or name in parameters
        }

    def __call__(self, rows: Sequence[Row]) -> list[Answer]:
        import torch

        torch.manual_seed(self.seed + rows[0].index)
        given = [{**row.data, "prompt": row.prompt, "index": row.index, "seed": self.seed + row.index} for row in rows]
        made = self.function(self.model, given, **self.options)
        if not isinstance(made, list) or len(made) != len(rows) or not all(isinstance(entry, dict) for entry in made):
            raise TypeError(f"{self.function.__name__} must give a list of {len(rows)} dicts, one per row")
        for entry in made:
            json.dumps(entry, allow_nan=False)
        return [Answer(dict(entry), entry["tokens"] if isinstance(entry.get("tokens"), int) else 0) for entry in made]


def _import(task: str, base: Path | None) -> Callable[..., Any]:
    if base is not None and str(base) not in sys.path:
        sys.path.insert(0, str(base))
    module, _, name = task.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise UsageError(f"task {task}: {error}", f"put the module into {base}, or install it") from error
    if not callable(found):
        raise UsageError(f"task {task}: the module has no function {name!r}", "check its name")
    function: Callable[..., Any] = found
    return function


TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")


def has_tokenizer(path: Path) -> bool:
    """Is there any file that a tokenizer is made from? transformers makes an empty one where there is none."""
    return any(True for pattern in TOKENIZER_FILES for _ in path.glob(pattern))


def _tokenizer(path: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        if not has_tokenizer(path):
            raise OSError("there are no files of one")
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        first = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"{path} has no tokenizer that can be used: {first}",
            "download it with the model (`include`), or use the task `module:function`",
        ) from error
    if tokenizer.pad_token is None:  # padding is masked: any token serves
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _encode(tokenizer: Any, row: Row) -> list[int]:
    """Token ids. A list of messages goes through the model's chat template, which transformers runs in a sandbox."""
    chat = not isinstance(row.prompt, str)
    text = tokenizer.apply_chat_template(row.prompt, tokenize=False, add_generation_prompt=True) if chat else row.prompt
    tokens: list[int] = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    if not tokens:
        raise ValueError("the prompt is empty")
    return tokens


def _pad(tokenizer: Any, encoded: list[list[int]], side: str, device: torch.device) -> dict[str, torch.Tensor]:
    padded = tokenizer.pad({"input_ids": encoded}, padding_side=side, return_tensors="pt")
    return {name: padded[name].to(device) for name in ("input_ids", "attention_mask")}


@contextmanager
def draw_alone(model: Any, seeds: Sequence[int]) -> Iterator[None]:
    """Inside, `model.generate` draws each row's tokens from a generator of its own.

    After all processors that transformers puts in order, the token is chosen by the Gumbel-max rule (Maddison et al.
    2014, arXiv 1411.0030), which draws exactly from the softmax of the scores. Beams are drawn by transformers.
    """
    ordinary = getattr(model, "_get_logits_processor", None)
    if ordinary is None:  # a transformers that is built otherwise: draws then depend on the batch
        yield
        return

    def processors(*arguments: Any, **named: Any) -> Any:
        found = ordinary(*arguments, **named)
        config = named.get("generation_config") or arguments[0]
        if config.do_sample and (config.num_beams or 1) == 1 and (config.num_return_sequences or 1) == 1:
            found.append(_row_sampler(seeds))
        return found

    model._get_logits_processor = processors
    try:
        yield
    finally:
        del model._get_logits_processor


def _row_sampler(seeds: Sequence[int]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    import torch

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def choose(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[rows, vocabulary] → the same, with all but the token drawn at −∞."""
        uniform = torch.stack([torch.rand(scores.shape[1], generator=each, dtype=torch.float64) for each in generators])
        noise = -torch.log(-torch.log(uniform.clamp_min(torch.finfo(torch.float64).tiny)))
        chosen = (scores.double() + noise.to(scores.device)).argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)

    return choose
