"""The command as a user gives it: the whole comparison in small, killed, repeated, from a wheel."""
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import psutil
import pytest
from command import Command, carot
from conftest import forking

from carot.runs.book import book_files

pytestmark = pytest.mark.usefixtures("warm")
ROOT = Path(__file__).resolve().parent.parent
SMALL = "--benchmark few:FEW --epochs 2 --eval-sets Glyphs,GlyphsV2".split()

def folder_with_few(folder):
    "Where the small benchmark is found."
    shutil.copy(ROOT/"tests"/"few.py", folder)
    return folder

@pytest.fixture
def few(tmp_path): return folder_with_few(tmp_path)


def stats(out): return {str(f.relative_to(out).parent): f.read_bytes() for f in sorted(Path(out).rglob("stats.tsv"))}

@pytest.fixture(scope="module")
def finished(tmp_path_factory, server):
    folder = folder_with_few(tmp_path_factory.mktemp("finished"))
    with forking(server): result = carot("reproduce", "--methods", "zs,lp,carot", *SMALL, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout

@pytest.mark.slow(20)
@pytest.mark.xdist_group("finished")
def test_prints_tables_and_files(finished):
    folder, printed = finished
    assert "Avg. shifts" in printed and "report.ipynb" in printed and "carot" in printed
    for line in printed.splitlines():
        if line.startswith(("  expt_logs", "  /")): assert (folder/line.strip()).exists()
    assert not [line for line in printed.splitlines() if str(folder) in line]

@pytest.mark.slow(5)
@pytest.mark.xdist_group("finished")
def test_run_directory_is_complete(finished):
    runs = {p.parent.name: p for p in (finished[0]/"expt_logs"/"few").glob("*/*") if (p/"config.json").exists()}
    assert sorted(runs) == ["carot", "lp", "zs"]
    assert re.fullmatch(r"epochs=2,eval_sets=Glyphs_GlyphsV2-[0-9a-f]{8},seed=1", runs["carot"].name)
    have = {str(f.relative_to(runs["carot"])) for f in runs["carot"].rglob("*") if f.is_file()}
    assert have >= {"run.ipynb", "config.json", "stats.tsv", "train.tsv", "metrics.tsv",
                    "predictions/Glyphs.safetensors", "predictions/val.safetensors", "student/open_clip_config.json",
                    "student/open_clip_model.safetensors", "teacher/open_clip_model.safetensors"}
    assert not [f for f in have if "optimizer" in f or "checkpoint" in f]
    config = json.loads((runs["carot"]/"config.json").read_text())
    assert config["complete"] and config["parameters"]["epochs"] == 2
    assert {"versions", "git", "hardware", "started", "seconds"} <= config.keys()
    header = (runs["carot"]/"stats.tsv").read_text().splitlines()[0].split("\t")
    columns = [f"{s} {m}" for s in ("Glyphs", "GlyphsV2") for m in ("Accuracy", "ECE", "batched ECE")]
    assert header == ["", "epoch", *columns, "Avg ID carot Loss"]

@pytest.mark.slow(5)
@pytest.mark.xdist_group("finished")
def test_again_does_nothing(finished):
    def times():
        return {f: f.stat().st_mtime_ns for f in finished[0].rglob("*") if f.is_file() and "report" not in f.parts}
    before = times()
    assert carot("reproduce", "--methods", "zs,lp,carot", *SMALL, cwd=finished[0]).returncode == 0
    assert before == times()

@pytest.mark.slow(15)
@pytest.mark.xdist_group("finished")
def test_the_report_shows_what_was_asked_for(finished):
    "Other methods and seeds in the folder are neither in the tables nor in the figures."
    import pandas as pd
    assert carot("run", "--method", "lp", "--seed", "2", *SMALL, cwd=finished[0]).returncode == 0
    printed = carot("reproduce", "--methods", "zs,lp", *SMALL, cwd=finished[0]).stdout
    results = pd.read_csv(finished[0]/"expt_logs"/"few"/"report"/"results.tsv", sep="\t")
    assert set(results.method) == {"zs", "lp"} and results[results.method == "lp"].run.nunique() == 1
    assert "| LP        | 1 " in printed and "CaRot" not in printed

@pytest.mark.slow(5)
@pytest.mark.xdist_group("finished")
def test_logits_give_the_logged_metrics(finished):
    import pandas as pd
    from carot.evaluate import load_predictions, metrics_table
    run = next((finished[0]/"expt_logs"/"few"/"carot").iterdir())
    logged = pd.read_csv(run/"metrics.tsv", sep="\t").set_index(["set", "metric"]).value
    again = metrics_table(load_predictions(run), 250).set_index(["set", "metric"]).value
    pd.testing.assert_series_equal(logged.sort_index(), again.sort_index(), rtol=1e-12)

@pytest.mark.xdist_group("finished")
@pytest.mark.slow(30)
def test_killed_at_any_moment_ends_the_same(finished, few):
    "kill -9 of the whole command at growing delays until it gets through; results are those of the uninterrupted one."
    for delay in (0.7, 2, 4, 300):
        given = Command("reproduce", "--methods", "zs,lp,carot", *SMALL, cwd=few)
        try:
            done = given.end(delay)
            break
        except subprocess.TimeoutExpired: given.process.wait()
    assert done.returncode == 0, done.stderr
    expected = {run: text for run, text in stats(finished[0]/"expt_logs"/"few").items() if "seed=1" in run}
    assert stats(few/"expt_logs"/"few") == expected and len(expected) == 3

@pytest.mark.slow(25)
def test_stopped_on_two_processes_and_gone_on(few):
    "A signal ends all processes between two steps, with exit code 75; the same command completes the run."
    words = "reproduce --benchmark few:FEW --methods flyp --epochs 2 --eval-sets Glyphs --processes 2".split()
    process = subprocess.Popen([sys.executable, "-m", "carot", *words], cwd=few, text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run = few/"expt_logs"/"few"/"flyp"/"epochs=2,eval_sets=Glyphs,seed=1"
    def steps(): return (run/"train.tsv").read_text().splitlines()[1:] if (run/"train.tsv").exists() else []
    deadline = time.monotonic() + 120
    while len(steps()) < 4 and time.monotonic() < deadline: time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75 and f"carot: flyp   {run.name}: stopped by SIGTERM" in err, err
    assert len(family) >= 4 and not psutil.wait_procs(family, timeout=20)[1]
    before = len(steps())
    assert 4 <= before < json.loads((run/"config.json").read_text())["steps"] and list((run/"checkpoints").iterdir())
    result = carot(*words, cwd=few)
    assert result.returncode == 0, result.stderr
    config = json.loads((run/"config.json").read_text())
    assert config["complete"] and [int(row.split("\t")[1]) for row in steps()] == list(range(1, config["steps"] + 1))

def test_two_at_once(few):
    words = ["run", "--method", "ft", *SMALL]
    both = [given.end() for given in [Command(*words, cwd=few), Command(*words, cwd=few)]]
    codes = sorted(each.returncode for each in both)
    assert codes in ([0, 2], [0, 0]), both  # the second waits a moment: it may find the run complete
    assert codes == [0, 0] or "another process" in "".join(each.stderr for each in both)
    assert len(stats(few)) == 1

@pytest.mark.slow(25)
def test_from_a_wheel_outside_the_clone(tmp_path):
    build = ["--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT]
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", *build], check=True)
    wheel = next(tmp_path.glob("carot-*.whl"))
    assert wheel.stat().st_size < 5e6
    zipfile.ZipFile(wheel).extractall(tmp_path/"site")
    shipped = {str(f.relative_to(tmp_path/"site"/"carot")) for f in (tmp_path/"site"/"carot").rglob("*")}
    modules = {str(f.relative_to(ROOT/"carot")) for f in ROOT.glob("carot/**/*.py")}
    assert shipped >= modules | {"py.typed", "weights/glyphs/open_clip_model.safetensors"}
    assert shipped >= {f"shipped/{file.relative_to(ROOT)}" for file in book_files()}
    (tmp_path/"elsewhere").mkdir()
    code = "import carot, sys; assert 'site' in carot.__file__; from carot.cli import main; sys.exit(main())"
    for words in ("reproduce --methods zs --eval-sets Glyphs", "notebooks book"):
        result = subprocess.run([sys.executable, "-c", code, *words.split()], cwd=tmp_path/"elsewhere",
                                env=os.environ | {"PYTHONPATH": str(tmp_path/"site")},
                                capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
    assert (tmp_path/"elsewhere"/"expt_logs"/"glyphs"/"report"/"report.ipynb").exists()
    pages = {name: execute_page(name, tmp_path/"elsewhere"/"book", tmp_path/"site") for name in ("index", "results")}
    assert "| CaRot " in pages["index"] and "| claim " in pages["results"]

def execute_page(name, book, site):
    "What the cells of a copied notebook show, read from the installed package; its figures are those in git."
    code = f"""import nbformat, os
from IPython.core.interactiveshell import InteractiveShell as Shell
os.chdir({str(book)!r})
shell = Shell.instance()
for cell in nbformat.read("{name}.ipynb", 4).cells:
    if cell.cell_type == "code":
        done = shell.run_cell(cell.source)
        done.raise_error()
        print(getattr(done.result, "data", ""))"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(site)},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

def test_an_editable_install_works_from_the_parent_folder(tmp_path):
    "There the clone's folder is called like the package, and must not be taken for it."
    clone, site = tmp_path/"carot", tmp_path/"site"
    for folder in ("carot", "nbs/runs", "expt_logs/reported"):
        shutil.copytree(ROOT/folder, clone/folder, ignore=shutil.ignore_patterns("__pycache__", "*.ipynb"))
    for name in ("setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT/name, clone)
    install = ["--no-deps", "--no-build-isolation", "--target", site, "-e", clone]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *install], check=True)
    packages = [path for path in sys.path if path.endswith("site-packages")]
    code = f"""\
import site, sys
site.addsitedir({str(site)!r})
sys.path += {packages!r}  # without the .pth file of the clone that is tested
import carot.clip
print(carot.clip.__file__)"""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == str(clone/"carot"/"clip.py"), done.stderr

IGNORED = ["expt_logs/glyphs/ft/seed=1/stats.tsv", "expt_logs/my/report/report.ipynb", "nbs/runs/expt_logs/glyphs/x",
           "expt_logs/reference/glyphs/ft/seed=1/student/x", "expt_logs/reference/glyphs/ft/seed=2/run.ipynb"]
TRACKED = ["expt_logs/reported/reported.tsv", "expt_logs/reference/glyphs/ft/seed=1/stats.tsv",
           "expt_logs/reference/glyphs/ft/seed=1/run.ipynb", "expt_logs/reference/glyphs/report/report.ipynb"]

@pytest.mark.skipif(not (ROOT/".git").exists(), reason="not a clone")
def test_results_made_in_a_clone_leave_git_status_clean():
    command = ["git", "check-ignore", "-q", "--no-index"]
    def ignored(path): return subprocess.run([*command, path], cwd=ROOT).returncode == 0
    assert all(map(ignored, IGNORED)) and not any(map(ignored, TRACKED))
