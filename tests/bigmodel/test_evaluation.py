"""Perplexity and divergence: those of a plain script, whatever the windows; what does not go together is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, strategies as some
from safetensors.torch import load_file, save_file
from support.contexts import MACHINE
from support.models import POINTER, make_checkpoint, save_model, tiny_config, tiny_model
from support.own_code import make_own_model
from support.plain_perplexity import all_logits, divergences, ids_of, load_plainly, perplexity, windows
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

import bigpipe
from bigpipe.bigmodel.architecture import architecture_of, describe_architecture
from bigpipe.bigmodel.checkpoint import describe_checkpoint, open_checkpoint
from bigpipe.bigmodel.evaluation import (
    Divergence,
    Known,
    Question,
    evaluating,
    place_pair,
    read_texts,
    render,
    windows_of,
)
from bigpipe.bigmodel.evaluation.layers import lose_least
from bigpipe.bigmodel.evaluation.measures import measure
from bigpipe.bigmodel.evaluation.summary import _divergence, _mean_of
from bigpipe.bigmodel.footprint import Workload
from bigpipe.bigmodel.formats import default_skips
from bigpipe.bigmodel.placement import place
from bigpipe.bigmodel.quantization import Settings, quantize_described
from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import DoesNotFit, StageFailed, UsageError
from bigpipe.sizes import parse_size

QUICKSTART = Path(__file__).parents[2] / "models/quickstart"
TEXT = "Return the number of occurrences of the argument. Raise ValueError if it is not present in the list.\n" * 4


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "opt")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("other"), "opt", seed=1)


@pytest.fixture(scope="module", params=["float32", "int8", "nf4"])
def quickstart(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "float32":
        return QUICKSTART
    made = tmp_path_factory.mktemp("made") / request.param
    bigpipe.quantize_checkpoint(QUICKSTART, made, scheme=request.param)
    return made


def test_perplexity_of_the_quickstart_is_that_of_a_plain_script(quickstart: Path, text: Path) -> None:
    plain = load_plainly(quickstart, **({"dtype": torch.float32} if quickstart == QUICKSTART else {}))
    wanted, count = perplexity(plain, ids_of(quickstart, TEXT), 32, 16)
    found = bigpipe.evaluate(quickstart, text, sequence_length=32)
    assert found.perplexity.value == pytest.approx(wanted, rel=1e-6, abs=1e-4)
    assert found.tokens == count


@pytest.mark.parametrize("stride", [64, 63, 7])
def test_bits_are_over_the_bytes_of_the_tokens_that_are_scored(tmp_path: Path, stride: int) -> None:
    """Also where windows do not overlap, and of the first token of each nothing is in the sum of nats."""
    (tmp_path / "text.txt").write_text(TEXT.replace("e", "é"))
    ids = ids_of(QUICKSTART, TEXT.replace("e", "é"))[0]
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART)
    scored = [ids[window.scored : window.end] for window in windows_of(len(ids), 64, stride)]
    size = len(b"".join(token for part in scored for token in as_bytes(tokenizer, part)))
    found = bigpipe.evaluate(QUICKSTART, tmp_path / "text.txt", sequence_length=64, stride=stride)
    nats = found.tokens * math.log(found.perplexity.value)
    assert found.bits_per_byte.value == pytest.approx(nats / math.log(2) / size)
    assert found.bits_per_byte.stderr == pytest.approx(
        found.perplexity.stderr / found.perplexity.value * found.tokens / math.log(2) / size
    )


def as_bytes(tokenizer: Any, ids: torch.Tensor) -> list[bytes]:
    """Of each token of a byte-level tokenizer, whose letters stand for bytes."""
    letters = {letter: bytes([number]) for number, letter in bytes_to_unicode().items()}
    return [b"".join(letters[letter] for letter in token) for token in tokenizer.convert_ids_to_tokens(ids.tolist())]


@pytest.mark.parametrize("stride", [16, 15, 1])
def test_bits_are_those_of_a_tokenizer_without_offsets_too(tmp_path: Path, text: Path, stride: int) -> None:
    """One that makes a token of each byte."""
    model = save_model(tiny_model("opt", vocab_size=384), tmp_path / "model", tokenizer=False)
    ByT5Tokenizer().save_pretrained(model)
    found = bigpipe.evaluate(model, text, sequence_length=16, stride=stride, max_tokens=120)
    assert found.bits_per_byte.value == pytest.approx(math.log2(found.perplexity.value))


def test_divergence_from_the_quickstart_is_that_of_a_script_that_keeps_all_logits(quickstart: Path, text: Path) -> None:
    ids = ids_of(quickstart, TEXT)
    kept = all_logits(load_plainly(QUICKSTART, dtype=torch.float32), ids, 32, 16)
    own = all_logits(
        load_plainly(quickstart, **({"dtype": torch.float32} if quickstart == QUICKSTART else {})), ids, 32, 16
    )
    wanted = divergences(kept, own)
    found = bigpipe.evaluate(quickstart, text, baseline=QUICKSTART, sequence_length=32).comparison
    assert found is not None
    assert found.kl.mean.value == pytest.approx(float(wanted.mean()), abs=1e-5)
    assert found.kl.max.value == pytest.approx(float(wanted.max()), abs=1e-5)
    assert found.kl.p99.value == pytest.approx(float(numpy.percentile(wanted.numpy(), 99)), abs=1e-5)
    assert found.kl.mean.stderr == pytest.approx(float(wanted.std() / len(wanted) ** 0.5), abs=1e-5)
    same = (kept.argmax(-1) == own.argmax(-1)).double()
    assert found.top1.value == pytest.approx(float(same.mean()))


@pytest.mark.parametrize(("length", "stride"), [(16, None), (16, 16), (16, 1), (128, None), (7, 3), (2, 1)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_any_windows_give_what_a_plain_script_gives(
    model: Path, text: Path, length: int, stride: int | None, batch_size: int
) -> None:
    ids = ids_of(model, TEXT)[:, :120]
    wanted, count = perplexity(load_plainly(model), ids, length, stride or length // 2)
    found = bigpipe.evaluate(
        model, text, sequence_length=length, stride=stride, batch_size=batch_size, max_tokens=120
    )  # fmt: skip
    assert found.perplexity.value == pytest.approx(wanted, rel=1e-6)
    assert found.tokens == count


@given(some.integers(1, 200), some.integers(2, 40), some.data())
def test_every_token_but_those_that_nothing_stands_before_is_scored_once(tokens: int, length: int, data) -> None:
    stride = data.draw(some.integers(1, length))
    found = list(windows_of(tokens, length, stride))
    scored = [token for window in found for token in range(window.scored, window.end)]
    assert scored == sorted(set(scored))
    left = set(range(tokens)) - set(scored)
    assert left == ({token for token in range(0, tokens, length)} if stride == length else {0})
    assert all(window.begin < window.scored < window.end <= window.begin + length for window in found)
    guide = [(begin, end) for begin, end, _ in windows(tokens, length, stride)]
    assert [(window.begin, window.end) for window in found] == [
        place for place in guide if place[1] - place[0] > 1
    ]  # fmt: skip


def test_a_model_is_as_good_as_itself(model: Path, text: Path) -> None:
    found = bigpipe.evaluate(model, text, baseline=model, sequence_length=16, per_layer=True)
    assert found.comparison is not None
    assert found.layers is not None
    assert found.comparison.perplexity_ratio.value == 1
    assert found.comparison.perplexity_ratio.stderr == 0
    assert found.comparison.kl == Divergence(*[type(found.perplexity)(0.0, 0.0)] * 3)
    assert found.comparison.top1.value == 1
    assert set(found.layers.modules.values()) == {0.0}
    assert found.layers.skip_modules is None  # nothing is quantized


def test_standard_errors_are_those_of_the_tokens() -> None:
    values = [0.5, 1.0, 4.0, 2.5]
    mean = _mean_of(sum(values), sum(value * value for value in values), 4)
    assert mean.value == pytest.approx(numpy.mean(values))
    assert mean.stderr == pytest.approx(numpy.std(values, ddof=1) / 2)
    many = numpy.random.default_rng(0).exponential(size=20_000)
    found = _divergence(many.tolist())
    assert found.p99.value == pytest.approx(numpy.percentile(many, 99))
    draws = numpy.random.default_rng(1).exponential(size=(400, 20_000))
    assert found.p99.stderr == pytest.approx(numpy.percentile(draws, 99, axis=1).std(), rel=0.25)
    ordered = sorted(many)
    assert found.max.stderr == pytest.approx((ordered[-1] - ordered[-2]) * 19_999 / 20_000)


def test_the_ratio_of_perplexities_has_the_error_of_pairs(model: Path, other: Path, text: Path) -> None:
    ids = ids_of(model, TEXT)
    losses = []
    for path in (model, other):
        kept = all_logits(load_plainly(path), ids, 32, 16).log_softmax(-1)
        losses.append(-kept.gather(-1, ids[0, 1:, None])[:, 0].numpy())
    differences = losses[0] - losses[1]
    found = bigpipe.evaluate(model, text, baseline=other, sequence_length=32).comparison
    assert found is not None
    wanted = math.exp(differences.mean())
    assert found.perplexity_ratio.value == pytest.approx(wanted, rel=1e-5)
    assert found.perplexity_ratio.stderr == pytest.approx(
        wanted * differences.std(ddof=1) / len(differences) ** 0.5, rel=1e-4
    )
    assert found.baseline_perplexity.value == pytest.approx(math.exp(losses[1].mean()), rel=1e-5)


def test_each_module_is_blamed_for_what_it_loses_itself(tmp_path: Path, text: Path) -> None:
    """One weight is changed by a tenth; what follows it computes with the baseline's own inputs."""
    baseline = save_model(tiny_model("opt"), tmp_path / "baseline")
    changed = tiny_model("opt")
    with torch.no_grad():
        layer = changed.get_submodule("model.decoder.layers.0.fc1")
        layer.weight *= 1.1
        layer.bias *= 1.1
    save_model(changed, tmp_path / "changed")
    found = bigpipe.evaluate(tmp_path / "changed", text, baseline=baseline, sequence_length=32, per_layer=True).layers
    assert found is not None
    assert next(iter(found.modules)) == "model.decoder.layers.0.fc1"
    assert found.modules["model.decoder.layers.0.fc1"] == pytest.approx(0.1, rel=1e-3)
    assert max(list(found.modules.values())[1:]) < 1e-6
    assert found.total == pytest.approx(0.1, rel=1e-3)


