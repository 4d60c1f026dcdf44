"Corruptions: the same for everybody, harmful in order, read from ImageNet-C in both layouts, and their tables."
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from fake_imagenet import WNIDS, number, write_corrupted
from PIL import Image
from torch.utils.data import DataLoader, Subset

from carot.analysis import corruption_tables as tables
from carot.benchmarks import corruptions as c
from carot.benchmarks.imagenet import set_folder
from carot.calibration import METRICS, ece, nll, softmax
from carot.clip import load_clip
from carot.core import UserError
from carot.data import EvalSet, load_benchmark
from carot.evaluate import Predictions, classifier, predict_set, read_predictions
from carot.runs.execute import execute_notebook
from carot.runs.settings import check_parameters, notebook_path
from carot.train import FineTuned

ALL = [*c.CORRUPTIONS, *c.EXTRA]


@pytest.fixture(scope="module")
def glyphs(): return load_benchmark("glyphs")


@pytest.fixture(scope="module")
def digits(glyphs): return Subset(glyphs.eval["Glyphs"].dataset, range(0, 5000, 25))


# images

@pytest.mark.parametrize("name", ALL)
def test_an_image_is_corrupted_alike_for_everybody(name, digits):
    image = digits[7][0]
    before = image.tobytes()
    np.random.seed(1); torch.manual_seed(1)
    one = c.corrupt(image, name, 4, index=7)
    np.random.seed(2); torch.manual_seed(2)
    assert c.corrupt(image.copy(), name, 4, index=7).tobytes() == one.tobytes() and image.tobytes() == before
    assert one.mode == "RGB" and one.size == image.size and one.tobytes() != before


def test_chance_is_of_corruption_severity_and_index_alone(digits):
    image = digits[0][0]
    made = [c.corrupt(image, "gaussian_noise", s, i).tobytes() for s in (1, 2) for i in (0, 1)]
    assert len(set(made)) == 4
    for name in ("brightness", "contrast", "pixelate", "jpeg_compression", "zoom_blur", "defocus_blur"):  # no chance
        assert c.corrupt(image, name, 2, 0).tobytes() == c.corrupt(image, name, 2, 1).tobytes()


def test_a_set_does_not_depend_on_order_or_loader_processes(digits):
    transform = load_clip("glyphs")[2]
    frosty = c.Corrupted(Subset(digits, range(20)), "frost", 3, transform)
    backwards = [frosty[i][0] for i in reversed(range(20))][::-1]
    assert torch.equal(frosty[-1][0], backwards[19]) and not torch.equal(frosty[0][0], frosty[1][0])
    for workers in (0, 2):
        images = torch.cat([images for images, _ in DataLoader(frosty, 3, num_workers=workers)])
        assert torch.equal(images, torch.stack(backwards))
    with pytest.raises(IndexError): frosty[20]


def test_everything_is_float_until_the_end():
    "No value wraps around: what is white stays white, and functions take and give fractions."
    rng = np.random.default_rng(0)
    image = rng.random((20, 24, 3)).astype(np.float32)
    for name, function in c.FUNCTIONS.items():
        for severity in c.SEVERITIES:
            made = function(image, np.random.default_rng(1), **c.strength(name, severity, 32))
            assert made.dtype.kind == "f" and made.shape == image.shape and np.isfinite(made).all(), name
    white = Image.new("RGB", (16, 16), "white")
    for name in ("brightness", "snow", "saturate", "contrast", "fog", "zoom_blur"):
        assert np.asarray(c.corrupt(white, name, 5)).min() > (240 if name != "fog" else 100), name
    assert np.array_equal(c.to_pil(np.array([[[-0.5, 0.5, 7.0]]])), [[[0, 128, 255]]])


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (28, 28), (224, 160), (500, 375)])
def test_any_size_will_do(size):
    image = Image.effect_noise(size, 60).convert("L")  # grey: it is made RGB
    for name in ALL: assert c.corrupt(image, name, 5).size == size


def test_published_strengths_at_their_sizes():
    "At 224 and 32 pixels nothing is interpolated; between them lies what is between."
    for name, parameters in c.STRENGTHS.items():
        for severity in c.SEVERITIES:
            for side, which in ((224, 0), (32, 1)):
                expected = {key: values[which][severity - 1] for key, values in parameters.items()}
                assert c.strength(name, severity, side) == pytest.approx(expected)
            for key, value in c.strength(name, severity, 90).items():
                low, high = sorted(values[severity - 1] for values in parameters[key])
                assert low - 1e-9 <= value <= high + 1e-9
    assert c.strength("gaussian_noise", 1, 85)["deviation"] == pytest.approx(
        0.04 * 2**(math.log(85 / 32) / math.log(7)))


