"""Every prompt once, in order, the same on any number of ranks, through crashes, and through the real launcher."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from support.contexts import check_context, forecast_context
from support.inferring import Reports, as_rank, context, infer, results, start, streaming
from support.launching import MACHINE
from support.measured import GOOD_HALVES, HERE, knowing
from support.models import make_checkpoint, save_model
from support.workshop import Workshop

from bigpipe.bigmodel.checkpoint import describe_checkpoint
from bigpipe.bigmodel.inference import assign, read_log
from bigpipe.bigmodel.placement import Placement, Speeds, place
from bigpipe.errors import StageFailed, UsageError
from bigpipe.orchestrator.contract.events import Progress, RankHello
from bigpipe.orchestrator.stage import CheckContext, Forecast, Gpu, Launch, StageContext, Trust
from bigpipe.plugins import inferring
from bigpipe.plugins.distributed_infer import STAGE, InferParams
from bigpipe.plugins.placed import read_placement

PROMPTS = ["Hello, my name is", "The", "Once upon a time", "a b c", "Why?"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "opt", dtype="float16")


def params(**fields: Any) -> InferParams:
    return InferParams(**{"task": "text-generation", "prompts": PROMPTS, "max_new_tokens": 5, **fields})


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_any_number_of_ranks_gives_the_same_bytes(tmp_path: Path, model: Path, batch_size: int) -> None:
    written = []
    for ranks, split in ((1, "queue"), (2, "static"), (4, "static")):
        ctx = context(tmp_path / str(ranks), model, ranks)
        metrics = infer(params(batch_size=batch_size, split=split), ctx)
        assert (metrics.prompts, metrics.errors, metrics.tokens) == (5, 0, 25)
        assert metrics.peak["cpu"] > 0
        assert 0 <= metrics.idle < 1
        written.append((ctx.out / "results.jsonl").read_bytes())
    assert len(set(written)) == 1
    found = results(ctx)
    assert [(line["index"], line["prompt"]) for line in found] == list(enumerate(PROMPTS))
    assert all(set(line) == {"index", "prompt", "text"} for line in found)


def rank_shares(ctx: StageContext) -> list[list[int]]:
    return [[record.index for record in read_log(log)] for log in sorted(ctx.scratch.glob("rank-*/records.jsonl"))]


def test_every_rank_says_what_it_has_to_do_before_it_begins(tmp_path: Path, model: Path) -> None:
    ctx = context(tmp_path, model, 2)
    infer(params(batch_size=2, split="static"), ctx)
    assert isinstance(ctx.reporter, Reports)
    told = [event for event in ctx.reporter if isinstance(event, Progress)]
    counts = {rank: [(event.done, event.total) for event in told if event.rank == rank] for rank in (0, 1)}
    assert counts == {0: [(0, 3), (2, 3), (3, 3), (3, 3)], 1: [(0, 2), (2, 2), (2, 2)]}
    assert {(event.unit, event.task) for event in told} == {("prompts", "inferring")}


def test_uneven_counts_and_padding(tmp_path: Path, model: Path) -> None:
    uneven, padded = context(tmp_path / "uneven", model, 2), context(tmp_path / "padded", model, 2)
    infer(params(split="static"), uneven)
    assert rank_shares(uneven) == [[0, 1, 2], [3, 4]]
    metrics = infer(params(split="static", apply_padding=True), padded)
    assert rank_shares(padded) == [[0, 1, 2], [3, 4, 4]]
    assert metrics.tokens == 25
    assert results(padded) == results(uneven)


@pytest.mark.parametrize("length", range(12))
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("pad", [False, True])
def test_ranks_get_what_accelerate_gives_them(length: int, ranks: int, pad: bool) -> None:
    from accelerate import PartialState

    wanted = []
    for rank in range(ranks):
        state = PartialState(cpu=True)
        state.num_processes, state.process_index = ranks, rank
        try:
            if length or not pad:  # accelerate has nothing to pad with
                with state.split_between_processes(list(range(length)), apply_padding=pad) as share:
                    wanted.append(list(share))
            else:
                wanted.append([])
        finally:
            PartialState._reset_state()
    if ranks == 1:
        assert wanted == [list(range(length))]
    assert assign(range(length), ranks, pad=pad) == wanted
    assert [row for share in assign(range(length), ranks) for row in share] == list(range(length))


STOPPING = """
from dataclasses import replace

from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.tasks import find_task

PLAIN = find_task("text-generation", Sources())

def bind(model, path, options, sources):
    answer, limit = PLAIN.bind(model, path, options, sources), sources.base / "limit"
    left = iter(range(int(limit.read_text()) if limit.exists() else 10**9))

    def answer_or_stop(rows):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return answer(rows)

    return answer_or_stop

