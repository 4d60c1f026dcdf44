"""A run that is killed often ends like one that is left alone.

    python speed/kill_often.py [--kills 20] [--seed 1] [--out speed/kill_often.tsv]

The run notebook's cells (CaRot on the built-in benchmark, 2 epochs, two sets and val evaluated after each, a checkpoint
every 3 steps) are executed in a process that is killed with -9: at random steps, at the sight of a half-written
checkpoint, at random times after the start, and in the evaluations after the first and the last epoch. Then they are
executed once more, undisturbed. Compared byte by byte with a run that was never killed: weights of student and teacher,
predictions, metrics.tsv, stats.tsv, and train.tsv without its column pairs_per_second. The exit code is 1 if anything
differs, or if the run was complete before it had been killed so often.
"""
import argparse
import csv
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import matplotlib
import nbformat
import torch

from carot import evaluate, train  # noqa: F401  # once, not in every child
from carot.analysis import tables  # noqa: F401  # once, not in every child
from carot.benchmarks import glyphs  # noqa: F401  # once, not in every child
from carot.runs.settings import notebook_path

SETTINGS = dict(method="carot", epochs=2, eval_every=1, eval_sets="Glyphs,GlyphsV2", workers=0, threads=1, device="cpu",
                checkpoint_every=3)


def execute(out):
    "The run notebook's code in this process."
    notebook = nbformat.read(notebook_path("fine_tune"), 4)
    parameters, *cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    scope = {"__name__": "__main__"}
    exec(parameters, scope)
    scope |= SETTINGS | {"out": str(out)}
    for cell in cells: exec(cell, scope)


def start(out):
    "A child that makes the run or goes on with it; what it says goes nowhere."
    child = os.fork()
    if child: return child
    code = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        execute(out)
        code = 0
    finally: os._exit(code)


def rows(run): return max(0, (run/"train.tsv").read_text().count("\n") - 1) if (run/"train.tsv").exists() else 0

def sets(run): return len(list((run/"predictions").glob("[!.]*")))

def written(file): return file.stat().st_mtime_ns if file.exists() else 0


def choose(late, step, total, rng):
    "Which kind of moment comes next; the last kills are in the evaluation at the end."
    if late or step > total - 10: return "evaluation"
    others = ["any"] * (step < total - 40) + ["first evaluation"] * (step <= total // 2)
    return rng.choice(["step", "checkpoint", *others])


def moment(kind, run, total, rng):
    "A function that tells whether it is time to kill."
    mark = run/("student/open_clip_model.safetensors" if kind == "evaluation" else "config.json")  # written just before
    began, before, first, trained, seen = time.monotonic(), written(mark), None, rows(run), set()
    delay, steps, parts = rng.uniform(0, 3), rng.randint(1, 5), rng.randint(1, 2)
    predicted = sets(run)
    wait_for_set = kind == "evaluation" and predicted < 2 and rng.random() < 0.5
    def due():
        nonlocal first, trained
        if wait_for_set: return sets(run) > predicted
        if kind == "any": return time.monotonic() - began > delay
        trained = min(trained, rows(run))  # on resuming, lost steps are dropped from the log
        if kind == "step": return rows(run) >= trained + steps
        if kind == "checkpoint":
            seen.update((run/"checkpoints"/"train").glob(".part-*"))
            return len(seen) >= parts
        ready = rows(run) == (total if kind == "evaluation" else total // 2)
        if ready and written(mark) != before: first = first or time.monotonic()
        return first is not None and time.monotonic() - first > 0.2 + delay / 3
    return due


def results(run):
    "What must be the same: bytes by file."
    files = {str(file.relative_to(run)): file.read_bytes() for folder in ("student", "teacher", "predictions")
             for file in sorted((run/folder).iterdir())}
    files |= {name: (run/name).read_bytes() for name in ("metrics.tsv", "stats.tsv")}
    return files | {"train.tsv": [line.rsplit("\t", 1)[0] for line in (run/"train.tsv").read_text().splitlines()]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default=Path(__file__).with_name("kill_often.tsv"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    matplotlib.use("agg")
    rng, table, folder = random.Random(asked.seed), [], Path(tempfile.mkdtemp(prefix="kill-often-"))
    code = os.waitstatus_to_exitcode(os.waitpid(start(folder/"whole"), 0)[1])
    whole = next((folder/"whole").rglob("config.json")).parent
    cut = folder/"cut"/whole.relative_to(folder/"whole")
    total, in_evaluation = rows(whole), max(1, asked.kills // 4)
    while len(table) < asked.kills and not code:
        kind = choose(asked.kills - len(table) <= in_evaluation, rows(cut), total, rng)
        child, due = start(folder/"cut"), moment(kind, cut, total, rng)
        while not due() and os.waitpid(child, os.WNOHANG) == (0, 0): time.sleep(0.0005)
        try: os.kill(child, signal.SIGKILL)
        except ProcessLookupError: break  # it came to its end before
        os.waitpid(child, 0)
        checkpoints = cut/"checkpoints"/"train"
        table.append({"kill": len(table) + 1, "moment": kind, "steps_logged": rows(cut),
                      "checkpoints": ",".join(str(int(path.name[5:])) for path in sorted(checkpoints.glob("step-*"))),
                      "half_written": len(list(checkpoints.glob(".*"))), "sets_predicted": sets(cut)})
        print(*table[-1].values(), sep="\t", flush=True)
    code = code or os.waitstatus_to_exitcode(os.waitpid(start(folder/"cut"), 0)[1])
    one, two = results(whole), results(cut)
    different = [name for name in one.keys() | two.keys() if one.get(name) != two.get(name)]
    print(f"{len(table)} kills, {total} steps, {len(one)} files compared: {', '.join(different) or 'none'} differ; "
          f"exit code of the last run {code}")
    with open(asked.out, "w", newline="") as file:
        writer = csv.DictWriter(file, table[0], delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    return int(bool(code or different or len(table) < asked.kills))


if __name__ == "__main__": raise SystemExit(main())
