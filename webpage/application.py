"""The page's addresses, one function each.

/                       the estimator: a form, and its answer
/api/estimate           the same question, answered with the JSON of `bigpipe estimate --json`
/recipes, /recipes/X    recipes of the directory; one with its graph and its plan
/runs, /runs/ID         runs on record; one while it goes on
/runs/ID/report         what `bigpipe report` makes of it
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import jinja2
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from bigpipe.errors import BigpipeError, UsageError
from bigpipe.orchestrator import report
from bigpipe.sizes import Total, format_duration, format_size, format_transfer

from . import questions
from .asking import Busy, Children
from .gpus import GPUS, MOST_AT_ONCE
from .questions import Question, read_question
from .safety import BODY_SECONDS, LARGEST_BODY, Guard, Rules

HERE = Path(__file__).parent
STATIC = {
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
STATUSES = {1: 500, 2: 400, 4: 422, 5: 403, 6: 422, 75: 503}
"""Exit code of a command → status of an answer that has nothing else to tell. 422: what was asked can be read, and
nothing can be made of it, a damaged checkpoint among others."""
MOST_STREAMS = 16
LOOK_SECONDS = 0.5
MOST_FIELDS = 100
SHOWN = frozenset({
    "model", "revision", "batch_size", "sequence_length", "dtypes", "train", "kv_dtype", "gradient_checkpointing",
    "double_quant",
})  # fmt: skip
"""Options that the form always has fields for; it has one for each of the others that is given."""
REPORT_POLICY = "default-src 'none'; style-src 'sha256-{}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


@dataclass(slots=True)
class Page:
    """What the handlers share. directory: whose recipes and models are shown; also: more directories of models."""

    directory: Path
    rules: Rules
    children: Children
    templates: jinja2.Environment
    also: tuple[Path, ...] = ()
    store: Path | None = None
    offline: bool = False
    allow_cancel: bool = False
    streams: int = 0


def application(page: Page) -> ASGIApp:
    """Return the whole page as an ASGI application, guarded."""
    routes = [
        Route("/", _front, methods=["GET", "POST"]),
        Route("/answer", _fragment, methods=["POST"]),
        Route("/api/estimate", _api, methods=["GET"]),
        Route("/recipes", _recipes),
        Route("/recipes/{name:path}", _recipe),
        Route("/runs", _runs),
        Route("/runs/{run}", _run),
        Route("/runs/{run}/events", _events),
        Route("/runs/{run}/report", _report),
        Route("/runs/{run}/cancel", _cancel, methods=["POST"]),
        Route("/static/{name}", _static),
    ]
    handlers: Any = {BigpipeError: _told, 404: _not_there, 405: _not_there, Exception: _bug}
    made = Starlette(routes=routes, exception_handlers=handlers)
    made.state.page = page
    return Guard(made, page.rules)


def templates() -> jinja2.Environment:
    """Return the templates: everything escaped, no secret in it, nothing that is not to be seen."""
    found = report.page_environment(jinja2.FileSystemLoader(HERE / "templates"))
    found.filters |= {
        "size": format_size,
        "transfer": format_transfer,
        "duration": format_duration,
        "total": _total,
        "number": "{:,}".format,
        "address": urlencode,
    }
    return found


def _total(plan: Mapping[str, Any], name: str) -> str:
    return str(Total(plan["at_least"][name], plan[name] is not None))


def _page(request: Request) -> Page:
    page: Page = request.app.state.page
    return page


def _render(request: Request, name: str, status: int = 200, /, **values: Any) -> Response:
    page = _page(request)
    around = {
        "form_token": page.rules.form_token, "path": request.url.path, "directory": str(page.directory),
        "allow_cancel": page.allow_cancel,
    }  # fmt: skip
    text = page.templates.get_template(name).render(**around, **values)
    return Response(text.encode("utf-8", "replace"), status, media_type="text/html; charset=utf-8")


async def _told(request: Request, error: Exception) -> Response:
    """An error of the tree: cause and cure, on a page."""
    known = error if isinstance(error, BigpipeError) else report.as_bigpipe_error(error)
    status = STATUSES.get(known.status, 500)
    return _render(request, "error.html", status, errors=known.as_json())


async def _not_there(request: Request, error: Exception) -> Response:
    told = UsageError("there is nothing at this address", "start from the top of the page")
    return _render(request, "error.html", 404, errors=told.as_json())


async def _bug(request: Request, error: Exception) -> Response:
    """Starlette raises it again, so that the terminal shows it."""
    told = BigpipeError("this is a bug in bigpipe", "the terminal that `bigpipe ui` runs in says more")
    return _render(request, "error.html", 500, errors=told.as_json())


async def _form(request: Request) -> list[tuple[str, str]]:
    """Return the fields of a form of ours. Raise UsageError for any other."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for more in request.stream():
                body += more
                if len(body) > LARGEST_BODY:
                    raise UsageError(f"more than {LARGEST_BODY} bytes were sent", "send less")
    except (TimeoutError, ClientDisconnect) as error:
        raise UsageError("what was sent did not arrive in time", "send it again") from error
    pairs = _pairs(body.decode("utf-8", "replace"))
    given = next((value for name, value in pairs if name == "form_token"), "")
    if not _page(request).rules.is_own_form(given):
        raise UsageError(
            "the form is not of this page, or of an earlier start of it",
            "load the page again; what was pasted is lost then, so copy it first",
        )
    return [(name, value) for name, value in pairs if name != "form_token"]