TASK = replace(PLAIN, name="stopping", bind=bind)
"""


@pytest.mark.parametrize("ranks_after", [1, 2, 3])
def test_what_was_finished_is_not_done_again(tmp_path: Path, model: Path, ranks_after: int) -> None:
    whole = context(tmp_path / "whole", model)
    infer(params(batch_size=2), whole)
    broken = context(tmp_path / "broken", model, 2, trust=Trust(modules=("stopping",)))
    (broken.base / "stopping.py").write_text(STOPPING)
    (broken.base / "limit").write_text("1")
    stopping = params(task="stopping:TASK", batch_size=2, split="static")
    with pytest.raises(KeyboardInterrupt):
        infer(stopping, broken)
    (broken.base / "limit").unlink()
    assert rank_shares(broken) == [[0, 2]]  # the longest two
    log = broken.scratch / "rank-0" / "records.jsonl"
    log.write_bytes(log.read_bytes() + log.read_bytes()[:40])
    again = replace(broken.within(launch=Launch(num_processes=ranks_after)), world_size=ranks_after)
    infer(stopping, again)
    assert sorted(index for share in rank_shares(again) for index in share) == [0, 1, 2, 3, 4]
    assert (again.out / "results.jsonl").read_bytes() == (whole.out / "results.jsonl").read_bytes()


def test_a_batch_with_a_torn_row_is_done_again_and_counts_once(tmp_path: Path, model: Path) -> None:
    ctx = context(tmp_path, model, 2)
    infer(params(batch_size=2, split="static"), ctx)
    wanted = (ctx.out / "results.jsonl").read_bytes()
    log = ctx.scratch / "rank-1" / "records.jsonl"
    lines = (ctx.scratch / "rank-0" / "records.jsonl").read_bytes().splitlines(keepends=True)
    (ctx.scratch / "rank-0" / "records.jsonl").write_bytes(b"".join(lines[:3]))
    log.unlink()
    assert infer(params(batch_size=2), ctx).prompts == 5
    assert (ctx.out / "results.jsonl").read_bytes() == wanted


def test_another_world_size_than_the_plan_was_made_for(tmp_path: Path, model: Path) -> None:
    ctx = context(tmp_path, model, 2)
    inferring.prepare(params(), ctx)
    with pytest.raises(StageFailed, match="divided for 2 ranks, and 3 came up"):
        inferring.run(params(), as_rank(replace(ctx, world_size=3), 0))


def test_a_prompt_that_fails_stands_in_the_results_where_that_is_allowed(tmp_path: Path, model: Path) -> None:
    prompts = ["good", "", "x" * 200, "fine"]
    with pytest.raises(StageFailed, match=r"prompt 1 \(prompts\[1\]\): ValueError: the prompt is empty"):
        infer(params(prompts=prompts, batch_size=4), context(tmp_path / "strict", model))
    ctx = context(tmp_path / "lenient", model)
    metrics = infer(params(prompts=prompts, batch_size=4, max_errors=2), ctx)
    assert metrics.errors == 2
    assert [set(line) - {"index", "prompt"} for line in results(ctx)] == [{"text"}, {"error"}, {"error"}, {"text"}]
    assert "more than the model's 128 positions" in results(ctx)[2]["error"]


def test_runs_through_a_placement(tmp_path: Path, model: Path) -> None:
    plain, placed = context(tmp_path / "plain", model), context(tmp_path / "placed", model)
    infer(params(dtype="float32"), plain)
    placement = Placement(
        device_map={"": "disk", "model.decoder.layers.0": "cpu"}, weights={}, max_memory={"cpu": 30_000, "disk": None},
        strategy="custom",
    )  # fmt: skip
    (tmp_path / "placement.json").write_text(json.dumps(placement.as_json()))
    infer(params(dtype="float32"), replace(placed, inputs={**placed.inputs, "placement": (tmp_path,)}))
    assert results(placed) == results(plain)


@pytest.mark.parametrize("task", ["text-generation", "feature-extraction", "scoring"])
def test_says_what_bounds_it_and_what_share_was_reached(tmp_path: Path, model: Path, task: str) -> None:
    makes, figures = task == "text-generation", Speeds(disk=1e5, ram=1e12)
    ctx = context(tmp_path, model, machine=HERE, memo=knowing(tmp_path, GOOD_HALVES, figures))
    ctx = replace(ctx, inputs={**ctx.inputs, "placement": (streaming(tmp_path, model),)})
    made = {"max_new_tokens": 5} if makes else {}
    prompts = [{"prompt": text, "continuation": "."} for text in PROMPTS] if task == "scoring" else PROMPTS
    metrics = infer(InferParams(task=task, prompts=prompts, micro_batches=2, **made), ctx)
    assert metrics.prompt_tokens > 5
    assert (metrics.tokens == metrics.prompt_tokens) == (task == "feature-extraction"), (
        "limits are of what speeds count"
    )
    assert metrics.bound_by == "bandwidth"
    streamed = read_placement(tmp_path).streamed_bytes_per_token
    passes = 3 * (metrics.tokens / 5 if makes else 1)
    if task == "feature-extraction":
        streamed -= 264 * 32 * 2  # of the head, which it does not run
    assert metrics.limit_tokens_per_second == pytest.approx(metrics.tokens / (passes * streamed / 1e5), rel=0.01)
    assert metrics.limit_tokens_per_second
    reached = metrics.tokens_per_second / metrics.limit_tokens_per_second
    assert metrics.share_of_limit == pytest.approx(reached, rel=0.01)


TELLS = """
import torch

