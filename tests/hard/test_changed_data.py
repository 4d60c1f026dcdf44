"""Data and weights change between two calls: nothing made from the old ones passes for a result of the new ones."""
import re

import pytest
from hard.makers import copied, cut, file, gone, link, moved, node, other_weights, replaced, several, tensors
from hard.place import call, copy_place, words_of
from hard.rows import AGAIN, FT, PREDICT, REPORT, WEIGHTS

SETS = ("train", "val", "Dark")
WAYS = {  # what is done: and what the line that tells it must name
    "an image is added": (copied("my/train/cat/0.png", "my/train/cat/9.png"), "train"),
    "an image is removed": (gone("my/val/dog/1.png"), "val"),
    "an image of a shift is removed": (gone("my/Dark/dog/1.png"), "Dark"),
    "an image is replaced by another": (copied("my/train/dog/0.png", "my/train/cat/0.png"), "train"),
    "an image's last byte is another": (None, "train"),
    "an image has another name": (moved("my/train/cat/0.png", "my/train/cat/00.png"), "train"),
    "a class folder has another name": (several(*(moved(f"my/{s}/cat", f"my/{s}/zebra") for s in SETS)), "class"),
    "two classes are swapped": (several(moved("my/train/cat", "my/x"), moved("my/train/dog", "my/train/cat"),
                                        moved("my/x", "my/train/dog")), "train"),
    "classnames.txt is added": (file("my/classnames.txt", "cat\tA cat\ndog\nowl\n"), "class|template"),
    "templates.txt is added": (file("my/templates.txt", "a drawing of a {}"), "class|template"),
    "the model has other weights": (tensors(WEIGHTS, other_weights), "weights"),
    "another folder has the name": (several(moved("my", "old"), copied("old", "my"), gone("my/train/owl/5.png"),
                                            gone("my/train/dog/5.png")), "train"),
    "a class is gone": (several(*(gone(f"my/{s}/owl") for s in SETS)), "class"),
    "a shift is gone": (gone("my/Dark"), "Dark"),
    "the model's link leads elsewhere": (several(copied("model", "other"), tensors("other/open_clip_model.safetensors",
                                         other_weights), gone("model"), link("model", "other")), "weights"),
}
pytestmark = [pytest.mark.slow(0.5), pytest.mark.xdist_group("changed data")]
COMMANDS = {"goes on": AGAIN, "was there": FT, "report": REPORT}


def last_byte(folder):
    "A picture of equal size: a byte of its pixels is another, its checksum too."
    from PIL import Image
    path = folder/"my"/"train"/"cat"/"0.png"
    content = path.read_bytes()
    for value in range(256):
        with Image.open(path) as image: pixels = image.copy()
        pixels.putpixel((15, 15), (value, 0, 0))
        path.unlink()
        pixels.save(path)
        if path.stat().st_size == len(content) and path.read_bytes() != content: return
    raise AssertionError("no such picture")


def change(way, folder): (WAYS[way][0] or last_byte)(folder)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("command", COMMANDS)
def test_is_noticed(command, way, place, tmp_path):
    "Refused, or left out of the table, with the difference named; every call anew."
    here = copy_place(place, tmp_path/"here")
    change(way, here)
    result = call(words_of(COMMANDS[command]), here)
    assert result.code == 2 or command == "report", (result.out, result.err)
    assert re.search(WAYS[way][1], result.err), result.err
    assert len(result.errors) == bool(result.code) and "Traceback" not in result.err
    if command == "report" and result.code == 0:
        table = (here/"expt_logs"/"my"/"report"/"results.tsv").read_text()
        assert "\tft/" not in table and "\tft\t" not in table, table


@pytest.mark.parametrize("way", WAYS)
def test_predictions_are_those_of_the_run(way, place, tmp_path):
    "A run's own files make them: they are as before, or refused; an untrained one reads the model, which is compared."
    here = copy_place(place, tmp_path/"here")
    before = [table(here, checkpoint).out for checkpoint in ("{ft}", "{zs}")]
    assert all(before)
    change(way, here)
    for checkpoint, old in zip(("{ft}", "{zs}"), before):
        result = table(here, checkpoint)
        assert result.code == 2 and re.search(WAYS[way][1],
            result.err) or result.code == 0 and result.out == old, result
        if "weights" in WAYS[way][1] and checkpoint == "{zs}": assert result.code == 2, result


def table(folder, checkpoint):
    "Predictions of a run; the table is in its words."
    (folder/"predictions.tsv").unlink(missing_ok=True)
    result = call(words_of(PREDICT.replace("{ft}", checkpoint)), folder)
    made = folder/"predictions.tsv"
    return type(result)(result.code, made.read_text() if made.exists() else "", result.err)


FILES = {  # of a run: what is done to it, and the command that must refuse it or leave it out
    "metrics.tsv": (replaced("{ft}/metrics.tsv", "accuracy\t0", "accuracy\t1"), REPORT),
    "predictions/Dark.safetensors": (tensors("{ft}/predictions/Dark.safetensors",
                                             lambda t: t["logits"].mul_(-1)), REPORT),
    "classes.json": (node("{ft}/classes.json", "classnames", ["dog", "cat", "owl"]), PREDICT),
    "student/head.safetensors": (tensors("{ft}/student/head.safetensors", other_weights), PREDICT),
    "student/open_clip_model.safetensors": (tensors("{ft}/student/open_clip_model.safetensors", other_weights),
    PREDICT),
    "stats.tsv": (cut("{ft}/stats.tsv"), REPORT),
    "config.json": (node("{ft}/config.json", "parameters.workers", 7), REPORT),
}


@pytest.mark.parametrize("name", FILES)
def test_a_run_is_as_it_was_made(name, place, tmp_path):
    here = copy_place(place, tmp_path/"here")
    make, command = FILES[name]
    make(here)
    result = call(words_of(command), here)
    assert name.rpartition("/")[2] in result.err, result.err
    assert (result.code, len(result.errors)) == ((2, 1) if command == PREDICT else (0, 0)), result.err


def test_a_sweep_believes_no_edited_record(place, tmp_path):
    "The run's table is made again, and its row says what the run was set to."
    here, sweep = copy_place(place, tmp_path/"here"), "sweep --method ft --grid seed=1 {common} --name s"
    assert call(words_of(sweep), here).code == 0
    file = here/"expt_logs"/"my"/"sweeps"/"s"/"results.tsv"
    before = file.read_text()
    node("{ft}/config.json", "parameters.workers", 7)(here)
    result = call(words_of(sweep), here)
    assert result.code == 0 and "config.json is not as it was made" in result.err, result
    assert file.read_text() == before
