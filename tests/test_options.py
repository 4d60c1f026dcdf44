"""Options that cannot be: one line, exit code 2, nothing written and nothing loaded. What nobody foresaw: one line and
a log."""
import errno
import os
import subprocess
import sys
import warnings

import pytest

from carot import cli, commands
from carot.cli import main
from carot.config import CORES, brief
from carot.core import UserError
from carot.methods.base import all_methods, find_method, settings_of
from carot.runs import errors
from carot.train import plan_steps

RUNS = ("run", "reproduce", "check", "sweep --grid=lr=1e-3,1e-4")  # commands that take settings of a run
LONG = "x" * 10_000

SETTINGS = [  # of a run: each for all of RUNS
    ("--epochs=0", "at least 1"), ("--epochs=10000000000", "at most 1,000,000,000"), ("--epochs=1e3", "takes int"),
    ("--epochs=", "takes int, not ''"), (f"--epochs={'9' * 5000}", "takes int"), ("--lr=-1", "at least 0"),
    ("--lr=nan", "takes float, not nan"), ("--lr=inf", "takes float"), ("--lr=1e400", "takes float"),
    ("--batch-size=0", "at least 1"), ("--batch-size=100000000", "at most 1,000,000"),
    ("--eval-batch-size=0", "at least 1"), ("--eval-batch-size=1000000000", "at most 1,000,000"),
    ("--accumulation-steps=-1", "at least 1"), ("--label-smoothing=1.1", "at most 1"),
    ("--micro-batch-size=0", "or auto"), ("--micro-batch-size=few", "or auto"), ("--micro-batch-size=", "is empty"),
    (f"--micro-batch-size=1{'0' * 30}", "or auto"), ("--workers=-3", "at least 0"),
    ("--workers=100000", f"at most {4 * CORES} (4 per core of this machine)"), ("--threads=-1", "at least 0"),
    ("--threads=100000", "at most 1,024"), ("--checkpoint-minutes=-1", "at least 0"), ("--shots=0", "at least 1"),
    ("--model=", "is empty"), ("--device=", "is empty"), ("--device=cuda:99999999999999999999", "CUDA devices"),
    ("--eval-sets=", "is empty"), ("--precision=bf61", "did you mean 'bf16'"), ("--out=", "is empty"),
    (f"--out={'x' * 300}", "longer than 255 bytes"), (f"--out={LONG}", "longer than 4,096 characters"),
    (f"--model={LONG}", "longer than 4,096"), ("--out=a\0b", "NUL character"), ("--root=a\0b", "NUL character"),
    ("--out=caf\udce9", "not UTF-8"), ("--eval-sets=caf\udce9", "not UTF-8"), ("--out=loop/logs", "leads nowhere"),
    ("--out=file/logs", "is a file"), ("--root=loop", "no folder|unknown benchmark"),
    ("--root=file", "no folder|unknown benchmark"), ("--settings=lr=nan", "takes float"),
    ("--settings=workers=100000", "4 per core"), ("--settings=lr=", "cannot read"),
    (f"--benchmark={LONG}", "longer than 4,096|unknown benchmark"), ("--benchmark=", "is empty"),
    ("--benchmark=loop", "unknown benchmark"), ("--benchmark=a\0b", "NUL character|unknown benchmark"),
]
OWN = [  # of one command
    ("run --seed=18446744073709551616", "at most 18,446,744,073,709,551,615"), ("run --seed=-1", "at least 0"),
    ("run --batch-size=1", "a pair alone has a loss of 0"), ("run --method=", "is empty"),
    ("run --method=flyp --batch-size=5 --accumulation-steps=3", "at least 6 with accumulation_steps=3"),
    ("reproduce --batch-size=1", "a pair alone"), ("check --batch-size=1", "a pair alone"),
    ("sweep --grid=batch_size=1,2", "a pair alone"), ("run --processes=0", "at least 1"),
    ("run --processes=1000000", "at most 1,024"), ("reproduce --methods=", "methods is empty"),
    ("reproduce --methods=,", "methods is empty"), ("reproduce --seeds=0", "at least 1"),
    ("reproduce --seeds=3000000", "at most 1,000"), ("reproduce --jobs=0", "at least 1"),
    ("reproduce --jobs=-1", "at least 1"), ("reproduce --jobs=1000000000", "at most 1,000"),
    ("reproduce --jobs=1e9", "takes int"), ("reproduce --timeout=-1", "at least 0.001"),
    ("reproduce --timeout=0", "at least 0.001"), ("reproduce --timeout=nan", "takes float, not nan"),
    ("reproduce --timeout=inf", "takes float, not inf"), ("reproduce --processes=-2", "at least 1"),
    ("sweep --grid=lr=1e-3 --seeds=3000000", "at most 1,000"), ("sweep --grid=lr=1e-3 --jobs=0", "at least 1"),
    ("sweep --grid=lr=1e-3 --timeout=-1", "at least 0|more than 0"), ("sweep --grid=", "is empty|needs a grid"),
    ("sweep --grid=lr=1e-3 --gpus=-1", "at least 0"), (f"sweep --grid=lr={'1e-3,' * 2000}1", "longer than 4,096"),
    ("sweep --grid=epochs=" + ",".join(map(str, range(1, 101))) + ";batch_size=" + ",".join(map(str, range(2, 103)))
     + ";warmup_steps=" + ",".join(map(str, range(100))), "at most 10,000"),
    ("claims --samples=0", "at least 1"), ("claims --samples=1000000000", "at most 1,000,000"),
    ("claims --seed=-1", "at least 0"), ("report --benchmark=", "is empty"), ("report --out=a\0b", "NUL character"),
    ("predict --checkpoint=. --images=", "images is empty"),
    ("predict --checkpoint= --images=.", "checkpoint is empty"),
    ("predict --checkpoint=. --images=. --batch-size=0", "at least 1"),
    ("predict --checkpoint=. --images=. --batch-size=100000000", "at most 1,000,000"),
    ("predict --checkpoint=. --images=. --workers=-3", "at least 0"),
    ("predict --checkpoint=. --images=. --workers=100000", "4 per core"),
    ("predict --checkpoint=. --images=. --temperature=", "is empty"),
    *((f"predict --checkpoint=. --images=. --temperature={T}", "temperature")
      for T in ("nan", "0", "-1", "inf", "hot")),
    ("export --run=. --to=", "to is empty"), ("export --run= --to=x", "run is empty"),
    ("shrink --root=. --out=", "out is empty"), ("shrink --root=. --out=o --shorter-side=0", "at least 1"),
    ("shrink --root=. --out=o --quality=0", "at least 1"), ("shrink --root=. --out=o --quality=101", "at most 100"),
    ("shrink --root=. --out=o --quality=95.5", "takes int"), ("shrink --root=. --out=o --workers=-1", "at least 0"),
    ("shrink --root=. --out=o --workers=100000", "4 per core"), ("completion --shell", "one of|unknown option"),
    ("caf\udce9", "unknown command"), ("run caf\udce9", "unexpected argument"), ("run --caf\udce9=1", "unknown option"),
]
TABLE = [(f"{command} {option}", words) for command in RUNS for option, words in SETTINGS] + OWN


