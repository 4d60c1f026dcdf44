"""Two and four processes on a CPU do what one does: same gradients, same run, each image predicted once."""
import copy
import csv

import pytest
import torch
from accelerate import debug_launcher

from carot import cli
from carot.runs import records
from carot.runs import settings
from carot.core import UserError
from carot.evaluate import classifier, predict_sets
from carot.engine.large_batches import Cut, ProcessBatches, backward_in_parts
from carot.train import FineTuned, fine_tune
from carot.engine.devices import make_accelerator
from test_large_batches import assert_same, make, plain
from test_train import SETTINGS, Killed, same, tokenizer, tune  # noqa: F401, the fixture


def compare_gradients(tiny_clip, tokenizer, cases):
    "In each process: its share of a batch, then the gradients of the whole one."
    accelerator = make_accelerator("cpu")
    for method, n, accumulation, micro in cases:
        torch.manual_seed(0)
        objective, batch, teacher = make(tiny_clip, tokenizer, method, n, label_smoothing=0.1)
        teacher = teacher if method == "carot" else None
        expected = plain(objective, batch, teacher)
        if accumulation > 1:
            objective.zero_grad()
            values = backward_in_parts(objective, Alone(accelerator), batch, n, teacher, Cut(accumulation))
            expected = values["loss"], {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
        cut = Cut(accumulation, micro, accelerator.num_processes, accelerator.process_index)
        rows = next(iter(ProcessBatches([list(range(n))], cut)))
        objective.zero_grad()
        values = backward_in_parts(objective, accelerator, [x[rows] for x in batch], n, teacher, cut)
        assert_same(expected, (values["loss"], {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}))


class Alone:
    "the same accelerator without its companions"
    num_processes = 1
    def __init__(self, accelerator): self.autocast, self.backward, self.reduce = accelerator.autocast, accelerator.backward, lambda x, _: x


@pytest.mark.parametrize("processes", [2, 4])
def test_gradients_of_one_process(tiny_clip, tokenizer, processes):
    cases = [("carot", 12, 1, None), ("carot", 13, 1, 2), ("carot", 3, 1, None), ("carot", 1, 1, 1), ("carot", 11, 3, 2),
             ("flyp", 13, 1, None), ("ft", 13, 1, 2), ("ft", 3, 1, None), ("lp", 9, 2, None)]
    debug_launcher(compare_gradients, (tiny_clip, tokenizer, cases), num_processes=processes)


def tune_and_predict(clip, tokenizer, toy, out, settings, stop_after=None):
    def stop(epoch, trained):
        if epoch == stop_after: raise Killed
    try: trained = fine_tune(clip, tokenizer, toy, "carot", **settings, out=out, on_epoch=stop)
    except Killed: return
    predict_sets(classifier(trained, tokenizer, toy), toy, out=out, batch_size=3)


def losses(out):
    with (out/"train.tsv").open() as file: return [(int(row["step"]), float(row["loss"]), float(row["lr"])) for row in csv.DictReader(file, delimiter="\t")]


def test_a_run_of_two_processes_is_that_of_one(tiny_clip, tokenizer, toy, tmp_path):
    "40 images in batches of 13: the last batch of an epoch has one image for two processes. Stopped, resumed, and with micro-batches."
    settings = SETTINGS | {"batch_size": 13, "epochs": 2, "micro_batch_size": 4}
    one = tune(tiny_clip, tokenizer, toy, "carot", **settings | {"micro_batch_size": None}, out=tmp_path/"one")
    expected = predict_sets(classifier(one, tokenizer, toy), toy)
    arguments = [copy.deepcopy(tiny_clip), tokenizer, toy, tmp_path/"two", settings]
    debug_launcher(tune_and_predict, (*arguments, 1), num_processes=2)
    assert len(losses(tmp_path/"two")) == 4 and not (tmp_path/"two"/"predictions").exists()
    debug_launcher(tune_and_predict, tuple(arguments), num_processes=2)
    assert len(losses(tmp_path/"two")) == 8
    for a, b in zip(losses(tmp_path/"one"), losses(tmp_path/"two")): assert a == pytest.approx(b, rel=2e-3)
    from carot.evaluate import load_predictions
    found = load_predictions(tmp_path/"two")
    assert sorted(found) == sorted(expected)
    for name, p in expected.items():
        assert torch.equal(found[name].labels, p.labels) and torch.allclose(found[name].logits, p.logits, atol=0.1)


def predict_shares(clip, tokenizer, toy, out):
    make_accelerator("cpu")
    predict_sets(classifier(FineTuned(clip), tokenizer, toy), toy, out=out, batch_size=2)


def test_each_image_is_predicted_once(tiny_clip, tokenizer, toy, tmp_path):
    "More processes than images in one of the sets."
    from carot.evaluate import load_predictions
    toy.val = torch.utils.data.Subset(toy.val, [0, 5, 11])
    expected = predict_sets(classifier(FineTuned(tiny_clip), tokenizer, toy), toy)
    debug_launcher(predict_shares, (tiny_clip, tokenizer, toy, tmp_path), num_processes=4)
    found = load_predictions(tmp_path)
    for name, p in expected.items():
        assert torch.equal(found[name].labels, p.labels) and torch.allclose(found[name].logits, p.logits, atol=1e-5) and len(p.labels) == len(toy.eval.get(name, toy.val))


def stop_at_a_bad_loss(clip, tokenizer, toy):
    with pytest.raises(UserError, match="not finite"):
        fine_tune(clip, tokenizer, toy, "flyp", **SETTINGS | {"lr": 1e8, "warmup_steps": 0, "batch_size": 40})


def test_all_processes_stop_at_a_bad_loss(tiny_clip, tokenizer, toy):
    debug_launcher(stop_at_a_bad_loss, (tiny_clip, tokenizer, toy), num_processes=2)


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1"); monkeypatch.setenv("WORLD_SIZE", "2")
    parameters, defaults = settings.resolve({"out": str(tmp_path)})
    run = records.open_run(parameters, defaults)
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


@pytest.mark.parametrize("change, words", [(dict(report_to="tensorbord"), "did you mean 'tensorboard'"), (dict(report_to="no_such"), "unknown report_to")])
def test_unknown_trackers(tiny_clip, tokenizer, toy, tmp_path, change, words):
    with pytest.raises(UserError, match=words): tune(tiny_clip, tokenizer, toy, "flyp", out=tmp_path, **change)


def test_a_missing_tracker_is_one_line(tiny_clip, tokenizer, toy, tmp_path, monkeypatch):
    monkeypatch.setattr("carot.train.find_spec", lambda name: None)
    with pytest.raises(UserError, match="wandb is not installed; pip install wandb"): tune(tiny_clip, tokenizer, toy, "flyp", out=tmp_path, report_to="wandb")
