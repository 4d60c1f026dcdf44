"Names are text: hostile ones get in nowhere, or go through every format as what they are."
import csv
import io
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from types import SimpleNamespace

import matplotlib.text
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from nbconvert.filters import markdown2html
from PIL import Image

from carot import commands
from carot.analysis import claims, figures, tables
from carot.analysis.tables import in_code, in_latex, in_markdown
from carot.benchmarks.folders import load, look_at_folder
from carot.core import (LONGEST_ERROR, RESERVED, UserError, check_name, check_set_name, load_object, unknown,
                        visible)
from carot.data import Benchmark, EvalSet
from carot.evaluate import Predictions, metrics_table, save_predictions
from carot.runs import records, settings, sweeps
from carot.runs.jobs import job_for

BAD = ["", " ", "a\nb", "a\tb", "a\rb", "a\x00b", "a\x1b[2Jb", "a\x7fb", "a\u2028b", "a\u202eb", "a\udce9b", "n" * 201,
       7, None, b"a"]
BAD_SETS = [*RESERVED, "a/b", "../a", ".a", ".", "..", "霧" * 70]
LIVE = ["<img src=x onerror=alert(1)>", "<script>alert(1)</script>", "</table></body>", "<!-- x", "\" onmouseover=\"x",
        "' x='", "&lt;b&gt;", "&#60;b>", "&amp", "a & b", "javascript:alert(1)", "<http://a.b>", "http://a.b",
        "www.a.b", "a@b.cd", "[a](javascript:x)", "![a](b)", "](b)", "[x][y]", "[^1]", "`code`", "a``b", "**bold**",
        "*it*", "__x__", "_x_ my_set", "_", "~~gone~~", "~x~", "a|b", "a\\|b", "\\", "\\\\", "\\(x\\)", "\\[x\\]",
        "\\begin{x}y\\end{x}", "$x$", "$\\alpha$ and $\\beta$", "$", "\\$x\\$", "$\\href{javascript:x}{y}$", "{{x}}",
        "{0}", "%s", "# h", "- x", "1. x", "{\\bf x}", "100 %", "a_b^c~d#e", "\\input{/etc/passwd}", "[x]", "*x",
        "± – …", "NA", "nan", "None", "001", "1e5", "True", "-1", " lead and trail ", "\"quoted\"", "it's", ";", "a,b",
        "=1+1", "$(touch x)", "`touch x`", "val ", "method", "run", "runs", "set", "value", "id", "mean", "日本語",
        "Ünïcödé", "🙂"]
SETS = [name for name in LIVE if "/" not in name and not name.startswith(".")]


# --- the gate

@pytest.mark.parametrize("name", BAD, ids=repr)
def test_what_is_no_text_is_no_name(name):
    sets = {"Home": EvalSet([], True)}
    for make in (lambda: check_name("thing", name), lambda: check_set_name(name),
                 lambda: Benchmark(name, ["a", "b"], ["{}"], [], [], sets),
                 lambda: Benchmark("toy", ["a", name], ["{}"], [], [], sets),
                 lambda: Benchmark("toy", ["a", "b"], ["{}"], [], [], {**sets, name: EvalSet([], False)})):
        with pytest.raises(UserError, match="rename it") as error: make()
        assert str(error.value).isprintable() and len(str(error.value)) < 250


@pytest.mark.parametrize("name", BAD_SETS, ids=repr)
def test_what_cannot_name_a_set(name):
    with pytest.raises(UserError, match="an evaluation set of toy: the name .*; rename it"):
        Benchmark("toy", ["a", "b"], ["{}"], [], [], {name: EvalSet([], False)})
    if name.strip("./"): Benchmark("toy", [name, "b"], ["{}"], [], [], {})


def test_text_is_a_name():
    Benchmark("toy", LIVE, ["{}"], [], [], {name: EvalSet([], False) for name in SETS})


def write_folder(root, shifts=(), classes=("one", "two")):
    "a folder benchmark of two images a set and class"
    for name in ("train", "val", "test", *shifts):
        for label, of in enumerate(classes):
            (root/name/of).mkdir(parents=True)
            for k in range(2): Image.new("RGB", (8, 8), (90 * label, 60 * k, 0)).save(root/name/of/f"{k}.png")
    return root


@pytest.mark.parametrize("name", [name for name in [*BAD, *BAD_SETS] if type(name) is str and name.strip(" .")
                                  and not set(name) & {"/", "\0"} and len(os.fsencode(name)) < 256
                                  and name not in ("train", "val") and not name.startswith(".")], ids=repr)
