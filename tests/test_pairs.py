"Tables of image files and captions: what is read, what is refused and in which words, and what training makes of it."
import copy
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import open_clip
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2

from carot.benchmarks.decode import TensorTransform, read_tensor
from carot.benchmarks.pairs import PairImages, find_root, read_pairs, with_pairs
from carot.core import UserError
from carot.data import BadImage, CaptionedImages, image_labels, image_name, load_benchmark, prepare
from carot.evaluate import classifier, predict_sets
from carot.train import fine_tune

PLAIN = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
SETTINGS = dict(epochs=2, batch_size=16, lr=1e-3, warmup_steps=2, device="cpu", workers=0)


@pytest.fixture
def images(toy, tmp_path):
    "the toy training set as files, in a folder of their own"
    (tmp_path/"my").mkdir()
    for i in range(len(toy.train)):
        pixels = toy.train.images[i].transpose(1, 2, 0)
        Image.fromarray(pixels).save(tmp_path/"my"/f"{i:02d}.png")
    return tmp_path/"my"


def write(images, rows=None, name="pairs.csv", header="filepath,title"):
    rows = [f"{i:02d}.png,caption {i}" for i in range(40)] if rows is None else rows
    (images/name).write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return images/name


def asked(file, **settings): return SimpleNamespace(pairs=str(file), **settings)


# what is read

@pytest.mark.parametrize("name, separator, said", [
    ("a.csv", ",", None), ("a.tsv", "\t", None), ("a.tab", "\t", None), ("a.txt", ",", None),
    ("a.csv", "\t", None), ("a.tsv", ",", None), ("a.csv", ";", None),  # FLYP's tabs in .csv: the header tells
    ("a.csv", "|", "|"), ("a.csv", "\t", "tab"), ("a.csv", "\t", "\\t"), ("a.csv", ",", "comma")])
def test_separators(tmp_path, name, separator, said):
    (tmp_path/name).write_text(f"no{separator}title{separator}filepath\n1{separator}a b{separator}x.png\n")
    paths, captions = read_pairs(tmp_path/name, said)
    assert (paths.to_pylist(), captions.to_pylist()) == (["x.png"], ["a b"])


def test_text_stays_text(tmp_path):
    "Quotes, line breaks, separators, a byte order mark, Windows' line ends, and words that pandas takes for gaps."
    captions = ["NA", "007", "null", "1e5", "nan", 'he said ""so""', "two\nlines", "a, b", "größer 你好 👍", "True"]
    body = "".join(f'{i}.png,"{caption}",9\r\n' for i, caption in enumerate(captions))
    (tmp_path/"a.csv").write_bytes(("\ufefffilepath,title,more\r\n" + body).encode())
    paths, found = read_pairs(tmp_path/"a.csv")
    assert found.to_pylist() == [caption.replace('""', '"') for caption in captions] and paths[9].as_py() == "9.png"


def test_columns_by_name(images, toy):
    file = write(images, ["a,00.png,b"], header="title,picture,text")
    paired = prepare(toy, asked(file, image_column="picture", caption_column="text"))
    assert paired.train.caption(0) == "b" and paired.train.path(0) == str(images/"00.png")


def test_a_picture_with_several_captions(images, toy):
    paired = prepare(toy, asked(write(images, ["00.png,one", "00.png,two", "01.png,three"])))
    assert len(paired.train) == 3 and [paired.train.caption(i) for i in range(3)] == ["one", "two", "three"]
    assert paired.train.path(0) == paired.train.path(1)


def test_where_relative_paths_begin(images, toy, monkeypatch):
    monkeypatch.chdir(images.parent)
    beside, below = write(images), write(images, [f"my/{i:02d}.png,x" for i in range(3)], "below.csv")
    whole = write(images, [f"{images}/00.png,x"], "absolute.csv")
    roots = [find_root(file, read_pairs(file)[0]) for file in (beside, below, whole)]
    assert roots == [str(images), "", str(images)]
    for file in (beside, below, whole): assert isinstance(prepare(toy, asked(file)).train[0][0], torch.Tensor)


# what is refused

