"Shards: what is in them, interrupted and full disks, and that training on them is training on the originals."
import errno
import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2
from PIL import Image
from torch.utils.data import DataLoader

from carot.benchmarks import decode, shards, shrink
from carot.benchmarks.decode import fast, read_tensor
from carot.benchmarks.files import scan_classes
from carot.benchmarks.shards import ShardImages, class_dataset
from carot.benchmarks.shrink import shrink_images, write_shards
from carot.core import UserError
from carot.data import BadImage, Benchmark, CaptionedImages, load_benchmark, read_image

CLASSES = {"ant": 0, "bee": 1, "été": 2}
TRAIN = image_transform_v2(PreprocessCfg(size=32), is_train=True, aug_cfg=AugmentationCfg(scale=(0.9, 1.0)))


@pytest.fixture
def root(tmp_path):
    "Class folders with large and small JPEGs, PNGs, names with dots, and names that differ in their suffix only."
    rng, root = np.random.default_rng(0), tmp_path/"data"
    for split, n in [("train", 7), ("val", 2)]:
        for label, name in enumerate(CLASSES):
            folder = root/split/name
            folder.mkdir(parents=True)
            for i in range(n):
                coarse = rng.integers(0, 200, (9, 12 + i, 1), "uint8") + np.uint8([0, 20, 40])
                pixels = np.repeat(np.repeat(coarse, 8, 0), 8, 1)
                suffix = "png" if i in (2, 3) else "jpg"
                Image.fromarray(pixels[:40] if i == 2 else pixels).save(folder/f"a.b{i}.{suffix}")
            Image.new("L", (20, 20), 80 * label).save(folder/"same.jpg")
            Image.new("RGB", (20, 20), (80 * label, 9, 9)).save(folder/"same.png")
    return root


def originals(root, **settings): return scan_classes(root/"train", CLASSES, **settings)


def make(root, out, **settings):
    return write_shards(originals(root), list(CLASSES), out, **{"shorter_side": 48, "shard_size": 8} | settings)


def contents(out): return {p.name: p.read_bytes() for p in sorted(out.iterdir()) if p.is_file()}


def test_form_is_webdatasets(root, tmp_path):
    "A streaming reader groups neighbours by the name up to the first dot: an image and its class, each time."
    make(root, tmp_path/"out")
    images, seen = originals(root), []
    for tar in sorted((tmp_path/"out").glob("*.tar")):
        groups = {}
        with tarfile.open(fileobj=io.BytesIO(tar.read_bytes()), mode="r|") as stream:
            for member in stream:
                key, _, suffix = member.name.partition(".")
                assert "/" not in key and (key in groups) == (suffix == "cls")
                assert suffix != "cls" or key == list(groups)[-1]
                groups.setdefault(key, {})[suffix] = stream.extractfile(member).read()
        for key, group in groups.items():
            image, = set(group) - {"cls"}
            position = int(key.split("_")[0])
            seen.append(position)
            assert int(group["cls"]) == images.labels[position]
            assert key.endswith(Path(images.name(position)).stem.replace(".", "_"))
            assert Image.open(io.BytesIO(group[image])).format == {"jpg": "JPEG", "png": "PNG"}[image]
    assert sorted(seen) == list(range(len(images))) and seen != sorted(seen)


def test_same_images_same_numbers(root, tmp_path):
    make(root, tmp_path/"out")
    images, shrunk = originals(root), ShardImages(tmp_path/"out", CLASSES)
    assert shrunk.labels.tolist() == images.labels.tolist()
    for i in range(len(images)):
        old, new = images[i][0], shrunk[i][0]
        if min(old.size) <= 48: assert np.array_equal(old, new)
        else: assert min(new.size) == 48 and abs(new.width / new.height - old.width / old.height) < 0.03
        resized = old.resize(new.size, Image.Resampling.BICUBIC)
        small = np.abs(np.asarray(resized, float) - np.asarray(new, float)).mean()
        assert small < 8, (images.name(i), small)
    # other labels and a class less: what scan_classes makes of the folders
    for labels, ignore in [({"été": 0, "bee": 1, "ant": 2}, []), ({"bee": 0, "été": 1}, ["ant"])]:
        images = scan_classes(root/"train", labels, ignore=ignore)
        shrunk = ShardImages(tmp_path/"out", labels, ignore=ignore)
        assert shrunk.labels.tolist() == images.labels.tolist()
        assert all(Path(images.name(i)).stem.replace(".", "_") in shrunk.path(i) for i in range(len(images)))
    with pytest.raises(UserError, match="ant is none of the 1"): ShardImages(tmp_path/"out", {"bee": 0}, ignore=["été"])


