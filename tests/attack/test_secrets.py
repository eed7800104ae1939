"""No secret is in what a command prints, nor in any file that it leaves, whatever goes wrong."""

from __future__ import annotations

import base64
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from support import leaking
from support.hub import LoopbackHub
from support.workshop import Workshop

from bigpipe.redaction import conceal, redact, redact_fields
from bigpipe.trust import Limits

SECRET = 'k"ana/ri+ü\\9f31c7&x'
"""Each program spells it differently."""
PROXY, ENDPOINT, TOKEN = "proxycanary41", "hubcanary77", "hf_tokencanary58"
STORED = "hf_storedcanary63"
CANARIES = (SECRET, PROXY, ENDPOINT, TOKEN, STORED)
NOT_INLINE = {"segmentation", "killed", "hang", "two_writes", "far_out", "child", "exit", "interrupt"}
"""These end the process, or go past Python's own output."""
WAYS = [*leaking.PRINTED, *leaking.TOLD, "metrics", "result", "foreseen"]
PLANNED = ["forecast", "check", "check_bug", "pin"]
QUICKSTART = Path(__file__).parents[2] / "models" / "quickstart"
MOVING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture
def leaky(tmp_path: Path) -> Leaky:
    (tmp_path / "work").mkdir()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text(STORED)
    shutil.copy(leaking.__file__, tmp_path / "work" / "leaking.py")
    return Leaky(tmp_path)


class Leaky:
    """A folder with a kind that gives secrets away, and what was said and left there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shop = Workshop(folder / "work")
        self.environment = {
            "S3_KEY": SECRET,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(folder / "hf"),
            "HF_ENDPOINT": f"http://me:{ENDPOINT}@127.0.0.1:9",
            "HTTPS_PROXY": f"http://me:{PROXY}@127.0.0.1:9",
            "ALL_PROXY": f"http://{PROXY}@127.0.0.1:9",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def recipe(self, nodes: Mapping[str, str], head: str = "secrets: [S3_KEY, HF_TOKEN]\n") -> None:
        stages = "".join(f"  {name}: {text}\n" for name, text in nodes.items())
        self.shop.manifest.write_text(
            f"version: 1\nname: leaky\n{head}trust: {{modules: [leaking]}}\nstages:\n{stages}"
        )

    def command(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run a command: no canary may be in what it says, nor what moves a terminal."""
        done = self.shop.command(*arguments, **{**self.environment, **environ})
        said = " ".join(arguments[:2])
        for stream in (done.stdout, done.stderr):
            assert not found_in(stream.encode()), f"{said}: {found_in(stream.encode())} in {stream[-2000:]}"
            assert not (moved := MOVING.findall(stream)), f"{said}: {moved}"
        assert "this is a bug in bigpipe" not in done.stderr
        return done

    def search(self) -> None:
        """All files under the folder: recipe, store, runs, Hub cache, lock files, what was saved."""
        own = {self.folder / "hf" / "token"}
        files = [path for path in self.folder.rglob("*") if path.is_file() and path not in own]
        assert len(files) > 2
        leaks = {str(path.relative_to(self.folder)): found for path in files if (found := found_in(path.read_bytes()))}
        assert leaks == {}


