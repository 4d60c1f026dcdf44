"Predictions on files: the same figures as in evaluation, whatever else lies in the folder."
import copy
import errno
import json
import os
import re
import shutil
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from safetensors.torch import load_file, save_file

from carot import calibration, predict
from carot.calibration import softmax, temperature_and_reason
from carot.clip import load_clip, save_clip
from carot.conformal import fit_conformal
from carot.core import UserError
from carot.evaluate import Predictions, classifier, load_classes, predict_sets, save_classes, save_predictions
from carot.methods.base import find_method
from carot.predict import classify_files, list_files, open_checkpoint
from carot.runs.fingerprints import weights_of
from carot.runs.seals import seal
from carot.train import fine_tune

SETTINGS = dict(epochs=2, batch_size=16, lr=1e-3, warmup_steps=2, teacher_update_every=2, workers=0, device="cpu")


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    "method -> run that was made once and is copied, and its predictions"
    return tmp_path_factory.mktemp("known"), {}

@pytest.fixture
def make_run(tiny_clip, toy, tmp_path, known):
    "a run of any method on the four colours, and its evaluation images as files"
    save_clip(tiny_clip, tmp_path/"tiny")
    clip, _, transform, tokenizer = load_clip(str(tmp_path/"tiny"))
    for dataset in (toy.train, toy.val, *(s.dataset for s in toy.eval.values())): dataset.transform = transform
    raw = copy.copy(toy.eval["Toy"].dataset)
    raw.transform = None
    (tmp_path/"new").mkdir()
    for i in range(len(raw)): raw[i][0].save(tmp_path/"new"/f"{i:02d}.png")
    def make_once(method):
        run = known[0]/method
        uses = find_method(method).uses
        settings = {name: value for name, value in SETTINGS.items() if uses(name)}
        trained = fine_tune(copy.deepcopy(clip), tokenizer, toy, method, **settings, out=run)
        known[1][method] = predict_sets(classifier(trained, tokenizer, toy), toy, out=run)
        save_classes(run, toy)
    def make(method):
        if method not in known[1]: make_once(method)
        return shutil.copytree(known[0]/method, tmp_path/method), known[1][method]
    return make


@pytest.mark.parametrize("method", ["lp", "ft", "lp-ft", "flyp", "carot"])
def test_the_same_as_in_evaluation(make_run, method, tmp_path, monkeypatch):
    run, predictions = make_run(method)
    monkeypatch.setattr(calibration, "MIN_IMAGES", 1)
    monkeypatch.setattr(calibration, "MIN_EACH", 1)
    T, _ = temperature_and_reason(predictions["val"].logits, predictions["val"].labels)
    for temperature, value in [("auto", T), (1, 1.0), ("2.5", 2.5)]:
        table = classify_files(run, tmp_path/"new", tmp_path/"t.tsv", temperature, device="cpu")
        probs = softmax(predictions["Toy"].logits / value)
        assert list(table["class"]) == [["red", "green", "blue", "yellow"][c] for c in probs.argmax(1)]
        assert np.allclose(table.confidence, probs.max(1), atol=1e-5)
        assert (table.temperature == value).all()
        assert np.allclose(table.second_confidence, np.sort(probs)[:, -2], atol=1e-5)
        assert (table["class"] != table.second).all()
    assert open_checkpoint(run/"student", "cpu")[3] == run/"predictions"/"val.safetensors"


