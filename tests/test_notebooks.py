"""The notebooks as files: executed, clean of errors and machine paths, parameter cells that papermill finds."""
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import hooks
import nbformat
import papermill
import pytest
from traitlets.config import Config

from carot.cli import command_options
from carot.runs.settings import notebook_parameters, parameters_cell

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(f for f in [*ROOT.glob("nbs/**/*.ipynb"), *ROOT.glob("expt_logs/reference/*/*/**/*.ipynb")]
                   if ".ipynb_checkpoints" not in f.parts)
CHAPTERS = sorted(f for f in ROOT.glob("nbs/[1-6]_*/**/*.ipynb") if ".ipynb_checkpoints" not in f.parts)
RUN_NOTEBOOKS = sorted(ROOT.glob("nbs/runs/*.ipynb"))
def ids(file): return str(file.relative_to(ROOT))

def body(cell): return re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()

@pytest.mark.parametrize("file", NOTEBOOKS, ids=ids)
def test_executed_without_errors_or_machine_paths(file):
    notebook = nbformat.read(file, 4)
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    assert notebook.metadata.kernelspec.language == "python"
    assert outputs, "not executed"
    assert not [o for o in outputs if o.output_type == "error"]
    text = file.read_text()
    for place in {str(ROOT), str(Path.home()), sys.prefix} - {"/"}: assert f"{place}/" not in text
    assert "papermill" not in notebook.metadata

@pytest.mark.parametrize("file", CHAPTERS, ids=ids)
def test_chapter_opens_with_title_and_summary(file):
    cells = nbformat.read(file, 4).cells
    assert cells[0].source.startswith("#| default_exp ")
    opening = next(c for c in cells if c.cell_type == "markdown").source.splitlines()
    assert opening[0].startswith("# ") and any(line.startswith("> ") for line in opening)
    exported = [c.source.count("\n") + 1 for c in cells if c.source.startswith("#| export")]
    assert max(exported) <= 80, "an exported cell is longer than a reader can take in"
    assert any("assert" in c.source for c in cells if c.cell_type == "code" and not c.source.startswith("#|"))

@pytest.mark.parametrize("file", RUN_NOTEBOOKS, ids=ids)
def test_parameters_are_typed_and_commented_and_survive_cleaning(file, tmp_path):
    shutil.copy(file, tmp_path/file.name)
    shutil.copy(ROOT/"settings.ini", tmp_path)
    subprocess.run([Path(sys.executable).parent/"nbdev_clean", "--fname", tmp_path/file.name], cwd=tmp_path, check=True)
    parameters = papermill.inspect_notebook(str(tmp_path/file.name))
    assert parameters
    for name, p in parameters.items():
        assert p["inferred_type_name"] in ("int", "float", "str", "bool") and p["help"], name

def test_the_run_notebook_has_the_declared_parameters():
    "Names, types, order and meaning; papermill reads them as we do."
    file = ROOT/"nbs"/"runs"/"fine_tune.ipynb"
    cell = next(cell for cell in nbformat.read(file, 4).cells if "parameters" in cell.metadata.get("tags", []))
    assert cell.source == parameters_cell()
    found = {name: (p["inferred_type_name"], p["help"]) for name, p in papermill.inspect_notebook(str(file)).items()}
    assert found == {name: (about.kind.__name__, about.help) for name, about in notebook_parameters(file).items()}

@pytest.mark.parametrize("file", RUN_NOTEBOOKS, ids=ids)
def test_parameters_are_read_as_papermill_reads_them(file):
    assert list(notebook_parameters(file)) == list(papermill.inspect_notebook(str(file)))

def test_the_tour_is_short_and_of_the_package():
    "Fifteen cells of code from images to a calibrated model."
    cells = [cell for cell in nbformat.read(ROOT/"nbs"/"00_tour.ipynb", 4).cells if cell.cell_type == "code"]
    assert len(cells) <= 20 and "carot" in cells[0].source

def test_the_comparison_notebook_and_the_command_are_one():
    "Parameters of `nbs/runs/reproduce.ipynb` are those of `carot reproduce`, with the same types."
    command = command_options("reproduce").known
    for name, about in notebook_parameters(ROOT/"nbs"/"runs"/"reproduce.ipynb").items():
        assert command[name].kind is about.kind, name

@pytest.mark.parametrize("file", [ROOT/"nbs"/"index.ipynb", ROOT/"nbs"/"runs"/"fine_tune.ipynb"], ids=ids)
def test_jupyterlab_saves_a_notebook_as_git_has_it(file, tmp_path):
    "After it was opened and run: what an editor notes in it is left out, tags and alternative texts are kept."
    shutil.copy(ROOT/"settings.ini", tmp_path)
    shutil.copy(file, tmp_path/"x.ipynb")
    notebook = nbformat.read(file, 4)
    for number, cell in enumerate(c for c in notebook.cells if c.cell_type == "code"):
        cell.execution_count, cell.metadata["execution"] = number, {"iopub.status.busy": "now"}
    notebook.metadata.kernelspec["display_name"], notebook.metadata["language_info"] = "Python 3", {"name": "python"}
    server = {"c": Config()}
    exec(hooks.HOOK, server)
    model, manager = {"type": "notebook", "content": notebook}, SimpleNamespace(root_dir=str(tmp_path))
    for path in ("/x.ipynb", "new.ipynb"):
        server["c"].ContentsManager.pre_save_hook(model=model, path=path, contents_manager=manager)
    assert nbformat.writes(notebook) + "\n" == file.read_text()

def test_hooks_are_installed_once_and_over_nobodys(tmp_path):
    config = tmp_path/"etc"/"jupyter_server_config.py"
    for _ in range(2): hooks.install_in_jupyter(config)
    assert config.read_text() == hooks.HOOK
    config.write_text("c.ContentsManager.pre_save_hook = mine\n")
    with pytest.raises(SystemExit, match="another pre_save_hook is there"): hooks.install_in_jupyter(config)
    assert config.read_text() == "c.ContentsManager.pre_save_hook = mine\n"
