"""What a manifest's `trust` means for the model at hand."""

from __future__ import annotations

from bigpipe.orchestrator.stage import StageContext


def remote_code(ctx: StageContext) -> bool:
    """May the Python files that came with the model run? Only where its repository is trusted at that commit."""
    return any(
        f"{node.params.get('repo')}@{node.metrics.get('commit')}" in ctx.trust.remote_code
        for node in ctx.lineage
        if node.kind == "download" and node.params.get("repo")
    )
