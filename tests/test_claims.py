"""Claims from simulated predictions of known truth: verdicts, intervals by hand, what is missing, the notebook."""
import json
import math
from dataclasses import asdict
from functools import partial

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from carot import commands
from carot.analysis import bootstrap, claims, tables
from carot.analysis.claims import CAROT, FT, LP, ZS, Claim, Evidence, Side
from carot.calibration import METRICS, ece, fit_temperature, percentile_interval, softmax
from carot.core import UserError, spell
from carot.evaluate import Predictions, metrics_table, read_predictions, save_predictions
from carot.methods.base import find_method, settings_of
from carot.runs import records, settings

SETS = {"Home": True, "Near": False, "Far": False, "val": True}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def predictions(name, method, seed, skill, heat=1.0, n=400, classes=5, images=0):
    "images belong to the set, noise to the run"
    shared = np.random.default_rng([images, len(name)])
    own = np.random.default_rng([seed, len(name), sum(map(ord, method)), images])
    labels = shared.integers(classes, size=n)
    logits = shared.normal(size=(n, classes)) + 0.7 * own.normal(size=(n, classes))
    logits[np.arange(n), labels] += skill - (not SETS[name])
    return Predictions(torch.tensor(heat * logits, dtype=torch.float32), torch.tensor(labels), SETS[name])


def make_run(out, method, seed=1, skill=1.5, heat=1.0, n=400, benchmark="toy", images=0, sets=SETS, keep=True, **asked):
    "a complete run; metrics computed from its predictions, which may not be kept"
    path = out/benchmark/method/",".join([*(f"{k}={spell(v)}" for k, v in sorted(asked.items())), f"seed={seed}"])
    path.mkdir(parents=True)
    usual = asdict(settings_of(find_method(method), {}, {"seed": seed})[0])
    parameters = usual | {"benchmark": benchmark, "method": method} | asked
    (path/"config.json").write_text(json.dumps({"parameters": parameters, "complete": True, "steps": 3,
                                                "seconds": {"total": 1.0}}))
    found = {name: predictions(name, method, seed, skill, heat, n, images=images) for name in sets}
    metrics_table(found, 100).to_csv(path/"metrics.tsv", sep="\t", index=False)
    if keep:
        for name, p in found.items(): save_predictions(path/"predictions"/f"{name}.safetensors", p)
    return path


def outcome(out, better=CAROT, worse=FT, metric="accuracy", sets="shifts", select="", benchmark="", evidence=None):
    return claims.test_claim(Claim("…", metric, sets, better, worse, benchmark), out, "toy", select,
                             evidence or Evidence(samples=200))


# --- verdicts where the truth is known

@pytest.mark.parametrize("metric, good, bad",
                         [("accuracy", {"skill": 2.5}, {"skill": 1.5}), ("ece", {"heat": 1.0}, {"heat": 4.0})])
@pytest.mark.parametrize("sets", ["id", "shifts"])
def test_better_holds_and_swapped_does_not(tmp_path, metric, good, bad, sets):
    for seed in (1, 2): make_run(tmp_path, "carot", seed, **good); make_run(tmp_path, "ft", seed, **bad)
    found, swapped = outcome(tmp_path, metric=metric, sets=sets), outcome(tmp_path, FT, CAROT, metric, sets)
    assert found["verdict"] == "holds" and found["effect"] > 0 and 0 < found["low"] <= found["high"]
    assert swapped["verdict"] == "does not hold" and swapped["effect"] == -found["effect"]
    assert swapped["low"] == pytest.approx(-found["high"]) and swapped["high"] == pytest.approx(-found["low"])
    assert found["better_runs"] == "toy/carot/seed=1 toy/carot/seed=2" and swapped["worse_runs"] == found["better_runs"]


