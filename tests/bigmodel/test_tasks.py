"""Each task on tiny real models: what transformers' own pipeline gives for a row alone, whatever its batch and home."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import models
from support.asking import answer_here
from support.models import tiny_tokenizer

from bigpipe.bigmodel.architecture import looks_ahead
from bigpipe.bigmodel.checkpoint import describe_checkpoint
from bigpipe.bigmodel.execution import load
from bigpipe.bigmodel.inference.working import answer_batch
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.tasks import Answerer, Row, TaskOptions, find_task
from bigpipe.errors import UsageError

SENTENCES = ["hello world", "the cat sat on a mat, the cat sat on a mat", "paris is in france.", "x9 zebra"]
HOMES = ("cpu", "disk")


def bind(name: str, path: Path, home: str = "cpu", **arguments: Any) -> Answerer:
    return find_task(name, Sources()).bind(load(path, {"": home}), path, TaskOptions(arguments=arguments), Sources())


def rows(texts: list[Any], **fields: list[Any]) -> list[Row]:
    more = [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)] or [{}] * len(
        texts
    )
    return [Row(index, text, {"prompt": text, **more[index]}) for index, text in enumerate(texts)]


def make_checkpoint(*arguments: Any, **changes: Any) -> Path:
    return answer_here(models.make_checkpoint(*arguments, **changes))


def make_with_head(*arguments: Any, **changes: Any) -> Path:
    return answer_here(models.make_with_head(*arguments, **changes))


def pipeline(name: str, path: Path) -> Any:
    import transformers

    return transformers.pipeline(name, model=str(path), device=-1)


def payloads(answerer: Answerer, given: list[Row]) -> list[dict[str, Any]]:
    """Of all together; each alone must give the same."""
    together = [answer.payload for answer in answerer(given)]
    assert_alike([answerer([row])[0].payload for row in given], together)
    return together


def assert_alike(found: Any, wanted: Any) -> None:
    """Equal, but for floats, which may differ by what another batch rounds differently."""
    if isinstance(wanted, float):
        assert found == pytest.approx(wanted, abs=1e-5)
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for name in wanted:
            assert_alike(found[name], wanted[name])
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_alike(one, other)
    else:
        assert found == wanted


def plain(value: Any) -> Any:
    """As JSON holds it: numpy's numbers are numbers."""
    return json.loads(json.dumps(value, default=lambda number: number.item()))


CLASSIFIERS = {
    "bert": {}, "roberta": {}, "gpt2": {"pad_token_id": 0}, "llama": {"pad_token_id": None},
    "bart": {"eos_token_id": 3},
}  # fmt: skip


@pytest.fixture(scope="module", params=CLASSIFIERS)
def classifier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"num_labels": 4, **CLASSIFIERS[request.param]}
    return make_with_head(tmp_path_factory.mktemp("model"), request.param, "ForSequenceClassification", **changes)


@pytest.mark.parametrize("home", HOMES)
def test_a_text_is_classified_as_by_transformers(classifier: Path, home: str) -> None:
    wanted = [pipeline("text-classification", classifier)(text, top_k=None) for text in SENTENCES]
    all_of_them = payloads(bind("text-classification", classifier, home, top_k=None), rows(SENTENCES))
    assert_alike([each["labels"] for each in all_of_them], wanted)
    assert_alike(payloads(bind("text-classification", classifier, home), rows(SENTENCES)), [each[0] for each in wanted])
    two = bind("text-classification", classifier, home, top_k=2)(rows(SENTENCES))
    assert_alike([each.payload["labels"] for each in two], [each[:2] for each in wanted])


def test_a_pair_of_texts_is_classified_as_by_transformers(tmp_path: Path) -> None:
    path = make_with_head(tmp_path, "bert", "ForSequenceClassification", num_labels=3)
    given = rows(SENTENCES[:2], second=["is paris in france?", "a cat"])
    classify = pipeline("text-classification", path)
    wanted = [classify({"text": row.prompt, "text_pair": row.data["second"]}) for row in given]
    assert_alike(payloads(bind("text-classification", path, pair="second"), given), wanted)
    assert payloads(bind("text-classification", path), given)[0] != wanted[0]


