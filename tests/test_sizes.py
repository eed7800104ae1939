"""Sizes and counts as people write and read them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, strategies as st

from bigpipe.errors import UsageError
from bigpipe.sizes import (
    counted,
    exact_size,
    format_duration,
    format_figure,
    format_size,
    format_transfer,
    parse_size,
    size_of,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), (7, 7), ("10GiB", 10 << 30), ("30GIB", 30 << 30), ("10GB", 10**10), ("1.5 TiB", 3 << 39),
        (" 2 kB ", 2000), ("0.1GB", 10**8), ("0.3 B", 0), ("1024", 1024),
    ],
)  # fmt: skip
def test_what_people_write(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", -1, "1e9", "10 Gib", "10Gb", "5 apples", "1,000", True, 1.5, None])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ValueError, match=r"size|bits"):
        parse_size(text)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="max_shard_size: "):
        size_of("max_shard_size", text)  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "meant"), [("5G", "5GB"), ("1.5 gi", "1.5GiB"), ("7k", "7KB"), ("2T", "2TB")])
def test_a_unit_without_its_b_is_told_whole(text: str, meant: str) -> None:
    with pytest.raises(UsageError) as caught:
        size_of("memory", text)
    assert (caught.value.cause, caught.value.cure) == (f"memory: {text!r} is not a size", f"did you mean {meant!r}?")
    assert parse_size(meant)


@given(st.integers(min_value=0, max_value=10**16))
def test_an_exact_size_is_read_back(size: int) -> None:
    assert parse_size(exact_size(size)) == size


def test_what_people_read() -> None:
    assert [format_size(size) for size in (0, 1023, 1024, 13_098_000_000)] == ["0 B", "1023 B", "1.0 KiB", "12.2 GiB"]
    assert [format_transfer(size) for size in (999, 1000, 25_706_000_000)] == ["999 B", "1.0 kB", "25.7 GB"]
    assert [format_figure(number) for number in (1234567, 0.99934, 12.0)] == ["1,234,567", "0.9993", "12"]
    assert [counted(number, "file") for number in (0, 1, 2, 1500)] == ["0 files", "1 file", "2 files", "1,500 files"]


@pytest.mark.parametrize(
    ("seconds", "exact", "whole"),
    [
        (0, "0.00 s", "0 s"), (0.123, "0.12 s", "0 s"), (12.34, "12.3 s", "12 s"), (59.94, "59.9 s", "1 min"),
        (59.96, "1 min", "1 min"), (61, "1 min 1 s", "1 min 1 s"), (3599.7, "1 h", "1 h"),
        (3723, "1 h 2 min", "1 h 2 min"), (1e20, "more than 100 years", "more than 100 years"),
        (math.inf, "more than 100 years", "more than 100 years"),
    ],
)  # fmt: skip
def test_how_long_something_took(seconds: float, exact: str, whole: str) -> None:
    assert format_duration(seconds) == exact
    assert format_duration(seconds, whole=True) == whole