def makes(model, rows, *, max_new_tokens):
    tokens = torch.tensor([[5, 6, 7]] * len(rows))
    model.generate(tokens, max_new_tokens=max_new_tokens, min_new_tokens=max_new_tokens, do_sample=False)
    return [{"tokens": max_new_tokens, "prompt_tokens": 3} for _ in rows]

def reads(model, rows):
    model(torch.tensor([[5, 6, 7]] * len(rows)))
    return [{"tokens": 3, "prompt_tokens": 3} for _ in rows]
"""


@pytest.mark.parametrize(("function", "more", "passes"), [("makes", {"max_new_tokens": 4}, 4), ("reads", {}, 1)])
def test_a_function_that_counts_is_held_against_the_limit(
    tmp_path: Path, model: Path, function: str, more: dict[str, Any], passes: int
) -> None:
    (tmp_path / "mytasks.py").write_text(TELLS)
    figures = Speeds(disk=1e5, ram=1e12)
    ctx = context(
        tmp_path, model, machine=HERE, memo=knowing(tmp_path, GOOD_HALVES, figures), trust=Trust(modules=("mytasks",))
    )
    ctx = replace(ctx, inputs={**ctx.inputs, "placement": (streaming(tmp_path, model),)})
    metrics = infer(InferParams(task=f"mytasks:{function}", prompts=["a", "b"], batch_size=2, **more), ctx)
    assert (metrics.prompt_tokens, metrics.bound_by) == (6, "bandwidth")
    streamed = read_placement(tmp_path).streamed_bytes_per_token
    assert metrics.limit_tokens_per_second == pytest.approx(metrics.tokens / (passes * streamed / 1e5), rel=0.01)


def test_computes_in_what_the_placement_says_unless_a_dtype_is_asked_for(tmp_path: Path, model: Path) -> None:
    written = {}
    for dtype, computed in ((None, "bfloat16"), ("float32", "bfloat16"), ("bfloat16", None), ("float32", None)):
        placement = place(model, device_map={"": "disk"}, compute_dtype=computed or "stored")
        (tmp_path / "placement.json").write_text(json.dumps(placement.as_json()))
        ctx = context(tmp_path / f"{dtype}-{computed}", model)
        ctx = replace(ctx, inputs={**ctx.inputs, "placement": (tmp_path,)})
        metrics = infer(InferParams(task="feature-extraction", prompts=["Once upon"], dtype=dtype), ctx)
        assert metrics.compute_dtype == (dtype or computed)
        written[dtype, computed] = (ctx.out / "results.jsonl").read_bytes()
    assert written[None, "bfloat16"] == written["bfloat16", None] != written["float32", None]
    assert written["float32", "bfloat16"] == written["float32", None]


@pytest.mark.parametrize("arguments", [{}, {"do_sample": True}, {"num_beams": 2}], ids=str)
def test_batches_that_go_through_streamed_layers_together_give_the_same_bytes(
    tmp_path: Path, model: Path, arguments: dict[str, Any]
) -> None:
    written = []
    for count in (1, 3, None):
        ctx = context(tmp_path / str(count), model)
        ctx = replace(ctx, inputs={**ctx.inputs, "placement": (streaming(tmp_path, model),)})
        metrics = infer(params(generation=arguments, micro_batches=count), ctx)
        assert metrics.micro_batches == (count or 5)
        assert 0 < metrics.tokens_per_second < 1e6
        written.append((ctx.out / "results.jsonl").read_bytes())
    assert len(set(written)) == 1


def test_a_batch_that_fails_beside_others_ends_the_stage_and_what_was_finished_stays(
    tmp_path: Path, model: Path
) -> None:
    ctx = context(tmp_path, model)
    ctx = replace(ctx, inputs={**ctx.inputs, "placement": (streaming(tmp_path, model),)})
    good = ["good", "fine", "so", "well"]
    with pytest.raises(StageFailed, match=r"prompt 4 \(prompts\[4\]\): ValueError: the prompt is empty"):
        infer(params(prompts=[*good, "", *good], micro_batches=4), ctx)
    before = len(rank_shares(ctx)[0])
    metrics = infer(params(prompts=[*good, "", *good], micro_batches=4, max_errors=1), ctx)
    assert (metrics.prompts, metrics.errors) == (9, 1)
    assert len(rank_shares(ctx)[0]) == 9 + before - sum(index != 4 for index in rank_shares(ctx)[0][:before])


def test_a_plan_says_how_many_batches_go_together_and_why(tmp_path: Path, model: Path) -> None:
    placement = place(model, device_map={"": "disk", "model.decoder.embed_tokens": "cpu"})
    inputs = {"model": (Forecast(output=describe_checkpoint(model)),), "placement": (Forecast(output=placement),)}
    ctx = forecast_context(tmp_path, inputs=inputs, machine=MACHINE)
    found = STAGE.forecast(params(), ctx)
    assert found.metrics == {"prompts": 5, "micro_batches": 5, "compute_dtype": "float16"}
    assert found.details[0].startswith("5 batches at once through the streamed layers: more would not be faster")
    need = placement.needs["cpu"].total
    small = replace(MACHINE, memory=int((need + 4 * 40_000) / 0.8))
    some = STAGE.forecast(params(prompts=["a" * 50] * 5), ctx.within(machine=small))
    assert some.metrics["micro_batches"] in (2, 3, 4)
    assert "must fit" in some.details[0]
    alone, asked = (STAGE.forecast(params(micro_batches=count), ctx) for count in (1, 4))
    assert asked.details[0].startswith("4 batches at once through the streamed layers: as asked")
    assert alone.ram is not None
    assert asked.ram is not None
    one = asked.ram - alone.ram
    assert one > 3 * 2 * 2 * 32 * 2 * (5 + len("Hello, my name is"))  # keys and values, layers, width, bytes, tokens
    whole = replace(ctx, inputs={**inputs, "placement": (Forecast(output=place(model, device_map={"": "cpu"})),)})
    for count in (None, 3):
        found = STAGE.forecast(params(micro_batches=count), whole)
        assert (found.details, found.metrics["micro_batches"]) == ((), 1)


@pytest.mark.parametrize(("name", "width"), [("DistilBert", "dim"), ("GPT2", "n_embd"), ("T5", "d_model")])
def test_a_batch_has_a_size_whatever_its_width_is_called(tmp_path: Path, name: str, width: str) -> None:
    import transformers

    few = {"DistilBert": {"n_layers": 2, "n_heads": 4, "hidden_dim": 64}, "GPT2": {"n_layer": 2, "n_head": 4}}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=264, bos_token_id=1, eos_token_id=2, **{width: 32}, **few.get(name, {"num_layers": 2})
    )
    folder = save_model(getattr(transformers, f"{name}Model")(config), tmp_path)
    placement = place(folder, device_map={"": "disk"})
    inputs = {"model": (Forecast(output=describe_checkpoint(folder)),), "placement": (Forecast(output=placement),)}
    ctx = forecast_context(tmp_path, inputs=inputs, machine=MACHINE)
    found = STAGE.forecast(InferParams(task="feature-extraction", prompts=PROMPTS), ctx)
    assert found.metrics["micro_batches"] == 5
    assert re.search(r"[1-9][\d.]* KiB each", found.details[0])


def custom_task(folder: Path) -> None:
    (folder / "mytasks.py").write_text("def lengths(model, rows, **o): return [{'length': len(r['q'])} for r in rows]")
    (folder / "questions.jsonl").write_text("".join(json.dumps({"q": text, "n": 1}) + "\n" for text in PROMPTS))


def test_a_function_of_ones_own_over_a_file(tmp_path: Path, model: Path) -> None:
    custom_task(tmp_path)
    ctx = context(tmp_path, model, 2, trust=Trust(modules=("mytasks",)))
    parameters = params(task="mytasks:lengths", prompts="questions.jsonl", column="q", batch_size=2)
    assert infer(parameters, ctx).prompts == 5
    wanted = [{"index": i, "prompt": text, "length": len(text)} for i, text in enumerate(PROMPTS)]
    assert results(ctx) == wanted


CALLS = """
def go(model, rows):
    with open("calls", "a") as calls:
        calls.write("".join(row["prompt"] for row in rows))
    if any(row["prompt"] == "x" for row in rows):
        raise ValueError("no x")
    return [{"text": row["prompt"]} for row in rows]
