"""What reads words and what writes names, for words and names of any kind.

`pytest tests/hard/test_parsers.py --hypothesis-profile long` tries thousands of each."""
import math
import re
import shlex
import string
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from carot.benchmarks.folders import class_names
from carot.cli import read_command
from carot.config import TrainSettings, describe, parse_settings
from carot.core import UserError, check_name, check_set_name, spell, write_atomic
from carot.data import Benchmark
from carot.evaluate import Predictions, metrics_table
from carot.runs.settings import list_values, resolve, run_name
from carot.runs.sweeps import metric_rows, parse_grid
from carot.translate import FLAGS, translation

ANY = st.text(st.characters(), max_size=60)  # lone surrogates, control characters and all
ODD = st.text("ab1.,;=-_{}\t\n\r\0 é<\"'\\/$%\udcff", max_size=12)
WORDS = st.text(string.ascii_letters + string.digits + "._-+/", min_size=1, max_size=20)
KNOWN = describe(TrainSettings)


def one_line(error):
    "That of a `UserError`."
    assert str(error).isprintable(), repr(str(error))


def or_refused(function, *arguments):
    "What a function gives; None if it refuses in one line. Nothing else may be raised."
    try: return function(*arguments)
    except UserError as error: return one_line(error)


@given(ANY | ODD)
@example("a\nb\x1b[31m\u2028\udcff\0")
def test_an_error_is_one_line(text): one_line(UserError(text))


# ---- settings

@given(ANY | ODD | st.lists(st.sampled_from([*KNOWN]) | ODD, max_size=4).map("=".join))
def test_settings_of_any_text(text): or_refused(parse_settings, text, KNOWN)


@given(st.fixed_dictionaries({}, optional={
    "epochs": st.integers(1, 10**6), "lr": st.floats(0, 1e6), "out": WORDS, "full_batches": st.booleans(),
    "eval_sets": st.lists(WORDS, min_size=1, max_size=3).map(",".join), "seed": st.integers(0, 2**64 - 1)}))
def test_settings_are_read_as_they_are_written(values):
    text = ",".join(f"{name}={value!r}" if isinstance(value, float) else f"{name}={value}" for name,
        value in values.items())
    assert parse_settings(text, KNOWN) == values


@given(ANY | ODD, st.sampled_from([None, int, float, str, bool]))
def test_lists_of_any_text(text, kind): or_refused(list_values, text, kind)


@given(st.lists(st.integers(-2**53, 2**53) | st.floats(allow_nan=False, allow_infinity=False), min_size=1) |
       st.lists(st.text(string.ascii_letters, min_size=4), min_size=1, max_size=5))
def test_lists_are_read_as_they_are_written(values):
    assume("infinity" not in map(str.lower, map(str, values)))
    assert list_values(",".join(map(str, values))) == values


@given(ANY | ODD | st.lists(ODD, max_size=5).map(";".join))
def test_grids_of_any_text(text):
    for name, values in (or_refused(parse_grid, text) or {}).items(): assert name.strip() and all(values)


@given(st.dictionaries(st.text(string.ascii_lowercase + "_", min_size=1, max_size=9), st.lists(WORDS, min_size=1,
    max_size=4),
                       min_size=1, max_size=4))
def test_grids_are_read_as_they_are_written(axes):
    assert parse_grid(";".join(f"{name}={','.join(values)}" for name, values in axes.items())) == axes


# ---- names of directories

def is_file_name(name):
    "On any disk, in any shell."
    return re.fullmatch(r"[\w.,=+-]+", name, re.ASCII) and name not in (".", "..") and len(name) <= 255


@given(ANY | ODD | WORDS, ANY | ODD | WORDS)
@example("a/b", "b-" + spell("a/b").rpartition("-")[2])
def test_names_of_values_never_collide(one, other):
    for text in (one, other, spell(one), spell(other)): assert is_file_name(spell(text)), text
    for a in (one, spell(one), one.lower(), one + " "):
        for b in (other, spell(other), one):
            if a != b: assert spell(a) != spell(b), (a, b)


@given(st.floats(0, 1e9), st.floats(0, 1e9), st.integers(0, 10**9))
@example(1e-5, 1.0000001e-5, 0)
@example(0.1, 0.1 + 2**-56, 0)
def test_names_of_numbers_never_collide(one, other, whole):
    assert (spell(one) == spell(other)) == (one == other)
    assert spell(whole) == str(whole)


SOME = st.fixed_dictionaries({}, optional={
    "epochs": st.integers(1, 99), "lr": st.floats(0, 1), "weight_decay": st.floats(0, 1), "batch_size": st.integers(2,
    99),
    "full_batches": st.booleans(), "seed": st.integers(0, 99), "eval_sets": ODD.filter(str.strip) | WORDS,
    "model": WORDS | st.sampled_from(["ViT-B-16,seed=1", "x,lr=0.5", "a=b"]), "label_smoothing": st.floats(0, 1)})


