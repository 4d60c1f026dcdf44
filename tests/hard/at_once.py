"""Several commands at once, each in a process of its own with real files and locks:
`python tests/hard/at_once.py FOLDER 'report --benchmark my' 'predict …'` prints how each ended, as JSON."""
import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hard.place import call, words_of

USED = """carot.analysis.claims carot.analysis.figures carot.analysis.published carot.benchmarks.folders carot.commands
carot.predict carot.runs.check carot.runs.execute carot.runs.sweeps nbclient papermill pyarrow.parquet"""


def one(folder, command, write):
    "What a process does."
    try:
        result = call(words_of(command), folder)
        os.write(write, json.dumps([result.code, result.out[-2000:], result.err[-2000:]]).encode())
    finally: os._exit(0)


def begin(folder, command):
    "A process and the end of the pipe on which it tells how it ended."
    read, write = os.pipe()
    pid = os.fork()
    if not pid: one(folder, command, write)
    os.close(write)
    return pid, os.fdopen(read)


def main(folder, *commands):
    for name in USED.split(): import_module(name)  # once, before there are many
    begun = []
    for command in commands:
        seconds, _, rest = command.partition("s:")  # "0.5s:report": that much later
        if rest: time.sleep(float(seconds))
        begun.append(begin(folder, rest or command))
    ended = [json.loads(file.read() or "[-9, \"\", \"it died\"]") for _, file in begun]
    for pid, _ in begun: os.waitpid(pid, 0)
    print(json.dumps(ended))


if __name__ == "__main__": main(*sys.argv[1:])
