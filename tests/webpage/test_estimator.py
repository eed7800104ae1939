"""The estimator page: the command's numbers, as tables and as JSON; what is wrong stands on the page."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support.hub import LoopbackHub
from support.paging import QUICKSTART, Visit, visiting
from support.workshop import Workshop

import bigpipe
from bigpipe.errors import BigpipeError
from bigpipe.machine import Gpu, Machine
from bigpipe.sizes import format_size
from bigpipe.webpage.answering import answer
from bigpipe.webpage.questions import OPTIONS, read_question

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
from bigpipe.webpage.application import STATUSES, templates

ENEMY = "</h2><script>alert(1)</script>"
FILES = {path.name: path for path in QUICKSTART.iterdir() if path.suffix in (".json", ".safetensors")}
BIG = {
    "architectures": ["OPTForCausalLM"], "model_type": "opt", "hidden_size": 5120, "ffn_dim": 20480,
    "num_hidden_layers": 40, "num_attention_heads": 40, "vocab_size": 50272, "max_position_embeddings": 2048,
    "word_embed_proj_dim": 5120, "do_layer_norm_before": True,
}  # fmt: skip
"""facebook/opt-13b, as far as sizes go."""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(QUICKSTART, folder / "model")
    (folder / "big").mkdir()
    (folder / "big" / "config.json").write_text(json.dumps(BIG))
    return Workshop(folder)


@pytest.fixture(scope="module")
def page(shop: Workshop) -> Iterator[Visit]:
    with visiting(shop) as visit:
        yield visit


def test_the_json_is_that_of_the_command(shop, page):
    told = page.get("/api/estimate?model=model&batch_size=4&dtypes=int8&dtypes=float32&train=lora&memory=1GiB")
    command = ("estimate", "model", "--batch-size", "4", "--dtypes", "int8", "float32", "--train", "lora")
    assert told.status == 200
    assert told.headers["content-type"] == "application/json"
    assert json.loads(told.text) == shop.json(*command, "--memory", "1GiB")


def test_what_does_not_fit_is_answered_as_the_command_answers(shop, page):
    told = json.loads(page.get("/api/estimate?model=big&memory=1GiB&dtypes=float16").text)
    assert told == shop.json("estimate", "big", "--memory", "1GiB", "--dtypes", "float16")
    assert told["exit_code"] == 4


def test_errors_are_those_of_the_command(shop, page):
    told = page.get("/api/estimate?model=model&dtypes=int9")
    assert told.status == 400
    assert json.loads(told.text) == shop.json("estimate", "model", "--dtypes", "int9")


def test_a_repository_and_its_address(tmp_path):
    workshop = Workshop(tmp_path)
    with LoopbackHub() as hub:
        commit = hub.create("org/model", FILES)
        around = hub.environment(tmp_path / "hf")
        with visiting(workshop, **around) as visit:
            named = json.loads(visit.get("/api/estimate?model=org/model").text)
            assert named["revision"] == commit
            linked = json.loads(visit.get("/api/estimate?model=https://huggingface.co/org/model/tree/main").text)
            assert linked["dtypes"] == named["dtypes"]
            missing = visit.get("/?model=org/other")
            assert 'class="error"' in missing.text
            assert "org/other" in missing.text
            assert "Traceback" not in missing.text
            recipe = re.search(r'id="recipe".*?>(.*?)</pre>', visit.get("/?model=org/model").text, re.DOTALL)
            assert commit in recipe[1]
        assert hub.bytes_sent(".safetensors") < FILES["model.safetensors"].stat().st_size / 10


def cells(text: str, label: str) -> list[list[str]]:
    """The rows of the table in a region, as they are read."""
    table = re.search(rf'aria-label="{re.escape(label)}">.*?<table.*?>(.*?)</table>', text, re.DOTALL)
    assert table is not None, label
    rows = re.findall(r"<tr>(.*?)</tr>", table[1], re.DOTALL)
    found = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL) for row in rows]
    return [[re.sub(r"<[^>]+>", "", cell).strip() for cell in row] for row in found]


def test_without_a_script_the_form_shows_the_numbers(shop, page):
    made = bigpipe.estimate(shop.folder / "model", batch_size=4)
    bare = bigpipe.estimate(shop.folder / "model", batch_size=4, head="none").as_json()
    told = page.post("/", {"model": "model", "batch_size": "4", "gpu": "T4", "run_in": "int8"})
    assert told.status == 200
    rows = cells(told.text, "Memory to infer, by dtype")[1:]
    assert [row[0] for row in rows] == ["float32", "float16", "int8", "int4"]
    for row, budget in zip(rows, made.budgets, strict=True):
        parts = (budget.weights, budget.kv_cache, budget.activations, budget.runtime)
        assert row[1:7] == [*(format_size(part.bytes) for part in parts),
                            format_size(budget.inference), format_size(budget.inference_high)]  # fmt: skip
    for row in cells(told.text, "As accelerate estimate-memory counts")[1:]:
        found = bare["dtypes"][row[0]]["accelerate"]
        assert row[1:] == [format_size(size) if size is not None else "–" for size in found.values()]
    trained = cells(told.text, "Memory of a training step, by dtype and optimizer")[1]
    assert trained[1:] == [format_size(term.bytes) for term in made["float32"].training.values()]


def test_the_kv_cache_by_batch_and_length(page):
    rows = cells(page.get("/?model=big&gpu=H100+80GB").text, "KV cache by batch size and sequence length")
    assert rows[0] == ["batch \\ tokens", "512", "2,048"]  # the model takes no more
    for row in rows[1:]:
        batch, per_token = int(row[0]), 2 * 40 * 5120 * 2
        assert [cell.split(" ✓")[0].split(" ✗")[0] for cell in row[1:]] == [
            format_size(batch * length * per_token) for length in (512, 2048)
        ]
    assert rows[1][1].endswith("✓ fits")
    assert rows[-1][2].endswith("✗ does not fit")


def test_what_fits_on_which_gpu_and_the_smallest_change(shop, page):
    rows = {row[0]: row for row in cells(page.get("/?model=big&batch_size=4&gpu=A10G").text, "What fits on one GPU")}
    made = bigpipe.estimate(shop.folder / "big", batch_size=4)
    for name, gib in (("A10G", 23028 / 1024), ("H100 80GB", 81559 / 1024)):
        for place, budget in enumerate(made.budgets, 2):
            verdict = made.verdict(budget.dtype, int(gib * 2**30))
            assert rows[name][place].startswith("✓") == verdict.fits
    assert rows["A10G"][3] == "✗ --dtypes int8"


def test_the_smallest_change_is_a_link_that_makes_it(page):
    before = page.get("/?model=big&batch_size=4&gpu=A10G&run_in=float16").text
    assert "is not enough" in before
    link = re.search(r'smallest change that fits: <a href="([^"]+)"', before)
    after = page.get(link[1].replace("&amp;", "&")).text
    assert "One GPU is enough" in after


MIDDLE = {**BIG, "hidden_size": 1024, "ffn_dim": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
          "word_embed_proj_dim": 1024}  # fmt: skip
"""Trained with AdamW at batch 4, it fits an RTX 3060 with gradient checkpointing alone."""


def linked_fields(told: dict, fields: dict) -> list[tuple[str, str]]:
    """Of the link that makes the smallest change."""
    change = told["page"]["change"]
    assert not change["fits"]
    assert change["fields"]
    kept = [(name, str(value)) for name, value in fields.items() if name not in change["fields"]]
    return [*kept, *((name, str(value)) for name, value in change["fields"].items())]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"train": "adamw", "gpu": "RTX 3060", "batch_size": 4}, "gradient_checkpointing"),
        ({"gpu": "RTX 3060", "run_in": "nf4", "double_quant": "true", "dtypes": "float16,int8"}, ""),
    ],
)
def test_a_change_that_is_a_flag_is_a_link_too(tmp_path, fields, name):
    (tmp_path / "config.json").write_text(json.dumps(MIDDLE if "train" in fields else BIG))
    pairs = [("model", str(tmp_path)), *((key, str(value)) for key, value in fields.items())]
    first = answer(read_question(pairs).as_json(), roots=[tmp_path])
    asked = pairs
    if name:
        asked = linked_fields(first, dict(pairs))
        assert (name, "true") in asked
    told = answer(read_question(asked).as_json(), roots=[tmp_path])
    assert told["estimate"]["errors"] == []
    assert told["page"]["change"]["fits"]


def test_a_pasted_config_comes_back_as_it_was_sent(page):
    """As a browser sends it: https://html.spec.whatwg.org/multipage/form-control-infrastructure.html (CRLF)."""
    told = page.post("/", {"config": json.dumps(BIG, indent=1).replace("\n", "\r\n")})
    field = re.search(r"<textarea[^>]*>(.*?)</textarea>", told.text, re.DOTALL)
    assert json.loads(html.unescape(field[1])) == BIG


