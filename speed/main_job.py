"""The main job: `carot reproduce`, six methods, one seed, glyphs; CPU and wall seconds of all its processes, by part.

    python speed/main_job.py                                # the whole, and the parts of one run per method
    python speed/main_job.py --no-parts --rounds 3 --trees ../carot-before .     # two checkouts, in turns
    python speed/main_job.py --no-whole --methods flyp --profile flyp.prof       # for python -m pstats

Whole: a fresh folder, the installed carot (or a checkout, by PYTHONPATH). CPU seconds are those of all processes that
have ended (getrusage); wall seconds mean something on a quiet machine only. Parts: the cells of the run notebook and of
the report, one after the other in a process of their own, in CPU seconds. Rows are appended to --out.
"""
import argparse
import cProfile
import csv
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat

PARTS = {  # what a cell has in it -> what it is part of; the first one counts
    "fine_tune(": "training", "predict_sets(": "evaluation", "load_benchmark(": "model and data",
    "\nimport ": "imports", "import pandas": "imports", "plt.": "figures", "write_figure(": "figures",
    "claims.": "intervals", "run.finish(": "what is kept"}


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="zs,lp,ft,lp-ft,flyp,carot")
    parser.add_argument("--settings", default="", help='of every run, as in carot reproduce: "epochs=1"')
    parser.add_argument("--jobs", type=int, help="runs at once; the default is carot's")
    parser.add_argument("--trees", nargs="*", default=[None], help="checkouts to compare; none: the installed carot")
    parser.add_argument("--rounds", type=int, default=1, help="of the whole")
    parser.add_argument("--no-whole", dest="whole", action="store_false")
    parser.add_argument("--no-parts", dest="parts", action="store_false")
    parser.add_argument("--profile", help="file for cProfile, with one method")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".tsv"))
    parser.add_argument("--cells", nargs=3, metavar=("NOTEBOOK", "METHOD", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args()


def measured(words, tree):
    "CPU and wall seconds of a command with everything that it starts."
    environment = os.environ | ({"PYTHONPATH": str(Path(tree).resolve())} if tree else {})
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *words], env=environment, check=True, cwd=tempfile.gettempdir())
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def whole(asked, tree, folder):
    "The job in a fresh folder."
    more = [f"--jobs={asked.jobs}"] if asked.jobs else []
    words = ["-m", "carot", "reproduce", "--methods", asked.methods, "--out", folder, "--no-preflight", *more]
    return measured([*words, "--settings", asked.settings], tree)


def cells(notebook, method, folder, settings, profile):
    "Executes a notebook's cells here; CPU seconds of each part."
    import builtins

    from carot.config import parse_settings
    from carot.methods.base import all_methods, find_method
    from carot.runs.jobs import used_by
    from carot.runs.settings import known_settings, notebook_path

    builtins.display = lambda *shown, **named: None
    space, seconds = {"__name__": "__main__"}, {}
    profiler = cProfile.Profile() if profile else None
    given = {"out": folder} | ({"method": method} if method else {})
    if method: given |= used_by(find_method(method), parse_settings(settings, known_settings(all_methods().values())))
    for number, cell in enumerate(c for c in nbformat.read(notebook_path(notebook), 4).cells if c.cell_type == "code"):
        text = cell.source if number else cell.source + "".join(f"\n{name} = {given[name]!r}" for name in given)
        part = next((part for words, part in PARTS.items() if number and words in f"\n{cell.source}"), "rest")
        began = time.process_time()
        if profiler: profiler.enable()
        exec(compile(text, f"{notebook}, cell {number}", "exec"), space)
        if profiler: profiler.disable()
        seconds[part] = seconds.get(part, 0) + time.process_time() - began
    if profiler: profiler.dump_stats(profile)
    for part, used in seconds.items(): print(f"PART\t{part}\t{used:.2f}")


def parts(asked, tree, notebook, method, folder):
    "The same in a process of its own."
    environment = os.environ | {"MPLBACKEND": "agg"} | ({"PYTHONPATH": str(Path(tree).resolve())} if tree else {})
    words = [sys.executable, __file__, "--cells", notebook, method, folder, "--settings", asked.settings]
    if asked.profile: words += ["--profile", asked.profile]
    said = subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {line.split("\t")[1]: float(line.split("\t")[2]) for line in said.splitlines() if line.startswith("PART\t")}


def rows(asked):
    "Every measurement: checkout, what, part, CPU seconds, wall seconds."
    for _ in range(asked.rounds if asked.whole else 0):
        for tree in asked.trees:
            with tempfile.TemporaryDirectory() as folder:
                yield tree, "carot reproduce", "all", *whole(asked, tree, folder)
    for tree in asked.trees if asked.parts else []:
        with tempfile.TemporaryDirectory() as folder:
            jobs = [("fine_tune", method) for method in asked.methods.split(",")]
            if len(jobs) > 1: jobs.append(("report", ""))
            for notebook, method in jobs:
                for part, used in parts(asked, tree, notebook, method, folder).items():
                    yield tree, method or notebook, part, used, ""


def main():
    asked = parse()
    if asked.cells: return cells(*asked.cells, asked.settings, asked.profile)
    from carot.engine.devices import hardware

    new = not asked.out.exists()
    with asked.out.open("a", newline="") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        if new: table.writerow(["checkout", "what", "part", "cpu_s", "wall_s", "methods", "jobs", "hardware"])
        for tree, what, part, used, wall in rows(asked):
            name = Path(tree).resolve().name if tree else "installed"
            wall = f"{wall:.1f}" if wall else ""
            table.writerow([name, what, part, f"{used:.2f}", wall, asked.methods, asked.jobs or "default", hardware()])
            file.flush()
            print(f"{name}  {what}  {part}: CPU {used:.1f} s" + (f", wall {wall} s" if wall else ""), flush=True)


if __name__ == "__main__": main()
