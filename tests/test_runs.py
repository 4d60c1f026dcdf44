"Runs under faults: kills, crashes, two processes at once, other parameters, strange names."
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from carot import commands
from carot.runs import execute
from carot.runs import jobs
from carot.runs import records
from carot.runs import settings
from carot.core import UserError

METRICS = "set\tid\tn\tmetric\tvalue\nTest\tTrue\t10\taccuracy\t0.8\nTest\tTrue\t10\tece\t0.1\nDark\tFalse\t10\taccuracy\t0.5\nDark\tFalse\t10\tece\t0.2\n"
RUN = """\
import os, pathlib, signal, sys, time
from carot.core import UserError
from carot.runs.records import open_run
from carot.runs.settings import resolve
given = {k: globals()[k] for k in NAMES}
if batch_size == 2: raise UserError("batch_size 2 is for nobody; take 3")
run = open_run(*resolve(given), steps=3)
print(pathlib.Path.cwd()/"data", sys.prefix, file=sys.stderr)
if batch_size == 3: os.kill(os.getpid(), signal.SIGKILL)
if batch_size == 4 and method == "lp": raise IndexError("beyond\\nthe end")
(run.path/"pid").write_text(str(os.getpid()))
while (run.path.parent.parent.parent/"hold").exists(): time.sleep(0.1)
if not run.complete:
    (run.path/"metrics.tsv").write_text(METRICS)
    run.finish(seconds={"total": 1.0})"""


def write_notebook(path, *cells):
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells], metadata={"kernelspec": kernel})
    notebook.cells[0].metadata["tags"] = ["parameters"]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


KINDS = {k: "str" if v is None else type(v).__name__ for k, v in settings.PAPER.items()}
PARAMETERS_OF_ALL = "\n".join(f"{name}: {kind} = None  # what {name} is" for name, kind in KINDS.items())

def standin(path):
    "A run notebook with all parameters, which trains nothing and fails in many ways."
    return write_notebook(path, PARAMETERS_OF_ALL, RUN.replace("NAMES", repr(list(KINDS))).replace("METRICS", repr(METRICS)))


def standin_report(path):
    return write_notebook(path, 'benchmark: str = "glyphs"  # which\nout: str = "expt_logs"  # where\nselect: str = ""  # some',
                          'from pathlib import Path\nfolder = Path(out, benchmark, "report")\nfolder.mkdir(exist_ok=True)\n(folder/"table2.md").write_text(f"| table of {select} |")')


@pytest.fixture
def notebook(tmp_path):
    return standin(tmp_path/"odd {name}"/"run.ipynb")


