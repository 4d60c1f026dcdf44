"""A small ImageNet with its five shifts, laid out and mapped like the real ones; nothing here uses carot.

Every image has the colour of its class number among the 1,000: three decimal digits as red, green and blue,
25 apart, which JPEG leaves legible. The number comes from the WordNet id in timm's list.
"""
import json
import random
from pathlib import Path

import numpy as np
import timm
from PIL import Image

INFO = Path(timm.__file__).parent/"data"/"_info"
WNIDS = (INFO/"imagenet_synsets.txt").read_text().split()
NAMES = dict(line.split("\t") for line in (INFO/"imagenet_synset_to_lemma.txt").read_text().splitlines())
SUBSETS = {f"ImageNet{which.upper()}": (INFO/f"imagenet_{which}_synsets.txt").read_text().split() for which in "ar"}
MAPPED, FOLDERS = 113, 313  # of ObjectNet


def colour(number):
    return tuple(25 * int(digit) + 12 for digit in f"{number:03d}")


def number(pixel):
    "The class number that a colour spells."
    digits = np.rint((np.asarray(pixel, dtype=float) - 12) / 25).clip(0, 9)
    return int(digits @ [100, 10, 1])


def objectnet(seed=0):
    "Folder -> ImageNet class numbers: none for most, several for some."
    rng = random.Random(seed)
    folders = [f"{'object thing gadget'.split()[i % 3]}_{i * 37 % FOLDERS}" for i in range(FOLDERS)]
    unique = [i for i, wnid in enumerate(WNIDS) if list(NAMES.values()).count(NAMES[wnid]) == 1]  # there are two cranes
    numbers = iter(rng.sample(unique, 300))
    mapped = set(rng.sample(folders, MAPPED))
    return {folder: [next(numbers) for _ in range(rng.choice([1, 1, 1, 2, 3]))] if folder in mapped else []
            for folder in folders}


def write_mappings(folder, covered):
    "The four files of ObjectNet's distribution."
    folder.mkdir(parents=True)
    lines = list(range(1000))
    random.Random(1).shuffle(lines)  # the class on each line
    label = {name: name.replace("_", " ").capitalize() for name in covered}
    (folder/"folder_to_objectnet_label.json").write_text(json.dumps(label))
    (folder/"objectnet_to_imagenet_1k.json").write_text(json.dumps(
        {label[name]: "; ".join(NAMES[WNIDS[i]] for i in numbers) for name, numbers in covered.items() if numbers}))
    (folder/"pytorch_to_imagenet_2012_id.json").write_text(json.dumps({str(i): line for line, i in enumerate(lines)}))
    (folder/"imagenet_to_label_2012_v2").write_text("".join(f"{NAMES[WNIDS[i]]}\n" for i in lines))


def write_images(folder, numbers, suffix="JPEG", size=24, border=False):
    "An image for each class number."
    folder.mkdir(parents=True, exist_ok=True)
    for i, n in enumerate(numbers):
        image = Image.new("RGB", (size + 4 * i, size), colour(n))
        if border:
            framed = Image.new("RGB", (image.width + 4, image.height + 4), (255, 0, 0))
            framed.paste(image, (2, 2))
            image = framed
        image.save(folder/f"{folder.name}_{i}.{suffix}", format="PNG" if suffix == "png" else "JPEG", quality=95)


def write_tree(root, train=2, quirks=True):
    "All six sets below a folder, with what real copies have in them besides."
    root = Path(root)
    for i, wnid in enumerate(WNIDS):
        if train: write_images(root/"ILSVRC2012"/"train"/wnid, [i] * train)
        write_images(root/"ILSVRC2012"/"val_dirs"/wnid, [i])
        write_images(root/"ImageNetV2-matched-frequency"/str(i), [i], "jpeg")
        write_images(root/"sketch"/wnid, [i])
    for name, folder in [("ImageNetA", "imagenet-a"), ("ImageNetR", "imagenet-r")]:
        for wnid in SUBSETS[name]: write_images(root/folder/wnid, [WNIDS.index(wnid)], "jpg")
        (root/folder/"README.txt").write_text("beside the class folders")
    rng, covered = random.Random(2), objectnet()
    for folder, numbers in covered.items():  # a class that several of ImageNet's stand for looks like one of them
        shown = [rng.choice(numbers or [500]) for _ in range(2)]
        write_images(root/"objectnet-1.0"/"images"/folder, shown, "png", border=True)
    write_mappings(root/"objectnet-1.0"/"mappings", covered)
    if quirks: add_quirks(root)
    return covered


def write_corrupted(root, folders, wnids=WNIDS, size=8):
    "Sets of ImageNet-C, an image for each class: `folders` are like fog/3 or, as in its archives, weather/fog/3."
    for folder in folders:
        for wnid in wnids:
            place = Path(root)/folder/wnid
            place.mkdir(parents=True)
            image = Image.new("RGB", (size, size), colour(WNIDS.index(wnid)))
            image.save(place/"ILSVRC2012_val_00000001.JPEG", quality=85)


def add_quirks(root):
    "Extra files, folders that are no classes, a broken JPEG."
    train = root/"ILSVRC2012"/"train"
    (train/"lost+found").mkdir()
    (train/WNIDS[3]/"._n.JPEG").write_bytes(b"of a Mac")
    (train/WNIDS[3]/".DS_Store").write_bytes(b"of a Mac")
    (train/WNIDS[4]/"list.txt").write_text("not an image")
    broken = train/WNIDS[5]/f"{WNIDS[5]}_0.JPEG"
    broken.write_bytes(broken.read_bytes()[:300])
    (root/"ILSVRC2012"/"val_dirs"/"val.txt").write_text("not a class")
    write_images(root/"old copies"/"cats", [1])
