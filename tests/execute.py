"""Executes notebooks in place as they are committed: `python tests/execute.py nbs/1_method/04_losses.ipynb …`.

Each in a fresh kernel in its own folder, on one thread; pictures have twice the pixels that they are shown with. What
fails is left as it was."""
import os
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

SHARP = "--InlineBackend.figure_formats=retina"  # the inline backend's word for twice the pixels


def execute(file: Path) -> None:
    "One notebook. Raises `CellExecutionError`."
    notebook = nbformat.read(file, 4)
    NotebookClient(notebook, timeout=None, extra_arguments=[SHARP],
                   resources={"metadata": {"path": str(file.parent)}}).execute()
    nbformat.write(notebook, file)
    subprocess.run([Path(sys.executable).with_name("nbdev_clean"), "--fname", file], check=True)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.pop("MPLBACKEND", None)
    for file in map(Path, sys.argv[1:]):
        print(file, flush=True)
        try: execute(file.resolve())
        except CellExecutionError as error: sys.exit(f"{file}: {error}")
