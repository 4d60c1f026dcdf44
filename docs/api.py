"""A page for each public module, from its source: signatures, comments of parameters, errors, the cell of each."""
import ast
import re
from dataclasses import dataclass, field
from functools import cache, cached_property

from carot.runs.settings import trailing_comments
from docs.sources import ROOT, Sources

CELL = re.compile(r"^# %% (?:\.\./)+nbs/(\S+)\.ipynb #(\S+)$")
LONGEST_VALUE = 160  # characters of a constant that are shown


@dataclass
class Module:
    "What a module says of itself."
    name: str  # "carot.losses"
    source: str
    tree: ast.Module = field(init=False)

    def __post_init__(self):
        self.tree, self.lines = ast.parse(self.source), self.source.splitlines()
        self.comments = trailing_comments(self.source)

    @cached_property
    def public(self) -> list[str]:
        "`__all__`, in the order of definition, without what is only a type variable."
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                known = set(ast.literal_eval(node.value)) - {"T", "F"}
                return [name for name in self.nodes if name in known]
        return []

    @cached_property
    def nodes(self) -> dict[str, ast.stmt]:
        "Definition of each name, the last of several."
        found = {}
        for node in self.tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)): found[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found[node.targets[0].id] = node
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name): found[node.target.id] = node
        return found

    def cell(self, node: ast.stmt) -> tuple[str, str] | None:
        "Chapter and id of the cell that a definition comes from."
        for line in reversed(self.lines[:node.lineno]):
            if found := CELL.match(line): return found[1], found[2]
        return None


@cache
def modules() -> dict[str, Module]:
    "All modules that are exported from chapters, by name."
    found = {}
    for file in sorted((ROOT/"carot").rglob("*.py")):
        if file.name.startswith("_") and file.name != "__main__.py": continue
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        module = Module(name, file.read_text(encoding="utf-8"))
        if module.public: found[name] = module
    return found


def plain(text: str) -> str:
    "A docstring or comment as Markdown: what is no code in backticks means itself."
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*_<$|\[\]\\])", r"\\\1", part) for part in parts)


def type_of(annotation: ast.expr) -> str:
    "A type as it is written, without the quotes of one that is defined later."
    text = ast.unparse(annotation)
    return text if "Literal" in text else text.replace("'", "")


def doc(node: ast.AST) -> str:
    "A docstring as Markdown."
    return plain(ast.get_docstring(node) or "")


def parameters(module: Module, node: ast.FunctionDef) -> list[tuple[str, str, str]]:
    "Name, type and trailing comment of each parameter."
    args = node.args
    every = [a for a in [*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg] if a]
    positional = [*args.posonlyargs, *args.args]
    values = dict(zip([a.arg for a in reversed(positional)], reversed(args.defaults)))
    values |= {a.arg: value for a, value in zip(args.kwonlyargs, args.kw_defaults) if value}
    lines, found = [a.lineno for a in every], []
    for a in every:
        if a.arg in ("self", "cls"): continue
        alone = lines.count(a.lineno) == 1 and a.lineno != node.lineno
        said = module.comments.get(values.get(a.arg, a).end_lineno, "") if alone else ""
        stars = "**" if a is args.kwarg else "*" if a is args.vararg else ""
        found.append((stars + a.arg, type_of(a.annotation) if a.annotation else "", said))
    return found


def fields_of(module: Module, node: ast.FunctionDef) -> list[str]:
    "Parameters, what is returned and which errors are raised that its own text does not name, as a list of fields."
    lines = []
    for name, kind, said in parameters(module, node):
        lines.append(f":param {name.replace('*', chr(92) + '*')}: {plain(said)}".rstrip())
        if kind: lines.append(f":type {name.replace('*', chr(92) + '*')}: `{kind}`")
    if node.returns and node.body[0].lineno > node.returns.end_lineno:
        if said := module.comments.get(node.returns.end_lineno): lines.append(f":returns: {plain(said)}")
    return lines + [f":raises {error}:" for error in raised(node) if error not in (ast.get_docstring(node) or "")]


def raised(node: ast.AST) -> list[str]:
    "The errors that a function raises itself; `unknown` makes one for a name."
    found = set()
    for inner in ast.walk(node):
        if not isinstance(inner, ast.Raise) or inner.exc is None: continue
        name = ast.unparse(inner.exc.func if isinstance(inner.exc, ast.Call) else inner.exc)
        found.add("UserError" if name == "unknown" else name)
    return sorted(name for name in found if re.fullmatch(r"[A-Z]\w+", name))


def directive(kind: str, head: str, body: list[str], options: tuple[str, ...] = ()) -> str:
    "A description of Sphinx's Python domain; its fence is longer than those inside."
    inside = [len(fence) for part in body for fence in re.findall(r"^`{3,}", part, re.M)]
    fence = "`" * (max([2, *inside]) + 1)
    return "\n".join([f"{fence}{{py:{kind}}} {head}", *options, "", *body, fence])


def source_line(module: Module, node: ast.stmt) -> str:
    "A link to the cell of the chapter."
    if not (found := module.cell(node)): return ""
    return f'\n<p class="from"><a href="../{found[0]}.html#cell-{found[1]}">in the chapter</a></p>\n'


