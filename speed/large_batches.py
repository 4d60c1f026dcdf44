"""Peak memory and time per pair of a CaRot step against the micro-batch, beside activation checkpointing.

    python benchmarks/large_batches.py [--model glyphs] [--batch-size 256] [--device cpu] [--out benchmarks/large_batches.tsv]
    python benchmarks/large_batches.py --model ViT-B-16 --batch-size 512 --device cuda     # needs a GPU, no weights: they are random

A step is teacher, student, both passes and the optimizer (AdamW). Settings take turns, the median of the rounds counts; a setting
that runs out of memory says so. Memory is what PyTorch allocates at most during a step, weights and optimizer included
(on a CPU: what the step itself allocates, without them). Rows of other models and devices in the file are kept.
"""
import argparse
import copy
import csv
import statistics
import time
from pathlib import Path

import torch
import torchvision

from carot.clip import load_clip
from carot.engine.large_batches import Cut, peak_memory
from carot.runs.records import hardware
from carot.train import ContrastiveObjective, Teacher, train_step
from carot.engine.devices import make_accelerator

COLUMNS = ["model", "batch_size", "setting", "peak_MB", "ms_per_pair", "relative_time", "device", "precision", "hardware"]
FULL = "all at once"


def steps(asked):
    "Name -> a function that makes one step."
    accelerator = make_accelerator(asked.device, asked.precision)
    clip, _, _, tokenizer = load_clip(asked.model, None if asked.model == "glyphs" else "random")
    size = clip.visual.preprocess_cfg["size"]
    clip.to(accelerator.device).train()
    teacher = Teacher(copy.deepcopy(clip).requires_grad_(False).eval(), 1000)
    objective = ContrastiveObjective(clip, label_smoothing=0.0, orthogonality_coef=0.2, cross_norm_coef=0.05, distillation_coef=1.5)
    optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(objective.trained(), lr=1e-6, weight_decay=0.1, fused=accelerator.device.type == "cuda"))
    model = accelerator.prepare_model(objective)
    size = size if isinstance(size, (tuple, list)) else (size, size)
    batch = [torch.randn(asked.batch_size, 3, *size), tokenizer([f"a photo of a {'big ' * (i % 3)}sun." for i in range(asked.batch_size)]),
             torch.zeros(asked.batch_size, dtype=torch.long)]
    batch = [x.to(accelerator.device) for x in batch]

    def step(cut=Cut(), layers=False):
        clip.set_grad_checkpointing(layers)
        train_step(model, optimizer, accelerator, batch, teacher, lambda values: None, cut)
        if accelerator.device.type == "cuda": torch.cuda.synchronize()
    made, micro = {FULL: step, "activation checkpointing": lambda: step(layers=True)}, asked.batch_size // 2
    while micro >= 16:
        made[f"micro-batch {micro}"] = lambda micro=micro: step(Cut(micro_batch_size=micro))
        micro //= 2
    return made, accelerator


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="glyphs")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("large_batches.tsv"))
    asked = parser.parse_args()
    if asked.device == "cpu": torch.set_num_threads(1)
    made, accelerator = steps(asked)
    clock = time.perf_counter if accelerator.device.type == "cuda" else time.process_time
    seconds, memory, failed = {name: [] for name in made}, {}, set()
    for round in range(asked.rounds + 1):
        for name, step in made.items():
            if name in failed: continue
            try:
                if round == 0:  # warms up, allocates the optimizer's state
                    step()
                    memory[name] = peak_memory(step, accelerator.device)
                    if accelerator.device.type == "cuda": memory[name] = torch.cuda.max_memory_allocated()
                    continue
                began = clock()
                step()
                seconds[name].append(clock() - began)
            except torch.OutOfMemoryError:
                failed.add(name)
                torch.cuda.empty_cache()
    per_pair = {name: 1e3 * statistics.median(s) / asked.batch_size for name, s in seconds.items() if s}
    where = f"{hardware()}; torch {torch.__version__}, torchvision {torchvision.__version__}"
    rows = []
    for name in made:
        known = [round_(memory[name] / 1e6), round_(per_pair[name]), round_(per_pair[name] / per_pair[FULL]) if FULL in per_pair else ""] if name in per_pair else ["out of memory", "", ""]
        rows.append([asked.model, asked.batch_size, name, *known, accelerator.device.type, accelerator.mixed_precision.replace("no", "fp32"), where])
    old = []
    if asked.out.exists():
        with open(asked.out, newline="") as file: old = list(csv.reader(file, delimiter="\t"))[1:]
    same = [str(asked.model), str(asked.batch_size), accelerator.device.type]
    rows = [row for row in old if [row[0], row[1], row[6]] != same] + rows
    with open(asked.out, "w", newline="") as file: csv.writer(file, delimiter="\t", lineterminator="\n").writerows([COLUMNS, *rows])
    print(asked.out.read_text(), end="")


def round_(x): return f"{x:.4g}"


if __name__ == "__main__": main()
