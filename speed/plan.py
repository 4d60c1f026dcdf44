"""Peak memory and operations of training steps that no machine here can make: computed, not measured.

    python speed/plan.py [--model ViT-B-16] [--batch-size 512] [--methods carot,flyp] [--out speed/plan.tsv]
    python speed/plan.py --check       # the same count beside real steps of the glyphs model: speed/plan_check.tsv

`carot.train.train_step` itself runs, on fake tensors: PyTorch follows shapes, types and lives of all of them, and
computes nothing. `LiveBytes` (speed/memory.py) adds up the storages that are alive after each operation: weights,
gradients, AdamW's moments, teacher, batch, activations. Not in it: what a kernel takes for itself while it runs, the
allocator's rounding, the CUDA context. A step's types are those of a GPU: linear algebra in half precision, layer
norms in float32, attention that keeps no table. Captions are as long as asked (18 tokens: what the longest of 512 of
ImageNet's 80 x 1,000 captions has on average; none has more than 23); the public step reads all 77.
Operations: `torch.utils.flop_counter` (those of layer norms and activations are not in it). `images_per_s_at_55`: if a
GPU did them at 55 % of 989 TFLOP/s, the bf16 rate on the data sheets of H100 SXM and H200.
"""
import argparse
import csv
import ctypes
import gc
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from memory import LiveBytes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from train_step import Variant

from carot.clip import WEIGHTS, build_clip, folder_config, named_config
from carot.engine.devices import make_accelerator
from carot.engine.large_batches import Cut
from carot.methods.base import Start, find_method, settings_of
from carot.train import train_step

PEAK = 989e12  # dense bf16 operations per second
COLUMNS = ["model", "batch_size", "method", "path", "precision", "peak_GB", "TFLOP_per_step", "images_per_s_at_55",
           "hardware"]
CHECK = ["model", "batch_size", "path", "computed_MB", "real_tensors_MB", "resident_MB", "error_of_tensors",
         "error_of_resident"]
COMPUTED = "computed: nothing ran on a GPU"
layer_norm, attention = F.layer_norm, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def norm_in_float32(x, *others, **named):
    "As autocast does it on a GPU."
    with torch.autocast("cpu", enabled=False):
        return layer_norm(x.float() if x.dtype == torch.bfloat16 else x, *others, **named)


@contextmanager
def fake():
    "Tensors without numbers; what asks for a number gets 1, and captions fill their rows."
    with ExitStack() as stack:
        def instead(target, name, value): stack.enter_context(mock.patch.object(target, name, value))
        instead(F, "layer_norm", norm_in_float32)
        instead(torch.Tensor, "item", lambda x: 1.0)
        for module in ("carot.clip", "carot.engine.large_batches"):
            instead(sys.modules[module], "trimmed_length", lambda tokens: tokens.shape[1])
        instead(sys.modules["carot.clip"], "is_causal", lambda tower: True)
        instead(sys.modules["carot.clip"], "places_up_to", lambda ends, length: torch.arange(len(ends) * length))
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)  # one operation, which no counter knows
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def count_attention(query, key, value, *others, out_shape=None, **named): return sdpa_flop_count(query, key, value)


def count_backward(grad, query, key, value, *others, out_shape=None, **named):
    return sdpa_backward_flop_count(grad, query, key, value)


CPU_ATTENTION = {attention: count_attention,
                 torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: count_backward}


def model_and_images(asked):
    "The model, with random weights, and a batch of images."
    glyphs = asked.model == "glyphs"
    clip = build_clip(folder_config(WEIGHTS/"glyphs") if glyphs else named_config(asked.model, "random"))
    size = clip.config["preprocess_cfg"]["size"]
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return clip, torch.zeros(asked.batch_size, 3, height, width)


def make_moments(optimizer, parameters):
    "AdamW's state, which its first step makes."
    for p in parameters: p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()


