"Interpolation, Model Stock and the methods made of them: against independent loops, and what cannot be mixed."
import copy
import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from carot.calibration import fit_temperature
from carot.core import UserError
from carot.engine.signals import StopSignals
from carot.evaluate import classifier, predict_sets
from carot.methods.base import linear_head
from carot.runs.jobs import Queue, job_for, next_job, plan_runs, with_bases
from carot.runs.records import load_bases
from carot.runs.settings import resolve
from carot.train import FineTuned, fine_tune, load_finetuned
from carot.weights import (interpolate, mean_cosine, mix, model_stock, starting_point, stock_finetuned, stock_ratio,
                           stock_tensor, wise_ft_heads, wise_ft_towers, with_head)


def tokenizer(texts):
    "one token per letter"
    rows = [[1, *(2 + ord(c) % 40 for c in t)][:11] + [49407] for t in texts]
    return torch.tensor([row + [0] * (12 - len(row)) for row in rows])


def moved(model, seed=1, by=0.05):
    torch.manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters(): p.add_(by * torch.randn_like(p))
    return other


# a line

def test_ends_are_exact_the_middle_is_the_mean_and_nothing_is_changed(tiny_clip):
    end = moved(tiny_clip)
    before = [copy.deepcopy(m.state_dict()) for m in (tiny_clip, end)]
    half = mix(tiny_clip, end, 0.5).state_dict()
    for alpha, state in ((0.0, before[0]), (1.0, before[1])):
        assert all(torch.equal(v, state[k]) for k, v in mix(tiny_clip, end, alpha).state_dict().items())
    for k, v in half.items():
        if v.is_floating_point() and v.isfinite().all():
            torch.testing.assert_close(v, (before[0][k] + before[1][k]) / 2)
    assert all(torch.equal(v, old[k]) for m, old in zip((tiny_clip, end), before) for k, v in m.state_dict().items())
    s = mix(tiny_clip, end, 0.25).logit_scale
    assert math.isclose(s.item(), 0.75 * tiny_clip.logit_scale.item() + 0.25 * end.logit_scale.item(), rel_tol=1e-6)


def test_an_attention_mask_of_minus_infinity_stays_what_it_is(tiny_clip):
    mask, ends = tiny_clip.attn_mask, [moved(tiny_clip, seed) for seed in (1, 2)]
    assert torch.isinf(mask).any() and torch.equal(mix(tiny_clip, ends[0], 0.3).attn_mask, mask)
    assert torch.equal(model_stock(tiny_clip, ends).attn_mask, mask)
    assert torch.equal(stock_tensor(mask, [mask, mask]), mask)


def test_counts_in_buffers_are_not_averaged():
    start, end = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    end.num_batches_tracked.fill_(7); end.running_mean.fill_(2.0)
    mixed = mix(start, end, 0.5)
    assert mixed.num_batches_tracked == 7 and mixed.running_mean.tolist() == [1.0, 1.0]
    stocked = model_stock(start, [end, end])
    assert stocked.num_batches_tracked == 7 and stocked.running_mean.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("headed", [False, True])
def test_alpha_zero_classifies_as_zero_shot(tiny_clip, toy, headed):
    trained = FineTuned(moved(tiny_clip), linear_head(torch.randn(4, 16), torch.randn(4)) if headed else None)
    start = starting_point(tiny_clip, tokenizer, toy, trained)
    models = FineTuned(tiny_clip), interpolate(start, trained, 0), trained, interpolate(start, trained, 1)
    zero, ours, end, last = (predict_sets(classifier(model, tokenizer, toy), toy) for model in models)
    for name in zero: torch.testing.assert_close(ours[name].logits, zero[name].logits, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(last[name].logits, end[name].logits) for name in end)
    assert not torch.allclose(end["Toy"].logits, zero["Toy"].logits, atol=0.1)


def test_a_head_without_bias_has_a_starting_point(tiny_clip, toy):
    trained = FineTuned(moved(tiny_clip), nn.Linear(16, 4, bias=False))
    half = wise_ft_towers(tiny_clip, tokenizer, toy, trained, 0.5)
    assert half.head.bias is None and half.head.weight.shape == (4, 16)
    assert stock_finetuned(tiny_clip, tokenizer, toy, [trained, trained]).head.bias is None


