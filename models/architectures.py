"""Writes the snapshot of common architectures for the installed transformers: `make snapshot`.

Each family's class is built on the meta device at several sizes, under every combination of the fields that change what
it consists of. From what is seen, formulas are found for every size (the simplest that gives all of them), and for
every part the values under which it is there. What was learnt is expanded again, by the code that reads the snapshot,
and must equal what each class built. Fields of the class's config that nothing was declared of are changed one by one,
and must change nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bigpipe.bigmodel.architecture import Architecture, Head, read_request
from bigpipe.bigmodel.architecture.instantiation import describe
from bigpipe.bigmodel.architecture.snapshot import evaluate, expand, snapshot_file
from bigpipe.versions import package_version

HEADS = (4, 6, 10, 3)
LAYERS = (2, 3, 1, 4)
HIDDEN = tuple(heads * size for heads, size in zip(HEADS, (14, 22, 34, 10), strict=True))
SIZES = {
    "hidden_size": HIDDEN, "intermediate_size": (97, 131, 53, 211), "vocab_size": (161, 173, 419, 307),
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": (2, 3, 5, 1),
    "max_position_embeddings": (127, 257, 71, 89),
}  # fmt: skip
GPT2_SIZES = {
    "n_embd": HIDDEN, "n_inner": (97, 131, 53, 211), "vocab_size": (161, 173, 419, 307), "n_layer": LAYERS,
    "n_head": HEADS, "n_positions": (127, 257, 71, 89),
}  # fmt: skip
ROPES: Mapping[str, Mapping[str, Any]] = {
    "default": {}, "linear": {"factor": 2.0}, "dynamic": {"factor": 2.0}, "yarn": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}  # fmt: skip
EITHER = (False, True)
SHARES = (1.0, 0.25, 0.2, 0.5)
Formula = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Family:
    classes: tuple[str, str]
    """With its head, and the bare model."""
    sizes: Mapping[str, Sequence[int]]
    """Field → its value in each sample."""
    shares: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """The same of fields that are fractions."""
    optional: Sequence[str] = ()
    """Sizes that a config may leave out."""
    switches: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Field → values that decide which parts there are; the first is taken where nothing is said."""
    accepted: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Field → values that make no difference. None: the field is not there."""
    rotates: bool = False
    same: Mapping[str, str] = field(default_factory=dict)
    """Field → the one that it must equal, where it is there."""
    spellings: Mapping[str, str] = field(default_factory=dict)
    blocks: Mapping[str, Formula] = field(default_factory=dict)
    """Quantities that formulas may be made of besides fields."""


def _rotating(prefix: str, **more: Any) -> Family:
    """Llama and its relatives."""
    defaults: dict[str, Any] = {
        "sizes": {**SIZES, "head_dim": (18, 8, 26, 12)},
        "optional": ("num_key_value_heads", "head_dim"),
        "accepted": {},
    }
    merged = {**defaults, **more}
    always = {"hidden_act": ("silu",), "partial_rotary_factor": (None,), "layer_types": (None,)}
    return Family(
        classes=(f"{prefix}ForCausalLM", f"{prefix}Model"), rotates=True,
        **{**merged, "accepted": {**always, **merged["accepted"]}},
    )  # fmt: skip


FAMILIES: Mapping[str, Family] = {
    "llama": _rotating(
        "Llama", switches={"tie_word_embeddings": EITHER, "attention_bias": EITHER, "mlp_bias": EITHER}
    ),
    "mistral": _rotating("Mistral", optional=("head_dim",), switches={"tie_word_embeddings": EITHER}),
    "qwen2": _rotating(
        "Qwen2", sizes=SIZES, optional=(), switches={"tie_word_embeddings": EITHER},
        accepted={"use_sliding_window": (False, None), "head_dim": (None,)},
        blocks={"head_dim": {"times": ["hidden_size"], "over": "num_attention_heads"}},
    ),
    "qwen3": _rotating(
        "Qwen3", optional=(), switches={"tie_word_embeddings": EITHER, "attention_bias": EITHER},
        accepted={"use_sliding_window": (False, None)},
    ),
    "opt": Family(
        classes=("OPTForCausalLM", "OPTModel"),
        sizes={"hidden_size": HIDDEN, "ffn_dim": (97, 131, 53, 211), "vocab_size": (161, 173, 419, 307),
               "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
               "max_position_embeddings": (127, 257, 71, 89)},
        switches={"tie_word_embeddings": (True, False), "_remove_final_layer_norm": EITHER},
        same={"word_embed_proj_dim": "hidden_size"},
        accepted={"activation_function": ("relu",), "do_layer_norm_before": (True,), "enable_bias": (True,),
                  "layer_norm_elementwise_affine": (True,)},
    ),
    "gpt2": Family(
        classes=("GPT2LMHeadModel", "GPT2Model"), sizes=GPT2_SIZES, optional=("n_inner",),
        switches={"tie_word_embeddings": (True, False)},
        accepted={"activation_function": ("gelu_new",), "add_cross_attention": (False,)},
    ),
    "bloom": Family(
        classes=("BloomForCausalLM", "BloomModel"),
        sizes={"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "vocab_size": (161, 173, 419, 307)},
        switches={"tie_word_embeddings": (True, False)},
        spellings={"hidden_size": "n_embed", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"},
    ),
    "gpt_neox": Family(
        classes=("GPTNeoXForCausalLM", "GPTNeoXModel"),
        sizes={name: values for name, values in SIZES.items() if name != "num_key_value_heads"},
        shares={"rotary_pct": SHARES}, rotates=True,
        switches={"tie_word_embeddings": EITHER, "attention_bias": (True, False)},
        accepted={"hidden_act": ("gelu",), "partial_rotary_factor": (None,)},
        blocks={"head": {"times": ["hidden_size"], "over": "num_attention_heads"},
                "rotated": {"times": ["head", "rotary_pct"]}},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """What the class builds of one config."""

    config: Mapping[str, Any]
    built: Architecture
    bare: Architecture

    @property
    def fields(self) -> dict[str, Any]:
        return {**self.built.config, **self.config}


def see(config: Mapping[str, Any]) -> Seen:
    built, bare = (_described(config, head) for head in ("auto", "none"))
    return Seen(config, built, bare)


def _described(config: Mapping[str, Any], head: Head) -> Architecture:
    return describe(read_request(config, head=head), with_cache=False)


def learn(model_type: str, family: Family) -> dict[str, Any]:
    """The family's entry in the snapshot. Raise ValueError where its classes are not as declared."""
    observations = [see(config) for config in _configs(model_type, family)]
    first = observations[0]
    quantities = _Quantities(family, observations)
    tree = _merge([_Part(seen, _nested(seen.built, "")) for seen in observations], family, quantities)
    body = next(name for name, child in tree["children"].items() if child["class"] == family.classes[1])
    tied = [seen for seen in observations if seen.built.tied]
    entry = {
        "classes": list(family.classes),
        "body": body,
        "no_split": list(first.built.no_split),
        "input_embedding": first.built.input_embedding,
        "output_embedding": first.built.output_embedding,
        "tied": [list(group) for group in tied[0].built.tied],
        "tied_if": _condition(family, observations, tied),
        "needs": [],
        "accepted": _accepted(family),
        "same": dict(family.same),
        "spellings": dict(family.spellings),
        "constants": _constants(observations) | _defaults(first, {*family.switches, *family.accepted}),
        "derived": {},
        "forced": _forced(observations),
        "quantities": dict(quantities.formulas),
        "tree": tree,
    }
    entry["derived"] = _derived(family, observations, quantities) | _left_out(model_type, family, entry)
    used = set(_names({name: entry[name] for name in ("tree", "quantities", "derived")}))
    unused = _can_be_left_out(first, set(family.sizes) - used)
    entry["needs"] = sorted(set(family.sizes) - unused.keys())
    entry["constants"] |= unused
    _verify(model_type, family, entry, observations)
    return entry


