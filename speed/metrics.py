"""What metrics, temperatures and bootstrap intervals cost on a set of ImageNet's size, and whether the numbers agree.

    python speed/metrics.py [--images 50000] [--classes 1000] [--samples 1000] [--rounds 5] [--before calibration.py]

Seconds of CPU on one core, the fastest of the rounds, in which all programs take turns in one process: carot, an older
carot/calibration.py if one is given, torchmetrics and netcal where they are installed and have the metric. The row
"all metrics" is carot's eleven, checked once, against what the others have of them. "difference" is the largest one
between carot's number (or any resample's) and another program's; torchmetrics computes ECE in float32. Writes --out as
TSV.
"""
import argparse
import csv
import importlib.metadata
import importlib.util
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from carot import calibration
from carot.engine.devices import hardware

BOOTSTRAPPED = ("ece", "nll", "brier", "adaptive_ece")
BATCH_SIZE = 256  # of the batched ECE


def simulate(n, classes):
    "float32 logits as of a good classifier that is sure of itself, and labels."
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 4, (n, classes)).astype(np.float32)
    likely = rng.integers(classes, size=n)
    logits[np.arange(n), likely] += 24 + rng.normal(0, 6, n).astype(np.float32)
    return logits, np.where(rng.random(n) < 0.8, likely, rng.integers(classes, size=n))


def older(file):
    "The module in a file, as it was, under another name."
    spec = importlib.util.spec_from_file_location("carot.before", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of_torchmetrics(probs, labels):
    "Those of our metrics that it has."
    from torchmetrics.functional import classification as tm
    p, y, c = torch.from_numpy(probs), torch.from_numpy(labels), probs.shape[1]
    return {"accuracy": lambda: tm.multiclass_accuracy(p, y, c, average="micro"),
            "ece": lambda: tm.multiclass_calibration_error(p, y, c, n_bins=10, norm="l1"),
            "macro_f1": lambda: tm.multiclass_f1_score(p, y, c, average="macro"),
            "auroc": lambda: tm.binary_auroc(p.amax(1), (p.argmax(1) == y).long())}


def of_netcal(probs, labels):
    from netcal.metrics import ECE
    return {"ece": lambda: ECE(10).measure(probs, labels)}


def of_carot(module, probs, labels):
    return {name: partial(metric.for_batches(BATCH_SIZE), probs, labels) for name, metric in module.METRICS.items()}


def in_turn(functions, checked=()):
    "All results of one program, as one function; carot's may be told that the arrays are the same for all."
    def call():
        if not checked: return [function() for function in functions.values()]
        with calibration.checked_once(*checked): return [function() for function in functions.values()]
    return call


def others(probs, labels):
    "Program -> its metrics, of those that are installed."
    programs = {"torchmetrics": of_torchmetrics, "netcal": of_netcal}
    return {name: make(probs, labels) for name, make in programs.items() if importlib.util.find_spec(name)}


def tasks(asked):
    "Task -> program -> function."
    logits, labels = simulate(asked.images, asked.classes)
    modules = {"carot": calibration} | ({"before": older(asked.before)} if asked.before else {})
    found = {}
    for kind in (np.float32, np.float64):
        values = logits.astype(kind, copy=False)
        found[f"fit_temperature, {kind.__name__}"] = {
            name: partial(module.fit_temperature, values, labels) for name, module in modules.items()}
    probs = calibration.softmax(logits)
    for metric in BOOTSTRAPPED:
        found[f"bootstrap of {metric}"] = {
            name: partial(module.bootstrap_values, module.METRICS[metric], probs, labels, asked.samples)
            for name, module in modules.items()}
    measured = {name: of_carot(module, probs, labels) for name, module in modules.items()} | others(probs, labels)
    for metric in calibration.METRICS:
        found[metric] = {name: functions[metric] for name, functions in measured.items() if metric in functions}
    found["all metrics"] = {name: in_turn(functions, (probs, labels) if name == "carot" else ())
                            for name, functions in measured.items()}
    return found


def timed(functions, rounds):
    "Program -> fewest seconds, program -> result, in turns."
    seconds, results = dict.fromkeys(functions, np.inf), {}
    for _ in range(rounds):
        for name, function in functions.items():
            began = time.process_time()
            results[name] = np.asarray(function(), dtype=float)
            seconds[name] = min(seconds[name], time.process_time() - began)
    return seconds, results


def total(what, rows, members):
    "A row of sums over some tasks."
    programs = {name for task in members for name in rows[task][0]}
    seconds = {name: sum(rows[task][0].get(name, 0) for task in members) for name in programs}
    return {what: (seconds, max(rows[task][1] for task in members))}


def main(asked):
    torch.set_num_threads(1)
    rows = {}
    for task, functions in tasks(asked).items():
        seconds, results = timed(functions, asked.rounds)
        same = [other for other in results.values() if other.shape == results["carot"].shape]
        rows[task] = seconds, max(float(np.abs(results["carot"] - other).max()) for other in same)
        print(task, {name: round(value, 3) for name, value in seconds.items()}, rows[task][1], flush=True)
    rows |= total("bootstrap, together", rows, [f"bootstrap of {metric}" for metric in BOOTSTRAPPED])
    write(rows, asked)


def machine():
    "Hardware and versions, in words."
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("numpy", "torch", "torchmetrics", "netcal")
                if importlib.util.find_spec(name)]
    return f"{hardware()}; {', '.join(versions)}; 1 thread"


def write(rows, asked):
    programs = [name for name in ("carot", "before", "torchmetrics", "netcal")
                if any(name in seconds for seconds, _ in rows.values())]
    where = machine()
    with open(asked.out, "w", newline="") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(["task", "images", "classes", *(f"{name}_s" for name in programs), "difference", "hardware"])
        for task, (seconds, difference) in rows.items():
            shown = [f"{seconds[name]:.2f}" if name in seconds else "" for name in programs]
            table.writerow([task, asked.images, asked.classes, *shown, f"{difference:.0e}", where])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=1000, help="resamples")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", type=Path, help="an older carot/calibration.py to compare with")
    parser.add_argument("--out", default=Path(__file__).with_suffix(".tsv"), type=Path)
    main(parser.parse_args())
