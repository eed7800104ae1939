"""Low-rank adapters are trained as a plain peft script trains them, on any format, and told beforehand."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import loaded, tuned, with_adapter
from support.media import make_whisper, tones, write_wav
from support.models import make_checkpoint, save_model
from transformers import AutoTokenizer, LEDConfig, LEDForConditionalGeneration

from bigpipe.bigmodel.architecture import describe_architecture
from bigpipe.bigmodel.checkpoint import describe_adapter, describe_checkpoint
from bigpipe.bigmodel.quantization import quantize_checkpoint
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.tasks import Row, require_template
from bigpipe.bigmodel.tasks.tokenizing import text_of
from bigpipe.bigmodel.training import (
    Lora,
    Training,
    Work,
    finetune,
    foreseen_adapter,
    parameters_of,
    read_data,
    train_rank,
    training_memory,
)
from bigpipe.bigmodel.training.adapting import trained_on
from bigpipe.bigmodel.training.examples import reading
from bigpipe.bigmodel.training.finetuning import unbounded
from bigpipe.bigmodel.training.order import Order
from bigpipe.bigmodel.training.saved import random_state, read_state, restore_random, save_state
from bigpipe.bigmodel.training.stepping import Trainer, seeded
from bigpipe.errors import InvalidCheckpoint, StageFailed, UsageError

pytest.importorskip("peft")
from support.plainly import train_plainly

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),  # peft asks for it
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),  # parameters did
    pytest.mark.filterwarnings("ignore:Failed to load CPU gemm_4bit_forward"),
]
ROWS = [
    "the cat sat on the mat", "hello world", "paris is in france", "a cat is in paris, and so is a mat",
    "the world is a mat on which cats sit", "hello, cat!", "on and on",
]  # fmt: skip
CHAT = {"text": [{"role": "user", "content": "hi"}]}
FAST: dict[str, Any] = {"learning_rate": 1e-2, "batch_size": 2, "max_steps": 6}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that share a core with other tests wait for each other at every tiny product."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    plain = make_checkpoint(folder / "opt", "opt", hidden_size=64, ffn_dim=128, word_embed_proj_dim=64)
    made = {"plain": plain}
    for scheme in ("int8", "nf4"):
        made[scheme] = folder / scheme
        quantize_checkpoint(plain, made[scheme], scheme=scheme)
    return made


@pytest.mark.parametrize(("kind", "dropout"), [("plain", 0.0), ("plain", 0.1), ("int8", 0.1), ("nf4", 0.1)])
def test_losses_and_adapter_are_those_of_a_plain_script(
    tmp_path: Path, models: dict[str, Path], kind: str, dropout: float
) -> None:
    """Step by step, and bit by bit."""
    # So large a scale makes gradients longer than 1, so that they are shortened
    lora: dict[str, Any] = {"r": 4, "lora_alpha": 400, "lora_dropout": dropout}
    options = {**FAST, "learning_rate": 1e-3}
    made = finetune(models[kind], ROWS, tmp_path / "ours", seed=3, **options, **lora)
    expected = train_plainly(
        models[kind], tmp_path / "theirs", ROWS, steps=6, learning_rate=1e-3, batch_size=2, seed=3,
        quantized=kind != "plain", **lora,
    )  # fmt: skip
    assert made.losses == expected
    ours, theirs = (tmp_path / side / "adapter_model.safetensors" for side in ("ours", "theirs"))
    assert ours.read_bytes() == theirs.read_bytes()
    configs = [json.loads((tmp_path / side / "adapter_config.json").read_bytes()) for side in ("ours", "theirs")]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])
        config["base_model_name_or_path"] = None
    assert configs[0] == configs[1]


@pytest.mark.parametrize("kind", ["plain", "int8", "nf4"])
def test_the_loss_falls(tmp_path: Path, models: dict[str, Path], kind: str) -> None:
    made = finetune(models[kind], ROWS, tmp_path / "out", **{**FAST, "max_steps": 40, "learning_rate": 3e-2})
    assert sum(made.losses[-7:]) / 7 < sum(made.losses[:7]) / 7 - 0.3
    assert made.steps == 40


def test_what_is_measured(tmp_path: Path, models: dict[str, Path]) -> None:
    told = []
    made = finetune(
        models["plain"], ROWS, tmp_path / "out", num_train_epochs=2, batch_size=3, eval_data=ROWS[:3], r=2,
        target_modules=["q_proj"], progress=lambda *words: told.append(words),
    )  # fmt: skip
    assert made.steps == 6  # 7 rows in 3 batches, twice
    assert made.trainable_parameters == 2 * 2 * (64 + 64)
    assert made.eval_loss is not None
    assert math.isfinite(made.eval_loss)
    assert made.peak["cpu"] > 0
    assert made.tokens_per_second > 0
    assert [(done, total) for done, total, _ in told] == [(step, 6) for step in range(7)]
    assert told[-1][2].startswith(f"loss {made.losses[-1]:.4g}, ")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


def test_random_numbers_of_the_process_go_on_as_if_none_had_been_drawn(tmp_path: Path, models: dict[str, Path]) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    finetune(models["plain"], ROWS, tmp_path / "out", max_steps=1)
    assert torch.equal(torch.rand(3), expected)


def test_random_numbers_of_gpus_go_on_as_if_none_had_been_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no GPU a list stands in for those of the driver."""
    generators = [torch.tensor([1, 1], dtype=torch.uint8), torch.tensor([2, 2], dtype=torch.uint8)]
    drawn = [state.clone() for state in generators]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [state.clone() for state in drawn])
    monkeypatch.setattr("torch.cuda.random.set_rng_state", lambda state, device: drawn[device].copy_(state))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: [state.fill_(9) for state in drawn])
    with seeded(3):
        assert all(torch.equal(state, torch.tensor([9, 9], dtype=torch.uint8)) for state in drawn)
    assert all(torch.equal(state, was) for state, was in zip(drawn, generators, strict=True))


