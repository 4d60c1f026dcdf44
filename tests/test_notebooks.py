"""The notebooks as files: executed, clean of errors and machine paths, parameter cells that papermill finds."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(f for f in [*ROOT.glob("nbs/**/*.ipynb"), *ROOT.glob("expt_logs/*/*/**/*.ipynb")] if ".ipynb_checkpoints" not in f.parts)
RUN_NOTEBOOKS = sorted(ROOT.glob("nbs/runs/*.ipynb"))
PARAMETERS = """benchmark root model pretrained method epochs batch_size micro_batch_size accumulation_steps lr weight_decay warmup_steps
label_smoothing orthogonality_coef cross_norm_coef distillation_coef teacher_update_every teacher_momentum_start teacher_momentum_end
teacher_warmup_fraction eval_sets eval_batch_size eval_every on_bad_image workers checkpoint_every checkpoint_minutes seed report_to
precision device threads out""".split()

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

@pytest.mark.parametrize("file", sorted(ROOT.glob("nbs/[0-9]*.ipynb")), ids=ids)
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
    for name, p in parameters.items(): assert p["inferred_type_name"] in ("int", "float", "str", "bool") and p["help"], name

def test_names_of_the_run_parameters():
    assert list(papermill.inspect_notebook(str(ROOT/"nbs/runs/fine_tune.ipynb"))) == PARAMETERS
