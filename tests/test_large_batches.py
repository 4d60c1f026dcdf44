"""Cut batches have the gradients of the whole batch, in every method, precision and cut; naive accumulation has not."""
import copy
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from small_runs import same, settings_for, tiny_tokenizer, tune  # noqa: F401, a fixture
from test_clip import RESNET
from torch import nn

from carot.clip import build_clip, text_features
from carot.core import UserError
from carot.engine.devices import make_accelerator
from carot.engine.large_batches import (
    Cut,
    ProcessBatches,
    backward_in_parts,
    compute_features,
    find_micro_batch,
    largest_that_fits,
)
from carot.methods.base import Objective, Start, all_methods, find_method, linear_head, settings_of
from carot.runs.settings import resolve
from carot.train import fine_tune

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/"speed"))
from memory import peak_memory

CAPTIONS = ["a sun", "a photo of a sun", "something that is a small red sun"]
TRAINED = {name: method for name, method in all_methods().items() if method.trains}


class Clusters(Objective):
    "Images of a class near each other, without text: a loss over pairs that looks at labels."
    terms = ("clusters",)

    def needs(self, step): return ("image",)

    def loss(self, features, labels):
        table = 5 * features["image"] @ features["image"].T
        alike = (labels[:, None] == labels).to(table)
        loss = F.cross_entropy(table, alike / alike.sum(1, keepdim=True))
        return loss, {"clusters": loss}


class Anchored(Objective):
    "A head on unnormalised features, and captions held where they were: a mean over samples with two terms and text."
    samplewise, normalized, terms = True, False, ("cross_entropy", "anchor", "never")

    def __init__(self, clip):
        super().__init__(clip, reference=copy.deepcopy(clip).requires_grad_(False))
        self.head = linear_head(torch.linspace(-1, 1, 64).view(4, 16))

    def trained(self): return [*self.head.parameters(), *self.clip.parameters()]

    def needs(self, step): return ("image", "text", "reference_text")

    def loss(self, features, labels):
        terms = {"cross_entropy": F.cross_entropy(self.head(features["image"]), labels),
                 "anchor": (features["text"] - features["reference_text"]).square().sum(1).mean()}
        return terms["cross_entropy"] + terms["anchor"], terms


OWN = {"clusters": Clusters, "anchored": Anchored}


def make(tiny_clip, tokenizer, toy, method, n, label_smoothing=0.0):
    "The objective of a method's last stage, and a batch, in float64."
    torch.manual_seed(0)
    clip = copy.deepcopy(tiny_clip)
    if method in OWN: objective = OWN[method](clip)
    else:
        settings, _ = settings_of(find_method(method), {}, dict(label_smoothing=label_smoothing))
        *_, stage = find_method(method).stages(Start(clip, tokenizer, toy, settings, 100))
        objective = stage.objective
    for module in {*objective.kept().values(), *objective.models.values()}: module.double()
    with torch.no_grad():
        for p in clip.parameters(): p.add_(0.05 * torch.randn_like(p))
    captions = [CAPTIONS[i % 3 if i < n - 2 else 0] for i in range(n)]
    shape = (16,) if "input" in objective.needs(1) else (3, 16, 16)  # a probe's batches are features
    return objective, (torch.randn(n, *shape).double(), tokenizer(captions), torch.arange(n) % 4)


def gradients(objective):
    named = nn.ModuleDict(objective.modules()).named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def zero_grad(objective):
    for module in objective.modules().values(): module.zero_grad()


def feature(objective, need, images, tokens):
    "From the definition."
    if need == "input": return images
    who, _, tower = need.rpartition("_")
    clip = objective.models[who or "student"]
    if tower == "text": made = text_features(clip, tokens)
    else: made = clip.encode_image(images, normalize=objective.normalized)
    return made.detach() if who else made


def plain(objective, batch, step=1):
    "Loss and gradients through autograd alone."
    zero_grad(objective)
    objective.before_step(step)
    features = {need: feature(objective, need, *batch[:2]) for need in objective.needs(step)}
    loss, _ = objective.loss(features, batch[2])
    loss.backward()
    return loss.item(), gradients(objective)


def cut_gradients(objective, batch, cut, precision="fp32", step=1):
    zero_grad(objective)
    objective.before_step(step)
    values = backward_in_parts(objective, make_accelerator("cpu", precision), batch, len(batch[0]), cut, step)
    return values["loss"], gradients(objective)


def assert_same(one, two, tolerance=1e-9):
    assert abs(one[0] - two[0]) < tolerance and one[1].keys() == two[1].keys()
    for name in one[1]: assert torch.allclose(one[1][name], two[1][name], atol=tolerance, rtol=tolerance), name


@pytest.mark.parametrize("method", [*TRAINED, *OWN])
@pytest.mark.parametrize("n, micro, smoothing", [(12, 4, 0.0), (13, 5, 0.1), (7, 1, 0.1), (5, 9, 0.0)])
def test_gradients_of_the_whole_batch(tiny_clip, tokenizer, toy, method, n, micro, smoothing):
    objective, batch = make(tiny_clip, tokenizer, toy, method, n, smoothing)
    assert_same(plain(objective, batch), cut_gradients(objective, batch, Cut(micro_batch_size=micro)))