def test_what_an_address_asks_for_stays_in_the_form(page):
    told = page.get("/?model=model&subfolder=sub&lora_rank=4&lora_targets=q_proj&lora_targets=v_proj&memory=1GiB")
    fields = dict(re.findall(r'<input id="\w+" name="(\w+)" value="([^"]*)"', told.text))
    given = {"subfolder": "sub", "lora_rank": "4", "lora_targets": "q_proj v_proj", "memory": "1GiB"}
    assert given.items() <= fields.items()
    assert 'name="variant"' not in told.text


def test_what_was_pasted_has_no_address_that_would_lose_it(page):
    told = page.post("/", {"config": json.dumps(BIG), "gpu": "A10G", "batch_size": "4"})
    assert "The smallest change that fits: <code>" in told.text
    assert 'href="/?' not in told.text


def test_what_is_not_trained_so_has_its_smallest_change_too(page):
    rows = {row[0]: row for row in cells(page.get("/?model=big&train=adamw").text, "What fits on one GPU")}
    assert "✗ not trained so: --train lora" in rows["H200"][4]


@pytest.mark.parametrize("run_in", ["float16", "int8", "nf4"])
def test_the_placement_is_that_of_the_library(shop, run_in):
    """Of a checkpoint in that format, which the page only foresees."""
    model = shop.folder / "model"
    if run_in != "float16":
        bigpipe.quantize_checkpoint(model, shop.folder / run_in, scheme=run_in)
    told = answer({"model": str(model), "run_in": run_in}, roots=[shop.folder])["page"]["placement"]
    held = {row["device"]: row["weights"] for row in told["devices"]}
    wanted = bigpipe.place(shop.folder / run_in if run_in != "float16" else model, dtype=None)
    assert held["cpu"] == wanted.weights["cpu"] > 0