def test_a_set_of_classes_and_a_page(make_run, tmp_path):
    run, predictions = make_run("carot")
    val, names, page = predictions["val"], ["red", "green", "blue", "yellow"], tmp_path/"p.html"
    table = classify_files(run, tmp_path/"new", None, 1, device="cpu", coverage=0.8, html=page)
    held = fit_conformal(softmax(val.logits), val.labels, 0.8).sets(softmax(predictions["Toy"].logits))
    assert [set(json.loads(cell)) for cell in table["set"]] == [{names[c] for c in np.flatnonzero(row)} for row in held]
    text = page.read_text(encoding="utf-8")
    shown = [float(found) for found in re.findall(r"</b> ([\d.]+)<br>", text)]
    assert len(shown) == len(table) and shown == sorted(shown) and "http" not in text
    assert "the right one for 80 % of images" in text and "Confidences are of temperature 1.000 (as given)." in text
    again = classify_files(run, tmp_path/"new", None, 1, device="cpu", html=page)  # a page is replaced
    assert again["set"].isna().all() and again["class"].equals(table["class"])
    with pytest.raises(UserError, match="no page of predictions"):
        classify_files(run, tmp_path/"new", None, device="cpu", html=run/"classes.json")
    with pytest.raises(UserError, match="leave out coverage"):
        classify_files(run/"teacher", tmp_path/"new", None, device="cpu", coverage=0.9)


def test_loader_processes_and_batches_change_nothing(make_run, tmp_path):
    run, _ = make_run("carot")
    (tmp_path/"new"/"bad.png").write_bytes(b"")
    ways, columns = [(256, 0), (3, 0), (1, 2)], ["file", "class", "error"]
    tables = [classify_files(run, tmp_path/"new", None, batch_size=b, workers=w, device="cpu") for b, w in ways]
    for table in tables[1:]:
        assert table[columns].equals(tables[0][columns])
        assert np.allclose(table.confidence.dropna(), tables[0].confidence.dropna(), atol=1e-6)


def test_the_teacher_has_no_temperature(make_run, tmp_path, capsys):
    run, _ = make_run("carot")
    classify_files(run/"teacher", tmp_path/"new", None, device="cpu")
    assert "temperature 1.000 (none applied: there are no validation predictions" in capsys.readouterr().out


def saved_validation(run, n, wrong):
    "validation predictions of four classes, sure of themselves, so many of them mistaken"
    labels = torch.arange(n) % 4
    logits = 9 * torch.nn.functional.one_hot((labels + (torch.arange(n) < wrong)) % 4, 4).float()
    save_predictions(run/"predictions"/"val.safetensors", Predictions(logits, labels, True))


@pytest.mark.parametrize("n, wrong, words", [
    (600, 0, "0 of 600 predictions are wrong, fewer than 10"), (12, 6, "12 images are fewer than 100"),
    (600, 590, "the fit ended at T = 1000, a bound"), (600, 60, None)])
def test_a_temperature_that_cannot_be_told_is_not_applied(make_run, n, wrong, words, tmp_path, capsys, recwarn):
    "A perfect validation does not make a model certain of noise; the line and the table say why."
    run, _ = make_run("ft")
    saved_validation(run, n, wrong)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(tmp_path/"noise.png")
    table = classify_files(run, tmp_path/"noise.png", tmp_path/"t.tsv", device="cpu")
    line, written = capsys.readouterr().out, pd.read_csv(tmp_path/"t.tsv", sep="\t")
    about = f"none applied: on validation, {words}" if words else "fitted on the 600 validation images of the run"
    assert about in line and line.count("\n") == 1 and written.calibration[0].startswith(about)
    assert (written.temperature[0] == 1) == bool(words)
    assert table.temperature[0] == pytest.approx(written.temperature[0], abs=1e-6)
    assert not any(warning.category is calibration.NoTemperature for warning in recwarn)
    plain = classify_files(run, tmp_path/"noise.png", None, 1, device="cpu")
    assert (plain.confidence[0] == table.confidence[0]) == bool(words) and plain.calibration[0] == "as given"


