"Sweeps under faults: a run that crashes, one that hangs, the whole killed; the same through Ray and Slurm."
import os
import re
import signal
import subprocess
import sys

import pandas as pd
import psutil
import pytest
from command import Command
from test_runs import tree, wait, write_notebook
from test_settings import METHOD

from carot.core import UserError
from carot.runs.sweeps import load_sweep, make_sweep, readable, save_tables

pytestmark = pytest.mark.usefixtures("warm")
PARAMETERS = """\
method: str = "ft"  # zs, lp, ft, lp-ft, flyp or carot
lr: float = None  # peak learning rate
epochs: int = None  # passes over the training set
seed: int = 1  # of everything random
out: str = None  # folder of all results"""
RUN = """\
import math, time
from carot.core import write_atomic
from carot.runs.records import open_run
from carot.runs.settings import asked_in, resolve
run = open_run(resolve(asked_in(globals())), steps=10)
print("this is", run.path.name)
if (lr, epochs) == (0.1, 1): raise ArithmeticError("the loss is not finite")
if (lr, epochs) == (0.2, 2): time.sleep(3600)
value = 0.8 - lr + 0.01 * epochs
rows = [("set", "id", "n", "metric", "value"), ("Test", True, 100, "accuracy", value),
        ("Dark", False, 100, "accuracy", value - 0.2), ("val", True, 100, "accuracy", value)]
if not run.complete:
    write_atomic(run.path/"metrics.tsv", "".join("\\t".join(map(str, row)) + "\\n" for row in rows))
    run.finish(seconds={"total": 0.1})"""
GRID = "lr=0.1,0.2,0.3,0.4;epochs=1,2,3"


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return write_notebook(tmp_path/"run.ipynb", PARAMETERS, RUN)


RATES = "sweep run.ipynb --out logs --name rates".split()

def alone(*words):
    "The command as a user gives it: nothing is imported before."
    return subprocess.Popen([sys.executable, "-m", "carot", *RATES, *words], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=True)

def given(*words): return Command(*RATES, *words, cwd=".")


@pytest.mark.slow(40)
def test_twelve_runs_a_crash_a_hang_and_a_kill(notebook, tmp_path):
    "Ends with ten results and two named failures, and makes nothing twice."
    process = alone("--grid", GRID, "--jobs", "3", "--timeout", "0.6")
    def complete(): return [run for run in (tmp_path/"logs"/"glyphs"/"ft").glob("*") if (run/"metrics.tsv").exists()]
    assert wait(lambda: len(complete()) >= 3, 90)
    started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    def lives(child): return child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    assert started and wait(lambda: not any(map(lives, started)), 20)
    before = {file: file.stat().st_mtime_ns for run in complete() for file in run.glob("metrics.tsv")}
    assert 3 <= len(before) < 12

    done = given("--grid", GRID, "--jobs", "3", "--timeout", "0.6").end(150)
    out, err = done.stdout, done.stderr
    assert done.returncode == 1 and "10 of 12 runs are complete; 2 failed" in out
    assert out.count("(was there)") >= len(before) - 3
    assert {file: file.stat().st_mtime_ns for file in before} == before
    folder = tmp_path/"logs"/"glyphs"/"sweeps"/"rates"
    results = load_sweep(folder)
    failures = pd.read_csv(folder/"failures.tsv", sep="\t").sort_values("lr")
    assert results.run.nunique() == 10 and len(results) == 30
    for row in results.itertuples():
        assert abs(row.value - (0.8 - row.lr - 0.2 * (not row.id) + 0.01 * row.epochs)) < 1e-9
    assert failures[["lr", "epochs"]].values.tolist() == [[0.1, 1], [0.2, 2]]
    assert "the loss is not finite" in failures.error.tolist()[0]
    assert failures.error.tolist()[1] == "stopped after 0.6 minutes, its timeout"
    for row in failures.itertuples():
        log = (tmp_path/row.log).read_text()
        assert f"this is {os.path.basename(row.run)}" in log and row.error in err
    assert "ArithmeticError: the loss is not finite" in err.replace("  | ", "")
    text = pd.read_csv(folder/"results.tsv", sep="\t").dropna(axis=1, how="all")
    pd.testing.assert_frame_equal(text, results[list(text)], check_dtype=False)
    assert results.drop(columns=list(text)).isna().all(axis=None)


def test_ctrl_c_keeps_what_is_done(notebook, tmp_path):
    sweep = given("--grid", "lr=0.2;epochs=1,2,3", "--jobs", "1")
    hanging = tmp_path/"logs"/"glyphs"/"sweeps"/"rates"/"logs"/"ft,epochs=2,lr=0.2,seed=1.log"
    assert wait(lambda: hanging.exists() and "this is" in hanging.read_text(), 60)
    sweep.process.send_signal(signal.SIGINT)
    stopped = sweep.end(60)
    assert stopped.returncode == 75 and "1 of 3 runs are complete" in stopped.stdout
    assert "Traceback" not in stopped.stderr
    assert load_sweep(tmp_path/"logs"/"glyphs"/"sweeps"/"rates").epochs.unique().tolist() == [1]
    done = given("--grid", "lr=0.2;epochs=1,3", "--jobs", "2").end(60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("(was there)") == 1 and "2 of 2 runs are complete" in done.stdout


def test_a_damaged_run_is_named_and_stops_no_table(notebook, tmp_path, capsys):
    grid = "lr=0.3,0.4;epochs=1"
    made = make_sweep("run.ipynb", grid, out="logs", name="rates")
    assert made.code == 0 and made.results.run.nunique() == 2
    (made.jobs[0].path/"metrics.tsv").write_text("set\tid\tn\tmetric\tval")
    capsys.readouterr()
    save_tables(made.folder, made.jobs)  # as if it had been damaged in this moment
    assert list(made.results.run.unique()) == [made.jobs[1].path.as_posix()]
    (made.jobs[0].path/"metrics.tsv").write_bytes(b"\xff\x00")
    assert readable([job.path for job in made.jobs]) == [made.jobs[1].path]
    warned, = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"carot: warning: left out of the table: cannot read .*lr=0.3.*metrics.tsv .*", warned)


