"""Every loss term, schedule and momentum against an independent float64 computation in plain numpy."""
import math

import numpy as np
import pytest
import torch

from carot.losses import (
    carot_loss,
    contrastive_logits,
    contrastive_loss,
    cross_norm,
    is_teacher_update,
    orthogonality,
    self_distillation,
    teacher_momentum,
    update_teacher,
)
from carot.train import learning_rate


def features(rng, n, d):
    x = rng.normal(size=(n, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True)

def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)

def cross_entropy(table, target):
    "Mean over rows of −Σ target · log softmax, row by row."
    total = 0.0
    for row, t in zip(table, target):
        shifted = row - row.max()
        total -= float((t * (shifted - math.log(np.exp(shifted).sum()))).sum())
    return total / len(table)

@pytest.fixture(params=[(7, 5, 100.0), (16, 8, 14.3), (2, 3, 1.0)])
def batch(request):
    n, d, s = request.param
    rng = np.random.default_rng(n)
    parts = dict(f_v=features(rng, n, d), f_t=features(rng, n, d), g_v=features(rng, n, d), g_t=features(rng, n, d),
                 W_v=rng.normal(size=(d + 4, d)), W_t=rng.normal(size=(d + 2, d)))
    return {"s": s, "s_t": 0.6 * s} | parts

def tensor(x, dtype): return torch.tensor(x, dtype=dtype)

@pytest.mark.parametrize("dtype, rel", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_terms_equal_numpy(batch, dtype, rel, smoothing):
    b, n = batch, len(batch["f_v"])
    S, T = b["s"] * b["f_v"] @ b["f_t"].T, b["s_t"] * b["g_v"] @ b["g_t"].T
    target = np.eye(n) * (1 - smoothing) + smoothing / n
    want = {
        "contrastive": (cross_entropy(S, target) + cross_entropy(S.T, target)) / 2,
        "orthogonality": math.sqrt(((b["W_v"].T @ b["W_v"] - np.eye(b["W_v"].shape[1])) ** 2).sum()),
        "cross_norm": math.sqrt(((b["W_v"] @ b["W_t"].T) ** 2).sum()),
        "distillation": cross_entropy(S, softmax(T)) + cross_entropy(S.T, softmax(T.T)),
    }
    t = {k: tensor(v, dtype) for k, v in b.items()}
    teacher = contrastive_logits(t["g_v"], t["g_t"], t["s_t"])
    loss, terms = carot_loss(t["f_v"], t["f_t"], t["s"], t["W_v"], t["W_t"], teacher, label_smoothing=smoothing)
    assert terms.keys() == want.keys()
    for name in want: assert float(terms[name]) == pytest.approx(want[name], rel=rel), name
    whole = want["contrastive"] + 0.2 * want["orthogonality"] + 0.05 * want["cross_norm"] + 1.5 * want["distillation"]
    assert float(loss) == pytest.approx(whole, rel=rel)

def test_gradient_matches_finite_differences(batch):
    t = {k: tensor(v, torch.float64) for k, v in batch.items()}
    teacher = contrastive_logits(t["g_v"], t["g_t"], t["s_t"])
    def loss(f_v, f_t, s, W_v, W_t): return carot_loss(f_v, f_t, s, W_v, W_t, teacher)[0]
    assert torch.autograd.gradcheck(loss, [t[k].requires_grad_() for k in ("f_v", "f_t", "s", "W_v", "W_t")])

def test_teacher_gets_no_say_in_the_gradient_and_first_step_has_no_distillation():
    f = torch.nn.functional.normalize(torch.randn(4, 3), dim=1)
    assert "distillation" not in carot_loss(f, f, 10.0, torch.eye(3), torch.eye(3), None)[1]

@pytest.mark.parametrize("W", [torch.zeros(4, 3), torch.eye(4, 3)])
def test_penalties_have_finite_gradients_where_the_norm_is_zero(W):
    for penalty in (
        lambda w: cross_norm(w, torch.zeros(5, 3)),
        lambda w: cross_norm(w * 0, torch.ones(5, 3)),
        orthogonality,
    ):
        w = W.clone().requires_grad_()
        penalty(w).backward()
        assert w.grad.isfinite().all()

def test_unsquared_norm():
    assert float(orthogonality(2 * torch.eye(3))) == pytest.approx(3 * math.sqrt(3))

def test_distillation_survives_probabilities_that_underflow():
    sure = 1e4 * (torch.eye(3).roll(1, 0))
    assert torch.isfinite(self_distillation(sure, torch.eye(3)))
    assert torch.isfinite(contrastive_loss(sure))

def test_logits_are_float32_under_autocast():
    f = torch.nn.functional.normalize(torch.randn(6, 32), dim=1)
    with torch.autocast("cpu", torch.bfloat16): logits = contrastive_logits(f, f, 100.0)
    assert logits.dtype == torch.float32 and torch.allclose(logits, 100 * f @ f.T)

@pytest.mark.parametrize(
    "total, start, end, fraction",
    [(25030, 0.05, 0.9, 0.2), (282, 0.05, 0.9, 0.2), (10, 0.5, 0.99, 1.0), (10, 0.1, 0.9, 0.0)],
)
def test_momentum(total, start, end, fraction):
    for step in range(1, total + 1):
        want = end if fraction == 0 else start + (end - start) * min(1.0, step / (fraction * total))
        assert teacher_momentum(step, total, start, end, fraction) == pytest.approx(want, abs=1e-12)

def test_updates_counted_from_one_and_after_the_last():
    assert [k for k in range(1, 1251) if is_teacher_update(k, 1250)] == [500, 1000, 1250]
    assert [k for k in range(1, 1001) if is_teacher_update(k, 1000)] == [500, 1000]

def test_update_averages_parameters_not_buffers():
    def norm(value):
        layer = torch.nn.BatchNorm1d(2)
        torch.nn.init.constant_(layer.weight, value)
        return layer
    teacher, student = norm(1.0), norm(3.0)
    student.running_mean += 5
    update_teacher(teacher, student, 0.75)
    assert (
        teacher.weight.tolist() == [1.5, 1.5]
        and teacher.running_mean.tolist() == [0, 0]
        and student.weight.tolist() == [3, 3]
    )


@pytest.mark.parametrize(
    "base, warmup, total, floor", [(1e-5, 500, 25030, 0.0), (3e-4, 20, 282, 0.0), (1.0, 0, 7, 0.1), (1.0, 7, 7, 0.0)]
)
def test_learning_rate(base, warmup, total, floor):
    for step in range(total):
        want = base * (step + 1) / warmup if step < warmup else (
            0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) * base + floor)
        assert learning_rate(step, base, warmup, total, floor) == pytest.approx(want, rel=1e-12, abs=1e-15)
