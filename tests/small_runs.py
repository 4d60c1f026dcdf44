"""Runs of nine steps of a tiny CLIP, for tests of the loop, of checkpoints and of large batches."""
import copy

import open_clip
import pytest
import torch

from carot.methods.base import find_method
from carot.train import fine_tune

SETTINGS = dict(epochs=3, batch_size=16, lr=1e-3, warmup_steps=2, teacher_update_every=2, workers=0, device="cpu")


@pytest.fixture(scope="module", name="tokenizer")
def tiny_tokenizer(): return open_clip.get_tokenizer("ViT-B-16", context_length=12)


def settings_for(method, **change):
    "Those of `SETTINGS` that the method uses, and a change."
    return {name: value for name, value in SETTINGS.items() if find_method(method).uses(name)} | change


def tune(clip, tokenizer, toy, method, *, out=None, on_epoch=None, **change):
    "A run of a copy of the model."
    return fine_tune(copy.deepcopy(clip), tokenizer, toy, method, out=out, on_epoch=on_epoch,
                     **settings_for(method, **change))


def same(one, two):
    "Whether two modules have the same weights, bit by bit."
    return all(torch.equal(x, y) for x, y in zip(one.state_dict().values(), two.state_dict().values()))


class Killed(Exception): pass