@given(SOME, SOME)
@example({"model": "a,epochs=3"}, {"model": "a", "epochs": 3})
@example({"model": "m" * 300}, {"model": "m" * 301})
def test_names_of_runs_never_collide(one, other):
    base = resolve({"benchmark": "glyphs", "method": "ft"})
    def named(values): return replace(base, settings=replace(base.settings, **values))
    a, b = named(one), named(other)
    assert (run_name(a) == run_name(b)) == (a.settings == b.settings), (run_name(a), run_name(b))
    assert is_file_name(run_name(a)) and re.search(r"(^|,)seed=\d+$", run_name(a))


# ---- benchmarks

@given(st.lists(ANY | ODD | st.sampled_from(["a {}", "{", "{}{}", "{0}", "{:>9}", "{!r}", "{{}}", "{}}",
    "{.__class__}"]),
                max_size=3))
def test_templates_take_a_name_or_are_refused(templates):
    found = or_refused(Benchmark, "b", ["cat", "dog"], templates, [], [], {})
    for template in found.templates if found else []:
        assert template.format("cat") == template.replace("{}", "cat")


@given(ANY | ODD, st.sampled_from(["class", "set"]))
def test_names_are_text_or_refused(name, kind):
    check, refused = check_name if kind == "class" else lambda _, name: check_set_name(name), None
    try: check("x", name)
    except UserError as error: refused = error
    fine = name.strip() and name.isprintable() and name.encode(errors="ignore") and len(name) <= 200
    if not fine: assert refused
    if refused: one_line(refused)


def classes_of(content):
    "What a classnames.txt of that content says of three folders."
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("cat", "dog", "owl"): (root/"train"/name).mkdir(parents=True)
        (root/"classnames.txt").write_bytes(content)
        return class_names(root)


LINE = st.tuples(st.sampled_from(["cat", "dog", "owl", "bee"]), st.none() | ODD | ANY).map(
    lambda pair: pair[0] if pair[1] is None else "\t".join(pair))


@given(st.binary(max_size=50) | st.lists(LINE, max_size=5).map(lambda lines: "\n".join(lines).encode(errors="replace")))
def test_classnames_of_any_content(content):
    names = or_refused(classes_of, content)
    if names is None: return
    assert set(names) == {"cat", "dog", "owl"} and len({name.lower() for name in names.values()}) == 3
    for name in names.values(): check_name("class", name)


PLAIN = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=20)


@given(st.permutations(["cat", "dog", "owl"]), st.lists(PLAIN, min_size=3, max_size=3))
def test_classnames_are_read_as_they_are_written(folders, names):
    names = [name.replace("_", "-") for name in names]
    assume(len({name.lower() for name in names}) == 3 and all(name.isprintable() for name in names))
    content = "".join(f"{folder}\t{name}\n" for folder, name in zip(folders, names))
    assert classes_of(content.encode()) == dict(zip(folders, names))


# ---- tables

SET = (PLAIN | ODD | st.sampled_from(['"', "'", "NA", "nan", "001", "True", "a\"b", " a", "b ", "é", "-1", "=1+1",
    "#x"]))


@given(st.lists(SET, min_size=1, max_size=4, unique=True))
def test_metrics_are_read_as_they_are_written(names):
    names = [name for name in names if accepted(name)]
    assume(names)
    predictions = {name: Predictions(torch.randn(5, 3), torch.arange(5) % 3, id=i % 2 == 0) for i,
        name in enumerate(names)}
    made = metrics_table(predictions, 4)
    with tempfile.TemporaryDirectory() as folder: again = write_and_read(Path(folder)/"ft"/"seed=1", made)
    assert again["set"].tolist() == made["set"].tolist() and again["metric"].tolist() == made["metric"].tolist()
    assert again["id"].tolist() == made["id"].tolist() and again["n"].tolist() == made["n"].tolist()
    for one, other in zip(again["value"], made["value"]): assert one == other or math.isnan(one) and math.isnan(other)


def accepted(name):
    "Whether it can be that of a set."
    try: check_set_name(name)
    except UserError: return False
    return True


def write_and_read(run, table):
    "As a run's notebook writes and the tables read it."
    write_atomic(run/"metrics.tsv", table.to_csv(sep="\t", index=False))
    return metric_rows(run)


# ---- translate

VALUE = st.sampled_from(["1", "0.5", "1e-5", "carot", "ImageNet", "ViT-B/16", "$X", "", "a b", "'", "\n",
    "\udcff"]) | ODD
FLAG = st.sampled_from([name for name in FLAGS if name.startswith("--")])


@given(st.lists(FLAG | VALUE, max_size=8) | st.lists(ANY, max_size=3))
def test_translate_any_words(words): or_refused(lambda: str(translation(words)))


USUAL = {"--lr": ["1e-5", "0.1"], "--wd": ["0.1", "0"], "--epochs": ["1", "10"], "--method": ["flyp", "ft", "carot"],
         "--batch-size": ["512", "8"], "--l_orth_wv": ["0", "0.2"], "--distil_coef": ["1.5"], "--seed": ["3"],
         "--run": ["2"]}


@given(st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in USUAL.items()}))
def test_what_translate_gives_is_a_command(flags):
    words = [word for item in flags.items() for word in item if item[0] in FLAGS]
    found = or_refused(translation, ["python", "src/main.py", "--train-dataset=ImageNet", *words])
    if not found: return
    assert read_command("run", shlex.split(found.command.replace("\\\n", " "))[2:]) == found.settings