def test_processes_change_nothing(root, tmp_path):
    for workers in (0, 2): make(root, tmp_path/str(workers), workers=workers)
    assert contents(tmp_path/"0") == contents(tmp_path/"2")


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_goes_on_after(root, tmp_path, monkeypatch, stop):
    "What is complete stays, nothing is half there, and the end result is that of a run without interruption."
    make(root, tmp_path/"whole")
    add, left = shards.add_file, iter(range(21))
    def fails(*arguments):
        if next(left, None) is None: raise stop
        add(*arguments)
    monkeypatch.setattr(shards, "add_file", fails)
    full_disk = isinstance(stop, OSError)
    with pytest.raises(UserError if full_disk else KeyboardInterrupt) as caught: make(root, tmp_path/"out")
    if full_disk: assert "No space left on device" in str(caught.value) and "goes on" in str(caught.value)
    assert sorted(p.name for p in (tmp_path/"out").iterdir()) == ["shards.json", "train-00000.npy", "train-00000.tar"]
    with pytest.raises(UserError, match="3 of 4 shards are missing"): ShardImages(tmp_path/"out")
    monkeypatch.undo()
    make(root, tmp_path/"out")
    assert contents(tmp_path/"out") == contents(tmp_path/"whole")


def test_refusals(root, tmp_path, monkeypatch):
    make(root, tmp_path/"out")
    (root/"train"/"ant"/"new.jpg").write_bytes((root/"train"/"ant"/"same.jpg").read_bytes())
    with pytest.raises(UserError, match="other images, files"): make(root, tmp_path/"out")
    (tmp_path/"out"/"shards.json").write_text("{")
    for call in (lambda: make(root, tmp_path/"out"), lambda: ShardImages(tmp_path/"out")):
        with pytest.raises(UserError, match="shards.json is damaged"): call()
    monkeypatch.setattr(shrink.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match="need about .* GB, but"): make(root, tmp_path/"full")
    for values in ({"shorter_side": 0}, {"quality": 101}, {"workers": -1}, {"workers": 100_000}, {"shard_size": 0}):
        with pytest.raises(UserError, match="must be at (least|most)"): shrink_images(root, tmp_path/"x", **values)
    assert not (tmp_path/"x").exists()
    with pytest.raises(UserError, match="cannot write to /proc"): shrink_images(root, "/proc/carot", workers=0)
    (tmp_path/"file").touch()
    with pytest.raises(UserError, match="cannot write to"): shrink_images(root, tmp_path/"file", workers=0)


def test_broken_images_stay_broken(root, tmp_path):
    bad = [root/"train"/"bee"/"empty.jpg", root/"train"/"été"/"cut.jpg"]
    bad[0].touch()
    bad[1].write_bytes((root/"train"/"bee"/"a.b0.jpg").read_bytes()[:500])
    found = make(root, tmp_path/"out")
    assert list(found) == [str(file) for file in bad] and found[str(bad[0])] == "the file is empty"
    assert str(root) not in (tmp_path/"out"/"shards.json").read_text()
    images, shrunk = originals(root), ShardImages(tmp_path/"out")
    for i in range(len(images)):
        if images.path(i) in map(str, bad):
            for data in (images, shrunk, ShardImages(tmp_path/"out", read=read_tensor)):
                with pytest.raises(BadImage, match=Path(images.path(i)).stem): data[i]
        else: shrunk[i]


def test_what_is_no_image_is_named_and_nothing_waits(root, tmp_path, capsys, monkeypatch):
    "A pipe is not waited for, PostScript starts no program; each is named, also by the call that finds all done."
    train = root/"train"/"bee"
    os.mkfifo(train/"pipe.jpg")
    (train/"gone.jpg").symlink_to(train/"nowhere")
    (train/"folder.jpg").mkdir()
    Image.new("RGB", (90, 90)).save(train/"eps.jpg", "EPS")
    (train/"moving.gif").touch()
    def no_program(*_, **__): raise AssertionError("a program was started")
    monkeypatch.setattr("subprocess.Popen.__init__", no_program)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"1 \.gif") as told: shrink_images(root, tmp_path/"out", 48, workers=0)
        said = capsys.readouterr().out.splitlines()
        assert len(told) == 1 and [line.rpartition(";")[2] for line in said] == [" copied as it is"] * 3
        reasons = ("eps.jpg: it is PostScript", "gone.jpg: No such file", "pipe.jpg: it is no regular file")
        assert all(words in line for line, words in zip(said, reasons))
    with pytest.raises(BadImage, match="eps|gone|pipe"): list(ShardImages(tmp_path/"out"/"train"))