@pytest.mark.parametrize("metric", ["accuracy", "ece"])
def test_equal_methods_are_mostly_undecided(tmp_path, metric):
    verdicts = []
    for trial in range(40):
        for method in ("carot", "ft"):
            make_run(tmp_path/str(trial), method, n=200, images=trial + 1, sets=["Home", "Near", "val"])
        verdicts.append(outcome(tmp_path/str(trial), metric=metric)["verdict"])
    assert verdicts.count("undecided") > 33  # two of 40 are decided by chance; seven or more have a chance below 0.5 %


def test_a_seed_that_disagrees_keeps_a_claim_from_holding(tmp_path):
    for seed, skill in [(1, 4.0), (2, 4.0), (3, 1.2)]:
        make_run(tmp_path, "carot", seed, skill); make_run(tmp_path, "ft", seed, 1.5)
    found = outcome(tmp_path)
    assert found["low"] > 0 and min(found["per_seed"].values()) < 0 and found["verdict"] == "undecided"
    assert outcome(tmp_path, FT, CAROT)["verdict"] == "does not hold"


def test_one_seed_is_enough(tmp_path):
    make_run(tmp_path, "carot", 1, 3.0); make_run(tmp_path, "ft", 1, 1.5); make_run(tmp_path, "ft", 2, 9.0)
    found = outcome(tmp_path)
    assert found["verdict"] == "holds" and list(found["per_seed"]) == [1] and found["worse_runs"] == "toy/ft/seed=1"


def test_zero_shot_stands_beside_every_seed(tmp_path):
    make_run(tmp_path, "zs", 1, 1.0)
    for seed in (2, 5): make_run(tmp_path, "ft", seed, 2.0)
    for better, worse in [(FT, ZS), (ZS, FT)]:
        found = outcome(tmp_path, better, worse)
        assert list(found["per_seed"]) == [2, 5] and found["verdict"] == ("holds" if better == FT else "does not hold")
    assert found["better_runs"] == "toy/zs/seed=1"


def test_no_common_seed(tmp_path):
    make_run(tmp_path, "carot", 1); make_run(tmp_path, "ft", 2)
    assert outcome(tmp_path)["verdict"] == "not run" and "no seed" in outcome(tmp_path)["missing"]


@pytest.mark.parametrize("per_seed, low, high, word", [
    ([0.1], 0.0, 0.2, "undecided"), ([0.1], 1e-9, 0.2, "holds"), ([-0.1], -0.2, 0.0, "undecided"),
    ([-0.1, 0.05], -0.2, -1e-9, "does not hold"),
    ([0.1, 0.0], 0.01, 0.2, "undecided")])
def test_verdicts_at_their_edges(per_seed, low, high, word):
    assert bootstrap.verdict(low, high, per_seed) == word


# --- the interval

@pytest.mark.parametrize("metric", ["accuracy", "ece", "nll", "adaptive_ece"])
def test_the_interval_by_hand(tmp_path, metric):
    for seed in (1, 2): make_run(tmp_path, "carot", seed, 2.0, n=150); make_run(tmp_path, "ft", seed, 1.5, 2.0, n=150)
    values = np.zeros(60)
    for name in ("Near", "Far"):
        rng = np.random.default_rng(bootstrap.set_seed(name, 3))
        resamples = [rng.integers(150, size=150) for _ in range(60)]
        for method, sign in [("carot", 1), ("ft", -1)]:
            for seed in (1, 2):
                p = read_predictions(tmp_path/"toy"/method/f"seed={seed}"/"predictions"/f"{name}.safetensors")
                values += [sign * METRICS[metric](p.probs[rows], p.labels.numpy()[rows]) / 4 for rows in resamples]
    if metric != "accuracy": values = -values
    found = outcome(tmp_path, metric=metric, evidence=Evidence(60, seed=3))
    assert (found["low"], found["high"]) == pytest.approx(percentile_interval(values), abs=1e-12)


def test_sets_of_one_size_are_resampled_independently():
    near, far = (bootstrap.resample_counts(300, 400, bootstrap.set_seed(name)) for name in ("Near", "Far"))
    both = [np.corrcoef(near[:, i], other[:, i])[0, 1] for other in (near, far) for i in range(20)]
    assert np.allclose(both[:20], 1) and abs(np.mean(both[20:])) < 0.05


