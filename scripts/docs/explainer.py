"""A hook of the documentation's site: the explainer is built into it, first in the navigation.

mkdocs.yml names this file. The page is that of ``sdconv explain-page``, at ``explainer/``.
"""

from __future__ import annotations

from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Link, Navigation

from sdconv.report.explainer.page import explainer

PATH = "explainer/index.html"
TITLE = "Moved by hand"


def on_files(files: Files, config: Any) -> Files:
    """Adds the page to the site's files."""
    files.append(File.generated(config, PATH, content=explainer()))
    return files


def on_nav(nav: Navigation, config: Any, files: Files) -> Navigation:
    """Puts its link in front of all others."""
    nav.items.insert(0, Link(TITLE, PATH))
    return nav
