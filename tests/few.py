"""A part of glyphs, for commands that are to be quick: `--benchmark few:FEW` where this file lies."""
from dataclasses import replace

from carot.benchmarks.glyphs import GLYPHS
from carot.data import ArrayImages, BenchmarkSpec


def every(images, step): return ArrayImages(images.images[::step], images.labels[::step], images.transform)


def load(root, transform, train_transform, eval_sets):
    glyphs = GLYPHS.load(root, transform, train_transform, eval_sets)
    sets = {name: replace(glyphs.eval[name], dataset=every(glyphs.eval[name].dataset, 10))
            for name in eval_sets or glyphs.eval}
    return replace(glyphs, name="few", train=every(glyphs.train, 3), val=every(glyphs.val, 4), eval=sets)


FEW = BenchmarkSpec("few", "a part of glyphs", load, {**GLYPHS.defaults, "warmup_steps": 5})
