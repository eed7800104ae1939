"""YAML beside manifests: read like any, but for what would crash the loader or fill memory."""

from __future__ import annotations

import pytest

from bigpipe import plainyaml


def test_plain_yaml_is_read():
    assert plainyaml.load(b"a: [1, {b: c}]\nd: no\n") == {"a": [1, {"b": "c"}], "d": False}
    assert plainyaml.load("") is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000 + "]" * 100_000, "nests deeper than 64"),
        ("{a: " * 100_000, "nests deeper than 64"),
        ("a: &a [1]\nb: *a\n", r"line 2: it holds the alias \*a"),
        ("a: &a {b: *a}\n", "alias"),
        ("a: [\n", "expected"),
        ("!!python/object/apply:os.system [x]", "could not determine a constructor"),
        (b"\xff", "."),
        ('"\\UFFFFFFFF"', "."),
        ("a: 1\n--- \nb: 1\n", "single document"),
        ("x: " + "1" * 5000, "digits"),
        ("2024-99-99", "month"),
    ],
)
def test_what_is_not_plain_is_refused(text, said):
    with pytest.raises(plainyaml.NotPlain, match=said):
        plainyaml.load(text)
