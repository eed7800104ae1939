"""Who may ask the page, and what a browser may do with its answers."""

from __future__ import annotations

import asyncio
import http.client
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support.hub import LoopbackHub
from support.paging import QUICKSTART, Answer, Visit, until, visiting
from support.workshop import Workshop

from bigpipe.errors import StageFailed
from bigpipe.trust import Limits
from bigpipe.webpage.asking import Busy, Children

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visit]:
    folder = tmp_path_factory.mktemp("safe")
    shutil.copytree(QUICKSTART, folder / "model")
    with visiting(Workshop(folder)) as visit:
        yield visit


@pytest.mark.parametrize("path", ["/", "/api/estimate", "/nothing", "/static/page.js", "/runs", "/recipes/x"])
def test_every_answer_is_sealed(page, path):
    headers = page.get(path).headers
    policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert "set-cookie" not in headers
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "localhost.evil.example", "", "127.0.0.1.nip.io", "["]
)
def test_a_name_that_someone_points_here_is_refused(page, host):
    told = page.get("/", Host=host)
    assert told.status == 421
    assert "by its address in digits" in told.text


@pytest.mark.parametrize("host", ["localhost:9000", "127.0.0.1", "[::1]:8765"])
def test_names_of_loopback_are_answered(page, host):
    assert page.get("/", Host=host).status == 200


def test_other_sites_may_send_nothing(page):
    for site in ("cross-site", "same-site"):
        assert page.get("/?model=model", Sec_Fetch_Site=site).status == 403
        assert page.get("/api/estimate?model=model", Sec_Fetch_Site=site, Sec_Fetch_Mode="no-cors").status == 403
    arrival = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}
    assert page.get("/", **arrival).status == 200
    assert page.get("/?model=model", **arrival).status == 403
    assert page.get("/", **{**arrival, "Sec_Fetch_Dest": "iframe"}).status == 403


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://localhost", "http://["]
)
def test_a_form_of_another_origin_is_refused(page, origin):
    assert page.post("/", {"model": "model"}, Origin=origin).status == 403
    assert page.post("/", {"model": "model"}, Origin=f"http://{page.place}").status == 200


def test_a_form_without_our_token_is_refused(page):
    for given in ("", "x", page.get().form_token[:-1]):
        told = page.post("/answer", {"model": "model", "form_token": given})
        assert told.status == 400
        assert "form is not of this page" in told.text
        assert "<main" not in told.text  # it takes a place in a page
    assert page.post("/answer", {"model": "model"}).status == 200


def test_requests_are_bounded(page):
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    assert page.ask("POST", "/", b"x" * (2 * 2**20 + 1), kind).status == 413
    many = "&".join(f"dtypes=int{number}" for number in range(200))
    assert page.get(f"/?model=model&{many}").status == 400
    assert page.ask("PUT", "/", b"", {}).status == 405
    assert page.ask("TRACE", "/", b"", {}).status == 405


def test_a_body_without_a_length_is_bounded_too(page):
    def endless() -> Iterator[bytes]:
        for _ in range(64):
            yield b"x" * 2**16

    try:
        told = page.ask("POST", "/", endless(), {"Content-Type": "application/x-www-form-urlencoded"})
        assert told.status == 400
    except (ConnectionError, BrokenPipeError):
        pass  # it hung up while we went on
    assert page.get().status == 200


def test_where_others_reach_it_a_token_is_asked_for(tmp_path):
    shutil.copytree(QUICKSTART, tmp_path / "model")
    with visiting(Workshop(tmp_path), "--host", "127.0.0.1") as visit:
        assert "token=" in visit.address
        token = visit.address.partition("token=")[2]
        assert len(token) >= 32
        for path in ("/", "/api/estimate?model=model", "/static/page.js", f"/?token={token[:-1]}", "/?token="):
            assert visit.get(path).status == 401, path
        assert visit.get("/", Cookie=f"bigpipe-1={token}").status == 401
        greeted = visit.get(f"/?token={token}&model=model")
        assert greeted.status == 303
        assert greeted.headers["location"] == "/?model=model"
        cookie, *flags = [part.strip().lower() for part in greeted.headers["set-cookie"].split(";")]
        assert {"httponly", "samesite=strict"} <= set(flags)
        cookie = greeted.headers["set-cookie"].partition(";")[0]
        shown = visit.get("/?model=model", Cookie=cookie)
        assert shown.status == 200
        assert token not in shown.text
        other = 'prefs={"a":1}'  # of another program on this host: cookies know no ports
        assert visit.get("/?model=model", Cookie=f"{other}; {cookie}").status == 200
        assert visit.get("/api/estimate?model=model", Authorization=f"Bearer {token}").status == 200
        assert visit.post("/", {"form_token": "x"}).status == 401