def test_a_gpu_goes_on_from_a_state_that_a_cpu_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same random numbers of the CPU; the GPU's own stay, as none were saved."""
    asked: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: asked.append(state))
    saved = random_state(torch.device("cpu"))
    expected = torch.rand(3)
    restore_random(saved, torch.device("cuda"))
    assert torch.equal(torch.rand(3), expected)
    assert asked == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_gradients_through_packed_matrices_take_is_foreseen(models: dict[str, Path], dtype: str) -> None:
    """The largest matrix unpacked, by way of 16 bits where it has four; of int8 the inputs of all products, too, which
    bitsandbytes keeps where checkpointing lets go of all else."""

    def activations(kind: str, **how: Any) -> int:
        model, training = describe_checkpoint(models[kind]), Training(max_steps=1, **how)
        architecture = describe_architecture(models[kind])
        return training_memory(model, architecture, 0, training, dtype, 4, gpu=False).activations

    size, matrix, layers = {"float32": 4, "bfloat16": 2}[dtype], 128 * 64, 2
    for kept, how in ((layers * 4 * (3 * 64 + 128) * size, {}), (0, {"gradient_checkpointing": False})):
        plain = activations("plain", **how)
        assert activations("int8", **how) - plain == size * matrix + kept
        assert activations("nf4", **how) - plain == (6 if size == 4 else 2) * matrix


def test_what_is_learnt_and_what_is_read_are_foreseen_up_to_the_positions_of_each(tmp_path: Path) -> None:
    config = LEDConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=264, attention_window=8, max_encoder_position_embeddings=48,
        max_decoder_position_embeddings=20, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    path = save_model(LEDForConditionalGeneration(config), tmp_path)
    model, architecture = describe_checkpoint(path), describe_architecture(path)
    training = Training(task="seq2seq-lm", max_steps=1)

    def activations(learnt: int, read: int) -> int:
        return training_memory(
            model, architecture, 0, training, "float32", learnt, gpu=False, given=read
        ).activations  # fmt: skip

    assert activations(400, 48) == activations(20, 48) > activations(19, 48)
    assert activations(20, 400) == activations(20, 48) > activations(20, 47)


