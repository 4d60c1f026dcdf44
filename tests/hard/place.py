"""A small place to work in: images, a model, runs. And carot's command, called there in this process."""
import ast
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import nbformat
import numpy as np
import torch
from conftest import TINY_VIT
from PIL import Image

from carot.clip import build_clip, save_clip
from carot.engine import warm
from carot.runs import execute, jobs, records

CLASSES = {"cat": (220, 30, 30), "dog": (30, 180, 60), "owl": (40, 60, 220)}
SIZES = {"train": 6, "val": 4, "Dark": 3}  # images a class
COMMON = "--benchmark my --model model --epochs 1 --batch-size 6 --warmup-steps 1 --workers 0"
NAME = "batch_size=6,epochs=1,model=model,warmup_steps=1,seed="
PLACES = {"ft": f"expt_logs/my/ft/{NAME}1", "zs": "expt_logs/my/zs/model=model,seed=1",
          "begun": f"expt_logs/my/ft/{NAME}2"}  # what words of commands may name in braces
DRAWS = re.compile(r"\.plot\(|plt\.|\baxes\b|\bfigure\b|Image\(")  # lines that make figures: slow, and tested elsewhere
SET_THREADS = torch.set_num_threads
SECONDS, CPU_SECONDS, MEMORY = 60, 20, 4 * 2**30  # for one command: who takes longer hangs


# ---- one process

class Ended:
    "A process that has ended."
    pid = 2**22 + 1  # nobody's

    def __init__(self, code): self.returncode = code

    def poll(self): return self.returncode

    def wait(self, timeout=None): return self.returncode

    def terminate(self): pass

    kill = terminate


def without_figures(source):
    "Code without the statements that draw; definitions stay."
    def kept(body):
        for node in body:
            if isinstance(node, ast.If): node.body = [*kept(node.body), ast.Pass()]
            defines = isinstance(node, ast.FunctionDef | ast.Import | ast.ImportFrom | ast.If)
            if defines or not DRAWS.search(ast.unparse(node)): yield node
    tree = ast.parse(source)
    tree.body = list(kept(tree.body))
    return ast.fix_missing_locations(tree)


def execute_here(source, executed, given, *_, **__):
    "In place of a kernel: the cells of a notebook, without what draws."
    notebook, heard = nbformat.read(source, 4), io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(heard): run_cells(notebook, given)
    except Exception as error:
        if isinstance(error, KeyboardInterrupt | TimeoutError) or type(error).__name__ == "Stopped": raise
        error.ename, error.evalue = type(error).__name__, str(error)
        return error, f"{error.ename}: {' '.join(error.evalue.split())}"
    finally:
        notebook.cells[-1].outputs = [nbformat.v4.new_output("stream", name="stderr", text=heard.getvalue())]
        nbformat.write(notebook, executed)
    return None, ""


def run_cells(notebook, given):
    "As papermill does, with parameters behind the cell of that name."
    space = {"__name__": "__main__"}
    for cell in notebook.cells:
        if cell.cell_type != "code": continue
        exec(compile(without_figures(cell.source), "<cell>", "exec"), space)
        if "parameters" in cell.metadata.get("tags", []): space.update(given)


def start_here(job, notebook, logs=None, *_, **__):
    "In place of a process for a run."
    words = io.StringIO()
    with contextlib.redirect_stdout(words), contextlib.redirect_stderr(words), same_signals():
        try: code = jobs.child(str(notebook), job.given, bool(logs)) or 0
        except SystemExit as end: code = end.code or 0
    file = tempfile.TemporaryFile()
    file.write(words.getvalue().encode(errors="backslashreplace"))
    job.team, job.error = [jobs.Child(Ended(code), file, 0)], ""


@contextlib.contextmanager
def same_signals():
    "Handlers afterwards are those of before."
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    try: yield
    finally:
        for number, handler in zip(numbers, handlers): signal.signal(number, handler)


@contextlib.contextmanager
def replaced(where, **others):
    "Other values of attributes."
    before = {name: getattr(where, name) for name in others}
    for name, value in others.items(): setattr(where, name, value)
    try: yield
    finally:
        for name, value in before.items(): setattr(where, name, value)