def test_any_metric_gets_the_same_resamples(tmp_path):
    p, counts = predictions("Home", "ft", 1, 1.5, n=100), bootstrap.resample_counts(100, 30, 7)
    def by_hand(probs, labels): return ece(probs, labels, 5)
    fast, slow = (bootstrap.resampled(metric, p.probs, p.labels, counts)
                  for metric in (partial(ece, n_bins=5), by_hand))
    assert np.allclose(fast, slow, atol=1e-12, rtol=0)


def test_an_infinite_loss_is_infinite_on_resamples_that_have_it():
    counts = np.array([[1, 1], [2, 0], [0, 2]], dtype=np.uint8)
    values = bootstrap.resampled(METRICS["nll"], [[0.0, 1.0], [0.5, 0.5]], [0, 0], counts)
    assert values[0] == values[1] == math.inf and not np.isfinite(values[2]) or values[2] == pytest.approx(math.log(2))


# --- temperature scaling

def test_scaling_changes_no_accuracy_and_uses_the_run_s_own_validation(tmp_path):
    for method, heat in [("carot", 3.0), ("ft", 6.0)]: make_run(tmp_path, method, 1, 2.0, heat)
    evidence, run = Evidence(50), claims.side_runs(FT, tmp_path, "toy")[1]
    val = read_predictions(run.path/"predictions"/"val.safetensors")
    fitted, other = fit_temperature(val.logits, val.labels), claims.side_runs(CAROT, tmp_path, "toy")[1]
    assert evidence.temperature(run) == fitted != evidence.temperature(other)
    for name in ("Home", "Near", "Far"):
        plain, scaled = (evidence.on_set(run, name, "accuracy", which) for which in (False, True))
        assert plain[0] == scaled[0] and np.array_equal(plain[1], scaled[1])
    assert evidence.on_set(run, "Home", "ece", True)[0] < 0.5 * evidence.on_set(run, "Home", "ece")[0]
    p = read_predictions(run.path/"predictions"/"Near.safetensors")
    by_hand = ece(softmax(p.logits.double() / fitted), p.labels)
    assert evidence.on_set(run, "Near", "ece", True)[0] == pytest.approx(by_hand)


def test_a_method_that_is_only_less_hot_wins_until_all_are_scaled(tmp_path):
    for seed in (1, 2, 3):
        make_run(tmp_path, "carot", seed, 2.0, 1.0, n=1000); make_run(tmp_path, "ft", seed, 2.0, 3.0, n=1000)
    assert outcome(tmp_path, metric="ece")["verdict"] == "holds"
    scaled = outcome(tmp_path, claims.scaled(CAROT), claims.scaled(FT), "ece")
    assert abs(scaled["effect"]) < 0.25 * outcome(tmp_path, metric="ece")["effect"]


# --- what is missing, and what does not belong together

def test_missing_runs_are_named(tmp_path):
    make_run(tmp_path, "carot", 1)
    found = outcome(tmp_path, CAROT, Side("carot", "distillation_coef=0"), select="")
    assert found["verdict"] == "not run"
    assert "carot run --benchmark toy --method carot --distillation-coef 0 --out" in found["missing"]
    assert "effect" not in found
    made = claims.command(Side("flyp"), "expt_logs", "toy", "epochs=2,distillation_coef=3")
    assert "--method flyp --epochs 2 --seed" in made
    assert "--out" not in claims.command(FT, "expt_logs", "toy")
    elsewhere = Claim("…", "accuracy", "shifts", ZS, FT, "plain_glyphs")
    lacking = claims.test_claim(elsewhere, "expt_logs_of_nobody", "toy")["missing"]
    assert "--benchmark plain_glyphs --method zs --out expt_logs_of_nobody" in lacking


