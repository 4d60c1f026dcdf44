"""Two and four processes on a CPU do what one does: same gradients, same run, each image predicted once."""
import copy
import csv

import pytest
import torch
from accelerate import debug_launcher
from small_runs import SETTINGS, Killed, same, settings_for, tiny_tokenizer, tune  # noqa: F401, a fixture
from test_large_batches import assert_same, gradients, make, plain, zero_grad

from carot import cli
from carot.core import UserError
from carot.engine.devices import make_accelerator
from carot.engine.large_batches import Cut, ProcessBatches, SingleProcess, backward_in_parts
from carot.evaluate import classifier, load_predictions, predict_sets
from carot.runs.records import open_run
from carot.runs.settings import resolve
from carot.train import FineTuned, fine_tune


def compare_gradients(tiny_clip, tokenizer, toy, cases):
    "In each process: its share of a batch, then the gradients of the whole one."
    accelerator = make_accelerator("cpu")
    for method, n, accumulation, micro in cases:
        objective, batch = make(tiny_clip, tokenizer, toy, method, n, label_smoothing=0.1)
        expected = plain(objective, batch)
        if accumulation > 1:
            zero_grad(objective)
            values = backward_in_parts(objective, SingleProcess(accelerator), batch, n, Cut(accumulation), 1)
            expected = values["loss"], gradients(objective)
        cut = Cut(accumulation, micro, accelerator.num_processes, accelerator.process_index)
        rows = next(iter(ProcessBatches([list(range(n))], cut)))
        zero_grad(objective)
        values = backward_in_parts(objective, accelerator, [x[rows] for x in batch], n, cut, 1)
        assert_same(expected, (values["loss"], gradients(objective)))
        assert method != "anchored" or list(values) == ["loss", "cross_entropy", "anchor"]  # "never" was never there


@pytest.mark.parametrize("processes", [2, 4])
def test_gradients_of_one_process(tiny_clip, tokenizer, toy, processes):
    "Also of a loss that looks at the labels of the whole batch, and of a mean over samples with several terms."
    cases = [("carot", 12, 1, None), ("carot", 13, 1, 2), ("carot", 3, 1, None), ("carot", 1, 1, 1),
             ("carot", 11, 3, 2), ("flyp", 13, 1, None), ("ft", 13, 1, 2), ("ft", 3, 1, None), ("lp", 9, 2, None),
             ("clusters", 11, 1, 2), ("clusters", 3, 1, None), ("anchored", 7, 1, 2), ("anchored", 3, 1, None)]
    debug_launcher(compare_gradients, (tiny_clip, tokenizer, toy, cases), num_processes=processes)


def tune_and_predict(clip, tokenizer, toy, out, settings, stop_after=None):
    def stop(epoch, trained):
        if epoch == stop_after: raise Killed
    try: trained = fine_tune(clip, tokenizer, toy, "carot", **settings, out=out, on_epoch=stop)
    except Killed: return
    predict_sets(classifier(trained, tokenizer, toy), toy, out=out, batch_size=3)


