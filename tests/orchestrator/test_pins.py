"""What floats is taken from a lock, or from what was recorded, only where the same was asked; and what `--locked` holds
is held before anybody takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.pinning import commit
from support.workshop import Workshop, statuses

import bigpipe
from bigpipe.errors import Offline, Stale, UsageError
from bigpipe.orchestrator import commands
from bigpipe.orchestrator.contract import LogLine, NodeFinished, RunFinished

RECIPE = """\
version: 1
name: pinned
trust: {modules: [support]}
params: {rev: main1, repo: org/model, note: ""}
stages:
  s:
    uses: support.pinning:%s
    with: {repo: "${params.repo}", revision: "${params.rev}", note: "${params.note}"}
"""
DRIFTING = """\
version: 1
name: drifting
trust: {modules: [support]}
stages:
  s: {uses: "support.pinning:SOURCE", with: {drifts: true}}
  use: {uses: "support.pinning:TAKE", inputs: s}
"""
DRIFTING_LATER = """\
version: 1
name: later
trust: {modules: [support]}
stages:
  s: {uses: "support.pinning:SOURCE"}
  t: {uses: "support.pinning:TAKE", inputs: s, with: {drifts: true}}
  use: {uses: "support.pinning:TAKE", inputs: t}
"""
MAIN = commit("org/model", "main1")


def brought(workshop: Workshop, **options: Any) -> str:
    result = workshop.run(**{"check": True, **options})
    return (result.path("s") / "text").read_text()


@pytest.fixture(params=["SOURCE", "ASKED_BY_ALL"])
def ran(request: pytest.FixtureRequest, workshop: Workshop) -> Workshop:
    """The recipe has run once."""
    workshop.manifest.write_text(RECIPE % request.param)
    assert brought(workshop) == MAIN
    return workshop


class TestLocked:
    @pytest.fixture(autouse=True)
    def _lock(self, ran: Workshop) -> None:
        commands.lock(ran.manifest)

    def test_a_lock_says_what_was_asked_and_holds_for_that(self, ran: Workshop) -> None:
        assert "asked:" in Path(f"{ran.manifest}.lock").read_text()
        assert brought(ran, locked=True, offline=True) == MAIN

    def test_another_revision_is_refused(self, ran: Workshop) -> None:
        with pytest.raises(Stale, match=r"asked.revision main1 → v2"):
            ran.run(params={"rev": "v2"}, locked=True, check=True)

    def test_another_revision_in_the_recipe_is_refused_too(self, ran: Workshop) -> None:
        ran.manifest.write_text(ran.manifest.read_text().replace("rev: main1", "rev: v2"))
        with pytest.raises(Stale, match=r"asked.revision main1 → v2"):
            ran.run(locked=True, check=True)

    def test_a_commit_that_needs_no_pin_is_refused(self, ran: Workshop) -> None:
        with pytest.raises(Stale, match=r"params\.revision"):
            ran.run(params={"rev": "a" * 40}, locked=True, check=True)

    def test_a_lock_that_does_not_say_what_was_asked_is_not_believed_of_another_revision(self, ran: Workshop) -> None:
        path = Path(f"{ran.manifest}.lock")
        lock = yaml.safe_load(path.read_text())
        del lock["inputs"]["s"]["asked"]
        path.write_text(yaml.safe_dump(lock))
        assert brought(ran, locked=True) == MAIN
        with pytest.raises(Stale):
            ran.run(params={"rev": "v2"}, locked=True, check=True)

    def test_offline_without_locked_another_revision_is_not_the_lock_s(self, ran: Workshop) -> None:
        with pytest.raises(Offline):
            ran.run(params={"rev": "v2"}, offline=True, check=True, store=ran.folder / "other")
        assert brought(ran, offline=True, store=ran.folder / "other") == MAIN


class TestOffline:
    def test_what_was_recorded_of_this_revision_is_used(self, ran: Workshop) -> None:
        assert brought(ran, offline=True) == MAIN
        assert brought(ran, params={"rev": "v2"}) == commit("org/model", "v2")
        assert brought(ran, offline=True) == MAIN
        assert brought(ran, offline=True, params={"rev": "v2"}) == commit("org/model", "v2")

    @pytest.mark.parametrize("params", [{"rev": "v2"}, {"repo": "org/other"}])
    def test_what_was_never_asked_has_no_answer(self, ran: Workshop, params: dict[str, str]) -> None:
        with pytest.raises(Offline) as refused:
            ran.run(params=params, offline=True, check=True)
        assert [node.decision.reason[:17] for node in refused.value.plan.nodes.values()] == ["not known offline"]
        (error,) = bigpipe.plan(ran.manifest, params=params, offline=True).errors()
        assert (error.status, error.cause, error.node) == (75, refused.value.cause, "s")
        assert bigpipe.plan(ran.manifest, params=params, offline=True, preflight=False).errors() == []
        assert ran.run(params=params, offline=True, keep_going=True).exit_code == 75
        assert bigpipe.plan(ran.manifest, offline=True).errors() == []

    def test_a_revision_that_was_found_cached_has_one(self, ran: Workshop) -> None:
        assert set(statuses(ran.run(params={"rev": "v1"})).values()) == {"cached"}
        assert brought(ran, params={"rev": "v1"}, offline=True) == MAIN
        assert brought(ran, offline=True) == MAIN


def test_what_a_pin_does_not_ask_may_change_offline(workshop: Workshop) -> None:
    workshop.run(RECIPE % "SOURCE")
    assert brought(workshop, offline=True, params={"note": "x"}) == MAIN
    workshop.run(RECIPE % "ASKED_BY_ALL")
    with pytest.raises(Offline):
        workshop.run(offline=True, params={"note": "x"}, check=True)


class TestOutputs:
    @pytest.fixture
    def drifted(self, workshop: Workshop) -> Workshop:
        """Locked, with the bytes of one run, which are gone."""
        workshop.manifest.write_text(DRIFTING)
        commands.lock(workshop.manifest)
        assert workshop.run().status == "succeeded"
        (workshop.folder / "taken").unlink()
        return workshop

    def test_what_is_not_what_is_locked_fails_its_node_before_it_is_taken(self, drifted: Workshop) -> None:
        other, events = drifted.folder / "other", []
        result = drifted.run(store=other, locked=True, progress=events.append)
        assert statuses(result) == {"s": "failed", "use": "skipped"}
        assert not (drifted.folder / "taken").exists()
        answer = result.as_json()
        assert (answer["status"], answer["exit_code"]) == ("failed", 6)
        assert answer["run"] == result.run
        assert "s brought other files" in answer["errors"][0]["cause"]
        assert bigpipe.runs(store=other)[-1].status == "failed"
        assert [event.status for event in events if isinstance(event, NodeFinished)] == ["failed", "skipped"]
        assert [event.status for event in events if isinstance(event, RunFinished)] == ["failed"]

    def test_what_the_store_has_is_held_to_the_lock_too(self, workshop: Workshop) -> None:
        workshop.manifest.write_text(DRIFTING_LATER)
        commands.lock(workshop.manifest)
        assert workshop.run().status == "succeeded"
        other = workshop.folder / "other"
        Path(f"{workshop.manifest}.lock").rename(kept := workshop.folder / "kept")
        assert workshop.run(store=other).status == "succeeded"
        kept.rename(f"{workshop.manifest}.lock")
        result = workshop.run(store=other, locked=True)
        assert statuses(result) == {"s": "cached", "t": "failed", "use": "skipped"}
        assert "for the same inputs, packages and facts" in result.errors[0].cause

    def test_a_lock_that_cannot_be_filled_in_costs_a_line(
        self, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        workshop.manifest.write_text(DRIFTING)
        lock = commands.lock(workshop.manifest)
        lines: list[str] = []

        def spoil(event: Any) -> None:
            if isinstance(event, RunFinished):
                lock.unlink()
                lock.mkdir()  # nobody, not even root, writes there
            if isinstance(event, LogLine) and event.node == "lock file":
                lines.append(event.line)

        result = workshop.run(progress=spoil, check=True)
        assert result.status == "succeeded"
        assert len(lines) == 1
        assert lines[0].startswith("not filled in: the lock file ")


def test_a_kind_that_asks_for_a_field_it_does_not_have_is_told_in_the_plan(workshop: Workshop) -> None:
    workshop.manifest.write_text(RECIPE % "ASKS_WRONGLY")
    with pytest.raises(UsageError, match="`pin_asks` names the field nope"):
        bigpipe.plan(workshop.manifest)
