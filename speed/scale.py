"""How time and memory grow: images, classes, batch, processes, runs, jobs of a sweep. Tables, plots, and a page.

    python speed/scale.py [--part images,classes,batch,processes,runs,sweep] [--again] [--minutes 4] [--write]

Each part takes one size after the other, from small to large, each in a process of its own, so that the memory of one
is not that of another; sizes that speed/scale/PART.tsv has already are kept, unless `--again` is said. A part ends
after `--minutes`; the same command goes on. `--write` makes plots and speed/scale.md of what the tables hold.

Nothing here has pixels, and no model is larger than it must be: the files of the training set are links to a few
empty ones, runs are simulated (`carot.analysis.simulated`), children of a sweep are fake. What is measured is carot's
own work: indices, heads, losses, metrics, records, the queue. CPU seconds are those of the process and its children
(`getrusage`), memory is resident memory beyond what there was after the imports.
"""
import argparse
import csv
import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage

FOLDER = Path(__file__).with_suffix("")
SIZES = {
    "images": (1_000, 10_000, 100_000, 1_281_167),
    "classes": (10, 100, 1_000, 10_000, 21_841),
    "batch": (32, 128, 512, 2_048, 8_192, 32_768),
    "processes": (1, 2, 4),
    "runs": (10, 100, 1_000, 10_000),
    "sweep": (10, 100, 1_000),
}


# What every point measures

def memory(name):
    "Resident memory of this process in MB: `VmRSS` now, `VmHWM` the most."
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6


def cpu():
    "CPU seconds of this process and of its children that have ended."
    return sum(used.ru_utime + used.ru_stime for used in map(getrusage, (RUSAGE_SELF, RUSAGE_CHILDREN)))


class Measure:
    "Collects figures of one size: CPU seconds and MB of what is done inside `with measure(name)`."
    def __init__(self): self.found = {}

    def __call__(self, name):
        self.name = name
        return self

    def __enter__(self):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # memory that is free anyway would be used without being seen
        Path("/proc/self/clear_refs").write_text("5")  # the mark of the most falls to what there is
        self.before, self.began, self.wall = memory("VmRSS"), cpu(), time.perf_counter()

    def __exit__(self, *_):
        self.found |= {f"{self.name} s": cpu() - self.began, f"{self.name} wall s": time.perf_counter() - self.wall,
                       f"{self.name} MB": max(0.0, memory("VmHWM") - self.before)}


# Images: the index of a training set without pixels

def link_images(train, n):
    "Class folders with `n` names in all: links to one empty file a class. Returns how many names are new."
    from carot.benchmarks.imagenet import wnids

    names, new = list(wnids()), 0
    for k, wnid in enumerate(names):
        folder = train/wnid
        folder.mkdir(parents=True, exist_ok=True)
        wanted, there = n // len(names) + (k < n % len(names)), len(os.listdir(folder))
        first = folder/f"{wnid}_0.JPEG"
        if not there: first.touch()
        for i in range(max(1, there), wanted): os.link(first, folder/f"{wnid}_{13 * i}.JPEG")
        new += wanted - there
    return new


def images(n, place):
    from carot.benchmarks.files import scan_classes
    from carot.benchmarks.imagenet import wnids
    from carot.data import EpochBatches
    from carot.runs.fingerprints import digest_of, identity_of

    measure = Measure()
    link_images(place/"train", n)
    with measure("list"): found = scan_classes(place/"train", wnids())
    assert len(found) == n
    with measure("epoch"):
        for _batch in EpochBatches(n, 512, seed=1, epoch=0): pass
    with measure("fingerprint"): digest_of(identity_of(found))
    inodes = len({entry.inode() for folder in os.scandir(place/"train") for entry in os.scandir(folder)})
    return measure.found | {"inodes": inodes + len(os.listdir(place/"train"))}


# Classes: head, predictions, metrics, class list

