"""The key holds all that bytes depend on and nothing else, and a difference is said in words."""

from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import pytest
from pydantic import Field

from bigpipe.errors import UsageError
from bigpipe.orchestrator.contract.types import Launch, Machine
from bigpipe.orchestrator.planning.keys import ABSENT, Difference, Identity, differences, identity
from bigpipe.orchestrator.stage import File, Forecast, Metrics, Params, Planning, Stage, StageResult
from bigpipe.orchestrator.store.hashing import StatMemo
from bigpipe.trust import Trust

MACHINE = Machine("here", 2, 2**34, 2**33, 2**40)


class MakeParams(Params):
    revision: str = "main"
    scheme: str = "int8"
    threshold: float = 6.0
    prompts: File | None = None
    skip: list[str] = Field(default_factory=list)
    options: dict[str, Any] = Field(default_factory=dict)


def stage(**changes):
    fields = {
        "kind": "make",
        "version": 1,
        "params": MakeParams,
        "metrics": Metrics,
        "inputs": {},
        "output": "checkpoint",
        "run": lambda params, context: StageResult(Metrics()),
        "forecast": lambda params, context: Forecast(),
    }
    return Stage(**(fields | changes))


@dataclass(frozen=True)
class Use:
    """What of a node enters its identity, and one thing that does not."""

    name: str = "make"
    kind: Stage = field(default_factory=stage)
    params: MakeParams = field(default_factory=MakeParams)
    env: dict[str, str] = field(default_factory=dict)
    location: str = "bigpipe.plugins.make:STAGE"


@pytest.fixture
def of(tmp_path):
    memo = StatMemo(tmp_path / "memo")

    def identify(use=None, machine=MACHINE, pins=None, **changes):
        use = replace(use or Use(), **changes)
        return identity(use, base=tmp_path, memo=memo, machine=machine, trust=Trust(), pins=pins)

    return identify


A, B, C = ("sha256:" + letter * 64 for letter in "abc")


def test_the_same_computation_has_the_same_key(of):
    assert of().key({"model": [A]}) == of().key({"model": (A,)})
    assert of(name="other").partial == of().partial
    assert of().key({"model": [A], "placement": []}) == of().key({"model": [A]})


@pytest.mark.parametrize(
    "change",
    [
        {"kind": stage(version=2)},
        {"kind": stage(kind="other")},
        {"kind": stage(packages=("pydantic",))},
        {"kind": stage(planning=Planning(facts=lambda params, machine: {"memory": machine.memory}))},
        {"params": MakeParams(scheme="nf4")},
        {"params": MakeParams(threshold=6.5)},
        {"params": MakeParams(skip=["lm_head"])},
        {"env": {"OMP_NUM_THREADS": "1"}},
    ],
)
def test_whatever_the_bytes_depend_on_changes_the_key(of, change):
    assert of(**change).partial != of().partial


def test_inputs_count_by_port_and_order(of):
    keys = [{}, {"model": [A]}, {"model": [B]}, {"other": [A]}, {"model": [A, B]}, {"model": [B, A]}]
    assert len({of().key(inputs) for inputs in keys}) == len(keys)


def test_a_revision_counts_by_its_commit(of):
    pinned = of(pins={"revision": "c0ffee"})
    assert pinned.params["revision"] == "c0ffee"
    assert pinned.partial == of(params=MakeParams(revision="v1"), pins={"revision": "c0ffee"}).partial
    with pytest.raises(UsageError, match="commit"):
        of(pins={"commit": "x"})


def test_facts_count_where_the_kind_asks_for_them(of):
    asking = stage(planning=Planning(facts=lambda params, machine: {"memory": machine.memory}))
    other = replace(MACHINE, memory=2**35)
    assert of(machine=other).partial == of().partial
    assert of(kind=asking, machine=other).partial != of(kind=asking).partial
    free = replace(MACHINE, memory_available=1)
    assert of(kind=asking, machine=free).partial == of(kind=asking).partial


def test_package_versions_are_those_installed(of):
    from importlib.metadata import version

    found = of(kind=stage(packages=("pydantic", "no-such-distribution"))).packages
    assert found == {"pydantic": version("pydantic"), "no-such-distribution": None}


def test_an_edited_file_changes_the_key_and_its_name_does_not(of, tmp_path):
    (tmp_path / "a.txt").write_text("1")
    (tmp_path / "b.txt").write_text("1")
    one, other = of(params=MakeParams(prompts="a.txt")), of(params=MakeParams(prompts="b.txt"))
    assert one.partial == other.partial
    (tmp_path / "a.txt").write_text("2")
    assert of(params=MakeParams(prompts="a.txt")).partial != one.partial


