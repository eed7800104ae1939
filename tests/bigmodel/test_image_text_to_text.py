"""What a model says of pictures, on a tiny LLaVA: what transformers' own pipeline gives for a row alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.media import make_llava, make_vit, write_picture
from support.models import make_checkpoint

from bigpipe.bigmodel.checkpoint import describe_checkpoint
from bigpipe.bigmodel.execution import load, loaded
from bigpipe.bigmodel.inference.working import answer_batch
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.tasks import Answerer, Row, TaskOptions, find_task, read_prompts
from bigpipe.errors import UsageError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is not divisible:UserWarning"),
]
NAMES = ("a.png", "b.png", "c.png")
NEW = 6
TASK = find_task("image-text-to-text", Sources())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With pictures and models."""
    made = tmp_path_factory.mktemp("pictures")
    for number, name in enumerate(NAMES):
        write_picture(made / name, seed=number, width=40 + 10 * number)
    make_llava(made / "model")
    make_llava(made / "plain", chats=False)
    return made


def bind(folder: Path, model: str = "model", home: str = "cpu", **arguments: Any) -> Answerer:
    path, options = folder / model, TaskOptions(arguments=arguments, max_new_tokens=NEW)
    return TASK.bind(load(path, {"": home}), path, options, Sources(base=folder))


def rows(folder: Path, given: list[Any]) -> list[Row]:
    return read_prompts(given, "prompt", folder)


def texts(answerer: Answerer, given: list[Row]) -> list[str]:
    """Of all together; each alone must give the same."""
    together = [answer.payload["text"] for answer in answerer(given)]
    assert [answerer([row])[0].payload["text"] for row in given] == together
    return together


def plainly(folder: Path, model: str = "model", **given: Any) -> str:
    """What a script with transformers makes of a row."""
    import transformers

    pipeline = transformers.pipeline("image-text-to-text", model=str(folder / model), device=-1)
    found = pipeline(max_new_tokens=NEW, return_full_text=False, **given)
    return str(found[0]["generated_text"])


def message(*parts: Any) -> list[dict[str, Any]]:
    shown = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "path": str(part)}
        for part in parts
    ]
    return [{"role": "user", "content": shown}]


@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_a_text_with_a_picture_is_a_message(folder: Path, home: str) -> None:
    asked = ["what is this", "and who sat on the mat", "a cat"]
    given = rows(folder, [{"prompt": text, "image": name} for text, name in zip(asked, NAMES, strict=True)])
    found = texts(bind(folder, home=home), given)
    assert found == [
        plainly(folder, text=message(folder / name, text)) for text, name in zip(asked, NAMES, strict=True)
    ]
    assert len(set(found)) == 3


def test_another_picture_makes_another_text(folder: Path) -> None:
    given = rows(folder, [{"prompt": "what is this", "image": name} for name in NAMES])
    assert len(set(texts(bind(folder), given))) == 3


@pytest.mark.parametrize("count", [1, 2])
def test_batches_of_a_rank_find_the_model_as_it_was(folder: Path, count: int) -> None:
    """The first forward hooks into the layers that see, for their hidden states."""
    given = rows(folder, [{"prompt": "what is this", "image": name} for name in (*NAMES, *NAMES)])
    model, path = load(folder / "model", {"": "disk"}), folder / "model"
    answerer = TASK.bind(model, path, TaskOptions(arguments={}, max_new_tokens=NEW), Sources(base=folder))
    found: dict[int, str] = {}

    def work(row: Row) -> None:
        found[row.index] = answerer([row])[0].payload["text"]

    loaded(model).stream.together(model, work, given, count)
    assert [found[row.index] for row in given] == texts(bind(folder), given)


def test_a_text_that_says_where_its_picture_stands_is_read_as_it_is(folder: Path) -> None:
    given = rows(folder, [{"prompt": "see <image> here", "image": name} for name in NAMES])
    wanted = [plainly(folder, images=str(folder / name), text="see <image> here") for name in NAMES]
    assert texts(bind(folder), given) == wanted
    assert texts(bind(folder, "plain"), given) == wanted


def test_a_row_begins_once_whoever_stands_beside_it(folder: Path) -> None:
    """A template writes the token that a text begins with, and the tokenizer writes it before any other."""
    make_llava(folder / "begins", begins=True)
    given = rows(folder, [{"prompt": text, "image": "a.png"} for text in ("see <image> here", "what is this", "a cat")])
    answers = bind(folder, "begins")(given)
    wanted = [plainly(folder, "begins", images=str(folder / "a.png"), text="see <image> here")]
    wanted += [plainly(folder, "begins", text=message(folder / "a.png", text)) for text in ("what is this", "a cat")]
    assert [answer.payload["text"] for answer in answers] == wanted
    assert [answer.read for answer in answers] == [14, 35, 28]


