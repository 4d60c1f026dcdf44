"The command: what it teaches, how it refuses, that it does what the functions do."
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command import MAIN, Command
from test_runs import alive, standin, standin_report, tree, wait, write_notebook

import carot
from carot.cli import COMMANDS
from carot.methods.base import all_methods


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    "A clone of carot whose notebooks train nothing."
    clone = tmp_path_factory.mktemp("clone")
    (clone/"carot").symlink_to(Path(carot.__file__).parent)
    standin(clone/"nbs"/"runs"/"fine_tune.ipynb")
    for name in ("report", "claims"): standin_report(clone/"nbs"/"runs"/f"{name}.ipynb")
    (clone/"work").mkdir()
    return clone


def environment(clone): return dict(os.environ, PYTHONPATH=str(clone))


def hear_signals(): signal.signal(signal.SIGINT, signal.SIG_DFL)  # jobs in the background ignore it


def start(clone, *words):
    command = [sys.executable, "-m", "carot", *words]
    return subprocess.Popen(command, cwd=clone/"work", env=environment(clone), text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            preexec_fn=hear_signals)


def carot_command(clone, *words):
    process = start(clone, *words)
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


def test_help_teaches(clone):
    code, out, err = carot_command(clone)
    assert (code, err) == (0, "") and all(f"carot {word}" in out for word in (*COMMANDS, "COMMAND --help"))
    assert all(name in out and method.summary in out for name, method in all_methods().items())
    assert carot_command(clone, "--help") == carot_command(clone, "help") == (0, out, "")
    assert carot_command(clone, "--version") == (0, f"carot {carot.__version__}\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_quick_and_light(clone, command):
    "Twice, since other work may delay one; no command's help imports PyTorch."
    code = f"""\
import sys, time
began = time.process_time()
from carot.cli import main
try: main([{command!r}, "--help"])
except SystemExit as end: assert not end.code
heavy = {{"torch", "matplotlib", "papermill", "pandas"}} & set(sys.modules)
sys.exit(f"{{heavy}}" if heavy else "slow" if time.process_time() - began > 1 else 0)"""
    def measure():
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(clone))
    done = [measure()]
    if done[0].returncode: done.append(measure())
    assert 0 in [each.returncode for each in done], done[0].stderr
    assert done[0].stdout.startswith(f"usage: carot {command}")


# one line on stderr, exit code 2, nothing written
REFUSED = [
    ("reprodcue", "did you mean 'reproduce'"), ("--benchmark glyphs", "unknown command '--benchmark'"),
    ("run --epoch 3", "unknown option '--epoch' (did you mean '--epochs'?)"),
    ("run --batch_sise=3", "did you mean '--batch-size'"), ("run --nonsense", "'--nonsense'; see carot run --help"),
    ("run --wd 0.1", "(--wd is --weight-decay here)"), ("reproduce --ls 0.1", "(--ls is --label-smoothing here)"),
    ("reproduce --ema_up_freq 5", "--ema_up_freq is --teacher-update-every here"), ("run --exp_name x", "unnecessary"),
    ("run --epochs three", "epochs takes int, not 'three' (epochs: passes over"), ("run --epochs 3.0", "takes int"),
    ("run --lr nan", "takes float, not nan"), ("run --lr", "expected one argument"), ("run all", "unexpected argument"),
    ("run --method crot", "did you mean 'carot'"), ("run --benchmark glyph", "did you mean 'glyphs'"),
    ("run --root nowhere", "no folder 'nowhere'"), ("run --out file/deeper", "file is a file"),
    ("run --device tpu", "unknown device"), ("run --precision half", "unknown precision"),
    ("run no.ipynb", "there is no notebook"),
    ("run --method lp --distillation-coef 1", "lp does not use distillation_coef"), ("run --seeds 2", "mean '--seed'"),
    ("run --settings epoch=3", "did you mean 'epochs'"), ("run --settings epochs", "cannot read 'epochs'"),
    ("run --method no_module:MINE", "cannot take 'MINE' from 'no_module'"), ("run --method json:loads", "not a Method"),
    ("reproduce --method ft", "did you mean '--methods'"), ("reproduce --methods ft,flip", "did you mean 'flyp'"),
    ("reproduce --seeds 0", "at least 1"), ("reproduce --seeds two", "takes int"), ("reproduce --jobs 0", "at least 1"),
    ("reproduce --benchmark glyph", "did you mean"), ("reproduce --methods zs --lr 1", "none of the methods zs uses"),
    ("reproduce --preflight=maybe", "preflight takes bool"), ("report --selct x", "did you mean '--select'"),
    ("report", "no runs in expt_logs/glyphs"), ("report --benchmark x", "no runs in"), ("sweep", "grid"),
    ("predict --images x", "needs --checkpoint"), ("translate", "needs a command of the public code"),
    ("translate -- --l_orth_wv $OC", "takes a number, not the shell variable"), ("translate --lr 1", "unknown option"),
    ("completion", "one of bash, zsh"), ("completion fish", "unexpected"),
]