def classes(n, place):
    import numpy as np
    import torch

    from carot.clip import load_clip, zero_shot_head
    from carot.data import Benchmark
    from carot.evaluate import (Predictions, load_classes, metrics_table, read_predictions, save_classes,
                                save_predictions)

    torch.set_num_threads(1)
    measure, (clip, _, _, tokenizer) = Measure(), load_clip("glyphs")
    names, rng = [f"kind {i:05d}" for i in range(n)], np.random.default_rng(0)
    zero_shot_head(clip, tokenizer, names[:10], ["a {}."])  # loads code
    with measure("class list"):
        save_classes(place, Benchmark("many", names, ["a {}."], train=[], val=[], eval={}))
        assert load_classes(place).classnames == names
    with measure("head"): assert zero_shot_head(clip, tokenizer, names, ["a photo of a {}."]).shape[0] == n
    logits = torch.from_numpy(rng.normal(size=(1_000, n)).astype("float32"))
    predictions = Predictions(logits, torch.from_numpy(rng.integers(n, size=1_000)), True)
    with measure("predictions"):
        save_predictions(place/"set.safetensors", predictions)
        read_predictions(place/"set.safetensors")
    metrics_table({"small": Predictions(logits[:10], predictions.labels[:10], True)}, 512)
    with measure("metrics"): metrics_table({"set": predictions}, 512)
    return measure.found


# Batch: one step of CaRot, exactly, in micro-batches of 32

TOWER = {"embed_dim": 32, "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
         "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}}


def tiny_step(batch, micro_batch):
    "A step of CaRot with a very small model, the teacher in it, and the gradients it leaves."
    import torch

    from carot.clip import build_clip
    from carot.engine.devices import make_accelerator
    from carot.engine.large_batches import Cut, backward_in_parts
    from carot.methods.base import Start, find_method, settings_of

    torch.manual_seed(0)
    clip, method = build_clip({"model_cfg": TOWER, "preprocess_cfg": {"size": 16}}), find_method("carot")
    *_, stage = method.stages(Start(clip, None, None, settings_of(method, {}, {})[0], 1000))
    images, labels = torch.randn(batch, 3, 16, 16), torch.zeros(batch, dtype=torch.long)
    tokens = torch.randint(1, 49000, (batch, 8))
    cut, accelerator = Cut(micro_batch_size=micro_batch), make_accelerator("cpu", "fp32")
    def step():
        clip.zero_grad()
        return backward_in_parts(stage.objective, accelerator, (images, tokens, labels), batch, cut, 1)
    return step


def batch(n, place):
    import torch

    torch.set_num_threads(1)
    tiny_step(64, 32)()  # loads code
    step, measure = tiny_step(n, 32), Measure()
    with measure("step"): step()
    return measure.found


# Processes: a step of CaRot on several of them, and what they say to one another through gloo

PAIRS, FLOATS = 256, 4_000_000  # of a batch; of a long message
MEMBER = """
import json, os, sys, time
import torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from scale import PAIRS, FLOATS, glyphs_step
torch.set_num_threads(1)
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
step, learned = glyphs_step(PAIRS, world, rank)
if world == 1: dist.init_process_group("gloo", init_method="tcp://127.0.0.1:" + sys.argv[2], rank=0, world_size=1)
def seconds(act, turns):
    act(); best = []
    for _ in range(turns):
        dist.barrier(); began = time.perf_counter(); act(); dist.barrier(); best.append(time.perf_counter() - began)
    return min(best)
own = torch.randn(PAIRS // world, 512)
parts, small, large = [torch.empty_like(own) for _ in range(world)], torch.zeros(1), torch.zeros(FLOATS)
found = {"step s": seconds(step, 5), "gather s": seconds(lambda: dist.all_gather(parts, own), 30),
         "short sum s": seconds(lambda: dist.all_reduce(small), 30),
         "long sum s": seconds(lambda: dist.all_reduce(large), 9), "weights": learned}
if not rank: print(json.dumps(found), flush=True)
"""


def glyphs_step(pairs, processes, rank):
    "One process's part of a step of CaRot with the glyphs model; how many weights are trained."
    import torch

    from carot.clip import load_clip
    from carot.engine.devices import make_accelerator
    from carot.engine.large_batches import Cut, backward_in_parts
    from carot.methods.base import Start, find_method, settings_of

    accelerator, (clip, *_), method = make_accelerator("cpu", "fp32"), load_clip("glyphs"), find_method("carot")
    *_, stage = method.stages(Start(clip, None, None, settings_of(method, {}, {})[0], 1000))
    size, own = clip.config["preprocess_cfg"]["size"], pairs // processes
    size = size if isinstance(size, int) else size[0]
    batch = torch.randn(own, 3, size, size), torch.randint(1, 49000, (own, 8)), torch.zeros(own, dtype=torch.long)
    cut = Cut(processes=processes, index=rank)
    def step():
        clip.zero_grad()
        backward_in_parts(stage.objective, accelerator, batch, pairs, cut, 1)
    return step, sum(p.numel() for p in stage.objective.trained())


def processes(n, place):
    from carot.runs.jobs import free_port, team_variables

    words = [sys.executable, "-c", MEMBER, str(FOLDER.parent), str(free_port())]
    team = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, **variables})
            for variables in team_variables(n)]
    said = [member.communicate()[0] for member in team]
    return json.loads(next(text for text in said if text))


