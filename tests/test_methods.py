"FT with CaRot's terms, probes on cached features, frozen towers and full batches: against plain PyTorch, and resumed."
import copy

import pytest
import torch
import torch.nn.functional as F
from small_runs import Killed, same, settings_for, tiny_tokenizer, tune  # noqa: F401, a fixture
from test_large_batches import Cut, assert_same, cut_gradients, make, plain

from carot.clip import tower_parameters, zero_shot_head
from carot.core import UserError
from carot.data import EpochBatches
from carot.engine.devices import make_accelerator
from carot.methods.base import Start, find_method, settings_of
from carot.train import train_step

STEPS = 20


def clip_norm(parameters, limit=1.0):
    norm = torch.sqrt(sum(p.grad.square().sum() for p in parameters))
    if norm > limit:
        for p in parameters: p.grad.mul_(limit / (norm + 1e-6))


def formula(clip, weight, bias, teacher, batch, step, oc, cn, sd):
    "FT's loss with the terms, from their formulas."
    images, _, labels = batch
    def logits(tower, w, b): return tower.encode_image(images, normalize=True) @ w.T + b
    z = logits(clip, weight, bias)
    loss = -z.log_softmax(1)[torch.arange(len(labels)), labels].mean()
    w_v, w_t = clip.visual.proj, clip.text_projection.detach()
    loss = loss + oc * ((w_v.T @ w_v - torch.eye(16)) ** 2).sum().sqrt() + cn * ((w_v @ w_t.T) ** 2).sum().sqrt()
    if step:
        target = logits(teacher[0], *teacher[1:]).softmax(1).detach()
        loss = loss - sd * (target * z.log_softmax(1)).sum(1).mean()
    return loss


@pytest.mark.parametrize("oc, cn, sd", [(0.2, 0.0, 1.5), (0.0, 0.05, 0.0), (0.2, 0.05, 0.7)])
def test_ft_with_terms_is_its_formula(tiny_clip, tokenizer, toy, oc, cn, sd):
    "Loss, and weights, head and teacher after twenty steps of AdamW, in float64."
    given = dict(orthogonality_coef=oc, cross_norm_coef=cn, distillation_coef=sd, teacher_update_every=3)
    settings, _ = settings_of(find_method("ft"), {}, given)
    double = tiny_clip.double()
    stage, = find_method("ft").stages(Start(copy.deepcopy(double), tokenizer, toy, settings, STEPS))
    objective = stage.objective
    for module in objective.kept().values(): module.double()
    optimizer = torch.optim.AdamW(objective.trained(), lr=1e-3, weight_decay=0.1)
    clip = copy.deepcopy(double)
    weight = zero_shot_head(clip, tokenizer, toy.classnames, toy.templates).double().requires_grad_(True)
    bias = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    teacher = [copy.deepcopy(clip), weight.detach().clone(), bias.detach().clone()]
    learned = [weight, bias, *clip.visual.parameters()]
    other = torch.optim.AdamW(learned, lr=1e-3, weight_decay=0.1)
    for step in range(STEPS):
        torch.manual_seed(step)
        batch = torch.randn(8, 3, 16, 16).double(), torch.zeros(8, 0).long(), torch.arange(8) % 4
        found = train_step(objective, optimizer, make_accelerator("cpu", "fp32"), batch, step)
        loss = formula(clip, weight, bias, teacher, batch, step, oc, cn, sd)
        other.zero_grad()
        loss.backward()
        clip_norm(learned)
        other.step()
        assert found["loss"] == pytest.approx(loss.item(), abs=1e-9)
        momentum = objective.after_step(step + 1)["momentum"]
        if (step + 1) % 3 == 0 or step + 1 == STEPS:
            with torch.no_grad():
                pairs = zip(teacher[0].parameters(), clip.parameters())
                for old, new in [*pairs, (teacher[1], weight), (teacher[2], bias)]:
                    old.mul_(momentum).add_((1 - momentum) * new)
    kept = [(objective.head.weight, weight), (objective.head.bias, bias), (objective.teacher_head.weight, teacher[1]),
            *zip(objective.clip.parameters(), clip.parameters()),
            *zip(objective.teacher.parameters(), teacher[0].parameters())]
    for mine, theirs in kept: assert torch.allclose(mine, theirs, atol=1e-9, rtol=0)