@pytest.mark.parametrize(
    ("problem", "labels"), [("regression", 1), ("multi_label_classification", 3), (None, 1), ("regression", 2)]
)
def test_scores_are_what_the_config_says_they_are(tmp_path: Path, problem: str | None, labels: int) -> None:
    path = make_with_head(tmp_path, "bert", "ForSequenceClassification", num_labels=labels, problem_type=problem)
    classify = pipeline("text-classification", path)
    wanted = [classify(text) for text in SENTENCES]
    assert_alike(
        payloads(bind("text-classification", path), rows(SENTENCES)), [each for (each,) in map(as_list, wanted)]
    )
    for function in ("sigmoid", "softmax", "none"):
        wanted = [classify(text, top_k=None, function_to_apply=function) for text in SENTENCES]
        asked = bind("text-classification", path, top_k=None, function_to_apply=function)
        assert_alike([each["labels"] for each in payloads(asked, rows(SENTENCES))], wanted)


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


LABELS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
def test_tokens_are_classified_as_by_transformers(tmp_path: Path, strategy: str, home: str) -> None:
    path = make_with_head(tmp_path, "bert", "ForTokenClassification", num_labels=5, id2label=LABELS)
    classify = pipeline("token-classification", path)
    wanted = [plain(classify(text, aggregation_strategy=strategy)) for text in SENTENCES]
    found = payloads(bind("token-classification", path, home, aggregation_strategy=strategy), rows(SENTENCES))
    assert_alike([each["entities"] for each in found], wanted)
    assert any(wanted)
    for text, each in zip(SENTENCES, found, strict=True):
        for span in each["entities"]:
            assert text[span["start"] : span["end"]].replace(" ", "") == span["word"].replace("##", "").replace(" ", "")


def test_labels_that_are_ignored(tmp_path: Path) -> None:
    path = make_with_head(tmp_path, "bert", "ForTokenClassification", num_labels=5, id2label=LABELS)
    everything = bind("token-classification", path, ignore_labels=[])(rows(SENTENCES[:1]))[0].payload["entities"]
    assert [entity["word"] for entity in everything] == ["hello", "world"]
    assert bind("token-classification", path, ignore_labels=list(LABELS.values()))(rows(SENTENCES))[1].payload == {
        "entities": []
    }


def make_clip(folder: Path) -> Path:
    import transformers

    few: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sees = {**few, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config={**few, "vocab_size": 264}, vision_config=sees, projection_dim=32)
    return models.save_model(transformers.CLIPModel(config), folder)


MASKED = ["hello [MASK]", "the cat [MASK] on a mat, the cat sat on a mat", "[MASK] is in [MASK]."]


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize(
    ("architecture", "head"), [("bert", "ForMaskedLM"), ("roberta", "ForMaskedLM"), ("bert", "ForPreTraining")]
)
def test_masks_are_filled_as_by_transformers(tmp_path: Path, architecture: str, head: str, home: str) -> None:
    path = make_with_head(tmp_path, architecture, head)
    fill = pipeline("fill-mask", path)
    found = payloads(bind("fill-mask", path, home, top_k=3), rows(MASKED))
    for text, each in zip(MASKED, found, strict=True):
        wanted = fill(text, top_k=3)
        assert_alike(each["fills"], wanted if text.count("[MASK]") > 1 else [wanted])


