"""Bytes that one recipe lets go (`cache: false`) and another one keeps: they stay as long as anybody wants them."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.stores import publish
from support.workshop import Workshop, statuses

import bigpipe
from bigpipe.orchestrator import commands
from bigpipe.orchestrator.store import keeping
from bigpipe.orchestrator.store.store import Store

KEEPS = """\
version: 1
name: keeps
stages:
  s: {uses: write, with: {text: much}%s}
  u: {uses: join, inputs: {first: s}, with: {squeeze: true}}
"""
DROPS = KEEPS.replace("keeps", "drops") % ", cache: false"


@pytest.fixture
def recipes(workshop: Workshop) -> tuple[Path, Path]:
    """One that keeps what `s` gives, which has run, and one that lets it go."""
    workshop.run(KEEPS % "")
    drops = workshop.folder / "drops.yaml"
    drops.write_text(DROPS)
    return workshop.manifest, drops


def actions(recipe: Path) -> set[str]:
    return {str(item.action) for item in bigpipe.plan(recipe).nodes.values()}


def test_what_another_recipe_keeps_stays(recipes: tuple[Path, Path]) -> None:
    keeps, drops = recipes
    for _ in range(2):
        assert set(statuses(bigpipe.run(drops)).values()) == {"cached"}
        assert actions(keeps) == {"cached"}


def test_it_goes_once_both_let_it_go(recipes: tuple[Path, Path]) -> None:
    keeps, drops = recipes
    path = bigpipe.run(drops).path("s")
    keeps.write_text(KEEPS % ", cache: false")
    bigpipe.run(keeps)
    assert path is None
    assert bigpipe.plan(keeps).nodes["s"].decision.reason == "its bytes were dropped (cache: false)"


def test_it_goes_once_the_other_recipe_is_gone(recipes: tuple[Path, Path]) -> None:
    keeps, drops = recipes
    keeps.unlink()
    bigpipe.run(drops)
    assert bigpipe.plan(drops).nodes["s"].decision.reason == "its bytes were dropped (cache: false)"


def test_a_recipe_that_kept_it_and_lets_it_go_now_frees_it(workshop: Workshop) -> None:
    workshop.run(KEEPS % "")
    workshop.run(KEEPS % ", cache: false")
    assert not bigpipe.plan(workshop.manifest).nodes["s"].decision.bytes_here
    workshop.manifest.write_text(KEEPS % "")
    told = "its bytes were dropped (cache: false), and are to be kept now"
    assert bigpipe.plan(workshop.manifest).nodes["s"].decision.reason == told


def test_what_was_made_without_a_recipe_stays_for_a_while(workshop: Workshop) -> None:
    bigpipe.run(workshop.folder / "none.yaml", text=KEEPS % "")
    (workshop.folder / "drops.yaml").write_text(DROPS)
    bigpipe.run(workshop.folder / "drops.yaml")
    assert set(statuses(bigpipe.run(workshop.folder / "none.yaml", text=KEEPS % "")).values()) == {"cached"}


def test_a_hit_takes_back_what_was_let_go_while_others_were_in_the_store(tmp_path: Path) -> None:
    with Store(tmp_path / "store") as other, Store(tmp_path / "store") as store:
        other.enter()
        done = publish(store, "s", {"a": b"much"})
        assert store.drop(done.digest, done.key) == 0
        other.keep(done.digest, done.key)
        store.close()
        other.close()
        assert other.intact(done)


def test_a_hit_of_a_node_that_keeps_its_bytes_takes_them_back(workshop: Workshop) -> None:
    result = workshop.run(KEEPS % "")
    record = result.records["s"]
    workshop.manifest.rename(workshop.folder / "moved.yaml")  # nobody names it
    with Store(workshop.folder / "store") as other:
        other.enter()
        Store(workshop.folder / "store").drop(record.digest, record.key)
        (workshop.folder / "moved.yaml").rename(workshop.manifest)
        assert statuses(workshop.run())["s"] == "cached"
        workshop.manifest.unlink()
    assert other.intact(record)


def test_what_was_pulled_of_a_node_that_nobody_takes_stays(workshop: Workshop) -> None:
    """As after a run: it is what the recipe is for, whatever its `cache` says."""
    remote, store = str(workshop.folder / "remote"), workshop.folder / "empty"
    ends = KEEPS.replace("squeeze: true}}", "squeeze: true}, cache: false}") % ", cache: false"
    workshop.run(ends)
    commands.push(workshop.manifest, remote=remote)
    commands.pull(workshop.manifest, remote=remote, store=store)
    goes_on = workshop.folder / "goes-on.yaml"
    goes_on.write_text(f"{ends}  v: {{uses: join, inputs: {{first: u, second: u}}}}\n".replace("keeps", "goes-on"))
    bigpipe.run(goes_on, store=store)
    planned = bigpipe.plan(workshop.manifest, store=store).nodes
    assert planned["u"].decision.bytes_here
    assert not planned["s"].decision.bytes_here


def test_nobody_looks_through_the_records_for_bytes_that_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All records of the store were read at every start and end of a run, and others kept out meanwhile."""
    with Store(tmp_path / "store") as store:
        made = publish(store, "a", {"a": b"much"})
        store.drop(made.digest, made.key)
        assert store.let_go(made.digest)
    monkeypatch.setattr(keeping, "all_records", lambda layout: pytest.fail("it read all records"))
    with Store(tmp_path / "store") as store:
        store.enter()
    monkeypatch.undo()
    with Store(tmp_path / "store") as store:  # what is made again goes again
        publish(store, "a", {"a": b"much"})
        assert not store.let_go(made.digest)
        assert store.drop(made.digest, made.key) == 4
