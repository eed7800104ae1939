"""One node's work, and whose record counts: what a decision refused does not, what came meanwhile does."""

from __future__ import annotations

import threading

import pytest

from bigpipe.orchestrator.launch import Needs
from bigpipe.orchestrator.planning.session import open_session
from bigpipe.orchestrator.running.execution import Attempt, execute


@pytest.fixture
def attempt(workshop):
    """Of a node that has a record."""
    result = workshop.run("version: 1\nname: one\nstages:\n  a: {uses: write}\n")
    (workshop.folder / "journal").unlink()
    session = open_session(workshop.manifest, params={}, store=workshop.folder / "store")
    record = result.nodes["a"].record

    def made(**given) -> Attempt:
        return Attempt(
            session=session, node=session.nodes[0], key=record.key, inputs={}, lineage=(), run="later",
            folder=workshop.folder / "attempts", report=lambda event: None, cancelled=threading.Event(), needs=Needs(),
            **given,
        )  # fmt: skip

    with session.store:
        yield made, record


def test_a_record_that_was_refused_is_not_taken(workshop, attempt):
    made, record = attempt
    again = execute(made(refused=record))
    assert workshop.ran == ["a"]
    assert (again.run, again.key, again.digest) == ("later", record.key, record.digest)


def test_one_that_answers_another_question_meanwhile_is_still_refused(workshop, attempt):
    """As a node that finds the key cached under another revision of the same commit notes it down."""
    made, record = attempt
    made(refused=record).session.store.note_asked(record, {"revision": "v1"})
    again = execute(made(refused=record))
    assert workshop.ran == ["a"]
    assert again.run == "later"


def test_a_record_that_came_after_the_decision_is_taken(workshop, attempt):
    made, record = attempt
    other = record.model_copy(update={"run": "earlier"})
    assert execute(made(refused=None)) == record
    assert execute(made(refused=other)) == record
    assert workshop.ran == []
