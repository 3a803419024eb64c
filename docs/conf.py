"""The website: README.md, docs/ and the reference. ``make docs`` builds it; warnings are errors."""

import dataclasses
import enum
import inspect

from sphinx.ext.napoleon import Config, GoogleDocstring

import agent_r1

project = "Agent-R1"
version = release = agent_r1.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"

# Pages are built from the root of the repository, so that their links work as they do on GitHub.
root_doc = "README"
include_patterns = ["*.md", "docs/**", "tests/data/templates/README.md"]
exclude_patterns = [".*", "build", "runs", "web", "docs/results/*/table.md"]
myst_heading_anchors = 3
SECTIONS = {
    "Begin": ["install", "first_tool", "concepts", "reading_a_run", "not_learning"],
    "Environments": ["environments/own", "environments/README", "environments/*"],
    "How to": [
        "algorithms",
        "models",
        "memory_and_speed",
        "engines",
        "language",
        "comparisons",
        "trackers",
    ],
    "From elsewhere": ["coming_from"],
    "Reference": ["reference", "keys", "metrics", "runs", "architecture"],
    "Results": ["results/README", "results/*/*"],
}
PAGES = (
    "".join(
        f"\n```{{toctree}}\n:hidden:\n:glob:\n:caption: {caption}\n\n"
        + "".join(f"docs/{page}\n" for page in pages)
        + "```\n"
        for caption, pages in SECTIONS.items()
    )
    + """
```{toctree}
:hidden:
:caption: The project

CHANGELOG
CONTRIBUTING
tests/data/templates/README
```
"""
)

autodoc_default_options = {"members": True, "exclude-members": "model_config"}
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 88


def add_pages(app, name, source):
    if name == root_doc:
        source[0] += PAGES


def google_sections(app, what, name, obj, options, lines):
    """What napoleon does, but not to attributes, where it takes "what: why" for "type: what"."""
    if what not in ("attribute", "property", "data"):
        config = Config(napoleon_use_ivar=True)
        lines[:] = GoogleDocstring(lines, config, app, what, name, obj, options).lines()


def plain_signature(app, what, name, obj, options, signature, returns):
    """No types in the signatures of settings, where they are pydantic's inner ones; nothing that
    Python puts in the place of a signature.
    """
    if what != "class" or not signature:
        return None
    if issubclass(obj, enum.Enum) or getattr(obj, "_is_protocol", False):
        return "", None
    if not dataclasses.is_dataclass(obj):
        given = inspect.signature(obj).parameters.values()
        bare = [value.replace(annotation=value.empty) for value in given]
        signature = str(inspect.Signature(bare))
    return signature.replace("<factory>", "..."), returns


def setup(app):
    app.connect("source-read", add_pages)
    app.connect("autodoc-process-docstring", google_sections)
    app.connect("autodoc-process-signature", plain_signature)
