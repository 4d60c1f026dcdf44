"A model that is handed on: the same predictions anywhere, whole or not there at all, other files left alone."
import base64
import copy
import errno
import io
import json
import os
import re
import shutil
import threading
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub as hub
import open_clip
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from carot import calibration, export
from carot.cli import main
from carot.clip import load_clip, save_clip
from carot.core import UserError, digest, write_atomic
from carot.engine import work
from carot.evaluate import classifier, metrics_table, predict_sets, save_classes
from carot.export import FILES, export_model
from carot.methods.base import find_method
from carot.predict import classify_files, read_export
from carot.runs.records import versions
from carot.runs.seals import seal, sealed
from carot.train import fine_tune

SETTINGS = dict(epochs=2, batch_size=16, lr=1e-3, warmup_steps=2, teacher_update_every=2, workers=0, device="cpu")


def finish(run, method, model, predictions):
    "The records of a complete run."
    write_atomic(run/"metrics.tsv", metrics_table(predictions, 16).to_csv(sep="\t", index=False))
    settings = {name: value for name, value in SETTINGS.items() if find_method(method).uses(name)}
    parameters = dict(method=method, benchmark="toy", root="/data/of/mine", model=str(model), pretrained=None, seed=1)
    kept = [name for name in ("predictions", "student", "teacher") if (run/name).is_dir()]
    config = {"parameters": parameters | settings, "complete": True, "versions": versions(), "kept": kept,
              "made": seal(run)}
    write_atomic(run/"config.json", json.dumps(sealed(config)))


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    "Runs that were made once and are copied."
    return tmp_path_factory.mktemp("known")

@pytest.fixture
def original(tiny_clip, toy, known, monkeypatch):
    "A complete run of any method on the four colours, which stays as it is."
    monkeypatch.setattr(calibration, "MIN_IMAGES", 1)
    monkeypatch.setattr(calibration, "MIN_EACH", 1)
    model = known/"tiny"
    if not model.exists(): save_clip(tiny_clip, model)
    clip, _, transform, tokenizer = load_clip(str(model))
    for dataset in (toy.train, toy.val, *(s.dataset for s in toy.eval.values())): dataset.transform = transform
    def make_once(method):
        run, uses = known/"toy"/method/"seed=1", find_method(method).uses
        settings = {name: value for name, value in SETTINGS.items() if uses(name)}
        trained = fine_tune(clip, tokenizer, toy, method, **settings, out=run)
        save_classes(run, toy)
        finish(run, method, model, predict_sets(classifier(trained, tokenizer, toy), toy, out=run))
        return run
    def make(method):
        run = known/"toy"/method/"seed=1"
        return run if (run/"config.json").exists() else make_once(method)
    return make

@pytest.fixture
def make_run(original, tmp_path):
    "A copy of such a run."
    return lambda method: shutil.copytree(original(method), tmp_path/"toy"/method/"seed=1")

@pytest.fixture
def make_export(original, tmp_path, known):
    "A copy of its export."
    def make(method, name="out"):
        if not (known/f"of {method}").exists(): export_model(original(method), known/f"of {method}")
        return shutil.copytree(known/f"of {method}", tmp_path/name)
    return make

@pytest.fixture
def plain(monkeypatch):
    "Exports without a picture, which takes as long as all else."
    monkeypatch.setattr(export, "draw_calibration", lambda *_: None)

@pytest.fixture
def pictures(toy, tmp_path):
    "The evaluation images as files."
    (tmp_path/"new").mkdir()
    raw = copy.copy(toy.eval["Toy"].dataset)
    raw.transform = None
    for i in range(0, 20, 3): raw[i][0].save(tmp_path/"new"/f"{i:02d}.png")
    return tmp_path/"new"


def digests(folder): return seal(folder, "*")

def python_of(card):
    "The lines of Python in a card."
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


