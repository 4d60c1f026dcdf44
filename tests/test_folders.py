"Folders as a benchmark, and images that cannot be read: what is accepted, what is refused and in which words."
import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset
from torchvision.transforms import v2

from carot.benchmarks.folders import TEMPLATES, class_names, folder_spec
from carot.benchmarks.inspect import look_at_sets
from carot.clip import save_clip
from carot.core import UserError
from carot.data import (ArrayImages, BadImage, CaptionedImages, benchmark_spec, image_labels, image_name,
                        load_benchmark, prepare)
from carot.evaluate import classifier, predict_sets
from carot.runs.execute import make_run
from carot.runs.settings import resolve
from carot.train import FineTuned, fine_tune

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "sky_blue": (40, 160, 220), "yellow": (230, 210, 40)}
SETTINGS = dict(epochs=2, batch_size=16, lr=1e-3, warmup_steps=2, device="cpu", workers=0)
PLAIN = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
CROP = v2.Compose([v2.RandomResizedCrop(16, scale=(0.8, 1.0)), PLAIN])


def write(folder, name, n, seed, classes=COLOURS):
    "noisy 16×16 squares of a colour as PNG files"
    rng = np.random.default_rng(seed)
    for colour in classes:
        (folder/name/colour).mkdir(parents=True)
        for i in range(n):
            pixels = (np.array(COLOURS[colour]) + rng.normal(0, 30, (16, 16, 3))).clip(0, 255).astype("uint8")
            Image.fromarray(pixels).save(folder/name/colour/f"{i:03d}.png")


@pytest.fixture
def my(tmp_path):
    "four colours; the shift `dusk` has no green"
    for seed, (name, n) in enumerate({"train": 30, "val": 3, "test": 4, "fog": 3}.items()):
        write(tmp_path/"my", name, n, seed)
    write(tmp_path/"my", "dusk", 3, 9, ("red", "sky_blue", "yellow"))
    return tmp_path/"my"


@pytest.fixture(scope="module")
def tokenizer(): return open_clip.get_tokenizer("ViT-B-16", context_length=12)


def loaded(my): return load_benchmark(str(my), None, PLAIN, CROP)


def break_files(my, *files):
    for kind, file in enumerate(files):
        path = my/file
        path.write_bytes([path.read_bytes()[:90], b"", b"no image"][kind % 3])


# what is read

def test_sets_classes_and_labels(my):
    benchmark = load_benchmark(my)
    assert (benchmark.name, benchmark.templates) == ("my", TEMPLATES)
    assert benchmark.classnames == ["green", "red", "sky blue", "yellow"]  # in the order of the folders
    assert {name: (s.id, len(s)) for name, s in benchmark.eval.items()} == {
        "test": (True, 16), "dusk": (False, 9), "fog": (False, 12)}
    for dataset in (benchmark.train, benchmark.val, *(s.dataset for s in benchmark.eval.values())):
        assert (np.diff(dataset.labels) >= 0).all()
    for s in benchmark.eval.values():
        for image, label in s.dataset:
            folder = benchmark.classnames[s.groups[label][0] if s.groups else label].replace(" ", "_")
            assert np.abs(np.asarray(image).mean((0, 1)) - COLOURS[folder]).max() < 25
    assert benchmark.eval["dusk"].groups == [[1], [2], [3]] and benchmark.eval["fog"].groups is None
    assert "dusk has 3 of the classes" in benchmark.note


def test_files_say_what_classes_are_called(my):
    names = "\ufeffyellow\tlemon_yellow\r\nsky_blue\r\n\r\nred\tRot — rouge\ngreen\n"
    (my/"classnames.txt").write_bytes(names.encode())
    (my/"templates.txt").write_text("a {} thing\n\nsomething {}\n", encoding="utf-8")
    benchmark = load_benchmark(my)
    assert benchmark.classnames == ["lemon yellow", "sky blue", "Rot — rouge", "green"]
    assert benchmark.templates == ["a {} thing", "something {}"] and benchmark.eval["dusk"].groups == [[0], [1], [2]]
    assert benchmark.train.name(0).startswith("yellow/") and benchmark.train.labels[0] == 0


def test_without_a_test_set_val_has_to_do(my):
    (my/"test").rename(my.parent/"test")
    benchmark = load_benchmark(my)
    assert list(benchmark.eval) == ["validation", "dusk", "fog"] and "no test set" in benchmark.note
    validation = benchmark.eval["validation"]
    assert validation.id and validation.dataset.labels.tolist() == benchmark.val.labels.tolist()