def test_zero_shot_run_and_run_without_classes(make_run, tmp_path):
    run, predictions = make_run("zs")
    parameters = dict(method="zs", benchmark="glyphs", root=None, model=str(tmp_path/"tiny"), pretrained=None)
    (run/"config.json").write_text(json.dumps({"parameters": parameters}))
    table = classify_files(run, tmp_path/"new", None, 1, device="cpu")
    assert np.allclose(table.confidence, softmax(predictions["Toy"].logits).max(1), atol=1e-5)
    (run/"classes.json").unlink()
    assert len(load_classes(run).classnames) == 100  # those of the benchmark in config.json


def test_other_files_are_reported_not_fatal(make_run, tmp_path, capsys):
    run, _ = make_run("ft")
    new = tmp_path/"new"
    (new/"empty.jpg").touch()
    (new/"notes.txt").write_text("no image")
    (new/"cut.png").write_bytes((new/"00.png").read_bytes()[:60])
    (new/".hidden").write_text("not listed")
    (new/"deep"/"er").mkdir(parents=True)
    shutil.copy(new/"00.png", new/"deep"/"er"/"tab\there größer.png")
    (new/"loop").symlink_to(new)
    classify_files(run, new, tmp_path/"out"/"p.tsv", device="cpu")
    table = pd.read_csv(tmp_path/"out"/"p.tsv", sep="\t")
    assert len(table) == 20 + 3 + 1 and table.error.notna().sum() == 3  # hidden files, links to folders are left out
    bad = table[table.error.notna()]
    assert bad[["class", "confidence"]].isna().all().all()
    assert "the file is empty" in bad.set_index("file").error[str(new/"empty.jpg")]
    row = table[table.file == str(new/"deep"/"er"/r"tab\there größer.png")].iloc[0]
    assert row.confidence == table.confidence[table.file == str(new/"00.png")].item()
    out = capsys.readouterr().out
    assert all(name in out for name in ("empty.jpg", "notes.txt", "cut.png"))


def test_a_list_and_a_single_image(make_run, tmp_path):
    run, _ = make_run("ft")
    new = tmp_path/"new"
    (tmp_path/"list.txt").write_text(f"\ufeff{new}/03.png\r\n\n{new}/gone.png\n{new}/01.png\n")
    table = classify_files(run, tmp_path/"list.txt", None, device="cpu")
    assert [file[-6:] for file in table.file] == ["03.png", "ne.png", "01.png"]
    assert table.error.notna().tolist() == [False, True, False]
    assert list_files(tmp_path/"new"/"03.png") == [str(tmp_path/"new"/"03.png")]


def test_thousands_of_bad_files_are_not_printed_one_by_one(make_run, tmp_path, capsys):
    run, _ = make_run("ft")
    for i in range(40): (tmp_path/"new"/f"bad{i}.jpg").touch()
    classify_files(run, tmp_path/"new", None, device="cpu")
    out = capsys.readouterr().out
    assert out.count("\n") == 12 and "40 files skipped in all" in out


ODD = ["tab\there.png", "two\nlines.png", 'said "no".png', r"back\slash\n.png", "trailing .png", "NA", "größer ☀",
       os.fsdecode(b"caf\xe9.png"), "\x1b[31mred.png", "bell\x07.png", "\u2028.png", "=1+1.png"]

def test_no_name_is_lost(make_run, tmp_path):
    "Every row is one printable line, and its file can be found again."
    run, _ = make_run("ft")
    new = tmp_path/"odd"
    new.mkdir()
    for i, name in enumerate(ODD): shutil.copy(tmp_path/"new"/f"{i:02d}.png", new/name)
    table = classify_files(run, new, tmp_path/"t.tsv", device="cpu")
    lines = (tmp_path/"t.tsv").read_bytes().decode().split("\n")
    assert len(lines) == len(ODD) + 2 and all(cell.isprintable() for line in lines for cell in line.split("\t"))
    assert sorted(map(predict.file_of, table.file)) == sorted(str(new/name) for name in ODD)
    assert table.error.isna().all() and predict.read_table(tmp_path/"t.tsv").file.equals(table.file)
    (tmp_path/"list.txt").write_bytes(b"\n".join(os.fsencode(new/name) for name in ODD if "\n" not in name))
    assert len(classify_files(run, tmp_path/"list.txt", None, device="cpu").dropna(subset="class")) == len(ODD) - 1