"""


def test_a_failed_row_is_asked_again_alone_whatever_changes(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "calls.py").write_text(CALLS)
    ctx = context(tmp_path, model, trust=Trust(modules=("calls",)))

    def calls(prompts: list[Any], **fields: Any) -> str:
        Path("calls").write_text("")
        with suppress(StageFailed):
            infer(InferParams(task="calls:go", prompts=prompts, **fields), ctx)
        return Path("calls").read_text()

    assert calls(["a", "b", "x"]) == "abx"
    assert calls(["a", "b", "x"], max_errors=1) == "x"
    assert calls(["a", "c", "x"], max_errors=1, rows_per_file=2) == "cx"
    assert [name.name for name in sorted(ctx.out.glob("*-of-*"))] == [f"results-0000{n}-of-00002.jsonl" for n in (1, 2)]


@pytest.mark.parametrize(
    ("fields", "rows"),
    [
        ({}, True), ({"prompts": "more/*.jsonl"}, True), ({"batch_size": 2}, False), ({"batch_tokens": 9}, False),
        ({"prompts": "pictures/*"}, False),
    ],
)  # fmt: skip
def test_what_leaves_the_answers_of_a_stopped_run_standing(fields: dict[str, Any], rows: bool) -> None:
    assert STAGE.planning.resumed is not None
    resumed = STAGE.planning.resumed(params(**fields))
    assert {"max_errors", "output_format", "rows_per_file"} <= set(resumed)
    assert ({"prompts", "limit"} <= set(resumed)) == rows


RECORDS_NOTHING = """
import torch

