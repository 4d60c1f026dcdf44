"Variants of a run, temperature, the feature spectrum, and effects with intervals: the parts of the ablation notebooks."
import math

import numpy as np
import pandas as pd
import pytest
import torch

from carot.analysis.bootstrap import verdict
from carot.analysis.bound import average_ranks, correlation, correlation_interval, image_embeddings, singular_values
from carot.analysis.effects import (claim, explained, interval, marginal_range, mean_std, outcomes, reseed,
                                    sample_and_resamples, show)
from carot.analysis.posthoc import choose_alpha, conformal_table, in_memory, scale_temperature, variant_predictions
from carot.calibration import METRICS, fit_temperature_ece
from carot.core import UserError
from carot.evaluate import Predictions, classifier, predict_sets
from carot.train import FineTuned


def tokenizer(texts):
    "one token per letter"
    rows = [[1, *(2 + ord(c) % 40 for c in t)][:11] + [49407] for t in texts]
    return torch.tensor([row + [0] * (12 - len(row)) for row in rows])


# variants

def test_images_in_memory_give_the_same_predictions(tiny_clip, toy):
    model = classifier(FineTuned(tiny_clip), tokenizer, toy)
    a, b = predict_sets(model, toy), predict_sets(model, in_memory(toy))
    assert a.keys() == b.keys() and all(a[k].id == b[k].id for k in a)
    assert all(torch.equal(a[k].logits, b[k].logits) and torch.equal(a[k].labels, b[k].labels) for k in a)
    assert a["ToyTwo"].logits.shape[1] == 2  # projected to the set's own classes


def test_variants_are_made_once_and_completed_if_one_set_is_gone(tiny_clip, toy, tmp_path):
    calls = []
    def make(): calls.append(1); return classifier(FineTuned(tiny_clip), tokenizer, toy)
    first = variant_predictions(tmp_path, "teacher", make, toy)
    again = variant_predictions(tmp_path, "teacher", make, toy)
    assert calls == [1] and all(torch.equal(first[k].logits, again[k].logits) for k in first)
    (tmp_path/"posthoc"/"teacher"/"predictions"/"Toy.safetensors").unlink()
    completed = variant_predictions(tmp_path, "teacher", make, toy)
    assert torch.equal(completed["Toy"].logits, first["Toy"].logits) and calls == [1, 1]
    variant_predictions(tmp_path, "alpha=0.5", make, toy)
    assert calls == [1, 1, 1]


# effects

def run(heat, seed=0, n=400, hardness=0.0, sets=("Clean", "Noise", "Dark")):
    found = {}
    for k, name in enumerate([*sets, "val"]):
        rng, labels = np.random.default_rng(k), np.arange(n) % 5
        logits = rng.normal(size=(n, 5)) + np.random.default_rng(100 + seed).normal(0, 0.1, 5)
        logits[np.arange(n), labels] += 2 - 0.6 * k - hardness
        found[name] = Predictions(torch.tensor(heat * logits), torch.tensor(labels), name in ("Clean", "val"))
    return found


def test_outcomes_are_the_metrics_and_equal_runs_never_differ():
    values = outcomes([run(1.0), run(1.0), run(2.0), None], n=50)
    for (metric, where), v in values.items():
        sets = [run(1.0)[name] for name in (("Clean",) if where == "ID" else ("Noise", "Dark"))]
        assert math.isclose(v[0, 0], np.mean([METRICS[metric](p.probs, p.labels) for p in sets]), rel_tol=1e-12)
        assert np.array_equal(v[0], v[1]) and np.isnan(v[3]).all() and len(set(v[0])) > 20
    assert np.array_equal(values["accuracy", "ID"][0], values["accuracy", "ID"][2])  # heat changes no prediction
    with pytest.raises(UserError, match="different images in Clean"): outcomes([run(1.0), run(1.0, n=300)], n=5)


def test_sets_are_resampled_independently():
    a, b, again = (sample_and_resamples(100, 5, name=name) for name in "ABA")
    assert not np.array_equal(a[1:], b[1:]) and np.array_equal(a, again) and (a.sum(1) == 100).all()


