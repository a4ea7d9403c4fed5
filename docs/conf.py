"""Builds the documentation: ``sphinx-build -W docs docs/_build``."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import reference  # noqa: E402 (beside this file)

import jaxpeft  # noqa: E402

project = "jaxpeft"
author = "the authors of jaxpeft"
copyright = "the authors of jaxpeft, Apache-2.0"
version = release = jaxpeft.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
default_role = "literal"  # `x` in docstrings
highlight_language = "none"

# Pages are Markdown. Their Python blocks run in the tests, so nothing runs here.
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"

# The reference is written out of the packages' own lists of public names.
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False

html_theme = "sphinx_book_theme"
html_title = "jaxpeft"
html_static_path = ["_static"]
html_css_files = ["jaxpeft.css"]
html_theme_options = {
    "home_page_in_toc": True,
    "show_navbar_depth": 1,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],
}


def setup(app):
    """Writes the reference's pages, and mends what Sphinx would misread."""
    app.connect("builder-inited", lambda app: reference.write(HERE / "api"))
    # Before napoleon, which has the usual place, 500.
    app.connect("autodoc-process-docstring", reference.as_written, priority=400)
    app.connect("autodoc-skip-member", reference.unwanted)
