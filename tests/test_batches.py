"Images in memory are read a batch at once, and captions read once: the numbers are those of one by one, bit for bit."
import copy
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from conftest import colours
from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.transforms import v2

from carot import train
from carot.data import ArrayImages, CaptionedImages, InBatches, split_transform

CLIPS = {(size, learning): image_transform_v2(PreprocessCfg(size=size), is_train=learning,
                                              aug_cfg=AugmentationCfg(scale=(0.5, 1.0)) if learning else None)
         for size in (8, 16, 20) for learning in (False, True)}
LAST = [transforms.ToTensor(), transforms.Normalize([0.4, 0.5, 0.6], [0.1, 0.2, 0.3])]
OTHERS = {
    "flipped": transforms.Compose([transforms.RandomHorizontalFlip(), *LAST]),
    "jittered": transforms.Compose([transforms.ColorJitter(0.4), *LAST]),
    "grey": transforms.Compose([transforms.Grayscale(), transforms.ToTensor()]),
    "erased": transforms.Compose([*LAST, transforms.RandomErasing(1.0)]),
    "second version": v2.Compose([v2.RandomResizedCrop(8), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]),
    "a function": lambda image: torch.rand(3) + np.asarray(image).mean(),
    "limited": transforms.Compose([transforms.Resize(15, max_size=16), transforms.CenterCrop(16), *LAST])}


def same(one, other):
    return type(one) is type(other) and (torch.equal(one, other) and one.stride() == other.stride()
                                         if isinstance(one, torch.Tensor) else one == other)


@pytest.mark.parametrize("transform", [*CLIPS.values(), *OTHERS.values(), None],
                         ids=[*(f"{size} {'training' if learning else 'evaluation'}" for size, learning in CLIPS),
                              *OTHERS, "none"])
@pytest.mark.parametrize("kept", [range(40), [39, 4, 4, 17]], ids=["all", "subset"])
def test_a_batch_is_what_its_items_are(toy, transform, kept):
    toy.train = Subset(colours(10, 0, transform), list(kept))
    captioned, keys = CaptionedImages(toy, seed=3), [(epoch, index) for epoch in (0, 2) for index in range(len(kept))]
    before = torch.get_rng_state()
    together = captioned.__getitems__(keys)
    assert torch.equal(before, torch.get_rng_state())
    for items in zip(together, map(captioned.__getitem__, keys)): assert all(map(same, *items))
    torch.manual_seed(1)
    together = InBatches(toy.train).__getitems__([2, 0])
    torch.manual_seed(1)
    for items in zip(together, [toy.train[2], toy.train[0]]): assert all(map(same, *items))


def test_what_is_done_at_once():
    "The steps for each image: none where size and colours are right."
    counts = {key: len(split_transform(transform, (16, 16))[0]) for key, transform in CLIPS.items()}
    assert counts == {(8, False): 3, (8, True): 2, (16, False): 0, (16, True): 2, (20, False): 3, (20, True): 2}
    assert all(split_transform(transform, (16, 16))[1] for transform in CLIPS.values())
    assert [name for name, transform in OTHERS.items() if split_transform(transform, (16, 16))[1]] == [
        "flipped", "limited"]
    assert len(split_transform(OTHERS["limited"], (16, 16))[0]) == 2


class Darker:
    "Images of another data set, which knows everything that that one knows."
    def __init__(self, images): self.images = images
    def __len__(self): return len(self.images)
    def __getattr__(self, name): return getattr(self.images, name)
    def __getitem__(self, index): return self.images[index][0] / 2, self.images[index][1]


class Inverted(ArrayImages):
    def __getitem__(self, index): return -super().__getitem__(index)[0], 3


def inverted(images): return Inverted(images.images, images.labels, images.transform)


@pytest.mark.parametrize("below", [Darker, inverted])
def test_a_data_set_of_ones_own_is_asked_item_by_item(toy, below):
    dataset = below(colours(10, 0, CLIPS[16, False]))
    for outer in (dataset, Subset(dataset, range(40))):
        images, labels = next(iter(DataLoader(InBatches(outer), 5)))
        assert torch.equal(images, torch.stack([dataset[index][0] for index in range(5)]))
        captioned = CaptionedImages(replace(toy, train=outer), seed=1)
        assert torch.equal(captioned.__getitems__([(0, 3)])[0][0], dataset[3][0])


@pytest.fixture
def tokenizer(): return open_clip.SimpleTokenizer(context_length=12)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_is_bit_for_bit_that_of_single_images(tiny_clip, tokenizer, toy, monkeypatch, workers):
    def run(name):
        toy.train = colours(10, 0, CLIPS[16, True])
        return train.fine_tune(copy.deepcopy(tiny_clip), tokenizer, toy, name, epochs=2, batch_size=8, lr=1e-3,
                               warmup_steps=1, workers=workers, device="cpu", precision="fp32").student.state_dict()
    fast = {name: run(name) for name in ("ft", "flyp")}
    monkeypatch.delattr(CaptionedImages, "__getitems__")
    monkeypatch.setattr(train, "remember_tokens", lambda tokenizer: tokenizer)
    for name, weights in fast.items():
        slow = run(name)
        assert all(torch.equal(weights[part], slow[part]) for part in slow)


def test_captions_are_read_once(tokenizer):
    read, original = [], open_clip.SimpleTokenizer.encode
    class Counting(open_clip.SimpleTokenizer):
        def encode(self, text):
            read.append(text)
            return original(self, text)
    remembered = train.remember_tokens(Counting(context_length=12), most=2)
    for captions in (["a star", "a sun", "a star"], ["a sun"], ["a moon", "a star"]):
        assert torch.equal(remembered(captions), tokenizer(captions))
    assert read == ["a star", "a sun", "a moon", "a star"]  # no more than two are kept
    assert train.remember_tokens(list) is list
