"""`bigpipe report`: one file that says what runs did, whatever they were."""

from __future__ import annotations

import re
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest

import bigpipe
from bigpipe import redaction
from bigpipe.errors import UsageError
from bigpipe.orchestrator.report import report_runs, results_text
from bigpipe.orchestrator.report.drawing import Drawn, graph
from bigpipe.orchestrator.running import records, sentence
from bigpipe.webpage.looking import run_now

RECIPE = """\
version: 1
name: told
params: {text: "<b>bold</b> | *x* `y`"}
stages:
  first: {uses: write, with: {text: "${params.text}"}}
  second: {uses: join, inputs: {first: first}, gates: ["characters > 2"]}
  third: {uses: join, inputs: {first: second, second: first}}
"""


UNGATED = RECIPE.replace(', gates: ["characters > 2"]', "")


class Page(HTMLParser):
    """What a page is made of: its elements, its attributes, and its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == [], "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def page_of(workshop, *runs: str) -> Page:
    return Page(report_runs(runs or ("last",), store=workshop.folder / "store"))


def test_a_page_needs_nothing_and_runs_nothing(workshop):
    workshop.run(RECIPE)
    page = page_of(workshop)
    assert not {"script", "link", "img", "iframe", "b"} & set(page.elements)
    addresses = [value for _, value in page.attributes if "://" in value and "www.w3.org" not in value]
    assert addresses == []
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert any("<b>bold</b>" in text for text in page.words)


def test_it_says_what_the_run_did(workshop):
    workshop.run(RECIPE)
    text = " ".join(page_of(workshop).words)
    for told in (
        "told",
        "succeeded",
        "first",
        "write",
        "characters > 2",
        "✓ holds",
        "Memory of the nodes",
        "bigpipe-ml",
    ):
        assert told in text
    svg = graph(
        [Drawn("a", "k", "cached", "✓"), Drawn("b", "k", "failed", "✗", ["a"]), Drawn("c", "k", "x", "", ["a", "b"])]
    )
    assert svg.count('class="edge"') == 3
    assert svg.count("<rect") == 3


def test_columns_of_a_graph_in_any_order():
    """A line that passes a column goes around the nodes in it."""
    svg = graph([Drawn("c", after=["a", "b"]), Drawn("b", after=["a"]), Drawn("a")])
    boxes = {name: svg.split(f"<title>{name}: ")[1].split(' x="')[1].split('"')[0] for name in "abc"}
    assert int(boxes["a"]) < int(boxes["b"]) < int(boxes["c"])
    longest = max(svg.split('<path class="edge" d="')[1:], key=lambda path: path.split('"')[0].count("C"))
    assert longest.split('"')[0].count("C") == 2


def test_a_run_that_failed_says_why(workshop):
    assert workshop.run(RECIPE.replace("> 2", "> 2000")).status == "failed"
    page = page_of(workshop)
    assert ("class", "error") in page.attributes
    text = " ".join(page.words)
    assert "✗ fails" in text
    assert "– skipped" in text


SAY = """
import json
from bigpipe.orchestrator.stage import Forecast, Metrics, Params, Stage, StageResult

class SayParams(Params):
    word: str

def run(params, context):
    (context.out / "results.jsonl").write_text(json.dumps({"prompt": "hello", "text": params.word}) + "\\n")
    return StageResult(Metrics())

SAY = Stage(kind="say", version=1, params=SayParams, metrics=Metrics, inputs={}, output="results", run=run,
            forecast=lambda params, context: Forecast())
"""
VARIANTS = """\
version: 1
name: two
trust: {modules: [say]}
stages:
  say: {uses: "say:SAY", matrix: {word: [one, two]}, with: {word: "${matrix.word}"}}
"""


def test_results_of_variants_stand_side_by_side(workshop):
    (workshop.folder / "say.py").write_text(SAY)
    workshop.run(VARIANTS, check=True)
    markdown = report_runs(store=workshop.folder / "store", form="markdown")
    assert "| prompt | say@word=one | say@word=two |" in markdown
    assert "| hello | one | two |" in markdown


SIZED = """
from bigpipe.orchestrator.stage import Forecast, Metrics, Params, Stage, StageResult

class Parts(Metrics):
    weights: int
    kv_cache: int
    activations: int
    runtime: int
    share: float

class Sized(Metrics):
    small: Parts
    large: Parts
    peak: dict[str, int]