def test_modules_of_a_mixture_are_compared_its_routers_among_them(tmp_path: Path, text: Path) -> None:
    """A router gives its logits, and with them what comes of these."""
    baseline = save_model(tiny_model("mixtral"), tmp_path / "baseline")
    changed = tiny_model("mixtral")
    router = next(name for name, _ in changed.named_modules() if name.endswith("layers.1.mlp.gate"))
    with torch.no_grad():
        changed.get_submodule(router).weight *= 1.1
    save_model(changed, tmp_path / "changed")
    same, found = (
        bigpipe.evaluate(path, text, baseline=baseline, sequence_length=32, per_layer=True).layers
        for path in (baseline, tmp_path / "changed")
    )
    assert same is not None
    assert set(same.modules.values()) == {0.0}
    assert found is not None
    assert next(iter(found.modules)) == router
    assert found.modules[router] == pytest.approx(0.1, rel=1e-3)


def test_the_fewest_modules_are_left_that_bring_the_error_under_the_bound() -> None:
    losses = [{"a": [9.0, 100.0], "b": [16.0, 100.0]}, {"c": [1.0, 100.0], "norm": [25.0, 100.0], "a": [9.0, 100.0]}]
    quantized = {"a", "b", "c"}
    found = lose_least(losses, 0.6, ("lm_head",), quantized)
    assert list(found.modules) == ["norm", "b", "a", "c"]
    assert found.total == pytest.approx(math.sqrt(0.51))
    assert found.skip_modules == ("lm_head", "b")
    assert lose_least(losses, 0.595, ("lm_head",), quantized).skip_modules == ("lm_head", "b")
    assert lose_least(losses, 0.55, (), quantized).skip_modules == ("b", "a")
    assert lose_least(losses, 0.8, (), quantized).skip_modules == ()
    assert lose_least(losses, None, (), quantized).bound == pytest.approx(found.total / 2)
    assert found.left == pytest.approx(math.sqrt(0.35))


