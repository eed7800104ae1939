"""The site of the documents: generated pages are current, links lead somewhere, nothing is fetched from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GENERATED = ("answers", "command-line", "kinds", "manifest", "python")


def test_the_generated_pages_of_the_reference_are_current(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    subprocess.run([sys.executable, ROOT / "docs/generated.py", tmp_path], env=environment, check=True)
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(GENERATED)
    for name in GENERATED:
        written = (ROOT / f"docs/reference/{name}.md").read_text()
        assert written == (tmp_path / f"{name}.md").read_text(), f"{name}: make reference"


def test_the_reference_names_every_command_export_answer_and_event() -> None:
    import bigpipe
    from bigpipe.cli import cli
    from bigpipe.orchestrator.contract import EVENTS
    from bigpipe.orchestrator.report.answers import ANSWERS

    pages = {name: (ROOT / f"docs/reference/{name}.md").read_text() for name in GENERATED}
    headings = {name: set(re.findall(r"^#+ `?([^`\n]+?)`?$", text, re.MULTILINE)) for name, text in pages.items()}
    assert set(cli.commands) <= headings["command-line"]
    assert set(bigpipe.__all__) <= headings["python"]
    assert set(ANSWERS) | set(EVENTS) <= headings["answers"]


def test_every_field_of_an_answer_is_described() -> None:
    answers = (ROOT / "docs/reference/answers.md").read_text().partition("## Events")[0]
    assert re.findall(r"^\| `.*\| +\|$", answers, re.MULTILINE) == []
    assert len(re.findall(r"^\| `", answers, re.MULTILINE)) > 100


class Fetched(HTMLParser):
    """What a browser fetches by itself when it opens a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "src"}
        found = dict(attrs).get(names.get(tag, ""))
        if found and dict(attrs).get("rel") not in ("prev", "next", "canonical"):
            self.addresses.append(found)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="pip install 'bigpipe-ml[docs]'")
    built = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", built],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return built


def test_it_is_built_without_a_warning_and_fetches_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        fetched = Fetched()
        fetched.feed(page.read_text())
        assert not [each for each in fetched.addresses if re.match(r"(https?:)?//", each)], page
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", style.read_text()), style


def test_every_page_is_in_it(site: Path) -> None:
    sources = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert all((site / path).is_file() for path in sources)
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = set(re.findall(r"[\w/.-]+\.md", str(navigation)))
    assert {str(path.with_suffix(".md")) for path in sources if path.parts[0] != "decisions"} <= listed


def test_what_lies_beside_the_documents_is_reached_inside_the_site(site: Path) -> None:
    first = (site / "index.html").read_text()
    assert 'href="files/manifests/quickstart.yaml.txt"' in first
    shown = site / "files/manifests/quickstart.yaml.txt"
    assert shown.read_bytes() == (ROOT / "manifests/quickstart.yaml").read_bytes()
    assert 'href="../files/schema/outputs.schema.json.txt"' in (site / "reference/json.html").read_text()
    assert 'href="how-to/a-stage-kind-of-your-own.html"' in (site / "architecture.html").read_text()
    assert 'href="001-sha256.html"' in (site / "decisions/index.html").read_text()
