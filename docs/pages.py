"""Pages made from the package's own knowledge: one per method, and the options of each command."""
import re
from functools import cache

import pandas as pd

from carot.analysis.rows import TABLES, all_rows
from carot.analysis.tables import cells, markdown, table
from carot.benchmarks.published import COLUMNS, REMARKS, read_reported
from carot.calibration import find_metric
from carot.cli import COMMANDS, REQUIRED, command_options
from carot.config import Setting
from carot.methods.base import Method, all_methods
from docs.api import modules, plain
from docs.chapters import reports
from docs.sources import Sources

BAR = re.compile(r"(?<!\\)\|")  # which ends a cell, unless it is escaped


def chapter_of(method: Method) -> tuple[str, str]:
    "Module and chapter that define a method."
    for name, module in modules().items():
        for node in module.nodes.values():
            text = "\n".join(module.lines[node.lineno - 1:node.end_lineno])
            if "= Method(" in text and f'"{method.name}"' in text: return name, module.cell(node)[0]
    raise LookupError(method.name)


def listing(rows, columns: list[str]) -> str:
    "A table whose cells are Markdown: code, links."
    lines = [columns, ["---"] * len(columns), *[[BAR.sub(r"\|", str(cell)) for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def settings_table(method: Method) -> str:
    "Every setting that it uses, with the default on ImageNet."
    rows = [(f"`{about.name}`", about.kind.__name__, "–" if about.default is None else f"`{about.default}`",
             plain(about.help)) for about in method.known.values()]
    return listing(rows, ["setting", "type", "default", "is"])


def published_rows(method: Method) -> str:
    "What was published of it: accuracy in %, and ECE as batched by the public code, as transcribed."
    found = read_reported()
    found = found[(found.method == method.name) & found.source.isin(TABLES)]
    if found.empty: return "None of the tables that were transcribed has a row of it.\n"
    sets, rows = found.columns.drop(["source", "method", "batch", "metric", "model"]), []
    names = {column: find_metric(name) for name, column in COLUMNS.items()}
    for _, row in found.iterrows():
        metric = names[row.metric]
        values = ["–" if row[name] != row[name] else metric.show(row[name]) for name in sets]
        rows.append([TABLES[row.source], row.model, row.batch, plain(metric.label), *values,
                     plain(REMARKS.get((row.source, row.method, row.batch), ""))])
    remarked, heads = any(row[-1] for row in rows), [name.removeprefix("ImageNet") or name for name in sets]
    return listing(rows if remarked else [row[:-1] for row in rows],
                   ["source", "model", "batch", "metric", *heads, *["remark"] * remarked])


def commands(method: Method) -> str:
    "What makes each of its rows."
    rows = [(row.table, row.name, row.model, f"`{row.command}`") for row in all_rows() if row.method == method.name]
    if not rows: return ""
    return listing(rows, ["table", "row", "model", "command"])


@cache
def kept_results() -> dict[str, pd.DataFrame]:
    "Results in git, by benchmark."
    files = {report.parts[-3]: report.parent/"results.tsv" for report in reports()}
    return {name: pd.read_csv(file, sep="\t", keep_default_na=False) for name, file in files.items() if file.exists()}


def own_results(method: Method) -> str:
    "Its rows of the tables in git, with a link to each report."
    parts = []
    for name, results in kept_results().items():
        results = results[results.method == method.name].assign(setting="")
        if results.empty: continue
        for metric in map(find_metric, ("accuracy", "ece")):
            shown = cells(table(results, metric), metric, bold=False).loc[[method.name]]  # of it alone
            seeds = f"mean over {n} seeds" if (n := results.seed.nunique()) > 1 else "one run"
            parts.append(f"{plain(metric.label)} on [{name}](../results/{name}.ipynb), {seeds}:\n\n"
                         f"{markdown(shown.reset_index(drop=True))}")
    return "\n\n".join(parts) or "No run of it is kept in git.\n"


def method_page(method: Method) -> str:
    "All that is known of a method."
    module, chapter = chapter_of(method)
    parts = [f"# {method.title}", f"> {plain(method.summary)}.",
             f"In commands: `{method.reference}`. The chapter with idea, formulas and a short run: "
             f"[](../{chapter}.ipynb); its code: [`{module}`](../api/{module}.md).",
             *(f"**{what.capitalize()}:** {plain(text)}" for what, text in method.notes.items()),
             "## Results on the benchmarks that come along", own_results(method),
             "## Published figures", "On ImageNet and its shifts, as transcribed. ECE is the public code's, per "
             "evaluation batch, which is biased upwards.", published_rows(method)]
    if text := commands(method): parts += ["## Commands of its rows", text]
    parts += ["## Settings", settings_table(method)]
    return "\n\n".join(parts) + "\n"


def methods_index() -> str:
    "All methods in the order of tables."
    rows = [(f"[{method.title}]({name}.md)", f"`{name}`", plain(method.summary), plain(method.source) or "–")
            for name, method in all_methods().items()]
    text = listing(rows, ["method", "in commands", "is", "published"])
    names = "\n".join(all_methods())
    return f"# Methods\n\nA page for each, made from what the method says of itself.\n\n{text}\n\n" \
           f"```{{toctree}}\n:hidden:\n:maxdepth: 1\n\n{names}\n```\n"


def default(about: Setting) -> str:
    "What an option is if it is not given."
    if about.default is REQUIRED: return "must be given"
    return "–" if about.default in (None, "") else f"`{about.default}`"


def commands_page() -> str:
    "Every command with its options."
    parts = ["# Commands\n", "`carot COMMAND --help` says the same in a terminal; with `--benchmark` and `--method`, "
             "what holds for these.\n"]
    for name, command in COMMANDS.items():
        known = command_options(name).known.values()
        rows = [(f"`--{about.name.replace('_', '-')}`", about.kind.__name__, default(about), plain(about.help))
                for about in known]
        word = f" [{command.spelt}]" if command.word == "notebook" else f" {command.spelt}" if command.word else ""
        usage = f"carot {name}{word} [--OPTION VALUE …]" + (f" -- {command.pattern}" if command.rest else "")
        parts += [f"## {name}\n", f"{plain(command.summary)}.\n", f"```sh\n{usage}\n```\n"]
        if rows: parts.append(listing(rows, ["option", "type", "default", "is"]) + "\n")
    return "\n".join(parts)


def write(sources: Sources) -> None:
    "Write the pages of methods and commands."
    for name, method in all_methods().items(): sources.write(f"methods/{name}.md", method_page(method))
    sources.write("methods/index.md", methods_index())
    sources.write("commands.md", commands_page())