def test_ft_with_terms_in_parts(tiny_clip, tokenizer, toy):
    method = find_method("ft")
    settings, _ = settings_of(method, {}, dict(orthogonality_coef=0.2, cross_norm_coef=0.05, distillation_coef=1.5))
    stage, = method.stages(Start(copy.deepcopy(tiny_clip), tokenizer, toy, settings, 9))
    for module in stage.objective.kept().values(): module.double()
    _, batch = make(tiny_clip, tokenizer, toy, "ft", 11)
    assert_same(plain(stage.objective, batch), cut_gradients(stage.objective, batch, Cut(micro_batch_size=4)))


def test_ft_with_terms_goes_on(tiny_clip, tokenizer, toy, tmp_path):
    "Killed after an epoch; the teacher's head is part of the checkpoint."
    terms = dict(distillation_coef=1.0, teacher_update_every=2)
    def stop(epoch, trained): raise Killed
    whole = tune(tiny_clip, tokenizer, toy, "ft", **terms)
    with pytest.raises(Killed): tune(tiny_clip, tokenizer, toy, "ft", out=tmp_path, on_epoch=stop, **terms)
    files = {path.name for path in tmp_path.glob("checkpoints/train/step-*/*.safetensors")}
    assert files == {"student.safetensors", "teacher.safetensors", "teacher_head.safetensors"}
    again = tune(tiny_clip, tokenizer, toy, "ft", out=tmp_path, **terms)
    for part in ("student", "head", "teacher", "teacher_head"): assert same(getattr(again, part), getattr(whole, part))
    assert (tmp_path/"teacher"/"head.safetensors").exists()


def test_without_terms_there_is_no_teacher(tiny_clip, tokenizer, toy):
    assert tune(tiny_clip, tokenizer, toy, "ft").teacher is None


@pytest.mark.parametrize("method", ["lp", "lp-ft"])
def test_a_probe_reads_each_image_once(tiny_clip, tokenizer, toy, monkeypatch, method):
    "In the transform of evaluation, however many epochs."
    seen = []
    class Counting:
        def __len__(self): return 40
        def __getitem__(self, index, train=toy.train):
            seen.append(index)
            return train[index]
    toy.train = Counting()
    passes, original = [], type(tiny_clip).encode_image
    def encode(self, images, **named):
        passes.append(len(images))
        return original(self, images, **named)
    monkeypatch.setattr(type(tiny_clip), "encode_image", encode)
    trained = tune(tiny_clip, tokenizer, toy, method, epochs=5)
    if method == "lp": assert sorted(seen) == list(range(40)) and sum(passes) == 40
    else: assert len(seen) == 40 + 5 * 40 and sum(passes) == 40 + 5 * 40
    assert len(trained.log) == 15