def test_the_folder_to_rename_is_named(name, tmp_path):
    write_folder(tmp_path, [name])
    for look in (load, look_at_folder):
        with pytest.raises(UserError) as error: look(tmp_path)
        assert str(error.value).isprintable()
        assert str(error.value).startswith(f"folder {tmp_path}/{visible(name)}: the name {name[:9]!r}"[:-1])


def test_a_class_folder_to_rename_is_named(tmp_path):
    write_folder(tmp_path, classes=("one", "caf\udce9"))
    message = re.escape(f"class folder {tmp_path}/train/caf\\udce9: the name")
    with pytest.raises(UserError, match=message): load(tmp_path)


@pytest.mark.parametrize("message", ["a\nb", "a\x1b[31m", "\udce9", "a\r\nb\u2028c\u0085d", "\x00"])
def test_an_error_is_one_line_of_what_can_be_shown(message):
    text = str(UserError(f"{message}; do this"))
    assert text.isprintable() and text.encode() and len(text.splitlines()) == 1 and text.endswith("; do this")
    assert str(UserError(text)) == text


def test_an_error_is_short_and_keeps_what_is_to_be_done():
    text = str(UserError(f"first {'x' * 9999}; do this"))
    assert len(text) == LONGEST_ERROR and text.startswith("first x") and text.endswith("x; do this") and " … " in text
    assert str(UserError(text)) == text
    text = str(unknown("thing", "n" * 9999, [f"name_{k}" for k in range(999)]))
    assert len(text) < LONGEST_ERROR and "known: name_0, name_1" in text and text.endswith(" …")


def test_a_module_that_ends_is_an_error(tmp_path, monkeypatch):
    (tmp_path/"ends_at_import.py").write_text("import sys; sys.exit(7)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="cannot take 'X' from 'ends_at_import': SystemExit: 7"):
        load_object("ends_at_import:X", str)


# --- every format

class Page(HTMLParser):
    "The elements of a page with their attributes, and its text."
    def __init__(self, page):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs): self.elements.append((tag, dict(attrs)))

    def handle_data(self, data): self.text += data

    def handle_comment(self, data): self.elements.append(("comment", {"": data}))

    handle_pi = unknown_decl = handle_comment


def only(page, allowed):
    "that a page has no element and no attribute but these"
    for tag, attributes in page.elements:
        assert tag in allowed and set(attributes) <= set(allowed[tag]), (tag, attributes)


CELLS = {**dict.fromkeys(("table", "thead", "tbody", "tr", "span", "p", "code"), ()), "th": ("style",),
         "td": ("style",)}
LISTS = {**dict.fromkeys(("strong", "em", "ul", "li"), ()), **dict.fromkeys(("h1", "h2", "h3"), ("id",)),
         "a": ("href", "class")}


@pytest.mark.parametrize("name", LIVE, ids=repr)
def test_in_markdown(name):
    for text, shown in [(in_markdown(name), name), (in_code(name), name), (f"{in_markdown(name)} {in_markdown(name)}",
                                                                           f"{name} {name}")]:
        page = Page(markdown2html(f"It is {text} here."))
        only(page, CELLS)
        assert page.text.strip() == f"It is {shown} here." or (text[0] == "`" and page.text.split() == ["It", "is",
                                                               *shown.split(), "here."])


@pytest.mark.parametrize("name", LIVE, ids=repr)
def test_in_a_table_of_markdown(name):
    frame = pd.DataFrame([[name, f"{name} is", "**7.5** ± 1"]], columns=["method", name, "x"])
    page = Page(markdown2html(tables.markdown(frame)))
    only(page, CELLS | {"strong": ()})
    found = [line.strip() for line in page.text.splitlines() if line.strip()]
    assert found == [part.strip() for part in ("method", name, "x", name, f"{name} is", "7.5 ± 1")]
    assert len([tag for tag, _ in page.elements if tag == "strong"]) == 1


@pytest.mark.parametrize("name", LIVE, ids=repr)
def test_in_latex(name):
    ours = r"\$\\pm\$|\\text(backslash|asciicircum|asciitilde|less|greater|bar)\{\}|\\[%&#_${}]|\{[\[*]\}"
    rest = re.sub(ours, "", in_latex(name))
    assert not re.search(r"[\\{}%&#_$^~|<>]", rest) and not re.match(r"[\[*]", in_latex(name))
    back = in_latex(name)
    for there, here in [(r"$\pm$", "±"), (r"\textbackslash{}", "\0"), *((v, k) for k, v in tables.LATEX.items())]:
        back = back.replace(there, here)
    assert re.sub(r"^\{([\[*])\}", r"\1", back).replace("\0", "\\").replace("--", "–") == name.replace("--", "–")


