"""Two writers of one run, readers while a sweep writes, ten commands at once: all end, and nothing is half."""
import json
import re
from pathlib import Path

import pytest
from command import Command
from hard.place import COMMON, PLACES, call, copy_place, digests, words_of
from hard.rows import AGAIN, CLAIMS, FT, PREDICT, REPORT

pytestmark = [pytest.mark.usefixtures("warm"), pytest.mark.slow(15), pytest.mark.xdist_group("at once")]
HERE = f"""\
from carot.engine import processes, warm
processes.begin()
warm._link = None  # it forks by itself
import sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from hard.at_once import main
main(*sys.argv[1:])
"""


def at_once(folder, *commands):
    "How each ended: code, what it said on stdout and on stderr."
    done = Command(folder, *commands, cwd=folder, code=HERE, OMP_NUM_THREADS="1", MPLBACKEND="agg").end(600)
    assert done.returncode == 0, done.stderr
    ended = json.loads(done.stdout.splitlines()[-1])
    for command, (code, out, err) in zip(commands, ended):
        assert "Traceback" not in out + err and code in (0, 2), (command, code, err)
        assert len(re.findall("(?m)^carot: error:", err)) == bool(code), (command, err)
    return ended


def parts(folder):
    "Files that a writer left unfinished, and temporary ones."
    return [name for name in digests(folder) if re.search(r"/\.[^/]*\.\w{8}$|/\.work/.|\.part", name)]


def weights(folder, run):
    return digests(folder/run/"student")


def test_two_writers_of_one_run(place, tmp_path):
    "One makes it, the other waits or says who is at work; the result is that of one alone."
    alone, here = copy_place(place, tmp_path/"alone"), copy_place(place, tmp_path/"here")
    assert call(words_of(AGAIN), alone).code == 0
    ended = at_once(here, AGAIN, AGAIN, AGAIN)
    assert 0 in [code for code, *_ in ended]
    assert all(code == 0 or "another process" in err for code, _, err in ended), ended
    assert weights(here, PLACES["begun"]) == weights(alone, PLACES["begun"]) and not parts(here)
    again = call(words_of(AGAIN), here)
    assert again.code == 0 and "was there" in again.out


def test_readers_during_a_sweep(place, tmp_path):
    "A report sees whole runs only, whenever it looks."
    here = copy_place(place, tmp_path/"here")
    sweep = f"sweep --method ft {COMMON} --grid seed=1,2,3,4 --jobs 1"
    ended = at_once(here, sweep, *(f"0.2s:{REPORT} --out expt_logs", f"0.2s:{CLAIMS}", "0.2s:" + REPORT, "0.2s:" + FT))
    assert [code for code, *_ in ended] == [0] * 5, ended
    tables = [out for _, out, _ in ended]
    assert "4 of 4 runs are complete" in tables[0] and not parts(here)
    final = call(words_of(REPORT), here)
    assert final.code == 0 and not re.search("(?i)damaged", final.err)


def test_ten_commands_at_once(place, tmp_path):
    here = copy_place(place, tmp_path/"here")
    check = f"check {COMMON} --no-time-step"
    predict = [f"{PREDICT} --out p{i}.tsv" for i in range(3)] + [f"{PREDICT} --out same.tsv"] * 2
    ended = at_once(here, REPORT, REPORT, CLAIMS, check, check, *predict)
    assert all(code == 0 or re.search("another|same.tsv", err) for code, _, err in ended), ended
    tables = {(here/f"{name}.tsv").read_text() for name in ("p0", "p1", "p2", "same")}
    assert len(tables) == 1 and not parts(here)