# Runs: what reads a folder of results

METHODS = ("lp", "ft", "lp-ft", "flyp", "carot")


def grid_of(n):
    "Runs as sweeps leave them: first those of a comparison (zs, five methods, three seeds), then a grid around it."
    from itertools import product

    yield "zs", 1, {}
    for method, seed in product(METHODS, (1, 2, 3)): yield method, seed, {}
    points = product((3, 2, 1), (1e-4, 2e-4, 5e-4, 2e-3, 3e-3), (0.05, 0.2, 0.3, 0.4), (0.0, 0.02, 0.1), METHODS,
                     range(1, 13))
    for epochs, lr, decay, smoothing, method, seed in points:
        yield method, seed, {"epochs": epochs, "lr": lr, "weight_decay": decay, "label_smoothing": smoothing}


def job_of(out, method, seed, asked):
    from carot.methods.base import find_method
    from carot.runs.jobs import job_for

    known = {name: value for name, value in asked.items() if find_method(method).uses(name)}
    return job_for({"method": method, "seed": seed, "benchmark": "glyphs", "out": str(out), **known})


def make_runs(out, n):
    "Complete, sealed runs on the glyphs benchmark with small predictions; files of equal content are links to one."
    from itertools import islice

    from carot.analysis.simulated import simulate_config, simulate_run
    from carot.runs.fingerprints import look_once
    from carot.runs.records import Run, made_from, versions

    jobs, models = [], {}
    with look_once():
        for method, seed, asked in islice(grid_of(n), n):
            job = job_of(out, method, seed, asked)
            jobs.append(job)
            if job.path.exists(): continue
            key = method, seed
            if key not in models:
                models[key] = simulate_run(out.parent/"models", method, seed, 2.5 + METHODS.index(method) / 9
                                           if method in METHODS else 2.4, n=200)
                (models[key]/"run.ipynb").write_text("{}")
            partial = job.path.with_name(f".{job.path.name}")
            shutil.rmtree(partial, ignore_errors=True)  # of a call that was stopped
            shutil.copytree(models[key], partial, copy_function=os.link)
            (partial/"config.json").unlink()
            config = simulate_config(method, seed, "glyphs", {}, False)
            config |= {"parameters": job.parameters, "versions": versions(), **made_from(job.resolved)}
            Run(partial, job.parameters, config).finish()
            os.replace(partial, job.path)
    return jobs


def runs(n, place):
    import pandas  # noqa: F401  imports are no part of what is measured, but for whole commands
    import torch  # noqa: F401

    from carot.analysis.claims import Evidence, claims_table
    from carot.analysis.tables import collect
    from carot.runs.fingerprints import look_once
    from carot.runs.jobs import is_complete
    from carot.runs.records import all_runs

    out = place/f"{n}"/"results"
    jobs, measure = make_runs(out, n), Measure()
    assert len({job.path for job in jobs}) == n
    with look_once():
        is_complete(jobs[0])  # draws glyphs, loads code
    with look_once(), measure("is_complete"): assert all(map(is_complete, jobs))
    with measure("list"): assert len(all_runs(out, "glyphs")) == n
    with measure("tables"): collect(out, "glyphs")
    with measure("claims table"): claims_table(out, "glyphs", evidence=Evidence(samples=200))
    for command in ("report", "claims"):
        with measure(f"carot {command}"):
            words = [sys.executable, "-m", "carot", command, "--benchmark=glyphs", f"--out={out}"]
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return measure.found


