"Settings of runs: names of directories, defaults, the folder of results, parameters cells, methods of one's own."
import ast
import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from carot.config import TrainSettings, describe
from carot.core import UserError, spell
from carot.methods.base import all_methods
from carot.runs.settings import (
    asked,
    asked_in,
    benchmark_folder,
    known_parameters,
    known_settings,
    notebook_parameters,
    notebook_path,
    parameters_cell,
    resolve,
    results_folder,
    usual_methods,
)

METHOD = """
from dataclasses import dataclass
from carot.config import TrainSettings, setting
from carot.methods.base import Method

@dataclass
class HingeSettings(TrainSettings):
    margin: float = setting(0.1, "by which the right class must win", low=0, group="method")

HINGE = Method("hinge", "Hinge", "a margin loss", HingeSettings, lambda start: iter(()), {"lr": 2e-5})
"""


@pytest.fixture
def hinge(tmp_path, monkeypatch):
    "A module with a method of one's own, in the working directory."
    (tmp_path/"hinge_method.py").write_text(METHOD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield "hinge_method:HINGE"
    sys.modules.pop("hinge_method", None)


# names

TEXTS = ["a", "A", "a/b", "c/b", "a b", "a_b", "a,b", "a=b", "a,seed=1", "a,lr=1", ".", "..", "../..", "None", "nan",
         "é", "è", "é/a", "x" * 60, "x" * 61, "x" * 300, "x" * 299 + "y", "a\nb", "a\tb", "-a", "b-0123abcd",
         "C:\\data", "~/data", "a|b", "b/", "b\\", "1", "1.0"]
TEXTS += [spell(text) for text in TEXTS if spell(text) != text]  # what a spelled one looks like
NUMBERS = [0.1, 0.1 + 1e-17, 0.1 + 1e-16, 0.1 + 2e-16, 1 / 3, 0.333333, 1e-5, 1.0000001e-5, 1.0, 1e22, 123456.0,
           1234567.0, 1234567.5, 5e-324]


def test_different_settings_have_different_names(tmp_path):
    given = [{}] + [{"pretrained": text} for text in TEXTS] + [{"model": text, "pretrained": "x"} for text in TEXTS]
    given += [{"lr": lr} for lr in NUMBERS]
    given += [{"seed": 2}, {"epochs": 3}, {"epochs": 31}, {"eval_sets": "a"}, {"warmup_steps": 0}]
    given += [{"workers": 0, "seed": 3}]
    given += [{"model": a, "pretrained": b} for a, b in itertools.product(TEXTS[:14], repeat=2)]
    long = {"model": "m" * 59, "pretrained": "p" * 59, "eval_sets": "e" * 59, "precision": "fp32"}
    runs = [resolve(settings) for settings in given + [long | {"epochs": n} for n in (1, 2)]]
    unequal = {json.dumps({**run.parameters, "workers": 0}, sort_keys=True): run.name for run in runs}
    assert len(set(unequal.values())) == len(unequal) > 200
    for name in unequal.values():
        assert re.fullmatch(r"[\w.,=+-]+", name, re.ASCII) and len(name) < 240
        (tmp_path/name).mkdir(exist_ok=True)


@pytest.mark.parametrize("given, directory", [  # as they have always been
    ({}, "glyphs/carot/seed=1"), ({"benchmark": "handwriting", "method": "zs"}, "handwriting/zs/seed=1"),
    ({"lr": 1e-4, "seed": 3, "epochs": 2}, "glyphs/carot/epochs=2,lr=0.0001,seed=3"),
    ({"method": "lp-ft", "label_smoothing": 0.1, "workers": 8, "micro_batch_size": "auto"},
     "glyphs/lp-ft/label_smoothing=0.1,micro_batch_size=auto,seed=1"),
    ({"pretrained": "/data/my models/best"}, "glyphs/carot/pretrained=best-cc7714f7,seed=1"),
    ({"benchmark": "imagenet", "method": "ft", "lr": 3e-5, "device": "cpu"}, "imagenet/ft/device=cpu,seed=1"),
    ({"model": "m" * 59, "pretrained": "p" * 59, "eval_sets": "e" * 59, "precision": "fp32", "epochs": 7},
     "glyphs/carot/epochs=7,eval_sets=" + "e" * 59 + ",model=" + "m" * 59
     + ",precision=fp32,pretrained=ppppppppp-aaaabc76,seed=1")])
def test_names_stay(given, directory):
    assert resolve(given).directory.as_posix().endswith(directory)


def test_a_folder_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"): (tmp_path/"my data"/split/"cat").mkdir(parents=True)
    runs = [resolve({"benchmark": name, "out": "logs"}) for name in ("my data", "my data/")]
    assert [run.directory for run in runs] == [Path("logs")/"my_data-b2167b0a"/"carot"/"seed=1"] * 2
    assert runs[0].parameters == runs[1].parameters
    assert benchmark_folder("logs", "my data/") == Path("logs/my_data-b2167b0a")
    assert benchmark_folder("logs", "gone/data") == Path("logs")/spell("gone/data")  # its images may have gone


# values

@pytest.mark.parametrize("given, words", [
    ({"lrr": 1.0}, "did you mean 'lr'"), ({"method": "fit"}, "did you mean 'ft'"),
    ({"epochs": "3"}, "epochs takes int, not '3'"),
    ({"epochs": 3.0}, "takes int"), ({"epochs": True}, "takes int"), ({"lr": float("nan")}, "takes float, not nan"),
    ({"lr": float("inf")}, "takes float"), ({"lr": -1.0}, "lr must be at least 0"), ({"batch_size": 0}, "at least 1"),
    ({"label_smoothing": 1.5}, "at most 1"), ({"seed": -1}, "at least 0"), ({"device": "cuda:99"}, "cuda:99"),
    ({"device": "tpu"}, "unknown device"), ({"precision": "half"}, "unknown precision"),
    ({"benchmark": "imagnet"}, "unknown benchmark"),
    ({"root": "/no/such/folder"}, "no folder"), ({"root": ""}, "root is empty"),
    ({"micro_batch_size": "0"}, "micro_batch_size"),
    ({"method": "flyp", "teacher_momentum_end": 0.5}, "does not use teacher_momentum_end; methods that do: ft, carot"),
    ({"method": "no.module:X"}, "no.module"), ({"benchmark": "no.module:X"}, "no.module"),
    ({"method": "json:loads"}, "json:loads")])
def test_wrong_settings_are_one_line(given, words):
    with pytest.raises(UserError) as error: resolve(given)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_unwritable_out(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match="no permission"): resolve({"out": str(tmp_path/"logs")})


def test_defaults_come_from_benchmark_then_method_then_declaration():
    glyphs, imagenet = ({name: resolve({"benchmark": benchmark, "method": name}).settings for name in all_methods()}
                        for benchmark in ("glyphs", "imagenet"))
    assert (glyphs["ft"].lr, imagenet["ft"].lr, imagenet["carot"].lr) == (3e-4, 3e-5, 1e-5)
    assert (glyphs["ft"].epochs, imagenet["ft"].epochs) == (6, TrainSettings().epochs)
    assert imagenet["ft"].pretrained == "openai"
    assert imagenet["lp-ft"].probe_lr == imagenet["lp"].lr == 1e-2 and glyphs["lp-ft"].probe_lr == 0.2
    assert (imagenet["lp-ft"].epochs, glyphs["lp-ft"].epochs) == (5, 6)
    assert glyphs["tracer"].lr == glyphs["carot"].lr and glyphs["lipsum-ft"].weight_decay == 0.0
    assert resolve({"model": "glyphs", "benchmark": "imagenet"}).settings.pretrained is None  # it has its weights
    assert resolve({"method": "ft", "batch_size": None, "weight_decay": 0}).settings.weight_decay == 0.0


def test_what_a_method_does_not_use_is_not_in_its_record():
    records = {name: set(resolve({"method": name}).parameters) for name in all_methods()}
    terms = {"orthogonality_coef", "cross_norm_coef", "distillation_coef"}
    assert records["zs"] < records["lp"] < records["flyp"] < records["carot"] and records["lp"] < records["ft"]
    assert records["ft"] - records["lp"] == records["carot"] - records["flyp"] > terms
    assert records["lp-ft"] - records["lp"] == {"probe_lr"} and "epochs" not in records["zs"]
    assert "pairs" in records["flyp"] and "pairs" not in records["ft"]


# the folder of results

def test_a_relative_out_is_the_clones(tmp_path, monkeypatch):
    clone = tmp_path/"clone"
    for part in ("carot", "nbs/runs"): (clone/part).mkdir(parents=True)
    (clone/"settings.ini").touch()
    places = {}
    for folder in (clone, clone/"nbs"/"runs", tmp_path):
        monkeypatch.chdir(folder)
        places[folder] = [results_folder().resolve(), results_folder("logs").resolve(), results_folder("/data/logs")]
        assert not results_folder("logs").is_absolute()
        assert resolve({"out": "logs"}).directory.resolve().parts[-4] == "logs"
    inside = [clone/"expt_logs", clone/"logs", Path("/data/logs")]
    assert places[clone] == places[clone/"nbs"/"runs"] == [path.resolve() for path in inside]
    assert places[tmp_path][:2] == [tmp_path.resolve()/"expt_logs", tmp_path.resolve()/"logs"]
    monkeypatch.setenv("CAROT_OUT", str(tmp_path/"results"))
    assert results_folder() == tmp_path/"results" and results_folder("logs") == Path("logs")


# notebooks

def write_cell(path, source):
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    return path


def test_the_run_notebooks_cell_is_what_the_declarations_say():
    cells = nbformat.read(notebook_path("fine_tune"), 4).cells
    cell, = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert cell.source == parameters_cell()
    found, declared = notebook_parameters(notebook_path("fine_tune")), known_settings(usual_methods())
    assert {name: about.kind for name, about in found.items()} == {name: about.kind for name, about in declared.items()}
    assert all(about.help for about in found.values()) and max(map(len, cell.source.splitlines())) <= 120
    assert resolve(asked({}, notebook_path("fine_tune"))).directory == resolve({}).directory


@pytest.mark.parametrize("file", sorted(notebook_path("fine_tune").parent.glob("*.ipynb")), ids=lambda file: file.name)
def test_a_cell_is_read_as_papermill_does(file):
    papermill = pytest.importorskip("papermill")
    theirs = papermill.inspect_notebook(str(file))
    ours = notebook_parameters(file)
    assert list(ours) == list(theirs)
    for name, about in ours.items():
        assert about.kind.__name__ == theirs[name]["inferred_type_name"] and about.help == theirs[name]["help"]
        assert about.default == ast.literal_eval(theirs[name]["default"])


def test_anybodys_cell(tmp_path):
    notebook = write_cell(tmp_path/"odd {name}.ipynb", """%matplotlib inline
a: int = 3  # three # of them
b = 0.5
c: "str" = "x # y"  # words
d: float | None = None  # a rate
e: Optional[bool] = None
f = [1, 2]  # no option
g: str = Path("x")  # worked out
h, i = 1, 2
j = -1  # negative
k: list[int] = None
l: int""")
    found = {name: (about.kind, about.default, about.help) for name, about in notebook_parameters(notebook).items()}
    assert found == {"a": (int, 3, "three # of them"), "b": (float, 0.5, ""), "c": (str, "x # y", "words"),
                     "d": (float, None, "a rate"), "e": (bool, None, ""), "g": (str, None, "worked out"),
                     "j": (int, -1, "negative"), "l": (int, None, "")}
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x = 1")]), tmp_path/"none.ipynb")
    assert notebook_parameters(tmp_path/"none.ipynb") == {}


def test_reading_a_cell_takes_milliseconds():
    began = time.perf_counter()
    for _ in range(10): notebook_parameters(notebook_path("fine_tune"))
    assert (time.perf_counter() - began) / 10 < 0.1
    code = "import sys, carot.runs.settings as s; s.parameters_cell(); " \
           "s.notebook_parameters(s.notebook_path('fine_tune')); " \
           "assert not {'torch', 'papermill', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# a method of one's own

def test_a_method_of_ones_own_brings_its_settings(hinge, tmp_path):
    notebook = notebook_path("fine_tune")
    run = resolve(asked({"method": hinge, "margin": 0.2}, notebook))
    assert run.directory.as_posix().endswith("glyphs/hinge/margin=0.2,seed=1") and run.parameters["method"] == hinge
    assert run.settings.lr == 3e-4 and resolve({"method": hinge, "benchmark": "imagenet"}).settings.lr == 2e-5
    assert "margin" in known_parameters(notebook, hinge) and "margin" not in known_parameters(notebook, "ft")
    assert asked_in({"method": hinge, "margin": 0.2, "time": time, "epochs": None}) == {"method": hinge, "margin": 0.2}
    for given, words in [({"margin": 0.2}, "unknown parameter 'margin'"),
                         ({"method": hinge, "margin": -1.0}, "at least 0"),
                         ({"method": hinge, "margin": "x"}, "margin takes float"),
                         ({"method": hinge, "marign": 1.0}, "'margin'"),
                         ({"method": hinge, "distillation_coef": 1.0}, "hinge does not use distillation_coef")]:
        with pytest.raises(UserError, match=re.escape(words)): resolve(asked(given, notebook))


def test_a_notebook_that_lists_its_own_parameters_gets_no_others(hinge, tmp_path):
    notebook = write_cell(tmp_path/"mine.ipynb", 'method: str = "ft"\nlr: float = None')
    assert list(known_parameters(notebook, hinge)) == ["method", "lr", "margin"]
    with pytest.raises(UserError, match="unknown parameter 'epochs'"): asked({"epochs": 2}, notebook)
    plain = write_cell(tmp_path/"plain.ipynb", "lr: float = None")
    assert list(known_parameters(plain, hinge)) == ["lr"]


def test_every_setting_is_described():
    for about in known_settings().values():
        assert about.help and about.group and about.kind in (bool, int, float, str), about.name
        assert not set(about.help) & set('"='), about.name  # papermill drops such a parameter
    assert set(describe(TrainSettings)) < set(known_settings())