def save_dot(path, *_, **__):
    "In place of a figure, for those that are drawn all the same."
    Image.new("L", (1, 1)).save(f"{path}.png")
    return Path(f"{path}.png").read_bytes()


class TooMany(BaseException):
    "A command starts more processes or threads than a machine bears."


def few_processes(most=8):
    "Nobody has more of them at once."
    start, started = multiprocessing.process.BaseProcess.start, []

    def counted(process):
        started.append(process)
        if sum(other._popen is not None and other.is_alive() for other in started) > most: raise TooMany
        return start(process)
    return replaced(multiprocessing.process.BaseProcess, start=counted)


def few_threads(threads, most=64):
    "As `torch.set_num_threads`, which has no bound."
    if threads > most: raise TooMany
    SET_THREADS(threads)


def one_process():
    "Kernels and processes of runs are replaced by calls; figures and pages of HTML are not made."
    from carot.analysis import figures
    stack = contextlib.ExitStack()
    stack.enter_context(replaced(execute, execute_there=execute_here))
    stack.enter_context(replaced(jobs, start=start_here))
    stack.enter_context(replaced(warm.Warm, start=lambda *_: None))
    stack.enter_context(few_processes())
    stack.enter_context(replaced(torch, set_num_threads=few_threads))
    stack.enter_context(replaced(figures, write_html=lambda page, *_, **__: page, save_figure=save_dot))
    return stack


# ---- a command

@dataclass
class Result:
    "How a command ended, and what it said."
    code: int
    out: str
    err: str

    @property
    def errors(self):
        "Its lines of errors."
        return [line for line in re.split(r"[\r\n]", self.err) if line.startswith("carot: error:")]


class Hangs(BaseException):
    "A command takes too long."


def hang(*_): raise Hangs


def feed_pipes():
    "Ends the wait of who reads a pipe and hears no signal."
    for path in Path().rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_fifo(): os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))


@contextlib.contextmanager
def bounded(seconds):
    "No longer, and no more memory than there is now and some GiB."
    before = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for number, timer, limit in [(signal.SIGALRM, signal.ITIMER_REAL, seconds),
                                 (signal.SIGPROF, signal.ITIMER_PROF, CPU_SECONDS)]:
        signal.signal(number, hang)
        signal.setitimer(timer, limit, 1)  # again: some callers swallow the first
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, before[1]))
    last = threading.Timer(seconds + 2, feed_pipes)
    last.start()
    try: yield
    finally:
        last.cancel()
        resource.setrlimit(resource.RLIMIT_AS, before)
        for timer in (signal.ITIMER_REAL, signal.ITIMER_PROF): signal.setitimer(timer, 0)


def terminal(encoding="utf-8", errors="strict"):
    "A stream as a process has it."
    return io.TextIOWrapper(io.BytesIO(), encoding, errors, write_through=True)


def said(stream):
    "All that was written."
    return stream.buffer.getvalue().decode(stream.encoding, "replace")


def call(words, folder=".", env=None, encoding="utf-8", seconds=SECONDS):
    "What `carot WORDS` does in a folder, in this process: nothing of it remains, whatever happens."
    from carot.cli import main
    out, err = terminal(encoding), terminal(errors="backslashreplace")
    before = os.getcwd(), dict(os.environ), list(sys.path), set(sys.modules), torch.get_num_threads()
    os.environ.update(env or {})
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), loud_warnings(), same_signals(), \
             one_process():
            try:
                with bounded(seconds): code = main(list(words))
            except SystemExit as end: code = end.code or 0
            except (Hangs, TooMany) as problem: code = type(problem).__name__
    finally: put_back(*before)
    return Result(code, said(out), said(err))


@contextlib.contextmanager
def loud_warnings():
    "Each warning on stderr, as in a process of its own."
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = lambda message, category, *_: print(f"{category.__name__}: {message}", file=sys.stderr)
        yield


def put_back(folder, environ, path, modules, threads):
    "What commands change in a process, as the end of theirs would put it back."
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith("own"): del sys.modules[name]  # a user's
    torch.set_num_threads(threads)
    for held in list(records.HELD.values()): held.release(force=True)
    records.HELD.clear()


