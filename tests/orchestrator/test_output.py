from __future__ import annotations

import base64
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from bigpipe.orchestrator.contract import Event, NodeFinished, OneAtATime
from bigpipe.orchestrator.launch import output
from bigpipe.orchestrator.launch.output import LONGEST_LINE, LineSplitter, Log, OutputReader
from bigpipe.redaction import Redactor, conceal, conceal_environment, mask, redact, redact_json, stored_hub_token

SECRET = "s3cr3t/with+signs=="


def split(*chunks: bytes) -> list[str]:
    splitter = LineSplitter()
    lines = [line for chunk in chunks for line in splitter.feed(chunk)]
    return lines + splitter.feed(b"", final=True)


@pytest.mark.parametrize(
    ("chunks", "lines"),
    [
        ([b"a\nb\n"], ["a", "b"]),
        ([b"a\r\nb\r", b"\nc"], ["a", "b", "c"]),
        ([b" 0%\r 5", b"0%\r100%\n"], ["100%"]),
        ([b"0%\r50%\r100%\r"], ["100%"]),
        ([b"\x1b[32mgreen\x1b[0m\x1b[K and \x1b]0;title\x07plain\n"], ["green and plain"]),
        ([b"\n\n  \n"], []),
        ([b"caf\xc3", b"\xa9 \xff\n"], ["café \ufffd"]),
    ],
)
def test_lines_are_cut_as_a_terminal_would_show_them(chunks: list[bytes], lines: list[str]) -> None:
    assert split(*chunks) == lines


def test_a_line_without_an_end_is_cut() -> None:
    lines = split(*[b"x" * 10_000] * 20)
    assert sum(map(len, lines)) == 200_000
    assert max(map(len, lines)) <= LONGEST_LINE + 10_000


@given(before=st.integers(0, LONGEST_LINE + 200), size=st.integers(1000, 70_000))
def test_a_secret_is_masked_wherever_the_cuts_fall(before: int, size: int) -> None:
    data = b"x" * before + SECRET.encode() + b"y" * 200
    chunks = [data[start : start + size] for start in range(0, len(data), size)]
    conceal([SECRET])
    assert SECRET not in "".join(split(*chunks))


def test_what_may_be_the_beginning_of_a_secret_is_not_logged_before_its_end() -> None:
    conceal([SECRET])
    splitter = LineSplitter()
    for end in range(1, len(SECRET)):
        assert splitter.feed(b"\rkey " + SECRET[:end].encode()) == []
        assert splitter.pending() == "key"
    splitter.feed(SECRET[-1:].encode())
    assert splitter.pending() == "key ***"


def test_a_secret_with_colours_in_it_is_masked() -> None:
    conceal([SECRET])
    half = len(SECRET) // 2
    assert split(f"key \x1b[1m{SECRET[:half]}\x1b[0m{SECRET[half:]}\n".encode()) == ["key ***"]


@given(st.text(min_size=4).filter(lambda text: len(text.strip()) >= 4 and "*" not in text), st.text(), st.text())
def test_redacted_text_never_holds_the_secret(secret: str, before: str, after: str) -> None:
    assert secret not in Redactor([secret]).text(before + secret + after)


def test_other_spellings_of_a_secret_are_masked_too() -> None:
    conceal([SECRET, "first line\nsecond line", "two\twords", "", "ab"])
    assert redact("https://u:s3cr3t%2Fwith%2Bsigns%3D%3D@host") == "https://u:***@host"
    assert redact("second line") == "***"
    assert redact(r'{"x": "two\twords"}') == '{"x": "***"}'
    assert redact("ab") == "ab"
    assert redact_json({"k": [SECRET, 1, None, {"n": SECRET}]}) == {"k": ["***", 1, None, {"n": "***"}]}


