"""What the documents say is true: generated pages are current, shipped recipes are valid, examples run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from support.media import make_whisper

from bigpipe.orchestrator.stage import Passing, Planning, Ranks, Stage

ROOT = Path(__file__).parents[1]
MANIFESTS = sorted((ROOT / "manifests").glob("*.yaml"))


def bigpipe(*arguments: str, path: tuple[Path, ...] = (), **options) -> subprocess.CompletedProcess[str]:
    """The command with nothing on the path but bigpipe and `path`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", *path)))}
    environment.update(options.pop("env", {}))
    return subprocess.run(
        [sys.executable, "-m", "bigpipe", *arguments],
        capture_output=True, text=True, check=False, env=environment, **options,
    )  # fmt: skip


def test_the_reference_of_the_kinds_is_current():
    assert bigpipe("kinds", "--markdown").stdout == (ROOT / "docs/reference/kinds.md").read_text(), "make reference"


def test_the_json_schema_is_current():
    assert bigpipe("schema").stdout == (ROOT / "schema/bigpipe.schema.json").read_text(), "make reference"
    outputs = (ROOT / "schema/outputs.schema.json").read_text()
    assert bigpipe("schema", "--outputs").stdout == outputs, "make reference"


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_match_the_schema(path):
    import jsonschema

    assert bigpipe("validate", str(path)).returncode == 0
    schema = json.loads((ROOT / "schema/bigpipe.schema.json").read_text())
    jsonschema.validate(yaml.safe_load(path.read_text()), schema)


@pytest.mark.parametrize("path", [p for p in MANIFESTS if p.stem != "quickstart"], ids=lambda path: path.stem)
def test_shipped_recipes_plan_offline_and_say_what_they_lack(path, tmp_path):
    """Without the Hub and without GPUs: never a traceback, always the facts that are missing or do not fit."""
    done = bigpipe("plan", str(path), "--offline", env={"BIGPIPE_HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")})
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 4, 75), done.stderr
    assert "not known" in done.stdout
    assert "offline" in done.stdout + done.stderr


def test_links_between_documents_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


KIND_OF_YOUR_OWN = (ROOT / "docs/how-to/a-stage-kind-of-your-own.md").read_text()


def write_files_of(page: str, folder: Path) -> None:
    """Every block that a paragraph beginning with `` `NAME`, `` announces, as that file."""
    for name, _, text in re.findall(r"^`([\w.]+)`,.*?\n\n```(python|yaml)\n(.*?)```", page, re.DOTALL | re.MULTILINE):
        (folder / name).write_text(text)


def test_the_stage_kind_of_the_how_to_works_in_an_empty_folder(tmp_path):
    """Its files and its commands as they are written."""
    write_files_of(KIND_OF_YOUR_OWN, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"bigpipe_census.py", "census.yaml", "test_census.py"}
    commands = re.findall(r"^\$ (.+)$", KIND_OF_YOUR_OWN, re.MULTILINE)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "BIGPIPE_HOME": str(tmp_path / "store")}
    for command in commands:
        written = re.sub(r"^(bigpipe|python)\b", lambda found: PROGRAMS[found[1]], command)
        done = subprocess.run(
            ["bash", "-c", written], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
    schema = json.loads((tmp_path / "bigpipe.schema.json").read_text())
    prefix = schema["definitions"]["bigpipe_census:STAGE"]["properties"]["prefix"]
    assert prefix["description"] == "Only tensors whose names start so."


PROGRAMS = {"python": sys.executable, "bigpipe": f"{sys.executable} -m bigpipe"}


def test_the_stage_kind_of_the_how_to_works_as_a_distribution(tmp_path):
    package, recipes = tmp_path / "package", tmp_path / "recipes"
    for folder in (package, recipes):
        folder.mkdir()
    write_files_of(KIND_OF_YOUR_OWN, package)
    project = tomllib.loads(re.findall(r"```toml\n(.*?)```", KIND_OF_YOUR_OWN, re.DOTALL)[0])
    information = package / "bigpipe_census-0.1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: bigpipe-census\nVersion: 0.1.0\n")
    entries = project["project"]["entry-points"]["bigpipe.stages"]
    lines = [f"{name} = {value}" for name, value in entries.items()]
    (information / "entry_points.txt").write_text("\n".join(["[bigpipe.stages]", *lines, ""]))
    recipe = (package / "census.yaml").read_text()
    by_name = re.sub("trust: .*\n", "", recipe).replace("bigpipe_census:STAGE", "census")
    (recipes / "census.yaml").write_text(by_name)
    home = {"BIGPIPE_HOME": str(tmp_path / "store")}
    done = bigpipe("run", "census.yaml", "--json", cwd=recipes, path=(package,), env=home)
    assert done.returncode == 0, done.stderr
    node = json.loads(done.stdout.splitlines()[-1])["nodes"]["census"]
    assert node["metrics"]["tensors"] == len((Path(node["path"]) / "census.txt").read_text().splitlines()) > 0