def words_of(command):
    "A command's words: a string as a shell reads it, with places in braces, or a list."
    words = shlex.split(command) if isinstance(command, str) else list(command)
    return [part for word in words for part in (COMMON.split() if word == "{common}" else [with_places(word)])]


def with_places(text):
    "Names in braces are those of folders."
    for name, place in PLACES.items(): text = text.replace(f"{{{name}}}", place)
    return text


# ---- a folder

def picture(colour, seed):
    "A noisy square."
    noise = np.random.default_rng(seed).normal(0, 30, (16, 16, 3))
    return Image.fromarray((np.array(colour) + noise).clip(0, 255).astype("uint8"))


def write_images(folder):
    "A benchmark `my`, and files without classes in `new`."
    for number, (name, size) in enumerate(SIZES.items()):
        for label, (kind, colour) in enumerate(CLASSES.items()):
            place = folder/"my"/name/kind
            place.mkdir(parents=True)
            for i in range(size): picture(colour, [number, label, i]).save(place/f"{i}.png")
    (folder/"new").mkdir()
    for label, colour in enumerate(CLASSES.values()):
        picture(colour, [9, label]).save(folder/"new"/f"{label}.png")
        picture(colour, [10, label]).save(folder/"new"/f"{label}.jpg", quality=95)
    rows = [f"my/train/{kind}/{i}.png\ta photo of one {kind}" for kind in CLASSES for i in range(3)]
    (folder/"pairs.tsv").write_text("\n".join(["filepath\ttitle", *rows, ""]))


def must(result):
    "A command that has to succeed."
    assert result.code == 0, result.err
    return result


def interrupted(folder):
    "A run that was stopped after the first of two epochs' worth of steps, with its checkpoint."
    from carot.engine.signals import Stopped
    from carot.train import fine_tune

    def stopping(*arguments, **settings):
        def stop(*_): raise Stopped
        settings["on_epoch"] = stop
        return fine_tune(*arguments, **settings)
    with replaced(sys.modules["carot.train"], fine_tune=stopping):
        call(words_of("run --method ft {common} --seed 2 --no-preflight"), folder)


def make_place(folder):
    "Everything that rows start from: about 60 small files."
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    write_images(folder)
    save_clip(build_clip(json.loads(json.dumps(TINY_VIT))), folder/"model")
    for method in ("zs", "ft"): must(call(words_of(method_words(method)), folder))
    interrupted(folder)
    assert (folder/PLACES["begun"]/"checkpoints").is_dir()
    return folder


def method_words(method):
    "The command of one of the runs that are there."
    return f"run --method {method} " + ("--benchmark my --model model --workers 0" if method == "zs" else "{common}")


def copy_place(master, folder):
    "The same as links: whoever changes a file writes a new one."
    shutil.copytree(master, folder, copy_function=os.link, symlinks=True)
    return folder


def put(path, content=b""):
    "Write a file; no other link to an old one sees it."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def digest_of(path):
    if os.path.getsize(path) > 2**30: return f"{os.path.getsize(path)} bytes"
    try:
        with open(path, "rb") as file: return hashlib.file_digest(file, "blake2b").hexdigest()[:16]
    except OSError as error: return str(error.strerror)


READ: dict = {}  # inode, bytes and time of the last change -> digest

def digest_of_link(path):
    "The same; a file with several links is read once as long as nobody writes to it: most rows leave most files alone."
    about = os.stat(path)
    if about.st_nlink == 1: return digest_of(path)
    key = about.st_ino, about.st_size, about.st_mtime_ns
    if key not in READ: READ[key] = digest_of(path)
    return READ[key]


def digests(folder, digest=digest_of):
    "Path -> what is there: a file's content, a link's goal, or what else it is."
    found, root = {}, os.path.join(os.fsencode(folder), b"")
    for place, folders, files in os.walk(root):
        if b"__pycache__" in folders: folders.remove(b"__pycache__")  # what Python keeps of a user's own module
        for name in folders + files:
            path = os.path.join(place, name)
            short = os.fsdecode(path.removeprefix(root))
            if os.path.islink(path): found[short] = f"link to {os.readlink(path)!r}"
            elif os.path.isfile(path): found[short] = digest(path)
            else: found[short] = "folder" if os.path.isdir(path) else "other"
    return found
