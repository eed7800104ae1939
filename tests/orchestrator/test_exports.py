"""`bigpipe export`: each file is what its target's schema or parser says, and does there what the recipe does here."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
from graphlib import TopologicalSorter
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, strategies as st
from support.actions import BASH, PLAIN, Runner, with_the_command
from support.models import make_checkpoint
from support.pods import expanded, variables
from support.workshop import Workshop

from bigpipe.bigmodel.formats import registry as formats
from bigpipe.errors import UsageError
from bigpipe.machine import Gpu, Machine
from bigpipe.names import plain_names
from bigpipe.orchestrator import commands
from bigpipe.orchestrator.export import TARGETS
from bigpipe.orchestrator.launch import distributions_with
from bigpipe.plugins.estimate import EstimateParams
from bigpipe.plugins.extras import of_estimate, of_quantization
from bigpipe.plugins.quantize import QuantizeParams

ROOT = Path(__file__).parents[2]
RECIPE = """\
version: 1
name: two words
params: {text: hello, most: 40, lines: [a, b]}
secrets: [API_KEY]
stages:
  write:
    uses: write
    matrix: {word: ["it's", "$(touch pwned)", "`touch pwned`"]}
    secrets: [API_KEY]
    with: {text: "${params.text} ${matrix.word}"}
    gates: ["characters <= ${params.most}"]
  begin: {uses: write, with: {lines: "${params.lines}"}}
  join: {uses: join, inputs: {first: begin, rest: [write]}}
