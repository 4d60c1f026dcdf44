"""Python processes without the seconds of their start: forks of this one, where PyTorch and carot are imported.

Each is a process all the same, with its own signals, session, working directory, environment and exit code. What a
fresh interpreter shows (what is imported, an installation) is no matter for forks; `tests/test_reproduce.py` and
`tests/test_cli.py` start real ones."""
import asyncio
import atexit
import importlib
import io
import logging
import multiprocessing.util
import os
import runpy
import signal
import stat
import subprocess
import sys
import threading
import traceback
import types
import warnings
from contextlib import contextmanager
from subprocess import Popen as Real

import pytest
from traitlets.config import SingletonConfigurable

MODULES = ("carot", "carot.cli", "ipykernel_launcher")


def imported():
    "What most processes need, once; a fork inherits it."
    for name in ("carot.cli", "carot.train", "carot.commands", "carot.runs.execute", "carot.analysis.figures",
                 "ipykernel.kernelapp", "papermill", "matplotlib.pyplot"): importlib.import_module(name)


def is_python(words):
    "Whether this is a command that a fork can be: `python -c CODE …` or `python -m carot …`."
    if isinstance(words, str) or len(words) < 3 or words[0] != sys.executable: return False
    return words[1] == "-c" or words[1] == "-m" and words[2] in MODULES


def forget_instances(kind):
    "IPython's shell is one to a process."
    kind._instance = None
    for other in kind.__subclasses__(): forget_instances(other)


def forget_the_parent():
    "Its event loop, handlers, hooks, and its open pipes and files, whose numbers stay taken."
    asyncio.events._set_running_loop(None)
    asyncio.set_event_loop(None)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN: signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL: signal.signal(signal.SIGINT, signal.default_int_handler)
    atexit._clear()
    forget_instances(SingletonConfigurable)
    logging.root.handlers.clear()
    importlib.reload(warnings)
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3, 256):
        try: kind = os.fstat(number).st_mode
        except OSError: continue
        if stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind) or stat.S_ISREG(kind): os.dup2(null, number)


def open_streams():
    "Standard input, output and errors of this process."
    sys.stdin = open(0, closefd=False)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = io.TextIOWrapper(open(number, "wb", closefd=False), line_buffering=name == "stderr")
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def execute(words):
    "What `python` does with them; its exit code."
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    sys.argv = [words[1], *words[3:]]
    if words[2] == "ipykernel_launcher": sys.argv.append(f"--IPKernelApp.parent_handle={os.environ['JPY_PARENT_PID']}")
    sys.path.insert(0, "" if words[1] == "-c" else os.getcwd())
    try:
        if words[1] == "-c": exec(compile(words[2], "<string>", "exec"), vars(main))
        elif words[2] == "ipykernel_launcher": runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        else: sys.exit(sys.modules["carot.cli"].main())
    except SystemExit as end:
        if isinstance(end.code, str): print(end.code, file=sys.stderr)
        return 1 if isinstance(end.code, str) else end.code or 0
    except BaseException as error:
        traceback.print_exc()
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def leave(code):
    "Ends this process as an interpreter does."
    threading._shutdown()
    multiprocessing.util._exit_function()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr): stream.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 255)


class Fork(Real):
    "`subprocess.Popen`; a command of Python is a fork."

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        own, pipes, session = is_python(args), rest[3:9], rest[14]
        if not own: return super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
        waiting, ready = os.pipe()
        self.pid = os.fork()
        if self.pid:
            self._child_created = True
            os.close(ready)
            os.read(waiting, 1)  # until it has a session of its own
            os.close(waiting)
            return self._close_pipe_fds(*pipes)
        try:
            if session: os.setsid()
            os.close(ready)
            self._become([str(word) for word in args], preexec_fn, cwd, env, pipes)
        except BaseException: traceback.print_exc()
        finally: os._exit(1)

    def _become(self, words, preexec_fn, cwd, env, pipes):
        for source, number in ((pipes[0], 0), (pipes[3], 1), (pipes[5], 2)):
            if source != -1: os.dup2(source, number)
        forget_the_parent()
        if preexec_fn: preexec_fn()
        if cwd: os.chdir(cwd)
        before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        sys.path[:0] = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p not in before]
        open_streams()
        sys.modules["carot.runs.execute"].follow_parent()
        leave(execute(words))


@contextmanager
def as_forks():
    "Within it processes of Python are forks, those that they start too."
    import jupyter_client.launcher
    imported()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", Fork)
        patch.setattr(jupyter_client.launcher, "Popen", Fork)
        yield


@pytest.fixture
def forked():
    "For one test."
    with as_forks(): yield


@pytest.fixture(scope="module")
def all_forked():
    "For a file, whose fixtures start processes too."
    with as_forks(): yield
