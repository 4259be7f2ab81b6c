"""The documentation as a site: ``make docs``."""

import argparse
import os
import re

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

import flowmo
from flowmo.cli import build_parser

project = "FlowMo"
author = "the FlowMo developers"
release = version = flowmo.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
# Pages are read on code hosts as well, where links lead to files beside the documentation; tests check those.
suppress_warnings = ["myst.xref_missing"]
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_use_ivar = True

html_theme = "furo"
html_title = "FlowMo"
html_show_sphinx = False
html_copy_source = False


class CommandLine(SphinxDirective):
    """What every command says with ``--help``."""

    def run(self):
        os.environ["COLUMNS"] = "82"  # what fits beside the list of contents
        sections = []
        for name, parser in commands(build_parser()):
            section = nodes.section(ids=[name.replace(" ", "-")])
            section += nodes.title(text=name)
            section += nodes.literal_block(text=parser.format_help(), language="text")
            sections.append(section)
        return sections


def commands(parser):
    """Every command of a parser with its own, those of groups of commands too."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                inner = list(commands(sub))
                yield from inner or [(sub.prog, sub)]


def links_from_here(app, path, page, content):
    """Make the links of an included file, which is the README, relative to this folder."""
    content[0] = re.sub(r"\]\((?!https:|#)", f"]({path.parent}/", content[0])


def setup(app):
    app.add_directive("command-line", CommandLine)
    app.connect("include-read", links_from_here)
