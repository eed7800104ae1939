"""What a newcomer types, as the pages say it: a fresh clone, an environment of its own, page after page."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.hub import LoopbackHub

ROOT = Path(__file__).parents[1]
CLONE = "git clone … bigpipe"
MODELS = ("facebook/opt-125m", "facebook/opt-13b")


RUN_BY = {
    "README.md": "test_newcomer.py",
    "docs/tutorial.md": "test_newcomer.py",
    "docs/how-to/a-ci-job.md": "orchestrator/test_reviewing.py",
    "docs/how-to/a-local-checkpoint.md": "test_newcomer.py",
    "docs/how-to/a-stage-kind-of-your-own.md": "test_docs.py",
    "docs/how-to/any-tool.md": "test_examples.py",
    "docs/how-to/evaluate.md": "test_examples.py",
    "docs/how-to/check-a-pull-request.md": "test_newcomer.py",
    "docs/how-to/export.md": "orchestrator/test_exports.py",
    "docs/how-to/fall-back.md": "test_examples.py",
    "docs/how-to/finetune.md": "test_docs.py",
    "docs/how-to/free-space.md": "test_freeing.py",
    "docs/how-to/know-before-you-download.md": "test_newcomer.py",
    "docs/how-to/on-a-cluster.md": "cluster/test_ray.py",
    "docs/how-to/prove-the-origin.md": "test_examples.py",
    "docs/how-to/share-a-cache.md": "orchestrator/test_remote_s3.py",
    "docs/how-to/the-page.md": "webpage/test_how_to.py",
    "docs/how-to/track-runs.md": "orchestrator/test_sinks.py",
    "docs/how-to/without-a-recipe.md": "test_without_recipe.py",
    "docs/reference/store.md": "test_newcomer.py",
}
"""Page with commands → the test that runs them."""
NOT_RUN = {"CONTRIBUTING.md", "docs/reliability.md", "docs/installing.md"}
"""The first two run the suites themselves; the third names a registry: `test_light_install.py` installs from here."""


def test_the_commands_of_every_page_run_in_a_test() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    found = {page.relative_to(ROOT).as_posix() for page in pages if "```console\n" in page.read_text(encoding="utf-8")}
    assert found == RUN_BY.keys() | NOT_RUN
    for page, test in RUN_BY.items():
        name = page.rpartition("/")[2]
        words = (name, name.removesuffix(".md"))
        assert any(word in (ROOT / "tests" / test).read_text(encoding="utf-8") for word in words), (page, test)


def commands(page: str, language: str = "console") -> list[str]:
    """What stands behind a prompt (`$`, `laptop$`) in the blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    found = re.findall(r"^[\w-]*\$ (.+)$", "\n".join(blocks), re.MULTILINE)
    assert found, f"{page} has no commands"
    return found


