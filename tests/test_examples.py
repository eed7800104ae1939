"""Every Python block of README and of docs runs as it is written, and every row for those who come from Accelerate."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.hub import LoopbackHub
from support.hub_state import files_of
from support.models import make_checkpoint, sample_inputs
from support.workshop import environment

import bigpipe
from bigpipe.errors import DoesNotFit

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "models/quickstart"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
}
BLOCKS = {
    "README.md": ["test_the_readme"],
    "docs/how-to/a-class-of-your-own.md": [
        "test_a_class_of_your_own",
        "test_a_task_of_your_own",
        "test_pictures_of_your_own",
    ],
    "docs/how-to/a-format-of-your-own.md": ["test_own_format.py"],
    "docs/how-to/a-stage-kind-of-your-own.md": ["test_docs.py", "test_docs.py"],
    "docs/how-to/any-tool.md": ["test_any_tool", "test_any_tool"],
    "docs/how-to/coming-from-accelerate.md": ["test_docs.py"],
    "docs/how-to/over-ranks.md": ["test_shares_of_ranks_in_a_script"],
    "docs/how-to/merge-and-run-adapters.md": ["test_merging_and_running_adapters"],
    "docs/how-to/evaluate.md": ["test_evaluating"],
    "docs/how-to/finetune.md": ["test_docs.py"],
    "docs/how-to/prove-the-origin.md": ["test_proving_the_origin"],
}
"""Where each Python block of a page runs, in order."""


def blocks(page: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def test_every_python_block_runs_in_a_test():
    assert {page: len(blocks(page)) for page in PAGES if blocks(page)} == {
        page: len(tests) for page, tests in BLOCKS.items()
    }


def run(folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env={**environment(folder), **environ}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def nodes(folder: Path, recipe: str) -> dict[str, Any]:
    """What a run of the recipe gives, by node."""
    (folder / "recipe.yaml").write_text(recipe)
    done = run(folder, "-m", "bigpipe", "run", "recipe.yaml", "--json")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["nodes"]
    return found


def test_the_readme(tmp_path):
    """Beside what it names; a Hub on loopback answers for the repository."""
    shutil.copytree(ROOT / "manifests", tmp_path / "manifests")
    (tmp_path / "models").symlink_to(ROOT / "models")
    bigpipe.save_checkpoint(QUICKSTART, tmp_path / "torch", format="bin")
    for file in (tmp_path / "torch").iterdir():
        file.rename(tmp_path / file.name)
    with LoopbackHub() as hub:
        hub.create("facebook/opt-13b", files_of(QUICKSTART))
        run(tmp_path, "-c", blocks("README.md")[0], **hub.environment(tmp_path / "hf"))
    loaded = bigpipe.load(tmp_path / "out-nf4")
    assert type(loaded).__name__ == "OPTForCausalLM"
    assert bigpipe.open_checkpoint(tmp_path / "out").nbytes == bigpipe.open_checkpoint(QUICKSTART).nbytes


MINGPT = """\
from support import tinygpt


class GPT(tinygpt.GPT):
    def __init__(self, config):
        config.model_type = {"gpt2-xl": "nano"}.get(config.model_type, config.model_type)  # small enough for a test
        super().__init__(config)
"""
INFERENCE = """\
def generate(model, rows, max_new_tokens):
    return [{"text": row["prompt"].upper(), "tokens": max_new_tokens} for row in rows]
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with a package `mingpt` and, in `recipes`, a recipe's place; a checkpoint of its class."""
    from support.tinygpt import GPT

    package = tmp_path / "recipes/mingpt"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "model.py").write_text(MINGPT)
    (package / "inference.py").write_text(INFERENCE)
    config = GPT.get_default_config()
    config.vocab_size, config.block_size = 50257, 1024
    for folder in ("checkpoints/my-gpt", "recipes/path/to/checkpoint"):
        (tmp_path / folder).mkdir(parents=True)
        save_file(GPT(config).state_dict(), tmp_path / folder / "model.safetensors")
    return tmp_path / "recipes"


