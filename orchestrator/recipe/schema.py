"""The JSON schema of a manifest, for editors: completion and checks of `with:` per stage kind.

Written for draft 7, which yaml-language-server follows: `$ref` has no siblings, kinds are told apart by `if`/`then`.
A reference `${…}` is accepted wherever a value may stand. What relates one field to another (exactly one of `repo` and
`path`, ports that fit) is left to `bigpipe validate`.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from bigpipe.orchestrator.contract import Choices, Port, Stage
from bigpipe.orchestrator.launch import executor
from bigpipe.orchestrator.sinks import SINKS

from .manifest import NAME, ManifestSpec, NodeSettings, Structure
from .registry import load_stage, named_stage, stage_kinds
from .validation import models_in
from .wiring import DEFAULT_PORT

if TYPE_CHECKING:
    from .graph import Recipe

Schema = dict[str, Any]

REFERENCE: Schema = {"$ref": "#/definitions/reference"}

REFERENCE_TO_CODE = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"

_ANNOTATIONS = ("description", "default", "examples")
_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
"""What pydantic leaves in its own words where a field may also be null."""
_NODE: Schema = {"$ref": "#/definitions/node"}
_RESTRICTIONS = ("enum", "const", "pattern", "format")


def manifest_schema(stages: Mapping[str, Stage[Any]] | None = None, *, more: Iterable[str] = ()) -> Schema:
    """Return the schema over `stages`, by default all registered kinds and `more`, each `module:STAGE`. JSON-ready."""
    if stages is None:
        stages = {name: load_stage(name) for name in stage_kinds()} | {name: named_stage(name) for name in more}
    definitions: dict[str, Schema] = {
        "reference": {"type": "string", "pattern": r"\$\{.+\}", "description": "${params.x}, ${matrix.x} or ${env.X}"},
        "node": {
            "type": "string",
            "pattern": rf"^{NAME.pattern}(@.+)?$|\$\{{.+\}}",
            "description": "A stage, or one of its variants.",
        },
    }
    top = _model_schema(ManifestSpec, "manifest", definitions, references=False)
    top["properties"]["version"] = {"const": 1, "description": "The manifest format."}
    top["properties"]["params"]["propertyNames"] = {"pattern": f"^{NAME.pattern}$"}
    top["properties"]["sinks"]["items"] = {"enum": list(SINKS)}
    top["properties"]["stages"] = {
        "type": "object",
        "minProperties": 1,
        "propertyNames": {"pattern": f"^{NAME.pattern}$"},
        "additionalProperties": {"$ref": "#/definitions/stage"},
        "description": "The stages, by name; each uses a kind and takes other stages as inputs.",
    }
    definitions["stage"] = _stage_schema(stages, definitions)
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "bigpipe manifest",
        **top,
        "patternProperties": {"^x-": {}},
        "definitions": dict(sorted(definitions.items())),
    }


def recipe_schema(recipe: Recipe) -> Schema:
    """Return the schema with the kinds of a recipe's own modules, and with the names of its nodes and parameters, which
    an editor then offers. Others are no mistake: a recipe grows after its schema was made. JSON-ready."""
    nodes = recipe.nodes.values()
    installed = {name: load_stage(name) for name in stage_kinds()}
    own = {node.location: node.kind for node in nodes if node.kind.kind not in installed}
    schema = manifest_schema(installed | own)
    names = dict.fromkeys(name for node in nodes for name in (node.stage, node.name))
    axes = dict.fromkeys(axis for node in nodes for axis in node.variant)
    references = [*(f"${{params.{name}}}" for name in recipe.params), *(f"${{matrix.{axis}}}" for axis in axes)]
    for definition, offered in (("node", list(names)), ("reference", references)):
        plain = schema["definitions"][definition]
        if offered:
            schema["definitions"][definition] = {"anyOf": [{"enum": offered}, plain]}
    return schema


def _stage_schema(kinds: Mapping[str, Stage[Any]], definitions: dict[str, Schema]) -> Schema:
    structure = _model_schema(Structure, "stage", definitions)
    settings = _model_schema(NodeSettings, "stage", definitions)
    properties = {name: _open(schema) for name, schema in (structure["properties"] | settings["properties"]).items()}
    properties["needs"]["anyOf"][0]["items"] = _NODE
    first = definitions["stage.FirstSpec"]["properties"]
    first["of"] = _named(first["of"]["description"])
    properties["uses"] = {
        "description": "The stage kind: a name, or `module:STAGE` of a module under `trust`.",
        # Not by `if`: an editor that has no value yet offers none of what stands under `else`.
        "anyOf": [
            {"enum": list(kinds), "enumDescriptions": [kind.title for kind in kinds.values()]},
            {"type": "string", "pattern": REFERENCE_TO_CODE},
        ],
    }
    return {
        "type": "object",
        "required": ["uses"],
        "additionalProperties": False,
        "properties": properties,
        "allOf": [
            {
                "if": {"required": ["uses"], "properties": {"uses": {"const": name}}},
                "then": _kind_schema(name, kind, definitions),
            }
            for name, kind in kinds.items()
        ],
    }


def _kind_schema(name: str, kind: Stage[Any], definitions: dict[str, Schema]) -> Schema:
    params = _model_schema(kind.params, name, definitions)
    cases = [case for each in kind.choices for case in _choices_schema(name, each, definitions)]
    definitions[name] = {**params, "allOf": cases} if cases else params
    # Not `anyOf`: an editor then names the wrong field rather than "no choice fits".
    note = f"The fields of {name}."
    fields: Schema = {
        "description": note,
        "if": {"type": "string"},
        "then": REFERENCE,
        "else": {"$ref": f"#/definitions/{name}"},
    }
    properties: dict[str, Schema | bool] = {"with": fields}
    properties["inputs"] = _ports_schema(kind) if kind.inputs or kind.open_ports else False
    if not executor(kind.runs_in).takes_launch:
        properties["launch"] = False
    required = [
        key
        for key, needed in (("with", params.get("required")), ("inputs", _needed(kind) or kind.needs_input))
        if needed
    ]
    return {"properties": properties, **({"required": required} if required else {})}


def _choices_schema(kind: str, choices: Choices, definitions: dict[str, Schema]) -> list[Schema]:
    cases: list[Schema] = []
    for name, model in choices.models().items():
        held = _open(_model_schema(model, f"{kind}.{name}", definitions))
        case: Schema = {"required": [choices.field], "properties": {choices.field: {"const": name}}}
        held = {"description": f"What {name} takes.", **held}
        cases.append({"if": case, "then": {"properties": {choices.decides: held}}})
    return cases


def _needed(kind: Stage[Any]) -> list[str]:
    return [name for name, port in kind.inputs.items() if not port.optional]


def _named(description: str) -> Schema:
    return {"allOf": [_NODE], "description": description}  # siblings of `$ref` are ignored in draft 7


def _port_schema(port: Port) -> Schema:
    if not port.many:
        return _named(f"A stage whose artifact is: {port.told}.")
    return {
        "anyOf": [_NODE, {"type": "array", "items": _NODE}],
        "description": f"A stage whose artifact is: {port.told}; a list gathers every variant.",
    }


def _ports_schema(kind: Stage[Any]) -> Schema:
    ports: dict[str, Schema] = {}
    for name, port in kind.inputs.items():
        ports[name] = _port_schema(port)
    others: Schema | bool = _port_schema(kind.open_ports) if kind.open_ports else False
    whole: Schema = {"type": "object", "additionalProperties": others, "properties": ports, "required": _needed(kind)}
    if kind.needs_input:
        whole["minProperties"] = 1
    short = (
        _NODE if (DEFAULT_PORT in ports or kind.open_ports) and not set(_needed(kind)) - {DEFAULT_PORT} else REFERENCE
    )
    return {"anyOf": [short, whole], "description": "The stages that it takes artifacts of, by port."}


def _model_schema(
    model: type[BaseModel], prefix: str, definitions: dict[str, Schema], *, references: bool = True
) -> Schema:
    """The model's own schema, opened to references; the models inside it go to `definitions` as `PREFIX.Name`."""
    schema = described_schema(model, f"#/definitions/{prefix}.{{model}}")
    for name, inner in schema.pop("$defs", {}).items():
        definitions[f"{prefix}.{name}"] = _inside(inner, references)
    return _inside(schema, references)