def test_a_class_list_without_training_images(my):
    "classnames.txt says that it is meant: the folder evaluates, and what trains says that it cannot."
    whole = load_benchmark(my)
    (my/"train").rename(my.parent/"train")
    (my/"classnames.txt").write_text("red\nyellow\nsky_blue\tazure\ngreen\n")
    bare = load_benchmark(my)
    assert bare.classnames == ["red", "yellow", "azure", "green"] and len(bare.train) == len(bare.plain()) == 0
    assert {name: len(s) for name, s in bare.eval.items()} == {name: len(s) for name, s in whole.eval.items()}
    assert bare.eval["dusk"].groups == [[0], [1], [2]] and "pairs" in bare.note
    assert [report.name for report in look_at_sets(str(my))] == ["val", "test", "dusk", "fog"]
    with pytest.raises(UserError, match="'my' has no training images"): prepare(bare, SimpleNamespace(shots=None))
    (my/"classnames.txt").write_text("red\nyellow\ngreen\n")
    with pytest.raises(UserError, match="no line for the class folder 'sky_blue'"): load_benchmark(my)


def test_plain_training_images(my):
    benchmark = loaded(my)
    plain = load_benchmark(my, None, PLAIN, CROP, ["dusk"]).plain()
    assert [plain.path(i) for i in range(120)] == [benchmark.train.path(i) for i in range(120)]
    assert torch.equal(plain[5][0], PLAIN(Image.open(plain.path(5)).convert("RGB"))) and plain[119][1] == 3


def test_few_shots_of_a_folder(my):
    benchmark = prepare(loaded(my), SimpleNamespace(shots=2, seed=1))
    break_files(my, *(f"train/red/{i:03d}.png" for i in range(30)))  # nothing is decoded to draw them
    again = prepare(loaded(my), SimpleNamespace(shots=2, seed=1))
    assert again.train.indices == benchmark.train.indices
    assert image_labels(again.train).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert image_name(again.train, 2).endswith(".png") and "train/red" in image_name(again.train, 2)


def test_unwanted_sets_are_not_even_listed(my):
    (my/"notes"/"of mine").mkdir(parents=True)
    with pytest.raises(UserError, match="of mine is none of the 4 class folders"): load_benchmark(my)
    assert list(load_benchmark(my, eval_sets=["dusk"]).eval) == ["dusk"]
    with pytest.raises(UserError, match="unknown evaluation set 'duks' .did you mean 'dusk'"):
        load_benchmark(my, eval_sets=["duks"])


def test_equal_to_the_same_images_in_memory(my, tiny_clip, tokenizer):
    folder = loaded(my)
    def memory(dataset):
        images = [np.asarray(Image.open(dataset.path(i))).transpose(2, 0, 1) for i in range(len(dataset))]
        return ArrayImages(np.stack(images), dataset.labels, dataset.transform)
    def predicted(benchmark, method):
        trained = fine_tune(copy.deepcopy(tiny_clip), tokenizer, benchmark, method, **SETTINGS)
        return predict_sets(classifier(trained, tokenizer, benchmark), benchmark)
    array = replace(folder, train=memory(folder.train), val=memory(folder.val),
                    eval={k: replace(s, dataset=memory(s.dataset)) for k, s in folder.eval.items()})
    for method in ("ft", "carot"):
        one, two = (predicted(benchmark, method) for benchmark in (folder, array))
        assert list(one) == ["test", "dusk", "fog", "val"] and one["dusk"].logits.shape == (9, 3)
        for name in one:
            assert torch.equal(one[name].logits, two[name].logits) and torch.equal(one[name].labels, two[name].labels)


# names and paths

def test_a_path_is_a_folder_and_a_name_is_built_in(my, monkeypatch):
    monkeypatch.chdir(my.parent)
    for spelling in ("my", "my/", "./my", str(my)): assert load_benchmark(spelling).name == "my"
    assert benchmark_spec("my").defaults["batch_size"] == 64 and benchmark_spec("glyphs").defaults["model"] == "glyphs"
    (my.parent/"glyphs").mkdir()
    assert benchmark_spec("glyphs").defaults["model"] == "glyphs"  # a folder that happens to be here changes nothing
    with pytest.raises(UserError, match="no folder glyphs/train|no folder glyphs"): load_benchmark("glyphs/")
    for name, words in [("no/where", "there is no folder 'no/where' .parameter benchmark"),
                        ("./my2", "there is no folder"), ("mx", "unknown benchmark 'mx'")]:
        for function in (load_benchmark, benchmark_spec):
            with pytest.raises(UserError, match=words): function(name)
    with pytest.raises(UserError, match="leave out root"): load_benchmark("my", "my")