def test_what_is_left_is_told_where_leaving_modules_does_not_bring_it_under_the_bound(
    tmp_path: Path, model: Path, text: Path
) -> None:
    losses = [{"norm": [25.0, 100.0], "a": [9.0, 100.0]}]
    found = lose_least(losses, 0.1, ("lm_head",), {"a"})
    assert (found.skip_modules, found.left) == (("lm_head", "a"), 0.5)
    assert lose_least(losses, 0.1, (), ()).skip_modules is None
    whole = bigpipe.evaluate(model, text, baseline=model, sequence_length=32)
    told = {bound: render(replace(whole, layers=lose_least(losses, bound, (), {"a"}))) for bound in (0.1, 0.5)}
    assert "even with skip_modules: [a] it would be 50.000%, not 10.000%: what is not quantized loses" in told[0.1]
    assert "for 50.000% together, quantize with skip_modules: [a]" in told[0.5]
    assert "skip_modules" not in render(replace(whole, layers=lose_least(losses, 0.1, (), ())))


@pytest.mark.parametrize("architecture", ["gpt2", "bloom"])
def test_modules_to_leave_are_named_where_they_are_stored_without_the_prefix_of_their_class(
    tmp_path: Path, text: Path, architecture: str
) -> None:
    """As those of openai-community/gpt2 and bigscience/bloom-560m are."""
    source = make_checkpoint(tmp_path / "source", architecture)
    file = source / "model.safetensors"
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    bigpipe.quantize_checkpoint(source, tmp_path / "int8", scheme="int8")
    found = bigpipe.evaluate(tmp_path / "int8", text, baseline=source, sequence_length=32, per_layer=True).layers
    assert found is not None
    assert found.left <= found.bound < found.total
    skipped = found.skip_modules or ()
    assert "lm_head" in skipped
    assert [name for name in skipped if name.startswith("transformer.h.")]
    bigpipe.quantize_checkpoint(source, tmp_path / "less", scheme="int8", skip_modules=skipped)


