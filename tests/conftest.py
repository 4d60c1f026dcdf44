"""What the tests share: one CPU thread, a tiny CLIP and a tiny benchmark; processes that begin at once; how several
workers divide the tests."""
import json
import signal
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from carot.clip import build_clip
from carot.commands import NEEDED, PAGES
from carot.data import ArrayImages, Benchmark, EvalSet
from carot.engine import warm as engine
from carot.engine.processes import NEVER_USED, leave_out

torch.set_num_threads(1)
leave_out(*NEVER_USED)  # as in commands, runs and kernels

FILE = Path(__file__).with_name("seconds.json")
SECONDS = json.loads(FILE.read_text())  # that tests took on one core, if more than `QUICK`: `pytest --time` writes it
QUICK = 0.1  # what takes longer is slow

def pytest_addoption(parser):
    parser.addoption("--time", action="store_true", help="write down in seconds.json what the tests of this call take")

class Clock:
    "What tests take."
    def __init__(self): self.taken = Counter()

    def pytest_runtest_logreport(self, report):
        name, at, group = report.nodeid.rpartition("@")
        self.taken[name if at and "]" not in group else report.nodeid] += report.duration

    def pytest_terminal_summary(self, terminalreporter):
        "A table of the files that took longest."
        files = Counter()
        for name, seconds in self.taken.items(): files[name.split("::")[0]] += seconds
        for name, seconds in files.most_common(20): terminalreporter.write_line(f"{seconds:7.1f} s  {name}")

    def write(self):
        "Puts them into the file, beside those of other tests."
        found = SECONDS | {name: round(seconds, 2) for name, seconds in self.taken.items()}
        kept = {name: seconds for name, seconds in sorted(found.items()) if seconds > QUICK}
        FILE.write_text(json.dumps(kept, indent=0, ensure_ascii=False) + "\n")

@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    if not hasattr(config, "workerinput"): config.pluginmanager.register(Clock(), "clock")

def pytest_sessionfinish(session):
    clock = session.config.pluginmanager.get_plugin("clock")
    if clock and session.config.getoption("--time"): clock.write()

def seconds_of(item):
    "As its marker says, or what was written down."
    slow = item.get_closest_marker("slow")
    return slow.args[0] if slow and slow.args else SECONDS.get(item.nodeid, 0)

def group_of(item):
    "Tests of one group stay on one worker: those of a file; one that is marked as slow is alone, or in a named group."
    named = item.get_closest_marker("xdist_group")
    return named.args[0] if named else item.nodeid if item.get_closest_marker("slow") else item.path.name

def put_in_group(item, name):
    "As pytest-xdist does it, whose own way has no effect since pytest 9.2: the name's end says it."
    if hasattr(item, "_id"): item._id = type(item._id).parse(f"{item.nodeid}@{name}")
    else: item.add_marker(pytest.mark.xdist_group(name))

def leave_long(items):
    "Skips what is long, and says so."
    for item in items:
        if long := item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason=f"long, {long.args[0]}: pytest -m long"))

@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the groups, and pytest at `-m`
def pytest_collection_modifyitems(config, items):
    """What is not quick is slow. For workers, `pytest -n 3 --dist loadgroup --no-loadscope-reorder`: what takes longest
    begins first. What is long is skipped unless `-m` says something of it."""
    if "long" not in config.option.markexpr: leave_long(items)
    total, groups = Counter(), {item: group_of(item) for item in items}
    for item in items: total[groups[item]] += seconds_of(item)
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: (-total[groups[item]], groups[item]))
    for item in items:
        if seconds_of(item) > QUICK or item.get_closest_marker("long"): item.add_marker("slow")
        if hasattr(config, "workerinput") and groups[item] != item.nodeid: put_in_group(item, groups[item])

@pytest.fixture(scope="session")
def server():
    "A link to a process that has everything imported; None where there can be none. It serves who asks for `warm`."
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    used = "carot.cli carot.predict carot.runs.check carot.runs.sweeps carot.benchmarks.folders nbdev.test".split()
    with engine.warm_start([*NEEDED, *PAGES, *used]):
        signal.signal(signal.SIGINT, usual)
        link, engine._link = engine._link, None
        yield link
        engine._link = link

@contextmanager
def forking(server):
    "Meanwhile processes are forked, runs and kernels included: they need not import anything."
    before, engine._link = engine._link, server
    try: yield
    finally: engine._link = before

@pytest.fixture
def warm(server):
    with forking(server): yield

VISION = {"image_size": 16, "layers": 1, "width": 24, "head_width": 8, "patch_size": 8}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
TINY_VIT = {"model_cfg": {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}, "preprocess_cfg": {"size": 16}}

@pytest.fixture
def tiny_clip():
    torch.manual_seed(0)
    return build_clip(TINY_VIT).eval()

def colours(n, seed, transform=None, each=1):
    "n noisy squares of each of four colours; a class is as many colours as `each` says"
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(4), n)
    base = np.array([(220, 30, 30), (30, 180, 60), (40, 60, 220), (230, 210, 40)])[labels][:, :, None, None]
    images = (base + rng.normal(0, 40, (4 * n, 3, 16, 16))).clip(0, 255).astype("uint8")
    return ArrayImages(images, labels // each, transform)

@pytest.fixture
def toy():
    from torchvision.transforms import v2
    plain = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    train = v2.Compose([v2.RandomResizedCrop(16, scale=(0.9, 1.0)), plain])
    sets = {"Toy": EvalSet(colours(5, 2, plain), True),
            "ToyTwo": EvalSet(colours(5, 3, plain, each=2), False, [[0, 1], [2, 3]])}
    templates, names = ["a photo of a {}", "a {} thing", "something {}"], ["red", "green", "blue", "yellow"]
    return Benchmark("toy", names, templates, colours(10, 0, train), colours(3, 1, plain), sets)
