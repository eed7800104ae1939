"""From the text of a manifest to a checked graph of nodes; every problem at once, each at its place."""

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .arguments import written
    from .conditions import UNKNOWN, Comparison, Condition, Lookup, metric
    from .graph import Recipe, declared_parameters, load_recipe
    from .initial import as_text, initial_manifest, initialise, source_of
    from .manifest import ResourcesSpec, Shared
    from .node import Choice, First, Node
    from .problems import Fault, Keys
    from .registry import PROBES, distributions_of, is_built_in, load_stage, named_stage, stage_kinds
    from .schema import described_schema, field_descriptions, manifest_schema, recipe_schema, texts_under_fields
    from .single import Single, fed_ports, in_options, option
    from .validation import models_in
    from .wiring import is_meant, parts_of

__getattr__, __all__ = face(__name__)