def test_a_state_of_another_kind_of_device_is_not_gone_on_from(tmp_path: Path, models: dict[str, Path]) -> None:
    """A GPU's has its random numbers besides."""
    rows = read_data(ROWS, "text", "", tmp_path)
    work = Work(model=models["plain"], training=Training(max_steps=2, save_steps=1), rows=rows)
    with seeded(0):
        train_rank(work, tmp_path)
    own = tmp_path / "rank-0"
    file = own / "adapter" / "adapter_model.safetensors"
    expected = file.read_bytes()
    found = read_state(own)
    assert found is not None
    tensors = {
        name: torch.zeros_like(value) if name.startswith("adapter/") else value for name, value in found[1].items()
    }
    for more, same in ((0, False), (16, True)):
        random = torch.nn.functional.pad(tensors["random"], (0, more))
        save_state(own, replace(found[0], step=1, losses=found[0].losses[:1]), {**tensors, "random": random})
        with seeded(0):
            train_rank(work, tmp_path)
        assert (file.read_bytes() == expected) == same


def test_a_step_over_several_batches_is_one_over_all_their_rows(tmp_path: Path) -> None:
    """Though rows differ in length: tokens count alike. OPT's own dropout would draw otherwise for each."""
    options: dict[str, Any] = {"max_steps": 3, "lora_dropout": 0.0, "learning_rate": 1e-2}
    rows, model = [*ROWS, "one more"], make_checkpoint(tmp_path / "model", "opt", dropout=0.0)
    whole = finetune(model, rows, tmp_path / "whole", batch_size=4, **options)
    parts = finetune(model, rows, tmp_path / "parts", batch_size=1, gradient_accumulation_steps=4, **options)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)


def test_checkpointing_changes_nothing_but_the_memory(tmp_path: Path, models: dict[str, Path]) -> None:
    kept = finetune(models["plain"], ROWS, tmp_path / "kept", gradient_checkpointing=False, **FAST)
    again = finetune(models["plain"], ROWS, tmp_path / "again", gradient_checkpointing=True, **FAST)
    assert kept.losses == again.losses
    assert kept.files["adapter_model.safetensors"] == again.files["adapter_model.safetensors"]


def test_going_on_from_an_adapter(tmp_path: Path, models: dict[str, Path]) -> None:
    first = finetune(models["int8"], ROWS, tmp_path / "first", r=4, **FAST)
    more = finetune(models["int8"], ROWS, tmp_path / "more", adapter=first.path, **FAST)
    config = json.loads((tmp_path / "more" / "adapter_config.json").read_bytes())
    assert config["r"] == 4
    assert (config["base_model_name_or_path"], config["revision"]) == (None, None)
    assert sum(more.losses) < sum(first.losses)


def test_going_on_from_an_adapter_that_was_pickled(tmp_path: Path, models: dict[str, Path]) -> None:
    first = finetune(models["plain"], ROWS, tmp_path / "first", **FAST).path
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "adapter_config.json").write_bytes((first / "adapter_config.json").read_bytes())
    torch.save(load_file(first / "adapter_model.safetensors"), pickled / "adapter_model.bin")
    both = [
        finetune(models["plain"], ROWS, tmp_path / f"{path.name}-more", adapter=path, **FAST).files
        for path in (first, pickled)
    ]
    assert both[0] == both[1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["lm_head", "embed_tokens", "a larger vocabulary"])
def test_going_on_from_an_adapter_beside_which_peft_stored_weights_of_the_model(tmp_path: Path, case: str) -> None:
    """An embedding or a head that it adapts, or both where the vocabulary was resized: they take the place of the
    model's, are not trained, and stay with the adapter."""
    base = make_checkpoint(tmp_path / "model", "llama")
    model, targets = loaded(base), ["q_proj"]
    if case == "a larger vocabulary":
        model.resize_token_embeddings(272)
        save_model(model, base := tmp_path / "resized")
    else:
        targets.append(case)
    adapter = tuned(base, tmp_path / "first", model=model, r=4, target_modules=targets)
    file = adapter / "adapter_model.safetensors"
    before = load_file(file)
    held = [name for name in before if "lora_" not in name]
    assert held
    before |= {name: before[name] * 1.5 for name in held}
    save_file(before, file, metadata={"format": "pt"})
    made = finetune(base, ROWS[:1], tmp_path / "more", adapter=adapter, max_steps=1)
    ids = AutoTokenizer.from_pretrained(base)(ROWS[0], return_tensors="pt").input_ids
    wanted = float(with_adapter(base, adapter)(input_ids=ids, labels=ids).loss)
    assert made.losses == pytest.approx([wanted], rel=1e-5)
    after = load_file(made.path / "adapter_model.safetensors")
    assert after.keys() == before.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == held
    trained = sum(value.numel() for name, value in before.items() if name not in held)
    assert made.trainable_parameters == parameters_of(describe_adapter(adapter))[0] == trained