def test_seeds_are_drawn_alike_for_all_settings():
    values = np.random.default_rng(0).normal(size=(2, 3, 4, 201))
    values[1] = values[0] + 1
    drawn = reseed(values)
    assert np.allclose(drawn[1] - drawn[0], 1) and np.array_equal(drawn[..., 0], values[..., 0])
    assert interval((drawn[1] - drawn[0]).mean((0, 1))) == pytest.approx((1, 1, 1))
    constant = np.repeat(np.arange(4.0)[:, None], 201, 1)
    assert reseed(constant).mean(0)[1:].std() > 0.3


def test_shares_of_variance_against_the_definition():
    y = np.random.default_rng(1).normal(size=(3, 4, 2, 1))
    y[1] += 2
    a, b, cell, grand = y.mean((1, 2)), y.mean((0, 2)), y.mean(2), y.mean()
    total = ((y - grand)**2).sum()
    at = list(np.ndindex(3, 4))
    expected = {"first": sum(8 * (a[i, 0] - grand)**2 for i in range(3)),
                "second": sum(6 * (b[j, 0] - grand)**2 for j in range(4)),
                "interaction": sum(2 * (cell[i, j, 0] - a[i, 0] - b[j, 0] + grand)**2 for i, j in at),
                "seeds": sum((y[i, j, k, 0] - cell[i, j, 0])**2 for i, j in at for k in range(2))}
    assert {k: v[0] for k, v in explained(y).items()} == pytest.approx({k: v / total for k, v in expected.items()})
    assert sum(expected.values()) == pytest.approx(total) and marginal_range(y, 0)[0] == pytest.approx(np.ptp(a))


def test_a_missing_run_is_seen_in_everything_computed_from_it():
    values = np.ones((2, 2, 3, 51)) + np.random.default_rng(0).normal(size=(2, 2, 3, 51))
    values[0, 1, 2] = np.nan
    assert claim("", "", marginal_range(reseed(values), 1), "ece")["verdict"] == "not run"
    assert all(np.isnan(v).all() for v in explained(values).values())


def test_intervals_cover():
    "of a known difference, in about 95 % of repetitions, when many seeds are there to draw from"
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        values = np.repeat(rng.normal(0.3, 1, (40, 1)), 301, 1)
        _, low, high = interval(reseed(values, seed=int(rng.integers(1e9))).mean(0))
        hits += low <= 0.3 <= high
    assert 178 <= hits <= 199


def test_holds_means_one_thing():
    assert verdict(0.1, 0.2) == verdict(0.1, 0.2, [0.3, 0.1]) == verdict(0.1, 0.2, np.array([0.3, 0.1])) == "holds"
    assert verdict(0.1, 0.2, [0.5, -0.1]) == verdict(0.1, 0.2, [0.5, 0.0]) == verdict(0.0, 0.2) == "undecided"
    assert verdict(-0.2, -0.1) == verdict(-0.2, -0.1, [0.1, -0.5]) == "does not hold"
    assert verdict(math.nan, math.nan, [math.nan]) == "not run"
    lucky = np.array([[1.0] * 101, [1.0] * 101, [-0.1] * 101])
    lucky[:, 1:] = lucky.mean(0)[1:]
    assert claim("", "", lucky, "ece")["verdict"] == "undecided"
    assert claim("", "", lucky.mean(0), "ece")["verdict"] == "holds"
    missing = np.array([[1.0] * 101, [math.nan] * 101])
    assert claim("", "", missing, "ece")["verdict"] == claim("", "", missing, "ece")["effect"] == "not run"


def test_numbers_are_printed_as_their_metric_says():
    values = np.array([0.0123, 0.0012, 0.0234])
    assert show(values, "accuracy") == show(values, METRICS["accuracy"]) == "+1.23 [+0.12, +2.34]"
    assert show(values, "ece") == "+0.0123 [+0.0012, +0.0234]"
    assert mean_std(np.array([0.5, 0.6]), "confidence") == "55.0 ± 7.1" and mean_std(np.array([0.5]), "nll") == "0.5000"
    with pytest.raises(UserError, match="did you mean 'ece'"): show(values, "eec")


# the bound

