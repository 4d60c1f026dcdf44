"The ablation notebooks end to end, on a folder of a few images: finished runs are laid before them, simulated or trained in this process."
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from carot.runs import execute
from carot.runs import jobs
from carot.runs import records
from carot.runs import settings
from carot.calibration import accuracy, batched_ece, ece
from carot.clip import load_clip
from carot.data import load_benchmark
from carot.core import write_atomic
from carot.evaluate import Predictions, classifier, load_predictions, metrics_table, predict_sets, save_predictions
from carot.train import fine_tune

CLASSES = {"sun": (230, 200, 30), "anchor": (40, 60, 200), "heart": (220, 30, 40), "skull": (200, 200, 200)}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    "the run parameters that all notebooks get"
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("ablations")
    for split, n, light in [("train", 16, 1), ("val", 40, 1), ("test", 6, 1), ("night", 6, 0.4), ("fog", 6, 0.7)]:
        for name, colour in CLASSES.items():
            for i in range(n):
                file = folder/"my"/split/name/f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((light * np.array(colour) + rng.normal(0, 40, (32, 32, 3))).clip(0, 255).astype("uint8")).save(file)
    return {"benchmark": str(folder/"my"), "model": "glyphs", "out": str(folder/"logs")}


def finish(job, predictions):
    "leave behind what a finished run leaves"
    run = records.open_run(*settings.resolve(job.given), steps=1)
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
    notebook = execute.notebook_path(name)
    execute.execute_notebook(notebook, settings.check_parameters(given | more, notebook), tmp_path/"executed.ipynb")
    folder = jobs.job_for(given).path.parents[1]/name
    assert all((folder/f"{file.stem}.md").exists() for file in folder.glob("*.tsv")) and list(folder.glob("*.png"))
    return {file.stem: pd.read_csv(file, sep="\t", keep_default_na=False, na_values=[""]) for file in folder.glob("*.tsv")}


def test_table4_finds_the_planted_effect(given, tmp_path):
    given = given | {"out": given["out"] + "4"}
    levels = [(oc, sd, seed) for oc in (0.0, 0.2) for sd in (0.0, 1.5) for seed in (1, 2)]
    jobs = {level: jobs.job_for(given | dict(zip(("orthogonality_coef", "distillation_coef", "seed"), level))) for level in levels}
    for (oc, sd, seed), job in jobs.items(): simulate(job, heat=1 + sd, skill=3 + 0.8 * sd + 0.05 * oc)
    for other in [{"method": "zs"}, {"method": "flyp"}, {"method": "flyp", "seed": 2}]: simulate(jobs.job_for(given | other))
    found = execute("table4_coefficients", given, tmp_path, orthogonality_coef="0,0.2", distillation_coef="0,1.5", seeds=2, resamples=100, jobs=1)
    row = found["table4"].set_index(["OC", "SD"]).loc["0.2", "1.5"]
    expected = [np.mean([accuracy(p.probs, p.labels) for k, p in load_predictions(jobs[0.2, 1.5, seed].path).items() if k in ("night", "fog")]) for seed in (1, 2)]
    assert row["shifts accuracy"] == pytest.approx(np.mean(expected)) and row["shifts accuracy std"] == pytest.approx(np.std(expected, ddof=1))
    assert row["run"] == "carot/model=glyphs,seed=*"
    assert set(found["claims"].verdict) == {"holds"}
    effect = found["effects"].set_index(["outcome", "factor"]).share["shifts accuracy"]
    assert effect["SD"] > 0.9 > 0.1 > effect["OC"] and effect.sum() == pytest.approx(1)
    text = jobs.job_for(given).path.parents[1]/"table4_coefficients"/"table4.md"
    assert "not run" not in text.read_text()


SPLIT = "accumulation_steps" in settings.PAPER

