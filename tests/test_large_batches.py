"""Cut batches have the gradients of the whole batch, in every method, precision and cut; naive accumulation has not."""
import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from carot.clip import build_clip, image_features, text_features
from carot.core import UserError
from carot.engine.large_batches import Cut, ProcessBatches, backward_in_parts, find_micro_batch, largest_that_fits, peak_memory
from carot.losses import contrastive_logits
from carot.runs.settings import resolve, run_name
from carot.train import ContrastiveObjective, HeadObjective, fine_tune, linear_head
from carot.engine.devices import make_accelerator
from test_clip import RESNET
from test_train import SETTINGS, same, tokenizer, tune  # noqa: F401, the fixture

COEFFICIENTS = {"flyp": dict(orthogonality_coef=0.0, cross_norm_coef=0.0, distillation_coef=0.0),
                "carot": dict(orthogonality_coef=0.2, cross_norm_coef=0.05, distillation_coef=1.5)}
CAPTIONS = ["a sun", "a photo of a sun", "something that is a small red sun"]

def make(tiny_clip, tokenizer, method, n, label_smoothing=0.0):
    "objective, batch and teacher in float64"
    clip, teacher = copy.deepcopy(tiny_clip).double(), copy.deepcopy(tiny_clip).double().requires_grad_(False)
    with torch.no_grad(): [p.add_(0.05 * torch.randn_like(p)) for p in clip.parameters()]
    batch = torch.randn(n, 3, 16, 16).double(), tokenizer([CAPTIONS[i % 3 if i < n - 2 else 0] for i in range(n)]), torch.arange(n) % 4
    if method in COEFFICIENTS: return ContrastiveObjective(clip, label_smoothing=label_smoothing, **COEFFICIENTS[method]), batch, teacher
    head = linear_head(torch.randn(4, 16).double(), torch.zeros(4).double())
    return HeadObjective(clip, head, method != "lp", method == "lp", label_smoothing), batch, None

def plain(objective, batch, teacher):
    "loss and gradients through autograd alone, from the definition"
    objective.zero_grad()
    table = None
    if teacher is not None:
        table = contrastive_logits(image_features(teacher, batch[0]), text_features(teacher, batch[1]), teacher.logit_scale.exp())
    loss, _ = objective(*batch, table)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}

def cut_gradients(objective, batch, teacher, cut, precision="fp32"):
    objective.zero_grad()
    values = backward_in_parts(objective, make_accelerator("cpu", precision), batch, len(batch[0]), teacher, cut)
    return values["loss"], {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}

def assert_same(one, two, tolerance=1e-9):
    assert abs(one[0] - two[0]) < tolerance and one[1].keys() == two[1].keys()
    for name in one[1]: assert torch.allclose(one[1][name], two[1][name], atol=tolerance, rtol=tolerance), name

@pytest.mark.parametrize("method", ["lp", "ft", "flyp", "carot"])
@pytest.mark.parametrize("n, micro, smoothing", [(12, 4, 0.0), (13, 5, 0.1), (7, 1, 0.1), (5, 9, 0.0)])
def test_gradients_of_the_whole_batch(tiny_clip, tokenizer, method, n, micro, smoothing):
    objective, batch, teacher = make(tiny_clip, tokenizer, method, n, smoothing)
    teacher = teacher if method == "carot" else None
    assert_same(plain(objective, batch, teacher), cut_gradients(objective, batch, teacher, Cut(micro_batch_size=micro)))

def test_naive_accumulation_is_another_loss(tiny_clip, tokenizer):
    objective, batch, teacher = make(tiny_clip, tokenizer, "carot", 11, 0.1)
    whole = plain(objective, batch, teacher)
    halves = [plain(objective, [x[:5] for x in batch], teacher), plain(objective, [x[5:] for x in batch], teacher)]
    mean = 5 / 11 * halves[0][0] + 6 / 11 * halves[1][0], {k: 5 / 11 * halves[0][1][k] + 6 / 11 * halves[1][1][k] for k in whole[1]}
    for micro in (None, 2): assert_same(mean, cut_gradients(objective, batch, teacher, Cut(2, micro)))
    assert abs(whole[0] - mean[0]) > 0.1

def test_more_parts_than_images(tiny_clip, tokenizer):
    objective, batch, teacher = make(tiny_clip, tokenizer, "carot", 2)
    assert_same(cut_gradients(objective, batch, teacher, Cut(5)), cut_gradients(objective, batch, teacher, Cut(2)))

class Dropped(nn.Module):
    def __init__(self, tower): super().__init__(); self.tower = tower
    def forward(self, x): return F.dropout(self.tower(F.dropout(x, 0.2)), 0.2)