def steps(page: str) -> list[str]:
    """The `run:` lines of a page's pipeline, in order."""
    found = re.findall(r"^- run: (.+)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert len(found) > 4
    return found


class Newcomer:
    """Somebody in an empty directory, with a terminal that ends at the first command that fails."""

    def __init__(self, home: Path, hub: LoopbackHub, *, pip: bool) -> None:
        self.home = home
        self.clone = home / "bigpipe"
        self.pip = pip
        """The environment is made by pip; else of links, with what is installed here."""
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
        pip_settings = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "UV_"))}
        self.environment = {
            **kept, **pip_settings, "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "HF_ENDPOINT": hub.url,
            "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip

    def types(self, *lines: str, folder: Path | None = None, fails_with: int = 0) -> str:
        """Type lines into one `bash -e`. Return what was printed."""
        activated = [". .venv/bin/activate"] if (folder or self.home) == self.clone else []
        script = "\n".join([*activated, *(self.told(line) for line in lines)])
        done = subprocess.run(
            ["bash", "-ec", script], cwd=folder or self.home, env=self.environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == fails_with, (lines, done.stdout[-2000:], done.stderr[-4000:])
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    def told(self, line: str) -> str:
        """A line as it is typed here: where the clone comes from, and, without pip, an environment that is ready."""
        if CLONE not in line:
            return line
        cloned = line.replace(CLONE, f"git clone --quiet {ROOT} bigpipe")
        return cloned if self.pip else f"{cloned}\n{sys.executable} {ROOT / 'tests/support/light.py'} .venv ."


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    files = {path.name: path for path in (ROOT / "models/quickstart").iterdir() if path.is_file()}
    with LoopbackHub() as served:
        for name in MODELS:
            served.create(name, files)
        yield served


@pytest.fixture(scope="module")
def newcomer(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Newcomer:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout of git")
    return Newcomer(tmp_path_factory.mktemp("newcomer"), hub, pip=False)


def read_the_readme(someone: Newcomer) -> None:
    """From the clone on, in one terminal."""
    shown = someone.types(*commands("README.md"))
    assert "run" in shown
    assert shown.count("· cached") >= 7, "the second time everything is"
    assert "params.scheme int8 → nf4" in shown


def do_the_tutorial(someone: Newcomer) -> None:
    """After the README, so without its clone."""
    lines = [line for line in commands("docs/tutorial.md") if CLONE not in line and line != "make quickstart"]
    shown = someone.types(*lines, folder=someone.clone)
    assert "my/opt.yaml: ok" in shown
    assert (someone.clone / "my/opt.yaml.lock").is_file()


@pytest.mark.timeout(1800)
def test_the_readme_and_the_tutorial_from_top_to_bottom(newcomer: Newcomer) -> None:
    read_the_readme(newcomer)
    do_the_tutorial(newcomer)


@pytest.fixture(scope="module")
def settled(newcomer: Newcomer) -> Newcomer:
    """Has done the tutorial; also where the test of that runs in another process."""
    if not (newcomer.clone / "my/opt.yaml.lock").exists():
        read_the_readme(newcomer)
        do_the_tutorial(newcomer)
    newcomer.types(
        "mkdir -p checkpoints recipes machines", "cp -r models/quickstart checkpoints/my-model",
        "cp my/opt.yaml recipe.yaml", "cp my/opt.yaml recipes/opt.yaml", folder=newcomer.clone,
    )  # fmt: skip
    return newcomer


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "page",
    [
        "docs/how-to/know-before-you-download.md",
        "docs/how-to/a-local-checkpoint.md",
        "docs/reference/store.md",
        "docs/how-to/check-a-pull-request.md",
    ],
)
def test_pages_after_it(page: str, settled: Newcomer) -> None:
    settled.types(*commands(page), folder=settled.clone)


@pytest.mark.timeout(900)
def test_questions_about_a_run_that_is_over(settled: Newcomer) -> None:
    page = (ROOT / "docs/how-to/watch-a-run.md").read_text(encoding="utf-8")
    table = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    asked = [line for line in re.findall(r"`(bigpipe [^`]+)`", table) if "20260103" not in line]
    assert len(asked) >= 6
    settled.types(*asked, folder=settled.clone)
    assert (settled.clone / "report.html").is_file()
    assert (settled.clone / "dist/model/config.json").is_file()


GATED = """\
version: 1
name: gated
stages:
  e:
    uses: estimate
    with: {path: ../models/quickstart, dtypes: [float32]}
    gates: ["float32.weights <= 1KiB"]
"""


@pytest.mark.timeout(900)
def test_the_pipeline_of_the_page_on_ci_under_bash_e(settled: Newcomer) -> None:
    """It passes where all is well, and fails as the run does: nothing hides the exit code."""
    lines = [line for line in steps("docs/how-to/a-ci-job.md") if not line.startswith("pip install")]
    settled.types(
        "bigpipe doctor --json > machines/gpu-box.json", "bigpipe lock recipes/opt.yaml", folder=settled.clone
    )
    settled.types("bigpipe run recipes/opt.yaml", *lines, folder=settled.clone)
    result: dict[str, Any] = json.loads((settled.clone / "result.json").read_text())
    assert (result["schema"], result["exit_code"]) == ("bigpipe.run/1", 0)
    (settled.clone / "recipes/opt.yaml").write_text(GATED)
    settled.types("bigpipe lock recipes/opt.yaml", folder=settled.clone)
    settled.types(lines[-1], "echo not reached > reached", folder=settled.clone, fails_with=3)
    assert not (settled.clone / "reached").exists()
    result = json.loads((settled.clone / "result.json").read_text())
    assert (result["exit_code"], result["errors"][0]["node"]) == (3, "e")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_same_where_pip_makes_the_environment(hub: LoopbackHub, tmp_path: Path) -> None:
    someone = Newcomer(tmp_path, hub, pip=True)
    read_the_readme(someone)
    do_the_tutorial(someone)