def make_step(asked, method, path, precision):
    "A function that makes a step, optimizer and all, as `carot` would on a machine with the memory for it."
    clip, images = model_and_images(asked)
    accelerator, cut = make_accelerator("cpu", precision), Cut()
    settings, _ = settings_of(find_method(method), {}, {})
    *_, stage = find_method(method).stages(Start(clip, None, None, settings, 1000))
    objective = stage.objective
    objective.train()
    if path == "activation checkpointing": clip.set_grad_checkpointing(True)
    if path.startswith("micro-batch"): cut = Cut(micro_batch_size=int(path.split()[1]))
    optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(objective.trained(), lr=1e-6, fused=True))
    make_moments(optimizer, objective.trained())
    labels = torch.zeros(len(images), dtype=torch.long)
    tokens = torch.ones(len(images), min(asked.tokens, clip.context_length), dtype=torch.long)
    return lambda: train_step(objective, optimizer, accelerator, (images, tokens, labels), 1, cut=cut)


def public_step(asked, precision):
    "The same as the public code makes it."
    clip, images = model_and_images(asked)
    step = Variant(clip, torch.device("cpu"), precision)
    make_moments(step.optimizer, list(step.clip.parameters()))
    return lambda: step(images, torch.ones(len(images), clip.context_length, dtype=torch.long))


def compute(asked, method, path, precision):
    "Peak bytes and operations of a step, on fake tensors."
    with fake(), LiveBytes() as live:
        step = public_step(asked, precision) if path == "public" else make_step(asked, method, path, precision)
        gc.collect()
        live.peak = live.now
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as operations: step()
    return live.peak, operations.get_total_flops()


def plan(asked):
    rows = []
    for method in asked.methods.split(","):
        for precision in asked.precisions.split(","):
            for path in (["public"] if method == "carot" else []) + PATHS:
                peak, operations = compute(asked, method, path, precision)
                rate = f"{asked.batch_size * 0.55 * PEAK / operations:.0f}" if precision == "bf16" else ""
                rows.append([asked.model, asked.batch_size, method, path, precision, f"{peak / 1e9:.2f}",
                             f"{operations / 1e12:.2f}", rate, COMPUTED])
                print(*rows[-1], sep="\t", flush=True)
    return rows


PATHS = ["all at once", "activation checkpointing", "micro-batch 128", "micro-batch 64"]


def status(name):
    "A figure of this process, in bytes."
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def real_bytes(asked, path):
    "Peak of a real step on this CPU: of its tensors, and of the process's memory."
    torch.set_num_threads(1)
    with LiveBytes() as live:
        step = make_step(asked, "carot", path, "fp32")
        step()  # loads code and makes plans of kernels
        gc.collect()
        kept = live.peak = live.now
        step()
    tensors = live.peak
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the mark of the most falls to what there is
    step()
    return tensors, kept + status("VmHWM") - before


def check(asked):
    "Computed and real bytes of steps that a CPU can make, each in a process of its own."
    rows = []
    for path in ["all at once", f"micro-batch {asked.batch_size // 4}"]:
        computed, _ = compute(asked, "carot", path, "fp32")
        words = [sys.executable, __file__, "--model", asked.model, "--batch-size", str(asked.batch_size), "--tokens",
                 str(asked.tokens), "--real", path]
        tensors, resident = map(int, subprocess.run(words, capture_output=True, text=True, check=True).stdout.split())
        rows.append([asked.model, asked.batch_size, path, *(f"{x / 1e6:.1f}" for x in (computed, tensors, resident)),
                     f"{computed / tensors - 1:+.3f}", f"{computed / resident - 1:+.3f}"])
        print(*rows[-1], sep="\t", flush=True)
    return rows


def write(file, columns, rows):
    with open(file, "w", newline="") as table:
        csv.writer(table, delimiter="\t", lineterminator="\n").writerows([columns, *rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="ViT-B-16; of --check: glyphs")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=18, help="of the longest caption of a batch")
    parser.add_argument("--methods", default="carot,flyp")
    parser.add_argument("--precisions", default="bf16,fp32")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--real", help="of --check: a path, run for real")
    parser.add_argument("--out", type=Path, default=None)
    asked = parser.parse_args()
    asked.model = asked.model or ("glyphs" if asked.check else "ViT-B-16")
    if asked.real: print(*real_bytes(asked, asked.real))
    elif asked.check: write(asked.out or Path(__file__).with_name("plan_check.tsv"), CHECK, check(asked))
    else: write(asked.out or Path(__file__).with_name("plan.tsv"), COLUMNS, plan(asked))


if __name__ == "__main__": main()
