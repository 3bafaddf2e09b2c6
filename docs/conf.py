"""The site, `sphinx-build -W docs build/site`: the guides, the notebook, and a reference from the docstrings.

Nothing in it asks another host for anything: formulas are MathML, fonts those of the reader.
"""

import sys
from importlib import metadata
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "_sphinx"))

project = "bnjax"
author = "the bnjax authors"
release = version = metadata.version("bnjax")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_nb",
    "mathml",
    "reference",
    "repository",
]
exclude_patterns = ["_sphinx"]
nitpicky = True  # a reference that leads nowhere is a warning, and CI takes no warnings
default_role = "code"  # single backticks in docstrings are code, as in Markdown

# Docstrings: they say shapes and dtypes, which types cannot.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autosummary_generate = False
napoleon_use_param = False  # one table of arguments, `activation, residual` in one row
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style")]
add_module_names = False

# Guides and the notebook: the outputs are those of this very build.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_output_stderr = "error"
nb_merge_streams = True

html_theme = "furo"
html_title = "bnjax"
html_static_path = ["assets"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_copyright = False  # LICENSE says it
