"""ImageNet and its shifts: label maps, folders, and a whole comparison on a generated tree."""
import copy
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from command import carot
from conftest import TINY_VIT
from fake_imagenet import MAPPED, SUBSETS, WNIDS, number, objectnet, write_images, write_tree
from safetensors.torch import load_file

from carot.benchmarks import imagenet
from carot.benchmarks.files import scan_classes
from carot.benchmarks.inspect import look_at_sets
from carot.clip import build_clip, load_clip, save_clip
from carot.core import UserError
from carot.data import Benchmark, EvalSet, load_benchmark
from carot.evaluate import predict_set
from carot.methods.base import all_methods
from carot.train import fine_tune

SHIFTS = ["ImageNetV2", "ImageNetR", "ImageNetA", "ImageNetSketch", "ObjectNet"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_tree(root)
    (root/"templates.txt").write_text("a photo of a {}.\n")
    return root


# truth, from WordNet ids and from the dictionary that the mapping files were written from: the class numbers of each
# own class, in order
OWN = {name: [[i] for i in range(1000)] for name in ("ImageNet", "ImageNetV2", "ImageNetSketch")}
OWN |= {name: [[WNIDS.index(wnid)] for wnid in sorted(wnids)] for name, wnids in SUBSETS.items()}
OWN["ObjectNet"] = [numbers for folder, numbers in sorted(objectnet().items()) if numbers]


class Stub:
    """Answers the class whose colour it sees, or its neighbour among a set's own classes; large logits everywhere else
    in the 1,000."""
    weight = torch.zeros(1)

    def __init__(self, own, shift):
        self.answer = {c: own[(k + shift) % len(own)][-1] for k, group in enumerate(own) for c in group}
        self.empty = torch.full((1000,), 50.0)  # of classes the set does not have
        self.empty[list(self.answer)] = 0.0

    def __call__(self, corners):
        logits = self.empty.repeat(len(corners), 1)
        logits[range(len(corners)), [self.answer[number(pixel)] for pixel in corners]] = 1.0
        return logits


def corner(image):
    "The first pixel: red, if a border is there."
    return torch.tensor(image.getpixel((0, 0)))


def test_label_maps(tree):
    benchmark = load_benchmark("imagenet", tree, corner)
    assert list(benchmark.eval) == ["ImageNet", *SHIFTS]
    assert [s.id for s in benchmark.eval.values()] == [True] + 5 * [False]
    assert [len(s) for s in benchmark.eval.values()] == [1000, 1000, 200, 200, 1000, 2 * MAPPED]
    for name, s in benchmark.eval.items():
        scores = []
        for shift in (0, 1, -1):
            p = predict_set(Stub(OWN[name], shift), s.dataset, s.project)
            assert p.logits.shape[1] == len(OWN[name]) == imagenet.SETS[name].n_classes
            scores.append((p.logits.argmax(1) == p.labels).float().mean().item())
        assert scores == [1, 0, 0], (name, scores)
        assert (np.diff(s.dataset.labels) >= 0).all()  # in class order
        assert set(s.dataset.labels) == set(range(len(OWN[name])))


def test_training_and_validation(tree):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        benchmark = load_benchmark("imagenet", tree, corner)
    assert ["lost+found" in str(w.message) for w in caught if "no classes" in str(w.message)] == [True]
    assert len(benchmark.train) == 2000 and len(benchmark.val) == 500 and benchmark.templates == ["a photo of a {}."]
    for i in [0, 1, 7, 998, 1999]:
        pixel, label = benchmark.train[i]
        assert number(pixel) == label == WNIDS.index(Path(benchmark.train.path(i)).parent.name)
    whole = benchmark.eval["ImageNet"].dataset
    assert [benchmark.val.name(i) for i in range(500)] == [whole.name(i) for i in range(0, 1000, 2)]
    with pytest.raises(UserError, match=f"{WNIDS[5]}_0.JPEG"): benchmark.train[10]


def test_border_is_two_pixels(tree):
    images = imagenet.load_set(tree, "ObjectNet").dataset
    assert images[0][0].size == (24, 24) and len(images[0][0].getcolors()) == 1


def test_names_and_templates_are_open_clips():
    import open_clip
    names, templates = imagenet.names_and_templates()
    assert names == list(open_clip.IMAGENET_CLASSNAMES)
    assert [t.format("X") for t in templates] == [t("X") for t in open_clip.OPENAI_IMAGENET_TEMPLATES]


SPELT = {"ILSVRC2012": ["imagenet", "ImageNet", "ILSVRC/Data/CLS-LOC", "."],
         "ImageNetV2-matched-frequency": ["imagenetv2-matched-frequency-format-val", "ImageNet-V2"],
         "imagenet-r": ["ImageNet-R", "imagenet_r"], "imagenet-a": ["ImageNetA"],
         "sketch": ["ImageNet-Sketch", "imagenet_sketch/sketch"], "objectnet-1.0": ["ObjectNet", "objectnet_1.0"]}


@pytest.mark.parametrize("turn", range(4))
def test_spellings(tree, tmp_path, turn):
    for folder, others in SPELT.items():
        spelling = others[turn % len(others)]
        if spelling == ".":
            for name, split in [("train", "train"), ("val", "val_dirs")]: (tmp_path/name).symlink_to(tree/folder/split)
            continue
        (tmp_path/spelling).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/spelling).symlink_to(tree/folder)
    for name in imagenet.SETS:
        here, there = imagenet.set_folder(tmp_path, name), imagenet.set_folder(tree, name)
        assert here.resolve() == there.resolve(), name


