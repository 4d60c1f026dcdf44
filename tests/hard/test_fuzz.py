"""Files with bytes and values changed at random: a command ends with 0 or 2 and one line, and no table changes unseen.

Fifty of them change each file once; `pytest -m long tests/hard/test_fuzz.py` tries 150 more, and with CAROT_FUZZ=10000
many. The seed of a case is its number."""
import io
import json
import os
import random
import re

import pytest
from hard.place import call, copy_place, put, with_places, words_of
from hard.rows import AGAIN, FT
from PIL import Image

FEW, CASES = 50, int(os.environ.get("CAROT_FUZZ", 200))
SWEEP = "sweep --method ft --grid seed=1 {common} --name s"
PREDICT = "predict --checkpoint {ft} --images new"
STEP = "{begun}/checkpoints/train/step-00000003"

# ---- changes

def bytes_changed(content, rng):
    "A few bytes flipped, cut, doubled or put in."
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(content) + 1)
        what = rng.randrange(5)
        if what == 0 and at < len(content): content[at] ^= 1 << rng.randrange(8)
        elif what == 1 and at < len(content): content[at] = rng.randrange(256)
        elif what == 2: del content[at:at + rng.choice([1, 7, 1000])]
        elif what == 3: content[at:at] = rng.randbytes(rng.choice([1, 7]))
        else: content = content[:at] if rng.random() < 0.5 else content + content[at:]
    return bytes(content)


VALUES = [None, True, -1, 0, 10**400, 1e308, float("nan"), "", "x", "\udcff", "a\nb", "../..", [], [[]], {}, {"x": 1},
    2**63,
          "<b>", ["a", 1], "0", 1.5]


def nodes(value):
    "All places of a JSON value: (container, key)."
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from nodes(value[key])


def node_changed(content, rng):
    "Another value at one place of a JSON file, or none."
    found = json.loads(content)
    container, key = rng.choice([*nodes(found)])
    if rng.random() < 0.2: del container[key]
    else: container[key] = rng.choice(VALUES)
    return json.dumps(found).encode()


def header_changed(content, rng):
    "The header of a safetensors file."
    n = int.from_bytes(content[:8], "little")
    head = rng.choice([node_changed, bytes_changed])(content[8:8 + n], rng)
    length = len(head) if rng.random() < 0.8 else rng.choice([0, 1, 2**31, 2**63, n + 1])
    return length.to_bytes(8, "little") + head + content[8 + n:]


def cell_changed(content, rng):
    "Another text in one cell of a table."
    rows = [line.split(b"\t") for line in content.split(b"\n")]
    row = rng.choice(rows)
    row[rng.randrange(len(row))] = str(rng.choice(VALUES)).encode(errors="surrogateescape")
    return b"\n".join(map(b"\t".join, rows))


# ---- what is changed, how, and the command that reads it

IMAGES = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM")
QUICK = [
    ("{ft}/metrics.tsv", (bytes_changed, cell_changed), SWEEP), ("{ft}/config.json", (bytes_changed, node_changed),
        SWEEP),
    ("{ft}/config.json", (bytes_changed, node_changed), FT), ("{ft}/config.json", (bytes_changed, node_changed),
        PREDICT),
    ("{ft}/classes.json", (bytes_changed, node_changed), PREDICT), ("{ft}/stats.tsv", (bytes_changed, cell_changed),
        FT),
    ("{ft}/predictions/Dark.safetensors", (bytes_changed, header_changed), SWEEP),
    ("{ft}/predictions/val.safetensors", (bytes_changed, header_changed), PREDICT),
    ("{ft}/student/head.safetensors", (bytes_changed, header_changed), PREDICT),
    ("{ft}/student/open_clip_model.safetensors", (header_changed,), PREDICT),
    ("{ft}/student/open_clip_config.json", (bytes_changed, node_changed), PREDICT),
    ("model/open_clip_config.json", (bytes_changed, node_changed), "predict --checkpoint {zs} --images new"),
    ("model/open_clip_model.safetensors", (header_changed,), "predict --checkpoint {zs} --images new"),
    *[(f"new/fuzz.{kind.lower()}", (bytes_changed,), PREDICT) for kind in IMAGES]]