def test_streamed_models_give_the_same_numbers(model: Path, other: Path, text: Path) -> None:
    whole = bigpipe.evaluate(model, text, baseline=other, sequence_length=32, batch_size=2)
    placement = place(model, device_map={"": "disk"})
    assert bigpipe.evaluate(
        model, text, baseline=other, sequence_length=32, batch_size=2, placement=placement
    ) == whole  # fmt: skip


def test_a_window_has_the_numbers_that_it_has_alone_beside_longer_ones(tmp_path: Path) -> None:
    """Dynamic rotary positions keep the frequencies of the longest text so far, and the last window is shorter."""
    scaled = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 1e4}
    config = tiny_config("llama", max_position_embeddings=16, rope_parameters=scaled, initializer_range=0.5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, baseline = (save_model(LlamaForCausalLM(config).eval(), tmp_path / name) for name in ("a", "b"))
    (tmp_path / "text.txt").write_text("the cat sat on a mat and looked at the dog, who slept; " * 3)
    alone, beside = (
        bigpipe.evaluate(
            model, tmp_path / "text.txt", baseline=baseline, sequence_length=96, stride=96, batch_size=size
        )
        for size in (1, 4)
    )  # fmt: skip
    assert alone.comparison is not None
    assert beside.comparison is not None
    assert beside.perplexity.value == pytest.approx(alone.perplexity.value, rel=1e-4)
    assert beside.comparison.kl.mean.value == pytest.approx(alone.comparison.kl.mean.value, rel=1e-4)
    assert beside.comparison.baseline_perplexity.value == pytest.approx(
        alone.comparison.baseline_perplexity.value, rel=1e-4
    )


def test_rows_and_texts_are_joined_by_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n{"body": ""}\n{"body": "two"}\n')
    (tmp_path / "b.txt").write_text("three\nlines\n\nof text")
    (tmp_path / "c.raw").write_text("four")
    assert read_texts("a.jsonl", "body", tmp_path) == "one\n\n\n\ntwo"
    assert read_texts("b.txt", "text", tmp_path) == "three\nlines\n\nof text"
    assert read_texts("[bc].*", "text", tmp_path) == "three\nlines\n\nof text\n\nfour"


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("a.jsonl", '{"body": "one"}\n', "a.jsonl:1: there is no 'text', only 'body'"),
        ("a.jsonl", '{"text": 3}\n', "a.jsonl:1: 'text' holds no text"),
        ("a.jsonl", '{"text": null}\n', "a.jsonl:1: 'text' holds no text: it is null"),
        (
            "a.jsonl",
            '{"text": "a \\ud800"}\n',
            "a.jsonl:1: 'text' holds half of a surrogate pair, '\\ud800', which is no",
        ),
        ("a.jsonl", "nonsense\n", "a.jsonl:1: not JSON"),
        ("a.txt", "", "holds no text"),
        ("a.txt", " \n\n", "holds no text"),
        ("a.jsonl", "", "holds no text"),
        ("a.raw", b"\xff\xfe", "a.raw cannot be read"),
        ("a.md", POINTER, "a.md: is a pointer of git-lfs"),
    ],
)
def test_data_that_hold_no_text_are_refused_where_they_stand(tmp_path: Path, name: str, content, cause: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as error:
        read_texts(name, "text", tmp_path)
    assert cause in error.value.cause
    assert "prompt" not in str(error.value)
    assert error.value.field in ("data", "column")
    with pytest.raises(UsageError, match="there is no file missing"):
        read_texts("missing.txt", "text", tmp_path)


@pytest.mark.parametrize(
    ("fields", "cause", "field"),
    [
        ({"sequence_length": 129}, "the model has 128 positions", "sequence_length"),
        ({"sequence_length": 8, "stride": 9}, "stride is 9 and a window has 8 tokens", "stride"),
        ({"stride": 129}, "stride is 129 and a window has 128 tokens", "stride"),
        ({"sequence_length": 1}, "sequence_length is 1", "sequence_length"),
        ({"max_tokens": 1}, "max_tokens is 1", "max_tokens"),
        ({"per_layer": True}, "there is none", "per_layer"),
    ],
)
def test_windows_that_the_model_cannot_read_are_refused(
    model: Path, text: Path, fields, cause: str, field: str
) -> None:
    with pytest.raises(UsageError, match=cause) as error:
        bigpipe.evaluate(model, text, **fields)
    assert error.value.field == field


def test_windows_that_the_baseline_cannot_read_are_refused_and_those_that_are_left_out_fit_both(
    tmp_path: Path, model: Path, text: Path
) -> None:
    short = make_checkpoint(tmp_path / "short", "opt", max_position_embeddings=64)
    for own, other, who in ((model, short, "baseline"), (short, model, "model")):
        with pytest.raises(UsageError, match=f"sequence_length is 128, and the {who} has 64 positions") as error:
            bigpipe.evaluate(own, text, baseline=other, sequence_length=128)
        assert error.value.field == "sequence_length"
        assert bigpipe.evaluate(own, text, baseline=other) == bigpipe.evaluate(
            own, text, baseline=other, sequence_length=64
        )  # fmt: skip


def test_a_text_of_one_token_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UsageError, match="the text has 1 token, and the first is never scored"):
        bigpipe.evaluate(model, tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("architecture", "cause"),
    [("bert", "makes no text"), ("t5", "reads a prompt apart"), ("vit", "no text|tokenizer")],
)
def test_a_model_that_does_not_go_on_with_a_text_is_refused(
    tmp_path: Path, text: Path, architecture: str, cause: str
) -> None:
    path = make_checkpoint(tmp_path, architecture)
    with pytest.raises(UsageError, match=cause) as error:
        bigpipe.evaluate(path, text)
    assert "task" not in str(error.value).replace(str(path), "")  # evaluate has none


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("text.txt", "$%&\n$%&\n$% $%\n", "text.txt:3"),
        ("rows.jsonl", '{"text": "$%&"}\n\n{"text": "$% &"}\n', "rows.jsonl:3"),
        ("*.txt", "$% &\n", "b.txt:1"),
    ],
)
def test_a_token_that_the_model_does_not_have_is_told_where_it_stands(
    tmp_path: Path, name: str, content: str, place: str
) -> None:
    small = make_checkpoint(tmp_path / "model", "llama", vocab_size=210)
    (tmp_path / name.replace("*", "b")).write_text(content)
    (tmp_path / "a.txt").write_text("$%&")
    with pytest.raises(UsageError, match=f"{place}: the tokenizer makes 'Ġ' token 224 of 260, .* 210 tokens") as error:
        bigpipe.evaluate(small, name, base=tmp_path)
    assert "resize_token_embeddings" in error.value.cure