def plain_scores(path: Path, prompt: str, continuation: str) -> dict[str, Any]:
    """One text, one forward, one token after the other."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    start, whole = len(tokenizer(prompt)["input_ids"]), tokenizer(prompt + continuation)["input_ids"]
    with torch.no_grad():
        likely = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    each = [likely[place - 1, whole[place]].item() for place in range(start, len(whole))]
    greedy = all(int(likely[place - 1].argmax()) == whole[place] for place in range(start, len(whole)))
    return {"logprob": sum(each), "token_logprobs": each, "tokens": len(each), "greedy": greedy}


CONTINUATIONS = [" world", [" cat", " mat and more", "."], " in france", ["a"]]


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("architecture", ["opt", "llama", "gpt2", "bloom"])
def test_continuations_are_scored_as_a_plain_loop_does(tmp_path: Path, architecture: str, home: str) -> None:
    path = make_checkpoint(tmp_path, architecture)
    given = rows(["hello", "the cat sat on a", "paris is", "x"], then=CONTINUATIONS)
    answers = bind("scoring", path, home, continuation="then")(given)
    for row, answer in zip(given, answers, strict=True):
        texts = row.data["then"] if isinstance(row.data["then"], list) else [row.data["then"]]
        assert_alike(answer.payload["scores"], [plain_scores(path, row.prompt, text) for text in texts])
        assert answer.tokens == sum(len(text) for text in texts)
        assert answer.read == sum(len(row.prompt) + len(text) for text in texts)
    assert_alike(
        [bind("scoring", path, home, continuation="then")([row])[0].payload for row in given],
        [answer.payload for answer in answers],
    )


def test_what_a_model_says_itself_is_greedy(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama")
    generate = find_task("text-generation", Sources()).bind(load(path), path, TaskOptions(max_new_tokens=1), Sources())
    prompts = [f"prompt {number}" for number in range(20)]
    said = [answer.payload["text"] for answer in generate(rows(prompts))]
    told = [(prompt, text) for prompt, text in zip(prompts, said, strict=True) if text.isascii() and text.isprintable()]
    told = [(prompt, text) for prompt, text in told if text]
    given = rows([prompt for prompt, _ in told], continuation=[[text, "~" if text != "~" else "!"] for _, text in told])
    scored = [[score["greedy"] for score in answer.payload["scores"]] for answer in bind("scoring", path)(given)]
    assert scored == [[True, False]] * len(told) != []


def test_a_chat_is_scored_after_its_template(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama")
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
    settings = json.loads((path / "tokenizer_config.json").read_bytes())
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    score = bind("scoring", path)
    chat, text = [{"role": "user", "content": "hi"}], "[user] hi\n[assistant] "
    assert score(rows([chat], continuation=["yes"])) == score(rows([text], continuation=["yes"]))


def test_what_a_tokenizer_puts_behind_a_text_is_no_part_of_a_continuation(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    path, given = make_checkpoint(tmp_path, "llama"), rows(["hello"], continuation=[[" world", "!"]])
    wanted = bind("scoring", path)(given)[0].payload["scores"]
    tokenizer, ends = tiny_tokenizer(), [("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=ends)
    tokenizer.save_pretrained(path)
    assert_alike(bind("scoring", path)(given)[0].payload["scores"], wanted)


def test_a_chat_that_the_assistant_has_begun_is_gone_on_with(tmp_path: Path) -> None:
    """As transformers' pipeline does."""
    path = make_checkpoint(tmp_path, "llama")
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant] {% endif %}"
    settings = json.loads((path / "tokenizer_config.json").read_bytes())
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    begun = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well"}]
    text, generate = "[user] hi</s>[assistant] Well", bind("text-generation", path)
    wanted = pipeline("text-generation", path)(begun, max_new_tokens=32, do_sample=False)[0]["generated_text"]
    found = generate(rows([begun, text]))
    assert found[0].payload == found[1].payload
    assert wanted[-1]["content"] == f"Well{found[0].payload['text']}"
    score = bind("scoring", path)
    assert score(rows([begun], continuation=["!"])) == score(rows([text], continuation=["!"]))


