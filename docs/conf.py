"""Sphinx settings."""

import importlib.metadata

project = "jaxprune"
author = "The jaxprune authors"
copyright = author
release = importlib.metadata.version("jaxprune")
version = ".".join(release.split(".")[:2])

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
# Each notebook is there twice: as Markdown, which is built, and as Colab opens it.
exclude_patterns = ["_build", "notebooks/*.ipynb"]

# Notebooks are Markdown files without outputs: each build runs them.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_attr_annotations = False  # shapes such as *stack are no markup
# Fields of a NamedTuple are told once, in the docstring.
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80

html_theme = "sphinx_book_theme"
html_title = f"jaxprune {version}"
