"""Lipsum-FT, CAR-FT and L2-SP: loss, gradients and weights equal float64 computations from their formulas."""
import copy
import math

import numpy as np
import pytest
import torch
from accelerate import debug_launcher
from small_runs import same, tiny_tokenizer, tune  # noqa: F401, a fixture
from test_processes import compare_gradients

from carot.clip import zero_shot_head
from carot.core import UserError
from carot.engine.devices import make_accelerator
from carot.engine.large_batches import Cut
from carot.evaluate import classifier, predict_sets
from carot.methods.base import Stage, Start, find_method, settings_of
from carot.runs.estimate import nbytes, time_step
from carot.train import FineTuned, load_finetuned, train_step

METHODS = ["lipsum-ft", "car-ft", "l2-sp"]
COEFFICIENTS = {"lipsum-ft": "lipsum_coef", "car-ft": "context_coef", "l2-sp": "l2sp_coef"}
LR, STEPS, N, SEED = 1e-3, 20, 10, 3
EPS = 1e-4  # AdamW's: with 1e-8 the spring of L2-SP blows up rounding where nothing else pulls (biases of keys)


def make(tiny_clip, tokenizer, toy, method, **given):
    "The objective of a method on a copy of the model, all in float64."
    clip = copy.deepcopy(tiny_clip).double()
    settings, _ = settings_of(find_method(method), {}, {"seed": SEED, **given})
    stage, = find_method(method).stages(Start(clip, tokenizer, toy, settings, STEPS))
    objective = stage.objective
    for module in {*objective.modules().values(), *objective.models.values()}: module.double()
    return objective


def batches(tokenizer):
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        images = torch.randn(N, 3, 16, 16, generator=generator, dtype=torch.float64)
        yield images, tokenizer(["a sun"] * N), (torch.arange(N) + step) % 4


# ---- the same from the formulas alone ----

def unit(x): return x / x.pow(2).sum(-1, keepdim=True).sqrt()


def cross_entropy(logits, labels):
    return -sum(row[y] - row.exp().sum().log() for row, y in zip(logits, labels.tolist())) / len(labels)


def lipsum_term(f, f0, s, step, tiny, *_):
    "(1/2M) Σ_m (s f·t_m − s f₀·t_m)², averaged over images; the texts drawn anew from seed and step."
    words = np.random.default_rng([SEED, step]).integers(0, 49406, (80, 8))
    texts = torch.tensor([[49406, *map(int, row), 49407, 0, 0] for row in words])  # padding comes after the end
    t = unit(tiny.encode_text(texts)).detach()
    return ((s * f @ t.T - s * f0 @ t.T) ** 2).sum(1).mean() / (2 * 80)


def context_term(f, f0, s, step, tiny, contexts, *_):
    "Σ_t p₀ log(p₀ / p), averaged over images."
    p0, p = (torch.exp(s * x @ contexts.T) for x in (f0, f))
    p0, p = p0 / p0.sum(1, keepdim=True), p / p.sum(1, keepdim=True)
    return (p0 * (p0 / p).log()).sum(1).mean()


def distance_term(f, f0, s, step, tiny, contexts, weights, start):
    "½ ‖θ − θ₀‖²."
    return sum(((a - b) ** 2).sum() for a, b in zip(weights, start)) / 2


TERMS = {"lipsum-ft": (1.0, lipsum_term), "car-ft": (1.0, context_term), "l2-sp": (0.01, distance_term)}


def contexts_of(tiny, tokenizer, toy):
    "Per template the mean over classes of normalised text features, normalised again; per class the other way round."
    table = torch.stack([unit(tiny.encode_text(tokenizer([t.format(c) for c in toy.classnames])))
                         for t in toy.templates]).detach()
    return unit(unit(table).mean(1)), unit(unit(table).mean(0))