def last(model, rows, max_new_tokens):
    tokens = torch.tensor([[5, 6, 7]])
    return [{"logit": float(model(tokens).logits[0, -1].numpy()[3])} for _ in rows]
"""


@pytest.mark.parametrize("together", [None, 2])
def test_a_function_need_not_say_that_nothing_is_trained(tmp_path: Path, model: Path, together: int | None) -> None:
    (tmp_path / "mytasks.py").write_text(RECORDS_NOTHING)
    ctx = context(tmp_path, model, trust=Trust(modules=("mytasks",)))
    if together is not None:
        ctx = replace(ctx, inputs={**ctx.inputs, "placement": (streaming(tmp_path, model),)})
    parameters = params(task="mytasks:last", prompts=["a", "b", "c"], batch_size=1, micro_batches=together)
    assert infer(parameters, ctx).errors == 0
    assert len({row["logit"] for row in results(ctx)}) == 1


def checking(folder: Path, **changes: Any) -> CheckContext:
    return check_context(folder, base=folder, machine=MACHINE, memo=folder, **changes)


@pytest.mark.parametrize("prompts", [["a", "b"], [[{"role": "user", "content": "a"}]]])
def test_a_column_of_prompts_without_fields_is_refused(prompts: list[Any]) -> None:
    with pytest.raises(ValidationError, match="names a field of objects") as error:
        params(prompts=prompts, column="text")
    assert error.value.errors()[0]["loc"] == ("column",)
    assert params(prompts=[{"text": "a"}, "b"], column="text").column == "text"
    assert params(prompts="prompts.jsonl", column="text").column == "text"
    assert params(task="mytasks:lengths", prompts=["a"], column="q").column == "q", "a function sees the field"


def test_what_makes_no_tokens_takes_no_length_be_it_the_default() -> None:
    with pytest.raises(ValidationError, match="makes no tokens"):
        params(task="feature-extraction", max_new_tokens=32)
    with pytest.raises(ValidationError, match="no argument 'num_beams'; it takes pooling"):
        InferParams(task="feature-extraction", prompts=["a"], generation={"num_beams": 2})


FUNCTIONS = {
    "def f(model, rows): return [{} for _ in rows]": ("max_new_tokens", "temperature"),
    "def f(model, rows, *, temperature=1.0): return [{} for _ in rows]": ("max_new_tokens",),
    "def f(model, rows, max_new_tokens=3): return [{} for _ in rows]": ("temperature",),
    "def f(model, rows, **more): return [{} for _ in rows]": (),
}


@pytest.mark.parametrize("source", FUNCTIONS)
def test_a_function_is_given_what_it_takes(tmp_path: Path, model: Path, source: str) -> None:
    given = {"max_new_tokens": {"max_new_tokens": 4}, "temperature": {"generation": {"temperature": 0.5}}}
    (tmp_path / "mytasks.py").write_text(source)
    trust = Trust(modules=("mytasks",))
    for name, fields in given.items():
        parameters = InferParams.model_validate({"task": "mytasks:f", "prompts": ["a"], **fields})
        ctx = context(tmp_path / name, model, base=tmp_path, trust=trust)
        for check in (
            lambda: inferring.check(parameters, checking(tmp_path, trust=trust)),  # noqa: B023
            lambda: inferring.prepare(parameters, ctx),  # noqa: B023
        ):
            if name not in FUNCTIONS[source]:
                check()
                continue
            with pytest.raises(UsageError, match=f"the function takes no '{name}'") as error:
                check()
            assert error.value.field in (name, f"generation.{name}")
    inferring.check(InferParams(task="mytasks:f", prompts=["a"]), checking(tmp_path, trust=trust))


def test_batches_together_need_a_placement_that_streams(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="without a placement none is streamed") as error:
        inferring.check(params(micro_batches=2), checking(tmp_path))
    assert error.value.field == "micro_batches"


def test_checks_prompts_task_and_tokenizer_before_anything_runs(tmp_path: Path, model: Path) -> None:
    with pytest.raises(UsageError, match="no file nowhere"):
        inferring.check(params(prompts="nowhere.jsonl"), checking(tmp_path))
    with pytest.raises(UsageError, match="module mytasks is not trusted"):
        inferring.check(params(task="mytasks:lengths"), checking(tmp_path))
    described = Forecast(output=describe_checkpoint(model))
    inferring.check(params(), checking(tmp_path, inputs={"model": (described,)}))
    bare = Forecast(output=describe_checkpoint(make_checkpoint(tmp_path / "bare", "opt", tokenizer=False)))
    with pytest.raises(UsageError, match="needs a tokenizer"):
        inferring.check(params(), checking(tmp_path, inputs={"model": (bare,)}))
    with pytest.raises(ValidationError, match="did you mean 'text-generation'"):
        params(task="text-generatoin")
    for wrong in ({"batch_size": 0}, {"batch_tokens": 0}, {"split": "even"}, {"max_tokens": 5}, {"seed": 2**63}):
        with pytest.raises(ValidationError):
            params(**wrong)


def test_a_text_that_no_model_takes_is_missed_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    ctx = checking(tmp_path)
    inferring.check(InferParams(task="fill-mask", prompts="p.jsonl", max_errors=1), ctx)
    with pytest.raises(UsageError, match=r"p\.jsonl:2: the text is empty") as error:
        inferring.check(InferParams(task="fill-mask", prompts="p.jsonl"), ctx)
    assert error.value.field == "prompts"


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("def length(model, rows): ...", r"mytasks\.py has nothing that is named lengths"),
        ("def lengths(model, rows:", r"mytasks\.py:1: "),
        ("from elsewhere import *", None),
        ("import lengths", None),
        ("if 1:\n    lengths = print", None),
        ("def __getattr__(name): ...", None),
    ],
)
def test_a_function_that_is_not_there_is_missed_before_anything_runs(
    tmp_path: Path, source: str, cause: str | None
) -> None:
    (tmp_path / "mytasks.py").write_text(source)
    ctx = checking(tmp_path, trust=Trust(modules=("mytasks",)))
    if cause is None:
        inferring.check(params(task="mytasks:lengths"), ctx)
        return
    with pytest.raises(UsageError, match=cause):
        inferring.check(params(task="mytasks:lengths"), ctx)


def test_a_module_of_a_package_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "mypackage").mkdir()
    (tmp_path / "mypackage/__init__.py").write_text("")
    (tmp_path / "mypackage/there.py").write_text("class Tasks: ...")
    ctx = checking(tmp_path, trust=Trust(modules=("mypackage",)))
    inferring.check(params(task="mypackage.there:Tasks.one"), ctx)
    with pytest.raises(UsageError, match=r"there is no module mypackage\.gone"):
        inferring.check(params(task="mypackage.gone:one"), ctx)


WRONG_ARGUMENTS = """version: 1
name: wrong
stages:
  download: {uses: download, with: {path: MODEL}}
  generate:
    uses: distributed-infer
    inputs: download
    with:
      task: text-generation
      prompts: [a]
      generation:
        num_beans: 4
        penalty_alpha: 0.5
        temperature: hot
    launch:
      machine_rank: 1