def described_schema(model: type[BaseModel], template: str = "#/$defs/{model}") -> Schema:
    """Return the model's own schema, each field with its docstring. template: how it refers to the models inside it."""
    described = _descriptions(model)
    schema = model.model_json_schema(ref_template=template)
    for name, inner in [(model.__name__, schema), *schema.get("$defs", {}).items()]:
        properties = inner.get("properties", {})
        for field in described.get(name, {}).keys() & properties.keys():
            properties[field].setdefault("description", described[name][field])
    return schema


def _descriptions(model: type[BaseModel], seen: frozenset[type[BaseModel]] = frozenset()) -> dict[str, dict[str, str]]:
    result = {model.__name__: field_descriptions(model)}
    for info in model.model_fields.values():
        for inner in models_in(info.annotation) - seen - {model}:
            result |= _descriptions(inner, seen | {model})
    return result


def _open(schema: Schema) -> Schema:
    if _takes_any_text(schema):
        return schema
    outside = {key: schema[key] for key in _ANNOTATIONS if key in schema}
    inside = {key: value for key, value in schema.items() if key not in _ANNOTATIONS}
    choices = inside["anyOf"] if set(inside) == {"anyOf"} else [inside]
    return {**outside, "anyOf": [*choices, REFERENCE]}


def _takes_any_text(schema: Schema) -> bool:
    if any(key in schema for key in _RESTRICTIONS) or "$ref" in schema:
        return False
    if any(_takes_any_text(choice) for choice in schema.get("anyOf", ())):
        return True
    kind = schema.get("type")
    return kind == "string" or (isinstance(kind, list) and "string" in kind) or not set(schema) - set(_ANNOTATIONS)


