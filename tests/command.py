"""The command `carot` in a process of its own: forked where the fixture `warm` is asked for, else a fresh one."""
import os
import subprocess
from contextlib import chdir
from tempfile import TemporaryFile

from carot.engine.warm import popen

MAIN = "import sys\nfrom carot.__main__ import main\nsys.exit(main())"


class Command:
    "One that has been given in a folder."
    def __init__(self, *words, cwd, code=MAIN, **environment):
        self.words, self.out, self.err = list(map(str, words)), TemporaryFile(), TemporaryFile()
        files = self.out.fileno(), self.err.fileno()
        with chdir(cwd): self.process = popen([code, *self.words], os.environ | environment, *files)

    def end(self, timeout=300):
        "Waits for its end: its `returncode`, `stdout` and `stderr`."
        try: code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return subprocess.CompletedProcess(self.words, code, read(self.out), read(self.err))


def read(file):
    "All that was written to a temporary file, which goes."
    with file:
        file.seek(0)
        return file.read().decode(errors="replace")


def carot(*words, cwd, **environment):
    "Gives the command, and waits for its end."
    return Command(*words, cwd=cwd, **environment).end()