def test_a_placement_says_that_it_keeps_keys_and_values_as_computed(shop):
    options = {"batch_size": 40, "kv_dtype": "int8"}
    told = answer({"model": str(shop.folder / "big"), "options": options, "gpu": "H100 80GB"}, roots=[shop.folder])
    assert told["page"]["change"]["fits"]
    assert told["page"]["placement"]["devices"] == []
    assert "keys and values as they are computed" in told["page"]["placement"]["error"]["cause"]
    same = {**options, "kv_dtype": "float16"}
    told = answer({"model": str(shop.folder / "big"), "options": same, "gpu": "H100 80GB"}, roots=[shop.folder])
    assert told["page"]["placement"]["error"] is None


def test_rooms_are_those_that_a_placement_counts_with(shop, monkeypatch, tmp_path):
    small = Machine(
        name="small", cpus=1, memory=16 * 2**30, memory_available=2**20, disk_free=2**30,
    )  # fmt: skip
    roots: list[Path] = []
    monkeypatch.setattr("bigpipe.webpage.answering.detect", lambda root: (roots.append(root), small)[1])
    told = answer({"config": json.dumps(BIG)}, memo=tmp_path / "store" / "memo")
    rows = {row["device"]: row for row in told["page"]["placement"]["devices"]}
    assert rows["cpu"]["room"] == small.memory
    assert rows["cpu"]["lacks"] == 0
    assert rows["disk"]["lacks"] == rows["disk"]["total"] - 2**30 > 0
    assert {*roots} == {tmp_path / "store"}  # a pasted config lies elsewhere


