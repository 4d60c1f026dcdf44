"""A training step of each method as its public code makes it, and as carot does.

    python speed/methods.py [--model glyphs] [--batch-sizes 64,128] [--device cpu] [--rounds 15]
    python speed/methods.py --model ViT-B-16 --batch-sizes 512 --device cuda --workers 16     # a GPU; random weights

The public steps are written here from what is known of the public codes: captions at the full context length (FLYP,
CaRot, TRACER), forwards one after the other, logarithms of softmaxes, AdamW as torch chooses it by itself, teachers
moved parameter by parameter (TRACER's after every step, CaRot's every 10 here), float32 on a CPU and fp16 autocast
with a gradient scaler on a GPU (Lipsum-FT and TRACER: bf16 there), activations in place as timm builds them. Ours is
`carot.train.train_step` with the objective that a run has. Both start from the same weights and see the same batches,
in turns, in one process. Before anything is timed, the losses of the first --same steps must be equal within rounding,
or nothing is written. Medians count; on a CPU one thread and CPU seconds. Settings are the methods' own, but lr 1e-6.
"""
import argparse
import copy
import csv
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import torchvision
from train_step import in_place, make_batches, write_table

from carot.clip import load_clip, padded_text, text_projection, visual_projection, zero_shot_head
from carot.data import load_benchmark
from carot.engine.devices import hardware, make_accelerator
from carot.methods.base import Start, find_method, settings_of
from carot.methods.lipsum import random_texts
from carot.teachers import kernel_weight
from carot.train import make_optimizer, train_step

COLUMNS = ["model", "method", "batch_size", "ours_pairs_per_s", "public_pairs_per_s", "ratio", "device", "precision",
           "hardware"]
GIVEN = {"lr": 1e-6, "weight_decay": 0.1}
MOVES = {"carot": {"teacher_update_every": 10, "teacher_momentum_start": 0.9, "teacher_momentum_end": 0.9}}
PRECISIONS = {"lipsum-ft": torch.bfloat16, "tracer": torch.bfloat16}  # of the public codes on a GPU; else fp16
TOTAL = 100_000  # steps of the run that these are the first of