def found_in(data: bytes) -> list[str]:
    """Return the canaries in some bytes, as any program may spell them. Written apart from what is tested."""
    text = data.decode(errors="replace")
    found = [canary for canary in CANARIES if any(form in text for form in leaking.spelled(canary))]
    for run in re.findall(rb"[A-Za-z0-9+/_-]{12,}={0,2}", data[:1_000_000]):
        for start in range(4):
            piece = run[start:].rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
            decoded = base64.b64decode(piece[: len(piece) // 4 * 4])
            found += [canary for canary in CANARIES if canary.encode() in decoded]
    return found


def test_the_search_finds_a_canary() -> None:
    for form in leaking.spelled(SECRET):
        assert SECRET in found_in(f"x {form} y".encode()), form
    nobodys = os.urandom(8).hex()
    assert redact("nothing is known of " + nobodys).endswith(nobodys)


def stages(ways: list[str]) -> dict[str, str]:
    nodes = {}
    for way in ways:
        more = "secrets: [S3_KEY, HF_TOKEN]" + ", timeout: 2s" * (way == "hang") + ", retries: 1" * (way == "retried")
        nodes[way] = f"{{uses: 'leaking:STAGE', with: {{how: {way}}}, {more}}}"
        if way not in NOT_INLINE:
            nodes[f"{way}_inline"] = f"{{uses: 'leaking:INLINE', with: {{how: {way}}}, {more}}}"
    return nodes


EVERY = (
    "plan recipe.yaml", "plan recipe.yaml --json", "plan recipe.yaml --explain", "status recipe.yaml",
    "status recipe.yaml --json", "validate recipe.yaml", "why recipe.yaml NODE --json", "graph recipe.yaml",
    "lock recipe.yaml", "ls", "ls --json", "show", "show --json", "log last", "diff RUN last", "diff RUN last --json",
    "gc --dry-run", "verify", "kinds",
)  # fmt: skip


def leaks_through(leaky: Leaky, ways: list[str], commands: Sequence[str] = EVERY) -> None:
    """A run of all of them, then every command about it."""
    leaky.recipe(stages(ways))
    run = leaky.command("run", "recipe.yaml", "--keep-going", "--json", "--events", "events.jsonl")
    told = json.loads(run.stdout)
    statuses = {name: node["status"] for name, node in told["nodes"].items()}
    assert set(statuses.values()) <= {"succeeded", "failed"}, run.stderr
    assert run.returncode in (0, 6), run.stderr
    again = leaky.command("run", "recipe.yaml", "--keep-going")
    assert again.returncode == run.returncode
    for command in commands:
        leaky.command(*[{"RUN": told["run"], "NODE": ways[0]}.get(word, word) for word in command.split()])
    leaky.search()


def test_a_secret_in_what_a_kind_does_reaches_nobody(leaky: Leaky) -> None:
    leaks_through(leaky, ["exception", "two_writes", "metrics", "log"], ["plan recipe.yaml --json", "show", "log last"])


@pytest.mark.attack
def test_a_secret_in_thirty_failures_reaches_nobody(leaky: Leaky) -> None:
    assert len(WAYS) >= 30
    leaks_through(leaky, WAYS)


@pytest.mark.attack
def test_a_secret_in_a_row_that_failed_reaches_neither_results_nor_card(leaky: Leaky) -> None:
    """Through two ranks, and what `save` makes of it."""
    (leaky.shop.folder / "leaking.py").write_text(
        "import os\ndef go(model, rows, **_):\n"
        "    if rows[0]['index']: raise RuntimeError('403 for ' + os.environ['S3_KEY'])\n"
        "    found = {'text': os.environ['S3_KEY'], 'url': 'https://me:' + os.environ['HF_TOKEN'] + '@host'}\n"
        "    return [found for _ in rows]\n"
    )
    leaky.recipe({
        "model": f"{{uses: download, with: {{path: '{QUICKSTART}'}}}}",
        "infer": "{uses: distributed-infer, inputs: model, "
                 "with: {task: 'leaking:go', prompts: [a, b, c], max_errors: 2}, "
                 "launch: {num_processes: 2}, secrets: [S3_KEY, HF_TOKEN]}",
        "strict": "{uses: distributed-infer, inputs: model, "
                  "with: {task: 'leaking:go', prompts: [a, b]}, secrets: [S3_KEY, HF_TOKEN]}",
        "save": "{uses: save, inputs: {model: model, results: infer}, with: {to: out}}",
    })  # fmt: skip
    run = json.loads(leaky.command("run", "recipe.yaml", "--json", "--keep-going").stdout)
    assert (run["nodes"]["strict"]["status"], run["nodes"]["save"]["status"]) == ("failed", "succeeded")
    assert list(leaky.folder.glob("work/store/work/*/scratch/rank-0/records.jsonl"))
    assert "***" in (leaky.shop.folder / "out" / "results" / "results.jsonl").read_text()
    leaky.search()


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=pytest.mark.attack if how != "check_bug" else ()) for how in PLANNED]
)
def test_a_secret_in_what_fails_before_the_run_reaches_nobody(leaky: Leaky, how: str) -> None:
    leaky.recipe({"a": f"{{uses: 'leaking:STAGE', with: {{how: {how}}}, secrets: [S3_KEY, HF_TOKEN]}}"})
    commands = ("plan", "run", "lock") if how != "check_bug" else ("run",)
    for command in commands:
        assert leaky.command(command, "recipe.yaml").returncode in (0, 4, 6)
    leaky.search()


