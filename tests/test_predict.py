"Predictions on files: the same figures as in evaluation, whatever else lies in the folder."
import copy
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from carot import calibration
from carot.calibration import softmax, temperature_and_reason
from carot.clip import save_clip
from carot.core import UserError
from carot.evaluate import Predictions, classifier, load_classes, predict_sets, save_classes, save_predictions
from carot.methods.base import find_method
from carot.predict import classify_files, list_files, open_checkpoint
from carot.train import fine_tune

SETTINGS = dict(epochs=2, batch_size=16, lr=1e-3, warmup_steps=2, teacher_update_every=2, device="cpu")


@pytest.fixture
def make_run(tiny_clip, toy, tmp_path):
    "a run of any method on the four colours, and its evaluation images as files"
    from carot.clip import load_clip
    save_clip(tiny_clip, tmp_path/"tiny")
    clip, _, transform, tokenizer = load_clip(str(tmp_path/"tiny"))
    for dataset in (toy.train, toy.val, *(s.dataset for s in toy.eval.values())): dataset.transform = transform
    raw = copy.copy(toy.eval["Toy"].dataset)
    raw.transform = None
    (tmp_path/"new").mkdir()
    for i in range(len(raw)): raw[i][0].save(tmp_path/"new"/f"{i:02d}.png")
    def make(method):
        run = tmp_path/method
        uses = find_method(method).uses
        settings = {name: value for name, value in SETTINGS.items() if uses(name)}
        trained = fine_tune(copy.deepcopy(clip), tokenizer, toy, method, **settings, out=run)
        predictions = predict_sets(classifier(trained, tokenizer, toy), toy, out=run)
        save_classes(run, toy)
        return run, predictions
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
    row = table[table.file == str(new/"deep"/"er"/"tab\there größer.png")].iloc[0]
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


def damage(file, content=b"x"):
    "another file in its place, for the old one may be open"
    file.unlink()
    file.write_bytes(content)

def empty_folder(new): (new/"empty").mkdir(); return new/"empty"
def unreadable(new): (new/"bad").mkdir(); (new/"bad"/"a").touch(); return new/"bad"

REFUSED = {  # fault: (what is done to run and images; returns what else is asked for, words of the message)
    "no checkpoint": (lambda run, new: dict(checkpoint=run/"nowhere"), "there is no folder .*nowhere"),
    "no run": (lambda run, new: dict(checkpoint=new), "neither classes.json nor config.json"),
    "unfinished": (lambda run, new: shutil.rmtree(run/"student"), "training has not ended"),
    "damaged classes": (lambda run, new: damage(run/"classes.json", b"{"), "classes.json is not valid JSON"),
    "damaged weights": (lambda run, new: damage(run/"student"/"open_clip_model.safetensors"), "not a checkpoint"),
    "damaged validation": (lambda run, new: damage(run/"predictions"/"val.safetensors"), "cannot read .*val"),
    "no images": (lambda run, new: dict(images=new/"nowhere"), "there is no folder or file"),
    "empty folder": (lambda run, new: dict(images=empty_folder(new)), "there is no file in"),
    "nothing readable": (lambda run, new: dict(images=unreadable(new)), "none of the 1 files in .*the file is empty"),
    "temperature": (lambda run, new: dict(temperature="0"), "temperature must be auto or a positive number, not '0'"),
    "temperature nan": (lambda run, new: dict(temperature="nan"), "temperature must be auto"),
    "device": (lambda run, new: dict(device="gpu"), "unknown device 'gpu'"),
}

@pytest.mark.parametrize("fault", REFUSED)
def test_refused_in_one_line(make_run, tmp_path, fault):
    run, _ = make_run("flyp")
    spoil, words = REFUSED[fault]
    asked = dict(checkpoint=run, images=tmp_path/"new", out=None) | (spoil(run, tmp_path/"new") or {})
    with pytest.raises(UserError, match=words) as error: classify_files(**asked)
    assert "\n" not in str(error.value)