def tree(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def alive(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait(condition, seconds):
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline: time.sleep(0.05)
    return found


def python(code, *arguments, **keywords):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **keywords)


# names

TEXTS = ["a", "A", "a/b", "c/b", "a b", "a_b", "a,b", "a=b", "a,seed=1", "a,lr=1", ".", "..", "../..", "None", "nan", "é", "è", "é/a",
         "x" * 60, "x" * 61, "x" * 300, "x" * 299 + "y", "a\nb", "a\tb", "-a", "b-0123abcd", "C:\\data", "~/data", "a|b", "b/", "b\\", "1", "1.0"]
TEXTS += [settings.spell(text) for text in TEXTS if settings.spell(text) != text]  # what a spelled one looks like
NUMBERS = [0.1, 0.1 + 1e-17, 0.1 + 1e-16, 0.1 + 2e-16, 1 / 3, 0.333333, 1e-5, 1.0000001e-5, 1.0, 1e22, 123456.0, 1234567.0, 1234567.5, 5e-324]


def test_different_settings_have_different_names(tmp_path):
    settings = [{}] + [{"pretrained": text} for text in TEXTS] + [{"model": text} for text in TEXTS] + [{"lr": lr} for lr in NUMBERS]
    settings += [{"seed": 2}, {"epochs": 3}, {"epochs": 31}, {"eval_sets": "a"}, {"warmup_steps": 0}, {"workers": 0, "seed": 3}]
    settings += [{"model": a, "pretrained": b} for a, b in itertools.product(TEXTS[:14], repeat=2)]
    settings += [{"model": "m" * 59, "pretrained": "p" * 59, "eval_sets": "e" * 59, "precision": "fp32", "epochs": n} for n in (1, 2)]
    resolved = [settings.resolve(given) for given in settings]
    unequal = {json.dumps(parameters, sort_keys=True) for parameters, _ in resolved}
    names = {json.dumps(parameters, sort_keys=True): settings.run_name(parameters, defaults) for parameters, defaults in resolved}
    assert len(set(names.values())) == len(unequal) > 200
    for name in names.values():
        assert re.fullmatch(r"[\w.,=+-]+", name, re.ASCII) and len(name) < 240
        (tmp_path/name).mkdir()


def test_a_new_parameter_and_another_order_rename_nothing():
    for given in ({}, {"lr": 1e-3, "seed": 3, "epochs": 2}, {"pretrained": "a b"}):
        parameters, defaults = settings.resolve(given)
        name = settings.run_name(parameters, defaults)
        assert settings.run_name({"added": 3} | dict(reversed(parameters.items())), {"added": 3} | defaults) == name
        assert name.endswith(f"seed={parameters['seed']}")


@pytest.mark.parametrize("given, words", [
    ({"lrr": 1.0}, "did you mean 'lr'"), ({"method": "fit"}, "did you mean 'ft'"), ({"method": 3}, "method takes str, not 3"),
    ({"epochs": "3"}, "epochs takes int, not '3' (epochs: what epochs is)"), ({"epochs": 3.0}, "takes int"), ({"epochs": True}, "takes int"),
    ({"lr": float("nan")}, "takes float, not nan"), ({"lr": float("inf")}, "takes float"), ({"lr": -1.0}, "lr must be at least 0"),
    ({"batch_size": 0}, "at least 1"), ({"label_smoothing": 1.5}, "at most 1"), ({"seed": -1}, "at least 0"),
    ({"device": "cuda:99"}, "unknown device"), ({"precision": "half"}, "unknown precision"), ({"benchmark": "imagnet"}, "unknown benchmark"),
    ({"root": "/no/such/folder"}, "no folder"), ({"root": ""}, "root is empty"), ({"method": "flyp", "teacher_momentum_end": 0.5}, "flyp does not use"),
    ({"out": "odd {name}/run.ipynb"}, "is a file")])
def test_wrong_parameters_are_one_line_and_leave_nothing(notebook, tmp_path, monkeypatch, given, words):
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(UserError) as error: execute.run(notebook, **given)
    assert words in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError) as error: commands.reproduce(notebook=notebook, **given)
    assert words in str(error.value) or "not method or seed" in str(error.value)
    assert tree(tmp_path) == before


def test_unwritable_out(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match="no permission"): settings.resolve({"out": str(tmp_path/"logs")})


def test_reproduce_gives_parameters_to_those_who_use_them(notebook):
    jobs = jobs.plan(list(settings.METHOD_DEFAULTS), 2, {"distillation_coef": 0.5, "epochs": 2})
    assert [str(job).split() for job in jobs if job.parameters["seed"] == 1] == [
        ["zs", "seed=1"], *[[m, "epochs=2,seed=1"] for m in ("lp", "ft", "lp-ft", "flyp")], ["carot", "distillation_coef=0.5,epochs=2,seed=1"]]
    assert len(jobs) == 11
    for bad in ({"seeds": 0}, {"jobs": 0}, {"methods": ["fit"]}):
        with pytest.raises(UserError): commands.reproduce(notebook=notebook, **bad)
    with pytest.raises(UserError, match="none of the methods zs, ft uses distillation_coef"): jobs.plan(["zs", "ft"], 1, {"distillation_coef": 0.5})


