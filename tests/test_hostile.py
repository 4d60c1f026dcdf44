"""Model folders and image files of strangers: they execute nothing, wait for nothing, are read rightly or refused."""
import json
import os
import struct
import sys
import types
import warnings
import zlib

import numpy as np
import open_clip
import pytest
from PIL import Image

from carot.benchmarks.decode import decode_image, read_tensor
from carot.benchmarks.files import scan_classes
from carot.benchmarks.folders import look_at_folder
from carot.clip import CONFIG, WEIGHTS, build_clip, load_clip, named_config, problems, save_clip
from carot.core import UserError
from carot.data import FORMATS, BadImage, load_benchmark, read_image

from conftest import TINY_VIT

# ---- model folders


@pytest.fixture(autouse=True)
def fake_transformers(monkeypatch, tmp_path):
    "A `transformers` that leaves a mark when it is asked for a tokenizer or a model, as the real one would run code."
    def mark(*_, **__): (tmp_path/"executed").touch()
    module = types.ModuleType("transformers")
    for name in ("AutoTokenizer", "AutoModel", "AutoConfig", "PretrainedConfig"):
        methods = dict.fromkeys(("from_pretrained", "from_config"), staticmethod(mark))
        setattr(module, name, type(name, (), methods))
    monkeypatch.setitem(sys.modules, "transformers", module)
    monkeypatch.setattr("open_clip.hf_model.transformers", module, raising=False)
    monkeypatch.setattr("open_clip.hf_model.AutoModel", module.AutoModel, raising=False)
    yield
    assert not (tmp_path/"executed").exists()


def folder_with(place, change):
    "a model folder that carot saved, its configuration changed"
    save_clip(build_clip(json.loads(json.dumps(TINY_VIT))), place)
    file = place/"open_clip_config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    (place/"tokenization_evil.py").write_text(f"open({str(place.parent/'executed')!r}, 'w')")
    return place


def setting(path, value):
    "a change of one value"
    *keys, last = path.split(".")
    def change(config):
        for key in keys: config = config.setdefault(key, {})
        config[last] = value
    return change


TEXT, VISION = "model_cfg.text_cfg", "model_cfg.vision_cfg"
HOSTILE = [
    (f"{TEXT}.hf_tokenizer_name", "x", "transformers"),
    (f"{TEXT}.tokenizer_kwargs", {"trust_remote_code": True}, "tokenizers other than CLIP's"),
    (f"{TEXT}.tokenizer_mode", "clips", "tokenizer"),
    (f"{TEXT}.hf_model_name", "roberta-base", "transformers"),
    (f"{TEXT}.hf_model_name", "/etc", "transformers"),
    (f"{TEXT}.hf_tokenizer_name", "", "transformers"),
    (f"{VISION}.timm_model_name", "hf-hub:somebody/model", "architecture in timm"),
    (f"{VISION}.timm_model_name", "hf_hub:somebody/model", "architecture in timm"),
    (f"{VISION}.timm_model_name", "local-dir:/tmp", "architecture in timm"),
    (f"{VISION}.timm_model_name", "../../x", "architecture in timm"),
    (f"{VISION}.timm_model_name", "https://example.org/x", "architecture in timm"),
    (f"{VISION}.timm_model_name", "resnet18.hf-hub:x/y", "architecture in timm"),
    (f"{VISION}.timm_model_name", ["resnet18"], "architecture in timm"),
    (f"{VISION}.norm_kwargs", {"device": "meta"}, "norm_kwargs.device"),
    (f"{VISION}.act_kwargs", {"approximate": "x" * 999}, "act_kwargs.approximate"),
    (f"{VISION}.act_kwargs", [1], "must be an object"),
    (f"{VISION}.width", 10**9, "16384"),
    (f"{VISION}.width", "24", "whole number"),
    (f"{VISION}.width", True, "whole number"),
    (f"{VISION}.layers", [1, 2], "list of 4"),
    (f"{VISION}.image_size", -1, "whole number"),
    (f"{VISION}.mlp_ratio", float("nan"), "number from"),
    (f"{VISION}.output_tokens", True, "false"),
    (f"{VISION}.head_width", 10_000, "no model that can be built"),
    (f"{TEXT}.vocab_size", 10, "49408"),
    (f"{TEXT}.heads", 7, "no model that can be built"),
    (f"{TEXT}.context_length", 10**12, "8192"),
    (TEXT, None, "must be an object"),
    (VISION, [], "must be an object"),
    ("model_cfg", "ViT-B-16", "must be an object"),
    ("model_cfg.multimodal_cfg", {"width": 8}, "CoCa"),
    ("model_cfg.cast_dtype", "float16", "cast_dtype is not allowed"),
    ("model_cfg.line\nbreak", 1, "is not allowed"),
    ("model_cfg.init_logit_bias", -10, "SigLIP"),
    ("auto_map", {"AutoModel": "evil.Evil"}, "auto_map is not allowed"),
    ("preprocess_cfg.size", 10**7, "4096"),
    ("preprocess_cfg.mode", "L", "RGB"),
    ("preprocess_cfg.mean", [0.5], "list of 3"),
    ("preprocess_cfg.std", [0, 1, 1], "list of 3"),
    ("preprocess_cfg.interpolation", "file:///etc/passwd", "bicubic"),
    ("preprocess_cfg", 3, "must be an object"),
]