def test_a_baseline_of_another_vocabulary_or_tokenizer_is_refused(tmp_path: Path, model: Path, text: Path) -> None:
    larger = save_model(tiny_model("opt", vocab_size=272), tmp_path / "larger")
    with pytest.raises(UsageError, match="a vocabulary of 272 tokens, and the model one of 264") as error:
        bigpipe.evaluate(model, text, baseline=larger)
    assert error.value.field == "inputs.baseline"
    odd = make_checkpoint(tmp_path / "odd", "opt")
    settings = json.loads((odd / "tokenizer.json").read_text())
    vocabulary = settings["model"]["vocab"]
    first, second = list(vocabulary)[70:72]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (odd / "tokenizer.json").write_text(json.dumps(settings))
    (tmp_path / "all.txt").write_text("".join(map(chr, range(32, 127))))
    with pytest.raises(UsageError, match="reads the text differently, from token ") as error:
        bigpipe.evaluate(model, tmp_path / "all.txt", baseline=odd)
    assert error.value.field == "inputs.baseline"


def test_logits_that_are_no_numbers_are_said_with_their_token(tmp_path: Path, model: Path, text: Path) -> None:
    broken = tiny_model("opt")
    with torch.no_grad():  # attention carries it to the whole window, since nothing times NaN is NaN
        broken.get_submodule("model.decoder.embed_positions").weight[2 + 5] = math.nan
    save_model(broken, tmp_path / "broken")
    with pytest.raises(StageFailed, match=r"the model gives token 1 of the text .*NaN"):
        bigpipe.evaluate(tmp_path / "broken", text, sequence_length=32)
    with pytest.raises(StageFailed, match="the baseline gives token 1 "):
        bigpipe.evaluate(model, text, baseline=tmp_path / "broken", sequence_length=32)


