"""Teachers: three kernels against their closed forms, their clocks, and runs that are stopped and go on."""
import copy
import math
import signal
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from small_runs import same, tiny_tokenizer, tune  # noqa: F401, a fixture
from test_checkpoints import equal, signals_at
from torch import nn

from carot import train
from carot.engine.signals import Stopped
from carot.methods.base import find_method, settings_of
from carot.teachers import KernelSettings, Teacher, TeacherSettings, kernel_weight

STEPS = 23


def walk(settings, total=STEPS, to=None):
    "The student's weights after each step, the initial ones first; the teacher's; what was logged."
    torch.manual_seed(3)
    student = nn.Linear(4, 2).double()
    teacher = Teacher({"teacher": student}, settings, total)
    students, teachers, momenta = [student.weight.detach().clone()], [], []
    for step in range(1, (to or total) + 1):
        with torch.no_grad():
            for p in student.parameters(): p.add_(torch.randn_like(p))
        momenta.append(teacher.after_step(step)["momentum"])
        students.append(student.weight.detach().clone())
        teachers.append(teacher.modules["teacher"].weight.clone())
    return students, teachers, momenta


def far(one, two): return (one - two).abs().max().item()


# kernels

@pytest.mark.parametrize("every", [1, 4, 500])
@pytest.mark.parametrize("start, end, warm", [(0.05, 0.9, 0.2), (0.5, 0.99, 0.0), (0.3, 0.8, 1.0)])
def test_ema_is_the_recursion_of_the_public_code(every, start, end, warm):
    students, teachers, momenta = walk(TeacherSettings("ema", 0.5, every, start, end, warm))
    expected = students[0]
    for step in range(1, STEPS + 1):
        m = end if step >= warm * STEPS else start + (end - start) * step / (warm * STEPS)
        assert momenta[step - 1] == pytest.approx(m, abs=1e-12)
        if step % every == 0 or step == STEPS: expected = m * expected + (1 - m) * students[step]
        assert far(teachers[step - 1], expected) < 1e-12, step


def density(tau, beta): return math.gamma(2 * beta) / math.gamma(beta) ** 2 * (tau * (1 - tau)) ** (beta - 1)


def weighted(students, updates, total, beta):
    "Σ κ(τ_k) θ_k / Σ κ(τ_k) over the steps after which the teacher was updated, the start being one."
    taus = [(k + 0.5) / (total + 1) for k in range(len(updates) + 1)]
    weights = torch.tensor([density(tau, beta) for tau in taus], dtype=torch.float64)
    return torch.tensordot(weights, torch.stack([students[step] for step in [0, *updates]]), 1) / weights.sum()


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("every", [1, 4, 23, 500])
def test_beta_is_the_weighted_mean_of_the_whole_way(every, beta):
    "On the clock of its updates: with one every four steps the last of six, after step 23, ends the kernel."
    students, teachers, momenta = walk(TeacherSettings("beta", beta, every))
    due = [step for step in range(1, STEPS + 1) if step % every == 0 or step == STEPS]
    for step in range(1, STEPS + 1):
        done = [k for k in due if k <= step]
        assert far(teachers[step - 1], weighted(students, done, len(due), beta)) < 1e-12, step
    if beta == 0.5: assert kernel_weight(0, len(due)) == pytest.approx(kernel_weight(len(due), len(due)))


def test_uniform_weights_are_the_plain_mean():
    students, teachers, _ = walk(TeacherSettings("beta", 1.0, 1))
    assert far(teachers[-1], torch.stack(students).mean(0)) < 1e-12


def test_a_slow_clock_reaches_the_end_of_its_kernel():
    "Counting steps of T instead of updates, the last student would weigh what one near the start weighs."
    students, teachers, _ = walk(TeacherSettings("beta", 0.5, 5))
    due = [5, 10, 15, 20, 23]
    wrong = weighted(students, due, STEPS, 0.5)
    assert far(teachers[-1], weighted(students, due, len(due), 0.5)) < 1e-12 < 1e-3 < far(teachers[-1], wrong)


def test_without_a_timetable_it_moves_after_every_step():
    for one, two in zip(walk(KernelSettings("beta"))[1], walk(TeacherSettings("beta", 0.5, 1))[1]):
        assert torch.equal(one, two)


@pytest.mark.parametrize("settings", [TeacherSettings("still", 0.5, 1), SimpleNamespace(teacher_kernel="still")])
def test_still_never_moves(settings):
    students, teachers, momenta = walk(settings)
    assert all(torch.equal(teacher, students[0]) for teacher in teachers) and set(momenta) == {1.0}


def test_shares_of_the_zero_shot_model_in_a_run_of_imagenet():
    "A student that is 1 at first and 0 ever after: the teacher is the initial model's share."
    total, student = 25030, nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(student.weight)
    teacher, shares = Teacher({"teacher": student}, KernelSettings("beta"), total), {}
    nn.init.zeros_(student.weight)
    for step in range(1, total + 1):
        teacher.after_step(step)
        if step in (1, 500, total): shares[step] = teacher.modules["teacher"].weight.item()
    assert {step: round(share, 3) for step, share in shares.items()} == {1: 0.634, 500: 0.032, total: 0.003}
    assert shares[1] == pytest.approx(math.sqrt(3) / (1 + math.sqrt(3)), abs=1e-4)