def test_refusals(clone):
    (clone/"work"/"file").touch()
    before = tree(clone/"work")
    code = f"""\
import contextlib, io
from carot.cli import main
for words, _ in {REFUSED!r}:  # in one process: PyTorch is slow to import
    with contextlib.redirect_stderr(io.StringIO()) as err: print(repr((main(words.split()), err.getvalue())))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=clone/"work", env=environment(clone), capture_output=True,
                          text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for line, (words, message) in zip(done.stdout.splitlines(), REFUSED):
        code, err = eval(line)
        assert code == 2 and err.startswith("carot: error: ") and err.count("\n") == 1 and message in err, (words, line)
    assert tree(clone/"work") == before


def test_help_has_defaults_of_method_and_benchmark(clone):
    def shown(*words): return " ".join(carot_command(clone, *words, "--help")[1].split())
    probe = shown("run", "--benchmark", "glyphs", "--method", "lp")
    assert "--lr FLOAT peak learning rate [0.01]" in probe and "--distillation-coef" not in probe
    assert "--on-bad-image {stop,skip}" in probe and "--precision {auto,fp32,bf16,fp16}" in probe
    compared = shown("reproduce", "--methods=lp,ft")
    assert "peak learning rate [0.01 (lp), 0.0003 (ft)]" in compared and "--seeds INT" in compared
    assert "for carot: --train-towers" in shown("run", "--method", "carot", "--benchmark", "glyphs")
    both = shown("reproduce", "--methods", "ft,carot,lp-ft")
    assert "for ft, carot:" in both and "for lp-ft: --probe-lr" in both and "for carot: --train-towers" in both
    assert "[0.01 (lp), 0.0003 (ft)]" in shown("sweep", "--grid", "method=lp,ft;seed=1,2")
    assert "--method" not in compared.replace("--methods", "") and "--no-preflight" in compared


def test_all_methods_are_named_by_a_word(clone):
    out = carot_command(clone, "reproduce", "--methods", "all", "--help")[1]
    own = {name for method in all_methods().values() for name in method.own}
    assert own and all(f"--{name.replace('_', '-')}" in out for name in own)


def test_a_public_command_is_translated(clone):
    public = "python src/main.py --train-dataset=ImageNet --data-location=d --wd 0.2 --run 2 --method carot".split()
    code, out, err = carot_command(clone, "translate", "--", *public)
    assert (code, err) == (0, "") and out.startswith("carot run --method carot --benchmark imagenet --root d")
    assert all(word in out for word in ("--weight-decay 0.2", "--seed 2", "--full-batches", "--distillation-coef 0"))
    for words in (public, [" ".join(public)]): assert carot_command(clone, "translate", *words) == (0, out, "")


def test_a_notebook_has_its_own_parameters(clone):
    notebook = clone/"own.ipynb"
    write_notebook(notebook, 'method: str = "ft"  # which\nlr: float = 0.5  # rate')
    out = carot_command(clone, "run", str(notebook), "--help")[1]
    assert "[0.5]" in out and "--method" in out and "--epochs" not in out
    code, _, err = carot_command(clone, "run", str(notebook), "--epochs", "3")
    assert code == 2 and "unknown option '--epochs'" in err


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(clone, shell):
    code, out, err = carot_command(clone, "completion", shell)
    assert (code, err) == (0, "")
    assert all(word in out for word in ("reproduce", "--distillation-coef", "handwriting", "lp-ft"))
    if shell == "bash": subprocess.run(["bash", "-n"], input=out, text=True, check=True)


def test_interrupted_and_again(clone, warm):
    "Ctrl-C ends the kernel too and says how to go on; the next command does, and the one after that finds it done."
    logs = clone/"work"/"expt_logs"
    logs.mkdir()
    (logs/"hold").touch()
    there = f"import carot\ncarot.__file__ = {str(clone/'carot'/'__init__.py')!r}\n"  # where its notebooks are found
    def given(*words): return Command(*words, cwd=clone/"work", code=there + MAIN)
    interrupted = given("reproduce", "--methods", "ft", "--batch_size", "4")
    pid = logs/"glyphs"/"ft"/"batch_size=4,seed=1"/"pid"
    assert wait(lambda: pid.exists() and pid.read_text(), 60)
    interrupted.process.send_signal(signal.SIGINT)
    done = interrupted.end(60)
    out, err = done.stdout, done.stderr
    assert done.returncode == 75 and out == "ft     batch_size=4,seed=1  started\n"
    assert re.fullmatch("carot: SIGINT: saving after the current step; Ctrl-C ends at once\ncarot: ft     "
                        r"batch_size=4,seed=1: stopped( by SIGTERM)?; give the same command again to go on\n", err)
    assert wait(lambda: not alive(int(pid.read_text())), 20)

    (logs/"hold").unlink()
    done = given("run", "--method", "ft", "--batch-size=4").end()
    out = done.stdout
    assert (done.returncode, done.stderr) == (0, "") and "ft     batch_size=4,seed=1  accuracy: ID 80.0 %" in out
    assert out.endswith("\nexpt_logs/glyphs/ft/batch_size=4,seed=1\n")
    before = tree(pid.parent)
    done = given("reproduce", "--methods", "ft", "--settings", "batch_size=4").end()
    out = done.stdout
    assert (done.returncode, done.stderr) == (0, "") and out.startswith("ft     batch_size=4,seed=1  accuracy: ")
    assert out.splitlines()[0].endswith("(was there)")
    assert "| table of batch_size=4 |" in out and "expt_logs/glyphs/report/report.ipynb" in out
    assert tree(pid.parent) == before


def test_the_console_script_finds_modules_of_the_working_directory(clone):
    text = "from carot.methods.base import Method\nMINE = Method('mine', 'Mine', 'mine')\n"
    (clone/"work"/"beside.py").write_text(text)
    code = """\
import sys
sys.path[0] = "/nowhere"  # as for a script in another folder
from carot.cli import main
main(["run", "--method", "beside:MINE", "--help"])"""
    done = subprocess.run([sys.executable, "-c", code], cwd=clone/"work", env=environment(clone), capture_output=True,
                          text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: carot run")
