"""A CaRot training step as the public code writes it and as carot does, and what each difference is worth.

    python speed/train_step.py [--model glyphs] [--batch-size 64] [--device cpu] [--rounds 15]
    python speed/train_step.py --model ViT-B-16 --batch-size 512 --device cuda --compile    # a GPU; random weights
    python speed/train_step.py --check-loss        # 200 steps of both from the same weights on the same batches, and
                                                   # of ours in four micro-batches, in bf16, and (--compile) compiled

The reference: fp16 autocast with a gradient scaler on a GPU (float32 on a CPU), captions at the full context length,
an eager teacher, the logarithm of a softmax, AdamW as torch chooses it (parameter by parameter on a CPU), the teacher's
average parameter by parameter, activations in place where timm builds them so. Every lever is measured alone, on top
of the reference. "ours" is `carot.train.train_step`. All variants take turns on the same batches in one process,
medians count; on a CPU one thread and CPU seconds. The teacher moves every 10 steps in all of them. `wait` is the time
that a step waits for the loader.
Utilisation: multiplications and additions that the model needs (forward, twice that for backward, the teacher's
forward; text at the length that was read) against the bf16 rate of a large matrix product on the same device.
"""
import argparse
import copy
import csv
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from memory import peak_memory
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from PIL import Image
from torch.utils.data import DataLoader

from carot.clip import image_features, load_clip, text_features, text_projection, trimmed_length, visual_projection
from carot.data import CaptionedImages, EpochBatches, load_benchmark
from carot.engine.devices import hardware, make_accelerator
from carot.engine.large_batches import Cut
from carot.losses import carot_loss, contrastive_logits, update_teacher
from carot.methods.carot import CaRot, CaRotSettings
from carot.train import make_optimizer, train_step

LEVERS = {  # on top of the reference, one at a time
    "bf16": {"precision": "bf16"}, "trimmed text": {"trim": True}, "fused AdamW": {"adamw": {"fused": True}},
    "foreach AdamW": {"adamw": {"foreach": True}}, "teacher in inference mode": {"inference": True},
    "foreach teacher update": {"foreach_teacher": True}, "log_softmax": {"log_softmax": True},
    "teacher text cache": {"cache": True}, "channels_last": {"channels_last": True},
    "not in place": {"inplace": False}}
SETTINGS = {"lr": 1e-5, "weight_decay": 0.1}
GFLOP = {"ViT-B-16": (35.1, 6.0)}  # forward: image, text at 77 tokens
TEACHER_EVERY = 10
COLUMNS = ["model", "batch_size", "step", "pairs_per_s", "speed_up", "peak_MB", "utilisation", "wait_ms_per_pair",
           "precision", "device", "hardware"]


def in_place(model, value):
    "Whether activations overwrite what they are given: as timm builds its towers, and as carot does not."
    for module in model.modules():
        if hasattr(module, "inplace") and not isinstance(module, torch.nn.Dropout): module.inplace = value


