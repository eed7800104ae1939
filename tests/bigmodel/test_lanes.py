"""Batches that go through streamed layers together give what each gives alone, and every layer is read once for all."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.models import CAUSAL, make_checkpoint, save_model

from bigpipe.bigmodel.execution import load, loaded
from bigpipe.bigmodel.execution.lanes import Lanes
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.tasks import Row, TaskOptions, find_task


class Library:
    """Books that are fetched and put back, with who read what and when."""

    def __init__(self, broken: tuple[int, ...] = ()) -> None:
        self.broken = broken
        self.events: list[str] = []
        self.lanes: Lanes[int] = Lanes(self.fetch, lambda book: self.events.append(f"-{book}"), lambda book: book)

    def fetch(self, book: int) -> None:
        if book in self.broken:
            raise OSError(errno.EIO, "Input/output error")
        self.events.append(f"+{book}")

    def read(self, reader: str, books: list[int]) -> None:
        for book in books:
            self.lanes.enter(book)
            self.events.append(f"{reader}{book}")
            self.lanes.leave(book)

    def run(self, shelves: dict[str, list[int]], count: int) -> list[str]:
        self.lanes.run(lambda reader: self.read(reader, shelves[reader]), shelves, count, lambda: lambda: None)
        return self.events


@pytest.mark.timeout(30)
class TestOrder:
    def test_what_all_need_is_fetched_once(self) -> None:
        events = Library().run({"a": [0, 1], "b": [0, 1], "c": [0, 1]}, 3)
        assert events == ["+0", "a0", "b0", "c0", "-0", "+1", "a1", "b1", "c1", "-1"]

    def test_those_that_are_apart_meet_again(self) -> None:
        events = Library().run({"a": [0, 1, 2, 3], "b": [2, 3], "c": [1, 3]}, 3)
        assert [event for event in events if event[0] == "+"] == ["+0", "+1", "+2", "+3"]

    def test_one_that_is_done_takes_the_next(self) -> None:
        events = Library().run({"a": [0], "b": [0, 1, 0, 1], "c": [0, 1]}, 2)
        assert events.index("c0") < events.index("b1")
        assert events.count("+0") + events.count("+1") == 4

    def test_without_others_one_goes_its_way(self) -> None:
        library = Library()
        library.read("a", [1, 0, 1])
        assert library.events == ["+1", "a1", "-1", "+0", "a0", "-0", "+1", "a1", "-1"]

    def test_within_each_other_and_twice(self) -> None:
        library = Library()

        def work(reader: str) -> None:
            for book in (0, 1, 1):
                library.lanes.enter(book)
            library.events.append(reader)
            for book in (1, 1, 0):
                library.lanes.leave(book)

        library.lanes.run(work, "ab", 2, lambda: lambda: None)
        assert library.events == ["+0", "+1", "a", "b", "-1", "-0"]

    def test_an_error_ends_all_and_leaves_nothing_fetched(self) -> None:
        library = Library()

        def work(reader: str) -> None:
            library.read(reader, [0])
            library.lanes.enter(1)
            if reader == "b":
                raise ValueError(reader)
            library.lanes.enter(2)
            library.events.append("never")

        with pytest.raises(ValueError, match="b"):
            library.lanes.run(work, "abcd", 3, lambda: lambda: None)
        assert "never" not in library.events
        assert sorted(event for event in library.events if event[0] == "+") == ["+0", "+1"]
        assert sorted(event for event in library.events if event[0] == "-") == ["-0", "-1"]
        assert Library.read(library, "z", [5]) is None  # and goes on

    def test_what_cannot_be_fetched_is_an_error_of_each_that_waits(self) -> None:
        library, caught = Library(broken=(1,)), []

        def work(reader: str) -> None:
            try:
                library.read(reader, [0, 1])
            except OSError:
                caught.append(reader)
            library.read(reader, [2])

        library.lanes.run(work, "abc", 3, lambda: lambda: None)
        assert caught == ["a", "b", "c"]
        assert library.events[-5:] == ["+2", "a2", "b2", "c2", "-2"]

    def test_what_lanes_meet_for_is_done_once_and_before_what_comes_after(self) -> None:
        library, tables = Library(), []

        def work(reader: str) -> None:
            for book in [0] if reader == "c" else [0, 2]:
                library.read(reader, [book])
                library.lanes.meet(book + 1, lambda table=book + 1: tables.append((table, len(library.events))))
            library.events.append(reader)

        library.lanes.run(work, "abc", 3, lambda: lambda: None)
        assert tables == [(1, 5), (3, 10)]
        assert library.events == ["+0", "a0", "b0", "c0", "-0", "c", "+2", "a2", "b2", "-2", "a", "b"]

    def test_an_error_where_lanes_meet_is_one_of_each(self) -> None:
        library, caught = Library(), []

        def work(reader: str) -> None:
            try:
                library.lanes.meet(1, lambda: next(iter(())))
            except StopIteration:
                caught.append(reader)
            library.read(reader, [2])

        library.lanes.run(work, "ab", 2, lambda: lambda: None)
        assert caught == ["a", "b"]
        assert library.events == ["+2", "a2", "b2", "-2"]

    def test_what_cannot_be_suspended_ends_all(self) -> None:
        library, times = Library(), iter(range(10))

        def suspend() -> Callable[[], None]:
            if next(times) == 1:
                raise MemoryError
            return lambda: None

        with pytest.raises(MemoryError):
            library.lanes.run(lambda reader: library.read(reader, [0, 1]), "abc", 3, suspend)
        library.read("z", [5])


def rows(count: int) -> list[Row]:
    texts = [f"{'word ' * (1 + 3 * number % 7)}{number}" for number in range(count)]
    return [Row(number, text, {"prompt": text}) for number, text in enumerate(texts)]


def answers(
    path: Path, device_map: dict[str, str], together: int, only: int | None = None, **arguments: object
) -> tuple[list[object], int]:
    """What a task says to six batches of two, so many together, or to one of them, and the bytes that were read."""
    name, options = ("feature-extraction", {}) if arguments.pop("features", False) else ("text-generation", arguments)
    model = load(path, device_map, dtype="float32")
    task = find_task(name, Sources()).bind(model, path, TaskOptions(arguments=options, max_new_tokens=5), Sources())
    batches = [rows(12)[first : first + 2] for first in range(0, 12, 2)]
    found: dict[int, object] = {}

    def work(number: int) -> None:
        found[number] = [answer.payload for answer in task(batches[number])]

    stream = loaded(model).stream
    chosen = range(6) if only is None else [only]
    stream.together(model, work, chosen, together)
    assert all(parameter.is_meta for name, parameter in model.named_parameters() if device_map.get("") == "disk")
    return [found[number] for number in chosen], stream.bytes_read


@pytest.mark.parametrize("architecture", [*CAUSAL, "t5", "bart"])
def test_generations_are_the_same_bits(tmp_path: Path, architecture: str) -> None:
    make_checkpoint(tmp_path, architecture)
    wanted, _ = answers(tmp_path, {"": "cpu"}, 1)
    alone, read = answers(tmp_path, {"": "disk"}, 1)
    together, shared = answers(tmp_path, {"": "disk"}, 6)
    assert wanted == alone == together
    assert shared < read / 4


COMMON = {
    "vocab_size": 264, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 32,
    "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
KEEPING: dict[str, tuple[str, dict[str, object]]] = {
    "its recurrent states": ("RecurrentGemma", {
        "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 16,
        "block_types": ["recurrent", "recurrent", "attention"],
    }),
    "the frequencies of its longest text": ("Llama", {
        "max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    }),
    "states outside": ("Mamba", {"state_size": 8}),
    "compressed keys": ("DeepseekV2", {
        "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    }),
}  # fmt: skip


@pytest.mark.parametrize("kept", KEEPING)
def test_what_a_model_keeps_is_kept_apart(tmp_path: Path, kept: str) -> None:
    import transformers

    name, fields = KEEPING[kept]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **fields})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_model(model.eval(), tmp_path)
    features = "frequencies" in kept  # which are too near to each other to choose another word
    single = [answers(tmp_path, {"": "disk"}, 1, only=number, features=features)[0][0] for number in range(6)]
    assert answers(tmp_path, {"": "cpu"}, 1, features=features)[0] == single
    assert answers(tmp_path, {"": "disk"}, 4, features=features)[0] == single


@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": True, "top_k": 40},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True},
        {"prompt_lookup_num_tokens": 3},
        {"features": True},
    ],
    ids=str,
)
def test_drawing_beams_and_vectors_are_the_same(tmp_path: Path, arguments: dict[str, object]) -> None:
    make_checkpoint(tmp_path, "llama")
    wanted, _ = answers(tmp_path, {"": "cpu"}, 1, **arguments)
    for together in (2, 4, 6):
        assert answers(tmp_path, {"": "disk"}, together, **arguments)[0] == wanted


def test_modules_of_a_task_are_as_before_when_its_batches_meet_in_them(tmp_path: Path) -> None:
    """GPT-2's, whose modules that multiply are no torch's own; an error of one batch ends all, and is told."""
    path = make_checkpoint(tmp_path, "gpt2", dtype="float32")
    model = load(path, {"": "disk"})
    task = find_task("text-generation", Sources()).bind(model, path, TaskOptions(max_new_tokens=2), Sources())
    met: list[str] = []

    def work(number: int) -> None:
        task(rows(2))
        met.extend({type(module).__name__ for module in model.modules() if "forward" in vars(module)})
        if number == 3:
            raise ValueError("the fourth")

    with pytest.raises(ValueError, match="the fourth"):
        loaded(model).stream.together(model, work, range(4), 4)
    assert {"Conv1D", "Linear"} <= set(met)
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_features_read_the_model_once(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "bert")
    once = answers(tmp_path, {"": "disk"}, 1, features=True)
    together = answers(tmp_path, {"": "disk"}, 6, features=True)
    assert together[0] == once[0]
    assert together[1] < once[1] / 5