def test_different_gpus_are_named_by_kind(shop, monkeypatch):
    gpus = tuple(Gpu(number, name, 2**34, 2**34) for number, name in enumerate(("A", "A", "B")))
    here = Machine(name="m", cpus=1, memory=2**36, memory_available=2**36, disk_free=2**40, gpus=gpus)
    monkeypatch.setattr("bigpipe.webpage.answering.detect", lambda root: here)
    told = answer({"model": str(shop.folder / "model")}, roots=[shop.folder])
    assert told["page"]["device"] == "2 × A and B, here"


def test_what_a_device_lacks_stands_on_the_page():
    row = {"label": "disk", "room": 2**30, "parts": 1, "total": 3 * 2**30, "lacks": 2**31, "device": "disk",
           "weights": 3 * 2**30, "kv_cache": 0, "activations": 0, "runtime": 0, "streaming": 0}  # fmt: skip
    page = answer({"config": json.dumps(BIG)})["page"]
    page["placement"] = {"devices": [row], "explanation": [], "error": None, "stored": None}
    text = templates().get_template("answer.html").render(page=page, errors=[], again=[], linked=False)
    assert "</span> disk lacks 2.0 GiB." in text


def test_gpus_that_are_not_here_are_placed_on(page):
    rows = cells(page.get("/?model=big&gpu=A10G&gpus=2&run_in=float16").text, "What each device holds")
    assert [row[0] for row in rows[1:]] == ["GPU 0: A10G", "GPU 1: A10G", "CPU memory", "disk"]
    assert rows[1][2].endswith("GiB")
    assert rows[2][2].endswith("GiB")


@pytest.mark.parametrize(
    "fields",
    [
        {"run_in": "float16"},
        {"run_in": "nf4", "batch_size": 3, "gpu": "T4"},
        {"run_in": "int8", "gpu": "RTX 4090", "gpus": 2},
        {"batch_size": 64, "kv_dtype": "int8", "gpu": "T4"},
        {"run_in": "nf4", "double_quant": True, "gpu": "T4"},
        {"head": "none", "gpu": "T4"},
        {"model": "packed", "run_in": "nf4", "gpu": "T4"},
        {"model": "packed", "gpu": "T4"},
        {"model": "\N{GRINNING FACE}"},
    ],
)
def test_the_recipe_is_one_that_plans(shop, fields):
    model = fields.get("model", "model")
    if model == "packed" and not (shop.folder / model).exists():
        bigpipe.quantize_checkpoint(shop.folder / "model", shop.folder / model, scheme="int8")
    elif not (shop.folder / model).exists():
        shutil.copytree(QUICKSTART, shop.folder / model)
    options = {name: value for name, value in fields.items() if name in OPTIONS and name != "model"}
    asked = {name: value for name, value in fields.items() if name not in OPTIONS}
    old = Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shop.folder)
        told = answer({"model": model, "options": options, **asked}, roots=[shop.folder])
    assert Path.cwd() == old
    (shop.folder / "made.yaml").write_text(told["page"]["recipe"])
    planned = shop.json("plan", "made.yaml")
    assert planned["exit_code"] == 0, planned["errors"]
    assert {node["action"] for node in planned["nodes"].values()} == {"run"}
    assert ("generate" in planned["nodes"]) == (options.get("head") != "none")
    gates = [(gate["passed"], gate["value"]) for gate in planned["nodes"]["estimate"]["gates"]]
    assert gates == ([(True, told["page"]["change"]["needed"])] if "gpu" in fields else [])


def test_a_recipe_is_of_the_folder_that_an_address_names(tmp_path):
    with LoopbackHub() as hub:
        commit = hub.create("org/pipe", {f"text_encoder/{name}": path for name, path in FILES.items()})
        with pytest.MonkeyPatch.context() as patch:
            for name, value in hub.environment(tmp_path / "hf").items():
                patch.setenv(name, value)
            told = answer({"model": "https://huggingface.co/org/pipe/tree/main/text_encoder"})
    source = yaml.safe_load(told["page"]["recipe"])["stages"]["download"]["with"]
    assert source == {"repo": "org/pipe", "revision": commit, "subfolder": "text_encoder"}