def by_hand(tiny_clip, tokenizer, toy, method, head):
    "Loss and gradients of each of 20 steps of AdamW without decay, and what they lead to, written out."
    coefficient, term = TERMS[method]
    tiny, model = (copy.deepcopy(tiny_clip).double() for _ in range(2))
    contexts, _ = contexts_of(tiny, tokenizer, toy)
    s, w = math.exp(tiny_clip.logit_scale.item()), head.clone().requires_grad_()
    weights = [w, *model.visual.parameters()]
    start, found = [p.detach().clone() for p in weights], []
    m, v = ([torch.zeros_like(p) for p in weights] for _ in range(2))
    for step, (images, _, labels) in enumerate(batches(tokenizer)):
        f, f0 = unit(model.encode_image(images)), unit(tiny.encode_image(images)).detach()
        loss = cross_entropy(s * f @ w.T, labels)
        loss = loss + coefficient * term(f, f0, s, step, tiny, contexts, weights, start)
        gradients = torch.autograd.grad(loss, weights)
        found.append((loss.item(), gradients))
        with torch.no_grad():
            for p, g, a, b in zip(weights, gradients, m, v):
                a.mul_(0.9).add_(0.1 * g)
                b.mul_(0.999).add_(0.001 * g * g)
                p -= LR * (a / (1 - 0.9 ** (step + 1))) / ((b / (1 - 0.999 ** (step + 1))).sqrt() + EPS)
    return found, weights, model


@pytest.mark.parametrize("cut", [Cut(), Cut(micro_batch_size=4)], ids=["whole", "micro"])
@pytest.mark.parametrize("method", METHODS)
def test_parity(tiny_clip, tokenizer, toy, method, cut, monkeypatch):
    objective = make(tiny_clip, tokenizer, toy, method)
    contexts, classes = contexts_of(copy.deepcopy(tiny_clip).double(), tokenizer, toy)
    assert torch.allclose(objective.head.weight, classes, atol=1e-6)  # the text tower's features are kept in float32
    objective.head.weight.data.copy_(classes)
    if method == "car-ft":
        assert torch.allclose(objective.contexts.double(), contexts, atol=1e-6)
        objective.contexts = contexts
    if method == "l2-sp": objective.initial_head = classes.clone()
    expected, weights, model = by_hand(tiny_clip, tokenizer, toy, method, classes)
    optimizer = torch.optim.AdamW(objective.trained(), lr=LR, eps=EPS, weight_decay=0.0)
    accelerator, gradients = make_accelerator("cpu", "fp32"), []
    monkeypatch.setattr(optimizer, "step", spy(optimizer.step, lambda: gradients.append(
        [p.grad.clone() for p in objective.trained()])))
    for step, batch in enumerate(batches(tokenizer)):
        objective.before_step(step)
        values = train_step(objective, optimizer, accelerator, batch, step, cut=cut, size=N)
        assert values["loss"] == pytest.approx(expected[step][0], abs=1e-9)
        assert all(torch.allclose(a, b, atol=1e-9, rtol=1e-9)
                   for a, b in zip(gradients[-1], expected[step][1], strict=True))
    for a, b in zip(objective.trained(), weights, strict=True): assert torch.allclose(a, b, atol=1e-9, rtol=0)
    assert max((a - b).abs().max() for a, b in zip(weights[1:], tiny_clip.visual.parameters())) > LR
    for name in ("text_projection", "logit_scale"):
        assert torch.equal(getattr(objective.clip, name), getattr(tiny_clip, name).double())


def spy(function, before):
    def called(*words, **named):
        before()
        return function(*words, **named)
    return called


# ---- runs ----

@pytest.mark.parametrize("method", METHODS)
def test_starts_at_zero_shot(tiny_clip, tokenizer, toy, method, tmp_path):
    frozen = tune(tiny_clip, tokenizer, toy, method, lr=0.0, out=tmp_path)
    head = zero_shot_head(tiny_clip, tokenizer, toy.classnames, toy.templates)
    assert torch.allclose(frozen.head.weight, head, atol=1e-5) and not frozen.head.bias.any()
    expected = predict_sets(classifier(FineTuned(tiny_clip), tokenizer, toy), toy)
    for trained in (frozen, load_finetuned(tmp_path)):
        for name, p in predict_sets(classifier(trained, tokenizer, toy), toy).items():
            assert torch.allclose(p.logits, expected[name].logits, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_what_learns(tiny_clip, tokenizer, toy, method, tmp_path):
    "Image tower and head, which is seen as it is after every epoch; what was saved classifies as what was trained."
    heads = []
    run = tune(tiny_clip, tokenizer, toy, method, out=tmp_path,
               on_epoch=lambda epoch, trained: heads.append(trained.head.weight.detach().clone()))
    old, new = tiny_clip.state_dict(), run.student.state_dict()
    assert {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])} == {"visual"}
    assert len(heads) == 3 and not torch.equal(heads[0], heads[1]) and torch.equal(heads[2], run.head.weight)
    assert 10 < run.head.weight.norm(dim=1).mean() < 20  # s₀ is part of it
    opened = load_finetuned(tmp_path)
    assert same(opened.student, run.student) and same(opened.head, run.head)


