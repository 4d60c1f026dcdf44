"Numeric oracles and faults for carot.calibration: every number is compared with one computed another way."
import itertools
import math
import warnings
from functools import partial

import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("Agg")
from carot import calibration as cal
from carot.core import UserError


def predictions(n=300, classes=5, seed=0, sharpness=2.0):
    "probabilities and labels, neither calibrated nor independent"
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, sharpness, (n, classes))
    labels = np.where(rng.random(n) < 0.5, logits.argmax(1), rng.integers(classes, size=n))
    return cal.softmax(logits), labels


WHOLE = {name: metric for name, metric in cal.METRICS.items() if not metric.takes("batch_size")}  # of a whole set


def two_class(confidences):
    "two-class rows whose first class has exactly these (float64) probabilities"
    confidences = np.asarray(confidences, dtype=float)
    return np.stack([confidences, 1 - confidences], 1)


# --- oracles: plain Python floats, one sample at a time, written from the definitions

def loop_binary(confidences, correct, n_bins):
    edges, n, total = np.linspace(0, 1, n_bins + 1).tolist(), len(confidences), 0.0
    for b, (low, high) in enumerate(itertools.pairwise(edges)):
        inside = [i for i in range(n) if low <= confidences[i] < high or b == n_bins - 1 and confidences[i] == 1.0]
        if inside:
            acc = sum(bool(correct[i]) for i in inside) / len(inside)
            conf = math.fsum(confidences[i] for i in inside) / len(inside)
            total += len(inside) / n * abs(acc - conf)
    return total


def loop_top(probs, labels):
    top = [max(range(len(row)), key=row.__getitem__) for row in probs]
    return [row[c] for row, c in zip(probs, top)], [c == y for c, y in zip(top, labels)]


def loop_ece(probs, labels, n_bins):
    return loop_binary(*loop_top(probs, labels), n_bins)


def loop_adaptive(probs, labels, n_bins):
    pairs = sorted(zip(*loop_top(probs, labels)))
    size, extra = divmod(len(pairs), n_bins)
    total, start = 0.0, 0
    for b in range(n_bins):
        chunk = pairs[start:start + size + (b < extra)]
        start += len(chunk)
        if chunk:
            conf, acc = (sum(column) / len(chunk) for column in zip(*chunk))
            total += len(chunk) / len(pairs) * abs(acc - conf)
    return total


def loop_classwise(probs, labels, n_bins):
    classes = len(probs[0])
    errors = [loop_binary([row[c] for row in probs], [y == c for y in labels], n_bins) for c in range(classes)]
    return sum(errors) / classes


CASES = [(n, classes, seed) for seed, (n, classes) in enumerate([(1, 2), (7, 2), (150, 3), (300, 10), (64, 101)])]


@pytest.mark.parametrize("n, classes, seed", CASES)
@pytest.mark.parametrize("n_bins", [1, 4, 10, 15])
@pytest.mark.parametrize("metric, loop", [
    (cal.ece, loop_ece), (cal.adaptive_ece, loop_adaptive), (cal.classwise_ece, loop_classwise)])
def test_calibration_errors_equal_plain_loops(metric, loop, n_bins, n, classes, seed):
    probs, labels = predictions(n, classes, seed)
    assert metric(probs, labels, n_bins) == pytest.approx(loop(probs.tolist(), labels.tolist(), n_bins), abs=1e-12)
    assert metric(probs, labels) == metric(probs, labels, 10)


@pytest.mark.parametrize("n_bins", [2, 4, 5, 10])
def test_confidences_on_edges_and_of_exactly_one(n_bins):
    # right on the edges, wrong between them, the reverse at the end: a sample in the wrong bin changes the sum
    right, wrong = [0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95], [0.55, 0.65, 0.72, 0.77, 0.85, 1.0]
    probs, labels = two_class(right + wrong), [0] * len(right) + [1] * len(wrong)
    for metric, loop in [(cal.ece, loop_ece), (cal.classwise_ece, loop_classwise)]:
        assert metric(probs, labels, n_bins) == pytest.approx(loop(probs.tolist(), labels, n_bins), abs=1e-12)


def test_bins_are_closed_on_the_left_and_one_belongs_to_the_last():
    # 0.75 shares a bin with 0.8 (not with 0.7), where an error of -0.75 and one of +0.2 meet
    assert cal.ece(two_class([0.75, 0.8]), [1, 0], 4) == pytest.approx(abs(-0.75 + 0.2) / 2)
    assert cal.ece(two_class([0.75, 0.7]), [1, 0], 4) == pytest.approx((0.75 + 0.3) / 2)
    # 1.0 shares a bin with 0.9: a bin of its own would give (1 + 0.1) / 2
    assert cal.ece(two_class([1.0, 0.9]), [1, 0]) == pytest.approx((1 - 0.1) / 2)
    assert cal.ece(two_class([1.0] * 4), [0, 0, 0, 1]) == 0.25
    assert cal.bin_index(np.linspace(0, 1, 11), 10).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9]
    assert cal.bin_index(np.nextafter(np.linspace(0, 1, 11)[1:], 0), 10).tolist() == list(range(10))


