"""Sphinx's settings for the book; `python -m docs` writes the pages and calls it."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from docs.sources import repository, settings

project, author, copyright = settings()["title"], settings()["author"], settings()["copyright"]
version = release = settings()["version"]
language = "en"
extensions = ["myst_nb", "docs.extension"]
exclude_patterns = []
root_doc = "index"

nb_execution_mode = "off"  # outputs are those in git
nb_render_markdown_format = "myst"
nb_code_prompt_show, nb_code_prompt_hide = "Imports", "Imports"  # nothing else is folded
nb_ipywidgets_js = {}  # nothing from elsewhere
nb_mime_priority_overrides = [("html", "text/html", 0)]
myst_enable_extensions = ["dollarmath", "amsmath", "fieldlist", "colon_fence"]
myst_heading_anchors = 4
myst_dmath_allow_digits = False
html_math_renderer = "mathml"
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "sphinx_book_theme"
html_title = f"{project} {version}"
html_static_path = ["static"]
html_css_files, html_js_files = ["book.css"], ["book.js"]
html_favicon = "static/carot.svg"
html_context = {"default_mode": "auto"}
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "repository_url": repository(), "use_repository_button": True, "use_download_button": False,
    "use_fullscreen_button": False, "show_toc_level": 2, "home_page_in_toc": True, "navbar_persistent": [],
    "pygments_light_style": "a11y-high-contrast-light", "pygments_dark_style": "a11y-high-contrast-dark",
}
