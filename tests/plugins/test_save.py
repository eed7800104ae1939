"""The kind `save`: directories, fsspec URLs, and a Hub on loopback through the real client."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import huggingface_hub
import pytest
import yaml
from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from pydantic import ValidationError
from s3fs import S3FileSystem
from support.contexts import Lineage, check_context, forecast_context, inputs, stage_context
from support.hub import LoopbackHub
from support.models import make_checkpoint
from support.sharing import BUCKET, S3, s3_server
from support.workshop import Workshop, statuses

import bigpipe
from bigpipe.bigmodel.checkpoint import ModelDescription, open_checkpoint
from bigpipe.bigmodel.origin import check_directory
from bigpipe.bigmodel.publishing import (
    Contents,
    Directory,
    Provenance,
    Step,
    led_to,
    open_destination,
    publish,
    read_provenance,
)
from bigpipe.bigmodel.publishing.card import card_of, front_matter
from bigpipe.bigmodel.publishing.destinations import FileSystem, Receipt, Stored, is_present
from bigpipe.bigmodel.publishing.publication import inspect
from bigpipe.bigmodel.writing import save_checkpoint
from bigpipe.environment import inherited
from bigpipe.errors import InvalidCheckpoint, NotAuthorised, Offline, StageFailed, Transient, UsageError
from bigpipe.orchestrator.stage import Forecast, StageResult
from bigpipe.plugins.save import STAGE, SaveMetrics, SaveParams

MODEL = {
    "config.json": b'{"model_type": "opt"}',
    "model.safetensors": os.urandom(50_000),
    "README.md": b"---\nlicense: mit\n---\nof the base model\n",
}
RESULTS = {"results.jsonl": b'{"index": 0, "prompt": "a", "text": "b"}\n'}
RECIPE = "version: 1\nname: tiny-int8\nstages: {}\n"
STEPS: tuple[tuple[str, str, dict[str, Any], dict[str, Any]], ...] = (
    ("download", "download", {"repo": "facebook/opt-13b"}, {"bytes": 100, "commit": "c" * 40}),
    ("estimate", "estimate", {}, {"int8": {"inference": 5}}),
    ("quantize", "quantize", {"scheme": "int8"}, {"bytes": 13_000_000_000, "ratio": 0.51}),
    ("generate", "distributed-infer", {"task": "text-generation"}, {"tokens_per_second": 7.25}),
)
LINEAGE = tuple(Lineage(node, kind, f"key of {node}", f"sha256:{node}", *rest) for node, kind, *rest in STEPS)


def artifact(store: Path, files: dict[str, bytes]) -> Path:
    """As the store keeps them: a directory of links to read-only objects."""
    folder = store / "artifacts" / uuid.uuid4().hex
    folder.mkdir(parents=True)
    (store / "objects").mkdir(exist_ok=True)
    for name, content in files.items():
        kept = store / "objects" / hashlib.sha256(content).hexdigest()
        if not kept.exists():
            kept.write_bytes(content)
            kept.chmod(0o444)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(kept)
    return folder


def params(to: str, **given: Any) -> SaveParams:
    return SaveParams.model_validate({"to": to, **given})


def save(root: Path, given: SaveParams, environment: dict[str, str] | None = None, **context: Any) -> StageResult:
    wired = context.pop("inputs", None) or inputs(
        model=artifact(root / "store", MODEL), results=artifact(root / "store", RESULTS)
    )
    return STAGE.run(
        given,
        stage_context(
            root, environment=environment or {}, inputs=wired, lineage=LINEAGE, recipe=RECIPE, recipe_name="tiny-int8",
            **context,
        ),
    )  # fmt: skip


def check(root: Path, given: SaveParams, environment: dict[str, str] | None = None, **context: Any) -> None:
    assert STAGE.planning.check is not None
    wired = {"model": (Forecast(),)}
    STAGE.planning.check(given, check_context(root, environment=environment or {}, inputs=wired, **context))


def present(root: Path, given: SaveParams, environment: dict[str, str] | None = None, **context: Any) -> bool:
    assert STAGE.planning.present is not None
    return STAGE.planning.present(given, root / "out", check_context(root, environment=environment or {}, **context))


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def metrics(result: StageResult) -> SaveMetrics:
    assert isinstance(result.metrics, SaveMetrics)
    return result.metrics


def test_a_directory_gets_real_files_a_card_and_provenance(tmp_path: Path) -> None:
    given = params("dist/model")
    check(tmp_path, given)
    found = metrics(save(tmp_path, given))
    target = tmp_path / "base" / "dist" / "model"
    saved = tree(target)
    assert sorted(saved) == [
        "README.md", "config.json", "model.safetensors", "provenance.json", "results/results.jsonl",
    ]  # fmt: skip
    assert saved["model.safetensors"] == MODEL["model.safetensors"]
    assert saved["results/results.jsonl"] == RESULTS["results.jsonl"]
    for path in target.rglob("*"):
        assert not path.is_symlink()
        assert os.access(path, os.W_OK)
    assert not list((tmp_path / "base" / "dist").glob(".*"))
    assert (found.url, found.files, found.bytes) == (str(target), 5, sum(map(len, saved.values())))
    provenance = json.loads(saved["provenance.json"])
    assert [step["node"] for step in provenance["steps"]] == ["download", "estimate", "quantize", "generate"]
    for name, listed in provenance["files"].items():
        assert listed == {"sha256": hashlib.sha256(saved[name]).hexdigest(), "size": len(saved[name])}


def test_what_was_written_is_read_through_its_own_index_before_it_counts(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "opt", max_shard_size="20KB")
    save(tmp_path, params("dist/model"), inputs=inputs(model=model))
    target = tmp_path / "base" / "dist" / "model"
    saved, original = open_checkpoint(target), open_checkpoint(model)
    assert len(saved.files) > 1
    assert {name: saved.read(name) for name in saved.tensors} == {name: original.read(name) for name in saved.tensors}

    inspect(model, target)
    save_checkpoint(model, tmp_path / "cast", dtype="float16")
    with pytest.raises(StageFailed, match=r"does not read back as the model: model\.decoder"):
        inspect(model, tmp_path / "cast")
    saved.files[0].unlink()
    with pytest.raises(InvalidCheckpoint, match=f"names {saved.files[0].name}, which is not there"):
        inspect(model, target)


def test_the_card_names_base_model_licence_recipe_and_measurements(tmp_path: Path) -> None:
    save(tmp_path, params("dist/tiny-int8", card={"language": "en", "tags": ["mine"]}))
    card = (tmp_path / "base" / "dist" / "tiny-int8" / "README.md").read_text()
    assert front_matter(card) == {
        "base_model": "facebook/opt-13b",
        "base_model_relation": "quantized",
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mine"],
        "language": "en",
    }
    assert "# tiny-int8" in card
    assert f"```yaml\n{RECIPE}```" in card
    assert "| quantize | bytes | 12.1 GiB |" in card
    assert "| generate | tokens_per_second | 7.25 |" in card
    assert "| estimate |" not in card
    assert "AutoModel.from_pretrained" in card


@pytest.mark.parametrize(("config", "library", "loaded_as"), [
    ({"architecture": "resnet50", "num_classes": 1000}, "timm", None),
    ({"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30.0"}, "diffusers", None),
    ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "transformers",
     "T5ForConditionalGeneration"),
    ({"model_type": "bert"}, "transformers", "AutoModel"),
    ({"model_type": "own", "architectures": ["Own"], "auto_map": {"AutoConfig": "o.C", "AutoModelForCTC": "o.Own"}},
     "transformers", "AutoModelForCTC"),
    ({"model_type": "own", "auto_map": {"AutoConfig": "o.C", "AutoModel": "o.Own"}}, "transformers", "AutoModel"),
    ({"hidden_size": 3}, None, None), (None, None, None),
])  # fmt: skip
@pytest.mark.parametrize("tokenizer", [True, False])
def test_the_card_says_how_the_model_that_is_saved_is_loaded(
    tmp_path: Path, config: dict[str, Any] | None, library: str | None, loaded_as: str | None, tokenizer: bool
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    if tokenizer:
        (tmp_path / "tokenizer.json").write_text("{}")
    card = card_of(tmp_path, Provenance(), "org/name", {})
    assert front_matter(card).get("library_name") == library
    if loaded_as is None:
        assert "from_pretrained" not in card
        return
    allowed = ", trust_remote_code=True" if "auto_map" in (config or {}) else ""
    assert f'model = {loaded_as}.from_pretrained("org/name", device_map="auto"{allowed})' in card
    assert (f'AutoTokenizer.from_pretrained("org/name"{allowed})' in card) == tokenizer


@pytest.mark.parametrize(("told", "allowed"), [
    ({"tokenizer_class": "PreTrainedTokenizerFast"}, False),
    ({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["o.Own", None]}}, True),
    ({}, False),
])  # fmt: skip
def test_the_card_allows_code_that_came_with_a_tokenizer(tmp_path: Path, told: dict[str, Any], allowed: bool) -> None:
    """Whatever the model is."""
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    card = card_of(tmp_path, Provenance(), "org/name", {})
    assert ('AutoTokenizer.from_pretrained("org/name", trust_remote_code=True)' in card) == allowed
    assert 'T5ForConditionalGeneration.from_pretrained("org/name", device_map="auto")' in card


TUNED = tuple(
    Step(node=node, kind=kind, key="", digest=None, params=given, metrics={})
    for node, kind, given in (
        ("download", "download", {"repo": "org/model"}),
        ("quantize", "quantize", {"scheme": "nf4"}),
        ("tune", "finetune", {"task": "causal-lm"}),
    )
)


@pytest.mark.parametrize(("told", "steps", "base", "loaded_as"), [
    ({"base_model_name_or_path": "org/base", "task_type": "CAUSAL_LM"}, TUNED[:1], "org/base", "AutoModelForCausalLM"),
    ({"base_model_name_or_path": "org/base", "auto_mapping": {"base_model_class": "OPTForCausalLM"}}, (), "org/base",
     "OPTForCausalLM"),
    ({"base_model_name_or_path": "/home/ada/base"}, TUNED[:1], None, None),
    ({"base_model_name_or_path": None}, TUNED, "org/model", None),
])  # fmt: skip
def test_the_card_of_an_adapter_names_its_model(
    tmp_path: Path, told: dict[str, Any], steps: tuple[Step, ...], base: str | None, loaded_as: str | None
) -> None:
    """And not how that was quantized when it was trained."""
    (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    card = card_of(tmp_path, Provenance(steps=steps), "me/tuned", {})
    expected = {"base_model": base, "base_model_relation": "adapter"} if base else {}
    assert front_matter(card) == {**expected, "library_name": "peft", "tags": ["bigpipe"]}
    assert "quantized" not in card
    assert ('PeftModel.from_pretrained(model, "me/tuned")' in card) == (loaded_as is not None)
    assert loaded_as is None or f'model = {loaded_as}.from_pretrained("{base}"' in card


def test_adapters_are_saved_from_where_they_are_trained(workshop: Workshop) -> None:
    workshop.manifest.write_text("""\
