"What `carot check` finds, what it says, and that nothing is trained on data or weights that are not what they seem."
import contextlib
import io
import json
import shutil
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY_VIT
from fake_imagenet import WNIDS, write_images, write_tree
from PIL import Image
from test_runs import write_notebook

from carot import commands
from carot.benchmarks import imagenet
from carot.cli import main
from carot.clip import build_clip, load_clip, save_clip
from carot.core import UserError
from carot.data import benchmark_spec, load_benchmark
from carot.engine.devices import make_accelerator
from carot.runs import check, estimate, jobs
from carot.runs.settings import parameters_cell, resolve

COUNTS = {"train": 2000, "ImageNet": 1000, "ImageNetV2": 1000, "ImageNetR": 200, "ImageNetA": 200,
          "ImageNetSketch": 1000, "ObjectNet": 226}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    "ImageNet's six sets, small; without the quirks, so that all is well."
    root = tmp_path_factory.mktemp("data")
    write_tree(root, quirks=False)
    return root


@pytest.fixture(autouse=True)
def counts(monkeypatch):
    for name, n in COUNTS.items(): monkeypatch.setitem(imagenet.SETS, name, replace(imagenet.SETS[name], images=n))


def carot(*words):
    "Exit code, output and errors of a command."
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main([str(word) for word in words])
    lines = [line for line in err.getvalue().splitlines() if line.startswith(("carot:", "Traceback"))]
    return code, out.getvalue(), "".join(f"{line}\n" for line in lines)


def test_a_whole_imagenet(tree):
    code, out, err = carot("check", "--benchmark", "imagenet", "--root", tree, "--no-time-step")
    assert (code, err) == (0, "") and "ready" in out
    rows = {words[0]: words for words in map(str.split, out.splitlines()) if words and words[0] in COUNTS}
    assert list(rows) == list(COUNTS)
    for name, row in rows.items():
        classes = {"ImageNetR": 200, "ImageNetA": 200, "ObjectNet": 113}.get(name, 1000)
        assert row[2:] == [f"{classes}/{classes}", f"{COUNTS[name]:,}", f"{COUNTS[name]:,}", "ok"], row
    assert rows["ImageNetSketch"][1] == "sketch" and rows["train"][1] == "ILSVRC2012/train"


def relink(tree, root, *without):
    root.mkdir(parents=True, exist_ok=True)
    for folder in tree.iterdir():
        if folder.name not in without: (root/folder.name).symlink_to(folder)
    return root


def replaced(folder, make):
    "A change: this folder is made anew by `make(folder, the original)`."
    def change(tree, root):
        top = folder.split("/")[0]
        relink(tree, root, top)
        if "/" in folder: relink(tree/top, root/top, folder.split("/")[1])
        make(root/folder, tree/folder)
    return change


def linked(folder, original, rename=lambda name: name, drop=()):
    folder.mkdir(parents=True)
    for entry in original.iterdir():
        if entry.name not in drop: (folder/rename(entry.name)).symlink_to(entry)


def spoil(n, content=b"no image"):
    "One class's images, all of them spoilt."
    def make(folder, original):
        linked(folder, original, drop=[WNIDS[n]])
        write_images(folder/WNIDS[n], [n] * len(list((original/WNIDS[n]).iterdir())))
        for file in (folder/WNIDS[n]).iterdir(): file.write_bytes(content)
    return make


def without_class(folder, original):
    linked(folder, original, drop=[WNIDS[7]])
    (folder/WNIDS[7]).mkdir()


def one_more(folder, original):
    linked(folder, original, drop=[WNIDS[7]])
    write_images(folder/WNIDS[7], [7] * 3)


def both(tree, root):
    relink(tree, root, "imagenet-r")
    for name in ("ImageNet_R", "ImageNet-R"): (root/name).symlink_to(tree/"imagenet-r")
def swapped(tree, root):
    relink(tree, root, "imagenet-r", "imagenet-a")
    (root/"imagenet-r").symlink_to(tree/"imagenet-a")
    (root/"imagenet-a").symlink_to(tree/"imagenet-r")
def nothing(folder, original): pass
def flat(folder, original): write_images(folder, [1, 2, 3])
def garbled(folder, original):
    linked(folder, original, drop=["pytorch_to_imagenet_2012_id.json"])
    (folder/"pytorch_to_imagenet_2012_id.json").write_text("[1")
def by_wnid(folder, original): linked(folder, original, lambda name: WNIDS[int(name)])
def loop(folder, original): folder.symlink_to(folder)


