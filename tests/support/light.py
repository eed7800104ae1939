"""Environments as `pip install bigpipe-ml` makes them, with extras or without: of links to what is installed here.

python tests/support/light.py .venv .    # as `make` makes it in a clone, without pip
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def required(extras: Iterable[str] = ()) -> list[str]:
    """What pyproject.toml asks for, with these extras."""
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    further = [each for name in extras for each in project["optional-dependencies"][name]]
    return [*project["dependencies"], *further]


def closure(requirements: Iterable[str]) -> dict[str, Distribution]:
    """All distributions that pip would install for these, of those that are installed here."""
    found: dict[str, Distribution] = {}
    waiting = [Requirement(each) for each in requirements]
    while waiting:
        asked = waiting.pop()
        applies = asked.marker is None or any(asked.marker.evaluate({"extra": e}) for e in ("", *asked.extras))
        try:
            here = distribution(asked.name) if applies and asked.name not in found else None
        except PackageNotFoundError:
            continue
        if here is not None:
            found[asked.name] = here
            waiting += [Requirement(each) for each in here.requires or () if "extra ==" not in each]
    return found


def _top_level(found: Distribution) -> Iterator[Path]:
    """The directories and files that a distribution has beside others' in site-packages."""
    names = {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}
    return (Path(str(found.locate_file(name))) for name in sorted(names))


def make_environment(folder: Path, extras: Iterable[str] = (), source: Path = ROOT) -> Path:
    """Make one in `folder`, in a second, without pip. source: the checkout whose bigpipe it has. Return its `bin`,
    which holds `python` and `bigpipe`."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for found in closure(required(extras)).values():
        for path in _top_level(found):
            if not (site / path.name).exists():
                (site / path.name).symlink_to(path)
    own = Path(str(distribution("bigpipe-ml").locate_file("")))
    for information in own.glob("bigpipe_ml-*.dist-info"):
        (site / information.name).symlink_to(information)
    (site / "bigpipe.pth").write_text(f"{source / 'src'}\n")
    command = folder / "bin/bigpipe"
    command.write_text(f"#!{folder / 'bin/python'}\nfrom bigpipe.__main__ import main\nmain()\n")
    command.chmod(0o755)
    return command.parent


if __name__ == "__main__":
    environment, checkout = (Path(given).absolute() for given in sys.argv[1:])
    make_environment(environment, ["run"], checkout)
    (environment / ".ready").touch()