def test_addresses_with_passwords_are_shown_without(leaky: Leaky) -> None:
    """A Hub that cannot be reached, a proxy that is not there, an address in the recipe."""
    leaky.recipe({"download": "{uses: download, with: {repo: org/model}}"})
    there = leaky.command("run", "recipe.yaml")
    assert there.returncode == 75
    assert "***" in there.stderr
    elsewhere = leaky.command("run", "recipe.yaml", HF_ENDPOINT="https://hub.invalid")
    assert elsewhere.returncode == 75
    assert leaky.command("estimate", "org/model").returncode == 75
    leaky.recipe(
        {
            "save": "{uses: save, inputs: {model: d}, with: {to: '${env.WHERE}'}}",
            "d": "{uses: download, with: {repo: o/m}}",
        }
    )
    refused = leaky.command("run", "recipe.yaml", WHERE=f"ftp://me:{PROXY}@example.org/x")
    assert refused.returncode == 2
    assert "BP503" in refused.stderr
    leaky.search()


@pytest.mark.attack
@pytest.mark.parametrize("status", [400, 401, 403, 404, 407, 409, 418, 429, 500, 503])
def test_a_hub_that_repeats_the_token_gives_it_to_nobody(leaky: Leaky, status: int) -> None:
    text = f"not with {TOKEN}, Authorization: Bearer {TOKEN}"
    headers = {"X-Error-Message": text, "X-Error-Code": "Odd", "Retry-After": "1", "X-Request-Id": TOKEN}
    with LoopbackHub() as hub:
        hub.create("org/model", {"config.json": b"{}"})
        hub.fail("status", "/api/", status=status, times=1000, headers=headers)
        own = {**hub.environment(leaky.folder / "hf"), "HF_ENDPOINT": hub.url}
        leaky.recipe({"download": "{uses: download, with: {repo: org/model}}"})
        for command in (["run", "recipe.yaml"], ["lock", "recipe.yaml"], ["estimate", "org/model"]):
            assert leaky.command(*command, **own).returncode not in (0, 1)
    leaky.search()


def test_children_that_need_no_secret_find_none(leaky: Leaky) -> None:
    """Neither in their environment nor on a command line; the one that lists it has it."""
    leaky.recipe({
        "blind": "{uses: 'leaking:STAGE', with: {how: look}}",
        "sees": "{uses: 'leaking:STAGE', with: {how: look}, secrets: [S3_KEY], env: {OWN: declared}}",
    })  # fmt: skip
    loaders = {
        "LD_PRELOAD": "", "LD_AUDIT": "", "PYTHONSTARTUP": "/x.py", "PYTHONINSPECT": "", "PYTHONUSERBASE": "/x",
        "PYTHONWARNINGS": "", "CUDA_INJECTION64_PATH": "/x.so", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
        "ACCELERATE_USE_CPU": "true", "AWS_SECRET_ACCESS_KEY": "aws", "GIT_SSH_COMMAND": "x", "BASH_ENV": "/x",
    }  # fmt: skip
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    try:
        run = json.loads(leaky.command("run", "recipe.yaml", "--json", **loaders).stdout)
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))
    around = {name: (Path(node["path"]) / "around").read_text() for name, node in run["nodes"].items()}
    assert found_in(around["blind"].encode()) == []
    assert set(found_in(around["sees"].encode())) == {SECRET}
    assert "OWN=declared" in around["sees"]
    assert [line.split()[4] for line in around["blind"].splitlines() if line.startswith("Max core file")] == ["0", "0"]
    for name in loaders:
        assert f"{name}=" not in around["blind"] + around["sees"]