version: 1
name: tuned
stages:
  model: {uses: download, with: {repo: org/model}}
  tune: {uses: finetune, inputs: model, with: {data: [a, b], max_steps: 1}}
  save: {uses: save, inputs: tune, with: {to: dist}}
""")
    assert bigpipe.load_manifest(workshop.manifest).nodes["save"].inputs == {"model": ("tune",)}


def test_the_card_loads_a_variant_as_one(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = make_checkpoint(tmp_path / "model", "llama")
    (model / "model.safetensors").rename(model / "model.fp16.safetensors")
    assert 'LlamaForCausalLM.from_pretrained("me/half", variant="fp16", device_map' in card_of(
        model, Provenance(), "me/half", {}
    )
    AutoModelForCausalLM.from_pretrained(model, variant="fp16")


def card_with(root: Path, provenance: Provenance, **extra: Any) -> dict[str, Any]:
    return front_matter(card_of(root, provenance, "name", extra))


def test_the_card_keeps_the_name_and_place_of_a_licence_of_its_own(tmp_path: Path) -> None:
    licence = {"license": "other", "license_name": "llama3", "license_link": "LICENSE"}
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(licence)}---\n")
    kept = card_with(tmp_path, Provenance())
    assert {name: value for name, value in kept.items() if name in licence} == licence
    other = card_with(tmp_path, Provenance(), license="mit")
    assert {name: value for name, value in other.items() if name in licence} == {"license": "mit"}


@pytest.mark.parametrize(
    "readme",
    [
        "\ufeff---\nlicense: mit\n---\n",
        "\n \n---\nlicense: mit\n---\n",
        "<!-- made by\n a tool -->\n<!-- -- -->\n---\nlicense: mit\n---\n",
        "---\ntags: &all [a]\nlicense: mit\ndatasets: *all\n---\n",
        "---\ndatasets:\n- *all\nlicense: mit\n---\n",
    ],
)
def test_a_licence_is_found_whatever_stands_around_it(tmp_path: Path, readme: str) -> None:
    (tmp_path / "README.md").write_text(readme)
    assert card_with(tmp_path, Provenance())["license"] == "mit"


def test_a_head_that_is_none_is_looked_through_once() -> None:
    for text in ("<!--" * 200_000, "<!-- -->" * 100_000, "\n" * 500_000 + "x", "---\n" + "a: *b\n" * 100_000 + "---\n"):
        started = time.process_time()
        assert front_matter(text) == {}
        assert time.process_time() - started < 20


def test_the_card_is_about_the_model_that_is_saved(workshop: Workshop) -> None:
    """Not about a baseline, an adapter, or another precision that was only measured beside it."""
    model = "{model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 8, vocab_size: 16, n_positions: 8}"
    text = f"""
version: 1
name: compared
stages:
  mine: {{uses: download, with: {{synthetic: {{config: {model}, seed: 1}}}}}}
  other: {{uses: download, with: {{synthetic: {{config: {model}, seed: 2}}}}}}
  told: {{uses: estimate, inputs: {{model: other}}}}
  save: {{uses: save, inputs: {{model: mine, reports: told}}, with: {{to: dist}}}}