"""
SECRETS = {"API_KEY": "sesame-sesame"}
HOSTILE = [
    "two words",
    "a'b",
    '"; touch pwned; "',
    "$(touch pwned)",
    "`touch pwned`",
    "x\ny: [",
    "-p",
    "${HOME} $HOME",
    "$$x$$ $(HF_HOME)",
]


@pytest.fixture
def words(workshop: Workshop) -> Workshop:
    workshop.manifest.write_text(RECIPE)
    return workshop


def exported(target: str, there: Workshop, **options: Any) -> str:
    return commands.export(target, there.manifest, **options).text


TESTED = "python -c 'import bigpipe.versions; print(bigpipe.versions.TESTED)'"


def installed(workflow: str) -> str:
    """What a workflow of GitHub Actions installs, but for its version."""
    steps = yaml.safe_load(workflow)["jobs"]["bigpipe"]["steps"]
    (commands,) = [step["run"] for step in steps if step.get("name") == "Install"]
    (own,) = [word for word in shlex.split(commands.splitlines()[-1]) if word.startswith("bigpipe-ml")]
    return own.partition("==")[0]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.chdir(tmp_path)
    return {**with_the_command(tmp_path), **SECRETS}


# Names


@given(st.lists(st.text(max_size=80), unique=True, max_size=8))
def test_plain_names_are_names_everywhere_and_never_the_same(names: list[str]) -> None:
    for joint in "-_":
        found = plain_names(names, joint)
        assert [*found] == names
        assert len({each.lower() for each in found.values()}) == len(names)
        assert all(re.fullmatch(rf"[A-Za-z]([A-Za-z0-9{joint}]{{0,61}}[A-Za-z0-9])?", each) for each in found.values())


def test_plain_names_do_not_depend_on_the_order_of_others() -> None:
    names = ["quantize@scheme=int8", "quantize-scheme-int8", "Quantize_scheme_int8", "shard"]
    found = plain_names(names)
    assert found["shard"] == "shard"
    assert found == plain_names(reversed(names))


# GitHub Actions


@pytest.fixture(scope="module")
def workflow_schema() -> dict[str, Any]:
    folder = files("check_jsonschema").joinpath("builtin_schemas", "vendor")
    found: dict[str, Any] = json.loads(folder.joinpath("github-workflows.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("recipe", sorted((ROOT / "manifests").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_workflow_of_every_shipped_recipe_is_one(recipe: Path, workflow_schema: dict[str, Any]) -> None:
    written = yaml.safe_load(commands.export("github", recipe, offline=True).text)
    jsonschema.validate(written, workflow_schema)
    assert written["on"]["push"]["paths"][0] == f"manifests/{recipe.name}"


def test_the_steps_of_a_workflow_run_as_github_runs_them(words: Workshop, path: dict[str, str]) -> None:
    workflow = yaml.safe_load(exported("github", words))
    runner = Runner(workflow, words.folder, path, inputs={"text": "bye"}, secrets=SECRETS)
    for step in ("Plan", "Run"):
        done = runner.run(step)
        assert done.returncode == 0, done.stderr
    assert "| write@word=it's | run |" in runner.summary
    result = json.loads(runner.outputs["result"])
    assert result["params"]["text"] == "bye"
    assert {node["status"] for node in result["nodes"].values()} == {"succeeded"}
    assert runner.steps["Install"]["run"].splitlines() == [
        "pip install --no-deps bigpipe-ml==0.1.0",
        f'pip install --constraint "$({TESTED})" bigpipe-ml==0.1.0 bigpipe-toys==0.1.0',
    ]
    seen = {name: {each for each in SECRETS if f"secrets.{each}" in str(step)} for name, step in runner.steps.items()}
    assert seen == {"Install": set(), "Plan": {"API_KEY"}, "Run": {"API_KEY"}}


@pytest.mark.parametrize("shell", [BASH, PLAIN], ids=" ".join)
def test_a_gate_that_fails_fails_the_step(words: Workshop, path: dict[str, str], shell: tuple[str, ...]) -> None:
    """And what came of it is an output all the same, with an annotation of the line."""
    runner = Runner(yaml.safe_load(exported("github", words, params={"most": 9})), words.folder, path, secrets=SECRETS)
    runner.contexts["inputs"] = {"text": "longer than most"}
    done = runner.run("Run", shell)
    assert done.returncode == 3
    assert "::error file=recipe.yaml,line=11,col=" in done.stderr
    result = json.loads(runner.outputs["result"])
    assert (result["exit_code"], result["params"]["most"]) == (3, 9)


def test_a_plan_that_is_refused_fails_its_step_and_is_in_the_summary(words: Workshop, path: dict[str, str]) -> None:
    words.manifest.write_text(RECIPE.replace("with: {", "with: {misfit: true, "))
    runner = Runner(yaml.safe_load(exported("github", words)), words.folder, path, secrets=SECRETS)
    assert runner.run("Plan").returncode == 4
    assert "| join | run |" in runner.summary


MANY = {f"text_{number}": value for number, value in enumerate(HOSTILE)}
MANY_PARAMS = f"""\
version: 1
params: {json.dumps(dict.fromkeys(MANY, "hello"))}
stages:
  a: {{uses: write, env: {json.dumps({name.upper(): f"${{params.{name}}}" for name in MANY})}}}
"""


def test_values_reach_the_recipe_of_a_workflow_as_they_are(
    words: Workshop, path: dict[str, str], workflow_schema: dict[str, Any]
) -> None:
    """Asked for, or given as the file was written."""
    words.manifest.write_text(MANY_PARAMS)
    others = dict.fromkeys(MANY, "other")
    for asked, written, wanted in ((MANY, others, MANY), ({}, MANY, MANY), ({}, {}, dict.fromkeys(MANY, "hello"))):
        workflow = yaml.safe_load(exported("github", words, params=written))
        jsonschema.validate(workflow, workflow_schema)
        runner = Runner(workflow, words.folder, path, inputs=asked)
        assert runner.run("Run").returncode == 0
        assert json.loads(runner.outputs["result"])["params"] == wanted
        (runner.temporary / "output").unlink()
    assert not (words.folder / "pwned").exists()


def test_a_recipe_that_needs_a_gpu_runs_on_a_runner_of_ones_own(words: Workshop) -> None:
    machine = Machine("box", 8, 2**36, 2**36, 2**40, (Gpu(0, "H100", 2**36, 2**36),))
    words.manifest.write_text(RECIPE.replace("    secrets", "    resources: {gpus: 1}\n    secrets", 1))
    assert "|| 'self-hosted'" in exported("github", words, machine=machine)
    assert '"nvidia.com/gpu": "1"' in json.dumps(yaml.safe_load(exported("argo", words, machine=machine)))


@pytest.mark.parametrize(("task", "asked"), [("text-generation", "1"), ("mytasks:answer", "2")])
def test_ranks_that_nobody_placed_get_the_gpu_that_they_go_to_and_those_of_an_own_task_what_there_is(
    words: Workshop, task: str, asked: str
) -> None:
    gpus = tuple(Gpu(index, "H100", 2**36, 2**36) for index in range(2))
    (words.folder / "mytasks.py").write_text("def answer(model, rows):\n    return [{} for row in rows]\n")
    words.manifest.write_text(f"""\