def _inside(schema: Schema, references: bool = True) -> Schema:
    """The schema with every value below it opened to references, without pydantic's titles and empty defaults."""

    def below(child: Schema) -> Schema:
        child = _inside(child, references)
        return _open(child) if references else child

    result: Schema = {}
    for key, value in schema.items():
        if key == "properties":
            result[key] = {name: below(child) for name, child in value.items()}
        elif key in ("items", "additionalProperties") and isinstance(value, dict):
            result[key] = below(value)
        elif key in ("anyOf", "oneOf", "allOf"):
            # A reference may satisfy several choices at once, which `oneOf` would refuse.
            result["anyOf" if key == "oneOf" else key] = [_inside(choice, references) for choice in value]
        elif key == "prefixItems":
            result["items"] = [below(child) for child in value]
        elif not _dropped(key, value):
            result[_BOUNDS.get(key, key)] = value
    if "$ref" in result and len(result) > 1:  # siblings of `$ref` are ignored in draft 7
        result["allOf"] = [{"$ref": result.pop("$ref")}]
    return result


def _dropped(key: str, value: Any) -> bool:
    if key == "propertyNames":  # names are always text in JSON; a number as a key is written as one in YAML
        return value.get("type") not in (None, "string")
    return key in ("title", "discriminator") or (key == "default" and (value is None or isinstance(value, dict | list)))


def field_descriptions(model: type[BaseModel]) -> dict[str, str]:
    """Return field as written in a manifest → its description, or the text under it in the class or one it extends.
    Read from the source when asked: having pydantic read it at import would cost every start of the command."""
    found: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if cls is not BaseModel and issubclass(cls, BaseModel):
            found |= texts_under_fields(cls)
    return {
        info.alias or name: text
        for name, info in model.model_fields.items()
        if (text := info.description or found.get(name))
    }


def texts_under_fields(cls: type) -> dict[str, str]:
    """Return field → the text under it in the source of this class alone."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):  # a class made at run time has no source
        return {}
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    found = {}
    for field, after in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr):
            text = after.value.value if isinstance(after.value, ast.Constant) else None
            if isinstance(text, str):
                found[field.target.id] = " ".join(text.split())
    return found