class Public:
    "A step as public code makes it: forwards, loss, scaler, AdamW. Subclasses have `parameters` and `loss`."
    clip_norm = None

    def __init__(self, name, start):
        self.clip, self.settings, self.step = copy.deepcopy(start.clip).train(), start.settings, 0
        in_place(self.clip, True)
        self.prepare(start)
        self.device = next(self.clip.parameters()).device
        cuda = self.device.type == "cuda"
        self.dtype = PRECISIONS.get(name, torch.float16) if cuda else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=self.settings.lr,
                                           weight_decay=self.settings.weight_decay)

    def prepare(self, start): "What the step needs beside the model."

    def parameters(self): return list(self.clip.parameters())

    def after(self): "What follows a step."

    def __call__(self, images, tokens, labels):
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            loss = self.loss(images, tokens, labels)
        self.scaler.scale(loss).backward()
        if self.clip_norm: torch.nn.utils.clip_grad_norm_(self.parameters(), self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self.after()
        return loss.item()


def both_features(clip, images, tokens):
    return clip.encode_image(images, normalize=True), clip.encode_text(tokens, normalize=True)


def clip_loss(f_v, f_t, s):
    target = torch.arange(len(f_v), device=f_v.device)
    return (F.cross_entropy(s * f_v @ f_t.T, target) + F.cross_entropy(s * f_t @ f_v.T, target)) / 2


class PublicFLYP(Public):
    def loss(self, images, tokens, labels):
        return clip_loss(*both_features(self.clip, images, tokens), self.clip.logit_scale.exp())


class PublicFT(Public):
    "Image tower and the zero-shot head with a bias; gradients clipped at 1."
    clip_norm = 1.0

    def prepare(self, start):
        weight = zero_shot_head(start.clip, start.tokenizer, start.benchmark.classnames, start.benchmark.templates)
        self.head = torch.nn.Linear(weight.shape[1], len(weight), device=weight.device)
        with torch.no_grad(): self.head.weight.copy_(weight), self.head.bias.zero_()

    def parameters(self): return [*self.clip.visual.parameters(), *self.head.parameters()]

    def loss(self, images, tokens, labels):
        return F.cross_entropy(self.head(self.clip.encode_image(images, normalize=True)), labels)


class PublicLipsum(Public):
    "Cross-entropy at the pretrained scale, and the scores of 80 random texts held where they were."
    def prepare(self, start):
        self.initial = copy.deepcopy(self.clip).requires_grad_(False).eval()
        weight = zero_shot_head(start.clip, start.tokenizer, start.benchmark.classnames, start.benchmark.templates)
        self.weight = torch.nn.Parameter(F.normalize(weight, dim=1))
        self.scale = start.clip.logit_scale.exp().item()
        self.special = start.tokenizer.sot_token_id, start.tokenizer.eot_token_id

    def parameters(self): return [*self.clip.visual.parameters(), self.weight]

    def loss(self, images, tokens, labels):
        s = self.settings
        texts = random_texts(s.seed, self.step, s.lipsum_texts, s.lipsum_length, self.special).to(images.device)
        with torch.no_grad():
            tower = getattr(self.initial, "text", self.initial)
            t = F.normalize(padded_text(tower, texts) @ text_projection(self.initial), dim=1)
            f_0 = self.initial.encode_image(images, normalize=True)
        f = self.clip.encode_image(images, normalize=True)
        moved = (self.scale * f @ t.T - self.scale * f_0 @ t.T) ** 2
        return F.cross_entropy(self.scale * f @ self.weight.T, labels) + (moved.mean(1) / 2).mean()


class PublicCaRot(Public):
    def prepare(self, start): self.teacher = copy.deepcopy(self.clip).requires_grad_(False).eval()

    def penalties(self):
        W_v, W_t = visual_projection(self.clip), text_projection(self.clip)
        gram = torch.norm(W_v.T @ W_v - torch.eye(W_v.shape[1], device=W_v.device))
        return 0.05 * torch.norm(W_v @ W_t.T) + 0.2 * gram

    def loss(self, images, tokens, labels):
        with torch.no_grad():
            u, v = both_features(self.teacher, images, tokens)
            table = self.teacher.logit_scale.exp() * u @ v.T
        f_v, f_t = both_features(self.clip, images, tokens)
        s = self.clip.logit_scale.exp()
        S, loss = s * f_v @ f_t.T, clip_loss(f_v, f_t, s) + self.penalties()
        for t, q in ((table, S), (table.T, S.T)):
            loss = loss - 1.5 * (t.softmax(1) * torch.log(q.softmax(1))).sum(1).mean()
        return loss

    def after(self):
        if self.step % 10: return
        with torch.no_grad():
            for t, s in zip(self.teacher.parameters(), self.clip.parameters()): t.copy_(0.9 * t + 0.1 * s)


def divergence(table, logits):
    return F.kl_div(F.log_softmax(logits, dim=1), F.softmax(table, dim=1), reduction="batchmean")


class PublicTracer(PublicCaRot):
    "Four distillations, and a teacher that moves after every step."
    def prepare(self, start):
        super().prepare(start)
        self.total = kernel_weight(0, TOTAL)

    def loss(self, images, tokens, labels):
        with torch.no_grad(): u, v = both_features(self.teacher, images, tokens)
        f_v, f_t = both_features(self.clip, images, tokens)
        s, target = self.clip.logit_scale.exp(), torch.arange(len(images), device=images.device)
        S, R = s * f_v @ f_t.T, self.teacher.logit_scale.exp() * u @ v.T
        X, Y = s * f_v @ v.T, s * f_t @ u.T
        feature = F.mse_loss(f_v, u) + F.mse_loss(f_t, v)
        relation = (divergence(R, S) + divergence(R.T, S.T)) / 2
        interaction = (F.cross_entropy(X, target) + F.cross_entropy(Y, target)) / 2
        cross = (divergence(R, X) + divergence(R.T, Y)) / 2
        W_v, W_t = visual_projection(self.clip), text_projection(self.clip)
        return (clip_loss(f_v, f_t, s) + 0.05 * torch.norm(W_v @ W_t.T)
                + 0.9 * (2000 * feature + relation + interaction + cross))

    def after(self):
        weight = kernel_weight(self.step, TOTAL)
        self.total += weight
        with torch.no_grad():
            for t, s in zip(self.teacher.parameters(), self.clip.parameters()):
                t.copy_(t + weight / self.total * (s - t))


PUBLIC = {"ft": PublicFT, "flyp": PublicFLYP, "carot": PublicCaRot, "lipsum-ft": PublicLipsum, "tracer": PublicTracer}


class Ours:
    "carot's own step of a method."
    def __init__(self, name, start, accelerator):
        own = Start(copy.deepcopy(start.clip), start.tokenizer, start.benchmark, start.settings, TOTAL)
        *_, stage = find_method(name).stages(own)
        self.objective, self.accelerator, self.step = stage.objective, accelerator, 0
        self.objective.train()
        self.optimizer = accelerator.prepare_optimizer(make_optimizer(
            self.objective.trained(), start.settings.lr, start.settings.weight_decay, accelerator.device))

    def __call__(self, images, tokens, labels):
        needs = self.objective.needs  # the public codes, too, distil in the step that is their first here
        self.objective.needs = lambda step: needs(max(step, 1))
        values = train_step(self.objective, self.optimizer, self.accelerator, (images, tokens, labels), self.step)
        self.objective.needs = needs
        self.step += 1
        self.objective.after_step(self.step)
        return values["loss"]


def make_start(asked, name, device):
    "What both steps of a method start from, and an endless loader of batches."
    clip, transform, _, tokenizer = load_clip(asked.model, None if asked.model == "glyphs" else "random")
    clip.to(device)
    benchmark = load_benchmark("glyphs", transform=transform, train_transform=transform)
    method = find_method(name)
    given = {key: value for key, value in (GIVEN | MOVES.get(name, {})).items() if method.uses(key)}
    settings, _ = settings_of(method, {}, given)
    words = SimpleNamespace(model=asked.model, batch_size=asked.batch_size, workers=asked.workers)
    return Start(clip, tokenizer, benchmark, settings, TOTAL), make_batches(words, transform, tokenizer, device)


def take_turns(steps, batches, asked, n_classes, device):
    "Seconds of each step by name. Raises if the first losses differ by more than rounding."
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds = {name: [] for name in steps}
    for turn in range(asked.rounds + asked.same):
        images, tokens = next(batches)
        labels, losses = torch.arange(len(images), device=device) % n_classes, {}
        for name in sorted(steps, reverse=turn % 2):
            began = clock()
            losses[name] = steps[name](images, tokens, labels)
            if device.type == "cuda": torch.cuda.synchronize()
            if turn >= asked.same: seconds[name].append(clock() - began)
        gap = abs(losses["ours"] / losses["public"] - 1)
        if turn < asked.same and gap > asked.tolerance: raise SystemExit(f"step {turn + 1}: {losses} differ by {gap}")
    return seconds


def measure(asked, name, accelerator):
    "A row of the table."
    device = accelerator.device
    start, batches = make_start(asked, name, device)
    steps = {"ours": Ours(name, start, accelerator), "public": PUBLIC[name](name, start)}
    seconds = take_turns(steps, batches, asked, len(start.benchmark.classnames), device)
    rate = {step: asked.batch_size / statistics.median(s) for step, s in seconds.items()}
    where = f"{hardware()}; torch {torch.__version__}, torchvision {torchvision.__version__}"
    precision = accelerator.mixed_precision.replace("no", "fp32")
    return [asked.model, name, asked.batch_size, f"{rate['ours']:.1f}", f"{rate['public']:.1f}",
            f"{rate['ours'] / rate['public']:.3f}", device.type, precision, where]


def save(out, row):
    "Rows of other models, methods, batch sizes and devices in the file are kept."
    old = []
    if out.exists():
        with open(out, newline="") as file: old = list(csv.reader(file, delimiter="\t"))[1:]
    def key(row): return [str(row[i]) for i in (0, 1, 2, 6)]
    write_table(out, [COLUMNS, *sorted([*(o for o in old if key(o) != key(row)), row], key=key)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="glyphs")
    parser.add_argument("--methods", default=",".join(PUBLIC))
    parser.add_argument("--batch-sizes", default="64,128")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--same", type=int, default=3, help="first steps, whose losses must be equal")
    parser.add_argument("--tolerance", type=float, default=None, help="relative; 1e-5, on a GPU 0.02 (half precision)")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".tsv"))
    asked = parser.parse_args()
    if asked.device == "cpu": torch.set_num_threads(1)
    accelerator = make_accelerator(asked.device, "auto")
    if asked.tolerance is None: asked.tolerance = 0.02 if accelerator.device.type == "cuda" else 1e-5
    for size in map(int, asked.batch_sizes.split(",")):
        asked.batch_size = size
        for name in asked.methods.split(","):
            row = measure(asked, name, accelerator)
            save(asked.out, row)
            print(*row, sep="\t", flush=True)


if __name__ == "__main__": main()