def source(module: Module, node: ast.stmt) -> str:
    "The code of a function or class, folded."
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    code = "\n".join(module.lines[first - 1:node.end_lineno])
    fence = "`" * (max([2, *map(len, re.findall("`+", code))]) + 1)
    return f'<details class="source"><summary>source</summary>\n\n{fence}python\n{code}\n{fence}\n\n</details>\n'


def head_of(node: ast.FunctionDef, name: str) -> str:
    "Name, parameters and what is returned; without self, and without the types, which are in the list below."
    arguments = ast.parse(ast.unparse(node)).body[0].args
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg): argument.annotation = None
    arguments.defaults = [ast.Constant(...) if isinstance(value, ast.JoinedStr) else value
                          for value in arguments.defaults]
    arguments = re.sub(r"^(self|cls)(, )?", "", ast.unparse(arguments))
    return f"{name}({arguments})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")


def function(module: Module, node: ast.FunctionDef, name: str, kind: str = "function") -> str:
    "A function, a method or a property."
    decorators = {ast.unparse(d) for d in node.decorator_list}
    link = [source_line(module, node)] if kind == "function" else []
    if decorators & {"property", "cached_property"}:
        options = (f":type: {ast.unparse(node.returns)}",) if node.returns else ()
        return directive("property", name, [doc(node)], options)
    options = (":classmethod:",) if "classmethod" in decorators else ()
    code = [source(module, node)] if kind == "function" else []  # a method's is in that of its class
    return directive(kind, head_of(node, name), [doc(node), *link, "", *fields_of(module, node), "", *code], options)


def klass(module: Module, node: ast.ClassDef, name: str) -> str:
    "A class: its fields with their comments, and its methods that say what they do."
    made = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    body = [doc(node), source_line(module, node), *(fields_of(module, made) if made else []), ""]
    if node.bases: body.append("Of " + ", ".join(f"`{ast.unparse(base)}`" for base in node.bases) + ".\n")
    for inner in node.body:
        if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
            said = module.comments.get(inner.end_lineno, "") or help_of(inner)
            options = (f":type: {type_of(inner.annotation)}",)
            body.append(directive("attribute", inner.target.id, [plain(said)], options))
        elif isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_") and ast.get_docstring(inner):
            body.append(function(module, inner, inner.name, "method"))
    body.append(source(module, node))
    return directive("class", head_of(made, name) if made else name, body)


def help_of(node: ast.AnnAssign) -> str:
    "What a declared setting says of itself: `name: type = setting(default, help)`."
    value = node.value
    if not isinstance(value, ast.Call) or ast.unparse(value.func) != "setting" or len(value.args) < 2: return ""
    return value.args[1].value if isinstance(value.args[1], ast.Constant) else ""


def constant(module: Module, node: ast.stmt, name: str) -> str:
    "A constant with its value, or the beginning of it."
    value = ast.unparse(node.value) if node.value is not None else ""
    whole = len(value) <= LONGEST_VALUE
    shown = value if whole else f"{value[:LONGEST_VALUE]} …"
    said = module.comments.get(node.lineno, "")
    code = [f"```{'python' if whole else 'text'}", f"{name} = {shown}", "```"]
    return directive("data", name, [plain(said), "", source_line(module, node), *code])


def page(module: Module) -> str:
    "A module's page."
    parts = [f"# {module.name}\n", doc(module.tree) + "\n"]
    first = next((found for name in module.public if (found := module.cell(module.nodes[name]))), None)
    if first: parts.append(f"The chapter with formulas, examples and tests: [](../{first[0]}.ipynb).\n")
    parts.append(f"```{{py:module}} {module.name}\n```\n")
    for name in module.public:
        node = module.nodes[name]
        if isinstance(node, ast.ClassDef): parts.append(klass(module, node, name))
        elif isinstance(node, ast.FunctionDef): parts.append(function(module, node, name))
        else: parts.append(constant(module, node, name))
    return "\n".join(parts) + "\n"


def summary(module: Module) -> str:
    "The first line of what it says of itself."
    return (ast.get_docstring(module.tree) or "").partition("\n")[0]


def index() -> str:
    "All modules by part."
    rows = [f"| [`{name}`]({name}.md) | {summary(module)} |" for name, module in modules().items()]
    names = "\n".join(modules())
    return ("# The package\n\nEach module is exported from a chapter, which has its formulas, examples and tests.\n\n"
            "| module | is |\n|---|---|\n" + "\n".join(rows)
            + f"\n\n```{{toctree}}\n:hidden:\n:maxdepth: 1\n\n{names}\n```\n")


def write(sources: Sources) -> None:
    "Write a page for each module, and their index."
    for name, module in modules().items(): sources.write(f"api/{name}.md", page(module))
    sources.write("api/index.md", index())


@cache
def names() -> dict[str, list[str]]:
    "Public name -> modules that define it."
    found: dict[str, list[str]] = {}
    for name, module in modules().items():
        for one in module.public: found.setdefault(one, []).append(name)
    return found
