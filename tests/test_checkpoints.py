"""Nothing is lost: kills, signals, damaged files, full disks; and nothing is executed."""
import contextlib
import csv
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import command
import conftest
import pytest
import torch

from small_runs import same, tiny_tokenizer, tune  # noqa: F401, a fixture

from carot import train
from carot.clip import build_clip
from carot.core import UserError
from carot.engine import checkpoints
from carot.engine.checkpoints import checksums, save_checkpoint
from carot.engine.signals import Stopped, StopSignals, outlive_signals

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def interruptible():
    "Ctrl-C as in a terminal; a job in the background ignores it."
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


def log(out):
    with (out/"train.tsv").open() as file: rows = list(csv.DictReader(file, delimiter="\t"))
    return [{k: v for k, v in row.items() if k not in ("seconds", "pairs_per_second")} for row in rows]

def equal(one, two, out_one, out_two):
    teachers = one.teacher is None or same(one.teacher, two.teacher)
    return same(one.student, two.student) and teachers and log(out_one) == log(out_two)

def steps(out, stage="train"): return [int(path.name[5:]) for path in sorted((out/"checkpoints"/stage).glob("step-*"))]

@contextlib.contextmanager
def signals_at(step, *numbers):
    "Signals to this process during the training step."
    original, count = train.train_step, [0]
    def stepping(*words, **named):
        count[0] += 1
        if count[0] == step:
            for number in numbers: signal.raise_signal(number)
        return original(*words, **named)
    train.train_step = stepping
    try: yield
    finally: train.train_step = original

@pytest.fixture(scope="module")
def begun(tokenizer, tmp_path_factory):
    "A run of nine steps that is left alone, and one stopped after the fifth, with checkpoints of steps 4 and 5."
    torch.manual_seed(0)
    clip, folder = build_clip(conftest.TINY_VIT).eval(), tmp_path_factory.mktemp("begun")
    def go_on(out, **change): return tune(clip, tokenizer, conftest.toy.__wrapped__(), "carot", out=out, **change)
    whole = go_on(folder/"whole")
    with signals_at(5, signal.SIGTERM), pytest.raises(Stopped) as ended: go_on(folder/"cut", checkpoint_every=2)
    assert ended.value.code == 75 and "saved at step 5 of 9" in str(ended.value)
    assert steps(folder/"cut") == [4, 5]
    return folder, go_on, whole

@pytest.fixture
def stopped(begun, tmp_path):
    "A copy of the stopped run; how to go on; whether what came of it is as if nothing had happened."
    folder, go_on, whole = begun
    shutil.copytree(folder/"cut", tmp_path/"cut")
    def is_same(resumed): return equal(whole, resumed, folder/"whole", tmp_path/"cut")
    return tmp_path/"cut", partial(go_on, tmp_path/"cut"), is_same


STOPS = [("carot", signal.SIGTERM), ("flyp", signal.SIGINT), ("lp-ft", signal.SIGTERM)]

@pytest.mark.parametrize("method, number", STOPS)
def test_stopped_after_every_step_ends_the_same(tiny_clip, tokenizer, toy, tmp_path, method, number, capsys):
    whole = tune(tiny_clip, tokenizer, toy, method, out=tmp_path/"whole")
    before, stops = signal.getsignal(number), 0
    while stops < 40:
        try:
            with signals_at(1, number):
                run = tune(tiny_clip, tokenizer, toy, method, out=tmp_path/"cut", checkpoint_minutes=0.0)
            break
        except Stopped: stops += 1
    assert stops == (18 if method == "lp-ft" else 9) and equal(whole, run, tmp_path/"whole", tmp_path/"cut")
    assert signal.getsignal(number) is before
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("carot: ")]
    where = f"stopped by {number.name} and saved at step 2 of 9"
    assert said[1:2] == [f"carot: {where}; give the same command again to go on"]

def test_second_ctrl_c_ends_at_once_and_the_rhythm_may_change(stopped):
    out, go_on, is_same = stopped
    with signals_at(2, signal.SIGINT, signal.SIGINT), pytest.raises(KeyboardInterrupt): go_on()
    assert steps(out) == [5, 6]
    with signals_at(2, signal.SIGTERM, signal.SIGTERM), pytest.raises(Stopped): go_on(checkpoint_every=1)
    assert steps(out) == [7, 8]
    assert is_same(go_on(checkpoint_every=5, checkpoint_minutes=1e-9)) and steps(out) == [8, 9]

def test_without_a_directory_nothing_is_promised(tiny_clip, tokenizer, toy):
    with signals_at(2, signal.SIGINT), pytest.raises(Stopped, match="not saved after step 2 of 9"):
        tune(tiny_clip, tokenizer, toy, "flyp")