@pytest.mark.parametrize("name", LIVE, ids=repr)
def test_in_figures(name):
    drawn = figures.in_figure(name)
    assert matplotlib.text.Text()._preprocess_math(drawn) == (" " * name.startswith("_") + name, False)


@pytest.mark.parametrize("escape", [in_markdown, in_code, in_latex, figures.in_figure])
@pytest.mark.parametrize("name", [name for name in BAD if type(name) is str], ids=repr)
def test_what_slipped_past_the_gate_is_one_line_of_text(escape, name):
    "A directory of results may be called anything."
    assert escape(name).isprintable()


# --- results with such sets

def make_run(out, method, names, seed=1):
    "a run with predictions on sets of these names"
    run = settings.resolve({"benchmark": "plain_glyphs", "method": method, "seed": seed, "out": str(out)})
    path, rng = run.directory, np.random.default_rng([seed, len(method)])
    path.mkdir(parents=True)
    found = {}
    for k, name in enumerate([*names, "val"]):
        labels = np.arange(40) % 4
        logits = rng.normal(size=(40, 4)) + np.eye(4)[labels]
        id = k == 0 or name == "val"
        found[name] = Predictions(torch.tensor(logits, dtype=torch.float32), torch.tensor(labels), id)
        save_predictions(path/"predictions"/f"{name}.safetensors", found[name])
    metrics_table(found, 20).to_csv(path/"metrics.tsv", sep="\t", index=False)
    facts = {"parameters": asdict(run.settings), "asked": {}, "complete": True, "seconds": {"total": 1.0}, "steps": 0,
             "hardware": "<b>a|b</b> $x$", "versions": {"torch": "<i>2</i>"}}
    (path/"config.json").write_text(json.dumps(facts))
    return path