def run(params, context):
    (context.out / "file").write_bytes(b"x" * 2500)
    small, large = Parts(weights=10**6, kv_cache=0, activations=10**6, runtime=10**6, share=1/3), {"share": 2/3}
    return StageResult(Sized(small=small, large=small.model_copy(update=large), peak={"ram": 1, "gpu": 2}))

SIZED = Stage(kind="sized", version=1, params=Params, metrics=Sized, inputs={}, output="report", run=run,
              forecast=lambda params, context: Forecast(write_bytes=2000))
"""


@pytest.fixture
def sized(workshop):
    (workshop.folder / "sized.py").write_text(SIZED)
    workshop.run('version: 1\nname: s\ntrust: {modules: [sized]}\nstages:\n  a: {uses: "sized:SIZED"}\n', check=True)
    return workshop


def drawings(workshop) -> dict[str, str]:
    """What is drawn, by what it shows."""
    text = report_runs(store=workshop.folder / "store")
    return {title: body for title, body in re.findall(r'<svg[^>]* aria-label="([^"]+)"[^>]*>(.*?)</svg>', text)}


def test_disk_is_drawn_as_it_was_predicted_and_as_it_was_taken(sized):
    assert "| a | 2.0 kB | 2.5 kB |" in report_runs(store=sized.folder / "store", form="markdown")
    bars = drawings(sized)["Disk of the nodes: predicted above, measured below"]
    widths = [float(width) for width in re.findall(r'width="([0-9.]+)"', bars)]
    assert widths[0] / widths[1] == pytest.approx(2000 / 2500, rel=0.01)
    assert re.findall(r'class="(\w+)"', bars) == ["name", "predicted", "measured"]


def test_parts_of_a_budget_are_one_bar_and_its_table(sized):
    markdown = report_runs(store=sized.folder / "store", form="markdown")
    assert "|  | weights | kv cache | activations | runtime | share |" in markdown
    assert "| large | 976.6 KiB | 0 | 976.6 KiB | 976.6 KiB | 0.6667 |" in markdown
    assert "| peak |" not in markdown, "it has no column in common with them"
    (title,) = [title for title in drawings(sized) if title.startswith("What a found")]
    bars = re.findall(r'class="(\w+)" x="([0-9.]+)" y="([0-9.]+)" width="([0-9.]+)"', drawings(sized)[title])
    assert [bar[0] for bar in bars] == ["weights", "activations", "runtime"] * 2
    for one, other in pairwise(bars[:3]):
        assert float(other[1]) == pytest.approx(float(one[1]) + float(one[3]), abs=0.2)
        assert one[2] == other[2], "in one line"
    assert "KV cache" in " ".join(page_of(sized).words)


def test_two_runs_are_drawn_beside_each_other(workshop):
    one = workshop.run(RECIPE)
    two = workshop.run(RECIPE.replace("> 2", "> 2000").replace("<b>bold</b> | *x* `y`", "longer, much longer text"))
    told = report_runs([one.run, two.run], store=workshop.folder / "store", form="markdown")
    before, after = (run.ran()["second"].metrics["characters"] for run in (one, two))
    assert f"| second | characters \\> 2 | ✓ {before} |  |" in told
    assert f"| second | characters \\> 2000 |  | ✗ {after} |" in told
    assert f"### Peak RAM by node\n\n| node | {one.run} | {two.run} |" in told
    assert "### Time by node" in told
    assert "sha256:" not in re.sub("sha256:[0-9a-f]{12}…", "", told.partition("## told")[0])


def test_runs_are_compared(workshop):
    one = workshop.run(RECIPE)
    two = workshop.run(RECIPE.replace("<b>bold</b> | *x* `y`", "longer text"))
    text = " ".join(page_of(workshop, one.run, two.run).words)
    assert "2 runs" in text
    assert f"From {one.run} to {two.run}" in text
    assert "metrics.characters" in text


def test_markdown_keeps_texts_of_others_in_their_cells(workshop):
    workshop.run(RECIPE)
    markdown = report_runs(store=workshop.folder / "store", form="markdown")
    assert r"| text | \<b\>bold\</b\> \| \*x\* \`y\` |" in markdown
    assert "    n0 --> n1" in markdown


def test_times_are_those_of_the_events(workshop):
    done = workshop.run(RECIPE)
    times = records.node_times(workshop.folder / "store" / "runs", done.run)
    assert list(times) == ["first", "second", "third"]
    assert all(0 <= start <= end <= done.seconds + 1 for start, end in times.values())
    assert times["second"][0] >= times["first"][0]


def test_fifty_nodes_are_less_than_200_kilobytes(workshop):
    numbers = list(range(49))
    workshop.run(
        f"version: 1\nname: many\nstages:\n  a: {{uses: write}}\n"
        f"  b: {{uses: join, matrix: {{n: {numbers}}}, inputs: {{first: a}}, needs: [], env: {{N: '${{matrix.n}}'}}}}\n"
    )
    text = report_runs(store=workshop.folder / "store")
    assert text.count('class="node') == 50
    assert len(text.encode()) < 200_000


def test_the_command_writes_what_the_ending_says(workshop):
    workshop.run(RECIPE)
    told = workshop.json("report", "-o", "out/run.md")
    assert told["schema"] == "bigpipe.report/1"
    assert (workshop.folder / "out/run.md").read_text().startswith("## told: succeeded")
    assert told["bytes"] == (workshop.folder / "out/run.md").stat().st_size
    assert workshop.command("report").returncode == 0
    assert (workshop.folder / "report.html").read_text().startswith("<!doctype html>")
    assert workshop.command("report", "nosuch").returncode == 2
    for other in ("recipe.yaml", "/dev/full", "folder.html"):
        (workshop.folder / "folder.html").mkdir(exist_ok=True)
        done = workshop.command("report", "-o", other)
        assert done.returncode == 2
        named = "another file with -o" if other == "folder.html" else "one with -o that ends in .html or .md"
        assert f"name {named}" in done.stderr
    assert workshop.manifest.read_text() == RECIPE


def test_a_form_that_is_none_is_refused(workshop):
    with pytest.raises(UsageError, match="'pdf' is no form"):
        report_runs(form="pdf", store=workshop.folder / "store")


@pytest.mark.parametrize("form", ["html", "markdown"])
def test_a_secret_is_in_no_page(workshop, form):
    """Not even where the record of a run that did not know of it holds it."""
    workshop.run(RECIPE.replace("<b>bold</b> | *x* `y`", "canary-of-a-run"))
    assert "canary" in report_runs(store=workshop.folder / "store", form=form)
    redaction.conceal(["canary-of-a-run"])
    assert "canary" not in report_runs(store=workshop.folder / "store", form=form)


def test_results_that_are_no_rows_are_shown_as_they_are(workshop):
    (workshop.folder / "say.py").write_text(
        SAY.replace('json.dumps({"prompt": "hello", "text": params.word})', '"[1] {"')
    )
    done = workshop.run(VARIANTS, check=True)
    assert "[1] {" in results_text(done)
    assert "[1] {" in " ".join(page_of(workshop).words)


def test_a_line_of_events_that_was_torn_costs_itself(workshop):
    done = workshop.run(RECIPE)
    events = workshop.folder / "store" / "runs" / done.run / "events.jsonl"
    events.write_bytes(b'{"time": \xff}\n' + events.read_bytes())
    assert len(records.node_times(workshop.folder / "store" / "runs", done.run)) == 3


def test_a_graph_is_drawn_before_anything_ran(workshop):
    workshop.manifest.write_text(RECIPE)
    svg = workshop.command("graph", "recipe.yaml", "--format", "svg").stdout
    root = ElementTree.fromstring(svg)  # noqa: S314  our own
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")} == {
        "first",
        "second",
        "third",
        "write",
        "join",
    }
    assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) == 3


@pytest.mark.parametrize(("columns", "wide"), [(6, False), (7, True)])
def test_a_drawing_shrinks_to_its_page_as_long_as_it_can_be_read(columns, wide):
    nodes = [Drawn(f"n{number}", after=[f"n{number - 1}"] if number else []) for number in range(columns)]
    assert ('class="wide"' in graph(nodes).partition(">")[0]) == wide


def test_names_stay_in_their_boxes_and_are_whole_in_their_titles():
    name, under = "generate@scheme=int8,length=2048", "distributed-infer, the first scheme"
    svg = graph([Drawn(name, under, "succeeded", "✓")])
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert texts == ["✓ generate@scheme=int…", "distributed-infer, the f…"]
    assert f"<title>{name}: succeeded</title>" in svg


@pytest.mark.parametrize("bound", ["> 2", "> 2000"])
def test_what_came_of_a_node_is_said_in_the_same_words_everywhere(workshop, bound):
    """At the end of a run, looking back, in a notebook, on the page of a run and in reports of it."""
    done = workshop.run(RECIPE.replace("> 2", bound))
    store = workshop.folder / "store"
    told = {name: sentence(node) for name, node in done.ran().items()}
    assert all(told.values())
    html = unescape(done._repr_html_()), unescape(bigpipe.runs(store=store)[-1]._repr_html_())
    texts = [results_text(done), workshop.command("show").stdout, *html]
    texts += [str(run_now(done.run, store)["rows"])]
    texts += [" ".join(page_of(workshop).words)]
    for text in texts:
        for name, words in told.items():
            assert words in text, (name, text)


def test_gates_say_what_was_measured_beside_what_was_asked(workshop):
    count = str(workshop.run(RECIPE.replace("> 2", "> 2000")).ran()["second"].metrics["characters"])
    rows = [line.split() for line in workshop.command("show").stdout.splitlines() if "> 2000" in line]
    assert ["second", "characters", ">", "2000", count, "✗", "fails"] in rows
    assert f"| second | characters \\> 2000 | {count} | ✗ fails |" in report_runs(
        store=workshop.folder / "store", form="markdown"
    )
    assert "measured" not in workshop.command("show", workshop.run(UNGATED).run).stdout


def test_a_graph_as_a_page_is_one_file_that_runs_nothing(workshop):
    workshop.run(RECIPE)
    page = Page(workshop.command("graph", "recipe.yaml", "--format", "html", "--run", "last").stdout)
    assert not {"script", "link", "img", "iframe", "b"} & set(page.elements)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert [tag for tag in sorted(set(page.elements)) if tag in ("svg", "table")] == ["svg", "table"]
    text = " ".join(page.words)
    for told in ("recipe.yaml, 3 nodes", "first: second; second: first", "✓ succeeded", "prefers-color-scheme: dark"):
        assert told in text, told


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        ("g.html", "<!doctype html>"),
        ("g.svg", "<svg "),
        ("g.dot", "digraph recipe {"),
        ("g.mmd", "graph TD"),
        ("g.txt", "first   write"),
        ("sub/g.gv", "digraph recipe {"),
    ],
)
def test_a_graph_is_drawn_as_the_name_of_its_file_ends(workshop, name, begins):
    workshop.manifest.write_text(RECIPE)
    told = workshop.json("graph", "recipe.yaml", "-o", name)
    assert (workshop.folder / name).read_text().startswith(begins)
    assert told["path"] == str(workshop.folder / name)
    assert workshop.json("graph", "recipe.yaml")["path"] is None


def test_a_graph_is_drawn_as_its_form_says_whatever_the_name(workshop):
    workshop.manifest.write_text(RECIPE)
    done = workshop.command("graph", "recipe.yaml", "--format", "svg", "-o", "picture")
    assert done.stdout.startswith("picture: ")
    assert (workshop.folder / "picture").read_text().startswith("<svg ")
    for odd in ("other.yaml", "folder.svg"):
        (workshop.folder / "folder.svg").mkdir(exist_ok=True)
        refused = workshop.command("graph", "recipe.yaml", "-o", odd)
        assert refused.returncode == 2
        endings = "one with -o that ends in .txt, .mmd, .mermaid, .dot, .gv, .svg or .html"
        assert f"name {'another file with -o' if odd == 'folder.svg' else endings}" in refused.stderr
    onto = workshop.command("graph", "recipe.yaml", "--format", "svg", "-o", "folder.svg")
    assert onto.returncode == 2
    assert "folder.svg is a directory\n  name another file with -o\n" in onto.stderr
    assert workshop.manifest.read_text() == RECIPE


def test_a_form_that_the_name_of_the_file_contradicts_is_refused(workshop):
    workshop.manifest.write_text(RECIPE)
    refused = workshop.command("graph", "recipe.yaml", "--format", "svg", "-o", "g.html")
    assert refused.returncode == 2
    assert "g.html ends as html does, and --format is svg\n" in refused.stderr
    assert "leave --format out, or name a file with -o that ends in .svg\n" in refused.stderr
    assert not (workshop.folder / "g.html").exists()
    assert workshop.command("graph", "recipe.yaml", "--format", "dot", "-o", "g.gv").returncode == 0


def test_a_drawing_that_stands_alone_brings_its_colours(workshop):
    workshop.manifest.write_text(RECIPE)
    root = ElementTree.fromstring(workshop.command("graph", "recipe.yaml", "--format", "svg").stdout)  # noqa: S314
    (style,) = root.iter("{http://www.w3.org/2000/svg}style")
    assert "svg .edge { fill: none;" in (style.text or "")
    assert "<style>" not in graph([Drawn("a")])
