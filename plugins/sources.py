"""What a stage's context lets the library use and run."""

from __future__ import annotations

from bigpipe.bigmodel.sources import Sources
from bigpipe.orchestrator.stage import CheckContext, ForecastContext, StageContext


def sources_of(context: CheckContext | ForecastContext | StageContext) -> Sources:
    """The context's trust, directories and Hub. Code that came with the model runs where its download is trusted."""
    lineage = context.lineage if isinstance(context, StageContext) else ()
    downloads = [node for node in lineage if node.kind == "download"]
    return Sources(
        trust=context.trust,
        trust_remote_code=any(
            context.trust.allows_code(node.params.get("repo"), node.metrics.get("commit")) for node in downloads
        ),
        base=context.base,
        memo=context.memo,
        offline=context.offline,
        environment=context.environment,
    )
