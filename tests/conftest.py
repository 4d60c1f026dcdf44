"""What the tests share: one CPU thread, a tiny CLIP and a tiny benchmark; how several workers divide them."""
import numpy as np
import pytest
import torch

from carot.clip import build_clip
from carot.data import ArrayImages, Benchmark, EvalSet

torch.set_num_threads(1)

def group_of(item):
    "Tests of one group stay on one worker: those of a file; a slow one is alone, unless its group is named."
    named = item.get_closest_marker("xdist_group")
    return named.args[0] if named else item.nodeid if item.get_closest_marker("slow") else item.path.name

def seconds_of(item):
    "As its marker says, of one core."
    slow = item.get_closest_marker("slow")
    return (slow.args or (10,))[0] if slow else 0

@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the groups
def pytest_collection_modifyitems(config, items):
    "For workers, `pytest -n 3 --dist loadgroup --no-loadscope-reorder`: what takes longest begins first."
    if not hasattr(config, "workerinput"): return
    total = {}
    for item in items: total[group_of(item)] = total.get(group_of(item), 0) + seconds_of(item)
    items.sort(key=lambda item: -total[group_of(item)])
    for item in items:
        if group_of(item) != item.nodeid: item.add_marker(pytest.mark.xdist_group(group_of(item)))

VISION = {"image_size": 16, "layers": 1, "width": 24, "head_width": 8, "patch_size": 8}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
TINY_VIT = {"model_cfg": {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}, "preprocess_cfg": {"size": 16}}

@pytest.fixture
def tiny_clip():
    torch.manual_seed(0)
    return build_clip(TINY_VIT).eval()

def colours(n, seed, transform=None, each=1):
    "n noisy squares of each of four colours; a class is as many colours as `each` says"
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(4), n)
    base = np.array([(220, 30, 30), (30, 180, 60), (40, 60, 220), (230, 210, 40)])[labels][:, :, None, None]
    images = (base + rng.normal(0, 40, (4 * n, 3, 16, 16))).clip(0, 255).astype("uint8")
    return ArrayImages(images, labels // each, transform)

@pytest.fixture
def toy():
    from torchvision.transforms import v2
    plain = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    train = v2.Compose([v2.RandomResizedCrop(16, scale=(0.9, 1.0)), plain])
    sets = {"Toy": EvalSet(colours(5, 2, plain), True),
            "ToyTwo": EvalSet(colours(5, 3, plain, each=2), False, [[0, 1], [2, 3]])}
    templates, names = ["a photo of a {}", "a {} thing", "something {}"], ["red", "green", "blue", "yellow"]
    return Benchmark("toy", names, templates, colours(10, 0, train), colours(3, 1, plain), sets)