def test_other_settings_are_refused_with_the_difference(stopped):
    out, go_on, is_same = stopped
    with pytest.raises(UserError) as error: go_on(lr=0.5, seed=2, teacher_momentum_end=0.8)
    for name, old, new in (("lr", 0.001, 0.5), ("seed", 1, 2), ("teacher_momentum_end", 0.9, 0.8)):
        assert f"the checkpoint has {name}={old}, this run {name}={new};" in str(error.value)
    assert steps(out) == [4, 5] and is_same(go_on())

def test_a_checkpoint_from_before_a_setting_was_known(stopped):
    "It names settings that are gone, and does not name some that there are; both cannot be compared."
    out, go_on, is_same = stopped
    for checkpoint in (out/"checkpoints"/"train").glob("step-*"):
        state = json.loads((checkpoint/"state.json").read_text())
        del state["settings"]["teacher_momentum_end"]
        (checkpoint/"state.json").write_text(json.dumps(state | {"settings": state["settings"] | {"forgotten": 7}}))
        (checkpoint/"manifest.json").write_text(json.dumps(checksums(checkpoint)))
    assert is_same(go_on()) and steps(out) == [6, 9]

OLD_COLUMNS = ["stage", "step", "epoch", "lr", "loss", "cross_entropy", "contrastive", "orthogonality", "cross_norm",
               "distillation", "momentum", "pairs_per_second"]

def test_a_log_keeps_the_columns_it_was_begun_with(stopped):
    "In their order; those that were not known then come behind them."
    out, go_on, is_same = stopped
    with (out/"train.tsv").open() as file: rows = list(csv.DictReader(file, delimiter="\t"))
    lines = [OLD_COLUMNS, *([row.get(name, "") for name in OLD_COLUMNS] for row in rows)]
    (out/"train.tsv").write_text("".join("\t".join(line) + "\n" for line in lines))
    go_on()
    text = (out/"train.tsv").read_text().splitlines()
    assert text[0].split("\t") == [*OLD_COLUMNS[:-1], "seconds", OLD_COLUMNS[-1]]
    assert len(text) == 10 and {line.count("\t") for line in text} == {12}


def test_signal_while_somebody_evaluates(tiny_clip, tokenizer, toy, tmp_path):
    def evaluate(epoch, trained): signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Stopped, match="between the epochs"):
        tune(tiny_clip, tokenizer, toy, "flyp", out=tmp_path, on_epoch=evaluate)
    assert steps(tmp_path) == [3]


# damage

def truncate(file): file.write_bytes(file.read_bytes()[:-7])
def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
def add(file): (file.parent/"more.pt").write_bytes(b"x")

FILES = ["student.safetensors", "teacher.safetensors", "optimizer.pt", "state.json", "manifest.json"]
DAMAGE = [*((damage, file) for damage in (truncate, flip, Path.unlink) for file in FILES), (add, "state.json")]

@pytest.mark.parametrize("damage, file", DAMAGE, ids=[f"{d.__name__}-{f}" for d, f in DAMAGE])
def test_damage_is_found_and_the_checkpoint_before_is_used(stopped, damage, file, capsys):
    out, go_on, is_same = stopped
    damage(out/"checkpoints"/"train"/"step-00000005"/file)
    original = torch.load
    def load(path, **named):
        return original(path, **named) if path.parent.name == "step-00000004" else pytest.fail("read what is damaged")
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", load)
        resumed = go_on()
    warning = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warning) == 1 and "step-00000005 cannot be used" in warning[0]
    assert warning[0].endswith("going on from step-00000004")
    assert is_same(resumed) and steps(out) == [6, 9]

def test_no_good_checkpoint_is_one_line(stopped):
    out, go_on, _ = stopped
    truncate(out/"checkpoints"/"train"/"step-00000005"/"student.safetensors")
    (out/"checkpoints"/"train"/"step-00000004"/"manifest.json").unlink()
    words = "step-00000005 .*; step-00000004 .*manifest.json is missing; delete that folder"
    with pytest.raises(UserError, match=words) as error: go_on()
    assert "\n" not in str(error.value) and steps(out) == [4, 5]

class Command:
    def __init__(self, folder): self.folder = str(folder)
    def __reduce__(self): return os.mkdir, (self.folder,)

