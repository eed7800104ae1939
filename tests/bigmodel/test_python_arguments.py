"""Arguments of the Python functions: what means something is used, whatever it was given as; the rest is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.models import make_checkpoint, tiny_model

import bigpipe
from bigpipe.errors import BigpipeError, DoesNotFit, InvalidCheckpoint, UsageError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.mark.parametrize("function", [bigpipe.estimate, bigpipe.place])
@pytest.mark.parametrize("given", [{"batch_size": 0}, {"sequence_length": 0}, {"sequence_length": -1}])
def test_no_sequence_is_no_work(function: Any, given: dict[str, Any], model: Path) -> None:
    with pytest.raises(UsageError, match=r"is (0|-1)") as error:
        function(model, **given)
    assert error.value.field in given


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"library_name": "jax"}, "library 'jax'"),
        ({"revision": "v2"}, "revision belongs to a repository"),
        ({"dtypes": ["int8"], "double_quant": True}, "no meaning for int8"),
        ({"lora_rank": 0}, "lora_rank is 0"),
    ],
)
def test_what_an_estimate_has_no_use_for_is_refused(given: dict[str, Any], told: str, model: Path) -> None:
    with pytest.raises(UsageError, match=told):
        bigpipe.estimate(model, **given)


@pytest.mark.parametrize("given", [{"revision": "v2"}, {"variant": "fp16"}, {"subfolder": "text"}])
@pytest.mark.parametrize("function", [bigpipe.estimate, bigpipe.place])
def test_a_module_has_no_revision_and_lies_in_no_folder(function: Any, given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="belongs to a path or repository"):
        function(tiny_model("llama"), **given)


def test_an_estimate_takes_names_alone_and_dtypes_as_torch_has_them(model: Path) -> None:
    one = bigpipe.estimate(model, lora_targets="q_proj", dtypes=torch.float8_e4m3fn, kv_dtype=torch.float8_e4m3fn)
    same = bigpipe.estimate(model, lora_targets=["q_proj"], dtypes=["float8"], kv_dtype="float8")
    assert one.as_json() == same.as_json()


def test_an_estimate_of_an_index_is_that_of_its_directory(model: Path, tmp_path: Path) -> None:
    bigpipe.save_checkpoint(model, tmp_path, max_shard_size="20KB")
    whole = bigpipe.estimate(tmp_path)
    assert bigpipe.estimate(tmp_path / "model.safetensors.index.json").metrics() == whole.metrics()


def test_an_estimate_of_a_module_says_nothing_of_files() -> None:
    assert "None" not in bigpipe.estimate(tiny_model("llama")).render()


def test_a_model_in_a_subfolder_and_a_variant_of_it(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "text")
    tiny_model("llama", dtype="float16").save_pretrained(tmp_path / "text", variant="fp16")
    plain = bigpipe.estimate(tmp_path, subfolder="text").checkpoint
    half = bigpipe.estimate(tmp_path, subfolder="text", variant="fp16").checkpoint
    assert plain is not None
    assert half is not None
    assert (plain["dtypes"].keys(), half["dtypes"].keys()) == ({"float32"}, {"float16"})
    placed = bigpipe.place(tmp_path, subfolder="text", variant="fp16", max_memory={"cpu": "1GiB"})
    assert placed.weights == bigpipe.place(model, dtype="float16", max_memory={"cpu": "1GiB"}).weights
    with pytest.raises(UsageError, match="txt is no folder"):
        bigpipe.estimate(tmp_path, subfolder="txt")
    with pytest.raises(UsageError, match="is no folder"):
        bigpipe.estimate(tmp_path, subfolder="..")
    with pytest.raises(UsageError, match="no weights of 'fp61'"):
        bigpipe.place(tmp_path, subfolder="text", variant="fp61")


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "disk"])
def test_a_device_alone_holds_all(device: Any, model: Path) -> None:
    ids = torch.arange(8)[None]
    loaded = bigpipe.load(model, device)
    assert set(loaded.hf_device_map.values()) == {str(device)}  # type: ignore[union-attr, operator]
    assert torch.equal(loaded(ids).logits, bigpipe.load(model)(ids).logits)
    assert bigpipe.place(model, device_map=device).device_map == {"": str(device)}


@pytest.mark.parametrize("device", ["cuda:0", 0, torch.device("cuda", 0)])
def test_a_gpu_alone_is_looked_for(device: Any, model: Path) -> None:
    assert bigpipe.place(model, device_map=device).device_map == {"": 0}
    if not torch.cuda.is_available():
        with pytest.raises(DoesNotFit, match="GPU 0, and this machine has none"):
            bigpipe.load(model, device)


@pytest.mark.parametrize("device_map", ["fastest", None, "mps", 1.5])
def test_what_is_no_map_is_called_that(device_map: Any, model: Path) -> None:
    with pytest.raises(UsageError, match="neither a mode, nor a device, nor a map"):
        bigpipe.place(model, device_map=device_map)


def test_caps_without_devices_are_called_that(model: Path) -> None:
    with pytest.raises(UsageError, match="max_memory is '1GiB'"):
        bigpipe.place(model, max_memory="1GiB")  # type: ignore[arg-type]


def test_a_mode_keeps_to_caps_as_in_accelerate(model: Path) -> None:
    caps = {"cpu": "64KiB", "disk": "1GiB"}
    wanted = bigpipe.place(model, max_memory=caps).device_map
    assert set(wanted.values()) == {"cpu", "disk"}
    assert bigpipe.load(model, "auto", max_memory=caps).hf_device_map == wanted
    with pytest.raises(UsageError, match="max_memory bounds what a mode may choose"):
        bigpipe.load(model, {"": "cpu"}, max_memory=caps)


@pytest.mark.parametrize(("given", "told"), [
    (lambda model: bigpipe.load(model, offload_folder="x"), "load has no argument 'offload_folder'\n  it takes path, "),
    (lambda model: bigpipe.load(model, max_memry={}), "load has no argument 'max_memry'\n  did you mean 'max_memory'"),
    (lambda model: bigpipe.place(model, verbose=True), r"place has no argument 'verbose'\n  see help\(place\)"),
    (lambda model: bigpipe.quantize_checkpoint(model, "x", scheme="nf4", bnb_4bit_compute_dtype="bf16"),
     "bnb_4bit_compute_dtype 'bf16' is not possible\n  write bfloat16"),
])  # fmt: skip
def test_an_argument_that_there_is_not_is_told_with_what_there_is(given: Any, told: str, model: Path) -> None:
    with pytest.raises(UsageError, match=told):
        given(model)


@pytest.mark.parametrize("given", [{"special_dtypes": {"lm_head.weight": torch.int8}}, {"dtype": "float8_e4m3fn"}])
def test_weights_are_not_cut_to_what_they_would_not_survive(given: dict[str, Any], model: Path) -> None:
    with pytest.raises(UsageError, match="not one that weights are loaded as"):
        bigpipe.load(model, **given)


def test_float64_stays_what_it_is(tmp_path: Path) -> None:
    """As in transformers; it is narrowed where somebody asks for that."""
    from transformers import AutoModelForCausalLM

    folder = make_checkpoint(tmp_path / "wide", "llama", dtype="float64")
    ids, theirs = torch.arange(8)[None], AutoModelForCausalLM.from_pretrained(folder)
    placed = bigpipe.place(folder, max_memory={"cpu": "1GiB"})
    loaded = bigpipe.load(folder, placed)
    assert theirs.dtype == loaded.lm_head.weight.dtype == torch.float64
    assert torch.equal(loaded(ids).logits, theirs(ids).logits)
    assert placed.weights == {
        "cpu": sum(p.nbytes for p in loaded.parameters()) + sum(b.nbytes for b in loaded.buffers())
    }
    assert bigpipe.load(folder, dtype="float32").lm_head.weight.dtype == torch.float32
    assert bigpipe.estimate(folder, dtypes=["float64"])["float64"].counts.loaded == placed.weights["cpu"]


def test_options_of_a_quantization_are_those_of_its_stage(model: Path, tmp_path: Path) -> None:
    def files(name: str, **options: Any) -> Any:
        return bigpipe.quantize_checkpoint(model, tmp_path / name, **options).files

    assert files("8", load_in_8bit=True, llm_int8_skip_modules=["lm_head"]) == files(
        "int8", scheme="int8", skip_modules="lm_head"
    )
    pasted = files("4", load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    assert pasted == files("nf4", scheme="nf4", bnb_4bit_compute_dtype="bfloat16")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"scheme": "int8", "bnb_4bit_use_double_quant": True}, "no meaning for scheme int8"),
        ({"scheme": "nf4", "llm_int8_threshold": 5.0}, "no meaning for scheme nf4"),
        ({"scheme": "int8", "load_in_4bit": True}, "contradicts load_in_4bit"),
        ({"scheme": "int8", "skip_module": ["lm_head"]}, "did you mean 'skip_modules'"),
        ({"scheme": "int8", "threads": 3}, "no option 'threads'"),
        ({"scheme": "int8", "skip_module": None}, "no option 'skip_module'"),
        ({"scheme": "int8", "llm_int8_threshold": None}, "llm_int8_threshold is None"),
        ({"scheme": "nf4", "bnb_4bit_use_double_quant": "no"}, "bnb_4bit_use_double_quant is 'no'"),
        ({"scheme": "int8", "max_shard_size": 0}, "max_shard_size is 0"),
        ({}, "no scheme"),
    ],
)
def test_an_option_without_effect_is_refused(options: dict[str, Any], told: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=told):
        bigpipe.quantize_checkpoint(model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_loaded_model_is_not_saved_over_what_it_was_loaded_from(model: Path, tmp_path: Path) -> None:
    source = shutil.copytree(model, tmp_path / "source")
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    loaded = bigpipe.load(source, dtype="float16")
    (tmp_path / "link").symlink_to(source)
    for out in (source, tmp_path / "link", source / "below"):
        with pytest.raises(UsageError, match="is where the source is"):
            bigpipe.save_checkpoint(loaded, out)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    bigpipe.save_checkpoint(loaded, tmp_path / "half")
    assert bigpipe.load(tmp_path / "half", dtype="auto").lm_head.weight.dtype == torch.float16


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # peft asks for it
def test_nothing_is_written_where_a_model_or_an_adapter_is_read(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    base, adapter = shutil.copytree(model, tmp_path / "all" / "base"), tmp_path / "all" / "adapter"
    (tmp_path / "text.txt").write_text("the cat sat on the mat")
    bigpipe.finetune(base, ["the cat sat"], adapter, max_steps=1)
    (tmp_path / "link").symlink_to(adapter)
    before = {path: path.read_bytes() for path in (tmp_path / "all").rglob("*") if path.is_file()}
    text = tmp_path / "text.txt"
    calls: dict[str, Any] = {
        "merge": lambda out: bigpipe.merge_adapter(base, adapter, out),
        "finetune": lambda out: bigpipe.finetune(base, ["the cat"], out, adapter=adapter, max_steps=1),
        "folder": lambda out: bigpipe.evaluate(base, text, adapter=adapter, folder=out),
        "out": lambda out: bigpipe.evaluate(base, text, adapter=adapter, out=out),
    }
    places = [base, base / "new", adapter, adapter / "new", tmp_path / "link", tmp_path / "link" / "new"]
    for name, call in calls.items():
        holding = [tmp_path / "all"] if name in ("merge", "finetune") else []  # reports lie beside anything
        for out in (*places, *holding):
            with pytest.raises(UsageError, match=r"is where the source is|holds the source") as error:
                call(out)
            assert error.value.field == "out"
            assert str(tmp_path / "all") in error.value.cause
    assert {path: path.read_bytes() for path in (tmp_path / "all").rglob("*") if path.is_file()} == before
    bigpipe.merge_adapter(base, adapter, tmp_path / "all" / "merged")


@pytest.mark.parametrize("source", [None, 5, torch.nn.Linear])
def test_what_is_no_model_is_not_saved(source: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no model"):
        bigpipe.save_checkpoint(source, tmp_path)


@pytest.mark.parametrize("dtype", ["torch.float16", "auto"])
def test_a_config_may_name_its_dtype_as_torch_does(dtype: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "half", "llama", dtype="float16")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
    assert bigpipe.load(folder, dtype="auto").lm_head.weight.dtype == torch.float16
    assert (
        bigpipe.place(folder, max_memory={"cpu": "1GiB"}).weights
        == bigpipe.place(
            make_checkpoint(tmp_path / "same", "llama", dtype="float16"), max_memory={"cpu": "1GiB"}
        ).weights
    )
    assert bigpipe.quantize_checkpoint(folder, tmp_path / "int8", scheme="int8").quantized
    assert not [note for note in bigpipe.estimate(folder).notes if "dtype" in note]


ODD: list[tuple[str, dict[str, Any]]] = [
    ("place", {"machine": "x.json"}), ("place", {"speeds": 3}), ("place", {"max_memory": [1]}), ("place", {"trust": 1}),
    ("place", {"no_split_module_classes": 5}), ("place", {"special_dtypes": "float16"}), ("place", {"batch_size": "4"}),
    ("place", {"revision": 2}), ("place", {"environment": "A=b"}), ("place", {"architecture": "module:Class"}),
    ("estimate", {"batch_size": 1.5}), ("estimate", {"sequence_length": "2k"}), ("estimate", {"lora_targets": 7}),
    ("estimate", {"memory": [1]}), ("estimate", {"double_quant": "yes"}), ("estimate", {"subfolder": 1}),
    ("estimate", {"base": 3}), ("estimate", {"trust": [b"a"]}), ("estimate", {"offline": "no"}),
    ("load", {"memory": 10}), ("load", {"first_gpu": "0"}), ("load", {"trust_remote_code": 1}),
    ("load", {"special_dtypes": ["lm_head.weight"]}), ("load", {"architecture": 1}), ("load", {"base": b"x"}),
    ("save_checkpoint", {"progress": 1}), ("save_checkpoint", {"max_shard_size": None}),
    ("quantize_checkpoint", {"scheme": 8}), ("quantize_checkpoint", {"parts": 1}),
    ("quantize_checkpoint", {"trust": 2}), ("quantize_checkpoint", {"device": [1]}),
    ("quantize_checkpoint", {"skip_modules": 5}), ("quantize_checkpoint", {"skip_modules": [5]}),
    ("quantize_checkpoint", {"keep_in_fp32_modules": {"lm_head": 1.5}}),
    ("quantize_checkpoint", {"llm_int8_threshold": float("nan")}),
    ("quantize_checkpoint", {"llm_int8_threshold": float("inf")}),
    ("estimate", {"head": "lm"}), ("load", {"first_gpu": -1}), ("place", {"device_map": {5: "cpu"}}),
    ("place", {"device_map": {"": "cpu", None: "disk"}}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given"), ODD, ids=str)
def test_an_argument_of_a_type_that_means_nothing_is_named(
    name: str, given: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    places = [model] if name in ("place", "estimate", "load") else [model, tmp_path / "out"]
    more = {"scheme": "int8"} if name == "quantize_checkpoint" else {}
    with pytest.raises(UsageError, match=next(iter(given))) as error:
        getattr(bigpipe, name)(*places, **{**more, **given})
    assert error.value.cure or "; write" in error.value.cause


@pytest.mark.parametrize("name", ["open_checkpoint", "load", "estimate", "place", "load_manifest", "plan", "run"])
@pytest.mark.parametrize("odd", [None, 5, b"model", ["model"]], ids=str)
def test_what_is_no_path_is_called_that(name: str, odd: Any) -> None:
    with pytest.raises(UsageError, match=r"is (None|5|b'model'|\['model'\])|neither|module") as error:
        getattr(bigpipe, name)(odd)
    assert error.value.cure


@pytest.mark.parametrize("given", [{"params": "a=1"}, {"store": 1}, {"nodes": 1}, {"nodes": [1]}, {"offline": "no"},
                                   {"jobs": "2"}, {"reporter": print}], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", ["plan", "run"])
def test_a_recipe_is_run_with_arguments_that_mean_something(name: str, given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(given))} is ") as error:
        getattr(bigpipe, name)(tmp_path / "recipe.yaml", **given)
    assert error.value.cure


def test_a_machine_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"machine is 'x\.json'\n  give a Machine, such as .*read_machine"):
        bigpipe.plan(tmp_path / "recipe.yaml", machine="x.json")  # type: ignore[arg-type]


def test_folders_may_be_texts(model: Path, tmp_path: Path) -> None:
    told = bigpipe.estimate(str(model), base=str(tmp_path), memo=str(tmp_path / "memo"))  # type: ignore[arg-type]
    assert told.metrics() == bigpipe.estimate(model).metrics()


def test_what_is_written_beside_the_weights_is_told(tmp_path: Path) -> None:
    saved = bigpipe.save_checkpoint(tiny_model("llama"), tmp_path)
    assert {"model.safetensors", "config.json", "generation_config.json"} == saved.files.keys()
    for name, (digest, size) in saved.files.items():
        content = (tmp_path / name).read_bytes()
        assert (digest, size) == (hashlib.sha256(content).hexdigest(), len(content))


@pytest.mark.parametrize(
    ("given", "told", "field"),
    [
        ({"skip_modules": [".*"]}, "skip_modules name all of the 15 linear modules", "skip_modules"),
        ({"keep_in_fp32_modules": [".*"]}, "keep_in_fp32_modules name all", "keep_in_fp32_modules"),
    ],
)
def test_a_quantization_that_leaves_everything_is_none(
    given: dict[str, Any], told: str, field: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=told) as error:
        bigpipe.quantize_checkpoint(model, tmp_path / "out", scheme="int8", **given)
    assert error.value.field == field
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["plan", "run", "load_manifest"])
@pytest.mark.parametrize(
    "odd", [object(), b"a", {1, 2}, float("nan"), torch.ones(1)], ids=lambda odd: type(odd).__name__
)
def test_a_parameter_is_what_yaml_holds(name: str, odd: Any, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "version: 1\nname: r\nparams: {a: 1}\nstages: {d: {uses: download, with: {path: m}}}\n"
    )
    with pytest.raises(UsageError, match="params: a is") as error:
        getattr(bigpipe, name)(tmp_path / "r.yaml", params={"a": odd})
    assert error.value.cure


def test_a_key_of_a_map_is_a_text(model: Path) -> None:
    with pytest.raises(UsageError, match="device_map has the key 5"):
        bigpipe.load(model, {5: "cpu"})  # type: ignore[dict-item]


def wrapped(how: str) -> torch.nn.Module:
    """A tiny model as trainers hand it over."""
    plain: torch.nn.Module = tiny_model("llama")
    if how == "a part compiled":
        plain.model.layers[0] = torch.compile(plain.model.layers[0])  # type: ignore[index, union-attr, assignment]
        return plain
    around = {"compiled": [torch.compile], "parallel": [torch.nn.DataParallel]}
    for wrap in around.get(how, [torch.compile, torch.nn.DataParallel]):
        plain = wrap(plain)  # type: ignore[assignment, operator]
    return plain


COMPILING = pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # of torch's own import


@COMPILING
@pytest.mark.parametrize("how", ["compiled", "parallel", "both", "a part compiled"])
def test_a_model_is_saved_without_what_is_around_it(how: str, tmp_path: Path) -> None:
    plain = bigpipe.save_checkpoint(tiny_model("llama"), tmp_path / "plain")
    saved = bigpipe.save_checkpoint(wrapped(how), tmp_path / "saved")
    assert saved.files == plain.files
    ids = torch.arange(8)[None]
    assert torch.equal(bigpipe.load(tmp_path / "saved")(ids).logits, tiny_model("llama")(ids).logits)


@COMPILING
@pytest.mark.parametrize("how", ["compiled", "parallel", "both"])
def test_a_module_counts_without_what_is_around_it(how: str, model: Path) -> None:
    plain, room = tiny_model("llama"), {"cpu": "100KB", "disk": "1GB"}
    assert bigpipe.estimate(wrapped(how)).metrics() == bigpipe.estimate(plain).metrics()
    assert bigpipe.place(wrapped(how), max_memory=room).device_map == bigpipe.place(plain, max_memory=room).device_map
    loaded, ids = bigpipe.load(model, model=wrapped(how)), torch.arange(8)[None]
    assert torch.equal(loaded(ids).logits, bigpipe.load(model)(ids).logits)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_names_of_what_was_around_a_model_are_called_that(prefix: str, model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    tensors = {f"{prefix}{name}": tensor for name, tensor in tiny_model("llama").state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for function in (bigpipe.load, lambda path: bigpipe.place(path, max_memory={"cpu": "1GiB"})):
        with pytest.raises(InvalidCheckpoint, match="no weights") as error:
            function(folder)
        assert f"the names begin with '{prefix}'" in error.value.cure


def test_a_module_that_has_no_shape_yet_is_called_that(tmp_path: Path) -> None:
    lazy = torch.nn.Sequential(torch.nn.LazyLinear(3))
    for function in (bigpipe.place, bigpipe.estimate, lambda module: bigpipe.save_checkpoint(module, tmp_path)):
        with pytest.raises(UsageError, match="have no shape before it has seen an input"):
            function(lazy)
    lazy(torch.ones(1, 2))
    assert bigpipe.place(lazy, max_memory={"cpu": "1MB"}).device_map == {"": "cpu"}


@pytest.mark.parametrize("name", ["__metadata__", "half \ud83d", 5, "a\0b"])
@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_a_name_that_no_file_keeps_is_refused(name: Any, format: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no tensor can be called"):
        bigpipe.save_checkpoint({"a": torch.ones(1), name: torch.ones(2)}, tmp_path / "out", format=format)


@pytest.mark.parametrize(
    "given",
    [
        {"baseline": 3}, {"adapter": 3}, {"adapter": ["a"]}, {"folder": 3}, {"column": 4}, {"seed": 2**64},
        {"seed": True}, {"stride": "a"}, {"per_layer_bound": "x"}, {"per_layer_bound": -1},
        {"per_layer_bound": float("nan")},
    ],
)  # fmt: skip
def test_what_an_evaluation_cannot_mean_is_refused(given: dict[str, Any], model: Path) -> None:
    with pytest.raises(UsageError) as error:
        bigpipe.evaluate(model, "texts/*.txt", **given)
    assert error.value.field in given or error.value.cause.startswith(next(iter(given)))


@pytest.mark.parametrize("name", ["out", "folder"])
def test_an_evaluation_names_the_file_in_the_place_of_a_directory(name: str, tmp_path: Path, model: Path) -> None:
    (tmp_path / "a").write_text("hello world")
    with pytest.raises(BigpipeError, match="File exists"):
        bigpipe.evaluate(model, tmp_path / "a", **{name: tmp_path / "a"})


@pytest.mark.parametrize("given", [{"weights": 1.0}, {"adapter": [3]}, {"adapter": 3}])
def test_what_a_merge_cannot_mean_is_refused(given: dict[str, Any], tmp_path: Path, model: Path) -> None:
    with pytest.raises(UsageError, match=next(iter(given))):
        bigpipe.merge_adapter(model, **{"adapter": model, "out": tmp_path / "out", **given})