def listing(folder): return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A working directory with a file, a link that leads to itself, and a folder of results that nobody may touch."
    folder = tmp_path_factory.mktemp("options")
    (folder/"file").touch()
    (folder/"loop").symlink_to("loop")
    return folder


@pytest.fixture(autouse=True)
def nothing_is_loaded(folder, monkeypatch):
    "Model, data and processes are out of bounds while options are read."
    monkeypatch.chdir(folder)
    def refuse(*words, **named): raise AssertionError("loaded before the options were checked")
    for place in ("carot.clip.load_clip", "carot.data.load_benchmark", "carot.runs.jobs.start"):
        monkeypatch.setattr(place, refuse)


def said(capsys, command):
    "Exit code, what went to stderr, and whether that is one printable line."
    words = [word for word in command.split(" ") if word]
    code = main(words)
    err = capsys.readouterr().err
    return code, err, err.count("\n") == 1 and err.rstrip("\n").isprintable() and len(err) < 650


@pytest.mark.parametrize("command, words", TABLE, ids=lambda text: ascii(text)[1:70])
def test_what_cannot_be_is_one_line(folder, capsys, command, words):
    before = listing(folder)
    code, err, one_line = said(capsys, command)
    assert code == 2 and one_line and err.startswith("carot: error: "), (code, err)
    assert any(word in err for word in words.split("|")), err
    assert listing(folder) == before


