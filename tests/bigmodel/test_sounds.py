"""Sounds: read without ffmpeg, resampled, and heard by a tiny Whisper as by transformers' pipeline."""

from __future__ import annotations

import json
import math
import shutil
import struct
import wave
from pathlib import Path
from typing import Any

import numpy
import pytest
import soundfile
from support.media import make_vit, make_whisper, tones, write_wav

from bigpipe.bigmodel.checkpoint import describe_checkpoint
from bigpipe.bigmodel.execution import load
from bigpipe.bigmodel.inference.working import answer_batch
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.tasks import Answerer, Row, TaskOptions, find_task, read_prompts
from bigpipe.bigmodel.tasks.sounds import _read_wav, read_sound, resample, sound_seconds
from bigpipe.errors import UsageError

NAME = "automatic-speech-recognition"


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_whisper(tmp_path_factory.mktemp("whisper"))


def bind(path: Path, base: Path, home: str = "cpu", **arguments: Any) -> Answerer:
    sources = Sources(base=base)
    return find_task(NAME, sources).bind(load(path, {"": home}), path, TaskOptions(arguments=arguments), sources)


@pytest.fixture
def sounds(tmp_path: Path) -> list[Row]:
    for name, seconds in (("a", 3.0), ("b", 40.0), ("c", 6.0)):
        write_wav(tmp_path / f"sounds/{name}.wav", tones(seconds, 16_000, len(name) + int(seconds)))
    return read_prompts("sounds/*.wav", "prompt", tmp_path)


@pytest.mark.parametrize("home", ["cpu", "disk"])
@pytest.mark.parametrize("timed", [False, True])
def test_sounds_are_heard_as_by_transformers(
    tmp_path: Path, whisper: Path, sounds: list[Row], home: str, timed: bool
) -> None:
    import transformers

    pipeline = transformers.pipeline(NAME, model=str(whisper), device=-1)
    options = {"num_beams": 1, "language": "en", "task": "transcribe"}
    samples = [read_sound(row, Sources(base=tmp_path), 16_000) for row in sounds]
    heard = [
        pipeline(each.copy(), chunk_length_s=30, return_timestamps=timed, generate_kwargs=options) for each in samples
    ]
    wanted = json.loads(json.dumps(heard))
    task = bind(whisper, tmp_path, home, language="en", task="transcribe", return_timestamps=timed)
    assert [answer.payload for answer in task(sounds)] == wanted
    assert task(sounds[1:2])[0].payload == wanted[1], "a sound of two chunks alone"
    assert len({each["text"] for each in wanted}) > 1


def test_scores_that_are_no_numbers_are_an_error(tmp_path: Path, whisper: Path, sounds: list[Row]) -> None:
    sources = Sources(base=tmp_path)
    model = load(whisper)
    task = find_task(NAME, sources).bind(model, whisper, TaskOptions(), sources)
    norm = model.model.decoder.layer_norm.weight
    norm.data = norm.data * math.nan
    with pytest.raises(ValueError, match="infinite or no numbers"):
        task(sounds[:1])


def test_a_wav_file_is_read_in_every_width(tmp_path: Path) -> None:
    wanted = numpy.array(tones(0.1, 8000), dtype=numpy.float32)
    stored = {
        1: lambda value: struct.pack("B", round(value * 127) + 128),
        2: lambda value: struct.pack("<h", round(value * 32767)),
        3: lambda value: struct.pack("<i", round(value * (2**23 - 1)))[:3],
        4: lambda value: struct.pack("<i", round(value * (2**31 - 1))),
    }
    for width, packed in stored.items():
        with wave.open(str(tmp_path / "a.wav"), "wb") as file:
            file.setparams((2, width, 8000, 0, "NONE", ""))
            file.writeframes(b"".join(packed(float(value)) + packed(0.0) for value in wanted))
        samples, rate = _read_wav(tmp_path / "a.wav")
        assert rate == 8000
        numpy.testing.assert_allclose(samples, wanted / 2, atol=2.0 ** (1 - 8 * width) + 1e-6)


