"""Attestations of a published model, read by the tools that they are for; and a directory held against them."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import bigpipe
from bigpipe.bigmodel.publishing import Contents, Provenance, Step, open_destination, publish
from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import InvalidCheckpoint, StageFailed, UsageError

MODEL = Path(__file__).parents[2] / "models" / "quickstart"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
BUILT = Provenance(
    recipe="tiny",
    node="save",
    text="version: 1\n",
    params={"scheme": "int8"},
    git={"commit": COMMIT[::-1], "dirty": False},
    steps=(
        Step("download", "download", "k1", "sha256:1", {"repo": "org/model"}, {"commit": COMMIT}),
        Step("quantize", "quantize", "k2", "sha256:2", {"scheme": "int8"}, {"ratio": 1.9}),
        Step("evaluate", "evaluate", "k3", None, {}, {"perplexity": 65.3, "tokens": 693}),
    ),
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """What `save` writes, and what a clone of a repository has besides."""
    target = open_destination(str(tmp_path / "dist" / "model"), Sources())
    (tmp_path / "scratch").mkdir()
    publish(Contents(model=MODEL), target, BUILT, scratch=tmp_path / "scratch")
    return tmp_path / "dist" / "model"


@pytest.fixture(params=["prime256v1", "secp384r1", "secp521r1"])
def keys(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    return make_keys(tmp_path, request.param)


def make_keys(folder: Path, curve: str = "prime256v1", name: str = "key") -> tuple[Path, Path]:
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    making = ["openssl", "ecparam", "-name", curve, "-genkey", "-noout", "-out", str(private)]
    subprocess.run(making, check=True, capture_output=True)
    halving = ["openssl", "ec", "-in", str(private), "-pubout", "-out", str(public)]
    subprocess.run(halving, check=True, capture_output=True)
    return private, public


def statement(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(base64.b64decode(json.loads(file.read_bytes())["dsseEnvelope"]["payload"]))
    return found


def by_their_tool(model: Path, signature: Path, public: Path) -> subprocess.CompletedProcess[str]:
    """As `model_signing` says it itself, in a process of its own."""
    words = ["verify", "key", str(model), "--signature", str(signature), "--public_key", str(public)]
    command = [sys.executable, "-W", "ignore", "-m", "model_signing", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_openssf_reads_the_signature_and_finds_a_changed_byte(saved: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    (saved / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    made = bigpipe.attest(saved, key=private)
    assert made.signed
    signature = saved.parent / "model.attestations" / "model.sig"
    assert str(signature) in made.files
    theirs = by_their_tool(saved, signature, public)
    assert theirs.returncode == 0, theirs.stderr
    whole = (saved / "config.json").read_bytes()
    (saved / "config.json").write_bytes(whole + b"\n")
    assert by_their_tool(saved, signature, public).returncode != 0


def test_what_a_client_notes_beside_its_download_is_no_part_of_the_model(saved: Path) -> None:
    noted = saved / ".cache/huggingface/download/config.json.metadata"
    noted.parent.mkdir(parents=True)
    noted.write_text("a commit, a digest, a time")
    assert bigpipe.check_directory(saved).error is None
    (saved / "more").mkdir()
    (saved / "more" / ".cache").write_text("what lies elsewhere counts")
    assert bigpipe.check_directory(saved).error is not None


def test_what_openssf_signed_is_read_here(saved: Path, tmp_path: Path) -> None:
    private, public = make_keys(tmp_path)
    out = tmp_path / "theirs"
    out.mkdir()
    words = ["sign", "key", str(saved), "--signature", str(out / "model.sig"), "--private_key", str(private)]
    subprocess.run([sys.executable, "-W", "ignore", "-m", "model_signing", *words], check=True, capture_output=True)
    found = bigpipe.check_directory(saved, out, key=public)
    assert found.error is None
    assert found.documents["model.sig"] == "signed"


def test_the_provenance_is_slsa_in_an_in_toto_statement(saved: Path) -> None:
    """Read strictly by the protocol buffers of in-toto; SLSA's message refuses fields that it does not have."""
    from google.protobuf import json_format
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
    from in_toto_attestation.v1 import statement_pb2
    from in_toto_attestation.v1.statement import Statement

    bigpipe.attest(saved)
    told = statement(saved.parent / "model.attestations" / "provenance.sigstore.json")
    parsed = json_format.ParseDict(told, statement_pb2.Statement())
    Statement.copy_from_pb(parsed).validate()
    predicate = json_format.ParseDict(told["predicate"], provenance_pb2.Provenance())
    assert told["predicateType"] == "https://slsa.dev/provenance/v1"
    [source, recipe] = predicate.build_definition.resolved_dependencies
    assert (source.uri, dict(source.digest)) == (f"pkg:huggingface/org/model@{COMMIT}", {"gitCommit": COMMIT})
    assert dict(recipe.digest) == {"gitCommit": COMMIT[::-1]}
    assert predicate.build_definition.external_parameters["parameters"]["scheme"] == "int8"
    assert predicate.run_details.builder.id.startswith("pkg:pypi/bigpipe-ml@")
    names = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    assert {subject.name for subject in parsed.subject} == names


