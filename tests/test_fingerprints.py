"What a run is made of: every change of data and weights is seen and named, copies are the same, and nothing hangs."
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

from carot import clip
from carot.benchmarks import handwriting
from carot.benchmarks.corruptions import Corrupted
from carot.benchmarks.files import SEEN_WHOLE, ImagePaths, scan_classes
from carot.benchmarks.pairs import PairImages
from carot.benchmarks.shards import ShardImages, shard_path
from carot.benchmarks.shrink import write_shards
from carot.core import UserError, model_digest
from carot.data import ArrayImages, benchmark_spec, load_benchmark, prepare
from carot.runs.fingerprints import (SEEN, data_and_weights, differences, digest_of, fingerprint_for, fingerprint_of,
                                     identity_of, look_once, weights_of)
from carot.runs.settings import resolve

from conftest import TINY_VIT

# ---- folders


def write(file, seed, size=60):
    "A file that no index opens: any bytes are an image to it."
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(random.Random(seed).randbytes(size))


def make_folder(place, seed=0):
    for part in ("train", "val", "test", "dark"):
        for name in ("a", "b", "c"):
            for i in range(3): write(place/part/name/f"{i}.png", f"{seed} {part} {name} {i}")
    (place/"templates.txt").write_text("a {}\nthe {}\n")
    (place/"classnames.txt").write_text("a\tape\nb\tbee\nc\tcat\n")
    return place


@pytest.fixture
def folder(tmp_path): return make_folder(tmp_path/"one"/"pets")


def now(folder, **settings): return fingerprint_for(resolve({"benchmark": str(folder), "method": "ft", **settings}))


def rename_class(folder):
    for part in ("train", "val", "test", "dark"): (folder/part/"b").rename(folder/part/"bb")
    (folder/"classnames.txt").write_text("a\tape\nbb\tbee\nc\tcat\n")


def swap(one, other):
    one.rename(one.with_name("between"))
    other.rename(one)
    one.with_name("between").rename(other)


def edit(file, old, new): file.write_text(file.read_text().replace(old, new))


