"Conformal sets: against plain loops written from the definitions, and the guarantee over many draws."
import math
import warnings
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from carot import conformal as con
from carot.calibration import accuracy, softmax
from carot.core import UserError


def predictions(n=200, classes=6, seed=0, heat=1.5):
    "probabilities, over-confident for a heat above 1, and labels"
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (n, classes))
    labels = (rng.random((n, 1)) < softmax(logits).cumsum(1)).argmax(1)
    return softmax(heat * logits), labels


def tied(n=200, classes=6, seed=0):
    "probabilities that are multiples of 1/8, so that many are equal, and many 0 (exact in binary)"
    rng = np.random.default_rng(seed)
    probs = rng.multinomial(8, np.ones(classes) / classes, n) / 8
    return probs, rng.integers(classes, size=n)


# --- oracles: one row and one class at a time, no sorting

def loop_score(row, c, k_reg, lam, coin):
    mass = math.fsum(p for p in row if p > row[c])
    rank = 1 + sum(p > row[c] for p in row)
    return mass + coin * row[c] + lam * max(rank - k_reg, 0)


def loop_sets(probs, labels, others, coverage, k_reg, lam, coins, other_coins):
    "fitted on the first, sets of the others; coverage a fraction"
    scores = sorted(loop_score(row, y, k_reg, lam, u) for row, y, u in zip(probs, labels, coins))
    k = math.ceil((len(scores) + 1) * coverage)
    threshold = scores[k - 1] if k <= len(scores) else math.inf
    return [{c for c in range(len(row)) if loop_score(row, c, k_reg, lam, u) <= threshold + 1e-12}
            for row, u in zip(others, other_coins)]


@pytest.mark.parametrize("coins", [False, True])
@pytest.mark.parametrize("kind, options, k_reg, lam", [
    ("aps", {}, 0, 0.0), ("raps", {}, 5, 0.01), ("raps", {"k_reg": 2, "lam": 0.2}, 2, 0.2), ("raps", {"lam": 0}, 5, 0)])
@pytest.mark.parametrize("n, classes, made, coverage", [
    (200, 6, predictions, Fraction(9, 10)), (37, 30, predictions, Fraction(8, 10)), (150, 5, tied, Fraction(7, 10)),
    (99, 2, predictions, Fraction(95, 100))])
