"""What others print while a command works."""

from __future__ import annotations

import io
import sys

from bigpipe.commandline.printing import Others, others_apart, own_stdout, say
from bigpipe.redaction import conceal


class Screen(io.StringIO):
    encoding = "utf-8"


def test_others_print_to_stderr_cleaned_and_whole_lines(monkeypatch) -> None:
    out, err = Screen(), Screen()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    conceal(["s3cr3t-of-others"])
    with others_apart():
        sys.stdout.write("from a \x1b[31mkind s3cr3t-of-")
        say("an answer")
        sys.stdout.write("others\nnot ended")
        assert own_stdout() is out
        assert not sys.stdout.isatty()
    assert (sys.stdout, sys.stderr) == (out, err)
    assert out.getvalue() == "an answer\n"
    assert err.getvalue() == "from a kind ***\nnot ended\n"


def test_a_bar_that_never_ends_its_line_takes_no_memory() -> None:
    screen = Screen()
    others = Others(screen)
    for done in range(1000):
        others.write(f"\r{done} of 1000 " + "=" * 1000)
    assert len(others._open) < 2000
    others.write("x" * 100_000)
    assert len(others._open) < 2000
    others.end()
    assert screen.getvalue().startswith("999 of 1000")