# Sweep: the loop that waits for runs

def sweep(n, place):
    "A queue of n runs, eight at once, with children that only sleep; CPU of the loop as a share of one core."
    from itertools import islice
    from unittest import mock

    import torch  # noqa: F401  the first look for GPUs would import it

    from carot.engine.signals import StopSignals
    from carot.runs import jobs as runner

    class Sleeper:
        code = None
        process = mock.Mock()

        def __init__(self): self.due = time.monotonic() + 10.0

    class Terminal:
        "Says it is a terminal, so that the screen is drawn; shows nothing."
        def write(self, text): return len(text)
        def flush(self): pass
        def isatty(self): return True

    def start(job, *_):
        job.team, job.began = [Sleeper()], time.monotonic()

    out, shares = place/"results", {}
    planned = [job_of(out, *point) for point in islice(grid_of(n), n)]
    log = "stage\tstep\tloss\n" + "train\t1\t2.5\n" * 10_000
    for job in planned[:8]:
        job.path.mkdir(parents=True, exist_ok=True)
        (job.path/"train.tsv").write_text(log)
        (job.path/"config.json").write_text('{"steps": 20000}')
    for shown in ("file", "terminal"):
        queue = runner.Queue("fine_tune", list(planned), 8, StopSignals())
        screen, said = runner.Screen(), sys.stdout
        with mock.patch.object(runner, "start", start):
            if shown == "terminal": sys.stdout = Terminal()
            else: sys.stdout = open(os.devnull, "w")
            try:
                began, used = time.monotonic(), cpu()
                while time.monotonic() < began + 8:
                    runner.start_next(queue)
                    screen.draw(planned, queue.active, len(queue.waiting))
                    time.sleep(0.2)
                    runner.collect(queue, screen)
                shares[f"{shown} % of a core"] = 100 * (cpu() - used) / (time.monotonic() - began)
            finally: sys.stdout = said
    return shares


# The page

TITLES = {
    "images": "Images of the training set", "classes": "Classes", "batch": "Images of a batch, exactly",
    "processes": "Processes", "runs": "Runs in the folder of results", "sweep": "Jobs of a sweep"}
WORDS = {
    "images": "Class folders are listed, an epoch is shuffled and cut into batches of 512, and the fingerprint of the "
              "data is taken: names, sizes, labels, and the content of 256 files. The files are links to 1,000 empty "
              "ones, so that they cost names and no inodes; on a disk with pixels each file has an inode of its own.",
    "classes": "One prompt a class for the zero-shot head of the glyphs model; logits of 1,000 images saved and read; "
               "all metrics of them; the list of classes written, read and checked.",
    "batch": "The gradients of one step of CaRot, teacher and all, in micro-batches of 32, with a model of 1.6 million "
             "weights (nearly all of them embeddings of tokens). The towers take linear time and the memory of one "
             "micro-batch. The loss is over all pairs of the batch: its time grows with the square, its memory does "
             "not, because above 4,096 pairs the tables are made block by block (`carot.losses.Table`).",
    "processes": "A step of CaRot with the glyphs model, 256 pairs in all, over gloo; more processes than cores take "
                 "turns. Then the same from parts: computation, divided by the processes, and messages as measured: "
                 "a ring's 2 (P - 1)/P of the gradients' bytes, and a wait for each message.",
    "runs": "A comparison (zero-shot, five methods, three seeds) and grids of sweeps around it, sealed records with "
            "predictions of 5 x 200 images. `carot report` and `carot claims` are whole commands: imports, kernel, "
            "figures and page are the same for any number of runs, and most of it.",
    "sweep": "Planned runs, eight of them at once, whose children only sleep; each has a log of 10,000 steps. The "
             "loop's CPU time over eight seconds, as a share of one core, into a file and onto a terminal.",
}
GOALS = {"runs": [("is_complete s", 10), ("carot report s", 10), ("carot claims s", 10)],
         "sweep": [("file % of a core", 1), ("terminal % of a core", 1)]}