def names_in(folder): return sorted(file.name for file in folder.iterdir())

def stop_after(monkeypatch, batches, error):
    "prediction that ends so early; returns how many images it was asked about"
    usual, asked = predict.classified, []
    def classified(*arguments):
        for n, (read, probs) in enumerate(usual(*arguments)):
            if n == batches: raise error
            asked.extend(read)
            yield read, probs
    monkeypatch.setattr(predict, "classified", classified)
    return asked


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a worker died"), SystemExit(75)])
def test_what_is_interrupted_goes_on(make_run, tmp_path, monkeypatch, capsys, error):
    "Nothing that was known is computed twice, and the table is that of one call; other batches are no other table."
    run, _ = make_run("ft")
    (tmp_path/"out").mkdir()
    (tmp_path/"new"/"bad.png").touch()
    ways, out = dict(device="cpu"), tmp_path/"out"/"t.tsv"
    whole = classify_files(run, tmp_path/"new", None, batch_size=4, **ways)
    with monkeypatch.context() as patch:
        stop_after(patch, 2, error)
        with pytest.raises(type(error)): classify_files(run, tmp_path/"new", out, batch_size=4, **ways)
    part, = (tmp_path/"out").iterdir()
    assert not out.exists() and len(part.read_text().splitlines()) == 9
    with open(part, "ab") as file: file.write(b"cut by a kill\tre")
    asked = stop_after(monkeypatch, 99, error)
    table = classify_files(run, tmp_path/"new", out, batch_size=6, **ways)
    assert "going on after 8 files" in capsys.readouterr().out and len(asked) == 21 - 8
    pd.testing.assert_frame_equal(table, whole, atol=2e-6)
    assert names_in(tmp_path/"out") == ["t.tsv"]


@pytest.mark.parametrize("change", ["image", "temperature", "list", "weights"])
def test_what_was_begun_of_something_else_is_not_used(make_run, tmp_path, monkeypatch, capsys, change):
    run, _ = make_run("flyp")
    out, asked = tmp_path/"out"/"t.tsv", dict(temperature=1, batch_size=4, device="cpu")
    with monkeypatch.context() as patch:
        stop_after(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt): classify_files(run, tmp_path/"new", out, **asked)
    if change == "image": Image.new("RGB", (16, 16)).save(tmp_path/"new"/"03.png")
    if change == "temperature": asked["temperature"] = 2
    if change == "list": (tmp_path/"new"/"00.png").unlink()
    if change == "weights": save_clip(load_clip(str(run/"teacher" if (run/"teacher").is_dir() else tmp_path/"tiny"))[0],
                                      run/"student")
    seen = stop_after(monkeypatch, 99, None)
    table = classify_files(run, tmp_path/"new", out, **asked)
    assert "beginning anew" in capsys.readouterr().out and len(seen) == len(table) == 20 - (change == "list")
    assert names_in(tmp_path/"out") == ["t.tsv"]


def test_a_full_disk_loses_nothing(make_run, tmp_path, monkeypatch):
    run, _ = make_run("ft")
    write, left = predict.GrowingTable.write, iter(range(3))
    def full(self, rows):
        if next(left, None) is None: raise OSError(errno.ENOSPC, "No space left on device")
        write(self, rows)
    out = tmp_path/"out"/"t.tsv"
    with monkeypatch.context() as patch:
        patch.setattr(predict.GrowingTable, "write", full)
        with pytest.raises(UserError, match="No space left on device; mend that .* it goes on"):
            classify_files(run, tmp_path/"new", out, batch_size=4, device="cpu")
    asked = stop_after(monkeypatch, 99, None)
    assert len(classify_files(run, tmp_path/"new", out, batch_size=4, device="cpu")) == 20 and len(asked) == 12