def test_continuations_that_cannot_be_scored(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "opt", max_position_embeddings=32)
    given = rows(["hello", "", "a"], continuation=["x", "y", "z" * 40])
    found = [answer.payload for answer in answer_batch(bind("scoring", path), given, str)]
    assert "scores" in found[0]
    assert [each["error"] for each in found[1:]] == [
        "ValueError: the prompt is empty: nothing stands before the first token that would be scored",
        "ValueError: 41 tokens are more than the model's 32 positions: shorten the prompt",
    ]
    for wrong in ([], "", ["a", 3], None):
        with pytest.raises(UsageError, match="prompt 0: 'continuation' holds no text"):
            list(find_task("scoring", Sources()).checked({}, rows(["a"], continuation=[wrong]), None))
    with pytest.raises(UsageError, match="needs 'continuation', which prompt 0 does not have"):
        list(find_task("scoring", Sources()).checked({}, rows(["a"]), None))


BOTH_WAYS: dict[str, tuple[dict[str, Any], str]] = {
    "bert": ({"architectures": ["BertLMHeadModel"]}, "is_decoder: false"),
    "roberta": ({"architectures": ["RobertaForCausalLM"]}, "is_decoder: false"),
    "llama": ({"is_causal": False}, "is_causal: false"),
}


@pytest.mark.parametrize(("config", "told"), [
    ({"model_type": "xlnet"}, "XLNet"),
    ({"model_type": "xlm"}, "causal: false"),
    ({"model_type": "flaubert", "causal": True}, None),
    ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention: true"),
    ({"model_type": "x", "text_config": {"use_bidirectional_attention": "all"}}, "use_bidirectional_attention: all"),
    ({"model_type": "x", "use_bidirectional_attention": "vision"}, None),
])  # fmt: skip
def test_configs_say_whether_a_model_looks_ahead(config: dict[str, Any], told: str | None) -> None:
    assert looks_ahead(config) == told