@pytest.mark.parametrize("method", ["zs", "lp", "ft", "flyp", "carot"])
def test_the_same_predictions_from_the_folder_alone(make_run, pictures, tmp_path, method, monkeypatch):
    "With the run gone and the folder moved: by carot to the last bit, by the card's lines of Python as nearly."
    run = make_run(method)
    ways = [dict(coverage=0.8), dict(temperature=2)]
    before = [classify_files(run, pictures, None, **how) for how in ways]
    Image.open(pictures/"00.png").save(tmp_path/"image.png")
    export_model(run, tmp_path/"out"/"model")
    assert classify_files(tmp_path/"out"/"model", pictures, None)["class"].equals(before[0]["class"])
    shutil.rmtree(tmp_path/"toy")
    shutil.move(tmp_path/"out"/"model", tmp_path/"away")
    after = [classify_files(tmp_path/"away", pictures, None, **how) for how in ways]
    for one, other in zip(before, after): pd.testing.assert_frame_equal(one, other, check_exact=True)
    assert before[0].calibration[0] == "fitted on the 12 validation images of the run"
    monkeypatch.chdir(tmp_path)
    lines = python_of((tmp_path/"away"/"README.md").read_text()).replace('Path("model")', 'Path("away")')
    with redirect_stdout(io.StringIO()) as said: exec(lines, {})
    name, confidence = said.getvalue().split()
    assert name == before[0]["class"][0] and float(confidence) == pytest.approx(before[0].confidence[0], abs=1e-5)


def test_open_clip_opens_it(make_run, tmp_path):
    run = make_run("carot")
    for part in ("student", "teacher"):
        export_model(run, tmp_path/part, part)
        theirs = open_clip.create_model(f"local-dir:{tmp_path/part}").state_dict()
        ours = load_clip(str(run/part))[0].state_dict()
        assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


def test_a_teacher_has_no_figures(make_run, pictures, tmp_path, capsys):
    export_model(make_run("carot"), tmp_path/"student", "teacher")  # a folder of that name is no part of a run
    assert not {"metrics.tsv", "reliability.png"} & set(os.listdir(tmp_path/"student"))
    card = hub.ModelCard.load(tmp_path/"student"/"README.md")
    assert card.data.eval_results is None and "weights of the teacher" in card.text and "![" not in card.text
    classify_files(tmp_path/"student", pictures, None)
    assert "none applied: there are no validation predictions" in capsys.readouterr().out
    with pytest.raises(UserError, match="leave out coverage"):
        classify_files(tmp_path/"student", pictures, None, coverage=0.9)


def test_what_the_hub_reads(make_run, tmp_path):
    "Licence, library, task, and every figure of the run, in YAML."
    run = make_run("flyp")
    export_model(run, tmp_path/"out", license="cc-by-4.0")
    export_model(run, tmp_path/"out")  # the licence stays what it was said to be
    text = (tmp_path/"out"/"README.md").read_text(encoding="utf-8")
    other = export_model(make_run("lp"), shutil.copytree(tmp_path/"out", tmp_path/"other"))
    assert hub.ModelCard.load(other/"README.md").data.license == "unknown"  # of another model nobody has said it
    data = yaml.safe_load(text.split("---\n")[1])
    assert (data["license"], data["library_name"], data["pipeline_tag"]) == (
        "cc-by-4.0", "open_clip", "zero-shot-image-classification")
    assert {"clip", "flyp", "toy"} <= set(data["tags"]) and "base_model" not in data and "datasets" not in data
    rows = pd.read_csv(run/"metrics.tsv", sep="\t").set_index(["set", "metric"]).value
    found = {(one.dataset_type, one.metric_type): one.metric_value for one in hub.ModelCard(text).data.eval_results}
    assert set(found) == {(which, metric) for which in ("Toy", "ToyTwo") for metric in ("accuracy", "ece")}
    assert all(value == pytest.approx(rows[name], abs=1e-6) for name, value in found.items())
    alt, file = re.search(r"!\[(.*)\]\((.*)\)", text).groups()
    assert "Toy, ToyTwo" in alt and Image.open(tmp_path/"out"/file).size[0] > 300
    for section in ("Results", "How to use it", "What it is not for", "How it was made", "Licence"):
        assert f"\n## {section}\n" in text
    assert find_method("flyp").source[:12] in text and "epochs=2" in text and "`cc-by-4.0`" in text
    assert (tmp_path/"out"/"metrics.tsv").read_bytes() == (run/"metrics.tsv").read_bytes()


