"Warm starts: what is forked is what `python -c` would be, and nothing outlives who asked for it."
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import psutil
import pytest

from carot.engine import warm

linux = pytest.mark.skipif(sys.platform != "linux", reason="there is no server on other systems")
BEGIN = "from carot.engine.processes import begin\nbegin()\n"
TELL = BEGIN + """
import json, os, sys, tempfile
json.dump({"words": sys.argv, "there": sorted(set(sys.argv) & set(sys.modules)), "folder": os.getcwd(),
           "environment": dict(os.environ), "temporary": tempfile.gettempdir(), "session": os.getsid(0) == os.getpid(),
           "read": sys.stdin.read(), "threads": len(os.listdir("/proc/self/task")),
           "open": len(os.listdir("/proc/self/fd"))}, sys.stdout)
"""
SLEEP = BEGIN + "import time\nprint(flush=True)\nfor _ in range(1000): time.sleep(0.1)"  # hears a signal between two


def is_alive(number):
    return psutil.pid_exists(number) and psutil.Process(number).status() != psutil.STATUS_ZOMBIE


def wait_until(holds, seconds=60):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def told(folder, *words, **environment):
    "What a process says of itself."
    with open(folder/"said.json", "w+b") as said:
        process = warm.popen([TELL, *words], os.environ | environment, said.fileno(), said.fileno())
        assert process.wait(120) == 0, (folder/"said.json").read_text()
    return json.loads((folder/"said.json").read_text())


@linux
def test_a_warm_process_is_what_a_cold_one_would_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"own").mkdir()
    given = {"TMPDIR": str(tmp_path/"own"), "GREETING": "f\u00fcnf \udcff", "CAROT_PARENT": str(os.getpid())}
    cold = told(tmp_path, "fractions", "a b\n", **given)
    with warm.warm_start(["fractions", "no_such_module"]):
        assert warm.is_warm()
        first, second = (told(tmp_path, "fractions", "a b\n", **given) for _ in range(2))
    assert not warm.is_warm() and cold.pop("there") == [] and first.pop("there") == ["fractions"]
    second.pop("there")
    assert first.pop("open") <= cold.pop("open") + 1 and second.pop("open") <= 6  # its link to the server
    assert first == second == cold and cold["threads"] == 1 and "CAROT_PARENT" not in cold["environment"]


@linux
def test_exit_codes_signals_and_handles():
    with warm.warm_start([]):
        leaving = [warm.popen([BEGIN + f"import sys; sys.exit({code})"], os.environ, None) for code in (0, 2, 75)]
        codes, failed = [process.wait(60) for process in leaving], warm.popen([BEGIN + "1 / 0"], os.environ)
        killed, stopped = (warm.popen([SLEEP], os.environ, None) for _ in range(2))
        assert killed.poll() is stopped.poll() is None
        with pytest.raises(subprocess.TimeoutExpired): stopped.wait(0.05)
        killed.kill()
        stopped.terminate()  # whether it has begun or not
        assert [killed.wait(60), stopped.wait(60), failed.wait(60), killed.poll()] == [-9, 75, 1, -9]
        stopped.send_signal(signal.SIGTERM)  # nobody is there any more
    assert codes == [0, 2, 75]


@linux
def test_processes_end_with_the_one_that_asked():
    asking = BEGIN + f"""
import os, sys, time
from carot.engine import warm
child = warm.popen([{SLEEP!r}], os.environ, None)
print(type(child).__name__, child.pid, flush=True)
time.sleep(100)
"""
    reading, writing = os.pipe()
    with warm.warm_start([]) as server, os.fdopen(reading) as lines:
        process, other = warm.popen([asking], os.environ, writing), warm.popen([SLEEP], os.environ, None)
        os.close(writing)
        kind, number = lines.readline().split()
        assert kind == "Forked" and is_alive(int(number)) and is_alive(other.pid)
        process.kill()
        wait_until(lambda: not is_alive(int(number)))
        assert other.poll() is None and process.wait(60) == -9
        server.keep_if(True)
        server.process.kill()
        assert other.wait(60) == -9
        wait_until(lambda: not is_alive(other.pid))


@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_of_a_parent_that_dies(number):
    parent = BEGIN + f"""
import os, time
from carot.engine import warm
with warm.warm_start([]) as server:
    child = warm.popen([{SLEEP!r}], os.environ, None)
    print(server.process.pid, child.pid, flush=True)
    for _ in range(1000): time.sleep(0.1)
"""
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen([sys.executable, "-c", parent], **quiet) as process:
        numbers = list(map(int, process.stdout.readline().split()))
        assert len(numbers) == 2 and all(map(is_alive, numbers))
        process.send_signal(number)
        assert process.wait(60) == (75 if number == signal.SIGTERM else -9)
    wait_until(lambda: not any(map(is_alive, numbers)), 10)


@linux
def test_without_a_server_processes_are_started_as_usual(monkeypatch):
    with warm.warm_start([]) as server:
        server.process.kill()  # it may be out of memory
        server.process.wait()
        assert warm.popen([BEGIN + "import sys; sys.exit(3)"], os.environ, None).wait(60) == 3
    for wanted, gpus in ((False, []), (True, ["/dev/nvidia0"])):
        monkeypatch.setattr(warm, "glob", lambda pattern, gpus=gpus: gpus)
        with warm.warm_start([], wanted) as server: assert server.process is None and not warm.is_warm()
    monkeypatch.undo()
    with warm.warm_start([]) as server, warm.warm_start([]) as second:
        assert second.process is None  # the first one serves
        server.keep_if(False)
        assert not warm.is_warm() and isinstance(warm.popen([BEGIN], os.environ), subprocess.Popen)


@linux
@pytest.mark.usefixtures("warm")
def test_the_server_has_one_thread():
    "With all that notebooks import: a fork copies one only, and what others hold would be held for ever."
    from carot.commands import NEEDED
    assert all(map(find_spec, NEEDED))
    there = f"import sys\nsys.exit(not sys.modules.keys() >= set({NEEDED}))"
    assert warm.popen([BEGIN + there], os.environ, None).wait(100) == 0
    children = [child for child in psutil.Process().children() if is_alive(child.pid)]
    server, = [child for child in children if "carot.engine.warm" in " ".join(child.cmdline())]
    assert server.num_threads() == 1
