"""Prompts as tokens, by the tokenizer that lies beside a model of transformers."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.architecture import looks_ahead, text_config
from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import UsageError
from bigpipe.modules import foreign
from bigpipe.sizes import counted

if TYPE_CHECKING:
    import torch

    from bigpipe.bigmodel.architecture import Architecture
    from bigpipe.bigmodel.checkpoint import ModelDescription

    from .rows import Row

Encoded = Mapping[str, Sequence[int]]
"""A text as a tokenizer gives it: `input_ids` and, by the tokenizer, `token_type_ids` and others, of one length."""
MODEL_INPUTS = ("input_ids", "token_type_ids")
"""What of it a model reads, besides the mask that comes with padding."""
Bounded = Callable[[str], AbstractContextManager[None]]
"""Around what a model's tokenizer and chat template do; see `TaskOptions`."""
TOKENIZER_FILES = (
    "tokenizer*", "*vocab*", "merges.txt", "*.model", "*.tiktoken", "*.spm", "*.tokenizer", "*.codes", "tekken.json",
    "byte_maps.json", "dict.txt", "emoji.json",
)  # fmt: skip
"""One of the files that any tokenizer of transformers names, and no other does."""
UNLIMITED = 10**9
"""Tokens: a tokenizer whose files name no limit says 10³⁰."""
WEIGHT_FILES = ("*.safetensors", "*.bin")
ANSWERED = {"add_generation_prompt": True}
"""How a chat ends that is to be answered, as arguments of `apply_chat_template`."""
OWN_FUNCTION = "use the task `module:function` with a function of yours, called (model, rows, **generation)"
DOWNLOAD = "bring its files along with the model (`include` of download)"


@dataclass(frozen=True, slots=True)
class Asking:
    """Who asks for a model: errors speak of it, and of what else it would take."""

    what: str = "the task"
    otherwise: str = OWN_FUNCTION

    def refuse_other(self, kind: str) -> UsageError:
        """Return the error for a model that is none of transformers'."""
        return UsageError(f"{self.what} needs a model of transformers; this one is of {kind}", self.otherwise)


TASK = Asking()


def require_tokenizer(model: ModelDescription, asking: Asking = TASK, called: str = "the model") -> None:
    """Raise UsageError for a model of a class of its own, and for one that comes without a tokenizer. called: what an
    error calls it that is not here yet."""
    if model.own_class is not None:
        raise asking.refuse_other(f"the class {model.own_class}")
    names = names_of(model)
    if names is not None and not _any(names, TOKENIZER_FILES):
        raise UsageError(f"{asking.what} needs a tokenizer, and {model.path or called} has none", DOWNLOAD)


def require_template(model: ModelDescription) -> Callable[[Row], None]:
    """Return what raises UsageError for a row that is a chat, where the model's directory has no template that makes a
    text of it."""
    has_template = cache(partial(_has_template, model))

    def check(row: Row) -> None:
        if not isinstance(row.prompt, str) and not has_template():
            cause = "this is a chat, and the model's tokenizer has no chat template"
            raise row.wrong(cause, "write it as a text, or add chat_template.jinja to the model")
        if not isinstance(row.prompt, str):
            _ = row.tools  # which raises for what is none

    return check


def refuse_chats(model: ModelDescription) -> Callable[[Row], None]:
    """Return what raises UsageError for a row that is a chat, which a task cannot read."""

    def check(row: Row) -> None:
        if not isinstance(row.prompt, str):
            raise row.wrong("this is a chat, and the task reads texts", "write it as one text")

    return check


def check_text_model(model: ModelDescription, arguments: Mapping[str, Any], sources: Sources) -> None:
    """Raise UsageError for a model that reads no text, or has no tokenizer."""
    require_tokenizer(model)
    architecture = known_architecture(model, sources)
    if architecture is not None and not text_config(architecture.config).get("vocab_size"):
        raise UsageError(f"{architecture.class_name} reads no text", OWN_FUNCTION)


def require_going_on(
    model: ModelDescription, sources: Sources, asking: Asking = TASK, *, field: str = ""
) -> Architecture | None:
    """Return what the model consists of; None where that is not known yet. Raise UsageError for a model that does not
    go on with the text it reads: an encoder, or one that reads a text apart from what follows."""
    architecture = known_architecture(model, sources, asking)
    if architecture is not None and not (architecture.generates and architecture.output_embedding):
        cause = f"{architecture.class_name} does no {asking.what}: it makes no text"
        raise UsageError(cause, asking.otherwise, field=field)
    if architecture is not None and architecture.config.get("is_encoder_decoder"):
        cause = f"{architecture.class_name} does no {asking.what}: it reads a prompt apart from what follows"
        raise UsageError(cause, "take a model that goes on with its prompt", field=field)
    if architecture is not None:
        refuse_looking_ahead(architecture, asking, field=field)
    return architecture