def test_noise_has_the_strength_that_it_says():
    grey = Image.new("RGB", (224, 224), (128, 128, 128))
    for severity, deviation in zip(c.SEVERITIES[:3], (0.08, 0.12, 0.18)):
        values = np.asarray(c.corrupt(grey, "gaussian_noise", severity), float) / 255
        assert values.std() == pytest.approx(deviation, rel=0.03) and values.mean() == pytest.approx(0.502, abs=0.01)
    salted = np.asarray(c.corrupt(grey, "impulse_noise", 3))
    assert (salted != 128).mean() == pytest.approx(0.09, abs=0.005)


def test_squares_are_those_of_clips_transform():
    from open_clip.transform import image_transform
    transform, rng = image_transform(24, is_train=False), np.random.default_rng(0)
    for size in ((24, 24), (31, 24), (24, 77), (40, 61), (13, 17)):
        image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
        assert torch.equal(transform(c.square(image, 24)), transform(image)), size


# harm

def difference(images, name, severity):
    pairs = [(image, c.corrupt(image, name, severity, i)) for i, image in enumerate(images)]
    return np.mean([abs(np.asarray(a, float) - np.asarray(b, float)).mean() for a, b in pairs])


def test_pixels_are_further_off_at_higher_severities(digits):
    images = [digits[i][0] for i in range(0, 200, 4)]
    for name in ("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "zoom_blur", "snow", "fog",
                 "brightness", "contrast", "pixelate", "jpeg_compression", "speckle_noise", "gaussian_blur"):
        far = [difference(images, name, severity) for severity in c.SEVERITIES]
        assert far == sorted(far), (name, far)


def test_accuracy_falls_with_severity(glyphs, digits):
    "For most corruptions, on 200 images, by more than chance; and on average at every step."
    clip, _, transform, tokenizer = load_clip("glyphs")
    model = classifier(FineTuned(clip), tokenizer, glyphs)
    def right(dataset):
        p = predict_set(model, dataset, batch_size=200)
        return (p.logits.argmax(1) == p.labels).numpy()
    clean = right(c.Corrupted(digits, "brightness", 1, transform)).mean()
    found = {name: [right(c.Corrupted(digits, name, s, transform)) for s in (1, 3, 5)] for name in c.CORRUPTIONS}
    means = np.array([[r.mean() for r in rows] for rows in found.values()]).mean(0)
    assert clean > means[0] > means[1] + 0.03 and means[1] > means[2] + 0.03
    fall = {name: (rows[0].astype(float) - rows[2]) for name, rows in found.items()}
    surely = [name for name, d in fall.items() if d.mean() > 2 * d.std() / len(d)**0.5]
    rises = [name for name, d in fall.items() if d.mean() < -2 * d.std() / len(d)**0.5]
    assert len(surely) >= 10 and not set(rises) - {"elastic_transform", "glass_blur"}, (surely, rises)


# ImageNet-C

LAYOUTS = {"flat": lambda name, s: f"{name}/{s}",
           "archives": lambda name, s: f"{next(k for k, v in c.CATEGORIES.items() if name in v)}/{name}/{s}"}