def test_two_at_once_do_not_mix(make_run, tmp_path, monkeypatch):
    run, _ = make_run("ft")
    out = tmp_path/"out"/"t.tsv"
    with monkeypatch.context() as patch:
        stop_after(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt): classify_files(run, tmp_path/"new", out, batch_size=4, device="cpu")
    part, = out.parent.iterdir()
    before = part.read_bytes()
    with predict.sole_writer(part):
        with pytest.raises(UserError, match="another process is writing to"):
            classify_files(run, tmp_path/"new", out, device="cpu")
        classify_files(run, tmp_path/"new", out, temperature=2, device="cpu")  # of something else: both are written
        assert part.read_bytes() == before
    classify_files(run, tmp_path/"new", out, device="cpu")
    assert names_in(out.parent) == ["t.tsv"]


def test_memory_is_that_of_a_batch(make_run, tmp_path, monkeypatch):
    "20,000 files and 1,000 classes: all probabilities would be 160 MB."
    run, _ = make_run("ft")
    files = [f"new/{i:06d}.png" for i in range(20_000)]
    def classified(model, files, temperature, begin, batch_size, workers):
        for start in range(begin, len(files), batch_size):
            some = range(start, min(start + batch_size, len(files)))
            yield [(index, "") for index in some], np.eye(2, 1000)[np.arange(len(some)) % 2]
    monkeypatch.setattr(predict, "classified", classified)
    monkeypatch.setattr(predict, "list_files", lambda images, out: files)
    tracemalloc.start()
    table = classify_files(run, tmp_path/"new", tmp_path/"t.tsv", device="cpu")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(table) == 20_000 and most < 40e6, most


def test_no_other_file_is_overwritten(make_run, tmp_path):
    "Images, lists and records keep their content; a table is replaced, through a link at its place."
    run, _ = make_run("ft")
    (tmp_path/"list.txt").write_text(str(tmp_path/"new"/"00.png"))
    for out in (tmp_path/"new"/"00.png", tmp_path/"list.txt", run/"classes.json"):
        before = out.read_bytes()
        with pytest.raises(UserError, match="is there and is no table of predictions"):
            classify_files(run, tmp_path/"new"/"00.png", out, device="cpu")
        assert out.read_bytes() == before
    (tmp_path/"link.tsv").symlink_to(tmp_path/"new"/"table.tsv")
    for _ in range(2): assert len(classify_files(run, tmp_path/"new", tmp_path/"link.tsv", device="cpu")) == 20
    assert (tmp_path/"link.tsv").is_symlink() and (tmp_path/"new"/"table.tsv").is_file()


def test_rotation_is_ignored(make_run, tmp_path):
    "As in training and evaluation, so that confidences mean the same."
    run, _ = make_run("ft")
    image, exif = Image.open(tmp_path/"new"/"00.png"), Image.Exif()
    exif[274] = 6
    (tmp_path/"turned").mkdir()
    image.save(tmp_path/"turned"/"a.png")
    image.save(tmp_path/"turned"/"b.png", exif=exif)
    image.rotate(-90).save(tmp_path/"turned"/"c.png")
    plain, noted, turned = classify_files(run, tmp_path/"turned", None, device="cpu").confidence
    assert plain == noted != turned


def test_the_teachers_own_head_is_used(make_run, tmp_path):
    run, _ = make_run("ft")
    shutil.copytree(run/"student", run/"teacher")
    student, teacher = (classify_files(place, tmp_path/"new", None, 1, device="cpu") for place in (run, run/"teacher"))
    assert student.equals(teacher)


def damage(file, content=b"x"):
    "another file in its place, for the old one may be open"
    file.unlink()
    file.write_bytes(content)

