"""Prompts as tokens, by the tokenizer that lies beside a model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.architecture import Architecture, describe_architecture, position_limit, read_request
from bigpipe.bigmodel.checkpoint import ModelDescription
from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import UsageError

from .rows import Row

if TYPE_CHECKING:
    import torch

TOKENIZER_FILES = (
    "tokenizer*", "*vocab*", "merges.txt", "*.model", "*.tiktoken", "*.spm", "*.tokenizer", "*.codes", "tekken.json",
    "byte_maps.json", "dict.txt", "emoji.json",
)  # fmt: skip
"""One of the files that any tokenizer of transformers names, and no other does."""
WEIGHT_FILES = ("*.safetensors", "*.bin")
OWN_FUNCTION = "use the task `module:function` with a function of yours, called (model, rows, **generation)"
DOWNLOAD = "download it with the model (`include`), or use the task `module:function`"


def require_tokenizer(model: ModelDescription) -> None:
    """Raise UsageError for a model of a class of its own, and for a directory with weights and without a tokenizer.
    Before a download a directory may hold the config alone: that says nothing."""
    if model.custom is not None:
        name = model.custom.get("class")
        raise UsageError(f"the task needs a model of transformers; this one is of the class {name}", OWN_FUNCTION)
    if model.path is not None and has_weights(model) and not _holds(model.path, TOKENIZER_FILES):
        raise UsageError(f"the task needs a tokenizer, and {model.path} has none", DOWNLOAD)


def known_architecture(model: ModelDescription, sources: Sources) -> Architecture | None:
    """Return what the model consists of; None where its config, or code of its own that is trusted, is not here yet.
    Raise UsageError for a model that is none of transformers', and as `describe_architecture` does."""
    if not model.config:
        return None
    library = read_request(model.config).library
    if library != "transformers":
        raise UsageError(f"the task needs a model of transformers; this one is of {library}", OWN_FUNCTION)
    source = model.path if model.path is not None and sources.trust_remote_code else model.config
    try:
        return describe_architecture(source, sources=sources)
    except UsageError:
        if sources.trust.remote_code and "auto_map" in model.config:
            return None
        raise


def has_weights(model: ModelDescription) -> bool:
    """Return whether its directory is a whole checkpoint: what is not in it is nowhere."""
    return model.path is not None and _holds(model.path, WEIGHT_FILES)


def _holds(directory: Path, patterns: Sequence[str]) -> bool:
    return any(True for pattern in patterns for _ in directory.glob(pattern))


def load_tokenizer(path: Path, sources: Sources) -> Any:
    """Return the tokenizer of the checkpoint directory, able to pad. Raise UsageError where there is none."""
    from transformers import AutoTokenizer

    try:
        if not _holds(path, TOKENIZER_FILES):  # transformers would make an empty one
            raise OSError("there are no files of one")
        trusted = sources.trust_remote_code
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=trusted)
    except Exception as error:  # a foreign file may make foreign code raise anything
        first = str(error).strip().partition("\n")[0]
        raise UsageError(f"{path} has no tokenizer that can be used: {first}", DOWNLOAD) from error
    if tokenizer.pad_token is None:  # padding is masked: any token serves
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def encode(tokenizer: Any, row: Row) -> list[int]:
    """Return the token ids of the prompt. Raise ValueError where it is empty. A list of messages goes through the
    model's chat template, which transformers runs in a sandbox."""
    chat = not isinstance(row.prompt, str)
    text = tokenizer.apply_chat_template(row.prompt, tokenize=False, add_generation_prompt=True) if chat else row.prompt
    tokens: list[int] = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    if not tokens:
        raise ValueError("the prompt is empty")
    return tokens


def pad(tokenizer: Any, encoded: list[list[int]], side: str, device: torch.device) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `attention_mask`, [rows, longest] int64 on `device`, padded on the `side` named."""
    mask: Any = {"return_attention_mask": True}  # some tokenizers' files leave it out
    padded = tokenizer.pad({"input_ids": encoded}, padding_side=side, return_tensors="pt", **mask)
    return {name: padded[name].to(device) for name in ("input_ids", "attention_mask")}


def check_length(model: Any, tokens: int, new: int = 0) -> None:
    """Raise ValueError for a text beyond the positions of a model: it fails, on a GPU for good, or goes on with
    nonsense."""
    limit = position_limit(model.config.to_dict())
    if limit is not None and tokens + new > limit:
        ones, cure = (f" and {new} new ones", " or max_new_tokens") if new else ("", "")
        raise ValueError(f"{tokens} tokens{ones} are more than the model's {limit} positions: shorten the prompt{cure}")
