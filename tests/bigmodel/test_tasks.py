"""Each task on tiny real models: what transformers' own pipeline gives for a row alone, whatever its batch and home."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.models import make_with_head, tiny_tokenizer

from bigpipe.bigmodel.checkpoint import describe_checkpoint
from bigpipe.bigmodel.execution import load
from bigpipe.bigmodel.inference.working import answer_batch
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.tasks import Answerer, Row, TaskOptions, find_task
from bigpipe.errors import UsageError

SENTENCES = ["hello world", "the cat sat on a mat, the cat sat on a mat", "paris is in france.", "x9 zebra"]
HOMES = ("cpu", "disk")


def bind(name: str, path: Path, home: str = "cpu", **arguments: Any) -> Answerer:
    return find_task(name, Sources()).bind(load(path, {"": home}), path, TaskOptions(arguments=arguments), Sources())


def rows(texts: list[Any], **fields: list[Any]) -> list[Row]:
    more = [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)] or [{}] * len(
        texts
    )
    return [Row(index, text, {"prompt": text, **more[index]}) for index, text in enumerate(texts)]


def pipeline(name: str, path: Path) -> Any:
    import transformers

    return transformers.pipeline(name, model=str(path), device=-1)


def payloads(answerer: Answerer, given: list[Row]) -> list[dict[str, Any]]:
    """Of all together; each alone must give the same."""
    together = [answer.payload for answer in answerer(given)]
    assert_alike([answerer([row])[0].payload for row in given], together)
    return together


def assert_alike(found: Any, wanted: Any) -> None:
    """Equal, but for floats, which may differ by what another batch rounds differently."""
    if isinstance(wanted, float):
        assert found == pytest.approx(wanted, abs=1e-5)
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for name in wanted:
            assert_alike(found[name], wanted[name])
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_alike(one, other)
    else:
        assert found == wanted


def plain(value: Any) -> Any:
    """As JSON holds it: numpy's numbers are numbers."""
    return json.loads(json.dumps(value, default=lambda number: number.item()))


CLASSIFIERS = {
    "bert": {}, "roberta": {}, "gpt2": {"pad_token_id": 0}, "llama": {"pad_token_id": None},
    "bart": {"eos_token_id": 3},
}  # fmt: skip


@pytest.fixture(scope="module", params=CLASSIFIERS)
def classifier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"num_labels": 4, **CLASSIFIERS[request.param]}
    return make_with_head(tmp_path_factory.mktemp("model"), request.param, "ForSequenceClassification", **changes)


@pytest.mark.parametrize("home", HOMES)
def test_a_text_is_classified_as_by_transformers(classifier: Path, home: str) -> None:
    wanted = [pipeline("text-classification", classifier)(text, top_k=None) for text in SENTENCES]
    all_of_them = payloads(bind("text-classification", classifier, home, top_k=None), rows(SENTENCES))
    assert_alike([each["labels"] for each in all_of_them], wanted)
    assert_alike(payloads(bind("text-classification", classifier, home), rows(SENTENCES)), [each[0] for each in wanted])
    two = bind("text-classification", classifier, home, top_k=2)(rows(SENTENCES))
    assert_alike([each.payload["labels"] for each in two], [each[:2] for each in wanted])


def test_a_pair_of_texts_is_classified_as_by_transformers(tmp_path: Path) -> None:
    path = make_with_head(tmp_path, "bert", "ForSequenceClassification", num_labels=3)
    given = rows(SENTENCES[:2], second=["is paris in france?", "a cat"])
    classify = pipeline("text-classification", path)
    wanted = [classify({"text": row.prompt, "text_pair": row.data["second"]}) for row in given]
    assert_alike(payloads(bind("text-classification", path, pair="second"), given), wanted)
    assert payloads(bind("text-classification", path), given)[0] != wanted[0]


@pytest.mark.parametrize(
    ("problem", "labels"), [("regression", 1), ("multi_label_classification", 3), (None, 1), ("regression", 2)]
)
def test_scores_are_what_the_config_says_they_are(tmp_path: Path, problem: str | None, labels: int) -> None:
    path = make_with_head(tmp_path, "bert", "ForSequenceClassification", num_labels=labels, problem_type=problem)
    classify = pipeline("text-classification", path)
    wanted = [classify(text) for text in SENTENCES]
    assert_alike(
        payloads(bind("text-classification", path), rows(SENTENCES)), [each for (each,) in map(as_list, wanted)]
    )
    for function in ("sigmoid", "softmax", "none"):
        wanted = [classify(text, top_k=None, function_to_apply=function) for text in SENTENCES]
        asked = bind("text-classification", path, top_k=None, function_to_apply=function)
        assert_alike([each["labels"] for each in payloads(asked, rows(SENTENCES))], wanted)


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


LABELS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
def test_tokens_are_classified_as_by_transformers(tmp_path: Path, strategy: str, home: str) -> None:
    path = make_with_head(tmp_path, "bert", "ForTokenClassification", num_labels=5, id2label=LABELS)
    classify = pipeline("token-classification", path)
    wanted = [plain(classify(text, aggregation_strategy=strategy)) for text in SENTENCES]
    found = payloads(bind("token-classification", path, home, aggregation_strategy=strategy), rows(SENTENCES))
    assert_alike([each["entities"] for each in found], wanted)
    assert any(wanted)
    for text, each in zip(SENTENCES, found, strict=True):
        for span in each["entities"]:
            assert text[span["start"] : span["end"]].replace(" ", "") == span["word"].replace("##", "").replace(" ", "")