def test_what_cannot_be_mixed(tiny_clip, toy):
    with pytest.raises(UserError, match="not normalised"):
        probe = FineTuned(tiny_clip, linear_head(torch.zeros(4, 16)), normalized=False)
        starting_point(tiny_clip, tokenizer, toy, probe)
    with pytest.raises(UserError, match="differ in architecture"):
        mix(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), 0.5)
    for alpha in (-0.1, 1.01, math.nan):
        with pytest.raises(UserError, match="between 0"): interpolate(FineTuned(tiny_clip), FineTuned(tiny_clip), alpha)


# the two forms of WiSE-FT

def test_the_public_form_mixes_the_heads_and_the_image_tower(tiny_clip, toy):
    "written as the public script does it: image tower tensor by tensor, then the two heads"
    end, alpha = FineTuned(moved(tiny_clip)), 0.3
    found = wise_ft_heads(tiny_clip, tokenizer, toy, end, alpha)
    visual = {k: (1 - alpha) * v + alpha * end.student.visual.state_dict()[k]
              for k, v in tiny_clip.visual.state_dict().items()}
    tower = copy.deepcopy(tiny_clip)
    tower.visual.load_state_dict(visual)
    heads = [classifier(FineTuned(model), tokenizer, toy).weight for model in (tiny_clip, end.student)]
    images = torch.stack([toy.val[i][0] for i in range(12)])
    with torch.no_grad():
        expected = tower.encode_image(images, normalize=True) @ ((1 - alpha) * heads[0] + alpha * heads[1]).T
        ours = classifier(found, tokenizer, toy)(images)
        towers = classifier(wise_ft_towers(tiny_clip, tokenizer, toy, end, alpha), tokenizer, toy)(images)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(towers, expected, atol=1e-3)


def test_with_a_trained_head_both_forms_are_one(tiny_clip, toy):
    end = FineTuned(moved(tiny_clip), linear_head(torch.randn(4, 16), torch.randn(4)))
    a, b = (make(tiny_clip, tokenizer, toy, end, 0.3) for make in (wise_ft_towers, wise_ft_heads))
    assert torch.equal(a.head.weight, b.head.weight) and torch.equal(a.head.bias, b.head.bias)
    assert all(torch.equal(x, y) for x, y in zip(a.student.parameters(), b.student.parameters()))
    assert with_head(end, tokenizer, toy) is end


# Model Stock

def loop(start, ends):
    "Model Stock of one tensor, entry by entry in float64."
    flat = [[float(b) - float(a) for a, b in zip(start.flatten().double(), end.flatten().double())] for end in ends]
    def norm(x): return math.sqrt(math.fsum(v * v for v in x))
    pairs = list(combinations(flat, 2))
    c = math.fsum(math.fsum(x * y for x, y in zip(a, b)) / (norm(a) * norm(b)) for a, b in pairs) / len(pairs)
    n = len(ends)
    t = min(1.0, max(0.0, n * c / (1 + (n - 1) * c)))
    mean = [math.fsum(column) / n for column in zip(*(end.flatten().double().tolist() for end in ends))]
    mixed = [t * m + (1 - t) * a for m, a in zip(mean, start.flatten().double().tolist())]
    return torch.tensor(mixed, dtype=torch.float64).reshape(start.shape)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_parity_with_a_loop_in_float64(n):
    torch.manual_seed(n)
    start = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    way = [0.05 * torch.randn_like(p) for p in start.parameters()]
    ends = [copy.deepcopy(start) for _ in range(n)]
    with torch.no_grad():
        for end in ends:
            for p, w in zip(end.parameters(), way): p += w + 0.04 * torch.randn_like(p)
    found, states = model_stock(start, ends), [end.state_dict() for end in ends]
    for name, tensor in start.named_parameters():
        expected = loop(tensor.detach(), [state[name] for state in states])
        torch.testing.assert_close(found.state_dict()[name], expected, atol=1e-9, rtol=0)
    as_state = model_stock(start.state_dict(), states)
    assert all(torch.equal(as_state[name], tensor) for name, tensor in found.state_dict().items())


