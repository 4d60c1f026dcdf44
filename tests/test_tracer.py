"""TRACER against its formulas: terms, gradients, and 20 steps of student and teacher, written out here in float64."""
import copy
import math

import numpy as np
import pytest
import torch
from accelerate import debug_launcher
from small_runs import tiny_tokenizer  # noqa: F401, a fixture
from test_large_batches import assert_same, cut_gradients, make, plain
from test_processes import compare_gradients

from carot import train
from carot.core import UserError
from carot.engine.large_batches import Cut
from carot.methods import tracer
from carot.methods.base import find_method, settings_of
from carot.train import fine_tune

STEPS, BATCH, LR, DECAY, WARMUP = 20, 10, 1e-3, 0.1, 3


# formulas, in numpy

def softmax(table):
    table = np.exp(table - table.max(1, keepdims=True))
    return table / table.sum(1, keepdims=True)

def divergence(target, table):
    p, q = softmax(target), softmax(table)
    return (p * (np.log(p) - np.log(q))).sum() / len(p)

def on_diagonal(table): return -np.log(np.diag(softmax(table))).mean()

def by_formula(f_v, f_t, u, v, s, st):
    S, R, X, Y = s * f_v @ f_t.T, st * u @ v.T, s * f_v @ v.T, s * f_t @ u.T
    B, d = f_v.shape
    return {"feature": ((f_v - u) ** 2).sum() / (B * d) + ((f_t - v) ** 2).sum() / (B * d),
            "relation": (divergence(R, S) + divergence(R.T, S.T)) / 2,
            "interaction": (on_diagonal(X) + on_diagonal(Y)) / 2,
            "cross": (divergence(R, X) + divergence(R.T, Y)) / 2}


def four_features(B=7, d=5, seed=0):
    torch.manual_seed(seed)
    return [torch.nn.functional.normalize(torch.randn(B, d, dtype=torch.float64), dim=1) for _ in range(4)]


def test_terms_are_their_formulas():
    features = four_features()
    found = tracer.distillation_terms(*features, 9.0, 7.0)
    expected = by_formula(*(f.numpy() for f in features), 9.0, 7.0)
    assert {name: term.item() for name, term in found.items()} == pytest.approx(expected, abs=1e-12)
    assert list(tracer.distillation_terms(*features, 9.0, 7.0, ["cross", "feature"])) == ["cross", "feature"]


@pytest.mark.parametrize("B, d", [(3, 4), (6, 512)])
def test_feature_distillation_is_divided_by_the_width(B, d):
    "A difference of one in one entry of each tower."
    u, f = torch.zeros(B, d), torch.zeros(B, d)
    f[1, 2] = 1
    assert tracer.feature_distillation(f, f, u, u).item() == pytest.approx(2 / (B * d))


def test_only_the_student_gets_a_gradient():
    "Also through its logit scale, which the cross tables have with the teacher's features."
    f_v, f_t, u, v = four_features()
    for f in (f_v, f_t): f.requires_grad_()
    s = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    for name, term in tracer.distillation_terms(f_v, f_t, u, v, s, torch.tensor(3.0).double()).items():
        for x in (f_v, f_t, s): x.grad = None
        term.backward(retain_graph=True)
        assert (s.grad is None) == (name == "feature")
        assert f_v.grad.abs().max() > 1e-4 < f_t.grad.abs().max()


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it():
    u, v = four_features()[:2]
    terms = tracer.distillation_terms(u, v, u, v, 9.0, 9.0)
    assert terms["feature"] == 0 and abs(terms["relation"]) < 1e-15 and abs(terms["cross"]) < 1e-15
    certain = tracer.distillation_terms(*four_features(), 1e4, 1e4)
    assert all(term.isfinite() for term in certain.values())


# a run, replayed

def features(clip, images, tokens):
    return clip.encode_image(images, normalize=True), clip.encode_text(tokens, normalize=True), clip.logit_scale.exp()

def log_softmax(table): return table - table.logsumexp(1, keepdim=True)

def torch_divergence(target, table):
    return (log_softmax(target).exp() * (log_softmax(target) - log_softmax(table))).sum() / len(table)

def pairs(table): return -log_softmax(table).diagonal().mean()

