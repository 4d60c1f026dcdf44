"A metric of somebody's module: found, measured, resampled, compared and printed like the built-in ones, with no edit."
import numpy as np
import pytest
import torch

from carot import calibration as cal
from carot.analysis.bootstrap import set_seed
from carot.analysis.effects import claim, mean_std, outcomes, reseed, show
from carot.calibration import METRICS, Metric, find_metric, find_metrics
from carot.core import UserError
from carot.evaluate import Predictions, add_stats, load_predictions, metrics_table, save_predictions, stats_row, wide


def top5_accuracy(probs, labels): return (np.argsort(probs, 1)[:, -5:] == labels[:, None]).any(1).mean()

def hits(probs, labels): return (np.argsort(probs, 1)[:, -5:] == labels[:, None]).any(1)

def worst_batch(probs, labels, batch_size):
    batches = [slice(i, i + batch_size) for i in range(0, len(labels), batch_size)]
    return max(1 - cal.accuracy(probs[batch], labels[batch]) for batch in batches)

PLAIN = Metric("top5", "top-5 accuracy", top5_accuracy, higher_is_better=True, scale=100, digits=1, unit="points")
QUICK = Metric("top5_quick", "top-5 accuracy", top5_accuracy, True, 100, 1, "points", per_image=hits)
BATCH = Metric("worst_batch", "error of the worst batch", worst_batch, higher_is_better=False)
TAKEN = Metric("ece", "another ECE", cal.ece, higher_is_better=False)
NO_METRIC = 3


def predictions(heat=1.0, seed=0, n=300, classes=20):
    "of a made-up run on an ID set, two shifts and val"
    found = {}
    for k, name in enumerate(["Clean", "Noise", "Dark", "val"]):
        rng, labels = np.random.default_rng([k, seed]), np.arange(n) % classes
        logits = rng.normal(size=(n, classes))
        logits[np.arange(n), labels] += 2 - 0.5 * (k % 3)
        found[name] = Predictions(torch.tensor(heat * logits).float(), torch.tensor(labels), name in ("Clean", "val"))
    return found


def test_metrics_are_found_by_name_and_by_reference():
    assert find_metric("ece") is METRICS["ece"] and find_metric(PLAIN) is PLAIN
    assert find_metric(f"{__name__}:PLAIN") is PLAIN
    more = find_metrics(f"{__name__}:PLAIN,{__name__}:BATCH")
    assert list(more) == [*METRICS, "top5", "worst_batch"] and find_metrics() == find_metrics(["nll"]) == METRICS
    assert "top5" not in METRICS  # nothing is registered anywhere


@pytest.mark.parametrize("reference, words", [
    ("eec", "unknown metric 'eec' .did you mean 'ece'"), ("top5", "unknown metric 'top5'"),
    (f"{__name__}:NO_METRIC", "is a int, not a Metric"), (f"{__name__}:ABSENT", "cannot take 'ABSENT'"),
    ("no_such_module:TOP5", "cannot take 'TOP5' from 'no_such_module'")])
def test_metrics_that_are_not_there(reference, words):
    for find in (find_metric, find_metrics):
        with pytest.raises(UserError, match=words) as error: find(reference)
        assert "\n" not in str(error.value)


def test_a_taken_name_is_refused():
    with pytest.raises(UserError, match="called 'ece' like another metric"): find_metrics(f"{__name__}:TAKEN")
    assert find_metrics([PLAIN, PLAIN])["top5"] is PLAIN


