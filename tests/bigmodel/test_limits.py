"""How fast work with streamed layers can be at the most, against counts by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.measured import GOOD_HALVES, HERE, knowing, rates
from support.models import make_checkpoint, save_model
from transformers import AlbertConfig, AlbertForMaskedLM, BertConfig, EncoderDecoderConfig, EncoderDecoderModel

from bigpipe.bigmodel.architecture import describe_architecture
from bigpipe.bigmodel.checkpoint import describe_checkpoint, open_checkpoint
from bigpipe.bigmodel.execution import load, loaded
from bigpipe.bigmodel.footprint import Workload
from bigpipe.bigmodel.formats import PLAIN, Format, named
from bigpipe.bigmodel.placement import Limit, Speeds, Work, batches_together, limit_here, limit_of, place
from bigpipe.bigmodel.placement.products import Products

FAST = Speeds(disk=1e30, link=1e30, ram=1e30)
QUICK = Products(rates(dict.fromkeys(("float32", "bfloat16", "float16"), (1e21, 1e21, 1e21))))
STREAMED = {"": "disk", "model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama", dtype="float32")


def sizes(path: Path) -> dict[str, int]:
    return {name: tensor.nbytes for name, tensor in open_checkpoint(path).tensors.items()}


def limit(path: Path, work: Work, speeds: Speeds = FAST, products: Products = QUICK) -> Limit:
    placement = place(path, device_map=STREAMED)
    architecture = describe_architecture(path)
    return limit_of(placement, architecture, sizes(path), "float32", "float32", work, speeds, products, 2)


def test_each_pass_moves_the_streamed_weights_once(llama: Path) -> None:
    layers = sum(size for name, size in sizes(llama).items() if ".layers." in name)
    alone = limit(llama, Work(rows=8, read=80, made=24, batch_size=2), replace(FAST, disk=1e6))
    assert alone.bandwidth == pytest.approx(4 * 3 * layers / 1e6)
    assert alone.bound_by == "bandwidth"
    assert alone.tokens_per_second == pytest.approx(24 / alone.bandwidth)
    together = limit(llama, Work(rows=8, read=80, made=24, batch_size=2, together=3), replace(FAST, disk=1e6))
    assert together.bandwidth == pytest.approx(2 * 3 * layers / 1e6)
    scored = limit(llama, Work(rows=8, read=80, batch_size=2, together=4), replace(FAST, disk=1e6))
    assert scored.bandwidth == pytest.approx(layers / 1e6)
    assert scored.tokens_per_second == pytest.approx(80 / scored.seconds)


def test_each_token_is_two_operations_with_each_weight(llama: Path) -> None:
    head = sizes(llama)["lm_head.weight"] // 4
    body = sum(size for name, size in sizes(llama).items() if "embed" not in name) // 4 - head
    slow = Products(rates(dict.fromkeys(("float32",), (1e-3, 2e-3, 4e-3))))
    found = limit(llama, Work(rows=8, read=80, made=24, batch_size=8), FAST, slow)
    assert found.bound_by == "compute"
    assert found.compute == pytest.approx((2 * body * 80 / 4e6 + 2 * (body * 16 + head * 24) / 2e6) / 2)
    step = limit(llama, Work(rows=8, made=8, batch_size=8), FAST, slow)
    assert step.compute == pytest.approx(2 * 8 * (body + head) / 2e6 / 2)
    at_once = limit(llama, Work(rows=64, made=64, batch_size=8, together=8), FAST, slow)
    assert at_once.compute == pytest.approx(2 * 64 * (body + head) / 4e6 / 2)


def test_more_batches_go_together_where_their_rows_are_multiplied_at_once(llama: Path) -> None:
    placement, architecture = place(llama, device_map=STREAMED), describe_architecture(llama)
    machine = replace(HERE, memory=2**40)

    def count(rows: int, stored: Format = PLAIN) -> int:
        workload = Workload(batch_size=rows, sequence_length=20)
        return batches_together(placement, architecture, workload, "float32", machine, stored=stored).count

    alone = count(1)
    assert 1 < alone < count(8)
    assert count(65) == count(8, named("int8")) == alone


def albert(folder: Path) -> Path:
    config = AlbertConfig(
        vocab_size=264, embedding_size=16, hidden_size=32, num_hidden_layers=6, num_hidden_groups=2,
        num_attention_heads=4, intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    return save_model(AlbertForMaskedLM(config).eval(), folder)


def test_the_layers_of_albert_are_moved_as_often_as_they_run(tmp_path: Path) -> None:
    placement = place(albert(tmp_path), device_map={"": "disk"})
    state = loaded(model := load(tmp_path, placement))
    with torch.inference_mode():
        model(torch.full((1, 1), 5))
    assert state.stream.bytes_read == placement.streamed_bytes_per_token == state.streamed
    assert state.streamed > 2 * sum(group.moved() for group in state.stream._groups)


def bert_to_bert(folder: Path) -> Path:
    small = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 264,
    }  # fmt: skip
    halves = BertConfig(**small), BertConfig(**small, is_decoder=True, add_cross_attention=True)
    model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(*halves)).eval()
    tokens = {"decoder_start_token_id": 1, "pad_token_id": 0}
    model.config.update(tokens)
    model.generation_config.update(**tokens, eos_token_id=None)
    return save_model(model, folder)


@pytest.mark.parametrize("architecture", ["t5", "bart", "opt", "a BERT before a BERT"])
def test_a_limit_counts_what_reading_and_each_token_made_really_move(tmp_path: Path, architecture: str) -> None:
    """Only the encoder of an encoder-decoder reads; only its decoder runs for each further token."""
    folder = bert_to_bert(tmp_path) if " " in architecture else make_checkpoint(tmp_path, architecture)
    placement, described = place(folder, device_map={"": "disk"}), describe_architecture(folder)
    model = load(folder, placement)
    stream, tokens = loaded(model).stream, torch.full((1, 1), 5)

    def counted(work: Work) -> float:
        slow = replace(FAST, disk=1e6)
        return 1e6 * limit_of(placement, described, sizes(folder), "float32", "float32", work, slow, QUICK, 2).bandwidth

    body = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    with torch.inference_mode():
        body(tokens)
        features, start = stream.bytes_read, stream.bytes_read
        model.generate(tokens, max_new_tokens=9, min_new_tokens=9)
    assert counted(Work(rows=1, read=1, headless=True)) == pytest.approx(features, rel=0.02)
    assert counted(Work(rows=1, read=1, made=9)) == pytest.approx(stream.bytes_read - start, rel=0.02)


def test_of_an_encoder_decoder_the_prompt_meets_the_encoder_and_its_answer_the_decoder(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "t5")
    encoder, decoder = (
        sum(size for name, size in sizes(folder).items() if name.startswith(part) and "bias" not in name) // 4
        for part in ("encoder.", "decoder.")
    )
    head, slow = 264 * 32, Products(rates(dict.fromkeys(("float32",), (1e-3, 2e-3, 4e-3))))
    placement = place(folder, device_map={"": "disk"})
    given = placement, describe_architecture(folder), sizes(folder), "float32", "float32"
    found = limit_of(*given, Work(rows=8, read=80, made=24, batch_size=8), FAST, slow, 2)
    assert found.compute == pytest.approx((2 * encoder * 80 / 4e6 + 2 * (decoder + head) * 24 / 2e6) / 2)
    read = limit_of(*given, Work(rows=8, read=80, batch_size=8, headless=True), FAST, slow, 2)
    assert read.compute == pytest.approx(2 * encoder * 80 / 4e6 / 2)
    step = limit_of(*given, Work(rows=8, made=8, batch_size=8), FAST, slow, 2)
    assert step.compute == pytest.approx(2 * 8 * (decoder + head) / 2e6 / 2)


def test_each_batch_reads_each_weight_from_memory_or_the_rows_of_all_meet_it_at_once(llama: Path) -> None:
    """The first of three steps reads prompts, which share where they are short; a row alone is multiplied alone."""
    weights = sum(size for name, size in sizes(llama).items() if "embed" not in name)
    found = limit(llama, Work(rows=8, read=640, made=24, batch_size=2, together=4), replace(FAST, ram=1e6))
    assert found.bound_by == "memory"
    assert found.memory == pytest.approx((4 + 2) * weights / 1e6)
    single = Work(rows=8, read=640, made=24, batch_size=1, together=4)
    beams, short = replace(single, sequences=4), replace(single, read=16)
    for work, fetches in [(single, 8 * 3), (beams, 8 + 2 * 2), (short, 2 + 8 * 2)]:
        assert limit(llama, work, replace(FAST, ram=1e6)).memory == pytest.approx(fetches * weights / 1e6)
    assert "tokens/s, bound by memory" in found.describe()


def test_is_of_this_machine_alone(tmp_path: Path, llama: Path) -> None:
    placement, model = place(llama, device_map=STREAMED), describe_checkpoint(llama)
    given = placement, describe_architecture(llama), model, "float32", Work(rows=1, made=1)
    knowing(tmp_path, GOOD_HALVES, replace(FAST, disk=1e6))
    found = limit_here(*given, HERE, tmp_path)
    assert found is not None
    assert found.bound_by == "bandwidth"
    assert limit_here(*given, replace(HERE, name="elsewhere"), tmp_path) is None
