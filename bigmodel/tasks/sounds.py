"""Files of sound as samples: read without ffmpeg, one channel, at the rate that a model hears."""

from __future__ import annotations

import math
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from mmap import ACCESS_COPY, mmap
from pathlib import Path
from typing import TYPE_CHECKING

from bigpipe.bigmodel.sources import Sources

from .processing import file_of, reading
from .rows import Row

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

LOWPASS_WIDTH, ROLLOFF = 6, 0.99
"""Zero crossings of the sinc on each side, and the part of the lower rate's band that is kept, as in torchaudio."""
OGG_PAGE = 27 + 255 + 255 * 255
"""Bytes of a page of Ogg, at most."""
UNKNOWN = 2**31 - 2**16
"""Bytes of a file from which on nobody has known how long it would be."""
EXTENSIBLE, WHOLE_NUMBERS = (0xFFFE).to_bytes(2, "little"), (1).to_bytes(2, "little")
"""Formats of .wav: WAVE_FORMAT_EXTENSIBLE, whose true format is a GUID behind the rest, and WAVE_FORMAT_PCM."""
GUID = bytes.fromhex("000000001000800000aa00389b71")
"""What follows the two bytes of a format in its GUID (RFC 2361)."""
MOST = 2**26
"""Elements of the filters, which two rates with no common factor would make as large as their product."""


def read_sound(row: Row, sources: Sources, rate: int) -> NDArray[numpy.float32]:
    """Return a row's sound, [samples] between -1 and 1, at `rate` Hz; of several channels their mean. Raise ValueError
    for a file that cannot be read, or holds nothing."""
    with reading(row.prompt, "sound"):
        samples, found = _read(file_of(row, sources))
        if not len(samples):
            raise ValueError("it holds no samples")
        return resample(samples, found, rate)


def sound_seconds(row: Row, sources: Sources) -> float:
    """Return how long a row's sound is, in seconds, by its header. Raise ValueError for a file that cannot be read."""
    with reading(row.prompt, "sound"):
        path = file_of(row, sources)
        _require_whole(path)
        if find_spec("soundfile") is None:
            with _opened_wav(path) as file:
                most = path.stat().st_size // (file.getsampwidth() * file.getnchannels())
                return min(file.getnframes(), most) / file.getframerate()
        import soundfile

        with soundfile.SoundFile(str(path)) as sound:
            return float(sound.frames / sound.samplerate)


def _read(path: Path) -> tuple[NDArray[numpy.float32], int]:
    """soundfile reads many formats; Python's own `wave` reads whole numbers in .wav alone. Raise ValueError for a file
    that is cut short, of which both read what is left."""
    _require_whole(path)
    if find_spec("soundfile") is None:
        return _read_wav(path)
    import soundfile

    with soundfile.SoundFile(str(path)) as file:
        samples = file.read(dtype="float32", always_2d=True)
        if len(samples) < file.frames:
            raise ValueError(f"it is cut short: {len(samples)} of {file.frames} samples are there")
        return samples.mean(1), file.samplerate


def _require_whole(path: Path) -> None:
    """Raise ValueError where a file of RIFF or AIFF (of its first eight bytes, the last four are the size of the rest),
    or the last page of Ogg (RFC 3533, 6), says that it is longer than it is. A size of nothing, or of all that 31 or 32
    bits hold, is that of who wrote into a pipe."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        file.seek(max(0, size - OGG_PAGE))
        tail = file.read()
    told = size
    if head[:4] in (b"RIFF", b"FORM"):
        told = 8 + int.from_bytes(head[4:], "little" if head[:1] == b"R" else "big")
        told = size if told == 8 or told > UNKNOWN else told
    elif head[:4] == b"OggS" and (page := tail[tail.rfind(b"OggS") :]):
        told = size - len(page) + 27 + page[26] + sum(page[27 : 27 + page[26]]) if len(page) > 26 else size + 1
    if told > size:
        raise ValueError(f"it is cut short: {size} bytes of {told} are there")


@contextmanager
def _opened_wav(path: Path) -> Iterator[wave.Wave_read]:
    """A file of whole numbers, also of the extensible format, in which ffmpeg writes more than two channels, 16 bits or
    48 kHz, and which `wave` knows from Python 3.12 on. Raise ValueError for another one."""
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_COPY) as mapped:
        place = _format_place(mapped)
        if mapped[place : place + 2] == EXTENSIBLE and mapped[place + 24 : place + 40] == WHOLE_NUMBERS + GUID:
            mapped[place : place + 2] = WHOLE_NUMBERS
        try:
            with wave.open(mapped) as sound:  # type: ignore[call-overload]
                yield sound
        except wave.Error as error:
            if not str(error).startswith("unknown"):
                raise
            cause = f"Python reads .wav of whole numbers alone ({error})"
            raise ValueError(f"{cause}: pip install 'bigpipe-ml[sounds]'") from error


def _format_place(mapped: mmap) -> int:
    """Where what a file of RIFF says of its format begins; behind the end, where it says nothing."""
    place = 12
    while place + 8 <= len(mapped) and mapped[place : place + 4] != b"fmt ":
        size = int.from_bytes(mapped[place + 4 : place + 8], "little")
        place += 8 + size + size % 2
    return place + 8


def _read_wav(path: Path) -> tuple[NDArray[numpy.float32], int]:
    import numpy

    with _opened_wav(path) as file:
        width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
        stored = numpy.frombuffer(file.readframes(file.getnframes()), numpy.uint8).reshape(-1, width)
    if width == 1:  # 8 bits have no sign, all others have
        whole = (stored[:, 0].astype(numpy.int32) - 128) << 24
    else:
        wide = numpy.zeros((len(stored), 4), numpy.uint8)
        wide[:, 4 - width :] = stored
        whole = wide.view("<i4")[:, 0]
    samples = (whole / 2.0**31).astype(numpy.float32)
    return samples.reshape(-1, channels).mean(1), rate


def resample(samples: NDArray[numpy.float32], rate: int, wanted: int) -> NDArray[numpy.float32]:
    """Return [samples] at another rate, by a sinc under a squared cosine (Smith, Digital Audio Resampling; the same as
    torchaudio.functional.resample with its defaults). Raise ValueError for rates whose filters would be too large."""
    import torch

    if rate == wanted:
        return samples
    common = math.gcd(rate, wanted)
    old, new = rate // common, wanted // common
    band = min(old, new) * ROLLOFF
    width = math.ceil(LOWPASS_WIDTH * old / band)
    if new * (2 * width + old) > MOST:
        raise ValueError(f"{rate} Hz are not resampled to {wanted}: convert it to a usual rate")
    places = torch.arange(-width, width + old, dtype=torch.float64) / old
    times = ((places[None] - torch.arange(new, dtype=torch.float64)[:, None] / new) * band).clamp(
        -LOWPASS_WIDTH, LOWPASS_WIDTH
    )
    filters = torch.sinc(times) * torch.cos(times * math.pi / LOWPASS_WIDTH / 2) ** 2 * band / old
    padded = torch.nn.functional.pad(torch.from_numpy(samples), (width, width + old))
    made = torch.nn.functional.conv1d(padded[None, None], filters.float()[:, None], stride=old)
    found: NDArray[numpy.float32] = made[0].T.reshape(-1)[: math.ceil(new * len(samples) / old)].numpy()
    return found
