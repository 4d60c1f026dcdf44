"""What the site adds to Sphinx: formulas as MathML, names as links to their description, anchors of cells."""
import hashlib
import html
import re
from functools import cache
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx import addnodes
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

from docs import api

UNKNOWN = {r"\arg": r"\operatorname{arg}", r"\big\lceil": r"\lceil", r"\big\rceil": r"\rceil"}  # to the converter
logger = logging.getLogger(__name__)
NAME = re.compile(r"(?:carot\.)?[A-Za-z_][\w.]*(?:\(\))?")
EVERYDAY = {"look", "tidy", "table", "wide", "names", "call", "answer", "listed", "page"}  # words before they are names


def formula(text: str, display: str = "inline") -> str:
    "LaTeX as MathML; a command that the converter does not know is a warning."
    for there, here in UNKNOWN.items(): text = text.replace(there, here)
    made = convert(text, display=display)
    if "\\" in made: logger.warning("a formula has a command that is not known: %s", text)
    return made


def visit_math(self, node: nodes.math) -> None:
    "A formula in a line."
    self.body.append(formula(node.astext()))
    raise nodes.SkipNode


def visit_math_block(self, node: nodes.math_block) -> None:
    "A formula of its own."
    self.body.append(f'<div class="formula">{formula(node.astext(), "block")}</div>\n')
    raise nodes.SkipNode


def inside(node: nodes.Node, kinds: tuple[type, ...]) -> bool:
    "Whether a node is part of another of some kinds."
    while node := node.parent:
        if isinstance(node, kinds): return True
    return False


class LinkNames(SphinxTransform):
    """Public names in backticks become links to their description: those of the page's own module first, then those
    that one module alone defines."""
    default_priority = 410

    def apply(self, **_) -> None:
        own = self.own_module()
        for literal in list(self.document.findall(nodes.literal)):
            if inside(literal, (addnodes.pending_xref, nodes.reference, nodes.title)): continue
            if target := self.target(literal.astext(), own):
                link = addnodes.pending_xref("", refdomain="py", reftype="obj", reftarget=target,
                                             refdoc=self.env.docname, refexplicit=True, refwarn=True)
                literal.replace_self(link)
                link += literal

    def own_module(self) -> str:
        "The module that this page describes or exports."
        name = self.env.docname
        if name.startswith("api/"): return name.removeprefix("api/")
        return exported().get(name, "")

    def target(self, text: str, own: str) -> str | None:
        "Full name of what is meant, if it is known and there is one only."
        if not NAME.fullmatch(text): return None
        name = text.removesuffix("()")
        if name in api.modules(): return name
        first, _, rest = name.removeprefix(f"{own}.").partition(".")
        modules = api.names().get(first, [])
        if "." in name and name.rpartition(".")[0] in api.modules():
            module, _, last = name.rpartition(".")
            return name if module in api.names().get(last, []) else None
        if rest or first in EVERYDAY and own not in modules: return None
        if own in modules: return f"{own}.{first}"
        return f"{modules[0]}.{first}" if len(modules) == 1 else None


@cache
def exported() -> dict[str, str]:
    "Page -> the module that is exported from it."
    found = {}
    for name, module in api.modules().items():
        for node in module.nodes.values():
            if cell := module.cell(node): found[cell[0]] = name
    return found


class AnchorCells(SphinxTransform):
    "Each cell can be linked to by its id."
    default_priority = 411

    def apply(self, **_) -> None:
        for container in self.document.findall(nodes.container):
            cell = container.get("cell_metadata", {}).get("from_cell")
            if cell and "remove-input" not in container["cell_metadata"].get("tags", []):
                container["ids"].append(f"cell-{cell}")


class NameCorners(SphinxTransform):
    "A head of a column that is empty gets a name for those who have tables read out."
    default_priority = 412

    def apply(self, **_) -> None:
        for head in self.document.findall(nodes.thead):
            for entry in head.findall(nodes.entry):
                if not entry.astext().strip():
                    entry.clear()
                    entry += nodes.paragraph("", "", nodes.inline("", "row", classes=["visually-hidden"]))


def title_of(app, page: str, template, context, doctree) -> None:
    "A description for search engines: the page's first paragraph."
    if doctree is None: return
    first = next((p.astext() for p in doctree.findall(nodes.paragraph)), "")
    context["metatags"] = context.get("metatags", "") + (
        f'<meta name="description" content="{html.escape(" ".join(first.split())[:200])}">')


def made_with() -> int:
    "Another number if this code or the public names are others: pages that were read before are read again."
    texts = [Path(__file__).read_bytes(), repr(sorted(api.names().items())).encode()]
    return int.from_bytes(hashlib.sha256(b"".join(texts)).digest()[:6])


def setup(app) -> dict:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.add_transform(LinkNames)
    app.add_transform(AnchorCells)
    app.add_transform(NameCorners)
    app.connect("html-page-context", title_of)
    return {"parallel_read_safe": True, "parallel_write_safe": True, "env_version": made_with()}
