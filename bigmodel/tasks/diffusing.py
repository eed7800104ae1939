"""Pipelines of diffusers: several models in one folder, which their own library puts together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.errors import UsageError
from bigpipe.modules import foreign

from .processing import require_library
from .tokenizing import DOWNLOAD, Bounded

if TYPE_CHECKING:
    from bigpipe.bigmodel.checkpoint import ModelDescription

INDEX = "model_index.json"
"""In the root: the pipeline's class, and of each part its library and class."""
LIBRARIES = ("diffusers", "transformers")
"""Whose classes parts may have; or one that diffusers keeps beside a pipeline of its own."""


def require_pipeline(model: ModelDescription, what: str) -> None:
    """Raise UsageError where `what` cannot be done: diffusers is not installed, or the pipeline's index, where it is
    here, names a class of nobody's but its own, or parts that no safetensors file holds."""
    require_library("diffusers", what)
    if model.path is not None:
        read_index(model.path)
    if model.format not in (None, "safetensors"):
        cause = f"{what} reads safetensors alone, and the pipeline's weights are {model.format}"
        raise UsageError(cause, "take a revision or a `variant` of it that has them")


def read_index(path: Path) -> Mapping[str, Any]:
    """Return what `model_index.json` says. Raise UsageError where it names code of its own, which does not run."""
    from bigpipe.bigmodel.checkpoint import MAX_CONFIG, read_json

    index = read_json(path / INDEX, path, MAX_CONFIG)
    cure = "take a pipeline whose class, and whose parts, are those of diffusers and transformers"
    if not isinstance(index.get("_class_name"), str):
        raise UsageError(f"{path / INDEX} names {index.get('_class_name')!r:.80} for the pipeline's class", cure)
    for name, part in index.items():
        if isinstance(part, list) and not (len(part) == 2 and all(each is None or _is_name(each) for each in part)):
            raise UsageError(f"{path / INDEX} names {part!r:.80} for its {name}", cure)
    return index


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isidentifier()


def computing_dtype(model: ModelDescription, asked: str | None, gpu: bool) -> str:
    """Return what a pipeline computes in. asked: None is float32 on a CPU, on a GPU what most bytes are
    stored in."""
    if asked or not gpu:
        return asked or "float32"
    from bigpipe.bigmodel.checkpoint import tensor_nbytes

    sizes: dict[str, int] = {}
    for dtype, shape in (model.tensors or {}).values():
        sizes[dtype] = sizes.get(dtype, 0) + tensor_nbytes(dtype, shape)
    return max(sizes, key=lambda dtype: sizes[dtype], default="float32")


def load_pipeline(path: Path, dtype: str, device: str, bounded: Bounded) -> Any:
    """Return the pipeline in a directory on `device`, computing in `dtype`. Raise UsageError where there is none that
    can be used. Only classes of diffusers and transformers are made, only safetensors are read, nothing is fetched."""
    import torch

    index, variant = read_index(path), _variant(path)
    with foreign("diffusers is installed, but importing it fails", "python -c 'import diffusers' says why"):
        import diffusers
    for name, part in index.items():
        library = part[0] if isinstance(part, list) else None
        if library not in (None, *LIBRARIES) and not hasattr(diffusers.pipelines, library):
            cause = f"{path / INDEX} takes its {name} from {library}"
            raise UsageError(cause, f"only parts of {' and '.join(LIBRARIES)} are made")
    diffusers.utils.logging.disable_progress_bar()
    broken = foreign(f"{path} has no pipeline that can be used", DOWNLOAD)
    with broken, bounded(f"loading the pipeline of {path}"):
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            str(path), dtype=getattr(torch, dtype), variant=variant, use_safetensors=True,
            local_files_only=True, trust_remote_code=False,
        )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _variant(path: Path) -> str | None:
    """As `fp16`, where some part has no plain weights; diffusers takes the others plain if they lack it. Raise
    UsageError where two such parts have none in common."""
    from bigpipe.bigmodel.checkpoint import variants

    parts: dict[str, list[str]] = {}
    for file in sorted(path.glob("*/*.safetensors")):
        parts.setdefault(file.parent.name, []).append(file.name)
    without_plain = {part: variants(names) for part, names in parts.items() if all(variants([name]) for name in names)}
    if not without_plain:
        return None
    if common := set.intersection(*map(set, without_plain.values())):
        return min(common)
    told = "; ".join(f"{part}: {', '.join(found)}" for part, found in without_plain.items())
    raise UsageError(f"{path}: no variant is one of all its parts ({told})", "take a `variant` that they have, or none")


def longest_prompt(pipeline: Any) -> int | None:
    """Return how many tokens of a prompt the pipeline reads; None where nobody knows. Where it has several tokenizers,
    what the first cuts off another one reads."""
    limits = [each.model_max_length for each in _tokenizers(pipeline)]
    return max(limits, default=None) if all(limit < 10**6 for limit in limits) else None


def count_tokens(pipeline: Any, text: str) -> int:
    """Return the tokens of a prompt, by the tokenizer that makes the fewest."""
    return min((len(each(text)["input_ids"]) for each in _tokenizers(pipeline)), default=0)


def _tokenizers(pipeline: Any) -> list[Any]:
    parts = (part for name, part in pipeline.components.items() if name.startswith("tokenizer"))
    return [part for part in parts if part is not None]
