"The house: which part may import which, what is imported when, and how long lines, functions and cells are."
import ast
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f
           for f in sorted(ROOT.glob("carot/**/*.py")) if f.name != "_modidx.py"}
TREES = {name: ast.parse(file.read_text()) for name, file in MODULES.items()}
NOTEBOOKS = [f for f in sorted(ROOT.glob("nbs/**/*.ipynb")) if ".ipynb_checkpoints" not in f.parts]

FLOORS = [  # a module may import those of its own floor and of the floors before
    ["carot.core", "carot.losses"],
    ["carot.config", "carot.data", "carot.calibration", "carot.conformal"],
    ["carot.clip", "carot.weights", "carot.teachers"],
    ["carot.methods"],
    ["carot.engine"],
    ["carot.benchmarks", "carot.train", "carot.evaluate"],
    ["carot.runs"],
    ["carot.predict"],
    ["carot.analysis", "carot.commands", "carot.export", "carot.translate", "carot.cli", "carot.__main__"],
]
METHODS = [f"methods.{file.stem}" for file in ROOT.glob("carot/methods/[!_]*.py")]
LIGHT = [*METHODS, *"""core config data conformal teachers
benchmarks.glyphs benchmarks.plain_glyphs benchmarks.handwriting benchmarks.folders benchmarks.imagenet benchmarks.files
benchmarks.inspect benchmarks.published benchmarks.corruptions
benchmarks.pairs engine.devices evaluate runs.settings runs.records runs.execute runs.jobs runs.sweeps analysis.tables
analysis.figures analysis.published analysis.rows analysis.effects analysis.bootstrap commands translate cli""".split()]
HEAVY = ["torch", "torchvision", "open_clip", "matplotlib", "pandas", "papermill", "accelerate"]


def floor(module):
    found = [n for n, parts in enumerate(FLOORS) for part in parts if f"{module}.".startswith(f"{part}.")]
    return found[0] if found else None


def absolute(module, node):
    "The module that `from … import` names."
    if not node.level: return node.module
    package = module.split(".") if MODULES[module].name == "__init__.py" else module.split(".")[:-1]
    return ".".join([*package[:len(package) - node.level + 1], *([node.module] if node.module else [])])


def named(module):
    "What a module imports: at the top, in functions, for type checkers, or when it is used."
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom):
            base = absolute(module, node) or ""
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import): yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("lazy", "import_module") and node.args:
            if isinstance(node.args[0], ast.Constant): yield node.args[0].value


PACKAGES = {name for name, file in MODULES.items() if file.name == "__init__.py"}
IMPORTS = {module: set(named(module)) & set(MODULES) - PACKAGES - {module} for module in set(MODULES) - PACKAGES}


def test_every_module_has_a_floor():
    assert not [module for module in IMPORTS if floor(module) is None]


def test_nothing_is_imported_against_the_direction():
    wrong = [(module, name) for module, names in IMPORTS.items() for name in names if floor(name) > floor(module)]
    assert not [f"{module} imports {name}" for module, name in sorted(wrong)]


def test_imports_go_in_no_circle():
    "What `carot.methods.base` and `carot.data` find by looking through a package is no import of theirs."
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module):], module])
        if module in done: return
        path.append(module)
        for name in sorted(IMPORTS[module]): visit(name)
        done.add(path.pop())
    for module in IMPORTS: visit(module)


def test_light_modules_are_light():
    code = f"""\
import sys, importlib
for name in {LIGHT!r}:
    importlib.import_module("carot." + name)
    heavy = [package for package in {HEAVY!r} if package in sys.modules]
    if heavy: sys.exit(f"carot.{{name}} imports {{', '.join(heavy)}}")"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def public(module):
    "What a module defines by a name without underscore."
    for node in TREES[module].body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name): yield target.id


def test_names():
    "No public name is also a module or a command (but `reproduce`, which is the command), and none says nothing."
    from carot.cli import COMMANDS
    taken = {name.rpartition(".")[2] for name in MODULES} | set(COMMANDS) - {"reproduce"}
    taken |= {"first", "key", "full", "rows", "everybodys"}
    found = {f"{module}.{name}" for module in MODULES for name in public(module) if name in taken}
    assert not sorted(found - {"carot.calibration.bootstrap"})  # a path that others rely on


def cells(notebook): return json.loads(notebook.read_text())["cells"]


def source(cell): return "".join(cell["source"])


FILES = [*NOTEBOOKS, *sorted(ROOT.glob("tests/*.py")), *sorted(ROOT.glob("speed/*.py")), ROOT/"setup.py"]

@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_line_is_over_120_columns(file):
    code = file.suffix == ".py"
    texts = [file.read_text()] if code else [source(cell) for cell in cells(file) if cell["cell_type"] == "code"]
    assert not [line for text in texts for line in text.splitlines() if len(line) > 120]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_and_code_are_in_separate_cells(file):
    "As nbdev asks: it executes cells with imports for the documentation."
    for cell in cells(file):
        text = source(cell)
        if cell["cell_type"] != "code" or "import" not in text: continue
        lines = ["" if line.lstrip().startswith(("%", "!")) else line for line in text.splitlines()]
        kinds = {is_import(node) for node in ast.parse("\n".join(lines)).body}
        assert len(kinds) < 2, text


def is_import(node):
    "An import, or one in `if TYPE_CHECKING:` or `try:`."
    inside = node.body if isinstance(node, (ast.If, ast.Try)) else [node]
    return any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in inside)


def functions():
    "Every function: its module, name and number of lines."
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield node.end_lineno - node.lineno + 1, f"{module}.{node.name}"


def test_functions_are_short(capsys):
    found = sorted(functions(), reverse=True)
    with capsys.disabled():
        lengths = [n for n, _ in found]
        median = statistics.median(lengths)
        print(f"\n{len(found)} functions: median {median:g} lines, longest {found[0][0]} ({found[0][1]})")
    assert found[0][0] <= 60 and median <= 8, found[:10]
