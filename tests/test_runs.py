"Runs under faults: kills, crashes, two processes at once, other settings, strange names."
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import psutil
import pytest

from carot import commands
from carot.core import UserError
from carot.methods.base import all_methods
from carot.runs import execute, jobs, records
from carot.runs.seals import sealed
from carot.runs.settings import notebook_parameters, parameters_cell, resolve

METRICS = ("set\tid\tn\tmetric\tvalue\nTest\tTrue\t10\taccuracy\t0.8\nTest\tTrue\t10\tece\t0.1\n"
           "Dark\tFalse\t10\taccuracy\t0.5\nDark\tFalse\t10\tece\t0.2\n"
           "val\tTrue\t10\taccuracy\t0.8\nval\tTrue\t10\tece\t0.1\n")
RUN = """\
import os, pathlib, signal, sys, time
from carot.core import UserError
from carot.runs.records import open_run
from carot.runs.settings import asked_in, resolve
if batch_size == 2: raise UserError("batch_size 2 is for nobody; take 3")
run = open_run(resolve(asked_in(globals())), steps=3)
print(pathlib.Path.cwd()/"data", sys.prefix, file=sys.stderr)
if batch_size == 3: os.kill(os.getpid(), signal.SIGKILL)
if batch_size == 4 and method == "lp": raise IndexError("beyond\\nthe end")
if batch_size == 5 and os.environ.get("RANK") == "1": raise IndexError("only here")
if batch_size == 5: time.sleep(60)
if batch_size == 6: raise IndexError("number " + os.environ["RANK"])
if run.writes: (run.path/"pid").write_text(str(os.getpid()))
while (run.path.parent.parent.parent/"hold").exists(): time.sleep(0.1)
if run.writes:
    (run.path/"metrics.tsv").write_text(METRICS)
    run.finish(seconds={"total": 1.0})""".replace("METRICS", repr(METRICS))
OUT = 'out: str = "expt_logs"'


def write_notebook(path, *cells):
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    cells = [nbformat.v4.new_code_cell(source) for source in cells]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    notebook.cells[0].metadata["tags"] = ["parameters"]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


def standin(path):
    "A run notebook with all parameters, which trains nothing and fails in many ways."
    return write_notebook(path, parameters_cell(), RUN)


def standin_report(path):
    parameters = f'benchmark: str = "glyphs"  # which\n{OUT}  # where\nselect: str = ""  # some'
    return write_notebook(path, parameters, """\
from carot.runs.settings import benchmark_folder
folder = benchmark_folder(out, benchmark)/"report"
folder.mkdir(exist_ok=True)
(folder/"table2.md").write_text(f"| table of {select} |")""")


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


# planning

@pytest.mark.parametrize("given, words", [
    ({"lrr": 1.0}, "did you mean 'lr'"), ({"method": "fit"}, "did you mean 'ft'"),
    ({"lr": -1.0}, "lr must be at least 0"),
    ({"epochs": "3"}, "epochs takes int, not '3' (epochs: passes over the training set)"),
    ({"device": "cuda:99"}, "cuda:99"), ({"root": "/no/such/folder"}, "no folder"),
    ({"out": "odd {name}/run.ipynb"}, "is a file"),
    ({"method": "flyp", "teacher_momentum_end": 0.5}, "flyp does not use")])
def test_wrong_parameters_are_one_line_and_leave_nothing(notebook, tmp_path, monkeypatch, given, words):
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(UserError) as error: execute.make_run(notebook, **given)
    assert words in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError) as error: commands.reproduce(notebook=notebook, **given)
    assert words in str(error.value) or "method" in str(error.value)
    assert tree(tmp_path) == before


def test_a_comparison_gives_settings_to_those_who_use_them(notebook):
    names = ["carot", "zs", "lp", "flyp", "ft", "lp-ft"]
    planned = jobs.plan_runs(names, 2, {"probe_lr": 0.5, "epochs": 2})
    assert [str(job).split() for job in planned if job.parameters["seed"] == 1] == [
        ["zs", "seed=1"], *[[m, "epochs=2,seed=1"] for m in ("lp", "ft")], ["lp-ft", "epochs=2,probe_lr=0.5,seed=1"],
        *[[m, "epochs=2,seed=1"] for m in ("flyp", "carot")]]
    assert len(planned) == 11
    for bad in ({"seeds": 0}, {"jobs": 0}, {"methods": "fit"}):
        with pytest.raises(UserError): commands.reproduce(notebook=notebook, **bad)
    with pytest.raises(UserError, match="none of the methods zs, ft uses probe_lr"):
        jobs.plan_runs(["zs", "ft"], 1, {"probe_lr": 0.5})


