"""`command`: any tool as a stage. Real programs, started as their users would."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path, PurePosixPath

import pytest
from support.contexts import inputs, stage_context
from support.forking import TOLD, forked
from support.models import POINTER
from support.stores import in_memory
from support.workshop import environment, statuses

import bigpipe
from bigpipe.errors import ManifestError, StageFailed, Transient, UsageError
from bigpipe.orchestrator.report import log_lines
from bigpipe.orchestrator.store import remove_tree
from bigpipe.plugins.command import CommandParams
from bigpipe.plugins.commanding import empty, lay_out, run
from bigpipe.programs import content_below, laid_out

NOBODY = 65534
COUNT = """\
import json, os, sys
from pathlib import Path
from helper import count
source, out = map(Path, sys.argv[1:3])
(out / "metrics.json").write_text(json.dumps({"letters": count(source / "text"), "half": 0.5}))
print("counted", file=sys.stderr)
"""
HELPER = "def count(path):\n    return len(path.read_text())\n"
RECIPE = """\
version: 1
name: tool
params: {most: 9, text: hello}
stages:
  text: {uses: write, with: {text: "${params.text}"}}
  count:
    uses: command
    inputs: {source: text}
    with:
      argv: ["${python}", tools/count.py, "${input.source}", "${out}"]
      files: [tools/*.py]
      produces: report
      metrics: metrics.json
    gates: ["letters <= ${params.most}"]
"""


@pytest.fixture
def tools(workshop):
    (workshop.folder / "tools").mkdir()
    (workshop.folder / "tools/count.py").write_text(COUNT)
    (workshop.folder / "tools/helper.py").write_text(HELPER)
    return workshop


NUMBERS = """\
version: 1
params: {steps: 3, fast: true}
stages:
  train:
    uses: command
    matrix: {rate: [0.1, 2]}
    with: {argv: [train, "${params.steps}", "${matrix.rate}", "--rate=${matrix.rate}"], produces: report}
    env: {RATE: "${matrix.rate}", STEPS: "${params.steps}", FAST: "${params.fast}"}
"""


def test_numbers_that_parameters_and_axes_bring_are_arguments_and_variables(workshop):
    workshop.manifest.write_text(NUMBERS)
    nodes = bigpipe.load_manifest(workshop.manifest).nodes
    assert [list(node.params.argv) for node in nodes.values()] == [
        ["train", "3", "0.1", "--rate=0.1"], ["train", "3", "2", "--rate=2"],
    ]  # fmt: skip
    assert nodes["train@rate=0.1"].env == {"RATE": "0.1", "STEPS": "3", "FAST": "true"}


@pytest.mark.parametrize(("number", "rate"), [("2.10", "1.50"), ("0x10", "1e3")])
def test_a_number_is_an_argument_as_it_is_written(workshop, number, rate):
    workshop.manifest.write_text(NUMBERS.replace("steps: 3", f"steps: {number}").replace("[0.1, 2]", f"[{rate}]"))
    (node,) = bigpipe.load_manifest(workshop.manifest).nodes.values()
    assert list(node.params.argv) == ["train", number, rate, f"--rate={rate}"]
    assert node.env == {"RATE": rate, "STEPS": number, "FAST": "true"}


def test_what_is_written_as_a_number_or_switch_is_not_guessed_to_be_text(workshop):
    """`2.10` would become 2.1."""
    workshop.manifest.write_text(NUMBERS.replace('"${matrix.rate}", "--', '2.10, 3, "${params.fast}", "--'))
    with pytest.raises(ManifestError) as caught:
        bigpipe.load_manifest(workshop.manifest)
    found = {(problem.cause, problem.cure) for problem in caught.value.problems}
    assert found == {
        ("argv.4: true where a text is expected", "put it in quotes where it is set if it is text: 'true'")
    }
    workshop.manifest.write_text(NUMBERS.replace('"${matrix.rate}", "--', '2.10, 3, "--'))
    with pytest.raises(ManifestError) as caught:
        bigpipe.load_manifest(workshop.manifest)
    found = {(problem.cause, problem.cure) for problem in caught.value.problems}
    assert found == {
        ("argv.2: 2.10 where a text is expected", "put it in quotes if it is text: '2.10'"),
        ("argv.3: 3 where a text is expected", "put it in quotes if it is text: '3'"),
    }


def test_a_tool_is_a_stage(tools):
    result = tools.run(RECIPE)
    assert result.exit_code == 0, result.errors
    record = result.nodes["count"].record
    assert record.metrics == {"letters": 5, "half": 0.5}
    assert record.artifact_type == "report"
    assert json.loads((result.path("count") / "metrics.json").read_text())["letters"] == 5
    assert "counted" in tools.command("log", "last", "count").stdout
    assert statuses(tools.run()) == {"text": "cached", "count": "cached"}
    assert tools.run(params={"most": "4"}, keep_going=True).exit_code == 3


def test_its_code_and_data_are_in_the_key(tools):
    """By content: another place of the same checkout is the same, a changed byte of what it imports is not."""
    first = tools.run(RECIPE).nodes["count"].key
    os.utime(tools.folder / "tools/helper.py", (1, 1))
    assert tools.run().nodes["count"].key == first
    (tools.folder / "tools/helper.py").write_text(HELPER + "# edited\n")
    result = tools.run()
    assert statuses(result)["count"] == "succeeded"
    assert "params.files" in result.nodes["count"].reason


def test_what_is_not_listed_is_not_there(tools):
    result = tools.run(RECIPE.replace("tools/*.py", "tools/count.py"))
    assert result.exit_code == 6
    assert "No module named 'helper'" in str(result.errors[0])


@pytest.mark.parametrize("listed", ["tools", "./tools/", "tools/**"])
def test_directories_and_globs(tools, listed):
    (tools.folder / "tools/__pycache__").mkdir()
    assert tools.run(RECIPE.replace("tools/*.py", listed)).exit_code == 0


LISTS = "import os, sys; open(os.path.join(sys.argv[1], 'there'), 'w').write(' '.join(sorted(os.path.join(at, name) for at, _, names in os.walk('.') for name in names)))"  # noqa: E501


def test_a_program_above_the_recipe_is_one_of_its_files(workshop):
    folder = workshop.folder / "recipes"
    folder.mkdir()
    tool = workshop.folder / "tools/convert"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho converted > $1/out\n")
    tool.chmod(0o755)
    text = recipe('[../tools/convert, "${out}"]', "produces: directory, files: [../tools/convert]")
    (folder / "recipe.yaml").write_text(text)
    assert bigpipe.plan(folder / "recipe.yaml").errors() == []
    result = bigpipe.run(folder / "recipe.yaml", store=workshop.folder / "store", check=False)
    assert result.exit_code == 0, result.errors
    assert (result.path("it") / "out").read_text() == "converted\n"


def test_what_is_laid_out_is_what_is_in_the_key_where_links_lead_in_a_circle(workshop):
    source = workshop.folder / "src"
    source.mkdir()
    (source / "a.py").write_text("")
    for name in ("me", "too"):
        (source / name).symlink_to(".")
    assert content_below(source) == ["a.py"]
    assert laid_out(["src"], workshop.folder) == {PurePosixPath("src/a.py"): source / "a.py"}
    result = workshop.run(recipe(f"['${{python}}', -c, \"{LISTS}\", '${{out}}']", "produces: report, files: [src]"))
    assert (result.path("it") / "there").read_text() == "./src/a.py"


def test_a_folder_that_several_links_lead_to_is_there_whole_under_each_name(tmp_path):
    """Whichever name sorts first, and beside links that lead in a circle."""
    project = tmp_path / "project"
    for name in ("pkg/x.py", "pkg/sub/y.py", "../shared/deep/z.json"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("")
    for name, target in (("alias", "pkg"), ("one", "../shared"), ("two", "../shared"), ("pkg/sub/up", "../..")):
        (project / name).symlink_to(target)
    whole = ["sub/y.py", "x.py"]
    links = ["one/deep/z.json", "two/deep/z.json"]
    assert content_below(project) == [
        *(f"alias/{name}" for name in whole), links[0], *(f"pkg/{name}" for name in whole), links[1]
    ]  # fmt: skip
    assert content_below(project, links=False) == [f"pkg/{name}" for name in whole]


def linked_to_each_other(folder: Path, count: int) -> Path:
    """Each of the packages has a file, and a link to each of the others, as a workspace of npm has them."""
    for name in range(count):
        (folder / f"p{name}").mkdir(parents=True)
        (folder / f"p{name}/a.js").write_text("")
        for other in range(count):
            if other != name:
                (folder / f"p{name}/to{other}").symlink_to(f"../p{other}")
    return folder


def test_folders_that_link_to_each_other_are_named_in_each_way_as_far_as_that_ends(workshop):
    assert len(content_below(linked_to_each_other(workshop.folder / "few", 6))) == 1956
    many = linked_to_each_other(workshop.folder / "many", 12)
    assert len(content_below(many, links=False)) == 12
    with pytest.raises(UsageError, match="links lead to the same folders in more than 10,000 ways") as refused:
        content_below(many)
    assert "name the folders that are meant" in refused.value.cure
    workshop.manifest.write_text(recipe("['true']", "produces: report, files: [many]"))
    with pytest.raises(UsageError, match=r"recipe\.yaml:4:\d+: .*many: links lead to the same folders"):
        bigpipe.plan(workshop.manifest, store=workshop.folder / "store")


@pytest.mark.parametrize(
    "files", ["[conf, ../conf]", "['conf/*', ../conf/x]", "[conf, ../../conf]", "[../../conf, conf/x]"]
)
def test_two_files_at_one_place_are_refused_by_the_plan(workshop, files):
    """Also a file where another one has a folder."""
    for name in ("a/b/conf/x", "a/conf/x", "conf"):
        (workshop.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (workshop.folder / name).write_text(name)
    manifest = workshop.folder / "a/b/recipe.yaml"
    manifest.write_text(recipe("[sh]", f"produces: report, files: {files}"))
    (error,) = bigpipe.plan(manifest).errors()
    assert isinstance(error, UsageError)
    assert "would both lie at conf" in error.cause
    assert error.place.line == 4


def test_a_file_that_is_named_twice_is_laid_out_once(tmp_path):
    """Also where it may not be written to."""
    with in_memory(tmp_path) as place:
        place.chmod(0o777)
        tool = place / "tools/x.py"
        tool.parent.mkdir()
        tool.write_text("")
        tool.chmod(0o444)
        assert (
            forked(lambda: lay_out(["tools", "tools/x.py", "tools/*.py"], place, place / "work"), user=NOBODY).code == 0
        )
        assert (place / "work/tools/x.py").exists()


def recipe(argv: str, more: str = "produces: directory", stage: str = "") -> str:
    return f"version: 1\nname: one\nstages:\n  it: {{uses: command{stage}, with: {{argv: {argv}, {more}}}}}\n"


def test_no_shell_reads_the_arguments(workshop):
    script = "import sys, pathlib; pathlib.Path(sys.argv[1], 'told').write_text('|'.join(sys.argv[2:]))"
    result = workshop.run(
        recipe(f"['${{python}}', -c, \"{script}\", '${{out}}', '$HOME; echo *', '`id`', '$${{out}}']")
    )
    told = (result.path("it") / "told").read_text()
    assert told.startswith("$HOME; echo *|`id`|")


def test_its_end_is_told_with_the_last_lines(workshop):
    script = "import sys; [print('line', n) for n in range(30)]; print('no such layer', file=sys.stderr); sys.exit(4)"
    error = workshop.run(recipe(f"['${{python}}', -c, \"{script}\"]")).errors[0]
    assert isinstance(error, StageFailed)
    assert "recipe.yaml:4:" in str(error)
    assert "${python} ended with exit status 4:" in error.cause
    assert "line 29" in error.cause
    assert "no such layer" in error.cause
    assert "line 3\n" not in error.cause
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    error = workshop.run(recipe(f"['${{python}}', -c, \"{killed}\"]")).errors[0]
    assert "was ended by signal 11 (SIGSEGV) and printed nothing" in error.cause


def test_a_signal_without_a_name_is_told_by_its_number(workshop):
    error = workshop.run(recipe("[sh, -c, 'kill -35 $$']")).errors[0]
    assert isinstance(error, StageFailed)
    assert error.cause == "sh was ended by signal 35 and printed nothing"


def test_what_an_attempt_left_where_nobody_may_write_is_removed(tmp_path):
    """As copies of read-only trees are."""
    with in_memory(tmp_path) as place:
        place.chmod(0o777)

        def leave() -> None:
            inner = place / "out/a/b"
            inner.mkdir(parents=True)
            (inner / "file").touch()
            (place / "out/link").symlink_to(place / "out/a")
            for folder in (inner, inner.parent, place / "out"):
                folder.chmod(0o555)

        def twice() -> None:
            leave()
            empty(place / "out")
            assert list((place / "out").iterdir()) == []
            (place / "out").rmdir()
            leave()
            remove_tree(place / "out")
            assert not (place / "out").exists()

        assert forked(twice, user=NOBODY).said == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to leave what is somebody else's")
def test_what_cannot_be_removed_of_an_attempt_is_told(tmp_path):
    with in_memory(tmp_path) as place:
        place.chmod(0o755)
        (place / "out/theirs").mkdir(parents=True)
        (place / "out/theirs/file").touch()
        ending = forked(lambda: empty(place / "out"), user=NOBODY)
        assert ending.code == TOLD
        assert f"which an attempt before left, cannot be removed: Permission denied; remove {place}" in ending.said


def test_exit_status_75_is_tried_again(workshop):
    script = "import sys; sys.exit(75)"
    text = recipe(f"['${{python}}', -c, \"{script}\"]")
    assert isinstance(workshop.run(text).errors[0], Transient)
    events = []
    workshop.run(text.replace("command,", "command, retries: 1,"), reporter=Told(events))
    assert [each.name for each in events if each.name == "node_retried"] == ["node_retried"]


class Told:
    def __init__(self, events: list) -> None:
        self.events = events

    def report(self, event) -> None:
        self.events.append(event)


WRITES = "import sys, pathlib; pathlib.Path(sys.argv[1], '{name}').write_text({text!r})"


@pytest.mark.parametrize(
    ("name", "text", "more", "cause"),
    [
        ("m.json", "[1]", "metrics: m.json", "m.json holds no object"),
        ("m.json", "{", "metrics: m.json", "m.json is no JSON"),
        ("n.json", "{}", "metrics: m.json", "the file of metrics, ${out}/m.json, cannot be read"),
        ("x", "x", "produces: checkpoint", "no"),
        ("x", "x", "produces: adapter", "is no adapter: there is no adapter_config.json"),
        ("model.safetensors", "x", "produces: checkpoint", "model.safetensors"),
        ("x", "x", "produces: results", "the command wrote no results.jsonl under ${out}"),
        ("results.jsonl", "{}\n[1]\n", "produces: results", "results.jsonl:2 is no JSON object"),
    ],
)
def test_what_it_made_is_checked(workshop, name, text, more, cause):
    script = WRITES.format(name=name, text=text)
    more = more if "produces" in more else f"produces: report, {more}"
    quoted = json.dumps(script)
    result = workshop.run(recipe(f"['${{python}}', -c, {quoted}, '${{out}}']", more))
    assert isinstance(result.errors[0], StageFailed), result.errors
    assert cause in result.errors[0].cause
    assert result.exit_code == 6


def test_what_gates_cannot_read_costs_a_line_and_not_the_work(workshop):
    text = '{"acc": 0.5, "acc,none": 0.4, "alias": "x", "deep": {"mean": 2, "a b": 1}, "b": NaN, "c": true, "d": 1%s, '
    text += '"e": {"f": 1}, "e.f": 2}'
    script = WRITES.format(name="m.json", text=text % ("0" * 400))
    quoted, more = json.dumps(script), "produces: report, metrics: m.json"
    gates = ", gates: ['acc >= 0.1', 'deep.mean == 2']"
    result = workshop.run(recipe(f"['${{python}}', -c, {quoted}, '${{out}}']", more, stage=gates))
    assert result.exit_code == 0, result.errors
    assert result.nodes["it"].record.metrics == {"acc": 0.5, "deep.mean": 2}
    (line,) = [line for line in log_lines("last", None) if "m.json" in line]
    assert line.endswith("and not 'acc,none', 'alias', 'deep.a b', 'b', 'c', 'd', 'e.f'")


@pytest.mark.parametrize("copy", ["cp -r $0/. $1", "mkdir -p $1/a/b && cp -r $0/. $1/a/b", "cp -rL $0/. $1"])
def test_an_input_may_be_copied_as_the_links_it_is(workshop, copy):
    text = recipe(f"[bash, -c, '{copy}', '${{input.one}}', '${{out}}']", stage=", inputs: {one: one}")
    text += "  one: {uses: write, with: {text: hello}}\n"
    result = workshop.run(text)
    assert result.exit_code == 0, result.errors
    assert [path.read_text() for path in result.path("it").rglob("text")] == ["hello"]


def test_nothing_under_out_is_no_result(workshop):
    for script in ("pass", "import os, sys; os.makedirs(sys.argv[1] + '/only/folders')"):
        error = workshop.run(recipe(f"['${{python}}', -c, \"{script}\", '${{out}}']")).errors[0]
        assert "wrote nothing under ${out}" in error.cause


def test_a_gate_needs_a_file_of_metrics(workshop):
    with pytest.raises(ManifestError) as caught:
        workshop.run(recipe("[x]", "produces: directory", stage=', gates: ["letters <= 3"]'))
    (problem,) = caught.value.problems
    assert problem.cause == "no metric 'letters' without `metrics` in command"
    assert "with: {metrics: …}" in problem.cure
    assert problem.place.line == 4


@pytest.mark.parametrize(
    ("argv", "more", "said"),
    [
        ("[llama-quantise, x]", "", "there is no program 'llama-quantise' on the PATH"),
        ("[./run.sh]", "", "./run.sh is not among the files of the command"),
        ("[./run.sh]", "files: [run.sh]", "./run.sh is no program: it cannot be executed"),
        ("[cat, p.bin]", "files: [run.sh, 'p*']", "files[1]: {folder}/p.bin: is a pointer of git-lfs"),
        ("['${python}', '${input.modle}']", "", "nothing is wired to the port 'modle', which ${input.modle} names"),
    ],
)
def test_what_is_missing_is_found_by_the_plan(workshop, argv, more, said):
    (workshop.folder / "run.sh").write_text("#!/bin/sh\n")
    (workshop.folder / "p.bin").write_text(POINTER)
    workshop.manifest.write_text(recipe(argv, "produces: directory" + (f", {more}" if more else "")))
    (error,) = bigpipe.plan(workshop.manifest).errors()
    assert isinstance(error, UsageError)
    assert said.replace("{folder}", str(workshop.folder)) in error.cause
    assert error.cure
    assert error.place.line == 4
    with pytest.raises(UsageError):
        workshop.run()


@pytest.mark.parametrize(
    ("argv", "more", "said"),
    [
        ("echo hi", "", 'no shell splits a text; write ["echo", "hi"]'),
        ("[]", "", "it is empty"),
        ("['${input.model}/run']", "", "what stages give is not run"),
        ("['${python}', '${input}']", "", "${input} is not known"),
        ("['${python}', '${outt}']", "", "${outt} is not a reference"),
        ("[x]", "metrics: ../m.json", "does not lie under ${out}"),
        ("[x]", "produces: model", "is not one of its values"),
    ],
)
def test_what_cannot_be_meant_is_refused(workshop, argv, more, said):
    text = recipe(argv, more if "produces" in more else f"produces: directory, {more}".rstrip(", "))
    with pytest.raises(ManifestError) as caught:
        workshop.run(text)
    assert said in str(caught.value)


def test_a_file_that_is_not_there_is_placed(workshop):
    workshop.manifest.write_text(recipe("[sh]", "produces: directory, files: [no.py]"))
    done = workshop.command("validate", "recipe.yaml")
    assert done.returncode == 2
    assert "there is no file no.py" in done.stdout + done.stderr


def test_what_it_produces_is_what_may_be_wired(workshop):
    base = recipe("[sh]", "produces: report")
    with pytest.raises(ManifestError, match="it \\(command\\) gives a report"):
        workshop.run(base + "  s: {uses: shard, inputs: it}\n")
    workshop.manifest.write_text(base.replace("report", "checkpoint") + "  s: {uses: shard, inputs: it}\n")
    bigpipe.load_manifest(workshop.manifest)


def test_gathered_inputs_are_several_arguments(workshop):
    script = "import sys, pathlib; pathlib.Path(sys.argv[1], 'n').write_text(str(len(sys.argv) - 2))"
    text = recipe(f"['${{python}}', -c, \"{script}\", '${{out}}', '${{input.all}}']", stage=", inputs: {all: [many]}")
    text += "  many: {uses: write, matrix: {text: [a, b, c]}, with: {text: '${matrix.text}'}}\n"
    result = workshop.run(text)
    assert (result.path("it") / "n").read_text() == "3"


def test_several_inputs_in_one_argument_are_refused_and_not_all_but_one_left_out(workshop):
    workshop.manifest.write_text(
        recipe("[sh, '--all=${input.all}', '${out}']", stage=", inputs: {all: [many]}")
        + "  many: {uses: write, matrix: {text: [a, b, c]}, with: {text: '${matrix.text}'}}\n"
    )
    (error,) = bigpipe.plan(workshop.manifest).errors()
    assert error.cause == "3 are gathered on the port 'all', and '--all=${input.all}' is one argument"


@pytest.mark.parametrize("gathered", [0, 2])
def test_what_is_gathered_into_one_argument_is_counted_again_when_it_runs(tmp_path, gathered):
    params = CommandParams(argv=["sh", "--all=${input.all}"], produces="directory")
    with pytest.raises(StageFailed, match=f"{gathered} are gathered on the port 'all'"):
        run(params, stage_context(tmp_path, inputs=inputs(all=[tmp_path] * gathered)))


def test_a_command_is_skipped_with_what_its_arguments_name(workshop):
    workshop.manifest.write_text(
        recipe("[sh, '${input.source}', '${out}']", stage=", inputs: {source: text, more: text}")
        + "  text: {uses: write, when: 1 > 2, with: {text: a}}\n"
        + "  other: {uses: command, inputs: {source: text}, with: {argv: [sh, '${out}'], produces: report}}\n"
    )
    planned = bigpipe.plan(workshop.manifest)
    actions = {name: str(node.action) for name, node in planned.nodes.items()}
    assert actions == {"text": "skipped", "it": "skipped", "other": "run"}
    assert planned.errors() == []


def test_it_sees_what_it_is_given_of_the_environment_and_no_more(workshop, monkeypatch):
    monkeypatch.setenv("MY_KEY", "s3cret-of-mine")
    monkeypatch.setenv("OTHER_KEY", "s3cret-of-others")
    monkeypatch.setenv("HF_TOKEN", "hf_tokentokentoken")
    script = "import os, sys, json, pathlib; pathlib.Path(sys.argv[1], 'e.json').write_text(json.dumps(sorted(os.environ))); print(os.environ['MY_KEY'])"  # noqa: E501
    stage = ", env: {WORD: hi}, secrets: [MY_KEY]"
    text = recipe(f"['${{python}}', -c, \"{script}\", '${{out}}']", stage=stage).replace(
        "name: one", "secrets: [MY_KEY]"
    )
    result = workshop.run(text)
    names = json.loads((result.path("it") / "e.json").read_text())
    assert {"WORD", "MY_KEY", "PATH"} <= set(names)
    assert not {"OTHER_KEY", "HF_TOKEN", "PYTHONSAFEPATH", "BIGPIPE_PARENT"} & set(names)
    log = workshop.command("log", "last", "it").stdout
    assert "***" in log
    assert "s3cret-of-mine" not in log


SLEEPS = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)']); open(sys.argv[1], 'w').write('x'); time.sleep(300)"  # noqa: E501


def marked(mark: str) -> dict[int, str]:
    """The processes with this in their environment, and their command lines."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace")
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("end", ["timeout", "interrupt", "kill"])
def test_it_ends_with_its_children(workshop, end):
    mark, begun = f"mark-of-{os.getpid()}-{end}", workshop.folder / "begun"
    timeout = ", timeout: 2s" if end == "timeout" else ""
    text = recipe(f"['${{python}}', -c, \"{SLEEPS}\", '{begun}']", stage=f", env: {{MARK: {mark}}}{timeout}")
    workshop.manifest.write_text(text)
    command = [sys.executable, "-m", "bigpipe", "run", "recipe.yaml"]
    run = subprocess.Popen(command, cwd=workshop.folder, env=environment(workshop.folder), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not begun.exists() and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.05)
    if end != "timeout":
        run.send_signal(signal.SIGINT if end == "interrupt" else signal.SIGKILL)
    said = run.communicate(timeout=60)[1].decode()
    assert run.returncode == {"timeout": 6, "interrupt": 130, "kill": -9}[end], said
    while (left := list(marked(mark).values())) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in marked(mark):
        os.kill(pid, signal.SIGKILL)
    assert left == []


CALLS = """\
import os, pathlib
from bigpipe.programs import run_program
pathlib.Path("caller").write_text(str(os.getpid()))
run_program(["sleep", "60"], folder=pathlib.Path(), environment=os.environ)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_group_that_others_are_in_is_not_ended(tmp_path):
    script = ["sh", "-c", '"$0" -c "$1" & wait; echo still here', sys.executable, CALLS]
    shell = subprocess.Popen(script, cwd=tmp_path, start_new_session=True, stdout=subprocess.PIPE)
    caller, deadline = tmp_path / "caller", time.monotonic() + 60
    while not (caller.exists() and caller.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    os.kill(int(caller.read_text()), signal.SIGKILL)
    assert shell.communicate(timeout=60)[0] == b"still here\n"


@pytest.mark.parametrize("instead", ["os.symlink(sys.argv[2], out)", "open(out, 'w')", "0"])
def test_out_that_was_replaced_is_refused_and_the_next_attempt_has_its_own(workshop, instead):
    theirs = workshop.folder / "theirs"
    theirs.mkdir()
    (theirs / "file").write_text("precious")
    script = f"import os, sys; out = sys.argv[1]; os.rmdir(out); {instead} if os.path.exists(sys.argv[2] + '/file') else (os.mkdir(out), open(out + '/x', 'w'))"  # noqa: E501
    text = recipe(f"['${{python}}', -c, \"{script}\", '${{out}}', {theirs}]")
    result = workshop.run(text)
    assert "replaced or removed ${out}" in result.errors[0].cause
    assert (theirs / "file").read_text() == "precious"
    assert not (theirs / "file").is_symlink()
    (theirs / "file").unlink()
    assert workshop.run().exit_code == 0


def test_an_attempt_that_broke_off_leaves_nothing(workshop):
    script = "import sys, pathlib; out = pathlib.Path(sys.argv[1]); n = len([*out.iterdir()]) + len([*pathlib.Path('.').iterdir()]); (out / str(n)).write_text('x'); pathlib.Path('left').write_text('x'); sys.exit(pathlib.Path(sys.argv[2]).exists())"  # noqa: E501
    (workshop.folder / "fail").touch()
    text = recipe(f"['${{python}}', -c, \"{script}\", '${{out}}', {workshop.folder / 'fail'}]")
    assert workshop.run(text).exit_code == 6
    (workshop.folder / "fail").unlink()
    result = workshop.run()
    assert [path.name for path in result.path("it").iterdir()] == ["0"]


def test_a_checkpoint_of_its_is_one_as_any_other(workshop, tmp_path):
    script = "import sys, shutil; shutil.copytree(sys.argv[1], sys.argv[2], dirs_exist_ok=True)"
    text = f"""\
version: 1
name: convert
stages:
  model:
    uses: download
    with:
      synthetic:
        config: {{model_type: gpt2, architectures: [GPT2LMHeadModel], n_embd: 8, n_layer: 1, n_head: 2, vocab_size: 32, n_positions: 16}}
  it:
    uses: command
    inputs: model
    with: {{argv: ["${{python}}", -c, "{script}", "${{input.model}}", "${{out}}"], produces: checkpoint}}
  shard: {{uses: shard, inputs: it, with: {{max_shard_size: 1kB}}}}
"""  # noqa: E501
    result = workshop.run(text)
    assert result.exit_code == 0, result.errors
    assert result.nodes["it"].record.artifact_type == "checkpoint"
    assert result.nodes["shard"].record.metrics["shards"] > 1