"""


def test_arguments_are_refused_where_they_stand(workshop: Workshop, model: Path) -> None:
    workshop.manifest.write_text(WRONG_ARGUMENTS.replace("MODEL", str(model)))
    said = workshop.command("validate", str(workshop.manifest))
    assert said.returncode == 2
    for words in (
        "recipe.yaml:12:9: error",
        "did you mean 'num_beams'",
        "recipe.yaml:13:9: error",
        "penalty_alpha is not taken",
        "recipe.yaml:16:",
    ):
        assert words in said.stdout + said.stderr
    assert "machine_rank 1 is not one of 1 machine" in said.stdout + said.stderr
    right = WRONG_ARGUMENTS.replace("        num_beans: 4\n        penalty_alpha: 0.5\n", "").partition("    launch")[0]
    with pytest.raises(UsageError, match=r'generation\.temperature takes float, and "hot" is given') as raised:
        workshop.run(right.replace("MODEL", str(model)))
    assert raised.value.place is not None
    assert raised.value.place.line == 12


PIPELINE = """version: 1
name: pipeline
stages:
  download: {uses: download, with: {path: pipe}}
  STAGE
"""


@pytest.mark.parametrize(
    "stage",
    [
        "shard: {uses: shard, inputs: download, with: {max_shard_size: 1MB}}",
        "quantize: {uses: quantize, inputs: download, with: {scheme: int8}}",
        "dispatch: {uses: dispatch, inputs: download}",
        "generate: {uses: distributed-infer, inputs: download, with: {task: text-generation, prompts: [a]}}",
    ],
)
def test_a_pipeline_is_no_model(workshop: Workshop, model: Path, stage: str) -> None:
    folder = workshop.folder / "pipe"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text('{"_class_name": "Pipe", "unet": ["diffusers", "UNet2DModel"]}')
    (folder / "unet/config.json").write_text('{"_class_name": "UNet2DModel"}')
    (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    workshop.manifest.write_text(PIPELINE.replace("STAGE", stage))
    planned = workshop.command("plan", str(workshop.manifest))
    assert planned.returncode == 2
    name = stage.partition(":")[0]
    assert f"recipe.yaml:5:3: {name}: the model is a pipeline of diffusers" in planned.stderr


@pytest.mark.parametrize(
    ("more", "line", "cause"),
    [
        ("task: text-generation\n      prompts: gone.jsonl", 9, "there is no file gone.jsonl"),
        ("task: text-generation\n      prompts: odd.xyz", 9, "ends with '.xyz'"),
        ("task: mytasks:gone\n      prompts: [a]", 8, "nothing that is named gone"),
        ("task: feature-extraction\n      prompts: [a]\n      max_new_tokens: 5", 10, "makes no tokens"),
        ("task: text-generation\n      prompts: [a]\n      max_new_tokens: 500", 10, "the model has 128 positions"),
        ("task: text-generation\n      prompts: [[{role: user, content: hi}]]", 9, "has no chat template"),
    ],
)
def test_what_is_wrong_is_told_at_its_field(workshop: Workshop, model: Path, more: str, line: int, cause: str) -> None:
    (workshop.folder / "mytasks.py").write_text("")
    (workshop.folder / "odd.xyz").write_text("a")
    head = "version: 1\nname: fields\ntrust: {modules: [mytasks]}\nstages:\n"
    stage = f"  g:\n    uses: distributed-infer\n    with:\n      {more}\n    inputs: d\n"
    workshop.manifest.write_text(f"{head}{stage}  d: {{uses: download, with: {{path: '{model}'}}}}\n")
    planned = workshop.command("plan", str(workshop.manifest))
    assert planned.returncode == 2
    assert f"recipe.yaml:{line}:" in planned.stderr
    assert cause in planned.stderr


@pytest.mark.parametrize("task", ["text-generation", "feature-extraction"])
def test_a_larger_batch_and_longer_prompts_need_more_memory(tmp_path: Path, model: Path, task: str) -> None:
    inputs = {"model": (Forecast(output=describe_checkpoint(model)),)}
    ctx = forecast_context(tmp_path, inputs=inputs, machine=MACHINE)
    found = []
    for batch_size, length in ((1, 10), (8, 10), (8, 90), (8, 9000), (8, 90_000)):
        asked = InferParams(task=task, prompts=["x" * length, "y"], batch_size=batch_size)
        found.append(STAGE.forecast(asked, ctx).ram)
    assert None not in found
    assert found[0] < found[1] < found[2] < found[3] == found[4], "a model of 128 positions takes no more"


def forecast_of(folder: Path, root: Path, **fields: Any) -> Forecast:
    inputs = {"model": (Forecast(output=describe_checkpoint(folder)),)}
    return STAGE.forecast(params(**fields), forecast_context(root, inputs=inputs, machine=MACHINE))


@pytest.mark.parametrize("architecture", ["bert", "opt", "t5"])
def test_features_take_no_memory_for_logits(tmp_path: Path, architecture: str) -> None:
    """As fill-mask, or scoring, would make them of the same model."""
    found = {}
    for vocabulary in (264, 100_000):
        folder = make_checkpoint(tmp_path / str(vocabulary), architecture, vocab_size=vocabulary)
        model, ctx = describe_checkpoint(folder), replace(HERE, gpus=())
        inputs = {"model": (Forecast(output=model),)}
        given = forecast_context(tmp_path, inputs=inputs, machine=ctx)
        asked = InferParams(task="feature-extraction", prompts=["x" * 100] * 64, batch_size=64)
        found[vocabulary] = STAGE.forecast(asked, given).ram
    assert found[264] == found[100_000]


@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences"])
@pytest.mark.parametrize("value", ["4", [4], {}, 4.5, None])
def test_a_number_of_sequences_that_is_none_is_left_to_who_refuses_it(
    tmp_path: Path, model: Path, name: str, value: Any
) -> None:
    plain, wrong = (
        forecast_of(model, tmp_path, batch_size=4, generation=given, max_new_tokens=64) for given in ({}, {name: value})
    )
    assert wrong.ram == plain.ram
    several = forecast_of(model, tmp_path, batch_size=4, generation={name: 4}, max_new_tokens=64)
    assert (several.ram or 0) > (plain.ram or 0)


def test_beams_that_the_models_own_file_asks_for_take_memory_too(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "bart")
    given = {"task": "text2text-generation", "batch_size": 5, "max_new_tokens": 100}
    asked = {**given, "generation": {"num_beams": 4}}
    wanted, plain = forecast_of(folder, tmp_path, **asked).ram, forecast_of(folder, tmp_path, **given).ram
    own = folder / "generation_config.json"
    own.write_text(json.dumps({**json.loads(own.read_text()), "num_beams": 4}))
    assert forecast_of(folder, tmp_path, **given).ram == wanted != plain
    said = {**given, "generation": {"num_beams": 1}}
    assert forecast_of(folder, tmp_path, **said).ram == plain, "who asks for another number is heard"


def test_a_plan_refuses_a_number_of_beams_that_is_a_text(workshop: Workshop, model: Path) -> None:
    workshop.manifest.write_text(f"""\