IMAGENET = {  # fault -> (change, sets that are found at fault, words)
    "missing set": (replaced("imagenet-r", nothing), ["ImageNetR"], "no folder imagenet-r"),
    "missing training set": (replaced("ILSVRC2012/train", nothing), ["train"], "there is no folder train in"),
    "empty set": (replaced("sketch", lambda folder, _: folder.mkdir()), ["ImageNetSketch"],
                  "no image in the class folders"),
    "flat validation set": (replaced("ILSVRC2012/val_dirs", flat), ["ImageNet"], "is flat"),
    "swapped sets": (swapped, ["ImageNetR", "ImageNetA"], "is no class of this set"),
    "misspelt class": (replaced("sketch", lambda f, o: linked(f, o, lambda name: name.replace(WNIDS[7], "n0"))),
                       ["ImageNetSketch"], "n0 is no class"),
    "missing class": (replaced("sketch", lambda f, o: linked(f, o, drop=[WNIDS[7]])), ["ImageNetSketch"],
                      "1 of 1000 classes have no image"),
    "empty class": (replaced("ILSVRC2012/val_dirs", without_class), ["ImageNet"],
                    "1 of 1000 classes have no image and 1 images fewer than the 1,000"),
    "too many images": (replaced("ILSVRC2012/train", one_more), ["train"], "1 images more than the 2,000"),
    "spoilt images": (replaced("sketch", spoil(0)), ["ImageNetSketch"], "cannot read image"),
    "empty file": (replaced("sketch", spoil(999, b"")), ["ImageNetSketch"], "the file is empty"),
    "set under two names": (both, ["ImageNetR"], "rename the one that is not meant"),
    "no mapping": (replaced("objectnet-1.0/mappings", nothing), ["ObjectNet"], "unpack it again"),
    "garbled mapping": (replaced("objectnet-1.0/mappings", garbled), ["ObjectNet"], "do not fit together"),
    "V2 by WordNet id": (replaced("ImageNetV2-matched-frequency", by_wnid), ["ImageNetV2"], "is no class of this set"),
    "link to itself": (replaced("sketch", loop), ["ImageNetSketch"], "no folder sketch"),
}


@pytest.mark.parametrize("fault", IMAGENET)
def test_faults_of_imagenet(tree, tmp_path, fault):
    "A line on stderr for each set at fault, with its name and what to do; the others are found; exit code 2."
    change, sets, words = IMAGENET[fault]
    change(tree, tmp_path/"data")
    code, out, err = carot("check", "--benchmark", "imagenet", "--root", tmp_path/"data", "--no-time-step")
    lines = err.splitlines()
    assert code == 2 and [line.split(": ")[2] for line in lines] == sets and all(words in line for line in lines), err
    assert all(line.startswith("carot: error: ") for line in lines)
    assert out.count(" ok\n") == 7 - len(sets) and "ready" not in out


def test_objectnet_with_fewer_images_is_a_warning(tree, tmp_path):
    def fewer(folder, original):
        linked(folder, original, drop=["one"])
        mapped = next(iter(imagenet.objectnet_classes(original).labels))
        (folder/mapped).unlink()
        (folder/mapped).mkdir()
        write_images(folder/mapped, [5])
    replaced("objectnet-1.0/images", fewer)(tree, tmp_path/"data")
    code, out, err = carot("check", "--benchmark", "imagenet", "--root", tmp_path/"data", "--no-time-step")
    words = "note: ObjectNet: 1 images fewer than the 226 of a complete copy: results are not comparable"
    assert (code, err) == (0, "") and words in out


def test_only_the_sets_that_are_asked_for(tree, tmp_path):
    relink(tree, tmp_path/"data", "imagenet-r", "objectnet-1.0")
    words = ["check", "--benchmark", "imagenet", "--root", tmp_path/"data", "--no-time-step"]
    assert carot(*words)[2].count("\n") == 2 and carot(*words, "--eval-sets", "ImageNet, ImageNetA")[::2] == (0, "")


def test_scan_finds_one_among_all(tree, tmp_path):
    def one_broken(folder, original):
        linked(folder, original, drop=[WNIDS[5]])
        shutil.copytree(original/WNIDS[5], folder/WNIDS[5])
        file, = (folder/WNIDS[5]).iterdir()
        file.write_bytes(file.read_bytes()[:300])
    replaced("sketch", one_broken)(tree, tmp_path/"data")
    words = ["check", "--benchmark", "imagenet", "--root", tmp_path/"data", "--no-time-step",
             "--eval-sets", "ImageNetSketch", "--workers", "2"]
    assert carot(*words)[0] == 0
    code, out, err = carot(*words, "--scan")
    assert code == 2 and f"{WNIDS[5]}_0.JPEG" in err
    assert "ImageNetSketch: 1 of 1,000 images cannot be read; the first: cannot read image" in err


