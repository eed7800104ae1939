"""Architectures of common families without a child process: expanded from a snapshot of their classes.

`models/architectures.py` builds the classes of the installed transformers at several sizes, learns from them what
depends on which field of the config, and writes one file per version into `snapshots/`. What it holds per family:

    needs       fields that must be there, as positive integers
    accepted    field → the values under which the class was seen; any other value is left to the class itself
    same        field → the one that it equals, where it is there
    spellings   field → another name for it
    constants   what the class's config says besides; derived: what it computes of other fields; forced: what it
                says whatever is written
    quantities  name → formula over fields and earlier quantities; the sizes in shapes are such names
    tree        modules from the root down: class, children, tensors; `repeat` is the number of like children, and
                `if` the values of fields under which a part is there
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from bigpipe.versions import planned_version

from .structure import Architecture, Head, ModuleSpec, TensorSpec

FOLDER = Path(__file__).parent / "snapshots"
MOST_LAYERS = 4096
"""More would fill this process's memory."""

TOKENS = frozenset({"bos_token_id", "eos_token_id", "pad_token_id"})
NULLABLE = frozenset({"sliding_window"})
"""Fields with a default that may be null all the same."""
NAMED = dict.fromkeys(("dtype", "torch_dtype"), frozenset({"float64", "float32", "float16", "bfloat16", "auto"}))
ROPE_NUMBERS = {
    "default": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""How positions are rotated → the numbers it needs."""

Family = Mapping[str, Any]
Fields = Mapping[str, Any]


def known_architecture(config: Mapping[str, Any], head: Head = "auto") -> Architecture | None:
    """Return the architecture of a plain config of a family in the snapshot, without `cache`; else None."""
    return _known(json.dumps(config), head) if str(config.get("model_type")) in families() else None


@lru_cache(maxsize=4)
def _known(config: str, head: Head) -> Architecture | None:
    """An index and the estimate after it ask the same."""
    data = json.loads(config)
    try:
        return expand(families()[data["model_type"]], data, head)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError):
        return None  # a field is missing or odd: the class knows its defaults and its errors


@cache
def families() -> Mapping[str, Family]:
    """Return model type → family of the transformers planned with; empty where there is no snapshot of its version."""
    file = snapshot_file(planned_version("transformers") or "")
    found: dict[str, Family] = json.loads(file.read_bytes())["families"] if file.is_file() else {}
    return found


def snapshot_file(version: str) -> Path:
    """Of a transformers version. Patch releases change no architecture."""
    return FOLDER / f"transformers-{'.'.join(version.split('.')[:2])}.json"


def missing_snapshot(model_type: object) -> str | None:
    """Return a sentence where a family is in a snapshot, but not in one of the installed transformers."""
    others = sorted(FOLDER.glob("transformers-*.json"))
    if families() or not any(model_type in json.loads(file.read_bytes())["families"] for file in others):
        return None
    made = ", ".join(file.stem.removeprefix("transformers-") for file in others)
    return (
        f"transformers {planned_version('transformers')} has no snapshot of common architectures (there are {made}), "
        "so a child process builds the class, which takes seconds"
    )


def expand(family: Family, config: Mapping[str, Any], head: Head) -> Architecture:
    """Return what the class of a family builds from `config`. Raise KeyError, TypeError, ValueError or
    ZeroDivisionError for a config that the snapshot says nothing of."""
    with_head, bare_class = family["classes"]
    named = config.get("architectures") or [with_head]
    if len(named) != 1 or named[0] not in family["classes"]:
        raise ValueError(f"class {named} is not one of {family['classes']}")
    complete = _complete(family, config)
    fields = dict(complete)
    for name, formula in family["quantities"].items():
        fields[name] = evaluate(formula, fields)
    bare = head == "none" or named[0] == bare_class
    body = family["body"]
    root = family["tree"]["children"][body] if bare else family["tree"]
    modules = tuple(_modules(root, "", fields))
    embedding = family["input_embedding"]
    return Architecture(
        class_name=modules[0].class_name,
        modules=modules,
        no_split=tuple(family["no_split"]),
        tied=tuple(map(tuple, family["tied"])) if not bare and _holds(family["tied_if"], fields) else (),
        output_embedding=None if bare else family["output_embedding"],
        input_embedding=embedding.removeprefix(f"{body}.") if bare else embedding,
        config=complete,
        generates=True,
    )


def _complete(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with what its class adds."""
    fields = {**family["constants"], **config}
    for name, other in family["spellings"].items():
        if fields.get(name) is None:
            fields[name] = fields.get(other)
    _check_types(family["constants"], config)
    seen = {**fields, "rope_type": rope_type(config)}
    for name, values in family["accepted"].items():
        if seen.get(name) not in values:
            raise ValueError(f"{name} is {seen.get(name)!r}, and the class was seen under {values}")
    for name, other in family["same"].items():
        if fields.get(name, fields[other]) != fields[other]:
            raise ValueError(f"{name} is not {other}")
    for name, formula in family["derived"].items():
        if fields.get(name) is None:
            fields[name] = evaluate(formula, fields)
    for name in family["needs"]:
        if type(fields[name]) is not int or fields[name] <= 0:
            raise ValueError(f"{name} is {fields[name]!r}")
    return {**fields, **family["forced"]}


def _check_types(constants: Fields, config: Fields) -> None:
    """Raise ValueError for a value that is not of its field's type: what comes of it, the class knows."""
    for name, value in config.items():
        default = constants.get(name, value)
        if name in TOKENS:
            tokens = value if isinstance(value, list) and name == "eos_token_id" else [value]
            right = all(token is None or (type(token) is int and token < config["vocab_size"]) for token in tokens)
        elif name in NAMED:
            right = value is None or value in NAMED[name]
        else:
            right = type(value) is type(default) or (value is None and name in NULLABLE)
        if not right or (name in ("id2label", "label2id") and not isinstance(value, dict)):
            raise ValueError(f"{name} is {value!r}")
    width = config.get("hidden_size") or config.get("n_embd")
    if width and width % (config.get("num_attention_heads") or config.get("n_head") or 1):
        raise ValueError(f"{width} is not a multiple of the heads")


def rope_type(config: Mapping[str, Any]) -> str:
    """Return how positions are rotated. Raise ValueError where layers differ in it, only a part is rotated, or a number
    is missing."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = str(scaling.get("rope_type", scaling.get("type", "default")))
    numbers = {name: value for name, value in scaling.items() if name not in ("rope_type", "type")}
    numbers["rope_theta"] = scaling.get("rope_theta", config.get("rope_theta", 1.0))
    if "partial_rotary_factor" in scaling or not all(type(number) in (int, float) for number in numbers.values()):
        raise ValueError("rotation that differs from the plain one")
    if missing := [name for name in ROPE_NUMBERS.get(kind, ("factor",)) if name not in numbers]:
        raise ValueError(f"{kind} has no {missing[0]}")
    return kind


def evaluate(formula: Mapping[str, Any], fields: Fields) -> int:
    """Return the product of `times` (fields and numbers), divided by `over` and rounded down or `up`, plus `plus`."""
    value: Any = 1
    for factor in formula["times"]:
        value = value * (fields[factor] if isinstance(factor, str) else factor)
    over = formula.get("over", 1)
    over = fields[over] if isinstance(over, str) else over
    return int(-(-value // over) if formula.get("up") else value // over) + int(formula.get("plus", 0))


def _holds(condition: Mapping[str, Any], fields: Fields) -> bool:
    return not condition or all(fields.get(name) in values for name, values in condition.items())


def _modules(node: Mapping[str, Any], name: str, fields: Fields) -> Iterator[ModuleSpec]:
    prefix = f"{name}." if name else ""
    children = _children(node, fields)
    yield ModuleSpec(
        name=name,
        class_name=node["class"],
        children=tuple(prefix + child for child, _ in children),
        tensors=tuple(
            _tensor(entry, prefix, fields) for entry in node.get("tensors", ()) if _holds(entry.get("if", {}), fields)
        ),
        linear=node["class"] in ("Linear", "Conv1D"),
    )
    for child, inner in children:
        yield from _modules(inner, prefix + child, fields)


def _children(node: Mapping[str, Any], fields: Fields) -> list[tuple[str, Mapping[str, Any]]]:
    if "repeat" in node:
        count = fields[node["repeat"]]
        if count > MOST_LAYERS:
            raise ValueError(f"{count} layers would fill this process's memory")
        return [(str(index), node["child"]) for index in range(count)]
    return [(name, child) for name, child in node.get("children", {}).items() if _holds(child.get("if", {}), fields)]


def _tensor(entry: Mapping[str, Any], prefix: str, fields: Fields) -> TensorSpec:
    shape = tuple(fields[size] for size in entry["shape"])
    own = (True, entry["persistent"], entry["fixed"]) if entry.get("buffer") else ()
    return TensorSpec(prefix + entry["name"], shape, entry["dtype"], *own)
