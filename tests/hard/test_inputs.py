"""Every row of the table of bad inputs. By hand: `python tests/hard/again.py FOLDER "ROW"`."""
import fnmatch
import re
import shlex

import pytest
from hard.place import call, copy_place, digest_of_link, digests, with_places, words_of
from hard.rows import ROWS


def problems(row, before, after, result):
    "What is not as the row says, in words."
    yield from of_the_end(row, result)
    yield from of_the_words(row, result)
    new = [name for name in sorted(after.keys() - before.keys()) if not allowed(name, row.leaves)]
    other = [name for name in sorted(before) if after.get(name) != before[name] and not allowed(name, row.changes)]
    for what, names in (("left", new), ("changed or removed", other)):
        if names: yield f"{what} {len(names)}: {', '.join(map(repr, names[:3]))}"


def of_the_end(row, result):
    if result.code != row.code: yield f"ended with {result.code} instead of {row.code}"
    if "Traceback" in result.out + result.err: yield "a traceback"
    if any(name in result.out + result.err for name in ("Hangs", "hard/place.py")): yield "an inner matter"


def of_the_words(row, result):
    lines = result.errors
    several = "check" in row.words  # it looks at all sets, and names each that is not in order
    if len(lines) != bool(row.code) and not (several and row.code and lines): yield f"{len(lines)} lines of error"
    if any(len(line) > 600 for line in lines): yield "a line of more than 600 characters"
    said = "\n".join(lines) if row.code else result.out + result.err
    if not re.search(row.says, said): yield f"does not say {row.says!r}"
    strange = [line for line in shown(result) if not line.startswith("carot: ")]
    if strange: yield f"says {strange[:2]}"
    odd = [character for line in lines for character in line if not character.isprintable()]
    if odd: yield f"characters that are not printable: {odd}"


BAR = re.compile(r"[\w ]+: +\d+%\|.*/s\]$")

def shown(result):
    "The lines that a terminal shows of stderr, bars of progress left out."
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in result.err.split("\n")]
    return [line for line in lines if line.strip() and not BAR.match(line)]


def allowed(name, patterns):
    "Whether a path matches a pattern; its folder may be there, too."
    for pattern in patterns:
        pattern = with_places(pattern)
        if fnmatch.fnmatchcase(name, pattern.replace("[", "[[]")): return True
        if pattern.startswith(f"{name}/"): return True
    return False


def look(row, folder):
    "Makes the input in a folder, gives the command, and lists the problems."
    if row.make: row.make(folder)
    before = digests(folder, digest_of_link)
    result = call(words_of(row.words), folder, dict(row.env), row.encoding)
    return result, list(problems(row, before, digests(folder, digest_of_link), result))


def test_there_are_enough():
    names = [row.name for row in ROWS]
    assert len(ROWS) >= 200 and len(set(names)) == len(names), [name for name in names if names.count(name) > 1]


WHOLE = ("run", "report", "claims", "reproduce", "sweep")  # they take a second or so
BESIDE = "report beside "
SOME = ("no metrics", "cut metrics", "metrics of a set with markup", "metrics in a pipe", "a config of words",
        "cut predictions")  # beside which a report is always made

def param(row):
    "A row, marked if it is no matter of a moment, or one of many reports."
    slow, many = not row.code and words_of(row.words)[0] in WHOLE, row.name.startswith(BESIDE)
    long = many and row.name.removeprefix(BESIDE) not in SOME
    marks = [pytest.mark.slow(2)] * slow + [pytest.mark.long("25 s for 18 of 24 reports beside damaged files")] * long
    return pytest.param(row, id=row.name, marks=marks)


@pytest.mark.parametrize("row", map(param, ROWS))
def test_row(row, place, tmp_path):
    result, found = look(row, copy_place(place, tmp_path/"here"))
    assert not found, f"""{"; ".join(found)}
    to repeat: python tests/hard/again.py /tmp/again {shlex.quote(row.name)}
    command:   carot {shlex.join(words_of(row.words))[:300]!r}
    stderr:    {result.err[-800:]!r}
    stdout:    {result.out[-300:]!r}"""
