"""Make README.md of nbs/index.ipynb."""
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import TagRemovePreprocessor

ROOT = Path(__file__).resolve().parent.parent
notebook = nbformat.read(ROOT/"nbs"/"index.ipynb", 4)
exporter = MarkdownExporter(preprocessors=[TagRemovePreprocessor(remove_input_tags={"remove_input"})])
text, _ = exporter.from_notebook_node(notebook)
text = re.sub(r"(\]\()\.\./", r"\1", text)  # links are relative to nbs/ there, to the top here
text = re.sub(r"(\]\()(?!https?:|[#/])((?:[\w-]+/)*[\w-]+\.ipynb)", r"\1nbs/\2", text)
text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
(ROOT/"README.md").write_text(text)
