"""A row of the table by hand: `python tests/hard/again.py FOLDER "NAME OF THE ROW"` makes its input in a new folder and
gives its command there; without a name it lists the rows."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hard.place import make_place, words_of
from hard.rows import ROWS
from hard.test_inputs import look


def main(folder=None, name=None):
    if name is None: return print(*(f"{row.code}  {row.name}" for row in ROWS), sep="\n")
    row = next(row for row in ROWS if row.name == name)
    result, found = look(row, make_place(folder))
    print(f"carot {words_of(row.words)}\n{result.out}\n{result.err}\nended with {result.code}")
    print(*(found or ["as the row says"]), sep="\n")
    return None


if __name__ == "__main__": main(*sys.argv[1:])