def losses(out):
    with (out/"train.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return [(int(row["step"]), float(row["loss"]), float(row["lr"])) for row in rows]


def test_a_run_of_two_processes_is_that_of_one(tiny_clip, tokenizer, toy, tmp_path):
    "40 images in batches of 19: the last batch has a pair for each process. Stopped, resumed, with micro-batches."
    settings = SETTINGS | {"batch_size": 19, "epochs": 2, "micro_batch_size": 4}
    one = tune(tiny_clip, tokenizer, toy, "carot", **settings | {"micro_batch_size": None}, out=tmp_path/"one")
    expected = predict_sets(classifier(one, tokenizer, toy), toy)
    arguments = [copy.deepcopy(tiny_clip), tokenizer, toy, tmp_path/"two", settings]
    debug_launcher(tune_and_predict, (*arguments, 1), num_processes=2)
    assert len(losses(tmp_path/"two")) == 3 and not (tmp_path/"two"/"predictions").exists()
    debug_launcher(tune_and_predict, tuple(arguments), num_processes=2)
    assert len(losses(tmp_path/"two")) == 6
    for a, b in zip(losses(tmp_path/"one"), losses(tmp_path/"two")): assert a == pytest.approx(b, rel=2e-3)
    found = load_predictions(tmp_path/"two")
    assert sorted(found) == sorted(expected)
    for name, p in expected.items():
        assert torch.equal(found[name].labels, p.labels) and torch.allclose(found[name].logits, p.logits, atol=0.1)


def tune_probe(clip, tokenizer, toy, out, settings):
    fine_tune(clip, tokenizer, toy, "lp", **settings, out=out)


def test_a_probe_of_two_processes_is_that_of_one(tiny_clip, tokenizer, toy, tmp_path):
    "Each computes the features of half of the 40 images and gets those of all; an uneven batch."
    settings = settings_for("lp", batch_size=13, epochs=2)
    tune(tiny_clip, tokenizer, toy, "lp", **settings, out=tmp_path/"one")
    debug_launcher(tune_probe, (copy.deepcopy(tiny_clip), tokenizer, toy, tmp_path/"two", settings), num_processes=2)
    assert len(losses(tmp_path/"two")) == 8
    for a, b in zip(losses(tmp_path/"one"), losses(tmp_path/"two")): assert a == pytest.approx(b, rel=1e-4)


def predict_shares(clip, tokenizer, toy, out):
    make_accelerator("cpu")
    predict_sets(classifier(FineTuned(clip), tokenizer, toy), toy, out=out, batch_size=2)


def test_each_image_is_predicted_once(tiny_clip, tokenizer, toy, tmp_path):
    "More processes than images in one of the sets."
    toy.val = torch.utils.data.Subset(toy.val, [0, 5, 11])
    expected = predict_sets(classifier(FineTuned(tiny_clip), tokenizer, toy), toy)
    debug_launcher(predict_shares, (tiny_clip, tokenizer, toy, tmp_path), num_processes=4)
    found = load_predictions(tmp_path)
    for name, p in expected.items():
        assert torch.equal(found[name].labels, p.labels) and len(p.labels) == len(toy.eval.get(name, toy.val))
        assert torch.allclose(found[name].logits, p.logits, atol=1e-5)


def stop_at_a_bad_loss(clip, tokenizer, toy):
    with pytest.raises(UserError, match="not finite"):
        fine_tune(clip, tokenizer, toy, "flyp", **settings_for("flyp", lr=1e8, warmup_steps=0, batch_size=40))


def test_all_processes_stop_at_a_bad_loss(tiny_clip, tokenizer, toy):
    debug_launcher(stop_at_a_bad_loss, (tiny_clip, tokenizer, toy), num_processes=2)


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    run = open_run(resolve({"out": str(tmp_path)}))
    assert not run.writes and not run.path.exists()
    run.finish()
    assert not run.path.exists()


def test_refused_under_a_launcher(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["reproduce"]) == 2 and "give single runs" in capsys.readouterr().err
    with pytest.raises(UserError, match="a device each"): make_accelerator("cuda:1", "fp32")


def test_trackers(tiny_clip, tokenizer, toy, tmp_path):
    pytest.importorskip("tensorboard")
    reported = tune(tiny_clip, tokenizer, toy, "flyp", report_to="tensorboard", out=tmp_path)
    assert list(tmp_path.rglob("events.out.tfevents*")) and len(losses(tmp_path)) == 9
    assert same(reported.student, tune(tiny_clip, tokenizer, toy, "flyp").student)


@pytest.mark.parametrize("change, words", [
    (dict(report_to="tensorbord"), "did you mean 'tensorboard'"), (dict(report_to="no_such"), "unknown report_to")])
def test_unknown_trackers(tiny_clip, tokenizer, toy, tmp_path, change, words):
    with pytest.raises(UserError, match=words): tune(tiny_clip, tokenizer, toy, "flyp", out=tmp_path, **change)


def test_a_missing_tracker_is_one_line(tiny_clip, tokenizer, toy, tmp_path, monkeypatch):
    monkeypatch.setattr("carot.engine.log.find_spec", lambda name: None)
    with pytest.raises(UserError, match="wandb is not installed; pip install wandb"):
        tune(tiny_clip, tokenizer, toy, "flyp", out=tmp_path, report_to="wandb")
