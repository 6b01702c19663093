"""Settings of the site, which `make docs` builds."""

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring

sys.path.insert(0, str(Path(__file__).parent))

import generate

import ijepa_enhanced

project = "IJEPA-Enhanced"
author = "The IJEPA-Enhanced authors"
version = release = ijepa_enhanced.__version__
exclude_patterns = ["_build"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_inline_tabs"]
myst_enable_extensions = ["colon_fence"]  # GitHub shows the text between colons as Markdown
myst_heading_anchors = 4

default_role = "code"  # docstrings use single backticks, like Markdown
smartquotes_action = "D"  # only dashes
highlight_language = "text"
add_module_names = False  # headings already contain them
toc_object_entries_show_parents = "hide"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
python_maximum_signature_line_length = 80

html_theme = "furo"
html_title = project
html_show_sphinx = False
html_show_copyright = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]


def complete(app: Sphinx, page: str, source: list[str]) -> None:
    """Add the generated text to a page, and turn links to pages above this folder into links of the site."""
    generated = {"reference/cli": generate.command_line, "reference/configuration": generate.configuration}
    if page in generated:
        source[0] += "\n" + "\n".join(generated[page]())
    source[0] = re.sub(r"\.\./(CONTRIBUTING|CHANGELOG|SECURITY)\.md", lambda link: f"{link[1].lower()}.md", source[0])


def restructure(app: Sphinx, what: str, name: str, subject: object, options: object, lines: list[str]) -> None:
    """Turn a docstring in Google's style into reStructuredText."""
    if what not in ("attribute", "data"):  # Google's style would read a colon in prose as the end of a type
        lines[:] = GoogleDocstring(lines, Config(napoleon_use_rtype=False), app, what, name, subject).lines()
    lines[:] = [re.sub(r"docs/([\w/]+)\.md", r":doc:`\1 </\1>`", line) for line in lines]


def setup(app: Sphinx) -> None:
    """Register the functions that change pages and docstrings."""
    app.connect("source-read", complete)
    app.connect("autodoc-process-docstring", restructure)