@pytest.mark.parametrize("architecture", BOTH_WAYS)
def test_a_model_that_sees_what_it_is_asked_about_scores_nothing(tmp_path: Path, architecture: str) -> None:
    from bigpipe.bigmodel.evaluation.windows import check_model
    from bigpipe.bigmodel.training.examples import check_model as check_learning

    path, (changes, told) = make_checkpoint(tmp_path, architecture), BOTH_WAYS[architecture]
    config = json.loads((path / "config.json").read_bytes())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    described, said = describe_checkpoint(path), rf"reads a text in both directions \({told}\)"
    for check in (
        lambda: list(find_task("scoring", Sources()).checked({}, rows(["a"], continuation=["b"]), described)),
        lambda: check_model(described, Sources()),
        lambda: check_learning("causal-lm", described, [], Sources()),
    ):
        with pytest.raises(UsageError, match=said):
            check()
    more = {"is_decoder": True} if architecture != "llama" else {"is_causal": True}
    (path / "config.json").write_text(json.dumps({**config, **changes, **more}))
    check_model(describe_checkpoint(path), Sources())


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("architecture", ["t5", "bart"])
@pytest.mark.parametrize("arguments", [{}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_an_encoder_decoder_answers_a_text_as_transformers_generates(
    tmp_path: Path, architecture: str, home: str, arguments: dict[str, Any]
) -> None:
    import torch
    from transformers import AutoModelForSeq2SeqLM

    path, tokenizer = make_checkpoint(tmp_path, architecture), tiny_tokenizer()
    options = TaskOptions(arguments=arguments, max_new_tokens=6)
    task = find_task("text2text-generation", Sources()).bind(load(path, {"": home}), path, options, Sources())
    model, wanted = AutoModelForSeq2SeqLM.from_pretrained(path), []
    for text in SENTENCES:
        tokens = torch.tensor([tokenizer(text)["input_ids"]])
        made = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, **arguments)
        wanted.append([tokenizer.decode(each, skip_special_tokens=True) for each in made])
    found = [answer.payload for answer in task(rows(SENTENCES))]
    assert [each.get("texts", [each["text"]]) for each in found] == wanted


def test_tasks_that_make_or_score_text_refuse_the_other_kind_of_model(tmp_path: Path) -> None:
    causal, both = (
        describe_checkpoint(make_checkpoint(tmp_path / "opt")),
        describe_checkpoint(make_checkpoint(tmp_path / "t5", "t5")),
    )
    masked = describe_checkpoint(make_checkpoint(tmp_path / "bert", "bert"))
    given = rows(["a"], continuation=["b"])
    for name, model, cause in (
        ("text2text-generation", causal, "OPTForCausalLM does no text2text-generation: it goes on with its prompt"),
        ("text2text-generation", masked, "BertForMaskedLM generates no text"),
        ("scoring", both, "T5ForConditionalGeneration does no scoring: it reads a prompt apart"),
        ("scoring", masked, "BertForMaskedLM does no scoring: it makes no text"),
    ):
        with pytest.raises(UsageError, match=cause) as error:
            list(find_task(name, Sources()).checked({}, given, model))
        assert error.value.field == "task"
    list(find_task("text2text-generation", Sources()).checked({"num_beams": 2}, given, both))
    seeing = describe_checkpoint(answer_here(make_clip(tmp_path / "clip")))
    with pytest.raises(UsageError, match="CLIPModel makes no features of a text alone"):
        list(find_task("feature-extraction", Sources()).checked({}, given, seeing))
    list(find_task("scoring", Sources()).checked({}, given, causal))


@pytest.mark.parametrize("name", ["text-classification", "token-classification", "fill-mask"])
def test_empty_texts_are_counted_before_there_is_a_model(name: str) -> None:
    task, given = find_task(name, Sources()), rows(["", "a", "", ""])
    assert len(list(task.answerable(given, 3))) == 4
    with pytest.raises(UsageError, match="row 0: the text is empty, and so is that of 2 other rows"):
        list(task.answerable(given, 2))
    assert len(list(find_task("text-generation", Sources()).answerable(given, 0))) == 4


def test_what_a_row_does_wrong_is_its_own_error(tmp_path: Path) -> None:
    path = make_with_head(tmp_path, "bert", "ForMaskedLM", max_position_embeddings=16)
    given = rows(["hello [MASK]", "", "no mask", "a " * 20 + "[MASK]"])
    found = [answer.payload for answer in answer_batch(bind("fill-mask", path), given, str)]
    assert "fills" in found[0]
    assert [each["error"] for each in found[1:]] == [
        "ValueError: the text is empty",
        "ValueError: there is no mask in the 8 tokens that are read of the text: write [MASK] where a token is to be"
        " found",
        "ValueError: 23 tokens are more than the model's 16 positions: shorten the prompt, or set truncate",
    ]
    assert_alike(answer_batch(bind("fill-mask", path, truncate=True), given[:1], str)[0].payload, found[0])
    cut = answer_batch(bind("fill-mask", path, truncate=True), given[3:], str)[0].payload["error"]
    assert cut.startswith("ValueError: there is no mask in the 16 tokens that are read")


@pytest.mark.parametrize("name", ["text-classification", "token-classification"])
def test_a_text_that_is_too_long_is_cut_where_that_is_asked_for(tmp_path: Path, name: str) -> None:
    path = make_with_head(tmp_path, "bert", HEADS[name], max_position_embeddings=16)
    task = bind(name, path, truncate=True)
    short = rows(["a " * 14, "b " * 3])
    wanted = payloads(task, short)
    assert_alike(payloads(task, rows(["a " * 40, "b " * 3])), wanted)
    assert_alike([answer.payload for answer in bind(name, path)(short)], wanted)


def test_the_longer_text_of_a_pair_is_cut(tmp_path: Path) -> None:
    path = make_with_head(tmp_path, "bert", "ForSequenceClassification", max_position_embeddings=16)
    task = bind("text-classification", path, truncate=True, pair="second")
    pairs = [rows(["a " * length], second=["b " * 3])[0] for length in (10, 40)]
    assert_alike(task([pairs[1]])[0].payload, task([pairs[0]])[0].payload)


HEADS = {
    "text-classification": "ForSequenceClassification", "token-classification": "ForTokenClassification",
    "fill-mask": "ForMaskedLM",
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_a_class_that_cannot_do_a_task_is_refused_by_name(tmp_path: Path, name: str) -> None:
    task = find_task(name, Sources())
    for other, head in HEADS.items():
        described = describe_checkpoint(make_with_head(tmp_path / other, "bert", head))
        if other == name:
            list(task.checked({}, rows(SENTENCES), described))
            continue
        with pytest.raises(UsageError, match=f"Bert{head} does no {name}") as error:
            list(task.checked({}, rows(SENTENCES), described))
        assert error.value.field == "task"
        assert f"a class …{HEADS[name]}" in str(error.value.cure)


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("prefix", "fields"),
    [("Electra", SMALL), ("Funnel", {"d_model": 32, "block_sizes": [1], "n_head": 2, "d_head": 8, "d_inner": 32})],
)
def test_a_class_that_learns_without_predicting_tokens_fills_no_masks(
    tmp_path: Path, prefix: str, fields: dict[str, Any]
) -> None:
    import transformers

    config = getattr(transformers, f"{prefix}Config")(vocab_size=264, **fields)
    models.save_model(getattr(transformers, f"{prefix}ForPreTraining")(config), tmp_path)
    described = describe_checkpoint(answer_here(tmp_path))
    with pytest.raises(UsageError, match=f"{prefix}ForPreTraining does no fill-mask: it predicts no tokens") as error:
        list(find_task("fill-mask", Sources()).checked({}, rows(SENTENCES), described))
    assert error.value.field == "task"


@pytest.mark.parametrize(
    ("name", "arguments", "cause"),
    [
        ("text-classification", {"topk": 3}, "takes no argument 'topk'"),
        ("text-classification", {"top_k": 0}, "top_k of text-classification: input should be greater than or equal"),
        ("text-classification", {"top_k": "3"}, "valid integer, and '3' is given"),
        ("text-classification", {"function_to_apply": "relu"}, "'sigmoid', 'softmax' or 'none', and 'relu' is given"),
        ("token-classification", {"aggregation_strategy": "mean"}, "'average' or 'max', and 'mean' is given"),
        ("token-classification", {"ignore_labels": "O"}, "ignore_labels of token-classification"),
        ("fill-mask", {"top_k": None}, "top_k of fill-mask"),
        ("feature-extraction", {"pooling": "sum"}, "pooling of feature-extraction"),
    ],
)
def test_arguments_that_a_task_does_not_take(name: str, arguments: dict[str, Any], cause: str) -> None:
    with pytest.raises(UsageError, match=cause) as error:
        list(find_task(name, Sources()).checked(arguments, rows(SENTENCES), None))
    assert error.value.field.removesuffix("[key]") == f"generation.{next(iter(arguments))}"


@pytest.mark.parametrize(
    ("second", "cause"),
    [
        ({}, "needs 'second', which prompt 1 does not have"),
        ({"second": 3}, "prompt 1: 'second' holds no text"),
        ({"second": ""}, "prompt 1: 'second' holds no text"),
        ({"second": ["a", "b"]}, "prompt 1: 'second' holds no text"),
    ],
)
def test_a_pair_needs_its_second_text(second: dict[str, Any], cause: str) -> None:
    given = [Row(0, "a", {"prompt": "a", "second": "b"}), Row(1, "b", {"prompt": "b", **second})]
    with pytest.raises(UsageError, match=cause):
        list(find_task("text-classification", Sources()).checked({"pair": "second"}, given, None))


@pytest.mark.parametrize("name", HEADS)
def test_a_chat_is_no_text(tmp_path: Path, name: str) -> None:
    described = describe_checkpoint(make_with_head(tmp_path, "bert", HEADS[name]))
    chat = rows([[{"role": "user", "content": "hi"}]])
    with pytest.raises(UsageError, match="this is a chat, and the task reads texts"):
        list(find_task(name, Sources()).checked({}, chat, described))


def test_a_tokenizer_without_a_mask_fills_none(tmp_path: Path) -> None:
    path = make_with_head(tmp_path, "bert", "ForMaskedLM", tokenizer=tiny_tokenizer())
    with pytest.raises(UsageError, match="has no mask token"):
        bind("fill-mask", path)