def test_a_probe_is_plain_softmax_regression(tiny_clip, tokenizer, toy):
    "The same batches through PyTorch alone; the bias starts at zero."
    toy.train.transform = toy.val.transform
    found = tune(tiny_clip, tokenizer, toy, "lp", epochs=2, warmup_steps=0, weight_decay=0.1)
    images, labels = zip(*(toy.train[i] for i in range(40)))
    with torch.no_grad(): features = tiny_clip.encode_image(torch.stack(images))
    torch.manual_seed(1)
    weight = torch.nn.Linear(16, 4).weight
    head = torch.nn.Linear(16, 4)
    head.weight.data, head.bias.data = weight.data.clone(), torch.zeros(4)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.1)
    from carot.train import learning_rate
    step = 0
    for epoch in (0, 1):
        for batch in EpochBatches(40, 16, 1, epoch):
            rows = [index for _, index in batch]
            for group in optimizer.param_groups: group["lr"] = learning_rate(step, 1e-3, 0, 6)
            loss = F.cross_entropy(head(features[rows]), torch.tensor(labels)[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert found.log[step]["loss"] == pytest.approx(loss.item(), abs=1e-6)
            step += 1
    assert torch.allclose(found.head.weight, head.weight, atol=1e-6)
    assert torch.allclose(found.head.bias, head.bias, atol=1e-6)


def test_a_probe_goes_on(tiny_clip, tokenizer, toy, tmp_path):
    def stop(epoch, trained): raise Killed
    whole = tune(tiny_clip, tokenizer, toy, "lp")
    with pytest.raises(Killed): tune(tiny_clip, tokenizer, toy, "lp", out=tmp_path, on_epoch=stop)
    assert same(tune(tiny_clip, tokenizer, toy, "lp", out=tmp_path).head, whole.head)


@pytest.mark.parametrize("method", ["flyp", "carot", "tracer"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_one_tower_stands_still(tiny_clip, tokenizer, toy, method, tower):
    start = copy.deepcopy(tiny_clip)
    trained = tune(tiny_clip, tokenizer, toy, method, train_towers=tower).student
    frozen = "text" if tower == "image" else "image"
    def moved(which):
        pairs = zip(tower_parameters(start, which), tower_parameters(trained, which))
        return [not torch.equal(old, new) for old, new in pairs]
    assert not any(moved(frozen)) and sum(moved(tower)) > len(moved(tower)) // 2
    assert trained.logit_scale != start.logit_scale
    settings, _ = settings_of(find_method(method), {}, {"train_towers": tower})
    stage, = find_method(method).stages(Start(start, tokenizer, toy, settings, 9))
    for module in {*stage.objective.kept().values(), *stage.objective.models.values()}: module.double()
    _, batch = make(tiny_clip, tokenizer, toy, "carot", 11)
    assert_same(plain(stage.objective, batch), cut_gradients(stage.objective, batch, Cut(micro_batch_size=4)))


def test_a_model_learns_whole_again_after_a_frozen_run(tiny_clip, tokenizer, toy):
    "What one run froze, the next one on the same model trains."
    from carot.train import fine_tune
    fine_tune(tiny_clip, tokenizer, toy, "flyp", **settings_for("flyp", train_towers="image"))
    before = [p.clone() for p in tower_parameters(tiny_clip, "text")]
    fine_tune(tiny_clip, tokenizer, toy, "flyp", **settings_for("flyp"))
    assert any(not torch.equal(old, new) for old, new in zip(before, tower_parameters(tiny_clip, "text")))


def test_full_batches(tiny_clip, tokenizer, toy, tmp_path):
    "40 images in batches of 16: three steps an epoch, all of them of 16 images, resumed in the middle of an epoch."
    sizes = []
    def counting(texts):
        sizes.append(len(texts))
        return tokenizer(texts)
    whole = tune(tiny_clip, counting, toy, "flyp", full_batches=True)
    assert len(whole.log) == 9 and set(sizes) == {16}
    sizes.clear()
    usual = tune(tiny_clip, counting, toy, "flyp")
    assert len(usual.log) == 9 and set(sizes) == {16, 8}
    assert [row["lr"] for row in usual.log] == [row["lr"] for row in whole.log]
    def stop(epoch, trained): raise Killed
    with pytest.raises(Killed): tune(tiny_clip, tokenizer, toy, "flyp", full_batches=True, out=tmp_path, on_epoch=stop)
    with pytest.raises(UserError, match="full_batches"): tune(tiny_clip, tokenizer, toy, "flyp", out=tmp_path)
    assert same(tune(tiny_clip, tokenizer, toy, "flyp", full_batches=True, out=tmp_path).student, whole.student)


def test_full_batches_in_several_steps_of_a_process(tiny_clip, tokenizer, toy):
    whole = tune(tiny_clip, tokenizer, toy, "carot", full_batches=True)
    cut = tune(tiny_clip, tokenizer, toy, "carot", full_batches=True, micro_batch_size=5)
    for a, b in zip(whole.log, cut.log): assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)


def test_every_built_in_method_says_where_it_is_from():
    from carot.methods.base import all_methods
    methods = all_methods().values()
    assert all(method.source and method.proof for method in methods if method.trains)
    assert len({(method.marker, method.filled) for method in methods}) == len(methods)
    assert [method.name for method in methods if method.usual] == ["zs", "lp", "ft", "lp-ft", "flyp", "carot"]
