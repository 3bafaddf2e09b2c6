"""Configures the site, `sphinx-build -W docs build/site`: guides, notebook, and a reference from the docstrings.

The site loads nothing from other hosts: formulas are MathML, and fonts those of the reader.
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
nitpicky = True  # a reference without a target is a warning, and CI fails on warnings
default_role = "code"  # single backticks in docstrings are code, as in Markdown

# The docstrings give shapes and dtypes, so types are not shown.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autosummary_generate = False
napoleon_use_param = False  # one table of arguments, in which `mean, var` may share a row
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style")]
add_module_names = False

# The build runs the notebook, so that its outputs are those of this version.
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
html_show_copyright = False  # it is in LICENSE