def test_ece_equals_netcal():
    netcal = pytest.importorskip("netcal.metrics")
    for seed, classes, n_bins in itertools.product(range(3), (3, 10, 50), (5, 10, 15)):
        probs, labels = predictions(500, classes, seed, sharpness=1 + 3 * seed)
        assert cal.ece(probs, labels, n_bins) == pytest.approx(netcal.ECE(n_bins).measure(probs, labels), abs=1e-12)
    rng = np.random.default_rng(0)
    probs = rng.multinomial(10, [0.6, 0.2, 0.1, 0.1], 2000) / 10  # all confidences on edges, some exactly 1
    assert (probs.max(1) == 1).any()
    labels = np.where(rng.random(2000) < 0.6, 0, rng.integers(4, size=2000))
    assert cal.ece(probs, labels) == pytest.approx(netcal.ECE(10).measure(probs, labels), abs=1e-12)


@pytest.mark.parametrize("n, batch_size", [(100, 32), (96, 32), (5, 7), (10, 1)])
@pytest.mark.parametrize("n_bins", [1, 10, 15])
def test_batched_ece_is_the_mean_over_batches_weighted_by_their_sizes(n, batch_size, n_bins):
    "As the public code sums: the ECE of each batch times its number of images, over all images."
    probs, labels = predictions(n, 4)
    batches = [slice(i, i + batch_size) for i in range(0, n, batch_size)]
    errors = [loop_ece(probs[batch].tolist(), labels[batch].tolist(), n_bins) for batch in batches]
    sizes = [len(labels[batch]) for batch in batches]
    assert len(errors) == math.ceil(n / batch_size) and sum(sizes) == n
    expected = sum(size * error for size, error in zip(sizes, errors)) / n
    found = cal.batched_ece(probs, labels, batch_size, n_bins)
    assert found == pytest.approx(expected, abs=1e-12)
    if len(set(sizes)) > 1: assert found != pytest.approx(sum(errors) / len(errors), abs=1e-4)  # the plain mean


def test_batched_ece_is_biased_and_whole_set_ece_is_nearly_not():
    rng = np.random.default_rng(0)
    confidences = rng.uniform(0.5, 1, 20_000)
    probs, labels = two_class(confidences), (rng.random(20_000) > confidences).astype(int)
    assert cal.ece(probs, labels) < 0.01
    assert 0.04 < cal.batched_ece(probs, labels, 64) < cal.batched_ece(probs, labels, 32)


def test_only_batched_ece_depends_on_the_order_of_samples():
    rng = np.random.default_rng(0)
    probs, labels = predictions(2000, 3)
    probs = (probs * 20).round() / 20  # ties
    probs[:, 0] += 1 - probs.sum(1)
    probs, labels = probs[probs.min(1) >= 0], labels[probs.min(1) >= 0]
    order = rng.permutation(len(labels))
    for name, metric in WHOLE.items():
        assert metric(probs, labels) == pytest.approx(metric(probs[order], labels[order]), abs=1e-12), name
    ordered, shuffled = (cal.batched_ece(*data, 32) for data in [(probs, labels), (probs[order], labels[order])])
    assert ordered != pytest.approx(shuffled, abs=1e-4)


def test_adaptive_ece_gives_ties_their_mean_accuracy():
    # sorted: 0.6 (wrong), then 0.9 four times, two of them right; two bins of 3 and 2
    probs, gap = two_class([0.9, 0.9, 0.6, 0.9, 0.9]), 0.5 - 0.9
    for labels in itertools.permutations([0, 0, 1, 1]):
        labels = [*labels[:2], 1, *labels[2:]]
        assert cal.adaptive_ece(probs, labels, 2) == pytest.approx((abs(-0.6 + 2 * gap) + abs(2 * gap)) / 5)
    assert cal.adaptive_ece(probs, [0, 0, 0, 0, 0], 50) == pytest.approx((0.4 + 4 * 0.1) / 5)  # more bins than samples


@pytest.mark.parametrize("n, classes, seed", CASES)
def test_accuracy_confidence_nll_brier_equal_plain_loops(n, classes, seed):
    probs, labels = predictions(n, classes, seed)
    rows, targets = probs.tolist(), labels.tolist()
    confidences, correct = loop_top(rows, targets)
    assert cal.accuracy(probs, labels) == pytest.approx(sum(correct) / n)
    assert cal.confidence(probs, labels) == pytest.approx(sum(confidences) / n)
    assert cal.nll(probs, labels) == pytest.approx(-sum(math.log(row[y]) for row, y in zip(rows, targets)) / n)
    squares = [(p - (c == y)) ** 2 for row, y in zip(rows, targets) for c, p in enumerate(row)]
    assert cal.brier_score(probs, labels) == pytest.approx(sum(squares) / n)


def test_nll_and_brier_equal_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    probs, labels = predictions(500, 7)
    assert cal.nll(probs, labels) == pytest.approx(metrics.log_loss(labels, probs, labels=range(7)))
    probs, labels = predictions(500, 2)
    assert cal.brier_score(probs, labels) == pytest.approx(2 * metrics.brier_score_loss(labels, probs[:, 1]))


def test_extreme_scores():
    assert cal.brier_score([[0.0, 1.0]], [1]) == 0 and cal.brier_score([[0.0, 1.0]], [0]) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cal.nll([[0.0, 1.0], [0.5, 0.5]], [0, 0]) == math.inf
        assert cal.bootstrap(cal.nll, [[0.0, 1.0]] * 3, [0] * 3) == (math.inf, math.inf)
        low, high = cal.bootstrap(cal.nll, [[0.0, 1.0]] + [[0.5, 0.5]] * 2, [0, 0, 0])
    assert low == pytest.approx(math.log(2)) and high == math.inf
    assert cal.softmax([[1e4, 0.0], [-1e4, -1e4]]).tolist() == [[1.0, 0.0], [0.5, 0.5]]


