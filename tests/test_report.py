"The report from simulated run directories: arithmetic, what is left out, what is said, and the notebook end to end."
import json
import math
import re
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from shutil import rmtree

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from carot import commands
from carot.analysis import claims, figures, published, tables
from carot.calibration import METRICS, Metric
from carot.core import UserError, spell
from carot.data import benchmark_spec
from carot.evaluate import Predictions, metrics_table, save_predictions
from carot.methods.base import Method, all_methods, find_method, settings_of
from carot.runs import fingerprints, records, settings
from carot.runs.sweeps import metric_rows

METHODS = [name for name, method in all_methods().items() if method.usual]

SETS = {"Home": True, "Near": False, "Far": False, "val": True}


def defaults(method, seed=1):
    "all parameters of a run"
    found = asdict(settings_of(find_method(method), {}, {"seed": seed})[0]) | {"method": method}
    return found | ({"lr": 0.01 if method == "lp" else 1e-5} if "lr" in found else {})


def make_run(out, method, seed=1, values=None, complete=True, config=None, benchmark="toy", **asked):
    "a run directory; `values`: metric -> a number per set of SETS"
    setting = [f"{k}={spell(v)}" for k, v in sorted(asked.items())]
    path = Path(out)/benchmark/find_method(method).name/",".join([*setting, f"seed={seed}"])
    path.mkdir(parents=True)
    parameters = defaults(method, seed) | {"benchmark": benchmark} | asked
    trained = method != "zs"
    facts = {"parameters": parameters, "asked": asked, "complete": complete, "versions": {"torch": "2.0"}, "git": None,
             "hardware": "a machine", "steps": 30 * trained,
             "seconds": {"train": 6.0 * trained, "evaluate": 2.0, "total": 9.0},
             "pairs_per_second": 1000.0 if trained else None}
    (path/"config.json").write_text(json.dumps(facts | (config or {})))
    if complete and values:
        rows = [(name, id, 100, metric, value) for metric, numbers in values.items()
                for (name, id), value in zip(SETS.items(), numbers)]
        write_metrics(path, pd.DataFrame(rows, columns=["set", "id", "n", "metric", "value"]))
    return path


def write_metrics(path, frame): frame.to_csv(path/"metrics.tsv", sep="\t", index=False)


def numbers(home, near, far, error=0.1):
    return {"accuracy": (home, near, far, 0.99), "ece": (error, error, error, 0.99), "batched_ece": (error + 0.1,) * 4}


@pytest.fixture
def out(tmp_path):
    make_run(tmp_path, "zs", 1, numbers(0.5, 0.4, 0.3, 0.02))
    for seed, shift in enumerate((0.0, 0.03, 0.09), 1):
        make_run(tmp_path, "ft", seed, numbers(0.8, 0.6 + shift, 0.5, 0.2))
    for seed, home in enumerate((0.8, 0.8), 1): make_run(tmp_path, "carot", seed, numbers(home, 0.7, 0.5, 0.1))
    return tmp_path


# --- the numbers

def test_means_deviations_and_the_average_over_shifts(out):
    table = tables.table(tables.collect(out, "toy"), "accuracy")
    assert list(table["mean"]) == ["Home", "Near", "Far", tables.AVERAGE] and list(table.index) == METHODS
    near = [0.6, 0.63, 0.69]
    averages = [(value + 0.5) / 2 for value in near]
    assert table["mean"].loc["ft", "Near"] == pytest.approx(sum(near) / 3)
    assert table["std"].loc["ft", "Near"] == pytest.approx(statistics.stdev(near))
    assert table["mean"].loc["ft", tables.AVERAGE] == pytest.approx(sum(averages) / 3)
    spread = table["std"].loc["ft", tables.AVERAGE]
    assert spread == pytest.approx(statistics.stdev(averages))  # not the mean of the deviations
    assert spread != pytest.approx((statistics.stdev(near) + 0) / 2 + 0.01)
    assert table["mean"].loc["zs"].tolist() == pytest.approx([0.5, 0.4, 0.3, 0.35])
    assert table["std"].loc["zs"].isna().all() and table["runs"].loc["zs", "Home"] == 1
    assert table["runs"].loc["ft", "Home"] == 3
    assert table["mean"].loc[["lp", "lp-ft", "flyp"]].isna().all(axis=None)


def test_the_average_leaves_out_id_sets_and_validation(out):
    values = tables.per_run(tables.collect(out, "toy"), "accuracy")
    assert "val" not in values and values.loc["zs", tables.AVERAGE].item() == pytest.approx(0.35)


def test_no_average_over_other_sets(out):
    path = make_run(out, "flyp", 1, numbers(0.9, 0.9, 0.9))
    frame = pd.read_csv(path/"metrics.tsv", sep="\t")
    write_metrics(path, frame[frame.set != "Far"])
    table = tables.table(tables.collect(out, "toy"), "accuracy")["mean"].loc["flyp"]
    assert table["Near"] == 0.9 and math.isnan(table["Far"]) and math.isnan(table[tables.AVERAGE])
    assert text(out, "accuracy").loc["flyp", tables.AVERAGE] == "–"


