"""Requests of OpenAI's Batch API in, its responses out: as openai's own types have them, and as `generate` computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from support.contexts import check_context
from support.inferring import context, infer, results
from support.launching import TESTS

from bigpipe.bigmodel.tasks import Prompts, Requests, Row, request_reader, response
from bigpipe.errors import UsageError
from bigpipe.plugins import inferring
from bigpipe.plugins.distributed_infer import InferParams

QUICKSTART = TESTS.parent / "models/quickstart"
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
PARTS = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's, whose texts are words, with a chat template."""
    path = tmp_path_factory.mktemp("model") / "quickstart"
    shutil.copytree(QUICKSTART, path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def request(number: int, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    given = {"prompt": f"prompt {number}"} if url == "/v1/completions" else {}
    body = {"model": "tiny", **given, **body}
    return {"custom_id": f"request-{number}", "method": "POST", "url": url, "body": body}


def written(folder: Path, requests: list[dict[str, Any]]) -> str:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "requests.jsonl").write_text("".join(json.dumps(each) + "\n" for each in requests))
    return "requests.jsonl"


def params(**fields: Any) -> InferParams:
    asked = {
        "task": "text-generation", "prompts": "requests.jsonl", "row_format": "openai-batch", "max_new_tokens": 6,
        "dtype": "float32",
    }  # fmt: skip
    return InferParams(**{**asked, **fields})


def answered(folder: Path, model: Path, requests: list[dict[str, Any]], ranks: int = 1, **fields: Any) -> Any:
    written(folder, requests)
    ctx = context(folder, model, ranks)
    infer(params(**fields), ctx)
    return results(ctx)


def plainly(folder: Path, model: Path, prompts: list[Any], **fields: Any) -> list[str]:
    """What the same stage makes of plain prompts."""
    folder.mkdir(exist_ok=True)
    ctx = context(folder, model)
    infer(InferParams(task="text-generation", prompts=prompts, dtype="float32", **fields), ctx)
    return [row["text"] for row in results(ctx)]


def test_answers_are_what_openai_types_take_and_what_is_generated(tmp_path: Path, model: Path) -> None:
    from openai.types import Completion
    from openai.types.chat import ChatCompletion

    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PARTS}]
    requests = [
        request(0),
        request(1, max_tokens=3),
        request(2, "/v1/chat/completions", messages=chat, max_completion_tokens=4),
        request(3, prompt=["prompt 0"], n=1, stream=False, user="me", logprobs=None),
    ]
    lines = answered(tmp_path / "one", model, requests, batch_size=4)
    assert [line["custom_id"] for line in lines] == ["request-0", "request-1", "request-2", "request-3"]
    assert all(set(line) == {"id", "custom_id", "response", "error"} for line in lines)
    assert all(line["error"] is None and line["response"]["status_code"] == 200 for line in lines)
    assert len({line["id"] for line in lines}) == 4
    bodies = [line["response"]["body"] for line in lines]
    found = [Completion.model_validate(body, strict=True) for body in (bodies[0], bodies[1], bodies[3])]
    said = ChatCompletion.model_validate(bodies[2], strict=True)
    texts = [each.choices[0].text for each in found]
    whole = plainly(tmp_path / "plain", model, ["prompt 0"], max_new_tokens=6)
    assert texts == [*whole, *plainly(tmp_path / "short", model, ["prompt 1"], max_new_tokens=3), *whole]
    prompt = [chat[0], {"role": "user", "content": "Hello"}]
    assert [said.choices[0].message.content] == plainly(tmp_path / "chat", model, [prompt], max_new_tokens=4)
    assert said.choices[0].finish_reason == "length"
    assert said.usage is not None
    assert (said.usage.completion_tokens, said.usage.total_tokens) == (4, said.usage.prompt_tokens + 4)
    two = answered(tmp_path / "two", model, requests, ranks=2, batch_size=4)
    assert two == lines


def test_sampling_is_as_each_request_says(tmp_path: Path, model: Path) -> None:
    hot: dict[str, Any] = {"prompt": "prompt 0", "temperature": 1.5}
    requests = [
        request(0, **hot, seed=7),
        request(1, **hot, seed=7),
        request(2, **hot, seed=8),
        request(3, **hot, seed=7, top_p=0.01),
        request(4, prompt="prompt 0"),
        request(5, prompt="prompt 0", temperature=0),
        request(6, prompt="prompt 0", top_p=0.5),
    ]
    texts = [
        line["response"]["body"]["choices"][0]["text"] for line in answered(tmp_path, model, requests, batch_size=7)
    ]
    same, again, other, sharp, plain, greedy, _ = texts
    assert same == again != other
    assert sharp == plain == greedy
    sampling = {"do_sample": True, "temperature": 1.5, "top_k": 0}
    assert plainly(tmp_path / "sampled", model, ["prompt 0"], max_new_tokens=6, seed=7, generation=sampling) == [same]


def test_a_stop_ends_an_answer_and_is_no_part_of_it(tmp_path: Path, model: Path) -> None:
    (whole,) = plainly(tmp_path / "plain", model, ["Once upon a time"], max_new_tokens=6)
    stop = whole[-3:-1]
    given: dict[str, Any] = {"prompt": "Once upon a time"}
    lines = answered(
        tmp_path, model, [request(0, **given, stop=[stop, "never"]), request(1, **given, stop="never", max_tokens=2)]
    )
    choices = [line["response"]["body"]["choices"][0] for line in lines]
    assert choices[0] == {"index": 0, "text": whole[: whole.index(stop)], "logprobs": None, "finish_reason": "stop"}
    assert whole.startswith(choices[1]["text"])
    assert choices[1]["finish_reason"] == "length"