def empty_folder(new): (new/"empty").mkdir(); return new/"empty"
def unreadable(new): (new/"bad").mkdir(); (new/"bad"/"a").touch(); return new/"bad"
def pipe(new): os.mkfifo(new/"t.tsv"); return new/"t.tsv"
def loop(new): (new/"loop.tsv").symlink_to(new/"loop.tsv"); return new/"loop.tsv"

def spoil_head(run, change):
    "another head in its place; None: one without this tensor"
    state = load_file(run/"student"/"head.safetensors")
    save_file({name: tensor for name, tensor in (state | change).items() if tensor is not None},
              run/"student"/"head.safetensors")

def spoil_classes(run, **change):
    content = json.loads((run/"classes.json").read_text()) | change
    (run/"classes.json").write_text(json.dumps({name: value for name, value in content.items() if value is not None}))

def sealed(run, spoil):
    "a run that knows what it has made, and something else in place of a part of it"
    (run/"config.json").write_text(json.dumps({"complete": True, "made": seal(run)}))
    spoil()

def untrained(run, tiny, spoil):
    "a run of the model in a folder, whose weights are others by now"
    shutil.rmtree(run/"student")
    parameters = dict(method="zs", benchmark="glyphs", root=None, model=str(tiny), pretrained=None)
    (run/"config.json").write_text(json.dumps({"parameters": parameters, "weights": weights_of(str(tiny))}))
    spoil()

def other_weights(folder):
    "the same model, every value different"
    file = folder/"open_clip_model.safetensors"
    state = {name: tensor + 1 for name, tensor in load_file(file).items()}
    file.unlink()
    save_file(state, file)

def no_numbers(folder):
    "weights of a training that has diverged"
    file = folder/"open_clip_model.safetensors"
    state = {name: tensor * float("nan") for name, tensor in load_file(file).items()}
    file.unlink()
    save_file(state, file)