def test_sixteen_bits_do_not_become_white(root, tmp_path):
    ramp = np.linspace(0, 65535, 90 * 90).astype(np.uint16).reshape(90, 90)
    Image.fromarray(ramp).save(root/"train"/"ant"/"deep.png")
    make(root, tmp_path/"out")
    images, shrunk = originals(root), ShardImages(tmp_path/"out")
    place = next(i for i in range(len(images)) if "deep" in images.name(i))
    pixels = np.asarray(shrunk[place][0])
    assert pixels.shape == (48, 48, 3) and pixels.min() < 10 and pixels.max() > 245
    want = np.asarray(images[place][0].resize((48, 48), Image.Resampling.BICUBIC), float)
    assert np.abs(pixels - want).mean() < 4


def test_rotation_is_ignored_and_not_kept(root, tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    pixels = np.arange(90 * 60 * 3).astype(np.uint8).reshape(60, 90, 3)
    Image.fromarray(pixels).save(root/"train"/"ant"/"0.jpg", exif=exif)
    make(root, tmp_path/"out")
    assert ShardImages(tmp_path/"out")[0][0].size == (72, 48)
    data = shrink.shrink_jpeg((root/"train"/"ant"/"0.jpg").read_bytes(), 48)
    assert not Image.open(io.BytesIO(data)).getexif()


def test_two_at_once_do_not_mix(root, tmp_path):
    with shrink.begun_shards(tmp_path/"out"/"train", {"images": 1}):
        with pytest.raises(UserError, match="another process is writing to"): make(root, tmp_path/"out"/"train")
        assert [file.name for file in (tmp_path/"out"/"train").iterdir()] == ["shards.json"]


def test_what_a_kill_leaves_is_swept(root, tmp_path):
    (tmp_path/"out"/"train").mkdir(parents=True)
    for name in (".shards.json.abcd1234", ".train-00000.tar", ".train-00001.npy.abcd1234"):
        (tmp_path/"out"/"train"/name).touch()
    make(root, tmp_path/"out"/"train")
    assert not [file for file in (tmp_path/"out"/"train").iterdir() if file.name.startswith(".")]


def test_a_folder_with_files_of_its_own_is_left_alone(root, tmp_path):
    home = tmp_path/"home"
    home.mkdir()
    (home/"thesis.tex").write_text("years of work")
    for out in (home, tmp_path/"home"/"thesis.tex", tmp_path/"home"/"thesis.tex"/"below", tmp_path/("x" * 300)):
        with pytest.raises(UserError, match="files of its own|cannot write to"): shrink_images(root, out, workers=0)
    (tmp_path/"loop").symlink_to(tmp_path/"loop")
    with pytest.raises(UserError, match="cannot write to"): shrink_images(root, tmp_path/"loop", workers=0)
    assert [file.name for file in home.iterdir()] == ["thesis.tex"]
    (tmp_path/"killed"/"train").mkdir(parents=True)
    (tmp_path/"killed"/"train"/".shards.json.abcd1234").touch()  # by a kill at the very beginning
    shrink_images(root, tmp_path/"killed", 48, workers=0)


def test_changed_originals_are_noticed(root, tmp_path):
    "Another size under the same name is another file; shards from before sizes were kept go on."
    make(root, tmp_path/"out")
    file = tmp_path/"out"/"shards.json"
    about = json.loads(file.read_text())
    with open(root/"train"/"ant"/"same.jpg", "ab") as image: image.write(b"0")
    with pytest.raises(UserError, match="made with other sizes"): make(root, tmp_path/"out")
    file.write_text(json.dumps({name: about[name] for name in about if name not in ("sizes", "unreadable")}))
    make(root, tmp_path/"out")


def test_training_sees_the_same(root, tmp_path):
    "Captions, labels and crops are those of the originals, in loader processes too; a pickled copy reads the same."
    make(root, tmp_path/"out", shorter_side=1000)
    read, transform = fast(TRAIN)
    sets = [originals(root, transform=transform, read=read), ShardImages(tmp_path/"out", CLASSES, transform, read=read)]
    sets.append(pickle.loads(pickle.dumps(sets[1])))
    batches = []
    for data, workers in zip(sets, (0, 2, 0)):
        benchmark = Benchmark("x", list(CLASSES), ["a {}", "the {}"], data, [], {})
        keys = [[(1, i) for i in range(len(data))]]
        batches.append(next(iter(DataLoader(CaptionedImages(benchmark, 3), batch_sampler=keys, num_workers=workers))))
    for other in batches[1:]:
        assert torch.equal(batches[0][0], other[0]) and batches[0][1] == other[1]
        assert all(torch.equal(a, b) for a, b in zip(batches[0][2:], other[2:]))


def test_fast_is_the_usual_transform(root):
    "The same crop, to the rounding of its two passes, for every file format and for PIL images."
    (read, transform), images = fast(TRAIN), originals(root)
    assert read is read_tensor
    for i in range(len(images)):
        for image in (read(images.path(i)), read_image(images.path(i))):
            torch.manual_seed(i); new = transform(image)
            torch.manual_seed(i); old = TRAIN(read_image(images.path(i)))
            off = (new - old).abs() * transform.std
            assert off.max() < 2.01 and (off > 0.5).float().mean() < 0.05
            assert new.dtype == torch.float32 and new.shape == old.shape


def test_both_decoders_give_the_same_pixels(root, monkeypatch):
    "What simplejpeg will not read PIL does; nothing deprecated is used."
    images = originals(root)
    before = [read_tensor(images.path(i)) for i in range(len(images))]
    def refuses(data): raise ValueError("broken")
    monkeypatch.setattr(decode, "decode_jpeg", refuses)
    assert all(torch.equal(old, read_tensor(images.path(i))) for i, old in enumerate(before))


@pytest.mark.parametrize("mode", ["CMYK", "L", "RGB"])
def test_every_kind_of_jpeg_is_read_as_pil_reads_it(root, tmp_path, mode):
    with Image.open(root/"train"/"ant"/"a.b0.jpg") as image: image.convert(mode).save(tmp_path/"x.jpg", quality=95)
    assert np.array_equal(read_tensor(tmp_path/"x.jpg").permute(1, 2, 0), read_image(tmp_path/"x.jpg"))


def test_one_function_chooses_between_folders_and_shards(root, tmp_path):
    shrink_images(root, tmp_path/"small", shorter_side=48, workers=0, shard_size=8)
    folders, made = class_dataset(root/"train", CLASSES), class_dataset(tmp_path/"small"/"train", CLASSES)
    assert not isinstance(folders, ShardImages) and isinstance(made, ShardImages)
    assert folders.labels.tolist() == made.labels.tolist()
    (tmp_path/"small"/"train"/"stranger").mkdir()
    with pytest.raises(UserError, match="stranger is none of the 3"): class_dataset(tmp_path/"small"/"train", CLASSES)


def test_a_root_of_small_images(root, tmp_path):
    "The new root is a benchmark like the old one."
    shrink_images(root, tmp_path/"small", shorter_side=48, workers=0, shard_size=8)
    old, new = load_benchmark(str(root)), load_benchmark(str(tmp_path/"small"))
    assert new.classnames == old.classnames and len(new.val) == len(old.val)
    assert new.train.labels.tolist() == old.train.labels.tolist()
    assert min(new.train[0][0].size) == 48 and np.array_equal(new.val[1][0], old.val[1][0])
    with pytest.raises(UserError, match="shards already"): shrink_images(tmp_path/"small", tmp_path/"smaller")
    imagenet = tmp_path/"all"/"ILSVRC2012"
    imagenet.mkdir(parents=True)
    for name in ("train", "val"): (root/name).rename(imagenet/name)
    (tmp_path/"all"/"sketch").mkdir()
    made = shrink_images(tmp_path/"all", tmp_path/"all-48", shorter_side=48, workers=0)
    assert made == tmp_path/"all-48"/"ILSVRC2012"/"train" and len(ShardImages(made)) == len(old.train)
    assert all((tmp_path/"all-48"/name).is_symlink() for name in ("sketch", "ILSVRC2012/val")) and not made.is_symlink()
