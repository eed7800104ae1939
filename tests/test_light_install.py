"""`pip install bigpipe-ml` without the extra `run`: no torch, and all that needs none works, to the same bytes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.light import make_environment
from support.models import make_checkpoint

ROOT = Path(__file__).parents[1]
INSTALL = "pip install 'bigpipe-ml[run]'"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_environment(tmp_path_factory.mktemp("light"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A checkout of what the shipped recipe needs."""
    shutil.copytree(ROOT / "manifests", tmp_path / "manifests")
    (tmp_path / "models").symlink_to(ROOT / "models")
    return tmp_path


def told(bin_: Path, place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command of an environment, with a store in `place`; never with a traceback."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"BIGPIPE_HOME": str(place / "store"), "HF_HOME": str(place / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [bin_ / "python", "-m", "bigpipe", *arguments],
        cwd=place, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


def answered(bin_: Path, place: Path, *arguments: str) -> dict[str, Any]:
    done = told(bin_, place, *arguments, "--json")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


HERE = Path(sys.executable).parent
RECIPE = "manifests/quickstart.yaml"


def test_it_has_no_torch(light: Path) -> None:
    for name in ("torch", "transformers", "accelerate", "bitsandbytes", "tokenizers"):
        done = subprocess.run([light / "python", "-c", f"import {name}"], capture_output=True, text=True, check=False)
        assert f"No module named '{name}'" in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        f"validate {RECIPE}", f"graph {RECIPE}", f"status {RECIPE}", "kinds", "kinds quantize", "schema", "ls", "ps",
        "gc --dry-run", "verify", f"plan {RECIPE}", f"lock {RECIPE}", "estimate models/quickstart", "completion bash",
        "init own/recipe.yaml --model facebook/opt-125m", f"run {RECIPE} save -p memory=2GiB --keep-going --help",
    ],
)  # fmt: skip
def test_what_needs_no_torch_works(command: str, light: Path, place: Path) -> None:
    done = told(light, place, *command.split())
    assert done.returncode == 0, done.stderr


def test_a_plan_a_lock_and_an_estimate_say_what_those_of_the_full_install_say(light: Path, place: Path) -> None:
    plans = [answered(bin_, place, "plan", RECIPE) for bin_ in (light, HERE)]
    assert plans[0]["not_installed"]["dispatch"] == ["torch", "transformers", "accelerate"]
    assert plans[1]["not_installed"] == {}
    for each in plans:
        del each["not_installed"], each["machine"]  # what is free on it moves
    assert plans[0] == plans[1]
    locks = []
    for bin_ in (light, HERE):
        assert told(bin_, place, "lock", RECIPE).returncode == 0
        locks.append((place / f"{RECIPE}.lock").read_bytes())
        (place / f"{RECIPE}.lock").unlink()
    assert locks[0] == locks[1]
    estimates = [answered(bin_, place, "estimate", "models/quickstart") for bin_ in (light, HERE)]
    assert estimates[0] == estimates[1]


def test_what_it_ran_and_locked_is_found_by_the_full_install(light: Path, place: Path) -> None:
    """Download, estimate, shard and quantize need no torch; a lock that was written before a run holds after it."""
    assert told(light, place, "lock", RECIPE).returncode == 0
    ran = answered(light, place, "run", RECIPE, "quantize", "estimate", "--locked")
    assert ran["exit_code"] == 0, ran["errors"]
    assert [node["status"] for node in ran["nodes"].values()] == ["succeeded"] * 4
    assert told(HERE, place, "lock", RECIPE, "--check").returncode == 0
    there = answered(HERE, place, "run", RECIPE, "quantize", "estimate", "--locked")
    assert {name: node["status"] for name, node in there["nodes"].items()} == dict.fromkeys(ran["nodes"], "cached")
    keys = [{name: node["key"] for name, node in found["nodes"].items()} for found in (ran, there)]
    assert keys[0] == keys[1]
    anew = answered(HERE, place, "run", RECIPE, "quantize", "--store", str(place / "empty"))
    assert anew["nodes"]["quantize"]["digest"] == ran["nodes"]["quantize"]["digest"]


def test_what_the_full_install_ran_is_found_by_it(light: Path, place: Path) -> None:
    ran = answered(HERE, place, "run", RECIPE, "dispatch")
    assert ran["nodes"]["dispatch"]["status"] == "succeeded"
    found = answered(light, place, "plan", RECIPE)
    assert {node["key"] for node in ran["nodes"].values()} <= {node["key"] for node in found["nodes"].values()}
    assert found["nodes"]["dispatch"]["action"] == "cached"
    assert list(found["not_installed"]) == ["evaluate", "generate"]
    assert told(light, place, "run", RECIPE, "dispatch").returncode == 0, "nothing has to run"