@pytest.mark.parametrize("path, value, words", HOSTILE)
def test_a_configuration_is_data(tmp_path, path, value, words):
    place = folder_with(tmp_path/"model", setting(path, value))
    with pytest.raises(UserError, match=words) as error: load_clip(str(place))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600, error.value


def test_the_trap_works(tmp_path):
    "open_clip alone asks `transformers` for what such a folder names."
    place = folder_with(tmp_path/"model", setting(f"{TEXT}.hf_tokenizer_name", "x"))
    open_clip.get_tokenizer(f"local-dir:{place}")
    (tmp_path/"executed").unlink()


def test_pipes_and_giants_in_a_model_folder(tmp_path):
    place = folder_with(tmp_path/"model", lambda config: None)
    file, weights = place/"open_clip_config.json", place/"open_clip_model.safetensors"
    text = file.read_text()
    for words, spoil in [("not valid JSON", lambda: file.write_text("[" * 100_000)),
                         ("too large", lambda: file.write_text(" " * 2_000_000)),
                         ("not valid JSON", lambda: file.write_bytes(b"\xff\xfe")),
                         ("no open_clip_config", lambda: (file.unlink(), os.mkfifo(file)))]:
        spoil()
        with pytest.raises(UserError, match=words): load_clip(str(place))
    file.unlink()
    file.write_text(text)
    load_clip(str(place))
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(UserError, match="no weights"): load_clip(str(place))


def test_ordinary_configurations_pass():
    for name in ("ViT-B-16", "ViT-L-14", "RN50", "ViT-B-16-quickgelu", "convnext_base", "EVA02-B-16", "ViT-H-14"):
        assert not list(problems(named_config(name, "random"), CONFIG)), name
    assert not list(problems(named_config("ViT-B-16", "openai"), CONFIG))
    refused = [name for name in open_clip.list_models()
               if list(problems({"model_cfg": open_clip.get_model_config(name)}, CONFIG))]
    for name in refused:
        config = open_clip.get_model_config(name)
        assert "multimodal_cfg" in config or any(key.startswith("hf_") for key in config["text_cfg"]), name


def test_named_models_pass_the_same_list(monkeypatch):
    "What would ask `transformers` for a text tower or a tokenizer is refused by name, before anything is downloaded."
    def asked(*_, **__): raise AssertionError("something was built or downloaded")
    for name in ("build_clip", "published_weights"): monkeypatch.setattr(f"carot.clip.{name}", asked)
    monkeypatch.setattr(open_clip, "get_tokenizer", asked)
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        outside = "multimodal_cfg" in config or any(key.startswith("hf_") for key in config["text_cfg"])
        with pytest.raises(UserError if outside else AssertionError) as error: load_clip(name, "random")
        words = str(error.value)
        if outside: assert words.startswith(f"the model {name}: ") and "is not allowed, for" in words