def test_batch_size_parts_add_up(given, tmp_path):
    given = given | {"out": given["out"] + "b"}
    cells = [(16, 16), (16, 8), (8, 8)] if SPLIT else [(16, 16)]
    for images, n in cells:
        share = -(-64 // images)  # steps of an epoch, where the usual run has one
        steps = {"warmup_steps": 10 * share, "batch_size": images} | ({"accumulation_steps": images // n} if n < images else {})
        simulate(jobs.job_for(given | steps | {"method": "flyp"}), skill=2 + n / 8, heat=1 + images / 16)
    sizes = dict(negatives="8,16", step_sizes="8,16") if SPLIT else dict(negatives="16", step_sizes="16")
    found = execute("batch_size", given, tmp_path, methods="flyp", step_size=16, eval_batches="100,50", seeds=1, resamples=50, simulations=20, jobs=1, **sizes)
    bias = found["estimator"].query("set == 'shifts'").set_index(["training batch", "evaluation batch"])
    assert (bias["perfectly calibrated"][16].loc[["whole set", "100", "50"]].diff().dropna() > 0).all()  # smaller batches, more bias
    if not SPLIT: return
    def measured(images):
        job = next(p for p in jobs.job_for(given).path.parents[1].glob("flyp/*") if f"batch_size={images}," in p.name and "accumulation" not in p.name)
        return np.mean([batched_ece(p.probs, p.labels, images) for k, p in load_predictions(job).items() if k in ("night", "fog")])
    parts = found["parts"].query("outcome == 'shifts ECE'").set_index("part").value
    assert parts["as it would be published"] == pytest.approx(measured(8) - measured(16))
    assert parts.drop("as it would be published").sum() == pytest.approx(parts["as it would be published"])
    assert list(found["parts"].query("outcome == 'shifts accuracy'").part) == ["fewer negatives", "more steps", "as it would be published"]


@pytest.fixture(scope="module")
def trained(given):
    "zs, flyp and carot, trained here"
    torch.set_num_threads(1)
    for method in ("zs", "flyp", "carot"):
        job = jobs.job_for(given | {"method": method})
        clip, train_transform, transform, tokenizer = load_clip("glyphs")
        data = load_benchmark(given["benchmark"], None, transform, train_transform)
        model = fine_tune(clip, tokenizer, data, method, epochs=2, batch_size=32, lr=1e-3, warmup_steps=1, teacher_update_every=2, out=None if method == "zs" else job.path)
        finish(job, predict_sets(classifier(model, tokenizer, data), data))
    return given


def test_posthoc_on_trained_runs(trained, tmp_path):
    found = execute("posthoc", trained, tmp_path, methods="flyp,carot", smoothed="", alphas="0.5", seeds=1, resamples=50, jobs=1)
    path = jobs.job_for(trained).path
    rows = found["results"].set_index(["method", "remedy"])["ID ECE"]
    def id_ece(predictions): return ece(predictions["test"].probs, predictions["test"].labels)
    assert rows["carot", "as trained"] == pytest.approx(id_ece(load_predictions(path)))
    assert rows["carot", "EMA teacher"] == pytest.approx(id_ece(load_predictions(path/"posthoc"/"teacher")))
    assert rows["carot", "WiSE-FT α=0.5"] == pytest.approx(id_ece(load_predictions(path/"posthoc"/"alpha=0.5")))
    assert len(set(rows["carot"])) == 6
    line = found["interpolation"].query("method == 'flyp' and temperature == 'none'").set_index("alpha")["shifts ECE"]
    zero = load_predictions(jobs.job_for(trained | {"method": "zs"}).path)
    assert line[0] == pytest.approx(np.mean([ece(zero[k].probs, zero[k].labels) for k in ("night", "fog")])) and list(line.index) == [0, 0.5, 1]
    gains = found["gains"].query("outcome == 'ID accuracy' and remedy == 'temperature'")
    assert (gains.value == 0).all() and len(found["claims"]) == 14


def test_bound_on_trained_runs(trained, tmp_path):
    found = execute("bound", trained, tmp_path, methods="flyp", resamples=20)
    assert list(found["training"].epoch) == list(range(11)) and found["training"]["sigma standardised"].nunique() > 5
    assert list(found["runs"].method) == ["zs", "flyp", "carot"] and (found["runs"].sigma > 0).all()
    first = found["runs"].set_index("method").loc["zs"]
    assert first.sigma == pytest.approx(found["training"].sigma[0]) and first["shifts ECE"] == pytest.approx(found["training"]["shifts ECE"][0])
    assert len(found["correlations"]) == 12 and set(found["correlations"].verdict) == {"no interval: fewer than 5 settings"}