def test_a_run_without_predictions_is_not_used(tmp_path):
    make_run(tmp_path, "carot", 1); make_run(tmp_path, "ft", 1, keep=False)
    found = outcome(tmp_path)
    assert found["verdict"] == "not run" and "no predictions of ft/seed=1" in found["missing"]
    (tmp_path/"toy"/"carot"/"seed=1"/"predictions"/"Far.safetensors").unlink()
    assert "carot/seed=1" in outcome(tmp_path)["missing"]
    with pytest.raises(UserError, match="no run on toy .* has its predictions"): claims.claims_table(tmp_path, "toy")


def test_an_unfinished_run_is_not_used(tmp_path):
    make_run(tmp_path, "carot", 1); path = make_run(tmp_path, "ft", 1)
    (path/"config.json").write_text(json.dumps({"parameters": {}, "complete": False}))
    assert outcome(tmp_path)["verdict"] == "not run"


@pytest.mark.parametrize("other", [{"n": 399}, {"images": 1}])
def test_other_images_are_refused(tmp_path, other):
    make_run(tmp_path, "carot", 1); make_run(tmp_path, "ft", 1, **other)
    with pytest.raises(UserError, match="ft/seed=1 and carot/seed=1 were not evaluated on the same images of Near"):
        outcome(tmp_path)


def test_other_sets_are_refused(tmp_path):
    make_run(tmp_path, "carot", 1); make_run(tmp_path, "ft", 1, sets=["Home", "Near", "val"])
    with pytest.raises(UserError, match="different sets"): outcome(tmp_path)
    assert outcome(tmp_path, sets="id")["verdict"] in ("holds", "does not hold", "undecided")


def test_other_benchmarks_may_have_other_images(tmp_path):
    for method in ("zs", "ft"): make_run(tmp_path, method, 1); make_run(tmp_path, method, 1, n=100, benchmark="plain")
    evidence = Evidence(50)
    assert outcome(tmp_path, ZS, FT, evidence=evidence)["better_runs"] == "toy/zs/seed=1"
    assert outcome(tmp_path, ZS, FT, benchmark="plain", evidence=evidence)["better_runs"] == "plain/zs/seed=1"


def test_settings_are_found_and_not_mixed(tmp_path):
    make_run(tmp_path, "carot", 1, 1.0); make_run(tmp_path, "carot", 1, 3.0, epochs=2); make_run(tmp_path, "zs", 1, 1.0)
    make_run(tmp_path, "carot", 1, 1.0, epochs=2, distillation_coef=0.0)
    make_run(tmp_path, "carot", 1, 2.0, epochs=2, distillation_coef=0.0, lr=0.1)
    found = outcome(tmp_path, CAROT, Side("carot", "distillation_coef=0"), select="epochs=2")
    assert found["better_runs"] == "toy/carot/epochs=2,seed=1"
    assert found["worse_runs"] == "toy/carot/distillation_coef=0,epochs=2,seed=1" and found["verdict"] == "holds"
    assert outcome(tmp_path, CAROT, ZS, select="epochs=2")["worse_runs"] == "toy/zs/seed=1"


def test_unknown_metric(tmp_path):
    make_run(tmp_path, "carot", 1); make_run(tmp_path, "ft", 1)
    with pytest.raises(UserError, match="did you mean 'accuracy'"): outcome(tmp_path, metric="acuracy")


# --- tables

@pytest.fixture
def comparison(tmp_path):
    for method, (skill, heat) in {"zs": (1.5, 1), "ft": (1.8, 3), "flyp": (1.8, 2), "carot": (2.5, 1)}.items():
        for seed in [1] if method == "zs" else [1, 2]: make_run(tmp_path, method, seed, skill, heat)
    return tmp_path


def test_a_statement_needs_all_of_its_tests(comparison):
    pairs = [(CAROT, FT), (FT, CAROT), (CAROT, LP)]
    for chosen, word in [([0], "holds"), ([0, 1], "does not hold"), ([0, 2], "not run"), ([1, 2], "does not hold")]:
        table = claims.claims_table(comparison, "toy",
                                    claims=claims.several("s", "ece", "shifts", [pairs[i] for i in chosen]),
                                    evidence=Evidence(100))
        assert claims.statements(table).verdict.tolist() == [word] and len(table) == len(chosen)