def test_labels_that_are_ignored(tmp_path: Path) -> None:
    path = make_with_head(tmp_path, "bert", "ForTokenClassification", num_labels=5, id2label=LABELS)
    everything = bind("token-classification", path, ignore_labels=[])(rows(SENTENCES[:1]))[0].payload["entities"]
    assert [entity["word"] for entity in everything] == ["hello", "world"]
    assert bind("token-classification", path, ignore_labels=list(LABELS.values()))(rows(SENTENCES))[1].payload == {
        "entities": []
    }


MASKED = ["hello [MASK]", "the cat [MASK] on a mat, the cat sat on a mat", "[MASK] is in [MASK]."]


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_masks_are_filled_as_by_transformers(tmp_path: Path, architecture: str, home: str) -> None:
    path = make_with_head(tmp_path, architecture, "ForMaskedLM")
    fill = pipeline("fill-mask", path)
    found = payloads(bind("fill-mask", path, home, top_k=3), rows(MASKED))
    for text, each in zip(MASKED, found, strict=True):
        wanted = fill(text, top_k=3)
        assert_alike(each["fills"], wanted if text.count("[MASK]") > 1 else [wanted])


def test_what_a_row_does_wrong_is_its_own_error(tmp_path: Path) -> None:
    path = make_with_head(tmp_path, "bert", "ForMaskedLM", max_position_embeddings=16)
    given = rows(["hello [MASK]", "", "no mask", "a " * 20 + "[MASK]"])
    found = [answer.payload for answer in answer_batch(bind("fill-mask", path), given, str)]
    assert "fills" in found[0]
    assert [each["error"] for each in found[1:]] == [
        "ValueError: the text is empty",
        "ValueError: there is no mask in the text: write [MASK] where a token is to be found",
        "ValueError: 23 tokens are more than the model's 16 positions: shorten the prompt",
    ]


HEADS = {
    "text-classification": "ForSequenceClassification", "token-classification": "ForTokenClassification",
    "fill-mask": "ForMaskedLM",
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_a_class_that_cannot_do_a_task_is_refused_by_name(tmp_path: Path, name: str) -> None:
    task = find_task(name, Sources())
    for other, head in HEADS.items():
        described = describe_checkpoint(make_with_head(tmp_path / other, "bert", head))
        if other == name:
            task.check({}, rows(SENTENCES), described)
            continue
        with pytest.raises(UsageError, match=f"Bert{head} does no {name}") as error:
            task.check({}, rows(SENTENCES), described)
        assert error.value.field == "task"
        assert f"a class …{HEADS[name]}" in str(error.value.cure)


@pytest.mark.parametrize(
    ("name", "arguments", "cause"),
    [
        ("text-classification", {"topk": 3}, "takes no argument 'topk'"),
        ("text-classification", {"top_k": 0}, "top_k of text-classification: input should be greater than or equal"),
        ("text-classification", {"top_k": "3"}, "valid integer, and '3' is given"),
        ("text-classification", {"function_to_apply": "relu"}, "'sigmoid', 'softmax' or 'none', and 'relu' is given"),
        ("token-classification", {"aggregation_strategy": "mean"}, "'average' or 'max', and 'mean' is given"),
        ("token-classification", {"ignore_labels": "O"}, "ignore_labels of token-classification"),
        ("fill-mask", {"top_k": None}, "top_k of fill-mask"),
        ("feature-extraction", {"pooling": "sum"}, "pooling of feature-extraction"),
    ],
)
def test_arguments_that_a_task_does_not_take(name: str, arguments: dict[str, Any], cause: str) -> None:
    with pytest.raises(UsageError, match=cause) as error:
        find_task(name, Sources()).check(arguments, rows(SENTENCES), None)
    assert error.value.field == f"generation.{next(iter(arguments))}"


@pytest.mark.parametrize(
    ("second", "cause"),
    [
        ({}, "needs 'second', which prompt 1 does not have"),
        ({"second": 3}, "prompt 1: 'second' holds no text"),
        ({"second": ""}, "prompt 1: 'second' holds no text"),
        ({"second": ["a", "b"]}, "prompt 1: 'second' holds no text"),
    ],
)
def test_a_pair_needs_its_second_text(second: dict[str, Any], cause: str) -> None:
    given = [Row(0, "a", {"prompt": "a", "second": "b"}), Row(1, "b", {"prompt": "b", **second})]
    with pytest.raises(UsageError, match=cause):
        find_task("text-classification", Sources()).check({"pair": "second"}, given, None)


@pytest.mark.parametrize("name", HEADS)
def test_a_chat_is_no_text(tmp_path: Path, name: str) -> None:
    described = describe_checkpoint(make_with_head(tmp_path, "bert", HEADS[name]))
    chat = rows([[{"role": "user", "content": "hi"}]])
    with pytest.raises(UsageError, match="prompt 0 is a chat, and the task reads texts"):
        find_task(name, Sources()).check({}, chat, described)


def test_a_tokenizer_without_a_mask_fills_none(tmp_path: Path) -> None:
    path = make_with_head(tmp_path, "bert", "ForMaskedLM", tokenizer=tiny_tokenizer())
    with pytest.raises(UsageError, match="has no mask token"):
        bind("fill-mask", path)
