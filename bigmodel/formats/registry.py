"""Where formats are found: the built-in ones by name, others through the entry-point group `bigpipe.formats`.

A built-in format is imported when it is asked for, not where its name is read. Entry points are looked through only for
a name that is not built in, or where all names are listed: reading the metadata of every installed distribution costs
more than the rest of a start.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cache
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from bigpipe.errors import UsageError
from bigpipe.modules import code_files, foreign, import_attribute, top_level

if TYPE_CHECKING:
    from .format import Format, Packing

GROUP = "bigpipe.formats"
"""An entry point is named as its `Format` is, and so is the `quant_method` that its config states."""
BUILT_IN: Mapping[str, str] = {
    "int8": "bigpipe.bigmodel.formats.int8:INT8",
    "nf4": "bigpipe.bigmodel.formats.four_bit:NF4",
    "fp4": "bigpipe.bigmodel.formats.four_bit:FP4",
}
"""Name → `module:NAME` of the format."""
OPTIONS = ("llm_int8_threshold", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "bnb_4bit_quant_type")
"""What some formats have no use for."""


@cache
def offered() -> Mapping[str, Any]:
    """Return the entry points of other distributions by name; none is imported. Raise UsageError where two offer the
    same."""
    from importlib.metadata import entry_points

    found: dict[str, Any] = {}
    for entry in entry_points(group=GROUP):
        other = found.setdefault(entry.name, entry)
        if other.value != entry.value:
            cause = f"the scheme {entry.name!r} is offered by {_owner(other)} and by {_owner(entry)}"
            raise UsageError(cause, f"uninstall one, or rename the format in the entry points of {_owner(entry)}")
    return {name: entry for name, entry in found.items() if name not in BUILT_IN}


def _owner(entry: Any) -> str:
    return str(entry.dist.name if entry.dist is not None else entry.module)


def names() -> list[str]:
    """Return the names of all formats that weights can be packed in."""
    return [*BUILT_IN, *sorted(offered())]


def require_known(name: str) -> None:
    """Raise UsageError where nobody offers a format of this name."""
    if name not in BUILT_IN and name not in offered():
        raise UsageError(f"scheme {name!r} is not known", f"choose one of {', '.join(names())}")


def named(name: str) -> Format:
    """Return one of the formats that weights can be packed in. Raise UsageError for another name."""
    require_known(name)
    if name in BUILT_IN:
        built_in: Format = import_attribute(BUILT_IN[name])
        return built_in
    from .format import Format

    with foreign(f"scheme {name!r} cannot be loaded from {offered()[name].value}", "mend its distribution"):
        found = offered()[name].load()
    if not isinstance(found, Format) or found.name != name or found.packing is None:
        raise UsageError(f"{offered()[name].value} is no Format named {name} with a packing", "correct its entry point")
    return found


def distribution_of(name: str) -> str | None:
    """Return the distribution that offers a format; None for those that are built in, and for other names."""
    entry = None if name in BUILT_IN else offered().get(name)
    return _owner(entry) if entry is not None and entry.dist else None


def version_of(name: str) -> str | None:
    """Return the distribution and version that offer a format, and a digest of its source, which may be edited where it
    lies; None for those that are built in."""
    if name in BUILT_IN or (found := offered()[name].dist) is None:
        return None
    digest = sha256()
    for file, path in code_files(top_level(offered()[name].value), None):
        digest.update(f"{file}\0{sha256(path.read_bytes()).hexdigest()}\0".encode())
    return f"{found.name} {found.version} {digest.hexdigest()[:12]}"


def read_options(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return what somebody asks of a quantization with BitsAndBytesConfig's own spellings turned into ours. Raise
    ValueError where they contradict each other, and for an option that a built-in scheme has no use for."""
    from .bitsandbytes import read_pasted

    read = read_pasted(fields)
    scheme = read.get("scheme")
    if isinstance(scheme, str) and scheme in BUILT_IN and (odd := idle_options(scheme, read)):
        raise ValueError(f"{', '.join(odd)} has no meaning for scheme {scheme}; remove it")
    return read


def idle_options(scheme: str, given: Collection[str]) -> list[str]:
    """Return those of `OPTIONS` among the given that a format has no use for. It is imported."""
    return [name for name in OPTIONS if name in given and name not in packing_of(scheme).takes]


def packing_of(name: str, **options: Any) -> Packing:
    """Return how a format packs weights, with those of the options that it takes. Raise UsageError as `named`."""
    packing = named(name).packing
    assert packing is not None  # noqa: S101  see `named`
    return replace(packing, **{key: value for key, value in options.items() if key in packing.takes})  # type: ignore[type-var]