def test_one_results_folder_however_it_is_spelt(my, monkeypatch):
    monkeypatch.chdir(my.parent)
    places = {resolve({"benchmark": name}).directory for name in ("my", "my/", "my//")}
    assert [place.parts[-4:] for place in places] == [("expt_logs", "my", "carot", "seed=1")]
    (my.parent/"glyphs").mkdir()
    assert resolve({"benchmark": "glyphs/"}).directory != resolve({"benchmark": "glyphs"}).directory


def test_the_folder_as_an_object(my):
    spec = folder_spec(my)
    assert (spec.name, spec.path, spec.needs_root, spec.counts) == ("my", str(my), False, {})
    assert spec.load(spec.path).classnames == load_benchmark(my).classnames and load_benchmark(my).spec == spec
    assert [report.name for report in look_at_sets(spec)] == ["train", "val", "test", "dusk", "fog"]
    assert [report.name for report in look_at_sets(spec, eval_sets=["fog"])] == ["train", "val", "fog"]
    with pytest.raises(UserError, match="unknown evaluation set 'fogg'"): look_at_sets(spec, eval_sets=["fogg"])


def test_a_look_finds_all_that_is_wrong(my):
    break_files(my, "val/red/000.png")
    (my/"test"/"green").rename(my.parent/"green")
    (my/"fog"/"red").rename(my/"fog"/"reed")
    found = {report.name: report for report in look_at_sets(str(my))}
    assert found["train"].verdict == "ok" and found["dusk"].verdict == "ok" and found["dusk"].classes == "3/4"
    assert "val/red/000.png" in found["val"].error and "reed is none of the 4" in found["fog"].error
    assert not found["test"].error and found["test"].warning == "1 of 4 classes have no image"


