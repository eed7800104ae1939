"""A real browser: the system's Chromium, driven by playwright; and axe-core, which finds what keeps people out."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
AXE = "axe-core-4.14.1"
AXE_DIGEST = "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745"
"""Of the package as npm has it."""
KEPT = Path(__file__).parents[2] / "build" / AXE
WIDTHS, THEMES = (360, 768, 1280), ("light", "dark")


@contextmanager
def chromium() -> Iterator[Any]:
    """Give a browser. Skip where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install 'bigpipe-ml[browser]'")
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(NAMES)} is on the PATH")
    sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium has none for root
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=program, args=sandbox)
        try:
            yield browser
        finally:
            browser.close()


def axe_script() -> str:
    """Return axe-core's source, fetched once with npm. Skip where that cannot be had."""
    script = KEPT / "package" / "axe.min.js"
    if not script.exists():
        _fetch()
    return script.read_text()


def _fetch() -> None:
    if shutil.which("npm") is None:
        pytest.skip("npm, which brings axe-core, is not on the PATH")
    KEPT.mkdir(parents=True, exist_ok=True)
    name, _, version = AXE.rpartition("-")
    done = subprocess.run(["npm", "pack", f"{name}@{version}"], cwd=KEPT, capture_output=True, text=True, check=False)
    archive = KEPT / f"{AXE}.tgz"
    if done.returncode or not archive.exists():
        pytest.skip(f"npm brings no axe-core: {done.stderr[-200:]}")
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == AXE_DIGEST
    with tarfile.open(archive) as packed:
        packed.extract("package/axe.min.js", KEPT, filter="data")


def violations(page: Any, script: str) -> dict[str, list[str]]:
    """Return what axe finds wrong, by theme, width and rule; and pages that are wider than the window."""
    found: dict[str, list[str]] = {}
    page.evaluate(script)
    for theme in THEMES:
        page.emulate_media(color_scheme=theme, reduced_motion="reduce")
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 800})
            for each in _violations(page):
                found[f"{theme} {width} {each['id']}"] = [node["html"][:200] for node in each["nodes"]]
            if (wide := page.evaluate("document.documentElement.scrollWidth")) > width:
                found[f"{theme} {width} wider than the window"] = [str(wide)]
    return found


def _violations(page: Any) -> list[Mapping[str, Any]]:
    return page.evaluate("axe.run().then(found => found.violations)")


def unnamed_charts(page: Any) -> list[str]:
    """Return drawings without a name, or without a table beside them that has numbers or names in it."""
    return page.evaluate(
        """() => [...document.querySelectorAll("svg")].filter((svg) => {
            if (!svg.getAttribute("aria-label") || svg.getAttribute("role") !== "img") return true;
            const row = svg.closest("tr");
            if (row) return row.querySelectorAll("td.number").length < 2;
            const names = [...svg.querySelectorAll("text")].map((text) => text.textContent);
            const cells = [...document.querySelectorAll("table th, table td")].map((cell) => cell.textContent);
            return !names.some((name) => cells.some((cell) => cell && name.includes(cell)));
        }).map((svg) => svg.outerHTML.slice(0, 200))"""
    )