def _accepted(family: Family) -> dict[str, list[Any]]:
    ropes = {"rope_type": list(ROPES)} if family.rotates else {}
    return {name: list(values) for name, values in {**family.switches, **family.accepted, **ropes}.items()}


def _defaults(first: Seen, names: set[str]) -> dict[str, Any]:
    """What fields are where nothing is said."""
    silent = see({name: value for name, value in first.config.items() if name not in names}).built.config
    return {name: silent[name] for name in sorted(names) if _plain(silent.get(name))}


def _can_be_left_out(first: Seen, names: set[str]) -> dict[str, Any]:
    """Of sizes in no shape, those without which the class is built all the same, and what they are then."""
    found = {}
    for name in sorted(names):
        with contextlib.suppress(Exception):  # the class refuses, for example as no multiple of its default
            found |= _defaults(first, {name})
    return found


def _names(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _names(inner)


def _configs(model_type: str, family: Family) -> Iterator[dict[str, Any]]:
    """Every combination of switches, in every sample of sizes; the first is plain."""
    for values in itertools.product(*family.switches.values()):
        for sample in range(len(HEADS)):
            yield {**_sample(model_type, family, sample), **dict(zip(family.switches, values, strict=True))}


def _sample(model_type: str, family: Family, sample: int) -> dict[str, Any]:
    sizes = {name: values[sample] for name, values in {**family.sizes, **family.shares}.items()}
    plain = {name: values[0] for name, values in family.accepted.items() if values[0] is not None}
    return {"model_type": model_type, "architectures": [family.classes[0]], **plain, **sizes}


Nested = Mapping[str, Any]


def _nested(architecture: Architecture, name: str) -> Nested:
    """Modules as a tree. Of like children with numbers for names, the first stands for all."""
    module = architecture.by_name[name]
    children = {child.rpartition(".")[2]: _nested(architecture, child) for child in module.children}
    tensors = {tensor.name.rpartition(".")[2]: tensor for tensor in module.tensors}
    if children and all(child.isdecimal() for child in children):
        return {"class": module.class_name, "count": len(children), "children": {"0": children["0"]}, "tensors": {}}
    return {"class": module.class_name, "children": children, "tensors": tensors}


@dataclass(frozen=True)
class _Part:
    seen: Seen
    node: Nested


def _merge(parts: Sequence[_Part], family: Family, quantities: _Quantities) -> dict[str, Any]:
    """One node that stands for what all these configs build at its place."""
    classes = {part.node["class"] for part in parts}
    if len(classes) != 1:
        raise ValueError(f"one place holds {classes}")
    node: dict[str, Any] = {"class": classes.pop()}
    fullest = max(parts, key=lambda part: len(part.node["tensors"]) + len(part.node["children"])).node
    if fullest["tensors"]:
        node["tensors"] = [_merge_tensor(name, parts, family, quantities) for name in fullest["tensors"]]
    if "count" in fullest:
        counts = [(part.seen, part.node["count"]) for part in parts]
        children = [_Part(part.seen, part.node["children"]["0"]) for part in parts]
        return {**node, "repeat": quantities.of(counts), "child": _merge(children, family, quantities)}
    if fullest["children"]:
        node["children"] = {name: _merge_child(name, parts, family, quantities) for name in fullest["children"]}
    return node


def _merge_child(name: str, parts: Sequence[_Part], family: Family, quantities: _Quantities) -> dict[str, Any]:
    there = [part for part in parts if name in part.node["children"]]
    merged = _merge([_Part(part.seen, part.node["children"][name]) for part in there], family, quantities)
    condition = _condition(family, [part.seen for part in parts], [part.seen for part in there])
    return {**merged, **({"if": condition} if condition else {})}


def _merge_tensor(name: str, parts: Sequence[_Part], family: Family, quantities: _Quantities) -> dict[str, Any]:
    there = [(part.seen, part.node["tensors"][name]) for part in parts if name in part.node["tensors"]]
    first = there[0][1]
    shape = [quantities.of([(seen, spec.shape[axis]) for seen, spec in there]) for axis in range(len(first.shape))]
    entry: dict[str, Any] = {"name": name, "shape": shape, "dtype": first.dtype}
    if first.buffer:
        entry |= {"buffer": True, "persistent": first.persistent, "fixed": first.fixed}
    condition = _condition(family, [part.seen for part in parts], [seen for seen, _ in there])
    return {**entry, **({"if": condition} if condition else {})}


def _condition(family: Family, among: Sequence[Seen], there: Sequence[Seen]) -> dict[str, list[Any]]:
    """The values of switches under which a part is there; each switch decides for itself, or `_verify` fails."""
    condition = {}
    for name in family.switches:
        present = list(dict.fromkeys(seen.config[name] for seen in there))
        if len(present) < len({seen.config[name] for seen in among}):
            condition[name] = present
    return condition


class _Quantities:
    """Formulas for sizes: the simplest that gives every size that was seen."""

    def __init__(self, family: Family, observations: Sequence[Seen]) -> None:
        self.formulas: dict[str, Formula] = dict(family.blocks)
        self.names = [*family.sizes, *family.blocks]
        self._known: dict[tuple[int, ...], str] = {}
        self._fields = {id(seen): self._with_blocks(seen.fields) for seen in observations}

    def _with_blocks(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        complete = dict(fields)
        for name, formula in self.formulas.items():
            complete[name] = evaluate(formula, complete)
        return complete

    def of(self, sizes: Sequence[tuple[Seen, int]]) -> str:
        """The name of a field, or of a formula that is noted."""
        known = [name for name in self.names if self._gives({"times": [name]}, sizes)]
        if known:
            return known[0]
        found = next((entry for entry in self._candidates() if self._gives(entry[1], sizes)), None)
        if found is None:
            seen, size = sizes[0]
            fields = {name: self._fields[id(seen)].get(name) for name in self.names}
            raise ValueError(f"no formula gives {size} of {fields}: declare a field or a block")
        name, formula = found
        self.formulas[name] = formula
        return name

    def _gives(self, formula: Formula, sizes: Sequence[tuple[Seen, int]]) -> bool:
        return all(evaluate(formula, self._fields[id(seen)]) == size for seen, size in sizes)

    def _candidates(self) -> Iterator[tuple[str, Formula]]:
        for name, number in itertools.product(self.names, (2, 3, 4)):
            yield f"{number} * {name}", {"times": [number, name]}
        for name, number in itertools.product(self.names, (1, 2)):
            yield f"{name} + {number}", {"times": [name], "plus": number}
        for name in self.names:
            yield f"{name} / 2, rounded up", {"times": [name], "over": 2, "up": True}
        for one, other in itertools.combinations(self.names, 2):
            yield f"{one} * {other}", {"times": [one, other]}
        for one, other in itertools.permutations(self.names, 2):
            yield f"{one} / {other}", {"times": [one], "over": other}


NOT_OF_THE_CLASS = {"architectures", "model_type", "transformers_version", "_name_or_path"}


def _plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def _added(observations: Sequence[Seen]) -> dict[str, list[Any]]:
    """Field that the class's config adds → its values."""
    first = observations[0]
    names = first.built.config.keys() - first.config.keys() - NOT_OF_THE_CLASS
    return {name: [seen.built.config.get(name) for seen in observations] for name in sorted(names)}


def _constants(observations: Sequence[Seen]) -> dict[str, Any]:
    added = _added(observations).items()
    return {name: values[0] for name, values in added if _plain(values[0]) and len(set(map(repr, values))) == 1}


def _derived(family: Family, observations: Sequence[Seen], quantities: _Quantities) -> dict[str, Formula]:
    added = _added(observations).items()
    varying = {name: values for name, values in added if _plain(values[0]) and len(set(map(repr, values))) > 1}
    return {
        name: _formula(quantities, list(zip(observations, values, strict=True))) for name, values in varying.items()
    }


def _formula(quantities: _Quantities, sizes: Sequence[tuple[Seen, int]]) -> Formula:
    before = set(quantities.formulas)
    name = quantities.of(sizes)
    formula = quantities.formulas.get(name, {"times": [name]})
    if name not in before:
        quantities.formulas.pop(name, None)
    return formula


def _forced(observations: Sequence[Seen]) -> dict[str, Any]:
    """Fields that the class's config sets whatever is written: seen by writing something."""
    first = observations[0]
    written = see({**first.config, "sliding_window": 16})
    window = written.built.config.get("sliding_window", 16)
    return {} if window == 16 else {"sliding_window": window}


def _left_out(model_type: str, family: Family, entry: Mapping[str, Any]) -> dict[str, Formula]:
    """What an optional size is where it is left out: as the class's config says, else as shapes show."""
    found = {}
    for name in family.optional:
        samples = [_sample(model_type, family, number) for number in range(len(HEADS))]
        observations = [see({key: value for key, value in sample.items() if key != name}) for sample in samples]
        values = [seen.built.config.get(name) or _from_shapes(name, entry["tree"], seen) for seen in observations]
        smaller = replace(family, sizes={key: values for key, values in family.sizes.items() if key != name})
        found[name] = _formula(_Quantities(smaller, observations), list(zip(observations, values, strict=True)))
    return found


def _from_shapes(name: str, tree: Mapping[str, Any], seen: Seen) -> int:
    """The size of a tensor's axis that is this field alone."""
    path, axis = next(_uses(name, tree, ""))
    return next(t.shape[axis] for module in seen.built.modules for t in module.tensors if t.name == path)


def _uses(name: str, node: Mapping[str, Any], path: str) -> Iterator[tuple[str, int]]:
    for tensor in node.get("tensors", ()):
        yield from ((path + tensor["name"], axis) for axis, size in enumerate(tensor["shape"]) if size == name)
    children = {"0": node["child"]} if "repeat" in node else node.get("children", {})
    for child, inner in children.items():
        yield from _uses(name, inner, f"{path}{child}.")


def _verify(model_type: str, family: Family, entry: Mapping[str, Any], observations: Sequence[Seen]) -> None:
    """What was learnt gives what each class built; and what nothing was declared of makes no difference."""
    plain = observations[0].config
    others = [*_respelled(plain, family), *_rotated(plain, family), *_with_values(plain, family)]
    for seen in [*observations, *map(see, others)]:
        for head, real in (("auto", seen.built), ("none", seen.bare)):
            ours = expand(entry, seen.config, head)
            if replace(ours, config={}) != replace(real, config={}):
                raise ValueError(f"{model_type}: the class builds another model of {seen.config}, head {head}")
            told = {name: value for name, value in real.config.items() if value is not None}
            wrong = {name for name, value in ours.config.items() if _plain(value) and value != told.get(name, value)}
            if wrong:
                raise ValueError(f"{model_type}: the class's config says otherwise of {wrong}, given {seen.config}")
    _verify_indifferent(observations[0], family)


def _respelled(plain: Mapping[str, Any], family: Family) -> Iterator[dict[str, Any]]:
    for name, other in family.spellings.items():
        yield {**{key: value for key, value in plain.items() if key != name}, other: plain[name]}
    for name in family.optional:
        yield {key: value for key, value in plain.items() if key != name}
        yield {**plain, name: None}
    yield {key: value for key, value in plain.items() if key != "architectures"}
    yield {**plain, "architectures": [family.classes[1]]}


def _rotated(plain: Mapping[str, Any], family: Family) -> Iterator[dict[str, Any]]:
    for name, settings in ROPES.items() if family.rotates else ():
        yield {**plain, "rope_parameters": {"rope_type": name, "rope_theta": 10000.0, **settings}}
        yield {**plain, "rope_scaling": {"rope_type": name, **settings}}
        yield {**plain, "rope_scaling": {"type": name, **settings}}


def _with_values(plain: Mapping[str, Any], family: Family) -> Iterator[dict[str, Any]]:
    for name, values in family.accepted.items():
        yield from ({**plain, name: value} for value in values if value is not None)
    silent = {*family.switches, *family.accepted}
    yield {name: value for name, value in plain.items() if name not in silent}
    yield from ({**plain, name: plain[other]} for name, other in family.same.items())


def _verify_indifferent(seen: Seen, family: Family) -> None:
    declared = {*family.sizes, *family.shares, *family.switches, *family.accepted, *family.same}
    aliases = {name for name, value in seen.built.config.items() if value in seen.config.values()}
    for name in sorted(seen.built.config.keys() - declared - aliases - NOT_OF_THE_CLASS):
        value = seen.built.config[name]
        other = {bool: not value, int: 7, float: 0.5, type(None): 7}.get(type(value))
        if other is None:
            continue
        try:
            changed = _described({**seen.config, name: other}, "auto")
        except Exception:  # noqa: S112  the class refuses the value, and says why to whoever gives it
            continue
        if replace(changed, config={}) != replace(seen.built, config={}):
            raise ValueError(f"{name} changes what is built: declare it among switches")


def main() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    version = package_version("transformers") or ""
    learnt = {model_type: learn(model_type, family) for model_type, family in FAMILIES.items()}
    file = snapshot_file(version)
    file.write_text(json.dumps({"transformers": version, "families": learnt}, indent=1) + "\n")
    print(f"{file.name}: {len(learnt)} families")


if __name__ == "__main__":
    main()
