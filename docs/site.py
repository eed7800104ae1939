"""What mkdocs does besides (`hooks` of mkdocs.yml): the README is the site's first page, and links that leave `docs/`
lead to pages or files of the site."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
BESIDE = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "space/README.md": "space.md",
}
"""Pages that lie beside `docs/` → their place in the site."""
DECISIONS = "decisions/index.md"
LINK = re.compile(r"(?<=\]\()([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add what does not lie below `docs/`: pages, the list of decisions, and files that pages link to."""
    for source, place in BESIDE.items():
        files.append(File.generated(config, place, content=_without_header((ROOT / source).read_text("utf-8"))))
    files.append(File.generated(config, DECISIONS, content=_decisions()))
    for path in sorted(_linked()):
        files.append(File.generated(config, f"files/{path}.txt", content=(ROOT / path).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the page with links as they must be in the site."""
    own = {place: source for source, place in BESIDE.items()}
    source = own.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return LINK.sub(lambda found: _in_site(found[1], source, page.file.src_uri), markdown)


def _in_site(target: str, source: str, place: str) -> str:
    """target: of a link in `source`, relative to it; place: where that is in the site."""
    if "://" in target or (source.startswith("docs/") and not target.startswith("..")):
        return target
    path = _path(target, source)
    if path.startswith("docs/"):
        inside = path.removeprefix("docs/")
        inside = f"{inside}/index.md" if (ROOT / path).is_dir() else inside
    else:
        inside = BESIDE.get(path, f"files/{path}.txt")
    return os.path.relpath(inside, PurePosixPath(place).parent)


def _path(target: str, source: str) -> str:
    return os.path.normpath(str(PurePosixPath(source).parent / target))


def _linked() -> set[str]:
    """Files outside `docs/` that pages link to, and that are no pages of the site."""
    pages = [*BESIDE, *(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
    targets = {_path(target, page) for page in pages for target in LINK.findall((ROOT / page).read_text("utf-8"))
               if "://" not in target}  # fmt: skip
    return {path for path in targets if not path.startswith("docs") and path not in BESIDE and (ROOT / path).is_file()}


def _decisions() -> str:
    pages = sorted((ROOT / "docs/decisions").glob("[0-9]*.md"))
    titles = {page.name: page.read_text("utf-8").partition("\n")[0].lstrip("# ") for page in pages}
    return "# Decisions\n\nHalf a page for each choice that someone will question.\n\n" + "\n".join(
        f"- [{title}]({name})" for name, title in titles.items()
    )


def _without_header(text: str) -> str:
    """Without the fields that a Space has above its page."""
    return re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
