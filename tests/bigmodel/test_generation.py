"""Tasks on tiny models: what transformers gives for each prompt alone, whatever its batch."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import make_checkpoint, tiny_tokenizer

from bigpipe.bigmodel.checkpoint import describe_checkpoint
from bigpipe.bigmodel.execution import load
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.tasks import Answerer, Row, TaskOptions, find_task, read_prompts
from bigpipe.errors import UsageError
from bigpipe.trust import Trust

TEXTS = ["Hello", "a much longer prompt than the others", "x", "two words"]


def bind(task: str, model: Any, path: Path, sources: Sources = Sources(), **options: Any) -> Answerer:
    return find_task(task, sources).bind(model, path, TaskOptions(**options), sources)


def rows(texts: list[Any] = TEXTS) -> list[Row]:
    return [Row(index, text, {"prompt": text}) for index, text in enumerate(texts)]


def alone(model: Any, text: str, **options: Any) -> str:
    tokenizer = tiny_tokenizer()
    tokens = torch.tensor([tokenizer(text)["input_ids"]])
    made = model.generate(tokens, attention_mask=torch.ones_like(tokens), pad_token_id=0, **options)[0]
    start = 0 if model.config.is_encoder_decoder else tokens.shape[1]
    return str(tokenizer.decode(made[start:], skip_special_tokens=True))


@pytest.mark.parametrize("architecture", ["opt", "llama", "gpt2", "bloom", "t5", "bart"])
@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_each_text_is_what_its_prompt_alone_gives(tmp_path: Path, architecture: str, home: str) -> None:
    path = make_checkpoint(tmp_path, architecture)
    model = load(path, {"": home})
    task = bind("text-generation", model, path, max_new_tokens=6)
    plain = load(path)
    wanted = [alone(plain, text, max_new_tokens=6) for text in TEXTS]
    assert [answer.payload for answer in task(rows())] == [{"text": text} for text in wanted]
    assert [answer.payload["text"] for row in rows() for answer in task([row])] == wanted


def test_counts_the_tokens_made(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "opt")
    model = load(path)
    task = bind("text-generation", model, path, max_new_tokens=9)
    assert [answer.tokens for answer in task(rows())] == [9] * 4
    tokens = torch.tensor([tiny_tokenizer()("Hello")["input_ids"]])
    third = int(model.generate(tokens, max_new_tokens=9)[0, tokens.shape[1] + 2])
    model.generation_config.eos_token_id = third
    assert task(rows()[:1])[0].tokens <= 3


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [("llama", {}), ("llama", {"do_sample": True}), ("llama", {"num_beams": 2}), ("t5", {})],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_an_error(
    tmp_path: Path, architecture: str, arguments: dict[str, Any], value: float
) -> None:
    path = make_checkpoint(tmp_path, architecture)
    model = load(path)
    task = bind("text-generation", model, path, max_new_tokens=3, arguments=arguments)
    assert len(task(rows()[:2])) == 2
    norm = next(each for name, each in model.named_parameters() if "norm" in name)
    norm.data = torch.full_like(norm, value)
    with pytest.raises(ValueError, match=r"infinite or no numbers.*dtype: float32"):
        task(rows()[:2])


def test_draws_depend_on_the_record_alone(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama")
    model = load(path)
    options = {"do_sample": True, "temperature": 0.9, "top_k": 30}
    task = bind("text-generation", model, path, max_new_tokens=8, arguments=options, seed=5)
    together = [answer.payload["text"] for answer in task(rows())]
    assert together == [task([row])[0].payload["text"] for row in rows()]
    other = bind("text-generation", model, path, max_new_tokens=8, arguments=options, seed=6)
    assert other(rows()[:1])[0].payload["text"] == task([Row(1, TEXTS[0], {})])[0].payload["text"] != together[0]


def test_draws_follow_the_models_distribution(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "opt", vocab_size=264)
    model = load(path)
    tokens = torch.tensor([tiny_tokenizer()("x")["input_ids"]])
    weights = torch.softmax(model(tokens).logits[0, -1].double() / 0.5, -1).tolist()
    wanted = Counter[str]()
    for token, weight in enumerate(weights):
        wanted[tiny_tokenizer().decode([token], skip_special_tokens=True)] += weight
    options = {"do_sample": True, "temperature": 0.5, "top_k": 0}
    task = bind("text-generation", model, path, max_new_tokens=1, arguments=options)
    drawn = Counter(answer.payload["text"] for answer in task([Row(index, "x", {}) for index in range(3000)]))
    for text, weight in wanted.most_common(5):
        assert drawn[text] / 3000 == pytest.approx(weight, abs=4 * (weight / 3000) ** 0.5)


def test_chats_go_through_the_models_template(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama")
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
    settings = json.loads((path / "tokenizer_config.json").read_bytes())
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    task = bind("text-generation", load(path), path, max_new_tokens=5)
    chat = [{"role": "user", "content": "hi"}]
    assert task(rows([chat])) == task(rows(["[user] hi\n[assistant] "]))


def test_a_chat_template_runs_in_a_sandbox(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama")
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    settings = json.loads((path / "tokenizer_config.json").read_bytes())
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    task = bind("text-generation", load(path), path)
    with pytest.raises(Exception, match="unsafe"):
        task(rows([[{"role": "user", "content": "hi"}]]))


def test_prompts_beyond_the_models_positions(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "opt", max_position_embeddings=32)
    task = bind("text-generation", load(path), path, max_new_tokens=8)
    with pytest.raises(ValueError, match="26 tokens and 8 new ones are more than the model's 32 positions"):
        task(rows(["y" * 26]))
    with pytest.raises(ValueError, match="empty"):
        task(rows([""]))


def test_what_is_read_and_what_is_made_have_positions_of_their_own(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "bart", max_position_embeddings=32)
    model = load(path)
    assert bind("text-generation", model, path, max_new_tokens=31)(rows(["y" * 28]))
    with pytest.raises(ValueError, match="more than the model's 32 positions"):
        bind("text-generation", model, path, max_new_tokens=8)(rows(["y" * 40]))
    with pytest.raises(ValueError, match="1 token and 32 new ones"):
        bind("text-generation", model, path, max_new_tokens=32)(rows(["y"]))


def test_more_new_tokens_than_positions_are_refused_before_there_is_a_model(tmp_path: Path) -> None:
    task, described = find_task("text-generation", Sources()), describe_checkpoint(make_checkpoint(tmp_path / "opt"))
    list(task.checked({}, rows(), described, Sources(), 127))
    with pytest.raises(UsageError, match="max_new_tokens is 128, and the model has 128 positions") as error:
        list(task.checked({}, rows(), described, Sources(), 128))
    assert error.value.field == "max_new_tokens"
    list(task.checked({}, rows(), describe_checkpoint(make_checkpoint(tmp_path / "t5", "t5")), Sources(), 10_000))


@pytest.mark.parametrize("name", ["text-generation", "feature-extraction"])
def test_a_chat_needs_a_template(tmp_path: Path, name: str) -> None:
    path = make_checkpoint(tmp_path)
    task, described = find_task(name, Sources()), describe_checkpoint(path)
    chat = rows(["text", [{"role": "user", "content": "hi"}]])
    with pytest.raises(UsageError, match="row 1: this is a chat") as error:
        list(task.checked({}, chat, described))
    assert error.value.field == "prompts"
    (path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    list(task.checked({}, chat, described))


@pytest.mark.parametrize("pooling", ["mean", "last", "first"])
@pytest.mark.parametrize("architecture", ["bert", "opt", "t5"])
def test_features(tmp_path: Path, architecture: str, pooling: str) -> None:
    path = make_checkpoint(tmp_path, architecture)
    model = load(path)
    task = bind("feature-extraction", model, path, arguments={"pooling": pooling})
    body = model.get_encoder() if architecture == "t5" else model.base_model
    for text, answer in zip(TEXTS, task(rows()), strict=True):
        tokens = torch.tensor([tiny_tokenizer()(text)["input_ids"]])
        with torch.inference_mode():
            states = body(tokens).last_hidden_state[0]
        wanted = {"mean": states.mean(0), "last": states[-1], "first": states[0]}[pooling]
        assert answer.payload["features"] == pytest.approx(wanted.tolist(), abs=1e-5)
        assert answer.tokens == tokens.shape[1]


FUNCTIONS = """
def shout(model, rows, mark="!", **options):
    return [{"text": row["prompt"].upper() + mark, "seed": row["seed"], "tokens": 2} for row in rows]