@pytest.mark.parametrize(("value", "what"), [(-math.inf, "no probability"), (math.nan, "logits that are no numbers")])
def test_the_token_that_cannot_be_scored_is_said(value: float, what: str) -> None:
    logits = torch.zeros(3, 4)
    wanted = torch.tensor([2, 2, 2])
    assert measure(logits, wanted, 10)["tokens"] == 3
    broken = logits.clone()
    broken[1, 2] = value
    with pytest.raises(StageFailed, match=f"the model gives token 11 of the text {what}"):
        measure(broken, wanted, 10)
    with pytest.raises(StageFailed, match=f"the baseline gives token 11 of the text {what}"):
        measure(logits, wanted, 10, broken)


@pytest.mark.parametrize("cap", ["200KiB", "80KiB"])
def test_a_cap_is_for_both_models(model: Path, other: Path, text: Path, cap: str) -> None:
    """Under the larger one the model is in memory and its baseline partly; under the smaller one both are streamed."""
    placement = place(model, max_memory={"cpu": cap, "disk": "1GiB"})
    work = Workload(sequence_length=32, all_logits=True)
    known = [Known(describe_checkpoint(path), describe_architecture(path)) for path in (model, other)]
    both = place_pair(placement, known[0], known[1], work, MACHINE)
    held = sum(need.weights + need.streaming for each in both if (need := each.needs["cpu"]))
    assert held <= parse_size(cap)
    assert ["disk" in each.device_map.values() for each in both] == [cap == "80KiB", True]
    found = bigpipe.evaluate(model, text, baseline=other, sequence_length=32, placement=placement)
    assert found == bigpipe.evaluate(model, text, baseline=other, sequence_length=32)


def test_a_cap_too_small_for_two_is_refused(model: Path, other: Path, text: Path) -> None:
    placement = place(model, max_memory={"cpu": "60KiB", "disk": "1GiB"})
    with pytest.raises(DoesNotFit, match="do not fit side by side, each in half of max_memory"):
        bigpipe.evaluate(model, text, baseline=other, sequence_length=32, placement=placement)


