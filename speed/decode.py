"""Images a second and core: decoding and augmenting JPEGs for training at 224 pixels.

    python speed/decode.py [--images 48] [--rounds 9] [--out speed/decode.tsv]

The JPEGs are made here: 500 x 375 pixels of coloured noise with the spectrum of photographs (amplitude ~ 1/f),
saved at the quality that gives 110 KB on average, the size of ImageNet's. What is timed is what a loader process does
for one image: read the file, decode, random crop of the training transform, tensor, mean and deviation. CPU seconds of
this process are counted, on one thread; variants take turns. The fastest round counts, because other work on the
machine can only add; the median is given beside it. torchcodec takes part if it is installed: carot does not need it.
"""
import argparse
import csv
import io
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2
from PIL import Image, features

from carot.benchmarks.decode import fast, read_tensor
from carot.benchmarks.shrink import shrink_jpeg
from carot.data import read_image
from carot.engine.devices import hardware

try: from torchcodec.decoders import decode_jpeg as torchcodec
except ImportError: torchcodec = None

SIZE, KILOBYTES = (500, 375), 110
COLUMNS = ["file", "KB", "decoder", "what", "ms_per_image", "median_ms", "images_per_second_and_core"]


def texture(rng):
    "A photograph-like image: three mixed channels of 1/f noise."
    width, height = SIZE
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1 / width
    noise = np.fft.rfft2(rng.normal(size=(3, height, width))) / frequency
    channels = np.fft.irfft2(noise, s=(height, width))
    image = np.stack([channels[0] + 0.3 * channels[i] for i in range(3)], -1)  # colours of photographs are alike
    image = (image - image.mean()) / image.std()
    return Image.fromarray((127 + 55 * image).clip(0, 255).astype("uint8"))


def jpeg(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def make_files(folder, n):
    "n JPEGs of about 110 KB, the same made small, and the quality they were saved with."
    rng = np.random.default_rng(0)
    images = [texture(rng) for _ in range(n)]
    sizes = {q: statistics.mean(len(jpeg(image, q)) for image in images[:6]) for q in range(60, 100)}
    quality = min(sizes, key=lambda q: abs(sizes[q] - KILOBYTES * 1000))
    for name in ("original", "shrunk"): (folder/name).mkdir()
    for i, image in enumerate(images):
        data = jpeg(image, quality)
        (folder/"original"/f"{i:03d}.jpg").write_bytes(data)
        (folder/"shrunk"/f"{i:03d}.jpg").write_bytes(shrink_jpeg(data))
    return {name: sorted((folder/name).iterdir()) for name in ("original", "shrunk")}, quality


def readers():
    "Decoder -> path -> image."
    found = {"PIL": read_image, "simplejpeg": read_tensor}
    return found | ({"torchcodec": lambda path: torchcodec(path.read_bytes())} if torchcodec else {})


def variants(files):
    "(file, decoder, what) -> what is done with a path, and the paths."
    on_pil = image_transform_v2(PreprocessCfg(), is_train=True, aug_cfg=AugmentationCfg(scale=(0.9, 1.0)))
    on_tensor = fast(on_pil)[1]  # of images as `load_clip` wants them
    found = {}
    for which, paths in files.items():
        for decoder, read in readers().items():
            found[which, decoder, "decode"] = (read, paths)
            for name, transform in ([("PIL", on_pil)] if read is read_image else []) + [("tensor", on_tensor)]:
                found[which, f"{decoder}, {name} transform", "decode + augment"] = (
                    lambda path, read=read, transform=transform: transform(read(path)), paths)
    found["making small", "PIL", "decode + resize + encode"] = (lambda path: shrink_jpeg(path.read_bytes()),
                                                                files["original"])
    return found


def measure(variants, rounds):
    "CPU seconds per image of each variant in each round; they take turns."
    seconds = {name: [] for name in variants}
    for round in range(rounds + 1):
        for name, (sample, paths) in variants.items():
            torch.manual_seed(0)
            began = time.process_time()
            for path in paths: sample(path)
            if round: seconds[name].append((time.process_time() - began) / len(paths))  # the first round warms up
    return seconds


def largest_difference(paths):
    "Between the pixels of any two decoders."
    def pixels(image): return np.asarray(image.permute(1, 2, 0) if isinstance(image, torch.Tensor) else image, int)
    pairs = [(pixels(read(path)), pixels(read_image(path))) for path in paths for read in readers().values()]
    return max(np.abs(one - other).max() for one, other in pairs)


def facts(asked, quality, difference):
    "The line above the table: on what this was measured."
    names = ["torch", "torchvision", "simplejpeg", *(["torchcodec"] if torchcodec else []), "Pillow"]
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    return (f"# {hardware()}; {packages} (libjpeg-turbo {features.version('libjpeg_turbo')}); {asked.images} JPEGs "
            f"{SIZE[0]} x {SIZE[1]}, quality {quality}; CPU time of the fastest of {asked.rounds} rounds, one thread; "
            f"the decoders' pixels differ by at most {difference}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("decode.tsv"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        files, quality = make_files(Path(folder), asked.images)
        size = {name: statistics.mean(path.stat().st_size for path in paths) / 1000 for name, paths in files.items()}
        line = facts(asked, quality, largest_difference(files["original"]))
        seconds = measure(variants(files), asked.rounds)
    lines = [[which, round(size.get(which, size["original"]), 1), decoder, what,
              round(1000 * min(s), 3), round(1000 * statistics.median(s), 3), round(1 / min(s), 1)]
             for (which, decoder, what), s in seconds.items()]
    with open(asked.out, "w", newline="") as file:
        print(line, file=file)
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([COLUMNS, *lines])
    print(asked.out.read_text(), end="")


if __name__ == "__main__": main()
