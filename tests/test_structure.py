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
NOTEBOOKS = [f for f in sorted(ROOT.glob("nbs/**/*.ipynb")) if not {".ipynb_checkpoints", "_proc"} & set(f.parts)]
CHAPTERS = [f for f in NOTEBOOKS if f.parent.name not in ("nbs", "runs", "tutorials")]

FLOORS = [  # a module may import those of its own floor and of the floors before
    ["carot.core", "carot.losses"],
    ["carot.config", "carot.data", "carot.calibration"],
    ["carot.clip"],
    ["carot.methods"],
    ["carot.engine"],
    ["carot.benchmarks", "carot.train", "carot.evaluate"],
    ["carot.runs"],
    ["carot.predict"],
    ["carot.analysis", "carot.commands", "carot.cli", "carot.__main__"],
]
LIGHT = ["core", "config", "data", "methods.base", "methods.probe", "methods.head", "methods.flyp", "methods.carot",
         *(f"benchmarks.{name}" for name in "glyphs plain_glyphs handwriting folders imagenet files inspect published".split()),
         "runs.settings", "commands", "cli"]
HEAVY = ["torch", "torchvision", "open_clip", "matplotlib", "papermill", "accelerate"]


def floor(module):
    found = [n for n, parts in enumerate(FLOORS) if any(module == part or module.startswith(f"{part}.") for part in parts)]
    return found[0] if found else None


def absolute(module, node):
    "The module that `from … import` names."
    package = module.split(".") if MODULES[module].name == "__init__.py" else module.split(".")[:-1]
    return ".".join([*package[:len(package) - node.level + 1], *([node.module] if node.module else [])]) if node.level else node.module


def named(module):
    "Names of carot's modules in the code of a module: imported anywhere, lazily too, or spelt in a text."
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom):
            base = absolute(module, node) or ""
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import): yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("lazy", "import_module") and node.args:
            if isinstance(node.args[0], ast.Constant): yield node.args[0].value
            elif isinstance(node.args[0], ast.JoinedStr): yield from spelt(node.args[0])


def spelt(text):
    "The modules that an f-string may mean: all of a package, if it begins with one."
    start = text.values[0].value if isinstance(text.values[0], ast.Constant) else ""
    return [name for name in MODULES if start.startswith("carot.") and start not in ("carot.methods.", "carot.benchmarks.")
            and name.startswith(start)]  # those two are looked through for methods and benchmarks


IMPORTS = {module: {name for name in named(module) if name in MODULES and name not in ("carot", module)
                    and MODULES[name].name != "__init__.py"} for module in MODULES}


def test_every_module_has_a_floor():
    assert not [m for m, file in MODULES.items() if floor(m) is None and file.name != "__init__.py"]


def test_nothing_is_imported_against_the_direction():
    assert not [f"{module} imports {name}" for module, names in IMPORTS.items() for name in sorted(names)
                if floor(module) is not None and floor(name) > floor(module)]


def test_imports_go_in_no_circle():
    "`carot.methods.base` and `carot.data` look through a package for what is there: that is not an import of any of it."
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module):], module])
        if module in done: return
        path.append(module)
        for name in sorted(IMPORTS[module]): visit(name)
        done.add(path.pop())
    for module in MODULES: visit(module)


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
    "No public name is also a module or a command (but `reproduce`, which is what the command does), and none says nothing."
    from carot.cli import COMMANDS
    taken = {name.rpartition(".")[2] for name in MODULES} | set(COMMANDS) - {"reproduce"} | {"first", "key", "full", "rows", "everybodys"}
    lazily = {"torch", "pd", "plt", "np"}
    found = [f"{module}.{name}" for module in MODULES for name in public(module) if name in taken - lazily]
    stand_ins = [f"{module}.{node.id}" for module, tree in TREES.items() for node in lazy_names(tree)]
    assert not sorted(set(found) - set(stand_ins))


def lazy_names(tree):
    "Names of modules that are imported when they are used."
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(getattr(getattr(n, "func", None), "id", "") == "lazy" for n in ast.walk(node.value)):
            yield from (n for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name))


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
        body = ast.parse("\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in text.splitlines())).body
        imports = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
        others = [node for node in body if not isinstance(node, (ast.Import, ast.ImportFrom)) and not is_import_block(node)]
        assert not (imports and others), text


def is_import_block(node):
    "`if TYPE_CHECKING: import …` and `try: import …`."
    return isinstance(node, (ast.If, ast.Try)) and any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in node.body)


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
        print(f"\n{len(found)} functions: median {statistics.median(lengths):g} lines, longest {found[0][0]} ({found[0][1]})")
    assert found[0][0] <= 60 and statistics.median(lengths) <= 8, found[:10]


@pytest.mark.parametrize("file", CHAPTERS, ids=lambda file: str(file.relative_to(ROOT)))
def test_exported_cells_are_short(file):
    exported = [source(cell) for cell in cells(file) if source(cell).startswith("#| export")]
    longest = max(exported, key=lambda text: text.count("\n"))
    assert longest.count("\n") <= 60, longest.splitlines()[1]
