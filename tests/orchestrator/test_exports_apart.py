"""What stands in an export beside what it does: names and values that the target itself would read, files of others."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, strategies as st
from support.actions import Runner, with_the_command
from support.listening import CREATED, serving
from support.pods import container_of, expanded
from support.workshop import Workshop

from bigpipe.errors import Stale, UsageError
from bigpipe.orchestrator import commands
from bigpipe.orchestrator.sinks import SINKS

RECIPE = """\
version: 1
name: apart
params: {image: a, store: b, secrets: c}
stages:
  a:
    uses: write
    matrix: {word: ["$$ $(BIGPIPE_HOME) $$$(x", plain]}
    with: {text: "${matrix.word} ${params.image} ${params.store} ${params.secrets}"}
"""
LET_GO = """\
version: 1
stages:
  a: {uses: write, CACHE}
  b: {uses: join, matrix: {x: [p, q]}, inputs: {first: a}, with: {separator: "${matrix.x}"}}
  c: {uses: join, cache: false, inputs: {first: a}}
  d: {uses: join, inputs: {first: c}}
"""


@pytest.fixture
def there(workshop: Workshop) -> Workshop:
    workshop.manifest.write_text(RECIPE)
    return workshop


def read(target: str, there: Workshop, **options: Any) -> Any:
    return yaml.safe_load(commands.export(target, there.manifest, **options).text)


# Argo


@given(st.text("$()ab {'"))
def test_kubernetes_gives_a_script_back_as_it_was(script: str) -> None:
    from bigpipe.orchestrator.export.argo import escaped

    assert expanded(escaped(script), {"a": "wrong", "b": "wrong"}) == script


def test_names_of_nodes_are_none_of_kubernetes_references(there: Workshop) -> None:
    names = [*commands.load_manifest(there.manifest).nodes]
    templates = read("argo", there)["spec"]["templates"][1:]
    ran = [expanded(each["container"]["args"][0], {"BIGPIPE_HOME": "/store"}) for each in templates]
    assert [shlex.split(script)[4] for script in ran] == names


def test_parameters_of_the_recipe_are_not_those_that_a_workflow_of_argo_stands_on(there: Workshop) -> None:
    workflow = read("argo", there, params={"image": "evil"})
    given = [each["name"] for each in workflow["spec"]["arguments"]["parameters"]]
    assert len(given) == len(set(given)) == 6
    container, annotations = container_of(workflow["spec"]["templates"][1])
    assert container["image"] == "{{workflow.parameters.bigpipe-image}}"
    assert annotations["bigpipe/image"] == "{{workflow.parameters.image}}"


# GitHub


def test_no_cache_of_a_recipe_begins_as_that_of_another(there: Workshop) -> None:
    """And whatever was made is kept: a key that is written once holds what the first run made."""
    steps = {each.get("name"): each for each in read("github", there)["jobs"]["bigpipe"]["steps"]}
    taken, kept = (
        steps[f"{verb} the store {where}"] for verb, where in (("Take", "from the cache"), ("Keep", "in the cache"))
    )
    assert taken["with"]["key"] == kept["with"]["key"]
    assert kept["with"]["key"].endswith("-${{ github.run_id }}-${{ github.run_attempt }}")
    assert all(key.startswith("bigpipe-apart_") for key in taken["with"]["restore-keys"].splitlines())
    assert "nodes.*.status, 'succeeded')" in kept["if"]


def test_a_workflow_declares_no_secret_that_github_gives(there: Workshop) -> None:
    declared = RECIPE.replace("stages", "secrets: [GITHUB_TOKEN, OTHER]\nstages")
    there.manifest.write_text(declared.replace("uses: write", "uses: write\n    secrets: [GITHUB_TOKEN, OTHER]"))
    workflow = read("github", there)
    assert [*workflow["on"]["workflow_call"]["secrets"]] == ["OTHER"]
    assert "${{ secrets.GITHUB_TOKEN }}" in json.dumps(workflow["jobs"])


@pytest.mark.parametrize(
    ("target", "secret", "said"),
    [("github", "GITHUB_X", "keeps names"), ("argo", "PARAM_IMAGE", "holds the parameter image")],
)
def test_a_secret_whose_name_is_taken_is_refused(there: Workshop, target: str, secret: str, said: str) -> None:
    declared = RECIPE.replace("stages", f"secrets: [{secret}]\nstages")
    there.manifest.write_text(declared.replace("uses: write", f"uses: write\n    secrets: [{secret}]"))
    with pytest.raises(UsageError, match=said):
        read(target, there)


# What sinks need


def test_a_workflow_hands_on_where_a_sink_is_and_who_may_tell_it(there: Workshop) -> None:
    """From variables or secrets; what nobody set is empty, and is as if it were not there."""
    there.manifest.write_text(RECIPE.replace("stages", "sinks: [openlineage]\nstages"))
    workflow = read("github", there)
    assert {"OPENLINEAGE_URL", "OPENLINEAGE_API_KEY"} < {*workflow["on"]["workflow_call"]["secrets"]}
    heard: list[tuple[str, str | None, bytes]] = []
    path = with_the_command(there.folder)
    with serving(CREATED, heard) as address:
        secrets = {"OPENLINEAGE_API_KEY": "sesame-sesame"}
        runner = Runner(workflow, there.folder, path, secrets=secrets, vars={"OPENLINEAGE_URL": address})
        done = runner.run("Run")
    assert done.returncode == 0, done.stderr
    assert "told of this run" not in done.stderr
    assert {key for _, key, _ in heard} == {"Bearer sesame-sesame"}
    assert json.loads(heard[0][2])["job"]["namespace"] == "bigpipe"
    done = Runner(workflow, there.folder, path).run("Run")
    assert done.returncode == 0
    assert "not told of this run: OPENLINEAGE_URL or OPENLINEAGE_CONFIG is not set" in done.stderr


def test_a_pod_takes_what_a_sink_needs_from_the_secret(there: Workshop) -> None:
    declared = RECIPE.replace("stages", "secrets: [MLFLOW_TRACKING_TOKEN]\nsinks: [mlflow]\nstages")
    there.manifest.write_text(declared.replace("uses: write", "uses: write\n    secrets: [MLFLOW_TRACKING_TOKEN]"))
    for template in read("argo", there)["spec"]["templates"][1:]:
        taken = [each for each in container_of(template)[0]["env"] if "secretKeyRef" in each.get("valueFrom", {})]
        assert sorted(each["name"] for each in taken) == sorted(SINKS["mlflow"].settings)
        assert all(each["valueFrom"]["secretKeyRef"]["optional"] for each in taken)


# What is one task


def test_who_takes_what_is_let_go_is_of_one_task_where_they_are_several(there: Workshop) -> None:
    """Else each but the first would make it again, in the memory that is foreseen for another."""
    found = [shlex.split(each["container"]["args"][0]) for each in _written(there, "cache: false")]
    assert [words[words.index("recipe.yaml") + 1 : words.index("--json")] for words in found] == [
        ["b@x=p", "b@x=q", "c"],
        ["d"],
    ]
    assert len(_written(there, "cache: true")) == 5


def _written(there: Workshop, cache: str) -> list[dict[str, Any]]:
    there.manifest.write_text(LET_GO.replace("CACHE", cache))
    templates: list[dict[str, Any]] = read("argo", there)["spec"]["templates"]
    return templates[1:]


# Files


def test_a_recipe_outside_of_the_working_directory_begins_in_its_own(
    there: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above the top nothing is checked out, and nothing is in an image."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert '"run", "recipe.yaml"' in commands.export("dockerfile", there.manifest).text
    found = commands.export("airflow", there.manifest, out=tmp_path / "dags" / "dag.py").text
    assert "RECIPE = '../recipe.yaml'" in found


def test_files_of_others_are_not_replaced(there: Workshop) -> None:
    own = there.folder / "Dockerfile"
    own.write_text("FROM scratch\n")
    for out in (own, there.manifest, there.folder / "new" / ".." / "recipe.yaml"):
        with pytest.raises(UsageError, match="was not written by"):
            commands.export("dockerfile", there.manifest, out=out)


def test_an_export_that_is_out_of_date_is_named(there: Workshop) -> None:
    out = there.folder / "ci.yaml"
    for target in ("github", "argo", "airflow", "dockerfile"):
        found = commands.export(target, there.manifest, out=out)
        out.unlink(missing_ok=True)
        with pytest.raises(Stale, match="is not there"):
            found.require_same(out)
        out.write_text(found.text)
        commands.export(target, there.manifest, out=out).require_same(out)
    assert there.command("export", "dockerfile", "recipe.yaml", "-o", "ci.yaml", "--check").returncode == 0
    there.manifest.write_text(RECIPE.replace("name: apart", "name: other\nsinks: [mlflow]"))
    done = there.command("export", "dockerfile", "recipe.yaml", "-o", "ci.yaml", "--check")
    assert (done.returncode, done.stdout) == (10, "")
    assert out.read_text() == found.text