def test_the_bill_of_materials_is_valid_and_the_same_each_time(saved: Path) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    bigpipe.attest(saved)
    file = saved.parent / "model.attestations" / "bom.cdx.json"
    text = file.read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    told = json.loads(text)["metadata"]["component"]
    assert told["type"] == "machine-learning-model"
    assert told["pedigree"]["ancestors"][0]["purl"] == f"pkg:huggingface/org/model@{COMMIT}"
    assert {"type": "perplexity", "value": "65.3", "slice": "evaluate"} in (
        told["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    )
    assert told["licenses"] == [{"license": {"name": "apache-2.0"}}]
    assert told["modelCard"]["properties"] == [{"name": "bigpipe:quantization", "value": "int8"}]
    bigpipe.attest(saved)
    assert file.read_text() == text


def test_a_model_of_others_has_no_provenance_and_is_attested_all_the_same(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "README.md").write_text("---\nbase_model: org/other\n---\n")
    (copy / "weights.bin").write_bytes(b"0")
    with pytest.raises(UsageError, match="nothing says what"):
        bigpipe.check_directory(copy, progress=lambda done, total: pytest.fail("it was read"))
    made = bigpipe.attest(copy, tmp_path / "out")
    assert [Path(file).name for file in made.files] == ["bom.cdx.json", "model.sig"]
    assert "nobody knows the build" in made.render()
    assert json.loads((tmp_path / "out" / "bom.cdx.json").read_text())["metadata"]["component"]["pedigree"]
    assert bigpipe.check_directory(copy, tmp_path / "out").documents == {"model.sig": "not signed"}


def test_a_directory_is_held_against_all_that_is_said_of_it(saved: Path) -> None:
    assert bigpipe.check_directory(saved).documents == {"provenance.json": "not signed"}
    bigpipe.attest(saved)
    found = bigpipe.check_directory(saved)
    assert found.error is None
    assert set(found.documents) == {"model.sig", "provenance.sigstore.json", "provenance.json"}
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (saved / "tokenizer.json").unlink()
    (saved / "more.py").write_text("import os\n")
    found = bigpipe.check_directory(saved)
    for document in found.documents:
        told = {each.file: each.problem for each in found.findings if each.against == document}
        assert told == {"model.safetensors": "changed", "tokenizer.json": "missing", "more.py": "extra"}
    assert found.error is not None
    assert found.error.exit_code == 6
    assert "model.safetensors is changed" in found.render()


def test_a_provenance_that_was_changed_is_found_by_the_signature(saved: Path, tmp_path: Path) -> None:
    private, public = make_keys(tmp_path)
    bigpipe.attest(saved, key=private)
    told = (saved / "provenance.json").read_text()
    (saved / "provenance.json").write_text(told.replace('"tiny"', '"tidy"'))
    found = bigpipe.check_directory(saved, key=public)
    assert {each.against for each in found.findings} == {"model.sig", "provenance.sigstore.json"}
    assert {each.file for each in found.findings} == {"provenance.json"}


def test_attestations_that_are_asked_for_must_be_there(saved: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """What lies in the model says the same of it whoever changed it."""
    with pytest.raises(UsageError, match=r"there is neither model\.sig nor"):
        bigpipe.check_directory(saved, tmp_path / "nowhere")
    (saved / "unet").mkdir()
    monkeypatch.chdir(saved / "unet")
    made = bigpipe.attest("..")
    assert str(saved.parent / "model.attestations" / "model.sig") in made.files


def test_signatures_that_do_not_hold(saved: Path, tmp_path: Path) -> None:
    private, public = make_keys(tmp_path)
    _, other = make_keys(tmp_path, "secp384r1", "other")
    place = saved.parent / "model.attestations"
    bigpipe.attest(saved)
    with pytest.raises(StageFailed, match="is not signed"):
        bigpipe.check_directory(saved, key=public)
    bigpipe.attest(saved, key=private)
    assert bigpipe.check_directory(saved).documents["model.sig"] == "not checked"
    assert bigpipe.check_directory(saved, key=public).documents["provenance.sigstore.json"] == "signed"
    with pytest.raises(StageFailed, match="is not signed with this key"):
        bigpipe.check_directory(saved, key=other)

    bundle = json.loads((place / "model.sig").read_text())
    told = statement(place / "model.sig")
    told["predicate"]["resources"][0]["digest"] = "0" * 64

    def forge() -> None:
        bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(told).encode()).decode()
        (place / "model.sig").write_text(json.dumps(bundle))

    forge()
    with pytest.raises(StageFailed, match="is not signed with this key"):
        bigpipe.check_directory(saved, key=public)
    with pytest.raises(InvalidCheckpoint, match="do not add up"):
        bigpipe.check_directory(saved)
    (place / "model.sig").write_text("{}")
    with pytest.raises(InvalidCheckpoint, match="is not a bundle"):
        bigpipe.check_directory(saved)
    (place / "model.sig").unlink()
    with pytest.raises(UsageError, match="a key is given, and there is no"):
        bigpipe.check_directory(saved, key=public)


@pytest.mark.parametrize("change", ["changed", "missing", "extra"])
def test_a_build_is_not_attested_of_files_that_it_did_not_give(saved: Path, change: str) -> None:
    if change == "changed":
        (saved / "tokenizer.json").write_text((saved / "tokenizer.json").read_text() + " ")
    elif change == "missing":
        (saved / "tokenizer.json").unlink()
    else:
        (saved / "more.py").write_text("import os\n")
    with pytest.raises(StageFailed, match=f"is not as its provenance.json says.* is {change}"):
        bigpipe.attest(saved)
    assert not (saved.parent / "model.attestations").exists()


def test_what_cannot_be_attested(saved: Path, tmp_path: Path) -> None:
    _, public = make_keys(tmp_path)
    with pytest.raises(UsageError, match="is not a private key that can be read"):
        bigpipe.attest(saved, key=public)
    private, _ = make_keys(tmp_path, "secp112r1", "old")  # a curve that cryptography does not know
    with pytest.raises(UsageError, match="is not a private key that can be read"):
        bigpipe.attest(saved, key=private)
    with pytest.raises(UsageError, match="lies in the model that is attested"):
        bigpipe.attest(saved, saved / "attestations")
    with pytest.raises(UsageError, match="there is no directory"):
        bigpipe.attest(tmp_path / "nothing")
    (saved / "link").symlink_to("config.json")
    with pytest.raises(UsageError, match="is a link") as error:
        bigpipe.attest(saved)
    assert "real files" in error.value.cure
    assert not (saved.parent / "model.attestations").exists()
