"""The benchmark contract, on whatever benchmark is built in."""
import numpy as np
import pytest
import torch
from PIL import Image

from carot.data import ArrayImages, CaptionedImages, EpochBatches, EvalSet, load_benchmark, sample_seeds
from carot.core import UserError, write_atomic
from carot.benchmarks.glyphs import RECIPES, make_set, render

@pytest.fixture(scope="module")
def glyphs(): return load_benchmark("glyphs")

def test_glyphs_shape(glyphs):
    assert (
        len(glyphs.classnames) == len(set(glyphs.classnames)) == 100
        and len(glyphs.train) == 3000
        and len(glyphs.val) == 1000
    )
    assert [len(s) for s in glyphs.eval.values()] == [5000] * 6
    assert [s.id for s in glyphs.eval.values()] == [True] + [False] * 5
    for s in glyphs.eval.values():
        labels = s.dataset.labels
        assert (np.diff(labels) >= 0).all() and (np.bincount(labels) == 50).all(), "class order, balanced"
        image, label = s.dataset[77]
        assert isinstance(image, Image.Image) and image.size == (32, 32) and image.mode == "RGB" and label == 1

def test_no_image_in_two_sets(glyphs):
    sets = [glyphs.train, glyphs.val, *(s.dataset for s in glyphs.eval.values())]
    digests = [{hash(image.tobytes()) for image in s.images} for s in sets]
    assert sum(map(len, digests)) == len(set().union(*digests)) == 34000

def test_same_seed_same_images(glyphs):
    images, labels = make_set("val")
    assert np.array_equal(images.numpy(), glyphs.val.images) and np.array_equal(labels.numpy(), glyphs.val.labels)

def test_typical_backgrounds_are_as_frequent_as_said():
    "With ρ = 1 the pictures of a class agree about their background, with ρ = 0 they do not."
    def spread(rho):
        images, _ = render("photo", torch.full((400,), 7), torch.Generator().manual_seed(0), rho=rho)
        return images[:, :, :4, :4].float().mean((2, 3)).std(0).mean()
    assert spread(1.0) < 0.6 * spread(0.0)

def test_seeds_differ_between_sets(): assert len({seed for _, seed, _ in RECIPES.values()}) == len(RECIPES)

@pytest.mark.parametrize(
    "groups, want", [([[0], [2]], [1.0, 3.0]), ([[0, 1], [2, 3]], [2.0, 4.0]), (None, [1.0, 2.0, 3.0, 4.0])]
)
@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_project(groups, want, kind):
    assert EvalSet([], False, groups).project(kind([1.0, 2.0, 3.0, 4.0])).tolist() == want


def test_augmentation_leaves_the_global_generator_alone(toy):
    torch.manual_seed(0)
    want = torch.rand(1)
    torch.manual_seed(0)
    CaptionedImages(toy, 1)[0, 0]
    assert torch.rand(1) == want

def test_captions_differ_between_epochs_and_repeat_with_the_seed(toy):
    def captions(seed, epoch): return [CaptionedImages(toy, seed)[epoch, i][1] for i in range(40)]
    assert captions(1, 0) == captions(1, 0) != captions(1, 1) and captions(1, 0) != captions(2, 0)

@pytest.mark.parametrize("n, batch", [(10, 3), (9, 3), (1, 5), (100, 100)])
def test_batches_cover_an_epoch(n, batch):
    batches = list(EpochBatches(n, batch, 1, 0))
    assert sorted(i for b in batches for _, i in b) == list(range(n)) and len(batches) == len(
        EpochBatches(n, batch, 1, 0)
    ) == -(-n // batch)


def test_samples_do_not_collide(): assert len({sample_seeds(1, e, i) for e in range(20) for i in range(500)}) == 10000

def test_images_and_labels_must_agree():
    with pytest.raises(UserError, match="2 images but 3 labels"):
        ArrayImages(np.zeros((2, 3, 4, 4), "uint8"), [0, 1, 2])


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    file = write_atomic(tmp_path/"a.txt", "old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError): write_atomic(file, "new")
    assert file.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]
