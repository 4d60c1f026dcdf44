"""The table of figures: `python tests/hard/table.py` runs the hard tests and counts; kills and stops are those that
`python speed/kill_often.py --stops 50 --kills 200` has counted last (speed/kill_often.tsv), if it has.

With patterns only some lines: `python tests/hard/table.py inputs changed`. The exit code is 1 if a line is not full."""
import csv
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent
KILLED = TESTS.parent/"speed"/"kill_often.tsv"
LINES = {  # what is counted: files of tests, and a pattern of their names
    "bad inputs: one line or the right result": ("hard/test_inputs.py", "test_row"),
    "words of any kind: read, or refused in one line (properties)": ("hard/test_parsers.py", ""),
    "files changed at random, 200 in twenty parts: no table changes unseen": ("hard/test_fuzz.py", ""),
    "changed data and weights: none unnoticed": ("hard/test_changed_data.py", ""),
    "hostile models and images: none executes, none hangs": ("test_hostile.py", ""),
    "names in HTML, Markdown, LaTeX, TSV, Slurm: none live": ("test_names.py", ""),
    "writers, readers, ten commands at once": ("hard/test_at_once.py", ""),
    "full, read-only, unlockable disks; closed streams": ("hard/test_disks.py", ""),
    "a command or a process that reads its images is killed": ("hard/test_loaders.py", ""),
}


class Count:
    "A plugin that counts how tests ended."
    def __init__(self): self.ended, self.bad = Counter(), []

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed": self.ended[report.outcome] += 1
        if report.outcome == "failed": self.bad.append(report.nodeid.partition("::")[2])


def count(file, pattern):
    "How many of the tests of a file passed, of how many; those that failed; how many this machine cannot do."
    counted = Count()
    quiet = open(os.devnull, "w")
    stdout, sys.stdout = sys.stdout, quiet
    every = ["-k", pattern, "-m", "long or not long", "-q", "-p", "no:cacheprovider", "--tb=no"]
    try: pytest.main([str(TESTS/file), *every], plugins=[counted])
    finally: sys.stdout = stdout
    right, wrong = counted.ended["passed"], counted.ended["failed"]
    return right, right + wrong, counted.bad, counted.ended["skipped"]


def killed():
    "Lines of the last count of kills and stops: what, how many were right, of how many."
    if not KILLED.exists(): return []
    with KILLED.open(newline="") as file: rows = list(csv.DictReader(file, delimiter="\t"))
    stops, kills = ([row for row in rows if row.get("way") == way] for way in ("stop", "kill"))
    ended = sum(row["code"] in ("0", "75") for row in stops)
    alone = sum(row["processes_left"] == "0" for row in stops + kills)
    counted = [("stops by a signal: 75 or 0", ended, len(stops)),
               ("stops and kills: no process left behind", alone, len(stops + kills))]
    return [(*line, [], 0) for line in counted if line[2]]


def main(*wanted):
    rows = [(what, *count(*line)) for what, line in LINES.items()
            if (TESTS/line[0]).exists() and (not wanted or any(word in what + line[0] for word in wanted))]
    rows += killed() if not wanted else []
    print("| what | as it should be |\n|---|---|")
    for what, right, of, _, skipped in rows:
        print(f"| {what} | {right} of {of}" + (f" ({skipped} cannot be tried here)" if skipped else "") + " |")
    for what, _, _, bad, _ in rows: print(*(f"not so ({what.partition(':')[0]}): {name}" for name in bad), sep="\n",
        end="")
    return int(any(right < of for _, right, of, *_ in rows))


if __name__ == "__main__": sys.exit(main(*sys.argv[1:]))
