"""The page in a real browser: an estimate, a run, a report; by mouse, by keyboard alone, without a script."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browsing import axe_script, chromium, unnamed_charts, violations
from support.hub import LoopbackHub
from support.paging import QUICKSTART, Visit, until, visiting
from support.workshop import Workshop
from test_watching import running, say

import bigpipe
from bigpipe.sizes import format_size

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
SHOTS = os.environ.get("BIGPIPE_SHOTS")
"""A directory for pictures of the pages, for the eye."""
RECIPE = """\
version: 1
name: sizes
stages:
  download: {uses: download, with: {path: model}}
  estimate: {uses: estimate, inputs: download, with: {dtypes: [float32, int8]}, gates: ["int8.weights <= 1GiB"]}
  shard: {uses: shard, inputs: download, with: {max_shard_size: 1MB}}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(QUICKSTART, folder / "model")
    (folder / "sizes.yaml").write_text(RECIPE)
    return Workshop(folder)


@pytest.fixture(scope="module")
def visit(shop: Workshop) -> Iterator[Visit]:
    with visiting(shop) as found:
        yield found


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    """A page of a fresh profile; what the browser complains about fails the test."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(60_000)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield page
    context.close()
    assert complaints == []


def kv_cache(model: Path, batch: int) -> str:
    return format_size(bigpipe.estimate(model, batch_size=batch)["float16"].kv_cache.bytes)


def row(tab: Any, dtype: str) -> list[str]:
    """Cells of the first table."""
    region = tab.get_by_role("region", name="Memory to infer, by dtype")
    return region.get_by_role("row", name=re.compile(f"^{dtype} ")).get_by_role("cell").all_inner_texts()


def test_an_estimate_is_typed_changed_and_copied(tab, visit, shop):
    tab.goto(visit.address)
    tab.get_by_label("Model", exact=True).fill("model")
    tab.get_by_role("button", name="Estimate").click()
    tab.get_by_role("heading", name="model", exact=True).wait_for()
    budget = bigpipe.estimate(shop.folder / "model")["float16"]
    parts = (budget.weights, budget.kv_cache, budget.activations, budget.runtime)
    assert row(tab, "float16")[:4] == [format_size(part.bytes) for part in parts]
    slider = tab.get_by_label("Batch size, in powers of two")
    slider.focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    assert tab.get_by_label("Batch size", exact=True).input_value() == "4"
    tab.get_by_text("4 × 256 tokens").wait_for()
    assert row(tab, "float16")[1] == kv_cache(shop.folder / "model", 4)
    assert "batch_size=4" in tab.url
    assert tab.title() == "model: what a model needs"
    tab.get_by_label("Run it in").select_option("int8")
    tab.get_by_role("heading", name="Where it goes: int8").wait_for()
    tab.get_by_role("button", name="Copy").click()
    tab.get_by_role("button", name="Copied").wait_for()
    copied = tab.evaluate("navigator.clipboard.readText()")
    assert copied == tab.get_by_role("region", name="The recipe").inner_text()
    assert "scheme: int8" in copied
    tab.reload()
    tab.get_by_text("4 × 256 tokens").wait_for()  # an address can be kept


def test_a_model_of_a_hub(tab, tmp_path):
    files = {path.name: path for path in QUICKSTART.iterdir() if path.suffix in (".json", ".safetensors")}
    with LoopbackHub() as hub:
        commit = hub.create("org/model", files)
        with visiting(Workshop(tmp_path), **hub.environment(tmp_path / "hf")) as visit:
            tab.goto(visit.address)
            tab.get_by_label("Model", exact=True).fill("https://huggingface.co/org/model")
            tab.keyboard.press("Enter")
            tab.get_by_text(f"from the headers of its weights at {commit[:12]}").wait_for()
            assert row(tab, "float16")[1] == kv_cache(QUICKSTART, 1)


def test_what_is_wrong_stands_on_the_page(browser, visit):
    page = browser.new_page()
    page.goto(visit.address)
    page.get_by_label("Model", exact=True).fill("no such model")
    page.keyboard.press("Enter")
    page.get_by_role("alert").filter(has_text="neither a path that exists nor the name of a repository").wait_for()
    page.get_by_text("Or paste a config.json").click()
    page.get_by_label("Model", exact=True).fill("")
    page.get_by_label("The text of a config.json").fill('{"model_type": "<img src=x onerror=alert(1)>"}')
    page.get_by_role("button", name="Estimate").click()
    page.get_by_role("alert").filter(has_text="<img src=x").wait_for()
    assert page.url == visit.address  # what was pasted has no other
    page.get_by_label("The text of a config.json").fill("")
    page.get_by_role("button", name="Estimate").click()
    page.get_by_text("name a model, or paste a config.json", exact=True).wait_for()
    assert page.locator("#answer img").count() == 0
    page.close()


def test_without_a_script(browser, visit, shop):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(visit.address)
    page.get_by_label("Model", exact=True).fill("model")
    page.get_by_label("Batch size", exact=True).fill("8")
    page.get_by_role("button", name="Estimate").click()
    page.get_by_text("8 × 256 tokens").wait_for()
    assert page.locator("input[type=range]:visible, [data-copy]:visible").count() == 0
    context.close()


def test_a_run_is_watched_until_its_report(tab, visit, shop):
    with running(shop):
        until(lambda: "slowly" in visit.get("/runs").text)
        tab.goto(f"{visit.address}runs")
        tab.get_by_role("row", name=re.compile("slowly")).get_by_role("link").click()
        tab.get_by_role("row", name=re.compile("^talk ")).wait_for()
        say(shop, "one", "hello")
        tab.get_by_role("row").filter(has_text="1/3").wait_for()
        tab.get_by_role("region", name="Log").filter(has_text="hello").wait_for()
        say(shop, "again", "goodbye")
        tab.get_by_role("link", name="Report").wait_for()
        assert "succeeded" in tab.locator("#now").get_by_role("status").inner_text()
        tab.get_by_role("link", name="Report").click()
        tab.get_by_role("heading", name="slowly: succeeded").wait_for()
        assert tab.get_by_role("region", name="Nodes", exact=True).get_by_role("row").count() == 3


def test_a_run_that_is_watched_stays_under_the_hand(browser, tmp_path):
    """The focus, the place in the log and what is pressed outlive each change; what is not heard any more is said."""
    workshop = Workshop(tmp_path)
    with running(workshop), visiting(workshop, "--allow-cancel") as visit:
        run = until(lambda: re.search(r'<a href="/runs/([\w-]+)">', visit.get("/runs").text))[1]
        page = browser.new_page(viewport={"width": 800, "height": 600})
        page.goto(f"{visit.address}runs/{run}")
        page.get_by_role("row", name=re.compile("^talk ")).wait_for()
        page.get_by_role("button", name="Cancel this run").focus()
        page.evaluate("window.button = document.activeElement")
        say(workshop, "one", "hello")
        page.get_by_role("row").filter(has_text="1/3").wait_for()
        assert page.evaluate("document.activeElement === window.button")
        assert page.evaluate("document.activeElement.textContent") == "Cancel this run"
        log = next((tmp_path / "store" / "runs" / run).glob("**/log.txt"))
        with log.open("a") as file:
            file.writelines(f"line {number}\n" for number in range(150))
        page.get_by_role("region", name="Log").filter(has_text="line 149").wait_for()
        assert page.evaluate("document.querySelector('.log').scrollTop") > 0  # it goes on with the end
        page.evaluate("document.querySelector('.log').scrollTop = 40")
        with log.open("a") as file:
            file.write("line 150\n")
        page.get_by_role("region", name="Log").filter(has_text="line 150").wait_for()
        assert page.evaluate("document.querySelector('.log').scrollTop") == 40
        page.route("**/events", lambda route: route.fulfill(status=503))
        page.reload()
        page.get_by_text("This page hears nothing more of the run").wait_for()
        page.close()


def test_by_keyboard_alone(tab, visit):
    """Every control is reached by Tab, in the order of the page, and is seen to have the focus."""
    tab.goto(visit.address)
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    while tab.evaluate("document.activeElement.id") != "model":
        tab.keyboard.press("Tab")
    tab.keyboard.type("model")
    tab.keyboard.press("Enter")
    tab.get_by_role("heading", name="model", exact=True).wait_for()
    passed = []
    for _ in range(80):
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement === document.body"):
            break
        passed.append(tab.evaluate("document.activeElement.id || document.activeElement.getAttribute('aria-label') "
                                   "|| document.activeElement.textContent.trim()"))  # fmt: skip
        assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", passed[-1]
    wanted = ["revision", "Or paste a config.json", "batch_size", "Batch size, in powers of two", "sequence_length",
              "run_in", "gpu", "gpus", "More", "Estimate", "Memory to infer, by dtype", "What fits on one GPU", "Copy",
              "recipe"]  # fmt: skip
    places = [passed.index(name) for name in wanted]
    assert places == sorted(places)


def test_nobody_is_kept_out(browser, visit, shop):
    """axe-core, in two themes and three widths; a table behind every drawing; nothing wider than the window."""
    script = axe_script()
    shop.run(RECIPE, reporter=None)
    run = sorted(path.name for path in (shop.folder / "store" / "runs").iterdir())[-1]
    paths = {
        "front": "/", "estimate": "/?model=model&gpu=T4&run_in=int8&batch_size=4", "error": "/?model=no+such",
        "recipes": "/recipes", "recipe": "/recipes/sizes.yaml", "runs": "/runs", "run": f"/runs/{run}",
        "report": f"/runs/{run}/report", "missing": "/nothing",
    }  # fmt: skip
    context = browser.new_context(bypass_csp=True)
    page, found, charts = context.new_page(), {}, {}
    for name, path in paths.items():
        page.goto(visit.address.rstrip("/") + path)
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        if wrong := violations(page, script):
            found[name] = wrong
        if bare := unnamed_charts(page):
            charts[name] = bare
        if SHOTS:
            _shoot(page, name)
    context.close()
    assert found == {}
    assert charts == {}


def _shoot(page: Any, name: str) -> None:
    for theme, width in (("light", 1280), ("dark", 1280), ("light", 360)):
        page.emulate_media(color_scheme=theme)
        page.set_viewport_size({"width": width, "height": 800})
        page.screenshot(path=f"{SHOTS}/{name}-{theme}-{width}.png", full_page=True)
