"""Models from every source, equal to open_clip's own; saved students open without carot; bad files are one line."""
import json
import pickle
import subprocess
import sys

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from carot.clip import (
    WEIGHTS,
    build_clip,
    image_features,
    is_causal,
    load_clip,
    is_plain,
    named_config,
    packed_text,
    padded_text,
    save_clip,
    text_features,
    text_projection,
    trimmed_length,
    visual_projection,
    zero_shot_head,
)
from carot.core import UserError

RESNET = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
}
CUSTOM = {
    "model_cfg": {
        "custom_text": True,
        "embed_dim": 16,
        "vision_cfg": {
            "timm_model_name": "test_efficientnet_ln",
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": 32,
        },
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
}

@pytest.fixture(scope="module")
def glyphs(): return load_clip("glyphs")

@pytest.mark.parametrize("config, size", [(RESNET, 64), (CUSTOM, 32)])
def test_other_towers(config, size):
    torch.manual_seed(0)
    clip = build_clip(config).eval()
    images, tokens = (
        torch.randn(2, 3, size, size),
        open_clip.get_tokenizer("RN50")(["a sun", "a photo of a small moon"]),
    )
    with torch.no_grad():
        assert torch.equal(image_features(clip, images), clip.encode_image(images, normalize=True))
        assert torch.allclose(text_features(clip, tokens), clip.encode_text(tokens, normalize=True), atol=1e-6)
    assert (
        is_causal(getattr(clip, "text", clip))
        and visual_projection(clip).shape[1] == text_projection(clip).shape[1] == 16
    )
    (visual_projection(clip).sum() + text_projection(clip).sum()).backward()
    touched = {name for name, p in clip.named_parameters() if p.grad is not None}
    assert len(touched) == 2

def test_resnet_projection_is_the_attention_pool_output():
    clip = build_clip(RESNET)
    assert torch.equal(visual_projection(clip), clip.visual.attnpool.c_proj.weight.T)

def test_features_are_those_of_open_clips_own_forward(glyphs):
    clip, tokens = glyphs[0], glyphs[3](["a sun", "a photo of a skull and crossbones"])
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad(): f_v, f_t, s = clip(images, tokens)
    with torch.no_grad():
        assert torch.allclose(image_features(clip, images), f_v, atol=1e-6) and torch.allclose(
            text_features(clip, tokens), f_t, atol=1e-6
        )
    assert torch.equal(s, clip.logit_scale.exp())

def test_text_gradients_are_those_of_the_full_length(glyphs):
    clip, tokenizer = glyphs[0], glyphs[3]
    tokens, grads = tokenizer(["a sun", "a photo of a skull and crossbones"]), []
    for encode in (text_features, lambda c, t: c.encode_text(t, normalize=True)):
        clip.zero_grad()
        encode(clip, tokens)[:, 0].sum().backward()
        grads.append({n: p.grad.clone() for n, p in clip.named_parameters() if p.grad is not None})
    clip.zero_grad()
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]: assert torch.allclose(grads[0][name], grads[1][name], atol=1e-6), name

@pytest.mark.parametrize("text, plain", [({}, True), ({"ls_init_value": 0.5}, True), ({"layers": 1}, True),
                                         ({"qk_norm": True}, False)], ids=str)
def test_text_without_padding_is_text_with_it(text, plain):
    "Features and gradients of captions of all lengths, in float64; blocks of another kind are left to open_clip."
    torch.manual_seed(0)
    config = json.loads(json.dumps(CUSTOM))
    config["model_cfg"]["text_cfg"] |= text
    clip, made = build_clip(config).double(), []
    tokens = open_clip.get_tokenizer("RN50")(["", "a", "a sun", "a photo of a small moon", "a " * 100])
    assert is_plain(clip.text.transformer) == plain
    def whole(clip, tokens): return clip.encode_text(tokens, normalize=True)
    for read in (packed_text, padded_text) if plain else (text_features, whole):
        clip.zero_grad()
        features = read(clip.text if plain else clip, tokens)
        features.square().flatten().cumsum(0).sum().backward()
        made.append([features, *(p.grad for p in clip.text.parameters() if p.grad is not None)])
    assert len(made[0]) == len(made[1]) > 10
    for one, other in zip(*made): assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)

def test_layers_that_are_computed_again_are_left_to_open_clip(glyphs):
    clip, tokens = glyphs[0], glyphs[3](["a sun", "a photo of a moon"])
    kept = text_features(clip, tokens)
    clip.set_grad_checkpointing(True)
    try: assert not is_plain(clip.transformer) and torch.allclose(text_features(clip, tokens), kept, atol=1e-6)
    finally: clip.set_grad_checkpointing(False)

def test_trimmed_length_counts_the_end_of_text(glyphs):
    tokens = glyphs[3](["a sun", "a photo of the sun"])
    assert trimmed_length(tokens) == 7 and trimmed_length(tokens[:1]) == 4

def test_bidirectional_text_is_left_alone():
    config = json.loads(json.dumps(CUSTOM))
    config["model_cfg"]["text_cfg"] |= {"no_causal_mask": True}
    clip = build_clip(config).eval()
    tokens = open_clip.get_tokenizer("RN50")(["a sun"])
    assert not is_causal(clip.text)
    with torch.no_grad(): assert torch.equal(text_features(clip, tokens), clip.encode_text(tokens, normalize=True))