def test_no_path_of_this_machine_and_no_licence_of_our_own(make_run, tmp_path):
    export_model(make_run("lp"), tmp_path/"out")
    texts = [file.read_text() for file in (tmp_path/"out").iterdir() if file.suffix in (".md", ".json", ".tsv")]
    assert not [text for text in texts if str(tmp_path) in text or "/data" in text]
    card = hub.ModelCard.load(tmp_path/"out"/"README.md")
    assert card.data.license == "unknown" and "Nobody has stated one" in card.text
    assert card.data.pipeline_tag == "image-classification"  # a linear head


def test_the_hubs_names_of_model_and_data(original):
    handed = export.open_handed(original("zs"))
    imagenet = {"benchmark": "imagenet", "model": "ViT-B-16", "pretrained": "laion2b_s34b_b88k"}
    handed = replace(handed, config={"parameters": imagenet})
    data = export.card_data(handed, "mine", "mit", None).to_dict()
    assert data["datasets"] == "ILSVRC/imagenet-1k" and data["base_model"] == "laion/CLIP-ViT-B-16-laion2B-s34B-b88K"
    published = export.base_model({"model": "ViT-B-16", "pretrained": "openai"})
    assert published[1] == "timm/vit_base_patch16_clip_224.openai"
    assert export.base_model({"model": "ViT-B-16", "pretrained": "/home/me/own.pt"}) == (
        "open_clip's ViT-B-16 with the weights own.pt", "")


BAD = {"a part that is none": (dict(part="pupil"), "unknown part 'pupil'"),
       "no teacher": (dict(part="teacher"), "ft has no teacher"), "no such run": (dict(run="gone"), "no folder 'gone'"),
       "no run": (dict(run="."), "not the directory of a complete run"),
       "a licence in capitals": (dict(license="MIT"), "as mit or apache-2.0"),
       "an empty folder's name": (dict(to=""), "to is empty"),
       "a repository's name": (dict(push="a/b/c"), "cannot name"),
       "a repository without owner": (dict(push="mine"), "lacks its owner"),
       "no token": (dict(push="me/mine"), "needs a token")}

@pytest.mark.parametrize("name", BAD)
def test_refused_before_anything_is_written(make_run, tmp_path, name, monkeypatch):
    given, words = BAD[name]
    monkeypatch.setattr(hub, "get_token", lambda: None)
    run = make_run("ft")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words): export_model(**dict(run=run, to="out") | given)
    assert sorted(os.listdir()) == ["toy"]


def test_a_run_that_is_not_whole(make_run, tmp_path):
    run = make_run("ft")
    weights = run/"student"/"open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="not the file that this run has made"): export_model(run, tmp_path/"out")
    for folder in ("student", "predictions"): shutil.rmtree(run/folder)
    with pytest.raises(UserError, match="a record only"): export_model(run, tmp_path/"out")
    config = json.loads((run/"config.json").read_text())
    (run/"config.json").write_text(json.dumps(config | {"complete": False}))
    with pytest.raises(UserError, match="not the directory of a complete run"): export_model(run, tmp_path/"out")
    assert not (tmp_path/"out").exists()


def test_other_files_are_left_alone(make_run, tmp_path, monkeypatch, plain):
    run = make_run("lp")
    (tmp_path/"file").write_text("mine")
    (tmp_path/"notes").mkdir()
    (tmp_path/"notes"/"plan.txt").write_text("mine")
    (tmp_path/"loop").symlink_to("loop")
    before = digests(tmp_path/"notes")
    for place, words in (("file", "no folder"), ("notes", "plan.txt"), ("loop", "no folder|levels of symbolic"),
                         ("file/x", "Not a directory"), ("x" * 300, "too long"), ("toy", "lp|toy")):
        with pytest.raises(UserError, match=words): export_model(run, tmp_path/place)
    monkeypatch.chdir(tmp_path/"notes")
    with pytest.raises(UserError, match="the working directory"): export_model(run, ".")
    assert digests(tmp_path/"notes") == before and (tmp_path/"file").read_text() == "mine"


