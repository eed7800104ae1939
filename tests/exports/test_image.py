"""What the exported Dockerfile runs, in an environment of its own in place of an image."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.workshop import Workshop

from bigpipe.orchestrator import commands

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.exports
LIGHT = """\
version: 1
name: light
params: {size: 1MB}
stages:
  download: {uses: download, with: {path: MODEL}}
  shard: {uses: shard, inputs: download, with: {max_shard_size: "${params.size}"}}
"""


def test_an_image_installs_what_was_tested_and_runs_the_recipe(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workshop.folder)
    (tmp_path / "model").symlink_to(ROOT / "models/quickstart")
    workshop.manifest.write_text(LIGHT.replace("MODEL", "model"))
    wheels = tmp_path / "wheels"
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", wheels, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "image"], check=True)
    there = tmp_path / "image/bin"
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")},
        "PATH": f"{there}:{os.environ['PATH']}", "PIP_FIND_LINKS": f"{wheels} {os.environ.get('PIP_FIND_LINKS', '')}",
        "BIGPIPE_HOME": str(tmp_path / "store-of-the-image"),
    }  # fmt: skip
    text = commands.export("dockerfile", workshop.manifest, params={"size": "2MB"}).text
    steps = re.findall(r"^RUN (pip .+)$", text, re.MULTILINE)
    assert len(steps) == 2
    for step in steps:
        done = subprocess.run(["sh", "-ec", step], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    installed = subprocess.run([there / "pip", "freeze"], env=environment, capture_output=True, text=True, check=True)
    pinned = (ROOT / "constraints.txt").read_text().lower().splitlines()
    others = [line for line in installed.stdout.lower().splitlines() if not line.startswith("bigpipe")]
    assert others
    assert set(others) <= set(pinned)
    words = [*json.loads(_last(text, "ENTRYPOINT")), *json.loads(_last(text, "CMD"))]
    assert words == ["bigpipe", "run", "recipe.yaml", "--json", "-p", "size=2MB"]
    done = subprocess.run(["sh", "-c", shlex.join(words)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["nodes"]["shard"]["status"] == "succeeded"


def _last(text: str, instruction: str) -> str:
    return re.findall(rf"^{instruction} (.+)$", text, re.MULTILINE)[-1]
