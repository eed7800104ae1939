"""What people and programs read: progress, plans, tables, records, the reference of the kinds."""

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .inspection import (
        Inspection as Inspection,
        collect_garbage as collect_garbage,
        diff_runs as diff_runs,
        list_store as list_store,
        log_lines as log_lines,
        show_run as show_run,
        verify_store as verify_store,
    )
    from .reference import kinds_json as kinds_json, kinds_markdown as kinds_markdown, kinds_overview as kinds_overview
    from .rendering import (
        columns as columns,
        graph_text as graph_text,
        plan_json as plan_json,
        plan_text as plan_text,
        results_text as results_text,
        why_text as why_text,
    )
    from .reporters import choose_reporter as choose_reporter, error_text as error_text
else:
    __getattr__ = face(
        __name__,
        inspection="Inspection collect_garbage diff_runs list_store log_lines show_run verify_store",
        reference="kinds_json kinds_markdown kinds_overview",
        rendering="columns graph_text plan_json plan_text results_text why_text",
        reporters="choose_reporter error_text",
    )