def test_no_mean_over_a_part_of_the_seeds(out):
    frame = pd.read_csv(out/"toy"/"ft"/"seed=2"/"metrics.tsv", sep="\t")
    write_metrics(out/"toy"/"ft"/"seed=2", frame[frame.set != "Far"])
    table = tables.table(tables.collect(out, "toy"), "accuracy")
    assert table["mean"].loc["ft"].isna().tolist() == [False, False, True, True]
    assert table["runs"].loc["ft"].tolist() == [3, 3, 2, 2]


def test_only_id_sets(tmp_path):
    path = make_run(tmp_path, "zs", 1, numbers(0.5, 0.4, 0.3))
    frame = pd.read_csv(path/"metrics.tsv", sep="\t")
    write_metrics(path, frame[frame.id])
    results = tables.collect(tmp_path, "toy")
    assert list(tables.table(results, "accuracy")["mean"]) == ["Home"]
    assert len(figures.result_picture(results).axes) == 1


# --- what is bold

def text(out, metric): return tables.cells(tables.table(tables.collect(out, "toy"), metric), metric)


def test_bold(out):
    accuracy, ece = text(out, "accuracy"), text(out, "ece")
    assert accuracy.loc["zs"].tolist() == ["50.0", "40.0", "30.0", "35.0"]
    assert accuracy.loc["ft"].tolist() == ["**80.0** ± 0.0", "64.0 ± 4.6", "**50.0** ± 0.0", "57.0 ± 2.3"]
    assert accuracy.loc["carot"].tolist() == ["**80.0** ± 0.0", "**70.0** ± 0.0", "**50.0** ± 0.0", "**60.0** ± 0.0"]
    assert accuracy.loc["flyp"].tolist() == ["not run", "", "", ""]
    assert ece.loc["zs"].tolist() == ["**0.0200**"] * 4
    assert "**" not in "".join(ece.loc["ft"]) + "".join(ece.loc["carot"])


def test_what_looks_equal_is_equally_bold(out):
    make_run(out, "lp", 1, numbers(0.79951, 0.69949, 0, 0.02004))
    assert text(out, "accuracy").loc["lp"].tolist()[:2] == ["**80.0**", "69.9"]
    assert text(out, "ece").loc["lp", "Home"] == "**0.0200**" == text(out, "ece").loc["zs", "Home"]


def test_rounding_is_that_of_the_printed_number(tmp_path):
    for method, value in [("zs", 0.12345), ("lp", 0.12344999), ("ft", 0.8125)]:
        make_run(tmp_path, method, 1, numbers(value, value, value))
    shown = text(tmp_path, "accuracy")
    assert shown.loc["zs", "Home"] == f"{12.345:.1f}" == shown.loc["lp", "Home"]
    assert shown.loc["ft", "Home"] == f"**{81.25:.1f}**"


def test_one_method_alone_is_not_the_best(tmp_path):
    make_run(tmp_path, "zs", 1, numbers(0.5, 0.4, 0.3))
    assert "**" not in "".join(text(tmp_path, "accuracy").loc["zs"])


def test_leaders_are_the_bold_ones(out):
    results = tables.collect(out, "toy")
    assert tables.leaders(results, "accuracy") == "Highest: FT and CaRot on Home, Far; CaRot on Near, Avg. shifts."
    assert tables.leaders(results, "ece") == "Lowest: zero-shot on Home, Near, Far, Avg. shifts."


def test_unknown_metric(out):
    with pytest.raises(UserError, match="did you mean 'accuracy'"): tables.table(tables.collect(out, "toy"), "acuracy")


# --- which runs count

def test_unfinished_failed_and_damaged_runs_are_listed_but_not_used(out):
    make_run(out, "lp", 1, complete=False)
    make_run(out, "lp-ft", 1, complete=False).joinpath("run.failed.ipynb").write_text("{}")
    make_run(out, "flyp", 1)  # complete, but its metrics are gone
    (make_run(out, "flyp", 2, numbers(1, 1, 1))/"config.json").write_text('{"complete": tr')
    (out/"toy"/"flyp"/"seed=3").mkdir()
    some = pd.DataFrame([("Home", True, 1, "accuracy", 1.0)], columns=["set", "id", "n", "metric", "value"])
    write_metrics(make_run(out, "carot", 9, complete=False), some)
    states = {run.name: run.state for run in records.find_runs(out, "toy")}
    assert states["lp/seed=1"] == "unfinished" and states["lp-ft/seed=1"] == "failed"
    assert states["flyp/seed=1"] == "damaged: no metrics.tsv"
    assert states["flyp/seed=2"] == "damaged: config.json" and states["flyp/seed=3"] == "unfinished"
    assert states["carot/seed=9"] == "unfinished"
    results = tables.collect(out, "toy")
    assert set(results.run) == {"zs/seed=1", "ft/seed=1", "ft/seed=2", "ft/seed=3", "carot/seed=1", "carot/seed=2"}


def test_other_folders_are_not_runs(out):
    for name in ("report", "carot/notes", "carot/seed=1.bak", "carot/seed="): (out/"toy"/name).mkdir(parents=True)
    (out/"toy"/"carot"/"seed=7").write_text("a file")
    assert len(records.all_runs(out, "toy")) == 6


