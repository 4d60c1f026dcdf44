"""Images a second in evaluation: `carot.evaluate.predict_set` on decoded tensors in memory, and end to end from JPEGs.

    python speed/evaluate.py [--model glyphs] [--images 2000] [--batch-size 250] [--device cpu] [--workers 0]
    python speed/evaluate.py --model ViT-B-16 --images 8192 --batch-size 512 --device cuda --precision bf16 --workers 16

The second needs a GPU. Weights of named models are random; the head has 1,000 classes. The JPEGs are those of
speed/decode.py: 500 x 375 pixels, 110 KB.
Wall-clock time; the fastest of the rounds counts, the two kinds take turns. Rows are appended to --out.
"""
import argparse
import csv
import tempfile
import time
from pathlib import Path

import torch
import torchvision
from decode import make_files
from torch.utils.data import Dataset, TensorDataset

from carot.clip import load_clip, text_projection
from carot.data import read_image
from carot.engine.devices import hardware
from carot.evaluate import Classifier, predict_set

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="glyphs", help="glyphs or a name that open_clip knows")
parser.add_argument("--images", type=int, default=2000, help="a round")
parser.add_argument("--jpegs", type=int, default=300, help="a round, end to end")
parser.add_argument("--batch-size", type=int, default=250)
parser.add_argument("--device", default="cpu")
parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
parser.add_argument("--workers", type=int, default=0, help="loader processes")
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--out", default=Path(__file__).with_suffix(".tsv"), type=Path)
asked = parser.parse_args()


class Jpegs(Dataset):
    "n images, read and transformed as in an evaluation set."
    def __init__(self, files, n, transform): self.files, self.n, self.transform = files, n, transform
    def __len__(self): return self.n
    def __getitem__(self, index): return self.transform(read_image(self.files[index % len(self.files)])), 0


torch.manual_seed(0)
clip, _, transform, _ = load_clip(asked.model, None if asked.model == "glyphs" else "random")
clip.to(asked.device).eval()
model = Classifier(clip, torch.randn(1000, text_projection(clip).shape[1], device=asked.device), None, True)
side = clip.visual.image_size[0] if isinstance(clip.visual.image_size, tuple) else clip.visual.image_size
images = torch.randn(64, 3, side, side).repeat(-(-asked.images // 64), 1, 1, 1)[:asked.images]
decoded = TensorDataset(images, torch.zeros(asked.images, dtype=torch.long))
how = dict(batch_size=asked.batch_size, workers=asked.workers, precision=asked.precision)
with tempfile.TemporaryDirectory() as folder:
    jpegs = Jpegs(make_files(Path(folder), 24)[0]["original"], asked.jpegs, transform)
    sets = {"decoded tensors": decoded, "end to end from JPEGs": jpegs}
    best = dict.fromkeys(sets, 0.0)
    for _ in range(asked.rounds + 1):  # the first warms up
        for name, dataset in sets.items():
            began = time.perf_counter()
            predict_set(model, dataset, **how)
            best[name] = max(best[name], len(dataset) / (time.perf_counter() - began))
new = not asked.out.exists()
with asked.out.open("a", newline="") as file:
    table = csv.writer(file, delimiter="\t", lineterminator="\n")
    if new: table.writerow(["model", "images", "images_per_s", "batch_size", "precision", "device", "hardware"])
    machine = (f"{hardware()}; torch {torch.__version__}, torchvision {torchvision.__version__}; "
               f"{asked.workers} loader processes, {torch.get_num_threads()} threads")
    for name, rate in best.items():
        table.writerow([asked.model, name, f"{rate:.0f}", asked.batch_size, asked.precision, asked.device, machine])
        print(f"{name}: {rate:,.0f} images/s")