"""
    assert set(statuses(workshop.run(text)).values()) == {"succeeded"}
    published = read_provenance(workshop.folder / "dist")
    assert published is not None
    download = published.provenance.last("download")
    assert download is not None
    assert (download.node, [step.node for step in published.provenance.steps]) == ("mine", ["mine", "other", "told"])


def test_what_led_to_a_model_goes_along_the_port_of_models() -> None:
    def step(node: str, kind: str, **inputs: Any) -> Step:
        ports = {port: names for port, names in inputs.items() if port != "left"}
        return Step(node, kind, "key", None, {"repo": f"org/{node}"}, {}, inputs.get("left", ""), ports)

    steps = (
        step("base", "download"),
        step("adapter", "download"),
        step("merged", "merge", model=["base"], adapter=["adapter"]),
        step("first", "quantize", model=["merged"], left="too bad"),
        step("second", "quantize", model=["merged"]),
        step("chosen", "command", thing=["first", "second"]),
        step("baseline", "download"),
        step("measured", "evaluate", model=["chosen"], baseline=["baseline"]),
    )
    assert [each.node for each in led_to("chosen", steps)] == ["base", "merged", "second", "chosen"]
    assert Provenance(steps=steps, model="chosen").param("download", "repo") == "org/base"
    assert Provenance(steps=steps).param("download", "repo") == "org/baseline"  # where nobody knows, the last


PARAMETERS = """\
version: 1
name: told
params: {to: one, notes: {a: "x|y"}}
stages:
  download: {uses: download, with: {synthetic: {config: {model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 8}, seed: 7}}}
  save: {uses: save, inputs: download, with: {to: "${params.to}"}}