def test_what_is_said_where_output_is_no_terminal(capsys, tmp_path):
    job = jobs.job_for({"method": "ft", "out": str(tmp_path)})
    job.began, screen = time.monotonic() - 725, jobs.Screen()
    for _ in range(3): screen.draw([job], [job], 0)
    screen.told[job.path] -= 301
    screen.draw([job], [job], 0)
    screen.clear()
    assert capsys.readouterr().out.splitlines() == ["ft     seed=1  started", "ft     seed=1  12:05"]


# directories

def with_settings(run, **settings):
    "The same run with other settings, as if they were its defaults."
    return replace(run, settings=replace(run.settings, **settings), defaults=replace(run.defaults, **settings))


def test_other_settings_are_refused_and_new_ones_are_not(tmp_path):
    run = resolve({"out": tmp_path})
    records.open_run(run).finish()
    before = tree(tmp_path)
    with pytest.raises(UserError, match="epochs was .* and is now 77"): records.open_run(with_settings(run, epochs=77))
    assert records.open_run(with_settings(run, workers=9, report_to="wandb")).complete
    assert tree(tmp_path) == before
    config = records.read_config(run.directory)
    config["parameters"] = {k: v for k, v in config["parameters"].items() if k != "label_smoothing"} | {"former": 1}
    (run.directory/"config.json").write_text(json.dumps(sealed(config)))
    assert records.open_run(with_settings(run, label_smoothing=0.0)).complete  # the record does not know it
    (run.directory/"config.json").write_text(json.dumps(config | {"seconds": {"total": 1}}))  # edited
    assert records.read_run(run.directory).state == "damaged: config.json is not as it was made"
    assert not records.open_run(run).complete
    (run.directory/"config.json").write_text("{")
    again = records.open_run(run)  # nobody knows what it was: it begins anew
    assert again.todo == "training" and (run.directory/"config.json.damaged").read_text() == "{"
    again.finish()
    assert records.read_config(run.directory)["complete"]


# of a record made before settings were a method's own: every parameter there was
BEFORE = {"benchmark": "glyphs", "root": None, "model": "glyphs", "pretrained": None, "epochs": 6, "batch_size": 64,
          "micro_batch_size": None, "accumulation_steps": 1, "report_to": None, "lr": 0.001, "weight_decay": 0.1,
          "warmup_steps": 20, "label_smoothing": 0.0, "orthogonality_coef": 0.2, "cross_norm_coef": 0.05,
          "distillation_coef": 1.5, "teacher_update_every": 6, "teacher_momentum_start": 0.05,
          "teacher_momentum_end": 0.9, "teacher_warmup_fraction": 0.2,
          "eval_sets": None, "eval_batch_size": 250, "eval_every": 0, "on_bad_image": "stop", "workers": 0, "seed": 1,
          "checkpoint_every": 0, "checkpoint_minutes": 10.0, "precision": "auto", "device": "auto", "threads": 1,
          "out": "expt_logs"}


@pytest.mark.parametrize("method, own", [("zs", {}), ("lp", {"lr": 0.01}), ("lp-ft", {}), ("carot", {})])
def test_records_made_before_are_found_and_go_on(tmp_path, method, own):
    run = resolve({"method": method, "out": str(tmp_path)})
    run.directory.mkdir(parents=True)
    for complete in (True, False):
        config = {"parameters": BEFORE | own | {"method": method}, "asked": {}, "complete": complete, "started": "then"}
        (run.directory/"config.json").write_text(json.dumps(config))
        (run.directory/"metrics.tsv").write_text(METRICS)
        assert records.check_same(run) == config
        opened = records.open_run(run, steps=3)
        assert opened.complete == complete and opened.config["started"] == "then"
    assert ("probe_lr" in records.read_config(run.directory)["parameters"]) == (method == "lp-ft")
    opened.finish(seconds={"total": 1.0})
    other = resolve({"method": method, "out": str(tmp_path), "seed": 2}) if run.method.seeded else run
    records.open_run(other).finish(seconds={"total": 1.0})  # extended
    (other.directory/"metrics.tsv").write_text(METRICS)
    assert [run.state for run in records.find_runs(tmp_path, "glyphs")] == ["complete"] * (1 + run.method.seeded)


HOLD = """\
import sys, time
from carot.runs.records import open_run
from carot.runs.settings import resolve
open_run(resolve({"out": sys.argv[1]}))
print("open", flush=True)
time.sleep(60)"""