REFUSED = {
    "column": ("filepath,text\n00.png,a\n", "no column 'title' .parameter caption_column.; it has filepath, text"),
    "separator": ("filepath|title\n00.png|a\n", "has no column 'filepath'.*pairs_separator"),
    "twice": ("filepath,title,filepath\n00.png,a,01.png\n", "has 2 columns 'filepath'"),
    "blank caption": ("filepath,title\n00.png,a\n01.png,\n02.png, \n", "'title': 2 of 3 rows.* row 3,"),
    "blank file": ("filepath,title\n,a\n", "'filepath': 1 of 1 rows.* row 2,"),
    "short row": ("filepath,title\n00.png,a\n01.png\n", "cannot read .*Row #3"),
    "long row": ("filepath,title\n00.png,a, b\n", "cannot read .*Expected 2 columns, got 3"),
    "open quote": ('filepath,title\n00.png,"a\n01.png,b\n', "a quote not closed"),
    "missing": ("filepath,title\n00.png,a\nxx.png,b\nyy.png,c\nxx.png,d\n", "2 image files .*'xx.png' for example"),
    "a folder": ("filepath,title\n.,a\n", "1 image files"),
    "no rows": ("filepath,title\n", "no rows below its header"),
    "empty": ("", "is empty"),
    "blank": ("\n\n", "is empty"),
    "latin-1 header": ("filepath,title,größe\n00.png,a,1\n".encode("latin-1"), "not UTF-8"),
    "latin-1 caption": (b"filepath,title\n" + b"00.png,a\n" * 5000 + "00.png,größer\n".encode("latin-1"), "UTF-?8"),
    "utf-16": ("filepath,title\n00.png,a\n".encode("utf-16"), "not UTF-8"),
    "an image": (b"\x89PNG\r\n\x1a\n\x00\x00\xff", "not UTF-8"),
}