def folders(root, classes=("cat", "dog", "bird")):
    "A folder of one's own."
    rng = np.random.default_rng(0)
    for split, n in [("train", 6), ("val", 3), ("night", 2)]:
        for name in classes:
            (root/split/name).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(0, 256, (24, 30, 3), "uint8")).save(root/split/name/f"{i}.png")
    return root


def remade(root, place, content):
    shutil.rmtree(root/place)
    (root/place).write_text(content)


def composed(root):
    "a class written with a composed letter in one set and a decomposed one in another"
    for split, form in [("train", "NFC"), ("val", "NFD"), ("night", "NFC")]:
        (root/split/"cat").rename(root/split/unicodedata.normalize(form, "chaté"))


def dangling(root):
    for i in range(3):
        (root/"val"/"dog"/f"{i}.png").unlink()
        (root/"val"/"dog"/f"{i}.png").symlink_to("gone")


FOLDERS = {  # fault -> (change, words)
    "no val": (lambda root: shutil.rmtree(root/"val"), "there is no folder"),
    "no train": (lambda root: shutil.rmtree(root/"train"), "there is no folder"),
    "empty root": (lambda root: [shutil.rmtree(folder) for folder in root.iterdir()], "no folder at all"),
    "one class": (
        lambda root: [shutil.rmtree(root/"train"/name) for name in ("cat", "dog")],
        "at least two are needed"),
    "misspelt class": (lambda root: (root/"val"/"cat").rename(root/"val"/"cta"), "cta is none of the 3 class folders"),
    "unicode twins": (composed, "is none of the 3 class folders"),
    "names alike": (
        lambda root: (root/"classnames.txt").write_text("cat\tpet\ndog\tPet\nbird\n"),
        "are both called 'pet'"),
    "named twice": (lambda root: (root/"classnames.txt").write_text("cat\ncat\ndog\nbird\n"), "twice"),
    "names in latin-1": (
        lambda root: (root/"classnames.txt").write_bytes("cat\tchat doré\ndog\nbird".encode("latin-1")),
        "not UTF-8"),
    "template without a slot": (lambda root: (root/"templates.txt").write_text("a photo\n"), "exactly one {}"),
    "class is a file": (lambda root: remade(root, "val/dog", "no folder"), "1 of 3 classes have no image"),
    "empty class": (
        lambda root: [file.unlink() for file in (root/"train"/"dog").iterdir()],
        "1 of 3 classes have no image"),
    "text for images": (
        lambda root: [file.write_text("x") for file in (root/"val"/"dog").iterdir()],
        "cannot identify"),
    "link to itself": (
        lambda root: [shutil.rmtree(root/"val"), (root/"val").symlink_to(root/"val")],
        "there is no folder"),
    "link that points nowhere": (dangling, "No such file"),
}


@pytest.mark.parametrize("fault", FOLDERS)
def test_faults_of_folders(tmp_path, fault):
    change, words = FOLDERS[fault]
    change(folders(tmp_path/"my"))
    code, _, err = carot("check", "--root", tmp_path/"my", "--no-time-step")
    assert code == 2 and err.count("\n") == 1 and err.startswith("carot: error: ") and words in err, err


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.manual_seed(0)
    return save_clip(build_clip(TINY_VIT).eval(), tmp_path_factory.mktemp("tiny"))


def test_what_a_run_needs(tmp_path, tiny):
    folders(tmp_path/"my")
    (tmp_path/"my"/"loop").symlink_to(tmp_path/"my")  # a shift? no: its class folders are train, val and night
    code, _, err = carot("check", "--root", tmp_path/"my", "--model", tiny, "--device", "cpu")
    assert code == 2 and "loop: " in err
    (tmp_path/"my"/"loop").unlink()
    words = ["check", "--root", tmp_path/"my", "--model", tiny, "--device", "cpu", "--workers", "0",
             "--out", tmp_path/"out"]
    for method in ("zs", "lp", "ft", "lp-ft", "flyp", "carot"):
        code, out, err = carot(*words, "--method", method, *([] if method == "zs" else ["--batch-size", "8"]))
        assert (code, err) == (0, "") and "ready" in out
        assert all(f"\n{name} " in out for name in ("model", "device", "memory", "disk", "speed", "time"))
    assert not (tmp_path/"out").exists()