def link(tree, root, *without):
    "A copy of the tree without some of its sets."
    for folder in tree.iterdir():
        if folder.name not in without: (root/folder.name).symlink_to(folder)
    return root


def test_a_missing_set_is_left_out_by_name_only(tree, tmp_path):
    root = link(tree, tmp_path, "imagenet-r", "objectnet-1.0")
    with pytest.raises(UserError, match="ImageNetR is not in .*no folder imagenet-r .*ObjectNet is not in .*"
                                        "eval_sets .ImageNet,ImageNetV2,ImageNetA,ImageNetSketch\\)"):
        load_benchmark("imagenet", root)
    kept = ["ImageNet", "ImageNetV2", "ImageNetA", "ImageNetSketch"]
    assert list(load_benchmark("imagenet", root, eval_sets=kept).eval) == kept
    assert list(load_benchmark("imagenet", root, eval_sets=["ImageNetA"]).eval) == ["ImageNetA"]
    with pytest.raises(UserError, match="did you mean 'ImageNetR'"):
        load_benchmark("imagenet", root, eval_sets=["ImagenetR"])


def test_refusals(tree, tmp_path):
    def copy(name, folder, make):
        "the tree with another folder in place of one"
        root = tmp_path/name
        root.mkdir()
        make(link(tree, root, folder)/folder)
        return root

    def misspelt(folder):
        for wnid in WNIDS: write_images(folder/(wnid if wnid != WNIDS[7] else wnid + "_"), [0])
    def numbers(folder):
        for i in range(1000): (folder/str(i)).mkdir(parents=True)
    def half(folder):
        (folder/"images").mkdir(parents=True)
        (folder/"mappings").mkdir()
    def flat(folder):
        (folder/"train").mkdir(parents=True)
        write_images(folder/"val", [1, 2])
    def empty(folder):
        for wnid in WNIDS: (folder/wnid).mkdir(parents=True)
    def garbled(folder):
        folder.mkdir()
        (folder/"images").symlink_to(tree/"objectnet-1.0"/"images")
        (folder/"mappings").mkdir()
        for file in (tree/"objectnet-1.0"/"mappings").iterdir():
            (folder/"mappings"/file.name).write_text(file.read_text()[:-200])

    for name, folder, make, words in [
            ("a", "sketch", misspelt,
             f"{WNIDS[7]}_ is no class of this set, and 1 of its 1000 class folders are missing .{WNIDS[7]}"),
            ("b", "sketch", numbers, "0 is no class of this set, and 1000 of its"),
            ("c", "objectnet-1.0", half, "has a file folder_to_objectnet_label"),
            ("d", "ILSVRC2012", flat, "val is flat: .*valprep"),
            ("e", "sketch", empty, "no image in the class folders"),
            ("f", "imagenet-a", lambda folder: folder.symlink_to(tree/"imagenet-r"), "is no class of this set"),
            ("g", "imagenet-r", lambda folder: folder.symlink_to(tree/"sketch"),
             "is a class of ImageNet, but none of the 200"),
            ("h", "objectnet-1.0", garbled, "do not fit together"),
            ("i", "ILSVRC2012", lambda folder: folder.mkdir(), "no folder val_dirs"),
            ("j", "ImageNetV2-matched-frequency", lambda folder: folder.symlink_to(tree/"sketch"),
             "n01440764 is no class")]:
        with pytest.raises(UserError, match=words) as caught: load_benchmark("imagenet", copy(name, folder, make))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="parameter root"): load_benchmark("imagenet")