def test_a_class_of_your_own(own):
    page = "docs/how-to/a-class-of-your-own.md"
    tests = str(Path(__file__).parent)
    path = {"PYTHONPATH": f"{environment(own)['PYTHONPATH']}:{tests}:{own}"}
    done = run(own, "-c", blocks(page)[0] + "print(type(model).__name__, model.head.weight.shape)", **path)
    assert done.stdout == "GPT torch.Size([50257, 32])\n"
    (own / "recipe.yaml").write_text(blocks(page, "yaml")[0])
    done = run(own, "-m", "bigpipe", "run", "recipe.yaml", "--json", **path)
    generate = json.loads(done.stdout.splitlines()[-1])["nodes"]["generate"]
    lines = [json.loads(line) for line in (Path(generate["path"]) / "results.jsonl").read_text().splitlines()]
    assert [(line["text"], generate["metrics"]["tokens"]) for line in lines] == [("HELLO, MY NAME IS", 10)]


def test_a_task_of_your_own(tmp_path):
    page = "docs/how-to/a-class-of-your-own.md"
    code = blocks(page)[1]
    name = re.match(r"# (\w+\.py)\n", code)
    assert name is not None
    code = code.replace("ForSequenceClassification", "ForCausalLM")  # the class of the model that ships
    score = "def score(model, prompt, passage, asked):\n    return len(prompt + passage) * asked.temperature\n"
    (tmp_path / name[1]).write_text(f"{code}\n\n{score}")
    (tmp_path / "models").symlink_to(ROOT / "models")
    recipe = """\
version: 1
name: rerank
trust: {modules: [mytasks]}
stages:
  download: {uses: download, with: {path: models/quickstart}}
  rank:
    uses: distributed-infer
    inputs: {model: download}
    with: {task: "mytasks:TASK", prompts: [{prompt: four, passage: seven}], generation: GENERATION}
"""
    rank = nodes(tmp_path, recipe.replace("GENERATION", "{}"))["rank"]
    assert json.loads((Path(rank["path"]) / "results.jsonl").read_text())["score"] == 9
    (tmp_path / "recipe.yaml").write_text(recipe.replace("GENERATION", "{top_k: 3}"))
    with pytest.raises(AssertionError, match="rerank takes no argument 'top_k'"):
        run(tmp_path, "-m", "bigpipe", "run", "recipe.yaml")


PICTURE = """

def picture_of(model, prompt, seed):
    from PIL import Image

    return Image.new("RGB", (len(prompt), 2), (seed, 0, 0))
"""