def test_finished_windows_are_not_computed_again(tmp_path: Path, model: Path, text: Path) -> None:
    class Enough(Exception):
        pass

    told: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        told.append((done, total))
        if done == 5:
            raise Enough

    with pytest.raises(Enough):
        bigpipe.evaluate(model, text, sequence_length=32, folder=tmp_path / "work", progress=stop)
    again: list[tuple[int, int]] = []
    found = bigpipe.evaluate(
        model, text, sequence_length=32, folder=tmp_path / "work", progress=lambda *at: again.append(at)
    )  # fmt: skip
    assert again[0] == (0, told[0][1] - 5)
    assert found == bigpipe.evaluate(model, text, sequence_length=32)


def test_finished_windows_of_another_model_or_question_are_not_believed(
    tmp_path: Path, model: Path, other: Path, text: Path
) -> None:
    first = bigpipe.evaluate(model, text, sequence_length=32, folder=tmp_path / "work")
    asked: list[dict[str, Any]] = [
        {"baseline": other}, {"dtype": "bfloat16"}, {"baseline": other, "per_layer": True}, {"model": other},
    ]  # fmt: skip
    for fields in asked:
        fields = {"model": model, "data": text, "sequence_length": 32, **fields}
        found = bigpipe.evaluate(**fields, folder=tmp_path / "work")
        assert found == bigpipe.evaluate(**fields)
        assert found != first


def test_finished_windows_in_the_dtype_of_another_placement_are_not_believed(
    tmp_path: Path, model: Path, text: Path
) -> None:
    def computed(placement: Any) -> int:
        """How many windows were not taken from the folder."""
        told: list[tuple[int, int]] = []
        bigpipe.evaluate(
            model, text, sequence_length=32, folder=tmp_path / "work", placement=placement,
            progress=lambda *at: told.append(at),
        )  # fmt: skip
        return told[-1][1] if told else 0

    whole = place(model, max_memory={"cpu": "1GiB"}, dtype="float32")
    every = computed(whole)
    assert every > 0
    assert computed(whole) == 0
    last = next(reversed(describe_checkpoint(model).tensors or {}))
    others = [
        replace(whole, dtype="bfloat16"), replace(whole, dtype=None, compute_dtype="bfloat16"),
        replace(whole, special_dtypes={last: "float32"}), {"": "disk"},
    ]  # fmt: skip
    assert [computed(placement) for placement in others] == [every] * len(others)


def test_a_bound_without_layers_is_refused(model: Path, text: Path) -> None:
    with pytest.raises(UsageError, match="per_layer_bound belongs to per_layer") as caught:
        bigpipe.evaluate(model, text, per_layer_bound=0.1)
    assert caught.value.field == "per_layer_bound"


def test_a_report_says_all(tmp_path: Path, model: Path, other: Path, text: Path) -> None:
    found = bigpipe.evaluate(
        model, text, baseline=other, sequence_length=32, per_layer=True, out=tmp_path / "report"
    )  # fmt: skip
    told = json.loads((tmp_path / "report/report.json").read_text())
    assert told["schema"] == "bigpipe.evaluation/1"
    assert told["perplexity"] == found.perplexity.value
    assert told["kl"]["p99_stderr"] >= 0
    assert list(told["per_layer"]["modules"]) == list(found.layers.modules) if found.layers else False
    lines = (tmp_path / "report/report.txt").read_text()
    assert f"{found.perplexity.value:.6g} ± {found.perplexity.stderr:.2g}" in lines
    assert "skip_modules" not in lines  # nothing is quantized


def test_what_a_model_with_code_of_its_own_keeps_whole_is_asked_of_that_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also once all windows are computed, and where a placement is shared with a baseline."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    own, packed, sources = make_own_model(tmp_path / "own"), tmp_path / "packed", Sources(trust_remote_code=True)
    packed.mkdir()
    quantize_described(open_checkpoint(own), packed, Settings(scheme="int8"), sources=sources)
    described, question = describe_checkpoint(packed), Question(data="x", per_layer=True)
    found = evaluating._layer_loss([{"layers": {"one": [1.0, 100.0]}}], question, described, sources)
    kept = default_skips(architecture_of(described, sources))
    assert set(found.skip_modules or ()) == {"one", *kept}
    assert evaluating._look(packed, sources).architecture.class_name == "OwnModel"
