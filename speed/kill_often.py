"""Commands that are stopped and killed at any moment end like ones that are left alone, and leave nothing behind.

    python speed/kill_often.py [--stops 50] [--kills 200] [--commands run,sweep,report,predict,export,shrink]
                               [--seed 1] [--out speed/kill_often.tsv]

Each command (a run of CaRot with a checkpoint every two steps, a sweep of two runs, a report, the classes of images, a
model handed on, a training set made small) is first made undisturbed, on the built-in benchmark. Then it is begun again
and again in another folder. A stop is SIGTERM, SIGINT or SIGHUP to the command, at a random moment from its first line
of Python on, a third of them within the first second and a half: it must end with 75, or with 0 if it was done. A kill
is kill -9 of the command, or of one of the processes below it, at a random moment or at the sight of a half-written
checkpoint. When a command comes to its end its results are compared byte by byte with the undisturbed ones (of
train.tsv all but the columns of times), and it is begun afresh. Counted beside: processes that are there three seconds
after a kill, and temporary files (in the system's folder, in Jupyter's, in `.work`, half-written ones) that are there
after the last call. The exit code is 1 if anything is not as it should be.
"""
import argparse
import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

MARK = "CAROT_KILLED_OFTEN"  # variable by which all processes of a command are found
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TIMES = ("seconds", "pairs_per_second")  # columns of train.tsv that differ from run to run
SMALL = "--eval-sets=Glyphs --epochs=1 --threads=1 --device=cpu --workers=1".split()


@dataclass
class Place:
    "A folder in which commands are given, with folders for temporary files of its own."
    folder: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self):
        for name in ("tmp", "jupyter"): (self.folder/name).mkdir(parents=True, exist_ok=True)

    def start(self, words):
        "The command, as a process."
        env = os.environ | {MARK: self.mark, "TMPDIR": str(self.folder/"tmp"), "OMP_NUM_THREADS": "1",
                            "JUPYTER_RUNTIME_DIR": str(self.folder/"jupyter"), "MPLBACKEND": "agg",
                            "TORCHINDUCTOR_CACHE_DIR": str(self.folder/"cache")}  # PyTorch's, and made to stay
        with open(self.folder/"said.txt", "ab") as said:
            return subprocess.Popen([sys.executable, "-m", "carot", *words], cwd=self.folder, env=env, stdout=said,
                                    stderr=said, stdin=subprocess.DEVNULL, start_new_session=True)

    def processes(self):
        "All that are alive and stem from a command that was given here."
        return [process for process in psutil.process_iter() if belongs(process, self.mark)]

    def alone(self, patience=3.0):
        "How many processes are left after some seconds; they are ended then."
        deadline = time.monotonic() + patience
        while (left := self.processes()) and time.monotonic() < deadline: time.sleep(0.05)
        for process in left: process.kill()
        return len(left)

    def temporary(self):
        "Temporary files and folders that are there."
        parts = [path for path in self.folder.rglob(".*") if path.name in (".work", ".locked_by")
                 or re.fullmatch(r"\..*\.\w{8}|\.part-.*|\.step-.*", path.name)]
        return parts + [path for name in ("tmp", "jupyter") for path in (self.folder/name).iterdir()]


def belongs(process, mark):
    "Whether a process is one of those with this mark, and not just being put away."
    try: return process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError): return False


def has_begun(process):
    "Whether its first line was read: whether it has a handler for SIGTERM (where the system tells)."
    try: status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError: return True
    return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (signal.SIGTERM - 1) & 1)


def wait_for(moment, process):
    "Waits until it is time, or the process has ended."
    while process.poll() is None and not moment(): time.sleep(0.002)


# what is compared