def test_one_process_at_a_time_and_no_stale_lock(tmp_path, monkeypatch):
    holder = python(HOLD, tmp_path)
    assert holder.stdout.readline() == "open\n"
    run = resolve({"out": tmp_path})
    before = tree(tmp_path)
    monkeypatch.setattr(records.lock, "__defaults__", (0.3,))
    with pytest.raises(UserError, match=f"another process .pid {holder.pid} on .*is working in"): records.open_run(run)
    assert tree(tmp_path) == before
    (run.directory/".config.json.abcd1234").write_text("left by a killed process")
    holder.kill()
    holder.communicate()
    opened = records.open_run(run)
    assert records.open_run(run).path == opened.path  # the same process may come back
    assert sorted(p.name for p in opened.path.iterdir()) == [".lock", ".locked_by", "config.json"]
    opened.finish()
    assert not (opened.path/".locked_by").exists()


# execution

REPRODUCE = """\
import sys
from carot.commands import reproduce
reproduce("ft", notebook=sys.argv[1], out=sys.argv[2], batch_size=4)"""


def test_kill_goes_on_and_one_failure_stops_nobody_else(notebook, tmp_path, capsys):
    "kill -9 of `reproduce` ends its run and the run's kernel; the next call finishes, the one after that does nothing."
    out = tmp_path/"logs"
    out.mkdir()
    (out/"hold").touch()
    parent = python(REPRODUCE, notebook, out)
    pid = out/"glyphs"/"ft"/"batch_size=4,seed=1"/"pid"
    assert wait(lambda: pid.exists() and pid.read_text(), 60)
    family = psutil.Process(parent.pid).children(recursive=True)
    assert int(pid.read_text()) in [p.pid for p in family]
    assert len(family) == 2 + (sys.platform == "linux")  # a run and its kernel; the server that they are forked from
    parent.kill()
    parent.communicate()
    assert wait(lambda: not any(alive(p.pid) for p in family), 10)
    assert not records.read_config(pid.parent)["complete"] and not (pid.parent/"run.ipynb").exists()

    (out/"hold").unlink()
    report = standin_report(tmp_path/"report.ipynb")
    code = commands.reproduce("lp,ft", jobs=2, notebook=notebook, report_notebook=report, out=str(out), batch_size=4)
    assert code == 1
    text, errors = capsys.readouterr()
    line = "accuracy: ID 80.0 %, shifts 50.0 %   ECE: ID 0.100, shifts 0.200   1 s"
    assert f"ft     batch_size=4,seed=1  {line}\n" in text and "ft     batch_size=4,seed=1  started\n" in text
    failed = out/"glyphs"/"lp"/"batch_size=4,seed=1"/"run.failed.ipynb"
    assert errors == f"carot: error: lp     batch_size=4,seed=1: IndexError: beyond the end (see {failed})\n"
    assert "| table of batch_size=4 |" in text and "report.ipynb" in text
    for written in (pid.parent/"run.ipynb", failed):
        for word in ('"papermill"', sys.prefix, f"{Path.cwd()}/"): assert word not in written.read_text()

    before = tree(pid.parent)
    assert execute.make_run(notebook, method="ft", out=out, batch_size=4, workers=0) == pid.parent
    assert tree(pid.parent) == before


def test_errors_in_the_kernel(notebook, tmp_path, capsys):
    before = tree(tmp_path)
    assert jobs.run_all(notebook, [jobs.job_for({"out": str(tmp_path/"logs"), "batch_size": 2})], at_once=1) == 2
    said = capsys.readouterr()
    assert said.out == "carot  batch_size=2,seed=1  started\n"
    assert said.err == "carot: error: carot  batch_size=2,seed=1: batch_size 2 is for nobody; take 3\n"
    assert tree(tmp_path) == before
    with pytest.raises(RuntimeError, match="kernel died.*failed.ipynb"):
        execute.make_run(notebook, out=tmp_path/"logs", batch_size=3)


# several processes

@pytest.mark.slow(10)
def test_words_of_several_processes(notebook, tmp_path, monkeypatch):
    "One that fails takes the others along; the reasons of all are told, and a log is kept for each."
    monkeypatch.setattr(jobs.is_broken, "__defaults__", (12.0,))  # the second may be that much later on a busy machine
    wrong = [jobs.job_for({"method": "ft", "out": str(tmp_path/"logs"), "batch_size": size}) for size in (5, 6)]
    began, before = time.monotonic(), psutil.Process().children(recursive=True)  # Python's own, of another test
    assert jobs.run_all(notebook, wrong, 2, logs=tmp_path/"said", processes=2) == 1 and time.monotonic() - began < 50
    assert wrong[0].error.startswith("IndexError: only here") and [child.code for child in wrong[0].team] == [75, 1]
    both = r"process 0: IndexError: number 0 \(see .*failed.ipynb\); process 1: IndexError: number 1"
    assert re.match(both, wrong[1].error), wrong[1].error
    for rank, name in enumerate(["ft,batch_size=6,seed=1.log", "ft,batch_size=6,seed=1,process=1.log"]):
        log = (tmp_path/"said"/name).read_text()
        assert f"number {rank}" in log and "--batch-size=6 --processes=2" in log.splitlines()[0]
    assert set(psutil.Process().children(recursive=True)) <= set(before)