def wrong(model, rows):
    return ["text"] * len(rows)

def given(model, rows):
    return rows

def other(model, rows, field):
    return [{field: "another"} for row in rows]
"""


def trusting(base: Path) -> Sources:
    return Sources(trust=Trust(("ownfunctions",)), base=base)


def test_a_function_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "ownfunctions.py").write_text(FUNCTIONS)
    path = make_checkpoint(tmp_path / "model", "opt")
    model, options = load(path), {"arguments": {"mark": "?"}, "seed": 10}
    task = bind("ownfunctions:shout", model, path, sources=trusting(tmp_path), **options)
    answers = task(rows(["a", "b"]))
    assert [answer.payload for answer in answers] == [
        {"text": "A?", "seed": 10, "tokens": 2},
        {"text": "B?", "seed": 11, "tokens": 2},
    ]
    assert answers[0].tokens == 2
    named = [{"prompt": "a", "q": "why", "seed": 7}]
    for column, template, said in (("prompt", None, "A?"), ("q", None, "WHY?"), ("q", "say {prompt}", "SAY A?")):
        (answer,) = task(read_prompts(named, column, tmp_path, template))
        assert answer.payload == {"text": said, "seed": 7, "tokens": 2}
    with pytest.raises(TypeError, match="a list of 1 dicts"):
        bind("ownfunctions:wrong", model, path, sources=trusting(tmp_path))(rows(["a"]))
    given = bind("ownfunctions:given", model, path, sources=trusting(tmp_path))
    assert given([Row(0, "a", {"prompt": "a", "index": 7})])[0].payload["index"] == 7
    for field in ("prompt", "index"):
        other = bind("ownfunctions:other", model, path, sources=trusting(tmp_path), arguments={"field": field})
        with pytest.raises(TypeError, match=f"another '{field}' than the row's"):
            other(rows(["a"]))
    with pytest.raises(UsageError, match="no function or Task of that name"):
        bind("ownfunctions:gone", model, path, sources=trusting(tmp_path))


@pytest.mark.parametrize(
    ("task", "options", "cause"),
    [
        ("text-generatoin", {}, "did you mean 'text-generation'"),
        ("text", {}, "is not known"),
        ("os:system", {}, "module os is not trusted"),
        ("text-generation", {"max_new_tokens": 3}, "set max_new_tokens as a field of the stage"),
        ("feature-extraction", {"pooling": "sum"}, "'weighted_mean', and 'sum' is given"),
        ("feature-extraction", {"top_k": 3}, "no argument 'top_k'"),
    ],
)
def test_refuses_what_cannot_work_before_there_is_a_model(task: str, options: dict[str, Any], cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        list(find_task(task, trusting(Path())).checked(options, rows(), None))


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "opt", tokenizer=False)
    with pytest.raises(UsageError, match="no tokenizer that can be used"):
        bind("text-generation", load(path), path)
    with pytest.raises(UsageError, match="has no `generate`"):
        bind("text-generation", torch.nn.Linear(1, 1), path)
