"""Does the loader keep up with the GPU? Its costs measured here, the rest simulated with recorded step times.

    python speed/loader.py [--images 48] [--rounds 5] [--out speed/loader.tsv]
    python speed/loader.py --check      # real loader processes on this machine beside the same simulation

Recorded: the time to decode and augment an image, original and made small by `carot shrink`, from speed/decode.tsv;
images a second of a step of ViT-B/16 at 55 % of the bf16 peak, from speed/plan.tsv. Nothing ran on a GPU.

Measured here, as CPU time on one thread, the least of several rounds: what `carot.data.CaptionedImages` does beside
that (seeds, random state, caption); the collation of a batch into shared memory; the copy of a batch in the main
process, which stands for the one into pinned memory (that needs CUDA: not measured); the time from making a
`DataLoader` to a first batch of two images. Also scaled decoding, which JPEG offers (a DCT of fewer points): its time,
and how far its 224-pixel images are from those of whole decoding.

Simulated (`Machine`): every process has its loader with some workers, each makes whole batches in turn and keeps two
ahead, batches are used in order, processes wait for one another in each step, and cores are shared when more work than
there are. One core per GPU is the main process's.
"""
import argparse
import csv
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from decode import make_files
from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2
from simplejpeg import decode_jpeg
from torch.utils.data import DataLoader, Dataset, default_collate

from carot.benchmarks.decode import fast, to_tensor
from carot.benchmarks.files import ImagePaths
from carot.data import Benchmark, CaptionedImages
from carot.engine.devices import hardware

HERE, BATCH, CORES = Path(__file__).parent, 512, 16
READ_AND_TRANSFORM = fast(image_transform_v2(PreprocessCfg(), is_train=True, aug_cfg=AugmentationCfg(scale=(0.9, 1.0))))
WORKERS, GPUS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32), (1, 2, 3, 4, 6, 8)
COLUMNS = ["what", "files", "gpus", "workers_per_gpu", "cores", "images_per_s", "of_the_gpus", "waits", "first_batch_s"]


# Measured

def least(act, rounds):
    "CPU seconds of the fastest round; the first warms up."
    seconds = []
    for _ in range(rounds + 1):
        began = time.process_time()
        act()
        seconds.append(time.process_time() - began)
    return min(seconds[1:])


def captioned(paths):
    "A training set of files, as a run of ImageNet reads it."
    read, transform = READ_AND_TRANSFORM
    images = ImagePaths(paths, [0] * len(paths), transform, read=read)
    return CaptionedImages(Benchmark("files", ["thing"], ["a photo of a {}."], images, [], {}), seed=1)


def start_seconds(images):
    "From making a loader with one process to a batch of two, wall time."
    began = time.perf_counter()
    next(iter(DataLoader(images, batch_sampler=[[(0, 0), (0, 1)]], num_workers=1)))
    return time.perf_counter() - began


def scaled(paths, rounds, size=224, shorter=0.9):
    "Whole and scaled decoding: CPU ms an image, and the mean difference of the 224-pixel images, of 255."
    crop = READ_AND_TRANSFORM[1].crop
    data = [path.read_bytes() for path in paths]
    least_side = round(size / shorter**0.5)  # of the image, so that the smallest crop is not enlarged
    ways = {"whole": {}, "scaled": {"min_height": least_side, "min_width": least_side},
            "fast DCT": {"fastdct": True}, "fast DCT and upsampling": {"fastdct": True, "fastupsample": True}}
    def cropped(content, way):
        torch.manual_seed(0)
        return crop(to_tensor(decode_jpeg(content, **way))).float()
    usual, found = [cropped(content, {}) for content in data], {}
    for name, way in ways.items():
        shape = decode_jpeg(data[0], **way).shape[:2]
        ms = 1000 * least(lambda way=way: [decode_jpeg(content, **way) for content in data], rounds) / len(data)
        gap = statistics.mean(float((cropped(one, way) - whole).abs().mean()) for one, whole in zip(data, usual))
        found[name] = f"{ms:.3f} ms, {shape[1]} x {shape[0]} pixels, off by {gap:.2f} of 255"
    return found