@pytest.mark.parametrize("method", METHODS)
def test_resume_is_bit_identical(tiny_clip, tokenizer, toy, tmp_path, method):
    class Killed(Exception): pass
    def stop(epoch, _): raise Killed
    whole = tune(tiny_clip, tokenizer, toy, method)
    with pytest.raises(Killed): tune(tiny_clip, tokenizer, toy, method, out=tmp_path, on_epoch=stop)
    resumed = tune(tiny_clip, tokenizer, toy, method, out=tmp_path)
    assert same(whole.student, resumed.student) and same(whole.head, resumed.head)
    assert [row["loss"] for row in whole.log[3:]] == [row["loss"] for row in resumed.log[-6:]]


def test_processes(tiny_clip, tokenizer, toy):
    "Two processes, one of them without images in the last case, have the gradients of the whole batch."
    cases = [(method, n, 1, micro) for method in METHODS for n, micro in ((13, 2), (1, None))]
    debug_launcher(compare_gradients, (tiny_clip, tokenizer, toy, cases), num_processes=2)


@pytest.mark.parametrize("method", METHODS)
def test_its_reference_is_counted(tiny_clip, tokenizer, toy, method):
    "By `carot check`: the model, a second image tower, the head, and what AdamW keeps of what learns."
    objective = make(tiny_clip, tokenizer, toy, method)
    step = time_step(Stage(objective), make_accelerator("cpu", "fp32"), next(batches(tokenizer)), repeats=1)
    model, visual, head = (nbytes([module]) for module in (tiny_clip.double(), tiny_clip.visual, objective.head))
    assert step.trained == visual + head and step.fixed == model + visual + head + 3 * step.trained


@pytest.mark.parametrize("method", METHODS)
def test_without_its_term(tiny_clip, tokenizer, toy, method):
    "All three are then the same method."
    plain, whole = (tune(tiny_clip, tokenizer, toy, method, **more) for more in ({COEFFICIENTS[method]: 0.0}, {}))
    other = tune(tiny_clip, tokenizer, toy, "l2-sp", l2sp_coef=0.0)
    for a, b in zip(plain.log, other.log): assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)
    assert len(plain.log[0]) == len(whole.log[0]) - 1 and not same(plain.student, whole.student)


def test_fresh_texts_every_step(tiny_clip, tokenizer, toy, monkeypatch):
    from carot.methods.lipsum import Lipsum
    drawn, before = [], Lipsum.before_step
    def watched(self, step):
        before(self, step)
        drawn.append((step, self.tokens.sum().item()))
    monkeypatch.setattr(Lipsum, "before_step", watched)
    tune(tiny_clip, tokenizer, toy, "lipsum-ft")
    assert [step for step, _ in drawn[1:]] == list(range(9))
    assert len(set(dict(drawn).values())) == 9


def test_texts_that_cannot_be_made(tiny_clip, tokenizer, toy):
    with pytest.raises(UserError, match="lipsum_length=11 .* more than the 12 tokens"):
        tune(tiny_clip, tokenizer, toy, "lipsum-ft", lipsum_length=11)
    with pytest.raises(UserError, match="CLIP's own tokenizer"):
        tune(tiny_clip, lambda texts: tokenizer(texts), toy, "lipsum-ft")


@pytest.mark.parametrize("method", METHODS)
def test_what_is_said_of_it(method):
    found = find_method(method)
    assert found.source and "1e-9" in found.proof and found.departs and not found.usual
    assert found.defaults == {"batch_size": 256, "weight_decay": 0.0, "warmup_steps": 5000}