def test_over_a_method_of_ones_own(notebook, tmp_path, monkeypatch):
    "Its setting is in no notebook's cell; beside another method, and through another command."
    (tmp_path/"hinge_sweep.py").write_text(METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    made = make_sweep("run.ipynb", "margin=0.1,0.2", method="hinge_sweep:HINGE", lr=0.3, epochs=1, jobs=2, out="logs")
    assert made.code == 0 and sorted(made.results.margin.unique()) == [0.1, 0.2]
    both = make_sweep("run.ipynb", "method=hinge_sweep:HINGE,ft", lr=0.3, epochs=1, out="logs", seeds=1)
    assert both.code == 0 and sorted(both.results.method.unique()) == ["ft", "hinge_sweep:HINGE"]
    assert len({job.path for job in made.jobs} & {job.path for job in both.jobs}) == 1
    with pytest.raises(UserError, match="unknown parameter 'margin'"): make_sweep("run.ipynb", "margin=0.1", out="logs")


def test_slurm_script_makes_the_runs(notebook, tmp_path, capsys):
    make_sweep("run.ipynb", "lr=0.3,0.4;epochs=1", engine="slurm", out="logs", name="rates", timeout=2)
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-1\n" in script and "#SBATCH --time=2\n" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    done = subprocess.run(["bash"], input=script, text=True, env=dict(os.environ, SLURM_ARRAY_TASK_ID="1"),
                          capture_output=True)
    assert done.returncode == 0 and "logs/glyphs/ft/epochs=1,lr=0.4,seed=1" in done.stdout
    make_sweep("run.ipynb", "lr=0.3,0.4;epochs=1", engine="slurm", out="logs", name="rates")
    assert "#SBATCH --array=0-0\n" in capsys.readouterr().out


@pytest.mark.slow(30)
def test_through_ray_as_locally(notebook, tmp_path, monkeypatch, capfd):
    "Two nodes of one processor; the same table, the same failure."
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster
    grid = "lr=0.1,0.3;epochs=1,3"
    local = make_sweep("run.ipynb", grid, jobs=2, out="local", name="rates")
    clone = os.path.dirname(os.path.dirname(sys.modules["carot"].__file__))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([clone, os.environ.get("PYTHONPATH", "")]))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        far = make_sweep("run.ipynb", grid, engine="ray", out="far", name="rates")
    finally: cluster.shutdown()
    assert local.code == far.code == 1
    columns = [name for name in local.results if name not in ("run", "out")]
    pd.testing.assert_frame_equal(local.results[columns], far.results[columns])
    assert len(far.failures) == 1
    assert [error.replace("far/", "local/") for error in far.failures.error] == local.failures.error.tolist()
    assert [run.replace("far/", "local/", 1) for run in far.results.run] == local.results.run.tolist()


MILLION = {"grid": {"lr": [k / 1000 for k in range(1, 1000)], "epochs": list(range(1, 1000))}}

@pytest.mark.parametrize("given, words", [
    (dict(grid=""), "a sweep needs a grid"), (dict(grid=None, seeds=3), "a sweep needs a grid"),
    (dict(grid="lrr=1"), "unknown parameter 'lrr' (did you mean 'lr'?)"),
    (dict(grid="lr=0.1;lr=0.2"), "lr is in the grid twice"), (dict(engine="sge"), "unknown engine 'sge'"),
    (dict(jobs=0), "jobs must be at least 1"), (dict(timeout=0), "timeout must be at least 0.001"),
    (dict(timeout=float("nan")), "timeout"), (dict(seeds=3_000_000), "seeds must be at most 1,000"),
    (dict(gpus=-1), "gpus"), (MILLION, "the grid has 998,001 runs"),
    (dict(gpus=1.0), "leave gpus out"), (dict(engine="ray", jobs=2), "leave jobs out"),
    (dict(engine="slurm", gpus=0.5), "whole GPUs"),
    (dict(engine="slurm", out="a\n#SBATCH --wrap=x"), "cannot stand in a script for Slurm"),
    (dict(notebook="nowhere.ipynb"), "there is no notebook 'nowhere.ipynb'"), (dict(out="run.ipynb"), "is a file")])
def test_wrong_sweeps_are_one_line_and_leave_nothing(notebook, tmp_path, given, words):
    before = tree(tmp_path)
    with pytest.raises(UserError, match=re.escape(words)) as error:
        make_sweep(**{"notebook": "run.ipynb", "grid": "lr=0.1"} | given)
    assert "\n" not in str(error.value) and tree(tmp_path) == before


WITHOUT_A_CLUSTER = """
from functools import cache
from ray._private import services
from carot.core import UserError
from carot.runs.sweeps import make_sweep
services.find_gcs_addresses = cache(lambda: set())  # nor one that somebody else has started here
services.find_bootstrap_address = lambda folder: None
try: make_sweep("run.ipynb", "lr=0.3", engine="ray", out="logs")
except UserError as error: print(error)
"""

def test_ray_without_a_cluster_says_how_to_start_one(notebook, tmp_path):
    "In a process of its own, where no earlier test has touched Ray."
    pytest.importorskip("ray")
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", WITHOUT_A_CLUSTER], env=env, capture_output=True, text=True)
    assert "ray start --head" in done.stdout, done.stderr