NOT_THE_SAME = r"^some images of {} are not the same"
CHANGES = {
    "an image more": (lambda f: write(f/"train/a/9.png", 1), r"^train has 10 images and had 9$"),
    "an image less": (lambda f: (f/"dark/c/1.png").unlink(), r"^dark has 8 images and had 9$"),
    "one of the same size": (lambda f: write(f/"train/b/1.png", 1), NOT_THE_SAME.format("train")),
    "one of another size": (lambda f: write(f/"val/b/2.png", 1, 61), NOT_THE_SAME.format("val")),
    "one that is empty now": (lambda f: (f/"test/b/2.png").write_bytes(b""), NOT_THE_SAME.format("test")),
    "one that is a pipe": (lambda f: ((f/"dark/a/0.png").unlink(), os.mkfifo(f/"dark/a/0.png")),
                           NOT_THE_SAME.format("dark")),
    "one that is a dangling link": (lambda f: ((f/"dark/a/0.png").unlink(), (f/"dark/a/0.png").symlink_to("x")),
                                    NOT_THE_SAME.format("dark")),
    "one renamed": (lambda f: (f/"train/c/2.png").rename(f/"train/c/3.png"), NOT_THE_SAME.format("train")),
    "one in another class": (lambda f: (f/"train/c/2.png").rename(f/"train/b/3.png"), NOT_THE_SAME.format("train")),
    "two images exchanged": (lambda f: swap(f/"train/c/2.png", f/"train/a/2.png"), NOT_THE_SAME.format("train")),
    "two classes exchanged": (lambda f: swap(f/"train/a", f/"train/b"), NOT_THE_SAME.format("train")),
    "two sets exchanged": (lambda f: swap(f/"test", f/"dark"), NOT_THE_SAME.format("test and dark")),
    "a class folder renamed": (rename_class, NOT_THE_SAME.format("train, val, test and dark")),
    "a class renamed": (lambda f: edit(f/"classnames.txt", "bee", "wasp"),
                        r"^the classes are others: 'wasp' is new, 'bee' is gone$"),
    "classes in another order": (lambda f: (f/"classnames.txt").write_text("b\tbee\na\tape\nc\tcat\n"),
                                 r"^the classes are in another order$"),
    "a class more": (lambda f: [*(write(f/part/"d"/"0.png", part) for part in ("train", "val", "test")),
                                edit(f/"classnames.txt", "cat\n", "cat\nd\tdog\n")],
                     r"^the classes are others: 'dog' is new$"),
    "no names": (lambda f: (f/"classnames.txt").unlink(),
                 r"^the classes are others: 'a', 'b' and 'c' are new, 'ape', 'bee' and 'cat' are gone$"),
    "another template": (lambda f: edit(f/"templates.txt", "the", "one"),
                         r"^the templates are others: 'one \{\}' is new, 'the \{\}' is gone$"),
    "a set more": (lambda f: shutil.copytree(f/"dark", f/"fog"), r"^the set fog is new$"),
    "a set less": (lambda f: shutil.rmtree(f/"dark"), r"^there is no set dark any more$"),
    "a class less in a shift": (lambda f: shutil.rmtree(f/"dark"/"c"), r"^dark has 6 images and had 9$"),
    "another folder": (lambda f: (shutil.rmtree(f), make_folder(f, seed=1)),
                       NOT_THE_SAME.format("train, val, test and dark")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_and_named(folder, tmp_path, change):
    act, words = CHANGES[change]
    before = now(folder)
    record = {"data": json.loads(json.dumps(before))}
    names = {"benchmark": "pets", "classnames": before.classnames, "templates": before.templates}
    (tmp_path/"classes.json").write_text(json.dumps(names))
    act(folder)
    found = differences(record, {"data": now(folder)}, tmp_path)
    assert any(re.search(words, text) for text in found), found
    assert differences(record, {"data": json.loads(json.dumps(now(folder)))})  # without anybody's names


def test_a_copy_is_the_same_wherever_and_whenever(folder, tmp_path, monkeypatch):
    before = now(folder)
    shutil.copytree(folder, tmp_path/"elsewhere"/"zoo")  # with new times
    (tmp_path/"elsewhere"/"zoo"/"README.txt").write_text("no image")
    assert now(tmp_path/"elsewhere"/"zoo") == before
    monkeypatch.chdir(folder.parent)
    assert now("pets") == now("pets/") == before
    os.rename(folder, folder.with_name("dogs"))
    assert now("dogs") == before


def test_before_a_run_and_in_it_it_is_the_same(folder, tmp_path):
    (tmp_path/"pairs.tsv").write_text("filepath\ttitle\none/pets/train/a/0.png\tan ape\n")
    for given in ({}, {"shots": 2, "seed": 3}, {"templates": "simple"}, {"eval_sets": "dark"},
                  {"method": "flyp", "pairs": str(tmp_path/"pairs.tsv")}):
        run = resolve({"benchmark": str(folder), "method": "ft", **given})
        sets = given.get("eval_sets") and [given["eval_sets"]]
        loaded = prepare(load_benchmark(folder, None, lambda image: 0, lambda image: 1, sets), run.settings)
        assert fingerprint_for(run) == fingerprint_of(loaded) == json.loads(json.dumps(fingerprint_of(loaded)))
        assert set(fingerprint_for(run)) == {"classes", "train", "val", *loaded.eval}
    assert now(folder, shots=1, seed=1)["train"] != now(folder, shots=1, seed=2)["train"]
    assert now(folder, seed=1) == now(folder, seed=2)


def test_where_nothing_is_known_nothing_differs(folder):
    before, run = now(folder), resolve({"benchmark": str(folder), "method": "ft"})
    shutil.rmtree(folder)
    assert data_and_weights(run)["data"] is None
    assert not differences({"data": before}, data_and_weights(run)) and not differences({}, {"data": before})
    assert fingerprint_for(resolve({"benchmark": "imagenet"})) is None


def test_what_is_here_and_cannot_be_loaded_is_an_error(folder):
    (folder/"val"/"c").rename(folder/"val"/"d")
    with pytest.raises(UserError, match="d is none of the 3 class folders"): now(folder)


def test_records_of_strangers_raise_nothing(folder, tmp_path):
    found = {"data": now(folder), "weights": "1"}
    for data in ({"train": 3}, {"train": {"images": "x", "digest": []}}, {"classes": [1], "val": None}, {"x\ny": {}}):
        assert differences({"data": data, "weights": "2"}, found)
    for text in ("", "[]", '{"classnames": 3}', '{"classnames": [1]}'):
        (tmp_path/"classes.json").write_text(text)
        words = differences({"data": {**found["data"], "classes": "x"}}, found, tmp_path)
        assert words == ["the class names or templates are others"]


def test_a_large_set_is_seen_by_its_sizes_and_a_sample(tmp_path):
    for i in range(SEEN_WHOLE + 100): write(tmp_path/"a"/f"{i:03d}.png", i, 10)
    def look(): return digest_of(identity_of(scan_classes(tmp_path, {"a": 0})))
    before = look()
    write(tmp_path/"a"/"001.png", 1, 11)
    assert look() != before
    write(tmp_path/"a"/"001.png", 1, 10)
    assert look() == before
    for i in range(SEEN_WHOLE + 100): write(tmp_path/"a"/f"{i:03d}.png", f"other {i}", 10)
    assert look() != before


def test_nothing_outlives_a_command(folder):
    with look_once():
        before = now(folder)
        write(folder/"train/a/9.png", 1)
        with look_once(): assert now(folder) is before
        assert now(folder) is before
        shots = [now(folder, shots=1, seed=seed)["train"] for seed in (1, 2, 1)]
        assert shots[0] == shots[2] != shots[1] and now(folder, templates="simple")["classes"] != before["classes"]
    assert now(folder) != before and not SEEN
    with pytest.raises(KeyError), look_once(): raise KeyError
    assert not SEEN

# ---- other data sets


def digest(dataset): return digest_of(identity_of(dataset))


def all_differ(*datasets): return len({digest(dataset) for dataset in datasets}) == len(datasets)


def test_subsets_and_wrappers():
    images = ArrayImages(np.arange(8 * 12, dtype=np.uint8).reshape(8, 3, 2, 2), np.arange(8) % 2)
    other = ArrayImages(images.images[::-1], images.labels)
    assert all_differ(images, other, Subset(images, range(8)), Subset(images, [1, 0]), Subset(images, [0, 1]),
                      Subset(Subset(images, [1, 0]), [1, 0]), Subset(other, [0, 1]), Corrupted(images, "fog", 1),
                      Corrupted(images, "fog", 2), Corrupted(images, "snow", 1), Corrupted(images, "fog", 1, side=2),
                      Corrupted(other, "fog", 1))
    assert digest(Subset(images, torch.tensor([1, 0]))) == digest(Subset(images, [1, 0]))


def test_somebody_elses_data_set_is_not_read():
    class Mine:
        "without anything but images"
        def __init__(self, n): self.n = n
        def __len__(self): return self.n
        def __getitem__(self, index): raise AssertionError("an image was read")

    class WithTargets(Mine):
        "like torchvision's"
        def __init__(self, targets): self.n, self.targets = len(targets), targets
    assert all_differ(Mine(3), Mine(4), WithTargets([0, 1, 1]), WithTargets([0, 0, 1]))
    assert digest(WithTargets([0, 1])) == digest(WithTargets(torch.tensor([0, 1])))


def test_pairs(tmp_path):
    for name in "ab": write(tmp_path/f"{name}.png", name)
    def pairs(files, captions=("x", "y"), root=tmp_path): return PairImages(files, captions, None, root)
    table = pairs(["a.png", "b.png"])
    assert all_differ(table, pairs(["b.png", "a.png"]), pairs(["a.png", "b.png"], ["y", "x"]),
                      pairs(["a.png", "b.png"], ["xy", ""]), pairs(["a.png", "a.png"]), pairs([], []))
    part = PairImages(table.images[1:], table.captions[1:], None, tmp_path)  # Arrow keeps the whole column
    assert digest(part) == digest(pairs(["b.png"], ["y"])) == digest(part.transformed(None))
    before = digest(table)
    write(tmp_path/"a.png", "c")
    assert digest(table) != before


def test_shards(tmp_path):
    from PIL import Image
    rng = np.random.default_rng(0)
    for name in ("x", "y"):
        for i in range(3):
            (tmp_path/"files"/name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path/"files"/name/f"{i}.png")
    images = scan_classes(tmp_path/"files", {"x": 0, "y": 1})
    for name in ("one", "two"): write_shards(images, ["x", "y"], tmp_path/name, shard_size=4)
    one, two = (ShardImages(tmp_path/name) for name in ("one", "two"))
    assert digest(one) == digest(two)
    assert all_differ(one, ShardImages(tmp_path/"one", {"y": 0, "x": 1}), ShardImages(tmp_path/"one", ignore=["x"]))
    with open(shard_path(tmp_path/"two", 0), "r+b") as tar:
        tar.seek(int(two.offset[two.shard == 0][0]) + 20)
        tar.write(b"\0\1\2\3")
    assert digest(one) != digest(two)


def test_files_and_labels(tmp_path):
    for name in ("a", "b"): write(tmp_path/f"{name}.png", "the same")
    def listed(names, labels): return ImagePaths([f"{name}.png" for name in names], labels, root=tmp_path)
    assert all_differ(listed("ab", [0, 1]), listed("ab", [1, 0]), listed("ba", [0, 1]), listed("a", [0]),
                      listed("", []))
    assert digest(listed("ab", [0, 1]).subset([1])) == digest(listed("b", [1]))
    assert digest(listed("", [])) == digest(ImagePaths([], [], root="/nowhere"))

# ---- benchmarks that carot draws


@pytest.mark.parametrize("name", ["glyphs", "plain_glyphs", "handwriting"])
def test_what_is_known_beforehand_is_what_is_loaded(name):
    loaded = load_benchmark(name)
    for given in ({}, {"method": "ft", "shots": 5, "seed": 2}, {"templates": "simple"}):
        run = resolve({"benchmark": name, **given})
        assert fingerprint_for(run) == fingerprint_of(prepare(loaded, run.settings))
    assert now("glyphs") != now("plain_glyphs")
    assert list(now("glyphs", eval_sets="GlyphsA")) == ["classes", "train", "val", "GlyphsA"]
    with pytest.raises(UserError, match="GlyphsR"): now("glyphs", eval_sets="GlyphsX")


def test_frozen_checksums_of_handwriting():
    digits = load_benchmark("handwriting")
    sets = {"train": digits.train, "val": digits.val, **{name: s.dataset for name, s in digits.eval.items()}}
    for name, images in sets.items():
        content = images.images.tobytes() + images.labels.astype(np.int64).tobytes()
        n, known = handwriting.SETS[name]
        assert len(images) == n and images.known == known
        if name != "Printed":  # not every version of FreeType draws alike
            assert hashlib.sha256(content).hexdigest().startswith(known)
    assert list(sets) == list(handwriting.SETS)


def test_what_carot_draws_is_known_without_drawing_or_open_clip():
    code = """if True:
        import sys, time
        from carot.runs.fingerprints import data_and_weights
        from carot.runs.settings import resolve
        runs = [resolve({"benchmark": name}) for name in ("glyphs", "plain_glyphs", "handwriting")]
        began = time.process_time()
        found = [data_and_weights(run) for run in runs]
        print(time.process_time() - began)
        assert found[0] != found[1] and not {"open_clip", "timm", "matplotlib", "sklearn"} & {*sys.modules}"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.5  # 0.02 s on a quiet machine


def test_sets_of_other_classes_are_others():
    glyphs = benchmark_spec("glyphs").outline()
    found = [replace(glyphs.eval["GlyphsA"], **change) for change in ({}, {"groups": [[0], [1, 2]]}, {"id": True},
                                                                      {"groups": [[0], [np.int64(1), 3]]})]
    assert len({fingerprint_of(replace(glyphs, eval={"A": s}))["A"]["digest"] for s in found}) == 4

# ---- weights


@pytest.fixture
def model(tmp_path): return clip.save_clip(clip.build_clip(json.loads(json.dumps(TINY_VIT))), tmp_path/"model")


def test_weights_are_known_by_their_content(model, tmp_path):
    before, weights = weights_of(str(model)), model/"open_clip_model.safetensors"
    shutil.copytree(model, tmp_path/"copy")
    (tmp_path/"copy"/"README.md").write_text("a model")
    assert weights_of(str(tmp_path/"copy")) == weights_of(f"local-dir:{tmp_path/'copy'}") == before
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    changed = weights_of(str(model))
    edit(model/"open_clip_config.json", "16", "17")
    assert len({before, changed, weights_of(str(model)), weights_of("glyphs")}) == 4
    assert weights_of("ViT-B-16", str(weights)) != weights_of("ViT-B-16", str(tmp_path/"copy"/weights.name))
    assert differences({"weights": before}, {"weights": changed}) == ["the model's weights are others"]


def test_weights_that_are_no_files(model, tmp_path):
    assert weights_of("ViT-B-16", "random") == "random" and weights_of("ViT-B-16", "openai") == "ViT-B-16/openai"
    assert weights_of("ViT-B-16", "laion2b_s34b_b88k") == "ViT-B-16/laion2b_s34b_b88k"
    for gone in (("ViT-B-16", "gone.pt"), ("ViT-B-16", str(tmp_path/"gone")), (str(tmp_path/"gone"), None)):
        assert weights_of(*gone) is None
    before, nothing = weights_of(str(model)), tmp_path/"empty"
    nothing.mkdir()
    for file in model.iterdir():
        file.unlink()
        os.mkfifo(file)
    assert weights_of(str(model)) == weights_of(str(nothing)) != before  # and nobody waits for a pipe


def test_the_file_that_is_looked_at_is_the_one_that_is_loaded(model):
    for name in ("head.safetensors", "z.pt", "a.bin"): (model/name).write_bytes(b"else")
    before = weights_of(str(model))
    for name in ("head.safetensors", "z.pt", "a.bin"): (model/name).unlink()
    assert weights_of(str(model)) == before and clip.folder_weights(model).name == "open_clip_model.safetensors"


def test_built_in_weights_are_checked_when_they_are_loaded(tmp_path, monkeypatch):
    assert model_digest(clip.WEIGHTS/"glyphs") == clip.BUILT_IN["glyphs"] == weights_of("glyphs")
    shutil.copytree(clip.WEIGHTS/"glyphs", tmp_path/"glyphs")
    monkeypatch.setattr(clip, "WEIGHTS", Path(tmp_path))
    clip.load_clip("glyphs")
    file = tmp_path/"glyphs"/"open_clip_model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="reinstall carot"): clip.load_clip("glyphs")
    file.unlink()
    with pytest.raises(UserError, match="reinstall carot"): clip.load_clip("glyphs")


def test_a_changed_model_of_a_run_is_named(model, folder):
    run = resolve({"benchmark": str(folder), "method": "ft", "model": str(model)})
    before = json.loads(json.dumps(data_and_weights(run)))
    assert before["weights"] == weights_of(str(model)) and not differences(before, data_and_weights(run))
    edit(model/"open_clip_config.json", "16", "17")
    assert differences(before, data_and_weights(run)) == ["the model's weights are others"]