WHISPER = {
    "architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper", "d_model": 64, "encoder_layers": 1,
    "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "vocab_size": 128, "num_mel_bins": 80, "pad_token_id": 0,
}  # fmt: skip


def test_a_model_that_hears_is_given_no_prompts(tmp_path):
    shutil.copy(FILES["model.safetensors"], tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(WHISPER))
    told = answer({"model": str(tmp_path)}, roots=[tmp_path])
    assert list(yaml.safe_load(told["page"]["recipe"])["stages"]) == ["download", "estimate", "dispatch"]


@pytest.mark.parametrize("model", ["big", "big/config.json", "model/model.safetensors"])
def test_what_holds_no_model_to_run_has_no_recipe(shop, page, model):
    told = page.get(f"/?model={model}")
    assert told.status == 200
    assert "As a recipe" not in told.text


def test_a_checkpoint_that_is_packed_already_is_placed_as_it_is_stored(shop):
    bigpipe.quantize_checkpoint(shop.folder / "model", shop.folder / "stored", scheme="int8")
    with visiting(shop) as visit:
        assert "Where it goes: as it is stored, in bitsandbytes int8 on" in visit.get("/?model=stored&run_in=nf4").text
        assert "Where it goes: nf4 on" in visit.get("/?model=model&run_in=nf4").text


def test_names_in_a_recipe_mean_themselves(tmp_path):
    shutil.copytree(QUICKSTART, tmp_path / "a: ${b} #'\"")
    told = answer({"model": str(tmp_path / "a: ${b} #'\"")}, roots=[tmp_path])
    (tmp_path / "made.yaml").write_text(told["page"]["recipe"])
    loaded = yaml.safe_load(told["page"]["recipe"])
    assert loaded["stages"]["download"]["with"]["path"] == str(tmp_path / "a: $${b} #'\"")
    recipe = bigpipe.load_manifest(tmp_path / "made.yaml")
    assert str(recipe.nodes["download"].params.path) == str(tmp_path / "a: ${b} #'\"")


def test_a_config_that_was_pasted(shop, page):
    told = page.post("/", {"config": json.dumps(BIG), "gpu": "H100 80GB"})
    assert told.status == 200
    assert cells(told.text, "Memory to infer, by dtype") == cells(
        page.get("/?model=big&gpu=H100+80GB").text, "Memory to infer, by dtype"
    )
    assert "As a recipe" not in told.text
    assert "bigpipe-" not in told.text  # no folder of ours


@pytest.mark.parametrize(
    "config",
    [
        "{", "[]", "null", "9" * 5000, "[" * 20_000, '{"model_type": 3}', '{"model_type": "opt", "hidden_size": "x"}',
        json.dumps({**BIG, "num_hidden_layers": 10**9}), json.dumps({**BIG, "hidden_size": -1}),
        json.dumps({"model_type": ENEMY, "architectures": [ENEMY]}), json.dumps({**BIG, "architectures": [ENEMY]}),
        json.dumps({"model_type": "opt\u202e\x1b[2J", "architectures": ["\ud800"]}),
        json.dumps({"auto_map": {"AutoModel": "evil.Model"}, "model_type": "evil"}),
        json.dumps({**BIG, "architectures": 7}), json.dumps({**BIG, "architectures": "OPT"}), "config.json",
    ],
)  # fmt: skip
def test_a_hostile_config_does_not_break_the_page(page, config):
    told = page.post("/", {"config": config})
    assert told.status in (200, 400, 422), told.text
    assert 'class="error"' in told.text or "To infer" in told.text
    assert "this is a bug" not in told.text
    assert "<script>alert" not in told.text
    assert "\x1b" not in told.text
    assert page.get().status == 200


@pytest.mark.parametrize(
    "name", [ENEMY, '"><img src=x onerror=alert(1)>', "a\x00b", "\u202egnp", "x" * 501, "{{ 7*7 }}"]
)
def test_a_hostile_name_does_not_break_the_page(page, name):
    told = page.post("/", {"model": name})
    assert told.status == 400
    assert 'class="error"' in told.text
    assert "<script>alert" not in told.text
    assert "<img" not in told.text
    assert ">49<" not in told.text
    assert "\x00" not in told.text