@pytest.mark.parametrize("bad", [{"methods": ""}, {"methods": []}, {"seeds": 0}, {"seeds": 10**7}, {"seeds": "3"},
                                 {"jobs": 10**9}, {"jobs": True}, {"timeout": -1}, {"timeout": float("nan")},
                                 {"processes": 0}, {"metrics": "a\0b"}, {"epochs": 10**5000}], ids=brief)
def test_python_has_the_same_bounds(folder, bad):
    before = listing(folder)
    with pytest.raises(UserError) as error: commands.reproduce(**bad)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300 and listing(folder) == before


def test_bounds_are_in_the_source_and_in_the_function():
    for name, command in cli.COMMANDS.items():
        known = cli.command_options(name).known
        for option, (low, high) in cli.declared_bounds(command.function).items():
            if option in known: assert (known[option].low, known[option].high) == (low, high), (name, option)
        numbers = [option for option, about in known.items() if about.kind in (int, float)]
        for option in {"workers", "seeds", "jobs", "timeout", "processes", "batch_size", "quality"} & {*numbers}:
            assert known[option].low is not None and known[option].high is not None, (name, option)


def test_defaults_are_within_their_bounds():
    for name in cli.COMMANDS:
        known = cli.command_options(name).known
        given = {option: about.default for option, about in known.items() if about.default is not cli.REQUIRED}
        cli.check_bounds(given, known)


# batches of one pair

def flyp(**given): return settings_of(find_method("flyp"), {}, {"warmup_steps": 0} | given)[0]


@pytest.mark.parametrize("n, given", [(33, {"batch_size": 16}), (1, {"batch_size": 16}), (3, {"batch_size": 2}),
                                      (35, {"batch_size": 16, "accumulation_steps": 2}),
                                      (17, {"batch_size": 32, "full_batches": True})])
def test_a_last_batch_that_cannot_be(n, given):
    with pytest.raises(UserError, match="loss of 0 whatever the model|cannot be made of 17 training images"):
        plan_steps(find_method("flyp"), flyp(**given), n)


def test_a_last_batch_that_can_be():
    method = find_method("flyp")
    assert plan_steps(method, flyp(batch_size=16, epochs=2), 34) == 6
    assert plan_steps(method, flyp(batch_size=16, epochs=2, full_batches=True), 33) == 6
    assert plan_steps(method, flyp(batch_size=16, epochs=1, micro_batch_size=1), 32) == 2
    ft = find_method("ft")
    assert plan_steps(ft, settings_of(ft, {}, {"batch_size": 1, "epochs": 1, "warmup_steps": 0})[0], 33) == 33


def test_who_learns_from_pairs_wants_two():
    for method in all_methods().values():
        if not method.trains: continue
        if method.contrastive:
            with pytest.raises(UserError, match="pair alone"): settings_of(method, {}, {"batch_size": 1})
        else: assert settings_of(method, {}, {"batch_size": 1})[0].batch_size == 1


# what nobody foresaw

def fail_with(error):
    def fail(*words, **named): raise error
    return fail


@pytest.mark.parametrize("error", [KeyError("a\nb"), MemoryError(), RecursionError("too deep"), ValueError(""),
                                   ZeroDivisionError("x" * 5000), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
                                   RuntimeError("CUDA error\n  at line 3"), OSError("no number"),
                                   subprocess.CalledProcessError(3, ["git"])], ids=lambda error: type(error).__name__)
