"""What a run with nothing to do imports: time that everybody waits for, and that creeps in by single modules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.models import make_checkpoint
from support.workshop import environment

RECIPE = """\
version: 1
name: nothing-to-do
stages:
  download: {uses: download, with: {path: model}}
  estimate: {uses: estimate, inputs: download, with: {dtypes: [float32, int8]}, gates: ["int8.weights <= 1GiB"]}
  shard: {uses: shard, inputs: download, with: {max_shard_size: 1MB}}
  save: {uses: save, inputs: {model: shard, reports: [estimate]}, with: {to: dist}}
"""
RUN = """
import sys
from bigpipe.cli import command
command()
print(*sys.modules)
"""
ROOMS = {
    "": "allocator cli commandline environment errors faces files filesystems fit git machine modules names passing"
    " redaction sizes tables programs trust versions",
    "commandline": "completing options pages printing published questions recipes single stored streams",
    "plugins": "download estimate library revisions save saving shard",
    "orchestrator": "commands contract launch lock planning recipe report running stage store",
    "orchestrator.contract": "contexts events stage types",
    "orchestrator.launch": "environment executors lifeline schedulers",
    "orchestrator.planning": "alike content decision effects fallback fit keys misfits plan rehearsal schedule"
    " session states suggestion",
    "orchestrator.recipe": "arguments conditions expansion graph interpolation manifest node problems registry spelling"
    " validation wiring yamlsource",
    "orchestrator.report": "progress rendering reporters shown",
    "orchestrator.running": "lineage nodes records result runner signals streaming timing",
    "orchestrator.store": "artifacts hashing keeping layout locks store",
    "bigmodel": "formats publishing sources",
    "bigmodel.formats": "registry widths",
    "bigmodel.publishing": "addresses destinations",
}
"""Room → its modules that are needed to see that nothing has to run."""
NOT_NEEDED = {
    "concurrent.futures", "difflib", "html", "logging", "networkx", "numpy", "psutil", "rich", "statistics", "torch",
}  # fmt: skip
"""Of what others made, what is needed where something runs, or is wrong."""


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    folder: Path = tmp_path_factory.mktemp("startup")
    make_checkpoint(folder / "model")
    (folder / "recipe.yaml").write_text(RECIPE)
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", RUN, "run", "recipe.yaml"],
            cwd=folder, env=environment(folder), capture_output=True, text=True, check=True,
        )  # fmt: skip
    assert "[4/4] save: · cached" in done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_a_run_with_nothing_to_do_imports_the_modules_it_needs(imported: set[str]) -> None:
    needed = {f"{room}.{name}".strip(".") for room, names in ROOMS.items() for name in names.split()}
    own = {name.removeprefix("bigpipe.") for name in imported if name.startswith("bigpipe.")}
    assert own == needed | {"plugins", "bigmodel", "orchestrator", "commandline"}


def test_it_imports_nothing_of_others_that_is_needed_where_something_runs(imported: set[str]) -> None:
    assert imported & NOT_NEEDED == set()
