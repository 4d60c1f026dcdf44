"""The loop: what is trained, what is saved, what survives a kill, what is refused."""
import copy
import csv
import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file

from carot.clip import zero_shot_head
from carot.core import UserError
from carot.engine.devices import make_accelerator
from carot.evaluate import classifier, predict_sets
from carot.methods.base import all_methods
from carot.methods.carot import CaRot, CaRotSettings
from carot.train import FineTuned, load_finetuned, make_optimizer, train_step
from small_runs import SETTINGS, Killed, same, tiny_tokenizer, tune  # noqa: F401, a fixture

@pytest.mark.parametrize("method", [name for name, method in all_methods().items() if not method.bases])
def test_same_seed_same_weights(tiny_clip, tokenizer, toy, method):
    one, two, other = [tune(tiny_clip, tokenizer, toy, method, seed=seed) for seed in (1, 1, 2)]
    def alike(a, b): return same(a.student, b.student) and (a.head is None or same(a.head, b.head))
    assert alike(one, two) and alike(one, other) == (not all_methods()[method].seeded)

def test_loader_processes_change_nothing(tiny_clip, tokenizer, toy):
    alone, helped = (tune(tiny_clip, tokenizer, toy, "carot", workers=workers) for workers in (0, 2))
    assert same(alone.student, helped.student)

def test_ft_starts_at_zero_shot(tiny_clip, tokenizer, toy):
    frozen = tune(tiny_clip, tokenizer, toy, "ft", lr=0.0)
    head = zero_shot_head(tiny_clip, tokenizer, toy.classnames, toy.templates)
    assert torch.allclose(frozen.head.weight, head) and frozen.head.bias.abs().max() == 0
    a = predict_sets(classifier(frozen, tokenizer, toy), toy)["Toy"].logits
    b = predict_sets(classifier(FineTuned(tiny_clip), tokenizer, toy), toy)["Toy"].logits
    assert torch.allclose(a, b, atol=1e-4)

def test_lp_ft_starts_at_its_probe(tiny_clip, tokenizer, toy, tmp_path):
    frozen = tune(tiny_clip, tokenizer, toy, "lp-ft", lr=0.0, out=tmp_path)
    probe = load_file(max((tmp_path/"checkpoints"/"probe").glob("step-*"))/"student.safetensors")
    assert torch.equal(frozen.head.weight, probe["head.weight"]) and frozen.normalized
    rows = list(csv.DictReader((tmp_path/"train.tsv").open(), delimiter="\t"))
    assert [row["stage"] for row in rows] == ["probe"] * 9 + ["train"] * 9

def test_only_ft_clips(tiny_clip, tokenizer, toy, monkeypatch):
    norms = []
    original = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a, **k: norms.append(a[1]) or original(*a, **k))
    for method, calls in (("ft", 9), ("lp", 0), ("flyp", 0), ("carot", 0), ("lp-ft", 9)):
        norms.clear()
        tune(tiny_clip, tokenizer, toy, method)
        assert norms == [1.0] * calls, method

def test_seconds_are_measured_and_sizes_are_those_of_the_batch(tiny_clip, tokenizer, toy, tmp_path):
    began = time.perf_counter()
    run = tune(tiny_clip, tokenizer, toy, "flyp", out=tmp_path)
    passed = time.perf_counter() - began
    seconds = [row["seconds"] for row in run.log]
    sizes = [row["seconds"] * row["pairs_per_second"] for row in run.log]
    assert min(seconds) > 0 and sum(seconds) < passed and sizes == pytest.approx([16, 16, 8] * 3, rel=0.01)
    written = list(csv.DictReader((tmp_path/"train.tsv").open(), delimiter="\t"))
    assert [float(row["seconds"]) for row in written] == seconds

@pytest.mark.parametrize("given", [{"batch_size": 13}, {"batch_size": 1}, {"accumulation_steps": 5},
                                   {"batch_size": 41, "full_batches": True}], ids=str)
def test_a_batch_of_one_pair_is_refused_before_anything_is_written(tiny_clip, tokenizer, toy, tmp_path, given):
    with pytest.raises(UserError, match="pair alone has a loss of 0|cannot be made of 40 training images"):
        tune(tiny_clip, tokenizer, toy, "flyp", out=tmp_path, **given)
    assert not any(tmp_path.iterdir())

def test_first_step_and_teacher(tiny_clip, tokenizer, toy):
    run = tune(tiny_clip, tokenizer, toy, "carot")
    assert ["distillation" in row for row in run.log] == [False] + [True] * 8
    assert not same(run.teacher, tiny_clip) and not same(run.teacher, run.student)
    assert not any(p.requires_grad for p in run.teacher.parameters())