def law(rows, name):
    "The exponent of growth between the largest sizes: the slope of the last third of the way, in logarithms."
    import numpy as np

    points = [(size, found[name]) for size, found in sorted(rows.items()) if found[name] > 0]
    points = points[-3:] if len(points) > 3 else points
    if len(points) < 2: return None
    return float(np.polyfit(*np.log(points).T, 1)[0])


def shown(value):
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def in_rows(part, rows):
    "A Markdown table: a row for each size, and one for the laws."
    names = [name for name in next(iter(rows.values())) if not name.endswith("wall s")]
    def cell(name):
        exponent = law(rows, name)
        return "" if exponent is None else f"n^{exponent:.2f}"
    lines = [["size", *names], ["---:"] * (1 + len(names)),
             *([f"{size:,}", *(shown(rows[size][name]) for name in names)] for size in sorted(rows)),
             *([] if part == "processes" or len(rows) < 2 else [["**growth**", *map(cell, names)]])]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(part, rows):
    "Seconds and megabytes against the size, as SVG."
    import matplotlib as mpl
    from matplotlib.figure import Figure

    kinds = {" s": "CPU seconds", " MB": "MB beyond the imports", " % of a core": "% of a core"}
    names = [name for name in next(iter(rows.values())) if not name.endswith("wall s")]
    there = {end: [name for name in names if name.endswith(end)] for end in kinds}
    there = {end: found for end, found in there.items() if found}
    figure = Figure(figsize=(4.6 * len(there), 3.4), layout="constrained")
    for ax, (end, found) in zip(figure.subplots(1, len(there), squeeze=False)[0], there.items()):
        for name, marker in zip(found, "osd^vP*X"):
            sizes = [size for size in sorted(rows) if rows[size][name] > 0]
            ax.plot(sizes, [rows[size][name] for size in sizes], marker=marker, label=name.removesuffix(end))
        ax.set(xscale="log", yscale="log", xlabel=TITLES[part].lower(), ylabel=kinds[end])
        if part == "processes": ax.set_ylabel("wall seconds")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8)
    with mpl.rc_context({"svg.hashsalt": "carot"}):
        figure.savefig(FOLDER/f"{part}.svg", metadata={"Date": None})


def verdicts(part, rows):
    "What of the goals is met at the largest size."
    most = max(rows)
    words = [f"{name.removesuffix(' s')} {shown(rows[most][name])}{' s' * name.endswith(' s')} at {most:,} "
             f"(goal: under {limit}: {'met' if rows[most][name] < limit else '**missed**'})"
             for name, limit in GOALS.get(part, [])]
    return "; ".join(words) + "." if words else ""


def simulated(rows, most=64):
    "Seconds of a step on 1 to 64 processes from what one and two need, as a Markdown table."
    one, two, weights = rows[1], rows[2], 149_620_737
    wait, speed = two["short sum s"], 4 * FLOATS / max(1e-9, two["long sum s"] - two["short sum s"])  # bytes a second
    def messages(count, floats, rows_floats):
        share, hops = (count - 1) / count, (count - 1).bit_length()  # seven messages
        return 7 * wait * hops + (2 * 4 * floats + 4 * 4 * rows_floats) * share / speed
    lines = ["| processes | glyphs, 256 pairs: step s | measured | speed-up | ViT-B/16, 512 pairs, computed GPU: s | "
             "of it messages |", "|---:|---:|---:|---:|---:|---:|"]
    for count in (1, 2, 4, 8, 16, 32, 64):
        small = one["step s"] / count + messages(count, one["weights"], PAIRS * 64)
        said = messages(count, weights, 512 * 512)
        large = 512 / 3714 / count + said
        real = f"{rows[count]['step s']:.3f}" if count in rows else ""
        lines.append(f"| {count} | {small:.3f} | {real} | {one['step s'] / small:.1f} | {large:.2f} | "
                     f"{100 * said / large:.0f} % |")
    return "\n".join([f"Through gloo here: {speed / 1e9:.2f} GB/s, {1e6 * wait:.0f} µs a short message.", "", *lines])