def test_report_order_and_seeds_as_numbers(tmp_path):
    for method in reversed(METHODS): make_run(tmp_path, method, 1, numbers(0.5, 0.4, 0.3))
    for seed in (10, 2): make_run(tmp_path, "ft", seed, numbers(0.5, 0.4, 0.3))
    found = records.find_runs(tmp_path, "toy")
    assert list(dict.fromkeys(run.method.name for run in found)) == ["zs", "lp", "ft", "lp-ft", "flyp", "carot"]
    assert [run.seed for run in found if run.method.name == "ft"] == [1, 2, 10]


def test_select(out):
    make_run(out, "carot", 1, numbers(0.1, 0.1, 0.1), distillation_coef=0.0)
    make_run(out, "ft", 1, numbers(0.2, 0.2, 0.2), epochs=3, lr=0.01)
    make_run(out, "lp", 1, numbers(0.3, 0.3, 0.3), epochs=3)  # whose default learning rate is 0.01
    def found(select): return {run.name for run in records.find_runs(out, "toy", select)}
    assert all(run.count("=") == 1 for run in found(""))
    assert found("distillation_coef=0") == {"carot/distillation_coef=0,seed=1", "zs/seed=1", "ft/seed=1", "ft/seed=2",
                                            "ft/seed=3"}
    both = {"zs/seed=1", "lp/epochs=3,seed=1", "ft/epochs=3,lr=0.01,seed=1"}
    assert found("epochs=3,lr=0.01") == both == found(" lr=0.01, epochs=3")
    assert found("epochs=3") == {"zs/seed=1", "lp/epochs=3,seed=1"}
    without = tables.collect(out, "toy", "distillation_coef=0")
    assert tables.table(without, "accuracy")["mean"].loc["carot", "Home"] == 0.1


@pytest.mark.parametrize("select", ["epochs=7", "seed=1"])
def test_no_such_setting(out, select):
    make_run(out, "ft", 1, numbers(0.2, 0.2, 0.2), lr=0.1)
    message = f"the setting {select!r} ('' = defaults); complete runs are at: '', 'lr=0.1'"
    with pytest.raises(UserError, match=re.escape(message)): records.find_runs(out, "toy", select)


def test_no_such_parameter(out):
    with pytest.raises(UserError, match="did you mean 'epochs'"): tables.collect(out, "toy", "epohcs=3")
    with pytest.raises(UserError, match="unknown parameter 'nonsense'"): tables.collect(out, "toy", "nonsense")


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="there are no runs in .*toy; make them with `carot reproduce`"):
        tables.collect(tmp_path, "toy")
    make_run(tmp_path, "carot", complete=False)
    with pytest.raises(UserError, match="complete runs are at: none"): tables.collect(tmp_path, "toy")


@pytest.mark.parametrize("content", ["", "set\tid\nx\tTrue\n", "set\tid\tn\tmetric\tvalue\nx\tTrue\t5\tece\tlow\n"])
def test_unreadable_metrics_stop_no_table(out, content, capsys):
    (out/"toy"/"ft"/"seed=1"/"metrics.tsv").write_text(content)
    others = {"zs/seed=1", "ft/seed=2", "ft/seed=3", "carot/seed=1", "carot/seed=2"}
    assert set(tables.collect(out, "toy").run) == others
    tables.tell_left_out(records.find_runs(out, "toy"))
    assert re.fullmatch(r"carot: warning: ft/seed=1 damaged: metrics.tsv.*\n", capsys.readouterr().err)
    with pytest.raises(UserError, match="cannot read .*metrics.tsv"): metric_rows(out/"toy"/"ft"/"seed=1")


def test_a_set_may_be_called_NA(tmp_path):
    rows = [("NA", True, 1, "accuracy", 0.5), ("None", False, 1, "accuracy", 0.25), ("val", True, 1, "accuracy", 1.0)]
    write_metrics(make_run(tmp_path, "zs"), pd.DataFrame(rows, columns=["set", "id", "n", "metric", "value"]))
    assert list(tables.table(tables.collect(tmp_path, "toy"), "accuracy")["mean"]) == ["NA", "None", tables.AVERAGE]


# --- one data set, one model

def recorded(images, weights="w", **sets):
    "what config.json says of data and weights"
    return {"data": {"classes": "c", "Home": {"images": images, "digest": f"{images}"}} | sets, "weights": weights}


def states(out): return {run.name: run.state for run in tables.comparable(records.find_runs(out, "toy"), "toy")}


def test_runs_of_other_data_or_weights_are_left_out_and_named(out, capsys):
    for seed in (3, 4, 5): make_run(out, "carot", seed, numbers(0.8, 0.7, 0.5), config=recorded(10))
    make_run(out, "flyp", 1, numbers(0.1, 0.1, 0.1), config=recorded(12))
    make_run(out, "flyp", 2, numbers(0.1, 0.1, 0.1), config=recorded(10, "other"))
    found = states(out)
    assert found["flyp/seed=1"] == "other data: Home has 10 images and had 12"
    assert found["flyp/seed=2"] == "other data: the model's weights are others"
    assert {state for name, state in found.items() if "flyp" not in name} == {"complete"}  # also those without record
    assert "flyp" not in set(tables.collect(out, "toy").method)
    tables.tell_left_out(tables.comparable(records.find_runs(out, "toy"), "toy"))
    assert capsys.readouterr().err.count("carot: warning: flyp/seed=") == 2