TARGETS = [  # each in its turn; what is quick twice
    *QUICK, *QUICK,
    ("expt_logs/my/sweeps/s/sweep.json", (bytes_changed, node_changed), SWEEP),
    ("expt_logs/my/sweeps/s/results.parquet", (bytes_changed,), SWEEP),
    (f"{STEP}/manifest.json", (bytes_changed, node_changed), AGAIN), (f"{STEP}/state.json",
        (bytes_changed, node_changed), AGAIN),
    (f"{STEP}/student.safetensors", (bytes_changed, header_changed), AGAIN), (f"{STEP}/optimizer.pt", (bytes_changed,),
        AGAIN),
    ("{begun}/train.tsv", (bytes_changed, cell_changed), AGAIN), ("{begun}/config.json", (bytes_changed, node_changed),
        AGAIN)]
TABLES = {"sweep": "expt_logs/my/sweeps/s/results.tsv", "predict": "predictions.tsv"}


def write_pictures(folder):
    "One of every format."
    for kind in IMAGES:
        content = io.BytesIO()
        Image.effect_noise((24, 24), 90).convert("RGB").save(content, kind)
        put(folder/"new"/f"fuzz.{kind.lower()}", content.getvalue())


@pytest.fixture(scope="module")
def ready(place, tmp_path_factory):
    "A place with a sweep and pictures, and each command's table as it should be."
    folder = copy_place(place, tmp_path_factory.mktemp("fuzz")/"place")
    write_pictures(folder)
    whole = {}
    for command in {command for *_, command in TARGETS}:
        here = copy_place(folder, tmp_path_factory.mktemp("fuzz")/"here")
        result = call(words_of(command), here)
        assert result.code == 0, result.err
        whole[command] = table_of(here, command)
        if command == SWEEP: copy_place(here/"expt_logs"/"my"/"sweeps", folder/"expt_logs"/"my"/"sweeps")
    return folder, whole


def table_of(folder, command):
    "The lines of the table that a command wrote; none for most."
    file = TABLES.get(command.split()[0])
    return set((folder/file).read_text().splitlines()) if file and (folder/file).exists() else set()


def fuzz(number, ready, here):
    "One case: its command's result, the problems, and what was done in words."
    folder, whole = ready
    rng = random.Random(number)
    name, ways, command = TARGETS[number % len(TARGETS)]
    change, path = rng.choice(ways), with_places(name)
    copy_place(folder, here)
    put(here/path, change((here/path).read_bytes(), rng))
    result = call(words_of(command), here)
    return result, list(problems(result, name, table_of(here,
        command) - whole[command])), f"{change.__name__} of {path}; {command}"


def problems(result, name, new):
    "What is wrong with the end of a command; `new`: lines that its table should not have."
    if result.code not in (0, 2): yield f"ended with {result.code}"
    if "Traceback" in result.out + result.err: yield "a traceback"
    if len(result.errors) != bool(result.code): yield f"{len(result.errors)} lines of error"
    if any(not line.isprintable() or len(line) > 600 for line in result.errors): yield "a line that is none"
    changed = [line for line in new if "fuzz." not in line]  # a changed picture may be of another class
    if changed and result.code == 0 and not re.search("(?i)damaged|not as",
        result.err): yield f"a table changed: {changed[:2]}"


def bad_cases(numbers, ready, folder):
    "What is wrong, case by case."
    for number in numbers:
        result, found, what = fuzz(number, ready, folder/str(number))
        if found: yield f"case {number}: {'; '.join(found)}: {what}\n{result.err[-400:]}"


PARTS = [*range(10), *(pytest.param(part, marks=pytest.mark.long("25 s for all parts")) for part in range(10, 20))]

@pytest.mark.slow(1)
@pytest.mark.xdist_group("fuzz")
@pytest.mark.parametrize("part", PARTS)
def test_changed_files(part, ready, tmp_path):
    numbers = range(part, FEW, 10) if part < 10 else range(FEW + part - 10, CASES, 10)
    bad = [*bad_cases(numbers, ready, tmp_path)]
    assert not bad, f"{len(bad)} cases\n" + "\n".join(bad[:12])
