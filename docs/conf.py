"""Settings of Sphinx: `make docs` builds these pages into build/docs, to be read without a network."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "distopt"
author = "the distopt authors"
copyright = author
release = version = installed_version("distopt")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "rendering", "generated"]
exclude_patterns = ["*.py"]
suppress_warnings = ["config.cache"]
nitpicky = False
default_role = "code"

html_theme = "furo"
html_title = "distopt"
html_show_sphinx = False
html_copy_source = False
html_math_renderer = "mathml"  # MathJax would be fetched from a CDN
html_static_path = ["_static"]
html_css_files = ["wide-tables.css"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4  # GitHub gives every heading an anchor, too
myst_links_external_new_tab = False

# Tutorials are Python files in cells. `make docs` runs them, `make docs EXECUTE=off` shows them without their output.
nb_custom_formats = {".py": ["rendering.read_tutorial", {}]}
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove"  # progress bars and warnings of other packages, with paths of the machine that built

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"show-inheritance": True}
autodoc_preserve_defaults = True
napoleon_custom_sections = ["Cost"]
napoleon_use_ivar = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