def test_a_checkpoint_executes_nothing(stopped, tmp_path, capsys):
    out, go_on, is_same = stopped
    newest = out/"checkpoints"/"train"/"step-00000005"
    torch.save({"optimizer": Command(tmp_path/"executed"), "scaler": None}, newest/"optimizer.pt")
    (newest/"manifest.json").write_text(json.dumps(checksums(newest)))
    assert is_same(go_on()) and not (tmp_path/"executed").exists()
    assert "optimizer.pt holds something other than tensors" in capsys.readouterr().err
    torch.load(out/"checkpoints"/"train"/"step-00000009"/"optimizer.pt", weights_only=True)
    torch.save(Command(tmp_path/"executed"), tmp_path/"bait.pt")
    torch.load(tmp_path/"bait.pt", weights_only=False)
    assert (tmp_path/"executed").exists()  # the bait was a real one


# disks

def test_full_disk_leaves_the_checkpoint(stopped, monkeypatch):
    out, go_on, is_same = stopped
    words = r"checkpoint of step 6 .* needs 12.9 MB and 0.1 MB are free .*the one of step 5 is intact; make room"
    with monkeypatch.context() as patch:
        usage = shutil._ntuple_diskusage(10**9, 10**9 - 10**5, 10**5)
        patch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(UserError, match=words): go_on()
    assert steps(out) == [4, 5] and not list((out/"checkpoints"/"train").glob(".*")) and is_same(go_on())

@pytest.mark.parametrize("limit", [10, 10**5, 5 * 10**6])
def test_disk_that_fills_up_while_writing(stopped, limit):
    "No file may grow beyond the limit: the weights, the optimizer or all of them cannot be written whole."
    out, go_on, is_same = stopped
    log = (out/"train.tsv").read_bytes()
    child = os.fork()
    if child == 0:
        code, soft = 9, resource.getrlimit(resource.RLIMIT_FSIZE)
        original = checkpoints.save_file
        def limited(*words, **named):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, soft[1]))
            return original(*words, **named)
        checkpoints.save_file = limited
        try: go_on()
        except UserError as error:
            code = 3 if "the one of step 5 is intact" in str(error) and "\n" not in str(error) else 4
        finally: os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert steps(out) == [4, 5] and (out/"train.tsv").read_bytes().startswith(log) and is_same(go_on())


# kills

def test_killed_at_random_moments_ends_the_same(tiny_clip, tokenizer, toy, tmp_path):
    "kill -9 of a forked process, half of the time while a checkpoint is being written."
    tune(tiny_clip, tokenizer, toy, "carot", out=tmp_path/"whole")
    moments, kills, out = random.Random(1), [], tmp_path/"cut"
    for attempt in range(12):
        child = os.fork()
        if child == 0:
            try: tune(tiny_clip, tokenizer, toy, "carot", out=out, checkpoint_every=1)
            finally: os._exit(0)
        began, writing = time.monotonic(), attempt % 2
        delay, skip = moments.uniform(0.05, 0.4), moments.randrange(2)
        seen = set()
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if writing:
                seen |= set((out/"checkpoints"/"train").glob(".part-*"))
                if len(seen) > skip: break
            elif time.monotonic() - began > delay: break
        else: break
        with contextlib.suppress(ProcessLookupError): os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills.append((writing, steps(out) if out.exists() else []))
    resumed = tune(tiny_clip, tokenizer, toy, "carot", out=out)
    assert len(kills) >= 4
    assert log(out) == log(tmp_path/"whole") and same(resumed.student, tune(tiny_clip, tokenizer, toy, "carot").student)
    for part in ("student", "teacher"):
        cut, whole = (folder/part/"open_clip_model.safetensors" for folder in (out, tmp_path/"whole"))
        assert cut.read_bytes() == whole.read_bytes()