@pytest.mark.parametrize("model", ["glyphs", "tiny", "tiny timm", "tiny ResNet"])
def test_saved_folders_load(tmp_path, model):
    vision = {"tiny timm": {"timm_model_name": "test_efficientnet_ln", "timm_pool": "avg", "timm_proj": "linear",
                            "image_size": 32},
              "tiny ResNet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}}.get(model)
    config = json.loads(json.dumps(TINY_VIT))
    if vision: config["model_cfg"]["vision_cfg"] = vision
    clip = load_clip("glyphs")[0] if model == "glyphs" else build_clip(config)
    place = save_clip(clip, tmp_path/"model")
    again, _, _, tokenizer = load_clip(str(place))
    assert [p.shape for p in clip.parameters()] == [p.shape for p in again.parameters()]
    theirs = open_clip.get_tokenizer(f"local-dir:{place}")
    assert (tokenizer(["a sun", "Ümläut &amp; more"]) == theirs(["a sun", "Ümläut &amp; more"])).all()


def test_sizes_of_old_folders(tmp_path):
    "Folders on hubs give mean and deviation only: the size is the image tower's."
    place = folder_with(tmp_path/"model", setting("preprocess_cfg", {"mean": [0, 0, 0], "std": [1, 1, 1]}))
    assert load_clip(str(place))[0].config["preprocess_cfg"]["size"] == 16
    assert (WEIGHTS/"glyphs"/"open_clip_config.json").stat().st_size < 10**4


# ---- images

RAMP = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
RGB = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)


def both(path):
    "what either reader makes of a file: pixels, or the message"
    found = []
    for read in (read_image, lambda path: read_tensor(path).permute(1, 2, 0).numpy()):
        try: found.append(np.asarray(read(path)))
        except BadImage as error: found.append(str(error))
    return found


def save_pgm(path, white, values):
    path.write_bytes(f"P5 {values.shape[1]} {values.shape[0]} {white}\n".encode() + values.astype(">u2").tobytes())


def save_12_bits(path, values):
    "a TIFF of one strip with 12 bits per pixel"
    pairs = values.reshape(-1, 2).astype(int)
    data = b"".join(struct.pack("BBB", a >> 4, (a & 15) << 4 | b >> 8, b & 255) for a, b in pairs)
    tags = [(256, values.shape[1]), (257, values.shape[0]), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1),
            (278, values.shape[0]), (279, len(data))]
    data += bytes(len(data) % 2)
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    path.write_bytes(struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + body
                     + bytes(4))


PRECISE = {
    "16.png": lambda path: Image.fromarray(RAMP).save(path),
    "16.tif": lambda path: Image.fromarray(RAMP).save(path),
    "16b.tif": lambda path: Image.frombytes("I;16B", (16, 16), RAMP.byteswap().tobytes()).save(path),
    "16.pgm": lambda path: save_pgm(path, 65535, RAMP),
    "4095.pgm": lambda path: save_pgm(path, 4095, np.rint(RAMP / 65535 * 4095)),
    "12.tif": lambda path: save_12_bits(path, np.rint(RAMP / 65535 * 4095)),
    "float.tif": lambda path: Image.fromarray(RAMP / np.float32(65535)).save(path),
    "float.pfm": lambda path: Image.fromarray(RAMP / np.float32(65535)).save(path),
    "16.jpg": lambda path: Image.fromarray(RAMP).save(path, "PNG"),
}