def test_a_look_at_every_set(tree, tmp_path):
    "Counts, and what is wrong with each set by itself; published counts are those of complete copies."
    reports = {report.name: report for report in look_at_sets("imagenet", tree)}
    assert list(reports) == list(imagenet.IMAGENET.counts) and imagenet.IMAGENET.counts["train"] == 1_281_167
    assert all(report.error for name, report in reports.items() if name != "ObjectNet")
    assert not reports["ObjectNet"].error and "not comparable" in reports["ObjectNet"].warning  # leniently
    root = link(tree, tmp_path, "imagenet-r")
    names = [report.name for report in look_at_sets(imagenet.IMAGENET, root, ["ImageNetR"])]
    assert names == ["train", "ImageNet", "ImageNetR"]
    assert "ImageNetR is not in" in look_at_sets(imagenet.IMAGENET, root, ["ImageNetR"])[-1].error
    for arguments, words in [((), "parameter root"), ((root/"x",), "no folder"), ((root, ["R"]), "unknown eval")]:
        with pytest.raises(UserError, match=words): look_at_sets("imagenet", *arguments)


# commands

def command(folder, *words):
    done = carot(*words, cwd=folder, OMP_NUM_THREADS="1")
    return done.returncode, done.stdout, done.stderr


FEW = ("--benchmark imagenet --model tiny --epochs 1 --batch-size 500 --warmup-steps 1 --threads 1 --workers 0 "
       "--no-preflight").split()


def test_a_broken_image_stops(tree, tmp_path, warm):
    "Unless it may be skipped: one line with its name, and exit code 2."
    save_clip(build_clip(TINY_VIT), tmp_path/"tiny")
    code, out, err = command(tmp_path, "run", *FEW, "--root", str(tree), "--method", "flyp", "--eval-sets", "ImageNet")
    *warnings, error = err.splitlines()  # the tree holds an image of a kind that is not read
    assert code == 2 and f"{WNIDS[5]}_0.JPEG" in error and error.startswith("carot: error:")
    assert len(warnings) <= 1 and all("left out" in line for line in warnings), err


USUAL = [name for name, method in all_methods().items() if method.usual]

@pytest.mark.slow(30)
@pytest.mark.parametrize("methods", [
    pytest.param(["zs", "lp-ft", "carot"], id="three"),
    pytest.param(USUAL, id="usual", marks=pytest.mark.long("50 s"))])
