"""Every chapter executes as `nbdev_test` does it, each in a process that is forked from one that has all imported."""
from pathlib import Path

import pytest
from command import Command

NBS = Path(__file__).resolve().parent.parent/"nbs"
CHAPTERS = [str(file.relative_to(NBS)) for file in sorted(NBS.rglob("*.ipynb"))
            if not file.name.startswith(("_", ".")) and not (file.parent/".notest").exists()
            and not any(part.startswith((".", "_")) for part in file.relative_to(NBS).parts)]
EXECUTE = """\
from carot.engine.processes import begin
begin()
import sys
from pathlib import Path
from carot.engine import warm
from nbdev.test import test_nb
file = Path(sys.argv[1])
if "warm_start(" in file.read_text(): warm._link = None  # it shows how processes begin without a server
sys.exit(not test_nb(file, skip_flags=["notest"], basepath=file.parents[1])[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAPTERS)
def test_chapter(name, warm):
    done = Command(NBS/name, cwd=NBS, code=EXECUTE).end(600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