version: 1
name: unplaced
trust: {{modules: [mytasks]}}
stages:
  download: {{uses: download, with: {{path: {ROOT / "models/quickstart"}}}}}
  generate:
    uses: distributed-infer
    inputs: download
    with: {{task: "{task}", prompts: [a]}}
""")
    for there, wanted in ((gpus, [asked]), ((), [])):
        machine = Machine("box", 8, 2**36, 2**36, 2**40, there)
        found = json.dumps(yaml.safe_load(exported("argo", words, machine=machine)))
        assert re.findall(r'"nvidia.com/gpu": "(\d)"', found) == wanted


# Argo


@pytest.fixture(scope="module")
def argo_schema() -> dict[str, Any]:
    """As Argo's own, but a field that it does not know is refused, as its server does."""
    found: dict[str, Any] = json.loads((ROOT / "tests/data/argo-workflow.schema.json").read_text(encoding="utf-8"))
    for definition in found["definitions"].values():
        if "properties" in definition:
            definition.setdefault("additionalProperties", False)
    return found


@pytest.mark.parametrize("recipe", sorted((ROOT / "manifests").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_workflow_of_argo_of_every_shipped_recipe_is_one(recipe: Path, argo_schema: dict[str, Any]) -> None:
    jsonschema.validate(yaml.safe_load(commands.export("argo", recipe, offline=True).text), argo_schema)


def in_order(workflow: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Task → its template, in an order in which they can run."""
    templates = {each["name"]: each for each in workflow["spec"]["templates"]}
    tasks = {each["name"]: each for each in templates[workflow["spec"]["entrypoint"]]["dag"]["tasks"]}
    before = {name: task["depends"].split(" && ") if "depends" in task else [] for name, task in tasks.items()}
    return {name: templates[tasks[name]["template"]] for name in TopologicalSorter(before).static_order()}


def pod(
    template: dict[str, Any], folder: Path, path: dict[str, str], arguments: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a container's command with its own variables, as a pod does, in a store of the test's."""
    container, seen = template["container"], variables(template, arguments)
    words = [expanded(word, seen) for word in (*container["command"], *container["args"])]
    own = {name: value for name, value in seen.items() if name not in ("BIGPIPE_HOME", "HF_HOME")}
    return subprocess.run(words, cwd=folder, env={**path, **own}, capture_output=True, text=True, check=False)


def arguments_of(workflow: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each["value"] for each in workflow["spec"]["arguments"]["parameters"]}


def test_the_containers_of_argo_run_one_after_the_other(words: Workshop, path: dict[str, str]) -> None:
    workflow = yaml.safe_load(exported("argo", words))
    found = in_order(workflow)
    ran = []
    for template in found.values():
        done = pod(template, words.folder, path, {**arguments_of(workflow), "text": "bye"})
        assert done.returncode == 0, done.stderr
        ran.append({name: node["status"] for name, node in json.loads(done.stdout)["nodes"].items()})
    assert len(ran) == 5
    assert all(list(each.values()).count("succeeded") == 1 for each in ran), "each node in its own pod"
    assert ran[-1]["join"] == "succeeded"
    assert not (words.folder / "pwned").exists()
    asked = [{each["name"] for each in template["container"]["env"]} for template in found.values()]
    assert all("API_KEY" in names for names in asked)


def test_a_pod_holds_what_is_foreseen_or_asked(words: Workshop) -> None:
    words.manifest.write_text(RECIPE.replace("[write]}}", "[write]}, resources: {cpus: 3, ram: 1GiB}}"))
    found = in_order(yaml.safe_load(exported("argo", words)))
    held = {name: template["container"]["resources"] for name, template in found.items()}
    assert held["node-join"] == {"requests": {"cpu": "3", "memory": "1280Mi"}, "limits": {"memory": "1280Mi"}}
    assert [each["requests"] for name, each in held.items() if "write" in name] == [{"cpu": "1", "memory": "257Mi"}] * 3


def test_values_reach_the_recipe_of_a_pod_as_they_are(words: Workshop, path: dict[str, str]) -> None:
    words.manifest.write_text(MANY_PARAMS)
    workflow = yaml.safe_load(exported("argo", words, params=MANY))
    (template,) = in_order(workflow).values()
    done = pod(template, words.folder, path, arguments_of(workflow))
    assert json.loads(done.stdout)["params"] == MANY
    assert not (words.folder / "pwned").exists()


# Airflow


def constants(dag: str) -> dict[str, Any]:
    """What stands at the top of a DAG's file."""
    compile(dag, "dag.py", "exec")
    found = [node for node in ast.parse(dag).body if isinstance(node, ast.Assign)]
    return {
        node.targets[0].id: ast.literal_eval(node.value) for node in found[:8] if isinstance(node.targets[0], ast.Name)
    }


@pytest.mark.parametrize("recipe", sorted((ROOT / "manifests").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_tasks_of_every_shipped_recipe_are_in_order(recipe: Path, tmp_path: Path) -> None:
    found = constants(commands.export("airflow", recipe, offline=True, out=tmp_path / "dags/dag.py").text)
    assert (tmp_path / "dags" / found["RECIPE"]).resolve() == recipe
    tasks, nodes = found["TASKS"], commands.load_manifest(recipe).nodes
    assert [*TopologicalSorter({name: task["after"] for name, task in tasks.items()}).static_order()]
    named = {node: name for name, task in tasks.items() for node in task["nodes"]}
    for node, name in named.items():
        for before in nodes[node].predecessors:
            assert before not in named or named[before] in {name, *tasks[name]["after"]}


def test_texts_of_a_recipe_are_literals_of_a_dag(words: Workshop) -> None:
    value = "'''\"\"\"\\\n{{ 1 }} \u2028"
    found = constants(exported("airflow", words, params={"text": value}))
    assert found["PARAMS"] == {"text": value, "most": "", "lines": ""}
    assert {node for task in found["TASKS"].values() for node in task["nodes"]} == {
        *commands.load_manifest(words.manifest).nodes
    }


# Dockerfile


def test_an_image_is_pinned_does_not_run_as_root_and_takes_the_recipe_last(
    words: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dockerfile_parse import DockerfileParser

    monkeypatch.chdir(tmp_path)
    commands.lock(words.manifest)
    (tmp_path / "image").mkdir()
    parser = DockerfileParser(str(tmp_path / "image"))
    for value in HOSTILE:
        parser.content = exported("dockerfile", words, params={"text": value})
        steps = [(step["instruction"], step["value"]) for step in parser.structure]
        order = [name for name, _ in steps if name != "COMMENT"]
        assert order == [
            "ARG",
            "FROM",
            "RUN",
            "RUN",
            "RUN",
            "ENV",
            "VOLUME",
            "WORKDIR",
            "COPY",
            "USER",
            "ENTRYPOINT",
            "CMD",
        ]
        given = dict(steps)
        assert json.loads(given["CMD"]) == ["run", "recipe.yaml", "--locked", "--json", "-p", f"text={value}"]
        assert given["USER"] == "10001"
        assert re.search(r":\d+\.\d+-slim", parser.baseimage)
        assert all("==" in text for name, text in steps if name == "RUN" and "pip install" in text)


# What cannot be, and what makes no difference


def test_variants_that_are_tried_are_of_one_task() -> None:
    """Else those that come after the one that is taken would run too."""
    found = constants(commands.export("airflow", ROOT / "manifests/quantize_or_fall_back.yaml", offline=True).text)
    assert found["TASKS"] == {
        "download": {"nodes": ["download"], "after": []},
        "shard": {"nodes": ["shard"], "after": ["download"]},
        "save": {"nodes": ["save"], "after": ["shard"]},
        "save-float16": {"nodes": ["save_float16"], "after": ["shard", "save"]},
    }


BETWEEN = """\
version: 1
stages:
  begin: {uses: write}
  write: {uses: write, matrix: {word: [a, b]}, with: {text: "${matrix.word}"}, gates: ["characters > 0"]}
  all: {uses: join, inputs: {first: begin, rest: [write]}}
  take: {uses: join, inputs: {first: write}, needs: [all], first: {axis: word, of: write}}
  last: {uses: join, inputs: {first: take}}
"""


def test_what_lies_between_variants_and_who_takes_one_is_of_the_same_task(words: Workshop) -> None:
    words.manifest.write_text(BETWEEN)
    tasks = constants(exported("airflow", words))["TASKS"]
    assert tasks == {
        "begin": {"nodes": ["begin"], "after": []},
        "take": {"nodes": ["take"], "after": ["begin"]},
        "last": {"nodes": ["last"], "after": ["take"]},
    }


@pytest.mark.parametrize(
    ("target", "recipe", "params", "said"),
    [
        ("gitlab", RECIPE, {}, "no target"),
        ("github", RECIPE, {"text": "${{ github.token }}"}, "would evaluate"),
        ("github", RECIPE.replace('"it\'s"', '"$${{ x }}"'), {}, "would evaluate"),
        ("argo", RECIPE, {"text": "{{workflow.uid}}"}, "would evaluate"),
        ("argo", RECIPE, {"text": "sesame-sesame"}, "holds a secret"),
        ("argo", RECIPE.replace("API_KEY", "API-KEY"), {}, "cannot be the name of a variable"),
        ("airflow", RECIPE, {"text": ""}, "is empty"),
    ],
)  # fmt: skip
def test_what_a_target_cannot_hold_is_refused(
    words: Workshop, monkeypatch: pytest.MonkeyPatch, target: str, recipe: str, params: dict[str, str], said: str
) -> None:
    monkeypatch.setenv("API_KEY", "sesame-sesame")
    words.manifest.write_text(recipe)
    with pytest.raises(UsageError, match=said) as refused:
        exported(target, words, params=params)
    assert refused.value.cure
    assert "sesame" not in str(refused.value)


def test_what_spans_machines_is_no_task_of_one(words: Workshop) -> None:
    launch = "launch: {num_processes: 16, num_machines: 2, main_process_ip: 10.0.0.1, main_process_port: 29500}"
    words.manifest.write_text(
        f"version: 1\ntrust: {{modules: [bigpipe]}}\nstages:\n  a: {{uses: 'bigpipe.plugins.probes:RANKS', {launch}}}\n"
    )
    for target in ("github", "argo", "airflow"):
        with pytest.raises(UsageError, match="spans 2 machines"):
            exported(target, words)
    assert "CMD" in exported("dockerfile", words)


@pytest.mark.parametrize("target", TARGETS)
def test_what_this_machine_has_made_makes_no_other_file(
    words: Workshop, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_KEY", SECRETS["API_KEY"])
    before = exported(target, words)
    assert words.run().status == "succeeded"
    assert exported(target, words) == before


def test_what_is_installed_is_what_the_recipe_needs(words: Workshop) -> None:
    words.manifest.write_text(RECIPE.replace("secrets", "sinks: [mlflow]\nremote: s3://team/cache\nsecrets", 1))
    assert installed(exported("github", words)) == "bigpipe-ml[mlflow,s3]"
    found = commands.export("github", ROOT / "manifests/whisper_large_v2_lora_int8.yaml", offline=True).text
    assert installed(found) == "bigpipe-ml[gpu,peft,run]"


@pytest.mark.parametrize(
    ("task", "prompts", "more", "to", "extras"),
    [
        ("text-generation", "'rows.jsonl'", ", output_format: parquet", "s3://bucket/x", "gpu,parquet,run,s3"),
        ("text-generation", "'table.PARQUET'", "", "out", "gpu,parquet,run"),
        ("image-classification", "'pictures/*.png'", "", "out", "gpu,pictures,run"),
        ("automatic-speech-recognition", "'sounds'", "", "simplecache::s3://bucket/x", "gpu,run,s3,sounds"),
        ("automatic-speech-recognition", "'sounds/*.wav'", "", "hf://a/b", "gpu,run"),
        ("automatic-speech-recognition", "[sounds/b.flac]", "", "out", "gpu,run,sounds"),
        ("automatic-speech-recognition", "[{heard: sounds/b.OGG}]", ", column: heard", "out", "gpu,run,sounds"),
        ("automatic-speech-recognition", "[sounds/a.wav, {prompt: sounds/a.WAV}]", "", "out", "gpu,run"),
        ("text-generation", "'rows.jsonl'", ", engine: openai, serving: {url: 'http://x/v1', model: m}", "out", ""),
    ],
)
def test_what_files_and_addresses_need_is_installed_too(
    task: str, prompts: str, more: str, to: str, extras: str, workshop: Workshop
) -> None:
    for name in ("table.PARQUET", "pictures/a.png", "sounds/a.wav", "sounds/b.flac"):
        (workshop.folder / name).parent.mkdir(exist_ok=True)
        (workshop.folder / name).touch()
    (workshop.folder / "rows.jsonl").write_text('{"prompt": "a"}')
    wired = "" if "openai" in more else "inputs: model, "
    workshop.manifest.write_text(f"""\
version: 1
stages:
  model: {{uses: download, with: {{repo: org/model}}}}
  answer: {{uses: distributed-infer, {wired}with: {{task: {task}, prompts: {prompts}{more}}}}}
  save: {{uses: save, inputs: {{results: answer}}, with: {{to: "{to}"}}}}
""")
    found = exported("github", workshop, offline=True)
    assert installed(found) == "bigpipe-ml" + (f"[{extras}]" if extras else "")


@pytest.mark.parametrize(
    ("resources", "extras"), [("", ""), (", resources: {gpus: 0}", ""), (", resources: {gpus: 1}", "[gpu]"),
                              (", resources: {gpu_memory: 8GiB}", "[gpu]")],
)  # fmt: skip
def test_what_counts_gpus_is_installed_where_a_tool_asks_for_some(words: Workshop, resources: str, extras: str) -> None:
    (words.folder / "train.py").write_text("")
    tool = "uses: command, with: {argv: ['${python}', train.py], files: [train.py], produces: directory}"
    words.manifest.write_text(f"version: 1\nname: tool\nstages:\n  tool: {{{tool}{resources}}}\n")
    assert installed(exported("github", words)) == f"bigpipe-ml{extras}"


@pytest.mark.parametrize(("packages", "installed"), [
    ((), ["bigpipe-ml"]),
    (("bigpipe-toys", "safetensors", "not-here"), ["bigpipe-ml", "bigpipe-toys==0.1.0", "not-here", "safetensors"]),
    (("torch", "transformers"), ["bigpipe-ml[gpu,run]"]),
])  # fmt: skip
def test_what_a_kind_of_ones_own_names_is_installed(
    words: Workshop, packages: tuple[str, ...], installed: list[str]
) -> None:
    module = f"mine{len(packages)}"
    (words.folder / f"{module}.py").write_text(
        "from dataclasses import replace\nfrom bigpipe_toys import WRITE\n"
        f"STAGE = replace(WRITE, kind='mine', packages={packages!r})\n"
    )
    words.manifest.write_text(f"version: 1\ntrust: {{modules: [{module}]}}\nstages:\n  a: {{uses: '{module}:STAGE'}}\n")
    for target in ("github", "dockerfile"):
        found = re.findall(r"--constraint .*\)\" (bigpipe.+|'.+)", exported(target, words))
        own, *further = shlex.split(found[-1])
        assert [own.partition("==")[0], *further] == installed


def test_what_is_named_of_an_installed_module_is_installed(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages, information = tmp_path / "site-packages", tmp_path / "site-packages/wordy-1.5.dist-info"
    information.mkdir(parents=True)
    (packages / "wordy_tasks.py").write_text("def answer(model, rows): return rows\n")
    (information / "RECORD").write_text("wordy_tasks.py,,\n")
    (information / "METADATA").write_text("Name: wordy\nVersion: 1.5\n")
    monkeypatch.syspath_prepend(str(packages))
    workshop.manifest.write_text("""\
version: 1
trust: {modules: [wordy_tasks]}
stages:
  model: {uses: download, with: {repo: org/model}}
  answer: {uses: distributed-infer, inputs: model, with: {task: 'wordy_tasks:answer', prompts: [a]}}
""")
    assert "wordy==1.5" in exported("github", workshop, offline=True)


def test_the_distributions_of_formats_and_executors_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = SimpleNamespace(name="mine", value="mine:IT", dist=SimpleNamespace(name="of-mine", version="1"))
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **asked: [entry])
    formats.offered.cache_clear()
    try:
        assert of_quantization(QuantizeParams(scheme="mine"), Path()) == {"of-mine"}
        assert of_estimate(EstimateParams(repo="a/b", dtypes=("int8", "mine")), Path()) == {"of-mine"}
        assert (distributions_with("mine"), distributions_with("process")) == ({"of-mine"}, set())
        other = SimpleNamespace(name="mine", value="other:IT", dist=SimpleNamespace(name="of-another"))
        monkeypatch.setattr("importlib.metadata.entry_points", lambda **asked: [entry, entry, other])
        formats.offered.cache_clear()
        with pytest.raises(UsageError, match="'mine' is offered by of-mine and by of-another"):
            formats.names()
    finally:
        formats.offered.cache_clear()


def test_an_estimate_installs_no_library_whose_models_it_may_never_see(words: Workshop) -> None:
    words.manifest.write_text("version: 1\nname: look\nstages:\n  look: {uses: estimate, with: {path: model}}\n")
    make_checkpoint(words.folder / "model", "opt")
    found = exported("github", words)
    assert "bigpipe-ml==" in found
    assert "bigpipe-ml[" not in found


def test_help_names_every_target(words: Workshop) -> None:
    said = words.command("export", "--help").stdout
    assert all(re.search(rf"\b{name}\b", said) for name in TARGETS)
    done = words.command("export", "github", "recipe.yaml", "-o", "ci/x.yaml")
    assert re.fullmatch(r"ci/x.yaml: .* kB\n", done.stdout)
    assert (words.folder / "ci/x.yaml").read_text() == words.command("export", "github", "recipe.yaml").stdout


def test_the_commands_of_the_page(tmp_path: Path, path: dict[str, str]) -> None:
    page = (ROOT / "docs/how-to/export.md").read_text(encoding="utf-8")
    for folder in ("manifests", "models"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    lines = re.findall(r"^clone\$ (bigpipe .+)$", page, re.MULTILINE)
    assert [line.split()[2] for line in lines] == [*TARGETS]
    subprocess.run(["bash", "-ec", "\n".join(lines)], cwd=tmp_path, env=path, check=True, capture_output=True)
    assert all((tmp_path / line.split()[-1]).is_file() for line in lines)