@pytest.mark.parametrize("fault", REFUSED)
def test_refused_in_one_line(images, toy, fault):
    content, words = REFUSED[fault]
    (images/"a.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=words) as error: prepare(toy, asked(images/"a.csv"))
    assert "\n" not in str(error.value) and "a.csv" in str(error.value)


@pytest.mark.parametrize("settings, words", [
    ({"pairs": "pears.csv"}, "no file 'pears.csv'"), ({"pairs": "."}, "no file '.'"),
    ({"pairs_separator": "::"}, "one character"), ({"caption_column": "filepath"}, "are both 'filepath'"),
    ({"shots": 2, "seed": 1}, "pairs have no classes")])
def test_refused_settings(images, toy, settings, words):
    with pytest.raises(UserError, match=words):
        prepare(toy, SimpleNamespace(**{"pairs": str(write(images)), **settings}))


def test_a_caption_may_have_lines(images, toy):
    "Line breaks in quotes are text; only those that swallow other rows are an error."
    file = write(images, ['00.png,"first line\nsecond, line\n"', "01.png,b"])
    assert len(prepare(toy, asked(file)).train) == 2


# as a training set

def test_the_rest_of_the_benchmark_stays(images, toy):
    paired = prepare(toy, asked(write(images)))
    assert replace(paired, train=toy.train, plain=None) == toy
    assert image_labels(paired.train).tolist() == [-1] * 40 and paired.train[3][1] == -1
    assert prepare(paired, asked(write(images))) is paired
    other = prepare(paired, asked(write(images, ["00.png,a"], "other.csv")))
    assert len(other.train) == 1 and torch.equal(other.plain()[0][0], PLAIN(Image.open(images/"00.png")))


def test_captions_through_subsets(images, toy):
    paired = prepare(toy, asked(write(images)))
    nested = replace(paired, train=Subset(Subset(paired.train, range(39, -1, -1)), [0, 5]))
    captioned = CaptionedImages(nested, seed=1)
    assert [captioned[0, i][1] for i in range(2)] == ["caption 39", "caption 34"]
    assert image_name(nested.train, 1) == str(images/"34.png") and captioned.own_captions


def test_a_stand_in_brings_its_own_caption(images, toy):
    (images/"05.png").write_bytes(b"")
    paired = prepare(toy, asked(write(images)))
    assert CaptionedImages(paired, 1, "skip")[0, 5][1:] == ("caption 6", -1, -6)
    with pytest.raises(BadImage, match="05.png"): CaptionedImages(paired, 1)[0, 5]


def test_braces_are_text(images, toy):
    captioned = CaptionedImages(prepare(toy, asked(write(images, ["00.png,a {} {0} {x} }"]))), seed=1)
    assert captioned[0, 0][1] == "a {} {0} {x} }"


def test_loader_processes_and_pickles(images, toy):
    paired = prepare(toy, asked(write(images)))
    captioned = CaptionedImages(paired, seed=1)
    keys = [[(0, i) for i in range(8)], [(1, i) for i in range(8)]]
    for context in ("fork", "spawn"):
        loader = DataLoader(captioned, batch_sampler=keys, num_workers=1, multiprocessing_context=context)
        for (images_, captions, labels, _), batch in zip(loader, keys):
            assert list(captions) == [f"caption {i}" for _, i in batch] and (labels == -1).all()
            assert torch.equal(images_[3], captioned[batch[3]][0])
    assert pickle.loads(pickle.dumps(paired.train)).caption(7) == "caption 7"


def test_read_as_the_benchmark_reads(images, toy):
    "ImageNet's fast decoder goes with its transform; evaluation transforms get PIL images."
    class Fast:
        read, transform = staticmethod(read_tensor), TensorTransform(v2.RandomResizedCrop(16), [0.5] * 3, [0.5] * 3)
        def __len__(self): return 1
    paired = with_pairs(replace(toy, train=Fast()), asked(write(images)))
    assert paired.train.read is read_tensor and paired.train[0][0].shape == (3, 16, 16)
    assert torch.equal(paired.plain()[0][0], PLAIN(Image.open(images/"00.png")))


def test_lengths_must_agree():
    with pytest.raises(UserError, match="2 images but 1 captions"): PairImages(["a", "b"], ["c"])


def test_a_million_rows_are_lean(tmp_path):
    "A process of its own, so that what it holds at most can be told."
    lines = (f"{i % 9}.jpg\tcaption {i}\n" for i in range(1_000_000))
    (tmp_path/"m.tsv").write_text("filepath\ttitle\n" + "".join(lines))
    code = f"""\
import resource, pyarrow.csv, pyarrow.compute
from carot.benchmarks.pairs import PairImages, read_pairs
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pairs = PairImages(*read_pairs({str(tmp_path/"m.tsv")!r}))
assert pairs.caption(999_999) == "caption 999999" and pairs.path(-1).endswith(".jpg")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200, done.stdout  # MB


def test_importing_is_light():
    code = "import sys, carot.benchmarks.pairs; print(*{'torch', 'pyarrow', 'pandas'} & {*sys.modules})"
    assert not subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()


# trained on

@pytest.mark.parametrize("method", ["flyp", "carot"])
def test_equal_to_classes_with_the_same_captions(images, toy, tiny_clip, method):
    "A table that says of every image what its class's only template would say trains the same weights, bit for bit."
    one = replace(toy, templates=["a photo of a {}"])
    rows = [f"{i:02d}.png,a photo of a {toy.classnames[toy.train.labels[i]]}" for i in range(40)]
    paired = prepare(one, asked(write(images, rows)))
    tokenizer = open_clip.get_tokenizer("ViT-B-16", context_length=12)
    logits = []
    for benchmark in (one, paired):
        trained = fine_tune(copy.deepcopy(tiny_clip), tokenizer, benchmark, method, **SETTINGS)
        logits.append(predict_sets(classifier(trained, tokenizer, benchmark), benchmark)["Toy"].logits)
    assert torch.equal(*logits)


def test_pairs_with_a_class_list(images, toy, tmp_path, tiny_clip, monkeypatch):
    "A folder without train/, a table, and the settings as a user gives them."
    for i in range(40):
        place = tmp_path/"set"/"val"/toy.classnames[i // 10]
        place.mkdir(parents=True, exist_ok=True)
        os.link(images/f"{i:02d}.png", place/f"{i:02d}.png")
    (tmp_path/"set"/"classnames.txt").write_text("\n".join(toy.classnames))
    benchmark = load_benchmark(tmp_path/"set", None, PLAIN, PLAIN)
    tokenizer = open_clip.get_tokenizer("ViT-B-16", context_length=12)
    paired = prepare(benchmark, asked(write(images), shots=None))
    trained = fine_tune(tiny_clip, tokenizer, paired, "flyp", **SETTINGS)
    assert predict_sets(classifier(trained, tokenizer, paired), paired)["validation"].logits.shape == (40, 4)
