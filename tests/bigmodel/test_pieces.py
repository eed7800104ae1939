"""A text that is read piece by piece has the tokens that it has as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from support.vocabularies import PUBLISHED, TEXTS, WORDS
from transformers import AutoTokenizer

from bigpipe.bigmodel.evaluation import pieces
from bigpipe.bigmodel.evaluation.pieces import Encoded, encode

LONG = 20_000
BETWEEN = [" ", " ", " ", "  ", "\n", "\n\n", " \n", ", ", "é", "日本語", "🙂🙂", "        "]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 2**12)
    monkeypatch.setattr(pieces, "SHARED", 2**10)


def read(tokenizer: Any, text: str, most: int | None = None) -> tuple[Encoded, int]:
    """Tokens, and in how many pieces they were read."""
    begun = []

    @contextmanager
    def bounded() -> Iterator[None]:
        begun.append(1)
        yield

    return encode(tokenizer, text, bounded, most), len(begun)


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "qwen2", "clip", "herbert", "unigram", "llama"])
def test_pieces_give_what_the_whole_gives(tmp_path: Path, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(PUBLISHED[name].make(tmp_path))
    assert tokenizer.is_fast
    random = Random(name)  # noqa: S311
    words = [random.choice([*WORDS, *TEXTS]) + random.choice(BETWEEN) for _ in range(LONG // 5)]
    text = "".join(words)[:LONG]
    whole = tokenizer(text, return_offsets_mapping=True, verbose=False)
    found, number = read(tokenizer, text)
    assert number == 1 + -(-(LONG - 2**12) // (2**12 - 2**10))
    assert found.ids.tolist() == whole["input_ids"]
    assert found.spans(0, len(found.ids)) == [tuple(span) for span in whole["offset_mapping"]]
    few, number = read(tokenizer, text, 100)
    assert few.ids[:100].tolist() == whole["input_ids"][:100]
    assert number == 1, "no more of the text than that takes"


def test_what_has_no_seam_is_read_whole(tmp_path: Path) -> None:
    """Each token of a word without an end depends on where it began."""
    tokenizer = AutoTokenizer.from_pretrained(PUBLISHED["bert"].make(tmp_path))
    text = "hello " * 500 + "x" * LONG + " world" * 500
    found, number = read(tokenizer, text)
    assert found.ids.tolist() == tokenizer(text)["input_ids"]
    assert number == 3