def test_pictures_of_your_own(tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "drawing.py").write_text(blocks("docs/how-to/a-class-of-your-own.md")[2] + PICTURE)
    (tmp_path / "models").symlink_to(ROOT / "models")
    recipe = """\
version: 1
name: pictures
trust: {modules: [drawing]}
stages:
  download: {uses: download, with: {path: models/quickstart}}
  draw:
    uses: distributed-infer
    inputs: {model: download}
    with: {task: "drawing:draw", prompts: [a dog, a chicken], seed: 7}
"""
    drawn = Path(nodes(tmp_path, recipe)["draw"]["path"])
    rows = [json.loads(line) for line in (drawn / "results.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == ["files/000000.png", "files/000001.png"]
    pictures = [image.open(io.BytesIO((drawn / row["image"]).read_bytes())) for row in rows]
    assert [picture.size for picture in pictures] == [(5, 2), (9, 2)]


# The rows of the table: what Accelerate does and what stands for it in Python give the same

OVER_RANKS = "docs/how-to/over-ranks.md"


def test_shares_of_ranks_in_a_script(tmp_path):
    """With the configuration file of the page, as its last line starts it."""
    (tmp_path / "my_config.json").write_text(blocks(OVER_RANKS, "json")[0])
    (tmp_path / "distributed_inference.py").write_text(blocks(OVER_RANKS)[0])
    command = re.findall(r"^    accelerate (launch) (.*)$", PAGES[OVER_RANKS], re.MULTILINE)[0]
    done = run(tmp_path, "-m", "accelerate.commands.launch", *command[1].split(), OMP_NUM_THREADS="1")
    assert json.loads(done.stdout.splitlines()[-1]) == ["A DOG", "A CAT", "A CHICKEN"]


def test_shares_of_ranks_in_a_recipe(tmp_path):
    (tmp_path / "my_config.json").write_text(blocks(OVER_RANKS, "json")[0])
    (tmp_path / "models").symlink_to(ROOT / "models")
    recipe = next(block for block in blocks(OVER_RANKS, "yaml") if block.startswith("version"))
    found = nodes(tmp_path, recipe)
    read = {name: (Path(found[name]["path"]) / "results.jsonl").read_bytes() for name in ("two", "three", "padded")}
    assert [line["prompt"] for line in map(json.loads, read["two"].splitlines())] == ["a dog", "a cat"]
    assert read["three"] == read["padded"]
    assert read["three"].startswith(read["two"])
    plan = run(tmp_path, "-m", "bigpipe", "plan", "recipe.yaml", BIGPIPE_HOME=str(tmp_path / "empty")).stdout
    assert "2 ranks (1 + 1)" in plan
    assert "2 ranks (2 + 1)" in plan


ACCELERATE = "docs/how-to/coming-from-accelerate.md"
ROWS = {
    cells[0]: cells[1:]
    for line in PAGES[ACCELERATE].splitlines()
    if line.startswith("| `")
    for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
}


def code(row: str, **names: Any) -> Any:
    """What the first code of the row's third cell gives. names: what its placeholders stand for."""
    (found, *_) = re.findall(r"`([^`]+)`", ROWS[row][1])
    return eval(found.replace("…", "LIMITS"), {"bigpipe": bigpipe, **names})  # noqa: S307 our own page


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A llama in one file, in an empty folder."""
    return make_checkpoint(tmp_path / "model", "llama", tokenizer=False)


def empty(model: Path) -> Any:
    import transformers
    from accelerate import init_empty_weights

    with init_empty_weights():
        return transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(model))


def assert_same_logits(one: Any, other: Any) -> None:
    with torch.inference_mode():
        inputs = sample_inputs(one)
        assert torch.equal(one(**inputs).logits, other(**inputs).logits)


def estimate_memory(model: Path, out: Path) -> None:
    from accelerate.utils import calculate_maximum_sizes

    row = "`accelerate estimate-memory MODEL`"
    found = code(row, MODEL=model)
    total, (largest, _) = calculate_maximum_sizes(empty(model))
    assert found["float32"].weights.bytes == total
    assert found.metrics()["float32"]["largest_layer"] == largest
    command = re.findall(r"`([^`]+)`", ROWS[row][1])[1].replace("MODEL", str(model))
    assert str(model) in run(out, "-m", *command.split()).stdout


def init_empty_weights(model: Path, out: Path) -> None:
    assert "`model=`" in ROWS["`init_empty_weights()`"][1]
    assert_same_logits(bigpipe.load(model, model=with_buffers(model)), bigpipe.load(model))


def with_buffers(model: Path) -> Any:
    import transformers
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(model))


def infer_auto_device_map(model: Path, out: Path) -> None:
    from accelerate import infer_auto_device_map

    limits = {"cpu": 120_000, "disk": 10**9}
    ours = code("`infer_auto_device_map(model, max_memory=…)`", MODEL=model, LIMITS=limits).device_map
    theirs = infer_auto_device_map(empty(model), limits, no_split_module_classes=["LlamaDecoderLayer"])
    assert {*ours.values()} == {*theirs.values()} == {"cpu", "disk"}
    names = [name for name, _ in empty(model).named_parameters()]
    assert all(any(name.startswith(prefix) for prefix in ours) for name in names)


def load_checkpoint_and_dispatch(model: Path, out: Path) -> None:
    from accelerate import load_checkpoint_and_dispatch

    row, placement = (
        '`load_checkpoint_and_dispatch(…, device_map="auto")`',
        bigpipe.place(model, max_memory={"cpu": "1GB"}),
    )
    theirs = load_checkpoint_and_dispatch(with_buffers(model), model, device_map={"": "cpu"}).eval()
    assert_same_logits(code(row, DIRECTORY=model, placement=placement), theirs)


def load_checkpoint_in_model(model: Path, out: Path) -> None:
    from accelerate import load_checkpoint_in_model

    row, theirs = "`load_checkpoint_in_model(model, DIRECTORY)`", with_buffers(model)
    load_checkpoint_in_model(theirs, model, device_map={"": "cpu"})
    if torch.cuda.is_available():
        ours = code(row, DIRECTORY=model, model=with_buffers(model)).to("cpu")
    else:
        with pytest.raises(DoesNotFit, match="names GPU 0, and this machine has none"):
            code(row, DIRECTORY=model, model=with_buffers(model))
        ours = bigpipe.load(model, {"": "cpu"}, model=with_buffers(model))
    assert_same_logits(ours, theirs.eval())


def offload_folder(model: Path, out: Path) -> None:
    before = sorted(out.rglob("*"))
    ours = bigpipe.load(model, code("`offload_folder=…`: a second copy of the weights"))
    assert_same_logits(ours, bigpipe.load(model))
    assert sorted(out.rglob("*")) == before


def save_model(model: Path, out: Path) -> None:
    from accelerate import Accelerator

    row = '`save_model(model, DIRECTORY, max_shard_size="1GB")`'
    code(row, MODEL=model, DIRECTORY=out / "ours")
    Accelerator(cpu=True).save_model(bigpipe.load(model), out / "theirs", max_shard_size="1GB")
    ours, theirs = (load_file(out / side / "model.safetensors") for side in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def safe_serialization(model: Path, out: Path) -> None:
    assert ROWS["`safe_serialization=False`"][1] == '`format="bin"`'
    bigpipe.save_checkpoint(model, out / "ours", format="bin")
    stored = torch.load(out / "ours/pytorch_model.bin", weights_only=True)
    assert all(torch.equal(stored[name], tensor) for name, tensor in load_file(model / "model.safetensors").items())


def quantization(model: Path, out: Path) -> None:
    code("`BnbQuantizationConfig`, `load_and_quantize_model`", DIRECTORY=model, OUT=out / "int8")
    modules = {type(module).__name__ for module in bigpipe.load(out / "int8").modules()}
    assert "Linear8bitLt" in modules


RANKS = """\
version: 1
name: ranks
stages:
  download: {uses: download, with: {path: model}}
  generate:
    uses: distributed-infer
    inputs: {model: download}
    with: {task: "count:tokens", prompts: [one, two, three], PADDING}
    LAUNCH
trust: {modules: [count]}
"""


def in_ranks(model: Path, out: Path) -> None:
    """The three rows that are about ranks, in one run of two."""
    split, padding, launch = (
        ROWS[row] for row in ROWS if "split_between" in row or "padding" in row or "launch" in row
    )
    assert split == ["`distributed-infer`; as it, `split: static`", "`bigpipe.split_between_processes(prompts)`"]
    (out / "count.py").write_text(
        "def tokens(model, rows):\n    return [{'length': len(row['prompt'])} for row in rows]\n"
    )
    (out / "FILE").write_text("compute_environment: LOCAL_MACHINE\nnum_processes: 1\nmixed_precision: 'no'\n")
    recipe = RANKS.replace("PADDING", padding[0].strip("`")).replace("LAUNCH", launch[0].strip("`"))
    generate = nodes(out, recipe)["generate"]
    lines = [json.loads(line) for line in (Path(generate["path"]) / "results.jsonl").read_text().splitlines()]
    assert [line["length"] for line in lines] == [3, 3, 5]


BY_ROW: dict[str, Callable[[Path, Path], None]] = {
    "`accelerate estimate-memory MODEL`": estimate_memory,
    "`init_empty_weights()`": init_empty_weights,
    "`infer_auto_device_map(model, max_memory=…)`": infer_auto_device_map,
    '`load_checkpoint_and_dispatch(…, device_map="auto")`': load_checkpoint_and_dispatch,
    "`load_checkpoint_in_model(model, DIRECTORY)`": load_checkpoint_in_model,
    "`offload_folder=…`: a second copy of the weights": offload_folder,
    '`save_model(model, DIRECTORY, max_shard_size="1GB")`': save_model,
    "`safe_serialization=False`": safe_serialization,
    "`BnbQuantizationConfig`, `load_and_quantize_model`": quantization,
    "`PartialState().split_between_processes(prompts)`": in_ranks,
    "`apply_padding=True`": in_ranks,
    "`accelerate launch --config_file FILE`": in_ranks,
}


def test_every_row_has_a_test():
    assert list(ROWS) == list(BY_ROW)


@pytest.mark.parametrize("example", dict.fromkeys(BY_ROW.values()), ids=lambda example: example.__name__)
def test_a_row_for_those_who_come_from_accelerate(model, tmp_path, monkeypatch, example):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="accelerate|torch")
        example(model, tmp_path)


ADAPTERS = "docs/how-to/merge-and-run-adapters.md"


@pytest.mark.filterwarnings("ignore")
def test_merging_and_running_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from support.adapters import tuned

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "model").symlink_to(QUICKSTART)
    tuned(tmp_path / "model", tmp_path / "lora", r=4, target_modules="all-linear")
    merged = nodes(tmp_path, blocks(ADAPTERS, "yaml")[0])["merge"]
    done = run(tmp_path, "-c", blocks(ADAPTERS)[0])
    assert done.stdout.split() == [str(merged["metrics"]["merged"]), "1"]
    wanted = bigpipe.open_checkpoint(merged["path"])
    made = bigpipe.open_checkpoint(tmp_path / "tuned")
    assert all(made.read(name) == wanted.read(name) for name in wanted.tensors)
    generate = nodes(tmp_path, blocks(ADAPTERS, "yaml")[1])["generate"]
    assert generate["metrics"]["tokens"] == 8


def commands(page: str) -> list[list[str]]:
    return [line.split("#")[0].split() for line in re.findall(r"^\$ bigpipe (.+)$", PAGES[page], re.MULTILINE)]


def test_the_recipe_that_falls_back(tmp_path):
    """The commands of its page, one after the other; a Hub on loopback has a small model under the large one's name."""
    shutil.copytree(ROOT / "manifests", tmp_path / "manifests")
    with LoopbackHub() as hub:
        hub.create("facebook/opt-1.3b", files_of(QUICKSTART))
        said = [
            run(tmp_path, "-m", "bigpipe", *words, **hub.environment(tmp_path / "hf")).stdout
            for words in commands("docs/how-to/fall-back.md")
        ]
    plan, first, why, wider, narrower = said
    assert "takes the first scheme that passes: nf4 or int8" in plan
    assert re.search(r"save .*takes scheme int8; nf4 is left: gate perplexity_ratio <= 1.02: 1.1", first)
    assert re.search(r"nf4: left \(evaluate@scheme=nf4: gate perplexity_ratio <= 1.02: 1.1", why)
    assert re.search(r"evaluate@scheme=nf4 +cached", wider)
    assert re.search(r"save .*takes scheme nf4", wider)
    assert re.search(r"save +skipped .*no scheme passes", narrower)
    assert re.search(r"save_float16 +succeeded", narrower)
    card = (tmp_path / "dist/opt-1.3b-fallback/README.md").read_text()
    assert "quantized to" not in card
    assert re.search(r"\| evaluate@scheme=nf4 \| gate perplexity_ratio <= 1.001: 1.1", card)
    assert re.search(r"\| evaluate@scheme=int8 \| gate perplexity_ratio <= 1.001: 1.005", card)


def test_proving_the_origin(tmp_path):
    page = "docs/how-to/prove-the-origin.md"
    for folder in ("manifests", "models"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for words in re.findall(r"^\$ (openssl .+)$", PAGES[page], re.MULTILINE):
        subprocess.run(words.split(), cwd=tmp_path, check=True, capture_output=True)
    said = [run(tmp_path, "-m", "bigpipe", *words).stdout for words in commands(page)]
    first, proven, checked, attested, signed = said
    assert "succeeded" in first
    assert "provenance.json (not signed): all as it says" in checked
    assert "quickstart.attestations/model.sig" in attested
    assert "model.sig (signed): all as it says" in signed
    shown = re.search(r"^\$ bigpipe verify [^\n]+\n(.*?)\n…\n(.*?)\n```", PAGES[page], re.DOTALL | re.MULTILINE)
    assert proven.startswith(shown[1])
    assert shown[2] in proven
    assert run(tmp_path, "-c", blocks(page)[0]).stdout.strip() == "True []"


def test_any_tool(tmp_path):
    """The files and commands of its page, beside the model that ships."""
    from test_docs import write_files_of

    page = "docs/how-to/any-tool.md"
    write_files_of(PAGES[page], tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    said = [run(tmp_path, "-m", "bigpipe", *words).stdout for words in commands(page)]
    assert re.search(r"measure +succeeded .*largest", said[0])
    assert re.search(r"measure +cached", said[1])
    saved = load_file(tmp_path / "dist/tool/model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


PUSH = """\
version: 1
name: push
params: {most: 1GB}
stages:
  model: {uses: download, with: {path: models/quickstart}}
  quantize: {uses: quantize, inputs: model, matrix: {scheme: [int8, nf4]}, with: {scheme: "${matrix.scheme}"}}
  weigh:
    uses: command
    inputs: {model: quantize}
    with:
      argv: ["${python}", weigh.py, "${input.model}", "${out}"]
      files: [weigh.py]
      produces: report
      metrics: metrics.json
    gates: ["bytes <= ${params.most}"]
  save:
    uses: save
    inputs: {model: quantize, reports: [weigh]}
    first: {axis: scheme, of: weigh}
    with: {to: "hf://ada/small"}
"""
WEIGH = """\
import json, sys
from pathlib import Path
source, out = map(Path, sys.argv[1:])
size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
(out / "metrics.json").write_text(json.dumps({"bytes": size}))
"""


def test_only_what_passes_is_pushed(tmp_path):
    """And the card says what was tried before it, and why that was left."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    (tmp_path / "weigh.py").write_text(WEIGH)
    (tmp_path / "recipe.yaml").write_text(PUSH)
    command = [sys.executable, "-m", "bigpipe", "run", "recipe.yaml", "-p"]
    with LoopbackHub() as hub:
        hub.users["secret-token"] = "ada"
        there = {**environment(tmp_path), **hub.environment(tmp_path / "hf"), "HF_TOKEN": "secret-token"}

        def pushed(most: str) -> int:
            done = subprocess.run(
                [*command, f"most={most}"], cwd=tmp_path, env=there, capture_output=True, text=True, check=False
            )
            assert done.returncode in (0, 3), done.stderr
            return done.returncode

        assert pushed("1MB") == 3
        assert "ada/small" not in hub.repositories
        assert pushed("1.8MB") == 0
        repository = hub.repositories["ada/small"]
        files = repository.commits[repository.branches["main"]]
    card = bytes(files["README.md"].content).decode()
    assert "quantized to nf4" in card
    assert re.search(r"\| weigh@scheme=int8 \| gate bytes <= 1.8MB: 2", card)
    steps = {step["node"]: step["left"] for step in json.loads(bytes(files["provenance.json"].content))["steps"]}
    assert steps.keys() == {"model", "quantize@scheme=nf4", "weigh@scheme=int8", "weigh@scheme=nf4"}


def test_evaluating(tmp_path):
    """The recipe, the commands and the Python block of the page, and the recipe for those who come from lm-eval."""
    page = "docs/how-to/evaluate.md"
    (tmp_path / "models").mkdir()
    (tmp_path / "models/quickstart").symlink_to(QUICKSTART)
    text = "Return the number of times that a value occurs in the list. Raise ValueError if it is not there.\n" * 4
    for name in ("text.txt", "wiki.txt"):
        (tmp_path / name).write_text(text)
    (tmp_path / "check.yaml").write_text(blocks(page, "yaml")[0])
    (tmp_path / "loss.yaml").write_text(blocks("docs/how-to/coming-from-lm-eval.md", "yaml")[0])
    for line in [*blocks(page, "console")[0].splitlines(), "$ bigpipe run loss.yaml"]:
        done = run(tmp_path, "-m", "bigpipe", *line.removeprefix("$ bigpipe ").split())
        assert "Traceback" not in done.stderr
    assert "perplexity ratio" in (tmp_path / "report/report.txt").read_text()
    bigpipe.quantize_checkpoint(QUICKSTART, tmp_path / "models/quickstart-nf4", scheme="nf4")
    assert "±" in run(tmp_path, "-c", blocks(page)[0]).stdout


def test_a_plan_counts_the_dearest_variant_for_who_takes_one(tmp_path, monkeypatch):
    monkeypatch.setenv("BIGPIPE_HOME", str(tmp_path / "store"))
    (tmp_path / "models").symlink_to(ROOT / "models")
    (tmp_path / "weigh.py").write_text(WEIGH)
    recipe = PUSH.replace("[int8, nf4]", "[nf4, int8]").replace("hf://ada/small", "dist/small")
    (tmp_path / "recipe.yaml").write_text(recipe)
    plan = bigpipe.plan(tmp_path / "recipe.yaml")
    sizes = [plan.nodes[f"quantize@scheme={scheme}"].forecast.write_bytes for scheme in ("nf4", "int8")]
    assert sizes[0] < sizes[1]
    assert sizes[0] < plan.nodes["save"].forecast.write_bytes
    assert abs(plan.nodes["save"].forecast.write_bytes - sizes[1]) < 0.01 * sizes[1]
