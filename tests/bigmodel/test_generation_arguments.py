"""Every argument of transformers' GenerationConfig does what it says, or is refused by name before there is a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import make_checkpoint
from transformers import AutoTokenizer, GenerationConfig

from bigpipe.bigmodel.checkpoint import ModelDescription, describe_checkpoint
from bigpipe.bigmodel.execution import load
from bigpipe.bigmodel.memo import remember
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.tasks import Answer, Row, TaskOptions, find_task
from bigpipe.bigmodel.tasks.arguments import (
    FIELDS,
    REFUSED,
    as_floats,
    known_arguments,
    said_by_config,
    wrong_value,
)
from bigpipe.errors import UsageError
from bigpipe.versions import package_version

QUICKSTART = Path(__file__).parents[2] / "models/quickstart"
VOCABULARY = 3072
"""Of the model that ships with the project, whose tokens these are."""
TEXTS = ["Create a new", "Return a", "The"]
TASK = find_task("text-generation", Sources())
SAMPLE = {"do_sample": True}
BEAMS = {"num_beams": 2}
VALUES: Mapping[str, Mapping[str, Any]] = {
    "min_length": {"min_length": 6}, "min_new_tokens": {"min_new_tokens": 3},
    "early_stopping": {**BEAMS, "early_stopping": True}, "stop_strings": {"stop_strings": ["e", "zz"]},
    "do_sample": SAMPLE, "num_beams": BEAMS, "use_cache": {"use_cache": False},
    "cache_implementation": {"cache_implementation": "static"}, "cache_config": {"cache_config": {}},
    "max_cache_len": {"cache_implementation": "static", "max_cache_len": 64},
    "temperature": {**SAMPLE, "temperature": 2}, "top_k": {**SAMPLE, "top_k": 3}, "top_p": {**SAMPLE, "top_p": 0.5},
    "min_p": {**SAMPLE, "min_p": 0.1}, "top_h": {**SAMPLE, "top_h": 0.4}, "typical_p": {**SAMPLE, "typical_p": 0.5},
    "epsilon_cutoff": {**SAMPLE, "epsilon_cutoff": 0.001}, "eta_cutoff": {**SAMPLE, "eta_cutoff": 0.001},
    "repetition_penalty": {"repetition_penalty": 2}, "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
    "length_penalty": {**BEAMS, "length_penalty": 2}, "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[40], [41, 42]]}, "renormalize_logits": {"renormalize_logits": True},
    "forced_bos_token_id": {"forced_bos_token_id": 7}, "forced_eos_token_id": {"forced_eos_token_id": 2},
    "remove_invalid_values": {"remove_invalid_values": True},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": [2, 1.5]},
    "suppress_tokens": {"suppress_tokens": [40]}, "begin_suppress_tokens": {"begin_suppress_tokens": [40]},
    "sequence_bias": {"sequence_bias": [[[40], 2.0]]}, "guidance_scale": {"guidance_scale": 2},
    "watermarking_config": {"watermarking_config": {"bias": 2.5}},
    "num_return_sequences": {**SAMPLE, "num_return_sequences": 2}, "pad_token_id": {"pad_token_id": 9},
    "bos_token_id": {"bos_token_id": 1}, "eos_token_id": {"eos_token_id": [2, 40]},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 2},
    "decoder_start_token_id": {"decoder_start_token_id": 1},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 2},
    "max_matching_ngram_size": {"prompt_lookup_num_tokens": 2, "max_matching_ngram_size": 2},
    "disable_compile": {"disable_compile": True}, "prefill_chunk_size": {"prefill_chunk_size": 4},
}  # fmt: skip


@pytest.fixture
def path() -> Path:
    return QUICKSTART


@pytest.fixture(scope="module")
def model() -> Any:
    return load(QUICKSTART)


def rows(texts: list[str] = TEXTS) -> list[Row]:
    return [Row(index, text, {"prompt": text}) for index, text in enumerate(texts)]


def generate(model: Any, path: Path, arguments: Mapping[str, Any], new: int = 8, seed: int = 0) -> list[Answer]:
    options = TaskOptions(arguments=arguments, max_new_tokens=new, seed=seed)
    return TASK.bind(model, path, options, Sources())(rows())


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(QUICKSTART))


def plain(model: Any, text: str) -> list[int]:
    """The tokens that transformers makes of one prompt."""
    tokens = torch.tensor([tokenizer()(text)["input_ids"]])
    made = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, pad_token_id=1)
    return list(made[0, tokens.shape[1] :].tolist())


def test_every_argument_is_known_and_either_tried_here_or_refused() -> None:
    refused = {name for names in REFUSED.values() for name in names} | FIELDS.keys()
    own = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
    assert known_arguments() == own
    assert VALUES.keys() | (refused & own) == own
    assert not VALUES.keys() & refused


@pytest.mark.parametrize("name", VALUES)
def test_what_is_taken_gives_a_text_per_prompt(model: Any, path: Path, name: str) -> None:
    TASK.check_arguments(VALUES[name])
    for encodes in (False, True):
        wrong = wrong_value(as_floats(VALUES[name]), {}, {"vocabulary": VOCABULARY, "encodes": encodes})
        assert bool(wrong) == (encodes and name == "guidance_scale")  # it asks the decoder alone for a second opinion
    answers = generate(model, path, VALUES[name])
    assert len(answers) == len(TEXTS)
    assert all(isinstance(answer.payload["text"], str) and answer.tokens for answer in answers)


@pytest.mark.parametrize("name", sorted({name for names in REFUSED.values() for name in names} | FIELDS.keys()))
def test_what_is_not_taken_is_named(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        TASK.check_arguments({name: 1})


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("max_token", "max_new_tokens"),
        ("temprature", "did you mean 'temperature'"),
        ("num_beans", "did you mean 'num_beams'"),
        ("max_seq_length", "GenerationConfig|did you mean"),
        ("token_type_ids", "GenerationConfig|did you mean"),
        ("input_ids", "GenerationConfig|did you mean"),
    ],
)
def test_what_is_misspelt_is_told_what_was_meant(name: str, cure: str) -> None:
    with pytest.raises(UsageError, match=f"no argument '{name}'") as raised:
        TASK.check_arguments({name: 1})
    assert raised.match(cure)


@pytest.mark.parametrize(
    ("arguments", "own", "cause"),
    [
        ({"do_sample": True, "temperature": 0.0}, {}, "strictly positive float"),
        ({"do_sample": True, "temperature": "hot"}, {}, 'temperature takes float, and "hot" is given'),
        ({"do_sample": "yes"}, {}, "do_sample takes bool"),
        ({"num_beams": True}, {}, "num_beams takes int"),
        ({"temperature": 0.7}, {}, "do_sample"),
        ({"top_p": 0.5, "do_sample": False}, {"do_sample": True}, "do_sample"),
        ({"num_return_sequences": 3}, {}, "Greedy methods"),
        ({"num_beams": 2, "num_return_sequences": 3}, {}, "smaller or equal to `num_beams`"),
        ({"do_sample": True, "top_p": 5.0}, {}, "top_p"),
        ({"length_penalty": 2.0}, {}, "num_beams"),
        ({"cache_implementation": "magic"}, {}, "cache_implementation"),
        ({}, {"num_return_sequences": 2}, "generation_config.json: Greedy methods"),
    ],
)
def test_values_that_transformers_would_refuse_or_not_heed(
    arguments: dict[str, Any], own: dict[str, Any], cause: str
) -> None:
    assert cause in str(wrong_value(arguments, own))


@pytest.mark.parametrize("encodes", [False, True])
@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": 2, "bad_words_ids": [3]}, "bad_words_ids"),
        ({"bad_words_ids": [[VOCABULARY]]}, "bad_words_ids"),
        ({"exponential_decay_length_penalty": 5}, "exponential_decay_length_penalty"),
        ({"stop_strings": 5}, "stop_strings"),
        ({"stop_strings": []}, "stop_strings"),
        ({"stop_strings": [".", ""]}, "stop_strings"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": [2, VOCABULARY]}, "eos_token_id"),
        ({"suppress_tokens": [-1]}, "suppress_tokens"),
        ({"pad_token_id": VOCABULARY}, "pad_token_id"),
    ],
)
def test_values_that_generating_would_stumble_over(arguments: dict[str, Any], name: str, encodes: bool) -> None:
    said = wrong_value(as_floats(arguments), {}, {"vocabulary": VOCABULARY, "encodes": encodes})
    assert str(said).startswith(f"generation.{name}")


def test_a_text_that_nothing_ends_but_its_length() -> None:
    assert wrong_value({"eos_token_id": -1}, {}, {"vocabulary": VOCABULARY, "encodes": False}) is None


@pytest.mark.parametrize(
    ("arguments", "own"),
    [
        ({"temperature": 0.7}, {"do_sample": True}),
        ({"temperature": 0.7}, None),
        ({}, {"temperature": 0.6, "top_p": 0.9}),
        ({"do_sample": False}, {"do_sample": True, "temperature": 0.6}),
        ({"do_sample": True, "top_k": 0}, {}),
        ({"do_sample": True, "typical_p": 1.0, "no_repeat_ngram_size": 0}, {}),
    ],
)
def test_values_that_go_with_the_models_own(arguments: dict[str, Any], own: dict[str, Any] | None) -> None:
    assert wrong_value(arguments, own) is None


def test_values_are_asked_of_a_child_once(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described, sources = describe_checkpoint(path), Sources(memo=tmp_path)
    for _ in range(2):
        with pytest.raises(UsageError, match="strictly positive float"):
            list(TASK.checked({"do_sample": True, "temperature": 0.0}, rows(), described, sources))
    kept = list((tmp_path / "generation").iterdir())
    assert len(kept) == 1
    remember(kept[0], {"wrong": None})
    list(TASK.checked({"do_sample": True, "temperature": 0.0}, rows(), described, sources))
    (tmp_path / "hqq-0.2.8.dist-info").mkdir()
    (tmp_path / "hqq-0.2.8.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: hqq\nVersion: 0.2.8\n")
    monkeypatch.syspath_prepend(tmp_path)
    package_version.cache_clear()
    with pytest.raises(UsageError, match="strictly positive float"):  # what was installed since may take it
        list(TASK.checked({"do_sample": True, "temperature": 0.0}, rows(), described, sources))
    package_version.cache_clear()


def test_several_texts_of_a_prompt_depend_on_the_prompt_alone(model: Any, path: Path) -> None:
    several = {"do_sample": True, "temperature": 3, "num_return_sequences": 3}
    together = generate(model, path, several, seed=4)
    assert all(answer.payload["text"] == answer.payload["texts"][0] for answer in together)
    assert all(len(set(answer.payload["texts"])) == 3 and answer.tokens > 8 for answer in together)
    one = TASK.bind(model, path, TaskOptions(arguments=several, max_new_tokens=8, seed=4), Sources())
    assert [one([row])[0] for row in rows()] == together
    alike = one(rows(["The"] * 3))
    assert len({text for answer in alike for text in answer.payload["texts"]}) == 9
    first = generate(model, path, {"do_sample": True, "temperature": 3}, seed=4)
    assert [answer.payload["text"] for answer in first] == [answer.payload["text"] for answer in together]
    assert all("texts" not in answer.payload for answer in first)


def test_beams_that_are_drawn_depend_on_the_prompt_alone(model: Any, path: Path) -> None:
    drawn = {"do_sample": True, "num_beams": 2, "num_return_sequences": 2}
    task = TASK.bind(model, path, TaskOptions(arguments=drawn, max_new_tokens=8, seed=3), Sources())
    assert task(rows()) == [task([row])[0] for row in rows()]


@pytest.mark.parametrize("end", [2, None])
@pytest.mark.parametrize("where", ["argument", "file"])
def test_a_stop_string_ends_each_text_whatever_pads_it(tmp_path: Path, where: str, end: int | None) -> None:
    path = Path(shutil.copytree(QUICKSTART, tmp_path / "model"))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    whole = {text: plain(load(path), text) for text in TEXTS}
    stop = tokenizer().decode(whole["Return a"][1:2])
    own = {} if where == "argument" else {"stop_strings": [stop]}
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": end, **own}))
    arguments = {"pad_token_id": 50, **({} if own else {"stop_strings": [stop]})}  # 50 is a letter
    for text, answer in zip(TEXTS, generate(load(path), path, arguments), strict=True):
        made = [tokenizer().decode(whole[text][:length], skip_special_tokens=True) for length in range(1, 9)]
        wanted = next((sofar for sofar in made if stop in sofar), made[-1])
        assert answer.payload["text"] == wanted


@pytest.mark.parametrize("where", ["argument", "file"])
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_keys_and_values_that_belong_in_ram_are_there_where_a_cpu_computes(
    tmp_path: Path, model: Any, where: str, kind: str
) -> None:
    path, asked = Path(shutil.copytree(QUICKSTART, tmp_path / "model")), {"cache_implementation": kind}
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **(asked if where == "file" else {})}))
    answers = generate(load(path), path, asked if where == "argument" else {}, new=3)
    assert answers == generate(model, path, {"eos_token_id": 2}, new=3)


def test_no_file_of_a_models_own_ends_texts_by_the_clock(tmp_path: Path, model: Any) -> None:
    path = Path(shutil.copytree(QUICKSTART, tmp_path / "model"))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "max_time": 1e-9}))
    assert generate(load(path), path, {}) == generate(model, path, {"eos_token_id": 2})


def test_an_end_of_ones_own_is_heeded(model: Any, path: Path) -> None:
    second = plain(model, "Return a")[1]
    answer = generate(model, path, {"eos_token_id": second, "pad_token_id": 50})[1]
    assert answer.payload["text"] == tokenizer().decode(plain(model, "Return a")[:2])
    assert answer.tokens == 2


def test_a_tokenizer_that_names_no_mask(tmp_path: Path) -> None:
    path = Path(shutil.copytree(QUICKSTART, tmp_path / "model"))
    wanted = generate(load(path), path, {})
    settings = json.loads((path / "tokenizer_config.json").read_bytes())
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "model_input_names": ["input_ids"]}))
    assert generate(load(path), path, {}) == wanted


@pytest.mark.parametrize(
    ("architecture", "task", "cause"),
    [
        ("bert", "text-generation", "generates no text"),
        ("t5", "text-generation", None),
        ("opt", "text-generation", None),
        ("opt", "feature-extraction", None),
        ("bert", "feature-extraction", None),
    ],
)
def test_a_task_that_the_model_cannot_do(tmp_path: Path, architecture: str, task: str, cause: str | None) -> None:
    described = describe_checkpoint(make_checkpoint(tmp_path, architecture))
    found = find_task(task, Sources())
    if cause is None:
        list(found.checked({}, rows(), described, Sources(memo=tmp_path / "memo")))
        return
    with pytest.raises(UsageError, match=cause):
        list(found.checked({}, rows(), described, Sources(memo=tmp_path / "memo")))


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        ({"architectures": ["OPTModel"]}, "OPTModel generates no text"),
        ({"_class_name": "UNet2DConditionModel"}, "one is of diffusers"),
        ({"architecture": "resnet18", "num_classes": 10}, "one is of timm"),
    ],
)
def test_configs_of_models_that_generate_nothing(
    config: dict[str, Any], cause: str, path: Path, tmp_path: Path
) -> None:
    whole = {**json.loads((path / "config.json").read_bytes()), **config} if "architectures" in config else config
    with pytest.raises(UsageError, match=cause):
        list(TASK.checked({}, rows(), ModelDescription(config=whole), Sources(memo=tmp_path)))


def test_whats_in_the_row_reaches_a_function_as_it_is(tmp_path: Path, model: Any, path: Path) -> None:
    (tmp_path / "echo_rows.py").write_text("def go(model, rows):\n    return [{'got': row} for row in rows]\n")
    from bigpipe.trust import Trust

    task = find_task("echo_rows:go", Sources(trust=Trust(("echo_rows",)), base=tmp_path))
    own = {"question": "q", "prompt": "p", "seed": "mine", "index": None}
    given = [Row(0, "q", own), Row(1, "a", {"question": "a"})]
    first, second = task.bind(model, path, TaskOptions(seed=5), Sources())(given)
    assert first.payload["got"] == {**own, "prompt": "q"}, "the prompt is what column and template make it"
    assert second.payload["got"] == {"question": "a", "prompt": "a", "index": 1, "seed": 6}


UNUSABLE: list[tuple[dict[str, Any], str]] = [
    ({"do_sample": True, "temperature": 0.0}, "strictly positive float"),
    ({"eos_token_id": "2"}, "invalid data type 'str'"),
    ({"cache_implementation": "quantized"}, "quanto"),
    ({"penalty_alpha": 0.6, "top_k": 4}, "Contrastive Search"),
    ({"num_beam_groups": 2, "num_beams": 4, "diversity_penalty": 0.5}, "Group Beam Search"),
    ({"force_words_ids": [[5]]}, "Constrained Beam Search"),
    ({"dola_layers": "high"}, "Dola Generation"),
    ({"token_healing": True}, "token healing"),
]


def with_own(folder: Path, own: Mapping[str, Any]) -> ModelDescription:
    make_checkpoint(folder, "llama")
    (folder / "generation_config.json").write_text(json.dumps(own))
    return describe_checkpoint(folder)


@pytest.mark.parametrize(("own", "said"), UNUSABLE, ids=str)
def test_what_the_models_own_file_asks_for_is_tried_too(tmp_path: Path, own: dict[str, Any], said: str) -> None:
    described = with_own(tmp_path / "model", own)
    with pytest.raises(UsageError, match=rf"generation_config\.json: .*{said}") as error:
        list(TASK.checked({}, rows(), described, Sources(), 8))
    assert "mend the model's file" in error.value.cure


def test_an_argument_mends_what_the_models_own_file_has_wrong(tmp_path: Path) -> None:
    described = with_own(tmp_path / "model", {"do_sample": True, "temperature": 0.0})
    list(TASK.checked({"temperature": 0.5}, rows(), described, Sources(), 8))
    with pytest.raises(UsageError, match=r"generation_config\.json: .*strictly positive"):
        list(TASK.checked({"min_length": 1}, rows(), described, Sources(), 8))


PUBLISHED: list[tuple[int, bool, dict[str, Any]]] = [
    (128256, False, {"do_sample": True, "eos_token_id": [128001, 128008], "temperature": 0.6, "max_length": 4096}),
    (256000, False, {"cache_implementation": "hybrid", "eos_token_id": [1, 107], "pad_token_id": 0}),
    (50264, True, {"decoder_start_token_id": 2, "early_stopping": True, "forced_bos_token_id": 0, "num_beams": 4,
                   "forced_eos_token_id": 2, "min_length": 56, "max_length": 142, "no_repeat_ngram_size": 3}),
    (58101, True, {"bad_words_ids": [[58100]], "num_beams": 6, "renormalize_logits": True, "pad_token_id": 58100}),
    (151936, False, {"chat_format": "chatml", "max_window_size": 6144, "do_sample": True, "top_k": 0, "top_p": 0.8}),
    (264, False, {"output_scores": True, "return_dict_in_generate": True, "penalty_alpha": None}),
    (264, False, {"cache_implementation": "offloaded_static", "pad_token_id": -1}),
    (264, True, {"do_sample": False, "early_stopping": False, "max_length": 20, "min_length": 0, "num_beams": 1,
                 "num_beam_groups": 1, "diversity_penalty": 0.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0,
                 "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0,
                 "encoder_no_repeat_ngram_size": 0, "num_return_sequences": 1, "remove_invalid_values": False}),
]  # fmt: skip


@pytest.mark.parametrize(("vocabulary", "encodes", "own"), PUBLISHED, ids=str)
def test_what_models_are_published_with_is_taken(vocabulary: int, encodes: bool, own: dict[str, Any]) -> None:
    assert wrong_value({}, own, {"vocabulary": vocabulary, "encodes": encodes}) is None


def test_a_model_that_guesses_with_its_first_layers_takes_one_text_at_a_time(tmp_path: Path) -> None:
    """transformers refuses a batch of more; what is made is what the whole model makes."""
    with_own(tmp_path / "plain", {"eos_token_id": 2})
    with_own(tmp_path / "guessing", {"eos_token_id": 2, "assistant_early_exit": 1})
    plain, guessing = (generate(load(tmp_path / name), tmp_path / name, {}) for name in ("plain", "guessing"))
    assert [answer.payload for answer in guessing] == [answer.payload for answer in plain]


OLDER: dict[str, Any] = {
    "num_beams": 4, "no_repeat_ngram_size": 2, "length_penalty": 2.0, "early_stopping": True, "forced_bos_token_id": 9,
}  # fmt: skip


def as_published_before(folder: Path, architecture: str, **fields: Any) -> Path:
    """A checkpoint of the time before generation_config.json: config.json says how it generates."""
    make_checkpoint(folder, architecture)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


@pytest.mark.filterwarnings("ignore")
def test_a_config_says_how_a_model_generates_where_no_other_file_does(tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM

    path = as_published_before(tmp_path, "bart", **OLDER)
    theirs, ours = AutoModelForSeq2SeqLM.from_pretrained(path), load(path)
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert ours.generation_config.num_beams == 4
    tokens = torch.tensor([[20, 30, 40]])
    wanted = theirs.generate(tokens, max_new_tokens=8).tolist()
    assert ours.generate(tokens, max_new_tokens=8).tolist() == wanted
    assert wanted[0][1] == 9


def test_what_such_a_config_asks_for_is_tried_too(tmp_path: Path) -> None:
    described = describe_checkpoint(as_published_before(tmp_path / "m", "llama", do_sample=True, temperature=0.0))
    with pytest.raises(UsageError, match=r"config\.json: .*strictly positive") as error:
        list(TASK.checked({}, rows(), described, Sources(), 8))
    assert not error.value.cause.startswith("generation_config.json")
    list(TASK.checked({"temperature": 0.5}, rows(), described, Sources(), 8))


def test_a_config_of_a_model_that_says_nothing_of_it_asks_for_nothing(tmp_path: Path) -> None:
    assert said_by_config(dict(describe_checkpoint(make_checkpoint(tmp_path, "llama")).config or {})) == {}
    nested = {"text_config": {"num_beams": 3, "top_k": 7}, "top_k": 5, "temperature": None, "hidden_size": 8}
    assert said_by_config(nested) == {"num_beams": 3, "top_k": 5}
