"""Published quantized models, recomputed from what they were made from: what is equal, and what is not by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.hub import LoopbackHub
from support.hub_state import files_of
from support.models import make_checkpoint, tiny_config

import bigpipe
from bigpipe.bigmodel.architecture import read_request
from bigpipe.bigmodel.architecture.instantiation import describe
from bigpipe.bigmodel.checkpoint import describe_opened, open_checkpoint
from bigpipe.bigmodel.formats import stored_offset
from bigpipe.bigmodel.publishing import Provenance, Step
from bigpipe.bigmodel.quantization import (
    Converted,
    Settings,
    largest_magnitudes,
    quantize_described,
    recompute,
    torch_threads,
    understand,
)
from bigpipe.bigmodel.writing import SyntheticModel, encode_config
from bigpipe.errors import InvalidCheckpoint, UsageError

WIDE: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 128},
    "opt": {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "gpt2": {"n_embd": 64},
}
"""bitsandbytes' CPU kernel needs input widths that are multiples of 64, and output widths of 32."""
MADE = {
    "int8": ("llama", {"load_in_8bit": True}, "60KB"),
    "nf4, tied": ("opt", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "5GB"),
    "nf4 twice, bfloat16": (
        "gpt2",
        {
            "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        },
        "5GB",
    ),
    "fp4, some skipped": (
        "llama", {"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head", "q_proj", "no_such_module"]}, "60KB",
    ),
}  # fmt: skip
"""Name → (family, BitsAndBytesConfig, max_shard_size)."""


@pytest.fixture(scope="module", autouse=True)
def _same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(torch_threads())
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {name: make_checkpoint(folder / name, name, max_shard_size="150KB", **WIDE[name]) for name in WIDE}


