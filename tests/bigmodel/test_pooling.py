"""Vectors of texts: pooled as the files of a sentence-transformers model say, by older names and present ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import make_with_head, tiny_tokenizer, word_tokenizer

from bigpipe.bigmodel.checkpoint import describe_checkpoint
from bigpipe.bigmodel.execution import load
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.tasks import Row, TaskOptions, find_task
from bigpipe.errors import InvalidCheckpoint, UsageError

TEXTS = ["hello world", "the cat sat on a mat, the cat sat on a mat", "x"]
FORMULAS: dict[str, Any] = {
    "mean": lambda states: states.mean(0),
    "cls": lambda states: states[0],
    "lasttoken": lambda states: states[-1],
    "max": lambda states: torch.stack([column.max() for column in states.T]),
    "mean_sqrt_len_tokens": lambda states: states.sum(0) / torch.tensor(float(len(states))).sqrt(),
    "weightedmean": lambda states: sum((n + 1) * state for n, state in enumerate(states)) / sum(range(len(states) + 1)),
}
OLDER = {
    "mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "lasttoken": "pooling_mode_lasttoken",
    "max": "pooling_mode_max_tokens", "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_with_head(tmp_path_factory.mktemp("model"), "bert", "Model")


def states(path: Path, text: str, tokenizer: Any = None) -> torch.Tensor:
    """Of the tokens of a text alone, by transformers."""
    from transformers import AutoModel

    tokens = torch.tensor([(tokenizer or word_tokenizer())(text)["input_ids"]])
    with torch.no_grad():
        found: torch.Tensor = AutoModel.from_pretrained(path)(tokens).last_hidden_state[0]
    return found


def published(plain: Path, folder: Path, pooling: Any, *more: str, **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for file in plain.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    parts = ["Transformer", "Pooling", *more]
    listed = [
        {"type": f"sentence_transformers.models.{name}", "path": f"{n}_{name}" if n else ""}
        for n, name in enumerate(parts)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def vectors(path: Path, texts: list[str] = TEXTS, **arguments: Any) -> list[torch.Tensor]:
    task = find_task("feature-extraction", Sources())
    given = [Row(index, text, {"prompt": text}) for index, text in enumerate(texts)]
    answers = task.bind(load(path), path, TaskOptions(arguments=arguments), Sources())(given)
    return [torch.tensor(answer.payload["features"]) for answer in answers]


def assert_close(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", FORMULAS)
def test_vectors_are_pooled_as_the_models_files_say(tmp_path: Path, plain: Path, mode: str) -> None:
    wanted = [FORMULAS[mode](states(plain, text)) for text in TEXTS]
    older = dict.fromkeys(OLDER.values(), False) | {OLDER[mode]: True}
    assert_close(vectors(published(plain, tmp_path / "older", older)), wanted)
    assert_close(vectors(published(plain, tmp_path / "present", {"pooling_mode": mode})), wanted)
    length_one = [vector / vector.norm() for vector in wanted]
    normalized = published(plain, tmp_path / "normalized", {"pooling_mode": mode}, "Normalize")
    assert_close(vectors(normalized), length_one)
    assert_close(vectors(normalized, normalize=False), wanted)
    assert_close(vectors(tmp_path / "present", normalize=True), length_one)


def test_several_modes_are_joined_and_what_is_asked_for_wins(tmp_path: Path, plain: Path) -> None:
    path = published(plain, tmp_path / "both", {OLDER["mean"]: True, OLDER["cls"]: True})
    both = [torch.cat([found[0], found.mean(0)]) for found in (states(plain, text) for text in TEXTS)]
    assert_close(vectors(path), both)
    assert_close(vectors(path, pooling="last"), [states(plain, text)[-1] for text in TEXTS])
    assert_close(vectors(plain), [states(plain, text).mean(0) for text in TEXTS])


def test_a_default_prompt_stands_before_every_text(tmp_path: Path, plain: Path) -> None:
    told = {"prompts": {"query": "the cat "}, "default_prompt_name": "query"}
    path = published(plain, tmp_path / "m", {"pooling_mode": "mean"}, config_sentence_transformers=told)
    assert_close(vectors(path), [states(plain, f"the cat {text}").mean(0) for text in TEXTS])


def test_texts_are_read_as_sentence_transformers_reads_them(tmp_path: Path) -> None:
    """Without the blanks around them and, where the model says so, in lower case."""
    plain = make_with_head(tmp_path / "plain", "bert", "Model", tokenizer=tiny_tokenizer())
    given = [" Hello World\n", "the cat", "X "]

    def wanted(texts: list[str]) -> list[torch.Tensor]:
        return [states(plain, text, tiny_tokenizer()).mean(0) for text in texts]

    path = published(plain, tmp_path / "m", {"pooling_mode": "mean"}, sentence_bert_config={"do_lower_case": False})
    assert_close(vectors(path, given), wanted(["Hello World", "the cat", "X"]))
    path = published(plain, tmp_path / "lower", {"pooling_mode": "mean"}, sentence_bert_config={"do_lower_case": True})
    assert_close(vectors(path, given), wanted(["hello world", "the cat", "x"]))
    assert_close(vectors(plain, given), wanted(given))


def test_an_older_file_says_how_long_a_text_may_be(tmp_path: Path, plain: Path) -> None:
    told = {"sentence_roberta_config": {"max_seq_length": 6}}
    path = published(plain, tmp_path / "m", {"pooling_mode": "mean"}, **told)
    with pytest.raises(ValueError, match="15 tokens are more than the 6"):
        vectors(path)


def test_a_text_beyond_the_models_own_limit_is_an_error_or_cut(tmp_path: Path, plain: Path) -> None:
    path = published(plain, tmp_path / "m", {"pooling_mode": "mean"}, sentence_bert_config={"max_seq_length": 6})
    with pytest.raises(ValueError, match=r"15 tokens are more than the 6 of its sentence_bert_config\.json"):
        vectors(path)
    cut = [TEXTS[0], "the cat sat on", TEXTS[2]]
    assert_close(vectors(path, truncate=True), [states(plain, text).mean(0) for text in cut])
    long = "the cat " * 100
    with pytest.raises(ValueError, match="more than the model's 128 positions"):
        vectors(plain, [long])
    assert_close(vectors(plain, [long], truncate=True), [states(plain, "the cat " * 63).mean(0)])


@pytest.mark.parametrize(
    ("pooling", "parts", "files", "cause"),
    [
        ({}, ("Dense",), {}, r"Dense \(2_Dense\), which is not done here"),
        ({"pooling_mode": "sum"}, (), {}, "the pooling mode 'sum' is not known"),
        ({"pooling_mode": 3}, (), {}, "the pooling mode 3 is not known"),
        ({}, (), {"modules": {"a": 1}}, "is not a JSON list"),
        ({}, (), {"modules": [3]}, "lists no modules"),
        ({}, (), {"modules": [{"type": "a.Pooling", "path": "../elsewhere"}]}, "elsewhere"),
        (
            {"include_prompt": False}, (),
            {"config_sentence_transformers": {"prompts": {"q": "a"}, "default_prompt_name": "q"}},
            "leaves the tokens of its prompt out",
        ),
    ],
)  # fmt: skip
def test_files_that_say_what_is_not_done_are_refused_before_a_model_is_loaded(
    tmp_path: Path, plain: Path, pooling: Any, parts: tuple[str, ...], files: Any, cause: str
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/config.json").write_text("{}")
    described = describe_checkpoint(published(plain, tmp_path / "m", pooling, *parts, **files))
    with pytest.raises((UsageError, InvalidCheckpoint), match=cause):
        list(find_task("feature-extraction", Sources()).checked({}, [Row(0, "a", {})], described))