@pytest.mark.filterwarnings("ignore")
def test_weights_of_the_model_beside_an_adapter_do_not_replace_quantized_ones(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "model", "llama")
    adapter = tuned(base, tmp_path / "first", r=4, target_modules=["q_proj", "lm_head"])
    quantize_checkpoint(base, tmp_path / "int8", scheme="int8", skip_modules=[])
    with pytest.raises(UsageError, match=r"weights of the model itself, which are quantized in this one: .*lm_head"):
        finetune(tmp_path / "int8", ROWS, tmp_path / "more", adapter=adapter, max_steps=1)


MIXTURES: dict[str, tuple[str, dict[str, Any], str]] = {
    "a part of what is stacked": ("mixtral", {"target_modules": ["w1"]}, "peft cannot adapt Mixtral.*w1 without also"),
    "experts and dropout": ("mixtral", {"target_modules": "all-linear"}, "peft cannot adapt Mixtral.*dropout"),
    "a misspelt one": ("mixtral", {"target_modules": ["q_proj", "q_prj"]}, "'q_prj' is the name of nothing"),
    "a router": ("mixtral", {"target_modules": ["router"]}, "peft cannot adapt Mixtral"),
    "other modules": ("opt", {"target_modules": r".*layers\.0.*"}, "peft cannot adapt OPT.*is not supported"),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_what_peft_cannot_adapt_is_said_in_its_words_before_anything_is_loaded(tmp_path: Path, name: str) -> None:
    architecture, fields, cause = MIXTURES[name]
    path = make_checkpoint(tmp_path / "model", architecture)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 1}))  # never loads
    with pytest.raises(UsageError, match=cause) as error:
        finetune(path, ROWS, tmp_path / "out", max_steps=1, **fields)
    assert error.value.cure


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"target_modules": "all-linear", "lora_dropout": 0.0},
        {"target_modules": ["q_proj", "w1", "w2", "w3"], "lora_dropout": 0.0},
    ],
)
def test_a_mixture_gets_the_adapter_that_was_foreseen(tmp_path: Path, fields: dict[str, Any]) -> None:
    """Also where a class holds its experts in one parameter, for which peft's own default names nothing."""
    path = make_checkpoint(tmp_path / "model", "mixtral")
    lora = Lora(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
    described = describe_checkpoint(path)
    architecture = describe_architecture(path)
    foreseen = foreseen_adapter(described, architecture, Training(max_steps=1, lora=lora), Sources())
    made = finetune(path, ROWS, tmp_path / "out", max_steps=2, **fields)
    told = {name: tuple(value.shape) for name, value in load_file(made.path / "adapter_model.safetensors").items()}
    assert {name: shape for name, (_, shape) in (foreseen.tensors or {}).items()} == told
    assert made.trainable_parameters == parameters_of(foreseen)[0]


def test_an_adapter_of_another_model_is_refused(tmp_path: Path, models: dict[str, Path]) -> None:
    other = make_checkpoint(tmp_path / "llama", "llama")
    adapter = finetune(other, ROWS, tmp_path / "first", max_steps=1).path
    with pytest.raises(UsageError, match="was made for another model"):
        finetune(models["plain"], ROWS, tmp_path / "more", adapter=adapter, max_steps=1)


def test_an_encoder_decoder_learns_texts_from_others(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "t5", "t5")
    rows = [{"input": text, "text": text.upper()} for text in ROWS]
    made = finetune(model, rows, tmp_path / "out", task="seq2seq-lm", **{**FAST, "max_steps": 40, "r": 8})
    assert sum(made.losses[-5:]) < sum(made.losses[:5])
    assert json.loads((made.path / "adapter_config.json").read_bytes())["task_type"] == "SEQ_2_SEQ_LM"


def test_an_input_of_a_task_that_learns_texts_alone_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    rows = [{"prompt": "a dog", "completion": "barks"}] * 4
    with pytest.raises(UsageError, match="input_column has no meaning for causal-lm") as caught:
        finetune(tmp_path / "no model", rows, tmp_path / "out", column="completion", input_column="prompt", max_steps=2)
    assert caught.value.field == "input_column"


def test_whisper_learns_what_is_said(tmp_path: Path) -> None:
    pytest.importorskip("soundfile")
    model = make_whisper(tmp_path / "whisper")
    rows = []
    for number, text in enumerate(("hello world", "the cat sat", "hello cat")):
        write_wav(tmp_path / f"{number}.wav", tones(0.3, 16_000, number))
        rows.append({"audio": str(tmp_path / f"{number}.wav"), "text": text})
    made = finetune(
        model, rows, tmp_path / "out", task="speech-seq2seq", max_steps=12, learning_rate=3e-2,
        target_modules=["q_proj", "v_proj"],
    )  # fmt: skip
    assert sum(made.losses[-3:]) < sum(made.losses[:3])
    import peft
    from transformers import WhisperForConditionalGeneration

    again = peft.PeftModel.from_pretrained(WhisperForConditionalGeneration.from_pretrained(model), str(made.path))
    assert again.peft_config["default"].auto_mapping["base_model_class"] == "WhisperForConditionalGeneration"


@pytest.mark.parametrize(
    ("seconds", "cause"),
    [(31.0, "the sound has 31 s, and the model hears 30 at a time"), (None, "1.wav is no sound that can be read")],
)
def test_a_sound_that_whisper_does_not_hear_whole_is_told_by_its_row(
    tmp_path: Path, seconds: float | None, cause: str
) -> None:
    """Its whole text would be learnt."""
    model = make_whisper(tmp_path / "whisper")
    write_wav(tmp_path / "0.wav", [0.0] * (16_000 * 30 + 160))
    write_wav(tmp_path / "1.wav", [0.0] * int(16_000 * (seconds or 1)))
    if seconds is None:
        (tmp_path / "1.wav").write_bytes(b"RIFF, but nothing else")
    rows = [{"audio": f"{number}.wav", "text": "hello"} for number in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = reading("speech-seq2seq", None, model, Sources(base=tmp_path), unbounded)
    assert len(read.examples(read_data("rows.jsonl", "text", "audio", tmp_path, limit=1), "audio", 64).all) == 1
    with pytest.raises(UsageError, match=rf"rows.jsonl:2: .*{cause}"):
        read.examples(read_data("rows.jsonl", "text", "audio", tmp_path), "audio", 64)


def test_what_an_encoder_reads_is_cut_at_a_length_of_its_own(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "t5", "t5")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"input": "a" * 12, "text": "b" * 12}) + "\n")
    rows = read_data("rows.jsonl", "text", "input", tmp_path)
    read = reading("seq2seq-lm", None, model, Sources(base=tmp_path), unbounded)
    for limits, lengths in (((5, 9), (5, 9)), ((5,), (5, 5)), ((12, 20), (12, 12))):
        made = read.examples(rows, "input", *limits)
        assert (len(made.all[0].labels), len(made.all[0].given)) == lengths
        assert made.cut == (lengths != (12, 12))


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_checkpoint(tmp_path_factory.mktemp("chatting"), "llama")
    template = "{% for tool in tools or [] %}{{ tool.name }}:{% endfor %}{{ messages[0].content }}"
    (model / "chat_template.jinja").write_text(template)
    return model


