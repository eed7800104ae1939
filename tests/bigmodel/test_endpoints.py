"""Tasks over an endpoint: what is asked, what counts as an answer, and a server that is an enemy."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.api import KEY, MODEL, Api, Asked, Reply, error_body, follows

from bigpipe.bigmodel.engines import NoAnswer, Wanted, find_engine
from bigpipe.bigmodel.engines.endpoint import connecting
from bigpipe.bigmodel.engines.openai import OpenAI
from bigpipe.bigmodel.inference import Bound, compute_share, merge_results, plan_work, side_by_side
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.tasks import Answerer, Row, TaskOptions
from bigpipe.errors import BigpipeError, NotAuthorised, Offline, StageFailed, Transient, UsageError
from bigpipe.machine import Machine

HERE = Machine("test", cpus=2, memory=2**33, memory_available=2**33, disk_free=2**40)
ENGINE = find_engine("openai")


@pytest.fixture
def api() -> Iterator[Api]:
    with Api() as server:
        yield server


def rows(*prompts: Any, **data: Any) -> list[Row]:
    return [Row(index, prompt, {"prompt": prompt, **data}) for index, prompt in enumerate(prompts)]


@contextmanager
def asking(api: Api, task: str = "text-generation", key: str | None = None, **fields: Any) -> Iterator[Answerer]:
    own = {name: fields.pop(name) for name in OpenAI.model_fields.keys() & fields.keys()}
    settings = OpenAI(**{"url": api.url, "model": MODEL, "longest_wait": 0.05, "secret": "K" if key else None, **own})
    wanted = Wanted(task=task, machine=HERE, environment={"K": key} if key else {})
    options = TaskOptions(max_new_tokens=fields.pop("max_new_tokens", 32), seed=7, arguments=fields)
    found = ENGINE.find_task(task, Sources())
    found.require_arguments(fields)
    assert ENGINE.serve is not None
    with ENGINE.serve(settings, wanted) as endpoint:
        yield found.bind(endpoint, Path(), options, Sources())


def test_a_text_goes_on_and_a_chat_is_answered(api: Api) -> None:
    chat = [{"role": "system", "content": "be"}, {"role": "user", "content": "good"}]
    with asking(api, max_new_tokens=5) as answer:
        text, talk = answer(rows("one two", chat))
    assert (text.payload, text.tokens, text.read) == ({"text": "owt e"}, 5, 7)
    assert (talk.payload, talk.tokens, talk.read) == ({"text": "doog "}, 5, 7)
    assert [asked.path for asked in api.asked] == ["/v1/completions", "/v1/chat/completions"]
    common = {"model": MODEL, "max_tokens": 5, "n": 1, "stream": False, "temperature": 0}
    assert [asked.body for asked in api.asked] == [{"prompt": "one two", **common}, {"messages": chat, **common}]
    assert "authorization" not in api.asked[0].headers


def test_a_text_may_be_the_message_of_a_user(api: Api) -> None:
    with asking(api, chat=True) as answer:
        assert answer(rows("abc"))[0].payload == {"text": "cba"}
    assert api.asked[0].body["messages"] == [{"role": "user", "content": "abc"}]


def test_a_model_that_knows_only_newer_names_is_asked_by_them(api: Api) -> None:
    def refusing(asked: Asked, reply: Reply) -> Reply:
        old = sorted({"max_tokens", "temperature"} & asked.body.keys())
        return Reply(error_body(f"Unsupported parameter: {old[0]!r}"), 400) if old else reply

    api.change = refusing
    with asking(api) as answer, pytest.raises(NoAnswer, match="Unsupported parameter: 'max_tokens'"):
        answer(rows("ab"))
    with asking(api, length_field="max_completion_tokens", do_sample=True, max_new_tokens=5) as answer:
        assert answer(rows("ab"))[0].payload == {"text": "7:ba"}


def test_vllm_goes_on_with_a_message_that_the_assistant_has_begun(api: Api) -> None:
    """As transformers does; of another server nobody knows whether it would."""
    asked, begun = [{"role": "user", "content": "a"}], {"role": "assistant", "content": "b"}
    task, told = find_engine("vllm").find_task("text-generation", Sources()), []
    for goes_on in (True, False):
        with connecting(api.url, 1, model=MODEL, timeout=10.0, goes_on=goes_on) as endpoint:
            task.bind(endpoint, Path(), TaskOptions(), Sources())(rows(asked, [*asked, begun]))
        told += [{name: value for name, value in each.body.items() if "_" in name} for each in api.asked[-2:]]
    own = {"max_tokens": 32}
    assert told == [own, {**own, "add_generation_prompt": False, "continue_final_message": True}, own, own]


def test_what_is_drawn_has_a_seed_for_each_record(api: Api) -> None:
    drawn = {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "num_return_sequences": 2}
    with asking(api, stop_strings="b", **drawn) as answer:
        found = answer(rows("cba", "xba"))
    assert [each.payload["texts"] for each in found] == [["7:a"] * 2, ["8:a"] * 2]
    sent = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "n": 2, "stop": "b"}
    assert [asked.body["seed"] for asked in api.asked] == [7, 8]
    assert all(asked.body.items() >= sent.items() for asked in api.asked)


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "num_return_sequences"])
def test_what_has_no_effect_without_drawing_is_refused(name: str) -> None:
    task = ENGINE.find_task("text-generation", Sources())
    with pytest.raises(UsageError, match=f"{name} has no effect where nothing is drawn"):
        task.require_arguments({name: 2 if name in ("top_k", "num_return_sequences") else 0.5})


def test_continuations_are_scored_by_what_the_server_says_of_a_prompt(api: Api) -> None:
    with asking(api, "scoring") as answer:
        (found,) = answer(rows("ab", continuation=["c", "~~"]))
    first, second = found.payload["scores"]
    assert first == {"logprob": -99.0, "token_logprobs": [-99.0], "tokens": 1, "greedy": True}
    assert second == {"logprob": -252.0, "token_logprobs": [-126.0, -126.0], "tokens": 2, "greedy": False}
    assert (found.tokens, found.read) == (3, 7)
    assert {asked.body["max_tokens"] for asked in api.asked} == {0}


def test_scores_are_refused_where_a_token_is_put_behind_every_text(api: Api) -> None:
    def ending(asked: Asked, reply: Reply) -> Reply:
        told = json.loads(reply.body)
        for name, value in (("tokens", "</s>"), ("token_logprobs", -1.0), ("top_logprobs", {"</s>": -1.0})):
            told["choices"][0]["logprobs"][name].append(value)
        return replace(reply, body=json.dumps(told).encode())

    api.change = ending
    with asking(api, "scoring") as answer, pytest.raises(NoAnswer, match="puts '</s>' behind every text"):
        answer(rows("ab", continuation="cd"))


def test_vectors_are_put_in_the_order_of_their_index(api: Api) -> None:
    with asking(api, "feature-extraction") as answer:
        found = answer(rows("a", "abc"))
    assert [each.payload["features"] for each in found] == [[1.0, 0.5, -1.0], [3.0, 0.5, -1.0]]
    assert [each.read for each in found] == [2, 2]
    assert len(api.asked) == 1


def said(**changes: Any) -> Callable[[Asked, Reply], Reply]:
    return lambda asked, reply: replace(reply, **changes)


def saying(value: Any) -> Callable[[Asked, Reply], Reply]:
    return said(body=json.dumps(value).encode())


LIES: dict[str, tuple[str, Callable[[Asked, Reply], Reply], str]] = {
    "no JSON": ("text-generation", said(body=b"<html>"), "what is no JSON"),
    "deep": ("text-generation", said(body=b"[" * 100_000), "nested too deeply"),
    "a list": ("text-generation", saying([]), "a list, where an object is due"),
    "no choices": ("text-generation", saying({}), "no choices, where 1 are due"),
    "two choices": ("text-generation", saying({"choices": [{"text": ""}] * 2}), "2 choices, where 1 are due"),
    "odd index": ("text-generation", saying({"choices": [{"text": "", "index": 9}]}), "numbers its choices"),
    "no text": ("text-generation", saying({"choices": [{"text": None, "finish_reason": "length"}]}), "without a text"),
    "filtered": ("text-generation", saying({"choices": [{"text": "x", "finish_reason": "content_filter"}]}), "filter"),
    "no logprobs": ("scoring", saying({"choices": [{"text": "x", "logprobs": None}]}), "no log-probabilities"),
    "likely": ("scoring", saying({"choices": [{"logprobs": {"token_logprobs": [None, 2], "top_logprobs": [1, {}]}}]}),
               "above 0"),
    "no vector": ("feature-extraction", saying({"data": [{"embedding": "AAAA"}]}), "without a vector"),
    "NaN": ("feature-extraction", said(body=b'{"data": [{"embedding": [NaN]}]}'), "nan where a number is due"),
}  # fmt: skip


@pytest.mark.parametrize("case", LIES)
def test_what_is_no_answer_is_none(api: Api, case: str) -> None:
    task, api.change, told = LIES[case]
    with asking(api, task) as answer, pytest.raises(NoAnswer, match=told):
        answer(rows("ab", continuation="c"))
    assert len(api.asked) == 1, "an answer that is wrong is not asked for again"


def test_tokens_that_nobody_can_have_used_are_not_counted(api: Api) -> None:
    api.change = saying({"choices": [{"text": "x"}], "usage": {"completion_tokens": 10**30, "prompt_tokens": "9"}})
    with asking(api) as answer:
        (found,) = answer(rows("ab"))
    assert (found.tokens, found.read) == (0, 0)


def at_first(times: int, **changes: Any) -> Callable[[Asked, Reply], Reply]:
    return lambda asked, reply: replace(reply, **changes) if asked.number <= times else reply


@pytest.mark.parametrize("trouble", [
    {"status": 429, "headers": {"Retry-After": "0"}}, {"status": 500}, {"status": 503, "body": b"<html>busy"},
    {"sends": 5}, {"after": 0.6},
], ids=str)  # fmt: skip
def test_what_passes_is_asked_again(api: Api, trouble: dict[str, Any]) -> None:
    api.change = at_first(2, **trouble)
    with asking(api, timeout=0.4) as answer:
        assert answer(rows("abc"))[0].payload == {"text": "cba"}
    assert len(api.asked) == 3


LASTING: dict[str, tuple[dict[str, Any], type[Exception], str, int]] = {
    "busy": ({"status": 429, "body": error_body("slow down")}, Transient, "429: slow down", 3),
    "a long pause": ({"status": 503, "headers": {"Retry-After": "3600"}}, Transient, "a pause of 1 h", 1),
    "out of order": ({"status": 500, "body": error_body("it broke")}, NoAnswer, "500: it broke", 3),
    "cut": ({"sends": 5}, NoAnswer, "does not answer to its end", 3),
    "silent": ({"after": 0.5}, NoAnswer, "does not answer in 0.2 s|too slowly", 3),
    "dripping": ({"each": 0.05}, NoAnswer, "too slowly", 3),
    "endless": ({"body": b" " * 3 * 2**20}, NoAnswer, "more than the", 3),
    "a bomb": ({"headers": {"Content-Encoding": "br"}}, NoAnswer, "packs its answer", 3),
    "refused": ({"status": 400, "body": error_body("too long")}, NoAnswer, "400: too long", 1),
    "a key": ({"status": 401}, NotAuthorised, "401.*serving.secret", 1),
    "no model": ({"status": 404, "body": error_body("no model toy")}, UsageError, "404: no model toy", 1),
    "elsewhere": ({"status": 307, "headers": {"Location": "http://127.0.0.1:9/"}}, UsageError, "leads elsewhere", 1),
}


@pytest.mark.parametrize("case", LASTING)
def test_what_stays_is_told_after_the_repetitions(api: Api, case: str) -> None:
    changes, kind, told, times = LASTING[case]
    api.change = said(**changes)
    begun = time.monotonic()
    with asking(api, timeout=0.2, retries=2) as answer, pytest.raises(kind, match=f"(?s){told}"):
        answer(rows("abc"))
    assert len(api.asked) == times
    assert time.monotonic() - begun < 5


def test_a_server_that_is_not_there_is_told_of(api: Api) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with asking(api, url=url, retries=1) as answer, pytest.raises(Transient, match="cannot be reached"):
            answer(rows("abc"))


def test_the_key_is_sent_and_shown_nowhere() -> None:
    with Api(key=KEY) as api:
        with asking(api, key=KEY) as answer:
            assert answer(rows("abc"))[0].payload == {"text": "cba"}
        assert api.asked[0].headers["authorization"] == f"Bearer {KEY}"
        api.change = said(status=403, body=error_body(f"who is {KEY}?"))
        with asking(api, key=KEY) as answer, pytest.raises(NotAuthorised) as error:
            answer(rows("abc"))
    assert "who is ***?" in str(error.value)
    assert KEY not in repr(error.value)


@pytest.mark.parametrize(("environment", "kind", "told"), [
    ({}, NotAuthorised, "the variable K, which holds the key"), ({"K": "a\nb"}, UsageError, "no header"),
    ({"K": "schlüssel"}, UsageError, "no header"),
], ids=str)  # fmt: skip
def test_a_key_that_cannot_be_sent_is_refused(environment: dict[str, str], kind: type[Exception], told: str) -> None:
    settings = OpenAI(url="http://127.0.0.1:1/v1", model="m", secret="K")
    with pytest.raises(kind, match=told) as error:
        ENGINE.check(settings, Wanted(task="text-generation", machine=HERE, environment=environment))
    assert isinstance(error.value, BigpipeError)
    assert error.value.field == "serving.secret"


def test_nothing_is_asked_of_the_network_offline() -> None:
    near, far = (OpenAI(url=f"http://{host}/v1", model="m") for host in ("localhost:1", "example.org"))
    wanted = Wanted(task="text-generation", machine=HERE, offline=True)
    ENGINE.check(near, wanted)
    with pytest.raises(Offline, match=r"example\.org"):
        ENGINE.check(far, wanted)


@pytest.mark.parametrize("url", ["host/v1", "ftp://h/v1", "http://me:word@h/v1", "http://h/v1?key=1", "http://", ""])
def test_an_address_is_one(url: str) -> None:
    with pytest.raises(ValueError, match="an address is http"):
        OpenAI(url=url, model="m")


def work(folder: Path, api: Api, prompts: list[str], **fields: Any) -> list[dict[str, Any]]:
    most, given = fields.pop("max_errors", 0), rows(*prompts)
    together = fields.get("concurrency", 8)
    plan_work(folder, given, lambda row: 1, ranks=1, together=lambda batching: together, max_errors=most)
    with asking(api, **fields) as answer:
        bound = Bound(answer, side_by_side, computes=False)
        compute_share(folder, 0, 1, lambda: bound, max_errors=most)
    merge_results(folder, folder, max_errors=most)
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_so_many_are_asked_at_once_and_each_once(tmp_path: Path, api: Api) -> None:
    prompts = [f"prompt {number}" for number in range(30)]
    api.change = said(after=0.05)
    found = work(tmp_path, api, prompts, concurrency=5)
    assert [line["text"] for line in found] == [follows(text, 32) for text in prompts]
    assert sorted(asked.text for asked in api.asked) == sorted(prompts)
    assert api.most_at_once == 5


def test_a_prompt_without_an_answer_is_an_error_of_its_own_and_what_was_answered_stays(
    tmp_path: Path, api: Api
) -> None:
    prompts = [f"prompt {number}" for number in range(6)]

    def refuse_one(asked: Asked, reply: Reply) -> Reply:
        return replace(reply, status=400, body=error_body("too long")) if asked.text == "prompt 3" else reply

    api.change = refuse_one
    with pytest.raises(StageFailed, match=r"prompt 3: NoAnswer: .*400: too long"):
        work(tmp_path, api, prompts, concurrency=2)
    before = {asked.text for asked in api.asked}
    found = work(tmp_path, api, prompts, concurrency=2, max_errors=1)
    assert [set(line) - {"index", "prompt"} for line in found] == [{"text"}] * 3 + [{"error"}] + [{"text"}] * 2
    again = [asked.text for asked in api.asked if asked.text in before]
    assert sorted(again) == sorted([*before, "prompt 3"]), "only what had no answer is asked again"


def test_whoever_asks_needs_no_torch(tmp_path: Path, api: Api) -> None:
    code = (
        "import sys, importlib.util\n"
        f"sys.path[:0] = {sys.path!r}\n"
        f"spec = importlib.util.spec_from_file_location('tested', {__file__!r})\n"
        "tested = importlib.util.module_from_spec(spec); spec.loader.exec_module(tested)\n"
        "from pathlib import Path\n"
        "with tested.Api() as api:\n"
        f"    print(tested.work(Path({str(tmp_path)!r}), api, ['abc'])[0]['text'])\n"
        "print([name for name in ('torch', 'transformers', 'accelerate') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "cba\n[]\n"