def test_an_earlier_export_is_replaced_if_nobody_changed_it(make_run, tmp_path, plain):
    out, link = tmp_path/"out", tmp_path/"link"
    out.mkdir()
    link.symlink_to(out)
    export_model(make_run("lp"), out)
    assert (out/"head.safetensors").exists()
    export_model(make_run("zs"), link)
    assert read_export(out)["method"] == "zs" and not (out/"head.safetensors").exists()
    assert link.is_symlink() and sorted(os.listdir(tmp_path)) == ["link", "out", "toy"]
    before = digests(out)
    with open(out/"README.md", "a") as card: card.write("\nMy own words.\n")
    with pytest.raises(UserError, match="README.md"): export_model(tmp_path/"toy"/"lp"/"seed=1", out)
    assert {name for name, digest in digests(out).items() if digest != before[name]} == {"README.md"}
    (out/"README.md").unlink()  # what was removed is no loss
    export_model(tmp_path/"toy"/"lp"/"seed=1", out)
    assert (out/"README.md").exists()


@pytest.mark.parametrize("at", range(1, 8))
def test_a_full_disk(make_run, make_export, tmp_path, monkeypatch, at):
    "One line; an earlier export is as it was, and nothing is left beside it."
    run, out = make_run("carot"), make_export("carot")
    before, written, write = digests(out), [], write_atomic
    def full(path, content):
        written.append(path)
        if len(written) == at: raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)
    for place in ("clip", "evaluate", "export"): monkeypatch.setattr(f"carot.{place}.write_atomic", full)
    with pytest.raises(UserError, match="No space left on device"): export_model(run, out)
    assert digests(out) == before and sorted(os.listdir(tmp_path)) == ["out", "toy"]


def test_stopped_between_two_moves(make_run, tmp_path, monkeypatch, plain):
    run, out, rename = make_run("ft"), tmp_path/"out", os.rename
    export_model(run, out)
    before = digests(out)
    def stopped(here, there):
        if Path(here).name == "new": raise KeyboardInterrupt
        rename(here, there)
    with monkeypatch.context() as patch:
        patch.setattr(export.os, "rename", stopped)
        with pytest.raises(KeyboardInterrupt): export_model(run, out)
    assert digests(out) == before and sorted(os.listdir(tmp_path)) == ["out", "toy"]


@pytest.mark.parametrize("when", ["begins", "moves"])
def test_two_at_once(make_run, tmp_path, monkeypatch, when, plain):
    "Another command's export appears while ours is made, or in the very moment in which it takes its place."
    mine, other, out = make_run("ft"), make_run("lp"), tmp_path/"out"
    export_model(other, tmp_path/"other")
    write, rename, names = export.write_export, os.rename, iter(range(9))
    monkeypatch.setattr(work, "work_name", lambda: f"one-{next(names)}-0")
    others = iter(["one"])
    def meanwhile():
        if next(others, None): shutil.copytree(tmp_path/"other", out)
    def slow(*given):
        if when == "begins": meanwhile()
        write(*given)
    def late(here, there):
        if Path(here).name == "new" and when == "moves": meanwhile()
        rename(here, there)
    monkeypatch.setattr(export, "write_export", slow)
    monkeypatch.setattr(export.os, "rename", late)
    export_model(mine, out)
    assert read_export(out)["method"] == "ft" and sorted(os.listdir(tmp_path)) == ["other", "out", "toy"]


RELIED_ON = {"open_clip_config.json", "open_clip_model.safetensors", "head.safetensors", "classes.json", "carot.json"}

@pytest.mark.parametrize("name, change", [(name, change) for name in FILES for change in ("changed", "removed")
                                          if (name, change) != ("carot.json", "removed")])  # that is no export
def test_what_was_exchanged_is_refused(make_export, pictures, tmp_path, name, change):
    "A file that predictions depend on; the card, the picture and the table may be edited or left out."
    file = make_export("lp")/name
    if change == "removed": file.unlink()
    else: file.write_bytes(file.read_bytes()[:-2] + b"1}")
    refused = pytest.raises(UserError, match=re.escape(f"{name} is not")) if name in RELIED_ON else nullcontext()
    with refused: classify_files(tmp_path/"out", pictures, None)


