"""Recipes of the page's directory with graph and plan; runs while they go on, their reports, and cancelling them."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import sys
from collections.abc import Iterator
from subprocess import DEVNULL
from urllib.parse import quote

import pytest
from support.commanding import BIGPIPE, start
from support.paging import QUICKSTART, Visit, until, visiting
from support.workshop import Workshop
from test_watching import KIND, RECIPE as SLOWLY, running, say

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
RECIPE = """\
version: 1
name: "{name}"
stages:
  download: {{uses: download, with: {{path: {model}}}}}
  estimate: {{uses: estimate, inputs: download, with: {{dtypes: [float32]}}, gates: ["float32.weights <= 1GiB"]}}
"""
ENEMY = "<img src=x onerror=alert(1)>.yaml"


@pytest.fixture
def workshop(tmp_path) -> Workshop:
    shutil.copytree(QUICKSTART, tmp_path / "model")
    (tmp_path / "sizes.yaml").write_text(RECIPE.format(name="sizes", model="model"))
    return Workshop(tmp_path)


@pytest.fixture
def page(workshop) -> Iterator[Visit]:
    with visiting(workshop) as visit:
        yield visit


def test_recipes_are_listed_with_graph_and_plan(workshop, page, tmp_path_factory):
    away = tmp_path_factory.mktemp("away") / "away.yaml"
    away.write_text((workshop.folder / "sizes.yaml").read_text())
    (workshop.folder / "link.yaml").symlink_to(away)
    (workshop.folder / "notes.yaml").write_text("a: list of things\n")
    (workshop.folder / "deeper").mkdir()
    (workshop.folder / "deeper" / ENEMY).write_text(RECIPE.format(name="<b>bold</b>", model="../model"))
    listed = page.get("/recipes").text
    names = re.findall(r'<a href="/recipes/([^"]+)">', listed)
    assert names == ["sizes.yaml", quote(f"deeper/{ENEMY}")]
    assert "<img" not in listed
    shown = page.get("/recipes/sizes.yaml")
    assert shown.status == 200
    assert '<svg viewBox="0 0' in shown.text
    assert re.search(r'<th scope="row">estimate</th><td>estimate</td><td>download</td><td>run</td>', shown.text)
    assert "gate float32.weights" in shown.text
    enemy = page.get(f"/recipes/{names[1]}")
    assert enemy.status == 200
    assert "<img" not in enemy.text
    assert "<b>" not in enemy.text
    for name in ("link.yaml", "notes.yaml", "../sizes.yaml", quote(str(away)), "%2e%2e/x.yaml"):
        assert page.get(f"/recipes/{name}").status in (400, 404), name


def test_a_recipe_that_is_wrong_shows_where(workshop, page):
    (workshop.folder / "sizes.yaml").write_text(RECIPE.format(name="sizes", model="model").replace("dtypes", "dtype"))
    shown = page.get("/recipes/sizes.yaml")
    assert shown.status == 200
    assert "did you mean" in shown.text
    assert re.search(r'class="place">[^<]*sizes.yaml:5:\d+<', shown.text)
    assert "dtype: [float32]" in shown.text  # its text


def events(page: Visit, run: str) -> Iterator[tuple[str, str]]:
    line = http.client.HTTPConnection(page.place, timeout=60)
    line.request("GET", f"/runs/{run}/events")
    found = line.getresponse()
    assert found.getheader("content-type").startswith("text/event-stream")
    name, data = "", []
    while text := found.readline().decode():
        match text.rstrip("\n").partition(": "):
            case ("event", _, name):
                pass
            case ("data", _, more):
                data.append(more)
            case _:
                yield name, "\n".join(data)
                data = []
    line.close()


def test_a_run_is_watched_until_it_is_over(workshop, page):
    with running(workshop):
        run = until(lambda: re.search(r'<a href="/runs/([\w-]+)">', page.get("/runs").text))[1]
        first = page.get(f"/runs/{run}")
        assert f'data-events="/runs/{run}/events"' in first.text
        assert "Cancel" not in first.text
        stream = events(page, run)
        assert next(stream)[0] == "now"
        say(workshop, "one", "hello")
        told = next(text for _, text in stream if "<td>saying 1/3" in text or "1/3" in text)
        assert "── talk" in told
        assert 'class="running"' in told
        say(workshop, "again", "goodbye")
        *_, (name, last) = stream
        assert name == "over"
        assert f'<a href="/runs/{run}/report">' in last
        assert "goodbye" in last
    report = page.get(f"/runs/{run}/report")
    assert report.status == 200
    assert "<h1>slowly: " in report.text
    policy = report.headers["content-security-policy"]
    assert "script" not in policy
    assert re.search(r"style-src 'sha256-[\w+/]{43}='", policy)
    for path in (f"/runs/{run[:5]}", "/runs/nothing", "/runs/..%2f..", f"/runs/{run}x/report"):
        assert page.get(path).status in (400, 404), path


def test_a_run_is_cancelled_only_where_that_is_allowed(workshop, page):
    with running(workshop) as process, visiting(workshop, "--allow-cancel") as allowed:
        run = until(lambda: re.search(r'<a href="/runs/([\w-]+)">', page.get("/runs").text))[1]
        assert page.post(f"/runs/{run}/cancel", {}).status == 400
        assert allowed.post(f"/runs/{run}/cancel", {"form_token": "x"}).status == 400
        assert process.poll() is None
        assert allowed.get(f"/runs/{run}/cancel").status == 404
        token = re.search(r'name="form_token" value="([^"]+)"', allowed.get(f"/runs/{run}").text)[1]
        assert allowed.post(f"/runs/{run}/cancel", {"form_token": token}).status == 303
        assert process.wait(timeout=60) == 130
        assert until(lambda: "interrupted" in allowed.get(f"/runs/{run}").text)
        over = allowed.post(f"/runs/{run}/cancel", {"form_token": token})
        assert over.status == 400
        assert "is over" in over.text


def test_a_number_that_is_another_process_by_now_is_not_interrupted(workshop, tmp_path):
    import json
    import subprocess
    import sys

    from bigpipe.errors import BigpipeError
    from bigpipe.files import read_sealed, write_sealed
    from bigpipe.webpage.looking import cancel

    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with running(workshop):
            store = workshop.folder / "store"
            found = until(lambda: list(store.glob("runs/*/run.json")))[0]
            record = read_sealed(found)
            record = json.loads(json.dumps(record)) | {"process": other.pid}
            write_sealed(found, record)
            with pytest.raises(BigpipeError, match="is not a process of this machine"):
                cancel(record["run"], store)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_recipe_with_a_byte_order_mark_is_listed(tmp_path):
    from bigpipe.webpage.looking import recipes

    (tmp_path / "marked.yaml").write_text(RECIPE.format(name="m", model="model"), encoding="utf-8-sig")
    (tmp_path / "other.yaml").write_text("x: \ufeffversion:\n", encoding="utf-8")
    assert recipes(tmp_path) == ["marked.yaml"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names are bytes")
def test_a_recipe_whose_name_is_no_text_is_left_out(tmp_path):
    from bigpipe.webpage.looking import recipes

    for name in ("sizes.yaml", os.fsdecode(b"\xff.yaml")):
        (tmp_path / name).write_text(RECIPE.format(name="m", model="model"))
    assert recipes(tmp_path) == ["sizes.yaml"]


def test_the_log_ends_with_the_node_that_printed_last(workshop):
    from bigpipe.orchestrator.running import records
    from bigpipe.webpage.looking import run_now

    assert workshop.command("run", "sizes.yaml").returncode == 0
    (folder,) = (workshop.folder / "store" / "runs").iterdir()
    for node, text, when in (("download", "goes on\n", 2e9), ("estimate", "over\n" * 300, 1e9)):
        log = records.node_folder(folder, node) / "1" / "log.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(text)
        os.utime(log, (when, when))
    lines = run_now(folder.name, workshop.folder / "store")["log"].splitlines()
    assert lines[-2:] == ["── download", "goes on"]
    assert len(lines) == 200


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_run_that_ignores_the_keyboard_is_cancelled_too(workshop):
    """As a script's shell starts `bigpipe run &`."""
    from bigpipe.webpage.looking import cancel, run_now

    (workshop.folder / "slowkind.py").write_text(KIND)
    workshop.manifest.write_text(SLOWLY)
    deaf = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *BIGPIPE]
    with start(workshop, "run", "recipe.yaml", command=deaf, stdout=DEVNULL, stderr=DEVNULL) as process:
        try:
            store = workshop.folder / "store"
            run = until(lambda: list(store.glob("runs/*/run.json")))[0].parent.name
            until(lambda: run_now(run, store)["rows"])
            cancel(run, store)
            assert process.wait(timeout=60) == 143
            assert run_now(run, store)["record"].status == "interrupted"
        finally:
            process.kill()


def test_the_graph_has_what_conditions_ask_too(workshop):
    import bigpipe
    from bigpipe.orchestrator.report import graph_json
    from bigpipe.webpage.looking import recipe_graph

    asking = '  shard: {uses: shard, inputs: download, when: "${stages.estimate.metrics.float32.weights} < 1GiB"}\n'
    path = workshop.folder / "asks.yaml"
    path.write_text(RECIPE.format(name="asks", model="model") + asking)
    told = graph_json(bigpipe.load_manifest(path))["nodes"]
    assert told["shard"]["after"] == ["download", "estimate"]
    assert recipe_graph(told).count('class="edge"') == 3


def test_a_recipe_beyond_the_end_of_the_list_is_shown_and_the_list_says_that_it_ends(workshop, page):
    for number in range(201):
        (workshop.folder / f"a{number:03}.yaml").write_text(RECIPE.format(name="m", model="model"))
    assert "Only the first 200 are listed." in page.get("/recipes").text
    assert page.get("/recipes/sizes.yaml").status == 200