def test_defaults_come_from_benchmark_then_method_then_paper(monkeypatch):
    monkeypatch.setattr(runs, "benchmark_defaults", lambda benchmark, method: {"epochs": 2, "pretrained": None})
    parameters, _ = settings.resolve({"method": "ft", "batch_size": None, "weight_decay": 0})
    assert [parameters[k] for k in ("epochs", "pretrained", "lr", "batch_size", "weight_decay")] == [2, None, 3e-5, 512, 0.0]


# directories

def test_other_parameters_are_refused_and_new_ones_are_not(tmp_path):
    parameters, defaults = settings.resolve({"out": tmp_path})
    records.open_run(parameters, defaults).finish()
    path = settings.run_directory(parameters, defaults)
    before = tree(tmp_path)
    with pytest.raises(UserError, match="epochs was .* and is now 77"): records.open_run(parameters | {"epochs": 77}, defaults | {"epochs": 77})
    assert records.open_run(parameters | {"added": 1, "workers": 9}, defaults | {"added": 1}).complete
    assert tree(tmp_path) == before
    (path/"config.json").write_text("{")
    with pytest.raises(UserError, match="damaged"): records.open_run(parameters, defaults)


HOLD = """\
import sys, time
from carot.runs.records import open_run
from carot.runs.settings import resolve
open_run(*resolve({"out": sys.argv[1]}))
print("open", flush=True)
time.sleep(60)"""


def test_one_process_at_a_time_and_no_stale_lock(tmp_path, monkeypatch):
    holder = python(HOLD, tmp_path)
    assert holder.stdout.readline() == "open\n"
    resolved = settings.resolve({"out": tmp_path})
    before = tree(tmp_path)
    monkeypatch.setattr(records.lock, "__defaults__", (0.3,))
    with pytest.raises(UserError, match=f"another process .pid {holder.pid} on .*is working in"): records.open_run(*resolved)
    assert tree(tmp_path) == before
    (settings.run_directory(*resolved)/".config.json.abcd1234").write_text("left by a killed process")
    holder.kill()
    holder.communicate()
    path = records.open_run(*resolved).path
    assert sorted(p.name for p in path.iterdir()) == [".lock", "config.json"]


# execution

REPRODUCE = "import sys; from carot.runs import reproduce; reproduce(['ft'], notebook=sys.argv[1], out=sys.argv[2], batch_size=4)"


def test_kill_goes_on_and_one_failure_stops_nobody_else(notebook, tmp_path, capsys):
    "kill -9 of `reproduce` ends its run and the run's kernel; the next call finishes, the one after that does nothing."
    out = tmp_path/"logs"
    out.mkdir()
    (out/"hold").touch()
    parent = python(REPRODUCE, notebook, out)
    pid = out/"glyphs"/"ft"/"batch_size=4,seed=1"/"pid"
    assert wait(lambda: pid.exists() and pid.read_text(), 60)
    family = psutil.Process(parent.pid).children(recursive=True)
    assert int(pid.read_text()) in [p.pid for p in family] and len(family) == 2
    parent.kill()
    parent.communicate()
    assert wait(lambda: not any(alive(p.pid) for p in family), 2)
    assert not records.read_config(pid.parent)["complete"] and not (pid.parent/"run.ipynb").exists()

    (out/"hold").unlink()
    report = standin_report(tmp_path/"report.ipynb")
    assert commands.reproduce(["lp", "ft"], jobs=2, notebook=notebook, report_notebook=report, out=out, batch_size=4) == 1
    text, errors = capsys.readouterr()
    assert "ft     batch_size=4,seed=1  accuracy: ID 80.0 %, shifts 50.0 %   ECE: ID 0.100, shifts 0.200   1 s\n" in text
    failed = out/"glyphs"/"lp"/"batch_size=4,seed=1"/"run.failed.ipynb"
    assert errors == f"carot: error: lp     batch_size=4,seed=1: IndexError: beyond the end (see {failed})\n"
    assert "| table of batch_size=4 |" in text and "report.ipynb" in text
    for written in (pid.parent/"run.ipynb", failed):
        assert '"papermill"' not in written.read_text() and sys.prefix not in written.read_text() and f"{Path.cwd()}/" not in written.read_text()

    before = tree(pid.parent)
    assert execute.run(notebook, method="ft", out=out, batch_size=4, workers=0) == pid.parent
    assert tree(pid.parent) == before