@pytest.mark.parametrize("name", ["head.safetensors", "a.safetensors"])
def test_weights_that_were_added(make_export, pictures, name):
    zs = make_export("zs", "zs")
    shutil.copy(make_export("lp", "lp")/"head.safetensors", zs/name)
    with pytest.raises(UserError, match=f"{name} is not the file"): classify_files(zs, pictures, None)


@pytest.mark.parametrize("change", [{"temperature": -1}, {"temperature": "1"}, {"images": 0}, {"reason": "two\nlines"},
                                    {"thresholds": {"0.90": "x"}}, {"thresholds": 3}, {"more": 1}, {"reason": None}])
def test_a_record_that_cannot_be(make_export, pictures, tmp_path, change):
    make_export("zs")
    record = json.loads((tmp_path/"out"/"carot.json").read_text())
    record["calibration"] |= change
    (tmp_path/"out"/"carot.json").write_text(json.dumps(sealed(record)))
    with pytest.raises(UserError, match="carot.json is damaged"): classify_files(tmp_path/"out", pictures, None)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"made": {}}', '{"made": 3, "digest": ""}', "{" * 9])
def test_a_record_that_is_none(make_export, pictures, text):
    "Neither used, nor replaced as if it were an export."
    out = make_export("zs")
    (out/"carot.json").write_text(text)
    with pytest.raises(UserError, match="carot.json"): classify_files(out, pictures, None)
    with pytest.raises(UserError, match="files that are not as|not valid JSON|no object"): export.check_target(out)


def test_sets_that_are_not_known(make_export, pictures, tmp_path):
    make_export("flyp")
    with pytest.raises(UserError, match="for whole percents"):
        classify_files(tmp_path/"out", pictures, None, coverage=0.905)
    with pytest.raises(UserError, match="leave out temperature or coverage"):
        classify_files(tmp_path/"out", pictures, None, 2, coverage=0.9)
    with pytest.warns(UserWarning, match="more than 12 validation images"):
        table = classify_files(tmp_path/"out", pictures, None, coverage=0.99)
    assert all(len(json.loads(cell)) == 4 for cell in table["set"])


def test_as_a_command(make_run, tmp_path, capsys, monkeypatch, plain):
    run = make_run("ft")
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--run", str(run), "--to", "out", "--license", "mit"]) == 0
    assert capsys.readouterr().out == "FT, its student: out\n  carot predict --checkpoint out --images FOLDER\n"
    assert main(["export", "--run", str(run)]) == 2 and "needs --to" in capsys.readouterr().err


# ---- a hub of our own