def test_embeddings_are_those_of_feature_extraction(tmp_path: Path, model: Path) -> None:
    from openai.types import CreateEmbeddingResponse

    requests = [request(n, "/v1/embeddings", input=text) for n, text in enumerate(["hello", ["the cat"]])]
    fields = {"task": "feature-extraction", "prompts": written(tmp_path, requests), "dtype": "float32"}
    ctx, plain = context(tmp_path, model), context(tmp_path / "plain", model)
    infer(InferParams(**fields, row_format="openai-batch"), ctx)
    infer(InferParams(**{**fields, "prompts": ["hello", "the cat"]}), plain)
    for line, row in zip(results(ctx), results(plain), strict=True):
        found = CreateEmbeddingResponse.model_validate(line["response"]["body"])
        assert found.data[0].embedding == row["features"]
        assert found.usage.prompt_tokens == found.usage.total_tokens > 1


def test_an_error_has_the_form_of_openai(tmp_path: Path, model: Path) -> None:
    from openai.types.shared import ErrorObject

    lines = answered(tmp_path, model, [request(0), request(1, prompt="x y " * 300)], max_errors=1)
    assert lines[0]["response"]["status_code"] == 200
    assert (lines[1]["response"]["status_code"], lines[1]["error"]) == (400, None)
    error = ErrorObject.model_validate(lines[1]["response"]["body"]["error"])
    assert error.type == "invalid_request_error"
    assert "positions" in error.message
    row = Row(0, "a", request(0), arguments={})
    died = response(row, {"error": "RankDied: its rank was ended by SIGSEGV, 3 times"}, 0, 0)
    assert died["response"] is None
    assert died["error"] == {"code": "server_error", "message": "its rank was ended by SIGSEGV, 3 times"}
    assert response(row, {"error": "KeyError: 'x'"}, 0, 0)["response"]["status_code"] == 500


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"custom_id": "b", "method": "POST", "url": "/v1/completions"}, "body is missing"),
    ({**request(1), "custom_id": 5}, "custom_id is 5"),
    ({**request(1), "method": "GET"}, "method is 'GET'"),
    ({**request(1), "url": "/v1/images"}, "url is '/v1/images'"),
    (request(1, "/v1/embeddings", input="a"), "asks for feature-extraction"),
    (request(1, model=None), r"body\.model is no text"),
    (request(1, prompt=[1, 2]), r"body\.prompt is no text"),
    (request(1, prompt=["a", "b"]), r"body\.prompt holds 2 texts"),
    (request(1, "/v1/chat/completions", messages=[]), r"body\.messages is no list"),
    (request(1, "/v1/chat/completions", messages=[{"content": "a"}]), r"body\.messages\[0\] has no role"),
    (
        request(1, "/v1/chat/completions", messages=[{"role": "user", "content": [PARTS[0], {"type": "image_url"}]}]),
        r"body\.messages\[0\]\.content\[1\] is no text",
    ),
    (request(1, max_tokens=7), r"body\.max_tokens is 7, and memory is planned for 6"),
    (request(1, max_completion_tokens=0), r"body\.max_completion_tokens is 0"),
    (request(1, temperature=3), r"body\.temperature is 3"),
    (request(1, temperature=True), r"body\.temperature is True"),
    (request(1, top_p="a"), r"body\.top_p is 'a'"),
    (request(1, seed=1.5), r"body\.seed is 1\.5"),
    (request(1, stop=["a", ""]), r"body\.stop is"),
    (request(1, stop=list("abcde")), r"body\.stop is"),
    (request(1, n=2), r"body\.n is not done here but as 1"),
    (request(1, stream=True), r"body\.stream is not done here but as False"),
    (request(1, top_k=3), r"body\.top_k is not done here"),
]


@pytest.mark.parametrize(("wrong", "cause"), WRONG, ids=[cause for _, cause in WRONG])
def test_what_is_not_done_is_refused_with_line_and_field(tmp_path: Path, wrong: dict[str, Any], cause: str) -> None:
    written(tmp_path, [request(0), wrong])
    reader = request_reader("text-generation", 6)
    with pytest.raises(UsageError, match=rf"requests\.jsonl:2: .*{cause}") as refused:
        list(Requests(Prompts("requests.jsonl", "prompt", tmp_path, request=reader)))
    assert refused.value.cure
    assert refused.value.field == "prompts"


def test_a_plan_reads_requests_and_refuses_two_of_one_name(tmp_path: Path) -> None:
    written(tmp_path, [request(0), request(1), {**request(2), "custom_id": "request-0"}])
    ctx = check_context(tmp_path, base=tmp_path)
    with pytest.raises(
        UsageError, match=r"requests\.jsonl:3: custom_id 'request-0' is that of .*requests\.jsonl:1 too"
    ):
        inferring.check(params(), ctx)
    written(tmp_path, [request(0), request(1)])
    inferring.check(params(), ctx)


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"task": "scoring"}, "requests are answered by feature-extraction and text-generation"),
        ({"output_format": "parquet"}, "lines of JSON"),
        ({"column": "text"}, "a request says its prompt itself"),
        ({"template": "{text}"}, "a request says its prompt itself"),
        ({"generation": {"num_return_sequences": 2, "do_sample": True}}, "a request gets one answer"),
    ],
)
def test_fields_that_requests_do_not_go_with_are_refused(fields: dict[str, Any], cause: str) -> None:
    if "task" in fields:
        fields["max_new_tokens"] = 1
    with pytest.raises(ValidationError, match=cause):
        params(**fields)