class Variant:
    "A training step: the reference with some levers."
    def __init__(self, clip, device, precision, trim=False, adamw=None, inference=False, foreach_teacher=False,
                 log_softmax=False, cache=False, channels_last=False, compiled=False, inplace=True):
        self.clip = copy.deepcopy(clip).train()
        self.teacher = copy.deepcopy(clip).requires_grad_(False).eval()
        for model in (self.clip, self.teacher): in_place(model, inplace)
        if channels_last:
            for model in (self.clip, self.teacher): model.to(memory_format=torch.channels_last)
        self.dtype = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        self.optimizer = torch.optim.AdamW(self.clip.parameters(), **SETTINGS, **(adamw or {}))
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.inference, self.foreach_teacher, self.log_softmax = inference, foreach_teacher, log_softmax
        self.cache = {} if cache else None
        self.channels_last, self.step, self.device = channels_last, 0, device
        self.text = text_features if trim else lambda clip, tokens: clip.encode_text(tokens, normalize=True)
        def features(clip, images, tokens): return image_features(clip, images), self.text(clip, tokens)
        self.features = torch.compile(features) if compiled else features

    def teacher_table(self, images, tokens):
        with torch.inference_mode() if self.inference else torch.no_grad():
            if self.cache is None: features = self.features(self.teacher, images, tokens)
            else: features = image_features(self.teacher, images), self.cached_text(tokens)
            return contrastive_logits(*features, self.teacher.logit_scale.exp())

    def cached_text(self, tokens):
        keys = [tuple(row) for row in tokens.tolist()]
        new = list(dict.fromkeys(key for key in keys if key not in self.cache))
        if new: self.cache.update(zip(new, self.text(self.teacher, torch.tensor(new, device=tokens.device))))
        return torch.stack([self.cache[key] for key in keys])

    def loss(self, images, tokens, table):
        f_v, f_t = self.features(self.clip, images, tokens)
        W_v, W_t, s = visual_projection(self.clip), text_projection(self.clip), self.clip.logit_scale.exp()
        if self.log_softmax: return carot_loss(f_v, f_t, s, W_v, W_t, table)[0]
        S, target = s * f_v @ f_t.T, torch.arange(len(images), device=images.device)
        loss = (F.cross_entropy(S, target) + F.cross_entropy(S.T, target)) / 2
        loss = loss + 0.2 * torch.norm(W_v.T @ W_v - torch.eye(W_v.shape[1], device=W_v.device))
        loss = loss + 0.05 * torch.norm(W_v @ W_t.T)
        for t, s in ((table, S), (table.T, S.T)):
            loss = loss - 1.5 * (t.softmax(1) * torch.log(s.softmax(1))).sum(1).mean()
        return loss

    def __call__(self, images, tokens):
        if self.channels_last: images = images.to(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            table = self.teacher_table(images, tokens)
            if self.inference: table = table.clone()
            loss = self.loss(images, tokens, table)
        value = loss.item()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        if self.step % TEACHER_EVERY == 0:
            if self.foreach_teacher: update_teacher(self.teacher, self.clip, 0.9)
            else:
                with torch.no_grad():
                    for t, s in zip(self.teacher.parameters(), self.clip.parameters()): t.copy_(0.9 * t + 0.1 * s)
            if self.cache is not None: self.cache.clear()
        return value


class Ours:
    "carot's own step."
    def __init__(self, clip, accelerator, cut=None, half=None):
        clip, self.accelerator, self.cut, self.step = copy.deepcopy(clip).train(), half or accelerator, cut, 0
        timetable = dict(teacher_update_every=TEACHER_EVERY, teacher_momentum_start=0.9, teacher_momentum_end=0.9)
        self.objective = CaRot(clip, CaRotSettings(**timetable), 10**9)
        self.optimizer = accelerator.prepare_optimizer(
            make_optimizer(self.objective.trained(), *SETTINGS.values(), accelerator.device))

    def __call__(self, images, tokens):
        labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
        self.step += 1  # from 1: the reference has a teacher in its first step, too
        values = train_step(self.objective, self.optimizer, self.accelerator, (images, tokens, labels), self.step,
                            cut=self.cut)
        self.objective.after_step(self.step)
        return values["loss"]


class Pictures:
    "An endless number of one picture of ImageNet's size."
    def __init__(self, transform):
        self.transform, self.picture = transform, Image.effect_noise((500, 375), 60).convert("RGB")

    def __len__(self): return 100_000

    def __getitem__(self, index): return self.transform(self.picture), index % 1000


def make_batches(asked, transform, tokenizer, device):
    "An endless loader of (images, tokens) on the device."
    benchmark = load_benchmark("glyphs", transform=transform, train_transform=transform)
    if asked.model != "glyphs":
        templates = [t("{}") for t in OPENAI_IMAGENET_TEMPLATES]
        benchmark = replace(benchmark, classnames=IMAGENET_CLASSNAMES, templates=templates, train=Pictures(transform))
    captioned, epoch = CaptionedImages(benchmark, seed=1), 0
    while True:
        sampler = [b for b in EpochBatches(len(captioned), asked.batch_size, 1, epoch) if len(b) == asked.batch_size]
        loader = DataLoader(captioned, batch_sampler=sampler, num_workers=asked.workers,
                            pin_memory=device.type == "cuda")
        for images, captions, _, _ in loader:
            yield images.to(device, non_blocking=True), tokenizer(captions).to(device)
        epoch += 1


def peak_rate(device):
    "bf16 operations per second of a large matrix product; None on a CPU."
    if device.type != "cuda": return None
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    for _ in range(3): a @ a
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(20): a @ a
    torch.cuda.synchronize()
    return 20 * 2 * 8192**3 / (time.perf_counter() - began)


def make_variants(asked, clip, accelerator, base):
    "Name -> step; and the flags of those that have some."
    flags = {name: base | lever for name, lever in LEVERS.items()}
    if asked.compile: flags["torch.compile"] = base | {"trim": True, "compiled": True}
    variants = {"reference": Variant(clip, accelerator.device, **base), "ours": Ours(clip, accelerator)}
    return variants | {name: Variant(clip, accelerator.device, **lever) for name, lever in flags.items()}, flags


def take_turns(variants, batches, asked, device):
    "Seconds a round and bytes by name, seconds of waiting and text lengths a round; no new round after --seconds."
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds, waits, memory, lengths = {name: [] for name in variants}, [], {}, []
    ends = time.monotonic() + asked.seconds
    for turn in range(asked.rounds + 2):
        if turn > 2 and time.monotonic() > ends: break
        began = clock()
        images, tokens = next(batches)
        waits.append(clock() - began)
        lengths.append(trimmed_length(tokens))
        for name, step in variants.items():
            if turn == 1:
                memory[name] = peak_memory(lambda step=step: step(images, tokens), device)
                continue
            began = clock()
            step(images, tokens)
            if device.type == "cuda": torch.cuda.synchronize()
            if turn: seconds[name].append(clock() - began)
    return seconds, memory, waits, lengths


def measure(asked):
    accelerator = make_accelerator(asked.device, "auto")
    device = accelerator.device
    clip, transform, _, tokenizer = load_clip(asked.model, None if asked.model == "glyphs" else "random")
    clip.to(device)
    base = {"precision": "fp16" if device.type == "cuda" else "fp32"}
    variants, flags = make_variants(asked, clip, accelerator, base)
    batches = make_batches(asked, transform, tokenizer, device)
    seconds, memory, waits, lengths = take_turns(variants, batches, asked, device)
    rate, median = peak_rate(device), {name: statistics.median(s) for name, s in seconds.items()}
    where = (f"{hardware()}; torch {torch.__version__}, torchvision {torchvision.__version__}; "
             f"{asked.workers} loader processes")
    rows, wait = [], f"{1e3 * statistics.median(waits) / asked.batch_size:.3f}"
    for name, s in median.items():
        image, text = GFLOP.get(asked.model, (0, 0))
        read = statistics.mean(lengths) / 77 if name in ("ours", "trimmed text", "torch.compile") else 1
        used = f"{4e9 * (image + text * read) * asked.batch_size / s / rate:.3f}" if rate and image else ""
        precision = accelerator.mixed_precision if name == "ours" else flags.get(name, base)["precision"]
        rows.append([asked.model, asked.batch_size, name, f"{asked.batch_size / s:.1f}",
                     f"{median['reference'] / s:.3f}", f"{memory[name] / 1e6:.1f}", used, wait,
                     precision.replace("no", "fp32"), device.type, where])
    save(asked.out, rows)


def write_table(file, rows):
    with open(file, "w", newline="") as table: csv.writer(table, delimiter="\t", lineterminator="\n").writerows(rows)


def save(out, rows):
    "Rows of other models, batch sizes and devices in the file are kept."
    old = []
    if out.exists():
        with open(out, newline="") as file: old = list(csv.reader(file, delimiter="\t"))[1:]
    same = [str(rows[0][0]), str(rows[0][1]), rows[0][9]]
    write_table(out, [COLUMNS, *[row for row in old if [row[0], row[1], row[9]] != same], *rows])
    print(out.read_text(), end="")


class HalfPrecision:
    "What a step needs of an accelerator, in bf16; accelerate itself has one precision a process."
    def __init__(self, device): self.device, self.num_processes = device, 1
    def autocast(self): return torch.autocast(self.device.type, torch.bfloat16)
    def backward(self, loss): loss.backward()


def loss_variants(asked, clip, accelerator):
    "Name -> step, all from the same weights."
    device, half = accelerator.device, HalfPrecision(accelerator.device)
    quarter = Cut(micro_batch_size=asked.batch_size // 4)
    steps = {"reference": Variant(clip, device, "fp16" if device.type == "cuda" else "fp32"),
             "ours": Ours(clip, accelerator), "micro-batches": Ours(clip, accelerator, quarter),
             "bf16": Ours(clip, accelerator, half=half), "bf16 micro-batches": Ours(clip, accelerator, quarter, half)}
    if asked.compile:
        steps["compiled"] = Variant(clip, device, "bf16" if device.type == "cuda" else "fp32", trim=True, compiled=True)
    for step in steps.values():
        for group in step.optimizer.param_groups: group["lr"] = asked.lr
    return steps


def check_loss(asked):
    "All steps from the same weights on the same batches; the reference's last steps say what noise is."
    accelerator = make_accelerator(asked.device, "auto")
    clip, transform, _, tokenizer = load_clip(asked.model, None if asked.model == "glyphs" else "random")
    clip.to(accelerator.device)
    batches = make_batches(asked, transform, tokenizer, accelerator.device)
    steps = loss_variants(asked, clip, accelerator)
    curves = []
    for _ in range(asked.steps):
        images, tokens = next(batches)
        curves.append([step(images, tokens) for step in steps.values()])
    rows = [[i + 1, *(f"{loss:.5f}" for loss in curve)] for i, curve in enumerate(curves)]
    write_table(asked.loss_out, [["step", *steps], *rows])
    agree = [compare(name, torch.tensor(curves)[:, [0, i]], asked.steps // 4) for i, name in enumerate(steps) if i]
    return all(agree)


def compare(name, curves, last):
    "Says how two curves (steps, 2) differ, and whether their last steps do by more than twice the noise."
    ends = curves[-last:]
    noise, gap = (ends[:, 0].std() / last ** 0.5).item(), (ends[:, 1] - ends[:, 0]).mean().item()
    print(f"{name}: mean loss of the last {last} of {len(curves)} steps {ends[:, 1].mean():.4f}, the reference's "
          f"{ends[:, 0].mean():.4f}; difference {gap:+.5f}, standard error of that mean {noise:.5f}; largest "
          f"difference of a step {curves.diff().abs().max():.5f}")
    return abs(gap) < 2 * noise


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="glyphs")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no new round begins")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile too: takes minutes to warm up")
    parser.add_argument("--check-loss", action="store_true")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--loss-out", type=Path, default=Path(__file__).with_name("train_step_loss.tsv"))
    parser.add_argument("--lr", type=float, default=3e-4, help="of --check-loss")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("train_step.tsv"))
    asked = parser.parse_args()
    if asked.device == "cpu": torch.set_num_threads(1)
    if asked.check_loss: raise SystemExit(0 if check_loss(asked) else 1)
    measure(asked)


if __name__ == "__main__": main()