def test_teacher_equals_a_hand_made_average(tiny_clip, tokenizer, toy):
    "One epoch, updates after steps 2 and 3 (the last): replayed from the students of these steps."
    run = tune(tiny_clip, tokenizer, toy, "carot", epochs=1, warmup_steps=1, teacher_warmup_fraction=1.0)
    momenta = [0.05 + 0.85 * k / 3 for k in (1, 2, 3)]
    assert [row["momentum"] for row in run.log] == pytest.approx(momenta)
    name, old = "text_projection", tiny_clip.text_projection.detach()
    new, teacher = run.student.state_dict()[name], run.teacher.state_dict()[name]
    # θ_t = m3·(m2·θ_0 + (1 − m2)·θ_s2) + (1 − m3)·θ_s3, so what is left must be a multiple of the step-2 student
    second = (teacher - (1 - momenta[2]) * new - momenta[2] * momenta[1] * old) / (momenta[2] * (1 - momenta[1]))
    assert 0 < (second - old).abs().max() < 3 * SETTINGS["lr"] and (second - new).abs().max() < 2 * SETTINGS["lr"]

@pytest.mark.parametrize("method", ["lp", "ft", "lp-ft", "flyp", "carot"])
@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_resume_is_bit_identical(tiny_clip, tokenizer, toy, tmp_path, method, epoch):
    def stop(done, _):
        if done == epoch: raise Killed
    whole = tune(tiny_clip, tokenizer, toy, method, out=tmp_path/"whole")
    with pytest.raises(Killed): tune(tiny_clip, tokenizer, toy, method, out=tmp_path/"cut", on_epoch=stop)
    with (tmp_path / "cut" / "train.tsv").open("a") as log:
        print("train", epoch * 3 + 1, epoch + 1, 0, 0, sep="\t", file=log)  # lost step
    resumed = tune(tiny_clip, tokenizer, toy, method, out=tmp_path/"cut")
    assert same(whole.student, resumed.student) and (whole.head is None or same(whole.head, resumed.head))
    assert whole.teacher is None or same(whole.teacher, resumed.teacher)
    logs = [
        [
            {k: v for k, v in row.items() if k not in ("seconds", "pairs_per_second")}
            for row in csv.DictReader((tmp_path / f / "train.tsv").open(), delimiter="\t")
        ]
        for f in ("whole", "cut")
    ]
    assert logs[0] == logs[1] and len(logs[0]) == (18 if method == "lp-ft" else 9)

def test_saved_before_anybody_evaluates(tiny_clip, tokenizer, toy, tmp_path):
    run = tune(tiny_clip, tokenizer, toy, "ft", out=tmp_path)
    opened = load_finetuned(tmp_path)
    assert same(opened.student, run.student) and same(opened.head, run.head) and opened.normalized

def test_other_settings_are_refused(tiny_clip, tokenizer, toy, tmp_path):
    tune(tiny_clip, tokenizer, toy, "carot", out=tmp_path)
    for change in (dict(lr=1e-2), dict(distillation_coef=3.0), dict(batch_size=8)):
        with pytest.raises(UserError, match=next(iter(change))):
            tune(tiny_clip, tokenizer, toy, "carot", out=tmp_path, **change)


