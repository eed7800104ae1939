"""Tasks over files: pictures as transformers' pipeline classifies them, and files that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.media import make_vit, write_picture

from bigpipe.bigmodel.checkpoint import describe_checkpoint
from bigpipe.bigmodel.execution import load
from bigpipe.bigmodel.inference.working import answer_batch
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.tasks import Answerer, Row, TaskOptions, find_task, read_prompts
from bigpipe.bigmodel.tasks.pictures import read_picture
from bigpipe.errors import UsageError

pytest.importorskip("PIL")
HOMES = ("cpu", "disk")


def bind(name: str, path: Path, base: Path, home: str = "cpu", new: int = 32, **arguments: Any) -> Answerer:
    options, sources = TaskOptions(arguments=arguments, max_new_tokens=new), Sources(base=base)
    return find_task(name, sources).bind(load(path, {"": home}), path, options, sources)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Row]:
    write_picture(tmp_path / "pictures/a.png", 1)
    write_picture(tmp_path / "pictures/b.JPG", 2, 64, 64)
    write_picture(tmp_path / "pictures/c.png", 3, mode="L")
    write_picture(tmp_path / "pictures/d.gif", 4, 200, 20, mode="P")
    return read_prompts("pictures/*", "prompt", tmp_path)


@pytest.mark.parametrize("home", HOMES)
def test_pictures_are_classified_as_by_transformers(tmp_path: Path, pictures: list[Row], home: str) -> None:
    import transformers
    from PIL import Image

    path = make_vit(tmp_path / "model")
    classify = transformers.pipeline("image-classification", model=str(path), device=-1)
    assert [row.prompt for row in pictures] == [f"pictures/{name}" for name in ("a.png", "b.JPG", "c.png", "d.gif")]
    wanted = []
    for row in pictures:
        with Image.open(tmp_path / row.prompt) as picture:
            wanted.append(classify(picture.convert("RGB"), top_k=4))
    every, one = (bind("image-classification", path, tmp_path, home, top_k=top_k) for top_k in (None, 1))
    for row, answer, labels in zip(pictures, every(pictures), wanted, strict=True):
        close = [{**each, "score": pytest.approx(each["score"], abs=1e-5)} for each in labels]
        assert answer.payload == {**close[0], "labels": close}
        assert one([row])[0].payload == close[0]
    assert len({str(labels) for labels in wanted}) == 4


def test_a_picture_lies_as_its_camera_says(tmp_path: Path) -> None:
    from PIL import Image

    path, upright = make_vit(tmp_path / "model"), write_picture(tmp_path / "p/a.png", 1, 32, 32)
    with Image.open(upright) as picture:
        exif = Image.Exif()
        exif[0x0112] = 3  # turned by 180 degrees
        picture.rotate(180).save(tmp_path / "p/b.png", exif=exif)
    first, second = bind("image-classification", path, tmp_path)(read_prompts("p/*.png", "prompt", tmp_path))
    assert first.payload["score"] == pytest.approx(second.payload["score"], abs=1e-6)


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_a_picture_of_16_bits_is_that_of_8(tmp_path: Path, ending: str) -> None:
    import numpy
    from PIL import Image

    ramp = numpy.linspace(0, 65535, 256).astype(numpy.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / f"a.{ending}")
    found = numpy.asarray(read_picture(tmp_path / f"a.{ending}", "a"))
    assert abs(found - (ramp // 257)[..., None].astype(int)).max() <= 1
    Image.fromarray(ramp.astype(numpy.float32)).save(tmp_path / "f.tif")
    with pytest.raises(ValueError, match="8 bits a channel"):
        read_picture(tmp_path / "f.tif", "f")


def test_a_picture_that_cannot_be_read_is_an_error_of_its_row(tmp_path: Path, pictures: list[Row]) -> None:
    (tmp_path / "pictures/b.JPG").write_bytes(b"no picture")
    whole = (tmp_path / "pictures/c.png").read_bytes()
    (tmp_path / "pictures/c.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "pictures/d.gif").unlink()
    path = make_vit(tmp_path / "model")
    found = [answer.payload for answer in answer_batch(bind("image-classification", path, tmp_path), pictures, str)]
    assert "label" in found[0]
    assert found[1]["error"].startswith("ValueError: pictures/b.JPG is no picture that can be read: cannot identify")
    assert str(tmp_path) not in found[1]["error"]
    assert found[2]["error"].startswith("ValueError: pictures/c.png is no picture that can be read")
    assert found[3]["error"].startswith("ValueError: pictures/d.gif is no picture that can be read: [Errno 2]")


def test_rows_are_what_a_task_reads(tmp_path: Path, pictures: list[Row]) -> None:
    vit, texts = describe_checkpoint(make_vit(tmp_path / "model")), [Row(0, "a", {"prompt": "a"})]
    task = find_task("image-classification", Sources())
    list(task.checked({}, pictures, vit))
    with pytest.raises(UsageError, match="reads pictures, and prompt 0 is a text") as error:
        list(task.checked({}, texts, vit))
    assert error.value.field == "prompts"
    assert "pictures/*.png" in str(error.value.cure)
    with pytest.raises(UsageError, match="task fill-mask reads texts, and prompt 0 is a picture"):
        list(find_task("fill-mask", Sources()).checked({}, pictures, None))
    (tmp_path / "pictures/notes.txt").write_text("a")
    with pytest.raises(UsageError, match=r"notes\.txt is no picture or sound, as others beside it are"):
        read_prompts("pictures/*", "prompt", tmp_path)
    with pytest.raises(UsageError, match="has no fields that a template could name"):
        read_prompts("pictures/a.png", "prompt", tmp_path, "{prompt}")


def test_a_model_that_cannot_is_refused_before_it_is_loaded(tmp_path: Path, pictures: list[Row]) -> None:
    from support.models import make_with_head

    task, path = find_task("image-classification", Sources()), make_vit(tmp_path / "model")
    text = describe_checkpoint(make_with_head(tmp_path / "bert", "bert", "ForSequenceClassification"))
    with pytest.raises(UsageError, match="BertForSequenceClassification does no image-classification"):
        list(task.checked({}, pictures, text))
    (path / "preprocessor_config.json").unlink()
    with pytest.raises(UsageError, match=r"needs a preprocessor_config\.json"):
        list(task.checked({}, pictures, describe_checkpoint(path)))
    with pytest.raises(UsageError, match="no processor that can be used"):
        bind("image-classification", path, tmp_path)