def test_what_computes_says_in_one_line_what_to_install(light: Path, place: Path) -> None:
    done = told(light, place, "run", RECIPE)
    assert done.returncode == 2
    assert re.fullmatch(
        rf"error: {RECIPE}:\d+:\d+: evaluate \(evaluate\) needs torch, transformers, tokenizers, bitsandbytes, "
        rf"not installed here\n  {re.escape(INSTALL)}\n",
        done.stderr,
    )
    assert not (place / "store/keys").exists() or not any((place / "store/keys").rglob("*.json")), "nothing ran before"
    refusal = answered(light, place, "run", RECIPE)["errors"][0]
    assert (refusal["cure"], refusal["node"], refusal["line"]) == (INSTALL, "evaluate", 28)
    planned = told(light, place, "plan", RECIPE)
    assert "not installed here: accelerate 1.15.0, bitsandbytes" in planned.stdout
    assert f"counted with for evaluate, dispatch, generate; to run: {INSTALL}\n" in planned.stdout
    doctor = told(light, place, "doctor")
    assert (doctor.returncode, doctor.stderr.count(INSTALL)) == (6, 3)


@pytest.mark.parametrize("call", ["load('M')", "evaluate('M', 'text.txt')", "finetune('M', [], 'out')",
                                  "merge_adapter('M', 'adapter', 'out')"])  # fmt: skip
def test_functions_that_compute_say_it_too(call: str, light: Path, place: Path) -> None:
    code = f"import bigpipe\ntry: bigpipe.{call}\nexcept bigpipe.BigpipeError as error: print(error)"
    done = subprocess.run([light / "python", "-c", code], cwd=place, capture_output=True, text=True, check=True)
    name = call.partition("(")[0]
    assert done.stdout.startswith(f"{name} needs torch, transformers")
    assert done.stdout.endswith(f", not installed here\n  {INSTALL}\n")


def foreign_family(folder: Path) -> None:
    """Turn a checkpoint into one of a family that no snapshot knows."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | {"model_type": "gptj", "architectures": ["GPTJForCausalLM"]}
    file.write_text(json.dumps(config))


def test_a_family_without_a_snapshot_is_counted_from_its_headers_and_said_to_be(light: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model")
    foreign_family(tmp_path / "model")
    found = answered(light, tmp_path, "estimate", "model")
    assert found["exit_code"] == 0
    needs = "building the model's class GPTJForCausalLM needs torch, transformers, accelerate, not installed here"
    assert f"{needs}; so sizes are from stored tensors alone" in " ".join(found["notes"])
    for name in ("model.safetensors", "model.safetensors.index.json"):
        (tmp_path / "model" / name).unlink(missing_ok=True)
    for file in (tmp_path / "model").glob("*.safetensors"):
        file.unlink()
    bare = told(light, tmp_path, "estimate", "model")
    assert (bare.returncode, bare.stderr) == (2, f"error: model: {needs}\n  {INSTALL}\n")


def test_an_estimate_that_the_full_install_would_make_otherwise_is_not_kept(light: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model")
    foreign_family(tmp_path / "model")
    recipe = "version: 1\nname: e\nstages:\n  e: {uses: estimate, with: {path: model}}\n"
    (tmp_path / "e.yaml").write_text(recipe)
    assert told(light, tmp_path, "plan", "e.yaml").returncode == 0
    done = told(light, tmp_path, "run", "e.yaml")
    assert "an estimate of model to keep needs torch, transformers, accelerate, not installed here" in done.stderr
    assert done.returncode == 2


def test_the_versions_it_plans_with_are_those_that_make_installs() -> None:
    from bigpipe import versions

    link = ROOT / "src/bigpipe/constraints.txt"
    assert link.resolve() == ROOT / "constraints.txt"
    pinned = dict(line.split("==") for line in link.read_text().splitlines() if "==" in line)
    assert set(versions.RUN) <= pinned.keys()
    assert versions.planned_version("torch") == versions.package_version("torch")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {re.split(r"[>=]", each)[0] for each in project["optional-dependencies"]["run"]}
    assert asked == set(versions.RUN) - {"tokenizers"}, "transformers brings tokenizers"
    core = {re.split(r"[>=]", each)[0] for each in project["dependencies"]}
    assert not core & set(versions.RUN)


@pytest.mark.slow
def test_pip_makes_it_in_less_than_200_megabytes(tmp_path: Path) -> None:
    """Truly: an empty environment, pip, the registry."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    bin_ = tmp_path / "venv/bin"
    subprocess.run(
        [bin_ / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", ROOT], check=True
    )
    files = [path for path in (tmp_path / "venv").rglob("*") if path.is_file() and not path.is_symlink()]
    size = sum(path.stat().st_size for path in files)
    assert 10e6 < size < 200e6, f"{size:,} bytes"
    (tmp_path / "recipe").mkdir()
    shutil.copytree(ROOT / "manifests", tmp_path / "recipe/manifests")
    shutil.copytree(ROOT / "models/quickstart", tmp_path / "recipe/models/quickstart")
    for command in (f"validate {RECIPE}", f"plan {RECIPE}", f"lock {RECIPE}", "estimate models/quickstart"):
        assert told(bin_, tmp_path / "recipe", *command.split()).returncode == 0
    assert not (tmp_path / "venv/lib").rglob("torch*") or not list((tmp_path / "venv/lib").rglob("site-packages/torch"))