def test_a_child_that_builds_a_class_finds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own children, outside a run."""
    from bigpipe.bigmodel.architecture.asking import ask_child

    (tmp_path / "telltale.py").write_text(
        "import json, os, pathlib, sys\npathlib.Path(sys.argv[2]).write_text(json.dumps({'seen': dict(os.environ)}))\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    own = {"S3_KEY": SECRET, "HF_TOKEN": TOKEN, "HTTPS_PROXY": f"http://me:{PROXY}@host", "LD_AUDIT": ""}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    seen = ask_child("telltale", "{}", "telling", Limits())["seen"]
    assert found_in(json.dumps(seen).encode()) == []
    assert seen["HTTPS_PROXY"] == "http://host"
    assert "LD_AUDIT" not in seen


SHOW = """
import bigpipe, pprint, dataclasses
recipe, plan = bigpipe.load_manifest("recipe.yaml"), bigpipe.plan("recipe.yaml")
result = bigpipe.run("recipe.yaml")
node = next(iter(recipe.nodes.values()))
session = result.session
around = session.surroundings(node), session.check_context(node)
for what in (recipe, plan, result, result.nodes, session, node, *around):
    print(repr(what), str(what), f"{what}", [what], {"k": what}, pprint.pformat(what))
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.hub import Hub
import os
print(Sources(environment=os.environ), Hub.from_environment())
import traceback
with open("wrong.yaml", "w") as file:
    file.write("version: 1\\nstages: {x: {uses: nosuch}}\\n")
for asked in ({"manifest": "wrong.yaml"}, {"manifest": "recipe.yaml", "remote": "nosuch://x"}):
    try:
        bigpipe.plan(**asked)
    except bigpipe.BigpipeError as error:
        print(*traceback.TracebackException.from_exception(error, capture_locals=True).format())
    else:
        raise SystemExit("nothing was raised")
"""


def test_what_is_printed_in_python_shows_no_environment(leaky: Leaky) -> None:
    leaky.recipe({"a": "{uses: 'leaking:STAGE', with: {how: none}, secrets: [S3_KEY, HF_TOKEN], env: {SET: shown}}"})
    environment = {**os.environ, **leaky.environment, "MY_NOTE": "notecanary99", "HF_ENDPOINT": "http://127.0.0.1:9"}
    environment |= {"PYTHONPATH": str(Path(leaking.__file__).parents[2] / "src")}
    done = subprocess.run(
        [sys.executable, "-c", SHOW],
        cwd=leaky.shop.folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert found_in(done.stdout.encode()) == []
    assert "notecanary99" not in done.stdout


RAISE = """
import bigpipe
for file in ("recipe.yaml", "check.yaml"):
    try:
        bigpipe.run(file)
    except bigpipe.BigpipeError as error:
        print(error, repr(error), error.cause, error.cure, error.args)
    else:
        raise SystemExit("nothing was raised")
