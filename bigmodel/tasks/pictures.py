"""Pictures that rows are or name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .processing import reading
from .rows import Row


def read_picture(path: Path, name: str) -> Any:
    """Return the picture in a file, upright, in RGB. name: as a row gives it. Raise ValueError for what is none."""
    from PIL import Image, ImageOps

    with reading(name, "picture"), Image.open(path) as image:
        return _of_bytes(ImageOps.exif_transpose(image)).convert("RGB")


def _of_bytes(image: Any) -> Any:
    """With a byte for each channel: Pillow cuts off wider numbers where they are converted, to white or black."""
    if image.mode.startswith("I;16"):
        return image.convert("I").point(lambda value: value * (255 / 65535) + 0.5).convert("L")
    if image.mode in ("I", "F"):
        raise ValueError(
            f"nobody knows which of its numbers is white (mode {image.mode}): save it with 8 bits a channel"
        )
    return image


def named_pictures(row: Row, column: str) -> list[str]:
    """Return the files of the pictures that a row is about, in their order: the one that it is, those that the parts of
    its chat name, or those that its `column` names, one or a list. Raise UsageError where it names none, or what is no
    file."""
    if row.reads == "picture":
        return [str(row.prompt)]
    parts = picture_parts(row.prompt)
    named = [name for part in parts if (name := _named(part)) is not None]
    given = row.data.get(column, [])
    beside = given if isinstance(given, list) else [given]
    if named and beside:
        raise row.wrong(f"its chat names pictures, and so does its {column!r}", "name them in one of the two")
    found = named or beside
    if not found:
        cause = f"there is no {column!r}, which names its picture"
        raise row.wrong(cause, f"give every prompt the field {column}: a file, or a list of files")
    if parts and len(parts) != len(found):
        raise row.wrong(f"its chat has {len(parts)} places for pictures, and {len(found)} are named", "name as many")
    for name in found:
        if not isinstance(name, str) or not name:
            raise row.wrong(f"{name!r:.60} is named for a picture", "name a file")
        if "://" in name or name.startswith("data:"):
            raise row.wrong(f"{name:.60} is an address", "download the picture first, and name its file")
    return found


def picture_parts(prompt: Any) -> list[Mapping[str, Any]]:
    """Return the parts of a chat that stand for pictures."""
    contents = [message.get("content") for message in prompt] if isinstance(prompt, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part for part in parts if isinstance(part, Mapping) and part.get("type") in ("image", "image_url")]


def _named(part: Mapping[str, Any]) -> Any:
    """As chats of transformers name it, or those of OpenAI."""
    for field in ("path", "image", "url", "image_url"):
        if (name := part.get(field)) is not None:
            return name.get("url") if isinstance(name, Mapping) else name
    return None