def test_complete_runs_get_it_from_their_saved_predictions(tmp_path):
    made = predictions()
    for name, p in made.items(): save_predictions(tmp_path/"predictions"/f"{name}.safetensors", p)
    table = metrics_table(load_predictions(tmp_path), 64, find_metrics([PLAIN, BATCH]))
    found = wide(table)
    assert list(found) == [*METRICS, "top5", "worst_batch"] and found.notna().all(axis=None)
    for name, p in made.items():
        among = [label in np.argsort(row)[-5:] for row, label in zip(p.probs, p.labels)]
        assert found.loc[name, "top5"] == np.mean(among)
        assert found.loc[name, "worst_batch"] == worst_batch(p.probs, p.labels.numpy(), 64)
        assert found.loc[name, "batched_ece"] == cal.batched_ece(p.probs, p.labels, 64)
    ours = table[table.metric.isin(METRICS)].reset_index(drop=True)
    assert metrics_table(load_predictions(tmp_path), 64).equals(ours)
    with_it, without = (stats_row(t, 1, "carot", 0.5) for t in (table, ours))
    assert with_it == without and list(add_stats(tmp_path, with_it)) == list(without)


@pytest.mark.parametrize("metric", [PLAIN, QUICK, BATCH.for_batches(50)], ids=["rows", "per image", "batches"])
def test_it_is_resampled_like_any_other(metric):
    p = predictions()["Noise"]
    def slow(probs, labels): return metric(probs, labels)
    assert cal.bootstrap(metric, p.probs, p.labels, 50) == pytest.approx(cal.bootstrap(slow, p.probs, p.labels, 50))
    counts = cal.resample_counts(300, 20, set_seed("Noise"))
    resamples = [np.repeat(np.arange(300), row) for row in counts]
    by_hand = [slow(p.probs[rows], p.labels.numpy()[rows]) for rows in resamples]
    assert np.allclose(cal.resampled(metric, p.probs, p.labels, counts), by_hand, atol=1e-12)


def test_effects_and_claims_are_in_its_terms():
    names = ["top5", "top5_quick", "worst_batch", "batched_ece"]
    metrics = [f"{__name__}:PLAIN", QUICK, BATCH, "batched_ece"]
    runs = [predictions(seed=seed) for seed in (1, 2, 3)] + [predictions(0.3, seed) for seed in (1, 2, 3)]
    found = outcomes(runs, n=60, metrics=metrics, batch_size=100)
    assert list(found) == [(name, where) for name in names for where in ("ID", "shifts")]
    assert np.allclose(found["top5", "shifts"], found["top5_quick", "shifts"], atol=1e-12)
    shifts = [worst_batch(runs[0][name].probs, runs[0][name].labels.numpy(), 100) for name in ("Noise", "Dark")]
    assert found["worst_batch", "shifts"][0, 0] == pytest.approx(np.mean(shifts))
    sharp, flat = reseed(found["batched_ece", "ID"].reshape(2, 3, -1))
    row = claim("Cooler logits lower the batched ECE", "flat − sharp", flat - sharp, "batched_ece")
    assert row["verdict"] == "holds" and row["effect"] == show((flat - sharp).mean(0), "batched_ece")
    same = reseed(found["top5", "ID"].reshape(2, 3, -1))
    assert show((same[1] - same[0]).mean(0), PLAIN) == "+0.00 [+0.00, +0.00]"
    one = mean_std(same[0][:, 0], PLAIN)
    assert one == f"{100 * same[0][:, 0].mean():.1f} ± {100 * same[0][:, 0].std(ddof=1):.1f}"


def test_what_tables_and_figures_ask():
    assert (PLAIN.show(0.7861), PLAIN.show_difference(0.0123), PLAIN.label) == ("78.6", "+1.2", "top-5 accuracy (%)")
    assert (BATCH.show(0.7861), BATCH.show_difference(-0.0123), BATCH.label) == ("0.7861", "-0.0123", BATCH.title)
    assert PLAIN.sign == 1 and PLAIN.better(0.8, 0.7) and BATCH.sign == -1 and BATCH.better(0.7, 0.8)
    assert METRICS["confidence"].sign == 0 and not METRICS["confidence"].better(0.9, 0.1)
    assert PLAIN.for_batches(9) is PLAIN and METRICS["ece"].for_batches(9) is METRICS["ece"]