# --- macro-F1, AUROC, AURC: from the definitions, with counts and pairs

def loop_macro_f1(probs, labels):
    predicted = [max(range(len(row)), key=row.__getitem__) for row in probs]
    scores = []
    for c in sorted(set(predicted) | set(labels)):
        hits = sum(p == c == y for p, y in zip(predicted, labels))
        precision = hits / predicted.count(c) if c in predicted else 0.0
        recall = hits / labels.count(c) if c in labels else 0.0
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    return sum(scores) / len(scores)


def loop_auroc(probs, labels):
    confidences, correct = loop_top(probs, labels)
    right = [c for c, a in zip(confidences, correct) if a]
    wrong = [c for c, a in zip(confidences, correct) if not a]
    if not right or not wrong: return math.nan
    return sum((r > w) + (r == w) / 2 for r in right for w in wrong) / (len(right) * len(wrong))


def loop_aurc(probs, labels):
    pairs, risks, wrong = sorted(zip(*loop_top(probs, labels)), reverse=True), [], 0.0
    share = {c: sum(not a for b, a in pairs if b == c) / sum(b == c for b, _ in pairs) for c, _ in pairs}
    for k, (c, _) in enumerate(pairs, 1):
        wrong += share[c]
        risks.append(wrong / k)
    return sum(risks) / len(risks)


LOOPS = {"macro_f1": loop_macro_f1, "auroc": loop_auroc, "aurc": loop_aurc}


@pytest.mark.parametrize("n, classes, seed", [*CASES, (40, 30, 9)])
@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("ties", [False, True])
def test_scores_of_the_prediction_equal_plain_loops(name, ties, n, classes, seed):
    probs, labels = predictions(n, classes, seed)
    if ties:
        probs = np.eye(classes)[probs.argmax(1)] * 0.5 + 0.5 / classes
        probs[::3] = np.eye(classes)[probs[::3].argmax(1)]
    found = getattr(cal, name)(probs, labels)
    assert found == pytest.approx(LOOPS[name](probs.tolist(), labels.tolist()), abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("n, classes", [(500, 7), (40, 30), (3, 2), (1, 5)])
def test_macro_f1_and_auroc_equal_scikit_learn(n, classes):
    "Classes that are never predicted, or never there, included."
    metrics = pytest.importorskip("sklearn.metrics")
    for seed in range(5):
        probs, labels = predictions(n, classes, seed)
        expected = metrics.f1_score(labels, probs.argmax(1), average="macro", zero_division=0)
        assert cal.macro_f1(probs, labels) == pytest.approx(expected, abs=1e-12)
        confidences, correct = cal.top_label(probs, labels)
        if 0 < correct.sum() < n:
            assert cal.auroc(probs, labels) == pytest.approx(metrics.roc_auc_score(correct, confidences), abs=1e-12)


def test_scores_of_the_prediction_at_their_ends():
    sure, unsure = two_class([0.9] * 3 + [0.6] * 2), two_class([0.8] * 5)
    assert cal.auroc(sure, [0, 0, 0, 1, 1]) == 1 and cal.auroc(sure, [1, 1, 1, 0, 0]) == 0
    assert cal.auroc(unsure, [0, 0, 0, 1, 1]) == 0.5 and cal.aurc(unsure, [0, 0, 0, 1, 1]) == pytest.approx(0.4)
    assert cal.aurc(sure, [0, 0, 0, 1, 1]) == pytest.approx((1 / 4 + 2 / 5) / 5)
    assert cal.macro_f1(sure, [0] * 5) == 1 and cal.macro_f1(sure, [1] * 5) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for labels in ([0] * 5, [1] * 5):
            assert math.isnan(cal.auroc(sure, labels)) and cal.aurc(sure, labels) == labels[0]
            assert math.isnan(cal.bootstrap(cal.auroc, sure, labels, 20)[0])
    assert cal.METRICS["auroc"].show(math.nan) == cal.METRICS["auroc"].show_difference(math.nan) == "–"


def test_without_an_error_in_some_resample_the_auroc_has_no_interval():
    labels = [0] * 30 + [1]
    values = cal.bootstrap_values(cal.auroc, two_class(np.linspace(0.6, 0.9, 31)), labels, 50)
    assert 0 < np.isnan(values).sum() < 50 and all(np.isnan(cal.percentile_interval(values)))


def test_metrics_have_the_names_under_which_results_are_saved():
    assert " ".join(cal.METRICS) == ("accuracy nll brier ece adaptive_ece classwise_ece macro_f1 auroc aurc "
                                     "confidence batched_ece")
    assert all(metric.name == name for name, metric in cal.METRICS.items())
    assert all(type(metric(*predictions())) is float for metric in WHOLE.values())
    with pytest.raises(TypeError, match="batch_size"): cal.METRICS["batched_ece"](*predictions())


@pytest.mark.parametrize("name, function", [
    ("accuracy", cal.accuracy), ("nll", cal.nll), ("brier", cal.brier_score), ("ece", cal.ece),
    ("adaptive_ece", cal.adaptive_ece), ("classwise_ece", cal.classwise_ece), ("macro_f1", cal.macro_f1),
    ("auroc", cal.auroc), ("aurc", cal.aurc), ("confidence", cal.confidence), ("batched_ece", cal.batched_ece)])
def test_metrics_are_the_plain_functions(name, function):
    metric, options = cal.METRICS[name], {"batch_size": 32} if name == "batched_ece" else {}
    assert metric.function is function and metric(*predictions(), **options) == function(*predictions(), **options)
    assert metric.takes("batch_size") == (name == "batched_ece")


def test_checked_once_gives_the_same_numbers_from_fewer_checks(monkeypatch):
    probs, labels = predictions()
    expected = {name: metric(probs, labels) for name, metric in WHOLE.items()}
    made, plain = [], cal.sums_and_minimum
    monkeypatch.setattr(cal, "sums_and_minimum", lambda matrix: made.append(len(matrix)) or plain(matrix))
    with cal.checked_once(probs, labels):
        assert {name: metric(probs, labels) for name, metric in WHOLE.items()} == expected
        assert made == [300]
        assert cal.ece(probs.copy(), labels) == cal.ece(probs, labels) and cal.ece(probs[:9], labels[:9]) >= 0
        assert made == [300, 300, 9]  # other arrays are checked
        with cal.checked_once(probs[:9], labels[:9]): cal.ece(probs, labels)
        cal.ece(probs, labels)
        assert made == [300, 300, 9, 300]
    cal.ece(probs, labels)
    assert made == [300, 300, 9, 300, 300]
    with pytest.raises(UserError, match="sums to"), cal.checked_once(2 * probs, labels): cal.ece(2 * probs, labels)
    cal.bootstrap(cal.adaptive_ece, probs, labels, 5)
    assert made[-1] == 300 and len(made) == 7  # once, and once what was refused


# --- temperature

def loop_nll(logits, labels, temperature):
    return cal.nll(cal.softmax(np.asarray(logits) / temperature), labels)


@pytest.mark.parametrize("seed, scale, classes", [(0, 0.01, 3), (1, 1, 2), (2, 5, 10), (3, 100, 50)])
def test_fit_temperature_equals_a_fine_grid(seed, scale, classes):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(400, classes))
    labels = np.where(rng.random(400) < 0.6, logits.argmax(1), rng.integers(classes, size=400))
    logits *= scale
    fitted = cal.fit_temperature(logits, labels)
    coarse = np.geomspace(1e-3, 1e3, 400)
    near = coarse[np.argmin([loop_nll(logits, labels, t) for t in coarse])]
    fine = np.linspace(near * 0.95, near * 1.05, 1001)
    assert fitted == pytest.approx(fine[np.argmin([loop_nll(logits, labels, t) for t in fine])], rel=2e-4)
    assert loop_nll(logits, labels, fitted) <= min(loop_nll(logits, labels, fitted * (1 + e)) for e in (-1e-3, 0, 1e-3))
    below = logits - logits.max(1, keepdims=True)
    assert cal.nll_slope(1 / fitted, below, below[np.arange(400), labels])[0] == pytest.approx(0, abs=1e-8 * scale)