@pytest.mark.parametrize("name", PRECISE)
def test_more_than_eight_bits(tmp_path, name):
    PRECISE[name](tmp_path/name)
    want = np.rint(RAMP / 257).astype(int)[:, :, None]
    for pixels in both(tmp_path/name):
        assert pixels.shape == (16, 16, 3) and np.abs(pixels.astype(int) - want).max() <= (1 if "4095" in name else 0)
        assert pixels.min() == 0 and pixels.max() == 255


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "RGB"])
def test_other_modes_are_as_they_were(tmp_path, mode):
    image = Image.fromarray(RGB).convert("L" if mode == "LA" else "RGB").convert(mode)
    image.save(tmp_path/"x.img", "TIFF" if mode == "CMYK" else "PNG")
    for pixels in both(tmp_path/"x.img"): assert np.array_equal(pixels, image.convert("RGB"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_formats_are_told_by_content(tmp_path, kind):
    Image.fromarray(RGB).save(tmp_path/"x.jpg", kind)
    assert kind in FORMATS
    for pixels in both(tmp_path/"x.jpg"): assert pixels.shape == (16, 16, 3)


def test_several_pictures_and_rotation(tmp_path):
    "A camera's JPEG of two pictures gives the first, and EXIF's rotation is ignored, by all readers alike."
    one, two = Image.fromarray(RGB[:8]), Image.fromarray(255 - RGB)
    exif = Image.Exif()
    exif[274] = 6
    one.save(tmp_path/"mpo.jpg", "MPO", save_all=True, append_images=[two])
    one.save(tmp_path/"exif.jpg", exif=exif)
    with Image.open(tmp_path/"exif.jpg") as image: assert image.getexif()[274] == 6
    for name in ("mpo.jpg", "exif.jpg"):
        a, b = both(tmp_path/name)
        assert a.shape == (8, 16, 3) and np.array_equal(a, b)


def ramp(mode):
    "sixteen columns from dark to bright"
    return Image.fromarray(np.tile(np.arange(0, 256, 16, dtype=np.uint8), (16, 1))).convert(mode)


def save_palette(path, transparency):
    image = Image.fromarray(RGB).convert("P", palette=Image.Palette.ADAPTIVE)
    image.save(path, "PNG", transparency=transparency)


def save_frames(path, kind):
    "a moving picture: a ramp, then two frames of one colour"
    others = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    ramp("RGB").save(path, kind, save_all=True, append_images=others, duration=50, lossless=True)


COLOURS = {  # what is saved; what is read, as RGB
    "grey and alpha": (lambda path: Image.merge("LA", [ramp("L"), ramp("L")]).save(path, "PNG"), ramp("RGB")),
    "one bit": (lambda path: ramp("L").point(lambda v: 255 * (v > 100), "1").save(path, "PNG"),
                ramp("L").point(lambda v: 255 * (v > 100)).convert("RGB")),
    "palette, one clear": (lambda path: save_palette(path, 0), None),
    "palette, all half clear": (lambda path: save_palette(path, bytes([128] * 256)), None),
    "colour and alpha": (lambda path: Image.merge("RGBA", [*ramp("RGB").split(), ramp("L")]).save(path, "PNG"),
                         ramp("RGB")),
    "moving WebP": (lambda path: save_frames(path, "WEBP"), ramp("RGB")),
    "moving PNG": (lambda path: save_frames(path, "PNG"), ramp("RGB")),
    "several TIFF": (lambda path: save_frames(path, "TIFF"), ramp("RGB")),
    "CMYK JPEG": (lambda path: ramp("RGB").convert("CMYK").save(path, "JPEG", quality=100), ramp("RGB")),
}


@pytest.mark.parametrize("kind", COLOURS)
def test_colours_are_right(tmp_path, kind, recwarn):
    "An alpha channel is dropped, of several pictures the first is read, and nothing is said about it."
    save, want = COLOURS[kind]
    save(tmp_path/"x.png")
    if want is None: want = Image.open(tmp_path/"x.png").convert("RGBA").convert("RGB")
    for pixels in both(tmp_path/"x.png"):
        assert np.abs(pixels.astype(int) - np.asarray(want)).max() <= (4 if "JPEG" in kind else 0)
    assert not recwarn.list


def no_images(folder):
    "file -> words of the message"
    small = Image.fromarray(RGB)
    small.save(folder/"gif.jpg", "GIF")
    small.save(folder/"eps.jpg", "EPS")
    small.save(folder/"pdf.jpg", "PDF")
    small.save(folder/"ico.png", "ICO")
    Image.fromarray(np.full((4, 4), 7, np.int32)).save(folder/"int.tif")
    Image.fromarray(np.float32([[0, 200]])).save(folder/"float.tif")
    Image.fromarray(np.float32([[0, np.nan]])).save(folder/"nan.tif")
    os.mkfifo(folder/"pipe.jpg")
    (folder/"device.jpg").symlink_to("/dev/zero")
    (folder/"folder.jpg").mkdir()
    (folder/"gone.jpg").symlink_to(folder/"nowhere")
    (folder/"loop.jpg").symlink_to(folder/"loop.jpg")
    (folder/"empty.jpg").touch()
    with open(folder/"sparse.jpg", "wb") as file: file.truncate(2**40)
    small.save(folder/"whole.jpg", quality=95)
    (folder/"cut.jpg").write_bytes((folder/"whole.jpg").read_bytes()[:400])
    (folder/"line\nbreak.jpg").write_text("no image")
    return {"gif.jpg": "it is GIF", "eps.jpg": "it is PostScript", "pdf.jpg": "it is PDF", "ico.png": "cannot identify",
            "int.tif": "32 bits", "float.tif": "outside 0 to 1", "nan.tif": "outside 0 to 1",
            "pipe.jpg": "regular file", "device.jpg": "regular file", "folder.jpg": "regular file",
            "gone.jpg": "No such file", "loop.jpg": "symbolic links", "empty.jpg": "is empty",
            "sparse.jpg": "too many", "cut.jpg": "(?i)truncated", "line\nbreak.jpg": "cannot identify",
            "nul\0.jpg": "null"}


def test_what_is_no_image_is_refused_in_one_line(tmp_path, monkeypatch):
    def no_program(*_, **__): raise AssertionError("a program was started")
    monkeypatch.setattr("subprocess.Popen.__init__", no_program)
    for name, words in no_images(tmp_path).items():
        a, b = both(tmp_path/name)
        assert isinstance(a, str) and a == b and "\n" not in a, (name, a, b)
        with pytest.raises(BadImage, match=words): read_image(tmp_path/name)
        with pytest.raises(BadImage, match=words): read_tensor(tmp_path/name)
    (tmp_path/"link.jpg").symlink_to(tmp_path/"whole.jpg")
    assert all(isinstance(pixels, np.ndarray) for pixels in both(tmp_path/"link.jpg"))


def write_claim(path, width, height):
    "a PNG of a few bytes that claims to be large"
    def part(name, data): return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(bytes(99)))
                     + part(b"IEND", b""))