def test_a_text_ends_with_the_token_that_ends_answers_where_that_is_asked(chatting: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chatting)
    rows = read_data(["ab", *CHAT.values(), "abcdefgh"], "text", "", Path())
    bare, ended = (
        reading("causal-lm", None, chatting, Sources(), unbounded, end=end).examples(rows, "", 8)
        for end in (False, True)
    )
    assert [list(each.labels) for each in bare.all] == [
        tokenizer(text)["input_ids"] for text in ("ab", "hi", "abcdefgh")
    ]
    text, chat, long = (each.labels for each in bare.all)
    assert [each.labels for each in ended.all] == [text + array("i", [tokenizer.eos_token_id]), chat, long]
    assert (bare.cut, ended.cut) == (0, 1), "what has no room for its end is cut"


TOOLS = [{"name": "weather"}, {"name": "time"}]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), None, [], ""])
def test_a_chat_is_learnt_and_prompted_with_its_tools(chatting: Path, tools: Any) -> None:
    rows = read_data([{**CHAT, "tools": tools}], "text", "", Path())
    wanted = "weather:time:hi" if tools else "hi"
    tokenizer = AutoTokenizer.from_pretrained(chatting)
    [example] = reading("causal-lm", None, chatting, Sources(), unbounded).examples(rows, "", 64).all
    assert list(example.labels) == tokenizer(wanted, add_special_tokens=False)["input_ids"]
    assert text_of(tokenizer, rows[0]) == (wanted, False)
    assert (rows[0].nbytes > Row(0, rows[0].prompt, CHAT).nbytes) is bool(tools)


