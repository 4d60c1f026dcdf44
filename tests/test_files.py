"""Compact image lists: what is found, that it is compact, that workers can read it."""
import os
import pickle
import tracemalloc

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from carot.benchmarks.files import ImagePaths, class_folders, list_folders, list_images, scan_classes
from carot.core import UserError


@pytest.fixture
def folder(tmp_path):
    for k, name in enumerate(("b", "a", "ä ö")):
        (tmp_path/name).mkdir()
        for i in range(3): Image.new("RGB", (4, 4), (40 * k, 20 * i, 0)).save(tmp_path/name/f"{i}.PNG")
    return tmp_path


def pixel(image): return np.array(image)[0, 0]


def test_order_follows_labels_then_names(folder):
    images = scan_classes(folder, {"ä ö": 0, "b": 1, "a": 2})
    assert [images.name(i) for i in range(9)] == [f"{name}/{i}.PNG" for name in ("ä ö", "b", "a") for i in range(3)]
    assert images.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert all(os.path.isfile(images.path(i)) for i in range(9))
    assert images.name(-1) == images.name(8)
    for wrong in (9, -10):
        with pytest.raises(IndexError): images[wrong]


def test_the_same_in_a_loader_with_workers(folder):
    images = scan_classes(folder, {"a": 0, "b": 1, "ä ö": 2}, pixel)
    alone, two = (list(DataLoader(images, 4, num_workers=n)) for n in (0, 2))
    assert all((x == y).all() and (a == b).all() for (x, a), (y, b) in zip(alone, two)) and len(two) == 3
    assert [tuple(x) for x in alone[0][0].tolist()] == [(40, 0, 0), (40, 20, 0), (40, 40, 0), (0, 0, 0)]
    assert pickle.loads(pickle.dumps(images)).name(7) == images.name(7)  # for workers that are spawned


def test_subset(folder):
    images = scan_classes(folder, {"a": 0, "b": 1, "ä ö": 2}, pixel)
    some = images.subset(range(0, 9, 2))
    assert len(some) == 5
    assert all((some[i][0] == images[2 * i][0]).all() and some[i][1] == images[2 * i][1] for i in range(5))


def test_what_is_an_image(tmp_path):
    for name in ("x.jpg", "x.JPEG", "x.webp", "x.txt", "x.jpg.part", ".x.jpg", "._x.jpg", "jpg"):
        (tmp_path/name).touch()
    (tmp_path/"folder.jpg").mkdir()
    (tmp_path/".cache").mkdir()
    (tmp_path/"gone.png").symlink_to(tmp_path/"nowhere")
    (tmp_path/"self.png").symlink_to(tmp_path/"self.png")
    (tmp_path/"round").symlink_to(tmp_path)
    assert list_images(tmp_path) == ["gone.png", "self.png", "x.JPEG", "x.jpg", "x.webp"]
    assert list_folders(tmp_path) == ["folder.jpg", "round"]
    images = scan_classes(tmp_path, {"round": 0, "folder.jpg": 1})
    for name in ("gone.png", "self.png", "x.jpg"):
        names = [images.name(i) for i in range(len(images))]
        with pytest.raises(UserError, match=name): images[names.index(f"round/{name}")]


@pytest.mark.skipif(os.name == "nt", reason="names are bytes on POSIX only")
def test_names_that_are_no_text(tmp_path):
    odd = os.fsencode(tmp_path) + b"/class/\xff.png"
    (tmp_path/"class").mkdir()
    try: Image.new("RGB", (2, 2)).save(os.fsdecode(odd))
    except OSError: pytest.skip("the file system takes text only")
    assert scan_classes(tmp_path, {"class": 5}, pixel)[0][1] == 5


def test_refusals(folder):
    assert class_folders(folder, {"a": 1, "b": 0}, ["ä ö"]) == ["b", "a"]
    for arguments, words in [((folder, {"a": 0, "b": 1}), "ä ö is none of the 2"),
                             ((folder/"c", {"a": 0}), "no folder"),
                             ((folder, {}), "none of the 0"), ((folder/"a", {"a": 0}), "no image in the class folders"),
                             ((folder/"a"/"0.PNG", {"a": 0}), "no folder")]:
        with pytest.raises(UserError, match=words): scan_classes(*arguments)
    with pytest.raises(UserError, match="2 images but 1 labels"): ImagePaths(["a", "b"], [0])
    with pytest.raises(UserError, match="cannot list"): list_images(folder/"c")


def test_no_object_per_image():
    n = 100_000
    tracemalloc.start()
    images = ImagePaths((f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(n)), np.zeros(n, np.int32))
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    path = sum(len(images.name(i)) for i in range(0, n, 100)) * 100 / n
    assert held / n < 12 + path + 5 and most / n < 5 * (12 + path), (held / n, most / n)
    assert isinstance(images.paths, np.ndarray) and images.paths.dtype == np.uint8