def test_data_holds_a_secret_neither_as_a_word_nor_in_base64() -> None:
    conceal(["s3cr3t-key", "EMPTY"])
    assert mask('{"k": "s3cr3t-key"} \\ns3cr3t-key=s3cr3t%2Dkey') == '{"k": "***"} \\n***=s3cr3t%2Dkey'
    assert mask("s3cr3t-keys are EMPTY") == "s3cr3t-keys are EMPTY"
    assert base64.b64encode(b"s3cr3t-key")[4:-4].decode() not in mask(base64.b64encode(b"me:s3cr3t-key!").decode())


def test_what_buckets_are_signed_in_with_is_masked_and_what_only_sounds_alike_is_not() -> None:
    secrets = {
        "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI",
        "FSSPEC_S3_SECRET": "opensesame",
        "AZURE_STORAGE_KEY": "keykeykey",
    }
    words = {
        "AWS_ACCESS_KEY_ID": "test",
        "AZURE_TOKEN_CREDENTIALS": "prod",
        "S3_KEY_PREFIX": "modelling",
        "AWS_SESSION_TOKEN": "short",
    }
    conceal_environment({**secrets, **words})
    assert mask(" ".join(secrets.values())) == "*** *** ***"
    assert redact("latest product modelling shorter") == "latest product modelling shorter"


def test_passwords_of_addresses_are_concealed_unless_they_are_words_like_any_other() -> None:
    conceal_environment({"HTTP_PROXY": "http://me:home@host", "ALL_PROXY": "http://me:l0ng%2Fpassword@host"})
    assert redact("/home/me with l0ng/password") == "/home/me with ***"
    assert redact("by http://me:home@host, http://token@host and abfs://container@account") == (
        "by http://me:***@host, http://***@host and abfs://container@account"
    )


def test_the_stored_hub_token_is_found(tmp_path: Path) -> None:
    (tmp_path / "huggingface").mkdir()
    (tmp_path / "huggingface" / "token").write_text("hf_one\n")
    (tmp_path / "other").write_text("hf_two")
    assert stored_hub_token({"XDG_CACHE_HOME": str(tmp_path)}) == "hf_one"
    assert stored_hub_token({"HF_HOME": str(tmp_path / "huggingface")}) == "hf_one"
    assert stored_hub_token({"HF_TOKEN_PATH": str(tmp_path / "other")}) == "hf_two"
    assert stored_hub_token({"HOME": str(tmp_path)}) is None


def test_pipes_are_read_to_their_end_and_a_flood_loses_nothing_in_the_log(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.txt")
    ours, theirs = os.pipe()
    other, rank = os.pipe()
    reader = OutputReader(log, {ours: None, other: 1})
    os.write(rank, b"from a rank")
    taken: list[tuple[int | None, str]] = []
    flood = b"".join(b"line %d\n" % number for number in range(30_000))
    with os.fdopen(theirs, "wb") as file:
        writer = threading.Thread(target=file.write, args=(flood,))
        writer.start()
        while writer.is_alive():
            writer.join(0.01)
            taken += reader.take()
    taken += reader.finish()  # the rank's end is still open: it is not waited for
    os.close(rank)
    assert len(taken) == 30_001
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert "[rank 1] from a rank" in lines
    assert [line for line in lines if line.startswith("line")] == [f"line {number}" for number in range(30_000)]


def test_a_process_that_escaped_and_prints_without_end_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "LEFT_SECONDS", 0.2)
    always = os.open("/dev/random", os.O_RDONLY)  # there is more to read at every look
    reader = OutputReader(Log(tmp_path / "log.txt"), {always: None})
    finishing = threading.Thread(target=reader.finish, daemon=True)
    finishing.start()
    finishing.join(20)
    assert not finishing.is_alive()


def test_reporters_see_no_secret_in_any_field_of_an_event() -> None:
    seen: list[Event] = []

    class Seeing:
        def report(self, event: Event) -> None:
            seen.append(event)

    conceal(["s3cr3t-value"])
    told = NodeFinished("n", "failed", 1.0, 2, {"s3cr3t-value": ["of s3cr3t-value"]}, error="no s3cr3t-value")
    OneAtATime(Seeing()).report(told)
    assert seen == [NodeFinished("n", "failed", 1.0, 2, {"***": ["of ***"]}, error="no ***")]
