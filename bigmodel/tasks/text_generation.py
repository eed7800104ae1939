"""text-generation: `{"text": …}`, the continuation of each prompt without the prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.execution import loaded
from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import UsageError

from .rows import Row
from .task import Answer, Answerer, Task, TaskOptions
from .tokenizing import OWN_FUNCTION, encode, load_tokenizer, pad, require_tokenizer

if TYPE_CHECKING:
    import torch


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    if taken := {"max_new_tokens", "seed"} & arguments.keys():
        raise UsageError(f"generation sets {', '.join(sorted(taken))}", "set it as a field of the stage")


def _bind(model: Any, path: Path, options: TaskOptions, sources: Sources) -> Answerer:
    if not hasattr(model, "generate") or not hasattr(model, "generation_config"):
        raise UsageError(f"{type(model).__name__} has no `generate` of transformers'", OWN_FUNCTION)
    tokenizer, goes_on = load_tokenizer(path, sources), not model.config.is_encoder_decoder

    def answer(rows: Sequence[Row]) -> list[Answer]:
        import torch

        encoded = [encode(tokenizer, row) for row in rows]
        if goes_on:
            _check_length(model, max(map(len, encoded)), options.max_new_tokens)
        # A decoder goes on where the prompt ends, so that is where all rows must meet.
        inputs = pad(tokenizer, encoded, "left" if goes_on else "right", loaded(model).homes.main)
        seeds = [options.seed + row.index for row in rows]
        with torch.inference_mode(), draw_alone(model, seeds):
            torch.manual_seed(seeds[0])
            own = {"max_new_tokens": options.max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
            made = model.generate(**inputs, **own, **options.arguments)
        made = made[:, inputs["input_ids"].shape[1] :] if goes_on else made
        if len(made) != len(rows):
            raise UsageError(f"generation gave {len(made)} texts for {len(rows)} prompts", "ask for one per prompt")
        given = 0 if goes_on else 1  # an encoder-decoder's first token
        return [
            Answer({"text": tokenizer.decode(tokens, skip_special_tokens=True)}, _count(model, tokens[given:]))
            for tokens in made.tolist()
        ]

    return answer


TASK = Task(name="text-generation", bind=_bind, check_arguments=_check_arguments, check_model=require_tokenizer)


def _count(model: Any, tokens: list[int]) -> int:
    """Tokens up to the first that ends a text, with it; what follows is padding."""
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    return next((place for place, token in enumerate(tokens, 1) if token in ends), len(tokens))


def _check_length(model: Any, tokens: int, new: int) -> None:
    """Beyond its positions a model fails, on a GPU for good, or goes on with nonsense."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if isinstance(limit, int) and tokens + new > limit:
        cause = f"{tokens} tokens and {new} new ones are more than the model's {limit} positions"
        raise ValueError(f"{cause}: shorten the prompt or max_new_tokens")


@contextmanager
def draw_alone(model: Any, seeds: Sequence[int]) -> Iterator[None]:
    """Inside, `model.generate` draws each row's tokens from a generator of its own. After all processors that
    transformers puts in order, the token is chosen by the Gumbel-max rule (Maddison et al. 2014, arXiv 1411.0030),
    which draws exactly from the softmax of the scores. Beams are drawn by transformers."""
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