def refuse_looking_ahead(architecture: Architecture, asking: Asking = TASK, *, field: str = "") -> None:
    """Raise UsageError for a model that sees the token which it is asked about."""
    if (told := looks_ahead(architecture.config)) is not None:
        cause = f"{architecture.class_name} does no {asking.what}: it reads a text in both directions ({told})"
        raise UsageError(cause, "take a model that reads forwards only, such as OPT, GPT-2 or Llama", field=field)


def _has_template(model: ModelDescription) -> bool:
    """Also where a file that may hold one is not here yet."""
    from bigpipe.bigmodel.checkpoint import MAX_CONFIG, read_json

    names = names_of(model)
    if names is None or _any(names, ("chat_template.*", "additional_chat_templates*")):
        return True
    settings = [name for name in ("tokenizer_config.json", "processor_config.json") if name in names]
    path = model.path
    return any(path is None or read_json(path / name, path, MAX_CONFIG).get("chat_template") for name in settings)


def known_architecture(model: ModelDescription, sources: Sources, asking: Asking = TASK) -> Architecture | None:
    """Return what the model consists of; None where its config, or code of its own that is trusted, is not here yet.
    Raise UsageError for a model that is none of transformers', and as `describe_architecture` does."""
    from bigpipe.bigmodel.architecture import describe_architecture, read_request

    if not model.config:
        return None
    library = read_request(model.config).library
    if library != "transformers":
        raise asking.refuse_other(library)
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


def names_of(model: ModelDescription) -> Collection[str] | None:
    """Of all files that the model has. None: not known; before a download a directory may hold the config alone."""
    if model.names is not None:
        return model.names
    return os.listdir(model.path) if model.path is not None and has_weights(model) else None


