"""Small pictures and sounds, each another one."""

from __future__ import annotations

import math
import random
import struct
import wave
from pathlib import Path
from typing import Any


def write_picture(path: Path, seed: int = 0, width: int = 40, height: int = 30, mode: str = "RGB") -> Path:
    """A picture of coloured blocks, in the format that the ending names."""
    from PIL import Image

    dice = random.Random(seed)  # noqa: S311
    picture = Image.new("RGB", (4, 4))
    picture.putdata([(dice.randrange(256), dice.randrange(256), dice.randrange(256)) for _ in range(16)])
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(path)
    return path


def tones(seconds: float, rate: int, seed: int = 0) -> list[float]:
    """Samples between -1 and 1 of a few sine waves below 4 kHz."""
    dice = random.Random(seed)  # noqa: S311
    waves = [(dice.uniform(100, 3500), dice.uniform(0, 6)) for _ in range(4)]
    return [sum(math.sin(6.283185 * f * n / rate + p) for f, p in waves) / 5 for n in range(int(seconds * rate))]


def write_wav(path: Path, samples: list[float], rate: int = 16_000, channels: int = 1) -> Path:
    """16-bit PCM; all channels alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, 2, rate, 0, "NONE", ""))
        file.writeframes(b"".join(struct.pack("<h", round(value * 32767)) * channels for value in samples))
    return path


def make_vit(folder: Path, **changes: Any) -> Path:
    """A tiny ViT that knows four kinds of pictures, with its processor."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    from .models import make_with_head

    path = make_with_head(folder, "vit", "ForImageClassification", tokenizer=False, num_labels=4, **changes)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(path)
    return path