def measure(asked):
    "Costs: seconds per image by kind of file, and per batch."
    with tempfile.TemporaryDirectory() as folder:
        files, _ = make_files(Path(folder), asked.images)
        sets = {kind: captioned(paths) for kind, paths in files.items()}
        keys, (read, transform) = [(0, i) for i in range(asked.images)], READ_AND_TRANSFORM
        with_all = least(partial(sets["shrunk"].__getitems__, keys), asked.rounds)
        alone = least(lambda: [transform(read(path)) for path in files["shrunk"]], asked.rounds)
        beside = max(0.0, with_all - alone) / asked.images
        items = [(torch.zeros(3, 224, 224), "a photo of a thing.", 0, i) for i in range(64)]
        whole = torch.empty(64, 3, 224, 224).share_memory_()
        collate = least(lambda: torch.stack([x[0] for x in items], out=whole), asked.rounds) / 64
        collate += least(lambda: default_collate([x[1:] for x in items]), asked.rounds) / 64
        target = torch.empty(64, 3, 224, 224)
        copy = least(lambda: target.copy_(whole), asked.rounds) / 64
        start = min(start_seconds(sets["shrunk"]) for _ in range(asked.rounds))
        image = {kind: recorded + beside for kind, recorded in decoding().items()}
        return Costs(image, beside, collate, copy, start), scaled(files["original"], asked.rounds)


@dataclass
class Costs:
    "Seconds."
    image: dict[str, float]  # per image, by kind of file
    beside: float  # of it, what is not decoding and augmenting
    collate: float  # per image
    copy: float  # per image, in the main process's thread for pinned memory
    start: float  # of a worker


# Simulated

@dataclass
class Machine:
    "Processes with a GPU and loader processes each, on some cores."
    gpus: int
    workers: int  # of each GPU's process; at least 1
    cores: int
    rate: float  # images per second that a GPU could train on
    batch: int = BATCH  # images of a step, over all GPUs
    ahead: int = 2  # batches per worker

    def run(self, seconds_per_image, copy, start, steps=400):
        "Images per second of all, the share of time a GPU waits in a steady state, and seconds to the first step."
        own = self.batch / self.gpus  # images of a process and step
        wanted = self.gpus * (1 + min(self.workers, self.rate * seconds_per_image))  # cores, if nobody waited for one
        slower = 1.0 if wanted <= self.cores else self.gpus * (1 + self.workers) / self.cores  # then nobody rests
        make, copied = own * seconds_per_image * slower, own * copy * slower
        step = own / self.rate
        free = [start * slower] * self.workers  # when each worker can begin its next batch
        done, used, waited = [], [], []  # when batch i is made; when its step begins; how long that was waited for
        now = 0.0
        for i in range(steps):
            worker = i % self.workers
            begin = free[worker]
            before = i - self.ahead * self.workers  # its place in the queue is free when this one is taken
            if before >= 0: begin = max(begin, used[before])
            free[worker] = begin + make
            done.append(free[worker] + copied)
            ready = max(now, done[i])
            waited.append(ready - now)
            used.append(ready)
            now = ready + step
        half = steps // 2
        steady = used[-1] - used[half]
        return (steps - 1 - half) * self.batch / steady, sum(waited[half + 1:]) / steady, used[0]


def decoding():
    "Recorded seconds an image, decoded and augmented, by kind of file."
    with open(HERE/"decode.tsv", newline="") as file:
        rows = list(csv.DictReader((line for line in file if not line.startswith("#")), delimiter="\t"))
    return {row["file"]: float(row["ms_per_image"]) / 1000 for row in rows
            if row["decoder"] == "simplejpeg, tensor transform"}


