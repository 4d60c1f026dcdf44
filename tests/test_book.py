"The notebooks as `carot notebooks` copies them, from the clone; from a wheel: `test_from_a_wheel_outside_the_clone`."
import json
import os
import re
from pathlib import Path

import nbformat
import pytest

from carot.core import UserError, shipped
from carot.runs.book import book_files, copy_notebooks, with_outer_links

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("book")
    told = copy_notebooks(folder)
    return folder, told


def content(folder): return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_all_notebooks_are_copied_and_the_first_is_named(copied):
    folder, told = copied
    names = {file.relative_to(shipped("nbs")) for file in book_files()}
    assert {file.relative_to(folder) for file in content(folder)} == names and len(names) > 80
    assert told.splitlines()[-1].endswith(f"jupyter lab {folder/'index.ipynb'}")


def test_a_copy_is_the_notebook_without_outputs(copied):
    for file in book_files():
        text = (copied[0]/file.relative_to(shipped("nbs"))).read_text()
        found, notebook = nbformat.reads(text, 4), nbformat.read(file, 4)
        nbformat.validate(found)
        assert text == nbformat.writes(found) + "\n", "an editor would write it otherwise"
        assert [cell.id for cell in found.cells] == [cell.id for cell in notebook.cells]
        code = [cell for cell in found.cells if cell.cell_type == "code"]
        assert [c.source for c in code] == [c.source for c in notebook.cells if c.cell_type == "code"]
        assert not any(cell.outputs or cell.execution_count for cell in code)


def test_links_to_other_notebooks_hold_in_the_copy(copied):
    lost = []
    for file in content(copied[0]):
        text = "\n".join(cell.source for cell in nbformat.read(file, 4).cells if cell.cell_type == "markdown")
        links = re.findall(r"\]\((?![a-z]+:|#|\.\./\.\./\.\./|/)([^)\s#]+)", text)
        lost += [(file.name, link) for link in links if link.endswith(".ipynb") and not (file.parent/link).exists()]
    assert not lost


def test_links_out_of_the_book_get_an_address():
    def at(text, name="4_runs/x.ipynb"): return with_outer_links(text, name, "https://host/carot")
    assert at("[a](../../speed) and ![b](../../expt_logs/b.png)") \
        == "[a](https://host/carot/blob/HEAD/speed) and ![b](https://host/carot/raw/HEAD/expt_logs/b.png)"
    inner = " ".join(f"[a]({target})" for target in ("y.ipynb", "../1_method/", "#b", "https://b/c", "mailto:b"))
    assert at(inner) == inner
    assert with_outer_links("[a](../b.md)", "index.ipynb", "") == "[a](../b.md)"


def test_again_is_fine_until_something_was_changed(copied, tmp_path):
    copy_notebooks(tmp_path/"deep"/"book")
    before = content(tmp_path)
    one, other = tmp_path/"deep"/"book"/"00_tour.ipynb", tmp_path/"deep"/"book"/"runs"/"tune.ipynb"
    other.unlink()
    copy_notebooks(tmp_path/"deep"/"book")
    assert content(tmp_path) == before
    one.write_text(json.dumps(json.loads(one.read_text())))
    other.unlink()
    with pytest.raises(UserError, match=r"^\S*00_tour.ipynb would be overwritten .*: move it away"):
        copy_notebooks(tmp_path/"deep"/"book")
    assert not other.exists() and content(tmp_path)[one] != before[one]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path)])
def test_what_is_no_file_is_left_alone(make, tmp_path):
    make(tmp_path/"index.ipynb")
    with pytest.raises(UserError, match="index.ipynb would be overwritten"): copy_notebooks(tmp_path)
    assert os.listdir(tmp_path) == ["index.ipynb"]


def test_the_clone_keeps_its_own():
    before = content(ROOT/"nbs")
    with pytest.raises(UserError, match="would be overwritten"): copy_notebooks(ROOT/"nbs")
    assert content(ROOT/"nbs") == before


def test_the_pages_say_nothing_of_where_they_lie():
    "What a notebook reads of the repository, it asks `shipped` for: it works in any folder."
    for file in book_files():
        code = "\n".join(cell.source for cell in nbformat.read(file, 4).cells if cell.cell_type == "code")
        assert not re.search(r"""["'](\.\./)+(expt_logs|speed|nbs|docs|tests)/""", code), file
        assert "carot.__file__).parent.parent" not in code or file.name == "01_records.ipynb", file  # git's commit
