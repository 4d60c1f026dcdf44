"The ablation notebooks end to end, on a folder of a few images: finished runs lie before them, simulated or trained here."
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
from carot.runs.jobs import job_for
from carot.runs.records import open_run
from carot.runs.settings import check_parameters, list_values, notebook_path
from carot.train import fine_tune

CLASSES = {"sun": (230, 200, 30), "anchor": (40, 60, 200), "heart": (220, 30, 40), "skull": (200, 200, 200)}
SHIFTS = ("night", "fog")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    "the run settings that all notebooks get"
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("ablations")
    for split, n, light in [("train", 16, 1), ("val", 40, 1), ("test", 6, 1), ("night", 6, 0.4), ("fog", 6, 0.7)]:
        for name, colour in CLASSES.items():
            for i in range(n):
                file = folder/"my"/split/name/f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                pixels = light * np.array(colour) + rng.normal(0, 40, (32, 32, 3))
                Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(file)
    return {"benchmark": str(folder/"my"), "model": "glyphs", "out": str(folder/"logs")}


def finish(job, predictions):
    "leave behind what a finished run leaves"
    run = open_run(job.resolved, steps=1)
    for name, p in predictions.items(): save_predictions(run.path/"predictions"/f"{name}.safetensors", p)
    write_atomic(run.path/"metrics.tsv", metrics_table(predictions, 250).to_csv(sep="\t", index=False))
    (run.path/"run.ipynb").write_text("{}")
    run.finish(seconds={"total": 1.0})


def simulate(job, heat=1.0, skill=3.0, n=400):
    "a finished run with made-up predictions"
    found = {}
    for k, (name, id) in enumerate({"test": True, "night": False, "fog": False, "val": True}.items()):
        rng, labels = np.random.default_rng([k, job.parameters["seed"]]), np.arange(n) * 4 // n
        logits = rng.normal(size=(n, 4))
        logits[np.arange(n), labels] += skill - k
        found[name] = Predictions(torch.tensor(heat * logits, dtype=torch.float32), torch.tensor(labels), id)
    finish(job, found)


def execute(name, given, tmp_path, **more):
    "its tables by name"
    own = {"benchmark": given["benchmark"], "out": given["out"], "settings": f"model={given['model']}"}
    notebook = notebook_path(name)
    execute_notebook(notebook, check_parameters(own | more, notebook), tmp_path/"executed.ipynb")
    folder = job_for(given).path.parents[1]/name
    tables = list(folder.glob("*.tsv"))
    assert all((folder/f"{file.stem}.md").exists() for file in tables) and list(folder.glob("*.png"))
    return {file.stem: pd.read_csv(file, sep="\t", keep_default_na=False, na_values=[""]) for file in tables}


def on_shifts(metric, path, *options):
    "mean of a metric over the shifts of a run"
    saved = load_predictions(path)
    return np.mean([metric(saved[name].probs, saved[name].labels, *options) for name in SHIFTS])


def test_table4_finds_the_planted_effect(given, tmp_path):
    given = given | {"out": given["out"] + "4"}
    names = "orthogonality_coef", "distillation_coef", "seed"
    levels = [(oc, sd, seed) for oc in (0.0, 0.2) for sd in (0.0, 1.5) for seed in (1, 2)]
    runs = {level: job_for(given | dict(zip(names, level))) for level in levels}
    for (oc, sd, _), job in runs.items(): simulate(job, heat=1 + sd, skill=3 + 0.8 * sd + 0.05 * oc)
    for other in [{"method": "zs"}, {"method": "flyp"}, {"method": "flyp", "seed": 2}]: simulate(job_for(given | other))
    found = execute("table4_coefficients", given, tmp_path, orthogonality_coef="0,0.2", distillation_coef="0,1.5",
                    seeds=2, resamples=100, jobs=1)
    row = found["table4"].set_index(["OC", "SD"]).loc["0.2", "1.5"]
    expected = [on_shifts(accuracy, runs[0.2, 1.5, seed].path) for seed in (1, 2)]
    assert row["shifts accuracy"] == pytest.approx(np.mean(expected))
    assert row["shifts accuracy std"] == pytest.approx(np.std(expected, ddof=1))
    assert row["run"] == "carot/model=glyphs,seed=*"
    assert set(found["claims"].verdict) == {"holds"}
    effect = found["effects"].set_index(["outcome", "factor"]).share["shifts accuracy"]
    assert effect["SD"] > 0.9 > 0.1 > effect["OC"] and effect.sum() == pytest.approx(1)
    text = job_for(given).path.parents[1]/"table4_coefficients"/"table4.md"
    assert "not run" not in text.read_text()