def test_two_models_by_hand():
    "c = 0.6: t = 2c / (1 + c) = 0.75 of the mean (0.8, 0.4)"
    start, ends = torch.tensor([1.0, 0.0]), [torch.tensor([2.0, 0.0]), torch.tensor([1.6, 0.8])]
    torch.testing.assert_close(stock_tensor(start, ends), 0.75 * torch.tensor([1.8, 0.4]) + 0.25 * start)


def test_bounds():
    start, there = torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(stock_tensor(start, [start, start]), start)  # nothing moved
    assert torch.equal(stock_tensor(start, [there, start]), start)  # an angle that is none counts as a right one
    assert torch.equal(stock_tensor(start, [there, -there]), start)  # opposite: c = -1, the denominator is 0
    torch.testing.assert_close(stock_tensor(start, [there, there, there]), there)
    scalar = stock_tensor(torch.tensor(4.0), [torch.tensor(5.0), torch.tensor(6.0)])
    assert scalar.shape == () and scalar == 5.5
    assert all(0 <= stock_ratio(c, n) <= 1 for n in (2, 3, 9) for c in (-1, -1 / (n - 1), -1e-9, 0, 0.3, 1, 1 + 1e-12))
    assert mean_cosine(torch.tensor([[2.0, 0], [0, 3]])) == 0


def test_precision_and_type_are_those_of_the_start():
    start = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    assert stock_tensor(start, [start + 1, start + 1]).dtype == torch.bfloat16
    assert stock_tensor(torch.tensor(3), [torch.tensor(5), torch.tensor(8)]) == 5


def test_one_model_is_too_few_and_others_do_not_fit(tiny_clip, toy):
    for ends in ([], [tiny_clip]):
        with pytest.raises(UserError, match=f"two fine-tuned models or more, not {len(ends)}"):
            model_stock(tiny_clip, ends)
        with pytest.raises(UserError, match="two fine-tuned models or more"):
            stock_finetuned(tiny_clip, tokenizer, toy, [FineTuned(end) for end in ends])
    with pytest.raises(UserError, match="differ in architecture"):
        model_stock(nn.Linear(2, 2), [nn.Linear(2, 2), nn.Linear(2, 3)])


def test_heads_are_stocked_from_the_zero_shot_head(tiny_clip, toy):
    ends = [FineTuned(moved(tiny_clip, seed), linear_head(torch.randn(4, 16), torch.randn(4))) for seed in (1, 2, 3)]
    found = stock_finetuned(tiny_clip, tokenizer, toy, ends)
    start = starting_point(tiny_clip, tokenizer, toy, ends[0]).head
    expected = loop(start.weight.detach(), [end.head.weight.detach() for end in ends])
    torch.testing.assert_close(found.head.weight.double(), expected, atol=1e-5, rtol=1e-5)
    name = "visual.proj"
    expected = loop(tiny_clip.state_dict()[name], [end.student.state_dict()[name] for end in ends])
    torch.testing.assert_close(found.student.state_dict()[name].double(), expected, atol=1e-6, rtol=1e-6)
    assert found.student.config is tiny_clip.config or found.student.config == tiny_clip.config  # it can be saved


# derived methods

def make(method, clip, toy, tmp_path=None, bases=(), **settings):
    return fine_tune(copy.deepcopy(clip), tokenizer, toy, method, out=tmp_path, bases=bases, device="cpu", workers=0,
                     precision="fp32", **settings)


def test_zero_shot_with_a_temperature_is_a_clip_whose_scale_is_divided(tiny_clip, toy, tmp_path):
    plain = make("zs", tiny_clip, toy)
    images = torch.stack([toy.val[k % 12][0] for k in range(120)])  # a fit takes some images
    with torch.no_grad(): labels = classifier(plain, tokenizer, toy)(images).argmax(1)
    labels[::3] = (labels[::3] + 1) % 4
    toy = replace(toy, val=TensorDataset(images, labels))
    found = make("zs-t", tiny_clip, toy, tmp_path)
    before, after = (predict_sets(classifier(m, tokenizer, toy), toy) for m in (plain, found))
    T = fit_temperature(before["val"].logits, before["val"].labels)
    assert abs(T - 1) > 0.01
    for name in before: torch.testing.assert_close(after[name].logits, before[name].logits / T, rtol=1e-4, atol=1e-6)
    saved = load_finetuned(tmp_path)
    assert saved.head is None and torch.equal(saved.student.logit_scale, found.student.logit_scale)
    assert all(torch.equal(a, b) for (n, a), b in zip(found.student.named_parameters(), plain.student.parameters())
               if n != "logit_scale")


