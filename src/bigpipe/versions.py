"""Versions of distributions: in keys, in records, and in what is remembered of a class; and what is missing here.

bigpipe is installed with what runs models (the extra `run`) or without. Without, it validates, plans, sizes and locks
as if the versions were there that it is tested with.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache, lru_cache
from pathlib import Path

from bigpipe.errors import UsageError

RUN = ("accelerate", "bitsandbytes", "tokenizers", "torch", "transformers")
"""What the extra `run` brings."""
INSTALL_RUN = "pip install 'bigpipe-ml[run]'"
INSTALL_GPU = "pip install 'bigpipe-ml[gpu]'"
_NOTED = re.compile(r"\.dist-info/|\.pyc,")
"""In a line of a RECORD (https://packaging.python.org/specifications/recording-installed-packages): a file that differs
from one machine to another."""
TESTED = Path(__file__).with_name("constraints.txt")


@cache
def package_version(name: str) -> str | None:
    """None where there is no such distribution."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        found = distribution(name)
    except PackageNotFoundError:
        return None
    # `found.version` parses all of the metadata, the whole README among it
    written = re.search(r"^Version: (\S+)$", found.read_text("METADATA") or "", re.MULTILINE)
    return written[1] if written else found.version


@cache
def planned_version(name: str) -> str | None:
    """Return the version of a distribution that a plan counts with: what is installed here, else, of what runs models,
    the one that bigpipe is tested with. None: neither."""
    return package_version(name) or (_tested().get(name) if name in RUN else None)


def brought_by(top: str, folder: Path) -> dict[str, str]:
    """Return the distributions installed in a folder to which a top-level module belongs: name → version, and a digest
    of all files that they brought, data and compiled ones among them."""
    return _brought_by(top, str(folder), folder.stat().st_mtime_ns)


@lru_cache(256)
def _brought_by(top: str, folder: str, changed: int) -> dict[str, str]:
    from hashlib import sha256
    from importlib.metadata import distributions

    found = {}
    for each in distributions(path=[folder]):
        lines = sorted((each.read_text("RECORD") or "").splitlines())
        if any(line.startswith((f"{top}/", f"{top}.")) for line in lines):
            own = [line for line in lines if not line.startswith("..") and not _NOTED.search(line)]
            found[each.name] = f"{each.version} {sha256(chr(10).join(own).encode()).hexdigest()}"
    return found


def requirement(name: str) -> str:
    """Return what pip installs of a distribution: the version that is here; of what bigpipe is tested with, the one
    that goes with bigpipe."""
    version = package_version(name)
    return name if version is None or name in _tested() else f"{name}=={version.partition('+')[0]}"


@cache
def _tested() -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", TESTED.read_text("utf-8"), re.MULTILINE))


def missing(names: Iterable[str]) -> list[str]:
    """Return those of `names` that run models and are not installed here."""
    return [name for name in names if name in RUN and package_version(name) is None]


def bars(packages: Iterable[str]) -> list[str]:
    """Return which of the packages that a kind names keep it from running here. Kinds that compute name torch; others
    need what they name for models that no snapshot knows, and then say so themselves."""
    lacking = missing(packages)
    return lacking if "torch" in lacking else []


def not_installed(what: str, names: Iterable[str]) -> UsageError:
    """Return the error where `what` needs distributions that are not installed here."""
    return UsageError(f"{what} needs {', '.join(names)}, not installed here", INSTALL_RUN)


def require(what: str, *names: str) -> None:
    """Raise UsageError where `what` needs some of these, and they are not installed here."""
    if lacking := missing(names):
        raise not_installed(what, lacking)


def lacks(error: BaseException) -> UsageError | None:
    """Return the error for the user where an import failed for want of what runs models; None where it did not."""
    name = (getattr(error, "name", None) or "").partition(".")[0] if isinstance(error, ImportError) else ""
    return not_installed("this", [name]) if missing([name]) else None


def __getattr__(name: str) -> str:
    """`__version__` is bigpipe's own; looked up when it is asked for."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return package_version("bigpipe-ml") or "0"
