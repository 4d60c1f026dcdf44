"""Notebooks as pages: directives out, imports folded, a link to the module, pictures with their text and caption."""
import ast
import base64
import io
import re
from functools import cache
from pathlib import Path

import nbformat
from PIL import Image

from carot.analysis.figures import DPI
from carot.methods.base import all_methods
from carot.runs.book import book_files
from docs.sources import ROOT, Sources, relative, with_links

PARTS = {"1_method": "The method", "2_benchmarks": "Benchmarks", "3_engine": "The engine", "4_runs": "Runs",
         "5_analysis": "Analysis", "6_use": "Use"}  # folders of nbs/, as parts of the book
RESULTS = ROOT/"expt_logs"/"reference"
RECIPES = ["own_images", "reliability", "imagenet", "small_card", "eight_cards", "sweep", "cluster", "add_method",
           "public_code"]
OTHERS = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}
TABLE = re.compile(r"^\| method .*\n\|[-| ]+\n(?:\|.*\n?)+", re.M)  # whose first column is of methods
PROGRESS = re.compile(r"\d+%\|.*|\r")


def reports() -> dict[Path, str]:
    "Executed reports of the results in git -> their pages."
    return {f: f"results/{f.parts[-3]}.ipynb" for f in sorted(RESULTS.glob("*/report/report.ipynb"))}


@cache
def site() -> dict[Path, str]:
    "Which files of the repository are pages, and their names."
    chapters = {f: f.relative_to(ROOT/"nbs").as_posix() for f in book_files()}
    recipes = {ROOT/"docs"/"recipes"/f"{name}.md": f"recipes/{name}.md" for name in RECIPES}
    more = {ROOT/name: page for name, page in OTHERS.items()} | {ROOT/"README.md": "index.ipynb"}
    return {**chapters, **recipes, **reports(), **more}


def module_of(notebook) -> str | None:
    "The module that a chapter is exported to."
    found = re.search(r"^#\| *default_exp +(\S+)", "\n".join(cell.source for cell in notebook.cells), re.M)
    return f"carot.{found[1]}" if found else None


def directives(source: str) -> list[str]:
    "What nbdev is told about a cell."
    return [line[2:].split()[0] for line in source.splitlines() if re.match(r"#\| *\S", line)]


def is_import(node: ast.stmt) -> bool:
    "An import, or one in `if TYPE_CHECKING:`."
    if isinstance(node, ast.If): return all(is_import(n) for n in node.body)
    return isinstance(node, (ast.Import, ast.ImportFrom))


def only_imports(source: str) -> bool:
    "Whether a cell does nothing but import."
    try: body = ast.parse(source).body
    except SyntaxError: return False  # of magics
    return bool(body) and all(map(is_import, body))


def is_picture(output) -> bool:
    "Whether an output is shown as an image."
    kinds = set(output.get("data", {}))
    return bool(kinds & {"image/png", "image/jpeg", "image/svg+xml"}) and not kinds & {"text/html"}


def size_of(output) -> dict[str, str]:
    "How wide a picture of more pixels than usual is shown."
    if not (content := output.data.get("image/png")): return {}
    picture = Image.open(io.BytesIO(base64.b64decode(content)))
    dense = round(picture.info.get("dpi", (DPI,))[0] / DPI)
    return {"width": f"{picture.width // dense}px"} if dense > 1 else {}


def is_progress(output) -> bool:
    "Whether an output is a bar of progress."
    return output.output_type == "stream" and output.name == "stderr" and bool(PROGRESS.search(output.text))


def listed(value) -> list[str]:
    "A text for each picture of a cell."
    return [value] if isinstance(value, str) else list(value or [])


@cache
def method_pages() -> dict[str, str]:
    "What methods are called in tables -> their pages."
    return {method.title: f"methods/{name}.md" for name, method in all_methods().items()}


def with_methods(text: str, page: str) -> str:
    "Markdown whose tables of methods have a link to the page of each."
    def linked(row):
        target = method_pages().get(row[1])
        return f"| [{row[1]}]({relative(target, page)}) " if target else row[0]
    return TABLE.sub(lambda found: re.sub(r"^\| (\S[^|]*?) *(?=\|)", linked, found[0], flags=re.M), text)


def tidy(output, page: str):
    "A table whose corner is no heading, for those who have it read out; links from methods to their pages."
    data = output.get("data", {})
    if "text/html" in data: data["text/html"] = data["text/html"].replace("<th></th>", "<td></td>")
    if "text/markdown" in data: data["text/markdown"] = with_methods(data["text/markdown"], page)
    return output