version: 1
name: beams
params: {{beams: "4"}}
stages:
  download: {{uses: download, with: {{path: '{model}'}}}}
  infer:
    uses: distributed-infer
    inputs: download
    with: {{task: text-generation, prompts: [a], generation: {{num_beams: "${{params.beams}}"}}}}
""")
    planned = workshop.command("plan", str(workshop.manifest))
    assert planned.returncode == 2, planned.stderr
    assert "generation.num_beams takes int" in planned.stderr


def test_forecasts_shares_memory_and_gpus(tmp_path: Path, model: Path) -> None:
    inputs = {"model": (Forecast(output=describe_checkpoint(model)),)}
    ctx = forecast_context(tmp_path, inputs=inputs, machine=MACHINE, launch=Launch(num_processes=2))
    assert STAGE.forecast(params(batch_size=2), ctx).summary == "5 prompts in 3 batches over 2 ranks"
    found = STAGE.forecast(params(batch_size=2, split="static"), ctx)
    assert found.summary == "5 prompts in 3 batches over 2 ranks (3 + 2)"
    assert found.metrics == {"prompts": 5, "micro_batches": 1, "compute_dtype": "float32"}
    assert found.ram is not None
    assert found.ram > 2 * 2 * (model / "model.safetensors").stat().st_size
    gpu = replace(MACHINE, gpus=(Gpu(0, "L4", 24 * 2**30, 20 * 2**30),))
    assert "2 ranks with 1 GPU each need 2" in STAGE.forecast(params(), ctx.within(machine=gpu)).misfits[0].cause
    apart = Launch(num_processes=2, num_machines=2, main_process_ip="10.0.0.1")
    assert STAGE.forecast(params(), ctx.within(machine=gpu, launch=apart)).misfits == ()
    assert STAGE.planning.facts is not None
    assert STAGE.planning.facts(params(), gpu) == {"gpus": ["L4"]}
    assert STAGE.planning.facts(params(), MACHINE) == {"memory": MACHINE.memory}
    assert STAGE.planning.facts(params(dtype="float32"), gpu) == {}


TASK_OF_ONES_OWN = """
from bigpipe.bigmodel.tasks import Answer, Task
from bigpipe.errors import UsageError

