"""What a stopped run had done is gone on with under another key, where the kind says which params leave it standing."""

from __future__ import annotations

from support.workshop import Workshop

KIND = """
from bigpipe.orchestrator.stage import Forecast, Metrics, Params, Planning, Stage, StageFailed, StageResult


class Rows(Params):
    text: str = "a"
    form: str = "lines"
    fails: bool = False


class Done(Metrics):
    before: int


def run(params, ctx):
    before = len(list(ctx.scratch.iterdir()))
    (ctx.scratch / params.form).write_text(params.text)
    if params.fails:
        raise StageFailed("one row failed", "mend it")
    (ctx.out / params.form).write_text(params.text)
    return StageResult(Done(before=before))


STAGE = Stage(
    kind="rows", version=1, params=Rows, metrics=Done, inputs={}, output="results", run=run, runs_in="inline",
    forecast=lambda params, ctx: Forecast(),
    planning=Planning(resumed=lambda params: ["form", "fails"]),
)
"""


def test_params_that_leave_work_standing_go_on_with_it(workshop: Workshop) -> None:
    (workshop.folder / "rowkind.py").write_text(KIND)

    def before(params: str) -> int | None:
        head = "version: 1\nname: r\ntrust: {modules: [rowkind]}\n"
        result = workshop.run(f"{head}stages:\n  a: {{uses: 'rowkind:STAGE', with: {{{params}}}}}\n")
        return result["a"].metrics["before"] if result.exit_code == 0 else None

    assert before("fails: true") is None
    assert before("text: b") == 0
    assert before("form: table") == 1
    assert before("form: columns") == 0, "what was published left nothing behind"