def test_defaults_suit_a_small_training_set(my):
    parameters = resolve({"benchmark": str(my)}).parameters
    assert (parameters["model"], parameters["pretrained"], parameters["epochs"]) == ("ViT-B-16", "openai", 10)
    assert parameters["warmup_steps"] < 10 * -(-120 // parameters["batch_size"])


# what is refused

def rename(old, new): return lambda my: (my/old).rename(my/new)
def text(name, content):
    return lambda my: (my/name).write_bytes(content if isinstance(content, bytes) else content.encode())

def flatten(my):
    "the class folders at the top, as in a training set alone"
    for folder in (my/"train").iterdir(): folder.rename(my/folder.name)
    (my/"train").rmdir()

def empty_class(my):
    for file in (my/"train"/"red").iterdir(): file.unlink()

def one_class(my):
    for name in ("red", "yellow"): (my/"dusk"/name).rename(my.parent/name)

REFUSED = {
    "no train": (rename("train", "training"), "there is no folder .*my/train.* found dusk, fog, test, training"),
    "no val": (rename("val", "valid"), "there is no folder .*my/val; .*valid"),
    "classes at the top": (flatten, "no folder .*my/train.*green"),
    "val and validation": (lambda my: [rename("test", "gone")(my), rename("fog", "validation")(my)],
                           "call one of them test"),
    "unknown class in a shift": (rename("dusk/red", "dusk/reed"), "dusk/reed is none of the 4 class folders"),
    "unknown class in val": (rename("val/red", "val/Red"), "val/Red is none of the 4"),
    "class without images": (empty_class, "train/red has no image"),
    "shift without images": (lambda my: (my/"empty").mkdir(), "no image in the class folders of .*my/empty"),
    "shift of one class": (one_class, "dusk has images of one class only"),
    "no classes": (lambda my: [rename("train", "x")(my), (my/"train").mkdir()],
                   "train has 0 class folders; at least two"),
    "a name for nothing": (text("classnames.txt", "green\nred\nsky_blue\nyelow\n"), "'yelow' .did you mean 'yellow'"),
    "name and folder swapped": (text("classnames.txt", "lemon\tyellow\nred\ngreen\nsky_blue\n"),
                                "unknown folder in .*'lemon'"),
    "a folder without a name": (text("classnames.txt", "green\nred\nyellow\n"),
                                "no line for the class folder 'sky_blue'"),
    "a folder twice": (text("classnames.txt", "green\nred\nyellow\nsky_blue\nred\tcrimson\n"),
                       "names the folder 'red' twice"),
    "the same name twice": (text("classnames.txt", "green\tGrass\nred\nyellow\tgrass\nsky_blue\n"),
                            "'green' and 'yellow' are both called 'grass'"),
    "no names in the file": (text("classnames.txt", "\n \n"), "classnames.txt is empty"),
    "not UTF-8": (text("classnames.txt", "grün\n".encode("latin-1")), "not UTF-8"),
    "template without a slot": (text("templates.txt", "a photo\n"), "exactly one {}"),
    "template with a named slot": (text("templates.txt", "a {} in {place}\n"), "exactly one {}"),
    "no templates in the file": (text("templates.txt", ""), "templates.txt is empty"),
}

@pytest.mark.parametrize("fault", REFUSED)
def test_refused_in_one_line(my, fault):
    change, words = REFUSED[fault]
    change(my)
    with pytest.raises(UserError, match=words) as error: load_benchmark(my)
    assert "\n" not in str(error.value)


def test_folders_that_read_alike(my):
    for split in ("train", "val", "test"):
        (my/split/"Sky blue").mkdir()
        Image.new("RGB", (16, 16)).save(my/split/"Sky blue"/"0.png")
    with pytest.raises(UserError, match="'Sky blue' and 'sky_blue' are both called 'sky blue'"): load_benchmark(my)


def test_unreadable_folder(my, monkeypatch):
    def denied(folder, *a): raise PermissionError(13, "Permission denied", str(folder))
    monkeypatch.setattr("carot.benchmarks.folders.class_dataset", denied)
    with pytest.raises(UserError, match="cannot read .*train: Permission denied"): load_benchmark(my)


def test_unicode_class_names(my):
    for split in ("train", "val", "test"): (my/split/"red").rename(my/split/"größer als 你好")
    (my/"fog"/"red").rename(my/"fog"/"größer als 你好")
    (my/"dusk"/"red").rename(my/"dusk"/"größer als 你好")
    assert "größer als 你好" in load_benchmark(my).classnames and len(load_benchmark(my).eval["dusk"].groups) == 3


# broken images in training

def test_stops_with_the_name_of_the_file(my, tiny_clip, tokenizer):
    break_files(my, "train/red/007.png")
    for workers in (0, 2):  # the error of a loader process must arrive just as clean
        with pytest.raises(UserError) as error:
            fine_tune(tiny_clip, tokenizer, loaded(my), "ft", **SETTINGS | {"workers": workers})
        message = str(error.value)
        assert "train/red/007.png" in message and "\n" not in message and "Traceback" not in message


@pytest.mark.parametrize("method", ["carot", "lp-ft"])
def test_skip_is_deterministic_and_listed(my, tiny_clip, tokenizer, method):
    break_files(my, "train/red/007.png")
    settings = dict(SETTINGS, on_bad_image="skip")
    runs = [fine_tune(copy.deepcopy(tiny_clip), tokenizer, loaded(my), method, **settings | {"workers": workers})
            for workers in (0, 2)]
    for trained in runs: assert trained.skipped == [str(my/"train/red/007.png")]
    assert all(torch.equal(a, b) for a, b in zip(*(t.student.state_dict().values() for t in runs)))


def test_the_next_readable_image_stands_in(my):
    break_files(my, "train/yellow/028.png", "train/yellow/029.png", "train/green/000.png")  # at both ends
    captioned = CaptionedImages(loaded(my), seed=1, on_bad_image="skip")
    last, first = captioned[0, 118], captioned[0, 0]
    assert last[3] == -1 - 118 and last[2] == 0 and "green" in last[1]  # 118, 119 and 0 are broken: image 1 it is
    assert first[3] == -1 and captioned[0, 1][3] == 1
    assert not torch.equal(last[0], captioned[0, 1][0])  # its augmentation is the missing image's own
    assert torch.equal(last[0], captioned[0, 118][0])


def test_all_images_broken(my):
    benchmark = loaded(my)
    for i in range(len(benchmark.train)): Path(benchmark.train.path(i)).write_bytes(b"")
    with pytest.raises(BadImage): CaptionedImages(benchmark, seed=1, on_bad_image="skip")[0, 5]


def test_more_than_one_percent_is_an_error(my, tiny_clip, tokenizer, tmp_path):
    break_files(my, "train/red/007.png", "train/green/001.png")  # of 120
    with pytest.raises(UserError, match="more than 1 % of the 120 training images cannot be read, among them .*"
                                        "(red/007|green/001)"):
        fine_tune(tiny_clip, tokenizer, loaded(my), "flyp", **SETTINGS, on_bad_image="skip", out=tmp_path/"run")


def test_subsets_name_the_file_too(my, tiny_clip, tokenizer):
    break_files(my, "train/red/007.png")
    benchmark = loaded(my)
    benchmark = replace(benchmark, train=Subset(benchmark.train, range(119, -1, -1)))
    trained = fine_tune(tiny_clip, tokenizer, benchmark, "ft", **SETTINGS, on_bad_image="skip")
    assert trained.skipped == [str(my/"train/red/007.png")]


def test_what_was_skipped_survives_a_kill(my, tiny_clip, tokenizer, tmp_path):
    class Kill(Exception): pass
    def kill(epoch, trained):
        if epoch == 2: raise Kill
    break_files(my, "train/red/007.png")
    settings = dict(SETTINGS, on_bad_image="skip", out=tmp_path/"run")
    with pytest.raises(Kill):
        fine_tune(copy.deepcopy(tiny_clip), tokenizer, loaded(my), "carot", **settings, on_epoch=kill)
    # nothing is left to train, so nobody meets the broken file again
    trained = fine_tune(copy.deepcopy(tiny_clip), tokenizer, loaded(my), "carot", **settings)
    assert trained.skipped == [str(my/"train/red/007.png")]


def test_a_repaired_file_is_forgotten_when_training_starts_anew(my, tiny_clip, tokenizer, tmp_path):
    whole = (my/"train/red/007.png").read_bytes()
    break_files(my, "train/red/007.png", "train/green/001.png")
    settings = dict(SETTINGS, on_bad_image="skip", out=tmp_path/"run")
    with pytest.raises(UserError, match="more than 1 %"):
        fine_tune(copy.deepcopy(tiny_clip), tokenizer, loaded(my), "ft", **settings)
    for name in ("red/007", "green/001"): (my/f"train/{name}.png").write_bytes(whole)
    assert fine_tune(copy.deepcopy(tiny_clip), tokenizer, loaded(my), "ft", **settings).skipped == []


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_never_skips(my, tiny_clip, tokenizer, workers):
    break_files(my, "dusk/red/001.png")
    benchmark = loaded(my)
    model = classifier(FineTuned(tiny_clip), tokenizer, benchmark)
    with pytest.raises(UserError) as error: predict_sets(model, benchmark, workers=workers)
    assert "dusk/red/001.png" in str(error.value) and "\n" not in str(error.value)


def test_unknown_choice():
    with pytest.raises(UserError, match="unknown on_bad_image 'ignore'; known: stop, skip"):
        resolve({"on_bad_image": "ignore"})
    with pytest.raises(UserError, match="zs does not use on_bad_image"):
        resolve({"on_bad_image": "skip", "method": "zs"})


# from end to end

def test_a_run_on_a_folder(my, tiny_clip, tmp_path, monkeypatch, warm):
    monkeypatch.chdir(tmp_path)
    save_clip(tiny_clip, "tiny")
    break_files(my, "train/red/007.png")
    settings = dict(benchmark="my/", model="tiny", method="carot", epochs=1, warmup_steps=1, batch_size=32, workers=0,
                    threads=1, device="cpu")
    with pytest.raises(UserError, match=r"^cannot read image my/train/red/007.png: .*$"): make_run(**settings)
    path = make_run(**settings, on_bad_image="skip")
    config = json.loads((path/"config.json").read_text())
    assert config["complete"] and config["skipped_images"] == ["my/train/red/007.png"]
    assert "on_bad_image=skip" in path.name
    assert json.loads((path/"classes.json").read_text())["classnames"] == list(class_names(my).values())
    assert {file.stem for file in (path/"predictions").iterdir()} == {"test", "dusk", "fog", "val"}