def _any(names: Collection[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def load_tokenizer(path: Path, sources: Sources, bounded: Bounded, limit: int | None = None) -> Any:
    """Return the tokenizer of the checkpoint directory, able to pad for a model with embeddings of `limit` tokens;
    None: nobody knows of how many. Raise UsageError where there is none."""
    from transformers import AutoTokenizer

    try:
        if not _holds(path, TOKENIZER_FILES):  # transformers would make an empty one
            raise OSError("there are no files of one")
        trusted = sources.trust_remote_code
        with bounded(f"loading the tokenizer of {path}"):
            tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=trusted)
    except Exception as error:  # a foreign file may make foreign code raise anything
        first = str(error).strip().partition("\n")[0]
        raise UsageError(f"{path} has no tokenizer that can be used: {first}", DOWNLOAD) from error
    if tokenizer.pad_token is None or (limit is not None and tokenizer.pad_token_id >= limit):
        # Padding is masked: any token serves
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    broken = foreign(f"{path} has a tokenizer that cannot be used", "mend its tokenizer_config.json")
    with broken, bounded(f"trying the tokenizer of {path}"):
        tokenizer.pad({"input_ids": [tokenizer("a")["input_ids"]]})
    return tokenizer


def encode(
    tokenizer: Any, rows: Sequence[Row], bounded: Bounded, most: int | None = None, *, going_on: bool = False,
    names: Sequence[str] = ("input_ids",),
) -> list[Encoded]:  # fmt: skip
    """Return the `input_ids` of each prompt, at `most` so many, and what else `names` asks for. Raise ValueError where
    one is empty. A list of messages goes through the model's chat template, which transformers runs in a sandbox.
    going_on: as in `text_of`."""
    cut = {} if most is None else {"truncation": True, "max_length": most}
    encoded: list[Encoded] = []
    with bounded("the tokenizer, or the chat template, of the model"):
        for special, alike in groupby((text_of(tokenizer, row, going_on=going_on) for row in rows), itemgetter(1)):
            texts = [text for text, _ in alike]
            found = tokenizer(texts, add_special_tokens=special, **cut)  # at once: each call takes its time
            encoded += [{name: found[name][number] for name in names} for number in range(len(texts))]
    if not all(each["input_ids"] for each in encoded):
        raise ValueError("the prompt is empty")
    return encoded


def text_of(tokenizer: Any, row: Row, *, going_on: bool = False) -> tuple[str, bool]:
    """Return a prompt as text, and whether special tokens are still to be added: a chat template writes them itself.
    going_on: does something follow? Then a chat whose last message is the assistant's is left open behind it."""
    if isinstance(row.prompt, str):
        return row.prompt, True
    opened = ending(row) if going_on else ANSWERED
    return str(tokenizer.apply_chat_template(row.prompt, tools=row.tools, tokenize=False, **opened)), False


def ending(row: Row) -> Mapping[str, bool]:
    """Return how a chat ends, as arguments of `apply_chat_template`: as transformers' pipelines end it, which go on
    with a last message of the assistant's. A request of OpenAI's API asks for a message of its own."""
    last = row.prompt[-1] if isinstance(row.prompt, list) and row.prompt else None
    begun = isinstance(last, Mapping) and last.get("role") == "assistant" and row.arguments is None
    return {"continue_final_message": True} if begun else ANSWERED


def added_behind(tokenizer: Any) -> int:
    """Return how many tokens a tokenizer puts after a text, such as an end of its own (`add_eos_token`)."""
    whole, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    begins = (start for start in range(len(whole) - len(bare) + 1) if whole[start : start + len(bare)] == bare)
    start = next(begins, None) if bare else None
    return 0 if start is None else len(whole) - len(bare) - start


def encode_texts(
    tokenizer: Any, texts: Sequence[str | tuple[str, str]], bounded: Bounded, **asked: Any
) -> list[Encoded]:
    """Return each text, or pair of texts, as the model of an encoder reads it, with its special tokens. asked: what the
    tokenizer is to give besides. Raise ValueError where one is empty."""
    pairs = [(text,) if isinstance(text, str) else text for text in texts]
    if not all(text for pair in pairs for text in pair):
        raise ValueError("the text is empty")
    with bounded("the tokenizer of the model"):
        found = tokenizer(*map(list, zip(*pairs, strict=True)), **asked)  # at once: each call takes its time
    return [{name: values[number] for name, values in found.items()} for number in range(len(pairs))]


def embedded(model: Any) -> int | None:
    """Return how many tokens a loaded model has embeddings of; None where that is no table of its vocabulary."""
    import torch

    try:
        table = model.get_input_embeddings()
    except NotImplementedError:  # CANINE hashes its letters
        return None
    size = getattr(model.config.get_text_config(), "vocab_size", None)
    return _rows_of((table.num_embeddings, 1), size) if isinstance(table, torch.nn.Embedding) else None


def vocabulary(architecture: Architecture) -> tuple[int | None, int | None]:
    """Return how many tokens a model has embeddings of, and how many it predicts; None where that is no table of its
    vocabulary."""
    heads = (architecture.input_embedding, architecture.output_embedding)
    found = [architecture.specs.get(f"{head}.weight") for head in heads]
    size = text_config(architecture.config).get("vocab_size")
    read, made = (_rows_of(tensor.shape if tensor else (), size) for tensor in found)
    return read, made


def _rows_of(shape: Sequence[int], size: object) -> int | None:
    """shape: of a table's weight. size: what the config calls the vocabulary's."""
    return shape[0] if len(shape) == 2 and isinstance(size, int) and shape[0] >= size else None


def beyond(tokenizer: Any, tokens: Sequence[int], limit: int | None) -> str | None:
    """Return why a model of `limit` tokens fails at these, on a GPU for good; None where it does not."""
    if limit is None or not tokens or (last := max(tokens)) < limit:
        return None
    text = tokenizer.convert_ids_to_tokens(int(last))
    return f"the tokenizer makes {text!r} token {last} of {len(tokenizer)}, and the model has {limit} tokens"


OTHER_TOKENIZER = (
    "take the tokenizer that belongs to the model, or give the model rows for it (`resize_token_embeddings` of"
    " transformers) and save it with them"
)


def pad(model: Any, tokenizer: Any, encoded: Sequence[Encoded], side: str) -> dict[str, torch.Tensor]:
    """Return those of `MODEL_INPUTS` that are there, and `attention_mask`, [rows, longest] int64, where the model takes
    them, padded on the `side` named. Raise ValueError for a token of which the model has no embedding: it fails, on a
    GPU for good."""
    import torch

    from bigpipe.bigmodel.execution import loaded

    if cause := beyond(tokenizer, [token for each in encoded for token in each["input_ids"]], embedded(model)):
        raise ValueError(f"{cause}: {OTHER_TOKENIZER}")
    fills = {"input_ids": tokenizer.pad_token_id, "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0)}
    lengths, most = [len(each["input_ids"]) for each in encoded], longest(encoded)
    read = {name: ([each[name] for each in encoded], fills[name]) for name in MODEL_INPUTS if name in encoded[0]}
    read["attention_mask"] = ([[1] * length for length in lengths], 0)

    def filled(values: Sequence[int], fill: int) -> list[int]:
        rest = [fill] * (most - len(values))
        return [*rest, *values] if side == "left" else [*values, *rest]

    return {
        name: torch.tensor([filled(values, fill) for values in rows]).to(loaded(model).homes.main)
        for name, (rows, fill) in read.items()
    }


def longest(encoded: Sequence[Encoded]) -> int:
    """Return the tokens of the longest text."""
    return max(len(each["input_ids"]) for each in encoded)


def check_length(model: Any, tokens: int, new: int = 0, *, encoded: bool = False, otherwise: str = "") -> None:
    """Raise ValueError for a text beyond the positions of a model: it fails, on a GPU for good, or goes on with
    nonsense. encoded: is it read by the encoder of an encoder-decoder alone? otherwise: what else helps."""
    from bigpipe.bigmodel.architecture import position_limit, read_limit

    limit = (read_limit if encoded else position_limit)(model.config.to_dict())
    if limit is not None and tokens + new > limit:
        ones, cure = (f" and {new} new ones", " or max_new_tokens") if new else ("", otherwise)
        raise ValueError(
            f"{counted(tokens, 'token')}{ones} are more than the model's {limit} positions: shorten the prompt{cure}"
        )