def test_written_claims_are_those_computed(comparison):
    table = claims.claims_table(comparison, "toy", evidence=Evidence(100))
    text = claims.write_claims(comparison/"claims", table)
    again = pd.read_csv(comparison/"claims"/"claims.tsv", sep="\t", keep_default_na=False,
                        na_values={name: [""] for name in ("effect", "low", "high")})
    assert list(again) == claims.ROW and again.verdict.tolist() == table.verdict.tolist()
    assert np.allclose(again.effect, table.effect, equal_nan=True)
    assert not table.benchmark.str.contains("plain").any() and again.per_seed[0].startswith("1:")
    for row in table.itertuples(): assert row.test in text and all(what in text for what in row.missing.split("; "))
    assert set(table.verdict[table.test.str.contains("LP|distillation")]) == {"not run"}
    assert f"{100 * table.effect[0]:+.1f} [{100 * table.low[0]:+.1f}, {100 * table.high[0]:+.1f}]" in text


def test_the_plain_counterpart_belongs_to_glyphs_only():
    assert {claim.benchmark for claim in claims.claims_for(tables.spec_of("glyphs"))} == {"", "plain_glyphs"}
    assert {claim.benchmark for claim in claims.claims_for(tables.spec_of("imagenet"))} == {""}


def test_differences_agree_with_the_claims(comparison):
    runs = records.find_runs(comparison, "toy")
    found = claims.against(runs, "ft", Evidence(200)).set_index(["method", "metric", "sets"])
    assert list(dict.fromkeys(found.index.get_level_values(0))) == ["zs", "flyp", "carot"]
    row, claim = found.loc[("carot", "ece", "shifts")], outcome(comparison, metric="ece")
    assert row.effect == -claim["effect"] and row.low == -claim["high"]
    assert "**" in claims.against_markdown(found.reset_index()).splitlines()[-1]
    for metric in ("accuracy", "ece"):
        means = tables.table(tables.collect(comparison, "toy"), metric)["mean"][tables.AVERAGE]
        assert found.loc[("carot", metric, "shifts")].effect == pytest.approx(means["carot"] - means["ft"])


# --- the notebook

def test_the_notebook_end_to_end(comparison, monkeypatch, capsys, warm):
    monkeypatch.chdir(comparison)
    executed = commands.make_claims(benchmark="toy", out=".", samples=100)
    folder = comparison/"toy"/"claims"
    expected = {"claims.ipynb", "claims.tsv", "claims.md", "forest.png", "forest.svg", "scatter.png", "scatter.svg"}
    assert expected <= {file.name for file in folder.iterdir()} <= expected | {"claims.html"}
    printed = capsys.readouterr().out
    assert "does not hold" in printed or "holds" in printed
    shown = "\n".join(str(o.get("data", {}).get("text/markdown", "")) for cell in nbformat.read(executed, 4).cells
                      for o in cell.get("outputs", []))
    assert "accuracy, shifts: zero-shot > FT" in shown and "There is no plain counterpart of toy" in shown
    assert str(comparison) not in executed.read_text()
    assert all(len(file.read_bytes()) < 300_000 for file in folder.glob("*.png"))


def test_without_predictions_the_notebook_writes_nothing(tmp_path):
    make_run(tmp_path, "ft", 1, keep=False)
    with pytest.raises(UserError, match="not kept in git"):
        space = {}
        for cell in nbformat.read(settings.notebook_path("claims"), 4).cells:  # in this process, which is quicker
            if cell.cell_type == "code": exec(cell.source, space)
            if "parameters" in cell.metadata.get("tags", []): space |= {"benchmark": "toy", "out": str(tmp_path)}
    assert not (tmp_path/"toy"/"claims").exists()