REFUSED = {  # fault: (what is done to run and images; returns what else is asked for, words of the message)
    "no checkpoint": (lambda run, new: dict(checkpoint=run/"nowhere"), "there is no folder .*nowhere"),
    "no run": (lambda run, new: dict(checkpoint=new), "neither classes.json nor config.json"),
    "weights alone": (lambda run, new: dict(checkpoint=shutil.copytree(run/"student", new/"student")),
                      "carot export makes a folder that is whole"),
    "unfinished": (lambda run, new: shutil.rmtree(run/"student"), "training has not ended"),
    "damaged classes": (lambda run, new: damage(run/"classes.json", b"{"), "classes.json is not valid JSON"),
    "damaged weights": (lambda run, new: damage(run/"student"/"open_clip_model.safetensors"), "not a checkpoint"),
    "damaged validation": (lambda run, new: damage(run/"predictions"/"val.safetensors"), "cannot read .*val"),
    "no images": (lambda run, new: dict(images=new/"nowhere"), "there is no folder or file"),
    "empty folder": (lambda run, new: dict(images=empty_folder(new)), "there is no file in"),
    "nothing readable": (lambda run, new: dict(images=unreadable(new)), "none of the 1 files in .*the file is empty"),
    "temperature": (lambda run, new: dict(temperature="0"), "temperature must be auto or a positive number .*not '0'"),
    "temperature nan": (lambda run, new: dict(temperature="nan"), "temperature must be auto"),
    "device": (lambda run, new: dict(device="gpu"), "unknown device 'gpu'"),
    "temperature beyond bounds": (lambda run, new: dict(temperature=1e-300), "temperature must be auto"),
    "no temperature": (lambda run, new: dict(temperature=None), "temperature must be auto"),
    "batch size": (lambda run, new: dict(batch_size=0), "batch_size must be at least 1"),
    "workers": (lambda run, new: dict(workers=-3), "workers must be at least 0"),
    "many workers": (lambda run, new: dict(workers=100_000), "workers must be at most"),
    "out is a folder": (lambda run, new: dict(out=new), "is a folder or no regular file"),
    "out is a pipe": (lambda run, new: dict(out=pipe(new)), "no regular file"),
    "out is long": (lambda run, new: dict(out=new/("x" * 300)), "File name too long"),
    "out is a loop": (lambda run, new: dict(out=loop(new)), "symbolic links"),
    "out below a file": (lambda run, new: dict(out=new/"00.png"/"t.tsv"), "cannot write to .*Not a directory"),
    "out where nobody writes": (lambda run, new: dict(out="/proc/1/t.tsv"), "cannot write to /proc"),
    "out is empty": (lambda run, new: dict(out=""), "out is empty"),
    "head of other classes": (lambda run, new: spoil_head(run, dict(weight=torch.ones(7, 16), bias=torch.ones(7))),
                              "its head is for 7 classes, but 4 have names"),
    "head of another width": (lambda run, new: spoil_head(run, dict(weight=torch.ones(4, 5))), "not fit 16 features"),
    "head without a bias": (lambda run, new: spoil_head(run, dict(bias=None)), "head.safetensors is damaged"),
    "head that is none": (lambda run, new: damage(run/"student"/"head.safetensors"), "head.safetensors is damaged"),
    "head and fewer classes": (lambda run, new: spoil_classes(run, classnames=["red", "green"]), "4 classes, but 2"),
    "fewer classes": (lambda run, new: spoil_classes(run, classnames=["red", "green"]), "val.safetensors is damaged"),
    "no templates": (lambda run, new: spoil_classes(run, templates=None), "classes.json is damaged"),
    "classes of another type": (lambda run, new: spoil_classes(run, classnames={"a": 1}), "classes.json is damaged"),
    "classes are a list": (lambda run, new: damage(run/"classes.json", b"[]"), "classes.json is damaged"),
    "config is a list": (lambda run, new: (run/"config.json").write_text("[]") and None, "config.json is dam"),
    "config of numbers": (lambda run, new: (shutil.rmtree(run/"student"), (run/"config.json").write_text(
        '{"parameters": {"method": "zs"}}')) and None, "config.json is damaged"),
    "no numbers": (lambda run, new: no_numbers(run/"student"), "no numbers"),
    "sealed weights": (lambda run, new: sealed(run, lambda: other_weights(run/"student")), "clip_model.* exchanged"),
    "sealed head": (lambda run, new: sealed(run, (run/"student"/"head.safetensors").unlink), "head.* exchanged"),
    "sealed classes": (lambda run, new: sealed(run, lambda: spoil_classes(run, classnames=["4", "3", "2", "1"])),
                       "classes.json .* exchanged"),
    "another model by now": (lambda run, new: untrained(run, new.parent/"tiny", lambda: other_weights(
        new.parent/"tiny")), "the model's weights are others by now"),
}

@pytest.mark.parametrize("fault", REFUSED)
def test_refused_in_one_line(make_run, tmp_path, fault):
    run, _ = make_run("ft" if "head" in fault else "flyp")
    spoil, words = REFUSED[fault]
    asked = dict(checkpoint=run, images=tmp_path/"new", out=tmp_path/"t.tsv") | (spoil(run, tmp_path/"new") or {})
    with pytest.raises(UserError, match=words) as error: classify_files(**asked)
    assert "\n" not in str(error.value) and not (tmp_path/"t.tsv").exists()


def test_what_costs_nothing_is_checked_first(make_run, tmp_path, monkeypatch):
    run, _ = make_run("flyp")
    monkeypatch.setattr(predict, "open_checkpoint", lambda *_: pytest.fail("the model was loaded"))
    for fault in ("temperature", "device", "batch size", "workers", "out is a folder", "out is long", "no images"):
        asked = dict(checkpoint=run, images=tmp_path/"new", out=None) | REFUSED[fault][0](run, tmp_path/"new")
        with pytest.raises(UserError, match=REFUSED[fault][1]): classify_files(**asked)
