"""What newcomers type into a recipe, and what they are told: each message was read as a stranger reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigpipe.errors import ManifestError
from bigpipe.orchestrator import commands

TABLE = (Path(__file__).parent / "data" / "newcomers_mistakes.txt").read_text(encoding="utf-8")
CASES = [section.partition("\n") for section in TABLE.split("\n## ")[1:]]


@pytest.mark.parametrize(("title", "body"), [pytest.param(title, body, id=title) for title, _, body in CASES])
def test_it_is_told_where_and_how_to_mend_it(tmp_path: Path, title: str, body: str) -> None:
    lines = body.rstrip("\n").split("\n")
    expected = [line.removeprefix("-> ") for line in lines if line.startswith("-> ")]
    (tmp_path / "m").mkdir()
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(line for line in lines if not line.startswith("-> ")) + "\n")
    error = commands.validate([path])[path]
    assert isinstance(error, ManifestError)
    told = [f"{p.place.line}:{p.place.column} {p.code} {p.cause}; {p.cure}" for p in error.problems]
    assert [text.replace(str(tmp_path), "FOLDER") for text in told] == expected
    assert all(problem.cure for problem in error.problems)


def test_there_are_more_than_twenty() -> None:
    assert len(CASES) > 20