def test_errors_in_the_kernel(notebook, tmp_path, capsys):
    before = tree(tmp_path)
    assert jobs.run_all(notebook, [jobs.job_for({"out": str(tmp_path/"logs"), "batch_size": 2})], at_once=1) == 2
    assert tuple(capsys.readouterr()) == ("", "carot: error: carot  batch_size=2,seed=1: batch_size 2 is for nobody; take 3\n")
    assert tree(tmp_path) == before
    with pytest.raises(RuntimeError, match="kernel died.*failed.ipynb"): execute.run(notebook, out=tmp_path/"logs", batch_size=3)


# the packaged notebook

def test_the_notebook_has_the_parameters_and_cleaning_keeps_their_tag(tmp_path):
    kinds = {k: str if v is None else type(v) for k, v in settings.PAPER.items()}
    path = execute.notebook_path("fine_tune")
    found = settings.parameters(path)
    assert {k: v["type"] for k, v in found.items()} == kinds and all(v["help"] for v in found.values())
    copy = nbformat.read(path, 4)
    copy.cells[next(i for i, cell in enumerate(copy.cells) if cell.metadata.get("tags"))].metadata["dirt"] = True
    nbformat.write(copy, tmp_path/"fine_tune.ipynb")
    subprocess.run([Path(sys.executable).with_name("nbdev_clean"), "--fname", tmp_path/"fine_tune.ipynb"], cwd=path.parent, check=True)
    clean = nbformat.read(tmp_path/"fine_tune.ipynb", 4)
    assert not any("dirt" in cell.metadata for cell in clean.cells) and settings.parameters(tmp_path/"fine_tune.ipynb") == found


def test_a_record_is_made_again(tmp_path, monkeypatch):
    "Figures without predictions and weights, as a clone has them, are no reason not to run; with one of them left they are."
    monkeypatch.chdir(tmp_path)
    cells = [PARAMETERS_OF_ALL, RUN.replace("NAMES", repr(list(settings.PAPER))).replace("METRICS", repr(METRICS))
             .replace("    run.finish", "    (run.path/'predictions').mkdir(); (run.path/'student').mkdir()\n    run.finish")]
    notebook = write_notebook(tmp_path/"run.ipynb", *cells)
    path = execute.run(notebook, method="ft", out="logs")
    first = json.loads((path/"config.json").read_text())
    assert first["kept"] == ["predictions", "student"]
    made = (path/"run.ipynb").stat().st_mtime_ns
    (path/"predictions").rmdir()
    execute.run(notebook, method="ft", out="logs")
    assert (path/"run.ipynb").stat().st_mtime_ns == made
    (path/"student").rmdir()
    execute.run(notebook, method="ft", out="logs")
    second = json.loads((path/"config.json").read_text())
    assert (path/"run.ipynb").stat().st_mtime_ns > made and (path/"predictions").is_dir() and second["started"] != first["started"]
    assert {k: v for k, v in first.items() if k not in ("started",)} == {k: v for k, v in second.items() if k not in ("started",)}


def test_signals_between_notebooks_do_not_reach_the_next(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    execute.run(notebook, method="ft", out="logs")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before and signal.set_wakeup_fd(-1) == -1
    caught = []
    usual = signal.signal(signal.SIGTERM, lambda *_: caught.append(1))
    try: signal.raise_signal(signal.SIGTERM)
    finally: signal.signal(signal.SIGTERM, usual)
    assert caught and execute.run(notebook, method="lp", out="logs").is_dir()