"""


def test_card_and_provenance_hold_the_parameters_that_were_used_and_the_commit(workshop: Workshop) -> None:
    def git(*words: str) -> str:
        own = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *own, *words], cwd=workshop.folder, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    workshop.manifest.write_text(PARAMETERS)
    git("init", "-q")
    git("add", "recipe.yaml")
    git("commit", "-qm", "one")
    assert workshop.command("run", "recipe.yaml", "-p", "to=two").returncode == 0
    card = (workshop.folder / "two" / "README.md").read_text()
    assert "| to | two |" in card
    assert '| notes | {"a": "x\\|y"} |' in card
    assert f"at git commit `{git('rev-parse', 'HEAD')}`.\n" in card
    provenance = json.loads((workshop.folder / "two" / "provenance.json").read_text())
    assert provenance["params"] == {"to": "two", "notes": {"a": "x|y"}}
    assert provenance["git"] == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    workshop.manifest.write_text(PARAMETERS + "# changed\n")
    assert workshop.command("run", "recipe.yaml", "-p", "to=three").returncode == 0
    assert "`, with changes that are not in it." in (workshop.folder / "three" / "README.md").read_text()


def test_the_card_names_the_seeds_of_steps(tmp_path: Path) -> None:
    metrics = {"prompts": 3, "timeline": {"0": {"began": 0.5, "ended": 2.5}}}
    step = Step("generate", "distributed-infer", "key", None, {"task": "text-generation", "seed": 5}, metrics)
    card = card_of(tmp_path, Provenance(recipe="r", text="version: 1", steps=(step,)), "name", {})
    assert "| generate | prompts | 3 |" in card
    assert "timeline" not in card, "when ranks were at work is nothing about the model"
    assert "| generate.seed | 5 |" in card


def test_reports_of_several_nodes_lie_in_folders_of_their_names(tmp_path: Path) -> None:
    one, two = (artifact(tmp_path / "store", {"report.json": text}) for text in (b"1", b"2"))
    save(tmp_path, params("one"), inputs=inputs(reports=one))
    assert sorted(tree(tmp_path / "base" / "one")) == ["provenance.json", "reports/report.json"]
    lineage = tuple(
        Lineage(f"estimate@dtype={dtype}", "estimate", "k", f"sha256:{path.name}", {}, {})
        for dtype, path in (("int8", one), ("nf4", two))
    )
    context = stage_context(tmp_path, inputs=inputs(reports=[one, two]), lineage=lineage)
    STAGE.run(params("two"), context)
    assert tree(tmp_path / "base" / "two")["reports/estimate@dtype=nf4/report.json"] == b"2"


def test_a_receipt_is_a_hit_until_the_destination_changes(tmp_path: Path) -> None:
    given = params("dist")
    save(tmp_path, given)
    receipt = json.loads((tmp_path / "out" / "receipt.json").read_bytes())
    assert receipt["files"]["config.json"]["sha256"] == hashlib.sha256(MODEL["config.json"]).hexdigest()
    assert present(tmp_path, given)
    config = tmp_path / "base" / "dist" / "config.json"
    os.utime(config)
    assert present(tmp_path, given)  # touched, but read and found equal
    config.write_bytes(MODEL["config.json"].replace(b"opt", b"OPT"))
    assert not present(tmp_path, given)
    config.unlink()
    assert not present(tmp_path, given)


def test_a_run_that_was_killed_before_its_receipt_can_be_repeated(tmp_path: Path) -> None:
    given = params("dist")
    save(tmp_path, given)
    (tmp_path / "out" / "receipt.json").unlink()
    check(tmp_path, given)
    save(tmp_path, given)
    assert present(tmp_path, given)


def test_what_a_killed_session_left_beside_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "base" / ".dist.bigpipe-killed"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    save(tmp_path, params("dist"))
    assert sorted(path.name for path in (tmp_path / "base").iterdir()) == ["dist"]


def test_what_others_wrote_or_changed_is_not_replaced_unless_asked(tmp_path: Path) -> None:
    target = tmp_path / "base" / "dist"
    target.mkdir(parents=True)
    check(tmp_path, params("dist"))  # an empty directory is in nobody's way
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="1 file that bigpipe did not write") as caught:
        check(tmp_path, params("dist"))
    assert "overwrite: true" in caught.value.cure
    check(tmp_path, params("dist", overwrite=True))
    save(tmp_path, params("dist", overwrite=True))
    assert not (target / "thesis.tex").exists()
    check(tmp_path, params("dist"))
    card = target / "README.md"
    card.write_text(card.read_text().replace("Made", "made"))
    with pytest.raises(UsageError, match=r"changed since it was saved: README\.md"):
        check(tmp_path, params("dist"))


def test_weights_that_somebody_trained_in_place_are_not_replaced(tmp_path: Path) -> None:
    """A plan does not read large files, so the run does before it replaces them."""
    large = {**MODEL, "model.safetensors": bytes(10_000_001)}
    model = inputs(model=artifact(tmp_path / "store", large))
    save(tmp_path, params("dist"), inputs=model)
    weights = tmp_path / "base" / "dist" / "model.safetensors"
    save(tmp_path, params("dist"), inputs=model)
    with weights.open("r+b") as file:
        file.write(b"theirs")
    with pytest.raises(UsageError, match=r"was changed since it was saved: model\.safetensors"):
        save(tmp_path, params("dist"), inputs=model)
    assert weights.read_bytes()[:6] == b"theirs"


def test_a_link_that_somebody_put_there_is_a_change(tmp_path: Path) -> None:
    save(tmp_path, params("dist"))
    for name, target in (("logs", tmp_path), ("gone", tmp_path / "nothing")):
        link = tmp_path / "base" / "dist" / name
        link.symlink_to(target)
        with pytest.raises(UsageError, match=f"was changed since it was saved: {name}"):
            check(tmp_path, params("dist"))
        link.unlink()
    check(tmp_path, params("dist"))


def test_another_recipes_output_is_not_replaced(tmp_path: Path) -> None:
    save(tmp_path, params("dist"))
    with pytest.raises(UsageError, match="written by node test of recipe 'tiny-int8'"):
        save(tmp_path, params("dist"), node="save@scheme=nf4")


def test_the_plan_knows_another_recipes_output(workshop: Workshop) -> None:
    make_checkpoint(workshop.folder / "model")
    recipe = (
        "version: 1\nname: NAME\nstages:\n  download: {uses: download, with: {path: model}}\n"
        "  shard: {uses: shard, inputs: download, with: {max_shard_size: SIZE}}\n"
        "  save: {uses: save, inputs: {model: shard}, with: {to: dist}}\n"
    )
    for name, size in (("one", "1MB"), ("other", "50KB")):
        (workshop.folder / f"{name}.yaml").write_text(recipe.replace("NAME", name).replace("SIZE", size))
    assert workshop.command("run", "one.yaml").returncode == 0
    assert workshop.command("plan", "one.yaml").returncode == 0
    refused = workshop.command("plan", "other.yaml")
    assert refused.returncode == 2
    assert "dist was written by node save of recipe 'one'" in refused.stderr
    assert "other.yaml:6:" in refused.stderr


@pytest.mark.parametrize("to", [".", "..", "~"])
def test_the_recipes_own_directory_is_never_replaced(tmp_path: Path, to: str) -> None:
    with pytest.raises(UsageError, match="it holds the recipe or your home"):
        check(tmp_path, params(to, overwrite=True))


def test_a_git_repository_and_a_file_in_the_way_are_refused(tmp_path: Path) -> None:
    (tmp_path / "base" / "repo" / ".git").mkdir(parents=True)
    with pytest.raises(UsageError, match="is a git repository"):
        check(tmp_path, params("repo", overwrite=True))
    (tmp_path / "base" / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        check(tmp_path, params("file", overwrite=True))


def test_nothing_wired_is_nothing_to_save(tmp_path: Path) -> None:
    assert STAGE.planning.check is not None
    with pytest.raises(UsageError, match="nothing to save"):
        STAGE.planning.check(params("dist"), check_context(tmp_path))


def test_a_failure_leaves_the_old_version_in_place(tmp_path: Path) -> None:
    """Somebody writes into the new version while it is being made."""
    save(tmp_path, params("dist"))
    target, source = tmp_path / "base" / "dist", tmp_path / "config.json"
    before = tree(target)
    source.write_text("{}")
    with Directory(target).replacing(tmp_path) as new:
        stored = Directory(target).put(new, "config.json", source, lambda size: None)
        assert [new] == list(target.parent.glob(".dist.bigpipe-*"))
        (new / "config.json").write_text('{"model_type": "gpt"}')
        with pytest.raises(StageFailed, match="reads back as sha256"):
            Directory(target).finish(new, {"config.json": stored})
    assert tree(target) == before
    assert sorted(path.name for path in (tmp_path / "base").iterdir()) == ["dist"]


def test_another_model_at_the_destination_is_not_what_the_receipt_says(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    save(first, params(f"file://{tmp_path}/dist"))
    other = inputs(model=artifact(second / "store", {**MODEL, "config.json": b'{"model_type": "gpt"}'}))
    save(second, params(f"file://{tmp_path}/dist"), inputs=other)
    assert not present(first, params(f"file://{tmp_path}/dist"))
    assert present(second, params(f"file://{tmp_path}/dist"))


@pytest.mark.parametrize("receipt", ["", "[]", '{"files": {"a": {}}}', '{"url": "", "commit": null, "files": []}'])
def test_a_damaged_receipt_shows_nothing_to_be_there(tmp_path: Path, receipt: str) -> None:
    save(tmp_path, params("dist"))
    assert present(tmp_path, params("dist"))
    (tmp_path / "out" / "receipt.json").write_text(receipt)
    assert not present(tmp_path, params("dist"))


def test_a_card_says_that_weights_are_made_up(tmp_path: Path) -> None:
    step = Step("download", "download", "key", None, {"synthetic": {"config": {}}}, {"commit": None})
    card = card_of(tmp_path, Provenance(recipe="tiny", steps=(step,)), "dist", {})
    assert "Made from made-up weights." in card


def test_a_file_url_is_a_directory(tmp_path: Path) -> None:
    found = metrics(save(tmp_path, params(f"file://{tmp_path}/elsewhere")))
    assert found.url == f"{tmp_path}/elsewhere"
    assert (tmp_path / "elsewhere" / "model.safetensors").read_bytes() == MODEL["model.safetensors"]


@pytest.mark.parametrize(
    ("to", "told"),
    [
        ("memory://a/model", "is gone once the run is over"),
        ("simplecache::memory://a/model", "is gone once the run is over"),
        ("https://example.org/model", "https only reads"),
        ("zip://model::file:///srv/model.zip", "zip only reads"),
        ("hf:/org/model", "neither a path nor an address; write hf://org/model"),
        ("hf:org/model", "write hf://org/model"),
        ("s3:/bucket/model", "write s3://bucket/model"),
        ("dist/gs:/bucket", "neither a path nor an address"),
        ("file://dist/model", "no absolute path; write a path alone"),
    ],
)
def test_what_is_saved_where_nothing_stays_is_refused_by_validate(to: str, told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        SaveParams(to=to)


@pytest.mark.parametrize("to", ["dist/12:30/model", "a:b", "file:///srv/model", "hf://org/model", "bucket://a/b:/c"])
def test_a_colon_elsewhere_is_part_of_a_name(to: str) -> None:
    assert SaveParams(to=to).to == to


@pytest.fixture
def bucket() -> type[MemoryFileSystem]:
    """What fsspec opens as `bucket://`, in place of a service that keeps what is sent."""

    class Bucket(MemoryFileSystem):  # type: ignore[misc]
        protocol = "bucket"
        store: ClassVar[dict[str, Any]] = {}
        pseudo_dirs: ClassVar[list[str]] = [""]

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return str(MemoryFileSystem._strip_protocol(path.replace("bucket://", "memory://")))

    fsspec.register_implementation("bucket", Bucket, clobber=True)
    return Bucket


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with pytest.MonkeyPatch.context() as patch, s3_server(patch.setenv) as server:
        S3FileSystem.clear_instance_cache()  # of a server that another module had
        yield server


@pytest.fixture(params=["bucket", "s3"])
def service(request: pytest.FixtureRequest) -> tuple[type[AbstractFileSystem], str]:
    """A file system, and an address on it where nothing is yet."""
    found = request.getfixturevalue(request.param)
    name = uuid.uuid4().hex
    return (S3FileSystem, f"{found.address}/{name}") if request.param == "s3" else (found, f"bucket://{name}/model")


def test_an_fsspec_url(tmp_path: Path, service: tuple[type[AbstractFileSystem], str]) -> None:
    url = service[1]
    given = params(url)
    check(tmp_path, given)
    found = metrics(save(tmp_path, given))
    system, root = fsspec.core.url_to_fs(url)
    assert found.url == url
    assert system.cat_file(f"{root}/model.safetensors") == MODEL["model.safetensors"]
    assert json.loads(system.cat_file(f"{root}/provenance.json"))["recipe"] == "tiny-int8"
    assert present(tmp_path, given)
    save(tmp_path, given)  # its own, unchanged
    system.pipe_file(f"{root}/config.json", b'{"model_type": "gpt"}')
    assert not present(tmp_path, given)
    with pytest.raises(UsageError, match="changed since it was saved"):
        check(tmp_path, given)
    system.pipe_file(f"{root}/stale-shard.safetensors", b"old")
    save(tmp_path, params(url, overwrite=True))
    assert not system.exists(f"{root}/stale-shard.safetensors")
    assert present(tmp_path, given)
    assert not [path for path in system.find(root) if ".bigpipe-" in path]


def test_a_run_signs_in_to_a_bucket_as_its_plan_does(workshop: Workshop, s3: S3) -> None:
    """By variables of this process: a key and its secret, the region, where the service is."""
    make_checkpoint(workshop.folder / "model")
    url = f"{s3.address}/{uuid.uuid4().hex}"
    text = SAVING.replace("to: dist", "to: '{url}'").format(overwrite="false", url=url)
    ran = workshop.run(text)
    assert statuses(ran)["save"] == "succeeded", ran.nodes["save"]
    assert any(name.endswith("model.safetensors") for name in s3.objects(url))
    assert set(statuses(workshop.run()).values()) == {"cached"}


@pytest.mark.parametrize(
    ("to", "seen"),
    [
        ("s3://bucket/model", {"AWS_PROFILE", "FSSPEC_CONFIG_DIR"}),
        ("simplecache::gs://bucket/model", {"GOOGLE_APPLICATION_CREDENTIALS", "FSSPEC_CONFIG_DIR"}),
        ("abfs://bucket/model", {"AZURE_STORAGE_KEY", "FSSPEC_CONFIG_DIR"}),
        ("hf://ada/model", set()),
        ("dist", set()),
    ],
)
def test_what_a_package_signs_in_by_reaches_what_writes_there_alone(to: str, seen: set[str]) -> None:
    told = ("AWS_PROFILE", "GOOGLE_APPLICATION_CREDENTIALS", "AZURE_STORAGE_KEY", "FSSPEC_CONFIG_DIR")
    stage = STAGE.with_params(params(to))
    assert {name for name in inherited(dict.fromkeys(told, "/x"), besides=stage.inherits) if name in told} == seen


class Said(Exception):
    """As botocore says what a service answered."""

    def __init__(self, status: int) -> None:
        super().__init__("SlowDown")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectionError("no route"), Transient),
        (TimeoutError("read timeout"), Transient),
        (type("EndpointConnectionError", (type("HTTPClientError", (Exception,), {}),), {})(), Transient),
        (Said(503), Transient),
        (Said(429), Transient),
        (Said(416), StageFailed),
        (PermissionError("AccessDenied"), NotAuthorised),
        (type("NoCredentialsError", (Exception,), {})(), NotAuthorised),
        (Said(403), NotAuthorised),
        (ValueError("a bug of theirs"), StageFailed),
    ],
)
def test_a_service_that_is_away_or_busy_is_asked_again(tmp_path: Path, error: Exception, kind: type[Exception]) -> None:
    class Away(MemoryFileSystem):  # type: ignore[misc]
        def find(self, *_: Any, **__: Any) -> None:
            raise OSError("as the package translates it") from error

    away = FileSystem("bucket://a", Away(), "/a")
    contents = Contents(results=artifact(tmp_path / "store", RESULTS))
    with pytest.raises((kind, UsageError)) as caught:
        publish(contents, away, Provenance(), scratch=tmp_path)
    assert type(caught.value) is (UsageError if kind is StageFailed else kind)
    assert is_present(away, Receipt("bucket://a", {"a": Stored("", 1, "m")})) == (kind is Transient)


def test_a_folder_that_somebody_made_in_a_bucket_is_no_file(tmp_path: Path, s3: S3) -> None:
    """The console of S3 makes an object whose name ends in a slash."""
    url, client = f"{s3.address}/{uuid.uuid4().hex}", s3.client()

    def mark(name: str) -> None:
        client.put_object(Bucket=BUCKET, Key=f"{url}/{name}".removeprefix(f"s3://{BUCKET}/"))

    mark("")
    check(tmp_path, params(url))
    save(tmp_path, params(url))
    mark("")
    mark("results/")
    assert present(tmp_path, params(url))
    check(tmp_path, params(url))
    save(tmp_path, params(url))


@pytest.mark.parametrize(
    ("to", "given", "told"),
    [
        ("hf://ada", {}, "write it as hf://owner/name"),
        ("dist/model", {"revision": "v2"}, "revision of a Hub repository"),
        ("s3://bucket/model", {"private": False}, "private of a Hub repository"),
    ],
)
def test_what_the_hub_alone_has_is_refused_elsewhere(to: str, given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        params(to, **given)


def test_a_url_nobody_can_open_is_found_by_the_plan(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nosuchprotocol"):
        check(tmp_path, params("nosuchprotocol://bucket/model"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    # Read once at import by the client, so the environment would come too late.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with LoopbackHub() as hub:
        hub.users["secret-token"] = "ada"
        yield hub


@pytest.fixture
def environment(server: LoopbackHub, tmp_path: Path) -> dict[str, str]:
    return {**server.environment(tmp_path / "hf"), "HF_TOKEN": "secret-token"}


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own, in its LFS upload
def test_the_hub_gets_a_private_repository_with_one_commit_and_gives_it_back(
    server: LoopbackHub, environment: dict[str, str], tmp_path: Path
) -> None:
    given = params("hf://ada/tiny-int8")
    check(tmp_path, given, environment)
    found = metrics(save(tmp_path, given, environment))
    repository = server.repositories["ada/tiny-int8"]
    assert repository.private
    assert found.commit == repository.branches["main"]
    assert found.url == f"{server.url}/ada/tiny-int8"
    back = huggingface_hub.snapshot_download(
        "ada/tiny-int8", revision=found.commit, endpoint=server.url, token="secret-token", cache_dir=tmp_path / "back"
    )
    saved = tree(Path(back))
    assert saved["model.safetensors"] == MODEL["model.safetensors"]
    assert "results/results.jsonl" in saved
    assert "provenance.json" in saved
    card = saved["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "facebook/opt-13b"
    assert 'from_pretrained("ada/tiny-int8"' in card
    assert present(tmp_path, given, environment)
    assert not any("secret-token" in path.read_text(errors="ignore") for path in (tmp_path / "out").rglob("*.json"))


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_what_git_and_the_client_keep_in_a_folder_is_not_saved(
    server: LoopbackHub, environment: dict[str, str], tmp_path: Path
) -> None:
    """A clone, or what `hf download --local-dir` brought: taken whole, as by `include: ['*']`."""
    kept = {".gitattributes": b"mine", ".git/config": b"", ".cache/huggingface/x.metadata": b"", "sub/.cache/x": b""}
    model = inputs(model=artifact(tmp_path / "store", {**MODEL, **kept}))
    for given in (params("hf://ada/model"), params("dist")):
        save(tmp_path, given, environment, inputs=model)
        assert present(tmp_path, given, environment)
        check(tmp_path, given, environment)
    repository = server.repositories["ada/model"]
    on_hub = repository.commits[repository.branches["main"]]
    assert on_hub.keys() == {".gitattributes", "provenance.json", *MODEL}
    assert on_hub[".gitattributes"].content != b"mine"
    assert tree(tmp_path / "base" / "dist").keys() == {"provenance.json", *MODEL}
    assert not check_directory(tmp_path / "base" / "dist").findings


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_the_hub_is_looked_at_again_and_stale_shards_go(
    server: LoopbackHub, environment: dict[str, str], tmp_path: Path
) -> None:
    given = params("hf://ada/model", revision="int8")
    save(tmp_path, given, environment)
    assert present(tmp_path, given, environment)
    check(tmp_path, given, environment)  # its own: may be replaced
    server.commit("ada/model", {"model-00002-of-00002.safetensors": b"stale", "config.json": b"{}"}, "int8")
    assert not present(tmp_path, given, environment)
    assert present(tmp_path, given, environment, offline=True)  # cannot be asked: the receipt is believed
    with pytest.raises(UsageError, match=r"changed since it was saved: config\.json, model-00002"):
        check(tmp_path, given, environment)
    save(tmp_path, params("hf://ada/model", revision="int8", overwrite=True), environment)
    head = server.repositories["ada/model"].commits[server.repositories["ada/model"].branches["int8"]]
    assert "model-00002-of-00002.safetensors" not in head
    assert present(tmp_path, given, environment)


def test_the_plan_asks_whether_the_token_may_write(
    server: LoopbackHub, environment: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(NotAuthorised, match="ada may not write to facebook"):
        check(tmp_path, params("hf://facebook/opt-13b"), environment)
    with pytest.raises(NotAuthorised, match="knows no user"):
        check(tmp_path, params("hf://ada/model"), {**environment, "HF_TOKEN": ""})
    with pytest.raises(Offline):
        check(tmp_path, params("hf://ada/model"), environment, offline=True)
    server.create("ada/theirs", {"model.bin": b"by hand"})
    with pytest.raises(UsageError, match="bigpipe did not write"):
        check(tmp_path, params("hf://ada/theirs"), environment)


def fine_grained(name: str, *permissions: str) -> dict[str, Any]:
    scopes = [{"entity": {"type": "user", "name": name}, "permissions": ["repo.content.read", *permissions]}]
    return {"role": "fineGrained", "fineGrained": {"global": [], "scoped": scopes}}


@pytest.mark.parametrize(
    ("role", "refused"),
    [
        ({"role": "read"}, "the token of ada may only read"),
        (fine_grained("ada"), "the token of ada is not for writing to ada/new"),
        (fine_grained("bob", "repo.write"), "not for writing"),
        (fine_grained("ada", "repo.write"), ""),
        (fine_grained("Ada/New", "repo.write"), ""),
        ({"role": "fineGrained", "fineGrained": "x"}, ""),
        ({"role": 5, "fineGrained": {"scoped": [5]}}, ""),
    ],
)
def test_the_plan_knows_what_the_token_is_for(
    server: LoopbackHub, environment: dict[str, str], tmp_path: Path, role: dict[str, Any], refused: str
) -> None:
    server.roles["secret-token"] = role
    with pytest.raises(NotAuthorised, match=refused) if refused else nullcontext():
        check(tmp_path, params("hf://ada/new"), environment)


def test_a_card_that_the_hub_does_not_take_is_refused_before_anything_is_made(
    server: LoopbackHub, environment: dict[str, str], tmp_path: Path
) -> None:
    """As far as it is known at plan time; when all is known, before anything is sent."""
    readme = {"README.md": b"---\nlicense: acme\n---\n"}
    model = artifact(tmp_path / "store", {**MODEL, **readme})
    wired = {"model": (Forecast(output=ModelDescription(config={}, path=model)),)}
    refused = 'does not take the model card: "license" must be one of'
    assert STAGE.planning.check is not None
    for card, told in (({}, wired), ({"license": "acme"}, {"model": (Forecast(),)})):
        with pytest.raises(UsageError, match=refused) as found:
            STAGE.planning.check(
                params("hf://ada/new", card=card), check_context(tmp_path, environment=environment, inputs=told)
            )
        assert found.value.field == "card"
    with pytest.raises(UsageError, match=refused):
        save(tmp_path, params("hf://ada/new"), environment, inputs=inputs(model=model))
    assert "ada/new" not in server.repositories
    server.fail("status", "/validate-yaml", status=404)  # a mirror that does not know the question
    check(tmp_path, params("hf://ada/new", card={"license": "acme"}), environment)


@pytest.mark.parametrize("given", [{}, {"revision": "int8"}])
@pytest.mark.parametrize("files", [{}, {"config.json": b"{}"}])
def test_the_plan_asks_whether_a_repository_that_is_there_may_be_written(
    server: LoopbackHub,
    environment: dict[str, str],
    tmp_path: Path,
    files: dict[str, bytes],
    given: dict[str, Any],
) -> None:
    """Also one that is empty, or has no such branch."""
    server.create("ada/model", {".gitattributes": b"", **files})
    server.fail("status", "/auth-check/write", status=403)
    with pytest.raises(NotAuthorised, match="403"):
        check(tmp_path, params("hf://ada/model", overwrite=True, **given), environment)


def test_nothing_is_asked_of_a_bucket_where_that_is_switched_off(
    tmp_path: Path, bucket: type[MemoryFileSystem]
) -> None:
    given = params("bucket://a/model")
    save(tmp_path, given)
    check(tmp_path, given)
    with pytest.raises(Offline, match="cannot be looked at while asking the network is switched off") as error:
        check(tmp_path, given, offline=True)
    assert error.value.field == "to"
    bucket.store.clear()
    assert not present(tmp_path, given)
    assert present(tmp_path, given, offline=True), "the receipt is believed"


SAVING = """\
version: 1
name: saving
params: {{size: 5GB}}
stages:
  download: {{uses: download, with: {{path: model}}}}
  shard: {{uses: shard, inputs: download, with: {{max_shard_size: "${{params.size}}"}}}}
  save: {{uses: save, inputs: shard, with: {{to: dist, overwrite: {overwrite}}}}}