def loss_by_formula(clip, teacher, images, tokens, step, c):
    f_v, f_t, s = features(clip, images, tokens)
    S = s * f_v @ f_t.T
    loss = (pairs(S) + pairs(S.T)) / 2
    loss = loss + c["cross_norm_coef"] * (clip.visual.proj @ clip.text_projection.T).square().sum().sqrt()
    if not step: return loss
    with torch.no_grad(): u, v, st = features(teacher, images, tokens)
    R, X, Y, Bd = st * u @ v.T, s * f_v @ v.T, s * f_t @ u.T, f_v.numel()
    feature = (f_v - u).square().sum() / Bd + (f_t - v).square().sum() / Bd
    relation = (torch_divergence(R, S) + torch_divergence(R.T, S.T)) / 2
    interaction = (pairs(X) + pairs(Y)) / 2
    cross = (torch_divergence(R, X) + torch_divergence(R.T, Y)) / 2
    return loss + c["distillation_coef"] * (c["feature_coef"] * feature + c["relation_coef"] * relation
                                            + c["interaction_coef"] * interaction + c["cross_coef"] * cross)

def rate(step):
    if step < WARMUP: return LR * (step + 1) / WARMUP
    return LR * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2

class AdamW:
    "β = 0.9 and 0.999, ε = 1e-8, decay apart from the gradient."
    def __init__(self, parameters): self.state = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]

    @torch.no_grad()
    def step(self, n, lr):
        for p, mean, square in self.state:
            mean.mul_(0.9).add_(0.1 * p.grad)
            square.mul_(0.999).add_(0.001 * p.grad ** 2)
            p.mul_(1 - lr * DECAY)
            p.sub_(lr * mean / (1 - 0.9 ** n) / ((square / (1 - 0.999 ** n)).sqrt() + 1e-8))
            p.grad = None

def kappa(n, total, beta):
    "The density of Beta(β, β) at τ_n."
    tau = (n + 0.5) / (total + 1)
    constant = math.gamma(2 * beta) / math.gamma(beta) ** 2
    return constant * (tau * (1 - tau)) ** (beta - 1)

def mean_of(snapshots, total, beta):
    "Σ κ(τ_k) θ_k / Σ κ(τ_k), from all snapshots."
    weights = torch.tensor([kappa(k, total, beta) for k in range(len(snapshots))], dtype=torch.float64)
    return [torch.tensordot(weights, torch.stack(tensors), 1) / weights.sum() for tensors in zip(*snapshots)]

def snapshot(clip): return [p.detach().clone() for p in clip.parameters()]

def replay(clip, batches, coefficients, beta=0.5):
    "Student and teacher after the last batch, and the losses."
    teacher, losses = copy.deepcopy(clip), []
    optimizer, snapshots = AdamW(clip.parameters()), [snapshot(clip)]
    for step, (images, tokens, _) in enumerate(batches):
        loss = loss_by_formula(clip, teacher, images, tokens, step, coefficients)
        loss.backward()
        optimizer.step(step + 1, rate(step))
        snapshots.append(snapshot(clip))
        for p, value in zip(teacher.parameters(), mean_of(snapshots, STEPS, beta)): p.data = value
        losses.append(loss.item())
    return clip, teacher, losses

class Doubled:
    "A data set's images in float64."
    def __init__(self, images): self.images = images
    def __len__(self): return len(self.images)
    def __getattr__(self, name): return getattr(self.images, name)
    def __getitem__(self, i):
        image, *others = self.images[i]
        return image.double(), *others

DEFAULTS = dict(cross_norm_coef=0.05, distillation_coef=0.9, feature_coef=2000.0, relation_coef=1.0,
                interaction_coef=1.0, cross_coef=1.0)
OTHERS = dict(cross_norm_coef=0.02, distillation_coef=1.3, feature_coef=70.0, relation_coef=0.4, interaction_coef=0.7,
              cross_coef=2.1, teacher_beta=1.7)

def run(tiny_clip, tokenizer, toy, monkeypatch, **given):
    "A run in float64, and its batches."
    batches, original = [], train.train_step
    def stepping(objective, optimizer, accelerator, batch, *words, **named):
        batches.append(batch)
        return original(objective, optimizer, accelerator, batch, *words, **named)
    monkeypatch.setattr(train, "train_step", stepping)
    toy.train = Doubled(toy.train)
    found = fine_tune(copy.deepcopy(tiny_clip).double(), tokenizer, toy, "tracer", epochs=5, batch_size=BATCH, lr=LR,
                      warmup_steps=WARMUP, workers=0, device="cpu", precision="fp32", **given)
    return found, batches

