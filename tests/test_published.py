"""Results on ImageNet beside the published figures: which are compared, and the verdict on means."""
import math
from pathlib import Path

import pandas as pd
import pytest

from carot.analysis.published import beside_published, compare_means, incomparable, published_figures
from carot.analysis.tables import AVERAGE, COLUMNS
from carot.data import benchmark_spec
from carot.methods.base import find_method
from carot.runs.records import RunFiles

IMAGENET = benchmark_spec("imagenet")
IMAGES = dict(IMAGENET.counts)
SHIFTS = list(IMAGES)[2:]


def results(off=0.0, method="carot", seeds=(1,), without=(), images=IMAGES, **settings):
    "runs whose figures are the paper's plus a constant"
    rows, runs = [], []
    for seed in seeds:
        name = f"{method}/seed={seed}"
        parameters = {"model": "ViT-B-16", "pretrained": "openai", "eval_batch_size": 512} | settings
        runs.append(RunFiles(Path(name), find_method(method), "", seed, "complete", {"parameters": parameters}))
        for metric in ("accuracy", "batched_ece"):
            paper = published_figures(IMAGENET, metric).query("source == 'paper' and method == @method").iloc[0]
            rows += [(method, "", seed, name, set_name, set_name == "ImageNet", images[set_name], metric,
                      paper[set_name] + off + 0.001 * seed - 0.001)
                     for set_name in ["ImageNet", *SHIFTS] if set_name not in without]
    return runs, pd.DataFrame(rows, columns=COLUMNS)


@pytest.mark.parametrize("metric, tolerance", [("accuracy", 0.006), ("batched_ece", 0.016)])
def test_the_tolerance_is_of_the_mean_over_shifts(metric, tolerance):
    for off, inside in [(0, True), (tolerance - 1e-4, True), (-tolerance + 1e-4, True), (tolerance + 1e-4, False),
                        (-tolerance - 1e-4, False)]:
        assert ("**outside**" not in compare_means(IMAGENET, *results(off), metric)) is inside, off
    runs, frame = results()
    frame.loc[(frame.set == "ImageNet"), "value"] += 0.2  # in distribution: not part of the mean
    frame.loc[frame.set == "ImageNetA", "value"] += 4.9 * tolerance  # one set, far off: the mean is what counts
    assert "inside" in compare_means(IMAGENET, runs, frame, metric)
    assert "outside" not in compare_means(IMAGENET, runs, frame, metric)
    frame.loc[frame.set == "ImageNetA", "value"] += 0.2 * tolerance
    assert "outside" in compare_means(IMAGENET, runs, frame, metric)


def test_verdict_by_hand():
    line = compare_means(IMAGENET, *results(0.003), "accuracy").splitlines()[2]
    assert [cell.strip() for cell in line.strip("| ").split("|")] == ["CaRot", "62.85", "62.55", "+0.30 points",
                                                                      "inside ±0.6 points"]
    line = compare_means(IMAGENET, *results(-0.02), "batched_ece").splitlines()[2]
    assert [cell.strip() for cell in line.strip("| ").split("|")] == ["CaRot", "0.0591", "0.0791", "-0.0200",
                                                                      "**outside** ±0.016"]


def test_unlike_is_not_compared():
    for settings, words in [({"model": "ViT-B-32"}, "these of ViT-B-32/openai"),
                            ({"pretrained": "laion2b_s34b_b88k"}, "these of ViT-B-16/laion2b"),
                            ({"pretrained": "random"}, "ViT-B-16/random"),
                            ({"without": ["ObjectNet"]}, "ObjectNet missing"),
                            ({"images": IMAGES | {"ObjectNet": 18_500}}, "ObjectNet has 18,500 images, not 18,574")]:
        for metric in ("accuracy", "batched_ece"):
            text = compare_means(IMAGENET, *results(**settings), metric)
            assert words in text and "inside" not in text and text.startswith("Not measured"), text
    small = results(eval_batch_size=256)
    assert "evaluation batch is 256, not 512" in compare_means(IMAGENET, *small, "batched_ece")
    assert "inside" in compare_means(IMAGENET, *small, "accuracy")
    assert incomparable(IMAGENET, *results(pretrained="/weights/ViT-B-16.pt"), "accuracy") == []
    with pytest.raises(ValueError, match="published metric"): compare_means(IMAGENET, *results(), "ece")


def test_rows_beside_each_other():
    runs, frame = results(0.01, seeds=(1, 2, 3))
    lines = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in beside_published(IMAGENET, frame, "accuracy").splitlines()]
    assert lines[0] == ["method", "source", "batch", "ImageNet", *SHIFTS, "Avg. shifts", "remark"]
    rows = {(row[0], row[1], row[2]): row[3:] for row in lines[2:]}
    assert rows["CaRot", "these runs", ""][0] == "84.2 ± 0.1" and rows["CaRot", "paper", "512"][0] == "83.1"
    assert rows["CaRot", "paper", "512"][-2] == "62.5"
    assert rows["zero-shot", "these runs", ""][0] == "not run" and rows["zero-shot", "paper", "512"][0] == "68.3"
    zero_shot = [cell for key, row in rows.items() if key[0] == "zero-shot" for cell in row]
    assert not any("82.9" in cell for cell in zero_shot)  # logged as zero-shot, but is not
    assert ("CaRot", "reproduction", "256") in rows and "doubtful" in rows["CaRot", "reproduction", "256"][-1]


def test_no_mean_over_other_sets():
    _, frame = results(without=["ObjectNet"])
    lines = beside_published(IMAGENET, frame, "accuracy").splitlines()
    mine = next(line for line in lines if "CaRot" in line and "these runs" in line)
    assert [cell.strip() for cell in mine.strip("|").split("|")][-3:] == ["–", "–", ""]
    paper = published_figures(IMAGENET, "accuracy").query("source == 'paper' and method == 'carot'")
    assert math.isclose(paper[AVERAGE].item(), 0.62546, abs_tol=1e-5)
