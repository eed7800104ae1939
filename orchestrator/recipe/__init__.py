"""From the text of a manifest to a checked graph of nodes; every problem at once, each at its place."""

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .conditions import (
        UNKNOWN as UNKNOWN,
        Condition as Condition,
        Lookup as Lookup,
        Verdict as Verdict,
        metric as metric,
    )
    from .docstrings import field_descriptions as field_descriptions
    from .graph import Recipe as Recipe, load_recipe as load_recipe
    from .initial import initial_manifest as initial_manifest
    from .node import Node as Node
    from .registry import (
        PROBES as PROBES,
        is_built_in as is_built_in,
        load_stage as load_stage,
        named_stage as named_stage,
        stage_kinds as stage_kinds,
    )
    from .schema import described_schema as described_schema, manifest_schema as manifest_schema
else:
    __getattr__ = face(
        __name__,
        conditions="Condition Lookup UNKNOWN Verdict metric",
        docstrings="field_descriptions",
        graph="Recipe load_recipe",
        initial="initial_manifest",
        node="Node",
        registry="PROBES is_built_in load_stage named_stage stage_kinds",
        schema="described_schema manifest_schema",
    )