@pytest.mark.parametrize("before", [b"", b"JUNK" + struct.pack("<L", 3) + b"abc\0"])
def test_a_wav_file_of_many_bits_or_channels_is_read_by_python_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bytes
) -> None:
    """As ffmpeg writes those of 24 bits."""
    path, wanted = tmp_path / "a.wav", numpy.array(tones(0.1, 96_000), dtype=numpy.float32)
    monkeypatch.setattr("bigpipe.bigmodel.tasks.sounds.find_spec", lambda name: None)

    def write(guid: str) -> None:
        more = struct.pack("<HHL", 22, 24, 4) + bytes.fromhex(guid)
        form = struct.pack("<HHLLHH", 0xFFFE, 1, 96_000, 288_000, 3, 24) + more
        body = b"".join(struct.pack("<i", round(float(value) * (2**23 - 1)))[:3] for value in wanted)
        chunks = (
            b"WAVE"
            + before
            + b"".join(name + struct.pack("<L", len(data)) + data for name, data in ((b"fmt ", form), (b"data", body)))
        )
        path.write_bytes(b"RIFF" + struct.pack("<L", len(chunks)) + chunks)

    write("0100000000001000800000aa00389b71")
    samples, rate = _read_wav(path)
    assert rate == 96_000
    numpy.testing.assert_allclose(samples, wanted, atol=1e-6)
    row = Row(0, "a.wav", {"prompt": "a.wav"}, "sound")
    assert sound_seconds(row, Sources(base=tmp_path)) == pytest.approx(0.1)
    write("0300000000001000800000aa00389b71")  # of floats
    with pytest.raises(ValueError, match=r"Python reads .wav of whole numbers alone .*install 'bigpipe-ml\[sounds\]'"):
        read_sound(row, Sources(base=tmp_path), 16_000)


@pytest.mark.parametrize(("rate", "wanted"), [(44_100, 16_000), (8000, 16_000), (48_000, 16_000), (22_050, 16_000)])
def test_a_resampled_tone_is_the_same_tone(rate: int, wanted: int) -> None:
    tone = [numpy.sin(2 * math.pi * 440 * numpy.arange(each) / each).astype(numpy.float32) for each in (rate, wanted)]
    found = resample(tone[0], rate, wanted)
    assert found.shape == (wanted,)
    inside = slice(200, wanted - 200)
    numpy.testing.assert_allclose(found[inside], tone[1][inside], atol=5e-3)
    high = numpy.sin(2 * math.pi * 0.47 * rate * numpy.arange(rate) / rate).astype(numpy.float32)
    if rate > wanted:
        assert abs(resample(high, rate, wanted)[inside]).max() < 0.02, "what the new rate cannot hold is gone"