def test_fit_temperature_divides_the_logits_and_ignores_offsets():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (20_000, 5))
    labels = (rng.random((20_000, 1)) < cal.softmax(logits).cumsum(1)).argmax(1)
    assert cal.fit_temperature(3 * logits, labels) == pytest.approx(3, rel=0.03)
    T = cal.fit_temperature(3 * logits, labels)
    assert cal.fit_temperature(3 * logits + rng.normal(0, 9, (20_000, 1)), labels) == pytest.approx(T, rel=1e-8)
    assert type(T) is float
    assert cal.ece(cal.softmax(3 * logits / T), labels) < 0.01 < cal.ece(cal.softmax(3 * logits), labels)


@pytest.mark.parametrize("logits, labels, expected", [
    ([[3.0, 0.0], [0.0, 2.0]], [0, 1], 1e-3),  # separable: the colder the better
    ([[900.0, 0.0], [0.0, 800.0]], [0, 1], 1e-3),  # the same where the slope underflows
    ([[3.0, 0.0], [0.0, 2.0]], [1, 0], 1e3),  # always wrong: the hotter the better
    ([[1e7, 0.0], [0.0, 1e7], [1e7, 0.0]], [0, 1, 1], 1e3)])  # the minimum lies beyond the bound
def test_nll_temperature_stops_at_its_bounds(logits, labels, expected):
    assert cal.nll_temperature(np.array(logits), np.array(labels)) == expected


def some_right(n, right, classes=4, seed=0):
    "logits of n images, and labels that agree with so many of their predictions"
    logits = np.random.default_rng(seed).normal(0, 2, (n, classes))
    return logits, (logits.argmax(1) + (np.arange(n) >= right)) % classes


FITS = {"nll": cal.fit_temperature, "ece": cal.fit_temperature_ece}
NO_FIT = {"perfect": (5000, 5000, "0 of 5,000 predictions are wrong"), "none right": (500, 0, "0 of 500 .* are right"),
          "nine wrong": (500, 491, "9 of 500 .* are wrong"), "nine right": (500, 9, "9 of 500 .* are right"),
          "few images": (99, 50, "99 images"), "one image": (1, 1, "1 images are fewer")}