"""


def test_what_is_raised_in_python_holds_no_secret(leaky: Leaky) -> None:
    for how, name in (("check", "check.yaml"), ("exception", "recipe.yaml")):
        leaky.recipe({"a": f"{{uses: 'leaking:STAGE', with: {{how: {how}}}, secrets: [S3_KEY, HF_TOKEN]}}"})
        leaky.shop.manifest.rename(leaky.shop.folder / name)
    environment = {**os.environ, **leaky.environment, "PYTHONPATH": str(Path(leaking.__file__).parents[2] / "src")}
    done = subprocess.run(
        [sys.executable, "-c", RAISE], cwd=leaky.shop.folder, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("***") > 2
    assert found_in(done.stdout.encode()) == []


def test_no_value_shows_an_environment() -> None:
    """Every dataclass of the package that holds one keeps it out of its `repr`."""
    import dataclasses
    import importlib
    import pkgutil

    import bigpipe

    checked = 0
    for module in pkgutil.walk_packages(bigpipe.__path__, "bigpipe."):
        if module.name.endswith("__main__") or ".launch.worker" in module.name:
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and dataclasses.is_dataclass(value):
                for item in dataclasses.fields(value):
                    if item.name.strip("_") in ("environment", "parent_environment", "token"):
                        checked += 1
                        assert not item.repr, f"{value.__name__}.{item.name}"
    assert checked > 5


HOSTILE = "\x1b[31mred\x1b]0;title\x07\x9b2J\u202egnp.exe\x00\x08\r\x1b[1A"


def test_nothing_that_a_kind_or_a_model_says_moves_the_terminal(leaky: Leaky) -> None:
    (leaky.shop.folder / "leaking.py").write_text(f"""
import json, sys
from bigpipe.orchestrator.stage import Forecast, Metrics, Params, Stage, StageContext, StageResult
HOSTILE = {HOSTILE!r}
class Way(Params):
    how: str = ""
class Said(Metrics):
    text: str
