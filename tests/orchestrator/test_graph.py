"""Recipes: parameters, axes, wiring, conditions, order. What goes wrong is in test_bad_manifests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from textwrap import dedent, indent

import pytest
from hypothesis import given, settings, strategies as st
from support.kinds import KINDS, PlaceParams, QuantizeParams

from bigpipe.errors import ManifestError, UsageError
from bigpipe.orchestrator.contract.types import Launch, Trust
from bigpipe.orchestrator.recipe.graph import Recipe, load_recipe
from bigpipe.orchestrator.recipe.manifest import ResourcesSpec


def recipe(folder: Path, text: str, environment: dict[str, str] | None = None, **params: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text("version: 1\n" + dedent(text), encoding="utf-8")
    return load_recipe(path, params, environment=environment or {}, stages=KINDS)


SEVEN = """
    name: opt
    params: {gpu: 22GiB, schemes: [int8, nf4]}
    stages:
      save: {uses: save, inputs: {model: quantize@scheme=int8, reports: [estimate]}, with: {to: dist/opt}}
      source: {uses: source, with: {repo: facebook/opt-13b}}
      estimate:
        uses: estimate
        inputs: source
        with: {dtypes: [int8], batch_size: 4}
        gates: ["int8.inference_high <= ${params.gpu}"]
      quantize:
        uses: quantize
        inputs: source
        matrix: {scheme: "${params.schemes}"}
        when: ${stages.estimate.metrics.int8.weights} < 30GiB
        with: {scheme: "${matrix.scheme}"}
      place:
        uses: place
        inputs: quantize
        with: {max_memory: {0: "${params.gpu}", 1-7: 46GiB, cpu: 48GiB}}
      infer:
        uses: infer
        inputs: {model: quantize, placement: place}
        with: {prompts: [hello]}
        gates: ["peak.gpu <= ${stages.quantize.metrics.bytes} * 2"]
        launch: {num_processes: 2}
        timeout: 30m
    """


@pytest.mark.parametrize("given", ["int8.weights <= ${params.most}", "${int8.weights} <= 1GB"])
def test_a_condition_or_name_that_a_parameter_brings_with_a_reference_in_it_is_not_passed_over(
    tmp_path: Path, given: str
) -> None:
    """What a parameter holds is not read once more for references."""
    text = """
    params: {most: 1GB, held: "int8.weights <= 1GB", after: source}
    stages:
      source: {uses: source, with: {repo: a/b}}
      estimate:
        uses: estimate
        inputs: source
        needs: ["${params.after}"]
        with: {dtypes: [int8], batch_size: 4}
        gates: ["${params.held}"]
    """
    with pytest.raises(ManifestError) as caught:
        recipe(tmp_path, text, held=given, after="${params.most}")
    causes = [problem.cause for problem in caught.value.problems]
    assert causes == ["no stage '${params.most}'", "'$' does not belong in a condition"]
    assert len(recipe(tmp_path, text).nodes["estimate"].gates) == 1


def test_nodes_come_in_topological_order_with_ties_in_file_order(tmp_path: Path) -> None:
    assert list(recipe(tmp_path, SEVEN).nodes) == [
        "source", "estimate", "quantize@scheme=int8", "save", "quantize@scheme=nf4",
        "place@scheme=int8", "place@scheme=nf4", "infer@scheme=int8", "infer@scheme=nf4",
    ]  # fmt: skip


def test_edges_come_from_inputs_needs_and_when(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, SEVEN)
    assert set(loaded.graph.predecessors("quantize@scheme=nf4")) == {"source", "estimate"}
    assert set(loaded.graph.predecessors("infer@scheme=nf4")) == {"quantize@scheme=nf4", "place@scheme=nf4"}
    assert set(loaded.graph.predecessors("save")) == {"quantize@scheme=int8", "estimate"}
    assert loaded.nodes["infer@scheme=nf4"].inputs == {
        "model": ("quantize@scheme=nf4",),
        "placement": ("place@scheme=nf4",),
    }
    assert loaded.nodes["save"].inputs == {"model": ("quantize@scheme=int8",), "reports": ("estimate",)}


def test_select_takes_ancestors_along(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, SEVEN)
    nf4 = {"quantize@scheme=nf4", "estimate", "source"}
    assert loaded.select(["place@scheme=nf4"]) == {"place@scheme=nf4", *nf4}
    assert loaded.select(["quantize"]) == {"quantize@scheme=int8", *nf4}
    assert loaded.select(["source", "estimate"]) == {"estimate", "source"}
    with pytest.raises(UsageError, match="did you mean 'quantize'"):
        loaded.select(["quantise"])
    with pytest.raises(UsageError, match="did you mean 'quantize@scheme=int8'"):
        loaded.select(["quantize@scheme=int4"])


def test_a_node_has_all_that_a_plan_needs(tmp_path: Path) -> None:
    text = """
        secrets: [TOKEN]
        trust: {modules: [mingpt.model], remote_code: [org/model@0123456789abcdef0123456789abcdef01234567]}
        x-anything: {goes: here}
        stages:
          source:
            uses: source
            with: {repo: a/b}
            secrets: [TOKEN]
            env: {OMP_NUM_THREADS: 4, COUNTRY: NO}
            retries: 2
            timeout: 1h30m
            on_fail: continue
            cache: false
            resources: {ram: 4GiB, cpus: 2, gpus: 0}
          infer:
            uses: infer
            inputs: source
            with: {prompts: prompts/*.jsonl}
            launch: {num_processes: 4, mixed_precision: bf16}
    """
    loaded = recipe(tmp_path, text)
    source = loaded.nodes["source"]
    assert source.kind is KINDS["source"]
    assert source.env == {"OMP_NUM_THREADS": "4", "COUNTRY": "NO"}
    assert source.secrets == ("HF_TOKEN", "TOKEN")
    assert (source.retries, source.timeout, source.on_fail, source.cache) == (2, 5400.0, "continue", False)
    assert source.resources == ResourcesSpec(ram=4 * 2**30, cpus=2, gpus=0)
    assert source.launch == Launch()
    assert loaded.nodes["infer"].launch == Launch(num_processes=4, mixed_precision="bf16")
    assert loaded.nodes["infer"].timeout is None
    assert loaded.trust == Trust(("mingpt.model",), ("org/model@0123456789abcdef0123456789abcdef01234567",))
    assert (loaded.name, loaded.nodes["source"].secrets) == ("recipe", ("HF_TOKEN", "TOKEN"))
    assert loaded.text.startswith("version: 1\n")


def test_places_of_a_node(tmp_path: Path) -> None:
    places = recipe(tmp_path, SEVEN).nodes["place@scheme=nf4"].places
    lines = (tmp_path / "recipe.yaml").read_text().splitlines()

    def shown(name: str) -> str:
        place = places[name]
        assert place.text == lines[place.line - 1]
        return place.text[place.column - 1 : place.column - 1 + place.width]

    assert shown("") == "place"
    assert shown("inputs") == "quantize"
    assert shown("params.max_memory.0") == '"${params.gpu}"'
    assert shown("params.max_memory.1-7") == "46GiB"
    infer = recipe(tmp_path, SEVEN).nodes["infer@scheme=nf4"]
    assert infer.gates[0].place == infer.places["gates[0]"]
    assert infer.places["params.prompts[0]"].text.strip() == "with: {prompts: [hello]}"


class TestParameters:
    TEXT = """
        params:
          scheme: int8
          memory: {0: 10GiB, cpu: 20GiB}
          batch: 4
          home: "${env.HOME:-nowhere}"
        stages:
          source: {uses: source, with: {repo: "x/${params.home}", revision: "v${params.batch}"}}
          quantize: {uses: quantize, inputs: source, with: {scheme: "${params.scheme}"}}
          place: {uses: place, inputs: quantize, with: {max_memory: "${params.memory}"}}
    """

    def test_defaults_keep_their_types(self, tmp_path: Path) -> None:
        loaded = recipe(tmp_path, self.TEXT)
        place = loaded.nodes["place"].params
        assert isinstance(place, PlaceParams)
        assert place.max_memory == {0: 10 * 2**30, "cpu": 20 * 2**30}
        assert loaded.nodes["source"].params.model_dump(include={"repo", "revision"}) == {
            "repo": "x/nowhere", "revision": "v4",
        }  # fmt: skip
        assert loaded.params["batch"] == 4

    def test_arguments_replace_them(self, tmp_path: Path) -> None:
        loaded = recipe(tmp_path, self.TEXT, scheme="nf4", memory="{0: 3GiB}", batch="8", home="h")
        quantize, place = loaded.nodes["quantize"].params, loaded.nodes["place"].params
        assert isinstance(quantize, QuantizeParams)
        assert isinstance(place, PlaceParams)
        assert quantize.scheme == "nf4"
        assert place.max_memory == {0: 3 * 2**30}
        assert loaded.params == {"scheme": "nf4", "memory": {0: "3GiB"}, "batch": 8, "home": "h"}

    def test_the_environment_is_read(self, tmp_path: Path) -> None:
        assert recipe(tmp_path, self.TEXT, {"HOME": "there"}).params["home"] == "there"

    def test_a_null_default_must_be_given(self, tmp_path: Path) -> None:
        text = "params: {repo: null}\nstages:\n  s: {uses: source, with: {repo: '${params.repo}'}}\n"
        assert recipe(tmp_path, text, repo="a/b").params == {"repo": "a/b"}
        with pytest.raises(ManifestError, match="BP205") as caught:
            recipe(tmp_path, text)
        assert len(caught.value.problems) == 1

    def test_one_that_no_stage_reads_is_not_given(self, tmp_path: Path) -> None:
        text = "params: {repo: a/b, rpo: a/b}\nstages:\n  s: {uses: source, with: {repo: '${params.repo}'}}\n"
        ((name, place),) = recipe(tmp_path, text).unread.items()
        assert (name, place.line, place.column) == ("rpo", 2, 21)
        with pytest.raises(ManifestError, match=r"BP206.*no stage reads 'rpo'") as caught:
            recipe(tmp_path, text, rpo="c/d")
        assert len(caught.value.problems) == 1


def after_source(folder: Path, text: str) -> Recipe:
    """A recipe of the source `s` and these stages."""
    return recipe(folder, "stages:\n  s: {uses: source}\n" + indent(dedent(text), "  "))


class TestMatrix:
    def test_several_axes_in_the_order_of_declaration(self, tmp_path: Path) -> None:
        text = """
          e: {uses: estimate, inputs: s, matrix: {batch: [1, 2], dtype: [int8]}, with: {batch_size: "${matrix.batch}"}}
          q:
            {uses: quantize, inputs: s, needs: [e], matrix: {scheme: [nf4], batch: [2, 3]}, with: {scheme: nf4},
             env: {B: "${matrix.batch}"}}
        """
        assert list(after_source(tmp_path, text).nodes) == [
            "s", "e@batch=1,dtype=int8", "e@batch=2,dtype=int8", "q@batch=2,dtype=int8,scheme=nf4",
        ]  # fmt: skip

    def test_values_keep_their_types(self, tmp_path: Path) -> None:
        text = """
            stages:
              s: {uses: source}
              q:
                uses: quantize
                inputs: s
                matrix: {threshold: [6, 6.5, 1e-5], double: [true]}
                with: {scheme: int8, threshold: "${matrix.threshold}", double: "${matrix.double}"}
        """
        loaded = recipe(tmp_path, text)
        assert list(loaded.nodes)[1:] == [
            "q@threshold=6,double=true", "q@threshold=6.5,double=true", "q@threshold=1e-5,double=true",
        ]  # fmt: skip
        assert loaded.nodes["q@threshold=1e-5,double=true"].variant == {"threshold": 1e-5, "double": True}
        assert [node.params.model_dump()["threshold"] for node in loaded.nodes.values() if node.stage == "q"] == [
            6.0, 6.5, 1e-5,
        ]  # fmt: skip

    def test_a_shared_axis_joins(self, tmp_path: Path) -> None:
        text = """
          q: {uses: quantize, inputs: s, matrix: {scheme: [int8, nf4]}, with: {scheme: "${matrix.scheme}"}}
          p: {uses: place, inputs: q}
          i: {uses: infer, inputs: {model: q, placement: p}, with: {prompts: [a]}}
        """
        loaded = after_source(tmp_path, text)
        assert loaded.nodes["i@scheme=nf4"].inputs == {"model": ("q@scheme=nf4",), "placement": ("p@scheme=nf4",)}
        assert len(loaded.nodes) == 7

    def test_a_list_gathers_every_variant_and_drops_the_axis(self, tmp_path: Path) -> None:
        text = """
          e:
            {uses: estimate, inputs: s, matrix: {b: [1, 2], c: [x, y]}, with: {batch_size: "${matrix.b}"},
             env: {C: "${matrix.c}"}}
          all: {uses: save, inputs: {reports: [e]}, with: {to: a}}
          some: {uses: save, inputs: {reports: [e@c=y]}, with: {to: a}}
          each: {uses: save, inputs: {reports: e}, with: {to: a}}
          none: {uses: save, inputs: {reports: [], model: s}, with: {to: a}}
        """
        nodes = after_source(tmp_path, text).nodes
        assert nodes["all"].inputs["reports"] == ("e@b=1,c=x", "e@b=1,c=y", "e@b=2,c=x", "e@b=2,c=y")
        assert nodes["some"].inputs["reports"] == ("e@b=1,c=y", "e@b=2,c=y")
        assert nodes["each@b=2,c=x"].inputs["reports"] == ("e@b=2,c=x",)
        assert nodes["none"].inputs == {"model": ("s",)}

    def test_a_pick_fixes_one_axis_and_leaves_the_others(self, tmp_path: Path) -> None:
        text = """
          q:
            {uses: quantize, inputs: s, matrix: {scheme: [int8, nf4], t: ["1,2", 3]},
             with: {scheme: "${matrix.scheme}"}, env: {T: "${matrix.t}"}}
          p: {uses: place, inputs: q@scheme=nf4}
          r: {uses: place, inputs: "q@t=1,2,scheme=int8"}
        """
        nodes = after_source(tmp_path, text).nodes
        assert [name for name in nodes if name[0] in "pr"] == ["p@t=1,2", "p@t=3", "r"]
        assert nodes["p@t=3"].inputs == {"model": ("q@scheme=nf4,t=3",)}
        assert nodes["r"].inputs == {"model": ("q@scheme=int8,t=1,2",)}

    def test_a_value_with_a_comma_is_not_the_value_before_the_comma(self, tmp_path: Path) -> None:
        text = """
          q:
            {uses: quantize, inputs: s, matrix: {gpus: ["0", "0,1"], b: [1, 2]},
             with: {scheme: int8}, env: {GPUS: "${matrix.gpus}", B: "${matrix.b}"}}
          one: {uses: place, inputs: "q@gpus=0,b=1"}
          two: {uses: place, inputs: "q@gpus=0,1,b=1"}
        """
        loaded = after_source(tmp_path, text)
        assert loaded.meant("q@gpus=0") == {"q@gpus=0,b=1", "q@gpus=0,b=2"}
        assert loaded.meant("q@gpus=0,1") == {"q@gpus=0,1,b=1", "q@gpus=0,1,b=2"}
        assert loaded.meant("q@b=1") == {"q@gpus=0,b=1", "q@gpus=0,1,b=1"}
        assert loaded.meant("q@b=1,gpus=0,1") == {"q@gpus=0,1,b=1"}
        assert loaded.nodes["one"].inputs == {"model": ("q@gpus=0,b=1",)}
        assert loaded.nodes["two"].inputs == {"model": ("q@gpus=0,1,b=1",)}

    def test_two_variants_of_one_name_are_refused(self, tmp_path: Path) -> None:
        text = """
          q:
            {uses: quantize, inputs: s, matrix: {a: ["1", "1,b=2"], b: ["2", "2,b=2"]},
             with: {scheme: int8}, env: {A: "${matrix.a}", B: "${matrix.b}"}}
        """
        with pytest.raises(ManifestError, match="two variants are called q@a=1,b=2,b=2") as refused:
            after_source(tmp_path, text)
        assert refused.value.problems[0].place.line == 6

    def test_conditions_mean_their_own_variant(self, tmp_path: Path) -> None:
        text = """
          q: {uses: quantize, inputs: s, matrix: {scheme: [int8, nf4]}, with: {scheme: "${matrix.scheme}"}}
          p:
            uses: place
            inputs: q
            when: ${stages.q.metrics.ratio} < 0.5
            gates: ["${stages.p.metrics.load_seconds} < 1min"]
          t: {uses: place, inputs: q@scheme=nf4, needs: [q@scheme=int8]}
        """.replace('gates: ["predicted.0 <= ${stages.q@scheme=int8.metrics.bytes}", ', "gates: [")
        nodes = after_source(tmp_path, text).nodes
        node = nodes["p@scheme=nf4"]
        assert node.when is not None
        assert node.when.references == {("q@scheme=nf4", "ratio")}
        assert node.gates[0].references == {(None, "load_seconds")}
        assert nodes["t"].predecessors == ("q@scheme=nf4", "q@scheme=int8")

    def test_matrix_in_gates_env_and_settings(self, tmp_path: Path) -> None:
        text = """
          q:
            uses: quantize
            inputs: s
            matrix: {gib: [2, 3]}
            with: {scheme: int8}
            gates: ["bytes < ${matrix.gib}GiB"]
            env: {GIB: "${matrix.gib}"}
            retries: ${matrix.gib}
            resources: {cpus: "${env.CPUS:-2}"}
        """
        node = after_source(tmp_path, text).nodes["q@gib=3"]
        assert node.gates[0].text == "bytes < 3GiB"
        assert (node.env, node.retries, node.resources.cpus) == ({"GIB": "3"}, 3, 2)


axes = st.dictionaries(st.sampled_from("abc"), st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(axes, st.sets(st.integers(0, 5))), min_size=1, max_size=6))
def test_every_input_is_the_variant_that_agrees(
    tmp_path_factory: pytest.TempPathFactory, stages: list[tuple[dict[str, list[int]], set[int]]]
) -> None:
    """Over random acyclic graphs: inputs exist, agree with the node on every shared axis, and come before it."""
    lines = ["stages:", "  s: {uses: source}"]
    for index, (matrix, needs) in enumerate(stages):
        named = ", ".join(f"e{other}" for other in sorted(needs) if other < index)
        read = {axis.upper(): f"${{matrix.{axis}}}" for axis in matrix}
        lines.append(
            f"  e{index}: {{uses: estimate, inputs: s, needs: [{named}], matrix: {matrix or '{}'}, env: {read}}}"
        )
    try:
        loaded = recipe(tmp_path_factory.mktemp("axes"), "\n".join(lines))
    except ManifestError as error:  # axes that meet without a shared value
        codes = {problem.code for problem in error.problems}
    else:
        codes = {"BP308"}
        check_inputs(loaded)
    assert codes == {"BP308"}


def check_inputs(loaded: Recipe) -> None:
    seen: set[str] = set()
    for node in loaded.nodes.values():
        for source in node.predecessors:
            other = loaded.nodes[source].variant
            assert source in seen
            assert {axis: node.variant[axis] for axis in other} == other
        seen.add(node.name)


def large(numbers: int) -> str:
    """A recipe of four nodes a number, and one."""
    values = ", ".join(map(str, range(numbers)))
    return f"""
        stages:
          s: {{uses: source}}
          q: {{uses: quantize, inputs: s, matrix: {{scheme: [int8, nf4], t: [{values}]}},
              with: {{scheme: "${{matrix.scheme}}", threshold: "${{matrix.t}}"}}}}
          p: {{uses: place, inputs: q, gates: ["predicted.0 < ${{stages.q.metrics.bytes}}"]}}
    """


def test_ten_thousand_nodes(tmp_path: Path) -> None:
    assert len(recipe(tmp_path, large(2500)).nodes) == 10_001


def test_twice_the_nodes_are_twice_the_work(tmp_path: Path) -> None:
    """Counted in calls of Python functions."""

    def calls(numbers: int) -> int:
        counted = 0

        def count(frame: object, event: str, argument: object) -> None:
            nonlocal counted
            counted += event == "call"

        sys.setprofile(count)
        try:
            recipe(tmp_path, large(numbers))
        finally:
            sys.setprofile(None)
        return counted

    calls(10)  # what is made once
    assert calls(200) < 2.1 * calls(100)


def test_a_long_chain_needs_no_deep_stack(tmp_path: Path) -> None:
    chain = "".join(
        f"  e{i}: {{uses: estimate, inputs: s, needs: [{f'e{i - 1}' if i else ''}]}}\n" for i in range(3000)
    )
    loaded = recipe(tmp_path, f"stages:\n  s: {{uses: source}}\n{chain}")
    assert list(loaded.nodes)[-1] == "e2999"
    assert len(loaded.select(["e2999"])) == 3001


def test_no_such_file(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(UsageError, match=r"did you mean 'recipe.yaml'"):
        load_recipe(tmp_path / "recipes.yaml")
    with pytest.raises(UsageError, match="cannot read"):
        load_recipe(tmp_path)


def test_loading_imports_no_heavy_library(tmp_path: Path) -> None:
    """networkx alone takes longer than all the rest of a cached run."""
    (tmp_path / "recipe.yaml").write_text("version: 1\nstages:\n  s: {uses: source}\n")
    code = """
import sys
from pathlib import Path
from support.kinds import KINDS
from bigpipe.orchestrator.recipe.graph import load_recipe
load_recipe(Path(sys.argv[1]), stages=KINDS)
print([name for name in ("networkx", "torch", "transformers", "numpy", "rich") if name in sys.modules])
"""
    command = [sys.executable, "-c", code, str(tmp_path / "recipe.yaml")]
    tests = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tests)
    assert done.stdout == "[]\n", done.stderr