@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
@pytest.mark.parametrize("n, right, words", NO_FIT.values(), ids=NO_FIT)
def test_too_little_to_fit_a_temperature(fit, n, right, words):
    "T = 1, one line of warning from where the fit was asked for, and the reason for whoever asks."
    logits, labels = some_right(n, right)
    with pytest.warns(cal.NoTemperature, match=words) as caught: assert fit(logits, labels) == 1
    assert len(caught) == 1 and caught[0].filename == __file__
    assert "\n" not in str(caught[0].message) and "(T = 1)" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        T, reason = cal.temperature_and_reason(logits, labels, fit)
    assert T == 1 and reason == caught[0].message.args[0]


def test_a_fit_that_meets_a_bound_is_none():
    logits, labels = some_right(1000, 10)  # nearly always wrong: the hotter the better
    for fit in FITS.values():
        with pytest.warns(cal.NoTemperature, match="T = 1000, a bound"): assert fit(logits, labels) == 1
    logits, labels = some_right(1000, 900)
    with pytest.warns(cal.NoTemperature, match="T = 0.001, a bound"):
        assert cal.fit_temperature(1e-5 * logits, labels) == 1


def test_what_is_just_enough_is_fitted():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fit in FITS.values():
            T, reason = cal.temperature_and_reason(*some_right(100, 90), fit)
            assert not reason and T == fit(*some_right(100, 90)) != 1


def test_no_temperature_survives_what_warnings_go_through():
    import pickle
    warning = pickle.loads(pickle.dumps(cal.NoTemperature("12 images")))
    assert str(warning) == "no temperature is applied (T = 1): 12 images" and warning.args == ("12 images",)


def test_float32_search_and_float64_end_equal_a_search_in_float64():
    for seed, scale in enumerate([1e-3, 0.1, 1, 30, 1e4]):
        rng = np.random.default_rng(seed)
        logits = rng.normal(0, 2, (3000, 20))
        labels = (rng.random((3000, 1)) < cal.softmax(logits).cumsum(1)).argmax(1)
        logits = scale * logits + rng.normal(0, 100, (3000, 1))
        below = logits - logits.max(1, keepdims=True)
        own = below[np.arange(3000), labels]
        exact = 1 / cal.newton(lambda beta, b=below, o=own: cal.nll_slope(beta, b, o), 1.0, 1e-13)
        assert cal.nll_temperature(logits, labels) == pytest.approx(exact, rel=1e-9)


def test_fit_temperature_ends_on_awkward_logits(recwarn):
    rng = np.random.default_rng(0)
    for _ in range(150):
        n, classes = rng.integers(1, 30), rng.integers(1, 6)
        logits = rng.normal(size=(n, classes)) * 10 ** rng.uniform(-4, 4, (n, 1))
        labels = rng.integers(classes, size=n)
        T = cal.nll_temperature(logits, labels)
        assert 1e-3 <= T <= 1e3
        others = [loop_nll(logits, labels, t) for t in np.geomspace(1e-3, 1e3, 61)]
        assert loop_nll(logits, labels, T) <= min(others) * (1 + 1e-9) + 1e-12
    masked = np.where(np.arange(5) < 2, np.finfo(np.float32).min, rng.normal(size=(200, 5)))
    labels = rng.integers(2, 5, size=200)
    for scale in (1, 3):
        plain = masked[:, 2:] * scale + 2 * (np.arange(3) == labels[:, None] - 2)
        hidden = np.concatenate([masked[:, :2], plain], 1)
        assert cal.fit_temperature(hidden, labels) == pytest.approx(cal.fit_temperature(plain, labels - 2))
    assert cal.nll_temperature(np.ones((4, 3)), np.array([0, 1, 2, 0])) == 1


def loop_ece_at(logits, labels, temperature, n_bins=10):
    "ECE at a temperature, row by row in Python floats."
    rows = [[math.exp((z - max(row)) / temperature) for z in row] for row in logits]
    return loop_ece([[e / sum(row) for e in row] for row in rows], labels, n_bins)


@pytest.mark.parametrize("seed, scale, n_bins", [(0, 1, 10), (1, 0.1, 10), (2, 8, 15), (3, 40, 1)])
def test_fit_temperature_ece_is_as_good_as_a_grid(seed, scale, n_bins):
    "The best of the whole grid of a power of ten in ten, and better than what surrounds it."
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (200, 5))
    labels = (rng.random((200, 1)) < cal.softmax(logits).cumsum(1)).argmax(1)
    logits *= scale
    T = cal.fit_temperature_ece(logits, labels, n_bins)
    assert type(T) is float and T == cal.fit_temperature_ece(logits, labels, n_bins)
    found = loop_ece_at(logits.tolist(), labels.tolist(), T, n_bins)
    assert found == pytest.approx(cal.ece(cal.softmax(logits / T), labels, n_bins), abs=1e-12)
    for t in [*10 ** (np.arange(-30, 31) / 10), *T * 10 ** (np.arange(-9, 10) / 1e5)]:
        assert found <= loop_ece_at(logits.tolist(), labels.tolist(), t, n_bins) + 1e-4 * (abs(t / T - 1) < 1e-3)
    nearest = 10 ** (round(10 * math.log10(T)) / 10)
    assert found <= loop_ece_at(logits.tolist(), labels.tolist(), nearest, n_bins) + 1e-12


