"""Settings of the documentation site (`make docs`): markdown, notebooks that are run, arguments from the code."""

import ast
import inspect
import textwrap
from typing import Any

from sphinx.application import Sphinx

project = "bioprop"
html_title = "bioprop"
html_theme = "furo"
html_theme_options = {"light_css_variables": {"color-brand-primary": "#0072B2", "color-brand-content": "#0072B2"}}

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["**/.ipynb_checkpoints"]

# links to headings, and mathematics between dollar signs, as code hosts show them
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]

# docstrings name other classes between single backticks
default_role = "py:obj"

# a cell that fails ends the build
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
# warnings of libraries about each other
nb_output_stderr = "remove"


def constructor_as_written(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    """Show a class with the arguments and defaults of its constructor, without types.

    ``__new__`` of algorithms takes any, and the value of a default would be an address where it is a function.
    """
    if what != "class":
        return None
    (constructor,) = ast.parse(textwrap.dedent(inspect.getsource(obj.__init__))).body
    assert isinstance(constructor, ast.FunctionDef)
    arguments = constructor.args
    for argument in [*arguments.args, *filter(None, [arguments.vararg, arguments.kwarg])]:
        argument.annotation = None
    del arguments.args[0]  # self
    return f"({ast.unparse(arguments)})", None


def setup(app: Sphinx) -> None:
    """Connect what is done to signatures."""
    app.connect("autodoc-process-signature", constructor_as_written)
