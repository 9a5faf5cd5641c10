"""Equations of the documentation: a ``math`` block's LaTeX becomes MathML while the site is built.

Browsers typeset MathML themselves, so that the pages need no script and no network connection;
GitHub typesets the same blocks. mkdocs.yml names :func:`fence`. Needs the ``docs`` extra.
"""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert


def fence(source: str, *_: Any, **__: Any) -> str:
    """The HTML of a fenced ``math`` block.

    Args:
        source: LaTeX, without dollar signs.
    """
    return f'<div class="equation">{convert(source, display="block")}</div>'
