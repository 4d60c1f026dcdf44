"The ablation notebooks end to end, on a folder of a few images: their runs are simulated, or trained here."
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from carot.calibration import accuracy, batched_ece, ece
from carot.clip import load_clip
from carot.core import UserError, write_atomic
from carot.data import load_benchmark
from carot.evaluate import Predictions, classifier, load_predictions, metrics_table, predict_sets, save_predictions
from carot.runs.execute import execute_notebook
from carot.runs.jobs import ablation
from carot.runs.records import open_run
from carot.runs.settings import check_parameters, list_values, notebook_path
from carot.train import fine_tune

pytestmark = pytest.mark.usefixtures("warm")
CLASSES = {"sun": (230, 200, 30), "anchor": (40, 60, 200), "heart": (220, 30, 40), "skull": (200, 200, 200)}
SETS = [("train", 16, 1), ("val", 40, 1), ("test", 6, 1), ("night", 6, 0.4), ("fog", 6, 0.7)]  # images, light
SHIFTS = ("night", "fog")


def write_images(folder):
    "A coloured square per class, with noise."
    rng = np.random.default_rng(0)
    for split, n, light in SETS:
        for name, colour in CLASSES.items():
            (folder/split/name).mkdir(parents=True)
            for i in range(n):
                image = (light * np.array(colour) + rng.normal(0, 40, (32, 32, 3))).clip(0, 255).astype("uint8")
                Image.fromarray(image).save(folder/split/name/f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return str(write_images(tmp_path_factory.mktemp("ablations")/"my"))


class Study:
    "What a notebook is given, and the runs that it will find or ask for."
    def __init__(self, name, images, out, settings="model=glyphs"):
        self.name, self.given = name, {"benchmark": images, "out": str(out), "settings": settings}
        self.ablation = ablation(name, images, out, settings)

    def job(self, method, seed=1, **own): return self.ablation.job(method, seed=seed, **own)

    def execute(self, executed, **more):
        "The notebook's tables by name."
        notebook = notebook_path(self.name)
        execute_notebook(notebook, check_parameters(self.given | more, notebook), executed/"executed.ipynb")
        files, folder = sorted(self.ablation.folder.glob("*.tsv")), self.ablation.folder
        assert all(file.with_suffix(".md").exists() for file in files) and list(folder.glob("*.png"))
        return {file.stem: pd.read_csv(file, sep="\t", keep_default_na=False, na_values=[""]) for file in files}


def finish(job, predictions):
    "Leave behind what a finished run leaves."
    run = open_run(job.resolved, steps=1)
    for name, p in predictions.items(): save_predictions(run.path/"predictions"/f"{name}.safetensors", p)
    write_atomic(run.path/"metrics.tsv", metrics_table(predictions, 250).to_csv(sep="\t", index=False))
    (run.path/"run.ipynb").write_text("{}")
    run.finish(seconds={"total": 1.0})


def simulate(job, heat=1.0, skill=3.0, n=400):
    "A finished run with made-up predictions."
    found = {}
    for k, (name, id) in enumerate({"test": True, "night": False, "fog": False, "val": True}.items()):
        rng, labels = np.random.default_rng([k, job.parameters["seed"]]), np.arange(n) * 4 // n
        logits = rng.normal(size=(n, 4))
        logits[np.arange(n), labels] += skill - k
        found[name] = Predictions(torch.tensor(heat * logits, dtype=torch.float32), torch.tensor(labels), id)
    finish(job, found)


def over_shifts(metric, path):
    "Mean of a metric of saved predictions."
    return np.mean([metric(p.probs, p.labels) for name, p in load_predictions(path).items() if name in SHIFTS])


def test_table4_finds_the_planted_effect(images, tmp_path):
    study = Study("table4_coefficients", images, tmp_path/"logs", "model=glyphs,lr=0.002")
    levels = [(oc, sd, seed) for oc in (0.0, 0.2) for sd in (0.0, 1.5) for seed in (1, 2)]
    jobs = {(oc, sd, seed): study.job("carot", seed, orthogonality_coef=oc, distillation_coef=sd)
            for oc, sd, seed in levels}
    for (oc, sd, _), job in jobs.items(): simulate(job, heat=1 + sd, skill=3 + 0.8 * sd + 0.05 * oc)
    for job in (study.job("zs"), study.job("flyp"), study.job("flyp", 2)): simulate(job)
    found = study.execute(tmp_path, orthogonality_coef="0.2,0", distillation_coef="0,1.5", seeds=2, resamples=100,
                          jobs=1)
    row = found["table4"].set_index(["OC", "SD"]).loc["0.2", "1.5"]
    expected = [over_shifts(accuracy, jobs[0.2, 1.5, seed].path) for seed in (1, 2)]
    assert row["shifts accuracy"] == pytest.approx(np.mean(expected))
    assert row["shifts accuracy std"] == pytest.approx(np.std(expected, ddof=1))
    assert row["run"] == "carot/lr=0.002,model=glyphs,seed=*"
    assert set(found["claims"].verdict) == {"holds"}
    effect = found["effects"].set_index(["outcome", "factor"]).share["shifts accuracy"]
    assert effect["SD"] > 0.9 > 0.1 > effect["OC"] and effect.sum() == pytest.approx(1)
    assert "not run" not in (study.ablation.folder/"table4.md").read_text()


def test_batch_size_parts_add_up(images, tmp_path):
    study, steps_of_64 = Study("batch_size", images, tmp_path/"logs"), 4
    jobs = {}
    for size, n in [(16, 16), (16, 8), (8, 8)]:
        share = -(-64 // size)  # steps of an epoch, where the usual run has one
        jobs[size, n] = study.job("flyp", warmup_steps=10 * share, batch_size=size, accumulation_steps=size // n)
        simulate(jobs[size, n], skill=2 + n / 8, heat=1 + size / 16)
    assert jobs[16, 8].parameters["warmup_steps"] == 10 * steps_of_64
    found = study.execute(tmp_path, methods="flyp", step_size=16, eval_batches="100,50", seeds=1, resamples=50,
                          simulations=20, jobs=1, negatives="8,16", step_sizes="8,16")
    bias = found["estimator"].query("set == 'shifts'").set_index(["training batch", "evaluation batch"])
    bias = bias["perfectly calibrated"][16].loc[["whole set", "100", "50"]]
    assert (bias.diff().dropna() > 0).all()  # smaller batches, more bias

    def measured(size): return over_shifts(lambda *data: batched_ece(*data, size), jobs[size, size].path)
    parts = found["parts"].query("outcome == 'shifts ECE'").set_index("part").value
    whole = "as it would be published"
    assert parts[whole] == pytest.approx(measured(8) - measured(16))
    assert parts.drop(whole).sum() == pytest.approx(parts[whole])
    others = found["parts"].query("outcome == 'shifts accuracy'").part
    assert list(others) == ["fewer negatives", "more steps", whole]


def test_pretraining_seeds_counts_signs(images, tmp_path):
    study, other = Study("pretraining_seeds", images, tmp_path/"logs"), tmp_path/"other"
    other.mkdir()
    for own in ({}, {"model": str(other)}):
        simulate(study.job("zs", **own), skill=2.5)
        simulate(study.job("ft", **own), skill=3.5)
        simulate(study.job("flyp", **own), skill=3.0, heat=1 + 3 * bool(own))
    found = study.execute(tmp_path, models=str(other), methods="zs,ft,flyp", jobs=1)
    signs = found["differences"].set_index(["difference", "outcome"])["same sign"]
    assert signs["FT − zero-shot", "shifts accuracy"] == "yes" == signs["FLYP − FT", "ID accuracy"]
    table = found["results"].set_index(["method", "pretrained"])["shifts ECE"]
    assert table["flyp", 2] == pytest.approx(over_shifts(ece, study.job("flyp", model=str(other)).path))


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    "The folder with runs of zs, flyp and carot, trained here, and the settings they have."
    torch.set_num_threads(1)
    out, settings = tmp_path_factory.mktemp("trained"), "model=glyphs,epochs=2,warmup_steps=1,lr=1e-3"
    study = Study("posthoc", images, out, settings)
    for method in ("zs", "flyp", "carot"):
        job = study.job(method)
        clip, train_transform, transform, tokenizer = load_clip("glyphs")
        data = load_benchmark(images, None, transform, train_transform)
        asked = dict(epochs=2, batch_size=32, lr=1e-3, warmup_steps=1) if method != "zs" else {}
        if job.method.uses("teacher_update_every"): asked["teacher_update_every"] = 2
        model = fine_tune(clip, tokenizer, data, method, out=job.path if asked else None, **asked)
        finish(job, predict_sets(classifier(model, tokenizer, data), data))
    return out, settings


def test_posthoc_on_trained_runs(images, trained, tmp_path):
    study = Study("posthoc", images, *trained)
    found = study.execute(tmp_path, methods="flyp,carot", smoothed="", alphas="0.5", seeds=1, resamples=50, jobs=1)
    path, zero = study.job("carot").path, study.job("zs").path
    results = found["results"].set_index(["method", "remedy"])["ID ECE"]
    for remedy, folder in (("as trained", path), ("EMA teacher", path/"posthoc"/"teacher"),
                           ("WiSE-FT α=0.5", path/"posthoc"/"alpha=0.5")):
        p = load_predictions(folder)["test"]
        assert results["carot", remedy] == pytest.approx(ece(p.probs, p.labels))
    assert len(set(results["carot"])) == 8
    line = found["interpolation"].query("method == 'flyp' and temperature == 'none'").set_index("alpha")["shifts ECE"]
    assert line[0] == pytest.approx(over_shifts(ece, zero)) and list(line.index) == [0, 0.5, 1]
    gains = found["gains"].query("outcome == 'ID accuracy' and remedy == 'temperature'")
    assert (gains.value == 0).all() and len(found["claims"]) == 34


def test_bound_on_trained_runs(images, trained, tmp_path):
    found = Study("bound", images, *trained).execute(tmp_path, methods="flyp", resamples=20)
    course, runs = found["training"], found["runs"]
    assert list(course.epoch) == [0, 1, 2] and course["sigma standardised"].nunique() == 3
    assert list(runs.method) == ["zs", "flyp", "carot"] and (runs.sigma > 0).all()
    zero = runs.set_index("method").loc["zs"]
    assert zero.sigma == pytest.approx(course.sigma[0]) and zero["shifts ECE"] == pytest.approx(course["shifts ECE"][0])
    assert len(found["correlations"]) == 12
    assert set(found["correlations"].verdict) == {"no interval: fewer than 5 settings"}


def test_tune_makes_each_trial_once(images, tmp_path):
    study = Study("tuning", images, tmp_path/"logs", "model=glyphs,warmup_steps=1,batch_size=32")
    asked = dict(methods="lp,carot", lrs="1e-4,1e-3", lp_lrs="1e-2,1e-1", epochs="1", seeds="101")
    notebook, folder = notebook_path("tune"), study.ablation.folder
    for _ in range(2):
        execute_notebook(notebook, check_parameters(study.given | asked, notebook), tmp_path/"executed.ipynb")
        made, chosen = (pd.read_csv(folder/f"{name}.tsv", sep="\t") for name in ("trials", "chosen"))
        assert list(made.method) == ["lp"] * 2 + ["carot"] * 6 and set(made.steps) == {2}
    best = made[made.method == "lp"].sort_values(["val_accuracy", "val_nll"], ascending=[False, True]).iloc[0]
    assert chosen.set_index(["method", "choice"]).loc[("lp", "grid"), "lr"] == best.lr
    assert list(chosen.trials) == [2, 2, 7] and chosen.choice.tolist() == ["grid", "grid", "extra"]


@pytest.mark.parametrize("name", ["table4_coefficients", "batch_size", "posthoc", "bound", "tune", "pretraining_seeds"])
def test_wrong_settings_are_named(name, images, tmp_path):
    notebook = notebook_path(name)
    given = check_parameters({"benchmark": images, "out": str(tmp_path), "settings": "epoch=1"}, notebook)
    with pytest.raises((UserError, RuntimeError), match="epoch"): execute_notebook(notebook, given, tmp_path/"nb.ipynb")


def test_lists_of_numbers():
    assert list_values("0, 0.5,3", float) == [0, 0.5, 3] and list_values(0.5) == [0.5]
    assert list_values("64,8") == [64, 8]
    for text in ("a", "1,x"):
        with pytest.raises(UserError): list_values(text, float)
