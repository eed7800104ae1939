"""A format that a distribution offers in one file, that of the how-to: estimated, quantized to, placed, run, saved."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models/quickstart"
COMPARE = """
import sys, torch, bigpipe
ids = torch.arange(3, 40)[None]
with torch.inference_mode():
    plain, packed = (bigpipe.load(path, dtype="float32")(ids).logits for path in sys.argv[1:])
print(((plain - packed).norm() / plain.norm()).item())
"""

QUANTIZE = """
import sys, pathlib, bigpipe
bigpipe.quantize_checkpoint(*sys.argv[1:3], scheme="int8-tensor", parts=pathlib.Path(sys.argv[3]))
"""


def command(*arguments: str, path: tuple[Path, ...], **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", *path)))}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False, **options
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip leaves behind of the how-to's distribution, and its recipe beside."""
    folder = tmp_path_factory.mktemp("format")
    page = (ROOT / "docs/how-to/a-format-of-your-own.md").read_text()
    blocks = dict(re.findall(r"```(python|toml|yaml)\n(.*?)```", page, re.DOTALL))
    project = tomllib.loads(blocks["toml"])["project"]
    [(name, target)] = project["entry-points"]["bigpipe.formats"].items()
    information = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    information.mkdir()
    (folder / f"{target.partition(':')[0]}.py").write_text(blocks["python"])
    (information / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    (information / "entry_points.txt").write_text(f"[bigpipe.formats]\n{name} = {target}\n")
    (folder / "models").symlink_to(ROOT / "models")
    (folder / "recipes").mkdir()
    (folder / "recipes/own.yaml").write_text(blocks["yaml"])
    return folder


@pytest.fixture(scope="module")
def nodes(site: Path) -> dict[str, Any]:
    done = command(
        "-m", "bigpipe", "run", "own.yaml", "--json", "--store", str(site / "store"), path=(site,), cwd=site / "recipes"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["nodes"]
    return found


def test_its_sizes_are_those_that_are_written(nodes: dict[str, Any]) -> None:
    estimated = nodes["estimate"]["metrics"]["formats"]["int8-tensor"]
    assert estimated["stored"] == nodes["quantize"]["metrics"]["bytes"]
    assert nodes["quantize"]["metrics"]["quantized"] == 36
    dispatched = nodes["dispatch"]["metrics"]
    assert dispatched["measured"] == dispatched["predicted"]
    assert dispatched["streamed_bytes_per_token"] > 0, "a layer lies on the disk"


def test_options_of_other_formats_are_refused_by_the_plan(site: Path) -> None:
    text = (site / "recipes/own.yaml").read_text()
    (site / "recipes/odd.yaml").write_text(
        text.replace("scheme: int8-tensor", "scheme: int8-tensor, llm_int8_threshold: 5.0")
    )
    done = command(
        "-m", "bigpipe", "plan", "odd.yaml", "--store", str(site / "other"), path=(site,), cwd=site / "recipes"
    )
    assert done.returncode == 2, done.stdout
    told = r"odd.yaml:\d+:\d+: quantize: llm_int8_threshold has no meaning for scheme int8-tensor"
    assert re.search(told, done.stderr)


def test_it_answers_and_is_saved_with_its_name(nodes: dict[str, Any], site: Path) -> None:
    assert nodes["generate"]["metrics"]["prompts"] == 1
    assert nodes["generate"]["metrics"]["errors"] == 0
    config = json.loads((site / "saved/config.json").read_text())
    assert config["quantization_config"] == {"modules_to_not_convert": None, "quant_method": "int8-tensor"}
    assert "- 8-bit\n- int8-tensor\n" in (site / "saved/README.md").read_text()


def test_what_was_saved_computes_as_the_model_did(nodes: dict[str, Any], site: Path) -> None:
    done = command("-c", COMPARE, str(MODEL), str(site / "saved"), path=(site,))
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < 0.05


def test_what_other_code_of_it_finished_is_not_taken(tmp_path: Path, site: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(site, changed, symlinks=True, ignore=shutil.ignore_patterns("store", "other", "saved"))
    [code] = changed.glob("*.py")
    code.write_text(code.read_text().replace("127 / measured", "63 / measured"))
    for folder, name in ((site, "first"), (changed, "second"), (changed, "alone")):
        parts = "alone" if name == "alone" else "shared"
        done = command("-c", QUANTIZE, str(MODEL), str(tmp_path / name), str(tmp_path / parts), path=(folder,))
        assert done.returncode == 0, done.stderr
    first, second, alone = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second", "alone")
    )
    assert first != second == alone


def test_it_is_not_quantized_again(nodes: dict[str, Any], site: Path) -> None:
    code = "import sys, bigpipe; bigpipe.quantize_checkpoint(sys.argv[1], sys.argv[2], scheme='int8')"
    done = command("-c", code, str(site / "saved"), str(site / "again"), path=(site,))
    assert "quantized already (int8 with a scale per tensor)" in done.stderr


def test_without_its_distribution_it_is_refused_by_name(nodes: dict[str, Any], site: Path) -> None:
    done = command("-c", "import sys, bigpipe; bigpipe.load(sys.argv[1])", str(site / "saved"), path=())
    assert "its weights are int8-tensor" in done.stderr
    done = command("-m", "bigpipe", "validate", "own.yaml", path=(), cwd=site / "recipes")
    assert done.returncode == 2
    assert "'int8-tensor' is not one of its values" in done.stderr


def test_it_is_listed_with_the_others(site: Path) -> None:
    listed = command("-m", "bigpipe", "kinds", "quantize", path=(site,)).stdout
    assert re.search(r"int8 .* nf4 .* fp4 .* int8-tensor", listed)
    schema = json.loads(command("-m", "bigpipe", "schema", path=(site,)).stdout)
    assert '"enum": ["int8", "nf4", "fp4", "int8-tensor"]' in json.dumps(schema)


def test_its_version_and_its_source_enter_the_key(site: Path) -> None:
    code = (
        "from bigpipe.plugins.quantize import QuantizeParams, facts\n"
        "from support.launching import MACHINE\n"
        "print(facts(QuantizeParams(scheme='int8-tensor'), MACHINE), facts(QuantizeParams(scheme='nf4'), MACHINE))"
    )
    done = command("-c", code, path=(site, ROOT / "tests"))
    assert re.search(r"'format': 'bigpipe-int8-tensor 0\.1\.0 [0-9a-f]{12}'$", done.stdout.split("} {")[0])
    assert done.stdout.endswith("{}\n")