def test_data_that_a_setting_chooses_may_differ(out):
    zs = recorded(10, train={"images": 9, "digest": "all"})
    make_run(out, "zs", 2, numbers(0.5, 0.4, 0.3), config=zs)
    for seed in (3, 4):
        drawn = recorded(10, train={"images": 4, "digest": f"{seed}"})
        parameters = defaults("carot", seed) | {"benchmark": "toy", "shots": 2}
        make_run(out, "carot", seed, numbers(0.8, 0.7, 0.5), config=drawn | {"parameters": parameters})
    assert set(states(out).values()) == {"complete"}


def test_the_data_at_hand_decide(tmp_path):
    def record(method):
        run = settings.resolve({"benchmark": "plain_glyphs", "method": method})
        return {**fingerprints.data_and_weights(run), "parameters": run.parameters}
    def found(): return tables.comparable(records.find_runs(tmp_path, "plain_glyphs"), "plain_glyphs")
    old = record("carot")
    old["data"] = old["data"] | {"val": {"images": 1, "digest": "x"}}
    for seed in (1, 2): make_run(tmp_path, "carot", seed, numbers(0.8, 0.7, 0.5), config=old, benchmark="plain_glyphs")
    message = "no run on plain_glyphs is of the data and weights that are here: val has .* images and had 1;"
    with pytest.raises(UserError, match=message): found()
    make_run(tmp_path, "zs", 1, numbers(0.5, 0.4, 0.3), config=record("zs"), benchmark="plain_glyphs")
    assert [run.name for run in found() if run.state == "complete"] == ["zs/seed=1"]


# --- what is said about the runs

def test_differences_between_runs_of_one_setting(out):
    assert tables.differences(records.find_runs(out, "toy")) == []
    parameters = defaults("carot", 3) | {"benchmark": "toy"}
    make_run(out, "carot", 3, numbers(0.8, 0.7, 0.5),
             config={"parameters": parameters | {"epochs": 5, "workers": 1, "out": "elsewhere"}, "git": "abc"})
    make_run(out, "lp", 1, numbers(0.8, 0.7, 0.5), eval_batch_size=64)
    make_run(out, "flyp", 1, numbers(0.8, 0.7, 0.5),
             config={"parameters": parameters | {"eval_batch_size": 64, "method": "flyp", "seed": 1},
                     "versions": {"torch": "9"}})
    lines = tables.differences(records.find_runs(out, "toy"))
    assert [line.partition(":")[0] for line in lines] == ["carot's commit", "torch", "eval_batch_size", "epochs"]
    assert lines[1] == "torch: 2.0 in zs/seed=1, ft/seed=1, ft/seed=2 …; 9 in flyp/seed=1"
    assert "5 in carot/seed=3" in lines[3]
    assert tables.batch_sizes(records.find_runs(out, "toy")) == "64 or 512"


def test_cost_is_the_mean_over_runs(out):
    make_run(out, "carot", 3, numbers(0.8, 0.7, 0.5),
             config={"seconds": {"train": 12.0, "evaluate": 2.0, "total": 15.0}})
    cost = tables.cost_table(records.find_runs(out, "toy"))
    assert cost.loc["carot"].dropna().to_dict() == {"runs": 3, "steps": 30, "pairs per second": 1000, "train (s)": 8,
                                                    "evaluate (s)": 2, "total (s)": 11}
    assert list(cost.index) == ["zs", "ft", "carot"] and math.isnan(cost.loc["zs", "pairs per second"])


def test_settings_show_only_what_a_method_uses(out):
    table = tables.settings_table(records.find_runs(out, "toy")).set_index("parameter")
    assert table.loc["lr"].tolist() == ["–", "1e-05", "1e-05"]
    assert table.loc["distillation_coef"].tolist() == ["–", "0", "1.5"]
    assert table.loc["train_towers"].tolist() == ["–", "–", "both"]