def _pairs(text: str) -> list[tuple[str, str]]:
    try:
        return parse_qsl(text, keep_blank_values=True, max_num_fields=MOST_FIELDS, errors="replace")
    except ValueError as error:
        raise UsageError(f"more than {MOST_FIELDS} fields were sent", "send less") from error


async def _front(request: Request) -> Response:
    pairs = await _form(request) if request.method == "POST" else _pairs(request.url.query)
    status, shown = await _answered(request, pairs)
    return _render(request, "front.html", status, **_fields(pairs), **shown)


async def _fragment(request: Request) -> Response:
    """The answer alone, or what is wrong, which takes the place of the one before."""
    try:
        pairs = await _form(request)
    except BigpipeError as error:
        return _render(request, "answer.html", STATUSES.get(error.status, 500), page=None, errors=error.as_json())
    status, shown = await _answered(request, pairs)
    return _render(request, "answer.html", status, **shown)


def _fields(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """What the form holds, as it was written: a browser sends the ends of lines as CRLF, and shows them so again."""
    given = {name: value.replace("\r\n", "\n") for name, value in pairs if name != "dtypes"}
    chosen = [value for name, value in pairs if name == "dtypes"] or list(questions.DTYPES)
    more = [name for name in questions.OPTIONS if name in given and name not in SHOWN and given[name].strip()]
    given["lora_targets"] = " ".join(value for name, value in pairs if name == "lora_targets")
    return {
        "given": given, "chosen": chosen, "run_in": questions.RUN_IN, "train": questions.TRAIN, "gpus": GPUS,
        "most_gpus": MOST_AT_ONCE, "more": more,
    }  # fmt: skip


async def _answered(request: Request, pairs: list[tuple[str, str]]) -> tuple[int, dict[str, Any]]:
    """Status, and what the templates show: the tables, errors, and the same question as an address and a command."""
    shown: dict[str, Any] = {"page": None, "errors": [], "again": _again(pairs), "linked": False}
    try:
        question = read_question(pairs)
        if not (question.model or question.config):
            return 200, shown
        told = await _ask(request, question)
    except BigpipeError as error:
        return STATUSES.get(error.status, 500), {**shown, "errors": error.as_json()}
    shown |= {"page": told["page"], "errors": told["estimate"]["errors"], "linked": not question.config}
    return _status(told), shown


def _status(told: Mapping[str, Any]) -> int:
    """What is answered is answered, also that it does not fit."""
    return 200 if told["page"] else STATUSES.get(told["estimate"]["exit_code"], 500)


def _again(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The fields that an address repeats: a config that was pasted is too long for one."""
    return [(name, value) for name, value in pairs if value.strip() and name != "config"]


async def _ask(request: Request, question: Question) -> dict[str, Any]:
    page = _page(request)
    from bigpipe.orchestrator.store import memo_directory

    asked = {
        "question": question.as_json(), "roots": [str(root) for root in (page.directory, *page.also)],
        "memo": str(memo_directory(page.store)), "offline": page.offline,
    }  # fmt: skip
    arguments = ["-m", "bigpipe.webpage.answering"]
    return await page.children.ask(arguments, json.dumps(asked).encode(), "the estimate", lambda: _left(request))


async def _left(request: Request) -> None:
    """Ends when the browser has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _api(request: Request) -> Response:
    """`bigpipe estimate --json`, its options as fields of the query."""
    try:
        told = await _ask(request, read_question(_pairs(request.url.query)))
    except BigpipeError as error:
        return JSONResponse(report.refused("estimate", error, {}), STATUSES.get(error.status, 500))
    return JSONResponse(told["estimate"], _status(told))


async def _recipes(request: Request) -> Response:
    from . import looking

    names = await asyncio.to_thread(looking.recipes, _page(request).directory)
    return _render(request, "recipes.html", names=names, most=looking.MOST_RECIPES)


async def _recipe(request: Request) -> Response:
    """One recipe: its graph and its plan, which the command itself makes, in children."""
    from . import looking

    page, name = _page(request), request.path_params["name"]
    path = await asyncio.to_thread(looking.require_recipe, page.directory, name)
    store = ["--store", str(page.store)] if page.store else []
    offline = ["--offline"] if page.offline else []
    command = ["-m", "bigpipe"]
    drawn = await page.children.ask([*command, "graph", name, "--json"], b"", "the graph", lambda: _left(request))
    planned = await page.children.ask(
        [*command, "plan", name, "--json", *offline, *store], b"", "the plan", lambda: _left(request)
    )
    svg = looking.recipe_graph(drawn["nodes"]) if "nodes" in drawn else ""
    text = await asyncio.to_thread(path.read_text, "utf-8", "replace")
    errors = planned.get("errors", [])
    return _render(
        request, "recipe.html", name=name, graph=svg, edges=drawn.get("nodes", {}), plan=planned, errors=errors,
        text=text, has_plan="nodes" in planned,
    )  # fmt: skip


async def _runs(request: Request) -> Response:
    from . import looking

    found = await asyncio.to_thread(looking.runs, _page(request).store)
    return _render(request, "runs.html", runs=found, most=looking.MOST_RUNS)


async def _run(request: Request) -> Response:
    from . import looking

    now = await asyncio.to_thread(looking.run_now, request.path_params["run"], _page(request).store)
    return _render(request, "run.html", **now)


async def _events(request: Request) -> Response:
    """Server-sent events: what stands on the page of a run, whenever it changes, until the run is over."""
    from . import looking

    page = _page(request)
    record = await asyncio.to_thread(looking.require_run, request.path_params["run"], page.store)
    if page.streams >= MOST_STREAMS:
        raise Busy(f"{page.streams} pages watch runs already", "close one of them")
    headers = {"X-Accel-Buffering": "no"}
    return StreamingResponse(_stream(request, record.run), media_type="text/event-stream", headers=headers)


async def _stream(request: Request, run: str) -> AsyncIterator[bytes]:
    from . import looking

    page, before = _page(request), ""
    template = page.templates.get_template("now.html")
    page.streams += 1
    try:
        while True:
            now = await asyncio.to_thread(looking.run_now, run, page.store)
            text = template.render(**now, form_token=page.rules.form_token, allow_cancel=page.allow_cancel)
            if text != before:
                yield _event("over" if now["over"] else "now", text)
            if now["over"]:
                return
            before = text
            await asyncio.sleep(LOOK_SECONDS)
    finally:
        page.streams -= 1


def _event(name: str, text: str) -> bytes:
    """https://html.spec.whatwg.org/multipage/server-sent-events.html"""
    lines = "".join(f"data: {line}\n" for line in re.split(r"\r\n|\r|\n", text))
    return f"event: {name}\n{lines}\n".encode("utf-8", "replace")


async def _report(request: Request) -> Response:
    from . import looking

    page, run = _page(request), request.path_params["run"]
    await asyncio.to_thread(looking.require_run, run, page.store)
    text = await asyncio.to_thread(lambda: report.report_runs([run], store=page.store))
    style = text.partition("<style>")[2].partition("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    headers = {"Content-Security-Policy": REPORT_POLICY.format(digest)}
    return Response(text.encode("utf-8", "replace"), 200, headers, "text/html; charset=utf-8")


async def _cancel(request: Request) -> Response:
    from . import looking

    await _form(request)
    page, run = _page(request), request.path_params["run"]
    if not page.allow_cancel:
        raise UsageError("this page may not cancel runs", "start it with `bigpipe ui --allow-cancel`")
    await asyncio.to_thread(looking.cancel, run, page.store)
    return RedirectResponse(f"/runs/{run}", 303)


async def _static(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in STATIC:
        return await _not_there(request, UsageError(""))
    text = (HERE / "static" / name).read_text(encoding="utf-8")
    return Response(report.STYLE + text if name == "page.css" else text, 200, media_type=STATIC[name])