"""


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_run_leaves_the_destination_as_the_recipe_makes_it(workshop: Workshop, overwrite: bool) -> None:
    """Deleted, edited, or written by another variant meanwhile: a record of the same key is no reason to do nothing."""
    make_checkpoint(workshop.folder / "model")
    folder = workshop.folder / "dist"
    assert workshop.run(SAVING.format(overwrite=str(overwrite).lower())).exit_code == 0
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)
    assert statuses(workshop.run())["save"] == "succeeded"
    assert {path.name: path.read_bytes() for path in folder.iterdir()}.keys() == first.keys()
    assert workshop.run(params={"size": "50KB"}).exit_code == 0
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert statuses(workshop.run())["save"] == "succeeded"
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert set(statuses(workshop.run()).values()) == {"cached"}
    if overwrite:
        (folder / "config.json").write_text("{}")
        assert statuses(workshop.run())["save"] == "succeeded"
        assert (folder / "config.json").read_bytes() == first["config.json"]


BLOB = f"models--a--b/blobs/{40 * 'a'}"
RECIPE_OVER = """\
version: 1
name: over
trust: {{modules: [own]}}
stages:
  download: {{uses: download, with: {{path: model}}}}
  generate:
    uses: distributed-infer
    inputs: download
    with: {{task: "own:run", prompts: prompts/*.txt}}
  save: {{uses: save, inputs: download, with: {{to: '{to}', overwrite: true}}}}
"""


@pytest.mark.parametrize(
    "to",
    [
        "model", "x/../model", "link", "link/new", "model/new", "all", "models--a--b", "prompts", "code", "real",
        "store", "store/artifacts/new", "{folder}/model", "file://{folder}/model", "file://{folder}/link",
    ],
)  # fmt: skip
def test_a_destination_is_nothing_that_the_recipe_stands_on(workshop: Workshop, to: str) -> None:
    """Its sources, their directories and the files they link to, its own file, code, and the store: by any name."""
    folder = workshop.folder
    for name in ("x", "all", "models--a--b/blobs", "prompts", "code", "real"):
        (folder / name).mkdir(parents=True)
    make_checkpoint(folder / "all" / "model")
    (folder / "model").symlink_to(folder / "all" / "model")
    (folder / "link").symlink_to("all/model")
    weights = folder / "model" / "model.safetensors"
    weights.rename(folder / BLOB)
    weights.symlink_to(folder / BLOB)
    (folder / "prompts" / "one.txt").write_text("one")
    (folder / "code" / "own.py").write_text("def run(model, rows): ...")
    (folder / "own.py").symlink_to("code/own.py")
    before = tree(folder)
    (folder / "real" / "recipe.yaml").write_text(RECIPE_OVER.format(to=to.format(folder=folder)))
    workshop.manifest.symlink_to("real/recipe.yaml")
    plan = workshop.command("plan", "recipe.yaml")
    assert plan.returncode == 2, plan.stderr
    assert "recipe.yaml:10:" in plan.stderr
    assert "save would write to" in plan.stderr
    assert workshop.command("run", "recipe.yaml").returncode == 2
    assert before.items() <= tree(folder).items()


KIND_BESIDE = """\
import json
from bigpipe.orchestrator.stage import File, Forecast, Metrics, Params, Planning, Stage

class NoteParams(Params):
    gone: File | None = None
    rows: File | None = None

class NoteMetrics(Metrics):
    length: int

def leads_to(params, base):
    lines = (base / params.rows).read_text().splitlines() if params.rows else []
    return [base / json.loads(line)["file"] for line in lines]

STAGE = Stage(
    kind="note", version=1, params=NoteParams, metrics=NoteMetrics, inputs={}, output="report",
    run=lambda params, context: None, forecast=lambda params, context: Forecast(), planning=Planning(leads_to=leads_to),
)
"""
RECIPE_BESIDE = """\
version: 1
name: beside
trust: {{modules: [notekinds]}}
remote: {{url: cache/shared}}
stages:
  first: {{uses: "notekinds:STAGE"}}
  note: {{uses: "notekinds:STAGE", with: {{rows: rows/all.jsonl{given}}}}}
  save: {{uses: save, inputs: {{reports: [first]}}, with: {{to: '{to}', overwrite: true}}}}
"""


@pytest.mark.parametrize(
    ("to", "given", "nodes", "what"),
    [
        ("notekinds", "", (), "the code of first"),
        ("sounds", "", (), "what note reads"),
        ("rows", ", gone: gone.txt", ("save",), "what note reads"),
        ("cache", "", (), "the remote store"),
        ("cache/shared/v1/objects", "", (), "the remote store"),
        ("sounds/new", "", (), None),
    ],
)
def test_all_that_enters_a_key_stays_where_it_is(
    tmp_path: Path, to: str, given: str, nodes: tuple[str, ...], what: str | None
) -> None:
    """A kind's own code, files that rows name, and what others share; also of a node that is not asked for."""
    for name, text in {
        "notekinds/__init__.py": KIND_BESIDE,
        "sounds/a.wav": "RIFF",
        "rows/all.jsonl": '{"file": "sounds/a.wav"}\n',
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    (tmp_path / "recipe.yaml").write_text(RECIPE_BESIDE.format(to=to, given=given))
    plan = bigpipe.plan(tmp_path / "recipe.yaml", nodes, params={}, store=tmp_path / "store", offline=True)
    told = [str(error) for error in plan.errors()]
    assert [f"is, holds or lies in {what}" in each for each in told] == ([True] if what else []), told


TWICE = """\
version: 1
name: twice
stages:
  download: {{uses: download, with: {{path: model}}}}
  estimate: {{uses: estimate, inputs: download, with: {{dtypes: [float16]}}}}
  shard: {{uses: shard, inputs: download, matrix: {{size: [1GB, 2GB]}}, with: {{max_shard_size: "${{matrix.size}}"}}}}
  save: {{uses: save, inputs: shard, with: {{to: '{to}', overwrite: true}}}}
  other: {{uses: save, inputs: {{reports: [estimate]}}, {when}, with: {{to: dist/report}}}}
"""


def test_two_nodes_do_not_write_to_one_place(workshop: Workshop) -> None:
    make_checkpoint(workshop.folder / "model")
    for to, stage in (("dist/model", "save@size=2GB"), ("dist/report/${matrix.size}", "other"), ("dist/x/..", "save")):
        workshop.manifest.write_text(TWICE.format(to=to, when="needs: []"))
        plan = workshop.command("plan", "recipe.yaml")
        assert plan.returncode == 2
        assert f"is, holds or lies in what {stage}" in plan.stderr
    workshop.manifest.write_text(TWICE.format(to="dist/${matrix.size}", when="needs: []"))
    assert workshop.command("plan", "recipe.yaml").returncode == 0


EITHER = """\
version: 1
name: either
stages:
  download: {{uses: download, with: {{path: model}}}}
  half: {{uses: shard, inputs: download, when: "${{stages.download.metrics.bytes}} < 1GB", with: {{dtype: float16}}}}
  small: {{uses: save, inputs: half, with: {{to: dist}}}}
  large: {{uses: save, inputs: download, {when} with: {{to: dist}}}}
"""


def test_of_two_nodes_that_depend_on_conditions_one_writes(workshop: Workshop) -> None:
    make_checkpoint(workshop.folder / "model")
    for when, code in (('when: "${stages.download.metrics.bytes} >= 1GB",', 0), ("", 2)):
        workshop.manifest.write_text(EITHER.format(when=when))
        assert workshop.command("plan", "recipe.yaml").returncode == code


@pytest.mark.parametrize("breaks", ["open", "cp_file"])
def test_a_transfer_file_by_file_that_broke_off_is_repeated(
    tmp_path: Path, service: tuple[type[AbstractFileSystem], str], breaks: str
) -> None:
    """While it writes, the old version stays; while that is replaced, what is there is nobody else's work."""
    system, address = service

    class Breaking(system):  # type: ignore[valid-type, misc]
        left = 3
        cachable = False

        def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
            self._use("open", mode == "wb")
            return super().open(path, mode, **options)

        def cp_file(self, path: str, to: str, **options: Any) -> None:
            self._use("cp_file")
            super().cp_file(path, to, **options)

        def _use(self, name: str, counts: bool = True) -> None:
            self.left -= counts and name == breaks
            if self.left < 0:
                raise ConnectionError("the service hung up")

    given, root = params(address), system._strip_protocol(address)
    save(tmp_path, given)
    model = artifact(tmp_path / "store", {**MODEL, "config.json": b'{"model_type": "gpt"}'})
    provenance = Provenance(recipe="tiny-int8", node="test")
    with pytest.raises(Transient, match="the service hung up"):
        publish(Contents(model=model), FileSystem(given.to, Breaking(), root), provenance, scratch=tmp_path)
    assert present(tmp_path, given) == (breaks == "open")
    check(tmp_path, given)
    save(tmp_path, given)
    assert present(tmp_path, given)
    with pytest.raises(UsageError, match="written by node test of recipe 'tiny-int8'"):
        save(tmp_path, given, node="another")


def test_a_repository_is_not_written_over_what_is_downloaded_of_it(
    server: LoopbackHub, environment: dict[str, str], workshop: Workshop
) -> None:
    checkpoint = make_checkpoint(workshop.folder / "model")
    commit = server.create("ada/model", {path.name: path.read_bytes() for path in checkpoint.iterdir()})
    repository = server.repositories["ada/old"] = server.repositories["ada/model"]
    repository.branches["int8"] = repository.branches["nf4"] = commit
    text = """\
version: 1
name: onto
stages:
  download: {{uses: download, with: {{repo: ada/model, revision: {source}}}}}
  save: {{uses: save, inputs: download, with: {{to: 'hf://{to}', revision: {revision}, overwrite: true}}}}
"""
    for source, to, revision, code in (
        ("main", "ada/model", "main", 2), ("main", "Ada/Model", "main", 2), ("main", "ada/old", "main", 2),
        (commit, "ada/model", "main", 0), ("main", "ada/model", "int8", 0), ("main", "ada/model", "new", 0),
        ("main", "ada/other", "main", 0),
    ):  # fmt: skip
        workshop.manifest.write_text(text.format(source=source, to=to, revision=revision))
        plan = workshop.command("plan", "recipe.yaml", **environment)
        assert plan.returncode == code, (to, plan.stderr)
        assert ("recipe.yaml:5:" in plan.stderr and "what download reads" in plan.stderr) == (code == 2)


def test_what_is_published_is_not_replaced_by_itself(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "all" / "model")
    (tmp_path / "link").symlink_to(model)
    before = tree(tmp_path)
    for place in (model, tmp_path / "link", tmp_path / "all", model / "new"):
        with pytest.raises(UsageError, match="of what is to be saved"):
            publish(Contents(model=model), open_destination(str(place)), Provenance(), scratch=tmp_path, overwrite=True)
    assert tree(tmp_path) == before


def test_a_directory_behind_another_file_system_is_refused(tmp_path: Path) -> None:
    for to in (f"simplecache::file://{tmp_path}/dist", f"dir::file://{tmp_path}/dist"):
        with pytest.raises(UsageError, match="behind another file system"):
            check(tmp_path, params(to))


def test_a_forecast_knows_where_and_how_much(tmp_path: Path) -> None:
    from bigpipe.bigmodel.checkpoint import ModelDescription

    described = ModelDescription(
        config=None, tensors={"a": ("float16", (1000, 1000))}, format="safetensors", tied={}, path=None,
        custom=None,
    )  # fmt: skip
    found = STAGE.forecast(params("dist"), forecast_context(tmp_path, inputs={"model": (Forecast(output=described),)}))
    assert (found.write_bytes, found.metrics["url"]) == (2_000_000, str(tmp_path / "base" / "dist"))
    assert STAGE.forecast(params("hf://ada/x"), forecast_context(tmp_path)).summary == "to hf://ada/x"


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_commit_that_comes_while_files_are_sent_is_not_lost(
    server: LoopbackHub, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    given = params("hf://ada/model", overwrite=overwrite)
    save(tmp_path, given, environment)
    send, met = huggingface_hub.HfApi.preupload_lfs_files, []

    def sent(*arguments: Any, **options: Any) -> None:
        send(*arguments, **options)
        met.append(server.commit("ada/model", {"NOTES.md": b"mine"}))

    monkeypatch.setattr(huggingface_hub.HfApi, "preupload_lfs_files", sent)
    changed = inputs(model=artifact(tmp_path / "store", {**MODEL, "model.safetensors": os.urandom(50_000)}))
    if overwrite:
        save(tmp_path, given, environment, inputs=changed)
        return
    with pytest.raises(StageFailed, match="somebody has committed to ada/model at main meanwhile"):
        save(tmp_path, given, environment, inputs=changed)
    assert server.repositories["ada/model"].branches["main"] == met[-1]
    with pytest.raises(UsageError, match=r"was changed since it was saved: NOTES\.md"):
        check(tmp_path, given, environment)


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_pull_request_takes_a_model_and_a_tag_does_not(
    server: LoopbackHub, environment: dict[str, str], tmp_path: Path
) -> None:
    head = server.create("ada/model", {"README.md": b"of the first\n"}, members={"ada"})
    repository = server.repositories["ada/model"]
    repository.tags["v1"] = head
    repository.branches["refs/pr/1"] = head
    for revision, said in (("v1", "v1 is a tag of ada/model"), ("refs/pr/2", "has no pull request refs/pr/2")):
        with pytest.raises(UsageError, match=said) as caught:
            check(tmp_path, params("hf://ada/model", revision=revision, overwrite=True), environment)
        assert caught.value.field == "revision"
    given = params("hf://ada/model", revision="refs/pr/1", overwrite=True)
    check(tmp_path, given, environment)
    found = metrics(save(tmp_path, given, environment))
    assert repository.branches == {"main": head, "refs/pr/1": found.commit}
    assert present(tmp_path, given, environment)
    check(tmp_path, params("hf://ada/model", revision="new", overwrite=True), environment)


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_pull_request_to_the_repository_of_others_takes_a_model(
    server: LoopbackHub, environment: dict[str, str], tmp_path: Path
) -> None:
    head = server.create("org/model", {"README.md": b"of the first\n"})
    server.repositories["org/model"].branches["refs/pr/1"] = head
    server.repositories["org/model"].authors["refs/pr/1"] = "ada"
    given = params("hf://org/model", revision="refs/pr/1", overwrite=True)
    check(tmp_path, given, environment)
    found = metrics(save(tmp_path, given, environment))
    assert server.repositories["org/model"].branches == {"main": head, "refs/pr/1": found.commit}
    with pytest.raises(NotAuthorised):
        check(tmp_path, params("hf://org/model", overwrite=True), environment)


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_branch_is_made_when_all_files_are_sent(
    server: LoopbackHub, environment: dict[str, str], tmp_path: Path
) -> None:
    server.create("ada/model", {"stale.txt": b"of main"})
    given = params("hf://ada/model", revision="int8")
    server.fail("status", "/preupload/", status=403)
    with pytest.raises(NotAuthorised):
        save(tmp_path, given, environment)
    repository = server.repositories["ada/model"]
    assert list(repository.branches) == ["main"]
    check(tmp_path, given, environment)
    save(tmp_path, given, environment)
    assert "stale.txt" not in repository.commits[repository.branches["int8"]]


MEASURE = """{uses: command, with: {argv: [sh, -c, "echo '{\\"n\\": 1}' > $0/m.json; echo $1 > $0/x", "${out}", %s],
       produces: report, metrics: m.json}}"""
TWO_MAY = f"""\
version: 1
stages:
  a: {MEASURE % "a"}
  b: {MEASURE % "b"}
  s: {{uses: save, when: "${{stages.a.metrics.n}} >= 1", inputs: {{reports: [a]}}, with: {{to: dist, overwrite: true}}}}
  t: {{uses: save, when: "${{stages.a.metrics.n}} <= 1", inputs: {{reports: [b]}}, with: {{to: dist, overwrite: true}}}}
"""


@pytest.mark.parametrize("jobs", [1, None])
def test_of_two_that_may_save_to_one_place_one_does(workshop: Workshop, jobs: int | None) -> None:
    """Both conditions hold: each run left what the other one had replaced, and said that all was well."""
    for _ in range(2):
        result = workshop.run(TWO_MAY, jobs=jobs)
        assert (result.exit_code, statuses(result)["t"]) == (2, "failed")
        assert "dist, which is, holds or lies in what s writes in this run" in str(result.errors[0])
    assert next((workshop.folder / "dist").rglob("x")).read_text() == "a\n"