def test_without_a_teacher_in_the_first_step(tiny_clip, tokenizer, toy):
    objective, batch = make(tiny_clip, tokenizer, toy, "carot", 9)
    first = cut_gradients(objective, batch, Cut(micro_batch_size=4), step=0)
    assert_same(plain(objective, batch, step=0), first)
    assert first[0] < plain(objective, batch)[0]


def test_terms_are_means_over_all_samples(tiny_clip, tokenizer, toy):
    "And a term that was never there is not made up."
    objective, batch = make(tiny_clip, tokenizer, toy, "anchored", 11)
    accelerator = make_accelerator("cpu")
    whole, cut = (backward_in_parts(objective, accelerator, batch, 11, Cut(micro_batch_size=n), 0) for n in (11, 3))
    assert list(cut) == ["loss", "cross_entropy", "anchor"] and cut == pytest.approx(whole)


def test_only_what_is_needed_is_computed(tiny_clip, tokenizer, toy, monkeypatch):
    "The teacher reads four micro-batches at once; nothing of it is made again, and nothing of the last one."
    for method, students, others, texts in (("ft", 2, 0, 0), ("carot", 3, 1, 4)):
        objective, batch = make(tiny_clip, tokenizer, toy, method, 8)
        counts = {"": 0, "teacher": 0, "text": 0}
        def counting(clip, who, counts=counts):
            original = clip.encode_image
            def encode(*words, **named):
                counts[who] += 1
                return original(*words, **named)
            clip.encode_image = encode
        def text(*words, counts=counts):
            counts["text"] += 1
            return text_features(*words)
        counting(objective.clip, "")
        if objective.teacher: counting(objective.teacher, "teacher")
        monkeypatch.setattr("carot.engine.large_batches.text_features", text)
        cut_gradients(objective, batch, Cut(micro_batch_size=4))
        assert list(counts.values()) == [students, others, texts], method


def test_unknown_features_are_named(tiny_clip):
    with pytest.raises(UserError, match="unknown feature 'teacher_image'.*known: image, text"):
        compute_features(Clusters(tiny_clip), ["teacher_image"], torch.zeros(1, 3, 16, 16), torch.ones(1, 12).long())


def test_naive_accumulation_is_another_loss(tiny_clip, tokenizer, toy):
    objective, batch = make(tiny_clip, tokenizer, toy, "carot", 11, 0.1)
    whole = plain(objective, batch)
    halves = [plain(objective, [x[:5] for x in batch]), plain(objective, [x[5:] for x in batch])]
    mean = (5 / 11 * halves[0][0] + 6 / 11 * halves[1][0],
            {k: 5 / 11 * halves[0][1][k] + 6 / 11 * halves[1][1][k] for k in whole[1]})
    for micro in (None, 2): assert_same(mean, cut_gradients(objective, batch, Cut(2, micro)))
    assert abs(whole[0] - mean[0]) > 0.1


def test_more_parts_than_images(tiny_clip, tokenizer, toy):
    objective, batch = make(tiny_clip, tokenizer, toy, "carot", 2)
    assert_same(cut_gradients(objective, batch, Cut(5)), cut_gradients(objective, batch, Cut(2)))


class Dropped(nn.Module):
    def __init__(self, tower): super().__init__(); self.tower = tower
    def forward(self, x): return F.dropout(self.tower(F.dropout(x, 0.2)), 0.2)


def test_dropout_is_replayed(tiny_clip, tokenizer, toy):
    objective, batch = make(tiny_clip, tokenizer, toy, "flyp", 13)
    objective.clip.visual = Dropped(objective.clip.visual)
    zero_grad(objective)
    torch.manual_seed(5)
    made = [compute_features(objective, ["image", "text"], *part) for part in zip(batch[0].split(4), batch[1].split(4))]
    loss, _ = objective.loss({name: torch.cat([part[name] for part in made]) for name in made[0]}, batch[2])
    loss.backward()
    kept = loss.item(), gradients(objective)
    torch.manual_seed(5)
    assert_same(kept, cut_gradients(objective, batch, Cut(micro_batch_size=4)))


def test_bf16_within_its_rounding(tiny_clip, tokenizer, toy):
    objective, batch = make(tiny_clip, tokenizer, toy, "carot", 12)
    for module in objective.models.values(): module.float()
    batch = batch[0].float(), *batch[1:]
    exact = cut_gradients(objective, batch, Cut(micro_batch_size=12))[1]
    size, errors = sum(g.pow(2).sum() for g in exact.values()).sqrt(), []
    for micro in (12, 4, 1):
        half = cut_gradients(objective, batch, Cut(micro_batch_size=micro), "bf16")[1]
        errors.append(sum((half[k] - exact[k]).pow(2).sum() for k in exact).sqrt() / size)
    assert 0 < errors[0] < 0.05 and max(errors[1:]) < 1.5 * errors[0] + 1e-3, errors