class TestDifferences:
    def changes(self, old, new, before=None, after=None):
        before = {"model": [A]} if before is None else before
        return differences(old.as_json, new.as_json, before, before if after is None else after)

    def test_nothing_differs(self, of):
        assert self.changes(of(), of()) == []

    def test_values_are_named_by_path_in_the_order_a_reader_looks(self, of):
        old = of(env={"A": "1"})
        new = of(
            kind=stage(version=2, packages=("pydantic",)),
            params=MakeParams(scheme="nf4", options={"a": {"b": 1}}, skip=["x"]),
            env={"B": "2"},
        )
        assert [change.path for change in self.changes(old, new, {"model": [A]}, {"model": [B]})] == [
            "version", "params.options.a", "params.scheme", "params.skip", "inputs.model", "env.A", "env.B",
            "packages.pydantic",
        ]  # fmt: skip

    def test_old_and_new_are_told(self, of):
        assert self.changes(of(), of(params=MakeParams(scheme="nf4"))) == [Difference("params.scheme", "int8", "nf4")]
        assert self.changes(of(), of(env={"A": "1"})) == [Difference("env.A", ABSENT, "1")]

    def test_one_and_one_point_nought_are_two_values(self, of):
        old = replace(of(), params={"x": 1})
        assert self.changes(old, replace(old, params={"x": 1.0})) == [Difference("params.x", 1, 1.0)]
        assert self.changes(old, replace(old, params={"x": True})) == [Difference("params.x", 1, True)]

    @pytest.mark.parametrize(
        ("old", "new", "told"),
        [
            (["sh", "-c", "x" * 80, 1], ["sh", "-c", "x" * 80, 2], ["params.x[3] 1 → 2"]),
            ([1, {"a": [2]}], [1, {"a": [3]}], ["params.x[1].a[0] 2 → 3"]),
            ([1, 2], [1, 2, 3], ["params.x [1, 2] → [1, 2, 3]"]),
            ([1, 2, 3, 4], [5, 6, 7, 8], ["params.x [1, 2, 3, 4] → [5, 6, 7, 8]"]),
            ("y" * 70 + "1", "y" * 70 + "22", [f"params.x …{'y' * 15}1 → …{'y' * 15}22"]),
        ],
    )
    def test_what_differs_is_in_what_is_shown(self, of, old, new, told):
        """The first items of a list, and the beginning of a text, said nothing where they were alike."""
        before, now = replace(of(), params={"x": old}), replace(of(), params={"x": new})
        assert [str(change) for change in self.changes(before, now)] == told

    @pytest.mark.parametrize(
        ("before", "after", "expected"),
        [
            ({"model": [A]}, {"model": [B]}, [Difference("inputs.model", A, B)]),
            ({"model": [A]}, {"model": None}, []),
            ({}, {"placement": [A]}, [Difference("inputs.placement", ABSENT, A)]),
            ({"placement": [A]}, {}, [Difference("inputs.placement", A, ABSENT)]),
            ({"reports": [A, B]}, {"reports": [A, C]}, [Difference("inputs.reports[1]", B, C)]),
            ({"reports": [A, B]}, {"reports": [A]}, [Difference("inputs.reports", [A, B], [A])]),
        ],
    )
    def test_inputs_differ_by_digest(self, of, before, after, expected):
        assert self.changes(of(), of(), before, after) == expected

    def test_two_recorded_identities_compare_too(self, of):
        old, new = of(), of(params=MakeParams(scheme="nf4"))
        assert differences(old.as_json, new.as_json, {}, {}) == [Difference("params.scheme", "int8", "nf4")]


def test_an_identity_can_be_recorded(of):
    import json

    found = of(kind=stage(packages=("pydantic",)))
    assert Identity(**json.loads(json.dumps(found.as_json))).partial == found.partial


MODEL_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "quantize": ("quantize", {"scheme": "int8"}),
    "merge": ("merge", {}),
    "dispatch": ("dispatch", {}),
    "distributed-infer": ("distributed_infer", {"task": "text-generation", "prompts": ["a"]}),
    "evaluate": ("evaluate", {"data": "text.txt"}),
    "finetune": ("finetune", {"data": [{"text": "a"}], "max_steps": 1, "lora": {"target_modules": ["q_proj"]}}),
    "estimate": ("estimate", {}),
}


@pytest.mark.parametrize("name", MODEL_KINDS)
def test_what_code_may_run_counts_for_kinds_that_ask_a_models_class(tmp_path, name):
    """It says what is quantized, placed and computed."""
    module, params = MODEL_KINDS[name]
    kind = import_module(f"bigpipe.plugins.{module}").STAGE
    (tmp_path / "text.txt").write_text("a")
    params = kind.params(**params)
    use = RankedUse(name, kind.with_params(params), params, location=f"bigpipe.plugins.{module}:STAGE")
    trusted = (), ("org/own@" + "a" * 40,), ("org/own@" + "b" * 40,)
    given = {"base": tmp_path, "memo": StatMemo(tmp_path / "memo"), "machine": MACHINE}
    keys = {identity(use, trust=Trust(remote_code=code), **given).partial for code in trusted}
    assert len(keys) == 3
    assert identity(use, trust=Trust(("mine",)), **given).partial in keys


@dataclass(frozen=True)
class RankedUse(Use):
    launch: Launch = field(default_factory=Launch)
