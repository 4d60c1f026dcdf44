"""Peak memory and time per pair of a CaRot step against the micro-batch, beside activation checkpointing.

    python speed/large_batches.py [--model glyphs] [--batch-size 256] [--device cpu] [--out speed/large_batches.tsv]
    python speed/large_batches.py --model ViT-B-16 --batch-size 512 --device cuda     # a GPU; no weights: random ones

A step is teacher, student, both passes and the optimizer (AdamW). Settings take turns, the median of the rounds
counts; a setting that runs out of memory says so. Memory is what PyTorch allocates at most during a step, weights and
optimizer included (on a CPU: what the step itself allocates, without them). Rows of other models and devices in the
file are kept.
"""
import argparse
import csv
import statistics
import time
from pathlib import Path

import torch
import torchvision
from memory import peak_memory

from carot.clip import load_clip
from carot.engine.devices import hardware, make_accelerator
from carot.engine.large_batches import Cut
from carot.methods.carot import CaRot, CaRotSettings
from carot.train import make_optimizer, train_step

COLUMNS = ["model", "batch_size", "setting", "peak_MB", "ms_per_pair", "relative_time", "device", "precision",
           "hardware"]
WHOLE, LAYERS = "all at once", "activation checkpointing"


def make_batch(asked, size, tokenizer, device):
    "Images, tokens and labels: noise and three captions."
    captions = [f"a photo of a {'big ' * (i % 3)}sun." for i in range(asked.batch_size)]
    size = size if isinstance(size, (tuple, list)) else (size, size)
    images, labels = torch.randn(asked.batch_size, 3, *size), torch.zeros(asked.batch_size, dtype=torch.long)
    return [x.to(device) for x in (images, tokenizer(captions), labels)]


def steps(asked):
    "Name -> a function that makes one step; the accelerator."
    accelerator = make_accelerator(asked.device, asked.precision)
    clip, _, _, tokenizer = load_clip(asked.model, None if asked.model == "glyphs" else "random")
    clip.to(accelerator.device).train()
    objective, cuda = CaRot(clip, CaRotSettings(), 1000), accelerator.device.type == "cuda"
    optimizer = accelerator.prepare_optimizer(make_optimizer(objective.trained(), 1e-6, 0.1, accelerator.device))
    batch = make_batch(asked, clip.visual.preprocess_cfg["size"], tokenizer, accelerator.device)

    def step(cut=Cut(), layers=False):  # noqa: B008
        clip.set_grad_checkpointing(layers)
        train_step(objective, optimizer, accelerator, batch, 1, cut=cut)
        if cuda: torch.cuda.synchronize()
    made, micro = {WHOLE: step, LAYERS: lambda: step(layers=True)}, asked.batch_size // 2
    while micro >= 16:
        made[f"micro-batch {micro}"] = lambda micro=micro: step(Cut(micro_batch_size=micro))
        micro //= 2
    return made, accelerator


def measure(made, device, rounds, seconds_left=float("inf")):
    "Bytes, and seconds of each round, by name; what ran out of memory has none."
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds, memory = {name: [] for name in made}, {}
    ends = time.monotonic() + seconds_left
    for turn in range(rounds + 1):
        if turn > 1 and time.monotonic() > ends: break
        for name in list(seconds):
            try:
                if turn == 0:
                    made[name]()  # warms up, allocates the optimizer's state
                    memory[name] = peak_memory(made[name], device)
                    if device.type == "cuda": memory[name] = torch.cuda.max_memory_allocated()
                    continue
                began = clock()
                made[name]()
                seconds[name].append(clock() - began)
            except torch.OutOfMemoryError:
                del seconds[name]
                torch.cuda.empty_cache()
    return memory, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="glyphs")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no new round begins")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("large_batches.tsv"))
    asked = parser.parse_args()
    if asked.device == "cpu": torch.set_num_threads(1)
    made, accelerator = steps(asked)
    memory, seconds = measure(made, accelerator.device, asked.rounds, asked.seconds)
    per_pair = {name: 1e3 * statistics.median(s) / asked.batch_size for name, s in seconds.items()}
    where = f"{hardware()}; torch {torch.__version__}, torchvision {torchvision.__version__}"
    precision, rows = accelerator.mixed_precision.replace("no", "fp32"), []
    for name in made:
        known = ["out of memory", "", ""]
        if name in per_pair:
            relative = f"{per_pair[name] / per_pair[WHOLE]:.4g}" if WHOLE in per_pair else ""
            known = [f"{memory[name] / 1e6:.4g}", f"{per_pair[name]:.4g}", relative]
        rows.append([asked.model, asked.batch_size, name, *known, accelerator.device.type, precision, where])
    save(asked.out, rows)


def save(out, rows):
    "Rows of other models, batch sizes and devices in the file are kept."
    old = []
    if out.exists():
        with open(out, newline="") as file: old = list(csv.reader(file, delimiter="\t"))[1:]
    same = [str(rows[0][0]), str(rows[0][1]), rows[0][6]]
    rows = [row for row in old if [row[0], row[1], row[6]] != same] + rows
    with open(out, "w", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([COLUMNS, *rows])
    print(out.read_text(), end="")


if __name__ == "__main__": main()
