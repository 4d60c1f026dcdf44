"""From the first line on a signal ends with 75 or 0, nothing outlives its parent, and nothing is left behind."""
import importlib.util
import os
import pty
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from command import carot

from carot.core import write_atomic
from carot.engine.signals import Stopped
from carot.engine.work import WORK, work_folder
from carot.runs.execute import execute_notebook, is_done
from carot.runs.records import lock, open_run, unlock
from carot.runs.settings import resolve

spec = importlib.util.spec_from_file_location("kill_often", Path(__file__).parent.parent/"speed"/"kill_often.py")
kill_often = sys.modules["kill_often"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kill_often)


@pytest.fixture(autouse=True)
def heeded():
    "Signals as in a terminal; a job in the background ignores Ctrl-C."
    usual = {number: signal.signal(number, signal.default_int_handler) for number in kill_often.STOPS}
    yield
    for number, handler in usual.items(): signal.signal(number, handler)


@pytest.fixture
def short():
    "A folder whose path leaves room for sockets below it: their names end at 108 bytes."
    with tempfile.TemporaryDirectory(prefix="carot") as folder: yield Path(folder)


@pytest.fixture
def place(short): return kill_often.Place(short)


def stop(place, words, number, due):
    "The exit code of a command that got a signal when `due()`, and what it said; none of its processes is left."
    process = place.start(words)
    kill_often.wait_for(lambda: kill_often.has_begun(process), process)
    kill_often.wait_for(due(), process)
    process.send_signal(number)
    code = process.wait(timeout=120)
    assert not place.alone(10)
    return code, kill_often.said(place)


# from the first line on

NOTHING = "--checkpoint=none --images=none".split()
FIRST = [  # command, signal, seconds after its first line
    (["run", "--method=lp"], "SIGTERM", 0), (["run", "--method=lp"], "SIGINT", 0.05),
    (["run", "--method=lp"], "SIGHUP", 0.1), (["run", "--method=lp"], "SIGTERM", 0.2),
    (["check"], "SIGINT", 0.05), (["check"], "SIGTERM", 0.5), (["reproduce"], "SIGHUP", 0.5),
    (["sweep", "--grid=lr=0.1,0.2"], "SIGTERM", 0.3), (["predict", *NOTHING], "SIGTERM", 0),
    (["export", "--run=none", "--to=out"], "SIGHUP", 0),
    (["shrink", "--root=none", "--out=small"], "SIGHUP", 0), (["report"], "SIGINT", 0), (["claims"], "SIGTERM", 0)]

@pytest.mark.parametrize("words, name, seconds", FIRST, ids=lambda x: x[0] if isinstance(x, list) else None)
def test_a_command_that_has_hardly_begun(place, words, name, seconds):
    code, said = stop(place, words, getattr(signal, name), lambda: kill_often.later(seconds))
    assert code == 75 and said.splitlines()[-1].startswith(f"carot: stopped by {name}; give the same"), said
    assert "Traceback" not in said and not place.temporary()


LAST = """\
import os, signal, sys
from carot.engine.processes import begin
begin()
class Last:
    def __del__(self, end=os.kill, me=os.getpid(), number=signal.SIGTERM): end(me, number)
sys.last = Last()
"""

def test_a_command_that_is_done_ends_with_its_own_code(place):
    "A signal in the last moments, when Python puts things away."
    assert subprocess.run([sys.executable, "-c", LAST]).returncode == 0


def there(pattern): return lambda place: lambda: any(place.folder.rglob(pattern))

KILL = signal.SIGKILL, there(".part-*")
EVERY = [(signal.SIGTERM, lambda place: kill_often.later(1)), (signal.SIGINT, there("kernel.json")),
         (signal.SIGHUP, there("step-00000002")), KILL]

@pytest.mark.slow(30)
@pytest.mark.parametrize("phases", [
    pytest.param([(signal.SIGTERM, there("step-00000002")), KILL], id="training, saving"),
    pytest.param(EVERY, id="every phase", marks=pytest.mark.long("60 s"))])
def test_a_run_that_is_stopped_and_killed_ends_the_same(phases, short, warm):
    "As one that was left alone, and forked. The first phases have tests of their own, above and below."
    command = next(command for command in kill_often.COMMANDS if command.name == "run")
    whole, place = kill_often.Place(short/"whole"), kill_often.Place(short/"cut")
    for each in (whole, place): shutil.copy(Path(__file__).with_name("few.py"), each.folder)
    words = [word for word in command.words if "--shots" not in word] + ["--benchmark=few:FEW", "--shots=5"]
    assert carot(*words, cwd=whole.folder).returncode == 0
    codes = [stop(place, words, number, lambda due=due: due(place))[0] for number, due in phases]
    assert all(code in (0, 75) or number == signal.SIGKILL and code == -9
               for code, (number, _) in zip(codes, phases)), codes
    folders = {"TMPDIR": str(place.folder/"tmp"), "JUPYTER_RUNTIME_DIR": str(place.folder/"jupyter")}
    done = carot(*words, cwd=place.folder, **folders)
    assert done.returncode == 0 and "Traceback" not in kill_often.said(place) + done.stderr, done.stderr
    assert command.results(place.folder) == command.results(whole.folder) and not place.temporary()


# a kernel

def notebook(folder, *cells):
    "One with a cell of parameters, written."
    cells = [nbformat.v4.new_code_cell(source) for source in ("x: int = 1  # a number", *cells)]
    cells[0].metadata["tags"] = ["parameters"]
    return write_atomic(folder/"notebook.ipynb", nbformat.writes(nbformat.v4.new_notebook(cells=cells)))


