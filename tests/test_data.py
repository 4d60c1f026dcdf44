"""The benchmark contract, on whatever benchmark is built in."""
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset

from carot.data import (ArrayImages, CaptionedImages, EpochBatches, EvalSet, image_labels, load_benchmark,
                        named_templates, plain_images, prepare, sample_seeds)
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


# the public stream of batches

@pytest.mark.parametrize("n, batch", [(10, 3), (9, 3), (1, 5), (3, 8), (7, 7)])
def test_full_batches_cover_the_stream(n, batch):
    "Batch k holds the stream's positions k·B to (k + 1)·B, over the borders of epochs; and every start resumes it."
    per_epoch, epochs = -(-n // batch), 6
    found = [list(EpochBatches(n, batch, 1, epoch, full=True)) for epoch in range(epochs)]
    assert {len(b) for epoch in found for b in epoch} == {batch} and {len(epoch) for epoch in found} == {per_epoch}
    orders = [[(e, int(i)) for i in np.random.default_rng([1, e]).permutation(n)] for e in range(epochs * batch)]
    assert sum(sum(found, []), []) == sum(orders, [])[:epochs * per_epoch * batch]
    for epoch in range(epochs):
        for start in range(per_epoch + 1):
            rest = EpochBatches(n, batch, 1, epoch, start, full=True)
            assert list(rest) == found[epoch][start:] and len(rest) == per_epoch - start


def test_full_batches_are_the_usual_ones_where_these_are_full():
    for epoch in range(3): assert list(EpochBatches(12, 4, 5, epoch, full=True)) == list(EpochBatches(12, 4, 5, epoch))


def test_captions_and_augmentation_follow_the_key(toy):
    captioned = CaptionedImages(toy, seed=1)
    (batch,) = EpochBatches(40, 64, 1, 0, full=True)
    assert {epoch for epoch, _ in batch} == {0, 1} and len(batch) == 64
    seen = {}
    for epoch, index in batch: seen.setdefault(index, set()).add(captioned[epoch, index][1])
    assert any(len(captions) == 2 for captions in seen.values())


# what load_benchmark keeps

@pytest.mark.parametrize("name", ["glyphs", "plain_glyphs", "handwriting"])
def test_plain_is_the_same_images_otherwise_transformed(name):
    benchmark = load_benchmark(name, None, lambda image: ("plain", image.tobytes()), lambda image: image.tobytes())
    plain = benchmark.plain()
    assert len(plain) == len(benchmark.train) and np.array_equal(plain.labels, benchmark.train.labels)
    for i in (0, 7, len(plain) - 1): assert plain[i] == (("plain", benchmark.train[i][0]), benchmark.train[i][1])
    assert benchmark.val[0][0][0] == "plain" and benchmark.transform(Image.new("RGB", (1, 1)))[0] == "plain"
    assert benchmark.train_transform(Image.new("RGB", (1, 1))) == bytes(3)


# shots, templates

def labelled(labels): return SimpleNamespace(labels=labels)

@pytest.mark.parametrize("dataset", [
    labelled([0, 2, 1]), labelled(torch.tensor([0, 2, 1])), labelled(lambda: [0, 2, 1]),
    SimpleNamespace(targets=[0, 2, 1]), [("a", 0), ("b", 2), ("c", 1)]])
def test_labels_of_any_data_set(dataset): assert image_labels(dataset).tolist() == [0, 2, 1]


def test_labels_read_from_images_leave_the_generator_alone(toy):
    class Unknown:
        def __len__(self): return 12
        def __getitem__(self, index): return toy.train[index]
    torch.manual_seed(0)
    want = torch.rand(1)
    torch.manual_seed(0)
    assert image_labels(Subset(Unknown(), [3, 11])).tolist() == [0, 1] and torch.rand(1) == want


def test_shots_decode_nothing_and_are_balanced(glyphs):
    class NoImages:
        labels = glyphs.train.labels
        def __len__(self): return len(self.labels)
        def __getitem__(self, index): raise AssertionError("decoded")
    images = NoImages()
    few = prepare(replace(glyphs, train=images, loaded=images, plain=NoImages), SimpleNamespace(shots=4, seed=3))
    assert np.bincount(image_labels(few.train)).tolist() == [4] * 100
    assert plain_images(few).indices == few.train.indices and plain_images(few).dataset is not images
    assert prepare(few, SimpleNamespace(shots=4, seed=3)) is few
    assert prepare(few, SimpleNamespace(shots=2, seed=3)).train.dataset is few.train


def test_shots_of_a_subset(toy):
    whole = replace(toy, train=Subset(toy.train, range(39, -1, -1)))
    few = prepare(whole, SimpleNamespace(shots=1, seed=0))
    assert [few.train[i][1] for i in range(4)] == [3, 2, 1, 0] and few.plain is None


def test_too_many_shots(toy):
    with pytest.raises(UserError, match="shots=11, but class 'red' has 10 training images"):
        prepare(toy, SimpleNamespace(shots=11, seed=0))
    with pytest.raises(UserError, match="class 'green' has 0"):
        prepare(replace(toy, train=Subset(toy.train, range(10))), SimpleNamespace(shots=1, seed=0))


def test_templates_by_name_and_from_a_file(toy, tmp_path):
    for name, n in [("openai", 80), ("reduced", 7), ("simple", 1)]:
        assert len(prepare(toy, SimpleNamespace(templates=name)).templates) == n
    (tmp_path/"mine.txt").write_text("one {}\n\n  another {} \n", encoding="utf-8-sig")
    assert prepare(toy, SimpleNamespace(templates=str(tmp_path/"mine.txt"))).templates == ["one {}", "another {}"]
    (tmp_path/"bad.txt").write_text("no slot\n")
    with pytest.raises(UserError, match="exactly one {}"):
        prepare(toy, SimpleNamespace(templates=str(tmp_path/"bad.txt")))
    with pytest.raises(UserError, match="'openia' .did you mean 'openai'..; known: openai, reduced, simple, or a file"):
        prepare(toy, SimpleNamespace(templates="openia"))
    (tmp_path/"latin.txt").write_bytes("größer {}".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"): prepare(toy, SimpleNamespace(templates=tmp_path/"latin.txt"))


def test_openai_templates_are_those_of_open_clip(toy):
    own = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES, "reduced": open_clip.SIMPLE_IMAGENET_TEMPLATES}
    for name in own:
        assert [t.format("fish") for t in named_templates(name)] == [template("fish") for template in own[name]]


def test_nothing_to_train_on(toy):
    empty = replace(toy, train=[])
    assert prepare(empty, SimpleNamespace(templates=None)) is empty
    with pytest.raises(UserError, match="has no training images"): prepare(empty, SimpleNamespace(shots=None))