def test_fit_temperature_ece_finds_the_truth_and_ignores_offsets():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (20_000, 5))
    labels = (rng.random((20_000, 1)) < cal.softmax(logits).cumsum(1)).argmax(1)
    T = cal.fit_temperature_ece(3 * logits, labels)
    assert T == pytest.approx(3, rel=0.05)
    assert cal.fit_temperature_ece(3 * logits + np.round(rng.normal(0, 9, (20_000, 1))), labels) == pytest.approx(T)
    assert cal.ece(cal.softmax(3 * logits / T), labels) <= cal.ece(cal.softmax(logits), labels) + 1e-3


def test_ece_temperature_at_its_bounds():
    two, diagonal = np.array([[3.0, 0.0], [0.0, 2.0]]), np.eye(2)
    assert cal.ece_temperature(two, np.array([1, 0])) == cal.T_MAX  # always wrong: the less confident the better
    assert cal.ece_temperature(1e-4 * diagonal, np.array([0, 1])) == cal.T_MIN  # right by a hair
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cal.ece_temperature(np.ones((4, 3)), np.array([0, 1, 2, 0])) == 1  # makes no difference
        T = cal.ece_temperature(two, np.array([0, 1]))  # an ECE of 0 wherever confidence rounds to 1
        assert 0.001 < T < 0.1 and cal.ece(cal.softmax(two / T), [0, 1]) == 0
        assert 0 < cal.ece_temperature(np.array([[1e300, -1e300], [0.0, 1.0]]), np.array([0, 1])) < 0.1


# --- bootstrap

QUICK = [metric for metric in cal.METRICS.values() if metric.per_image]

@pytest.mark.parametrize("metric", [*QUICK, *(metric.function for metric in QUICK)])
@pytest.mark.parametrize("classes", [2, 7, 101])
def test_fast_bootstrap_equals_the_generic_one(metric, classes):
    probs, labels = predictions(251, classes)
    probs[:20, :] = np.eye(classes)[labels[:20]]  # ties, and confidences of exactly 1
    fast = cal.bootstrap_values(metric, probs, labels, n=40, seed=3)
    generic = cal.bootstrap_values(lambda p, y: metric(p, y), probs, labels, n=40, seed=3)
    rows = np.random.default_rng(3).integers(251, size=251)
    assert np.allclose(fast, generic, atol=1e-12, rtol=0) and len(set(fast)) > 10
    assert fast[0] == pytest.approx(metric(probs[rows], labels[rows]))
    counts, both = cal.resample_counts(251, 40, 3), (metric, lambda p, y: metric(p, y))
    assert np.allclose([cal.resampled(f, probs, labels, counts) for f in both], generic, atol=1e-12, rtol=0)
    intervals = [cal.bootstrap(f, probs, labels, 40, 3) for f in both]
    assert intervals[0] == pytest.approx(intervals[1], abs=1e-12)


def test_one_column_means_and_other_forms_of_per_image_values():
    "a metric's own per-image values: of shape (N,), of several columns, or with options"
    probs, labels = predictions(80, 4)
    def share(p, y, top=2): return (np.argsort(p, 1)[:, -top:] == y[:, None]).any(1).mean()
    def hits(p, y, top=2): return (np.argsort(p, 1)[:, -top:] == y[:, None]).any(1)
    def spread(p, y): return float(p.max(1).std())
    quick = cal.Metric("top", "top-2", share, True, per_image=hits)
    wide = cal.Metric("spread", "spread", spread, None, per_image=lambda p, y: np.stack([p.max(1), p.max(1)**2], 1),
                      finish=lambda means: np.sqrt(means[..., 1] - means[..., 0]**2))
    for fast, slow in [(quick, share), (partial(quick, top=3), partial(share, top=3)), (wide, spread)]:
        values = [cal.bootstrap_values(f, probs, labels, 30) for f in (fast, lambda p, y: slow(p, y))]
        assert np.allclose(*values, atol=1e-9) and len(set(values[0])) > 5


def test_bootstrap_takes_any_callable():
    probs, labels = predictions(100, 3)

    class Unhashable:
        __hash__ = None
        def __call__(self, p, y): return cal.ece(p, y, n_bins=7)

    expected = cal.bootstrap(lambda p, y: cal.ece(p, y, n_bins=7), probs, labels, 30)
    assert cal.bootstrap(Unhashable(), probs, labels, 30) == expected
    assert cal.bootstrap(partial(cal.ece, n_bins=7), probs, labels, 30) == pytest.approx(expected, abs=1e-12)
    by_nine = cal.bootstrap(lambda p, y: cal.batched_ece(p, y, 9), probs, labels, 30)
    assert cal.bootstrap(cal.METRICS["batched_ece"].for_batches(9), probs, labels, 30) == by_nine
    assert expected != cal.bootstrap(cal.ece, probs, labels, 30)
    low, high = cal.bootstrap(cal.classwise_ece, probs, labels, 30)
    assert 0 < low < high
    only = cal.bootstrap_values(cal.accuracy, probs, labels, n=1)[0]
    assert cal.bootstrap(cal.accuracy, probs, labels, n=1) == (only, only)


def test_bootstrap_is_seeded_and_leaves_the_global_generator_alone():
    probs, labels = predictions(400, 3)
    state = np.random.get_state()[1].tolist()
    first = cal.bootstrap(cal.nll, probs, labels, seed=5)
    assert first == cal.bootstrap(cal.nll, probs, labels, seed=5) != cal.bootstrap(cal.nll, probs, labels, seed=6)
    assert np.random.get_state()[1].tolist() == state
    assert first[0] < cal.nll(probs, labels) < first[1]