BAD_RUNS = {  # more words -> words of the only line
    ("--model", "ViT-B-61"): "did you mean 'ViT-B-16'", ("--pretrained", "nowhere.pt"): "neither a file nor a tag",
    ("--model", "no/such"): "no folder 'no/such'", ("--epochs", "0"): "at least 1",
    ("--device", "tpu"): "unknown device",
    ("--root", "also"): "no folder", ("--eval-sets", "nigth"): "did you mean 'night'", ("--scan", "yes"): "'yes'",
    ("--no-preflight",): "unknown option", ("--out", "/dev/null/x"): "cannot write to"}


@pytest.mark.parametrize("words", BAD_RUNS)
def test_parameters_that_cannot_be(tmp_path, words):
    folders(tmp_path/"my")
    code, _, err = carot("check", "--benchmark", tmp_path/"my", *words)
    assert code == 2 and err.count("\n") == 1 and BAD_RUNS[words] in err, err


def test_weights_memory_and_disk(tmp_path, tiny, monkeypatch):
    folders(tmp_path/"my")
    words = ["check", "--root", tmp_path/"my", "--device", "cpu"]
    monkeypatch.setattr("open_clip.download_pretrained", lambda *_, **__: (_ for _ in ()).throw(OSError("offline")))
    code, _, err = carot(*words)
    assert code == 2 and err.count("\n") == 1 and "neither cached nor downloadable" in err
    assert "give its path as `pretrained`" in err
    broken = tmp_path/"broken"
    shutil.copytree(tiny, broken)
    (broken/"open_clip_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0notjson!")
    code, _, err = carot(*words, "--model", broken)
    assert code == 2 and err.count("\n") == 1 and "is not a checkpoint of this model" in err
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    monkeypatch.setattr(estimate.psutil, "virtual_memory", lambda: type("memory", (), {"available": 1000}))
    code, _, err = carot(*words, "--model", tiny)
    assert code == 2 and [line.split(": ")[2] for line in err.splitlines()] == ["memory", "disk"]
    def too_large(*_): raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(estimate, "time_step", too_large)
    assert "micro_batch_size=auto takes as many as do" in carot(*words, "--model", tiny)[2]


def test_activations_are_counted():
    "A hand count for one linear layer: what the backward pass needs is the input, once."
    clip, train, transform, tokenizer = load_clip("glyphs")
    glyphs = load_benchmark("glyphs", transform=transform, train_transform=train)
    stage, = estimate.make_stages(resolve({"method": "lp", "device": "cpu"}), clip, tokenizer, glyphs)
    images, captions, labels, _ = estimate.load_batch(glyphs, 32)
    step = estimate.time_step(stage, make_accelerator("cpu"), (images, tokenizer(captions), labels))
    width = clip.encode_image(torch.zeros(1, 3, 32, 32)).shape[1]
    head = (width + 1) * len(glyphs.classnames)
    assert step.fixed == 4 * (sum(p.numel() for p in clip.parameters()) + head) + 12 * head and step.trained == 4 * head
    features, scores, target = 4 * 32 * width, 4 * 32 * len(glyphs.classnames), 8 * 32
    assert features + scores <= step.activations <= features + 2 * scores + 2 * target + 64


@pytest.mark.parametrize("method, again, copies", [("lp", 1, 1), ("ft", 1, 1), ("flyp", 4 / 3, 1), ("carot", 5 / 4, 2)])
def test_what_an_objective_costs_is_asked_of_it(method, again, copies, tiny_clip, toy):
    "A pass more where features are cached, a copy of the weights for a teacher."
    tokenizer = load_clip("glyphs")[3]
    stages = estimate.make_stages(resolve({"method": method, "device": "cpu"}), tiny_clip, tokenizer, toy)
    def short(texts): return tokenizer(texts)[:, :12]
    found = estimate.measure_with(4, stages, tiny_clip, short, toy, make_accelerator("cpu"))
    weights = estimate.nbytes([tiny_clip])
    assert found.steps[-1].again == again and weights * copies <= found.steps[-1].kept < weights * (copies + 0.5)


def zero_shot_standin(path):
    "A run notebook that trains nothing; its zero-shot accuracies are those in the file `accuracy.json`."
    return write_notebook(path, parameters_cell(), f"""\
import json
from pathlib import Path
from carot.runs.records import open_run
from carot.runs.settings import asked_in, resolve
run = open_run(resolve(asked_in(globals())), steps=3)
accuracy = json.loads(Path({str(path.parent/'accuracy.json')!r}).read_text())
rows = [("set", "id", "n", "metric", "value")]
rows += [(name, name == "ImageNet", 10, metric, v) for name, v in accuracy.items() for metric in ("accuracy", "ece")]
rows += [("val", True, 10, metric, 0.5) for metric in ("accuracy", "ece")]
(run.path/"metrics.tsv").write_text("".join("\\t".join(map(str, row)) + "\\n" for row in rows))
run.finish(seconds={{"total": 1.0}})""")