def test_a_sound_at_another_rate_and_of_two_channels_is_heard(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", tones(1, 16_000), 16_000)
    write_wav(tmp_path / "b.wav", tones(1, 48_000), 48_000, channels=2)
    first, second = (read_sound(row, Sources(base=tmp_path), 16_000) for row in read_prompts("*.wav", "p", tmp_path))
    assert len(first) == len(second) == 16_000
    numpy.testing.assert_allclose(first[200:-200], second[200:-200], atol=0.02)


@pytest.mark.parametrize("ending", ["flac", "mp3", "ogg", "opus", "aiff", "au", "caf"])
def test_a_file_of_another_form_is_read_by_soundfile(tmp_path: Path, ending: str) -> None:
    soundfile = pytest.importorskip("soundfile")
    wanted = numpy.array(tones(0.5, 16_000), dtype=numpy.float32)
    form = {"format": "OGG", "subtype": "OPUS"} if ending == "opus" else {}
    soundfile.write(str(tmp_path / f"a.{ending}"), wanted, 16_000, **form)
    (row,) = read_prompts(f"a.{ending}", "p", tmp_path)
    found = read_sound(row, Sources(base=tmp_path), 16_000)
    assert row.reads == "sound"
    assert len(found) == len(wanted)
    lossy = ending in ("mp3", "ogg", "opus")
    assert numpy.corrcoef(found, wanted)[0, 1] > (0.9 if lossy else 0.9999)


def test_a_sound_that_cannot_be_heard_is_an_error_of_its_row(tmp_path: Path, whisper: Path, sounds: list[Row]) -> None:
    (tmp_path / "sounds/b.wav").write_bytes(b"no sound")
    write_wav(tmp_path / "sounds/c.wav", [])
    write_wav(tmp_path / "sounds/d.wav", [0.0] * 100, 44_101)
    given = read_prompts("sounds/*.wav", "prompt", tmp_path)
    found = [answer.payload for answer in answer_batch(bind(whisper, tmp_path, language="en"), given, str)]
    assert "text" in found[0]
    assert found[1]["error"].startswith("ValueError: sounds/b.wav is no sound that can be read: ")
    assert found[2]["error"] == "ValueError: sounds/c.wav is no sound that can be read: it holds no samples"
    assert "44101 Hz are not resampled to 16000" in found[3]["error"]


def test_a_model_that_does_not_hear_is_refused_before_it_is_loaded(
    tmp_path: Path, sounds: list[Row], whisper: Path
) -> None:
    task = find_task(NAME, Sources())
    list(task.checked({"language": "en"}, sounds, describe_checkpoint(whisper)))
    with pytest.raises(UsageError, match="takes no argument 'langauge'"):
        list(task.checked({"langauge": "en"}, sounds, None))
    with pytest.raises(UsageError, match="reads sounds, and prompt 0 is a text"):
        list(task.checked({}, [Row(0, "a", {})], None))
    pytest.importorskip("PIL")
    with pytest.raises(UsageError, match=f"ViTForImageClassification does no {NAME}"):
        list(task.checked({}, sounds, describe_checkpoint(make_vit(tmp_path / "vit"))))


def test_a_model_that_hears_makes_no_features_of_a_text(whisper: Path) -> None:
    with pytest.raises(UsageError, match="WhisperForConditionalGeneration makes no features of a text alone"):
        list(find_task("feature-extraction", Sources()).checked({}, [Row(0, "a", {})], describe_checkpoint(whisper)))


def test_a_language_that_a_model_does_not_know_is_refused_before_it_is_loaded(
    tmp_path: Path, sounds: list[Row], whisper: Path
) -> None:
    task, described = find_task(NAME, Sources()), describe_checkpoint(whisper)
    for known in ("english", "German", "DE", "<|en|>", None):
        list(task.checked({"language": known}, sounds, described))
    for unknown in ("englsh", "french", "fr"):
        with pytest.raises(UsageError, match=f"knows no language '{unknown}'") as error:
            list(task.checked({"language": unknown}, sounds, described))
        assert error.value.field == "generation.language"
        assert "by its code: de" in str(error.value.cure)
    alone = Path(shutil.copytree(whisper, tmp_path / "alone"))
    own = json.loads((alone / "generation_config.json").read_bytes())
    (alone / "generation_config.json").write_text(json.dumps({**own, "is_multilingual": False}))
    for given in ({"language": "en"}, {"task": "transcribe"}):
        with pytest.raises(UsageError, match="the model knows English alone"):
            list(task.checked(given, sounds, describe_checkpoint(alone)))
    list(task.checked({}, sounds, describe_checkpoint(alone)))


def test_an_overlap_that_leaves_nothing_of_a_chunk_is_refused(sounds: list[Row]) -> None:
    task = find_task(NAME, Sources())
    list(task.checked({"chunk_length_s": 10.0, "stride_length_s": 4.0}, sounds, None))
    with pytest.raises(UsageError, match="stride_length_s 5 on both sides leaves nothing of 10 s") as error:
        list(task.checked({"chunk_length_s": 10.0, "stride_length_s": 5.0}, sounds, None))
    assert error.value.field == "generation.stride_length_s"


FORMATS = [
    ("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("AIFF", "PCM_16"),
    ("MP3", "MPEG_LAYER_III"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "kind"), FORMATS)
def test_a_sound_that_is_cut_short_is_none(tmp_path: Path, form: str, kind: str) -> None:
    path = tmp_path / "whole.wav"
    soundfile.write(path, tones(2.0, 16_000, 3), 16_000, format=form, subtype=kind)
    whole = path.read_bytes()
    row = Row(0, "whole.wav", {}, reads="sound")
    assert len(read_sound(row, Sources(base=tmp_path), 16_000)) == pytest.approx(32_000, abs=2000)
    for left in (len(whole) // 2, len(whole) - 7):
        path.write_bytes(whole[:left])
        with pytest.raises(ValueError, match="no sound that can be read") as caught:
            read_sound(row, Sources(base=tmp_path), 16_000)
        assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("size", [0, 2**31 - 1, 2**32 - 1])
def test_a_sound_of_whoever_did_not_know_its_length_is_read(tmp_path: Path, size: int) -> None:
    path = tmp_path / "piped.wav"
    write_wav(path, tones(1.0, 16_000, 3))
    path.write_bytes(path.read_bytes()[:4] + struct.pack("<I", size) + path.read_bytes()[8:])
    row = Row(0, "piped.wav", {}, reads="sound")
    assert len(read_sound(row, Sources(base=tmp_path), 16_000)) == 16_000