def test_interval_is_the_middle_95_percent():
    values = np.random.default_rng(0).permutation(1000)
    assert cal.percentile_interval(values) == (25, 974)
    probs, labels = predictions(400, 3)
    assert all(np.isnan(cal.percentile_interval([*range(100), math.nan])))
    values = cal.bootstrap_values(cal.brier_score, probs, labels)
    assert cal.bootstrap(cal.brier_score, probs, labels) == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=1e-3)


def test_bootstrap_interval_of_the_accuracy_covers_the_truth():
    rng, truth, n, covered = np.random.default_rng(0), 0.7, 300, 0
    for trial in range(300):
        probs, labels = np.tile([0.8, 0.2], (n, 1)), (rng.random(n) > truth).astype(int)
        low, high = cal.bootstrap(cal.accuracy, probs, labels, n=200, seed=trial)
        covered += low <= truth <= high
    assert 0.91 <= covered / 300 <= 0.98


# --- what is accepted and what is refused

@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float64, 1e-14), (torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("classes", [2, 3, 1000])
def test_tensors_of_any_float_type(dtype, tolerance, classes):
    logits = torch.randn(200, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    labels = logits.argmax(1).where(torch.arange(200) < 120, torch.arange(200) % classes)
    probs = logits.softmax(1).to(dtype).requires_grad_()
    for name in ("accuracy", "nll", "brier", "confidence"):
        exact = cal.METRICS[name](logits.softmax(1).numpy(), labels.numpy())
        if name != "nll" or dtype != torch.float16 or classes < 1000:  # float16 underflows
            room = max(tolerance, tolerance * exact) + (name == "accuracy") * 0.02
            assert cal.METRICS[name](probs, labels) == pytest.approx(exact, abs=room)
    as_read = probs.detach().double().numpy()
    for metric in (cal.ece, cal.adaptive_ece, cal.classwise_ece):
        assert metric(probs, labels) == metric(as_read, labels.numpy()) == metric(as_read.tolist(), labels.tolist())
    T = cal.fit_temperature(logits, labels)
    assert cal.fit_temperature(logits.to(dtype).requires_grad_(), labels) == pytest.approx(T, rel=20 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_softmax_of_equal_logits_passes_for_any_number_of_classes(dtype):
    for classes in range(2, 1200, 7):  # every entry is rounded the same way: the worst case for the sum of a row
        assert cal.accuracy(torch.full((2, classes), 1 / classes).to(dtype), [0, 1]) == 0.5


def test_layouts_and_label_types():
    probs, labels = predictions(60, 4)
    expected = cal.ece(probs, labels)
    turned = torch.as_tensor(probs).T.contiguous().T
    for same in (np.asfortranarray(probs), np.repeat(probs, 2, 0)[::2], turned, probs.tolist()):
        assert cal.ece(same, labels) == expected
    for kind in ("uint8", "int16", "int32", "uint64"):
        assert cal.ece(probs, labels.astype(kind)) == expected
    assert cal.ece(probs, torch.as_tensor(labels).to(torch.int32)) == expected
    assert cal.accuracy(np.eye(3, dtype=int), [0, 1, 2]) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_tensors_on_a_gpu():
    probs, labels = (torch.as_tensor(array) for array in predictions())
    assert cal.ece(probs.cuda().requires_grad_(), labels.cuda()) == cal.ece(probs, labels)
    for fit in (cal.fit_temperature, cal.fit_temperature_ece):
        assert fit(probs.log().cuda(), labels.cuda()) == fit(probs.log(), labels)


def test_inputs_are_not_written_to():
    probs, labels = predictions(50, 3)
    logits = np.log(probs)
    copies = [array.copy() for array in (probs, labels, logits)]
    for array in (probs, labels, logits): array.flags.writeable = False
    for metric in WHOLE.values(): metric(probs, labels); cal.bootstrap(metric, probs, labels, 3)
    cal.batched_ece(probs, labels, 7), cal.fit_temperature(logits, labels), cal.softmax(logits)
    cal.fit_temperature_ece(logits, labels)
    assert all(np.array_equal(a, b) for a, b in zip((probs, labels, logits), copies))


PROBS, LABELS = predictions(20, 4)
LOGITS = np.random.default_rng(0).normal(0, 3, (20, 4))

def changed(array, index, value):
    array = np.array(array, dtype=float); array[index] = value
    return array

BAD_LABELS = {
    "short": LABELS[:-1], "long": [*LABELS, 0], "column": LABELS[:, None], "one-hot": np.eye(4)[LABELS], "scalar": 1,
    "too large": [4, *LABELS[1:]], "negative": [-1, *LABELS[1:]], "ignored": [-100, *LABELS[1:]],
    "float": LABELS.astype(float), "half": LABELS + 0.5, "NaN": LABELS * np.nan, "bool": LABELS > 1,
    "text": LABELS.astype(str), "none": None}
BAD_MATRICES = {
    "NaN": changed(PROBS, (3, 2), np.nan), "inf": changed(PROBS, (3, 2), np.inf),
    "-inf": changed(PROBS, (3, 2), -np.inf),
    "all NaN": PROBS * np.nan, "vector": PROBS[:, 0], "cube": PROBS[None], "no samples": PROBS[:0],
    "no classes": PROBS[:, :0], "ragged": [[0.5, 0.5], [1.0]],
    "text": PROBS.astype(str), "complex": PROBS + 0j, "bool": PROBS > 0.5, "none": None}
BAD_PROBS = {
    "logits": LOGITS, "positive logits": abs(LOGITS), "log-probabilities": np.log(PROBS),
    "one logit row": np.concatenate([PROBS[:-1], LOGITS[-1:]]), "per cent": 100 * PROBS,
    "negative entry": np.concatenate([PROBS[:-1], [[1.2, -0.2, 0, 0]]]), "sigmoids": 1 / (1 + np.exp(-LOGITS)),
    "subset of columns": PROBS[:, :3], "zeros": 0 * PROBS, "off by 2 %": PROBS * 1.02}
METRICS = {**WHOLE, "batched_ece": partial(cal.batched_ece, batch_size=4),
           "reliability_diagram": cal.reliability_diagram, "bootstrap": partial(cal.bootstrap, cal.ece, n=3),
           "quick bootstrap": partial(cal.bootstrap, cal.adaptive_ece, n=3),
           "generic bootstrap": partial(cal.bootstrap, lambda p, y: 0.5, n=3)}


def refuses(call, *arguments, **options):
    with pytest.raises(UserError) as caught: call(*arguments, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
    return str(caught.value)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_metrics_refuse_what_is_no_prediction(metric):
    for name, probs in {**BAD_MATRICES, **BAD_PROBS}.items():
        labels = np.minimum(LABELS, 2) if name == "subset of columns" else LABELS
        if name in ("no samples", "ragged"): labels = LABELS[:len(probs)]
        refuses(metric, probs, labels)
    for labels in BAD_LABELS.values(): refuses(metric, PROBS, labels)
    refuses(metric, LABELS, PROBS)
    refuses(metric, torch.as_tensor(LOGITS, dtype=torch.bfloat16), torch.as_tensor(LABELS))


@pytest.mark.parametrize("fit", [cal.fit_temperature, cal.fit_temperature_ece])
def test_temperatures_and_softmax_refuse_what_is_no_logit(fit):
    for name, logits in BAD_MATRICES.items():
        refuses(fit, logits, LABELS[:len(logits)] if name in ("no samples", "ragged") else LABELS)
        refuses(cal.softmax, logits)
    for labels in BAD_LABELS.values(): refuses(fit, LOGITS, labels)


@pytest.mark.parametrize("count", [0, -3, 2.5, 10.0, True, "10", None, math.nan])
def test_counts_must_be_whole_and_positive(count):
    for metric in (cal.ece, cal.adaptive_ece, cal.classwise_ece, cal.reliability_diagram):
        assert "n_bins" in refuses(metric, PROBS, LABELS, n_bins=count)
    assert "batch_size" in refuses(cal.batched_ece, PROBS, LABELS, batch_size=count)
    assert "n_bins" in refuses(cal.batched_ece, PROBS, LABELS, 4, n_bins=count)
    assert "n must" in refuses(cal.bootstrap, cal.ece, PROBS, LABELS, n=count)
    assert "n_bins" in refuses(cal.fit_temperature_ece, LOGITS, LABELS, n_bins=count)


def test_messages_name_the_row_and_the_remedy():
    assert "row 19" in refuses(cal.ece, BAD_PROBS["one logit row"], LABELS)
    assert "softmax" in refuses(cal.ece, LOGITS, LABELS)
    assert "label 4 in row 0" in refuses(cal.ece, PROBS, BAD_LABELS["too large"])
    assert "row 3" in refuses(cal.ece, BAD_MATRICES["NaN"], LABELS)


# --- reliability diagram

def test_reliability_diagram_draws_what_ece_sums():
    from matplotlib.figure import Figure
    probs, labels = predictions(500, 6)
    ax = Figure().add_subplot()
    assert cal.reliability_diagram(probs, labels, n_bins=8, ax=ax) is ax
    bars, *gaps = ax.containers
    confidences, correct = cal.top_label(probs, labels)
    bins = np.minimum((confidences * 8).astype(int), 7)
    assert [bar.get_height() for bar in bars] == pytest.approx([correct[bins == b].mean() for b in np.unique(bins)])
    strip = ax.child_axes[0].containers[0]
    share = {round(bar.get_x() * 8): bar.get_height() for bar in strip}
    assert sum(share.values()) == pytest.approx(1)
    drawn = [(round(bar.get_x() * 8), abs(bar.get_height())) for container in gaps for bar in container]
    assert sorted(b for b, _ in drawn) == np.unique(bins).tolist()
    assert sum(share[b] * height for b, height in drawn) == pytest.approx(cal.ece(probs, labels, 8))
    words = ax.texts[0].get_text()
    assert f"ECE {cal.ece(probs, labels, 8):.3f}" in words and f"{cal.accuracy(probs, labels):.1%}" in words


def test_reliability_diagram_with_empty_bins_leaves_pyplot_alone():
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure
    figures = plt.get_fignums()
    for confidences in ([1.0], [0.5, 1.0], [0.51, 0.52, 0.97]):
        figure = Figure(figsize=(2, 2), layout="constrained")
        ax = cal.reliability_diagram(two_class(confidences), [0] * len(confidences), ax=figure.add_subplot())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            figure.draw_without_rendering()
        assert len(ax.containers[0]) == len({min(int(c * 10), 9) for c in confidences})
    assert plt.get_fignums() == figures
    new = cal.reliability_diagram(PROBS, LABELS)
    assert plt.get_fignums() != figures
    plt.close(new.figure)