def test_files_of_a_table(out, tmp_path):
    found, results = records.find_runs(out, "toy"), tables.collect(out, "toy")
    written = tables.write_table(tmp_path/"report"/"table2", found, results, "accuracy",
                                 title="Table 2: top-1 accuracy in %")
    assert (tmp_path/"report"/"table2.md").read_text() == written
    assert written.startswith("**Table 2: top-1 accuracy in %.** Benchmark toy, default settings.")
    lines = [line for line in written.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == "| method | runs | Home (ID) | Near | Far | Avg. shifts |".split()
    assert re.search(r"^\| FLYP +\| 0 +\| not run +\|", written, re.M)
    again = pd.read_csv(tmp_path/"report"/"table2.tsv", sep="\t", index_col="method")
    assert list(again)[:5] == ["Home", "Near", "Far", tables.AVERAGE, "Home std"]
    assert again.loc["ft", "Near"] == pytest.approx(0.64)
    assert [file.name for file in (tmp_path/"report").iterdir() if file.name.startswith(".")] == []


def test_diagrams_are_of_the_first_run_that_has_predictions(out):
    results = tables.collect(out, "toy")
    assert figures.reliability_grid(records.find_runs(out, "toy"), results) is None
    for name in ("carot/seed=1", "ft/seed=2", "ft/seed=3"):
        predictions = Predictions(torch.eye(3), torch.tensor([0, 1, 2]), True)
        for which in ("Home", "Far"): save_predictions(out/"toy"/name/"predictions"/f"{which}.safetensors", predictions)
    found = records.find_runs(out, "toy")
    assert [run.name for run in figures.with_predictions(found).values()] == ["ft/seed=2", "carot/seed=1"]
    axes = figures.reliability_grid(found, results).axes
    assert [ax.get_ylabel() for ax in axes[::3]] == ["FT\naccuracy", "CaRot\naccuracy"]
    assert not axes[1].axison  # no predictions on Near


def test_notes_are_found_without_loading_images():
    assert "Ten classes" in tables.spec_of("handwriting").note and tables.spec_of("/some/folder").note == ""


# --- the published figures

IMAGENET = benchmark_spec("imagenet")


def test_published_means():
    def means(metric):
        found = published.published_figures(IMAGENET, metric)
        return found[found.source == "paper"].set_index("method")[tables.AVERAGE]
    accuracy, ece = means("accuracy"), means("batched_ece")
    assert {k: round(100 * v + 1e-9, 2) for k, v in accuracy.items()} == {
        "carot": 62.55, "ft": 57.5, "lp-ft": 59.92, "flyp": 59.46, "lipsum-ft": 61.04, "zs": 58.4}
    assert {k: round(v, 4) for k, v in ece.items() if k != "zs"} == {
        "carot": 0.0791, "ft": 0.2186, "lp-ft": 0.1468, "flyp": 0.1831, "lipsum-ft": 0.0914}


def test_published_rows_are_labelled():
    rows = published.published_figures(IMAGENET, "accuracy")
    assert (rows.remark[rows.source == "paper"] == "as transcribed").all()
    logged = rows.set_index("method").loc["zs_as_logged"]
    assert "not zero-shot" in logged.remark and set(rows.source[rows.method == "zs"]) == {
        "paper", "open_clip", "tracer_table1_vitb16", "tracer_table2_vitb16"}
    for metric in ("accuracy", "batched_ece"):
        for line in published.published_table(IMAGENET, metric).splitlines():
            assert "**" not in line or line.startswith("| paper"), "only the paper's rows are compared with each other"
    with pytest.raises(UserError, match="accuracy, batched_ece"): published.published_figures(IMAGENET, "ece")


def test_published_best():
    line = next(line for line in published.published_table(IMAGENET, "batched_ece").splitlines() if "| carot" in line
                and "paper" in line)
    assert line.count("**") == 2 * 2 and "**0.0367**" in line
    assert "**0.0699**" in line  # V2 and Sketch; elsewhere others are lower


# --- where numbers come from, and other forms of the tables

def test_every_cell_names_its_runs(out):
    make_run(out, "flyp", 1, numbers(0.9, 0.9, 0.9)); make_run(out, "flyp", 2, numbers(0.9, 0.9, 0.9))
    file = out/"toy"/"flyp"/"seed=2"/"metrics.tsv"
    frame = pd.read_csv(file, sep="\t")
    write_metrics(file.parent, frame[frame.set != "Far"])
    results = tables.collect(out, "toy")
    made, means = tables.table_runs(results, "ece"), tables.table(results, "ece")["mean"]
    assert list(made) == list(means) and list(made.index) == list(means.index)
    assert made.loc["flyp"].tolist() == ["flyp/seed=1 flyp/seed=2"] * 2 + ["flyp/seed=1"] * 2
    assert set(made.loc["lp-ft"]) == {"not run"}
    page = tables.html_table(tables.collect(out, "toy"), "ece")
    assert page.count("<span title=") == len(METHODS) * 4 and '<span title="zs/seed=1"><b>0.0200</b></span>' in page


def test_latex_escapes_and_marks_the_best(out):
    columns = {"method": ["FT"] * 3, "a_b": ["**80.0** ± 0.1", "50 %", "–"]}
    text = tables.latex(pd.DataFrame(columns), "Table & co. In %.")
    for part in (r"a\_b", r"\textbf{80.0} $\pm$ 0.1", r"50 \%", "--", r"\caption{Table \& co. In \%.}"):
        assert part in text, part
    tables.write_table(out/"table2", records.find_runs(out, "toy"), tables.collect(out, "toy"), "accuracy")
    assert r"FT & 3 & \textbf{80.0} $\pm$ 0.0 & 64.0 $\pm$ 4.6 &" in (out/"table2.tex").read_text()


def test_coefficients_are_read_off_config(out):
    assert tables.coefficient_table(out, "toy").empty
    make_run(out, "carot", 1, numbers(0.6, 0.5, 0.4, 0.3), orthogonality_coef=0.0)
    make_run(out, "carot", 1, numbers(0.7, 0.6, 0.5, 0.2), distillation_coef=3.0)
    make_run(out, "carot", 1, numbers(0.1, 0.1, 0.1), distillation_coef=0.0, epochs=3)
    make_run(out, "carot", 1, complete=False, orthogonality_coef=0.0, distillation_coef=3.0)
    table = tables.coefficient_table(out, "toy").set_index(["OC", "SD"])
    assert list(table.index) == [("0", "1.5"), ("0", "3"), ("0.2", "1.5"), ("0.2", "3")]
    assert table.loc[("0", "1.5")].tolist() == ["60.0", "45.0", "0.3000", "0.3000", "carot/orthogonality_coef=0,seed=1"]
    assert table.loc[("0", "3")].tolist() == ["not run"] * 5
    assert table.loc[("0.2", "1.5"), "accuracy, shifts"] == "60.0 ± 0.0"
    assert table.loc[("0.2", "1.5"), "runs"] == "carot/seed=1 carot/seed=2"


def test_peak_memory_is_shown_where_it_was_recorded(out):
    make_run(out, "carot", 3, numbers(0.8, 0.7, 0.5), config={"peak_memory_mb": 900})
    shown = tables.cost_table(records.find_runs(out, "toy"))["peak memory (MB)"]
    assert shown["carot"] == 900 and math.isnan(shown["ft"])


# --- risk and coverage

def test_risk_and_coverage_by_hand():
    rng = np.random.default_rng(0)
    confidences, correct = rng.permutation(50) / 50, rng.random(50) < 0.7
    order = np.argsort(-confidences)
    assert np.allclose(figures.risk_coverage(confidences, correct),
                       [1 - correct[order][:k].mean() for k in range(1, 51)])
    shuffled = rng.permutation(50)
    assert np.allclose(figures.risk_coverage(np.round(confidences, 1), correct),
                       figures.risk_coverage(np.round(confidences, 1)[shuffled], correct[shuffled]))
    best, found, worst = (figures.risk_coverage(c, correct).mean() for c in (1.0 * correct, confidences, 1.0 - correct))
    assert best < found < worst


def test_what_was_logged_is_recomputed(tmp_path):
    run = records.read_run(full_run(tmp_path, "ft", 1, 1.5, 1.0))
    assert tables.recomputed(run) < 1e-12
    assert tables.recomputed(records.read_run(make_run(tmp_path, "carot", 1, numbers(0.8, 0.7, 0.6)))) is None
    frame = pd.read_csv(run.path/"metrics.tsv", sep="\t")
    frame.loc[(frame.set == "Far") & (frame.metric == "ece"), "value"] += 0.01
    write_metrics(run.path, frame)
    assert tables.recomputed(run) == pytest.approx(0.01)


# --- the notebook

def full_run(out, method, seed, skill, heat, n=100, classes=5, benchmark="toy"):
    "a run with predictions and a log, its metrics computed from them"
    path, rng = make_run(out, method, seed, benchmark=benchmark), np.random.default_rng(seed)
    predictions = {}
    for (name, id), hardness in zip(SETS.items(), (0, 0.5, 1, 0)):
        labels = np.arange(n) * classes // n
        logits = rng.normal(size=(n, classes)) + (skill - hardness) * np.eye(classes)[labels]
        predictions[name] = Predictions(torch.tensor(heat * logits, dtype=torch.float32), torch.tensor(labels), id)
        save_predictions(path/"predictions"/f"{name}.safetensors", predictions[name])
    write_metrics(path, metrics_table(predictions, 20))
    log = pd.DataFrame({"stage": "train", "step": np.arange(30) + 1, "loss": rng.random(30),
                        "contrastive": rng.random(30)})
    if method == "lp-ft": log = pd.concat([log.assign(stage="probe"), log])
    if method != "zs": log.to_csv(path/"train.tsv", sep="\t", index=False)
    return path


def outputs(file):
    "all that the cells of a notebook show, as one text"
    cells = nbformat.read(file, 4).cells
    return "\n".join(str(o.get("text", "")) + str(o.get("data", {}).get("text/markdown", ""))
                     for cell in cells for o in cell.get("outputs", []))


FILES = {"report.ipynb", "report.html", "cost.tsv", "results.tsv", "aurc.tsv", "differences.md", "differences.tsv",
         *(f"{table}{ending}" for table in ("table2", "table3", "table3_batched")
           for ending in (".md", ".tex", ".tsv", "_runs.tsv")),
         *(f"{figure}.{ending}" for figure in ("result", "scatter", "sets", "reliability", "risk_coverage", "training")
           for ending in ("png", "svg"))}


def test_the_notebook_end_to_end(tmp_path, monkeypatch, capsys, warm):
    monkeypatch.chdir(tmp_path)
    for i, method in enumerate(METHODS):
        if method != "flyp": full_run("logs", method, 1, 1.5 + 0.3 * i, 1 + 0.1 * i)
    full_run("logs", "carot", 2, 3.1, 1.2)
    make_run("logs", "flyp", complete=False)
    make_run("logs", "carot", 1, numbers(0, 0, 0), epochs=3)
    executed = commands.make_report(benchmark="toy", out="logs")
    folder = tmp_path/"logs"/"toy"/"report"
    assert {file.name for file in folder.iterdir()} == FILES and executed.resolve() == folder/"report.ipynb"
    printed = capsys.readouterr().out
    assert "Table 2" in printed and "Table 3" in printed and "not run" in printed
    shown = outputs(executed)
    for name in ("table2.md", "table3.md", "table3_batched.md"): assert (folder/name).read_text().strip() in shown, name
    page = (folder/"report.html").read_text()
    assert '<span title="carot/seed=1 carot/seed=2">' in page and "import pandas" not in page
    assert not re.search(r"(src|href)=.https?:", page)
    assert "against FT" in shown and "against FLYP" not in shown and "Not run: CaRot was trained with one pair" in shown
    assert "from the saved predictions of 6 runs differ from those logged by at most 0." in shown
    assert "Methods without a complete run: FLYP." in shown and "`epochs=3`" in shown and "| unfinished |" in shown
    assert "published figures" not in shown
    results = tables.collect("logs", "toy")
    assert np.allclose(pd.read_csv(folder/"results.tsv", sep="\t").value, results.value)
    assert len(results) == 6 * 4 * len(METRICS)
    assert "Error" not in shown and str(tmp_path) not in executed.read_text()
    assert all(50 < len(file.read_bytes()) < 300_000 for file in folder.glob("*.png"))


def test_the_notebook_without_predictions_beside_published_figures(tmp_path, monkeypatch):
    for method in ("zs", "carot"): make_run(tmp_path, method, 1, numbers(0.8, 0.7, 0.6), benchmark="imagenet")
    shown = in_this_process(monkeypatch, benchmark="imagenet", out=str(tmp_path))
    assert not (tmp_path/"imagenet"/"report"/"reliability.png").exists()
    assert "## Beside the published figures" in shown and "62.5" in shown
    assert "not zero-shot" in shown and "as transcribed" in shown


# --- what carot does not know

MODULE = """
from carot.calibration import Metric
from carot.config import TrainSettings
from carot.methods.base import Method

MINE = Method("mine", "Mine", "somebody's", TrainSettings, lambda start: iter(()), colour="#123456", marker="*",
              order=2.5)
def top2(probs, labels): return (probs.argsort(1)[:, -2:] == labels[:, None]).any(1).mean()

TOP2 = Metric("top2", "top-2 accuracy", top2, True, 100, 1, "points")
TAKEN = Metric("ece", "another", lambda p, y: 0.0, False)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path/"my_methods.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_methods"
    sys.modules.pop("my_methods", None)


def in_this_process(monkeypatch, **parameters):
    "execute the report notebook here, which is quicker; what it displays"
    shown = []
    def display(content, raw=False): shown.append(content["text/markdown"] if raw else content.data)
    monkeypatch.setattr("IPython.display.display", display)
    space = {}
    for cell in nbformat.read(settings.notebook_path("report"), 4).cells:
        if cell.cell_type == "code": exec(cell.source, space)
        if "parameters" in cell.metadata.get("tags", []): space |= parameters
    return "\n".join(shown)


def colours(figure): return {line.get_color() for ax in figure.axes for line in ax.lines}


def test_a_method_of_one_s_own_is_a_row_a_curve_and_a_marker(tmp_path, module):
    for method, skill in [("zs", 1.0), ("ft", 1.5), (f"{module}:MINE", 3.0)]:
        full_run(tmp_path/"out", method, 1, skill, 1.0)
    results, runs = tables.collect(tmp_path/"out", "toy"), records.find_runs(tmp_path/"out", "toy")
    text = tables.text_table(results, "accuracy")
    assert list(text.method) == ["zero-shot", "LP", "FT", "Mine", "LP-FT", "FLYP", "CaRot"]
    assert tables.leaders(results, "accuracy").startswith("Highest: Mine on")
    assert set(tables.table_runs(results, "ece").loc[f"{module}:MINE"]) == {"mine/seed=1"}
    assert list(tables.settings_table(runs)) == ["parameter", "zero-shot", "FT", "Mine"]
    curves = figures.risk_curves(runs, results)
    for figure in (figures.result_picture(results), figures.scatter_picture(results), figures.per_set_picture(results),
                   figures.risk_picture(curves), figures.training_curves(runs)): assert "#123456" in colours(figure)
    assert [ax.get_ylabel() for ax in figures.reliability_grid(runs, results).axes[::3]][-1] == "Mine\naccuracy"
    assert "| Mine " in claims.against_markdown(claims.against(runs, "ft", claims.Evidence(50)))


def test_a_method_that_is_gone_is_still_reported(tmp_path, module, monkeypatch):
    for method in ("zs", f"{module}:MINE"): full_run(tmp_path/"out", method, 1, 1.5, 1.0)
    (tmp_path/"my_methods.py").unlink()
    sys.modules.pop(module)
    results = tables.collect(tmp_path/"out", "toy")
    assert list(tables.text_table(results, "ece").method)[-1] == "mine"
    assert "#999999" in colours(figures.result_picture(results))


def test_methods_of_one_title_are_told_apart():
    one, other = (Method(name, "Same", "", reference=f"x:{name}") for name in ("a", "b"))
    assert tables.titles([one, other]) == {"x:a": "Same (x:a)", "x:b": "Same (x:b)"}


def test_a_metric_added_later_reaches_complete_runs(tmp_path, module, monkeypatch):
    for method in ("zs", "ft"): full_run(tmp_path/"out", method, 1, 1.5, 1.0)
    make_run(tmp_path/"out", "carot", 1, numbers(0.8, 0.7, 0.6))  # without predictions
    results = tables.collect(tmp_path/"out", "toy", metrics=f"{module}:TOP2")
    metric = sys.modules[module].TOP2
    saved = tables.read_predictions(tmp_path/"out"/"toy"/"ft"/"seed=1"/"predictions"/"Far.safetensors")
    found = results[(results.metric == "top2") & (results.run == "ft/seed=1")].set_index("set").value
    assert list(found.index) == list(SETS) and found["Far"] == metric(saved.probs, saved.labels.numpy()) > 0.5
    text = tables.cells(tables.table(results, metric), metric)
    assert set(text.loc["carot"]) == {"–"} and text.loc["lp", "Home"] == "not run"
    assert text.loc["ft", "Home"].strip("*") == metric.show(found["Home"])
    with pytest.raises(UserError, match="another name"):
        tables.collect(tmp_path/"out", "toy", metrics=f"{module}:TAKEN")
    shown = in_this_process(monkeypatch, benchmark="toy", out=str(tmp_path/"out"), metrics=f"{module}:TOP2",
                            methods="zs,ft")
    written = (tmp_path/"out"/"toy"/"report"/"top2.md").read_text()
    assert "**top-2 accuracy.**" in written and "highest in bold" in written and written.strip() in shown
    assert "CaRot" not in written


def test_a_metric_that_takes_the_batch_gets_that_of_the_run(tmp_path):
    run = full_run(tmp_path, "ft", 1, 1.5, 1.0)
    frame = pd.read_csv(run/"metrics.tsv", sep="\t")
    write_metrics(run, frame[frame.metric != "other"])
    metric = Metric("other", "other", lambda probs, labels, batch_size: float(batch_size), None)
    assert set(tables.collect(tmp_path, "toy", metrics=[metric]).query("metric == 'other'").value) == {512.0}


def test_the_report_shows_the_runs_it_is_asked_for(tmp_path, monkeypatch):
    for seed, keep in [(1, False), (2, False), (3, True)]:
        for method, skill in [("ft", 1.0), ("carot", 1.0 + seed)]:
            path = full_run(tmp_path, method, seed, skill, 1.0)
            if not keep: rmtree(path/"predictions")
    full_run(tmp_path, "flyp", 3, 1.2, 1.0)
    in_this_process(monkeypatch, benchmark="toy", out=str(tmp_path), seeds="3", methods="ft,carot")
    folder = tmp_path/"toy"/"report"
    table = pd.read_csv(folder/"table2.tsv", sep="\t", index_col="method")
    assert list(table.index) == ["ft", "carot"] and (table["Home runs"] == 1).all()
    frame = pd.read_csv(folder/"differences.tsv", sep="\t")
    rows = frame[frame.metric == "accuracy"].set_index(["method", "sets"]).effect
    assert rows["carot", "id"] == pytest.approx(table.Home["carot"] - table.Home["ft"])
    assert rows["carot", "shifts"] == pytest.approx(table[tables.AVERAGE]["carot"] - table[tables.AVERAGE]["ft"])
    assert set(pd.read_csv(folder/"results.tsv", sep="\t").run) == {"ft/seed=3", "carot/seed=3"}


def test_no_difference_of_other_runs_than_the_table_s(tmp_path):
    for method in ("ft", "flyp", "carot"):
        for seed in (1, 2):
            path = full_run(tmp_path, method, seed, 1.5, 1.0)
            if (method, seed) == ("carot", 1): rmtree(path/"predictions")
    full_run(tmp_path, "flyp", 3, 1.5, 1.0)
    runs, evidence = records.find_runs(tmp_path, "toy"), claims.Evidence(20)
    assert set(claims.against(runs, "ft", evidence).method) == {"flyp"}
    assert claims.against(runs, "carot", evidence).empty
    assert claims.not_compared(runs, ["ft"]) == ["Not compared, for want of predictions of carot/seed=1: CaRot.",
                                                 "FT and FLYP: flyp/seed=3 without a partner."]


def test_table_4_is_of_the_seeds_that_are_asked_for(out):
    make_run(out, "carot", 1, numbers(0.6, 0.5, 0.4, 0.3), orthogonality_coef=0.0)
    table = tables.coefficient_table(out, "toy", seeds=[1])
    assert table.runs.tolist() == ["carot/orthogonality_coef=0,seed=1", "carot/seed=1"]
    assert tables.coefficient_table(out, "toy", seeds=[2]).empty


def test_the_notebook_s_parameters():
    known = settings.notebook_parameters(settings.notebook_path("report"))
    assert list(known) == ["benchmark", "out", "select", "methods", "seeds", "metrics"]
    assert all(about.help and about.kind is str for about in known.values())
