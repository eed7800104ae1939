"""What people and programs read: progress, plans, tables, records, the reference of the kinds."""

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .answers import ANSWERS, outputs_schema
    from .drawing import STYLE, Drawn, graph
    from .freeing import collect_garbage, remove
    from .graphs import MARKS, became_of, graph_json, graph_text, write_graph
    from .inspection import (
        Inspection,
        diff_runs,
        get_artifact,
        list_store,
        log_lines,
        logged,
        open_store,
        show_run,
        verify_store,
    )
    from .outcomes import answered, as_bigpipe_error, refused
    from .page import report_runs, write_report
    from .reference import fields_markdown, kinds_json, kinds_markdown, kinds_overview
    from .rendering import (
        exchange_json,
        exchange_text,
        plan_json,
        probe_json,
        probe_text,
        remote_json,
        results_text,
        why_text,
    )
    from .reporters import choose_reporter, following
    from .reviewing import diff, plan_markdown, review
    from .shown import clean, error_text, json_text
    from .templates import page_environment
    from .watching import follow_log, follow_run, positions, run_ids, running

__getattr__, __all__ = face(__name__)