class Hub(BaseHTTPRequestHandler):
    "As much of the hub as an upload talks to: repositories, a commit, large files."
    def log_message(self, *_): pass

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def read(self): return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_HEAD(self):
        "A file of a repository."
        _, owner, name, _, commit, *path = self.path.split("/")
        content = self.server.repositories.get(f"{owner}/{name}", {}).get("/".join(path))
        self.send_response(404 if content is None else 200)
        self.send_header("X-Repo-Commit", "1" * 40)
        self.send_header("ETag", f'"{digest(repr(content))}"')
        self.send_header("Content-Length", str(len(content or b"")))
        if content is None: self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        return content

    def do_GET(self):
        if "/resolve/" in self.path: return self.wfile.write(self.do_HEAD() or b"")
        files = self.server.repositories.get("/".join(self.path.split("/")[3:5]))
        if files is None: return self.answer({"error": "Repository not found"}, 404)
        self.answer([{"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40} for path in files])

    def do_PUT(self):
        self.server.blobs[self.path.rpartition("/")[2]] = self.read()
        self.answer({})

    def do_POST(self):
        place, content, here = self.path.split("?")[0], self.read(), f"http://{self.headers['Host']}"
        self.server.heard.append((place, self.headers.get("Authorization"), content))
        if self.server.refuse and place.startswith(self.server.refuse[0]):
            return self.answer({"error": "refused"}, self.server.refuse[1])
        given = {} if "commit" in place else json.loads(content)
        if place == "/api/repos/create":
            name = f"{given['organization'] or 'me'}/{given['name']}"
            exists = name in self.server.repositories
            self.server.repositories.setdefault(name, {})
            self.answer({"url": f"{here}/{name}"}, 409 if exists else 200)
        elif place == "/api/validate-yaml": self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in place:
            def mode(path): return "lfs" if path.endswith((".safetensors", ".png")) else "regular"
            self.answer({"files": [{"path": file["path"], "uploadMode": mode(file["path"]), "shouldIgnore": False}
                                   for file in given["files"]]})
        elif place.endswith("/info/lfs/objects/batch"):
            self.answer({"transfer": "basic", "objects": [
                {**one, "actions": {"upload": {"href": f"{here}/blobs/{one['oid']}"}}} for one in given["objects"]]})
        else: self.commit(here, place, [json.loads(line) for line in content.splitlines()])

    def commit(self, here, place, lines):
        files = self.server.repositories["/".join(place.split("/")[3:5])]
        for value, kind in ((line["value"], line["key"]) for line in lines):
            if kind == "file": files[value["path"]] = base64.b64decode(value["content"])
            if kind == "lfsFile": files[value["path"]] = self.server.blobs[value["oid"]]
            if kind == "deletedFile": files.pop(value["path"])
        self.answer({"commitUrl": f"{here}/{'/'.join(place.split('/')[3:5])}/commit/1", "commitOid": "1" * 40})


@pytest.fixture
def stand_in(monkeypatch):
    "A hub at an address of this machine."
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories, server.blobs, server.heard, server.refuse = {}, {}, [], None
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_mine")
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: "hf_mine", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    yield server
    server.shutdown()
    server.server_close()


def test_push(make_run, tmp_path, stand_in, capsys):
    "The folder arrives as it is, with the token; the next one drops what it does not have; others' files stay."
    export_model(make_run("lp"), tmp_path/"lp", push="me/mine")
    assert f"pushed to {stand_in.address}/me/mine" in capsys.readouterr().out
    arrived = stand_in.repositories["me/mine"]
    assert arrived == {file.name: file.read_bytes() for file in (tmp_path/"lp").iterdir()}
    assert {token for _, token, _ in stand_in.heard} == {"Bearer hf_mine"}
    text = arrived["README.md"].decode()
    assert "hf download me/mine --local-dir lp" in text
    arrived |= {"LICENSE": b"theirs", ".gitattributes": b"theirs"}
    export_model(make_run("zs"), tmp_path/"zs", push="me/mine", private=True)
    assert set(arrived) == {"LICENSE", ".gitattributes", *os.listdir(tmp_path/"zs")}
    assert "head.safetensors" not in arrived
    creations = [json.loads(content) for place, _, content in stand_in.heard if place == "/api/repos/create"]
    assert [creation.get("visibility") for creation in creations] == [None, "private"]
    assert len([place for place, _, _ in stand_in.heard if "/commit/" in place]) == 2


def test_open_clip_fetches_it(make_run, tmp_path, stand_in, plain, monkeypatch):
    "By the name of the repository."
    export_model(make_run("flyp"), tmp_path/"out", push="me/mine")
    template = stand_in.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    theirs = open_clip.create_model("hf-hub:me/mine", cache_dir=str(tmp_path/"cache")).state_dict()
    ours = load_clip(str(tmp_path/"out"))[0].state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


@pytest.mark.parametrize("refuse, words", [
    (("/api/repos/create", 401), "does not accept the token"), (("/api/repos/create", 403), "may not write"),
    (("/api/models/me/mine/commit", 403), "may not write"), (("/api/models/me/mine/preupload", 404), "does not know")])
def test_the_hub_refuses(make_run, tmp_path, stand_in, refuse, words, capsys, plain):
    stand_in.refuse = refuse
    assert main(["export", "--run", str(make_run("ft")), "--to", str(tmp_path/"out"), "--push", "me/mine"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(words, said) and "the export is whole" in said and "Traceback" not in said
    assert read_export(tmp_path/"out")["method"] == "ft"


def test_no_network(make_run, tmp_path, stand_in, monkeypatch, plain):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot push to me/mine at http://127.0.0.1:9: ConnectError"):
        export_model(make_run("ft"), tmp_path/"out", push="me/mine")
    assert read_export(tmp_path/"out")