def test_dropout_is_replayed(tiny_clip, tokenizer):
    objective, batch, _ = make(tiny_clip, tokenizer, "flyp", 13)
    objective.clip.visual = Dropped(objective.clip.visual)
    objective.zero_grad(); torch.manual_seed(5)
    own = [torch.cat(x) for x in zip(*((image_features(objective.clip, i), text_features(objective.clip, t))
                                       for i, t in zip(batch[0].split(4), batch[1].split(4))))]
    loss, _ = objective.pair_loss(*own)
    loss.backward()
    kept = loss.item(), {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    torch.manual_seed(5)
    assert_same(kept, cut_gradients(objective, batch, None, Cut(micro_batch_size=4)))

def test_bf16_within_its_rounding(tiny_clip, tokenizer):
    objective, batch, teacher = make(tiny_clip, tokenizer, "carot", 12)
    objective, teacher, batch = objective.float(), teacher.float(), (batch[0].float(), *batch[1:])
    exact = cut_gradients(objective, batch, teacher, Cut(micro_batch_size=12))
    errors = []
    for micro in (12, 4, 1):
        half = cut_gradients(objective, batch, teacher, Cut(micro_batch_size=micro), "bf16")
        errors.append(sum((half[1][k] - exact[1][k]).pow(2).sum() for k in exact[1]).sqrt() / sum(g.pow(2).sum() for g in exact[1].values()).sqrt())
    assert 0 < errors[0] < 0.05 and max(errors[1:]) < 1.5 * errors[0] + 1e-3, errors

@pytest.mark.parametrize("method", ["lp", "ft", "lp-ft", "flyp", "carot"])
def test_runs_agree_and_resume(tiny_clip, tokenizer, toy, tmp_path, method):
    whole, cut = tune(tiny_clip, tokenizer, toy, method), tune(tiny_clip, tokenizer, toy, method, micro_batch_size=5, out=tmp_path)
    for a, b in zip(whole.log, cut.log): assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)
    again = tune(tiny_clip, tokenizer, toy, method, micro_batch_size="7", out=tmp_path)  # complete: nothing to do, and not refused
    assert same(again.student, cut.student)

def test_auto_on_a_cpu_is_the_whole_batch(tiny_clip, tokenizer, toy, capsys):
    assert same(tune(tiny_clip, tokenizer, toy, "carot", micro_batch_size="auto").student, tune(tiny_clip, tokenizer, toy, "carot").student)
    assert "micro_batch_size=auto: all images at once" in capsys.readouterr().out

class Card(str):
    "the CPU in the guise of a GPU"
    type = "cuda"

@pytest.mark.parametrize("room, found", [(99, None), (7, 6), (5, 3), (1, 1)])
def test_auto_halves_until_it_fits(tiny_clip, tokenizer, monkeypatch, room, found):
    objective, batch, teacher = make(tiny_clip, tokenizer, "carot", 13)
    def crowded(clip, images):
        if len(images) > room: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return image_features(clip, images)
    monkeypatch.setattr("carot.large_batches.image_features", crowded)
    card = SimpleNamespace(device=Card("cpu"), autocast=nullcontext, backward=lambda loss: loss.backward(), gather=lambda x: x)
    assert find_micro_batch(objective, card, [x[:1] for x in batch], 13, teacher, Cut()) == found
    assert all(p.grad is None for p in objective.parameters())
    room = 0
    with pytest.raises(UserError, match="not even one"): find_micro_batch(objective, card, [x[:1] for x in batch], 13, teacher, Cut())

def test_other_errors_are_not_taken_for_full_memory():
    def broken(size): raise RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes"): largest_that_fits(broken, 8)

def test_accumulation_changes_the_negatives(tiny_clip, tokenizer, toy, tmp_path):
    whole, parts = (tune(tiny_clip, tokenizer, toy, "flyp", accumulation_steps=n, out=tmp_path/str(n)) for n in (1, 4))
    assert len(whole.log) == len(parts.log) and parts.log[0]["loss"] < whole.log[0]["loss"] - 0.3
    with pytest.raises(UserError, match="accumulation_steps"): tune(tiny_clip, tokenizer, toy, "flyp", accumulation_steps=2, out=tmp_path/"1")

@pytest.mark.parametrize("change, words", [(dict(micro_batch_size="big"), "or auto"), (dict(micro_batch_size=0), "at least 1"),
                                           (dict(accumulation_steps=17), "cannot be made of batch_size=16")])
def test_refused(tiny_clip, tokenizer, toy, change, words):
    with pytest.raises(UserError, match=words): tune(tiny_clip, tokenizer, toy, "carot", **change)

def test_batch_norm_is_refused(toy, tokenizer):
    with pytest.raises(UserError, match="batch norm"): fine_tune(build_clip(RESNET), tokenizer, toy, "flyp", **SETTINGS, micro_batch_size=4)

def test_memory_falls(tiny_clip, tokenizer):
    objective, batch, teacher = make(tiny_clip, tokenizer, "carot", 96)
    objective.clip.token_embedding.requires_grad_(False)  # its dense gradient outweighs this model's activations
    def step(micro):
        backward_in_parts(objective, accelerator, batch, 96, teacher, Cut(micro_batch_size=micro))
        objective.zero_grad()
    accelerator = make_accelerator("cpu")
    whole, cut = (peak_memory(lambda: step(micro), accelerator.device) for micro in (96, 8))
    assert cut < 0.5 * whole, (cut, whole)

def test_parameters_of_a_run():
    parameters, defaults = resolve({"micro_batch_size": 64, "accumulation_steps": 2})
    assert parameters["micro_batch_size"] == "64" and run_name(parameters, defaults) == "accumulation_steps=2,seed=1"
    with pytest.raises(UserError, match="zs does not use micro_batch_size"): resolve({"method": "zs", "micro_batch_size": "auto"})

def test_process_shares_are_whole():
    batches = [list(range(10)), list(range(10, 13)), [13]]
    for processes in (1, 2, 4):
        for accumulation in (1, 3):
            loaded = [list(ProcessBatches(batches, Cut(accumulation, None, processes, i))) for i in range(processes)]
            counts = [Cut(accumulation, None, processes).counts(len(batch)) for batch in batches]
            for k, batch in enumerate(batches):
                own = [mine[k][:sum(part[i] for part in counts[k])] for i, mine in enumerate(loaded)]
                assert sorted(sum(own, [])) == batch