LOADER = (
    "Simulated (`python speed/loader.py`): ViT-B/16 at {rate:,.0f} images a second and GPU, which is CaRot at 55 % of "
    "the bf16 peak (speed/plan.tsv, computed), a batch of 512 over all GPUs, {cores} cores for all, of which each "
    "GPU's process has one; an image costs {original} ms from an original JPEG, {shrunk} ms from one that "
    "`carot shrink` made small (speed/decode.tsv, and what the data set does beside).")


def loader_lines():
    "The loader's simulation: best rates on the cores there are, and how many a GPU needs."
    file = FOLDER.with_name("loader.tsv")
    if not file.exists(): return []
    with open(file, newline="") as opened: lines = opened.read().splitlines()
    facts = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# ") and ": " in line)
    rows = list(csv.DictReader((line for line in lines if not line.startswith("#")), delimiter="\t"))
    tried = [row for row in rows if row["what"] == "simulated"]
    fewest = {(row["files"], row["gpus"]): row["cores"] for row in rows if row["what"] == "fewest cores"}
    draw_loader(tried)
    found = ["| files | GPUs | images/s and GPU, best number of workers | GPU waits | cores for no wait |",
             "|:---|---:|---:|---:|---:|"]
    for kind, gpus in dict.fromkeys((row["files"], row["gpus"]) for row in tried):
        best = max((row for row in tried if (row["files"], row["gpus"]) == (kind, gpus)),
                   key=lambda row: (float(row["images_per_s"]), -int(row["workers_per_gpu"])))
        need = fewest[kind, gpus]
        rate = float(best["images_per_s"]) / int(gpus)
        found.append(f"| {kind} | {gpus} | {rate:,.0f} with {best['workers_per_gpu']} | "
                     f"{100 * float(best['waits']):.0f} % | {need} |")
    words = {kind: facts[f"{kind} image"].split()[0] for kind in ("original", "shrunk")}
    said = LOADER.format(rate=float(facts["GPU"].split()[0]), cores=tried[0]["cores"], **words)
    most = {kind: max((int(gpus) for (files, gpus), cores in fewest.items() if files == kind and int(cores) <= 16))
            for kind in words}
    whole, scaled = facts["decoding, whole"].split(", "), facts["decoding, scaled"].split(", ")
    return ["## Loader", "", said, "", *found, "",
            "![Loader: images per second and GPU against workers](scale/loader.svg)", "",
            f"A GPU needs {fewest['original', '1']} cores with originals, {fewest['shrunk', '1']} with images made "
            f"small: on 16 cores up to {most['original']} and {most['shrunk']} GPUs never wait for their loaders. With "
            "more of them `carot shrink` comes first, cores second. Scaled decoding, which would make shrinking "
            "superfluous, is no way: for 500 x 375 pixels the smallest scale that covers a crop takes as long "
            f"({scaled[0]} against {whole[0]} an image here) and gives other pixels ({scaled[-1]}).", ""]


def draw_loader(rows):
    "Images per second and GPU against workers, as SVG."
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 3.2), layout="constrained")
    for ax, kind in zip(figure.subplots(1, 2, sharey=True), dict.fromkeys(row["files"] for row in rows)):
        for gpus, marker in zip(dict.fromkeys(row["gpus"] for row in rows), "osd^vP"):
            own = [row for row in rows if row["files"] == kind and row["gpus"] == gpus]
            ax.plot([int(row["workers_per_gpu"]) for row in own],
                    [float(row["images_per_s"]) / int(gpus) for row in own], marker=marker, label=f"{gpus} GPUs")
        ax.set(title=f"{kind} images, 16 cores", xlabel="workers per GPU", xscale="log", ylim=(0, None))
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("images per second and GPU")
    figure.axes[0].legend(frameon=False, fontsize=8)
    with mpl.rc_context({"svg.hashsalt": "carot"}): figure.savefig(FOLDER/"loader.svg", metadata={"Date": None})