@pytest.fixture(scope="module", name="hostile")
def hostile_results(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    for method in ("zs", "ft", "carot"): make_run(out, method, SETS)
    runs = records.find_runs(out, "plain_glyphs")
    return SimpleNamespace(out=out, runs=runs, results=tables.results_of(runs))


def test_no_set_is_lost_or_overwritten(hostile):
    means = tables.table(hostile.results, "accuracy")["mean"]
    assert list(means) == [*SETS, tables.AVERAGE] and means.loc["ft"].notna().all()
    assert means.loc["ft", tables.AVERAGE] == pytest.approx(means.loc["ft", SETS[1:]].mean())
    assert list(tables.table_runs(hostile.results, "ece").loc["ft"].unique()) == ["ft/seed=1"]


def test_the_tables_of_a_report(hostile, tmp_path):
    text = tables.write_table(tmp_path/"table", hostile.runs, hostile.results, "accuracy", title="<b>T</b> & $x$ _y_")
    page = Page(markdown2html(text))
    only(page, CELLS | {"strong": ()})
    assert "<b>T</b> & $x$ _y_" in page.text
    head = [f"{name} (ID)" if k == 0 else name for k, name in enumerate(SETS)]
    lines = [line.strip() for line in page.text.splitlines() if line.strip()]
    assert [name.strip() for name in ("method", "runs", *head)] == lines[1:len(head) + 3]
    html = Page(tables.html_page(hostile.results, "accuracy", "<b>x</b>"))
    only(html, CELLS | {"div": ("class",), "table": ("border", "class"), "span": ("title",), "tr": ("style",), "b": ()})
    assert {about["title"] for tag, about in html.elements if tag == "span"} == {"not run", *(
        run.name for run in hostile.runs)}
    assert all(name in html.text for name in head) and "<b>x</b>" in html.text
    latex = (tmp_path/"table.tex").read_text()
    line = next(line for line in latex.splitlines() if line.startswith("method & "))
    assert line == " & ".join(["method", "runs", *map(in_latex, head), in_latex(tables.AVERAGE)]) + r" \\"


@pytest.mark.parametrize("name", ["table.tsv", "table_runs.tsv"])
def test_tables_in_tsv_have_all_names(hostile, tmp_path, name):
    tables.write_table(tmp_path/"table", hostile.runs, hostile.results, "accuracy")
    with open(tmp_path/name, newline="", encoding="utf-8") as file: head, *rows = list(csv.reader(file, delimiter="\t"))
    assert head[1:len(SETS) + 1] == SETS and {len(row) for row in rows} == {len(head)}


def test_figures_show_names_as_they_are(hostile):
    some = [*SETS[:1], "$x$", "_x_ my_set", "$\\alpha$ and $\\beta$", "val"]
    results = hostile.results[hostile.results.set.isin(some)]
    drawn = [figures.result_picture(results), figures.scatter_picture(results), figures.per_set_picture(results),
             figures.reliability_grid(hostile.runs, results)]
    shown = set()
    for figure in drawn:
        if figure is None: continue
        assert figures.svg(figure)
        for text in figure.findobj(matplotlib.text.Text):
            plain, formula = text._preprocess_math(text.get_text())
            if name := next((name for name in ("x$", "alpha", "my_set") if name in plain), None):
                assert not formula, plain
                shown.add(name)
    assert shown == {"x$", "alpha", "my_set"}


# --- tables that are read back

def read_back(text, **kind): return pd.read_csv(io.StringIO(text), sep="\t", keep_default_na=False, dtype=str, **kind)


def test_metrics_are_read_as_they_were_written(hostile, tmp_path):
    run = hostile.runs[0]
    found = sweeps.metric_rows(run.path)
    assert list(found.set.unique()) == [*SETS, "val"] and list(tables.read_metrics(run).set.unique()) == [*SETS, "val"]
    with open(run.path/"metrics.tsv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [(row["set"], float(row["value"])) for row in rows] == list(zip(found.set, found.value))
    assert run.state == "complete"


def test_a_sweep_s_tables_are_read_as_they_were_written(hostile, tmp_path):
    job = SimpleNamespace(path=hostile.runs[0].path, parameters=hostile.runs[0].parameters | {"eval_sets": "NA"},
                          error="first\nsecond\t\"third\" \udce9", method=hostile.runs[0].method)
    table = sweeps.sweep_table([run.path for run in hostile.runs])
    assert list(read_back(table.to_csv(sep="\t", index=False)).set) == list(table.set)
    failures = sweeps.failures_table([job], tmp_path)
    again = read_back(failures.to_csv(sep="\t", index=False))
    assert again.error[0] == failures.error[0] == visible(job.error) and again.eval_sets[0] == "NA"


def test_claims_are_read_as_they_were_written(hostile, tmp_path):
    evidence = claims.Evidence(10)
    table = claims.claims_table(hostile.out, "plain_glyphs", evidence=evidence)
    table["claim"] = [LIVE[k % len(LIVE)] for k in range(len(table))]
    table["test"] = [f"x, {LIVE[-k % len(LIVE)]}" for k in range(len(table))]
    text = claims.write_claims(tmp_path, table, "<b>x</b>")
    again = read_back((tmp_path/"claims.tsv").read_text())
    assert list(again.claim) == list(table.claim) and list(again.test) == list(table.test)
    only(Page(markdown2html(text)), CELLS | LISTS)
    figure = claims.forest_picture(table.assign(metric="ece"))
    assert all(not text._preprocess_math(text.get_text())[1] for ax in figure.axes for text in ax.get_yticklabels())


# --- commands

WORDS = ["plain", "with space", "it's", "\"double\"", "$(touch x)", "`touch x`", "a;b", "a|b", "a&b", "#c", "*", "~",
         "50%d", "é", "!x", "a\\b"]

@pytest.mark.parametrize("word", WORDS, ids=repr)
def test_a_script_for_slurm_says_what_it_was_told(word, tmp_path, monkeypatch):
    place = tmp_path/word
    place.mkdir()
    monkeypatch.chdir(place)
    python = place/"python"
    python.write_text("#!/bin/sh\nfor word; do printf '%s\\0' \"$word\"; done\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    run = settings.resolve({"method": "zs", "out": str(place/"out")})
    job = job_for({"method": "zs", "out": str(place/"out"), "root": str(place)})
    def script(): return sweeps.slurm_script(place/"a b.ipynb", [job], place/"out"/"sweeps"/"x-12345678", timeout=5)
    if "\\" in word:
        with pytest.raises(UserError, match="Slurm takes the backslash"): script()
        return
    lines = script().splitlines()
    asked = [shlex.split(line.removeprefix("#SBATCH ")) for line in lines if line.startswith("#SBATCH")]
    assert all(len(words) == 1 for words in asked) and len(asked) == 4 + bool(job.parameters["threads"])
    output = next(words[0] for words in asked if words[0].startswith("--output="))
    assert output.replace("%%", "%") == f"--output={place}/out/sweeps/x-12345678/logs/slurm-%A_%a.log"
    (place/"script.sh").write_text(script())
    subprocess.run(["bash", "-n", place/"script.sh"], check=True)
    done = subprocess.run(["bash", place/"script.sh"], env={"SLURM_ARRAY_TASK_ID": "0", "PATH": os.environ["PATH"]},
                          capture_output=True, check=True, cwd="/")
    words = done.stdout.decode().split("\0")
    assert words[:3] == ["-m", "carot", "run"] and f"{place}/a b.ipynb" in words
    assert words[words.index("--root") + 1] == str(place) if "--root" in words else f"--root={place}" in words
    assert run.directory.parent.parent.parent == place/"out" and not (place/"x").exists()


@pytest.mark.parametrize("word", ["a\nb", "a\n#SBATCH --wrap=x", "a\x1bb", "a\udce9b"], ids=repr)
def test_a_line_break_gets_into_no_script(word, tmp_path):
    for make in (lambda: sweeps.in_script([word]), lambda: sweeps.log_pattern(tmp_path/word)):
        with pytest.raises(UserError, match="cannot stand in a script for Slurm"): make()


@pytest.mark.parametrize("word", WORDS, ids=repr)
def test_a_command_of_the_claims_is_one_for_the_shell(word, tmp_path):
    made = claims.command(claims.FT, f"out/{word}", f"./{word}")
    words = shlex.split(made)
    assert words[:2] == ["carot", "run"] and words[words.index("--out") + 1] == f"out/{word}"
    assert words[words.index("--benchmark") + 1] == f"./{word}"


# --- from a folder to a page

HARMLESS = {"charset", "lang", "class", "id", "href", "src", "alt", "title", "style", "border", "tabindex", "role",
              "data-mime-type", "itemprop"}

def is_live(tag, about):
    "whether an element is none of those that the page of a notebook has"
    outside = tag == "img" and not about["src"].startswith("data:image/png") or (
        tag == "a" and not about.get("href", "#").startswith("#"))
    viewport = tag == "meta" and about.get("name") == "viewport" and set(about) == {"name", "content"}
    return outside or tag in ("script", "u", "iframe", "comment", "object", "svg") or not (
        viewport or set(about) <= HARMLESS)


@pytest.mark.slow(60)
def test_from_a_folder_to_a_page(tmp_path, monkeypatch, warm):
    "A folder benchmark with hostile shifts, through records, to report and claims."
    names = ["<img src=x onerror=alert(1)>", "a|b $x$ _y_", "`code` **b** {t} \\(x\\)"]
    data = write_folder(tmp_path/"<u>my</u> $data$", names)
    monkeypatch.chdir(tmp_path)
    benchmark = load(data)
    assert list(benchmark.eval) == ["test", *sorted(names)]
    for method in ("zs", "ft", "carot"):
        run = settings.resolve({"benchmark": str(data), "method": method, "out": "out", "seed": 1})
        path = make_run(tmp_path/"made", method, benchmark.eval)
        run.directory.parent.mkdir(parents=True)
        os.rename(path, run.directory)
        config = json.loads((run.directory/"config.json").read_text()) | {"parameters": run.parameters}
        (run.directory/"config.json").write_text(json.dumps(config))
    report = commands.make_report(benchmark=str(data), out="out", show=None)
    claimed = commands.make_claims(benchmark=str(data), out="out", samples=10)
    for notebook in (report, claimed):
        before, script, after = notebook.with_suffix(".html").read_text().partition(f"<script>{figures.SORT}</script>")
        page = Page(before + after)
        assert script and not [element for element in page.elements if is_live(*element)]
        assert "<u>my</u> $data$" in page.text
        outputs = [output for cell in nbformat.read(notebook, 4).cells for output in cell.get("outputs", [])]
        shown = [output.data["text/markdown"] for output in outputs if "text/markdown" in output.get("data", {})]
        assert len(shown) > 3
        for text in shown: only(Page(markdown2html(text)), CELLS | LISTS)
    text = Page(report.with_suffix(".html").read_text()).text
    assert all(name in text for name in names)
    tables_tsv = pd.read_csv(report.parent/"table2.tsv", sep="\t", index_col="method")
    assert list(tables_tsv)[:4] == ["test", *sorted(names)]
