"""`distributed-infer` where a server holds the model: what a recipe may say, what is kept, and what is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.api import KEY, MODEL, Api, Asked, Reply, error_body, follows
from support.workshop import Workshop, statuses

import bigpipe
from bigpipe.errors import ManifestError
from bigpipe.orchestrator.report import report_runs

PROMPTS = ["Hello, my name is", "The", "Once upon a time", "a b c", "Why?"]


@pytest.fixture
def api() -> Iterator[Api]:
    with Api(key=KEY) as server:
        yield server


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGPIPE_HOME", str(tmp_path / "store"))
    monkeypatch.setenv("API_KEY", KEY)


def recipe(api: Api | None, *, inputs: str = "", more: str = "", secrets: str = "[API_KEY]", **fields: Any) -> str:
    url = api.url if api else "http://127.0.0.1:1/v1"
    serving = {"url": url, "model": MODEL, "secret": "API_KEY", **fields.pop("serving", {})}
    given = {"task": "text-generation", "prompts": PROMPTS, "max_new_tokens": 8, "engine": "openai", **fields}
    given = {name: value for name, value in {**given, "serving": serving}.items() if value is not None}
    return (
        "version: 1\nname: asks\nsecrets: [API_KEY]\nstages:\n"
        f"  bring:\n    uses: download\n    with: {{path: model}}\n"
        f"  answer:\n    uses: distributed-infer\n    secrets: {secrets}\n    with: {json.dumps(given)}\n{inputs}{more}"
    )


def results(workshop: Workshop) -> list[dict[str, Any]]:
    return [json.loads(line) for line in next(workshop.folder.glob("store/**/results.jsonl")).read_text().splitlines()]


def problems(tmp_path: Path, text: str) -> str:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ManifestError) as error:
        bigpipe.load_manifest(tmp_path / "recipe.yaml")
    return str(error.value)


def asking_alone(text: str) -> str:
    """Without the download, which only some recipes wire."""
    return text.replace("  bring:\n    uses: download\n    with: {path: model}\n", "")


def test_a_recipe_asks_and_keeps_what_was_answered(tmp_path: Path, api: Api) -> None:
    workshop, text = Workshop(tmp_path), asking_alone(recipe(api))
    result = workshop.run(text)
    assert statuses(result) == {"answer": "succeeded"}
    assert [line["text"] for line in results(workshop)] == [follows(prompt, 8) for prompt in PROMPTS]
    assert result.nodes["answer"].metrics["tokens"] == sum(len(follows(prompt, 8)) for prompt in PROMPTS)
    assert len(api.asked) == 5
    page = report_runs(("last",), store=tmp_path / "store", form="markdown")
    assert "Ranks of answer" in page
    assert "| rank | began | ended | busy | prompts | tokens |" in page
    assert result.records["answer"].peak_rss < 200 * 2**20, "torch alone takes more"
    assert statuses(workshop.run(text.replace('"secret"', '"concurrency": 2, "retries": 0, "secret"'))) == {
        "answer": "cached"
    }
    assert len(api.asked) == 5, "how it is asked is no part of the key"
    kept = [path for path in (tmp_path / "store").rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert kept == []
    assert statuses(workshop.run(text.replace('"max_new_tokens": 8', '"max_new_tokens": 3'))) == {"answer": "succeeded"}
    assert len(api.asked) == 10


def test_a_run_that_broke_off_goes_on_with_other_settings(tmp_path: Path, api: Api) -> None:
    workshop = Workshop(tmp_path)

    def refuse(asked: Asked, reply: Reply) -> Reply:
        return replace(reply, status=503, body=error_body("gone"), headers={"Retry-After": "99"})

    text = asking_alone(recipe(api, serving={"concurrency": 1}))
    api.change = lambda asked, reply: refuse(asked, reply) if asked.number > 3 else reply
    broken = workshop.run(text)
    assert statuses(broken) == {"answer": "failed"}
    assert "a pause of 1 min 39 s" in str(broken.errors[0])
    assert broken.errors[0].exit_code == 75
    before = [asked.text for asked in api.asked[:3]]
    api.change = lambda asked, reply: reply
    assert statuses(workshop.run(text.replace('"concurrency": 1', '"concurrency": 4'))) == {"answer": "succeeded"}
    assert sorted(asked.text for asked in api.asked[4:]) == sorted(set(PROMPTS) - set(before))


def test_a_plan_says_what_will_be_asked_and_asks_nothing(tmp_path: Path, api: Api) -> None:
    (tmp_path / "recipe.yaml").write_text(asking_alone(recipe(api, serving={"concurrency": 3})))
    assert "5 prompts to toy, 3 at once" in bigpipe.plan(tmp_path / "recipe.yaml").render()
    assert api.asked == []


@pytest.mark.parametrize(("text", "told"), [
    (recipe(None, inputs="    inputs: bring\n"), "distributed-infer has no port 'model' with these fields"),
    (recipe(None, more="    launch: {num_processes: 2}\n"), "does not run as ranks with these fields"),
    (recipe(None, engine="nonsense", serving={}), "engine"),
    (recipe(None, task="fill-mask", max_new_tokens=None), "engine openai does no fill-mask; it does text-generation"),
    (recipe(None, task="mine:answer"), "engine openai does no mine:answer"),
    (recipe(None, serving={"urll": "x"}), "engine openai takes no argument 'urll'; did you mean 'url'"),
    (recipe(None, serving={"concurrency": 0}), "concurrency of engine openai: input should be greater than"),
    (recipe(None, serving={"url": "nowhere"}), "url of engine openai: an address is http"),
    (recipe(None, generation={"num_beams": 2}), "text-generation takes no argument 'num_beams'"),
    (recipe(None, dtype="float32"), "the server computes in what it does"),
    (recipe(None, batch_size=2), "is asked a prompt at a time"),
    (recipe(None, split="static"), "has no ranks"),
    (recipe(None, task="scoring", max_new_tokens=None, serving={"chat": True}), "scoring asks no chats; leave it out"),
    (recipe(None, engine="transformers", serving={"url": "http://h"}), "engine transformers takes no argument"),
    (recipe(None, engine=None), "needs a checkpoint on its port 'model'"),
], ids=lambda value: value[:0] or None)  # fmt: skip
def test_what_does_not_go_together_is_told_where_it_stands(tmp_path: Path, text: str, told: str) -> None:
    if told.startswith("needs a checkpoint"):
        text = text.replace(json.dumps({"url": "http://127.0.0.1:1/v1", "model": MODEL, "secret": "API_KEY"}), "{}")
    assert told in problems(tmp_path, text)


def test_what_an_engine_needs_is_asked_for(tmp_path: Path) -> None:
    text = asking_alone(recipe(None)).replace('"url": "http://127.0.0.1:1/v1", ', "")
    assert "engine openai needs 'url'" in problems(tmp_path, text)


@pytest.mark.parametrize(("text", "told"), [
    (recipe(None, secrets="[]"), "the variable API_KEY, which holds the key for 127.0.0.1:1, is not there"),
    (recipe(None, task="feature-extraction", max_new_tokens=None, prompts=[[{"role": "user", "content": "a"}]]),
     "prompts[0]: task feature-extraction takes no chats here"),
])  # fmt: skip
def test_what_only_the_surroundings_tell_is_told_by_the_plan(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "recipe.yaml").write_text(asking_alone(text))
    (error,) = bigpipe.plan(tmp_path / "recipe.yaml").errors()
    assert told in str(error)
    assert error.place is not None