def run(params, context):
    context.log(HOSTILE); print(HOSTILE); sys.stderr.write(HOSTILE)
    context.progress(1, 2, HOSTILE, HOSTILE)
    rows = [{{"index": 0, "prompt": HOSTILE, "text": HOSTILE}}]
    rows += [{{"index": 1, "prompt": "::error::x", "text": "##[error]x"}}]
    (context.out / "results.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
    if params.how == "fail":
        raise RuntimeError(HOSTILE)
    return StageResult(Said(text=HOSTILE))
def forecast(params, context):
    print(HOSTILE)
    return Forecast(summary=HOSTILE, details=(HOSTILE,), unknown=(HOSTILE,), metrics={{"text": HOSTILE}})
def stage(kind, runs_in):
    return Stage(kind=kind, version=1, params=Way, metrics=Said, inputs={{}}, output="results", run=run,
                 forecast=forecast, runs_in=runs_in, result_line=lambda metrics: str(metrics["text"]))
STAGE, INLINE = stage("hostile", "process"), stage("hostile-inline", "inline")
print(HOSTILE)
""")
    leaky.recipe({
        f"{name}{'_fails' * bool(how)}": f"{{uses: 'leaking:{name}', with: {{how: '{how}'}}, on_fail: continue}}"
        for name in ("STAGE", "INLINE")
        for how in ("", "fail")
    })  # fmt: skip
    for command in ("plan recipe.yaml", "run recipe.yaml", "run recipe.yaml --json", "show", "log last"):
        done = leaky.command(*command.split(), GITHUB_ACTIONS="true")
        assert not re.search(r"^\s*::(?!error file=)", done.stdout + done.stderr, re.MULTILINE)
        assert "##[" not in done.stdout
        if "--json" in command:
            json.loads(done.stdout)
    logs = list(leaky.folder.glob("work/store/runs/*/nodes/*/*/log.txt"))
    assert len(logs) >= 4
    assert not any(MOVING.search(log.read_text()) for log in logs)


@pytest.mark.attack
def test_nothing_in_a_config_or_an_argument_moves_the_terminal(leaky: Leaky) -> None:
    leaky.recipe({"a": "{uses: 'leaking:STAGE', with: {how: none}}"})
    (leaky.shop.folder / "model").mkdir()
    config = {"model_type": HOSTILE, "architectures": [HOSTILE], "n_layer": HOSTILE}
    for fields in (config, {**config, "model_type": "gpt2"}, {**config, "model_type": "gpt2", "n_layer": 1}):
        (leaky.shop.folder / "model" / "config.json").write_text(json.dumps(fields))
        leaky.command("estimate", "model")
        json.loads(leaky.command("estimate", "model", "--json").stdout)
    leaky.command("run", HOSTILE.replace("\x00", ""), "--json")
    leaky.command("run", "recipe.yaml", "--" + HOSTILE.replace("\x00", ""))


@pytest.mark.parametrize("words", [("characters", "succeeded"), ("findings", "test")], ids=" ".join)
def test_a_secret_that_is_a_word_like_any_other_breaks_nothing(words: tuple[str, str], tmp_path: Path) -> None:
    """A placeholder, where a mirror or a server of one's own asks for a key: it is also the name of a stage, a folder,
    a metric, a status, and in the environment of a stage."""
    folder = tmp_path / "findings" / "test"
    folder.mkdir(parents=True)
    shop = Workshop(folder)
    shop.manifest.write_text(
        "version: 1\nname: test\nsecrets: [OPENAI_API_KEY, HF_TOKEN]\nparams: {word: findings}\nstages:\n"
        "  test: {uses: write, secrets: [OPENAI_API_KEY, HF_TOKEN], env: {SAYS: test-findings}, "
        'with: {text: "${params.word}"}, gates: ["characters >= 5"]}\n'
        "  findings-test: {uses: join, inputs: {first: test}}\n"
    )
    given = dict(zip(("OPENAI_API_KEY", "HF_TOKEN"), words, strict=True))

    def command(*arguments: str) -> str:
        done = shop.command(*arguments, **given)
        assert done.returncode == 0, done.stderr
        return done.stdout

    told = json.loads(command("run", "recipe.yaml", "--json"))
    assert {name: node["status"] for name, node in told["nodes"].items()} == {
        "test": "succeeded", "findings-test": "succeeded",
    }  # fmt: skip
    assert Path(told["nodes"]["test"]["path"], "text").read_text() == "findings"
    assert told["nodes"]["test"]["metrics"]["characters"] == 8
    for arguments in (("lock",), ("lock", "--check"), ("run", "--locked")):
        command(arguments[0], "recipe.yaml", *arguments[1:])
    shown = json.loads(shop.command("show", "--json").stdout)
    assert (shown["manifest"], shown["status"]) == (str(shop.manifest), "succeeded")
    assert set(shown["nodes"]) == {"test", "findings-test"}
    command("get", "test", "out")


def test_a_secret_under_a_name_like_any_other_is_in_no_record(tmp_path: Path) -> None:
    """What a recipe calls its parameters, and a kind its metrics, says nothing of what is in them."""
    secret = "Zx9-corr3ct-horse-battery"
    shop = Workshop(tmp_path)
    shop.manifest.write_text(
        "version: 1\nname: named\nsecrets: [PASSPHRASE]\nparams: {key: x, path: y, source: z, other: w}\nstages:\n"
        "  one:\n    uses: write\n    secrets: [PASSPHRASE]\n"
        '    env: {A: "${params.key}", B: "${params.path}", C: "${params.source}"}\n'
        '    with: {text: "${params.other}"}\n'
    )
    given = [each for name in ("key", "path", "source") for each in ("-p", f"{name}={secret}")]
    for command in (("run", "--json"), ("plan", "--json"), ("lock",)):
        done = shop.command(command[0], "recipe.yaml", *given, *command[1:], PASSPHRASE=secret)
        assert done.returncode == 0, done.stderr
        assert secret not in done.stdout + done.stderr
    texts = [shop.manifest.with_name("recipe.yaml.lock"), *(tmp_path / "store" / "runs").rglob("*.json*")]
    told = [path for path in texts if path.name != "job.json"]  # which is what the stage is given
    assert {"run.json", "events.jsonl", "recipe.yaml.lock"} <= {path.name for path in told}
    assert [path for path in told if secret in path.read_text()] == []


def test_metrics_keep_no_secret() -> None:
    conceal(["Zx9-corr3ct-horse"])
    told = {"metrics": {"address": "https://u:pw@h/x?sig=abcdef", "made_of": "tok_Zx9-corr3ct-horse", "kept": 1}}
    assert redact_fields(told) == {"metrics": {"address": "https://u:***@h/x?sig=***", "made_of": "tok_***", "kept": 1}}