def run_files(run):
    "Bytes by file, of train.tsv without times."
    files = {str(file.relative_to(run)): file.read_bytes() for part in ("student", "teacher", "predictions")
             for file in sorted((run/part).glob("*"))}
    with (run/"train.tsv").open() as file: rows = list(csv.DictReader(file, delimiter="\t"))
    log = [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
    return files | {name: (run/name).read_bytes() for name in ("metrics.tsv", "stats.tsv")} | {"train.tsv": log}


def runs(folder): return {f"{file.parent.name}/{name}": content for file in sorted(folder.rglob("config.json"))
                          for name, content in run_files(file.parent).items()}

def sweep(folder):
    names = {str(file.relative_to(folder)): None for file in folder.rglob("results.*")}
    return runs(folder) | names

def report(folder):
    files = folder.glob("logs/glyphs/report/*.[tm][sd]*")
    return {file.name: file.read_bytes() for file in files if file.stem != "cost"}  # which is of seconds

def table(folder): return {"predictions.tsv": (folder/"predictions.tsv").read_bytes()}

def model(folder): return {file.name: file.read_bytes() for file in (folder/"model").iterdir()}

def images(folder): return {str(file.relative_to(folder)): file.read_bytes()
                            for file in (folder/"small").rglob("*") if file.is_file()}


# commands

@dataclass
class Command:
    name: str
    words: list[str]
    results: Callable[[Path], dict]
    made: tuple[str, ...]  # folders and files that it makes: removed to begin afresh
    seconds: float = 0.0  # that it takes undisturbed


RUN = ["run", "--method=carot", "--shots=30", "--batch-size=30", *SMALL, "--checkpoint-every=2", "--out=logs"]
BASE = ["run", "--method=lp", *SMALL, "--out=logs"]
SETTING = "device=cpu,epochs=1,eval_sets=Glyphs"
LP = f"logs/glyphs/lp/{SETTING},seed=1"
COMMANDS = [
    Command("run", RUN, runs, ("logs",)),
    Command("sweep", ["sweep", "--method=lp", "--grid=lr=0.001,0.003", *SMALL, "--jobs=2", "--out=logs"], sweep,
            ("logs",)),
    Command("report", ["report", f"--select={SETTING}", "--out=logs"], report, ("logs/glyphs/report",)),
    Command("predict", ["predict", f"--checkpoint={LP}", "--images=images", "--batch-size=8", "--workers=1"], table,
            ("predictions.tsv",)),
    Command("export", ["export", f"--run={LP}", "--to=model"], model, ("model",)),
    Command("shrink", ["shrink", "--root=images", "--out=small", "--shorter-side=64", "--workers=2"], images,
            ("small",)),
]


def make_images(folder, n=150):
    "Random pictures in two classes."
    rng = np.random.default_rng(0)
    for index in range(n):
        file = folder/"images"/"train"/"ab"[index % 2]/f"{index}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (96, 128, 3), dtype=np.uint8)).save(file)


def prepare(folder, command):
    "A place in which the command can be given."
    place = Place(folder)
    if command.name in ("predict", "shrink"): make_images(folder)
    if command.name in ("predict", "report", "export"): assert place.start(BASE).wait() == 0, said(place)
    return place


def said(place): return (place.folder/"said.txt").read_text(errors="replace")[-2000:]


def undisturbed(folder, command):
    "What it makes when it is left alone."
    place = prepare(folder, command)
    began = time.monotonic()
    assert place.start(command.words).wait() == 0, said(place)
    command.seconds = time.monotonic() - began
    return command.results(folder)


# stops and kills

def half_written(place):
    "A function that tells whether a checkpoint is being written."
    return lambda: any(place.folder.rglob("checkpoints/train/.part-*"))


def later(seconds):
    "A function that tells whether so many seconds have gone."
    due = time.monotonic() + seconds
    return lambda: time.monotonic() >= due


def moment(command, place, way, rng):
    "When the signal comes: what is said of it, and a function that tells whether it is time."
    if way == "kill" and command.name == "run" and rng.random() < 0.3:
        return "half-written checkpoint", half_written(place)
    seconds = rng.uniform(0, 1.5 if rng.random() < 1 / 3 else command.seconds)
    return f"{seconds:.2f} s", later(seconds)


def disturb(command, place, way, rng):
    "One stop, or one kill: what came of it."
    process = place.start(command.words)
    wait_for(lambda: has_begun(process), process)
    when, due = moment(command, place, way, rng)
    wait_for(due, process)
    number = rng.choice(STOPS) if way == "stop" else signal.SIGKILL
    below = [] if way == "stop" or rng.random() < 0.7 else [p for p in place.processes() if p.pid != process.pid]
    victim = rng.choice(below or [process])
    try: os.kill(victim.pid, number)
    except ProcessLookupError: pass
    began = time.monotonic()
    try: code = process.wait(timeout=120)
    except subprocess.TimeoutExpired: code = None
    ended = time.monotonic() - began
    return {"command": command.name, "way": way, "signal": number.name,
            "to": "command" if victim is process else "child", "moment": when, "code": code,
            "seconds_to_end": round(ended, 2), "processes_left": place.alone()}


def is_right(row):
    "Whether a command ended as it should."
    if row["processes_left"] or row["code"] is None: return False
    if row["way"] == "stop": return row["code"] in (0, 75)
    return row["code"] in (0, -9) if row["to"] == "command" else row["code"] >= 0


@dataclass
class Tally:
    "What has come of it all."
    rows: list[dict] = field(default_factory=list)
    compared: int = 0
    different: list[str] = field(default_factory=list)
    temporary: list[str] = field(default_factory=list)

    def compare(self, command, place, whole):
        "Looks at the results of a command that has come to its end."
        found = command.results(place.folder)
        self.compared += 1
        self.different += [f"{command.name}: {name}" for name in whole.keys() | found.keys()
                           if name not in found or name not in whole or whole[name] != found[name]]
        self.temporary += [f"{command.name}: {path.relative_to(place.folder)}" for path in place.temporary()]


def torment(command, folder, ways, rng, tally):
    "One command, stopped and killed as often as asked for, and compared whenever it comes to its end."
    whole, place = undisturbed(folder/"whole", command), prepare(folder/"cut", command)
    for n, way in enumerate(ways, 1):
        tally.rows.append(disturb(command, place, way, rng))
        print(*tally.rows[-1].values(), "" if is_right(tally.rows[-1]) else said(place), sep="\t", flush=True)
        if tally.rows[-1]["code"] != 0 and n < len(ways): continue
        code = place.start(command.words).wait()  # the next call: goes on, or finds all done and sweeps
        if code: tally.different.append(f"{command.name} ended with {code}: {said(place)}")
        else: tally.compare(command, place, whole)
        for name in command.made: remove(place.folder/name)


def remove(path): shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def summary(tally):
    "The figures, in lines."
    count = Counter((row["way"], is_right(row)) for row in tally.rows)
    for way, what in (("stop", "stops that ended with 75 or 0"), ("kill", "kills that left no process behind")):
        yield f"{what}: {count[way, True]} of {count[way, True] + count[way, False]}"
    yield f"results compared: {tally.compared}; different: {', '.join(tally.different) or 'none'}"
    yield f"temporary files after the last call: {', '.join(tally.temporary) or 'none'}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stops", type=int, default=10)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--commands", default=",".join(command.name for command in COMMANDS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default=Path(__file__).with_suffix(".tsv"))
    asked = parser.parse_args()
    chosen = [command for command in COMMANDS if command.name in asked.commands.split(",")]
    for number in STOPS: signal.signal(number, signal.default_int_handler)  # heeded by what is started
    rng, tally = random.Random(asked.seed), Tally()
    ways = ["stop"] * asked.stops + ["kill"] * asked.kills
    rng.shuffle(ways)
    with tempfile.TemporaryDirectory(prefix="kill-often-") as folder:
        for n, command in enumerate(chosen):
            torment(command, Path(folder)/command.name, ways[n::len(chosen)], rng, tally)
    print(*summary(tally), sep="\n")
    with open(asked.out, "w", newline="") as file:
        writer = csv.DictWriter(file, tally.rows[0], delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(tally.rows)
    return int(not all(map(is_right, tally.rows)) or bool(tally.different or tally.temporary))


if __name__ == "__main__": raise SystemExit(main())
