"""image-text-to-text: `{"text": …}`, what a model says of each row's pictures and text; the rest as text-generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict

from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import UsageError

from .arguments import check_names
from .pictures import named_pictures, picture_parts, read_picture
from .processing import load_processor, on_device, require_library, require_processor
from .rows import Row
from .task import Answerer, Arguments, Task, TaskOptions
from .text_generation import Encoding, check_generation, generator, require_generate
from .tokenizing import (
    ANSWERED,
    OWN_FUNCTION,
    Bounded,
    ending,
    known_architecture,
    load_tokenizer,
    require_template,
)

if TYPE_CHECKING:
    from bigpipe.bigmodel.checkpoint import ModelDescription

OWN = frozenset({"image", "text"})
"""Arguments that are not for `generate`."""
PICTURE_TOKENS = 1024
"""Of a picture, as plans reckon; processors make some 200 to 1,500 of one at their usual size."""


class ImageTextToText(Arguments):
    """And arguments of transformers' `generate`, as in text-generation."""

    model_config = ConfigDict(extra="allow")

    image: str = "image"
    """The field of a row that names its picture, a file or a list of files. Parts of a chat may name them too:
    `{type: image, path: cat.png}`."""
    text: str | None = None
    """What is asked of each picture, where the prompts are pictures: `prompts: pictures/*.png`."""


def _files(row: Row, arguments: Mapping[str, Any]) -> list[str]:
    asked = ImageTextToText.model_validate(arguments)
    if row.reads == "picture" and asked.text is None:
        cause = "the prompts are pictures, and nothing is asked of them"
        raise UsageError(cause, "write what under `generation: {text: …}`", field="generation")
    found = named_pictures(row, asked.image)
    return [] if row.reads == "picture" else found


def _length(row: Row, arguments: Mapping[str, Any]) -> int:
    asked = ImageTextToText.model_validate(arguments)
    text = len((asked.text or "").encode()) if row.reads == "picture" else row.nbytes
    return text + PICTURE_TOKENS * len(named_pictures(row, asked.image))


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    check_names(_for_generate(arguments))


def _check_model(model: ModelDescription, arguments: Mapping[str, Any], sources: Sources) -> None:
    require_library("PIL", "image-text-to-text")
    require_processor(model)
    architecture = known_architecture(model, sources)
    if architecture is not None and "vision_config" not in architecture.config:
        cause = f"{architecture.class_name} does not read pictures and texts together"
        raise UsageError(cause, f"take a model that does, such as LLaVA; or {OWN_FUNCTION}", field="task")
    check_generation(model, _for_generate(arguments), sources)


def _for_generate(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in OWN}


def _bind(model: Any, path: Path, options: TaskOptions, sources: Sources) -> Answerer:
    require_library("PIL", "image-text-to-text")
    require_generate(model)
    asked = ImageTextToText.model_validate(options.arguments)
    tokenizer = load_tokenizer(path, sources, options.bounded)
    processor = load_processor("AutoProcessor", path, sources, options.bounded)
    if not hasattr(processor, "tokenizer"):
        cause = f"{path} has a {type(processor).__name__}, which reads pictures alone, or texts"
        raise UsageError(cause, "take a model whose processor reads both")
    processor.tokenizer.pad_token, processor.tokenizer.padding_side = tokenizer.pad_token, "left"

    def read(rows: Sequence[Row]) -> Encoding:
        names = [named_pictures(row, asked.image) for row in rows]
        pictures = [[read_picture((sources.base or Path()) / name, name) for name in each] for each in names]
        texts = [
            _text(processor, row, len(each), asked.text, options.bounded) for row, each in zip(rows, names, strict=True)
        ]
        # As transformers does: what a template writes may have its special tokens already
        bos, whole = tokenizer.bos_token, _is_message(processor, rows[0])
        special = not (whole and bos and texts[0].startswith(bos))
        single = all(len(each) == 1 for each in pictures)
        with options.bounded("the processor of the model"):
            found = processor(
                images=[each[0] for each in pictures] if single else pictures, text=texts, return_tensors="pt",
                padding=True, add_special_tokens=special,
            )  # fmt: skip
        inputs = on_device(model, found)
        return Encoding(inputs, [int(count) for count in found["attention_mask"].sum(-1)])

    arguments = _for_generate(options.arguments)
    return generator(model, tokenizer, read, options, arguments, apart=lambda row: _is_message(processor, row))


def _is_message(processor: Any, row: Row) -> bool:
    """Does it go through the chat template? A text does not that says itself where its pictures stand."""
    if row.reads == "text" and not isinstance(row.prompt, str):
        return True
    token = getattr(processor, "image_token", None)
    return processor.chat_template is not None and not (row.reads == "text" and token and token in row.prompt)


def _text(processor: Any, row: Row, pictures: int, asked: str | None, bounded: Bounded) -> str:
    """What the model reads. A text that does not say itself where its pictures stand is a message, with the pictures
    before it, where the model has a chat template."""
    prompt = asked if row.reads == "picture" else row.prompt
    if not _is_message(processor, row):
        return str(prompt)
    if isinstance(prompt, str):
        parts = [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": prompt}]
        prompt = [{"role": "user", "content": parts}]
    elif not picture_parts(prompt):
        prompt = _with_pictures(prompt, pictures)
    with bounded("the chat template of the model"):
        opened = ending(row) if isinstance(row.prompt, list) else ANSWERED
        return str(processor.apply_chat_template(_plain(prompt), tokenize=False, **opened))


def _with_pictures(chat: Any, pictures: int) -> list[Mapping[str, Any]]:
    """The pictures of a chat that does not say where they stand come before its first message of a user."""
    first = next((number for number, message in enumerate(chat) if message.get("role") == "user"), 0)
    shown = [{"type": "image"} for _ in range(pictures)]
    return [
        {**message, "content": [*shown, *_parts(message.get("content"))]} if number == first else message
        for number, message in enumerate(chat)
    ]


def _plain(chat: Any) -> list[dict[str, Any]]:
    """With every content as parts, as templates of such models want it, and without the names of files."""
    return [{**message, "content": [_part(part) for part in _parts(message.get("content"))]} for message in chat]


def _parts(content: Any) -> list[Any]:
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def _part(part: Any) -> Any:
    return {"type": "image"} if isinstance(part, Mapping) and part.get("type") in ("image", "image_url") else part


TASK = Task(
    name="image-text-to-text", bind=_bind, arguments=ImageTextToText, check_arguments=_check_arguments,
    check_model=_check_model, row_check=require_template, reads=("text", "picture"), files=_files, makes_tokens=True,
    length_of=_length, side_by_side=True,
)  # fmt: skip
