"""Canonical digests: one text per value, different texts for different values."""

import hashlib
import json
import math
import os

import pytest
from hypothesis import given, strategies as st

from bigpipe.orchestrator.store.hashing import CHUNK, canonical, digest_of, hash_file
from bigpipe.orchestrator.store.layout import hex_of

text = st.text(st.characters(), max_size=8)  # lone surrogates too: file names may hold them
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4))


def exact(value):
    """A form in which two values are equal only if type and value are."""
    if isinstance(value, dict):
        return "map", sorted((key, exact(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return "list", [exact(item) for item in value]
    return type(value).__name__, repr(value)


@given(values, values)
def test_two_values_share_a_text_only_if_they_are_the_same(one, other):
    assert (canonical(one) == canonical(other)) == (exact(one) == exact(other))


@given(st.dictionaries(text, scalars, max_size=6), st.randoms())
def test_the_order_of_keys_does_not_matter(value, random):
    items = list(value.items())
    random.shuffle(items)
    assert canonical(dict(items)) == canonical(value)


@given(values)
def test_the_text_is_json_without_spaces_that_reads_back(value):
    data = canonical(value)
    assert exact(json.loads(data.decode("utf-8", "surrogatepass"))) == exact(value)


@given(values, text, text)
def test_the_tag_is_part_of_the_digest(value, one, other):
    assert (digest_of(one, value) == digest_of(other, value)) == (one == other)


def test_a_pair_of_surrogates_is_not_the_character_it_would_encode():
    assert canonical("\ud800\udc00") != canonical("\U00010000")


def test_tuples_are_lists():
    assert canonical({"a": (1, (2,))}) == b'{"a":[1,[2]]}'


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, [math.nan], {"a": math.inf}])
def test_what_is_not_a_number_is_refused(value):
    with pytest.raises(ValueError, match="JSON"):
        canonical(value)


@pytest.mark.parametrize("value", [{1: 2}, {None: 1}, [{"a": {True: 1}}], {"a": {1}}, b"x", object()])
def test_what_json_has_no_word_for_is_refused(value):
    with pytest.raises(TypeError):
        canonical(value)


def test_the_digest_is_that_of_the_tagged_text():
    """Fixed for ever: keys of existing stores depend on it."""
    assert (
        digest_of("key", {"b": 1, "a": "é"})
        == "sha256:" + hashlib.sha256('["key",{"a":"é","b":1}]'.encode()).hexdigest()
    )


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 17])
def test_a_file_is_hashed_whole(tmp_path, size):
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    assert hash_file(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        hash_file(tmp_path / "none")


@pytest.mark.parametrize(
    "text", ["", "sha256:", "md5:" + "0" * 64, "sha256:" + "g" * 64, "sha256:../" + "0" * 61, "0" * 64]
)
def test_only_a_digest_becomes_a_file_name(text):
    with pytest.raises(ValueError, match="not a digest"):
        hex_of(text)