@pytest.mark.parametrize("method", TRAINED)
def test_runs_agree_and_resume(tiny_clip, tokenizer, toy, tmp_path, method):
    whole = tune(tiny_clip, tokenizer, toy, method)
    cut = tune(tiny_clip, tokenizer, toy, method, micro_batch_size=5, out=tmp_path)
    for a, b in zip(whole.log, cut.log): assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)
    again = tune(tiny_clip, tokenizer, toy, method, micro_batch_size="5", out=tmp_path)
    assert same(again.student, cut.student) and again.micro_batch_size == 5 and whole.micro_batch_size is None
    with pytest.raises(UserError, match="micro_batch_size"):  # other roundings
        tune(tiny_clip, tokenizer, toy, method, micro_batch_size=7, out=tmp_path)

def test_auto_on_a_cpu_is_the_whole_batch(tiny_clip, tokenizer, toy, capsys):
    auto, whole = (tune(tiny_clip, tokenizer, toy, "carot", micro_batch_size=size) for size in ("auto", None))
    assert same(auto.student, whole.student)
    assert "micro_batch_size=auto: all images at once" in capsys.readouterr().out

class Card(str):
    "the CPU in the guise of a GPU"
    type = "cuda"

@pytest.mark.parametrize("room, found", [(99, None), (7, 6), (5, 3), (1, 1)])
def test_auto_halves_until_it_fits(tiny_clip, tokenizer, toy, room, found):
    objective, batch = make(tiny_clip, tokenizer, toy, "carot", 13)
    original = objective.clip.encode_image
    def crowded(images, normalize):
        if len(images) > room: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return original(images, normalize)
    objective.clip.encode_image = crowded
    def backward(loss): loss.backward()
    card = SimpleNamespace(device=Card("cpu"), autocast=nullcontext, backward=backward, gather=lambda x: x)
    example = [x[:1] for x in batch]
    assert find_micro_batch(objective, card, example, 13, Cut()) == found
    assert all(p.grad is None for p in objective.trained())
    room = 0
    with pytest.raises(UserError, match="not even one"): find_micro_batch(objective, card, example, 13, Cut())

def test_other_errors_are_not_taken_for_full_memory():
    def broken(size): raise RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes"): largest_that_fits(broken, 8)

def test_accumulation_changes_the_negatives(tiny_clip, tokenizer, toy, tmp_path):
    whole, parts = (tune(tiny_clip, tokenizer, toy, "flyp", accumulation_steps=n, out=tmp_path/str(n)) for n in (1, 4))
    assert len(whole.log) == len(parts.log) and parts.log[0]["loss"] < whole.log[0]["loss"] - 0.3
    with pytest.raises(UserError, match="accumulation_steps"):
        tune(tiny_clip, tokenizer, toy, "flyp", accumulation_steps=2, out=tmp_path/"1")

@pytest.mark.parametrize("change, words", [
    (dict(micro_batch_size="big"), "or auto"), (dict(micro_batch_size=0), "at least 1"),
    (dict(accumulation_steps=17), "cannot be made of batch_size=16")])
def test_refused(tiny_clip, tokenizer, toy, change, words):
    with pytest.raises(UserError, match=words): tune(tiny_clip, tokenizer, toy, "carot", **change)

def test_batch_norm_is_refused(toy, tokenizer):
    with pytest.raises(UserError, match="batch norm"):
        fine_tune(build_clip(RESNET), tokenizer, toy, "flyp", **settings_for("flyp", micro_batch_size=4))

def test_memory_falls(tiny_clip, tokenizer, toy):
    objective, batch = make(tiny_clip, tokenizer, toy, "carot", 96)
    objective.clip.token_embedding.requires_grad_(False)  # its dense gradient outweighs this model's activations
    accelerator = make_accelerator("cpu")
    def step(micro):
        backward_in_parts(objective, accelerator, batch, 96, Cut(micro_batch_size=micro), 1)
        zero_grad(objective)
    whole, cut = (peak_memory(lambda micro=micro: step(micro), accelerator.device) for micro in (96, 8))
    assert cut < 0.5 * whole, (cut, whole)

def test_memory_is_counted():
    def two_squares():
        a = torch.ones(250, 1000)
        b = a * 2
        del a
        return b * b
    assert peak_memory(two_squares, torch.device("cpu")) == 2_000_000

def test_parameters_of_a_run():
    asked = resolve({"micro_batch_size": 64, "accumulation_steps": 2})
    assert asked.parameters["micro_batch_size"] == "64"
    assert asked.name == "accumulation_steps=2,micro_batch_size=64,seed=1"
    with pytest.raises(UserError, match="zs does not use micro_batch_size"):
        resolve({"method": "zs", "micro_batch_size": "auto"})

def test_process_shares_are_whole():
    batches = [list(range(10)), list(range(10, 13)), [13]]
    for processes in (1, 2, 4):
        for accumulation in (1, 3):
            loaded = [list(ProcessBatches(batches, Cut(accumulation, None, processes, i))) for i in range(processes)]
            counts = [Cut(accumulation, None, processes).counts(len(batch)) for batch in batches]
            for k, batch in enumerate(batches):
                own = [mine[k][:sum(part[i] for part in counts[k])] for i, mine in enumerate(loaded)]
                assert sorted(sum(own, [])) == batch