def test_large_images_are_read_without_a_word(tmp_path, monkeypatch, recwarn):
    "PIL warns of those that have more than half of what it refuses."
    Image.fromarray(RGB).save(tmp_path/"x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    assert all(isinstance(pixels, np.ndarray) for pixels in both(tmp_path/"x.png")) and not recwarn.list


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(tmp_path):
    Image.fromarray(RGB).save(tmp_path/"x.png")
    (tmp_path/"x.png").chmod(0)
    assert all("Permission denied" in message for message in both(tmp_path/"x.png"))


def test_bombs(tmp_path, monkeypatch):
    "PIL's limit holds in the fast path, too; running out of memory is no bad image."
    Image.fromarray(RGB).save(tmp_path/"x.jpg")
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        assert all("decompression bomb" in message for message in both(tmp_path/"x.jpg"))
        patch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        assert all(isinstance(pixels, np.ndarray) for pixels in both(tmp_path/"x.jpg"))
    data = bytearray((tmp_path/"x.jpg").read_bytes())
    at = data.index(b"\xff\xc0") + 5
    data[at:at + 4] = b"\xff\xdc\xff\xdc"  # 65,500 pixels either way
    (tmp_path/"x.jpg").write_bytes(data)
    assert all("decompression bomb" in message for message in both(tmp_path/"x.jpg"))

    write_claim(tmp_path/"x.png", 60_000, 60_000)
    with monkeypatch.context() as patch:  # nothing is decoded
        patch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("memory was taken"))
        assert all("3600000000 pixels" in message for message in both(tmp_path/"x.png"))

    def full(*_, **__): raise MemoryError
    monkeypatch.setattr(Image, "open", full)
    with pytest.raises(MemoryError): read_image(tmp_path/"x.jpg")
    with pytest.raises(MemoryError): decode_image(b"x", "x")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "PPM"])
