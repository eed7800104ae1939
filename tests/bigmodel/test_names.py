"""Names that mean nothing a model has: refused by whoever takes them, with what was probably meant."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.models import make_checkpoint
from support.workshop import Workshop

import bigpipe
from bigpipe.errors import UsageError
from bigpipe.names import as_names, did_you_mean, refuse_unknown


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("names") / "llama", "llama")


SLIPS = [
    ("skip_modules", ["self_atn"], "self_attn"),
    ("skip_modules", ["lm_head", "model.layers.0.self_attn.q_prj"], "model.layers.0.self_attn.q_proj"),
    ("skip_modules", "lm_haed", "lm_head"),
    ("skip_modules", ["classifer"], ""),
    ("keep_in_fp32_modules", ["nrom"], "norm"),
    ("no_split_module_classes", ["LlamaDecoderLayr"], "LlamaDecoderLayer"),
    ("no_split_module_classes", "LlamaDecoderLayr", "LlamaDecoderLayer"),
    ("no_split_module_classes", ["BloomBlock"], ""),
    ("special_dtypes", {"lm_head": "float32"}, "lm_head.weight"),
    ("special_dtypes", {"model.norm.wieght": "float32"}, "model.norm.weight"),
    ("device_map", {"": "cpu", "model.layer.0": "disk"}, "model.layers.0"),
    ("device_map", {"": "cpu", "model.layers.0.self_attn.q_proj.wight": "disk"}, "q_proj.weight"),
]


@pytest.mark.parametrize(("field", "given", "meant"), SLIPS)
def test_a_name_that_means_nothing_is_refused(llama: Path, tmp_path: Path, field: str, given: Any, meant: str) -> None:
    calls: dict[str, list[Callable[..., Any]]] = {
        "modules": [partial(bigpipe.quantize_checkpoint, llama, tmp_path / "out", scheme="int8")],
        "device_map": [partial(bigpipe.place, llama), lambda device_map: bigpipe.load(llama, device_map)],
        "": [partial(bigpipe.place, llama, max_memory={"cpu": "1GiB"}), partial(bigpipe.load, llama)],
    }
    for call in calls["modules" if field.endswith("_modules") else field if field in calls else ""]:
        with pytest.raises(UsageError, match="that the model does not have") as caught:
            call(**{field: given})
        assert as_names(given)[-1] in caught.value.cause
        assert meant in caught.value.cause
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("field", "entry"), [("skip_modules", "self_attn"), ("skip_modules", "mlp"), ("keep_in_fp32_modules", "self_attn")]
)
def test_a_name_of_modules_of_which_none_is_meant_is_refused(
    llama: Path, tmp_path: Path, field: str, entry: str
) -> None:
    """As transformers reads it, the end of a name means that module and nothing in it; a pattern means what lies in
    them."""
    quantize = partial(bigpipe.quantize_checkpoint, llama, tmp_path / "out", scheme="int8")
    with pytest.raises(UsageError, match=f"{field}: {entry} names model.layers.0.{entry}") as caught:
        quantize(**{field: [entry]})
    assert caught.value.cure == f"write .*{entry} to mean all of these"
    left = quantize(**{field: [f".*{entry}", "lm_head"]})
    assert left.skipped
    assert all(f".{entry}." in name for name in left.skipped if name != "lm_head")


@pytest.mark.parametrize(
    "entry", ["lm_head", "embed_tokens", "q_proj", "model.layers.0", r"model\.layers\.[12]", "norm"]
)
def test_names_that_mean_something_are_taken(llama: Path, tmp_path: Path, entry: str) -> None:
    """Of modules that are no linear ones too: they are left alone as it is."""
    bigpipe.quantize_checkpoint(llama, tmp_path / "out", scheme="int8", skip_modules=entry)
    bigpipe.quantize_checkpoint(llama, tmp_path / "more", scheme="int8", keep_in_fp32_modules=entry)


def test_a_class_given_as_one_text_is_one_name(llama: Path) -> None:
    name = "LlamaDecoderLayer"
    one, several = (
        bigpipe.place(llama, max_memory={"cpu": "1GiB"}, no_split_module_classes=given) for given in (name, [name])
    )
    assert one == several
    assert one.no_split_module_classes == (name,)
    bigpipe.load(llama, one, no_split_module_classes=name)


RECIPE = """\
version: 1
name: names
stages:
  download: {{uses: download, with: {{path: {model}}}}}
  quantize:
    uses: quantize
    inputs: download
    with:
      scheme: int8
      skip_modules: [{skip}]
  dispatch:
    uses: dispatch
    inputs: download
    with:
      max_memory: {{cpu: 1GiB}}
      no_split_module_classes: [{block}]
      device_map: {{"": cpu, {part}: disk}}
"""
RIGHT = {"skip": "lm_head", "block": "LlamaDecoderLayer", "part": "model.norm"}


@pytest.mark.parametrize(
    ("slip", "line"), [({"skip": "lm_hed"}, 10), ({"block": "LlamaLayer"}, 16), ({"part": "model.nrom"}, 17)]
)
def test_a_plan_says_where_it_stands(llama: Path, workshop: Workshop, slip: dict[str, str], line: int) -> None:
    workshop.manifest.write_text(RECIPE.format(model=llama, **RIGHT | slip))
    plan = workshop.command("plan", "recipe.yaml")
    assert plan.returncode == 2
    assert f"recipe.yaml:{line}:" in plan.stderr
    assert next(iter(slip.values())) in plan.stderr
    assert "did you mean" in plan.stderr


def test_it_is_said_what_a_quantization_leaves(tmp_path: Path) -> None:
    """Experts that a class holds as one tensor are no linear modules, and the most of a mixture's bytes."""
    mixture = make_checkpoint(tmp_path / "mixtral", "mixtral")
    notes = bigpipe.quantize_checkpoint(mixture, tmp_path / "out", scheme="int8").notes
    (told,) = [note for note in notes if note.startswith("not quantized: ")]
    assert "experts" in told
    assert "model.embed_tokens.weight" in told
    assert " more" not in told, "vectors, which are never quantized, need no word"


def test_suggestions() -> None:
    assert did_you_mean("int9", ["int8", "nf4"]) == "did you mean 'int8'?"
    assert did_you_mean("zzz", ["int8", "nf4"], otherwise="it takes") == "it takes int8 and nf4"
    refuse_unknown("names", ["a"], {"a"}, "parts", "")
    known = [f"model.layers.{number}.mlp" for number in range(3000)]
    with pytest.raises(UsageError, match=r"did you mean model\.layers\.2999\.mlp") as caught:
        refuse_unknown("names", ["model.layers.2999.mpl"], known, "parts", "cure")
    assert caught.value.field == "names.model.layers.2999.mpl"


def test_an_input_that_is_quantized_already_has_its_place(llama: Path, workshop: Workshop) -> None:
    bigpipe.quantize_checkpoint(llama, workshop.folder / "int8", scheme="int8")
    text = RECIPE.format(model=workshop.folder / "int8", **RIGHT).partition("  dispatch:")[0]
    workshop.manifest.write_text(text)
    plan = workshop.command("plan", "recipe.yaml")
    assert plan.returncode == 2
    assert "recipe.yaml:7:13: quantize: the checkpoint is quantized already" in plan.stderr