def test_singular_values_do_not_depend_on_rotation_and_standardised_ones_not_on_scale():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6)) + 5
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    assert all(np.allclose(singular_values(x), singular_values(moved)) for moved in (x @ rotation, x - 7))
    assert np.allclose(singular_values(x, True), singular_values(x * [1, 10, 0.1, 3, 1e3, 1], True))
    assert not np.allclose(singular_values(x), singular_values(2 * x)) and (np.diff(singular_values(x)) <= 0).all()
    twin = np.column_stack([x, x[:, 0]])
    assert singular_values(twin)[-1] < 1e-12
    for bad in (x[:6], x * np.nan, x[0]):
        with pytest.raises(UserError): singular_values(bad)


def test_embeddings_are_of_unit_length_and_in_order(tiny_clip, toy):
    features = image_embeddings(tiny_clip, toy.val, batch_size=5)
    assert features.shape == (12, 16) and torch.allclose(features.norm(dim=1), torch.ones(12), atol=1e-5)
    assert torch.allclose(features[3], image_embeddings(tiny_clip, torch.utils.data.Subset(toy.val, [3]))[0], atol=1e-6)


def test_correlations_against_pandas():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=30), rng.integers(0, 5, 30)
    assert correlation(x, y) == pytest.approx(pd.Series(x).corr(pd.Series(y)))
    assert average_ranks(y).tolist() == (pd.Series(y).rank() - 1).tolist()
    assert correlation(x, y, ranks=True) == pytest.approx(pd.Series(x).rank().corr(pd.Series(y).rank()))
    low, high = correlation_interval(x, x + rng.normal(0, 0.1, 30), range(30))
    assert 0.9 < low < high <= 1 and all(map(math.isnan, correlation_interval(x, y, np.arange(30) % 4)))


# temperature

def test_temperature_is_fitted_on_val_alone():
    predictions = run(3.0)
    predictions["Noise"].logits[:] *= 10  # a shift's own heat must not matter
    scaled = scale_temperature(predictions)
    factors = {name: float((predictions[name].logits / p.logits).mean()) for name, p in scaled.items()}
    assert len({round(f, 8) for f in factors.values()}) == 1 and all(scaled[k].id == predictions[k].id for k in scaled)
    with pytest.raises(UserError, match="which are not there"): scale_temperature({"Clean": predictions["Clean"]})


def test_temperature_by_ece_is_at_least_as_good_on_val():
    predictions = run(3.0)
    by_nll, by_ece = (scale_temperature(predictions, **how)["val"] for how in ({}, {"fit": fit_temperature_ece}))
    ece = METRICS["ece"]
    assert ece(by_ece.probs, by_ece.labels) <= ece(by_nll.probs, by_nll.labels) + 1e-9


def test_a_share_is_chosen_on_val_alone():
    path = {0.25: run(0.5), 0.5: run(1.0), 0.75: run(3.0)}
    for name in ("nll", "ece", "accuracy"):
        best = (max if METRICS[name].sign > 0 else min)(
            path, key=lambda alpha: METRICS[name](path[alpha]["val"].probs, path[alpha]["val"].labels))
        assert choose_alpha(path, name) == best
    before = choose_alpha(path, "ece")
    for predictions in path.values(): predictions["Noise"].logits[:] = 0
    assert choose_alpha(path, "ece") == before
    with pytest.raises(UserError, match="which are not there"): choose_alpha({0.5: {"Clean": path[0.5]["Clean"]}})
    with pytest.raises(UserError, match="did you mean 'ece'"): choose_alpha(path, "eec")


# conformal sets

def test_sets_keep_their_promise_on_id_and_are_fitted_there_alone():
    predictions = run(1.0, n=2000, sets=("Clean", "Noise"))
    predictions["val"] = run(1.0, n=2000, sets=("Clean",))["Clean"]
    table = conformal_table(predictions, 0.9).set_index("set")
    assert list(table.index) == ["Clean", "Noise"] and list(table.id) == [True, False]
    assert table.coverage["Clean"] >= 0.9 > table.coverage["Noise"] and (table["size"] >= 1).all()
    wider = conformal_table(predictions, 0.97).set_index("set")
    assert (wider["size"] > table["size"]).all() and (wider.coverage > table.coverage).all()
    with pytest.raises(UserError, match="did you mean 'raps'"): conformal_table(predictions, kind="rap")
    with pytest.raises(UserError, match="which are not there"): conformal_table({"Clean": predictions["Clean"]})
