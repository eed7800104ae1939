"""What may run besides bigpipe's own code."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.contexts import Lineage, inputs, stage_context

from bigpipe.errors import UsageError
from bigpipe.plugins.library import downloads_of, sources_of
from bigpipe.trust import Trust


@pytest.mark.parametrize("reference", ["mingpt:GPT", "mingpt.model:GPT"])
def test_a_trusted_module_and_what_it_contains(reference: str) -> None:
    Trust(("mingpt",)).require_module(reference, "the class")


@pytest.mark.parametrize("reference", ["mingpt2:GPT", "os:system", "min:gpt", "support:mingpt"])
def test_no_other_module(reference: str) -> None:
    with pytest.raises(UsageError, match=r"the class: module .* is not trusted") as caught:
        Trust(("mingpt",)).require_module(reference, "the class")
    assert f"trust: {{modules: [{reference.partition(':')[0]}]}}" in caught.value.cure


def test_code_of_a_repository_is_allowed_at_its_commit_alone() -> None:
    trust = Trust(remote_code=("org/model@" + "a" * 40,))
    assert trust.allows_code("org/model", "a" * 40)
    assert not trust.allows_code("org/model", "b" * 40)
    assert not trust.allows_code("org/other", "a" * 40)
    assert not Trust(remote_code=("None@None",)).allows_code(None, None)


def test_names_of_modules_are_a_trust() -> None:
    assert Trust.of("mingpt") == Trust.of(["mingpt"]) == Trust(("mingpt",))
    assert Trust.of(Trust(("mingpt",))) == Trust(("mingpt",))


@pytest.mark.parametrize(
    ("trusted", "code", "runs"),
    [
        (["one"], ["one"], True),
        (["one"], ["two"], False),
        (["one"], ["one", "two"], False),
        (["one", "two"], ["one", "two"], True),
        (["one"], [], True),
        ([], ["one"], False),
    ],
)
def test_the_code_of_one_model_does_not_run_because_another_is_trusted(
    tmp_path: Path, trusted: list[str], code: list[str], runs: bool
) -> None:
    steps, wired = [], {}
    for name in ("one", "two"):
        folder = tmp_path / "artifacts" / (name * 16)
        folder.mkdir(parents=True)
        if name in code:
            (folder / "modeling.py").write_text("")
        steps.append(Lineage(name, "download", "k", f"sha256:{folder.name}", {"repo": f"org/{name}"}, {"commit": "c"}))
        wired["model" if name == "one" else "baseline"] = folder
    trust = Trust(remote_code=tuple(f"org/{name}@c" for name in trusted))
    context = stage_context(tmp_path, inputs=inputs(**wired), lineage=tuple(steps), trust=trust)
    assert sources_of(context).trust_remote_code == runs
    assert [item.node for item in downloads_of(context, wired["baseline"])] == ["two"]
    assert [item.node for item in downloads_of(context, tmp_path)] == ["one", "two"]  # nobody knows


@pytest.mark.parametrize(
    ("commit", "metrics", "pins", "runs"),
    [
        ("c", {}, {}, True),
        ("main", {}, {"revision": "c"}, True),
        ("main", {}, {"revision": "d"}, False),
        ("main", {}, {}, False),
        ("c", {"commit": "d"}, {}, False),
    ],
)
def test_a_download_that_still_runs_brings_the_commit_that_it_is_pinned_to(
    tmp_path: Path, commit: str, metrics: dict[str, str], pins: dict[str, str], runs: bool
) -> None:
    """What follows it has no record of it to ask."""
    asked = {"repo": "org/one", "revision": commit}
    step = Lineage("one", "download", "k", None, asked, metrics, pins=pins)
    context = stage_context(tmp_path, lineage=(step,), trust=Trust(remote_code=("org/one@c",)))
    assert sources_of(context).trust_remote_code == runs