@pytest.mark.slow(10)
def test_two_jobs_of_two_processes_do_not_meet(notebook, tmp_path):
    variables = [jobs.team_variables(2) for _ in range(2)]
    assert [team["RANK"] for team in variables[0]] == ["0", "1"]
    assert len({team["MASTER_PORT"] for teams in variables for team in teams}) == 2
    planned = jobs.plan_runs(["lp", "ft"], 1, {"out": str(tmp_path/"logs")})
    assert jobs.run_all(notebook, planned, 2, processes=2) == 0 and all(map(jobs.is_complete, planned))


@pytest.mark.parametrize("processes, device, gpus, words", [
    (0, "cpu", 0, "processes must be at least 1, not 0"), (3, "auto", 2, "this machine has 2"),
    (2, "cuda:0", 2, "use device=auto"), (2, "mps", 0, "device=cpu")])
def test_processes_that_cannot_be(monkeypatch, processes, device, gpus, words):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    with pytest.raises(UserError, match=words): jobs.check_processes(processes, {"device": device})
    jobs.check_processes(1, {"device": device})
    jobs.check_processes(8, {"device": "cpu"})


def test_processes_of_a_comparison(notebook):
    with pytest.raises(UserError, match="at least 1"): commands.reproduce("zs", notebook=notebook, processes=0)
    with pytest.raises(UserError, match="at least 1"): commands.run_one(notebook, processes=0)


def test_all_methods_or_the_usual_ones():
    usual = [name for name, method in all_methods().items() if method.usual]
    assert commands.method_names(None) == usual
    for empty in ("", ",", []):
        with pytest.raises(UserError, match="methods is empty"): commands.method_names(empty)
    assert commands.method_names("all") == list(all_methods()) and commands.method_names("ft,zs") == ["ft", "zs"]
    assert commands.method_names(["all", "mine:MINE"]) == [*all_methods(), "mine:MINE"]


# the packaged notebook

def test_cleaning_keeps_the_tag_of_the_parameters(tmp_path):
    path = execute.notebook_path("fine_tune")
    copy = nbformat.read(path, 4)
    copy.cells[next(i for i, cell in enumerate(copy.cells) if cell.metadata.get("tags"))].metadata["dirt"] = True
    nbformat.write(copy, tmp_path/"fine_tune.ipynb")
    clean = [Path(sys.executable).with_name("nbdev_clean"), "--fname", tmp_path/"fine_tune.ipynb"]
    subprocess.run(clean, cwd=path.parent, check=True)
    assert not any("dirt" in cell.metadata for cell in nbformat.read(tmp_path/"fine_tune.ipynb", 4).cells)
    assert notebook_parameters(tmp_path/"fine_tune.ipynb") == notebook_parameters(path)


@pytest.mark.slow(10)
def test_a_record_is_made_again(tmp_path, monkeypatch):
    "Figures without predictions and weights, as a clone has them, are no reason not to run; with one of them they are."
    monkeypatch.chdir(tmp_path)
    kept = "    (run.path/'predictions').mkdir(); (run.path/'student').mkdir()\n    run.finish"
    notebook = write_notebook(tmp_path/"run.ipynb", parameters_cell(), RUN.replace("    run.finish", kept))
    path = execute.make_run(notebook, method="ft", out="logs")
    first = json.loads((path/"config.json").read_text())
    assert first["kept"] == ["predictions", "student"]
    made = (path/"run.ipynb").stat().st_mtime_ns
    (path/"predictions").rmdir()
    execute.make_run(notebook, method="ft", out="logs")
    assert (path/"run.ipynb").stat().st_mtime_ns == made
    (path/"student").rmdir()
    execute.make_run(notebook, method="ft", out="logs")
    second = json.loads((path/"config.json").read_text())
    assert (path/"run.ipynb").stat().st_mtime_ns > made and (path/"predictions").is_dir()
    assert first.pop("started") != second.pop("started") and first.pop("digest") != second.pop("digest")
    assert first == second


@pytest.mark.slow(10)
def test_signals_between_notebooks_do_not_reach_the_next(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    execute.make_run(notebook, method="ft", out="logs")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1
    caught = []
    usual = signal.signal(signal.SIGTERM, lambda *_: caught.append(1))
    try: signal.raise_signal(signal.SIGTERM)
    finally: signal.signal(signal.SIGTERM, usual)
    assert caught and execute.make_run(notebook, method="lp", out="logs").is_dir()