def test_several_pictures_of_a_row(folder: Path) -> None:
    given = rows(folder, [{"prompt": "which", "image": ["a.png", "b.png"]}, {"prompt": "this", "image": "c.png"}])
    wanted = [message(folder / "a.png", folder / "b.png", "which"), message(folder / "c.png", "this")]
    assert texts(bind(folder), given) == [plainly(folder, text=each) for each in wanted]


def test_chats_say_where_their_pictures_stand(folder: Path) -> None:
    wanted = message("look", folder / "a.png", "and here", folder / "b.png")
    told = [[{"role": "user", "content": [
        {"type": "text", "text": "look"}, first, {"type": "text", "text": "and here"}, second
    ]}] for first, second in (
        ({"type": "image", "path": "a.png"}, {"type": "image", "image": "b.png"}),
        ({"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "image", "url": "b.png"}),
        ({"type": "image"}, {"type": "image"}),
    )]  # fmt: skip
    given = rows(folder, [told[0], told[1], {"prompt": told[2], "image": ["a.png", "b.png"]}])
    assert texts(bind(folder), given) == [plainly(folder, text=wanted)] * 3
    before = [{"role": "system", "content": "be short"}, {"role": "user", "content": "what is this"}]
    shown = [
        {"role": "system", "content": [{"type": "text", "text": "be short"}]},
        *message(folder / "a.png", "what is this"),
    ]
    assert texts(bind(folder), rows(folder, [{"prompt": before, "image": "a.png"}])) == [plainly(folder, text=shown)]


def test_pictures_as_rows_are_asked_one_question(folder: Path) -> None:
    given = read_prompts("*.png", "prompt", folder)
    list(TASK.checked({"text": "what is this"}, given, describe_checkpoint(folder / "model")))
    wanted = [plainly(folder, text=message(folder / name, "what is this")) for name in NAMES]
    assert texts(bind(folder, text="what is this"), given) == wanted
    with pytest.raises(UsageError, match="nothing is asked of them"):
        list(TASK.checked({}, given, None))


def test_arguments_of_generate(folder: Path) -> None:
    given = rows(folder, [{"prompt": "what is this", "photo": "a.png"}])
    found = bind(folder, image="photo", num_return_sequences=2, do_sample=True)(given)[0].payload
    assert len(set(found["texts"])) == 2
    with pytest.raises(UsageError, match="temprature"):
        list(TASK.checked({"temprature": 1.0}, given, None))


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        ({"prompt": "a"}, "there is no 'image', which names its picture"),
        ({"prompt": "a", "image": []}, "there is no 'image'"),
        ({"prompt": "a", "image": 3}, "3 is named for a picture"),
        ({"prompt": "a", "image": ["a.png", ""]}, "'' is named for a picture"),
        ({"prompt": "a", "image": "https://localhost/a.png"}, "is an address"),
        ({"prompt": "a", "image": "data:image/png;base64,AA"}, "is an address"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "there is no 'image'"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "image": ["a.png", "b.png"]},
            "its chat has 1 places for pictures, and 2 are named",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image", "path": "a.png"}]}], "image": "b.png"},
            "its chat names pictures, and so does its 'image'",
        ),
    ],
)
def test_rows_that_name_no_picture_are_refused_before_a_model_is_loaded(
    folder: Path, data: dict[str, Any], cause: str
) -> None:
    with pytest.raises(UsageError, match=cause) as error:
        list(TASK.checked({}, rows(folder, [data]), None))
    assert "prompts[0]" in str(error.value)


def test_models_that_cannot_are_refused_before_they_are_loaded(folder: Path, tmp_path: Path) -> None:
    given = rows(folder, [{"prompt": "a", "image": "a.png"}])
    with pytest.raises(UsageError, match="has none"):
        list(TASK.checked({}, given, describe_checkpoint(make_checkpoint(tmp_path / "opt", "opt"))))
    with pytest.raises(UsageError, match="ViTForImageClassification does not read pictures and texts"):
        list(TASK.checked({}, given, describe_checkpoint(make_vit(tmp_path / "vit"))))
    chat = rows(folder, [message(folder / "a.png", "what")])
    with pytest.raises(UsageError, match="no chat template"):
        list(TASK.checked({}, chat, describe_checkpoint(folder / "plain")))
    list(TASK.checked({}, chat, describe_checkpoint(folder / "model")))


def test_a_picture_that_cannot_be_read_is_an_error_of_its_row(folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"no picture")
    given = rows(folder, [{"prompt": "a", "image": "a.png"}, {"prompt": "a", "image": "broken.png"}])
    try:
        found = [answer.payload for answer in answer_batch(bind(folder), given, str)]
    finally:
        (folder / "broken.png").unlink()
    assert "text" in found[0]
    assert found[1]["error"].startswith("ValueError: broken.png is no picture that can be read: cannot identify")
