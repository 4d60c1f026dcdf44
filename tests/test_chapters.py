"Every notebook executes, as `nbdev_test` does it: each in a fork of its own, where PyTorch is imported already."
import multiprocessing
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = [file for file in sorted(ROOT.glob("nbs/**/*.ipynb"))
             if not any(part.startswith((".", "_")) for part in file.relative_to(ROOT).parts)
             and not (file.parent/".notest").exists()]


def execute(file):
    "In the forked process: exit code 0 if no cell fails; else the traceback is on stderr."
    from nbdev.config import get_config
    from nbdev.test import test_nb as executed
    os.chdir(ROOT/"nbs")
    passed, _ = executed(file, skip_flags=get_config().tst_flags.split(), basepath=ROOT)
    sys.exit(0 if passed else 1)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.relative_to(ROOT/"nbs").as_posix())
def test_executes(file):
    process = multiprocessing.get_context("fork").Process(target=execute, args=(file,))
    process.start()
    process.join()
    assert process.exitcode == 0