@pytest.mark.parametrize("query", ["batch_size=0", "batch_size=-1", "batch_size=1e9", "batch_size=" + "9" * 400,
                                   "gpus=17", "gpu=Z80", "run_in=int9", "trust_remote_code=true", "double_quant=maybe",
                                   "dtypes=int9", "memory=5q", "train=sleep", "library_name=x", "head=x"])  # fmt: skip
def test_a_field_that_is_wrong_is_said(page, query):
    told = page.get(f"/?model=model&{query}")
    assert told.status == 400
    assert (
        re.search(rf'class="cause">[^<]*{query.partition("=")[2][:20] or "0"}', told.text)
        or "trust_remote" in told.text
    )


ODD = ("xx", "-1", "0", "1e9", "9" * 30, "../..", "é", "[1]", "null", "nan", "%s", "16Gb", "a" * 499, "*", "a|b")


@pytest.mark.parametrize("name", [*OPTIONS, "config", "run_in", "gpu", "gpus"])
def test_whatever_stands_in_a_field_is_answered_with_a_cause_and_a_cure(shop, monkeypatch, name):
    """Never as a bug: what is wrong is the reader's to put right (400, 422), but for a repository that nobody can ask
    for (503)."""
    monkeypatch.chdir(shop.folder)
    statuses = set()
    for odd in ODD:
        try:
            question = read_question([*([("model", "model")] if name not in ("model", "config") else []), (name, odd)])
            told = answer(question.as_json(), roots=[shop.folder], memo=shop.folder / "memo", offline=True)
            errors, code = told["estimate"]["errors"], told["estimate"]["exit_code"]
        except BigpipeError as error:
            errors, code = error.as_json(), error.status
        assert all(each["cause"] and each["cure"] for each in errors), (odd, errors)
        statuses.add(STATUSES[code] if code else 200)
    assert statuses <= {200, 400, 422, *([503] if name == "model" else [])}
    assert statuses & {400, 422}


def test_what_is_pasted_and_no_config_is_said(page):
    for text, cause in (("{", "the config is not JSON: "), ("[1]", "the config is JSON, and no object")):
        told = page.post("/", {"config": text})
        assert told.status == 400
        assert cause in told.text
        assert "paste the whole text of a config.json" in told.text


def test_only_paths_of_the_directory_are_looked_at(shop, page, tmp_path):
    shutil.copytree(QUICKSTART, tmp_path / "model")
    (shop.folder / "away").symlink_to(tmp_path / "model")
    texts = []
    for path in (str(tmp_path / "model"), f"{tmp_path}/nothing", "away", "../x", "model/../../x", "."):
        told = page.get(f"/?model={path}")
        texts.append(re.sub(r"&#39;", "'", told.text))
        assert told.status == 400
    assert all("is not in a directory that this page may read" in text for text in texts[:5])
    with visiting(shop, "--also", str(tmp_path)) as visit:
        assert visit.get(f"/?model={tmp_path / 'model'}").status == 200
        assert visit.get("/?model=away").status == 200
        assert visit.get(f"/?model={QUICKSTART}").status == 400


def test_code_of_a_model_never_runs(shop, page, tmp_path):
    model = shop.folder / "evil"
    shutil.copytree(QUICKSTART, model)
    config = json.loads((model / "config.json").read_text())
    auto = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (model / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": auto}))
    (model / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    told = page.get("/?model=evil")
    assert told.status == 200  # from the names of its tensors
    assert "Note:" in told.text
    assert not (tmp_path / "ran").exists()
    refused = page.get(f"/api/estimate?model=evil&trust_remote_code=true&revision={'0' * 40}")
    assert refused.status == 400
    assert not (tmp_path / "ran").exists()


def test_a_secret_is_not_shown(shop):
    with visiting(shop, HF_TOKEN="hf_verysecretverysecret") as visit:
        told = visit.get("/?model=hf_verysecretverysecret")
        assert "hf_verysecret" not in told.text
        assert "***" in told.text