def test_zero_shot_head_is_the_double_mean(glyphs):
    clip, _, _, tokenizer = glyphs
    names, templates = ["sun", "skull and crossbones", "anchor"], ["a photo of a {}", "a {}"]
    want = []
    with torch.no_grad():
        for name in names:
            each = F.normalize(clip.encode_text(tokenizer([t.format(name) for t in templates])), dim=-1)
            want.append(F.normalize(each.mean(0), dim=0) * clip.logit_scale.exp())
    for size in (1, 2, 1024):
        assert torch.allclose(zero_shot_head(clip, tokenizer, names, templates, size), torch.stack(want), atol=1e-4)

def test_saved_student_opens_without_carot(glyphs, tmp_path):
    clip = glyphs[0]
    save_clip(clip, tmp_path/"student")
    code = """if 1:
        import sys, torch, open_clip
        clip, _, transform = open_clip.create_model_and_transforms("local-dir:" + sys.argv[1])
        tokenizer = open_clip.get_tokenizer("local-dir:" + sys.argv[1])
        torch.manual_seed(0); clip.eval()
        words = tokenizer(["a sun", "an anchor"])
        with torch.no_grad(): out = [clip.encode_image(torch.randn(2, 3, 32, 32)), clip.encode_text(words)]
        assert "carot" not in sys.modules
        torch.save(out, sys.argv[1] + "/out.pt")"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path/"student")], check=True, cwd=tmp_path)
    torch.manual_seed(0)
    with torch.no_grad():
        want = [clip.encode_image(torch.randn(2, 3, 32, 32)), clip.encode_text(glyphs[3](["a sun", "an anchor"]))]
    for a, b in zip(torch.load(tmp_path / "student" / "out.pt", weights_only=True), want):
        assert torch.allclose(a, b, atol=1e-5)


def test_named_model_with_a_checkpoint_file(tmp_path):
    config = tmp_path/"tiny-vit-16.json"
    config.write_text(
        json.dumps(
            {
                "embed_dim": 16,
                "vision_cfg": {"image_size": 16, "layers": 1, "width": 24, "head_width": 8, "patch_size": 8},
                "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
            }
        )
    )
    open_clip.add_model_config(config)
    model = load_clip("tiny-vit-16", "random")[0]
    torch.save(model.state_dict(), tmp_path/"weights.pt")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path/"weights.safetensors")
    for file in ("weights.pt", "weights.safetensors"):
        again = load_clip("tiny-vit-16", str(tmp_path/file))[0]
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    clip, train, evaluate, tokenizer = load_clip("tiny-vit-16", str(tmp_path/"weights.pt"))
    assert tokenizer(["a sun"]).shape == (1, 12) and "16" in str(evaluate)

def test_quick_gelu_follows_the_tag():
    assert named_config("ViT-B-16", "openai")["model_cfg"]["quick_gelu"]
    assert not named_config("ViT-B-16", "random")["model_cfg"].get("quick_gelu")

class Bomb:
    def __reduce__(self): return (open, ("exploded", "w"))

def foreign(tmp_path, kind):
    folder = tmp_path/"model"
    clip = load_clip("glyphs")[0]
    save_clip(clip, folder)
    file = folder/"open_clip_model.safetensors"
    state = load_file(file)
    if kind == "truncated": file.write_bytes(file.read_bytes()[:1000])
    if kind == "empty": file.write_bytes(b"")
    if kind == "text": file.write_text("hello")
    if kind == "other shapes": save_file(state | {"logit_scale": torch.ones(3)}, file)
    if kind == "missing tensor": save_file({k: v for k, v in state.items() if k != "text_projection"}, file)
    if kind == "pickle": file.unlink(); (folder/"model.pt").write_bytes(pickle.dumps({"state_dict": Bomb()}))
    if kind == "torch pickle": file.unlink(); torch.save({"state_dict": Bomb()}, folder/"model.pt")
    if kind == "no weights": file.unlink()
    if kind == "no config": (folder/"open_clip_config.json").unlink()
    if kind == "broken config": (folder/"open_clip_config.json").write_text("{")
    if kind == "foreign config": (folder/"open_clip_config.json").write_text("{}")
    return folder

@pytest.mark.parametrize(
    "kind",
    [
        "truncated",
        "empty",
        "text",
        "other shapes",
        "missing tensor",
        "pickle",
        "torch pickle",
        "no weights",
        "no config",
        "broken config",
        "foreign config",
    ],
)
def test_bad_model_folders(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error: load_clip(str(foreign(tmp_path, kind)))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert not (tmp_path/"exploded").exists()

@pytest.mark.parametrize(
    "model, pretrained, words",
    [
        ("glyhps", None, "did you mean 'glyphs'"),
        ("ViT-B-16", "openia", "openai"),
        ("ViT-B-16", None, "needs `pretrained`"),
        ("glyphs", "openai", "no meaning"),
        ("/no/such/folder", None, "no folder"),
    ],
)
def test_bad_names(model, pretrained, words):
    with pytest.raises(UserError, match=words): load_clip(model, pretrained)

def test_built_in_weights_are_small_and_half_precision():
    files = list((WEIGHTS/"glyphs").iterdir())
    assert sum(f.stat().st_size for f in files) < 10e6
    state = load_file(WEIGHTS/"glyphs"/"open_clip_model.safetensors")
    assert state["token_embedding.weight"].dtype == torch.float16 and len(state["token_ids"]) == len(
        state["token_embedding.weight"]
    )
