"""What imports and `--help` cost: CPU and wall seconds of a fresh Python, beside `import torch`, in turns.

    python speed/imports.py [--turns 3] [--only carot.losses,report] [--out speed/imports.tsv]

Everything is measured once per turn, in the same order; medians are given. A module may cost what `import torch` costs
in the same turn and 0.2 s more, a `--help` 0.5 s of CPU: `goal` is what a row may cost, by the medians of this table.
CPU seconds are those of the process and its threads. On a machine that is shared wall seconds mean little.
"""
import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from carot.cli import COMMANDS
from carot.engine.devices import hardware

ROOT = Path(__file__).resolve().parent.parent
MODULES = ["torch", "carot", "carot.losses", "carot.calibration", "carot.evaluate", "carot.runs.records",
           *(f"carot.analysis.{file.stem}" for file in sorted(ROOT.glob("carot/analysis/[!_]*.py")))]
COLUMNS = ["what", "cpu_s", "wall_s", "goal_cpu_s", "met"]


def commands():
    "What is measured -> words of its command."
    found = {f"import {name}": [sys.executable, "-c", f"import {name}"] for name in MODULES}
    carot = [sys.executable, "-m", "carot"]
    return found | {"carot --help": [*carot, "--help"]} | {
        f"carot {name} --help": [*carot, name, "--help"] for name in COMMANDS}


def seconds(words):
    "CPU and wall seconds of a process."
    began = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    _, code, used = os.wait4(process.pid, 0)
    process.returncode = code
    if code: raise SystemExit(f"{' '.join(words)} ended with {code}")
    return used.ru_utime + used.ru_stime, time.perf_counter() - began


def measure(wanted, turns):
    "What -> median CPU and wall seconds; a first turn writes bytecode and reads files into memory."
    found = {what: [] for what in wanted}
    for turn in range(turns + 1):
        for what, words in wanted.items():
            one = seconds(words)
            if turn: found[what].append(one)
    return {what: [statistics.median(values) for values in zip(*pairs)] for what, pairs in found.items()}


def goal(what, torch):
    "CPU seconds that it may cost; None: no goal."
    if what.startswith("carot"): return 0.5
    return None if what == "import torch" else torch + 0.2


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", default="", help="parts of names, by commas; torch is always there")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".tsv"))
    asked = parser.parse_args()
    parts = [part for part in asked.only.split(",") if part]
    wanted = {what: words for what, words in commands().items()
              if not parts or what == "import torch" or any(part in what for part in parts)}
    found = measure(wanted, asked.turns)
    lines = []
    for what, (cpu, wall) in found.items():
        limit = goal(what, found["import torch"][0])
        shown = ("", "") if limit is None else (f"{limit:.2f}", "yes" if cpu <= limit else "no")
        lines.append([what, f"{cpu:.2f}", f"{wall:.2f}", *shown])
    if not parts:
        with open(asked.out, "w", newline="") as file:
            print(f"# {hardware()}; medians of {asked.turns} turns", file=file)
            csv.writer(file, delimiter="\t", lineterminator="\n").writerows([COLUMNS, *lines])
    for line in [COLUMNS, *lines]: print(*line, sep="\t")


if __name__ == "__main__": main()