@pytest.mark.parametrize("tools", ["hammer", {"name": "weather"}, ["weather"], 3])
def test_tools_that_are_none_are_refused_where_they_stand(chatting: Path, tools: Any) -> None:
    [row] = read_data([{**CHAT, "tools": tools}], "text", "", Path())
    with pytest.raises(UsageError, match=r"data\[0\]: 'tools' is no list of tools"):
        require_template(describe_checkpoint(chatting))(row)


def test_limits_are_of_some_rows_however_many_there_are(chatting: Path) -> None:
    begun = []

    @contextmanager
    def bounded(what: str) -> Iterator[None]:
        begun.append(what)
        yield

    rows = read_data(["ab"] * 1025, "text", "", Path())
    read = reading("causal-lm", None, chatting, Sources(), bounded)
    begun.clear()
    assert len(read.examples(rows, "", 8).all) == 1025
    assert len(begun) == 3


@pytest.mark.parametrize(
    ("given", "cause", "cure"),
    [
        (None, "'input' holds no text: it is null", "write a text, or leave the row out"),
        (3, "'input' holds no text", "put it in quotes"),
        ({"path": "a.wav"}, "'input' holds what is in a file", "write that into a file"),
        (["a"], "'input' holds no text", "write a text, or name another column"),
    ],
)
def test_an_input_that_is_there_and_holds_no_text_is_told_apart(given: Any, cause: str, cure: str) -> None:
    with pytest.raises(UsageError) as error:
        read_data([{"input": "a", "text": "b"}, {"input": given, "text": "b"}], "text", "input", Path())
    assert error.value.cause == f"data[1]: {cause}"
    assert error.value.cure.startswith(cure)


def test_the_largest_seed_is_one_for_every_rank() -> None:
    """Each draws from its own."""
    seeds = [Training(max_steps=1, seed=2**32 - 1).seed_of(rank) for rank in range(3)]
    assert seeds == [2**32 - 1, 0, 1]
    for seed in seeds:
        with seeded(seed):
            pass


def test_every_row_is_taken_once_an_epoch_whoever_asks_from_where() -> None:
    order = Order(rows=10, ranks=2, batch_size=2, accumulation=2, seed=1)
    steps = list(order.steps(0, 6))
    assert len(steps) == 6  # 5 rows a rank in 3 batches, of which 2 make a step
    first = sorted(row for ranks in steps[:2] for batches in ranks for batch in batches for row in batch)
    assert first == list(range(10))
    assert steps[:2] != steps[2:4]
    for begin in range(6):
        assert list(order.steps(begin, 6)) == steps[begin:]


