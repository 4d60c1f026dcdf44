"The command: what it teaches, how it refuses, that it does what the functions do."
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import carot
from test_runs import alive, standin, standin_report, tree, wait


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    "A clone of carot whose notebooks train nothing."
    clone = tmp_path_factory.mktemp("clone")
    (clone/"carot").symlink_to(Path(carot.__file__).parent)
    standin(clone/"nbs"/"runs"/"fine_tune.ipynb")
    standin_report(clone/"nbs"/"runs"/"report.ipynb")
    (clone/"work").mkdir()
    return clone


def start(clone, *words):
    return subprocess.Popen([sys.executable, "-m", "carot.cli", *words], cwd=clone/"work", text=True, env=dict(os.environ, PYTHONPATH=str(clone)),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a job in the background ignores it


def carot_command(clone, *words):
    process = start(clone, *words)
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


def test_help_teaches_and_is_quick(clone):
    began = time.monotonic()
    code, out, err = carot_command(clone)
    assert (code, err) == (0, "") and all(f"carot {word}" in out for word in ("reproduce", "run", "report", "COMMAND --help"))
    assert time.monotonic() - began < 1.5
    assert carot_command(clone, "--help") == carot_command(clone, "help") == (0, out, "")
    assert "torch" not in subprocess.run([sys.executable, "-X", "importtime", "-c", "import carot.cli"], capture_output=True, text=True).stderr


# one line on stderr, exit code 2, nothing written
REFUSED = [
    (["reprodcue"], "did you mean 'reproduce'"), (["--benchmark", "glyphs"], "unknown command '--benchmark'"),
    (["run", "--epoch", "3"], "unknown option '--epoch' (did you mean '--epochs'?)"), (["run", "--batch_sise=3"], "did you mean '--batch-size'"),
    (["run", "--epochs", "three"], "epochs takes int, not 'three' (epochs: what epochs is"), (["run", "--epochs", "3.0"], "takes int"),
    (["run", "--lr", "nan"], "takes float, not nan"), (["run", "--lr"], "expected one argument"), (["run", "all"], "unexpected argument 'all'"),
    (["run", "--method", "crot"], "did you mean 'carot'"), (["run", "--benchmark", "glyph"], "did you mean 'glyphs'"),
    (["run", "--root", "nowhere"], "no folder 'nowhere'"), (["run", "--out", "file/deeper"], "file is a file"), (["run", "--device", "tpu"], "unknown device"),
    (["run", "--method", "ft", "--distillation-coef", "1"], "ft does not use distillation_coef"), (["run", "--seeds", "2"], "did you mean '--seed'"),
    (["reproduce", "--method", "ft"], "did you mean '--methods'"), (["reproduce", "--methods", "ft,flip"], "did you mean 'flyp'"),
    (["reproduce", "--seeds", "0"], "at least 1"), (["reproduce", "--seeds", "two"], "seeds takes int"), (["reproduce", "--jobs", "0"], "at least 1"),
    (["reproduce", "--benchmark", "glyph"], "did you mean"), (["reproduce", "--methods", "zs", "--lr", "1"], "none of the methods zs uses lr"),
    (["report", "--selct", "x"], "did you mean '--select'"), (["report"], "no runs in expt_logs/glyphs"), (["report", "--benchmark", "x"], "no runs in"),
]


def test_refusals_and_help_of_a_command(clone):
    (clone/"work"/"file").touch()
    before = tree(clone/"work")
    code = f"""\
import contextlib, io
from carot.cli import main
for words, _ in {REFUSED!r}:  # in one process: PyTorch is slow to import
    with contextlib.redirect_stderr(io.StringIO()) as err: print(repr((main(words), err.getvalue())))
main(["run", "--help"])"""
    done = subprocess.run([sys.executable, "-c", code], cwd=clone/"work", env=dict(os.environ, PYTHONPATH=str(clone)), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    for line, (words, message) in zip(lines, REFUSED):
        code, err = eval(line)
        assert code == 2 and err.startswith("carot: error: ") and err.count("\n") == 1 and message in err, (words, line)
    assert tree(clone/"work") == before
    text = "\n".join(lines[len(REFUSED):])
    assert text.startswith("usage: carot run") and re.search(r"--batch-size INT\s+what batch_size is \[512\]", text)


def test_interrupted_and_again(clone):
    "Ctrl-C ends the kernel too and says how to go on; the next command does, and the one after that finds it done."
    logs = clone/"work"/"expt_logs"
    logs.mkdir()
    (logs/"hold").touch()
    process = start(clone, "reproduce", "--methods", "ft", "--batch_size", "4")
    pid = logs/"glyphs"/"ft"/"batch_size=4,seed=1"/"pid"
    assert wait(lambda: pid.exists() and pid.read_text(), 60)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75 and out == ""
    assert err == ("carot: SIGINT: saving after the current step; Ctrl-C ends at once\n"
                   "carot: ft     batch_size=4,seed=1: stopped; give the same command again to go on\n")
    assert wait(lambda: not alive(int(pid.read_text())), 5)

    (logs/"hold").unlink()
    code, out, err = carot_command(clone, "run", "--method", "ft", "--batch-size=4")
    assert (code, err) == (0, "") and out.startswith("ft     batch_size=4,seed=1  accuracy: ID 80.0 %")
    assert out.endswith("\nexpt_logs/glyphs/ft/batch_size=4,seed=1\n")
    before = tree(pid.parent)
    code, out, err = carot_command(clone, "reproduce", "--methods", "ft", "--batch_size", "4")
    assert (code, err) == (0, "") and re.match(r"ft     batch_size=4,seed=1  accuracy: .* \(was there\)\n", out)
    assert "| table of batch_size=4 |" in out and "expt_logs/glyphs/report/report.ipynb" in out and tree(pid.parent) == before