def test_batch_size_parts_add_up(given, tmp_path):
    given, runs = given | {"out": given["out"] + "b"}, {}
    for images, n in [(16, 16), (16, 8), (8, 8)]:
        share = -(-64 // images)  # steps of an epoch, where the usual run has one
        steps = {"warmup_steps": 10 * share, "batch_size": images}
        if n < images: steps["accumulation_steps"] = images // n
        runs[images, n] = job_for(given | steps | {"method": "flyp"})
        simulate(runs[images, n], skill=2 + n / 8, heat=1 + images / 16)
    found = execute("batch_size", given, tmp_path, methods="flyp", negatives="8,16", step_size=16, step_sizes="8,16",
                    eval_batches="100,50", seeds=1, resamples=50, simulations=20, jobs=1)
    bias = found["estimator"].query("set == 'shifts'").set_index(["training batch", "evaluation batch"])
    by_batch = bias["perfectly calibrated"][16].loc[["whole set", "100", "50"]]
    assert (by_batch.diff().dropna() > 0).all()  # smaller batches, more bias
    small, large = (on_shifts(batched_ece, runs[images, images].path, images) for images in (8, 16))
    parts = found["parts"].query("outcome == 'shifts ECE'").set_index("part").value
    assert parts["as it would be published"] == pytest.approx(small - large)
    assert parts.drop("as it would be published").sum() == pytest.approx(parts["as it would be published"])
    of_accuracy = found["parts"].query("outcome == 'shifts accuracy'").part
    assert list(of_accuracy) == ["fewer negatives", "more steps", "as it would be published"]


@pytest.fixture(scope="module")
def trained(given):
    "zs, flyp and carot, trained here"
    torch.set_num_threads(1)
    short = {"epochs": 2, "batch_size": 32, "lr": 1e-3, "warmup_steps": 1, "teacher_update_every": 2}
    for method in ("zs", "flyp", "carot"):
        job = job_for(given | {"method": method})
        clip, train_transform, transform, tokenizer = load_clip("glyphs")
        data = load_benchmark(given["benchmark"], None, transform, train_transform)
        settings = {name: value for name, value in short.items() if job.method.uses(name)}
        model = fine_tune(clip, tokenizer, data, method, out=job.path if job.method.trains else None, **settings)
        finish(job, predict_sets(classifier(model, tokenizer, data), data))
    return given


def test_posthoc_on_trained_runs(trained, tmp_path):
    found = execute("posthoc", trained, tmp_path, methods="flyp,carot", smoothed="", alphas="0.5", seeds=1,
                    resamples=50, jobs=1)
    path = job_for(trained).path
    rows = found["results"].set_index(["method", "remedy"])["ID ECE"]
    def id_ece(predictions): return ece(predictions["test"].probs, predictions["test"].labels)
    assert rows["carot", "as trained"] == pytest.approx(id_ece(load_predictions(path)))
    assert rows["carot", "EMA teacher"] == pytest.approx(id_ece(load_predictions(path/"posthoc"/"teacher")))
    assert rows["carot", "WiSE-FT α=0.5"] == pytest.approx(id_ece(load_predictions(path/"posthoc"/"alpha=0.5")))
    assert len(set(rows["carot"])) == 6
    line = found["interpolation"].query("method == 'flyp' and temperature == 'none'").set_index("alpha")["shifts ECE"]
    assert line[0] == pytest.approx(on_shifts(ece, job_for(trained | {"method": "zs"}).path))
    assert list(line.index) == [0, 0.5, 1]
    gains = found["gains"].query("outcome == 'ID accuracy' and remedy == 'temperature'")
    assert (gains.value == 0).all() and len(found["claims"]) == 14


def test_bound_on_trained_runs(trained, tmp_path):
    found = execute("bound", trained, tmp_path, methods="flyp", resamples=20)
    assert list(found["training"].epoch) == list(range(11))
    assert found["training"]["sigma standardised"].nunique() > 5
    assert list(found["runs"].method) == ["zs", "flyp", "carot"] and (found["runs"].sigma > 0).all()
    before, start = found["runs"].set_index("method").loc["zs"], found["training"].iloc[0]
    assert before.sigma == pytest.approx(start.sigma) and before["shifts ECE"] == pytest.approx(start["shifts ECE"])
    assert len(found["correlations"]) == 12
    assert set(found["correlations"].verdict) == {"no interval: fewer than 5 settings"}


def test_lists_of_numbers():
    assert list_values("0, 0.5,3", float) == [0, 0.5, 3] and list_values(0.5) == [0.5] and list_values("64,8") == [64, 8]
    for text in ("a", "1,x"):
        with pytest.raises(UserError): list_values(text, float)
