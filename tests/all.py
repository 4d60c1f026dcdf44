"""Every check of the project, in the order in which a failure is cheapest: `python tests/all.py`."""
import hashlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = Path(sys.executable).parent
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
WORKERS = ["-n", str(min(CORES + 1, 8)), "--dist", "loadgroup", "--no-loadscope-reorder"]  # one more: some only wait
DRAW = "from carot.data import load_benchmark as load; load('glyphs'), load('plain_glyphs')"  # not each worker at once


def fingerprint(*patterns):
    "What the files hold that match."
    return {f: hashlib.sha256(f.read_bytes()).hexdigest() for p in patterns for f in sorted(ROOT.glob(p))}


def unchanged(command, *patterns):
    "Run a tool that rewrites files; fail and name them if it had anything to rewrite."
    before = fingerprint(*patterns)
    run(command)
    changed = [str(f.relative_to(ROOT)) for f, digest in fingerprint(*patterns).items() if before.get(f) != digest]
    if changed: sys.exit(f"`{command[0]}` changed {', '.join(changed)}: commit what it wrote")


def run(command):
    env = dict(os.environ, PATH=f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}", OMP_NUM_THREADS="1", MPLBACKEND="agg")
    result = subprocess.run(command, cwd=ROOT, env=env)
    if result.returncode: sys.exit(result.returncode)


STAGES = [  # the checks of one at once
    {"ruff finds nothing": lambda: run(["ruff", "check"])},
    {"the package is what the notebooks export": lambda: unchanged(["nbdev_export"], "carot/**/*.py")},
    {"types agree": lambda: run(["mypy"]),
     "the notebooks are clean": lambda: unchanged(["nbdev_clean"], "nbs/**/*.ipynb"),
     "README.md is made of nbs/index.ipynb": lambda: unchanged([sys.executable, "tests/readme.py"], "README.md"),
     "the benchmarks' images are drawn": lambda: run([sys.executable, "-c", DRAW])},
    {"every chapter executes, and the tests pass": lambda: run(
        [sys.executable, "-m", "pytest", "-rs", "--durations", "15", *WORKERS, *sys.argv[1:]])}]


def timed(what, check):
    "Seconds of a check."
    start = time.time()
    print(f"== {what}", flush=True)
    check()
    return time.time() - start


def main():
    seconds = {}
    for stage in STAGES:
        with ThreadPoolExecutor(CORES) as pool: begun = {what: pool.submit(timed, what, stage[what]) for what in stage}
        seconds |= {what: done.result() for what, done in begun.items()}
    print("", *(f"{taken:6.0f} s  {what}" for what, taken in seconds.items()), sep="\n")


if __name__ == "__main__": main()
