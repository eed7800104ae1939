"""What stands under the fields of a model, as descriptions for people and editors."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap

from pydantic import BaseModel


def field_descriptions(model: type[BaseModel]) -> dict[str, str]:
    """Return field as written in a manifest → its description, or the text under it in the class or one it extends.

    Read from the source when asked: having pydantic read it at import would cost every start of the command.
    """
    found: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if cls is not BaseModel and issubclass(cls, BaseModel):
            found |= _texts_under_fields(cls)
    return {
        info.alias or name: text
        for name, info in model.model_fields.items()
        if (text := info.description or found.get(name))
    }


def _texts_under_fields(cls: type) -> dict[str, str]:
    """On one line each."""
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