@pytest.fixture(scope="module")
def published(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Made by transformers and bitsandbytes."""
    folder = tmp_path_factory.mktemp("published")
    for name, (family, options, size) in MADE.items():
        config = transformers.BitsAndBytesConfig(**options)
        dtype = options.get("bnb_4bit_compute_dtype", torch.float16)
        loading = transformers.AutoModelForCausalLM
        model = loading.from_pretrained(sources[family], quantization_config=config, dtype=dtype)
        model.save_pretrained(folder / name, max_shard_size=size)
    return {name: folder / name for name in MADE}


@pytest.fixture
def taken(published: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one, to be changed."""

    def take(name: str) -> Path:
        copy = tmp_path / "published"
        copy.mkdir()
        for file in published[name].iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        return copy

    return take


@pytest.mark.parametrize("name", MADE)
def test_what_transformers_and_bitsandbytes_made_is_proven_equal(
    name: str, published: dict[str, Path], sources: dict[str, Path]
) -> None:
    found = bigpipe.reproduce(published[name], sources[MADE[name][0]])
    assert found.equal
    assert found.error is None
    weights = [file for file in found.files if file.tensors]
    assert sum(file.tensors for file in weights) == len(open_checkpoint(published[name]).tensors)
    assert all(file.became == "equal" and file.equal_bytes == file.bytes for file in weights)
    assert (len(weights) > 1) == (MADE[name][2] == "60KB")
    assert ("no_such_module" in (published[name] / "config.json").read_text()) == ("skipped" in name)
    assert not found.pinned, "a directory is no commit"


def test_of_all_of_a_file_each_byte_counts(taken: Callable[[str], Path], sources: dict[str, Path]) -> None:
    """Any byte behind the header, in whatever tensor, is found, by its tensor and place."""
    copy = taken("nf4 twice, bfloat16")
    file = copy / "model.safetensors"
    whole = file.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    tensors = open_checkpoint(copy).tensors
    for tensor in (tensors["transformer.h.0.attn.c_attn.weight"], tensors["transformer.wte.weight"]):
        place = tensor.offset + tensor.nbytes - 1
        assert place >= begin
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        found = bigpipe.reproduce(copy, sources["gpt2"])
        assert [(each.name, each.what) for each in found.differences] == [(tensor.name, "bytes")]
        assert f"1 of {tensor.nbytes:,} bytes differ, the first is byte {tensor.nbytes - 1:,}" in found.render()
        [weights] = [each for each in found.files if each.tensors]
        assert (weights.became, weights.bytes - weights.equal_bytes) == ("different", 1)
        assert found.error is not None
        assert found.error.exit_code == 6
        assert tensor.name in found.error.cause


SCALES = "model.layers.0.mlp.up_proj.SCB"


def _missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


def _extra(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.backdoor.weight"] = torch.ones(3)


def _dtype(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()


def _shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].contiguous()


def _scaled(tensors: dict[str, torch.Tensor]) -> None:
    tensors[SCALES] *= 1.01


@pytest.mark.parametrize(("change", "name", "what"), [
    (_missing, "model.norm.weight", "missing"), (_extra, "model.backdoor.weight", "extra"),
    (_dtype, "model.norm.weight", "dtype"), (_shape, "model.norm.weight", "shape"), (_scaled, SCALES, "bytes"),
])  # fmt: skip
def test_what_was_changed_is_named(
    change: Callable[[dict[str, torch.Tensor]], None], name: str, what: str, taken: Callable[[str], Path],
    sources: dict[str, Path],
) -> None:  # fmt: skip
    copy = taken("int8")
    tensors = {key: value for file in copy.glob("*.safetensors") for key, value in load_file(file).items()}
    change(tensors)
    for file in [*copy.glob("*.safetensors"), copy / "model.safetensors.index.json"]:
        file.unlink()
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    found = bigpipe.reproduce(copy, sources["llama"])
    assert [(each.name, each.what) for each in found.differences] == [(name, what)]
    assert name in found.render()


@pytest.mark.parametrize("stored", ["both", "the other", "more"])
def test_a_source_may_store_tied_tensors_twice_or_by_the_other_name(
    stored: str, published: dict[str, Path], sources: dict[str, Path], tmp_path: Path
) -> None:
    """And tensors that its class does not have: whoever loads it leaves them out."""
    tensors = {key: value for file in sources["opt"].glob("*.safetensors") for key, value in load_file(file).items()}
    embedded = tensors["model.decoder.embed_tokens.weight"]
    if stored == "both":
        tensors["lm_head.weight"] = embedded.clone()
    elif stored == "the other":
        tensors["lm_head.weight"] = tensors.pop("model.decoder.embed_tokens.weight")
    else:
        tensors["model.decoder.inv_freq"] = torch.ones(4)
    (tmp_path / "config.json").write_bytes((sources["opt"] / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert bigpipe.reproduce(published["nf4, tied"], tmp_path).equal


def test_a_file_that_was_cut_is_named(taken: Callable[[str], Path], sources: dict[str, Path]) -> None:
    copy = taken("int8")
    file = sorted(copy.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InvalidCheckpoint, match=file.name):
        bigpipe.reproduce(copy, sources["llama"])


def test_where_nobody_says_what_it_comes_from(taken: Callable[[str], Path]) -> None:
    copy = taken("int8")
    with pytest.raises(UsageError, match=r"nobody says what .* was made from: its card names no base_model") as error:
        bigpipe.reproduce(copy)
    assert "--source" in error.value.cure
    (copy / "README.md").write_text("---\nbase_model: [org/one, org/two]\n---\n")
    with pytest.raises(UsageError, match="its card names 2 base models"):
        bigpipe.reproduce(copy)
    for odd in ("../secret/model", "5", "{a: b}", "[5]"):
        (copy / "README.md").write_text(f"---\nbase_model: {odd}\n---\n")
        with pytest.raises(UsageError, match="which is no repository"):
            bigpipe.reproduce(copy)


def test_wrong_sources(published: dict[str, Path], sources: dict[str, Path]) -> None:
    with pytest.raises(InvalidCheckpoint, match=r"int8 cannot come from .*opt: the checkpoint has no model"):
        bigpipe.reproduce(published["int8"], sources["opt"])
    with pytest.raises(UsageError, match=r"the source .*int8 is quantized itself"):
        bigpipe.reproduce(published["int8"], published["int8"])
    with pytest.raises(UsageError, match=r"llama cannot be recomputed: it is plain numbers"):
        bigpipe.reproduce(sources["llama"], sources["llama"])
    with pytest.raises(UsageError, match="neither a directory nor the name of a repository"):
        bigpipe.reproduce("org/name/more", sources["llama"])


@pytest.fixture
def hub(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        for name, value in server.environment(tmp_path / "hf").items():
            monkeypatch.setenv(name, value)
        server.create("org/llama", files_of(sources["llama"]))
        yield server


def test_a_repository_whose_card_names_its_source(
    hub: LoopbackHub, published: dict[str, Path], sources: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    card = b"---\nbase_model: org/llama\n---\n"
    first = hub.repositories["org/llama"].branches["main"]
    commit = hub.create("ada/llama-int8", {**files_of(published["int8"]), "README.md": card})
    found = bigpipe.reproduce("ada/llama-int8")
    assert found.equal
    assert (found.commit, found.source, found.source_commit, found.pinned) == (commit, "org/llama", first, False)
    assert f"no commit of the source is on record: it is taken as it is now, {first}" in found.render()

    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "llama").symlink_to(sources["opt"])
    assert bigpipe.reproduce("ada/llama-int8").equal, "what lies here under that name is not the repository"

    other = make_checkpoint(sources["llama"].parent / "moved", "llama", seed=1, max_shard_size="150KB", **WIDE["llama"])
    second = hub.commit("org/llama", files_of(other))
    moved = bigpipe.reproduce("ada/llama-int8")
    assert moved.source_commit == second
    assert not moved.equal
    assert moved.error is not None
    assert "of which commit" in moved.error.cure
    monkeypatch.chdir("/")
    named = bigpipe.reproduce("ada/llama-int8", f"org/llama@{first}")
    assert named.equal
    assert named.pinned


LINEAR = """\
import torch


class Net(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.one = torch.nn.Linear(width, width, bias=False)
        self.two = torch.nn.Linear(width, width, bias=False)
"""
RECIPE = """\
version: 1
name: round-trip
stages:
  download: {uses: download, with: {repo: org/llama}}
  shard: {uses: shard, inputs: download, with: {max_shard_size: 100KB, dtype: bfloat16}}
  quantize:
    uses: quantize
    inputs: shard
    with: {scheme: nf4, bnb_4bit_use_double_quant: true, keep_in_fp32_modules: [lm_head]}
  save: {uses: save, inputs: quantize, with: {to: dist/model}}
"""


def test_what_bigpipe_published_says_itself_where_it_comes_from(hub: LoopbackHub, workshop: Any) -> None:
    """Cast to bfloat16 first and to float16 then, from the commit that it was made from, whatever came since."""
    result = workshop.run(RECIPE)
    assert result.status == "succeeded", result.errors
    first, saved = hub.repositories["org/llama"].branches["main"], workshop.folder / "dist" / "model"
    hub.commit("org/llama", {"model.safetensors": b"something else"})
    found = bigpipe.reproduce(saved)
    assert found.equal, found.render()
    assert (found.source, found.source_commit, found.pinned, found.notes) == ("org/llama", first, True, found.notes)
    became = {file.name: file.became for file in found.files}
    assert {became["config.json"], became["generation_config.json"], became["tokenizer.json"]} == {"equal"}
    assert became["README.md"] == became["provenance.json"] == "not recomputed"

    for name in ("config.json", "tokenizer.json"):
        whole = (saved / name).read_bytes()
        (saved / name).write_bytes(whole.replace(b"{", b"{ ", 1))
        assert [each.file for each in bigpipe.reproduce(saved).differences] == [name]
        (saved / name).write_bytes(whole)
    (saved / ".git").mkdir()
    (saved / ".git" / "HEAD").write_text("ref: refs/heads/main")
    (saved / "tokenizer.json").unlink()
    absent = bigpipe.reproduce(saved)
    assert [(each.file, each.what) for each in absent.differences] == [("tokenizer.json", "missing")]
    assert ".git/HEAD" not in {file.name for file in absent.files}
    (saved / "tokenizer.json").write_bytes(whole)

    told = json.loads((saved / "provenance.json").read_text())
    (saved / "provenance.json").write_text(json.dumps(told | {"steps": [{"node": 1}]}))
    with pytest.raises(InvalidCheckpoint, match=r"provenance\.json.*steps"):
        bigpipe.reproduce(saved)
    odd = [{**step, "params": {**step["params"], "skip_modules": 5}} for step in told["steps"]]
    (saved / "provenance.json").write_text(json.dumps(told | {"steps": odd}))
    with pytest.raises(InvalidCheckpoint, match="what it says of how it was made cannot be read"):
        bigpipe.reproduce(saved)
    merge = {**told["steps"][0], "kind": "merge", "node": "merge"}
    (saved / "provenance.json").write_text(json.dumps(told | {"steps": [*told["steps"], merge]}))
    assert bigpipe.reproduce(saved).equal, "another model was merged"
    merged = [{**step, "kind": "merge"} if step["node"] == "shard" else step for step in told["steps"]]
    (saved / "provenance.json").write_text(json.dumps(told | {"steps": merged}))
    with pytest.raises(UsageError, match="made with an adapter"):
        bigpipe.reproduce(saved)
    small = [
        {**step, "params": {**step["params"], "miniature": True}} if step["kind"] == "download" else step
        for step in told["steps"]
    ]
    (saved / "provenance.json").write_text(json.dumps(told | {"steps": small}))
    with pytest.raises(UsageError, match="its recipe took a miniature"):
        bigpipe.reproduce(saved)
    (saved / "provenance.json").unlink()
    by_card = bigpipe.reproduce(saved)
    assert (by_card.source_commit, by_card.pinned) == (first, True), "our card has the commit too"


def _say(published: Path, casts: Sequence[str | None], **quantize: Any) -> None:
    """Write the `provenance.json` of a model that came from a directory over these shards."""
    given: list[tuple[str, dict[str, Any]]] = [
        ("download", {"path": "somewhere"}), *(("shard", {"dtype": dtype}) for dtype in casts), ("quantize", quantize),
    ]  # fmt: skip
    steps = [
        Step(f"{kind}{at}", kind, "", None, params, {}, inputs={"model": [f"{given[at - 1][0]}{at - 1}"]} if at else {})
        for at, (kind, params) in enumerate(given)
    ]
    told = Provenance(recipe="by hand", node="save", model=steps[-1].node, steps=tuple(steps))
    (published / "provenance.json").write_text(told.json({}))


@pytest.mark.parametrize("casts", [("float16",), ("bfloat16", None), ("bfloat16", "float16")], ids=str)
def test_all_casts_are_repeated_and_what_no_download_takes_is_not_missed(
    casts: tuple[str | None, ...], tmp_path: Path
) -> None:
    """Of float32, with a weight that stays so: each cast leaves its mark on it."""
    source = last = make_checkpoint(tmp_path / "source", "llama", dtype="float32", **WIDE["llama"])
    for number, dtype in enumerate(casts):
        bigpipe.save_checkpoint(last, tmp_path / f"shard{number}", dtype=dtype)
        last = tmp_path / f"shard{number}"
    asked: dict[str, Any] = {"scheme": "int8", "dtype": "float16", "keep_in_fp32_modules": ["down_proj"]}
    bigpipe.quantize_checkpoint(last, tmp_path / "published", **asked)
    _say(tmp_path / "published", casts, **asked)
    for name in ("train.log", "loss.png"):
        (source / name).write_text("of the training")
    found = bigpipe.reproduce(tmp_path / "published", source)
    assert found.equal, found.render()


def test_a_class_of_ones_own_is_as_recomputed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ownlinear.py").write_text(LINEAR)
    monkeypatch.syspath_prepend(tmp_path)
    source, own = tmp_path / "source", {"class": "ownlinear:Net", "config": {"width": 64}}
    source.mkdir()
    save_file({"one.weight": torch.randn(64, 64), "two.weight": torch.randn(64, 64)}, source / "model.safetensors")
    trusted: dict[str, Any] = {"trust": ["ownlinear"], "base": tmp_path}
    described = {**own, "source": "sha256:of the download"}
    bigpipe.quantize_checkpoint(source, tmp_path / "published", scheme="int8", architecture=described, **trusted)
    (source / "bigpipe_architecture.json").write_text(json.dumps(own))
    _say(tmp_path / "published", (), scheme="int8")
    found = bigpipe.reproduce(tmp_path / "published", source, **trusted)
    assert found.equal, found.render()
    file = tmp_path / "published/bigpipe_architecture.json"
    file.write_text(file.read_text().replace("ownlinear:Net", "other:Net"))
    changed = bigpipe.reproduce(tmp_path / "published", source, **trusted)
    assert [each.file for each in changed.differences] == ["bigpipe_architecture.json"]


def _large(folder: Path) -> Path:
    """Of which one matrix has more scales than torch sums in one thread."""
    tiny_config("opt", architectures=["OPTForCausalLM"], hidden_size=1024, ffn_dim=8192, word_embed_proj_dim=1024,
                num_hidden_layers=1).save_pretrained(folder)  # fmt: skip
    architecture = describe(read_request(folder))
    SyntheticModel(json.loads((folder / "config.json").read_text()), architecture).write(folder / "opt")
    return folder / "opt"


def _settings(threads: int) -> Settings:
    return Settings(scheme="nf4", bnb_4bit_use_double_quant=True, threads=threads)


def _offsets(folder: Path) -> list[float | None]:
    opened = open_checkpoint(folder)
    return [stored_offset(opened.read(name)) for name in opened.tensors if name.endswith("__nf4")]


def test_a_mean_that_more_threads_summed_is_found(tmp_path: Path) -> None:
    source = _large(tmp_path)
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, threads in ((here, torch_threads()), (there, 1 if torch_threads() > 1 else 2)):
        quantize_described(open_checkpoint(source), folder, _settings(threads))
    assert _offsets(here) != _offsets(there), "the last bit of a mean depends on the number of threads"
    found = bigpipe.reproduce(there, source)
    assert found.equal
    assert not any("taken as published" in note for note in found.notes)


@pytest.mark.parametrize(("off", "equal"), [(2e-7, True), (1e-4, False)])
def test_a_mean_that_no_cpu_sums_to_is_taken_where_it_is_near(off: float, equal: bool, tmp_path: Path) -> None:
    """As a GPU's: the codes of the scales follow from it."""
    source = make_checkpoint(tmp_path / "opt", "opt", **WIDE["opt"])
    opened, settings = open_checkpoint(source), _settings(1)
    outlined, described = understand(describe_opened(opened), settings)
    weights = [part for part in outlined.parts if isinstance(part, Converted)]
    absmax = dict(zip((part.source for part in weights), largest_magnitudes(opened, weights, settings), strict=True))

    def measured(part: Any) -> Any:
        if part.source not in absmax:
            return part
        mean = np.float32(settings.packing.measure(absmax[part.source], 1))
        return replace(part, measured=float(np.float32(mean * (1 + off))))

    tensors = {}
    for planned, pieces in recompute(opened, [measured(part) for part in outlined.parts], settings):
        content = bytearray(b"".join(map(bytes, pieces)))
        tensors[planned.name] = torch.frombuffer(content, dtype=getattr(torch, planned.dtype)).reshape(planned.shape)
    out = tmp_path / "out"
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_bytes(encode_config(described.config or {}))
    found = bigpipe.reproduce(out, source)
    assert found.equal == equal
    assert any("taken as published: no CPU sums to its last bits" in note for note in found.notes) == equal
    if not equal:
        assert {each.name.rpartition(".")[2] for each in found.differences} >= {"bitsandbytes__nf4"}


CONSTANT = """
import re, sys
import bigpipe
published, source, memo = sys.argv[1:]
found = bigpipe.reproduce(published, source, memo=memo)
assert found.equal, found.render()
assert "torch" not in sys.modules
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
"""


def test_memory_stays_far_below_the_weights_and_torch_is_not_imported(tmp_path: Path) -> None:
    sizes = {"hidden_size": 2048, "ffn_dim": 8192, "word_embed_proj_dim": 2048, "num_hidden_layers": 4}
    tiny_config("opt", architectures=["OPTForCausalLM"], **sizes).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    SyntheticModel(config, describe(read_request(tmp_path))).write(tmp_path / "opt")
    quantize_described(open_checkpoint(tmp_path / "opt"), tmp_path / "out", _settings(torch_threads()))
    assert open_checkpoint(tmp_path / "opt").nbytes > 400 * 10**6
    command = [sys.executable, "-c", CONSTANT, *(str(tmp_path / name) for name in ("out", "opt", "memo"))]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout)
    assert peak < 256 * 2**20
