"""Against a Hub on loopback, through the real `huggingface_hub` client."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.hub import LoopbackHub

from bigpipe.bigmodel.hub.access import check_access
from bigpipe.bigmodel.hub.repository import (
    Hub,
    address_of,
    cached_commit,
    check_name,
    describe,
    read_range,
    resolve_commit,
)
from bigpipe.bigmodel.sources import Sources
from bigpipe.environment import inherited
from bigpipe.errors import GatedRepository, InvalidCheckpoint, NotAuthorised, Offline, Transient, UsageError

WEIGHTS = bytes(range(256)) * 64


@pytest.fixture
def server() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        hub.users["secret-token"] = "ada"
        hub.create("org/model", {"config.json": b'{"model_type": "opt"}', "model.safetensors": WEIGHTS})
        yield hub


@pytest.fixture
def hub(server: LoopbackHub, tmp_path: Path) -> Hub:
    return Hub.from_environment(server.environment(tmp_path))


def signed_in(server: LoopbackHub, tmp_path: Path, token: str = "") -> Hub:
    return Hub.from_environment({**server.environment(tmp_path), "HF_TOKEN": token or "secret-token"})


def test_a_branch_is_resolved_by_one_request(server: LoopbackHub, hub: Hub) -> None:
    first = resolve_commit("org/model", "main", hub=hub)
    assert first == server.repositories["org/model"].branches["main"]
    assert [(r.method, r.path) for r in server.log] == [("GET", "/api/models/org/model/revision/main")]
    second = server.commit("org/model", {"config.json": b"{}"})
    assert resolve_commit("org/model", "main", hub=hub) == second != first


def test_tags_and_short_commits_are_resolved_and_full_commits_are_taken_as_they_are(
    server: LoopbackHub, hub: Hub
) -> None:
    commit = server.repositories["org/model"].branches["main"]
    server.repositories["org/model"].tags["v1.0"] = commit
    assert resolve_commit("org/model", "v1.0", hub=hub) == commit
    assert resolve_commit("org/model", commit[:10], hub=hub) == commit
    asked = len(server.log)
    assert resolve_commit("org/model", commit, hub=hub) == commit
    assert len(server.log) == asked


def test_the_listing_has_sizes_and_digests_and_is_kept_for_a_commit(
    server: LoopbackHub, hub: Hub, tmp_path: Path
) -> None:
    hub = replace(hub, memo=tmp_path / "memo")
    described = describe("org/model", "main", hub=hub)
    config, weights = described.files
    assert (config.path, config.size, config.sha256, len(config.blob_id)) == ("config.json", 21, None, 40)
    assert (weights.size, len(weights.sha256 or "")) == (len(WEIGHTS), 64)
    assert described.library == "transformers"
    asked = len(server.log)
    assert describe("org/model", described.commit, hub=hub) == described
    assert len(server.log) == asked
    away = replace(hub, offline=True)
    assert describe("org/model", described.commit, hub=away) == described


def test_a_renamed_repository_has_one_address_by_both_names(server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
    hub = replace(hub, memo=tmp_path / "memo")
    server.repositories["org/old"] = server.repositories["org/model"]
    commit = describe("org/old", hub=hub).commit
    asked = len(server.log)
    assert address_of("org/old", "main", commit, hub=hub) == "hf://org/model@main"
    assert len(server.log) == asked, "it is kept with the listing"
    assert address_of("Org/Model", "main", hub=hub) == "hf://org/model@main"
    assert address_of("org/Away", "main", hub=replace(hub, offline=True)) == "hf://org/away@main"


def test_ranges_are_read_without_the_rest_and_the_token_stays_on_the_hub(server: LoopbackHub, tmp_path: Path) -> None:
    hub = signed_in(server, tmp_path)
    commit = resolve_commit("org/model", "main", hub=hub)
    assert read_range("org/model", commit, "model.safetensors", 100, 50, hub=hub) == WEIGHTS[100:150]
    assert read_range("org/model", commit, "model.safetensors", len(WEIGHTS) - 5, 50, hub=hub) == WEIGHTS[-5:]
    assert server.bytes_sent("/cdn/") == 55
    assert [r.token for r in server.requests("/cdn/")] == [None, None]
    assert {r.token for r in server.requests("/resolve/")} == {"secret-token"}
    assert server.requests("/resolve/")[0].user == "ada"


def test_a_server_that_ignores_ranges_is_not_believed(server: LoopbackHub, hub: Hub) -> None:
    server.fail("html", "/cdn/")
    with pytest.raises(Transient, match="more than the 50 bytes"):
        read_range("org/model", "main", "model.safetensors", 100, 50, hub=hub)


def test_an_unknown_model_without_a_token_may_be_private(hub: Hub) -> None:
    with pytest.raises(NotAuthorised) as caught:
        describe("org/modle", hub=hub)
    assert "private or does not exist" in caught.value.cause
    assert "HF_TOKEN" in caught.value.cure
    assert caught.value.exit_code == 5


def test_an_unknown_model_with_a_token_is_a_mistake(server: LoopbackHub, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no model 'org/modle'") as caught:
        describe("org/modle", hub=signed_in(server, tmp_path))
    assert caught.value.exit_code == 2


def test_a_private_model_is_shown_to_its_members(server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
    server.create("org/private", {"config.json": b"{}"}, private=True, members={"ada"})
    with pytest.raises(NotAuthorised):
        describe("org/private", hub=hub)
    assert describe("org/private", hub=signed_in(server, tmp_path)).file("config.json")


def test_a_token_the_hub_does_not_know(server: LoopbackHub, tmp_path: Path) -> None:
    with pytest.raises(NotAuthorised, match="does not accept the token") as caught:
        describe("org/model", hub=signed_in(server, tmp_path, "expired"))
    assert "expired" not in caught.value.cause


def test_a_gate_is_met_before_anything_is_downloaded(server: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
    server.create("org/gated", {"config.json": b"{}"}, gated="manual", members={"grace"})
    with pytest.raises(GatedRepository, match="no token was sent") as caught:
        check_access("org/gated", hub=hub)
    assert f"{server.url}/org/gated" in caught.value.cure
    with pytest.raises(GatedRepository, match="has not been let in"):
        check_access("org/gated", hub=signed_in(server, tmp_path))
    server.repositories["org/gated"].members.add("ada")
    check_access("org/gated", hub=signed_in(server, tmp_path))


def test_a_misspelt_revision_gets_a_guess(server: LoopbackHub, hub: Hub) -> None:
    server.repositories["org/model"].tags["v1.0"] = server.repositories["org/model"].branches["main"]
    with pytest.raises(UsageError, match="no revision 'mian'") as caught:
        resolve_commit("org/model", "mian", hub=hub)
    assert "did you mean 'main'?" in caught.value.cure
    assert "v1.0" in caught.value.cure


def test_a_missing_file_is_named(hub: Hub) -> None:
    with pytest.raises(UsageError, match=r"no file 'tokenizer\.json'"):
        read_range("org/model", "main", "tokenizer.json", 0, 10, hub=hub)


def test_a_malformed_name_is_refused(hub: Hub) -> None:
    with pytest.raises(UsageError):
        read_range("org/model", "main", "../../secret", 0, 10, hub=hub)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", f"http://{'q' * 64}.org"])
def test_nobody_listens(tmp_path: Path, endpoint: str) -> None:
    """Nor at a name that DNS cannot hold."""
    hub = Hub(endpoint=endpoint, cache=tmp_path)
    with pytest.raises(Offline, match="cannot be reached") as caught:
        resolve_commit("org/model", "main", hub=hub)
    assert "--offline" in caught.value.cure
    assert caught.value.exit_code == 75


def test_offline_asks_nothing_and_names_the_commit_the_cache_has_seen(server: LoopbackHub, hub: Hub) -> None:
    ref = hub.folder("org/model") / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_text("c" * 40)
    away = Hub(endpoint=hub.endpoint, cache=hub.cache, offline=True)
    assert cached_commit(away, "org/model", "main") == "c" * 40
    with pytest.raises(Offline) as caught:
        resolve_commit("org/model", "main", hub=away)
    assert f"revision: {'c' * 40}" in caught.value.cure
    assert not server.log


def test_one_failure_of_the_server_is_ridden_out_and_more_are_transient(server: LoopbackHub, hub: Hub) -> None:
    server.fail("status", "/revision/", status=503)
    assert describe("org/model", hub=hub).commit
    server.fail("status", "/revision/", status=503, times=2)
    with pytest.raises(Transient, match="503"):
        describe("org/model", hub=hub)
    server.fail("status", "/revision/", status=429, headers={"Retry-After": "3600"})
    with pytest.raises(Transient, match="429") as caught:
        describe("org/model", hub=hub)
    assert "wait 1 h" in caught.value.cure


def test_a_login_page_instead_of_an_answer(server: LoopbackHub, hub: Hub) -> None:
    server.fail("html", "/revision/")
    with pytest.raises(Transient, match="did not answer as a Hub does"):
        describe("org/model", hub=hub)


def test_a_redirect_loop_ends(server: LoopbackHub, hub: Hub) -> None:
    server.fail("redirect", "/revision/", times=1000)
    with pytest.raises(Transient, match="in a circle"):
        describe("org/model", hub=hub)


def test_an_answer_that_never_comes(server: LoopbackHub, hub: Hub) -> None:
    server.fail("hang", "/revision/")
    with pytest.raises(Transient, match="ReadTimeout"):
        describe("org/model", hub=replace(hub, timeout=0.3))


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "/etc/passwd",
        "a/../../b",
        "C:/x",
        "a\\b",
        "a//b",
        "./a",
        "line\nbreak",
        "..",
        "a/",
        "a\x1b[2J",
        "a\u202eb",
    ],
)
def test_names_that_lead_out_are_refused(name: str) -> None:
    with pytest.raises(InvalidCheckpoint, match="could lead out"):
        check_name("org/model", name)


def test_such_a_name_in_a_listing_is_refused(server: LoopbackHub, hub: Hub) -> None:
    server.create("org/evil", {"config.json": b"{}", "../../../.bashrc": b"curl"})
    with pytest.raises(InvalidCheckpoint, match="bashrc"):
        describe("org/evil", hub=hub)


def test_plain_names_pass() -> None:
    for name in (
        "config.json",
        "unet/model.safetensors",
        ".gitattributes",
        "1_Pooling/config.json",
        "a b.txt",
        "assets/at 3.45.12\u202fPM.png",
        "a\u00a0b\u200b.txt",
        "\U0001f469\u200d\U0001f4bb.md",
    ):
        check_name("org/model", name)


def test_the_environment_is_read_as_huggingface_hub_reads_it(tmp_path: Path) -> None:
    names = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME")
    cases: list[dict[str, str]] = [
        {"HF_HOME": f"{tmp_path}/home"},
        {"HF_HOME": f"{tmp_path}/home", "HF_HUB_CACHE": f"{tmp_path}/hub"},
        {"XDG_CACHE_HOME": f"{tmp_path}/xdg"},
        {"HUGGINGFACE_HUB_CACHE": f"{tmp_path}/legacy"},
        {"HF_HOME": "~/models"},
    ]
    ask = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    for case in cases:
        environment = {**{k: v for k, v in os.environ.items() if k not in names}, **case}
        theirs = subprocess.run(
            [sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True
        )
        assert str(Hub.from_environment({**dict.fromkeys(names, ""), **case}).cache) == theirs.stdout.strip()
    assert "secret" not in repr(Hub.from_environment({"HF_TOKEN": "secret"}))


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
@pytest.mark.parametrize(
    ("said", "offline"),
    [("1", True), ("True", True), ("on", True), ("YES", True), ("0", False), ("false", False), ("", False)],
)
def test_offline_is_said_as_to_huggingface_hub(name: str, said: str, offline: bool) -> None:
    nothing = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "")
    assert Hub.from_environment({**nothing, name: said}).offline is offline


def test_a_token_from_a_file_may_end_in_a_newline(tmp_path: Path) -> None:
    assert Hub.from_environment({"HF_TOKEN": " hf_secret\r\n"}).token == "hf_secret"
    assert Hub.from_environment({"HF_TOKEN": "\n", "HUGGING_FACE_HUB_TOKEN": ""}).token is None


def test_a_cache_that_a_node_names_begins_at_the_recipe(tmp_path: Path) -> None:
    """Its worker runs there, too."""
    found = Hub.of(Sources(base=tmp_path, environment={"HF_HUB_CACHE": "cache"}))
    assert found.cache == tmp_path / "cache"


def test_a_cache_is_where_it_is_wherever_a_worker_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"HF_HOME": "hf", "HF_HUB_CACHE": "~/hub", "SSL_CERT_FILE": "/etc/ca.pem", "TORCH_HOME": "", "HF_X": "hf"}
    assert inherited(given) == {**given, "HF_HOME": str(tmp_path / "hf")}
