"""docs/reference/errors.md lists every code, and says of its examples what bigpipe says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bigpipe.errors import ManifestError
from bigpipe.orchestrator.recipe.graph import load_recipe
from bigpipe.orchestrator.recipe.problems import Fault

TEXT = (Path(__file__).parents[2] / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")
HEADINGS = re.findall(r"^### (BP\d{3}): (.+)$", TEXT, re.MULTILINE)
EXAMPLE = re.compile(r"^(BP\d{3}): .*?```yaml\n(.*?)\n```\n\n```text\n(.*?)\n```", re.DOTALL)
EXAMPLES = [match.groups() for section in TEXT.split("\n### ") if (match := EXAMPLE.match(section))]


def test_the_codes_are_those_of_the_program_in_order() -> None:
    assert [code for code, _ in HEADINGS] == sorted(code.value for code in Fault)


@pytest.mark.parametrize(
    ("code", "manifest", "message"), [pytest.param(*example, id=example[0]) for example in EXAMPLES]
)
def test_each_example_gives_its_message(
    code: str, manifest: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("recipe.yaml")
    path.write_text(manifest + "\n", encoding="utf-8")
    with pytest.raises(ManifestError) as caught:
        load_recipe(path, environment={})
    assert str(caught.value) == message
    assert {problem.code for problem in caught.value.problems} == {code}


def test_most_codes_have_an_example() -> None:
    assert len(EXAMPLES) >= len(Fault) - 7