def descendants(): return psutil.Process().children(recursive=True)


@pytest.mark.parametrize("seconds", [0.05, 0.6])
def test_a_signal_while_a_kernel_is_being_started(tmp_path, seconds):
    import papermill  # noqa: F401  # before the clock runs

    source, before = notebook(tmp_path, "import time; time.sleep(60)"), descendants()
    timer = threading.Timer(seconds, os.kill, [os.getpid(), signal.SIGTERM])
    timer.start()
    began = time.monotonic()
    with pytest.raises(Stopped, match="SIGTERM"): execute_notebook(source, {}, tmp_path/"results"/"done.ipynb")
    assert time.monotonic() - began < 50 and not (tmp_path/"results").exists()
    assert set(descendants()) <= set(before)


def test_a_signal_to_the_kernel_itself(tmp_path):
    source = notebook(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
    with pytest.raises(Stopped, match="again"): execute_notebook(source, {}, tmp_path/"done.ipynb")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notebook.ipynb"]


def test_a_folder_with_a_difficult_name(tmp_path):
    "Papermill formats braces; sockets have short names; spaces."
    folder = tmp_path/"{x} a"/("long" * 20)
    source = notebook(tmp_path, "import os, tempfile; print(tempfile.gettempdir(), os.getcwd())")
    execute_notebook(source, {"x": 2}, folder/"done.ipynb")
    printed = nbformat.read(folder/"done.ipynb", 4).cells[-1].outputs[0].text
    assert [path.name for path in folder.iterdir()] == ["done.ipynb"] and WORK not in printed


# a terminal that is closed

TERMINAL = """\
import sys, time
from carot.engine.processes import begin
begin()
from carot.engine.signals import StopSignals
with StopSignals() as stop:
    print("ready", flush=True)
    while not stop.asked: time.sleep(0.02)
    for stream in (sys.stdout, sys.stderr): print("saving", file=stream, flush=True)
    open(sys.argv[1], "w").write(stop.asked)
    stop.leave("")
"""

def test_a_terminal_that_is_closed(tmp_path):
    "What is said afterwards goes nowhere, and what is to be saved is saved."
    child, terminal = pty.fork()
    if child == 0: os.execv(sys.executable, [sys.executable, "-c", TERMINAL, str(tmp_path/"saved")])
    assert b"ready" in os.read(terminal, 100)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
    assert (tmp_path/"saved").read_text() == "SIGHUP"


# nothing outlives its parent

LOADER = """\
import sys, time
import torch
from carot.engine.signals import outlive_signals
class Slow(torch.utils.data.Dataset):
    def __len__(self): return 10 ** 6
    def __getitem__(self, index): return torch.zeros(3)
if __name__ == "__main__":
    loader = torch.utils.data.DataLoader(Slow(), 4, num_workers=int(sys.argv[1]), worker_init_fn=outlive_signals)
    for n, batch in enumerate(loader):
        if n == 3 * int(sys.argv[1]): print("ready", flush=True)
        if n > 3 * int(sys.argv[1]): time.sleep(0.05)
"""

@pytest.mark.parametrize("workers", [2, pytest.param(200, marks=pytest.mark.slow(20))])
def test_loader_processes_end_with_a_parent_that_is_killed(place, workers):
    (place.folder/"loader.py").write_text(LOADER)
    env = os.environ | {"TMPDIR": str(place.folder/"tmp"), kill_often.MARK: place.mark, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "loader.py", str(workers)], env=env, cwd=place.folder, text=True,
                               stdout=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n" and len(place.processes()) > workers
    assert list((place.folder/"tmp").glob("pymp-*"))  # in which tensors are handed over
    process.kill()
    process.wait()
    assert not place.alone(20) and not place.temporary()


# what a kill leaves

@pytest.fixture
def complete(tmp_path):
    "A run that is complete, in which a killed process has left its things."
    run = open_run(resolve({"method": "zs", "out": str(tmp_path)}))
    (run.path/"metrics.tsv").write_text("set\tid\tn\tmetric\tvalue\nTest\tTrue\t100\taccuracy\t0.8\n")
    run.finish(seconds={"total": 0.1})
    for name in ("run.ipynb", ".locked_by", ".metrics.tsv.abcdefgh", "checkpoints/train/step-00000002/state.json",
                 f"{WORK}/{work_of_the_dead()}/kernel.json"): write_atomic(run.path/name, "")
    return resolve({"method": "zs", "out": str(tmp_path)})


def work_of_the_dead():
    "The name of a folder whose process has ended."
    script = "from carot.engine.work import work_name; print(work_name())"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip()


def things(path): return {file.name for file in path.rglob("*") if file.is_file()} - {".lock"}


def test_a_complete_run_is_swept(complete):
    assert "state.json" in things(complete.directory) and is_done(complete)
    assert things(complete.directory) == {"run.ipynb", "config.json", "metrics.tsv"}


def test_not_while_somebody_works_there(complete):
    with work_folder(complete.directory):
        held = lock(complete.directory)
        assert is_done(complete) and "state.json" in things(complete.directory)
        assert any((complete.directory/WORK).iterdir())
        unlock(held)
        assert is_done(complete) and "state.json" not in things(complete.directory)
        assert any((complete.directory/WORK).iterdir())
    assert not (complete.directory/WORK).exists()
