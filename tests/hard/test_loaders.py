"A command, or a process that reads its images, is killed: no traceback, nobody is left, and it goes on."
import os
import re
import subprocess
import sys
import time

import psutil
import pytest
from hard.place import call, copy_place, words_of
from hard.rows import PREDICT

pytestmark = [pytest.mark.slow(10), pytest.mark.xdist_group("killed loaders")]


def with_loaders(folder, words):
    "A command in a process of its own, and its two loader processes."
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "carot", *words_of(words)], cwd=folder, env=environment,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    loaders, end = [], time.monotonic() + 120
    while len(loaders) < 2 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
        loaders = psutil.Process(process.pid).children()
    assert len(loaders) == 2, process.communicate()
    return process, loaders


@pytest.mark.parametrize("who", ["a loader", "the command"])
def test_killed_while_images_are_read(who, place, tmp_path):
    "One line or none, no traceback; nobody is left; the same command goes on and makes the whole table."
    here = copy_place(place, tmp_path/"here")
    for i in range(3000): os.link(here/"new"/f"{i % 3}.png", here/"new"/f"more{i}.png")
    words = f"{PREDICT} --workers 2 --batch-size 8"
    process, loaders = with_loaders(here, words)
    (loaders[0] if who == "a loader" else process).kill()
    out, err = process.communicate(timeout=120)
    lines = [line for line in re.split(r"[\r\n]", err) if line.strip() and not line.startswith("predict:")]
    assert process.returncode == (2 if who == "a loader" else -9), (process.returncode, err)
    assert [line[:13] for line in lines] == ["carot: error:"] * (who == "a loader"), err
    assert who == "the command" or "images was killed" in lines[0], err
    assert not psutil.wait_procs(loaders, 30)[1]
    again = call(words_of(f"{PREDICT} --batch-size 500"), here)
    assert again.code == 0 and (here/"predictions.tsv").read_text().count("\n") == 3007, again.err
    assert not list(here.glob(".carot*")) and not list(here.glob("*.part"))