def rates():
    "Images per second and GPU, all at once in bf16, from the recorded plan."
    with open(HERE/"plan.tsv", newline="") as file: rows = list(csv.DictReader(file, delimiter="\t"))
    return {row["method"]: float(row["images_per_s_at_55"]) for row in rows
            if row["path"] == "all at once" and row["precision"] == "bf16"}


def table(costs, rate):
    "Each number of workers and GPUs on 16 cores, then the fewest cores and workers with which a GPU never waits."
    rows = []
    for kind, seconds in costs.image.items():
        each = seconds + costs.collate
        for gpus in GPUS:
            for workers in WORKERS:
                images, waits, first = Machine(gpus, workers, CORES, rate).run(each, costs.copy, costs.start)
                rows.append(["simulated", kind, gpus, workers, CORES, f"{images:.0f}", f"{images / gpus / rate:.3f}",
                             f"{waits:.3f}", f"{first:.2f}"])
    for kind, seconds in costs.image.items():
        for gpus in GPUS:
            cores, workers = fewest(seconds + costs.collate, costs, gpus, rate)
            images, waits, first = Machine(gpus, workers, cores, rate).run(seconds + costs.collate, costs.copy,
                                                                           costs.start)
            rows.append(["fewest cores", kind, gpus, workers, cores, f"{images:.0f}", f"{images / gpus / rate:.3f}",
                         f"{waits:.3f}", f"{first:.2f}"])
    return rows


def fewest(each, costs, gpus, rate, most=0.01):
    "The fewest cores, and workers per GPU, with which GPUs wait for at most 1 % of the time."
    for workers in range(1, 200):
        cores = gpus * (workers + 1)
        if Machine(gpus, workers, cores, rate).run(each, costs.copy, costs.start)[1] <= most: return cores, workers
    raise SystemExit("no number of workers is enough")


# A check of the simulation by real processes

class Spinning(Dataset):
    "Items that take a known CPU time."
    def __init__(self, seconds): self.seconds = seconds

    def __len__(self): return 10**6

    def __getitem__(self, index):
        end = time.process_time() + self.seconds
        while time.process_time() < end: pass
        return torch.zeros(8)


def check(steps=60, batch=32, seconds=0.002):
    "A loader of one or two processes beside a step that sleeps: images per second, real and simulated."
    rows = []
    for workers in (1, 2):
        for rate in (250, 450, 800):  # slower than one worker, faster than one, faster than both
            loader = iter(DataLoader(Spinning(seconds), batch, num_workers=workers))
            used = []
            for _ in range(steps):
                next(loader)
                used.append(time.perf_counter())
                time.sleep(batch / rate)
            del loader
            half = steps // 2
            real = (steps - 1 - half) * batch / (used[-1] - used[half])
            machine = Machine(1, workers, workers + 1, rate, batch)
            simulated = machine.run(seconds, 0, 0, steps)[0]
            rows.append([workers, rate, f"{real:.0f}", f"{simulated:.0f}", f"{simulated / real - 1:+.3f}"])
            print(*rows[-1], sep="\t", flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE/"loader.tsv")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.check: return check()
    (costs, ways), known = measure(asked), rates()
    facts = {**{f"{kind} image": f"{1000 * s:.3f} ms, recorded decoding and augmenting with what is measured beside"
                for kind, s in costs.image.items()}, "beside": f"{1000 * costs.beside:.3f} ms an image",
             "collation": f"{1000 * costs.collate:.3f} ms an image", "copy": f"{1000 * costs.copy:.3f} ms an image",
             "start of a worker": f"{costs.start:.2f} s", "GPU": f"{known['carot']:.0f} images/s (CaRot, computed)",
             **{f"decoding, {name}": text for name, text in ways.items()}}
    with open(asked.out, "w", newline="") as file:
        print(f"# {hardware()}; {asked.images} JPEGs", *(f"# {name}: {text}" for name, text in facts.items()), sep="\n",
              file=file)
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([COLUMNS, *table(costs, known["carot"])])
    print(asked.out.read_text(), end="")


if __name__ == "__main__": main()