def write_page():
    "Plots of all tables, and the page."
    from carot.core import write_atomic
    from carot.engine.devices import hardware

    parts = ["# How carot grows", "", f"{hardware()}. `python speed/scale.py` measures, `--write` makes this page of "
             "the tables. CPU seconds; growth is the exponent of the three largest sizes: 1 is linear, 0 is flat. "
             "**Other work shared the machine**: CPU seconds are up to a half too many, and wall seconds, which only "
             "the processes have, mean little where they outnumber free cores.", ""]
    for part in PARTS:
        rows = read(part)
        if not rows: continue
        draw(part, rows)
        parts += [f"## {TITLES[part]}", "", WORDS[part], "", in_rows(part, rows), "",
                  f"![{TITLES[part]}: time and memory against size](scale/{part}.svg)", ""]
        if part == "processes": parts += [simulated(rows), ""]
        if part == "runs" and read("runs_before"):
            parts += ["Before reports and claims looked at their own runs only, and imports waited for their use "
                      "(between commits 45ec7ea and 3f8e78f):", "", in_rows(part, read("runs_before")), ""]
        if verdicts(part, rows): parts += [verdicts(part, rows), ""]
    parts += loader_lines()
    write_atomic(FOLDER.with_suffix(".md"), "\n".join(parts).rstrip() + "\n")


# The driver

PARTS = {"images": images, "classes": classes, "batch": batch, "processes": processes, "runs": runs, "sweep": sweep}


def read(part):
    "The rows of a table that is there: size -> figures."
    file = FOLDER/f"{part}.tsv"
    if not file.exists(): return {}
    with open(file, newline="") as opened: rows = list(csv.DictReader(opened, delimiter="\t"))
    return {int(row["size"]): {name: float(value) for name, value in row.items() if name != "size"} for row in rows}


def write(part, rows):
    from carot.core import write_atomic

    names = list(next(iter(rows.values())))
    lines = [["size", *names], *([size, *(f"{rows[size][name]:.6g}" for name in names)] for size in sorted(rows))]
    write_atomic(FOLDER/f"{part}.tsv", "".join("\t".join(map(str, line)) + "\n" for line in lines))


def make_part(part, again, minutes, place):
    "Measures the sizes that are missing, each in a process of its own, until time is over."
    rows, began = {} if again else read(part), time.monotonic()
    for size in SIZES[part]:
        if size in rows: continue
        if time.monotonic() - began > 60 * minutes: return print(f"{part}: {size:,} and more next time")
        words = [sys.executable, __file__, "--point", part, str(size), str(place/part)]
        made = subprocess.run(words, stdout=subprocess.PIPE, text=True)
        if made.returncode: return print(f"{part}: {size:,} failed with code {made.returncode}")
        rows[size] = json.loads(made.stdout.splitlines()[-1])
        write(part, rows)
        print(part, size, *(f"{name} {value:.4g}" for name, value in rows[size].items()), sep="  ", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default=",".join(PARTS))
    parser.add_argument("--again", action="store_true", help="measure sizes that the tables have already")
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--place", type=Path, help="folder for files, kept; none: a temporary one")
    parser.add_argument("--write", action="store_true", help="plots and page from the tables")
    parser.add_argument("--point", nargs=3, metavar=("PART", "SIZE", "PLACE"), help="one size, here: figures as JSON")
    asked = parser.parse_args()
    if asked.point:
        part, size, place = asked.point
        Path(place).mkdir(parents=True, exist_ok=True)
        return print(json.dumps(PARTS[part](int(size), Path(place))))
    if asked.write: return write_page()
    with tempfile.TemporaryDirectory() as folder:
        for part in asked.part.split(","): make_part(part, asked.again, asked.minutes, asked.place or Path(folder))


if __name__ == "__main__": main()