def test_what_nobody_foresaw_is_a_line_and_a_log(tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr(cli, "call", fail_with(error))
    code, err, one_line = said(capsys, f"run --out={tmp_path}/logs --epochs=3")
    log = (tmp_path/"logs"/"error.log").read_text()
    assert code == 1 and one_line and err.startswith(f"carot: error: {type(error).__name__}"), err
    assert "error.log" in err and "carot.cli.answer" in err
    assert log.startswith("# ") and f"carot run --out={tmp_path}/logs --epochs=3\n" in log and "Traceback" in log
    assert main(["run", f"--out={tmp_path}/logs"]) == 1 and (tmp_path/"logs"/"error.log").read_text().startswith(log)


def test_an_error_whose_text_cannot_be_made(tmp_path, monkeypatch, capsys):
    class Odd(Exception):
        def __str__(self): raise RuntimeError
    monkeypatch.setattr(cli, "call", fail_with(Odd()))
    code, err, one_line = said(capsys, f"run --out={tmp_path}/logs")
    assert code == 1 and one_line and "Odd" in err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EMFILE,
                                    errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG], ids=errno.errorcode.get)
def test_the_systems_refusals_are_the_users_to_mend(tmp_path, monkeypatch, capsys, number):
    error = OSError(number, os.strerror(number), f"/data/{'x' * 300}\n")
    monkeypatch.setattr(cli, "call", fail_with(error))
    code, err, one_line = said(capsys, f"run --out={tmp_path}/logs")
    assert code == 2 and one_line and os.strerror(number) in err and ";" in err and not (tmp_path/"logs").exists()
    told = errors.mendable_in_words(type(error).__name__, str(error))
    assert os.strerror(number) in str(told)


def test_a_traceback_for_those_who_ask(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CAROT_TRACEBACK", "1")
    monkeypatch.setattr(cli, "call", fail_with(KeyError("x")))
    assert main(["run", f"--out={tmp_path}/logs"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("carot: error: KeyError: 'x'")


def test_a_log_that_cannot_be_written(folder, monkeypatch, capsys):
    monkeypatch.setattr(cli, "call", fail_with(KeyError("x")))
    code, err, one_line = said(capsys, "report --out=file")
    assert code == 1 and one_line and "CAROT_TRACEBACK=1" in err


def test_stopped_and_interrupted(monkeypatch, capsys):
    for error in (KeyboardInterrupt(), cli.Stopped()):
        monkeypatch.setattr(cli, "call", fail_with(error))
        assert said(capsys, "run") == (75, "carot: stopped; give the same command again to go on\n", True)


def test_warnings_do_not_drown_the_line(monkeypatch, capsys):
    def warn(command, found):
        for module in ("torch.nn.modules", "carot.data"):
            warnings.warn_explicit(f"from {module}\nin lines", UserWarning, "file.py", 1, module)
        raise UserError("the line")
    monkeypatch.setattr(cli, "call", warn)
    assert main(["run"]) == 2
    assert capsys.readouterr().err == "carot: warning: from carot.data\\nin lines\ncarot: error: the line\n"


# where output goes

def shell(folder, line):
    "A command line of a shell, in which `carot` is the command."
    here = f"unset PYTHONUNBUFFERED; export PYTHONPATH={cli.__file__.rpartition('/carot/')[0]}; " \
           f'carot() {{ {sys.executable} -m carot "$@"; }}; '
    return subprocess.run(["bash", "-c", f"set -o pipefail; {here}{line}"], cwd=folder, capture_output=True, text=True)


def test_nobody_reads_any_more(folder):
    done = shell(folder, "carot --help | head -1")
    assert done.stderr == "" and done.returncode == 0 and done.stdout.count("\n") == 1


def test_a_full_disk_behind_stdout(tmp_path):
    done = shell(tmp_path, "ulimit -f 1; carot --help > said")  # no file of more than 1 KB
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "File too large" in done.stderr


def test_without_stdout_and_without_a_working_directory(folder):
    assert shell(folder, "carot --version >&-").returncode == 0
    done = shell(folder, "mkdir gone; cd gone; rmdir ../gone; carot report")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("carot: error: ")


def test_a_name_that_the_terminal_cannot_show(folder):
    done = shell(folder, "PYTHONIOENCODING=ascii carot run --help")
    assert (done.returncode, done.stderr) == (0, "") and "\\u2026" in done.stdout