def test_strips(tmp_path, monkeypatch, kind):
    "What a model's transform would make very large is refused before it is decoded, by either reader."
    for width, height in [(60_000, 1), (2, 513), (512, 2)]:
        Image.new("RGB", (width, height)).save(tmp_path/"x", kind)
        found = both(tmp_path/"x")
        if height == 2: assert [pixels.shape for pixels in found] == [(2, 512, 3)] * 2
        else: assert all(f"its sides, {width} × {height} pixels, differ" in message for message in found), found
    write_claim(tmp_path/"x.png", 100_000, 100)
    with monkeypatch.context() as patch:
        patch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("it was decoded"))
        assert all("crop it" in message for message in both(tmp_path/"x.png"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_damage_anywhere(tmp_path, kind):
    "Bytes are changed, cut out and doubled: an image or a BadImage, never anything else."
    rng = np.random.default_rng(0)
    Image.fromarray(RGB).save(tmp_path/"x", kind)
    whole = (tmp_path/"x").read_bytes()
    for _ in range(60):
        data, at = bytearray(whole), int(rng.integers(len(whole)))
        change = rng.integers(3)
        if change == 0: data[at:at + 4] = rng.bytes(4)
        elif change == 1: del data[at:at + int(rng.integers(1, 200))]
        else: data[at:at] = data[at:at + 50]
        (tmp_path/"y").write_bytes(data)
        with warnings.catch_warnings(action="ignore"): both(tmp_path/"y")


# ---- class folders


def test_left_out_images_are_told_once(tmp_path):
    for split in ("train", "val", "night"):
        for name in ("cat", "dog"):
            (tmp_path/split/name).mkdir(parents=True)
            Image.fromarray(RGB).save(tmp_path/split/name/"0.png")
    for name in ("a.gif", "b.GIF", "c.heic", "notes.txt"): (tmp_path/"night"/"cat"/name).touch()
    (tmp_path/"night"/"dog"/"d.gif").touch()
    with pytest.warns(UserWarning, match=r"night.*\(3 .gif, 1 .heic\)") as caught: load_benchmark(str(tmp_path))
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert [".gif" in report.warning for report in look_at_folder(tmp_path)] == [False, False, True]
    (tmp_path/"night"/"dog"/"0.png").unlink()
    with pytest.warns(UserWarning, match="3 .gif"): scan_classes(tmp_path/"night", {"cat": 0, "dog": 1})
    with warnings.catch_warnings(action="error"): scan_classes(tmp_path/"train", {"cat": 0, "dog": 1})


def test_left_out_images_are_told_beside_other_faults(tmp_path):
    "A shift may lack a class, and that is no word worth; images that are left out are."
    for place in ("train/cat", "train/dog", "train/owl", "val/cat", "val/dog", "val/owl", "night/cat", "night/dog"):
        (tmp_path/place).mkdir(parents=True)
        Image.fromarray(RGB).save(tmp_path/place/"0.png")
    (tmp_path/"night"/"cat"/"a.gif").touch()
    (tmp_path/"test").mkdir()
    (tmp_path/"test"/"cat").mkdir()
    Image.fromarray(RGB).save(tmp_path/"test"/"cat"/"0.png")
    (tmp_path/"test"/"cat"/"b.heic").touch()
    warned = {report.name: report.warning for report in look_at_folder(tmp_path)}
    assert "1 .gif" in warned["night"] and "no image" not in warned["night"]
    assert "1 .heic" in warned["test"] and "2 of 3 classes have no image" in warned["test"]
