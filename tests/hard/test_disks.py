"""Full disks, files that may not grow, places that cannot be written to or locked, streams that are closed."""
import contextlib
import errno
import fcntl
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hard.place import PLACES, call, copy_place, digests, replaced, words_of
from hard.rows import AGAIN, CLAIMS, PREDICT, REPORT, SHRINK

pytestmark = [pytest.mark.slow(1), pytest.mark.xdist_group("hard disks")]
NEW = "run --method ft {common} --seed 8"
WRITERS = {"run": NEW, "go on": AGAIN, "report": REPORT, "claims": CLAIMS, "predict": PREDICT, "shrink": SHRINK,
           "export": "export --run {ft} --to out",
           "sweep": "sweep --method zs --grid seed=1 --benchmark my --model model"}


def whole(before, after):
    "Whether nothing of what was there has changed, but what is written on: logs, records of a run that goes on."
    return all(after.get(name) == content for name, content in before.items() if PLACES["begun"] not in name)


def refused(result, words):
    "One line that names the place and what is wrong."
    assert result.code == 2 and len(result.errors) == 1 and "Traceback" not in result.out + result.err, result
    assert any(word in result.errors[0] for word in words), result.errors


@contextlib.contextmanager
def small_files(size):
    "No file grows beyond so many bytes, as on a full disk."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", WRITERS)
def test_files_may_not_grow(name, place, tmp_path):
    "One line; what was there is there; the same command does its work once there is room."
    here = copy_place(place, tmp_path/"here")
    before = digests(here)
    with small_files(100): result = call(words_of(WRITERS[name]), here)
    refused(result, ("too large", "space", "write"))
    assert whole(before, digests(here))
    again = call(words_of(WRITERS[name]), here)
    assert again.code == 0, again.err


@contextlib.contextmanager
def mounted(folder, options):
    "A file system of one's own there; skips where it cannot be had."
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode: pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try: yield folder
    finally: subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("words", [f"{NEW} --out disk", f"{PREDICT} --out disk/p.tsv",
    "shrink --root my --out disk/small", "export --run {zs} --to disk/out"])
def test_a_full_disk(words, place, tmp_path):
    here = copy_place(place, tmp_path/"here")
    with mounted(here/"disk", "size=64k"):
        with pytest.raises(OSError), open(here/"disk"/"other", "wb", buffering=0) as file:
            while True: file.write(bytes(1000))
        size = (here/"disk"/"other").stat().st_size
        refused(call(words_of(words), here), ("disk",))
        assert (here/"disk"/"other").stat().st_size == size > 30_000
    assert call(words_of(words), here).code == 0


@pytest.mark.parametrize("words", [f"{NEW} --out disk", f"{PREDICT} --out disk/p.tsv",
    "shrink --root my --out disk/small", "export --run {zs} --to disk/out",
                                   f"{REPORT} --out disk/expt_logs"])
def test_a_disk_that_is_only_read(words, place, tmp_path):
    here = copy_place(place, tmp_path/"here")
    with mounted(here/"disk", "size=32m"):
        copy = subprocess.run(["cp", "-r", str(here/"expt_logs"), str(here/"disk")], capture_output=True)
        assert copy.returncode == 0
        remount = subprocess.run(["mount", "-o", "remount,ro", str(here/"disk")], capture_output=True)
        if remount.returncode: pytest.skip("no file system can be made read-only here")
        refused(call(words_of(words), here), ("disk",))


def no_locks(number):
    "What a file system without locks answers."
    def flock(*_): raise OSError(number, os.strerror(number))
    return replaced(fcntl, flock=flock)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_disk_without_locks(number, place, tmp_path):
    "The run is made all the same, or refused in one line that says why; reading needs no lock."
    here = copy_place(place, tmp_path/"here")
    with no_locks(number):
        result = call(words_of(NEW), here)
        if result.code: refused(result, ("lock", "file system"))
        assert call(words_of(REPORT), here).code == 0
    assert call(words_of(NEW), here).code == 0


# ---- streams

def carot(shell, folder):
    "A line of a shell in which `carot` is this one; its code and stderr."
    line = shell.replace("carot", f"'{sys.executable}' -m carot", 1)
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], cwd=folder, capture_output=True, text=True,
        timeout=300)
    return done.returncode, done.stderr


def test_streams_that_are_closed(tmp_path):
    "A reader that has enough is no error; a closed stream costs no traceback."
    for line in ("carot --help | head -1", "carot --help >&-", "carot --help 2>&-", "carot reprodcue 2>&-"):
        code, err = carot(line, tmp_path)
        assert "Traceback" not in err and "Exception" not in err, (line, err)
        assert code in ((2,) if "reprodcue" in line else (0, 2, 141)), (line, code, err)
    if Path("/dev/full").is_char_device():
        for unbuffered, words in (("", "--help"), ("1", "--help"), ("1", "run --help"), ("1", "--version")):
            line = f"export PYTHONUNBUFFERED={unbuffered}; carot {words} > /dev/full"
            code, err = carot(line, tmp_path)
            assert code == 2 and err.startswith("carot: error: standard output: No space"), (line, code, err)
            assert err.count("\n") == 1, (line, err)
