"""Images a second and core: decoding and augmenting JPEGs for training at 224 pixels.

    python benchmarks/decode.py [--images 48] [--rounds 9] [--out benchmarks/decode.tsv]

The JPEGs are made here: 500 x 375 pixels of coloured noise with the spectrum of photographs (amplitude ~ 1/f),
saved at the quality that gives 110 KB on average, the size of ImageNet's. What is timed is what a loader process does for
one image: read the file, decode, random crop of the training transform, tensor, mean and deviation. CPU seconds of this
process are counted, on one thread; variants take turns. The fastest round counts, because other work on the machine
can only add; the median is given beside it.
"""
import argparse
import csv
import io
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2
from PIL import Image, features

from carot.data import read_image
from carot.runs.records import hardware
from carot.benchmarks.decode import fast, read_tensor
from carot.benchmarks.shrink import shrink_jpeg

SIZE, KILOBYTES = (500, 375), 110


def texture(rng):
    "A photograph-like image: three mixed channels of 1/f noise."
    width, height = SIZE
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1 / width
    noise = np.fft.rfft2(rng.normal(size=(3, height, width))) / frequency
    channels = np.fft.irfft2(noise, s=(height, width))
    luminance = channels[0]  # colour channels of photographs are alike
    image = np.stack([luminance + 0.3 * channels[i] for i in range(3)], -1)
    image = (image - image.mean()) / image.std()
    return Image.fromarray((127 + 55 * image).clip(0, 255).astype("uint8"))


def jpeg(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def make_files(folder, n):
    "n JPEGs of about 110 KB and the quality they were saved with."
    rng = np.random.default_rng(0)
    images = [texture(rng) for _ in range(n)]
    sizes = {q: statistics.mean(len(jpeg(image, q)) for image in images[:6]) for q in range(60, 100)}
    quality = min(sizes, key=lambda q: abs(sizes[q] - KILOBYTES * 1000))
    for i, image in enumerate(images): (folder/f"{i:03d}.jpg").write_bytes(jpeg(image, quality))
    return sorted(folder.glob("*.jpg")), quality


def torchvision_to_pil(path):
    return Image.fromarray(read_tensor(path).permute(1, 2, 0).numpy())


def measure(variants, files, rounds):
    "CPU seconds per image of each variant in each round; they take turns."
    seconds = {name: [] for name in variants}
    for round in range(rounds + 1):
        for name, (sample, which) in variants.items():
            torch.manual_seed(0)
            began = time.process_time()
            for path in files[which]: sample(path)
            if round: seconds[name].append((time.process_time() - began) / len(files[which]))  # the first round warms up
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("decode.tsv"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    on_pil = image_transform_v2(PreprocessCfg(), is_train=True, aug_cfg=AugmentationCfg(scale=(0.9, 1.0)))  # as in `load_clip`
    read, on_tensor = fast(on_pil)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder)/"original").mkdir()
        (Path(folder)/"shrunk").mkdir()
        original, quality = make_files(Path(folder)/"original", asked.images)
        for path in original: (Path(folder)/"shrunk"/path.name).write_bytes(shrink_jpeg(path.read_bytes()))
        files = {"original": original, "shrunk": sorted((Path(folder)/"shrunk").iterdir())}
        size = {name: statistics.mean(path.stat().st_size for path in paths) / 1000 for name, paths in files.items()}
        decoders = {"PIL": (read_image, on_pil), "PIL, tensor transform": (read_image, on_tensor),
                    "torchvision, PIL transform": (torchvision_to_pil, on_pil), "torchvision, tensor transform": (read, on_tensor)}
        variants = {}
        for which in files:
            for name, (load, transform) in decoders.items():
                variants[which, name, "decode"] = (load, which)
                variants[which, name, "decode + augment"] = (lambda path, load=load, transform=transform: transform(load(path)), which)
        variants["making small", "PIL", "decode + resize + encode"] = (lambda path: shrink_jpeg(path.read_bytes()), "original")
        same = max(np.abs(np.asarray(read_image(path), int) - np.asarray(torchvision_to_pil(path), int)).max() for path in original)
        seconds = measure(variants, files, asked.rounds)
    lines = [["file", "KB", "decoder", "what", "ms_per_image", "median_ms", "images_per_second_and_core"]]
    lines += [[which, round(size.get(which, size["original"]), 1), name, what, round(1000 * min(s), 3), round(1000 * statistics.median(s), 3), round(1 / min(s), 1)]
              for (which, name, what), s in seconds.items()]
    facts = (f"# {hardware()}; torch {torch.__version__}, torchvision {torchvision.__version__}, Pillow {Image.__version__} (libjpeg-turbo "
             f"{features.version('libjpeg_turbo')}); {asked.images} JPEGs {SIZE[0]} x {SIZE[1]}, quality {quality}; CPU time of the fastest of {asked.rounds} rounds, "
             f"one thread; the decoders' pixels differ by at most {same}")
    with open(asked.out, "w", newline="") as file:
        print(facts, file=file)
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows(lines)
    print(asked.out.read_text(), end="")


if __name__ == "__main__": main()