def check(arguments):
    if arguments.keys() - {"times"}:
        raise UsageError(f"compare takes `times` alone, not {sorted(arguments)}", "write times: 2")

def bind(model, path, options, sources):
    def answer(rows):
        times = options.arguments["times"]
        return [Answer({"same": row.prompt == row.data["other"], "times": times}, len(row.prompt)) for row in rows]
    return answer

TASK = Task(name="compare", bind=bind, check_arguments=check, columns=("other",))
"""
RECIPE = """
version: 1
name: compares
trust: {modules: [comparing]}
params: {pairs: null, times: {times: 3}}
stages:
  download: {uses: download, with: {path: MODEL}}
  compare:
    uses: distributed-infer
    inputs: download
    with: {task: "comparing:TASK", prompts: "${params.pairs}", batch_size: 2, generation: "${params.times}"}
    launch: {num_processes: 2}
"""


def test_a_task_in_one_file_runs_in_a_recipe(workshop: Workshop, model: Path) -> None:
    (workshop.folder / "comparing.py").write_text(TASK_OF_ONES_OWN)
    pairs = [{"prompt": "a", "other": "a"}, {"prompt": "bb", "other": "b"}, {"prompt": "c", "other": "c"}]
    result = workshop.run(RECIPE.replace("MODEL", str(model)), params={"pairs": pairs})
    assert result.exit_code == 0, [str(error) for error in result.errors]
    found = [json.loads(line) for line in (result.path("compare") / "results.jsonl").read_text().splitlines()]
    assert [(line["prompt"], line["same"], line["times"]) for line in found] == [
        ("a", True, 3), ("bb", False, 3), ("c", True, 3),
    ]  # fmt: skip
    assert result.nodes["compare"].record.metrics["tokens"] == 4
    for params, cause in (
        ({"pairs": [*pairs, {"prompt": "d"}]}, "task compare needs 'other', which prompt 3 does not have"),
        ({"pairs": pairs, "times": {"often": 3}}, "compare takes `times` alone, not ['often']"),
    ):
        refused = workshop.run(params=params)
        assert [error.cause for error in refused.errors] == [cause]
    edited = TASK_OF_ONES_OWN.replace("options.arguments[", "2 * options.arguments[")
    (workshop.folder / "comparing.py").write_text(edited)
    result = workshop.run(params={"pairs": pairs})
    assert json.loads((result.path("compare") / "results.jsonl").read_text().splitlines()[0])["times"] == 6


GENERATE = {"task": "text-generation", "prompts": PROMPTS, "max_new_tokens": 5}


def test_two_launched_ranks_give_what_one_gives(tmp_path: Path, model: Path) -> None:
    events: list[Any] = []
    one = context(tmp_path / "one", model)
    infer(params(), one)
    two = start(tmp_path / "two", model, 2, events.append, **GENERATE)
    written = (tmp_path / "two" / "work" / "out" / "results.jsonl").read_bytes()
    assert written == (one.out / "results.jsonl").read_bytes()
    assert two.metrics["tokens"] == 25
    assert two.files["results.jsonl"][1] == len(written)
    assert sorted(event.rank for event in events if isinstance(event, RankHello)) == [0, 1]
    last = {event.rank: (event.done, event.total) for event in events if isinstance(event, Progress)}
    assert sum(done for done, _ in last.values()) == 5
    assert all(done == total for done, total in last.values())