def test_sets_equal_plain_loops(n, classes, made, coverage, kind, options, k_reg, lam, coins):
    probs, labels = made(n, classes)
    for others in (made(80, classes, seed=1)[0], made(40, max(2, classes // 2), seed=2)[0]):  # fewer classes, too
        rule = con.fit_conformal(probs, labels, float(coverage), kind, seed=3 if coins else None, **options)
        u, v = (rule.coins(len(p), stream) if coins else [0.0] * len(p) for stream, p in enumerate((probs, others)))
        expected = loop_sets(probs.tolist(), labels.tolist(), others.tolist(), coverage, k_reg, lam, u, v)
        assert [set(np.flatnonzero(row)) for row in rule.sets(others)] == expected
        assert rule.sets(others).shape == others.shape and (rule.k_reg, rule.lam) == (k_reg, lam)


@pytest.mark.parametrize("made", [predictions, tied])
def test_scores_equal_plain_loops_in_parts_as_well(made, monkeypatch):
    probs, _ = made(50, 7)
    u = np.random.default_rng(0).random(50)
    expected = [[loop_score(row, c, 2, 0.1, coin) for c in range(7)] for row, coin in zip(probs.tolist(), u)]
    found = con.conformal_scores(probs, 2, 0.1, u)
    assert np.allclose(found, expected, atol=1e-14)
    real = np.array_split
    monkeypatch.setattr(np, "array_split", lambda array, parts: real(array, 7))
    assert np.array_equal(con.conformal_scores(probs, 2, 0.1, u), found)


@pytest.mark.parametrize("made", [predictions, tied])
@pytest.mark.parametrize("options", [{}, {"kind": "raps", "k_reg": 2, "lam": 0.1}, {"seed": 5}])
def test_the_numbering_of_the_classes_does_not_matter(made, options):
    (probs, labels), (others, _) = made(), made(seed=1)
    turn = np.random.default_rng(0).permutation(6)
    rule = con.fit_conformal(probs, labels, **options)
    turned = con.fit_conformal(probs[:, turn], np.argsort(turn)[labels], **options)
    assert rule == turned and np.array_equal(rule.sets(others)[:, turn], turned.sets(others[:, turn]))


def test_the_order_of_the_validation_images_does_not_matter_without_coins():
    probs, labels = predictions()
    order = np.random.default_rng(0).permutation(200)
    assert con.fit_conformal(probs, labels) == con.fit_conformal(probs[order], labels[order])


def test_sets_hold_the_prediction_with_its_ties_and_the_most_probable_classes_first():
    for made in (predictions, tied):
        sets, probs = con.fit_conformal(*made(), kind="raps").sets(made(seed=1)[0]), made(seed=1)[0]
        assert sets[probs == probs.max(1, keepdims=True)].all()
        for row, inside in zip(probs, sets):
            if not inside.all(): assert row[inside].min() > row[~inside].max()


def test_coins_are_seeded_and_others_for_validation():
    data, others = predictions(), predictions(seed=1)[0]
    one, again, other = (con.fit_conformal(*data, seed=seed) for seed in (1, 1, 2))
    assert one == again and np.array_equal(one.sets(others), again.sets(others))
    assert one != other and not np.array_equal(one.sets(others), replace(one, seed=2).sets(others))
    assert not np.array_equal(one.coins(200, 0), one.coins(200, 1))
    state = np.random.get_state()[1].tolist()
    con.fit_conformal(*data, seed=1).sets(others)
    assert np.random.get_state()[1].tolist() == state


# --- the guarantee

@pytest.mark.parametrize("options, exact", [
    ({}, False), ({"kind": "raps"}, False), ({}, True), ({"kind": "raps", "lam": 0.05, "k_reg": 2}, True)])
@pytest.mark.parametrize("n, coverage", [(19, 0.9), (50, 0.9), (99, 0.8)])
def test_mean_coverage_over_many_draws(n, coverage, options, exact):
    "At least what was asked, and k/(n + 1) with coins, within three standard errors."
    trials, found = 500, []
    for trial in range(trials):
        probs, labels = predictions(n + 300, 8, seed=[trial, n], heat=2)
        coins = {"seed": trial} if exact else {}
        rule = con.fit_conformal(probs[:n], labels[:n], coverage, **options, **coins)
        found.append(con.coverage_and_size(rule.sets(probs[n:]), labels[n:])[0])
    share, error = math.ceil((n + 1) * coverage - 1e-9) / (n + 1), np.std(found) / math.sqrt(trials)
    assert np.mean(found) > share - 3 * error and error < 0.01
    if exact: assert np.mean(found) < share + 3 * error


def test_coverage_fails_under_shift():
    rule = con.fit_conformal(*predictions(2000, 10))
    probs, labels = predictions(2000, 10, seed=1, heat=5)
    others, their_labels = predictions(2000, 10, seed=2)
    assert con.coverage_and_size(rule.sets(others), their_labels)[0] > 0.88
    assert con.coverage_and_size(rule.sets(probs), labels)[0] < 0.8


def test_a_classifier_better_than_the_coverage_names_its_prediction_alone():
    probs, labels = predictions(500, 4, heat=3)
    rule = con.fit_conformal(probs, labels, coverage=0.3)
    assert rule.threshold == 0 and con.coverage_and_size(rule.sets(probs), labels) == (accuracy(probs, labels), 1)


# --- quantile, ends

def test_quantile_at_its_ends():
    scores = np.random.default_rng(0).permutation(np.arange(1.0, 100))
    assert [con.conformal_quantile(scores, c) for c in (0.01, 0.07, 0.5, 0.9, 0.99)] == [1, 7, 50, 90, 99]
    assert con.conformal_quantile(scores, 0.991) == math.inf and con.conformal_quantile(np.ones(5), 0.5) == 1
    for n in range(1, 200):
        for percent in range(1, 100):
            k = -(-(n + 1) * percent // 100)
            assert con.conformal_quantile(np.arange(1, n + 1), percent / 100) == (k if k <= n else math.inf)


def test_too_few_validation_images():
    probs, labels = predictions(8)
    with pytest.warns(UserWarning, match="needs more than 8 validation images") as caught:
        rule = con.fit_conformal(probs, labels)
    assert caught[0].filename == __file__
    assert rule.threshold == math.inf and rule.sets(predictions()[0]).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert con.fit_conformal(*predictions(9)).threshold < math.inf


def test_probabilities_of_zero_and_one():
    probs = np.eye(3)[[0, 1, 2, 0, 1, 2, 0, 1, 2]]
    assert con.fit_conformal(probs, [0, 1, 2] * 3).sets(probs).tolist() == probs.astype(bool).tolist()
    assert con.fit_conformal(probs, [1, 2, 0] * 3).sets(probs).all()  # always wrong: mass 1 before each label
    assert con.fit_conformal(np.full((9, 3), 1 / 3), [0, 1, 2] * 3).sets(np.full((2, 3), 1 / 3)).all()


def test_tensors_lists_and_what_is_not_written_to():
    probs, labels = predictions()
    rule = con.fit_conformal(probs, labels)
    tensors = torch.as_tensor(probs, dtype=torch.float64, device="cpu").requires_grad_(), torch.as_tensor(labels)
    assert rule == con.fit_conformal(*tensors) == con.fit_conformal(probs.tolist(), labels.tolist())
    assert np.array_equal(rule.sets(tensors[0]), rule.sets(probs.tolist()))
    found = con.coverage_and_size(torch.as_tensor(rule.sets(probs)), tensors[1])
    assert found == con.coverage_and_size(rule.sets(probs), labels) and all(type(number) is float for number in found)
    copy = probs.copy()
    probs.flags.writeable = False
    con.fit_conformal(probs, labels, kind="raps", seed=1).sets(probs)
    assert np.array_equal(copy, probs)


# --- refusals

PROBS, LABELS = predictions()
RULE = con.fit_conformal(PROBS, LABELS)

@pytest.mark.parametrize("call, words", [
    (lambda: con.fit_conformal(np.log(PROBS), LABELS), "softmax"),
    (lambda: con.fit_conformal(2 * PROBS, LABELS), "sums to 2"),
    (lambda: con.fit_conformal(PROBS[:, :3], np.minimum(LABELS, 2)), "of probs sums to"),
    (lambda: con.fit_conformal(PROBS, LABELS[1:]), "labels must have shape"),
    (lambda: con.fit_conformal(PROBS, LABELS + 1), "none of the 6 classes"),
    (lambda: con.fit_conformal(PROBS[:0], LABELS[:0]), "empty"),
    (lambda: con.fit_conformal(PROBS * np.nan, LABELS), "NaN"),
    (lambda: con.fit_conformal(PROBS, LABELS, kind="apps"), "did you mean 'aps'"),
    *[(lambda c=c: con.fit_conformal(PROBS, LABELS, coverage=c), "coverage must be a number between 0 and 1")
      for c in (0, 1, 1.5, -0.1, 90, math.nan, math.inf, "0.9", None, True)],
    *[(lambda k=k: con.fit_conformal(PROBS, LABELS, kind="raps", k_reg=k), "k_reg must be a whole number")
      for k in (-1, 2.5, True, "3")],
    *[(lambda x=x: con.fit_conformal(PROBS, LABELS, lam=x), "lam must be a number")
      for x in (-1, math.inf, math.nan, "1")],
    *[(lambda s=s: con.fit_conformal(PROBS, LABELS, seed=s), "seed must be a whole number")
      for s in (-1, 0.5, True, "1")],
    (lambda: RULE.sets(np.log(PROBS)), "negative"), (lambda: RULE.sets(PROBS[0]), "(samples, classes)"),
    (lambda: RULE.sets(5), "(samples, classes)"), (lambda: RULE.sets([]), "(samples, classes)"),
    (lambda: con.coverage_and_size(PROBS, LABELS), "rule.sets(probs)"),
    (lambda: con.coverage_and_size(RULE.sets(PROBS)[0], LABELS), "(samples, classes)"),
    (lambda: con.coverage_and_size(RULE.sets(PROBS), LABELS[:5]), "labels must have shape"),
    (lambda: con.coverage_and_size(RULE.sets(PROBS)[:, :4], LABELS), "none of the 4 classes")])
def test_refusals(call, words):
    with pytest.raises(UserError) as caught: call()
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 200