@pytest.mark.parametrize("headed", [False, True])
def test_derived_methods_are_the_arithmetic_of_their_bases(tiny_clip, toy, tmp_path, headed):
    ends = [FineTuned(moved(tiny_clip, seed), linear_head(torch.randn(4, 16), torch.randn(4)) if headed else None)
            for seed in (1, 2, 3)]
    found = (make("wise-ft", tiny_clip, toy, tmp_path, ends[:1], alpha=0.3),
             make("model-stock", tiny_clip, toy, bases=ends))
    expected = (wise_ft_towers(tiny_clip, tokenizer, toy, ends[0], 0.3),
                stock_finetuned(tiny_clip, tokenizer, toy, ends))
    for ours, theirs in zip(found, expected):
        assert all(torch.equal(a, b) for a, b in zip(ours.student.parameters(), theirs.student.parameters()))
        assert (ours.head is None) == (not headed) and ours.log == [] and ours.teacher is None
        if headed: assert torch.equal(ours.head.weight, theirs.head.weight)
    saved = load_finetuned(tmp_path)
    assert torch.equal(saved.student.logit_scale, found[0].student.logit_scale) and (saved.head is None) == (not headed)


def test_the_runs_a_run_is_made_from(tmp_path):
    wise = resolve({"method": "wise-ft", "seed": 2, "out": str(tmp_path), "eval_sets": "Glyphs",
                    "base_settings": "lr=0.001;epochs=3"})
    base, = wise.bases
    assert (base.method.name, base.settings.seed, base.settings.lr, base.settings.epochs) == ("ft", 2, 0.001, 3)
    assert base.settings.eval_sets == "Glyphs" and base.settings.out == str(tmp_path) and base.bases == []
    assert [b.settings.seed for b in resolve({"method": "model-stock", "of_seeds": 2}).bases] == [1, 2]
    twice = resolve({"method": "wise-ft", "base": "model-stock"})  # derived of derived
    assert [b.method.name for b in twice.bases[0].bases] == ["ft"] * 3
    with pytest.raises(UserError, match="make it first: carot run --method=ft .*--lr=0.001.* --seed=2"):
        load_bases(wise)
    with pytest.raises(UserError, match="zs leaves none"): resolve({"method": "wise-ft", "base": "zs"})


def test_a_comparison_makes_bases_first_and_passes_on_what_they_use(tmp_path):
    planned = plan_runs(["wise-ft", "model-stock", "zs"], 1, {"lr": 1e-3, "out": str(tmp_path)})
    needed = with_bases(planned)
    names = [(job.method.name, job.parameters["seed"]) for job in needed]
    assert names == [("ft", 1), ("ft", 2), ("ft", 3), ("zs", 1), ("wise-ft", 1), ("model-stock", 1)]
    assert all(job.parameters["lr"] == 1e-3 for job in needed[:3]) and needed[3:] == planned
    assert [job_for(job.given).path for job in needed] == [job.path for job in needed]
    chained = with_bases(plan_runs(["wise-ft"], 1, {"base": "model-stock", "out": str(tmp_path)}))
    assert [job.method.name for job in chained] == ["ft", "ft", "ft", "model-stock", "wise-ft"]
    with pytest.raises(UserError, match="uses probe_lr"): plan_runs(["wise-ft"], 1, {"probe_lr": 1e-3})


def test_a_derived_run_waits_for_its_bases(tmp_path):
    jobs = with_bases(plan_runs(["model-stock", "zs"], 1, {"out": str(tmp_path)}))
    stock, zs = (next(job for job in jobs if job.method.name == name) for name in ("model-stock", "zs"))
    ft = [job for job in jobs if job.method.name == "ft"]
    queue = Queue("", [stock, ft[0], zs], 4, StopSignals(), None, None)
    assert next_job(queue) is ft[0]
    queue.active, queue.waiting = [ft[0]], [stock, zs]
    assert next_job(queue) is zs
    queue.waiting = [stock]
    assert next_job(queue) is None
    queue.active = []
    assert next_job(queue) is stock  # its own process says what is missing
