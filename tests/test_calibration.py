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
def test_batched_ece_is_the_mean_over_batches(n, batch_size):
    probs, labels = predictions(n, 4)
    batches = [slice(i, i + batch_size) for i in range(0, n, batch_size)]
    errors = [loop_ece(probs[batch].tolist(), labels[batch].tolist(), 10) for batch in batches]
    assert len(errors) == math.ceil(n / batch_size)
    assert cal.batched_ece(probs, labels, batch_size) == pytest.approx(sum(errors) / len(errors), abs=1e-12)


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


def test_metrics_have_the_names_under_which_results_are_saved():
    assert " ".join(cal.METRICS) == "accuracy nll brier ece adaptive_ece classwise_ece confidence batched_ece"
    assert all(metric.name == name for name, metric in cal.METRICS.items())
    assert all(type(metric(*predictions())) is float for metric in WHOLE.values())
    with pytest.raises(TypeError, match="batch_size"): cal.METRICS["batched_ece"](*predictions())


@pytest.mark.parametrize("name, function", [
    ("accuracy", cal.accuracy), ("nll", cal.nll), ("brier", cal.brier_score), ("ece", cal.ece),
    ("adaptive_ece", cal.adaptive_ece), ("classwise_ece", cal.classwise_ece), ("confidence", cal.confidence),
    ("batched_ece", cal.batched_ece)])
def test_metrics_are_the_plain_functions(name, function):
    metric, options = cal.METRICS[name], {"batch_size": 32} if name == "batched_ece" else {}
    assert metric.function is function and metric(*predictions(), **options) == function(*predictions(), **options)
    assert metric.takes("batch_size") == (name == "batched_ece")


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
    margins = logits - logits[np.arange(400), labels][:, None]
    assert cal.nll_slope(1 / fitted, margins)[0] == pytest.approx(0, abs=1e-8 * scale)


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
def test_fit_temperature_stops_at_its_bounds_and_says_so(logits, labels, expected):
    with pytest.warns(UserWarning, match="bound"):
        assert cal.fit_temperature(logits, labels) == expected


def test_fit_temperature_ends_on_awkward_logits(recwarn):
    rng = np.random.default_rng(0)
    for _ in range(150):
        n, classes = rng.integers(1, 30), rng.integers(1, 6)
        logits = rng.normal(size=(n, classes)) * 10 ** rng.uniform(-4, 4, (n, 1))
        labels = rng.integers(classes, size=n)
        T = cal.fit_temperature(logits, labels)
        assert 1e-3 <= T <= 1e3
        others = [loop_nll(logits, labels, t) for t in np.geomspace(1e-3, 1e3, 61)]
        assert loop_nll(logits, labels, T) <= min(others) * (1 + 1e-9) + 1e-12
    masked = np.where(np.arange(5) < 2, np.finfo(np.float32).min, rng.normal(size=(200, 5)))
    labels = rng.integers(2, 5, size=200)
    assert cal.fit_temperature(masked, labels) == pytest.approx(cal.fit_temperature(masked[:, 2:], labels - 2))
    assert cal.fit_temperature(np.ones((4, 3)), [0, 1, 2, 0]) == 1


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
    assert cal.fit_temperature(probs.log().cuda(), labels.cuda()) == cal.fit_temperature(probs.log(), labels)


def test_inputs_are_not_written_to():
    probs, labels = predictions(50, 3)
    logits = np.log(probs)
    copies = [array.copy() for array in (probs, labels, logits)]
    for array in (probs, labels, logits): array.flags.writeable = False
    for metric in WHOLE.values(): metric(probs, labels); cal.bootstrap(metric, probs, labels, 3)
    cal.batched_ece(probs, labels, 7), cal.fit_temperature(logits, labels), cal.softmax(logits)
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


def test_fit_temperature_and_softmax_refuse_what_is_no_logit():
    for name, logits in BAD_MATRICES.items():
        refuses(cal.fit_temperature, logits, LABELS[:len(logits)] if name in ("no samples", "ragged") else LABELS)
        refuses(cal.softmax, logits)
    for labels in BAD_LABELS.values(): refuses(cal.fit_temperature, LOGITS, labels)


@pytest.mark.parametrize("count", [0, -3, 2.5, 10.0, True, "10", None, math.nan])
def test_counts_must_be_whole_and_positive(count):
    for metric in (cal.ece, cal.adaptive_ece, cal.classwise_ece, cal.reliability_diagram):
        assert "n_bins" in refuses(metric, PROBS, LABELS, n_bins=count)
    assert "batch_size" in refuses(cal.batched_ece, PROBS, LABELS, batch_size=count)
    assert "n_bins" in refuses(cal.batched_ece, PROBS, LABELS, 4, n_bins=count)
    assert "n must" in refuses(cal.bootstrap, cal.ece, PROBS, LABELS, n=count)


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
    assert f"ECE {cal.ece(probs, labels, 8):.1%}" in words and f"{cal.accuracy(probs, labels):.1%}" in words


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
