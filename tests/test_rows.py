"Every row of the published tables: its command is one, and it trains for a few steps on a small ImageNet."
import copy
import json
import shlex

import fake_imagenet
import open_clip
import pytest
import torch
from conftest import TINY_VIT
from torch.utils.data import Subset

from carot.analysis.rows import MODELS, all_rows, parity_table
from carot.cli import read_command
from carot.clip import build_clip, load_clip
from carot.data import load_benchmark, prepare
from carot.evaluate import classifier, predict_set
from carot.methods.base import all_methods
from carot.runs.settings import resolve
from carot.train import fine_tune

SETS = ["ImageNetA"]
SMALL = dict(epochs=1, batch_size=16, warmup_steps=1, workers=0, device="cpu", templates="simple")
UNIQUE = {row.command: row for row in all_rows()}


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    "The folder of a small ImageNet, and a tiny CLIP."
    root = tmp_path_factory.mktemp("imagenet")
    fake_imagenet.write_tree(root, train=1, quirks=False)
    torch.manual_seed(0)
    (root/"tiny").mkdir()
    (root/"tiny"/"open_clip_config.json").write_text(json.dumps(TINY_VIT))
    from carot.clip import save_clip
    model = build_clip(TINY_VIT)
    save_clip(model, root/"tiny")
    return root


def train(asked, imagenet):
    "What a run of the row leaves behind, after three steps."
    clip, augment, transform, _ = load_clip(str(imagenet/"tiny"))
    tokenizer = open_clip.get_tokenizer("ViT-B-16", context_length=12)
    run = resolve({**asked, "root": str(imagenet), "model": str(imagenet/"tiny"), "out": str(imagenet/"out"),
                   **{name: value for name, value in SMALL.items()
                      if all_methods()[asked["method"]].uses(name)}})
    data = prepare(load_benchmark("imagenet", imagenet, transform, augment, SETS), run.settings)
    data.train = Subset(data.train, range(0, 960, 20))
    wanted = run.method.bases(run.settings) if run.method.bases else []
    bases = [train({"benchmark": "imagenet", **given}, imagenet) for given in wanted]
    given = {name: value for name, value in vars(run.settings).items() if name not in ("benchmark", "method", "out")}
    trained = fine_tune(copy.deepcopy(clip), tokenizer, data, run.method, bases=bases, **given)
    found = predict_set(classifier(trained, tokenizer, data), data.eval["ImageNetA"].dataset,
                        data.eval["ImageNetA"].project, False)
    assert found.logits.shape == (200, 200) and found.logits.isfinite().all()
    return trained


@pytest.mark.parametrize("command", UNIQUE)
def test_a_row_runs_for_a_few_steps(command, imagenet):
    row = UNIQUE[command]
    asked = row.asked | ({"model": str(imagenet/"tiny")} if "model" in row.asked else {})
    trained = train(asked, imagenet)
    steps = len(trained.log)
    assert steps == (3 if all_methods()[row.method].trains else 0)


def test_commands_are_commands():
    for command, row in UNIQUE.items():
        carot, word, *rest = shlex.split(command.replace("DATA", "."))
        given = read_command(word, rest)
        assert carot == "carot" and {name: given[name] for name in row.asked} == row.asked, command


def test_nothing_of_the_tables_is_left_out():
    tables = {row.table for row in all_rows()}
    assert {"CaRot, Tables 2 and 3", "CaRot, Table 4", "CaRot, Table 5", "TRACER, Table 1", "TRACER, Table 6",
            "TRACER, Table 7"} <= tables
    assert len([row for row in all_rows() if row.table == "CaRot, Table 4"]) == 8
    assert {row.model for row in all_rows()} == set(MODELS)
    assert list(parity_table().name) == [method.reference for method in all_methods().values()]