BAD = {
    "column": ({"column": "body"}, "there is no 'body'"),
    "rows": ({"batch_size": 8}, "7 rows, which is too few: a step takes 8"),
    "task": ({"task": "speech-seq2seq"}, "there is no text 'audio', only 'text'"),
    "both": ({"num_train_epochs": 1}, "either max_steps or num_train_epochs"),
    "neither": ({"max_steps": None}, "either max_steps or num_train_epochs"),
    "rate": ({"learning_rate": 0.0}, "learning_rate is 0.0"),
    "field": ({"learning_rat": 1e-3}, "finetune takes no 'learning_rat'"),
    "empty": ({"eval_data": []}, "eval_data: there is no row in"),
    "rank": ({"r": 0}, "r is 0"),
    "half a rank": ({"r": 2.5}, "r is 2.5"),
    "alpha": ({"lora_alpha": -3}, "lora_alpha is -3"),
    "dropout": ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
    "no dropout": ({"lora_dropout": math.nan}, "lora_dropout is nan"),
    "seed": ({"seed": 2**32}, "seed is 4294967296"),
    "rate as text": ({"learning_rate": "1e-3"}, "learning_rate is '1e-3'"),
    "no such task": ({"task": "clm"}, "task is 'clm'"),
    "no module": ({"target_modules": []}, "names no module"),
    "another module": ({"target_modules": ["q_proj", "nope"]}, "no linear module 'nope'"),
    "a name as text": ({"target_modules": "q_proj"}, "matches no module"),
    "expression": ({"target_modules": "(("}, "is no regular expression"),
    "adapters": ({"adapter": ["a"]}, r"adapter is \['a'\]"),
    "end": ({"end": "yes"}, "end is 'yes'"),
    "flag": ({"gradient_checkpointing": "no"}, "gradient_checkpointing is 'no'"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_trained_is_refused_before_anything_is_loaded(
    tmp_path: Path, models: dict[str, Path], name: str
) -> None:
    changes, cause = BAD[name]
    rows = [{"text": text} for text in ROWS]
    with pytest.raises(UsageError, match=cause):
        finetune(models["plain"], rows, tmp_path / "out", **{"max_steps": 1, **changes})
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def unloadable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that every load fails at: what is said of its rows was said before."""
    path = make_checkpoint(tmp_path_factory.mktemp("models") / "odd", "llama")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "intermediate_size": config["intermediate_size"] * 2}))
    with pytest.raises(InvalidCheckpoint):
        finetune(path, ROWS, path.with_name("out"), max_steps=1)
    return path


FILES = {
    "rows.jsonl": ('{"text": "a b"}\n\n{"text": ""}\n{"text": " "}\n', "rows.jsonl:3: there is nothing .*1 other rows"),
    "rows.csv": ('text,n\n"a\nb",1\n,2\n', "rows.csv:4: there is nothing to learn in 'text'"),
    "rows.json": ('["a b", ""]', r"rows.json\[1\]: there is nothing to learn in 'text'"),
    "short.txt": ("a b\na\n", "short.txt:2: .* makes no token beside the first"),
    "prompts.jsonl": ('{"txt": "a"}\n', "prompts.jsonl:1: there is no 'text', only 'txt'"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_row_that_teaches_nothing_is_told_by_file_and_line_before_anything_is_loaded(
    tmp_path: Path, unloadable: Path, name: str
) -> None:
    content, cause = FILES[name]
    (tmp_path / name).write_text(content)
    for fields in ({"data": tmp_path / name}, {"data": ROWS, "eval_data": tmp_path / name}):
        with pytest.raises(UsageError, match=cause) as error:
            finetune(unloadable, out=tmp_path / "out", max_steps=1, **fields)
        assert error.value.field in (list(fields)[-1], "column")
        assert "prompt" not in str(error.value).replace(str(tmp_path / name), "")


def test_a_row_that_is_written_in_a_list_is_told_by_its_number(tmp_path: Path, unloadable: Path) -> None:
    for rows, place in ((["ab", ""], "data[1]"), (["ab", "cd", {"text": "  "}], "data[2]"), (["ab", "a"], "data[1]")):
        with pytest.raises(UsageError, match="nothing to learn") as error:
            finetune(unloadable, rows, tmp_path / "out", max_steps=1)
        assert error.value.cause.startswith(f"{place}: ")
        assert error.value.field == place


@pytest.mark.parametrize(
    ("architecture", "fields", "place"),
    [
        ("opt", {"data": [*ROWS, CHAT]}, "data[7]"),
        ("opt", {"data": ROWS, "eval_data": [CHAT]}, "eval_data[0]"),
        ("t5", {"data": [{"input": "a", **CHAT}], "task": "seq2seq-lm"}, "data[0]"),
    ],
)
def test_a_chat_where_there_is_no_template_is_told_by_its_row(
    tmp_path: Path, architecture: str, fields: dict[str, Any], place: str
) -> None:
    model = make_checkpoint(tmp_path / "model", architecture)
    with pytest.raises(UsageError, match="this is a chat, and the model's tokenizer has no chat template") as error:
        finetune(model, out=tmp_path / "out", max_steps=1, **fields)
    assert error.value.cause.startswith(f"{place}: ")
    assert error.value.field == place


def test_a_chat_that_the_template_refuses_is_told_by_its_row(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "opt")
    (model / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UsageError, match=r"data\[0\]: the model's chat template refuses it: .*roles must alternate"):
        finetune(model, [CHAT], tmp_path / "out", max_steps=1)


@pytest.mark.parametrize(
    ("architecture", "rows", "fields"),
    [
        ("llama", ["ab!", "$% &"], {}),
        ("t5", [{"input": "ab", "text": "a"}, {"input": "$% &", "text": "a"}], {"task": "seq2seq-lm"}),
        ("t5", [{"input": "ab", "text": "a"}, {"input": "a", "text": "$% &"}], {"task": "seq2seq-lm"}),
    ],
)
def test_a_token_that_the_model_does_not_have_is_told_by_its_row_before_anything_is_loaded(
    tmp_path: Path, architecture: str, rows: list[Any], fields: dict[str, Any]
) -> None:
    model = make_checkpoint(tmp_path / "model", architecture, vocab_size=100)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for data, place in ((rows, r"data\[1\]"), (tmp_path / "rows.jsonl", "rows.jsonl:2")):
        with pytest.raises(
            UsageError, match=f"{place}: the tokenizer makes 'Ġ' token 224 of 260, .* 100 tokens"
        ) as error:
            finetune(model, data, tmp_path / "out", max_steps=1, **fields)
        assert "resize_token_embeddings" in error.value.cure


def test_a_model_of_another_task_is_refused(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "t5", "t5")
    with pytest.raises(UsageError, match="causal-lm is for models that continue a text") as error:
        finetune(model, ROWS, tmp_path / "out", max_steps=1)
    assert error.value.cure == "use task: seq2seq-lm"


def test_a_loss_that_is_no_number_ends_it_at_its_step(tmp_path: Path, models: dict[str, Path]) -> None:
    with pytest.raises(StageFailed, match=r"step \d+: the (loss|norm of the gradients) is (nan|inf)"):
        finetune(models["plain"], ROWS, tmp_path / "out", max_steps=20, learning_rate=1e30)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_gradients_that_are_no_numbers_end_it_at_their_step_and_nothing_is_written(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """Also at the last step, after which no loss would tell."""
    learn = Trainer._learn

    def overflowing(self: Trainer, *given: Any) -> float:
        loss = learn(self, *given)
        if self._so_far.step == 1:
            next(iter(self._parameters.values())).grad[0, 0] = value  # type: ignore[index]
        return loss

    monkeypatch.setattr(Trainer, "_learn", overflowing)
    with pytest.raises(StageFailed, match=rf"step 2: the norm of the gradients is {value}: .*diverged"):
        finetune(models["plain"], ROWS, tmp_path / "out", max_steps=2)
    assert not (tmp_path / "out").exists()


def test_no_row_is_longer_than_the_model_has_positions(tmp_path: Path, models: dict[str, Path]) -> None:
    made = finetune(models["plain"], ["a long row " * 30] * 2, tmp_path / "out", max_steps=2)  # of 128 positions
    assert made.steps == 2


def test_long_rows_are_cut(tmp_path: Path, models: dict[str, Path]) -> None:
    short = finetune(models["plain"], [text[:5] for text in ROWS], tmp_path / "short", max_steps=3)
    cut = finetune(models["plain"], ROWS, tmp_path / "cut", max_steps=3, max_length=5)
    assert cut.losses == short.losses


def test_an_adapter_names_the_repository_of_its_model_and_no_path(tmp_path: Path, models: dict[str, Path]) -> None:
    def named(adapter: Path) -> tuple[str | None, str | None]:
        config = json.loads((adapter / "adapter_config.json").read_bytes())
        return config["base_model_name_or_path"], config["revision"]

    first = finetune(models["plain"], ROWS, tmp_path / "1", max_steps=1, base_model="org/model", revision="abc").path
    assert named(first) == ("org/model", "abc")
    assert named(finetune(models["plain"], ROWS, tmp_path / "2", max_steps=1, adapter=first).path) == named(first)
    other = finetune(models["plain"], ROWS, tmp_path / "3", max_steps=1, adapter=first, base_model="a/b").path
    assert named(other) == ("a/b", None)
    config = json.loads((first / "adapter_config.json").read_bytes())
    for path in (str(models["plain"]), "opt", "../models/opt"):
        (first / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": path}))
        assert trained_on(first) == (None, None)