def test_the_how_to_explains_every_field_of_a_stage():
    groups = {"planning": Planning, "ranks": Ranks, "passing": Passing}
    fields = [
        name for field in Stage.__dataclass_fields__
        for name in (field, *(f"{field}.{inner}" for inner in getattr(groups.get(field), "__dataclass_fields__", ())))
    ]  # fmt: skip
    assert re.findall(r"^\| `([\w.]+)` \|", KIND_OF_YOUR_OWN, re.MULTILINE) == fields


def test_the_examples_for_those_who_come_from_accelerate_work(tmp_path):
    """Both ways, beside the model that ships; the quantized bytes are the same."""
    page = (ROOT / "docs/how-to/coming-from-accelerate.md").read_text()
    blocks = dict(re.findall(r"```(python|yaml)\n(.*?)```", page, re.DOTALL))
    (tmp_path / "models").symlink_to(ROOT / "models")
    code = blocks["python"] + "\nprint(type(quantized).__name__)\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("OPTForCausalLM\n")
    assert "'disk'" in done.stdout
    (tmp_path / "recipe.yaml").write_text(blocks["yaml"])
    ran = bigpipe("run", "recipe.yaml", "--json", cwd=tmp_path, env={"BIGPIPE_HOME": str(tmp_path / "store")})
    assert ran.returncode == 0, ran.stderr
    nodes = json.loads(ran.stdout.splitlines()[-1])["nodes"]
    assert nodes["generate"]["metrics"]["prompts"] == 2
    for file in (tmp_path / "int8").glob("*.safetensors"):
        assert file.read_bytes() == (Path(nodes["quantize"]["path"]) / file.name).read_bytes()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_the_how_to_about_fine_tuning_works_as_it_is_written(tmp_path):
    pytest.importorskip("peft")
    page = (ROOT / "docs/how-to/finetune.md").read_text()
    blocks = dict(re.findall(r"```(python|yaml|json|console)\n(.*?)```", page, re.DOTALL))
    (tmp_path / "models").symlink_to(ROOT / "models")
    (tmp_path / "tune.yaml").write_text(blocks["yaml"])
    (tmp_path / "rows.jsonl").write_text(blocks["json"])
    home = {"BIGPIPE_HOME": str(tmp_path / "store"), "OMP_NUM_THREADS": "1"}
    for command in re.findall(r"^\$ bigpipe (.+)$", blocks["console"], re.MULTILINE):
        done = bigpipe(*command.split(), cwd=tmp_path, env=home)
        assert done.returncode == 0, (command, done.stderr)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    (tmp_path / "adapter").rename(tmp_path / "from-the-recipe")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **home}
    done = subprocess.run(
        [sys.executable, "-c", blocks["python"]], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(" 12288\n")


@pytest.mark.parametrize(
    ("recipe", "own"),
    [
        ("opt6.7b_lora_int8", ("-p", "source={path: ../models/quickstart}", "-p", "batch=1", "-p", "steps=4")),
        ("whisper_large_v2_lora_int8", ("-p", "source={path: WHISPER}", "-p", "batch=4", "-p", "rank=2")),
    ],
)
def test_the_recipes_that_train_run_at_small_size(recipe, own, tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("soundfile")
    shutil.copytree(ROOT / "manifests", tmp_path / "manifests")
    (tmp_path / "models").symlink_to(ROOT / "models")
    if "whisper" in recipe:
        make_whisper(tmp_path / "whisper")
    given = [each.replace("WHISPER", str(tmp_path / "whisper")) for each in own]
    home = {"BIGPIPE_HOME": str(tmp_path / "store"), "OMP_NUM_THREADS": "1"}
    done = bigpipe("run", f"manifests/{recipe}.yaml", *given, "--json", cwd=tmp_path, env=home)
    assert done.returncode == 0, done.stderr
    node = json.loads(done.stdout.splitlines()[-1])["nodes"]["finetune"]
    assert node["metrics"]["steps"] == (4 if "opt" in recipe else 6)
    assert (Path(node["path"]) / "adapter_model.safetensors").is_file()