@pytest.mark.parametrize("inside", ["", "imagenet-c", "ImageNet-C"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_layouts_with_the_folder_or_the_one_it_lies_in(layout, inside, tmp_path):
    pairs = [(name, s) for name in ("fog", "jpeg_compression", "spatter") for s in (1, 5)]
    write_corrupted(tmp_path/inside, [LAYOUTS[layout](*pair) for pair in pairs], WNIDS[5:8])
    found = c.corruption_folders(tmp_path, ["fog", "jpeg_compression", "spatter"], [1, 5])
    assert list(found) == pairs and all(folder.is_dir() for folder in found.values())
    assert found == c.corruption_folders(tmp_path/inside, ["fog", "jpeg_compression", "spatter"], [1, 5])
    with pytest.warns(UserWarning, match="3 images of 3 of the 1,000 classes"):
        evalset = c.load_corrupted(found["fog", 5])
    assert [evalset.dataset[i][1] for i in range(3)] == [5, 6, 7] and not evalset.id and evalset.groups is None


def test_a_whole_set_is_read_without_a_word_and_in_class_order(tmp_path):
    write_corrupted(tmp_path, ["snow/2"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = c.load_corrupted(c.corruption_folders(tmp_path, ["snow"], [2])["snow", 2]).dataset
    assert images.labels.tolist() == list(range(1000))
    assert all(number(images[i][0].getpixel((4, 4))) == i for i in range(0, 1000, 111))


def test_missing_folders_are_one_clear_line(tmp_path):
    write_corrupted(tmp_path, ["weather/fog/1", "weather/fog/2"], WNIDS[:1])
    for root, names, severities, words in [
            (tmp_path, ["fog", "frost"], [2, 3], r"lacks 3 of 4 folders .*\(frost/2, frost/3, fog/3\); unpack weather"),
            (tmp_path, ["fog", "snow", "pixelate"], [1], r"lacks 2 of 3 .*unpack weather.tar, digital.tar there"),
            (tmp_path/"nowhere", ["fog"], [1], "there is no folder .*nowhere.*root")]:
        with pytest.raises(UserError, match=words) as error:
            c.corruption_folders(root, c.choose_corruptions(names), severities)
        assert "\n" not in str(error.value)
    (tmp_path/"weather"/"fog"/"1"/"n00000000").mkdir()
    with pytest.raises(UserError, match="n00000000 is no class"): c.load_corrupted(tmp_path/"weather"/"fog"/"1")


@pytest.mark.parametrize("call, words", [
    (lambda: c.choose_corruptions(["fogg"]), "unknown corruption 'fogg'.*did you mean 'fog'"),
    (lambda: c.choose_severities([1, 6]), "severity 6 is none of 1, 2, 3, 4, 5"),
    (lambda: c.corrupt(Image.new("RGB", (8, 8)), "fog", 0), "severity 0"),
    (lambda: c.Corrupted([], "mist", 1), "unknown corruption 'mist'")])
def test_wrong_names_are_named(call, words):
    with pytest.raises(UserError, match=words): call()


def test_imagenet_itself_does_not_take_its_corrupted_copy_for_one_of_its_sets(tmp_path):
    write_corrupted(tmp_path/"imagenet-c", ["fog/1"], WNIDS[:2])
    with pytest.raises(UserError, match="there is no folder ILSVRC2012"): set_folder(tmp_path, "ImageNet")


# tables

def frame(values):
    "Results of (method, seed, corruption, severity) -> accuracy; ECE is half of the error, NLL twice."
    lines = [(*key, metric, f(accuracy)) for key, accuracy in values.items()
             for metric, f in (("accuracy", float), ("ece", lambda a: (1 - a) / 2), ("nll", lambda a: 2 * (1 - a)))]
    return pd.DataFrame(lines, columns=["method", "seed", "corruption", "severity", "metric", "value"])


def whole(errors, method="carot", seed=1):
    "All 15 at five severities, whose mean errors these are."
    steps = (-0.02, -0.01, 0, 0.01, 0.02)
    return {(method, seed, "clean", 0): 0.9} | {(method, seed, name, s): 1 - error - step
                                               for name, error in errors.items() for s, step in enumerate(steps, 1)}


def test_mce_by_hand():
    errors = {name: error * (0.5 if name in c.CATEGORIES["noise"] else 0.8) for name, error in c.ALEXNET.items()}
    results = frame(whole(errors) | whole(c.ALEXNET, "flyp"))
    found = tables.corruption_errors(results)
    assert found.loc[("carot", 1)].to_dict() == pytest.approx(errors) and tables.is_whole(results)
    expected = (3 * 0.5 + 12 * 0.8) / 15
    assert tables.mean_corruption_error(found.loc[("carot", 1)], c.ALEXNET) == pytest.approx(expected)
    assert tables.mean_corruption_error(found.loc[("flyp", 1)], c.ALEXNET) == pytest.approx(1)
    summary = tables.summary_numbers(results, c.ALEXNET, "mCE").loc[("carot", 1)]
    mean = np.mean(list(errors.values()))
    assert summary["mCE"] == pytest.approx(expected) and summary["accuracy, clean"] == pytest.approx(0.9)
    assert summary["ECE, corrupted"] == pytest.approx(mean / 2) and summary["NLL, corrupted"] == pytest.approx(2 * mean)


def test_alexnets_errors_are_those_of_the_paper():
    "Table 1 of Hendrycks and Dietterich (2019), in percent."
    printed = [88.6, 89.4, 92.3, 82.0, 82.6, 78.6, 79.8, 86.7, 82.7, 81.9, 56.5, 85.3, 64.6, 71.8, 60.7]
    assert list(c.ALEXNET) == list(c.CORRUPTIONS)
    assert np.abs(100 * np.array(list(c.ALEXNET.values())) - printed).max() < 0.0501


def test_extra_corruptions_are_in_no_mean_but_their_own():
    results = frame(whole(c.ALEXNET) | {("carot", 1, "spatter", s): 0.0 for s in c.SEVERITIES})
    assert tables.by_severity(results, "accuracy").loc[("carot", 1), 3] == pytest.approx(
        1 - np.mean(list(c.ALEXNET.values())))
    assert "spatter" not in tables.corruption_errors(results) and "spatter" in tables.by_corruption(results, "ece")
    alone = results[results.corruption.isin(["spatter", "clean"])]
    assert tables.by_severity(alone, "accuracy").loc[("carot", 1)].tolist() == [0.9] + 5 * [0.0]


def test_a_part_is_not_a_whole():
    results = frame(whole(c.ALEXNET))
    assert not tables.is_whole(results[results.severity != 4])
    assert not tables.is_whole(results[results.corruption != "fog"])


def test_seeds_are_averaged_in_text_and_figure():
    better = {name: error - 0.1 for name, error in c.ALEXNET.items()}
    results = frame(whole(c.ALEXNET) | whole(better, seed=2) | whole(c.ALEXNET, "zs"))
    text = tables.summary_text(tables.summary_numbers(results, c.ALEXNET, "mCE"))
    assert list(text.method) == ["zero-shot", "CaRot"] and text.mCE[0] == "100.0" and "±" in text.mCE[1]
    assert tables.corruption_text(results, "accuracy").shape == (15, 3)
    detail = tables.severity_text(results)
    assert detail.shape == (32, 8) and (detail.iloc[1:16, 2] == "").all() and (detail.iloc[1:16, 3:] != "").all().all()
    axes = tables.severity_picture(results).axes
    assert [ax.get_ylabel() for ax in axes] == [METRICS["accuracy"].label, METRICS["ece"].label]
    line = axes[0].get_lines()[0]
    assert line.get_color() == tables.in_order(["zs"])[0].colour and len(line.get_ydata()) == 6


class Seer:
    "Logits from the colour that spells an ImageNet class; `shift` classes off."
    weight = torch.zeros(1)
    def __init__(self, shift): self.shift = shift
    def __call__(self, pixels):
        logits = torch.zeros(len(pixels), 1000)
        logits[range(len(pixels)), [(number(pixel) + self.shift) % 1000 for pixel in pixels]] = 9.0
        return logits


def test_files_are_measured_once_for_all_models(tmp_path):
    write_corrupted(tmp_path/"c", ["noise/shot_noise/1", "noise/shot_noise/2"])
    folders, opened = [tmp_path/"right", tmp_path/"wrong"], []
    def transform(image): return torch.tensor(image.getpixel((4, 4)))
    def models(numbers): opened.append(list(numbers)); return [Seer(k) for k in numbers]
    sets = {pair: lambda folder=folder: c.load_corrupted(folder, transform)
            for pair, folder in c.corruption_folders(tmp_path/"c", ["shot_noise"], [1, 2]).items()}
    right, wrong = tables.measure(folders, models, sets, batch_size=256)
    assert (right[right.metric == "accuracy"].value == 1).all() and (wrong[wrong.metric == "accuracy"].value == 0).all()
    assert set(right.n) == {1000} and sorted(set(right.severity)) == [1, 2] and not right.id.any()
    (folders[1]/"shot_noise-2.tsv").unlink()
    again = tables.measure(folders, models, sets, batch_size=256, logits=True)
    assert opened == [[0, 1], [0, 1], [1]] and again[0].equals(right) and again[1].equals(wrong)
    kept = read_predictions(folders[1]/"predictions"/"shot_noise-2.safetensors")
    assert kept.logits.shape == (1000, 1000) and not (folders[0]/"predictions").exists()


def test_kept_numbers_are_those_of_the_metrics(tmp_path):
    rng = np.random.default_rng(0)
    p = Predictions(torch.tensor(rng.normal(size=(50, 4)) * 3), torch.tensor(rng.integers(0, 4, 50)), False)
    few = {name: METRICS[name] for name in ("ece", "nll")}
    assert tables.kept_metrics(tmp_path, "fog-1", few, 10) is None
    tables.keep_metrics(tmp_path, "fog-1", p, few, 10)
    found = tables.kept_metrics(tmp_path, "fog-1", few, 10).set_index("metric").value
    probs, labels = softmax(p.logits), p.labels.numpy()
    assert found["ece"] == ece(probs, labels) and found["nll"] == nll(probs, labels)  # to the last bit
    perfect = Predictions(10.0 * torch.eye(4), torch.arange(4), False)  # without an error there is no AUROC
    tables.keep_metrics(tmp_path, "fog-2", perfect, {"auroc": METRICS["auroc"]}, 10)
    assert tables.kept_metrics(tmp_path, "fog-2", {"auroc": METRICS["auroc"]}, 10).value.isna().all()
    assert tables.kept_metrics(tmp_path, "fog-1", METRICS, 10) is None


def test_models_together_answer_as_alone(glyphs, digits):
    clip, _, transform, tokenizer = load_clip("glyphs")
    model = classifier(FineTuned(clip), tokenizer, glyphs)
    evalset = EvalSet(c.Corrupted(Subset(digits, range(30)), "fog", 2, transform), id=False)
    half = classifier(FineTuned(clip), tokenizer, glyphs)
    half.weight = half.weight / 2
    one, two = tables.predict_together([model, half], evalset, batch_size=10)
    assert torch.equal(one.logits, predict_set(model, evalset.dataset, batch_size=10).logits)
    assert torch.allclose(two.logits, one.logits / 2, atol=1e-4) and torch.equal(one.labels, two.labels)


# the notebook

def write_squares(folder):
    rng = np.random.default_rng(0)
    for split, n in (("train", 4), ("val", 6), ("test", 12)):
        for name, colour in {"sun": (230, 200, 30), "anchor": (40, 60, 200), "heart": (220, 30, 40)}.items():
            (folder/split/name).mkdir(parents=True)
            for i in range(n):
                image = (np.array(colour) + rng.normal(0, 40, (40, 32, 3))).clip(0, 255).astype("uint8")
                Image.fromarray(image).save(folder/split/name/f"{i}.png")
    return folder


@pytest.mark.slow
def test_the_notebook_end_to_end(tmp_path, warm):
    notebook, data = notebook_path("corruptions"), write_squares(tmp_path/"squares")
    asked = dict(benchmark=str(data), settings="model=glyphs,device=cpu,workers=0", methods="", images=20, jobs=1,
                 corruptions="fog,spatter", severities="1,5", out=str(tmp_path/"logs"))
    for _ in range(2):
        execute_notebook(notebook, check_parameters(asked, notebook), tmp_path/"executed.ipynb")
    [folder] = tmp_path.glob("logs/*/corruptions")
    results = pd.read_csv(folder/"results.tsv", sep="\t")
    assert set(zip(results.corruption, results.severity)) == {("clean", 0), *((n, s) for n in ("fog", "spatter")
                                                                              for s in (1, 5))}
    assert set(results.method) == {"zs"} and set(results.n) == {20} and set(results.metric) == set(METRICS)
    assert {file.suffix for file in folder.glob("severities.*")} == {".png", ".svg"}
    assert "| zero-shot " in (folder/"summary.md").read_text() and "100.0" in (folder/"summary.md").read_text()
    [kept] = tmp_path.glob("logs/*/zs/*/posthoc/corruptions,images=20")
    assert len(list(kept.glob("*.tsv"))) == 5 and not (kept/"predictions").exists()
    write_corrupted(tmp_path/"imagenet-c", ["fog/1", "fog/5", "extra/spatter/1", "spatter/5"], WNIDS[:1])
    with pytest.raises((UserError, RuntimeError), match="1,000 classes, .* has 3; leave out root"):
        execute_notebook(notebook, check_parameters(asked | {"root": str(tmp_path)}, notebook), tmp_path/"again.ipynb")