def test_a_redirect_stays_on_the_page(tmp_path):
    with visiting(Workshop(tmp_path), "--host", "127.0.0.1") as visit:
        token = visit.address.partition("token=")[2]
        assert visit.get(f"//evil.example/?token={token}").headers["location"] == "/evil.example/"


def test_only_a_few_work_at_once(tmp_path):
    shutil.copytree(QUICKSTART, tmp_path / "model")
    with LoopbackHub() as hub:
        hub.create("org/model", {"config.json": b"{}"})
        hub.fail("hang", "/api/models", times=100, seconds=30)
        with visiting(Workshop(tmp_path), **hub.environment(tmp_path / "hf")) as visit:
            answers: list[Answer] = []

            def ask_for_one() -> None:
                with suppress(OSError, http.client.HTTPException):  # those that are cut off at the end get no answer
                    answers.append(visit.get("/api/estimate?model=org/model"))

            threads = [threading.Thread(target=ask_for_one) for _ in range(14)]
            for thread in threads:
                thread.start()
            until(lambda: len(answers) >= 4)  # two work, eight wait
            assert [answer.status for answer in answers[:4]] == [503] * 4
            assert all("10 questions wait already" in answer.text for answer in answers[:4])
            assert visit.get("/runs").status == 200
            visit.process.send_signal(2)
            for thread in threads:
                thread.join()


def alive(text: bytes) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if text in (folder / "cmdline").read_bytes() and int(folder.name) != os.getpid():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def ask(code: str, **bounds) -> dict:
    children = Children(Path.cwd(), limits=Limits(**{"seconds": 30, "memory": 2**30, **bounds}))
    return asyncio.run(children.ask(["-c", code], b"{}", "the question"))


def test_a_child_answers():
    assert ask("import sys; print(sys.stdin.read())") == {}


def test_a_child_that_takes_long_is_ended_with_its_own():
    sleep = "import time; time.sleep(61.25)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleep!r}]); {sleep}"
    with pytest.raises(StageFailed, match="the question takes more than 1 s"):
        ask(code, seconds=1)
    until(lambda: not alive(b"time.sleep(61.25)"), 5)


@pytest.mark.parametrize("code", ["print('nothing')", "import os; os.abort()", "print([])", "print('[' * 10**5)",
                                  "x = bytearray(2**31); print({})", "print('{' + ' ' * 2**26 + '}')"])  # fmt: skip
def test_a_child_without_an_answer_is_an_error(code):
    with pytest.raises(StageFailed, match="ended without an answer"):
        ask(code)


def test_a_child_nobody_waits_for_ends():
    async def leave() -> None:
        await asyncio.sleep(0.5)

    async def go() -> None:
        await Children(Path.cwd()).ask(["-c", "import time; time.sleep(62.5)"], b"", "the question", leave)

    with pytest.raises(Busy):
        asyncio.run(go())
    until(lambda: not alive(b"time.sleep(62.5)"), 5)


def test_who_has_gone_while_waiting_waits_no_more():
    async def leave() -> None:
        await asyncio.sleep(0.1)

    async def go() -> dict:
        children = Children(Path.cwd(), at_once=1, waiting=1)
        working = asyncio.ensure_future(children.ask(["-c", "import time; time.sleep(60)"], b"", "the first"))
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="nobody waits"):
            await children.ask(["-c", "print({})"], b"", "the second", leave)
        assert children.asked == 1
        following = asyncio.ensure_future(children.ask(["-c", "print({})"], b"", "the third"))
        await asyncio.sleep(0)
        working.cancel()
        return await following

    assert asyncio.run(go()) == {}