def test_preflight(tree, tmp_path, monkeypatch, warm):
    "Nothing is trained on wrong data or on a model whose zero-shot accuracy is off, but with --no-preflight."
    notebook = zero_shot_standin(tmp_path/"run.ipynb")
    monkeypatch.setattr(commands, "make_report", lambda *_, **__: None)
    published = benchmark_spec("imagenet").zero_shot("ViT-B-16", "openai")
    assert published["ImageNet"] == 0.6834 and len(published) == 6
    data, logs = relink(tree, tmp_path/"data", "imagenet-r"), tmp_path/"logs"
    def reproduce(**more):
        given = {"benchmark": "imagenet", "root": str(data), "out": str(logs)} | more
        return commands.reproduce("ft", notebook=notebook, **given)
    with pytest.raises(UserError, match="ImageNetR: ImageNetR is not in .*--no-preflight"): reproduce()
    assert not logs.exists()
    sets = "ImageNet,ObjectNet"
    low = published["ObjectNet"] - 0.016
    (tmp_path/"accuracy.json").write_text(json.dumps({"ImageNet": published["ImageNet"], "ObjectNet": low}))
    with pytest.raises(UserError, match="ObjectNet 53.7 % instead of 55.3 %"): reproduce(eval_sets=sets)
    zero_shot, = logs.rglob("metrics.tsv")
    assert zero_shot.parts[-3] == "zs" and not list(logs.rglob("ft"))
    made = []
    def pretend(notebook, jobs, *_, **__): return made.extend(map(str, jobs)) or 0
    for module in (check, jobs): monkeypatch.setattr(module, "run_all", pretend)
    assert reproduce(eval_sets=sets, preflight=False) == 0 and len(made) == 1 and made[0].startswith("ft")
    zero_shot.write_text(zero_shot.read_text().replace(str(low), str(published["ObjectNet"] - 0.014)))
    config = json.loads(zero_shot.with_name("config.json").read_text())
    del config["made"], config["digest"]  # or the changed table would not be believed
    zero_shot.with_name("config.json").write_text(json.dumps(config))
    assert reproduce(eval_sets=sets, lr=1e-4) == 0 and [name[:2] for name in made] == ["ft", "zs", "ft"]
    assert reproduce(eval_sets=sets, model="ViT-B-32") == 0
    assert [name[:2] for name in made[3:]] == ["ft"]  # there is no published row
    made.clear()
    # the command stops in the same way; for weights without a published row the data are all that is looked at
    code, _, err = carot("run", "--method", "ft", "--benchmark", "imagenet", "--root", data, "--out", logs)
    assert code == 2 and err.count("\n") == 1 and "ImageNetR is not in" in err and not made
    words = ["run", "--method", "ft", "--benchmark", "imagenet", "--root", data, "--out", logs]
    assert carot(*words, "--no-preflight")[0] == 0 and len(made) == 1
    zero_shot = benchmark_spec("imagenet").zero_shot
    assert zero_shot("ViT-B-32", "openai") == zero_shot("glyphs", None) == {}


NEEDS = {("predict",): "needs --checkpoint", ("predict", "--checkpoint", "x"): "needs --images",
         ("predict", "--checkpoint", "x", "--images", "y"): "",
         ("export", "--to", "x"): "needs --run", ("export", "--run", "x"): "needs --to",
         ("shrink", "--root", "."): "needs --out", ("shrink", "--root", "nowhere", "--out", "x"): "no folder 'nowhere'",
         ("shrink", "--root", "/dev/null", "--out", "x"): "no folder",
         ("check", "--benchmark", "imagenet"): "parameter root",
         ("check", "--benchmark", "imagenet", "--root", "/dev/null"): "no folder",
         ("check", "--root", "nowhere"): "unknown benchmark 'nowhere'",
         ("check", "--root", "no/where"): "no folder 'no/where'",
         ("check", "--benchmark", "glyhps"): "did you mean 'glyphs'"}


@pytest.mark.parametrize("words", NEEDS)
def test_commands_that_lack_something(words):
    code, _, err = carot(*words)
    assert code == 2 and err.count("\n") == 1 and NEEDS[words] in err, err