def code_cells(cell, page: str) -> list:
    "A cell of code as the site shows it: one for each of its pictures, with alternative text and caption."
    found, source = directives(cell.source), re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
    if set(found) & {"default_exp", "hide"}: return []
    outputs = [tidy(output, page) for output in cell.outputs if not is_progress(output)]
    texts, captions = listed(cell.metadata.get("alt")), listed(cell.metadata.get("caption"))
    tags, made, rest = [], [], outputs
    if "remove_input" in cell.metadata.get("tags", []): tags.append("remove-input")  # as in the README
    elif only_imports(source): tags.append("hide-input")
    while True:
        cut = next((i + 1 for i, output in enumerate(rest) if is_picture(output)), len(rest))
        one = nbformat.v4.new_code_cell("" if made else source, outputs=rest[:cut], id=f"{cell.id}-{len(made)}")
        one.metadata = {"tags": ["remove-input"] if made else tags, "from_cell": cell.id, "mystnb": {}}
        if rest[:cut] and is_picture(rest[cut - 1]):
            one.metadata["mystnb"]["image"] = size_of(rest[cut - 1]) | ({"alt": texts.pop(0)} if texts else {})
            if captions: one.metadata["mystnb"]["figure"] = {"caption": captions.pop(0)}
        made.append(one)
        if not (rest := rest[cut:]): return made


def heading(module: str, page: str) -> str:
    "Below a chapter's summary: what it defines, and where that is described."
    return f"[`{module}`]({relative(f'api/{module}.md', page)}) is exported from this chapter."


def as_page(file: Path, page: str, sources: Sources, hide_code: bool = False) -> str:
    "A notebook as the site shows it."
    notebook, made = nbformat.read(file, 4), []
    module = module_of(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code": made += code_cells(cell, page); continue
        cell.metadata = {}
        cell.source = with_links(cell.source, file.parent, page, site(), sources)
        made.append(cell)
        if module:
            made.append(nbformat.v4.new_markdown_cell(heading(module, page), id="module"))
            module = None
    if hide_code:
        for cell in made:
            if cell.cell_type == "code": cell.metadata["tags"] = ["remove-input"]
    notebook.cells, notebook.nbformat_minor = made, 5
    notebook.metadata = {"kernelspec": notebook.metadata.kernelspec}
    return nbformat.writes(notebook)


def tree(caption: str, names: list[str], hidden: bool = True) -> str:
    "A part of the table of contents."
    lines = [f":caption: {caption}", ":maxdepth: 1", *([":hidden:"] if hidden else [])]
    return "\n".join(["```{toctree}", *lines, "", *(name.rpartition(".")[0] for name in names), "```"])


def contents() -> str:
    "The table of contents: the parts of the book in their order."
    pages = [site()[f] for f in book_files()]
    def under(folder): return [page for page in pages if page.startswith(f"{folder}/")]
    parts = {"Start": ["00_tour.ipynb", *under("tutorials")],
             "How do I …": [f"recipes/{name}.md" for name in RECIPES],
             **{title: under(folder) for folder, title in PARTS.items()},
             "Notebooks that run": under("runs"),
             "Results": ["results.ipynb", "methods/index.md", *reports().values()],
             "Reference": ["commands.md", "api/index.md", *OTHERS.values()]}
    return "\n\n".join(tree(title, names) for title, names in parts.items())


def write(sources: Sources) -> None:
    "Write a page for each notebook, report and text."
    pictured = pictures_of_run_notebooks()
    for file in book_files():
        page = site()[file]
        content = as_page(file, page, sources)
        if page == "index.ipynb":
            notebook = nbformat.reads(content, 4)
            notebook.cells.append(nbformat.v4.new_markdown_cell(contents(), id="contents"))
            content = nbformat.writes(notebook)
        sources.write(page, content)
    for file, page in reports().items(): sources.write(page, report_page(file, page, sources, pictured))
    for file, page in site().items():
        if file.suffix == ".md" and page != "index.ipynb":
            sources.write(page, with_links(file.read_text(encoding="utf-8"), file.parent, page, site(), sources))


def pictures_of_run_notebooks() -> dict[str, dict]:
    "What cells of nbs/runs/ say of their pictures, by the cell's id, which executing keeps."
    return {cell.id: {key: cell.metadata[key] for key in ("alt", "caption") if key in cell.metadata}
            for file in sorted((ROOT/"nbs"/"runs").glob("*.ipynb")) for cell in nbformat.read(file, 4).cells}


def report_page(file: Path, page: str, sources: Sources, pictured: dict[str, dict]) -> str:
    "The report of a benchmark, without its code."
    notebook, name = nbformat.reads(as_page(file, page, sources, hide_code=True), 4), file.parts[-3]
    for cell in notebook.cells:
        known = pictured.get(cell.metadata.get("from_cell"), {})
        if cell.cell_type != "code" or not any(map(is_picture, cell.outputs)): continue
        if known.get("alt"): cell.metadata["mystnb"]["image"]["alt"] = f"{name}: {listed(known['alt'])[0]}"
        if known.get("caption"): cell.metadata["mystnb"]["figure"] = {"caption": listed(known["caption"])[0]}
    title = next(cell for cell in notebook.cells if cell.cell_type == "markdown")
    title.source = re.sub(r"^# .*", f"# Report: {name}", title.source, count=1)
    return nbformat.writes(notebook)