def test_from_the_command_line(methods, tree, tmp_path, warm):
    "The check, then methods for four steps on the whole tree, broken JPEG and strangers included; the report."
    torch.manual_seed(0)
    save_clip(build_clip(TINY_VIT), tmp_path/"tiny")
    code, out, err = command(tmp_path, "check", "--benchmark", "imagenet", "--root", str(tree), "--model", "tiny",
                             "--threads", "1", "--workers", "0")
    assert code == 2 and "lost+found" in out  # far fewer images than the real sets have
    counts = {"train": "2,000", "ImageNet": "1,000", "ImageNetV2": "1,000", "ImageNetR": "200", "ImageNetA": "200",
              "ImageNetSketch": "1,000", "ObjectNet": "226"}
    for name, n in counts.items():
        assert any(line.split()[:1] == [name] and n in line.split() for line in out.splitlines()), name
    code, out, err = command(tmp_path, "reproduce", *FEW, "--root", str(tree), "--on-bad-image", "skip", "--jobs", "2",
                             *(() if methods == USUAL else ("--methods", ",".join(methods))))
    assert code == 0, err
    folder = tmp_path/"expt_logs"/"imagenet"
    runs = {path.parent.name: path for path in folder.glob("*/*seed=1") if (path/"metrics.tsv").exists()}
    assert set(runs) == set(methods)
    for method, path in runs.items():
        config = json.loads((path/"config.json").read_text())
        assert config["complete"] and config["steps"] == {"zs": 0, "lp-ft": 8}.get(method, 4)
        skipped = [Path(name).name for name in config.get("skipped_images") or []]
        assert skipped == ([] if method == "zs" else [f"{WNIDS[5]}_0.JPEG"])
        predictions = {file.stem: load_file(file) for file in (path/"predictions").glob("*.safetensors")}
        assert {name: tuple(p["logits"].shape) for name, p in predictions.items()} == {
            "ImageNet": (1000, 1000), "ImageNetV2": (1000, 1000), "ImageNetR": (200, 200), "ImageNetA": (200, 200),
            "ImageNetSketch": (1000, 1000), "ObjectNet": (226, 113), "val": (500, 1000)}
        assert "lost+found" in (path/"run.ipynb").read_text()  # the warning is on record
    for words in ("Table 2", "Avg. shifts", "CaRot"): assert words in out
    report = (folder/"report"/"report.ipynb").read_text()
    for words in ("Beside the published figures", "as transcribed", "Not measured against the paper",
                  "every other one of them"): assert words in report


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return load_clip("ViT-B-16", "random")


@pytest.mark.xdist_group("vit")
@pytest.mark.slow(12)
@pytest.mark.parametrize("method", [name for name, method in all_methods().items() if method.trains and method.usual])
def test_a_step_of_vit_b_16(tree, vit, method):
    "Random weights, 224 pixels, two classes: one optimizer step moves what it should, on the CPU."
    clip, train, _, tokenizer = copy.deepcopy(vit[0]), *vit[1:]
    names, templates = imagenet.names_and_templates()
    folder, first = tree/"ILSVRC2012"/"val_dirs", {wnid: i for i, wnid in enumerate(WNIDS[:2])}
    images = scan_classes(folder, first, train, ignore=WNIDS[2:])
    two = Benchmark("two", names[:2], templates[:1], images, images, {"ImageNet": EvalSet(images, True)})
    before = {name: p.detach().clone() for name, p in clip.named_parameters()
              if "resblocks.0.attn.in_proj_weight" in name or name.split(".")[-1] == "proj"}
    trained = fine_tune(clip, tokenizer, two, method, epochs=1, batch_size=2, warmup_steps=1, lr=1e-5, workers=0,
                        precision="fp32", device="cpu")
    steps = [row for row in trained.log if row.get("stage", "train") == "train"]
    assert len(steps) == 1 and np.isfinite(steps[0]["loss"])
    assert clip.visual.preprocess_cfg["size"] in (224, (224, 224), [224, 224])
    moved = {name: not torch.equal(p, before[name]) for name, p in clip.named_parameters() if name in before}
    assert any("visual" in name for name in moved) and any(name.startswith("transformer") for name in moved)
    for name, was in moved.items():
        assert was == {"lp": False}.get(method, "visual" in name or method in ("flyp", "carot")), (method, name)