@pytest.mark.parametrize(
    "name", ["student.safetensors", "teacher.safetensors", "optimizer.pt", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_checkpoint_is_one_line(tiny_clip, tokenizer, toy, tmp_path, name, damage):
    def stop(done, _): raise Killed
    with pytest.raises(Killed): tune(tiny_clip, tokenizer, toy, "carot", out=tmp_path, on_epoch=stop)
    file = max((tmp_path/"checkpoints"/"train").glob("step-*"))/name
    file.write_bytes(file.read_bytes()[:50]) if damage == "truncated" else file.unlink()
    with pytest.raises(UserError, match="cannot be used") as error:
        tune(tiny_clip, tokenizer, toy, "carot", out=tmp_path)
    assert "\n" not in str(error.value)

def test_half_written_checkpoint_is_ignored(tiny_clip, tokenizer, toy, tmp_path):
    def stop(done, _): raise Killed
    with pytest.raises(Killed): tune(tiny_clip, tokenizer, toy, "flyp", out=tmp_path, on_epoch=stop)
    folder = tmp_path/"checkpoints"/"train"
    shutil.copytree(max(folder.glob("step-*")), folder/".step-6")
    (folder/".step-6"/"state.json").unlink()
    assert same(
        tune(tiny_clip, tokenizer, toy, "flyp", out=tmp_path).student, tune(tiny_clip, tokenizer, toy, "flyp").student
    )


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(method="caort"), "did you mean 'carot'"),
        (dict(warmup_steps=10), "warmup_steps=10.*9 steps"),
        (dict(precision="fp61"), "unknown precision"),
        (dict(precision="fp16"), "needs a GPU"),
        (dict(device="cuda:9"), "CUDA devices"),
        (dict(device="gpu"), "unknown device"),
    ],
)
def test_refused(tiny_clip, tokenizer, toy, tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        tune(tiny_clip, tokenizer, toy, **{"method": "ft", "out": tmp_path} | change)
    assert not any(tmp_path.iterdir())

def test_non_finite_loss_stops_with_the_checkpoint_intact(tiny_clip, tokenizer, toy, tmp_path):
    with pytest.raises(
        UserError,
        match=r"contrastive not finite at step \d+ with lr \S+ \(batch: image \d+, .* and 36 more, "
        r"all in .*not_finite.txt\); the last",
    ):
        tune(tiny_clip, tokenizer, toy, "flyp", lr=1e8, warmup_steps=0, epochs=3, batch_size=40, out=tmp_path)
    assert len((tmp_path/"not_finite.txt").read_text().splitlines()) == 40
    steps = list((tmp_path/"checkpoints"/"train").glob("step-*"))
    assert all(t.isfinite().all() for p in steps for t in load_file(p/"student.safetensors").values())

def test_precision_can_change_within_a_process():
    assert [make_accelerator("cpu", p).mixed_precision for p in ("fp32", "bf16", "fp32")] == ["no", "bf16", "no"]

def test_bf16_trains(tiny_clip, tokenizer, toy):
    run = tune(tiny_clip, tokenizer, toy, "carot", precision="bf16")
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in run.student.parameters())

@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_rows_of_words_move_as_adamw_moves_them(decay):
    "Also behind a dense gradient, without a gradient, and from a state that was saved; unread rows only decay."
    ends = []
    for sparse in (False, True):
        torch.manual_seed(0)
        words = torch.nn.Embedding(50, 4, sparse=sparse).double()
        def fresh(words=words): return make_optimizer(words.parameters(), 0.1, decay, torch.device("cpu"))
        before, optimizer = words.weight.detach().clone(), fresh()
        for text in ([1, 1, 3], [2], None, [4, 49], "dense", [3], "reload", [2, 5]):
            if text == "reload":
                state, optimizer = copy.deepcopy(optimizer.state_dict()), fresh()
                optimizer.load_state_dict(state)
                continue
            if text == "dense": words.weight[10:12].square().sum().backward()
            elif text: words(torch.tensor(text)).sin().sum().backward()
            optimizer.step()
            assert words.weight.grad is None or not words.weight.grad.is_sparse
            optimizer.zero_grad()
        ends.append([words.weight.detach(), *optimizer.state[words.weight].values()])
    for one, other in zip(*ends): assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)
    assert torch.allclose(ends[1][0][20], before[20] * (1 - 0.1 * decay) ** 6) and ends[1][1] == 6

def test_words_have_sparse_gradients_in_a_step_only(tiny_clip, tokenizer, toy, monkeypatch):
    "And not where the device or the optimizer cannot use them."
    clip, seen = copy.deepcopy(tiny_clip), []
    objective = CaRot(clip, CaRotSettings(), 10)
    optimizer = make_optimizer(objective.trained(), 1e-4, 0.1, torch.device("cpu"))
    def move(p, group):
        seen.append(p.grad.is_sparse)
        p.grad = None
    monkeypatch.setattr(optimizer, "move_rows", move)
    batch = torch.randn(4, 3, 16, 16), tokenizer(["a", "a sun", "a moon", "a dog"]), torch.arange(4)
    for given in (optimizer, torch.optim.AdamW(objective.trained())):
        train_step(objective, given, make_accelerator("cpu"), batch, 0)
        assert seen == [True] and not clip.token_embedding.sparse

def test_state_is_json_and_weights_only(tiny_clip, tokenizer, toy, tmp_path):
    tune(tiny_clip, tokenizer, toy, "carot", out=tmp_path)
    folder = max((tmp_path/"checkpoints"/"train").glob("step-*"))
    assert json.loads((folder/"state.json").read_text())["step"] == 9
    torch.load(folder/"optimizer.pt", weights_only=True)
    assert sorted(p.suffix for p in folder.iterdir()) == [".json", ".json", ".pt", ".safetensors", ".safetensors"]
    assert sorted(p.name for p in (tmp_path/"checkpoints"/"train").iterdir()) == ["step-00000006", folder.name]
