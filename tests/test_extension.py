"A method, a metric and a benchmark of somebody's module are trained, reported, drawn, estimated and swept as ours are."
import csv
import json
import subprocess
import sys

import command
import pandas as pd
import pytest
import torch
from conftest import forking
from safetensors.torch import load_file

pytestmark = [pytest.mark.usefixtures("warm"), pytest.mark.slow(7), pytest.mark.xdist_group("extension")]
MODULE = '''
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import Subset

from carot import losses
from carot.benchmarks.glyphs import GLYPHS
from carot.calibration import Metric
from carot.config import TrainSettings, setting
from carot.data import BenchmarkSpec
from carot.methods.base import Method, Objective, Stage


@dataclass
class MarginSettings(TrainSettings):
    margin: float = setting(0.1, "what the right pair must be ahead", low=0, group="method")


class Margin(Objective):
    terms = ("contrastive",)

    def __init__(self, clip, margin):
        super().__init__(clip)
        self.margin = margin

    def needs(self, step): return ("image", "text")

    def loss(self, features, labels):
        table = losses.contrastive_logits(features["image"], features["text"], self.clip.logit_scale.exp())
        loss = losses.contrastive_loss(table - self.margin * torch.eye(len(table), device=table.device))
        return loss, {"contrastive": loss}


def stages(start): yield Stage(Margin(start.clip, start.settings.margin))


MINE = Method("mine", "Margin", "a margin", MarginSettings, stages, defaults={"lr": 3e-4}, colour="#123456", marker="h")


def top5(probs, labels):
    best = np.argsort(-np.asarray(probs), axis=1)[:, :5]
    return (best == np.asarray(labels)[:, None]).any(1).mean()


TOP5 = Metric("top5", "Top-5 accuracy", top5, higher_is_better=True, scale=100, digits=1, unit="points")


def load(root, transform, train_transform, eval_sets):
    glyphs = GLYPHS.load(root, transform, train_transform, eval_sets)
    sets = {name: glyphs.eval[name] for name in ("Glyphs", "GlyphsV2")}
    return replace(glyphs, name="few", train=Subset(glyphs.train, range(0, len(glyphs.train), 10)), eval=sets)


FEW = BenchmarkSpec("few", "a tenth of glyphs", load, {**GLYPHS.defaults, "epochs": 1, "warmup_steps": 2})
'''
ON_FEW = ("--benchmark", "that.module:FEW", "--micro-batch-size", "16")
RUN = "micro_batch_size=16,seed=1"


def carot(folder, *words):
    done = command.carot(*words, cwd=folder, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("somebody")
    (folder/"that").mkdir()
    (folder/"that"/"module.py").write_text(MODULE)
    return folder


@pytest.fixture(scope="module")
def printed(folder, server):
    "What the comparison prints; its runs are the other tests'."
    words = ("--methods", "carot,that.module:MINE", "--metrics", "that.module:TOP5")
    with forking(server): return carot(folder, "reproduce", *ON_FEW, *words)


def run_of(folder, method, run=RUN): return folder/"expt_logs"/"few"/method/run


def test_help_lists_its_options(folder):
    text = carot(folder, "run", "--method", "that.module:MINE", "--help")
    assert "for mine:" in text and "--margin FLOAT" in text and "[0.1]" in text and "--distillation-coef" not in text
    text = carot(folder, "run", *ON_FEW, "--method", "that.module:MINE", "--help")
    assert "[0.0003]" in text and "passes over the training set [1]" in text


def test_it_is_trained_with_its_settings(folder, printed):
    config = json.loads((run_of(folder, "mine")/"config.json").read_text())
    expected = {"method": "that.module:MINE", "benchmark": "that.module:FEW", "margin": 0.1, "lr": 3e-4}
    assert config["complete"] and config["parameters"].items() >= expected.items()
    with open(run_of(folder, "mine")/"train.tsv") as file: steps = list(csv.DictReader(file, delimiter="\t"))
    assert len(steps) == config["steps"] > 0 and all(float(step["contrastive"]) > 0 for step in steps)


def test_it_is_reported_and_drawn(folder, printed):
    assert "CaRot" in printed and "Margin" in printed
    report = folder/"expt_logs"/"few"/"report"
    assert "#123456" in "".join(file.read_text() for file in report.glob("*.svg"))
    metrics = pd.read_csv(report/"results.tsv", sep="\t")
    top5 = metrics[metrics.metric == "top5"].value
    assert len(top5) >= 4 and (top5 >= metrics[metrics.metric == "accuracy"].value.min()).all()
    assert "Top-5 accuracy" in (report/"report.ipynb").read_text()


def test_check_estimates_it(folder):
    text = carot(folder, "check", *ON_FEW, "--method", "that.module:MINE", "--margin", "0.2")
    assert "ready" in text and "GlyphsV2" in text


def test_it_is_swept(folder, printed):
    before = (run_of(folder, "mine")/"config.json").stat().st_mtime_ns
    carot(folder, "sweep", *ON_FEW, "--method", "that.module:MINE", "--grid", "margin=0.1,0.2", "--name", "margins")
    table = pd.read_csv(folder/"expt_logs"/"few"/"sweeps"/"margins"/"results.tsv", sep="\t")
    assert sorted(table.margin.unique()) == [0.1, 0.2] and run_of(folder, "mine", f"margin=0.2,{RUN}").is_dir()
    assert (run_of(folder, "mine")/"config.json").stat().st_mtime_ns == before, "the default was there"


def test_two_processes_do_what_one_does(folder, printed):
    carot(folder, "run", *ON_FEW, "--method", "that.module:MINE", "--out", "two", "--processes", "2")
    one, two = run_of(folder, "mine"), folder/"two"/"few"/"mine"/RUN
    losses = [pd.read_csv(run/"train.tsv", sep="\t").loss.tolist() for run in (one, two)]
    assert len(losses[0]) == len(losses[1]) and losses[1] == pytest.approx(losses[0], rel=2e-3)
    weights = [load_file(run/"student"/"open_clip_model.safetensors") for run in (one, two)]
    apart = torch.cat([(weights[0][name] - weights[1][name]).flatten() for name in weights[0]]).abs()
    assert apart.mean() < 1e-6 and apart.max() < 2e-3, "Adam moves some biases by gradients of mere rounding"


CHECKS = """
import json
from carot.core import UserError
from carot.runs.records import check_same
from carot.runs.settings import check_parameters, notebook_path, resolve
given = {"benchmark": "that.module:FEW", "method": "that.module:MINE"}
def refused(call):
    try: call()
    except UserError as error: print(error)
refused(lambda: check_parameters(given | {"margin": "wide"}, notebook_path("fine_tune")))
refused(lambda: check_parameters({"margin": 0.1}, notebook_path("fine_tune")))
refused(lambda: resolve(given | {"margin": -1.0}))
run = resolve(given | {"margin": 0.2, "seed": 7})
run.directory.mkdir(parents=True)
(run.directory/"config.json").write_text(json.dumps({"parameters": run.parameters | {"margin": 0.1}}))
refused(lambda: check_same(run))
"""

def test_one_declaration_is_enough(folder, printed):
    "The parameter of the method is checked in the notebook, bounded, and compared when a run goes on."
    done = subprocess.run([sys.executable, "-c", CHECKS], cwd=folder, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stderr
    assert "margin takes float, not 'wide'" in lines[0] and "unknown parameter 'margin'" in lines[1]
    assert "margin must be at least 0" in lines[2] and "margin was 0.1 and is now 0.2" in lines[3]