@pytest.mark.parametrize("settings", [TeacherSettings("ema", 0.5, 2), KernelSettings("beta")])
def test_parameters_follow_and_buffers_do_not(settings):
    student = nn.BatchNorm1d(3).double()
    teacher = Teacher({"teacher": student}, settings, 4)
    student.running_mean += 1
    with torch.no_grad(): student.weight += 1
    for step in range(1, 5): teacher.after_step(step)
    copied = teacher.modules["teacher"]
    assert copied.running_mean.abs().max() == 0 and copied.weight.min() > 1
    assert not copied.training and not any(p.requires_grad for p in copied.parameters())


def test_several_modules_move_together():
    tower, head = nn.Linear(2, 2).double(), nn.Linear(2, 3).double()
    teacher = Teacher({"teacher": tower, "teacher_head": head}, KernelSettings("beta"), 5)
    before = {name: module.weight.clone() for name, module in teacher.modules.items()}
    with torch.no_grad():
        for module in (tower, head): module.weight += 1
    w = teacher.after_step(1)["momentum"]
    for name, old in before.items(): assert far(teacher.modules[name].weight, old + 1 - w) < 1e-12


# methods

def test_still_method_keeps_the_zero_shot_model(tiny_clip, tokenizer, toy):
    run = tune(tiny_clip, tokenizer, toy, "carot-still")
    assert same(run.teacher, tiny_clip) and not same(run.student, tiny_clip)
    assert ["distillation" in row for row in run.log] == [False] + [True] * 8


@pytest.mark.parametrize("method, given", [
    ("carot-still", dict(teacher_kernel="still")), ("carot-beta", dict(teacher_kernel="beta", teacher_update_every=1))])
def test_they_are_carot_with_another_teacher(tiny_clip, tokenizer, toy, method, given):
    one, two = tune(tiny_clip, tokenizer, toy, method), tune(tiny_clip, tokenizer, toy, "carot", **given)
    assert same(one.student, two.student) and same(one.teacher, two.teacher)
    other = tune(tiny_clip, tokenizer, toy, "carot")
    assert not same(one.student, other.student) and not same(one.teacher, other.teacher)


def test_weighted_method_keeps_the_mean_of_its_students(tiny_clip, tokenizer, toy, monkeypatch):
    students, original = [copy.deepcopy(tiny_clip)], train.train_step
    def stepping(objective, *words, **named):
        values = original(objective, *words, **named)
        students.append(copy.deepcopy(objective.clip))
        return values
    monkeypatch.setattr(train, "train_step", stepping)
    run = tune(tiny_clip, tokenizer, toy, "carot-beta", teacher_beta=0.7)
    tracks = [dict(student.named_parameters()) for student in students]
    for name, p in run.teacher.named_parameters():
        mean = weighted([track[name].detach().double() for track in tracks], range(1, 10), 9, 0.7)
        assert far(p, mean) < 1e-6, name
    assert len(students) == 10


def test_their_coefficients_are_those_of_carot():
    usual, _ = settings_of(find_method("carot"), {}, {})
    for name in ("carot-still", "carot-beta"):
        own, _ = settings_of(find_method(name), {}, {})
        known = set(vars(own)) & set(vars(usual)) - {"method"}
        assert {key: getattr(own, key) for key in known} == {key: getattr(usual, key) for key in known}


# stopped and resumed

CASES = [("carot", {}), ("carot", dict(teacher_kernel="beta", teacher_update_every=2)), ("carot-still", {}),
         ("carot-beta", {}), ("tracer", {}), ("tracer", dict(teacher_kernel="still"))]

@pytest.mark.parametrize("method, given", CASES, ids=[f"{m}-{'-'.join(map(str, g.values()))}" for m, g in CASES])
def test_stopped_after_every_step_ends_the_same(tiny_clip, tokenizer, toy, tmp_path, method, given):
    "A weighted teacher's counters come back, too: without them it would be another teacher."
    whole, stops = tune(tiny_clip, tokenizer, toy, method, out=tmp_path/"whole", **given), 0
    while stops < 20:
        try:
            with signals_at(1, signal.SIGTERM):
                run = tune(tiny_clip, tokenizer, toy, method, out=tmp_path/"cut", checkpoint_minutes=0.0, **given)
            break
        except Stopped: stops += 1
    assert stops == 9 and equal(whole, run, tmp_path/"whole", tmp_path/"cut")
    assert torch.isfinite(torch.tensor([row["loss"] for row in whole.log])).all()


def test_counters_are_in_the_checkpoint(tiny_clip, tokenizer, toy, tmp_path):
    tune(tiny_clip, tokenizer, toy, "carot-beta", out=tmp_path)
    newest = max((tmp_path/"checkpoints"/"train").glob("step-*"))
    kept = load_file(newest/"teacher_counters.safetensors")
    assert kept["updates"] == 9 and kept["total"].dtype == torch.float64
    assert kept["total"].item() == pytest.approx(sum(kernel_weight(n, 9) for n in range(10)), rel=1e-12)
    assert not (tmp_path/"teacher_counters").exists()