OPERATIONS = [(os, "rename"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"), (os, "fsync"), (checkpoints, "save_file"),
              (torch, "save")]

def test_kill_between_the_renames_and_in_the_deletion(tmp_path, monkeypatch):
    "Every single file operation of a save is the last one once."
    class Died(BaseException): pass
    model = torch.nn.Linear(2, 2)
    objective = SimpleNamespace(kept=lambda: {"student": torch.nn.ModuleDict({"model": model})})
    parts = dict(settings={}, objective=objective, optimizer=torch.optim.AdamW(model.parameters()))
    for deadly in range(1, 40):
        folder, count = tmp_path/str(deadly), [0]
        for step in (1, 2): save_checkpoint(folder, step, **parts)
        def counted(original):
            def operation(*words, **named):
                count[0] += 1
                if count[0] == deadly: raise Died
                return original(*words, **named)
            return operation
        with monkeypatch.context() as patch:
            for place, name in OPERATIONS: patch.setattr(place, name, counted(getattr(place, name)))
            try: save_checkpoint(folder, 3, **parts)
            except Died: pass
        assert checkpoints.load_checkpoint(folder, **parts) in (2, 3)
        assert not any(checkpoints.find_damage(path) for path in folder.glob("step-*"))
        save_checkpoint(folder, 3, **parts)
        assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"]
        if count[0] < deadly: break
    assert 10 < deadly < 39


# processes

SCRIPT = """\
import os, sys
sys.path.insert(0, sys.argv[1])
import conftest, torch
from open_clip import get_tokenizer
from carot.clip import build_clip
from carot.train import fine_tune
def main():
    torch.manual_seed(0)
    clip = build_clip(conftest.TINY_VIT).eval()
    tokenizer = get_tokenizer("ViT-B-16", context_length=12)
    fine_tune(clip, tokenizer, conftest.toy.__wrapped__(), "carot", epochs=300, batch_size=16, lr=1e-3, warmup_steps=2,
              teacher_update_every=2, workers=2, device="cpu", out=sys.argv[2])
main()"""

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_a_script_and_its_loader_processes(tmp_path, number):
    words = [sys.executable, "-c", SCRIPT, str(ROOT/"tests"), str(tmp_path)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    deadline = time.monotonic() + 100
    while not steps(tmp_path) if (tmp_path/"checkpoints"/"train").exists() else True:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, number)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and "Traceback" not in errors, errors
    last = steps(tmp_path)[-1]
    within = f"carot: stopped by {number.name} and saved at step {last} of 900; give the same" in errors
    assert within or f"{number.name} between the epochs" in errors and last % 3 == 0

def test_a_signal_finds_a_loader_process_that_has_just_begun(monkeypatch):
    "PyTorch's handler is there, ours is not yet."
    from torch.utils.data._utils import signal_handling
    usual = signal_handling._set_worker_signal_handlers
    def and_then():
        usual()
        os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(signal_handling, "_set_worker_signal_handlers", and_then)
    loader = torch.utils.data.DataLoader(range(8), num_workers=2, worker_init_fn=outlive_signals)
    with StopSignals() as stop: assert len(list(stop.watch(loader))) == 8
    assert not stop.asked

@pytest.mark.slow(15)
def test_signal_to_the_command_reaches_the_kernel_and_back(tmp_path, warm):
    "carot, the run's process, papermill's kernel: it saves and ends; the next call warns of damage, and finishes."
    words = ("run --method lp --epochs 2 --batch-size 250 --eval-sets Glyphs --checkpoint-every 1 --workers 0 "
             f"--threads 1 --out {tmp_path/'logs'}").split()
    given, deadline = command.Command(*words, cwd=tmp_path), time.monotonic() + 200
    while sum(len(file.read_text().splitlines()) for file in tmp_path.rglob("train.tsv")) < 4:
        assert time.monotonic() < deadline and given.process.poll() is None
        time.sleep(0.1)
    given.process.send_signal(signal.SIGTERM)
    stopped = given.end(100)
    out, err = stopped.stdout, stopped.stderr
    run = next(tmp_path.rglob("config.json")).parent
    assert stopped.returncode == 75 and out.count("\n") == 1 and "Traceback" not in err, (out, err)
    assert not (run/"run.failed.ipynb").exists()
    before, last = steps(run)
    assert len(err.splitlines()) == 2 and f"stopped by SIGTERM and saved at step {last} of " in err.splitlines()[1]
    flip(run/"checkpoints"/"train"/f"step-{last:08d}"/"state.json")
    done = command.carot(*words, cwd=tmp_path)
    err = done.stderr
    assert done.returncode == 0 and err.count("\n") == 1, err
    assert err.startswith("carot: warning: lp") and err.endswith(f"going on from step-{before:08d}\n")
    assert [int(row["step"]) for row in log(run)] == list(range(1, len(log(run)) + 1))
    assert json.loads((run/"config.json").read_text())["complete"]

VOTE = """\
import os, sys
from accelerate import Accelerator
from carot.engine.signals import in_any_process
accelerator = Accelerator(cpu=True)
wishes = (), (1,), (), (0, 1), ()
print([in_any_process(accelerator, accelerator.process_index in wishing) for wishing in wishes])"""

def test_all_processes_stop_after_the_same_step():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, ACCELERATE_USE_CPU="true")
    both = [subprocess.Popen([sys.executable, "-c", VOTE], env=env | dict(RANK=str(rank), LOCAL_RANK=str(rank)),
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in range(2)]
    said = [process.communicate(timeout=100) for process in both]
    assert [out for out, _ in said] == ["[False, True, False, True, False]\n"] * 2, said
