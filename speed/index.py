"""What the training index of ImageNet costs, and its fingerprint: carot's, beside the public recipe's CSV of captions.

    python speed/index.py [FOLDER]

Makes 1,281,167 empty files in 1,000 class folders below FOLDER (default: a temporary one, removed at the end; five
minutes and 1.3 million inodes), and a CSV of image x template rows for 1 % of them. Each index is built in a process
of its own; memory is resident memory beyond what the imported libraries take. Writes speed/index.tsv.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

from carot.benchmarks.imagenet import IMAGENET, names_and_templates, wnids

COUNT, SAMPLE = IMAGENET.counts["train"], 0.01

MEASURE = """
import json, sys, time
def memory(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6
{imports}
before, began = memory("VmRSS"), time.perf_counter()
{build}
seconds = time.perf_counter() - began
print(json.dumps(dict(seconds=seconds, resident=memory("VmRSS") - before, peak=memory("VmHWM") - before, rows=rows)))
"""

OURS = ("""from carot.data import EpochBatches
from carot.benchmarks.files import scan_classes
from carot.benchmarks.imagenet import wnids""",
        """images = scan_classes({train!r}, wnids())
rows = len(images)
batch = next(iter(EpochBatches(rows, 512, seed=1, epoch=0)))""")
FINGERPRINT = (OURS[0] + "\nfrom carot.runs.fingerprints import digest_of, identity_of\n"
               "images = scan_classes({train!r}, wnids())",
               "rows = len(images)\ndigest_of(identity_of(images))")
CSV = ("import pandas as pd",
       """frame = pd.read_csv({table!r}, sep="\\t")
images, captions = frame["filepath"].tolist(), frame["title"].tolist()
rows = len(images)""")
FIGURES = ("seconds", "resident", "peak")


def measure(imports, build):
    "Seconds, resident and peak memory in MB, and rows of an index, in a fresh process."
    code = MEASURE.format(imports=imports, build=build)
    return json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def image_names():
    "As many names per class as fit, spelt like ImageNet's."
    for k, wnid in enumerate(wnids()):
        for i in range(COUNT // 1000 + (k < COUNT % 1000)): yield wnid, f"{wnid}_{13 * i + 7}.JPEG"


def make_files(train):
    for wnid, name in image_names():
        if not (train/wnid).exists(): (train/wnid).mkdir(parents=True)
        (train/wnid/name).touch()


def make_csv(file):
    "The public recipe: a row per image and template, of every hundredth image."
    classnames, templates = names_and_templates()
    number = wnids()
    rows = [(f"ILSVRC2012/train/{wnid}/{name}", template.format(classnames[number[wnid]]))
            for i, (wnid, name) in enumerate(image_names()) if i % round(1 / SAMPLE) == 0 for template in templates]
    pd.DataFrame(rows, columns=["filepath", "title"]).sample(frac=1, random_state=0).to_csv(file, sep="\t", index=False)
    return len(rows)


def main(folder):
    train, table = folder/"train", folder/"captions.csv"
    if not train.exists(): make_files(train)
    make_csv(table)
    def best(imports, build):
        times = [measure(imports.format(train=str(train)), build.format(train=str(train))) for _ in range(3)]
        return min(times, key=lambda m: m["seconds"]), [round(m["seconds"], 1) for m in times]
    ours, times = best(*OURS)
    known, again = best(*FINGERPRINT)
    csv = measure(CSV[0], CSV[1].format(table=str(table)))
    assert ours["rows"] == COUNT
    scale, size = COUNT * 80 / csv["rows"], table.stat().st_size / 1e6
    lines = [("carot: files listed, epoch shuffled, captions sampled", COUNT,
              *(round(ours[name], 1) for name in FIGURES), 0),
             ("carot: fingerprint of the listed files", COUNT, *(round(known[name], 1) for name in FIGURES), 0),
             ("CSV of captions, 1 % sample", csv["rows"], *(round(csv[name], 1) for name in FIGURES), round(size)),
             ("CSV of captions, extrapolated", COUNT * 80, *(round(scale * csv[name]) for name in FIGURES),
              round(scale * size))]
    result = pd.DataFrame(lines, columns=["index", "rows", "seconds", "resident MB", "peak MB", "file MB"])
    result.to_csv(Path(__file__).with_suffix(".tsv"), sep="\t", index=False)
    print(result.to_string(index=False), times, again, sep="\n")


if __name__ == "__main__":
    if len(sys.argv) > 1: main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder: main(Path(folder))