@pytest.mark.parametrize("micro", [None, 3])
@pytest.mark.parametrize("given", [{}, OTHERS], ids=["defaults", "others"])
def test_twenty_steps_are_those_of_the_formulas(tiny_clip, tokenizer, toy, monkeypatch, micro, given):
    found, batches = run(tiny_clip, tokenizer, toy, monkeypatch, micro_batch_size=micro, **given)
    coefficients = {**DEFAULTS, **given}
    student, teacher, losses = replay(copy.deepcopy(tiny_clip).double(), batches, coefficients,
                                      coefficients.get("teacher_beta", 0.5))
    assert len(batches) == STEPS and [row["loss"] for row in found.log] == pytest.approx(losses, abs=1e-9, rel=1e-9)
    for one, two in ((found.student, student), (found.teacher, teacher)):
        for (name, p), q in zip(one.named_parameters(), two.parameters()):
            assert p.dtype == torch.float64 and (p - q).abs().max() < 1e-9, name
    assert max((p - q).abs().max() for p, q in zip(snapshot(found.student), snapshot(found.teacher))) > 1e-4

@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("micro", [None, 1, 4])
def test_gradients_are_those_of_the_formulas(tiny_clip, tokenizer, toy, step, micro):
    objective, batch = make(tiny_clip, tokenizer, toy, "tracer", 9)
    found = (plain(objective, batch, step) if micro is None
             else cut_gradients(objective, batch, Cut(micro_batch_size=micro), step=step))
    clip = objective.clip
    clip.zero_grad()
    loss = loss_by_formula(clip, objective.teacher, *batch[:2], step, DEFAULTS)
    loss.backward()
    assert_same(found, (loss.item(), {f"clip.{name}": p.grad.clone() for name, p in clip.named_parameters()}))

@pytest.mark.parametrize("processes", [2, 3])
def test_gradients_of_one_process(tiny_clip, tokenizer, toy, processes):
    cases = [("tracer", 13, 1, 2), ("tracer", 2, 1, None), ("tracer", 11, 3, 2), ("carot-beta", 7, 1, 2),
             ("carot-still", 7, 1, None)]
    debug_launcher(compare_gradients, (tiny_clip, tokenizer, toy, cases), num_processes=processes)


# settings

def test_defaults_are_those_of_the_smallest_vision_transformer():
    settings, _ = settings_of(find_method("tracer"), {}, {})
    assert {name: getattr(settings, name) for name in DEFAULTS} == DEFAULTS
    known = dict(lr=1e-5, weight_decay=0.1, batch_size=512, warmup_steps=500, epochs=10, orthogonality_coef=0,
                 teacher_kernel="beta", teacher_beta=0.5)
    assert {name: getattr(settings, name) for name in known} == known

def test_a_benchmark_cannot_slow_its_teacher_down():
    settings, _ = settings_of(find_method("tracer"), {"teacher_update_every": 6}, {})
    assert not hasattr(settings, "teacher_update_every")
    with pytest.raises(UserError, match="does not use teacher_update_every; methods that do: "):
        settings_of(find_method("tracer"), {}, {"teacher_update_every": 6})
    with pytest.raises(UserError, match="unknown teacher_kernel 'ema'"):
        settings_of(find_method("tracer"), {}, {"teacher_kernel": "ema"})

def test_without_distillation_nothing_of_the_teacher_is_computed(tiny_clip, tokenizer, toy):
    objective, batch = make(tiny_clip, tokenizer, toy, "tracer", 6)
    objective.settings.distillation_coef = 0.0
    assert objective.needs(5) == ("image", "text")
    assert_same(plain(objective, batch, 5), plain(objective, batch, 0))

def test_a_zero_coefficient_leaves_its_term_out(tiny_clip, tokenizer, toy):
    objective, batch = make(tiny_clip, tokenizer, toy, "tracer", 6)
    objective.settings.feature_coef = objective.settings.cross_norm_coef = 0.0
    made = {need: torch.nn.functional.normalize(torch.randn(6, 16).double(), dim=1) for need in objective.needs(1)}
    assert list(objective.loss(made, batch[2])[1]) == ["contrastive", "relation", "interaction", "cross"]
